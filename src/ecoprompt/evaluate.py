"""Evaluates the runs of a recipe on its benchmarks: rows, metrics, results."""

from __future__ import annotations

import gc
import platform
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ecoprompt import processes
from ecoprompt.asking import Asked, Asking, add_together, judge, read_again, rereads, row_of
from ecoprompt.benchmarks import Benchmark, parse_forget
from ecoprompt.data import Source, told_together
from ecoprompt.items import Item
from ecoprompt.lessons import gate_sources, training_cost
from ecoprompt.models import load_model, locate
from ecoprompt.pack import OUTPUT, TrainedGate, is_published, learned_corruption, obtain_gate
from ecoprompt.paired import by_column, differences, errors
from ecoprompt.plots import write_plots
from ecoprompt.processes import from_main
from ecoprompt.recipe import EvaluateTable, Recipe, Run, digest, resolve_runs
from ecoprompt.registry import InputError, Progress, aggregates, benchmarks, metrics, plugins, quiet
from ecoprompt.report import examples, said
from ecoprompt.results import RETAIN, Store, count_rows, grid, to_json, write_results
from ecoprompt.sources import ForgetSet
from ecoprompt.sweep import key_path

ORIGINAL = "original"
"""The run that a guard's harm is measured against."""
STORE = "scores.jsonl"
Done = dict[str, tuple[list[Asked], float]]
"""By run the rows that were asked, and the seconds that computing them took."""
REPORTED = ("torch", "transformers", "scikit-learn", "numpy", "scipy")


@dataclass
class Evaluated:
    """What an evaluation found: the summary as written to summary.json, every row, and the files."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def samples(self, count: int = 3) -> tuple[list[str], list[str], dict[str, list[str]]]:
        """(prompts, true answers, answers by run) of a few generations, forget set first, spread over its rows."""
        shown = [row for row in self.rows if "generation" in row]
        chosen = examples([row for row in shown if row["forget"]] or shown, count)
        answers = {run: [said(one.answers[run]) for one in chosen] for run in self.summary["runs"]}
        return [one.prompt for one in chosen], [one.target for one in chosen], answers


def evaluate(recipe: Recipe, output: Path = OUTPUT, progress: Progress = quiet) -> Evaluated:
    """Evaluate all runs and write the results under `output`/<recipe>; what a killed evaluation stored is kept."""
    recipe.enter()
    runs, notes = _with_learned(recipe, runs_of(recipe), output)
    asks_model = any(benchmark.asks_model for benchmark in _benchmarks(recipe))
    for run in runs if asks_model else ():  # before any work: a wrong name is not to be found out an hour later
        locate(run.model.name or "")
    with told_together(lambda: _sources(recipe, runs), recipe.root):
        items = _items(recipe)
    _check_ready(recipe, items)
    folder = output / recipe.name
    store = Store(folder / STORE)
    gates = _gates(recipe, runs, output, progress)
    done: Done = {}
    claimed: set[str] = set()
    for run in runs if not asks_model else ():
        done[run.name] = judge(recipe, run, gates[run.name], items, _named(progress, run.name))
    for group in _by_model(runs) if asks_model else ():
        asking = Asking(load_model(group[0].model), recipe, items, store, claimed)
        for run in group:
            done[run.name] = asking.ask(run, gates[run.name], _named(progress, run.name))
        del asking
        gc.collect()
    if any(map(rereads, items)):
        reader = load_model(recipe.model)
        for name, (asked, seconds) in done.items():
            done[name] = read_again(reader, asked, store, _named(progress, name)), seconds
    found = _conclude(recipe, runs, done, gates, store, folder)
    return replace(found, notes=[*notes, *_missed(found.summary)])


def _gates(recipe: Recipe, runs: Sequence[Run], output: Path, progress: Progress) -> dict[str, TrainedGate | None]:
    """The gate of each run, by the run's name; one that several runs have is obtained once."""
    obtained: dict[str, TrainedGate] = {}
    for run in runs:
        name = digest(run.gate, run.seed)
        if run.gate is not None and name not in obtained:
            obtained[name] = obtain_gate(recipe, run.gate, run.seed or 0, output, progress)
    return {run.name: obtained.get(digest(run.gate, run.seed)) for run in runs}


def _missed(summary: Mapping[str, Any]) -> list[str]:
    """What is to be said of gates that let prompts through which are to be forgotten: these are not guarded."""
    told: dict[tuple[int, int], str] = {}
    for run, entry in summary["runs"].items():
        gate = entry["gate"] or {}
        if gate.get("false_negatives"):
            told.setdefault((gate["false_negatives"], gate["forget_prompts"]), run)
    return [f"the gate of {run} missed {missed} of {asked} prompts to forget" for (missed, asked), run in told.items()]


def _check_ready(recipe: Recipe, items: Sequence[Item]) -> None:
    """Raises EcopromptError where a metric needs what is not there: an extra, a model."""
    for metric in metrics_read(recipe):
        if metrics[metric].ready is not None:
            metrics[metric].ready()
    if any(map(rereads, items)):
        if recipe.model.name is None:
            raise InputError("'model.name': this key is needed, as perplexity is that under the recipe's own model")
        locate(recipe.model.name)


