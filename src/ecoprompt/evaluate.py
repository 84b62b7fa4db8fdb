"""Evaluates the runs of a recipe on its benchmarks: rows, metrics, results."""

from __future__ import annotations

import gc
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ecoprompt.benchmarks import Benchmark, ForgetSet, Item, parse_forget
from ecoprompt.data import fill
from ecoprompt.guard import Guard
from ecoprompt.metrics import reads
from ecoprompt.models import Loaded, encode, load_model, locate, render, render_answer
from ecoprompt.pack import OUTPUT, TrainedGate, make_forget, obtain_gate
from ecoprompt.recipe import EvaluateTable, Recipe, Run, digest, resolve_runs
from ecoprompt.registry import InputError, Progress, aggregates, benchmarks, metrics, quiet
from ecoprompt.results import Store, count_rows, grid, write_results
from ecoprompt.scoring import Request, answer, log_prob

RETAIN = "retain"
"""The run whose values the forget set's are compared with."""
STORE = "scores.jsonl"
JUDGED = 64
"""Prompts that a gate judges at a time where no model is asked."""
REPORTED = ("torch", "transformers", "scikit-learn", "numpy", "scipy")


@dataclass(frozen=True)
class Asked:
    """A row put to a model: by what its metrics read, the keys under which the results are stored."""

    item: Item
    keys: dict[str, list[str]]
    flagged: bool = False
    score: float | None = None


@dataclass
class Evaluated:
    """What an evaluation found: the summary as written to summary.json, every row, and the files."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    files: list[Path] = field(default_factory=list)

    def samples(self, count: int = 3) -> tuple[list[str], list[str], dict[str, list[str]]]:
        """(prompts, true answers, answers by run) of a few generations, forget set first, spread over its rows."""
        shown = [row for row in self.rows if "generation" in row]
        first = [row for row in shown if row["forget"]] or shown
        prompts = list(dict.fromkeys((row["subset"], row["index"]) for row in first))
        chosen = prompts[:: max(1, len(prompts) // count)][:count]
        rows = {(row["run"], row["subset"], row["index"]): row for row in shown}
        runs = list(self.summary["runs"])
        some = [rows[runs[0], *place] for place in chosen]
        answers = {run: [rows[run, *place]["generation"] for place in chosen] for run in runs}
        return [row["prompt"] for row in some], [row["target"] for row in some], answers


def evaluate(recipe: Recipe, output: Path = OUTPUT, progress: Progress = quiet) -> Evaluated:
    """Evaluate all runs and write the results under `output`/<recipe>; what a killed evaluation stored is kept."""
    runs = runs_of(recipe)
    asks_model = any(benchmarks[table.benchmark].asks_model for table in recipe.evaluate)
    for run in runs if asks_model else ():  # before any work: a wrong name is not to be found out an hour later
        locate(run.model.name or "")
    items = _items(recipe)
    folder = output / recipe.name
    store = Store(folder / STORE)
    gates = {
        digest(run.gate, run.seed): obtain_gate(recipe, run.gate, run.seed or 0, output, progress)
        for run in runs
        if run.gate is not None
    }
    done: dict[str, tuple[list[Asked], float, dict[str, Any] | None]] = {}
    claimed: set[str] = set()
    for run in runs if not asks_model else ():
        gate = gates[digest(run.gate, run.seed)] if run.gate is not None else None
        asked, seconds = _judge(recipe, run, gate, items, _named(progress, run.name))
        done[run.name] = asked, seconds, _gate_report(asked, gate) if gate else None
    for group in _by_model(runs) if asks_model else ():
        loaded = load_model(group[0].model)
        for run in group:
            gate = gates[digest(run.gate, run.seed)] if run.gate is not None else None
            asked, seconds = _run(loaded, recipe, run, gate, items, store, claimed, _named(progress, run.name))
            done[run.name] = asked, seconds, _gate_report(asked, gate) if gate else None
        del loaded
        gc.collect()
    return _conclude(recipe, runs, done, store, folder)


def _conclude(
    recipe: Recipe,
    runs: Sequence[Run],
    done: Mapping[str, tuple[list[Asked], float, dict[str, Any] | None]],
    store: Store,
    folder: Path,
) -> Evaluated:
    """Metrics, summary and files of runs that are computed."""
    rows = {run.name: [_row(asked, store) for asked in done[run.name][0]] for run in runs}
    values = {name: _values(found) for name, found in rows.items()}
    entries: dict[str, Any] = {}
    for run in runs:
        _, seconds, gate = done[run.name]
        entries[run.name] = {
            "metrics": _metrics(recipe, values[run.name], values.get(_retain(run.name, values))),
            "seconds": seconds,
            "gate": gate,
            "model": run.model.name,
        }
    tables = [benchmarks[table.benchmark] for table in recipe.evaluate]
    flat = [{"run": name, **row} for name, found in rows.items() for row in found]
    summary = {
        "recipe": recipe.name,
        "forget": recipe.data.forget if recipe.data else None,
        "seed": recipe.seed,
        "runs": entries,
        "columns": [column for table in tables for column in table.table_columns()],
        "better": {name: way for table in tables for name, way in table.better().items()},
        "grids": {table.name: grid(table.subsets) for table in tables if not table.asks_model},
        "rows": count_rows(flat),
        "resolved": recipe.document(),
        "versions": {name: version(name) for name in ("ecoprompt", *REPORTED)},
        "hardware": _hardware(),
    }
    return Evaluated(summary, flat, write_results(folder, summary, flat))


def _retain(run: str, values: Mapping[str, Any]) -> str:
    """The run to compare `run` with: of the same point of a sweep, if that changes the retain run too."""
    point = set(run.partition("[")[2].removesuffix("]").split(","))
    for name in values:
        base, _, rest = name.partition("[")
        if base == RETAIN and set(rest.removesuffix("]").split(",")) <= point | {""}:
            return name
    return RETAIN


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `evaluate` would do, told without a model, a network or torch: recipe, runs, rows and devices."""
    rows: dict[str, dict[str, int | None]] = {}
    for table, benchmark, forget_set, root in _tables(recipe):
        counts = benchmark.dry_rows(forget_set, root)
        rows[benchmark.name] = {name: _at_most(count, _limit(table, name)) for name, count in counts.items()}
    return {
        "recipe": recipe.document(),
        "runs": {run.name: {"model": run.model.name, "guarded": run.guarded} for run in resolve_runs(recipe)},
        "rows": rows,
        "devices": _devices(),
    }


