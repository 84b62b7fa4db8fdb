"""Views: what a text says once it is folded, and its parts."""

from __future__ import annotations

import time

import pytest

from ecoprompt.views import normalise, parts, word_windows


@pytest.mark.parametrize(
    "unseen", ["\u200b", "\u00ad", "\ufe0f", "\u034f", "\u180b", "\U000e0100", "\u3164", "\u115f", "\u2800"]
)
def test_what_shows_nothing_splits_no_word(unseen):
    assert normalise(f"Har{unseen}ry Pot{unseen}{unseen}ter") == "harry potter"


@pytest.mark.parametrize(
    "look",
    [
        "Наrrу Роttеr",
        "ʜᴀʀʀʏ ᴘᴏᴛᴛᴇʀ",
        "Ｈａｒｒｙ Ｐｏｔｔｅｒ",
        "𝐇𝐚𝐫𝐫𝐲 𝐏𝐨𝐭𝐭𝐞𝐫",
        "Hárrÿ Pöttèr",
        "H a r r y   P o t t e r",
    ],
)
def test_what_looks_alike_reads_alike(look):
    assert normalise(look) == "harry potter"


def test_parts_are_the_whole_and_its_sentences():
    text = "He sat down at once. Who is Harry Potter? It was late by then."
    assert parts(text) == [text, "He sat down at once.", "Who is Harry Potter?", "It was late by then."]
    assert parts("Who is it?") == ["Who is it?"]


def test_windows_overlap_by_half_and_end_with_the_text():
    assert word_windows("aa bb cc dd ee ff gg", 4) == ["aa bb cc dd", "cc dd ee ff", "dd ee ff gg"]
    assert word_windows("?!", 4) == []


@pytest.mark.parametrize("text", [" " * 200_000, "\n " * 100_000, ". " * 100_000, "a " * 100_000, ':"' * 100_000])
def test_no_text_takes_long(text):
    started = time.perf_counter()
    parts(f"{text}x")
    assert time.perf_counter() - started < 5
