"""Counts what `optimize` needs on TOFU, forget10, by method, start and seed; prints Markdown tables.

`python tests/bench/search.py [--seeds 20] [--starts 0.1 1 100] [--methods adaptive published] [--set KEY=VALUE ...]`.
Each search reads half of the forget set's rows; its result is then evaluated on the others. `--dims` searches the
dimensions of `zero_out_top_k` instead, beside a grid over all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests/recipes/tofu-mini-search.toml"
PUBLISHED = ("optimize.budget=21", "optimize.bounds=[1e-8, 1000.0]")
"""The published method makes ten updates of two evaluations each and looks at the last value; it steps below 0.01."""


def main() -> int:
    """Exit status 0, or 2 where data or models are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/ and models/")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--starts", type=float, nargs="+", default=[0.1, 1.0, 100.0])
    parser.add_argument("--methods", nargs="+", default=["adaptive", "published"])
    parser.add_argument("--dims", action="store_true", help="search the dims of zero_out_top_k")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    options = parser.parse_args()
    if not (options.shared / "data/tofu").is_dir():
        print(f"search: no folder {options.shared / 'data/tofu'}; --shared names where data/ lies", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        if options.dims:
            return over_dims(options, Path(folder))
        head = ["method", "start", "seeds", "evaluations: median (most)", "forget quality: least, median", "above 0.1"]
        line([*head, "strengths found", "seconds a search"])
        line(["---", *["---:"] * 7])
        for method in options.methods:
            for start in options.starts:
                found = [search(options, Path(folder), method, seed, start) for seed in range(options.seeds)]
                line([method, f"{start:g}", str(options.seeds), *summary(found)])
    return 0


def read(options: argparse.Namespace, *overrides: str) -> Any:
    """The recipe, with the places of its data and models."""
    from ecoprompt.recipe import load_recipe

    places = {
        "data.root": "data",
        "model.name": "models/tofu-mini-full",
        "run.retain.model": "models/tofu-mini-retain90",
    }
    fixed = [f"{key}='{(options.shared / place).resolve()}'" for key, place in places.items()]
    return load_recipe(str(RECIPE), [*fixed, *overrides, *options.overrides])


def search(options: argparse.Namespace, folder: Path, method: str, seed: int, start: float) -> dict[str, Any]:
    """One search from one start, and the forget quality of what it found on the rows that it did not read."""
    from ecoprompt.optimize import optimize

    settings = (f"optimize.method={method}", f"seed={seed}", f"corruption.strength={start}")
    recipe = read(options, *settings, *(PUBLISHED if method == "published" else ()))
    started = time.perf_counter()
    learned = optimize(recipe, folder)
    seconds = time.perf_counter() - started
    quality = quality_of(recipe, learned.corruption, folder)
    count = len(learned.found.evaluations)
    strength = learned.corruption["strength"]
    print(f"{method} {start:g} seed {seed}: {count}, {strength:.4g}, {quality:.3g}", file=sys.stderr, flush=True)
    return {"evaluations": count, "quality": quality, "strength": strength, "seconds": seconds}


def quality_of(recipe: Any, corruption: dict[str, Any], folder: Path) -> float:
    """Forget quality on the forget set's rows that a search left out; nothing else is asked."""
    from ecoprompt.asking import Asking, row_of
    from ecoprompt.evaluate import STORE, tables_of, values_of
    from ecoprompt.metrics import forget_quality
    from ecoprompt.models import load_model
    from ecoprompt.pack import obtain_gate
    from ecoprompt.recipe import CorruptionTable, Run, resolve_runs
    from ecoprompt.registry import quiet
    from ecoprompt.results import Store

    ((_, benchmark, forget_set),) = tables_of(recipe)
    apart = {"seed": recipe.seed, "held_out": recipe.optimize.held_out}
    items = benchmark.items("forget", forget_set, recipe.root, None, **apart)
    gate = obtain_gate(recipe, recipe.gate, recipe.seed, folder)
    parameters = dict(corruption)
    method = parameters.pop("method")
    eco = CorruptionTable(method=method, parameters=parameters)
    store, found = Store(folder / recipe.name / STORE), []
    retain = next(run for run in resolve_runs(recipe) if run.name == "retain")
    for run, trained in (
        (retain, None),
        (Run("eco", recipe.model, None, recipe.seed, recipe.gate, recipe.tokens, eco), gate),
    ):
        asking = Asking(load_model(run.model), recipe, items, store, set(), frozenset(["truth_ratio"]))
        asked, _ = asking.ask(run, trained, quiet)
        found.append(values_of([row_of(one, store, {}) for one in asked], benchmark.name))
    return forget_quality(found[1], found[0]) or 0.0


def summary(found: Sequence[dict[str, Any]]) -> list[str]:
    """The cells of a row."""
    counts, qualities = [one["evaluations"] for one in found], [one["quality"] for one in found]
    strengths = [one["strength"] for one in found]
    return [
        f"{statistics.median(counts):g} ({max(counts)})",
        f"{min(qualities):.2g}, {statistics.median(qualities):.2g}",
        f"{sum(quality > 0.1 for quality in qualities)} of {len(found)}",
        f"{min(strengths):.3g} to {max(strengths):.3g}",
        f"{statistics.median(one['seconds'] for one in found):.0f}",
    ]


def over_dims(options: argparse.Namespace, folder: Path) -> int:
    """The best forget quality of a grid over the dims of `zero_out_top_k`, and that of a search."""
    from ecoprompt.optimize import optimize

    zero = 'corruption={ method = "zero_out_top_k", dims = 16 }'
    settings = ("optimize.parameter=dims", zero)
    line(["seed", "way", "evaluations", "dims", "forget quality"])
    line(["---", "---", "---:", "---:", "---:"])
    for seed in range(options.seeds):
        recipe = read(options, *settings, f"seed={seed}")
        tried = {
            dims: quality_of(recipe, {"method": "zero_out_top_k", "dims": dims}, folder)
            for dims in (*range(8, 160, 8), *range(160, 257, 16))
        }
        best = max(tried, key=lambda dims: tried[dims])
        line([str(seed), "grid", str(len(tried)), str(best), f"{tried[best]:.2g}"])
        learned = optimize(recipe, folder)
        quality = quality_of(recipe, learned.corruption, folder)
        count = len(learned.found.evaluations)
        line([str(seed), "search", str(count), str(learned.corruption["dims"]), f"{quality:.2g}"])
    return 0


def line(cells: Sequence[str]) -> None:
    """A row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
