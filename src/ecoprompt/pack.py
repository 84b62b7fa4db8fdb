"""The forget pack: a recipe's gate trained, calibrated, measured and stored with its forget spec, and read back."""

from __future__ import annotations

import errno
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecoprompt.benchmarks import parse_forget
from ecoprompt.calibration import calibration_scores, conformal_threshold, hold_out
from ecoprompt.card import tradeoff, write_card
from ecoprompt.data import told_together
from ecoprompt.files import CLASSIFIER, check_folder, read_toml, write_text_atomic, writing
from ecoprompt.forget import Forget, is_probability
from ecoprompt.gate import FORMAT, SETTINGS, WEIGHTS, Gate, load_gate
from ecoprompt.hub import HUB_ID, fetch
from ecoprompt.lessons import gate_sources
from ecoprompt.pressure import press
from ecoprompt.processes import is_main, main_first
from ecoprompt.recipe import Calibration, CorruptionTable, GateTable, Recipe, TokensTable, digest, load_recipe, shipped
from ecoprompt.registry import (
    EcopromptError,
    InputError,
    Progress,
    benchmarks,
    corruptions,
    gates,
    nearest,
    quiet,
)
from ecoprompt.sources import GateData, without_overlap

PACK = "forget.toml"
OUTPUT = Path("results")
SPACY = re.compile(r"[a-z]{2,3}_[a-z]+_[a-z]+_[a-z]+", re.ASCII)
"""What the names of spaCy's models look like: of other names, it would import a package."""
RETAIN_SET = "retain set"
FILES = (PACK, *(f"gate/{name}" for name in (SETTINGS, WEIGHTS, *CLASSIFIER)))
"""What is fetched of a pack on the Hub."""
SPEC = ("tokens", "corruption")
LEARNED = "learned"
"""The table of a pack that says how its corruption was found."""
ABOUT = ("trained", "tradeoff")
EDITS = ("lower_case", "upper_case", "no_punctuation", "typos", "extra_spaces")
"""The pressures under which a pack's gate is measured; `evaluate` measures it under all (recipe `robustness`)."""


@dataclass(frozen=True)
class TrainedGate:
    """A gate, its threshold (a number by now), and how often it errs, one entry for each data set."""

    gate: Gate
    threshold: float
    measured: list[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)
    """For the pack's card: how it was `trained`, and the `tradeoff` of its threshold."""


def train_classifier(recipe: Recipe, output: Path = OUTPUT, progress: Progress = quiet) -> tuple[Path, TrainedGate]:
    """Train (or load), calibrate and measure the recipe's gate, and write its forget pack; the folder and the gate."""
    recipe.enter()
    folder = pack_folder(recipe, recipe.gate, recipe.seed, output)
    data = _gate_data(recipe)
    trained = _train(recipe.gate, data, recipe.seed, progress)
    save_pack(folder, recipe, trained, recipe.seed, _trained_on(recipe.gate, recipe.seed, data))
    return folder, trained


def obtain_gate(
    recipe: Recipe, table: GateTable, seed: int, output: Path = OUTPUT, progress: Progress = quiet
) -> TrainedGate:
    """The gate that `table` describes: from the recipe's pack if it was trained on the same data in the same way, else
    trained, calibrated, measured and written there. A published classifier is loaded from where it is."""
    if is_published(table):
        assert not isinstance(table.threshold, Calibration)
        about = {"trained": {"settings": {"classifier": table.parameters["classifier"]}}}
        return TrainedGate(_make_gate(table, None, seed, progress), table.threshold, [], about)
    with main_first():
        return _stored_or_trained(recipe, table, seed, output, progress)


def _stored_or_trained(recipe: Recipe, table: GateTable, seed: int, output: Path, progress: Progress) -> TrainedGate:
    """The gate of the recipe's pack, trained if it is not there; other processes then find it there."""
    data = _gate_data(recipe)
    trained_on = _trained_on(table, seed, data)
    folder = pack_folder(recipe, table, seed, output)
    trained, tables = _stored(folder, trained_on) or (None, {})
    if trained is None:
        trained = _train(table, data, seed, progress)
    elif LEARNED in tables or (  # what was learned stays until it is searched or trained anew
        _spec(recipe.document()) == _spec(tables) and _reading(table).items() <= tables["gate"].items()
    ):
        return trained
    try:
        save_pack(folder, recipe, trained, seed, trained_on, table)
    except OSError as error:  # a chat in a folder that cannot be written trains the gate each time
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return trained


