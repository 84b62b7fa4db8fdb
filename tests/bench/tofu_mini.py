"""Runs tests/recipes/tofu-mini.toml for several seeds and prints its table, with times, as Markdown.

`python tests/bench/tofu_mini.py [--seeds 0 1 2] [--shared ../shared] [--set KEY=VALUE ...]`; `make bench` runs it.
Every seed is evaluated in a folder of its own, so that all of them are timed from nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[2]
COLUMNS = ("forget_quality", "model_utility", "forget_rouge", "forget_probability", "retain_rouge")
DATA, MODELS = Path("data/tofu"), (Path("models/tofu-mini-full"), Path("models/tofu-mini-retain90"))


def main() -> int:
    """Exit status 0, or 2 where data or models are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/ and models/")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    options = parser.parse_args()
    missing = [str(options.shared / part) for part in (DATA, *MODELS) if not (options.shared / part).is_dir()]
    if missing:
        print(f"tofu_mini: no folder {', '.join(missing)}; --shared names where data/ and models/ lie", file=sys.stderr)
        return 2
    rows: list[list[str]] = []
    gates: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            started = time.perf_counter()
            summary = run(options.shared, Path(folder) / str(seed), [f"seed={seed}", *options.overrides])
            wall = time.perf_counter() - started
            rows += table_rows(seed, summary, wall)
            gates += [f"seed {seed}, {name}: {gate(entry)}" for name, entry in summary["runs"].items() if entry["gate"]]
    head = ["seed", "run", *(name.replace("_", " ") for name in COLUMNS), "seconds", "all of it, seconds"]
    for cells in (head, ["---", "---", *["---:"] * (len(head) - 2)], *rows):
        print(f"| {' | '.join(cells)} |")
    print()
    print("Gate: " + "; ".join(gates) + ".")
    print(f"Machine: {machine(summary)}.")
    return 0


def run(shared: Path, output: Path, overrides: list[str]) -> dict[str, Any]:
    """The summary of one evaluation of the recipe, written below `output`."""
    from ecoprompt.evaluate import evaluate
    from ecoprompt.recipe import load_recipe

    places = {
        "model.name": shared / MODELS[0],
        "run.retain.model": shared / MODELS[1],
        "data.root": shared / DATA.parent,
    }
    fixed = [f"{key}='{path.resolve()}'" for key, path in places.items()]
    recipe = load_recipe(str(ROOT / "tests/recipes/tofu-mini.toml"), [*fixed, *overrides])
    return evaluate(recipe, output, report).summary


def report(what: str, done: int, total: int) -> None:
    """Progress on stderr, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done}/{total}\033[K", end="", file=sys.stderr, flush=True)


def table_rows(seed: int, summary: dict[str, Any], wall: float) -> list[list[str]]:
    """One row of cells for each run."""
    from ecoprompt.results import number

    return [
        [
            str(seed),
            name,
            *(number(run["metrics"][column]) for column in COLUMNS),
            f"{run['seconds']:.0f}",
            f"{wall:.0f}",
        ]
        for name, run in summary["runs"].items()
    ]


def gate(run: dict[str, Any]) -> str:
    """How the gate of a run judged the prompts, in words."""
    found = run["gate"]
    return (
        f"{found['false_negatives']} of {found['forget_prompts']} missed, "
        f"{found['false_positives']} of {found['other_prompts']} falsely flagged"
    )


def machine(summary: dict[str, Any]) -> str:
    """What it ran on."""
    hardware, versions = summary["hardware"], summary["versions"]
    processor = platform.processor() or hardware["machine"]
    gpus = f", {', '.join(hardware['gpus'])}" if hardware["gpus"] else ""
    return f"{processor}, {hardware['threads']} threads{gpus}, torch {versions['torch']}"


if __name__ == "__main__":
    sys.exit(main())
