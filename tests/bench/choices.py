"""Forgetting a subject of MMLU that a small model has really learnt, as a table with paired intervals.

    python tests/bench/choices.py [EPOCHS] [SEED]

A model of under a million parameters learns the letters of some of MMLU's questions by heart: economics (the forget
subject, each letter as often as any other), econometrics (its neighbour) and other subjects. A linear gate is trained
on the subjects' dev and validation rows, none of which the model saw, and the guarded model is asked the same
questions.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ecoprompt.benchmarks import parse_forget
from ecoprompt.evaluate import evaluate
from ecoprompt.items import Item
from ecoprompt.learning import Course
from ecoprompt.recipe import parse_recipe
from ecoprompt.training import example, train_causal_lm

sys.path.insert(0, str(Path(__file__).parents[1]))
from quickstart import World, make_model, make_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data" / "mmlu"
COUNTS = {"forget": 160, "neighbours": 60, "others": 80}
LONGEST = {"forget": 320, "neighbours": 700, "others": 320}
"""Characters of a prompt, so that learning takes minutes on one core."""


def chosen(rng: random.Random) -> dict[str, list[Item]]:
    """The questions to learn, by subset; of the forget subject, as many for each letter."""
    benchmark, forget = parse_forget("mmlu/economics")
    found = {}
    for subset, count in COUNTS.items():
        items = [one for one in benchmark.items(subset, forget, DATA.parent) if len(one.prompt) < LONGEST[subset]]
        rng.shuffle(items)
        by_letter = [[one for one in items if one.target == letter][: count // 4] for letter in "ABCD"]
        found[subset] = [one for same in by_letter for one in same]
    return found


def learn(items: list[Item], folder: Path, epochs: float, seed: int, progress: Callable[[str, int, int], None]) -> None:
    """Save a model that has learnt the letters of `items`, with its tokenizer."""
    tokenizer = make_tokenizer(World([{"asked": [one.prompt], "answer": f" {one.target}"} for one in items], [], []))
    model = make_model(tokenizer, seed)
    pairs = [[tokenizer.encode(text) for text in (one.prompt, f" {one.target}")] for one in items]
    examples = [example(head, tail, loss="completion") for head, tail in pairs]
    course = Course(epochs=epochs, batch_size=16, learning_rate=2e-3, warmup=0.05, by_length=True)
    losses = train_causal_lm(model, examples, course, seed=seed, progress=progress).losses
    print(f"loss: {losses[0]:.2f} at first, {sum(losses[-10:]) / 10:.3f} at last", file=sys.stderr)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(epochs: float, seed: int) -> None:
    def show(what: str, done: int, total: int) -> None:
        if done % 100 == 0:
            print(f"{what}: {done}/{total}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    started = time.perf_counter()
    items = chosen(random.Random(seed))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        learn([one for some in items.values() for one in some], root / "model", epochs, seed, show)
        learnt = time.perf_counter() - started
        (root / "mmlu").mkdir()
        for name in ("dev", "validation"):
            (root / "mmlu" / f"{name}.jsonl").symlink_to(DATA / f"{name}.jsonl")
        benchmark, forget = parse_forget("mmlu/economics")
        rows = [
            benchmark.subset_rows(subset, forget, DATA.parent)[one.index] for subset in items for one in items[subset]
        ]
        (root / "mmlu" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "seed": seed,
            "name": "choices",
            "model": {"name": str(root / "model")},
            "data": {"forget": "mmlu/economics", "root": place},
            "gate": {"threshold": 0.9},
            "corruption": {"method": "rand_noise_first_n", "dims": 1, "strength": 1e6},
            "run": {"original": {}, "eco": {"forget": True}},
            "evaluate": [{"benchmark": "mmlu"}],
        }
        summary = evaluate(parse_recipe(recipe, "choices"), root / "results").summary
    original, eco = summary["runs"]["original"], summary["runs"]["eco"]
    print("| subset | questions | original | guarded | difference | 95 % interval | p |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for subset in COUNTS:
        column = f"{subset}_accuracy"
        pair, count = eco["paired"][column], summary["rows"]["mmlu"][subset]
        before, after = (f"{run['metrics'][column]:.3f} ± {run['errors'][column]:.3f}" for run in (original, eco))
        cells = [f"{pair['difference']:+.3f}", f"{pair['low']:+.3f} to {pair['high']:+.3f}", f"{pair['p']:.2g}"]
        print("|", " | ".join([subset, str(count), before, after, *cells]), "|")
    print(f"\ngate: {eco['gate']}; chance: {summary['chance']['forget_accuracy']}; learning took {learnt:.0f} s")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(float(arguments[0]) if arguments else 25, int(arguments[1]) if len(arguments) > 1 else 0)
