"""Pressures on a gate: every kind by the same checks, and what some of them promise."""

from __future__ import annotations

import re

import pytest

from ecoprompt.pressure import EVERYDAY, GENERAL, TEXTS, WORDINGS, press, rehearse, rehearse_anew
from ecoprompt.registry import InputError, pressures
from ecoprompt.views import normalise

TEXT = "Who is Hsiao Yun-Hwa, the author born in Taipei?"
OTHERS = ["How far is the Moon?", "What do owls eat at night?", "Name a yellow flower."]
REWRITING = {"keywords", "cloze"}
"""Those that leave words of the prompt out; all others keep each of them, in order."""


@pytest.mark.parametrize("name", list(pressures))
def test_every_pressure_repeats_changes_and_takes_anything(name):
    assert press(name, TEXT, 0) == press(name, TEXT, 0)
    assert press(name, TEXT, 0) != TEXT
    assert all(press(name, TEXT, seed, OTHERS) != TEXT for seed in range(5))
    for text in ("", "?", "a", "日本の作家は誰ですか", "{0} {name} %s", "line one\nline two"):
        assert isinstance(press(name, text, 0), str)
    assert pressures[name].__doc__
    assert pressures.bind(name, {}) == {}


@pytest.mark.parametrize("name", [name for name in pressures if name not in REWRITING | {"typos"}])
def test_every_pressure_asks_the_same(name):
    # Read as a gate reads it: folded, without punctuation.
    asked, pressed = normalise(TEXT), normalise(press(name, TEXT, 1, OTHERS))
    assert asked.replace(" ", "") in pressed.replace(" ", "")


@pytest.mark.parametrize("name", sorted(REWRITING))
def test_a_rewritten_prompt_keeps_its_names(name):
    kept = normalise(press(name, TEXT, 0))
    assert all(word in kept for word in ("hsiao", "yun", "hwa", "author", "taipei"))


@pytest.mark.parametrize("seed", range(20))
def test_there_are_two_typos_in_two_words(seed):
    changed = [(a, b) for a, b in zip(TEXT.split(), press("typos", TEXT, seed).split(), strict=True) if a != b]
    assert len(changed) == 2
    for right, wrong in changed:
        assert right[0] == wrong[0]
        assert abs(len(right) - len(wrong)) <= 1


def test_small_edits_are_what_they_are_called():
    text = "Who is  Hsiao Yun-Hwa, the author?"
    assert press("lower_case", text, 0) == text.lower()
    assert press("upper_case", text, 0) == text.upper()
    assert press("no_punctuation", text, 0) == "Who is  Hsiao YunHwa the author"
    assert press("extra_spaces", text, 0).split() == text.split()
    assert min(map(len, re.findall(r"\s+", press("extra_spaces", text, 0)))) >= 2


def test_a_prompt_stands_in_the_middle():
    long = press("long_context", TEXT, 0, OTHERS)
    before, found, after = long.partition(TEXT)
    assert found
    assert 3000 <= len(before.split()) <= 3010
    assert 3000 <= len(after.split()) <= 3010
    composite = press("composite", TEXT, 0, OTHERS)
    assert composite.startswith("Please answer question 3. Question 1:")
    assert f"Question 3: {TEXT} Question 4:" in composite
    assert press("five_shot", TEXT, 0).endswith(f"Question: {TEXT}\nAnswer:")
    assert press("five_shot", TEXT, 0).count("Question:") == 6


def test_a_gate_is_not_tested_on_the_wordings_that_it_practised():
    """No three words in a row of a wording for practice stand in one for measuring."""
    tested = [wording for kind in TEXTS["wordings"].values() for wording in kind["of"]]

    def triples(wording):
        words = normalise(wording.replace("{}", " ")).split()
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    measured = set().union(*map(triples, tested))
    assert not measured & set().union(*map(triples, WORDINGS))
    assert all(wording.count("{}") == 1 for wording in (*tested, *WORDINGS))


def test_rehearsal_keeps_labels_and_adds_what_asks_for_nothing():
    texts = [(f"Who is Hsiao number {n}?", 1) for n in range(4)] + [(f"Where is town {n}?", 0) for n in range(8)]
    copies = rehearse(texts, 7)
    assert copies == rehearse(texts, 7)
    assert sum(label for _, label in copies) == 4 * 4
    assert {(question, 0) for question in EVERYDAY} <= set(copies)


def test_every_epoch_has_its_own_edits_and_as_many():
    texts = [(f"Who is Hsiao number {n}?", 1) for n in range(40)] + [(f"Where is town {n}?", 0) for n in range(80)]
    epochs = [rehearse_anew(texts, seed) for seed in range(4)]
    assert epochs[1] == rehearse_anew(texts, 1)
    assert len({tuple(copies) for copies in epochs}) == 4
    assert len({len(copies) for copies in epochs}) == 1
    assert all(sum(label for _, label in copies) == 40 for copies in epochs)
    assert all({(text, 0) for text in GENERAL} <= set(copies) for copies in epochs)
    for text in ("", "?", "word", "日本の作家は誰ですか"):
        assert rehearse_anew([(text, 1)], 0)


def test_random_words_mark_no_sentence():
    words = press("random_prefix", TEXT, 3).removesuffix(TEXT).split()
    assert len(words) == 24
    assert all(word.isalnum() for word in words)


def test_an_unknown_pressure_is_refused():
    with pytest.raises(InputError, match="no pressure 'typo'; did you mean 'typos'"):
        press("typo", TEXT, 0)
    assert press(None, TEXT, 0) == TEXT
