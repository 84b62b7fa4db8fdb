"""Two processes on a CPU against one: the four long commands on tofu-mini, with few rows.

`python tests/bench/processes.py [--rows 40]`, from the project's root folder. Prints a table: what is compared, of one
process and of two that take half a batch each, the largest difference, and the seconds of each.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

LAUNCHED = Path(__file__).parents[1] / "launched.py"
TWO = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
RECIPES = {"optimize": "search", "evaluate": "search", "finetune": "finetune", "baseline": "baselines"}
COURSE = {"finetune": ["models=['retain']", "epochs=0.1"], "baseline": ["loss=npo-gd", "epochs=1"]}
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=40)
    rows = parser.parse_args().rows
    print("| what | one process | two processes | largest difference | seconds of one | of two |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for command, recipe in RECIPES.items():
            file = f"tests/recipes/tofu-mini{'-' if recipe else ''}{recipe}.toml"
            found, seconds = [], []
            for count in (1, 2):
                output = Path(folder) / str(count)
                started = time.perf_counter()
                run(count, file, output, command, settings(command, rows, BATCH // count))
                seconds.append(time.perf_counter() - started)
                found.append(numbers(output / f"tofu-mini-{recipe}", command))
            apart = max(abs(one - two) for one, two in zip(*found, strict=True))
            cells = [command, *(f"{len(one)} numbers, last {one[-1]:.6g}" for one in found), f"{apart:.1e}"]
            print(f"| {' | '.join([*cells, *(f'{one:.0f}' for one in seconds)])} |", flush=True)


def settings(command: str, rows: int, batch: int) -> list[str]:
    """The keys that keep a command short."""
    if command in COURSE:
        common = (f"batch_size={batch}", "by_length=false", "arithmetic=float32")
        return [f"{command}.{one}" for one in (*COURSE[command], *common)]
    limit = f"evaluate.limit={{forget={rows},retain={rows},real_authors={rows},world_facts={rows}}}"
    return [limit, "optimize.budget=3", "model.batch_tokens=2048"]


def run(count: int, file: str, output: Path, command: str, keys: Sequence[str]) -> None:
    """One command in so many processes."""
    launcher = f"{TWO} --dynamo_backend no --main_process_port 0".split() if count == 2 else []
    subprocess.run([sys.executable, *launcher, str(LAUNCHED), file, str(output), command, *keys], check=True)


def numbers(folder: Path, command: str) -> list[float]:
    """What a command found: every number of its table, its trace, or the loss of every step."""
    if command == "evaluate":
        with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        values = [json.loads(line)["values"] for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]
        cells = [cell for row in table for name, cell in row.items() if name not in ("run", "seconds") and cell]
        return [float(cell) for cell in cells] + [float(value) for one in values for value in one.values()]
    if command == "optimize":
        (trace,) = folder.glob("optimize-*.jsonl")
        return [json.loads(line)["metric"] for line in trace.read_text(encoding="utf-8").splitlines()[1:]]
    (about,) = (folder / ("models" if command == "finetune" else "baselines")).glob("*/training.json")
    return list(json.loads(about.read_text(encoding="utf-8"))["losses"])


if __name__ == "__main__":
    main()
