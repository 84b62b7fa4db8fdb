"""Data sets, prompts and scoring, declared in benchmarks.toml or in a table of the user's own."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from ecoprompt.data import Row, Source, check_columns, local_file, opening, sample, split
from ecoprompt.declared import bind_aggregates, dangling, parts, subsets_of, whole
from ecoprompt.items import OWN, Choosing, Item, choose
from ecoprompt.metrics import ROW_INPUTS, Better, asks_model, reads
from ecoprompt.pressure import press
from ecoprompt.registry import InputError, aggregates, benchmarks, describe, metrics, nearest, pressures
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
    count,
    prompts,
    read,
    without_overlap,
)
from ecoprompt.template import fill, template_names

PACKAGE = Path(__file__).parent

BenchmarkName = Annotated[str, as_value_error(benchmarks.__getitem__)]
MetricName = Annotated[str, as_value_error(metrics.__getitem__)]
PressureName = Annotated[str, as_value_error(pressures.__getitem__)]


class Subset(Choosing, Reading, Named):
    """Rows of one data set and the metrics that are read off them; what is None follows the benchmark.

    `answer`, `reference` and `alternatives` name columns, for which `choices` and `right` stand where an answer is to
    be chosen; without a reference the answer is its own. `answer_words` is how many words of a long answer count, from
    its first. `samples` is how many answers are drawn for the metrics that read them, at `temperature`, from the
    likeliest tokens that together have the probability `top_p`. `pressure` rewrites the prompts; each of `pressures`
    makes a further subset of the same rows, called SUBSET_PRESSURE.
    """

    prompt: Template | None = None
    answer: str = "answer"
    answer_words: Annotated[int, Field(ge=1)] | None = None
    reference: str | None = None
    alternatives: str | None = None
    metrics: dict[str, MetricName]
    forget: bool = False
    samples: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    pressure: PressureName | None = None
    pressures: Annotated[tuple[PressureName, ...], Field(strict=False)] = ()

    @property
    def asks_model(self) -> bool:
        """Whether a metric reads more of a row than what the gate says of its prompt."""
        return any(map(asks_model, self.metrics.values()))

    def scored(self, row: Row, column: str) -> str:
        """What counts of a text of `row`: of the answer its opening, and nothing where no model is asked."""
        if not self.asks_model:
            return ""
        return opening(row[column], self.answer_words if column == self.answer else None)

    @model_validator(mode="after")
    def _has_what_metrics_read(self) -> Subset:
        keys = {"samples": self.samples, "alternatives": self.alternatives or self.choices}
        keys |= dict.fromkeys(("answers", "logits", "place"), self.choices)
        given = set(ROW_INPUTS) - {name for name, key in keys.items() if key is None}
        pairs = [(metric, key) for metric in self.metrics.values() for key in reads(metric)]
        lacking = [f"'{metric}' reads '{key}'" for metric, key in pairs if key not in given]
        if lacking:
            raise ValueError(f"found no key for what metrics read: {', '.join(lacking)}")
        return self


class Benchmark(Choosing, Named):
    """A data set, how a prompt is made of a row, and how the answers are scored.

    `of` names the benchmark that it varies: what is not stated of forget sets, `hub`, `split`, `prompt`, `raw`,
    `max_length`, `rows`, `metrics` and `subsets` is as there. `metrics`, `pressures`, `choices`, `right` and
    `completion` are those of all subsets that state none. With `raw`, prompts are given to a model as they stand,
    without a chat template, and an answer follows after a space.
    """

    of: BenchmarkName | None = None
    pressures: Annotated[tuple[PressureName, ...], Field(strict=False)] = ()
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
    def declared(self) -> Mapping[str, Any]:
        """The table that it was declared by, with what that left to others."""
        return self._declared

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
        made = {name: one for name, one in self.aggregates.items() if set(subsets_of(one)) <= set(kept)}
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
        for name, parameters in self.aggregates.items():
            subsets = subsets_of(parameters)
            if set(subsets) <= set(forgotten):
                found[name] = (subsets, parts(name, parameters))
        return found

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

    def subset_rows(self, subset: str, forget: str | ForgetSet | None, root: Path | None = None) -> list[Row]:
        """All rows of `subset`, with every column that is read of them checked."""
        table = self.subset(subset)
        source = self._source(table, forget)
        rows = read(source, table, self._forget_set(forget), root)
        check_columns(rows, source, self._columns_read(table))
        return rows

    def items(
        self,
        subset: str,
        forget: str | ForgetSet | None,
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
        parts = split(rows, held_out, seed) if table.forget else (rows, [])
        return [self._item(table, index, row, seed) for _, (index, row) in sample(parts[held], limit, seed)]

    def _item(self, table: Subset, index: int, row: Row, seed: int) -> Item:
        """`row` as it is asked."""
        prompt = table.prompt or self.prompt
        if table.choices is not None:
            said = choose(table, prompt, row, f"{self.name}, {table.name}: row {index + 1}")
        else:
            said = {"prompt": fill(prompt, row), "target": table.scored(row, table.answer)}
            said["reference"] = table.scored(row, table.reference or table.answer)
            said["alternatives"] = tuple(row[table.alternatives]) if table.alternatives else ()
        said["prompt"] = press(table.pressure, said["prompt"], seed)
        said["prompts"] = tuple(press(table.pressure, one, seed) for one in said.get("prompts", ()))
        return Item(benchmark=self.name, subset=table.name, index=index, **said)

    def gate_texts(self, forget: str | ForgetSet | None, root: Path | None = None) -> GateData:
        """The prompts that train a gate for `forget`, and those that test it, none of which it is trained on."""
        gate = self._gate()
        if not gate.positive or not gate.negative:
            raise InputError(
                f"benchmark '{self.name}' only tests gates: its [gate] table has no 'positive', 'negative'"
            )
        data = GateData(
            positive=[text for texts in gate.positive for text in self._texts(texts, forget, root)],
            negative=[text for texts in gate.negative for text in self._texts(texts, forget, root)],
            checks=self.gate_checks(forget, root),
        )
        return without_overlap(data)

    def gate_checks(self, forget: str | ForgetSet | None, root: Path | None = None) -> dict[str, tuple[list[str], int]]:
        """The prompts that test a gate, by the name of their set, each with its label."""
        checks = self._gate().checks
        return {name: (self._texts(check, forget, root), check.label) for name, check in checks.items()}

    def dry_rows(self, forget: str | ForgetSet | None, root: Path | None = None) -> dict[str, int | None]:
        """How many rows each subset has: of the local data, else as published, else None. Asks no network."""
        return {name: self._count(subset, forget, root) for name, subset in self.subsets.items()}

    def dry_gate_rows(self, forget: str | ForgetSet | None, root: Path | None = None) -> dict[str, int | None]:
        """How many prompts train (`positive`, `negative`) and test a gate, as `dry_rows`."""
        gate = self._gate()
        counts: dict[str, int | None] = {}
        for name, sources in (("positive", gate.positive), ("negative", gate.negative)):
            parts = [self._count(texts, forget, root) for texts in sources]
            known = [part for part in parts if part is not None]
            counts |= {name: sum(known) if len(known) == len(parts) else None} if sources else {}
        return counts | {name: self._count(check, forget, root) for name, check in gate.checks.items()}

    def gate_hubs(self) -> list[str]:
        """The Hub data sets that train and test a gate."""
        gate = self._gate()
        read_by_it = (*gate.positive, *gate.negative, *gate.checks.values())
        named = [self.hub if one.hub is None and one.folder is None else one.hub for one in read_by_it]
        return sorted({name for name in named if name})

    def fetches(self, forget: str | ForgetSet | None, root: Path | None, gate: bool = False) -> list[str]:
        """The Hub data sets that its rows, or else its gate's prompts, are read from, and the local files that are not
        there; nothing of what is local."""
        table = self._gate() if gate else None
        read = [*table.positive, *table.negative, *table.checks.values()] if table else self.subsets.values()
        sources = [source for source in (self._source(one, forget) for one in read) if not local_file(source, root)]
        return list(dict.fromkeys(source.hub or f"{source.local} (a file of your own)" for source in sources))

    def _gate(self) -> GateSources:
        if self.gate is None:
            raise InputError(f"benchmark '{self.name}' does not say which prompts train a gate (no [gate] table)")
        return self.gate

    def _texts(self, texts: GateTexts, forget: str | ForgetSet | None, root: Path | None) -> list[str]:
        source = self._source(texts, forget)
        return prompts(read(source, texts, self._forget_set(forget), root), source, texts, self.prompt)

    def _count(self, table: Reading, forget: str | ForgetSet | None, root: Path | None) -> int | None:
        source = self._source(table, forget)
        own = table.hub is None and table.folder is None
        published = self.rows.get(source.config or source.split if own else source.local or "")
        return count(source, table, self._forget_set(forget), root, published)

    def _source(self, table: Reading, forget: str | ForgetSet | None) -> Source:
        elsewhere = table.hub is not None or table.folder is not None  # with commits and a local name of its own
        hub, folder = (table.hub, table.folder) if elsewhere else (self.hub, self.folder)
        named = (table.config, table.local if elsewhere else table.local or self.local)
        config, local = (self._filled(name, forget) if name else None for name in named)
        split = table.split or self.split
        if folder is not None:
            path = str(self._base / folder / (config or split))
            return Source(config=config, split=split, path=path, base=str(self._base))
        return Source(hub or None, config, split, revision=None if elsewhere else self.revision, local=local)

    def _forget_set(self, forget: str | ForgetSet | None) -> ForgetSet | None:
        return None if forget is None else self.forget_set(forget if isinstance(forget, str) else forget.name)

    def _filled(self, template: str, forget: str | ForgetSet | None) -> str:
        """`template` with the names of the forget set and its retain set, which it need not use."""
        if not template_names(template):
            return template
        if forget is None:
            raise InputError(f"benchmark '{self.name}' needs a forget set; {nearest('', self.family.forget_sets)}")
        forget_set = self._forget_set(forget)
        assert forget_set is not None
        return fill(template, {"forget": forget_set.name, "retain": forget_set.retain})

    def _columns_read(self, subset: Subset) -> dict[str, type]:
        prompt = subset.prompt or self.prompt
        columns: dict[str, type] = dict.fromkeys(sorted(subset.names(prompt)), object)
        columns |= dict.fromkeys(sorted(template_names(prompt, printed=True) - OWN), str)
        if subset.asks_model and subset.choices is None:
            columns |= {column: str for column in (subset.answer, subset.reference) if column is not None}
        return columns | ({subset.alternatives: list} if subset.alternatives is not None else {})


def declare(name: str, table: Mapping[str, Any], base: Path = PACKAGE, where: str | None = None) -> Benchmark:
    """The benchmark `name` that `table` declares; `base` is what its `folder` is relative to.

    `where` is the key path under which the table stands. Raises InputError with all mistakes at once.
    """
    where = name if where is None else where
    bound, problems = bind_aggregates(table, where)
    table = whole(table)
    try:
        benchmark = Benchmark.model_validate({**table, "aggregates": bound} if "aggregates" in table else table)
    except ValidationError as error:
        raise InputError(*describe(error, Benchmark, where, f"benchmark '{name}'"), *problems) from None
    benchmark._name = name
    benchmark._base = base
    benchmark._declared = table
    problems += dangling(benchmark, where)
    if problems:
        raise InputError(*problems)
    return benchmark


def parse_forget(name: str) -> tuple[Benchmark, ForgetSet]:
    """The benchmark and forget set that "benchmark/forget set" names."""
    head, slash, tail = name.partition("/")
    every = [f"{known.name}/{forget_set}" for known in benchmarks.values() for forget_set in known.forget_sets]
    if not slash:
        raise InputError(f"found '{name}' as the forget set, expected BENCHMARK/FORGET_SET; {nearest(name, every)}")
    benchmark: Benchmark = benchmarks[head]
    return benchmark, benchmark.forget_set(tail)


def _declare_all() -> None:
    with (PACKAGE / "benchmarks.toml").open("rb") as file:
        for name, table in tomllib.load(file).items():
            benchmarks.add(name, declare(name, table))


_declare_all()
