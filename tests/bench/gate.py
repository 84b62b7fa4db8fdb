"""Measures the gates on TOFU: errors, errors under pressure, calibration and cost; prints Markdown tables.

`python tests/bench/gate.py [--shared ../shared] [--base FOLDER] [--load FOLDER] [--rows N] [--kinds KIND …]`; without
`--base` the linear gate, with it an encoder that is fine-tuned here (or was, and saved to the folder `--load` names).
With `--kinds` the named pressures alone, as in `--kinds long_context`.
Prompts are unlike those that a gate practised on: other seeds, other wordings, and other text around a prompt.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

from ecoprompt.pressure import press
from ecoprompt.registry import pressures

ROOT = Path(__file__).parents[2]
SEED = 2026
SPLITS = 2000
PAIRS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
Gate = Any


def main() -> int:
    """Exit status 0, or 2 where the data are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/")
    parser.add_argument("--base", help="an encoder to fine-tune instead of the linear gate")
    parser.add_argument("--load", type=Path, help="a gate that was saved, instead of training one")
    parser.add_argument("--save", type=Path, help="where to save the gate for forget10")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--arithmetic", default="auto", choices=["auto", "float32", "bfloat16"], help="of the training")
    parser.add_argument("--plain", action="store_true", help="train the encoder without edited copies")
    parser.add_argument("--rows", type=int, default=1000, help="most prompts of a general set")
    parser.add_argument("--pressed", type=int, default=400, help="most prompts of a set under pressure")
    parser.add_argument("--long", type=int, default=200, help="most prompts in a long context")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", choices=[*pressures], help="these pressures alone")
    options = parser.parse_args()
    data = options.shared / "data"
    if not (data / "tofu").is_dir():
        print(f"gate: no folder {data / 'tofu'}; --shared names where data/ lies", file=sys.stderr)
        return 2
    if options.kinds:
        under_pressure(data, train(data, "forget10", options)[0], options)
        return 0
    gate = errors(data, options)
    general(data, gate, options)
    under_pressure(data, gate, options)
    if not options.load and not options.base:
        conformal(data)
    cost(data, gate)
    return 0


