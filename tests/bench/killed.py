"""Kills an evaluation of tests/recipes/tofu-mini.toml with SIGKILL at random moments and compares its table.

`python tests/bench/killed.py [--kills 10] [--seed 0] [--reference DIR]`, from the project's root folder. One evaluation
runs through (or DIR holds the results of one that did), another is killed and started again until it has been killed
`--kills` times; then it is left alone, and rows and table have to be the same to the last digit, the seconds left out.
"""

from __future__ import annotations

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE, NAME = "tests/recipes/tofu-mini.toml", "tofu-mini"


def main() -> int:
    """Exit status 0 if both are the same, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=35.0, help="seconds that an evaluation lives at most")
    parser.add_argument("--reference", type=Path, help="results of an evaluation of the same recipe")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        reference = options.reference or Path(folder) / "whole"
        if options.reference is None and start(reference).wait() != 0:
            return 1
        output = Path(folder) / "killed"
        kills = 0
        while kills < options.kills:
            life = generator.uniform(1.0, options.longest)
            process = start(output)
            time.sleep(life)
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            kills += 1
            store = output / NAME / "scores.jsonl"
            print(f"kill {kills} after {life:.1f} s, {store.stat().st_size if store.exists() else 0} bytes stored")
        if start(output).wait() != 0:
            return 1
        same = results(reference) == results(output)
    print(f"killed {kills} times; rows and table are {'the same' if same else 'NOT the same'}")
    return 0 if same else 1


def start(output: Path) -> subprocess.Popen[bytes]:
    """The evaluation, writing below `output`."""
    command = [sys.executable, "-m", "ecoprompt", "evaluate", RECIPE, "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def results(output: Path) -> tuple[str, list[list[str]]]:
    """The rows as written, and the cells of the table without the seconds."""
    folder = output / NAME
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        head, *body = csv.reader(file)
    kept = [number for number, name in enumerate(head) if name != "seconds"]
    cells = [[row[number] for number in kept] for row in (head, *body)]
    return (folder / "rows.jsonl").read_text(encoding="utf-8"), cells


if __name__ == "__main__":
    sys.exit(main())
