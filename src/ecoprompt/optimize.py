"""Learns a corruption: searches the strength or the dimensions at which a metric of the guarded model is on target."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ecoprompt.asking import Asking, row_of
from ecoprompt.benchmarks import Benchmark
from ecoprompt.checks import STRENGTHS
from ecoprompt.corruption import dimensions
from ecoprompt.evaluate import STORE, tables_of, values_of
from ecoprompt.files import write_bytes_atomic, writing
from ecoprompt.items import Item
from ecoprompt.models import load_model, locate
from ecoprompt.pack import OUTPUT, TrainedGate, obtain_gate, save_learned, searched_by
from ecoprompt.plots import draw_search, rendered
from ecoprompt.processes import is_main
from ecoprompt.recipe import CorruptionTable, ModelTable, OptimizeTable, Recipe, Run, digest, resolve_runs
from ecoprompt.registry import InputError, Progress, aggregates, quiet
from ecoprompt.results import RETAIN, Store
from ecoprompt.zeroth import Found, Measured, Space, minimise


@dataclass(frozen=True)
class Learned:
    """A search that ended: the corruption with its best parameter, the value aimed at, and every evaluation."""

    corruption: dict[str, Any]
    about: dict[str, Any]
    found: Found
    pack: Path

    def document(self) -> dict[str, Any]:
        """What `--json` prints."""
        made = [asdict(one) for one in self.found.evaluations]
        return {"pack": self.pack, "corruption": self.corruption, **self.about, "trace": made}


def optimize(recipe: Recipe, output: Path = OUTPUT, progress: Progress = quiet) -> Learned:
    """Search as [optimize] says, and write the corruption that is found into the recipe's forget pack.

    The metric is read on the rows of the forget set that are held out, which `evaluate` leaves out. A search that was
    killed goes on where it was.
    """
    recipe.enter()
    table, corruption = search_of(recipe)
    retain = _retain_run(recipe, table)
    for model in (recipe.model, retain.model if retain else None):  # before any work, not an hour later
        if model is not None:
            locate(model.name or "")
    objective = Objective(recipe, table, corruption, Store(output / recipe.name / STORE))
    trained = obtain_gate(recipe, recipe.gate, recipe.seed, output, progress)
    if retain is not None:
        objective.compare_with(retain, progress)
    objective.attach(trained, progress)
    searched, identity = searched_by(recipe), objective.identity()
    trace = output / recipe.name / f"optimize-{identity}.jsonl"
    with writing(trace):
        found = minimise(
            objective,
            objective.start,
            objective.space,
            method=table.method,
            parameters=table.parameters,
            budget=table.budget,
            tolerance=table.tolerance,
            seed=recipe.seed,
            trace=trace,
            identity=identity,
            progress=progress,
        )
    best = objective.corruption_at(found.best.parameter)
    reached = found.best.metric
    if found.best.seed != recipe.seed:  # of a method that draws anew: what holds for the noise of the recipe?
        reached = objective(np.asarray(found.best.parameter), recipe.seed).metric
    learned = {"method": best.method, **best.parameters}
    about = {
        "metric": table.metric,
        "target": objective.target,
        "reached": reached,
        "rows": len(objective.items),
        "search": table.method,
        "evaluations": len(found.evaluations),
        "stopped": found.stopped,
        "digest": searched,
    }
    return Learned(learned, about, found, save_learned(recipe, trained, learned, about, output))


def search_of(recipe: Recipe) -> tuple[OptimizeTable, CorruptionTable]:
    """What is searched for and where it starts; raises InputError for a recipe without a search."""
    if recipe.optimize is None or recipe.corruption is None:
        raise InputError(f"{recipe.name}: there is nothing to search for: the recipe has no [optimize]")
    return recipe.optimize, recipe.corruption


def _retain_run(recipe: Recipe, table: OptimizeTable) -> Run | None:
    """The run that tells what the metric should be: [run.retain], else one of the surrogate, if there is one."""
    for run in resolve_runs(recipe):
        if run.base == RETAIN:
            return run
    if table.surrogate is None:
        return None
    named = {"name": table.surrogate, "revision": None, "tokenizer": None}
    return Run(RETAIN, recipe.model.model_copy(update=named))


def held_out(recipe: Recipe, table: OptimizeTable) -> tuple[Benchmark, list[Item]]:
    """The benchmark that has the metric, and the rows of its forget sets that are kept apart for the search."""
    for entry, benchmark, forget_set in tables_of(recipe):
        subsets, _ = benchmark.forget_columns().get(table.metric, ([], []))
        if subsets:
            apart: dict[str, Any] = {"seed": recipe.seed, "held_out": table.held_out, "held": True}
            rows = [benchmark.items(name, forget_set, recipe.root, entry.limit_of(name), **apart) for name in subsets]
            if not all(rows):
                raise InputError(f"'optimize.held_out': a share of {table.held_out} leaves no row to search on")
            return benchmark, [item for some in rows for item in some]
    raise InputError(f"'optimize.metric': no [[evaluate]] has '{table.metric}' of a forget set")


class Objective:
    """How far a metric of the guarded model is from its target, by the parameter of the corruption."""

    def __init__(self, recipe: Recipe, table: OptimizeTable, corruption: CorruptionTable, store: Store) -> None:
        self.recipe = recipe
        self.table = table
        self.corruption = corruption
        self.store = store
        self.benchmark, self.items = held_out(recipe, table)
        self.read = frozenset(self.benchmark.forget_columns()[table.metric][1])
        self.reference: Mapping[str, np.ndarray] | None = None
        self._compared = ""

    def compare_with(self, retain: Run, progress: Progress) -> None:
        """Take the values of the retain run for what the metric is compared with."""
        asking = self._asking(retain.model)
        self.reference = self._values(asking, retain, None, progress)
        self._compared = asking.loaded.fingerprint
        del asking
        gc.collect()  # two models need not be in memory at once

    def identity(self) -> str:
        """A digest of all that decides what the objective is at a parameter: tables, models, rows, version."""
        rows = [(item.prompt, item.target, item.reference, item.alternatives) for item in self.items]
        models = (self.asking.loaded.fingerprint, self._compared)
        return digest(searched_by(self.recipe), models, self.target, rows, version("ecoprompt"))

    def attach(self, trained: TrainedGate, progress: Progress) -> None:
        """Load the model that is to be guarded, and settle the target, the space and where the search starts."""
        self.trained, self.progress = trained, progress
        self.asking = self._asking(self.recipe.model)
        size = int(self.asking.loaded.model.get_input_embeddings().weight.shape[1])
        table, parameters = self.table, self.corruption.parameters
        dims = dimensions(parameters.get("dims", 1), size)
        low, high = table.bounds or (STRENGTHS if table.parameter == "strength" else (1, size))
        if table.parameter == "dims" and high > size:
            raise InputError(f"'optimize.bounds': found {high:g}, expected at most the model's hidden size, {size}")
        self.space = Space(low, high, table.scale, table.parameter == "dims", dims if table.vector else 1)
        self.start = dims if table.parameter == "dims" else parameters["strength"]
        self.target = self._target()

    def _asking(self, model: ModelTable) -> Asking:
        return Asking(load_model(model), self.recipe, self.items, self.store, set(), self.read)

    def _target(self) -> float:
        if isinstance(self.table.target, float):
            return self.table.target
        chance = self.benchmark.chance(self.table.metric)
        if self.table.target == "chance" and chance is not None:
            return float(np.mean([chance(len(item.alternatives)) for item in self.items]))
        assert self.reference is not None  # a recipe without a retain model was refused
        return self._metric(self.reference)

    def __call__(self, parameter: np.ndarray, seed: int) -> Measured:
        """The distance from the target at a parameter, with noise by `seed`."""
        recipe = self.recipe
        corruption = self.corruption_at(parameter.tolist())
        run = Run("search", recipe.model, None, seed, recipe.gate, recipe.tokens, corruption)
        metric = self._metric(self._values(self.asking, run, self.trained, self.progress))
        return Measured(abs(metric - self.target), metric, metric - self.target)

    def corruption_at(self, parameter: list[float] | tuple[float, ...]) -> CorruptionTable:
        """The corruption with this parameter in place of its own."""
        value: Any = list(parameter) if self.table.vector else parameter[0]
        value = int(value) if self.table.parameter == "dims" else value
        parameters = {**self.corruption.parameters, self.table.parameter: value}
        return CorruptionTable(method=self.corruption.method, parameters=parameters)

    def _values(
        self, asking: Asking, run: Run, trained: TrainedGate | None, progress: Progress
    ) -> Mapping[str, np.ndarray]:
        asked, _ = asking.ask(run, trained, progress)
        return values_of([row_of(one, self.store, {}) for one in asked], self.benchmark.name)

    def _metric(self, values: Mapping[str, np.ndarray]) -> float:
        """The metric of the values of all held-out rows."""
        name = self.table.metric
        if name not in self.benchmark.aggregates:
            (subset,), (key,) = self.benchmark.forget_columns()[name]
            return float(values[f"{subset}/{key}"].mean())
        found = aggregates[name](values, self.reference, **self.benchmark.aggregates[name])
        if found is None:
            raise InputError(f"'optimize.metric': '{name}' needs [run.retain] or [optimize] surrogate to compare with")
        return float(found)


def check_plot() -> None:
    """Raises InputError without matplotlib: before a search, not after it."""
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'ecoprompt[plot]'")


def draw(recipe: Recipe, learned: Learned, output: Path = OUTPUT) -> Path:
    """The file that is written: a picture of the search. Raises InputError without matplotlib."""
    check_plot()
    path = output / recipe.name / "optimize.png"
    if not is_main():
        return path
    table, about = search_of(recipe)[0], learned.about
    parameter = f"{learned.corruption['method']}: {table.parameter}"
    distance = f"distance of {table.metric} from {about['target']:.4g}"
    figure = draw_search(learned.found.evaluations, learned.found.best, table.scale, parameter, distance)
    write_bytes_atomic(path, rendered(figure))
    return path