def rows(path: Path, field: str) -> list[str]:
    """A column of a file of JSON lines or CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        found: Iterable[Any] = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file)
        return [str(row[field]) for row in found]


def tofu(data: Path, name: str, field: str = "question") -> list[str]:
    return rows(data / "tofu" / f"{name}.jsonl", field)


def train(data: Path, forget: str, options: argparse.Namespace) -> tuple[Gate, float]:
    """A gate for a forget set with the shipped settings (or the encoder's), and the seconds that training took."""
    from ecoprompt.gate import linear, load_gate, transformer
    from ecoprompt.sources import GateData

    texts = GateData(tofu(data, forget), tofu(data, PAIRS[forget]))
    started = time.perf_counter()
    if options.load:
        kind = "transformer" if (options.load / "config.json").exists() else "linear"
        return load_gate(options.load, kind), float("nan")
    if options.base:
        settings = {"epochs": options.epochs, "learning_rate": options.learning_rate}
        settings |= {"edits": not options.plain, "arithmetic": options.arithmetic}
        gate: Gate = transformer(texts, 0, base=options.base, batch_size=32, max_length=128, **settings)
    else:
        gate = linear(texts, 0)
    return gate, time.perf_counter() - started


def errors(data: Path, options: argparse.Namespace) -> Gate:
    """The table of errors on TOFU; the gate for forget10."""
    heading(
        "TOFU", ["forget set", "training, s", "missed", "paraphrased missed", "retain", "real authors", "world facts"]
    )
    for forget, retain in PAIRS.items():
        if (options.base or options.load) and forget != "forget10":
            continue
        gate, seconds = train(data, forget, options)
        paraphrased = tofu(data, f"{forget}_perturbed", "paraphrased_question")
        cells = [share(gate, tofu(data, forget), miss=True), share(gate, paraphrased, miss=True)]
        cells += [share(gate, tofu(data, name)) for name in (retain, "real_authors", "world_facts")]
        line([forget, f"{seconds:.1f}", *cells])
        if forget == "forget10" and options.save:
            gate.save(options.save)
    return gate


def general(data: Path, gate: Gate, options: argparse.Namespace) -> None:
    """The table of false flags far from the domain."""
    heading("Far from the domain", ["prompts of", "falsely flagged"])
    quickstart = ROOT / "src/ecoprompt/quickstart"
    sets = {
        "MMLU": rows(data / "mmlu/test.jsonl", "question"),
        "TruthfulQA": rows(data / "truthfulqa/TruthfulQA.csv", "Question"),
        "CommonsenseQA": rows(data / "commonsenseqa/validation.jsonl", "question"),
        "ARC-Easy": rows(data / "arc_easy/test.jsonl", "question"),
        "WMDP biology": rows(data / "wmdp/bio.jsonl", "question"),
        "PIQA (how to do things)": rows(data / "piqa/validation.jsonl", "goal"),
        "the quick start's made-up people": [
            text for name in ("forget", "retain") for text in rows(quickstart / f"{name}.jsonl", "question")
        ],
        "sentences of two novels": sentences(data, "books"),
        "sentences of news": sentences(data, "news"),
    }
    for name, texts in sets.items():
        line([name, share(gate, some(texts, options.rows))])


def sentences(data: Path, kind: str) -> list[str]:
    if kind == "books":
        names = ("alice_in_wonderland", "adventures_of_sherlock_holmes")
        texts = [(data / "books" / f"{name}.txt").read_text(encoding="utf-8") for name in names]
    else:
        texts = rows(data / "wikinews/2019.jsonl", "text")
    found = [part.strip() for text in texts for part in re.split(r"(?<=[.?!])\s+", text)]
    return [part for part in found if len(part.split()) >= 4]


def under_pressure(data: Path, gate: Gate, options: argparse.Namespace) -> None:
    """The table of errors by kind of pressure: the forget set, retain set, and the two general sets of TOFU."""
    heading("Under pressure", ["pressure", "forget10 missed", "paraphrased missed", "retain90", "authors and facts"])
    others = some(rows(data / "commonsenseqa/validation.jsonl", "question"), 400)
    sets = [
        (tofu(data, "forget10"), True),
        (tofu(data, "forget10_perturbed", "paraphrased_question"), True),
        (some(tofu(data, "retain90"), options.pressed), False),
        (tofu(data, "real_authors") + tofu(data, "world_facts"), False),
    ]
    around = {"long_context": {"everyday questions": (), "two novels": sentences(data, "books")}}
    around["long_context"]["news"] = sentences(data, "news")
    for kind in options.kinds or (None, *pressures):
        for name, filler in around.get(kind or "", {"": others}).items():
            most = options.long if kind == "long_context" else options.pressed
            cells = [
                share(gate, [press(kind, text, SEED, filler) for text in some(texts, most)], miss)
                for texts, miss in (sets if kind != "long_context" else [sets[0], sets[2]])
            ]
            if kind == "long_context":
                cells = [cells[0], "–", cells[1], "–"]
            line([(kind or "none").replace("_", " ") + (f", {name}" if name else ""), *cells])


def conformal(data: Path) -> None:
    """The realised rate of false flags over random splits of held-out prompts into calibration and test."""
    from ecoprompt.calibration import calibration_scores, conformal_threshold, hold_out
    from ecoprompt.gate import linear
    from ecoprompt.sources import GateData

    heading(f"Conformal threshold, {SPLITS} splits", ["asked", "prompts", "mean realised", "standard error"])
    texts, held_out = hold_out(GateData(tofu(data, "forget10"), tofu(data, "retain90")), 0.5, 0)
    gate = linear(texts, 0)
    plain, highest = np.asarray(gate.score(held_out)), calibration_scores(gate, held_out, 0)
    generator = np.random.default_rng(0)
    for rate in (0.01, 0.05):
        realised: dict[str, list[float]] = {"as they are or edited": [], "as they are": []}
        for _ in range(SPLITS):
            order = generator.permutation(len(held_out))
            half = len(order) // 2
            threshold = conformal_threshold(highest[order[:half]], rate)
            realised["as they are or edited"].append(float((highest[order[half:]] > threshold).mean()))
            realised["as they are"].append(float((plain[order[half:]] > threshold).mean()))
        for name, values in realised.items():
            line([f"{rate:.0%}", name, f"{np.mean(values):.3%}", f"{np.std(values) / SPLITS**0.5:.3%}"])


def cost(data: Path, gate: Gate) -> None:
    """The table of prompts a second."""
    heading("Cost", ["prompts", "a second, 64 at a time", "alone, ms"])
    texts = some(tofu(data, "retain90"), 640)
    long = [press("long_context", text, SEED, sentences(data, "news")) for text in texts[:8]]
    for name, prompts, size in (("questions of TOFU", texts, 64), ("8,000 tokens", long, 8)):
        started = time.perf_counter()
        for start in range(0, len(prompts), size):
            gate.score(prompts[start : start + size])
        rate = len(prompts) / (time.perf_counter() - started)
        started = time.perf_counter()
        for prompt in prompts[:32]:
            gate.score([prompt])
        alone = 1000 * (time.perf_counter() - started) / len(prompts[:32])
        line([name, f"{rate:.0f}" if rate > 10 else f"{rate:.1f}", f"{alone:.1f}"])
    print(f"\nMachine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores.")


def some(texts: Sequence[str], most: int) -> list[str]:
    """At most that many of the texts, drawn by seed."""
    return list(texts) if len(texts) <= most else random.Random(SEED).sample(list(texts), most)


def share(gate: Gate, texts: Sequence[str], miss: bool = False) -> str:
    """How many of the texts the gate misses or flags, and of how many."""
    flagged = sum(int((np.asarray(gate.score(texts[i : i + 64])) > 0.5).sum()) for i in range(0, len(texts), 64))
    count = len(texts) - flagged if miss else flagged
    return f"{count} of {len(texts)} ({count / len(texts):.2%})"


def heading(title: str, cells: Sequence[str]) -> None:
    print(f"\n### {title}\n")
    line(cells)
    line(["---", *(["---:"] * (len(cells) - 1))])


line: Callable[[Sequence[str]], None] = lambda cells: print(f"| {' | '.join(cells)} |", flush=True)  # noqa: E731


if __name__ == "__main__":
    sys.exit(main())
