"""The forget pack: a recipe's gate trained, calibrated, measured and stored with its forget spec, and read back."""

from __future__ import annotations

import contextlib
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecoprompt.benchmarks import GateData, parse_forget
from ecoprompt.forget import Forget, is_probability
from ecoprompt.gate import Gate, GateTexts, calibration_scores, conformal_threshold, hold_out, load_gate
from ecoprompt.models import out_of_reach
from ecoprompt.pressure import press
from ecoprompt.recipe import Calibration, CorruptionTable, GateTable, Recipe, TokensTable, digest, load_recipe, shipped
from ecoprompt.registry import EcopromptError, InputError, Progress, gates, nearest, quiet
from ecoprompt.results import write_text_atomic

PACK = "forget.toml"
OUTPUT = Path("results")
SPEC = ("tokens", "corruption")
EDITS = ("lower_case", "upper_case", "no_punctuation", "typos", "extra_spaces")
"""The pressures under which a pack's gate is measured; `evaluate` measures it under all (recipe `robustness`)."""


@dataclass(frozen=True)
class TrainedGate:
    """A gate, its threshold (a number by now), and how often it errs, one entry for each data set."""

    gate: Gate
    threshold: float
    measured: list[dict[str, Any]]


def train_classifier(recipe: Recipe, output: Path = OUTPUT, progress: Progress = quiet) -> tuple[Path, TrainedGate]:
    """Train (or load), calibrate and measure the recipe's gate, and write its forget pack; the folder and the gate."""
    folder = pack_folder(recipe, recipe.gate, recipe.seed, output)
    data = _gate_data(recipe)
    trained = _train(recipe.gate, data, recipe.seed, progress)
    save_pack(folder, recipe, trained, recipe.seed, digest(recipe.gate, recipe.seed, vars(data)))
    return folder, trained


def obtain_gate(
    recipe: Recipe, table: GateTable, seed: int, output: Path = OUTPUT, progress: Progress = quiet
) -> TrainedGate:
    """The gate that `table` describes: from the recipe's pack if it was trained on the same data in the same way, else
    trained, calibrated, measured and written there. A published classifier is loaded from where it is."""
    if table.parameters.get("classifier") is not None and not isinstance(table.threshold, Calibration):
        return TrainedGate(_make_gate(table, None, seed, progress), table.threshold, [])
    data = _gate_data(recipe)
    trained_on = digest(table, seed, vars(data))
    folder = pack_folder(recipe, table, seed, output)
    if (folder / PACK).is_file():
        try:
            stored = _read_pack(folder)
            if stored["trained"]["digest"] == trained_on:
                gate = load_gate(folder / "gate", stored["gate"]["kind"])
                trained = TrainedGate(gate, float(stored["gate"]["threshold"]), stored["measured"])
                if _spec(recipe) != {name: stored[name] for name in SPEC if name in stored}:
                    save_pack(folder, recipe, trained, seed, trained_on)
                return trained
        except (InputError, KeyError, TypeError):  # damaged, so it is made again
            pass
    trained = _train(table, data, seed, progress)
    with contextlib.suppress(PermissionError):  # a chat in a folder that cannot be written trains it each time
        save_pack(folder, recipe, trained, seed, trained_on)
    return trained


def pack_folder(recipe: Recipe, table: GateTable, seed: int, output: Path = OUTPUT) -> Path:
    """Where the pack of a recipe is written; a gate that a sweep changes has a folder of its own."""
    own = (table, seed) == (recipe.gate, recipe.seed)
    return output / recipe.name / ("pack" if own else f"pack-{digest(table, seed)}")


def _gate_data(recipe: Recipe) -> GateData:
    """The prompts to train, calibrate and measure a gate on."""
    if recipe.data is None:
        raise InputError(f"{recipe.name}: training, calibrating or measuring a gate needs [data] forget")
    benchmark, forget_set = parse_forget(recipe.data.forget)
    return benchmark.gate_texts(forget_set, Path(recipe.data.root) if recipe.data.root else None)


def _make_gate(table: GateTable, texts: GateTexts | None, seed: int, progress: Progress) -> Gate:
    gate: Gate = gates[table.kind](texts, seed, progress, **table.parameters)
    return gate


def _train(table: GateTable, data: GateData, seed: int, progress: Progress) -> TrainedGate:
    texts = GateTexts(data.positive, data.negative)
    held_out: list[str] = []
    if isinstance(table.threshold, Calibration):
        texts, held_out = hold_out(texts, table.threshold.held_out, seed)
        conformal_threshold(np.zeros(len(held_out)), table.threshold.false_positive_rate)  # too few? say so at once
    gate = _make_gate(table, texts, seed, progress)
    if isinstance(table.threshold, Calibration):
        scores = calibration_scores(gate, held_out, seed)
        threshold = conformal_threshold(scores, table.threshold.false_positive_rate)
    else:
        threshold = table.threshold
    sets: dict[str, tuple[list[str], int]] = {"forget set": (texts.positive, 1), "retain set": (texts.negative, 0)}
    if held_out:
        sets["retain set, held out"] = (held_out, 0)
    sets |= {name.replace("_", " "): check for name, check in data.checks.items()}
    edited = {name: [press(name, text, seed) for text in texts.positive] for name in EDITS}
    sets |= {f"forget set, {name.replace('_', ' ')}": (prompts, 1) for name, prompts in edited.items()}
    measured = []
    for number, (name, (prompts, label)) in enumerate(sets.items()):
        progress("measuring the gate", number, len(sets))
        flagged = int((np.asarray(gate.score(prompts)) > threshold).sum())
        errors = len(prompts) - flagged if label else flagged
        measured.append({"data": name, "flag": bool(label), "prompts": len(prompts), "errors": errors})
    return TrainedGate(gate, threshold, measured)


