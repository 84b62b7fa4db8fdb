"""Data sets, prompts and scoring, declared in benchmarks.toml or in a table of the user's own."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from ecoprompt.data import Row, Rows, Source, check_columns, local_file, sample, split
from ecoprompt.items import Choosing, Item, MetricName, Pressures, Subset
from ecoprompt.metrics import Better, asks_model, reads
from ecoprompt.registry import InputError, aggregates, benchmarks, describe, metrics, nearest
from ecoprompt.sources import (
    ForgetSet,
    GateData,
    GateSources,
    GateTexts,
    Local,
    Named,
    Reading,
    Template,
    Texts,
    TrainingSources,
    as_value_error,
    prompts,
    read,
    total,
    without_overlap,
)
from ecoprompt.template import fill, template_names

PACKAGE = Path(__file__).parent
BenchmarkName = Annotated[str, as_value_error(benchmarks.__getitem__)]
INHERITED = ("hub", "split", "prompt", "raw", "max_length", "rows", "metrics", "subsets")
"""What a benchmark takes of the one it is `of`."""
SHARED = ("metrics", "choices", "right", "completion")
"""What a benchmark's subsets take of it."""

Forget = str | ForgetSet | None
"""A forget set or its name; None where none is asked for."""


class Benchmark(Choosing, Named):
    """A data set, how a prompt is made of a row, and how the answers are scored.

    `of` names the benchmark that it varies: what is not stated of forget sets, `hub`, `split`, `prompt`, `raw`,
    `max_length`, `rows`, `metrics` and `subsets` is as there. `metrics`, `pressures`, `choices`, `right` and
    `completion` are those of all subsets that state none. With `raw`, prompts are given to a model as they stand,
    without a chat template, and an answer follows after a space.
    """

    of: BenchmarkName | None = None
    pressures: Pressures = ()
    title: str = ""
    hub: str | None = None
    folder: str | None = None
    local: Local | None = None
    revision: str | None = None
    split: str = "train"
    prompt: Template
    raw: bool = False
    max_length: Annotated[int, Field(ge=1)]
    rows: dict[str, int] = {}
    columns: Texts = ()
    forget_sets: dict[str, ForgetSet] = {}
    metrics: dict[str, MetricName] = {}
    subsets: Annotated[dict[str, Subset], Field(min_length=1)] = {}
    aggregates: dict[str, dict[str, Any]] = {}
    gate: GateSources | None = None
    training: TrainingSources | None = None
    _base: Path = PrivateAttr(PACKAGE)
    _declared: Mapping[str, Any] = PrivateAttr({})

    @model_validator(mode="after")
    def _has_one_source(self) -> Benchmark:
        if self.folder is not None and self.hub is not None:
            raise ValueError("found both 'hub' and 'folder'")
        if self.folder is None and self.hub is None and self.local is None:
            raise ValueError("found neither 'hub' nor 'folder'")
        if not self.subsets and self.gate is None:
            raise ValueError("found neither 'subsets' nor 'gate', so there is nothing to read")
        return self

    def model_post_init(self, context: Any) -> None:
        """Tell the inner tables their names."""
        for name, subset in list(self.subsets.items()):
            if "pressures" not in subset.model_fields_set:
                self.subsets[name] = subset = subset.model_copy(update={"pressures": self.pressures})
            for kind in subset.pressures:
                if f"{name}_{kind}" in self.subsets:
                    raise ValueError(f"found a subset '{name}_{kind}', which is what '{name}' is under '{kind}'")
                self.subsets[f"{name}_{kind}"] = subset.model_copy(update={"pressure": kind, "pressures": ()})
        named: list[tuple[str, Named]] = [*self.forget_sets.items(), *self.subsets.items()]
        for name, table in named:
            table._name = name

    @property
    def family(self) -> Benchmark:
        """The benchmark whose forget sets it has: itself, or that of which it is."""
        found: Benchmark = self if self.forget_sets or self.of is None else benchmarks[self.of].family
        return found

    def forget_set(self, name: str) -> ForgetSet:
        """The forget set of this name; raises InputError with the nearest one."""
        known = self.family.forget_sets
        if name not in known:
            raise InputError(f"benchmark '{self.name}' has no forget set '{name}'; {nearest(name, known)}")
        return known[name]

    def subset(self, name: str) -> Subset:
        """The subset of this name; raises InputError with the nearest one."""
        if name not in self.subsets:
            raise InputError(f"benchmark '{self.name}' has no subset '{name}'; {nearest(name, self.subsets)}")
        return self.subsets[name]

    def only(self, subsets: Sequence[str] | None) -> Benchmark:
        """The benchmark with these of its subsets alone, and the columns that are read off them; None for all."""
        if subsets is None:
            return self
        kept = {name: subset for name, subset in self.subsets.items() if name in subsets}
        made = {name: one for name, one in self.aggregates.items() if set(self.made_of(name)[0]) <= set(kept)}
        less = self.model_copy(update={"subsets": kept, "aggregates": made})
        return less.model_copy(update={"columns": tuple(name for name in self.columns if name in less.better())})

    def better(self) -> dict[str, Better]:
        """All columns of a run's results, in their order, and which way each is better."""
        found: dict[str, Better] = {name: aggregates[name].better for name in self.aggregates}
        for subset in self.subsets.values():
            for key, metric in subset.metrics.items():
                compared = subset.forget and asks_model(metric) and "nearest" not in reads(metric)
                aim: Better = "closer to chance" if metrics[metric].chance else "closer to retain"
                found[f"{subset.name}_{key}"] = aim if compared else metrics[metric].better
        return found

    def forget_columns(self) -> dict[str, tuple[list[str], list[str]]]:
        """The columns that are read off forget sets alone, row by row: by name the subsets and the keys of metrics they
        are of. Without those that need another model's reading, which is there only when all runs are done."""
        forgotten = {name: subset for name, subset in self.subsets.items() if subset.forget}
        found = {
            f"{name}_{key}": ([name], [key])
            for name, subset in forgotten.items()
            for key, metric in subset.metrics.items()
            if not metrics[metric].together and "reread" not in reads(metric)
        }
        made = {name: self.made_of(name) for name in self.aggregates}
        return found | {name: (subsets, keys) for name, (subsets, keys) in made.items() if {*subsets} <= {*forgotten}}

    def made_of(self, aggregate: str) -> tuple[list[str], list[str]]:
        """The subsets that an aggregate is read off, and the keys of their metrics: those it is told, or its own."""
        told = self.aggregates[aggregate]
        subsets = told["subsets"] if "subsets" in told else [told["subset"]]
        return list(subsets), list(told.get("metrics") or aggregates[aggregate].of)

    def averages(self) -> dict[str, list[str]]:
        """The aggregates that are means of columns, with these."""
        made = {name: self.made_of(name) for name in self.aggregates if aggregates[name].averages}
        return {name: [f"{one}_{key}" for one in subsets for key in keys] for name, (subsets, keys) in made.items()}

    def chance(self, column: str) -> Callable[[int], float] | None:
        """What a column is by chance, by the number of alternatives, if it is one of a forget set that says so."""
        subsets, keys = self.forget_columns().get(column, ([], []))
        metric = self.subsets[subsets[0]].metrics[keys[0]] if subsets and column not in self.aggregates else None
        return metrics[metric].chance if metric else None

    @property
    def asks_model(self) -> bool:
        """Whether it needs a language model; without, it measures the gate alone."""
        return any(subset.asks_model for subset in self.subsets.values())

    def table_columns(self) -> tuple[str, ...]:
        """The columns of the table on the terminal: `columns`, else all of them."""
        return self.columns or tuple(self.better())

    def subset_rows(self, subset: str, forget: Forget, root: Path | None = None) -> list[Row]:
        """All rows of `subset`, with every column that is read of them checked."""
        table = self.subset(subset)
        rows = self.read(table, forget, root)
        check_columns(rows, table.columns_read(table.prompt or self.prompt))
        return rows

    def read(self, table: Reading, forget: Forget, root: Path | None) -> Rows:
        """The rows that `table` takes of its data set."""
        return read(self._source(table, forget), table, self._forget_set(forget), root)

    def count(self, table: Reading, forget: Forget, root: Path | None) -> int | None:
        """How many rows that are: of local data, else by what is published, else as many as are declared to be taken
        `first`; None if neither tells. Asks no network."""
        source = self._source(table, forget)
        if local_file(source, root) is not None:
            return len(self.read(table, forget, root))
        published = self.rows.get((source.local or "") if _elsewhere(table) else source.stem)
        known = [number for number in (published, table.first) if number is not None]
        if not known or table.rows != "all":
            return None
        start, end = table.sample or (0, min(known))
        return max(0, min(end, *known) - start)

    def items(
        self,
        subset: str,
        forget: Forget,
        root: Path | None = None,
        limit: int | None = None,
        seed: int = 0,
        held_out: float = 0.0,
        held: bool = False,
    ) -> list[Item]:
        """The rows of `subset`, or a seeded sample of `limit` of them, with their prompts and answers.

        Of a forget set, the share `held_out` of its rows is kept apart for a search: these if `held`, else all others.
        """
        table = self.subset(subset)
        rows = list(enumerate(self.subset_rows(subset, forget, root)))
        chosen = (split(rows, held_out, seed) if table.forget else (rows, []))[held]
        prompt = table.prompt or self.prompt
        return [table.item(self.name, prompt, index, row, seed) for index, row in sample(chosen, limit, seed)]

    def gate_texts(self, forget: Forget, root: Path | None = None) -> GateData:
        """The prompts that train a gate for `forget`, and those that test it, none of which it is trained on."""
        gate = self.gate_sources()
        if not gate.positive or not gate.negative:
            raise InputError(
                f"benchmark '{self.name}' only tests gates: its [gate] table has no 'positive', 'negative'"
            )
        positive, negative = (
            [text for texts in part for text in self._texts(texts, forget, root)]
            for part in (gate.positive, gate.negative)
        )
        return without_overlap(GateData(positive, negative, self.gate_checks(forget, root)))

    def gate_checks(self, forget: Forget, root: Path | None = None) -> dict[str, tuple[list[str], int]]:
        """The prompts that test a gate, by the name of their set, each with its label."""
        checks = self.gate_sources().checks
        return {name: (self._texts(check, forget, root), check.label) for name, check in checks.items()}

    def dry_rows(self, forget: Forget, root: Path | None = None) -> dict[str, int | None]:
        """How many rows each subset has, as `count` tells."""
        return {name: self.count(subset, forget, root) for name, subset in self.subsets.items()}

    def dry_gate_rows(self, forget: Forget, root: Path | None = None) -> dict[str, int | None]:
        """How many prompts train (`positive`, `negative`) and test a gate, as `count` tells."""
        gate = self.gate_sources()
        counts: dict[str, int | None] = {}
        for name, sources in (("positive", gate.positive), ("negative", gate.negative)):
            if sources:
                counts[name] = total([self.count(texts, forget, root) for texts in sources])
        return counts | {name: self.count(check, forget, root) for name, check in gate.checks.items()}

    def gate_hubs(self) -> list[str]:
        """The Hub data sets that train and test a gate."""
        named = (one.hub if _elsewhere(one) else self.hub for one in self.gate_sources().readings())
        return sorted({name for name in named if name})

    def fetches(self, forget: Forget, root: Path | None, gate: bool = False) -> list[str]:
        """The Hub data sets that its rows, or else its gate's prompts, are read from, and the local files that are not
        there; nothing of what is local."""
        readings = self.gate_sources().readings() if gate else self.subsets.values()
        sources = [one for one in self.sources(readings, forget) if not local_file(one, root)]
        return list(dict.fromkeys(source.hub or f"{source.local} (a file of your own)" for source in sources))

    def sources(self, readings: Iterable[Reading], forget: Forget) -> list[Source]:
        """Where `readings` are read from."""
        return [self._source(one, forget) for one in readings]

    def gate_sources(self) -> GateSources:
        """Which prompts train a gate and test it; raises InputError where that is not said."""
        if self.gate is None:
            raise InputError(f"benchmark '{self.name}' does not say which prompts train a gate (no [gate] table)")
        return self.gate

    def _texts(self, texts: GateTexts, forget: Forget, root: Path | None) -> list[str]:
        rows = self.read(texts, forget, root)
        if texts.field is None:
            return prompts(rows, texts.prompt or self.prompt)
        check_columns(rows, {texts.field: str})
        return [row[texts.field] for row in rows]

    def _source(self, table: Reading, forget: Forget) -> Source:
        elsewhere = _elsewhere(table)
        hub, folder = (table.hub, table.folder) if elsewhere else (self.hub, self.folder)
        named = (table.config, table.local if elsewhere else table.local or self.local)
        config, local = (self._filled(name, forget) if name else None for name in named)
        split = table.split or self.split
        if folder is not None:
            path = str(self._base / folder / (config or split))
            return Source(config=config, split=split, path=path, base=str(self._base))
        return Source(hub or None, config, split, revision=None if elsewhere else self.revision, local=local)

    def _forget_set(self, forget: Forget) -> ForgetSet | None:
        return None if forget is None else self.forget_set(forget if isinstance(forget, str) else forget.name)

    def _filled(self, template: str, forget: Forget) -> str:
        """`template` with the names of the forget set and its retain set, which it need not use."""
        if not template_names(template):
            return template
        forget_set = self._forget_set(forget)
        if forget_set is None:
            raise InputError(f"benchmark '{self.name}' needs a forget set; {nearest('', self.family.forget_sets)}")
        return fill(template, {"forget": forget_set.name, "retain": forget_set.retain})