def _at_most(count: int | None, limit: int | None) -> int | None:
    return count if limit is None or count is None else min(count, limit)


def runs_of(recipe: Recipe) -> list[Run]:
    """The runs to evaluate; raises InputError for a recipe that has none, or no benchmark."""
    runs = resolve_runs(recipe)
    if not runs or not recipe.evaluate:
        missing = "[run.NAME]" if not runs else "[[evaluate]]"
        raise InputError(f"{recipe.name}: there is nothing to evaluate: the recipe has no {missing}")
    return runs


def _tables(recipe: Recipe) -> Iterator[tuple[EvaluateTable, Benchmark, ForgetSet | None, Path | None]]:
    """Each [[evaluate]] with its benchmark, the forget set if it is of that benchmark, and the data's root."""
    root = Path(recipe.data.root) if recipe.data and recipe.data.root else None
    named = parse_forget(recipe.data.forget) if recipe.data else None
    for table in recipe.evaluate:
        benchmark = benchmarks[table.benchmark]
        yield table, benchmark, named[1] if named and named[0].name in (benchmark.name, benchmark.of) else None, root


def _limit(table: EvaluateTable, subset: str) -> int | None:
    return table.limit.get(subset) if isinstance(table.limit, dict) else table.limit


def _items(recipe: Recipe) -> list[Item]:
    """All rows that every run is asked."""
    return [
        item
        for table, benchmark, forget_set, root in _tables(recipe)
        for subset in benchmark.subsets
        for item in benchmark.items(subset, forget_set, root, _limit(table, subset), recipe.seed)
    ]


