"""Walks every decoder architecture of transformers under the guard and writes the table of docs/models.md.

`python tests/bench/architectures.py`; about half a minute on one core. Exit status 1 if an architecture leaks or
an unflagged row moves.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

if TYPE_CHECKING:
    from architectures import Outcome


def main() -> int:
    """Exit status 0, or 1 where an architecture does not pass."""
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from architectures import VARIANTS, architectures, walk
    from conftest import make_tokenizer

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    started = time.perf_counter()
    found = []
    for number, architecture in enumerate(architectures(), 1):
        with contextlib.redirect_stdout(sys.stderr):  # some architectures print
            found.append(walk(architecture, tokenizer))
        print(f"\r{number} {architecture:40}", end="", file=sys.stderr)
    print(f"\r{time.perf_counter() - started:.0f} s{'':50}", file=sys.stderr)
    generate = generator()
    text = generate.models_page(measured(generate, found, transformers.__version__, VARIANTS))
    (ROOT / "docs" / "models.md").write_text(text, encoding="utf-8")
    failed = [outcome for outcome in found if outcome.problems or outcome.difference > 1e-6 * bool(outcome.experts)]
    for outcome in failed:
        print(f"{outcome.architecture}: {'; '.join(outcome.problems) or outcome.difference}", file=sys.stderr)
    print(sentence(found, VARIANTS))
    return 1 if failed else 0


def generator() -> Any:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sentence(found: Sequence[Outcome], variants: Any) -> str:
    counts = collections.Counter(outcome.result for outcome in found if outcome.architecture not in variants)
    return ", ".join(f"{counts[result]} {result}" for result in ("guarded", "refused", "not built"))


def measured(generate: Any, found: Sequence[Outcome], version: str, variants: Any) -> str:
    """The part of the page on architectures."""
    rows = [
        [
            f"`{outcome.architecture}`",
            f"`{outcome.model}`",
            f"{outcome.result}: {outcome.reason}" if outcome.reason else outcome.result,
            (f"{outcome.difference:.0e}" if outcome.difference else "0") if outcome.result == "guarded" else "–",
            "; ".join(filter(None, ["experts" if outcome.experts else "", outcome.note])) or "–",
        ]
        for outcome in found
    ]
    text = [
        f"Every model type that transformers {version} has a causal language model for, as a random model of few small "
        "layers on the CPU in float32, under a guard that flags two of the four rows of a batch: "
        f"{sentence(found, variants)}. Written by `tests/bench/architectures.py`; the tests marked `slow` in "
        "`tests/test_architectures.py` hold it.",
        "*Guarded* means: what enters the first layer (read by a probe of its own, in a forward and in a greedy "
        "generation) changes at all tokens of a flagged prompt but the last, and nowhere else; two prompts that are "
        "corrupted to the same embeddings give the same logits, so nothing else of a prompt gets in; the logits of "
        "unflagged rows move by the difference shown, which is 0, bit for bit, unless there are experts, whose sums "
        "may follow the batch; and nothing of the guard is left afterwards. *Refused* means that the call ends with "
        "this message before there is an answer.",
    ]
    head = ["architecture", "class", "result", "unflagged rows move by", "remark"]
    return str(generate.page([*text, generate.table(head, rows)]))


if __name__ == "__main__":
    sys.exit(main())