def metrics_read(recipe: Recipe) -> dict[str, None]:
    """The row metrics of all that is evaluated, each once."""
    tables = _benchmarks(recipe)
    return dict.fromkeys(name for one in tables for subset in one.subsets.values() for name in subset.metrics.values())


def _with_learned(recipe: Recipe, runs: list[Run], output: Path) -> tuple[list[Run], list[str]]:
    """The runs with the corruption that was learned in place of the recipe's, and what is to be said of it."""
    if recipe.optimize is None:
        return runs, []
    learned = from_main(lambda: learned_corruption(recipe, output))
    if learned is None:
        return runs, ["[optimize] has not been run with these tables, so [corruption] is used as it stands"]
    searched = (recipe.model, recipe.gate, recipe.tokens, recipe.seed)
    chosen = {
        run.name
        for run in runs
        if (run.model, run.gate, run.tokens, run.seed) == searched and _takes_corruption(recipe, run)
    }
    told = (
        f"learned: {learned.method}, {to_json(learned.parameters, None)}; used by {', '.join(sorted(chosen)) or 'none'}"
    )
    return [replace(run, corruption=learned) if run.name in chosen else run for run in runs], [told]


def _takes_corruption(recipe: Recipe, run: Run) -> bool:
    """Whether a run is corrupted as [corruption] says, and neither as a table of its own nor as a sweep does."""
    own = ["run", run.base, "corruption"]
    swept = any(path[0] == "corruption" or path[:3] == own for path in map(key_path, recipe.sweep))
    return recipe.run[run.base].corruption is None and not swept


def _conclude(
    recipe: Recipe,
    runs: Sequence[Run],
    done: Done,
    gates: Mapping[str, TrainedGate | None],
    store: Store,
    folder: Path,
) -> Evaluated:
    """Metrics, summary and files of runs that are computed."""
    known: dict[Hashable, Mapping[str, Any]] = {}
    rows = {run.name: [row_of(asked, store, known) for asked in done[run.name][0]] for run in runs}
    for name, found in rows.items():
        add_together(done[name][0], found, store)
    flat = [{"run": name, **row} for name, found in rows.items() for row in found]
    columns = by_column(flat)
    tables = _benchmarks(recipe)
    averages = {name: of for benchmark in tables for name, of in benchmark.averages().items()}
    entries: dict[str, Any] = {}
    for run in runs:
        asked, seconds = done[run.name]
        gate = gates[run.name]
        entries[run.name] = {
            "base": run.base,
            "point": run.point,
            "metrics": _metrics(recipe, rows[run.name], rows.get(_same_point(RETAIN, run, runs))),
            "errors": errors(columns.get(run.name, {}), averages),
            "paired": differences(columns.get(run.name, {}), columns.get(_same_point(ORIGINAL, run, runs)), averages),
            "seconds": seconds,
            "gate": _gate_report(asked, gate) if gate else None,
            "model": run.model.name,
            **training_cost(run.model.name),
        }
    summary = {
        "recipe": recipe.name,
        "forget": recipe.data.forget if recipe.data else None,
        "seed": recipe.seed,
        "runs": entries,
        "columns": [column for table in tables for column in table.table_columns()],
        "tradeoff": _tradeoff(tables),
        "better": _better(tables, RETAIN in {run.base for run in runs}),
        "chance": _chance(done[runs[0].name][0]),
        "grids": {table.name: grid(table.subsets) for table in tables if not table.asks_model},
        "rows": count_rows(flat),
        "resolved": recipe.document(),
        "versions": {name: version(name) for name in ("ecoprompt", *REPORTED)} | plugins,
        "hardware": _hardware(),
    }
    return Evaluated(summary, flat, [*write_results(folder, summary, flat), *write_plots(folder, summary)])


def _tradeoff(tables: Sequence[Benchmark]) -> list[str]:
    """The two columns of the trade-off plot: the first of the forget set and of others.

    Where the tables show no column of one kind, they are the first two of the other.
    """
    columns = [column for table in tables for column in table.table_columns()]
    forgotten = {name for table in tables for name in table.forget_columns()}
    first = [next((name for name in columns if (name in forgotten) == of), "") for of in (True, False)]
    return first if all(first) else columns[:2]


def _better(tables: Sequence[Benchmark], retain: bool) -> dict[str, str]:
    """Which way each column is better; without a `retain` run there is nothing to be close to."""
    every = {name: way for table in tables for name, way in table.better().items()}
    return {name: way for name, way in every.items() if retain or way != "closer to retain"}


def _same_point(base: str, run: Run, runs: Sequence[Run]) -> str:
    """The run called `base` to compare `run` with: of the same point of a sweep, if that changes it too."""
    return next((one.name for one in runs if one.base == base and one.point.items() <= run.point.items()), base)


