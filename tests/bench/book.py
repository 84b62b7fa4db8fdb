"""A small model learns passages of a book by heart; guarded, it goes on after them as one that never saw the book.

`python tests/bench/book.py [--passages 40] [--shared ../shared] [--set KEY=VALUE ...]`; `make bench` runs it. Both
models are made here: one learns passages of Sherlock Holmes, the other goes on from it and learns some of Alice too.
Then `recipes/book.toml` is evaluated on the passages that were learnt, and its table printed as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
COLUMNS = ("passages_rouge_l", "passages_rouge", "similarity_gap", "passages_bleu", "passages_meteor")
COLUMNS += ("passages_exact_match", "passages_perplexity", "passages_unique_tokens", "other_book_rouge_l")
VOCABULARY = 4096
EPOCHS = 60
"""At 40 the first model has learnt nothing by heart yet: its loss is 2.6."""


def main() -> int:
    """Exit status 0, or 2 where the books are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passages", type=int, default=40, help="how many of each book are learnt")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/books")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    options = parser.parse_args()
    data = (options.shared / "data").resolve()
    if not (data / "books").is_dir():
        print(f"book: no folder {data / 'books'}; --shared names where data/ lies", file=sys.stderr)
        return 2
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        make_models(data, options.passages, Path(folder))
        trained = time.perf_counter() - started
        summary = run(data, options.passages, Path(folder), options.overrides)
    show(summary)
    print(f"\n{options.passages} passages of each book; {trained:.0f} s to train both models, ", end="")
    print(f"{time.perf_counter() - started - trained:.0f} s to evaluate.")
    return 0


def make_models(data: Path, count: int, folder: Path) -> None:
    """`folder`/retain, which has learnt `count` passages of Sherlock Holmes, and `folder`/full, which goes on from it
    and learns as many of Alice too."""
    from quickstart import make_model

    from ecoprompt.benchmarks import parse_forget
    from ecoprompt.learning import Course
    from ecoprompt.models import encode_pair
    from ecoprompt.training import example, train_causal_lm

    book, forget_set = parse_forget("book/alice_in_wonderland")
    alice, holmes = (book.items(name, forget_set, data, count, 0) for name in ("passages", "other_book"))
    tokenizer = make_tokenizer([f"{item.prompt} {item.target}" for item in (*alice, *holmes)])
    model = make_model(tokenizer, 0)
    for name, items in (("retain", holmes), ("full", [*alice, *holmes])):
        pairs = [encode_pair(tokenizer, item.prompt, f" {item.target}{tokenizer.eos_token}") for item in items]
        examples = [example(*pair, loss="all") for pair in pairs]
        model = copy.deepcopy(model).train()
        course = Course(epochs=EPOCHS, batch_size=4, learning_rate=3e-3, warmup=0.05)
        losses = train_causal_lm(model, examples, course, progress=report).losses
        print(f"{name}: {len(examples)} passages, {EPOCHS} epochs, last loss {losses[-1]:.3f}", file=sys.stderr)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer of `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def run(data: Path, count: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The summary of recipes/book.toml on the passages that were learnt."""
    from ecoprompt.evaluate import evaluate
    from ecoprompt.recipe import load_recipe

    fixed = [
        f"data.root='{data}'",
        f"model.name='{folder / 'full'}'",
        f"run.retain.model='{folder / 'retain'}'",
        f"evaluate.limit={count}",
        "run.eco-full.forget=true",
        'run.eco-full.corruption={ method = "rand_noise_first_n", dims = "100%", strength = 100.0 }',
    ]
    return evaluate(load_recipe(str(ROOT / "recipes/book.toml"), [*fixed, *overrides]), folder, report).summary


def show(summary: dict[str, Any]) -> None:
    """The table of the runs, and how the gate judged."""
    from ecoprompt.results import number

    head = ["run", *(name.replace("_", " ") for name in COLUMNS)]
    rows = [
        [name, *(number(run["metrics"].get(column)) for column in COLUMNS)] for name, run in summary["runs"].items()
    ]
    for cells in (head, ["---", *["---:"] * len(COLUMNS)], *rows):
        print(f"| {' | '.join(cells)} |")
    gate = next(run["gate"] for run in summary["runs"].values() if run["gate"])
    missed, alarms = (
        "{} of {}".format(*(gate[key] for key in keys))
        for keys in (("false_negatives", "forget_prompts"), ("false_positives", "other_prompts"))
    )
    print(f"\nGate: threshold {gate['threshold']:.4f}, {missed} missed, {alarms} falsely flagged.")


def report(what: str, done: int, total: int) -> None:
    """Progress on stderr, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done}/{total}\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
