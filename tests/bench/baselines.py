"""Trains every named method on tofu-mini-full, forget10, and prints what each did to its loss and what it cost.

`python tests/bench/baselines.py [--epochs 5] [METHOD …]`, from the project's root folder, each in a process of its own,
whose peak memory it is; plain attention trains faster on a CPU. What was trained is not trained again.
tests/recipes/tofu-mini-baselines.toml compares the models.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from ecoprompt.registry import methods
from ecoprompt.results import markdown_table

RECIPE = "tests/recipes/tofu-mini-baselines.toml"


def main() -> None:
    """Prints one row for each method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: all of them")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--output", default="results")
    options = parser.parse_args()
    cells = [["method", "steps", "loss at first", "at last", "seconds", "tokens", "peak memory, MiB"]]
    for name in options.methods or methods:
        changed = [f"--set=baseline.epochs={options.epochs}", "--set=model.attention=eager"]
        settings = ["--loss", name, *changed, "--output", options.output]
        command = [sys.executable, "-m", "ecoprompt", "baseline", RECIPE, *settings, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        (about,) = json.loads(done.stdout).values()
        losses = [f"{about[key]:.4g}" for key in ("first_loss", "last_loss")]
        costs = [f"{about['seconds']:.0f}", str(about["tokens"]), f"{about['peak_memory_mib']:.0f}"]
        cells.append([f"`{name}`", str(about["steps"]), *losses, *costs])
        sys.stderr.write(f"{' '.join(cells[-1])}\n")
    print(markdown_table(cells))


if __name__ == "__main__":
    main()
