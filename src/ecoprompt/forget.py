"""The forget spec (gate, token selector, corruption), what it decides of a prompt, and the pack that stores it."""

from __future__ import annotations

import hashlib
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ecoprompt.benchmarks import GateData, parse_forget
from ecoprompt.gate import Gate, GateTexts, conformal_threshold, hold_out, load_gate, small_edits
from ecoprompt.models import Turn, to_text, turns
from ecoprompt.recipe import Calibration, CorruptionTable, GateTable, Recipe, TokensTable, digest, load_recipe, shipped
from ecoprompt.registry import EcopromptError, InputError, Progress, corruptions, gates, nearest, quiet, selectors
from ecoprompt.results import write_text_atomic
from ecoprompt.tokens import mask

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


PACK = "forget.toml"
OUTPUT = Path("results")

Probabilities = Sequence[float] | np.ndarray


class Scorer(Protocol):
    """A gate's one duty: the probability, for each text, that it asks about what must be forgotten."""

    def score(self, texts: Sequence[str]) -> Probabilities: ...


@dataclass(frozen=True)
class _Callable:
    """Any function texts -> probabilities as a gate."""

    function: Callable[[list[str]], Probabilities]

    def score(self, texts: Sequence[str]) -> Probabilities:
        return self.function(list(texts))


@dataclass(frozen=True)
class Selection:
    """The tokens of one flagged turn that are corrupted: their positions, and the turn's token ids, which seed noise.

    Under scope `sequence` a given answer belongs to the turn, so each answer to a prompt gets noise of its own, as if
    it were drawn anew (the published code draws anew at every call; noise shared by the answers would not
    part the right one from the wrong ones).
    """

    positions: tuple[int, ...]
    seed_ids: tuple[int, ...]


@dataclass(frozen=True)
class Decision:
    """What the gate said of one prompt: its text, the highest score of its turns, and the positions corrupted.

    Positions count from the prompt's first token, padding left out. `turn_scores` are those of a conversation's turns
    in order, the latest last.
    """

    text: str
    score: float
    flagged: bool
    turn_scores: tuple[float, ...] = ()
    selections: tuple[Selection, ...] = field(default=(), repr=False)

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(sorted(position for selection in self.selections for position in selection.positions))