def runs_of(recipe: Recipe) -> list[Run]:
    """The runs to evaluate; raises InputError for a recipe that has none, or no benchmark."""
    runs = resolve_runs(recipe)
    if not runs or not recipe.evaluate:
        missing = "[run.NAME]" if not runs else "[[evaluate]]"
        trained = f"; `ecoprompt train-classifier {recipe.name}` trains its gate" if recipe.data else ""
        raise InputError(f"{recipe.name}: there is nothing to evaluate: the recipe has no {missing}{trained}")
    return runs


def tables_of(recipe: Recipe) -> Iterator[tuple[EvaluateTable, Benchmark, ForgetSet | None]]:
    """Each [[evaluate]] with its benchmark (of the subsets that are read), and the forget set if that benchmark has it.

    Benchmarks of the same data share the names of their forget sets.
    """
    named = parse_forget(recipe.data.forget) if recipe.data else None
    for table in recipe.evaluate:
        benchmark = benchmarks[table.benchmark].only(table.subsets)
        known = named is not None and named[0].name in (benchmark.name, benchmark.family.name)
        yield table, benchmark, named[1] if named and known else None


def _benchmarks(recipe: Recipe) -> list[Benchmark]:
    return [benchmark for _, benchmark, _ in tables_of(recipe)]


def _sources(recipe: Recipe, runs: Sequence[Run]) -> Iterator[Source]:
    """Where all rows are read from, and the prompts of gates that are to be trained."""
    for _, benchmark, forget_set in tables_of(recipe):
        yield from benchmark.sources(benchmark.subsets.values(), forget_set)
    if recipe.data is not None and any(run.gate and not is_published(run.gate) for run in runs):
        yield from gate_sources(recipe)


def _items(recipe: Recipe) -> list[Item]:
    """All rows that every run is asked; those that a search read are not."""
    held_out = recipe.optimize.held_out if recipe.optimize else 0.0
    found = [
        item
        for table, benchmark, forget_set in tables_of(recipe)
        for subset in benchmark.subsets
        for item in benchmark.items(subset, forget_set, recipe.root, table.limit_of(subset), recipe.seed, held_out)
    ]
    if recipe.optimize and not any(benchmarks[item.benchmark].subset(item.subset).forget for item in found):
        raise InputError(f"'optimize.held_out': a share of {held_out} leaves no row of the forget set to evaluate")
    return found


def _by_model(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs, those of one model together, so that each model is loaded once."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(digest(run.model), []).append(run)
    return list(groups.values())


def _named(progress: Progress, run: str) -> Progress:
    return lambda what, done, total: progress(f"{run}: {what}", done, total)


def values_of(rows: Sequence[Mapping[str, Any]], benchmark: str) -> dict[str, np.ndarray]:
    """The values of a benchmark's rows as arrays, by "subset/metric"."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["values"].items() if row["benchmark"] == benchmark else ():
            found.setdefault(f"{row['subset']}/{name}", []).append(value)
    return {name: np.array(values) for name, values in found.items()}


def _metrics(
    recipe: Recipe, rows: Sequence[Mapping[str, Any]], retain: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """The aggregates of each benchmark, then the mean of every row metric by subset."""
    found: dict[str, Any] = {}
    for benchmark in _benchmarks(recipe):
        own = values_of(rows, benchmark.name)
        theirs = values_of(retain, benchmark.name) if retain is not None else None
        for name, parameters in benchmark.aggregates.items():
            subsets, keys = benchmark.made_of(name)
            read = {f"{subset}/{key}" for subset in subsets for key in keys}
            there = read <= own.keys() and (theirs is None or read <= theirs.keys())
            found[name] = aggregates[name](own, theirs, **parameters) if there else None
        found |= {name.replace("/", "_"): float(array.mean()) for name, array in own.items()}
    return found


def _chance(asked: Sequence[Asked]) -> dict[str, float]:
    """What a model that knows nothing scores, by column, where that is known."""
    found: dict[str, list[float]] = {}
    for item in (one.item for one in asked):
        for name, metric in benchmarks[item.benchmark].subset(item.subset).metrics.items():
            if (chance := metrics[metric].chance) is not None:
                found.setdefault(f"{item.subset}_{name}", []).append(chance(len(item.alternatives)))
    return {column: float(np.mean(values)) for column, values in found.items()}


def _gate_report(asked: Sequence[Asked], trained: TrainedGate) -> dict[str, Any]:
    """How the gate judged the prompts that were evaluated: forget subsets are to be flagged, all others not."""
    forget = [row for row in asked if benchmarks[row.item.benchmark].subset(row.item.subset).forget]
    others = [row for row in asked if not benchmarks[row.item.benchmark].subset(row.item.subset).forget]
    return {
        "threshold": trained.threshold,
        "false_negatives": sum(not row.flagged for row in forget),
        "forget_prompts": len(forget),
        "false_positives": sum(row.flagged for row in others),
        "other_prompts": len(others),
    }


def _hardware() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    told = {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpus": devices}
    return told | {"processes": processes.count()}