def _stored(folder: Path, trained_on: str) -> tuple[TrainedGate, dict[str, Any]] | None:
    """The gate in a pack and the pack's tables; None if it is not there, damaged or trained on something else."""
    try:
        tables = _read_pack(folder)
        if tables["trained"]["digest"] != trained_on:
            return None
        gate = load_gate(folder / "gate", tables["gate"]["kind"])
        about = {name: tables[name] for name in ABOUT}
        return TrainedGate(gate, float(tables["gate"]["threshold"]), tables["measured"], about), tables
    except (InputError, OSError, KeyError, TypeError):
        return None


def is_published(table: GateTable) -> bool:
    """Whether a gate is a classifier of others as it stands."""
    return table.parameters.get("classifier") is not None and not isinstance(table.threshold, Calibration)


def searched_by(recipe: Recipe) -> str:
    """A digest of all in a recipe that decides what a corruption scores in its search, and where the search starts."""
    tables = recipe.document()
    unimportant = ("batch_tokens", "device_map", "budget", "tolerance")
    model, optimize = (
        {key: value for key, value in tables.get(name, {}).items() if key not in unimportant}
        for name in ("model", "optimize")
    )
    parts = [tables.get(name) for name in ("corruption", "tokens", "gate", "seed")]
    limits = []
    for entry in recipe.evaluate:
        benchmark = benchmarks[entry.benchmark]
        columns = benchmark.forget_columns()
        if optimize.get("metric") in columns:
            subsets, _ = columns[optimize["metric"]]
            limits.append([benchmark.model_dump(mode="json"), {name: entry.limit_of(name) for name in subsets}])
    forget, retain = tables.get("data", {}).get("forget"), tables.get("run", {}).get("retain")
    return digest(model, optimize, limits, forget, retain, *parts)


def save_learned(
    recipe: Recipe, trained: TrainedGate, corruption: Mapping[str, Any], about: Mapping[str, Any], output: Path = OUTPUT
) -> Path:
    """Write a corruption that was learned, and how, into the recipe's pack; its folder."""
    import tomli_w

    folder = pack_folder(recipe, recipe.gate, recipe.seed, output)
    if not is_main():
        return folder
    if is_published(recipe.gate):  # which has no pack by itself, or one from a search with other tables
        save_pack(folder, recipe, trained, recipe.seed, "")
    document = _read_pack(folder) | {"corruption": dict(corruption), LEARNED: dict(about)}
    write_card(folder, _title(recipe), document)
    write_text_atomic(folder / PACK, tomli_w.dumps(document))
    return folder


def learned_corruption(recipe: Recipe, output: Path = OUTPUT) -> CorruptionTable | None:
    """The corruption that `optimize` found for just this recipe and wrote into its pack; None if there is none."""
    try:
        stored = _read_pack(pack_folder(recipe, recipe.gate, recipe.seed, output))
        if stored[LEARNED]["digest"] != searched_by(recipe):
            return None
        parameters = {**stored["corruption"]}
        method = parameters.pop("method")
        return CorruptionTable(method=method, parameters=corruptions.bind(method, parameters, "corruption"))
    except (EcopromptError, OSError, KeyError, TypeError):
        return None


def _reading(table: GateTable) -> dict[str, Any]:
    """How a gate is used, whatever it was trained on."""
    return table.model_dump(include={"context", "check"})


def _trained_on(table: GateTable, seed: int, data: GateData) -> str:
    """A digest of all that determines a gate and its threshold."""
    return digest(FORMAT, _training(table), seed, vars(data))


def _training(table: GateTable) -> dict[str, Any]:
    """What a gate is trained by, however it is used."""
    return table.model_dump(mode="json", exclude=set(_reading(table)))