@dataclass(frozen=True)
class Forget:
    """A forget spec: who is flagged (`gate` above `threshold`), which tokens, and how they are corrupted.

    `gate` is a gate or any function texts -> probabilities. `tokens` is a token selector's name, or a table of
    `select`, `scope` and the selector's parameters; `corruption` is a table of `method` and its parameters. Raises
    InputError for a name or a parameter that does not exist.
    """

    gate: Scorer | Callable[[list[str]], Probabilities]
    corruption: Mapping[str, Any]
    threshold: float = 0.5
    tokens: str | Mapping[str, Any] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        tokens = {"select": self.tokens} if isinstance(self.tokens, str) else dict(self.tokens)
        scope, select = tokens.pop("scope", "prompt"), tokens.pop("select", "all")
        corruption = dict(self.corruption)
        if "method" not in corruption:
            raise InputError("'corruption.method': this key is needed")
        if scope not in ("prompt", "sequence"):
            raise InputError(f"'tokens.scope': found {scope!r}, expected 'prompt' or 'sequence'")
        method = corruption.pop("method")
        tokens = {"select": select, "scope": scope, **selectors.bind(select, tokens, "tokens")}
        object.__setattr__(self, "tokens", tokens)
        bound = corruptions.bind(method, corruption, "corruption")
        object.__setattr__(self, "corruption", {"method": method, **bound})
        if not hasattr(self.gate, "score"):
            object.__setattr__(self, "gate", _Callable(self.gate))

    def _check_types(self) -> None:
        problems = [
            f"'{name}': found {value!r}, expected {expected}"
            for name, value, expected, right in (
                ("gate", self.gate, "a gate or a function", hasattr(self.gate, "score") or callable(self.gate)),
                ("gate.threshold", self.threshold, "a number from 0 to 1", _is_probability(self.threshold)),
                ("tokens", self.tokens, "a name or a table", isinstance(self.tokens, (str, Mapping))),
                ("corruption", self.corruption, "a table", isinstance(self.corruption, Mapping)),
                ("seed", self.seed, "a whole number", type(self.seed) is int),
            )
            if not right
        ]
        if problems:
            raise InputError(*problems)

    @property
    def scope(self) -> str:
        assert isinstance(self.tokens, Mapping)
        return str(self.tokens["scope"])

    def decide(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> list[Decision]:
        """Gate prompts, given as token ids without padding, turn by turn; one call of the gate for all of them."""
        texts = [to_text(tokenizer, ids) for ids in prompts]
        said = [turns(tokenizer, text) for text, _ in texts]
        contents = list(dict.fromkeys(turn.content for row in said for turn in row))
        scores = dict(zip(contents, self.gate.score(contents), strict=True)) if contents else {}  # type: ignore[union-attr]
        decisions = []
        for ids, (text, offsets), row in zip(prompts, texts, said, strict=True):
            flagged = [turn for turn in row if not scores[turn.content] <= self.threshold]  # NaN is flagged
            heard = tuple(float(scores[turn.content]) for turn in row)
            picked = [self._select(text, offsets, ids, turn) for turn in flagged]
            decisions.append(Decision(text, max(heard, default=0.0), bool(flagged), heard, tuple(picked)))
        return decisions

    def extend(
        self, tokenizer: PreTrainedTokenizerBase, decision: Decision, ids: Sequence[int], prompt: int
    ) -> Decision:
        """The decision on a prompt (the first `prompt` of `ids`), carried over to the answer that follows it.

        Under scope `sequence` the answer's tokens, all but the last, belong to the prompt's last turn.
        """
        if self.scope == "prompt" or not decision.flagged or len(ids) == prompt:
            return decision
        text, offsets = to_text(tokenizer, ids)
        asked = turns(tokenizer, decision.text)
        asked[-1] = replace(asked[-1], end=len(text))
        scored = zip(asked, decision.turn_scores, strict=True)
        picked = [self._select(text, offsets, ids, turn) for turn, score in scored if not score <= self.threshold]
        return replace(decision, selections=tuple(picked))

    def _select(self, text: str, offsets: Sequence[tuple[int, int]], ids: Sequence[int], turn: Turn) -> Selection:
        """The tokens of one flagged turn that are corrupted; where the selector finds none, all of them.

        The last token never is: it is where the model starts to answer. A sole token is the exception.
        """
        assert isinstance(self.tokens, Mapping)
        inside = [number for number, (start, _) in enumerate(offsets) if turn.start <= start < turn.end]
        if turn.end >= len(text):  # special tokens at the very end may have no character of their own
            inside = [*inside, *range(inside[-1] + 1 if inside else 0, len(ids))]
        # A turn may begin inside a token of the one before; a turn without any token of its own corrupts that one.
        inside = inside or [n for n, (start, end) in enumerate(offsets) if start < turn.end and turn.start < end]
        inside = inside or list(range(len(ids)))
        most = [number for number in inside if number != len(ids) - 1] or inside
        parameters = {key: value for key, value in self.tokens.items() if key not in ("select", "scope")}
        shifted = [(offsets[number][0] - turn.start, offsets[number][1] - turn.start) for number in inside]
        chosen = mask(str(self.tokens["select"]), parameters, text[turn.start : turn.end], shifted)
        found = [number for number, hit in zip(inside, chosen, strict=True) if hit and number in set(most)]
        # White space at its end belongs to the turn only while it is the last one: noise must not change with that.
        seeding = [ids[number] for number in inside if text[offsets[number][0] : turn.end].strip()]
        return Selection(tuple(found or most), tuple(seeding))

    def corrupt(self, embeddings: Tensor, decision: Decision) -> Tensor:
        """A copy of one row's embeddings [T, D], padding left out, with the decision's positions corrupted.

        The noise of a turn is a function of (seed, the turn's tokens, corruption method) alone.
        """
        import torch

        parameters = {key: value for key, value in self.corruption.items() if key != "method"}
        method = corruptions[self.corruption["method"]]
        corrupted = embeddings.clone()
        for selection in decision.selections:
            generator = torch.Generator().manual_seed(self._noise_seed(selection.seed_ids))
            index = torch.tensor(selection.positions, dtype=torch.long, device=embeddings.device)
            corrupted[index] = method(embeddings[index], generator, **parameters)
        return corrupted

    def _noise_seed(self, ids: Sequence[int]) -> int:
        key = f"{self.seed}:{self.corruption['method']}:{','.join(map(str, ids))}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")

    def check_hidden_size(self, size: int) -> None:
        """Raises InputError if the corruption asks for more dimensions than the model has."""
        if (dims := self.corruption.get("dims", 0)) > size:
            raise InputError(f"'corruption.dims': found {dims}, expected at most the model's hidden size, {size}")


def _is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


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
                return TrainedGate(gate, float(stored["gate"]["threshold"]), stored["measured"])
        except (InputError, KeyError, TypeError):  # damaged, so it is made again
            pass
    trained = _train(table, data, seed, progress)
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
        threshold = conformal_threshold(gate.score(held_out), table.threshold.false_positive_rate)
    else:
        threshold = table.threshold
    sets: dict[str, tuple[list[str], int]] = {"forget set": (texts.positive, 1), "retain set": (texts.negative, 0)}
    if held_out:
        sets["retain set, held out"] = (held_out, 0)
    sets |= {name.replace("_", " "): check for name, check in data.checks.items()}
    edits = [small_edits(text, seed) for text in texts.positive]
    sets |= {f"forget set, {name.replace('_', ' ')}": ([edit[name] for edit in edits], 1) for name in edits[0]}
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

    tables = recipe.document()
    document = {
        "format": 1,
        "seed": seed,
        "gate": {"kind": trained.gate.kind, "threshold": trained.threshold},
        "tokens": tables["tokens"],
        **({"corruption": tables["corruption"]} if recipe.corruption is not None else {}),
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
    if not _is_probability(gate.get("threshold")):
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
            raise InputError(f"--forget {reference}: no pack folder, recipe or Hub id; {hint}")
        recipe = load_recipe(reference)
        if recipe.corruption is None:
            raise InputError(f"{reference}: no [corruption], so there is nothing to guard with")
        trained = obtain_gate(recipe, recipe.gate, recipe.seed, progress=progress)
        return make_forget(trained, recipe.tokens, recipe.corruption, recipe.seed)
    return load_pack(_download(reference))


def _download(reference: str) -> Path:
    """A pack from the Hub, its text and safetensors files only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(reference, allow_patterns=["*.toml", "*.json", "*.safetensors", "*.txt"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise EcopromptError(
            f"--forget {reference}: no such folder, and not to be had from the Hub: {error}"
        ) from error
