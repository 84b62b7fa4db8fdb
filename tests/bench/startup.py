"""Times how soon the commands answer that need no model; prints a Markdown table.

`python tests/bench/startup.py [--rounds 7]`; each is started anew, and an empty Python beside it tells what is ours.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "Python alone": ["-c", "pass"],
    "`ecoprompt --help`": ["-m", "ecoprompt", "--help"],
    "`ecoprompt optimize --help`": ["-m", "ecoprompt", "optimize", "--help"],
    "`ecoprompt evaluate nowhere` (no such recipe)": ["-m", "ecoprompt", "evaluate", "nowhere"],
    "`ecoprompt evaluate tofu --dry-run`": ["-m", "ecoprompt", "evaluate", "tofu", "--dry-run"],
    "`ecoprompt evaluate tofu-ablation --dry-run`": ["-m", "ecoprompt", "evaluate", "tofu-ablation", "--dry-run"],
    "`import ecoprompt`": ["-c", "import ecoprompt"],
    "`import torch, transformers`": ["-c", "import torch, transformers"],
}  # fmt: skip


def main() -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print("| what | median, s | slowest, s |\n| --- | ---: | ---: |")
    for name, arguments in COMMANDS.items():
        took = []
        for _ in range(options.rounds):
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
            took.append(time.perf_counter() - started)
        print(f"| {name} | {statistics.median(took):.2f} | {max(took):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