def pack_folder(recipe: Recipe, table: GateTable, seed: int, output: Path = OUTPUT) -> Path:
    """Where the pack of a recipe is written; a gate that a sweep changes has a folder of its own."""
    own = (_training(table), seed) == (_training(recipe.gate), recipe.seed)
    return output / recipe.name / ("pack" if own else f"pack-{digest(_training(table), seed)}")


def _gate_data(recipe: Recipe) -> GateData:
    """The prompts to train, calibrate and measure a gate on."""
    table = recipe.subject()
    benchmark, forget_set = parse_forget(table.forget)
    with told_together(lambda: gate_sources(recipe), recipe.root):
        data = benchmark.gate_texts(forget_set, recipe.root)
        checks = dict(data.checks)
        for name in table.checks:
            checks |= benchmarks[name].gate_checks(None, recipe.root)
    return without_overlap(replace(data, checks=checks))


def _make_gate(table: GateTable, data: GateData | None, seed: int, progress: Progress) -> Gate:
    gate: Gate = gates[table.kind](data, seed, progress, **table.parameters)
    return gate


def _train(table: GateTable, data: GateData, seed: int, progress: Progress) -> TrainedGate:
    held_out: list[str] = []
    about: dict[str, Any] = {"settings": {k: v for k, v in table.parameters.items() if v is not None}}
    if isinstance(table.threshold, Calibration):
        data, held_out = hold_out(data, table.threshold.held_out, seed)
        conformal_threshold(np.zeros(len(held_out)), table.threshold.false_positive_rate)  # too few? say so at once
        about |= {"calibration": table.threshold.model_dump(), "held_out": len(held_out)}
    started = time.perf_counter()
    gate = _make_gate(table, data, seed, progress)
    about |= {"positive": len(data.positive), "negative": len(data.negative)}
    about["seconds"] = round(time.perf_counter() - started, 2)
    if isinstance(table.threshold, Calibration):
        calibrated_on = calibration_scores(gate, held_out, seed)
        threshold = conformal_threshold(calibrated_on, table.threshold.false_positive_rate)
        if threshold >= 1:
            raise InputError("'gate.threshold': calibrated to 1, which no score exceeds, so nothing would be flagged")
    else:
        threshold = table.threshold
    measured, scores = _measure(gate, threshold, _sets(data, held_out, seed), progress)
    return TrainedGate(gate, threshold, measured, {"trained": about, "tradeoff": tradeoff(scores, threshold)})


def _sets(data: GateData, held_out: list[str], seed: int) -> dict[str, tuple[list[str], int]]:
    """The sets of prompts that a gate is measured on, by name, each with its label."""
    sets: dict[str, tuple[list[str], int]] = {"forget set": (data.positive, 1), RETAIN_SET: (data.negative, 0)}
    if held_out:
        sets["retain set, held out"] = (held_out, 0)
    sets |= {name.replace("_", " "): check for name, check in data.checks.items()}
    for name in EDITS:
        sets[f"forget set, {name.replace('_', ' ')}"] = [press(name, text, seed) for text in data.positive], 1
    return sets


def _measure(
    gate: Gate, threshold: float, sets: Mapping[str, tuple[list[str], int]], progress: Progress
) -> tuple[list[dict[str, Any]], list[tuple[np.ndarray, int]]]:
    """How often a gate errs on each set; and the scores and label of each, without the retain set that it was taught
    if there is another set to let through."""
    measured, kept = [], []
    alone = sum(label == 0 for _, label in sets.values()) == 1
    for number, (name, (prompts, label)) in enumerate(sets.items()):
        progress("measuring the gate", number, len(sets))
        scores = np.asarray(gate.score(prompts), dtype=float)
        flagged = int((scores > threshold).sum())
        errors = len(prompts) - flagged if label else flagged
        measured.append({"data": name, "flag": bool(label), "prompts": len(prompts), "errors": errors})
        if name != RETAIN_SET or alone:
            kept.append((scores, label))
    return measured, kept


