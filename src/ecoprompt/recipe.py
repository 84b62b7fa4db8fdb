"""The recipe: one TOML file for one experiment, read strictly, with `--set` and `[sweep]`."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from ecoprompt.checks import check_benchmarks, check_optimize, check_runs
from ecoprompt.files import read_toml
from ecoprompt.learning import BaselineTable, FinetuneTable, check_training
from ecoprompt.registry import (
    InputError,
    Registry,
    corruptions,
    describe,
    gates,
    methods,
    nearest,
    plugged,
    searches,
    selectors,
)
from ecoprompt.sources import Table
from ecoprompt.sweep import check_sweep, key_path, parse_override, points, set_key, with_swept


class ModelTable(Table):
    """How a model is loaded."""

    name: str | None = Field(None, description="alias, Hub id or folder of the model subject to unlearning")
    tokenizer: str | None = Field(None, description="folder or Hub id of the tokenizer, if it is not with the model")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and arithmetic; auto: bfloat16 on a GPU that has it, else float32"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="auto: flash-attn where it is installed and fits, else PyTorch's own"
    )
    device_map: str | None = Field(None, description='"auto" spreads a model over the GPUs of one process')
    quantization: Literal["8bit", "4bit"] | None = Field(None, description="by bitsandbytes (extra `quantization`)")
    chat_template: str | None = Field(
        None, description="a Jinja chat template, or the alias whose template is used, instead of the tokenizer's own"
    )
    batch_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="padded tokens that are scored at once, of generations twice as many; by itself: what fits the "
        "memory, at most 8192 on a CPU and 65536 on a GPU, halved when memory is out",
    )


class DataTable(Table):
    """What is to be forgotten, and where data is found."""

    forget: str = Field(description="benchmark and forget set, as in `tofu/forget10`; retain set and gate data follow")
    root: str | None = Field(None, description="folder of local copies of Hub data sets; default: $ECOPROMPT_DATA")
    checks: list[str] = Field([], description="further benchmarks whose prompts measure the gate, as in `general`")


class Calibration(Table):
    """How a gate's threshold is found on held-out prompts."""

    calibrate: Literal["conformal"] = Field(description="split-conformal")
    false_positive_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="the share of prompts that need not be forgotten which may be flagged"
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(0.25, description="share of the retain prompts held out")


class GateTable(Table):
    """The prompt classifier and its threshold; the other keys are the parameters of its kind."""

    kind: str = Field("linear", description="gate kind; `transformer` if `classifier` is given")
    threshold: Annotated[float, Field(ge=0, le=1)] | Calibration = Field(
        0.5, description="a prompt is flagged above it; or a table with `calibrate`"
    )
    context: Annotated[int, Field(ge=0)] = Field(
        4, description="how many turns before it a turn of a conversation is read with as well"
    )
    check: Literal["prompt", "answer"] = Field(
        "prompt", description="`answer`: a generated answer is read too, with its question, and made anew if flagged"
    )
    parameters: dict[str, Any] = {}


class TokensTable(Table):
    """The token selector; the other keys are its parameters."""

    select: str = Field("all", description="token selector")
    scope: Literal["prompt", "sequence"] = Field(
        "prompt", description="`sequence` corrupts a teacher-forced answer's tokens too, as the paper's tables need"
    )
    parameters: dict[str, Any] = {}


class CorruptionTable(Table):
    """The corruption; the other keys are its parameters."""

    method: str = Field(description="corruption function")
    parameters: dict[str, Any] = {}


class RunTable(Table):
    """One model in one state to evaluate."""

    model: str | None = Field(None, description="another model than `[model] name`")
    forget: bool = Field(False, description="attach the guard")
    prefix: str | None = Field(None, description="text put before every prompt; `{{ targets }}` names the forget set's")
    corruption: CorruptionTable | None = Field(None, description="another corruption than `[corruption]`")


class EvaluateTable(Table):
    """A benchmark to evaluate every run on."""

    benchmark: str = Field(description="name of the benchmark")
    limit: Annotated[int, Field(ge=1)] | dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        None, description="rows of a seeded sample, for every subset or by subset; default: all rows"
    )
    subsets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="those of the benchmark's subsets that are read; default: all"
    )

    def limit_of(self, subset: str) -> int | None:
        """How many rows of a subset are read at most; None for all."""
        return self.limit.get(subset) if isinstance(self.limit, dict) else self.limit


class OptimizeTable(Table):
    """The search for the corruption's strength or dims, from where `[corruption]` starts; the other keys are the
    parameters of its method."""

    metric: str = Field(description="a column of a benchmark's results for its forget set, as in `ks_statistic`")
    target: float | Literal["retain", "chance"] = Field(
        "retain", description="what the metric is to be: a number, what [run.retain] scores, or what chance does"
    )
    surrogate: str | None = Field(None, description="a model that stands for the retain model where there is none")
    parameter: Literal["strength", "dims"] = Field("strength", description="what of the corruption is searched for")
    vector: bool = Field(False, description="a strength of its own for each of the dimensions")
    bounds: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="the least and the most; by itself: strength 0.01 to 1000, dims 1 to the hidden size"
    )
    scale: Literal["log", "linear"] = Field("log", description="in which steps are alike")
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25,
        description="share of the forget set's rows that the search reads and `evaluate` leaves out; a `limit` counts "
        "on each side",
    )
    budget: Annotated[int, Field(ge=1)] = Field(16, description="evaluations of the metric at most")
    tolerance: Annotated[float, Field(ge=0)] = Field(0.01, description="how near the target is near enough")
    method: str = Field("adaptive", description="search method")
    parameters: dict[str, Any] = {}