def _elsewhere(table: Reading) -> bool:
    """Whether rows are of a data set of their own, with its commits and its local name."""
    return table.hub is not None or table.folder is not None


def declare(name: str, table: Mapping[str, Any], base: Path = PACKAGE, where: str | None = None) -> Benchmark:
    """The benchmark `name` that `table` declares; `base` is what its `folder` is relative to.

    `where` is the key path under which the table stands. Raises InputError with all mistakes at once.
    """
    where = name if where is None else where
    bound, problems = _bind_aggregates(table, where)
    table = _whole(table)
    try:
        benchmark = Benchmark.model_validate({**table, "aggregates": bound})
    except ValidationError as error:
        raise InputError(*describe(error, Benchmark, where, f"benchmark '{name}'"), *problems) from None
    benchmark._name = name
    benchmark._base = base
    benchmark._declared = table
    problems += _dangling(benchmark, where)
    if problems:
        raise InputError(*problems)
    return benchmark


def _whole(table: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with what it leaves to the benchmark that it is `of`, and each subset with what it leaves to `table`."""
    given, of = dict(table), table.get("of")
    if isinstance(of, str) and of in benchmarks:
        left = {key: value for key, value in benchmarks[of]._declared.items() if key in INHERITED and key not in table}
        if {"folder", "local"} & table.keys():
            left.pop("hub", None)
        if "metrics" in table and "subsets" in left:
            left["subsets"] = {name: {**one, "metrics": table["metrics"]} for name, one in left["subsets"].items()}
        given |= left
    shared = {key: given[key] for key in SHARED if key in given}
    if isinstance(given.get("subsets"), Mapping):
        subsets = given["subsets"].items()
        given["subsets"] = {name: {**shared, **one} if isinstance(one, Mapping) else one for name, one in subsets}
    return given


def _bind_aggregates(table: Mapping[str, Any], where: str) -> tuple[Any, list[str]]:
    """The aggregates of a table with their defaults, and what is wrong with them."""
    given = table.get("aggregates", {})
    if not isinstance(given, Mapping):
        return given, []
    bound, problems = {}, []
    for name, parameters in given.items():
        key = f"{where}.aggregates.{name}"
        if name not in aggregates:
            problems.append(f"'{key}': there is no aggregate '{name}'; {nearest(name, aggregates)}")
        elif not isinstance(parameters, Mapping):
            problems.append(f"'{key}': found {parameters!r}, expected a table of parameters")
        else:
            try:
                bound[name] = aggregates.bind(name, parameters, key)
            except InputError as error:
                problems += error.problems
    return bound, problems


def _dangling(benchmark: Benchmark, where: str) -> list[str]:
    """Names in the tables of `benchmark` that point to nothing."""
    problems = []
    known = benchmark.better()
    for number, column in enumerate(benchmark.columns):
        if column not in known:
            problems.append(f"'{where}.columns.{number}': there is no column '{column}'; {nearest(column, known)}")
    for name in benchmark.aggregates:
        subsets, keys = benchmark.made_of(name)
        for subset in subsets:
            place = f"'{where}.aggregates.{name}'"
            if subset not in benchmark.subsets:
                problems.append(f"{place}: there is no subset '{subset}'; {nearest(subset, benchmark.subsets)}")
                continue
            lacking = [key for key in keys if key not in benchmark.subsets[subset].metrics]
            if lacking:
                problems.append(f"{place}: subset '{subset}' has no metric called {', '.join(lacking)}, which it reads")
    return problems


def parse_forget(name: str) -> tuple[Benchmark, ForgetSet]:
    """The benchmark and forget set that "benchmark/forget set" names."""
    head, slash, tail = name.partition("/")
    every = [f"{known.name}/{forget_set}" for known in benchmarks.values() for forget_set in known.forget_sets]
    if not slash:
        raise InputError(f"found '{name}' as the forget set, expected BENCHMARK/FORGET_SET; {nearest(name, every)}")
    benchmark: Benchmark = benchmarks[head]
    return benchmark, benchmark.forget_set(tail)


for _name, _table in tomllib.loads((PACKAGE / "benchmarks.toml").read_text(encoding="utf-8")).items():
    benchmarks.add(_name, declare(_name, _table))