def save_pack(
    folder: Path, recipe: Recipe, trained: TrainedGate, seed: int, trained_on: str, table: GateTable | None = None
) -> None:
    """Write a forget pack: forget.toml and the gate's folder; whole or not at all, also when killed.

    `trained_on` is the digest of the gate's data and settings, by which it is known again; `table` is the gate's where
    a sweep changes it. Of the processes of a launcher, the main one alone writes.
    """
    if not is_main():
        return
    import tomli_w

    document = {
        "format": 1,
        "seed": seed,
        "gate": {"kind": trained.gate.kind, "threshold": trained.threshold, **_reading(table or recipe.gate)},
        **_spec(recipe.document()),
        "trained": {**trained.about.get("trained", {}), "digest": trained_on, **_subject(recipe)},
        "tradeoff": trained.about.get("tradeoff", {}),
        "measured": trained.measured,
    }
    if learned_corruption(recipe, folder.parents[1]) is not None and (table or recipe.gate) == recipe.gate:
        stored = _read_pack(folder)
        document |= {name: stored[name] for name in ("corruption", LEARNED)}
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    with writing(folder):
        trained.gate.save(beside / "gate")
    write_card(beside, _title(recipe), document)
    write_text_atomic(beside / PACK, tomli_w.dumps(document))
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # at once, where deleting it file by file could leave half a pack
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _title(recipe: Recipe) -> str:
    return f"{recipe.name}: {recipe.data.forget}" if recipe.data else recipe.name


def _subject(recipe: Recipe) -> dict[str, Any]:
    """What a recipe's pack forgets: the forget set, what prompts call it, and the data sets on the Hub behind it."""
    if recipe.data is None:
        return {}
    benchmark, forget_set = parse_forget(recipe.data.forget)
    known = [benchmark, *(benchmarks[name] for name in recipe.data.checks)]
    hubs = dict.fromkeys(hub for one in known for hub in one.gate_hubs())
    return {"forget": recipe.data.forget, "targets": list(forget_set.targets), "datasets": list(hubs)}


def _spec(tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a pack takes over from its recipe as it stands there."""
    return {name: tables[name] for name in SPEC if name in tables}


def _read_pack(folder: Path) -> dict[str, Any]:
    """The tables of a pack; raises InputError for one that is damaged."""
    path = folder / PACK
    check_folder(folder)
    tables = read_toml(path, "not a forget pack: ")
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
    tokens = tables.get("tokens", "all")
    model = tokens.get("model", "spacy/spacy") if isinstance(tokens, dict) else "spacy/spacy"
    if not isinstance(model, str) or not (HUB_ID.fullmatch(model) or SPACY.fullmatch(model)) or Path(model).exists():
        raise InputError(
            f"{folder / PACK}: 'tokens.model': found {model!r:.80}, expected a Hub id or a spaCy model's name"
        )
    gate = load_gate(folder / "gate", tables["gate"]["kind"])
    try:
        read = {name: tables["gate"][name] for name in ("threshold", "context", "check") if name in tables["gate"]}
        return Forget(gate, tables["corruption"], tokens=tokens, seed=tables.get("seed", 0), **read)
    except InputError as error:
        raise InputError(*(f"{folder / PACK}: {problem}" for problem in error.problems)) from None


def make_forget(
    trained: TrainedGate, gate: GateTable, tokens: TokensTable, corruption: CorruptionTable, seed: int
) -> Forget:
    """The forget spec of a recipe's tables."""
    return Forget(
        trained.gate,
        {"method": corruption.method, **corruption.parameters},
        trained.threshold,
        {"select": tokens.select, "scope": tokens.scope, **tokens.parameters},
        seed,
        **_reading(gate),
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
        learned = learned_corruption(recipe) if recipe.optimize else None
        return make_forget(trained, recipe.gate, recipe.tokens, learned or recipe.corruption, recipe.seed)
    try:
        fetched = fetch(f"the pack '{reference}'", reference, FILES, PACK)
    except EcopromptError as error:
        near = next(one for one in folder.parents if one.is_dir())
        here = [str(path.parent) for deep in ("", "*/", "*/*/") for path in near.glob(deep + PACK)]
        if near == Path() or not here:
            raise
        raise type(error)(f"{error}; {nearest(reference, here)}") from None
    return load_pack(fetched)
