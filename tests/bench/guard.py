"""Times generations under the guard against plain ones, with and without the gate's time, as a Markdown table.

`python tests/bench/guard.py [PACK ...] [--model DIR] [--prompts FILE] [--batch 16] [--tokens 64] [--rounds 7]`.
Without a pack, the gate of tests/recipes/tofu-mini.toml is trained here. FILE holds JSON lines with a `question`.
Beside the model stands a Llama of 100 million random parameters. Plain and guarded take turns, and all numbers are
medians; the gate reads every prompt of every guarded generation anew. `--cpu-time` counts the process's own time, where
other work shares the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
SHARED = ROOT.parent / "shared"
COLUMNS = (
    *("gate", "model", "prompts", "plain, s", "guarded, s", "gate, s"),
    *("ratio without the gate", "ratio with the gate"),
)
SEARCHED = 1200
"""How many prompts, spread over the file, are put to a gate to find a batch of flagged and one of unflagged ones."""


def main() -> int:
    """Exit status 0, or 2 where the data or the model are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packs", nargs="*", help="folders of forget packs")
    parser.add_argument("--model", type=Path, default=SHARED / "models/tofu-mini-full")
    parser.add_argument("--prompts", type=Path, default=SHARED / "data/tofu/full.jsonl")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="time of the process instead of the clock's")
    options = parser.parse_args()
    if not options.model.is_dir() or not options.prompts.is_file():
        print(f"guard: {options.model} or {options.prompts} is missing; see --model and --prompts", file=sys.stderr)
        return 2
    import torch

    from ecoprompt.models import load_model
    from ecoprompt.pack import load_forget
    from ecoprompt.recipe import parse_model

    loaded = load_model(parse_model({"name": str(options.model)}))
    models = [(options.model.name, loaded.model), ("random Llama", random_llama(loaded))]
    line(COLUMNS)
    line(["---", "---", "---", *(["---:"] * (len(COLUMNS) - 3))])
    for forget in map(load_forget, options.packs) if options.packs else [trained_here()]:
        batches = batches_of(loaded, forget, options)
        for name, model in models:
            for prompts, batch in batches.items():
                size = f"{sum(one.numel() for one in model.parameters()) / 1e6:.0f} M"
                cells = [getattr(forget.gate, "kind", "?"), f"{name} ({size})", prompts]
                line([*cells, *measured(dataclasses.replace(loaded, model=model), forget, batch, options)])
    print(
        f"\nBatches of {options.batch}, {options.tokens} new tokens each, medians of {options.rounds} rounds, "
        f"{'processor time' if options.cpu_time else 'wall time'}, {torch.get_num_threads()} threads, "
        f"{os.cpu_count()} cores, torch {torch.__version__}."
    )
    return 0


def random_llama(loaded: Any) -> Any:
    """A Llama with 100 million random parameters, in float32, which ends where the loaded model does."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = loaded.model.generation_config
    return model


def trained_here() -> Any:
    """The forget spec of tests/recipes/tofu-mini.toml, its gate trained on TOFU's forget10."""
    from ecoprompt.pack import make_forget, obtain_gate
    from ecoprompt.recipe import load_recipe

    recipe = load_recipe(str(ROOT / "tests/recipes/tofu-mini.toml"), [f"data.root='{(SHARED / 'data').resolve()}'"])
    with tempfile.TemporaryDirectory() as folder:
        trained = obtain_gate(recipe, recipe.gate, recipe.seed, Path(folder))
    assert recipe.corruption is not None
    return make_forget(trained, recipe.gate, recipe.tokens, recipe.corruption, recipe.seed)


def batches_of(loaded: Any, forget: Any, options: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """By name, a batch of prompts that are not flagged, and one of prompts that are: token ids and mask [B, T]."""
    from ecoprompt.models import encode, pad, render

    questions = [json.loads(line)["question"] for line in options.prompts.open(encoding="utf-8")]
    chosen = questions[:: max(len(questions) // SEARCHED, 1)]
    prompts = [encode(loaded.tokenizer, render(loaded.tokenizer, [{"role": "user", "content": one}])) for one in chosen]
    flags = [decision.flagged for decision in forget.decide(loaded.tokenizer, prompts)]
    batches = {}
    for name, wanted in (("unflagged", False), ("flagged", True)):
        rows = [ids for ids, flagged in zip(prompts, flags, strict=True) if flagged == wanted][: options.batch]
        if len(rows) < options.batch:
            raise SystemExit(f"guard: {options.prompts} has {len(rows)} {name} prompts; --batch asks for more")
        batches[name] = pad(loaded, rows, True)
    return batches


def measured(loaded: Any, forget: Any, batch: tuple[Any, Any], options: argparse.Namespace) -> list[str]:
    """The cells of one row: seconds plain, guarded and in the gate, and the ratios, each a median over the rounds."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    timed(loaded, None, batch, options.tokens, clock)  # warm
    plain, guarded, gating = [], [], []
    for turn in range(options.rounds):
        for under in (False, True) if turn % 2 else (True, False):
            whole, gate = timed(loaded, forget if under else None, batch, options.tokens, clock)
            (guarded if under else plain).append(whole)
            if under:
                gating.append(gate)
    apart = [whole - gate for whole, gate in zip(guarded, gating, strict=True)]
    ratios = [statistics.median(map(float.__truediv__, one, plain)) for one in (apart, guarded)]
    seconds = (f"{statistics.median(one):.3f}" for one in (plain, guarded, gating))
    return [*seconds, *(f"{one:.3f}" for one in ratios)]


def timed(loaded: Any, forget: Any, batch: tuple[Any, Any], tokens: int, clock: Any) -> tuple[float, float]:
    """(seconds of a generation, seconds of these inside the gate), under a new guard if a forget spec is given."""
    import contextlib

    import torch

    from ecoprompt.guard import Guard

    spent = [0.0]

    class Timed:
        def score(self, texts: Sequence[str]) -> Any:
            started = clock()
            scores = forget.gate.score(texts)
            spent.append(clock() - started)
            return scores

    guarded = None if forget is None else dataclasses.replace(forget, gate=Timed())
    block = Guard(loaded.model, loaded.tokenizer, guarded) if guarded else contextlib.nullcontext()
    settings: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    ids, mask = batch
    with block, torch.inference_mode():
        started = clock()
        loaded.model.generate(input_ids=ids, attention_mask=mask, **settings)
        whole = clock() - started
    return whole, sum(spent)


def line(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
