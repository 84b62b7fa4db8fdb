"""Times TOFU's evaluation and its ablation, ours against a straightforward loop, as Markdown tables.

`python tests/bench/evaluation.py [--part setting|ablation|memory] [--settings 3] [--rounds 3] [--every N]`. The loop
takes the rows in batches of 64 in the order of the file, makes one forward pass for each candidate answer with the
logits of all positions, calls `generate` until a whole batch is done, and asks the gate at every call. Both compute the
same numbers, as is checked.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[2]
BATCH = 64
ROWS = {"forget": 400, "retain": 300, "real_authors": 100, "world_facts": 117}
MODELS = {"run.retain.model": "models/tofu-mini-retain90", "model.name": "models/tofu-mini-full"}


def main() -> int:
    """Exit status 0, 1 where both ways differ, or 2 where data or models are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/ and models/")
    parser.add_argument("--part", choices=["setting", "ablation", "memory"], help="one of the tables; default: all")
    parser.add_argument("--scored", nargs=2, metavar=("WAY", "VOCABULARY"), help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=int, default=3, help="settings of the ablation that the loop is timed on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="a seeded sample of one row in N, of all subsets"
    )
    options = parser.parse_args()
    if not (options.shared / "data/tofu").is_dir():
        print(f"evaluation: no folder {options.shared / 'data/tofu'}; --shared names where data/ lies", file=sys.stderr)
        return 2
    if options.scored:
        print(scored(options.scored[0], int(options.scored[1])))
        return 0
    parts = {"setting": one_setting, "ablation": ablation, "memory": memory}
    return max(part(options) for name, part in parts.items() if options.part in (None, name))


def recipe_of(name: str, options: argparse.Namespace) -> Any:
    """A recipe of tests/recipes, with the places of its data and models."""
    from ecoprompt.recipe import load_recipe

    places = {"data.root": "data", **MODELS}
    overrides = [f"{key}='{(options.shared / place).resolve()}'" for key, place in places.items()]
    rows = ", ".join(f"{name} = {max(1, count // options.every)}" for name, count in ROWS.items())
    overrides += [f"evaluate.limit={{ {rows} }}"]
    return load_recipe(str(ROOT / "tests/recipes" / name), overrides)


def one_setting(options: argparse.Namespace) -> int:
    """(b) TOFU's evaluation of one setting: retain, original and eco."""
    recipe = recipe_of("tofu-mini.toml", options)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        warm(recipe, output)
        ours, plain = [], []
        for number in range(options.rounds):
            summary, seconds = timed(lambda n=number: ours_of(recipe, output / str(n)))
            ours.append(seconds)
            straight, seconds = timed(lambda: Plain(recipe, output).evaluate())
            plain.append(seconds)
            print(f"ours {ours[-1]:.1f} s, plain {plain[-1]:.1f} s", file=sys.stderr, flush=True)
    print("| TOFU, one setting | median, s | all, s |")
    print("| --- | ---: | ---: |")
    for name, found in (("plain loop", plain), ("ours", ours)):
        print(f"| {name} | {statistics.median(found):.1f} | {', '.join(f'{one:.1f}' for one in found)} |")
    print(f"\n{statistics.median(plain) / statistics.median(ours):.1f} times faster.")
    return compare(straight, summary)