class Recipe(Table):
    """One experiment. Every command reads its own tables of it."""

    name: str = Field(
        "", pattern=r"^([\w-][\w.-]*)?$", max_length=100, description="names the results; default: the file's name"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of samples, gate training and noise")
    model: ModelTable = ModelTable()
    data: DataTable | None = None
    gate: GateTable = GateTable()
    tokens: TokensTable = TokensTable()
    corruption: CorruptionTable | None = None
    optimize: OptimizeTable | None = None
    finetune: FinetuneTable | None = None
    baseline: BaselineTable | None = None
    run: dict[str, RunTable] = {}
    evaluate: list[EvaluateTable] = []
    benchmark: dict[str, dict[str, Any]] = Field({}, description="benchmarks of your own, by name")
    sweep: dict[str, Any] = Field({}, description="dotted key = list of values: one run for each combination")
    _written: dict[str, Any] = PrivateAttr(default_factory=dict)
    _base: Path = PrivateAttr(Path())

    def enter(self) -> None:
        """Make its own benchmarks those that are known, in place of those of a recipe that was read since."""
        from ecoprompt.own import declare_own

        declare_own({"benchmark": self.benchmark}, self._base)

    def subject(self) -> DataTable:
        """[data]; raises InputError where there is none."""
        if self.data is None:
            raise InputError(f"{self.name}: training, calibrating or measuring a gate needs [data] forget")
        return self.data

    @property
    def root(self) -> Path | None:
        """The folder of local data sets that [data] names."""
        return Path(self.data.root) if self.data and self.data.root else None

    def document(self) -> dict[str, Any]:
        """The recipe as the plain tables of a TOML file, every default filled in but those that depend on a sweep."""
        tables: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        for holder in (tables, *tables["run"].values()):
            holder |= {name: _flatten(holder[name]) for name in OPEN if name in holder}
        tables = {name: table for name, table in tables.items() if table not in ({}, [])}
        for path in map(key_path, self.sweep):
            if path[-2:-1] and path[-1] == OPEN.get(path[-2], ("",))[0]:  # the defaults are those of the function swept
                set_key(tables, path[:-1], functools.reduce(dict.__getitem__, path[:-1], self._written))
        return tables


# Tables whose remaining keys belong to a registered function: the key that names it, and where it is looked up.
OPEN: dict[str, tuple[str, Registry, type[BaseModel]]] = {
    "gate": ("kind", gates, GateTable),
    "tokens": ("select", selectors, TokensTable),
    "corruption": ("method", corruptions, CorruptionTable),
    "optimize": ("method", searches, OptimizeTable),
    "baseline": ("loss", methods, BaselineTable),
}


@dataclass(frozen=True)
class Run:
    """One run, resolved: what determines its results besides the data; `base` is its name in the recipe, and `point`
    the values in words, by key, of a sweep that changes it."""

    base: str
    model: ModelTable
    prefix: str | None = None
    seed: int | None = None
    gate: GateTable | None = None
    tokens: TokensTable | None = None
    corruption: CorruptionTable | None = None
    point: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its results are called, as in `eco[corruption.strength=5]`."""
        label = ",".join(f"{key}={value}" for key, value in self.point.items())
        return f"{self.base}[{label}]" if label else self.base

    @property
    def guarded(self) -> bool:
        return self.gate is not None


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that stand for `parts` in canonical JSON (tables are dumped), and for plug-ins
    that they name."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    document = json.dumps(plain, sort_keys=True)
    return hashlib.sha256("".join([document, *plugged(document)]).encode()).hexdigest()[:16]


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    here = Path(__file__).parent
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_recipe(reference: str) -> Path:
    """The file of a recipe given by its path or, wherever one stands, by its shipped name."""
    path = Path(reference)
    if path.is_file():
        return path
    known = shipped()
    if path.parent in (Path(), Path("recipes")) and path.name.removesuffix(".toml") in known:
        return known[path.name.removesuffix(".toml")]
    what = "this is a folder, not a recipe" if path.is_dir() else "there is no such file, and no such shipped recipe"
    raise InputError(f"{reference}: {what}; {nearest(path.name.removesuffix('.toml'), known)}")


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `KEY=VALUE` overrides, and check all of it, every point of its sweep included."""
    path = find_recipe(reference)
    raw = read_toml(path)
    raw["name"] = raw.get("name") or re.sub(r"[^\w.-]+", "-", path.stem).lstrip(".")
    for override in overrides:
        set_key(raw, *parse_override(override))
    return parse_recipe(raw, str(path))


def parse_recipe(raw: Mapping[str, Any], where: str) -> Recipe:
    """Check the plain tables of a recipe; `where` names their source in messages. All mistakes at once."""
    from ecoprompt.own import declare_own  # with all benchmarks, which a recipe that is not there does not need

    problems = [*check_sweep(raw), *declare_own(raw, Path(where).parent)]
    written, told = dict(raw), set[str]()
    if not problems:
        try:
            checked = [(point, _validate(point.tables)[1]) for point in points(raw)]
            problems = [point.place(problem) for point, found in checked for problem in found]
            told = set(checked[0][1])
            written = with_swept(raw)  # what is only swept is not stated twice
        except InputError as error:
            problems = list(error.problems)
    recipe, found = _validate(written)
    found = [problem for problem in found if problem not in told]
    if recipe is None or problems or found:
        raise InputError(*(f"{where}: {problem}" for problem in dict.fromkeys([*found, *problems])))
    recipe._written, recipe._base = written, Path(where).parent
    return recipe


def parse_model(raw: Mapping[str, Any]) -> ModelTable:
    """The `[model]` table that a command's options make."""
    try:
        return ModelTable.model_validate(dict(raw))
    except ValidationError as error:
        raise InputError(*describe(error, ModelTable, "", "a model")) from None


def resolve_runs(recipe: Recipe) -> list[Run]:
    """The runs of a recipe in order; one that a sweep changes is repeated and named `eco[corruption.strength=5]`."""
    swept: dict[str, list[tuple[dict[str, str], Run]]] = {name: [] for name in recipe.run}
    for point in points(recipe._written):
        chosen, _ = _validate(point.tables)
        assert chosen is not None  # every point was checked when the recipe was read
        for name, table in chosen.run.items():
            swept[name].append((point.labels, _resolve(name, table, chosen)))
    runs: dict[str, Run] = {}
    for found in swept.values():
        changing = [key for key in recipe.sweep if _changes(key, found)]
        for values, run in found:
            named = replace(run, point={key: values[key] for key in changing})
            runs.setdefault(named.name, named)
    return list(runs.values())


def _changes(key: str, found: Sequence[tuple[dict[str, str], Run]]) -> bool:
    """Whether runs differ at points of a sweep that differ in `key` alone."""
    others = [tuple(value for name, value in values.items() if name != key) for values, _ in found]
    return len(set(zip(others, (digest(*vars(run).values()) for _, run in found), strict=True))) > len(set(others))


def _resolve(name: str, table: RunTable, recipe: Recipe) -> Run:
    model = recipe.model
    if table.model:  # another model has its own commits and its own tokenizer
        model = model.model_copy(update={"name": table.model, "revision": None, "tokenizer": None})
    if not table.forget:
        return Run(name, model, table.prefix)
    corruption = table.corruption or recipe.corruption
    return Run(name, model, table.prefix, recipe.seed, recipe.gate, recipe.tokens, corruption)


def _validate(raw: Mapping[str, Any]) -> tuple[Recipe | None, list[str]]:
    """The recipe, or all that is wrong with it."""
    tables, problems = _bind_open_tables(raw)
    problems += [*check_runs(raw), *check_benchmarks(raw), *check_optimize(raw), *check_training(raw)]
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        return None, describe(error, Recipe, "", "a recipe") + problems
    return recipe, problems


def _bind_open_tables(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`raw` with the parameters of each open table set apart, checked and completed; and what is wrong with them."""
    tables = dict(raw)
    problems: list[str] = []
    for name in OPEN:
        if name in raw or name in ("gate", "tokens"):
            tables[name], found = _bind(name, name, raw.get(name, {}))
            problems += found
    if isinstance(raw.get("run"), dict):
        tables["run"] = dict(raw["run"])
        for run, table in raw["run"].items():
            if isinstance(table, dict) and "corruption" in table:
                bound, found = _bind("corruption", f"run.{run}.corruption", table["corruption"])
                tables["run"][run] = {**table, "corruption": bound}
                problems += found
    return tables, problems


def _bind(name: str, where: str, table: Any) -> tuple[Any, list[str]]:
    if not isinstance(table, dict):
        return table, []
    choice, registry, schema = OPEN[name]
    own = schema.model_fields
    closed = {key: value for key, value in table.items() if key in own and key != "parameters"}
    parameters = {key: value for key, value in table.items() if key not in closed}
    if name == "gate" and "classifier" in parameters:
        closed.setdefault("kind", "transformer")
    chosen = closed.get(choice, own[choice].default)
    if not isinstance(chosen, str):
        return {**closed, "parameters": {}}, []
    if chosen not in registry:
        return closed, [f"'{where}.{choice}': there is no {registry.unknown(chosen)}"]
    try:
        return {**closed, "parameters": registry.bind(chosen, parameters, where)}, []
    except InputError as error:
        return closed, list(error.problems)


def _flatten(table: dict[str, Any]) -> dict[str, Any]:
    """An open table with the keys of its `parameters` beside its own."""
    parameters = table.pop("parameters", {})
    return table | {key: value for key, value in parameters.items() if value is not None}