def _by_model(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs, those of one model together, so that each model is loaded once."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(digest(run.model), []).append(run)
    return list(groups.values())


def _named(progress: Progress, run: str) -> Progress:
    return lambda what, done, total: progress(f"{run}: {what}", done, total)


def _run(
    loaded: Loaded,
    recipe: Recipe,
    run: Run,
    trained: TrainedGate | None,
    items: Sequence[Item],
    store: Store,
    claimed: set[str],
    progress: Progress,
) -> tuple[list[Asked], float]:
    """Ask a model all rows in one state; returns what was asked and the seconds that computing it took.

    `claimed` are the keys that earlier runs answer; this run's are added.
    """
    prefix = _prefix(recipe, run)
    progress("preparing", 0, 1)
    requests = [_requests(loaded, item, prefix) for item in items]
    guard = None
    if trained is not None and run.tokens is not None and run.corruption is not None:
        guard = Guard(loaded.model, loaded.tokenizer, make_forget(trained, run.tokens, run.corruption, run.seed or 0))
    with guard or nullcontext():
        decisions = guard.decide([encode(loaded.tokenizer, prompt) for prompt, _ in requests]) if guard else None
        asked: list[Asked] = []
        new: dict[str, Request] = {}
        for number, (item, (_, by_input)) in enumerate(zip(items, requests, strict=True)):
            decision = decisions[number] if decisions else None
            corrupted = None
            if decision is not None and decision.flagged:  # which turns the gate flagged shows in the positions
                corrupted = digest(version("ecoprompt"), run.tokens, run.corruption, run.seed, decision.positions)
            keys: dict[str, list[str]] = {}
            for name, wanted in by_input.items():
                keys[name] = [request.key(loaded.fingerprint, corrupted) for request in wanted]
                new.update(zip(keys[name], wanted, strict=True))
            asked.append(Asked(item, keys, corrupted is not None, decision.score if decision else None))
        todo = [(key, request) for key, request in new.items() if key not in claimed]
        seconds = answer(loaded, todo, store, guard, run.model.batch_tokens, progress)
    claimed.update(new)
    return asked, seconds


def _judge(
    recipe: Recipe, run: Run, trained: TrainedGate | None, items: Sequence[Item], progress: Progress
) -> tuple[list[Asked], float]:
    """What a run's gate says of all rows, without a language model; and the seconds that it took."""
    prefix = _prefix(recipe, run)
    started = time.perf_counter()
    asked = []
    for start in range(0, len(items), JUDGED):
        progress("judging the prompts", start, len(items))
        some = items[start : start + JUDGED]
        scores = trained.gate.score([prefix + item.prompt for item in some]) if trained else [None] * len(some)
        for item, score in zip(some, scores, strict=True):
            flagged = score is not None and trained is not None and not score <= trained.threshold
            asked.append(Asked(item, {}, flagged, None if score is None else float(score)))
    return asked, time.perf_counter() - started


def _prefix(recipe: Recipe, run: Run) -> str:
    """What stands before every prompt of a run, with the names of the forget set's targets filled in."""
    if run.prefix is None:
        return ""
    targets = parse_forget(recipe.data.forget)[1].targets if recipe.data else ()
    return fill(run.prefix, {"targets": ", ".join(targets)}).strip() + "\n"


def _requests(loaded: Loaded, item: Item, prefix: str) -> tuple[str, dict[str, list[Request]]]:
    """The rendered prompt of a row, and by what its metrics read the requests that give it.

    A generation may be as long as the benchmark allows prompt and answer together, a run's prefix not counted.
    """
    benchmark = benchmarks[item.benchmark]
    bare = [{"role": "user", "content": item.prompt}]
    messages = [{"role": "user", "content": prefix + item.prompt}]
    prompt = render(loaded.tokenizer, messages)
    texts = {"answer": [item.target], "reference": [item.reference], "alternatives": list(item.alternatives)}
    requests: dict[str, list[Request]] = {}
    for metric in benchmark.subset(item.subset).metrics.values():
        for name in reads(metric):
            if name in texts and name not in requests:
                completions = [render_answer(loaded.tokenizer, messages, text) for text in texts[name]]
                requests[name] = [Request("log_prob", prompt, completion) for completion in completions]
            elif name == "generation":
                room = benchmark.max_length - len(encode(loaded.tokenizer, render(loaded.tokenizer, bare)))
                requests[name] = [Request("generation", prompt, max_new_tokens=max(room, 1))]
    return prompt, requests


def _row(asked: Asked, store: Store) -> dict[str, Any]:
    """One row of rows.jsonl: what was asked, what came back, and the value of every metric."""
    item = asked.item
    subset = benchmarks[item.benchmark].subset(item.subset)
    stored = {name: [store.get(key) for key in keys] for name, keys in asked.keys.items()}
    read: dict[str, Any] = {"target": item.target, "flagged": float(asked.flagged)}
    for name, found in stored.items():
        if name == "generation":
            read[name] = found[0]
        else:
            probabilities = [log_prob(value) for value in found]
            read[name] = probabilities if name == "alternatives" else probabilities[0]
    return {
        "benchmark": item.benchmark,
        "subset": item.subset,
        "forget": subset.forget,
        "index": item.index,
        "prompt": item.prompt,
        "target": item.target,
        "flagged": asked.flagged,
        "score": asked.score,
        **({"generation": read["generation"]} if "generation" in read else {}),
        "values": {
            name: metrics[metric](*(read[part] for part in reads(metric))) for name, metric in subset.metrics.items()
        },
    }


def _values(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The rows' values as arrays, by benchmark and "subset/metric"."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["values"].items():
            found.setdefault(f"{row['benchmark']}:{row['subset']}/{name}", []).append(value)
    return {name: np.array(values) for name, values in found.items()}


def _metrics(
    recipe: Recipe, values: Mapping[str, np.ndarray], retain: Mapping[str, np.ndarray] | None
) -> dict[str, Any]:
    """The aggregates of each benchmark, then the mean of every row metric by subset."""
    found: dict[str, Any] = {}
    for table in recipe.evaluate:
        benchmark = benchmarks[table.benchmark]
        own = _of(values, benchmark.name)
        theirs = _of(retain, benchmark.name) if retain is not None else None
        for name, parameters in benchmark.aggregates.items():
            found[name] = aggregates[name](own, theirs, **parameters)
        found |= {name.replace("/", "_"): float(array.mean()) for name, array in own.items()}
    return found


def _of(values: Mapping[str, np.ndarray], benchmark: str) -> dict[str, np.ndarray]:
    head = f"{benchmark}:"
    return {name.removeprefix(head): array for name, array in values.items() if name.startswith(head)}


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
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpus": devices}


def _devices() -> str:
    """The device plan in words, asking no torch."""
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout.splitlines()
        if listed:
            return f"{len(listed)} GPU(s), bfloat16: {'; '.join(line.partition(' (UUID')[0] for line in listed)}"
    return f"CPU ({platform.machine()}), float32"