def ablation(options: argparse.Namespace) -> int:
    """(c) The comparison of all settings, ours whole, and the loop on a few of them, evenly spread."""
    from ecoprompt.recipe import resolve_runs

    recipe = recipe_of("tofu-mini-ablation.toml", options)
    swept = [run.name for run in resolve_runs(recipe) if run.guarded]
    chosen = swept[:: max(1, len(swept) // options.settings)][: options.settings]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        warm(recipe, output)
        summary, ours = timed(lambda: ours_of(recipe, output))
        print(f"ours {ours:.1f} s", file=sys.stderr, flush=True)
        loop = Plain(recipe, output)
        base, alone = timed(lambda: loop.evaluate(["retain", "original"]))
        each, found = [], {}
        for name in chosen:
            rows, seconds = timed(lambda n=name: loop.evaluate([n]))
            each.append(seconds)
            found |= rows
            print(f"{name}: plain {seconds:.1f} s", file=sys.stderr, flush=True)
    one = statistics.median(each)
    print(f"\n| TOFU, {len(swept)} settings | seconds | ours is faster by |")
    print("| --- | ---: | ---: |")
    print(f"| ours, all of it | {ours:.0f} | |")
    for name, seconds in (
        ("the loop, eco alone once per setting", len(swept) * one),
        ("the loop, retain and original once, eco per setting", alone + len(swept) * one),
        ("the loop, all three runs per setting", len(swept) * (alone + one)),
    ):
        print(f"| {name} | {seconds:.0f} | {seconds / ours:.1f} |")
    spread = ", ".join(f"{seconds:.0f}" for seconds in each)
    print(f"\nThe loop took {spread} s on {len(chosen)} of the settings; their median stands for each of them.")
    compared = set(loop.benchmark.aggregates) - {"model_utility"}  # with the retain run, which was not asked again
    own = {run: {name: value for name, value in rows.items() if name not in compared} for run, rows in found.items()}
    return compare(base | own, summary)


def memory(options: argparse.Namespace) -> int:
    """(d) Peak memory of scoring 64 rows of 100 tokens, each way in a process of its own."""
    print("\n| vocabulary | plain loop, MiB | ours, MiB | share |")
    print("| ---: | ---: | ---: | ---: |")
    for vocabulary in (32_000, 256_000):
        peaks = []
        for way in ("plain", "ours"):
            command = [sys.executable, __file__, "--shared", str(options.shared), "--scored", way, str(vocabulary)]
            found = [int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
            peaks.append(statistics.median(found))
        print(f"| {vocabulary:,} | {peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[1] / peaks[0]:.1%} |")
    return 0


def scored(way: str, vocabulary: int) -> int:
    """The peak memory of this process, in MiB, after it scored the rows one way."""
    import resource

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from ecoprompt.models import Loaded
    from ecoprompt.scoring import Request, answer

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **size)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "src/ecoprompt/quickstart/full")
    loaded = Loaded(LlamaForCausalLM(config).eval(), tokenizer, "random")
    if way == "plain":
        ids = torch.randint(0, 400, (BATCH, 100))
        with torch.inference_mode():
            logits = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    else:
        text = " ".join(["word"] * 40)
        requests = [Request("log_prob", f"Question {number}: {text}", f" {text}") for number in range(BATCH)]
        with tempfile.TemporaryDirectory() as folder:
            from ecoprompt.results import Store

            answer(loaded, [(str(n), one) for n, one in enumerate(requests)], Store(Path(folder) / "store.jsonl"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def compare(plain: dict[str, Any], ours: dict[str, Any]) -> int:
    """Exit status 1 where the metrics of a run differ."""
    worst = 0.0
    for run, found in plain.items():
        for name, value in found.items():
            other = ours["runs"][run]["metrics"][name]
            worst = max(worst, abs(value - other))
    print(f"Largest difference of a metric: {worst:.1e}.")
    return int(worst > 1e-3)


def warm(recipe: Any, output: Path) -> None:
    """Train the gate and load what is loaded once."""
    from ecoprompt.pack import obtain_gate

    obtain_gate(recipe, recipe.gate, recipe.seed, output)
    import transformers  # noqa: F401


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = call()
    return found, time.perf_counter() - started


def ours_of(recipe: Any, output: Path) -> Any:
    from ecoprompt.evaluate import evaluate

    return evaluate(recipe, output).summary


class Plain:
    """A straightforward evaluation of a recipe's runs."""

    def __init__(self, recipe: Any, output: Path) -> None:
        from ecoprompt.benchmarks import benchmarks, parse_forget
        from ecoprompt.pack import obtain_gate

        self.recipe = recipe
        self.gate = obtain_gate(recipe, recipe.gate, recipe.seed, output)
        self.benchmark = benchmarks[recipe.evaluate[0].benchmark]
        limit = recipe.evaluate[0].limit
        forget = parse_forget(recipe.data.forget)[1]
        self.items = {
            name: self.benchmark.items(
                name, forget, Path(recipe.data.root), limit.get(name) if isinstance(limit, dict) else limit, recipe.seed
            )
            for name in self.benchmark.subsets
        }

    def evaluate(self, names: Sequence[str] = ()) -> dict[str, dict[str, float]]:
        """By run its metrics, of all runs or those that are named."""
        from ecoprompt.models import load_model
        from ecoprompt.recipe import resolve_runs
        from ecoprompt.registry import aggregates

        values, found = {}, {}
        for run in resolve_runs(self.recipe):
            if not names or run.name in names:
                values[run.name] = self.run(load_model(run.model), run)
                own = {name: rows.mean() for name, rows in values[run.name].items()}
                found[run.name] = {name.replace("/", "_"): float(mean) for name, mean in own.items()}
                for name, settings in self.benchmark.aggregates.items():
                    found[run.name][name] = aggregates[name](values[run.name], values.get("retain"), **settings) or 0.0
        return found

    def run(self, loaded: Any, run: Any) -> dict[str, Any]:
        import numpy as np

        from ecoprompt.metrics import reads
        from ecoprompt.registry import metrics

        values: dict[str, Any] = {}
        for name, items in self.items.items():
            rows = []
            for start in range(0, len(items), BATCH):
                some = items[start : start + BATCH]
                columns = {"answer": [i.target for i in some], "reference": [i.reference for i in some]}
                scored = {key: self.log_probs(loaded, run, some, texts) for key, texts in columns.items()}
                count = max(len(item.alternatives) for item in some)
                each = [
                    self.log_probs(loaded, run, some, [(*item.alternatives, "x", "x", "x")[n] for item in some])
                    for n in range(count)
                ]
                scored["alternatives"] = [
                    [column[row] for column in each][: len(item.alternatives)] for row, item in enumerate(some)
                ]
                scored |= {"generation": self.generate(loaded, run, some), "target": [item.target for item in some]}
                rows += [{key: column[row] for key, column in scored.items()} for row in range(len(some))]
            for key, metric in self.benchmark.subset(name).metrics.items():
                values[f"{name}/{key}"] = np.array(
                    [metrics[metric](*(r[part] for part in reads(metric))) for r in rows]
                )
        return values

    def guarded(self, loaded: Any, run: Any) -> Any:
        """A guard that remembers nothing, or none."""
        import contextlib

        from ecoprompt.guard import Guard
        from ecoprompt.pack import make_forget

        if not run.guarded:
            return contextlib.nullcontext()
        spec = make_forget(self.gate, run.gate, run.tokens, run.corruption, run.seed)
        return Guard(loaded.model, loaded.tokenizer, spec)

    def log_probs(self, loaded: Any, run: Any, items: Sequence[Any], texts: Sequence[str]) -> list[Any]:
        """The log-probability of one candidate answer of each row."""
        import torch

        from ecoprompt.metrics import LogProb
        from ecoprompt.models import encode_pair, pad, render, render_answer

        asked = [[{"role": "user", "content": item.prompt}] for item in items]
        pairs = [
            encode_pair(loaded.tokenizer, render(loaded.tokenizer, one), render_answer(loaded.tokenizer, one, text))
            for one, text in zip(asked, texts, strict=True)
        ]
        ids, mask = pad(loaded, [head + tail for head, tail in pairs], left=False)
        with torch.inference_mode(), self.guarded(loaded, run) as guard:
            if guard is None:
                logits = loaded.model(input_ids=ids, attention_mask=mask).logits
            else:
                with guard.prompt_lengths([len(head) for head, _ in pairs]):
                    logits = loaded.model(input_ids=ids, attention_mask=mask).logits
            chosen = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0].double()
        spans = [slice(len(head) - 1, len(head) + len(tail) - 1) for head, tail in pairs]
        return [
            LogProb(float(row[span].sum()), span.stop - span.start) for row, span in zip(chosen, spans, strict=True)
        ]

    def generate(self, loaded: Any, run: Any, items: Sequence[Any]) -> list[str]:
        """The greedy answer to each row."""
        import torch

        from ecoprompt.models import encode, pad, render
        from ecoprompt.scoring import decode

        prompts = [
            encode(loaded.tokenizer, render(loaded.tokenizer, [{"role": "user", "content": item.prompt}]))
            for item in items
        ]
        ids, mask = pad(loaded, prompts, left=True)
        most = [self.benchmark.max_length - len(prompt) for prompt in prompts]
        with torch.inference_mode(), self.guarded(loaded, run):
            out = loaded.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max(most), do_sample=False)
        rows = out[:, ids.shape[1] :].tolist()
        return [decode(loaded, row[:limit]) for row, limit in zip(rows, most, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
