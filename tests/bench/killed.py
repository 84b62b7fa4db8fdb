"""Kills the four long commands with SIGKILL at random moments, half of them of writing, and starts them again.

`python tests/bench/killed.py [--kills 50] [--seed 0] [COMMAND …]`, from the project's root folder. Each command runs
through once, and beside that is killed and started again until it has had its share of the kills; one that ends before
its kill is compared and begun anew. A start is a fork of this process, which has loaded torch, so that kills fall into
the work. No start may fail, compute anything twice or lose what was finished, and in the end every file has to say the
same, weights bit for bit, measured seconds and memory left out.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecoprompt.cli import main as main_of_ecoprompt

LOADED = [f"ecoprompt.{name}" for name in ("baseline", "evaluate", "optimize", "sampling", "printing")]
LOADED += ["matplotlib.pyplot", "scipy.stats", "sklearn.linear_model", "transformers.models.llama.modeling_llama"]
FORK = multiprocessing.get_context("fork")
EPOCH = ["--set", "finetune.epochs=1", "--set", "finetune.by_length=false", "--set", "finetune.save_steps=4"]
UNLEARNED = ["quickstart-baselines", "--set", "model.name=quickstart", "--set", "baseline.save_steps=2"]
SMALL = ["--set", "evaluate.limit=12", "--set", "model.batch_tokens=600"]
COMMANDS = {
    "evaluate": ["evaluate", "quickstart-search", *SMALL],
    "optimize": ["optimize", "quickstart-search", *SMALL],
    "finetune": ["finetune", "quickstart-baselines", *EPOCH],
    "baseline": ["baseline", *UNLEARNED, "--loss", "npo"],
}
PAGE = os.sysconf("SC_PAGE_SIZE")
MEASURED = {"seconds", "peak_memory_mib"}
TEMPORARY = re.compile(r"\..+\.\d+")
"""The name under which a process writes what it then moves into place."""
CHECKPOINT = re.compile(r"\.(?P<model>[\w-]+)-[0-9a-f]{16}/checkpoint-(?P<step>\d+)")


@dataclass
class Life:
    """One start of a command: how it ended, after how long, how it wrote its files, and what it said."""

    status: int = 0
    seconds: float = 0.0
    writes: int = 0
    pages: int = 0
    said: str = ""
    paths: set[str] = field(default_factory=set)


def main() -> int:
    """Exit status 0 if nothing was lost and all came to the same, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commands", nargs="*", metavar="COMMAND", default=list(COMMANDS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    load()
    rng, problems, torn = random.Random(options.seed), [], 0
    for number, name in enumerate(options.commands):
        kills = len(range(number, options.kills, len(options.commands)))
        with tempfile.TemporaryDirectory() as folder:
            found, half = torment(name, Path(folder), kills, rng)
        problems += found
        torn += half
    print(f"{options.kills} kills, of which {torn} left something half written; problems: {len(problems)}")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def load() -> None:
    """Imports what the commands do, so that a start is all work."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}  # as the commands set them
    for name in LOADED:
        importlib.import_module(name)


def torment(name: str, folder: Path, kills: int, rng: random.Random) -> tuple[list[str], int]:
    """Kills a command so often; what went wrong, and how many of the kills left something half written."""
    began = time.monotonic()
    whole = live(name, folder / "whole")
    expected, output = contents(folder / "whole"), folder / "killed"
    problems = check(name, whole, {}, folder / "whole", 0)
    done = ended = torn = 0
    while done <= kills:
        before = finished(output)
        limits = {"writes": rng.randint(1, max(whole.writes // 3, 1))} if done % 2 else {}
        limits = limits or {"seconds": rng.uniform(0, whole.seconds)}
        life = live(name, output, **limits if done < kills else {})
        problems += check(name, life, before, output, 0 if life.status == 0 else -9)
        if life.status == 0:
            problems += [f"{name}: {path} differs" for path in differing(expected, contents(output))]
            shutil.rmtree(output)
            ended += 1
        else:
            torn += is_torn(output)
        done += life.status != 0 or done == kills
    took = time.monotonic() - began
    print(f"{name}: {whole.seconds:.1f} s undisturbed, {kills} kills, {torn} half written; {ended} ends, {took:.0f} s")
    return problems, torn


def live(name: str, output: Path, seconds: float = math.inf, writes: float = math.inf) -> Life:
    """One start of a command, which is killed after so many seconds or changes of its files unless it ends before."""
    began, last, life = time.monotonic(), stamps(output), Life()
    with tempfile.TemporaryFile("w+") as said:
        process = FORK.Process(target=command, args=([*COMMANDS[name], "--output", str(output)], said.fileno()))
        process.start()
        while process.is_alive():
            now = stamps(output)
            life.writes += now != last
            life.paths |= now.keys() - last.keys()
            life.pages = max(life.pages, sum(-(-size // PAGE) + 1 for size, _ in now.values()))
            last = now
            if time.monotonic() - began > seconds or life.writes >= writes:
                process.kill()
                break
            time.sleep(0.002)
        process.join()
        life.status, life.seconds = process.exitcode, time.monotonic() - began
        said.seek(0)
        life.said = said.read()
    return life


def command(arguments: list[str], said: int) -> None:
    """Runs a command as its own program would, with standard error to the file `said`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(said, 2)
    sys.argv = ["ecoprompt", *arguments]
    main_of_ecoprompt()


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """The size and the time of every file below a folder, by its path."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            try:
                about = os.stat(path)
                found[path] = about.st_size, about.st_mtime_ns
            except FileNotFoundError:
                continue
    return found


def check(name: str, life: Life, before: dict[str, float], output: Path, status: int) -> list[str]:
    """What is wrong with a life: it failed, lost what was finished `before`, or did that again."""
    problems = []
    if life.status != status or not all(line.startswith(("note: ", "written: ")) for line in life.said.splitlines()):
        problems.append(f"exit status {life.status}, {life.said}")
    after = finished(output)
    problems += [f"{what} fell from {had}" for what, had in before.items() if after.get(what, 0) < had]
    steps = [found for path in life.paths if (found := CHECKPOINT.search(path))]
    problems += [f"{one[0]} was done again" for one in steps if int(one["step"]) <= before.get(one["model"], 0)]
    for path in output.rglob("*.jsonl"):
        problems += [f"{path.name}: {key} was computed again" for key, times in keys(path).items() if times > 1]
    return [f"{name}: {problem}" for problem in problems]


def finished(output: Path) -> dict[str, float]:
    """How much is finished: results and evaluations by file, steps by model, infinitely many of one that is whole."""
    found: dict[str, float] = {path.name: len(keys(path)) for path in output.rglob("*.jsonl")}
    for state in output.rglob("trainer_state.json"):
        if (place := CHECKPOINT.search(str(state))) and not is_half(state):
            found[place["model"]] = max(found.get(place["model"], 0), int(place["step"]))
    whole = (path.parent.name for path in output.rglob("training.json"))
    return found | {name: math.inf for name in whole if not name.startswith(".")}


def is_half(path: Path) -> bool:
    """Whether a JSON file was cut off."""
    try:
        json.loads(path.read_text())
    except ValueError:
        return True
    return False


def is_torn(output: Path) -> bool:
    """Whether something lies there that was not written to its end."""
    paths = list(output.rglob("*"))
    lines = any(path.suffix == ".jsonl" and path.read_bytes()[-1:] not in (b"", b"\n") for path in paths)
    aside = any(TEMPORARY.fullmatch(path.name) or path.suffix in (".part", ".new") for path in paths)
    states = [path / "trainer_state.json" for path in paths if CHECKPOINT.search(str(path)) and path.is_dir()]
    return lines or aside or any(not state.exists() or is_half(state) for state in states)


def records(path: Path) -> list[Any]:
    """The whole lines of a file of JSON lines."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def keys(path: Path) -> Counter[str]:
    """How often each result or evaluation stands in a file of them."""
    every = records(path)
    return Counter(str(key) for one in every for key in (one.get("values", {}) if "run" not in one else ())) + Counter(
        str(one["number"]) for one in every if "number" in one
    )


def contents(folder: Path) -> dict[str, Any]:
    """What every file says, by its path, but for what a killed process left aside and for pages made of the others."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): read(path)
        for path in files
        if not TEMPORARY.fullmatch(path.name) and path.suffix != ".md"
    }


def read(path: Path) -> Any:
    """What a file says, without what was measured."""
    if path.name == "scores.jsonl":
        return {key: value for one in records(path) for key, value in one["values"].items()}
    if path.suffix == ".jsonl":
        return plain(records(path))
    if path.suffix == ".json":
        return plain(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".toml":
        return plain(tomllib.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return plain(list(csv.DictReader(file)))
    return path.read_bytes()


def plain(document: Any) -> Any:
    """A document without what was measured."""
    if isinstance(document, dict):
        return {key: plain(value) for key, value in document.items() if key not in MEASURED}
    return [plain(one) for one in document] if isinstance(document, list) else document


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The paths of files that do not say the same, or are on one side only."""
    return [path for path in sorted({*expected, *found}) if expected.get(path) != found.get(path)]


if __name__ == "__main__":
    sys.exit(main())