def save_pack(folder: Path, recipe: Recipe, trained: TrainedGate, seed: int, trained_on: str) -> None:
    """Write a forget pack: forget.toml and the gate's folder; whole or not at all, also when killed.

    `trained_on` is the digest of the gate's data and settings, by which it is known again.
    """
    import tomli_w

    document = {
        "format": 1,
        "seed": seed,
        "gate": {"kind": trained.gate.kind, "threshold": trained.threshold},
        **_spec(recipe),
        "trained": {"digest": trained_on, **({"forget": recipe.data.forget} if recipe.data else {})},
        "measured": trained.measured,
    }
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    trained.gate.save(beside / "gate")
    write_text_atomic(beside / PACK, tomli_w.dumps(document))
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # at once, where deleting it file by file could leave half a pack
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _spec(recipe: Recipe) -> Mapping[str, Any]:
    """What a pack takes over from its recipe as it stands there."""
    tables = recipe.document()
    return {name: tables[name] for name in SPEC if name in tables}


def _read_pack(folder: Path) -> dict[str, Any]:
    """The tables of a pack; raises InputError for one that is damaged."""
    path = folder / PACK
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a forget pack: {error}") from None
    if tables.get("format") != 1:
        raise InputError(f"{path}: found format {tables.get('format')!r}, expected 1")
    gate = tables.get("gate")
    if not isinstance(gate, dict) or not isinstance(gate.get("kind"), str):
        raise InputError(f"{path}: 'gate.kind': this key is needed")
    if not is_probability(gate.get("threshold")):
        raise InputError(f"{path}: 'gate.threshold': found {gate.get('threshold')!r}, expected a number from 0 to 1")
    return tables


def load_pack(folder: Path) -> Forget:
    """The forget spec in a pack; no code from it is run. Raises InputError for a pack that is damaged or incomplete."""
    tables = _read_pack(folder)
    if "corruption" not in tables:
        raise InputError(f"{folder / PACK}: no [corruption]; add one, with `method` and its parameters")
    gate = load_gate(folder / "gate", tables["gate"]["kind"])
    try:
        threshold, tokens = tables["gate"]["threshold"], tables.get("tokens", "all")
        return Forget(gate, tables["corruption"], threshold, tokens, tables.get("seed", 0))
    except InputError as error:
        raise InputError(*(f"{folder / PACK}: {problem}" for problem in error.problems)) from None


def make_forget(trained: TrainedGate, tokens: TokensTable, corruption: CorruptionTable, seed: int) -> Forget:
    """The forget spec of a recipe's tables."""
    return Forget(
        trained.gate,
        {"method": corruption.method, **corruption.parameters},
        trained.threshold,
        {"select": tokens.select, "scope": tokens.scope, **tokens.parameters},
        seed,
    )


def load_forget(reference: str, progress: Progress = quiet) -> Forget:
    """The forget spec of a pack folder, of a recipe (its gate is trained if it is not yet), or of a pack on the Hub."""
    folder = Path(reference)
    if folder.is_dir():
        if not (folder / PACK).is_file():
            raise InputError(f"{reference}: this folder holds no {PACK}, so it is not a forget pack")
        return load_pack(folder)
    if folder.is_file() or folder.suffix == ".toml" or "/" not in reference:
        if not folder.is_file() and folder.name.removesuffix(".toml") not in shipped():
            hint = nearest(folder.name.removesuffix(".toml"), shipped())
            raise InputError(f"'{reference}': no pack folder, recipe or Hub id to forget by; {hint}")
        recipe = load_recipe(reference)
        if recipe.corruption is None:
            raise InputError(f"{reference}: no [corruption], so there is nothing to guard with")
        trained = obtain_gate(recipe, recipe.gate, recipe.seed, progress=progress)
        return make_forget(trained, recipe.tokens, recipe.corruption, recipe.seed)
    return load_pack(_download(reference))


def _download(reference: str) -> Path:
    """A pack from the Hub, its text and safetensors files only."""
    reason = out_of_reach(reference, PACK)
    if reason is not None:
        raise EcopromptError(
            f"'{reference}': no such pack folder, and the Hub cannot be reached ({reason}); download the pack where "
            f"there is a network (`hf download {reference}`)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(reference, allow_patterns=["*.toml", "*.json", "*.safetensors", "*.txt"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise EcopromptError(f"'{reference}': no such pack folder, and not to be had from the Hub: {error}") from error
