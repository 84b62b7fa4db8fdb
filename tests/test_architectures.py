"""The guard on every decoder architecture that transformers can build small: a few by default, all with `-m slow`."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import architectures
import pytest
from architectures import Outcome
from conftest import make_tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ecoprompt.models import aliases

pytestmark = pytest.mark.filterwarnings("ignore")  # of the architectures' own code
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SAMPLE = {
    **dict.fromkeys(["bloom", "falcon", "gemma3", "mamba", "phi3", "rwkv", "xglm", "zaya"], "guarded"),
    **dict.fromkeys(["gemma4_text, no per-layer embeddings", "qwen4_exp_text, no n-grams"], "guarded"),
    **dict.fromkeys(["blt, fixed patches", "deepseek_v4", "gemma4_text", "qwen4_exp_text", "xlnet"], "refused"),
}
"""What is walked by default, none of it a family of conftest.py: layers of every kind, and each second way in."""
SECOND_PATHS = {"blt", "deepseek_v4", "gemma3n_text", "gemma4", "gemma4_text", "qwen4_exp", "qwen4_exp_text"}
"""Architectures whose layers read token ids past the input embedding: they leak if they are guarded by it alone."""


@functools.cache
def outcome(architecture: str) -> Outcome:
    return architectures.walk(architecture, tokenizer())


@functools.cache
def tokenizer():
    return make_tokenizer()


def check(found: Outcome) -> None:
    """Guarded without a leak, or refused with a reason; unflagged rows bit for bit, with experts to 1e-6."""
    assert not found.problems
    assert (found.result == "guarded") == (not found.reason)
    assert found.difference <= (1e-6 if found.experts else 0)


@pytest.mark.parametrize("architecture", SAMPLE)
def test_a_sample(architecture: str) -> None:
    found = outcome(architecture)
    check(found)
    assert found.result == SAMPLE[architecture], found.reason


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures.architectures())
def test_every_architecture(architecture: str) -> None:
    found = outcome(architecture)
    check(found)
    if architecture in SECOND_PATHS:
        assert found.result == "refused"
        assert re.search("second way|in every layer", found.reason)


@pytest.mark.slow
def test_at_least_120_are_guarded() -> None:
    known = [outcome(architecture) for architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    assert sum(found.result == "guarded" for found in known) >= 120
    assert {found.architecture for found in known if found.result == "not built"} <= set(architectures.NOT_BUILT)


@pytest.mark.slow
def test_the_page_says_what_the_walk_finds() -> None:
    rows = dict(rows_of_the_page())
    for architecture in architectures.architectures():
        found = outcome(architecture)
        assert rows[architecture] == f"{found.result}: {found.reason}".removesuffix(": ")


def rows_of_the_page() -> list[tuple[str, str]]:
    """(architecture, result) of every row of the table of architectures in docs/models.md."""
    _, _, part = PAGE.read_text(encoding="utf-8").partition("\n## Architectures\n")
    cells = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| `")]
    return [(row[0].strip("`"), row[2]) for row in cells]


def test_the_page_has_every_architecture_once() -> None:
    assert [name for name, _ in rows_of_the_page()] == architectures.architectures()


def test_what_models_toml_says_of_architectures() -> None:
    """Every alias is of an architecture that is guarded, or says that its code is not transformers' own."""
    results = dict(rows_of_the_page())
    for name, alias in aliases().items():
        if alias.get("code") == "remote":
            assert alias["architecture"] not in results, name
        else:
            assert results[alias["architecture"]] == "guarded", name


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk sees a second way in if the guard does not refuse it."""
    monkeypatch.setattr(importlib.import_module("ecoprompt.guard"), "second_paths", lambda model, embedding: [])
    for architecture in ("deepseek_v4", "qwen4_exp_text"):
        found = architectures.walk(architecture, tokenizer())
        assert any("second way in" in problem for problem in found.problems)


def test_a_corruption_in_the_wrong_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt = architectures._OneNoise.corrupt

    def shifted(self, embeddings, decision):
        return corrupt(self, embeddings, decision).roll(1, 0)

    monkeypatch.setattr(architectures._OneNoise, "corrupt", shifted)
    found = architectures.walk("phi3", tokenizer())
    assert any("reads changes at" in problem for problem in found.problems)
