"""What a recipe's commands would do, told without a model, a network or torch."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ecoprompt.benchmarks import parse_forget
from ecoprompt.evaluate import metrics_read, tables_of
from ecoprompt.hub import HUB_ID
from ecoprompt.lessons import planned_training
from ecoprompt.models import aliases
from ecoprompt.pack import OUTPUT, is_published
from ecoprompt.recipe import Recipe, parse_recipe, resolve_runs
from ecoprompt.registry import benchmarks, metrics


def plan(recipe: Recipe) -> dict[str, Any]:
    """What a recipe would do, told without model, network and torch: its tables, runs, rows, what to fetch, devices."""
    recipe.enter()
    rows: dict[str, dict[str, int | None]] = {}
    for table, benchmark, forget_set in tables_of(recipe):
        counts = benchmark.dry_rows(forget_set, recipe.root)
        held_out = recipe.optimize.held_out if recipe.optimize else 0.0
        for name, count in counts.items():
            if benchmark.subset(name).forget and count is not None:
                counts[name] = count - round(held_out * count)
        rows[benchmark.name] = {name: _at_most(count, table.limit_of(name)) for name, count in counts.items()}
    if recipe.data is not None and not recipe.evaluate:  # what remains to be done is to train its gate
        benchmark, forget_set = parse_forget(recipe.data.forget)
        rows[benchmark.name] = benchmark.dry_gate_rows(forget_set, recipe.root)
        rows |= {name: benchmarks[name].dry_gate_rows(None, recipe.root) for name in recipe.data.checks}
    return {
        "recipe": recipe.document(),
        "runs": {run.name: {"model": run.model.name, "guarded": run.guarded} for run in resolve_runs(recipe)},
        "rows": rows,
        "fetches": _fetches(recipe),
        "devices": _devices(),
        **({"search": _planned_search(recipe)} if recipe.optimize else {}),
        **planned_training(recipe),
    }


def gate_part(recipe: Recipe) -> Recipe:
    """What `train-classifier` reads of a recipe; raises InputError where it has no [data]."""
    recipe.subject()
    read = ("name", "seed", "data", "gate", "tokens", "corruption", "benchmark")
    return parse_recipe({name: recipe._written[name] for name in read if name in recipe._written}, recipe.name)


def _fetches(recipe: Recipe) -> list[str]:
    """What the runs need from the Hub and is not a local file: data sets, models, classifiers; and what is to be put in
    place by hand. Asks no network."""
    runs = resolve_runs(recipe)
    gates = [run.gate for run in runs if run.gate is not None] or [recipe.gate] * (recipe.data is not None)
    found: list[str | None] = []
    for _, benchmark, forget_set in tables_of(recipe):
        found += benchmark.fetches(forget_set, recipe.root)
    if recipe.data is not None and not (recipe.evaluate and all(map(is_published, gates))):
        benchmark, forget_set = parse_forget(recipe.data.forget)
        found += benchmark.fetches(forget_set, recipe.root, gate=True)
        found += [one for name in recipe.data.checks for one in benchmarks[name].fetches(None, recipe.root, gate=True)]
    named = [run.model.name for run in runs] + [recipe.finetune.base if recipe.finetune else None]
    named += [gate.parameters.get("classifier") or gate.parameters.get("base") for gate in gates]
    named += [run.tokens.parameters["model"] for run in runs if run.tokens and run.tokens.select == "ner"]
    named += [metrics[metric].model for metric in metrics_read(recipe)]
    for name in filter(None, named):
        place = aliases().get(name, {}).get("hub", name)
        if HUB_ID.fullmatch(place) and not Path(place).is_dir():
            found.append(place)
        elif place not in aliases() and not Path(place).exists() and OUTPUT not in Path(place).parents:
            found.append(f"{place} (a folder of your own)")
    return [name for name in dict.fromkeys(found) if name]


def _planned_search(recipe: Recipe) -> dict[str, Any]:
    """What `optimize` would do: its settings and how many rows it reads."""
    table = recipe.optimize
    assert table is not None
    rows: dict[str, int | None] = {}
    for entry, benchmark, forget_set in tables_of(recipe):
        counts = benchmark.dry_rows(forget_set, recipe.root)
        for name in benchmark.forget_columns().get(table.metric, ([], []))[0]:
            count = counts[name]
            rows[name] = _at_most(None if count is None else round(table.held_out * count), entry.limit_of(name))
    named = ("metric", "target", "parameter", "method", "budget")
    return {name: getattr(table, name) for name in named} | {"rows": rows}


def _at_most(count: int | None, limit: int | None) -> int | None:
    return count if limit is None or count is None else min(count, limit)


def _devices() -> str:
    """The device plan in words, asking no torch."""
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout.splitlines()
        if listed:
            return f"{len(listed)} GPU(s), bfloat16: {'; '.join(line.partition(' (UUID')[0] for line in listed)}"
    return f"CPU ({platform.machine()}), float32"
