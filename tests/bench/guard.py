"""Times a guarded generation against a plain one, and the gate's share of it, as a Markdown table.

`python tests/bench/guard.py PACK [PACK ...] [--model DIR] [--prompts FILE] [--batch 32] [--tokens 40] [--rounds 5]`.
FILE holds JSON lines with a `question`. No prompt is asked twice, so that each is gated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).parents[3] / "shared"


def main() -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packs", nargs="+", help="folders of forget packs")
    parser.add_argument("--model", default=str(SHARED / "models/tofu-mini-full"))
    parser.add_argument("--prompts", type=Path, default=SHARED / "data/tofu/full.jsonl")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import torch

    from ecoprompt.models import encode, load_model, pad, render
    from ecoprompt.pack import load_forget
    from ecoprompt.recipe import parse_model

    loaded = load_model(parse_model({"name": options.model}))
    questions = [json.loads(line)["question"] for line in options.prompts.open(encoding="utf-8")]
    step = len(questions) // (options.batch * options.rounds)
    chosen = questions[:: max(step, 1)][: options.batch * options.rounds]
    prompts = [encode(loaded.tokenizer, render(loaded.tokenizer, [{"role": "user", "content": one}])) for one in chosen]
    batches = [pad(loaded, prompts[i : i + options.batch], True) for i in range(0, len(prompts), options.batch)]
    settings: dict[str, Any] = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}

    def ask() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for ids, mask in batches:
                loaded.model.generate(input_ids=ids, attention_mask=mask, **settings)
        return time.perf_counter() - started

    ask()  # warm
    plain = ask()
    print("| gate | flagged | plain, seconds | guarded, seconds | gate alone, seconds | its share | prompts a second |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for pack in options.packs:
        forget = load_forget(pack)
        guarded, gating, flagged = guard_and_time(loaded, forget, ask)
        kind, rate = getattr(forget.gate, "kind", "?"), len(prompts) / gating
        cells = [kind, f"{flagged} of {len(prompts)}", *(f"{one:.2f}" for one in (plain, guarded, gating))]
        print(f"| {' | '.join(cells)} | {gating / guarded:.1%} | {rate:.0f} |")
    threads = torch.get_num_threads()
    print(f"\n{len(prompts)} prompts, batches of {options.batch}, {options.tokens} new tokens each, {threads} threads.")
    return 0


def guard_and_time(loaded: Any, forget: Any, ask: Any) -> tuple[float, float, int]:
    """(seconds under the guard, seconds of these inside the gate, prompts flagged)."""
    import dataclasses

    from ecoprompt.guard import Guard

    spent, flags = [], []

    class Timed:
        def score(self, texts: Any) -> Any:
            started = time.perf_counter()
            scores = forget.gate.score(texts)
            spent.append(time.perf_counter() - started)
            flags.append(sum(score > forget.threshold for score in scores))
            return scores

    forget.gate.score(["Anything to begin with."])
    with Guard(loaded.model, loaded.tokenizer, dataclasses.replace(forget, gate=Timed())):
        seconds = ask()
    return seconds, sum(spent), sum(flags)


if __name__ == "__main__":
    sys.exit(main())
