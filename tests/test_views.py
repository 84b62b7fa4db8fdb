"""Views: what a text says once it is folded, and its parts."""

from __future__ import annotations

import random
import time
import unicodedata

import pytest

from ecoprompt.views import normalise, parts, visible, word_windows


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


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Ηѕіао Үυո", "Hsiao"),
        ("W h o   i s   H s i a o ?", "Who is Hsiao ?"),
        ("W-h-o", "W-h-o"),
        ("h.s.i.a.o.y.u.n", "hsiaoyun"),
        ("J. R. R. Tolkien", "J. R. R. Tolkien"),
        ("Hs\u200bi\u00adao", "Hsiao"),
        ("Kálidás", "Kalidas"),
    ],
)
def test_what_is_seen(text, seen):
    assert visible(text).startswith(seen)


def test_look_alikes_fold_to_what_they_look_like():
    # Unicode's own names, not our table: CYRILLIC SMALL LETTER ES is drawn as c, and so on.
    latin, other = "ABCEHKMOPTX", "АВСЕНКМОРТХ"
    assert all(unicodedata.name(letter).startswith("CYRILLIC CAPITAL") for letter in other)
    assert normalise(other) == latin.lower()


def test_parts_are_the_sentences_and_the_whole():
    text = "Please answer question 2. Question 1: Where do owls live? Question 2: Who is Hsiao Yun-Hwa?"
    assert parts(text)[0] == text
    assert "Who is Hsiao Yun-Hwa?" in parts(text)[-1]
    assert all("owls" not in part for part in parts(text)[2:] if "Hsiao" in part)
    assert parts("Who is Hsiao Yun-Hwa?") == ["Who is Hsiao Yun-Hwa?"]
    assert parts("") == [""]
    assert all(len(part.split()) >= 4 for part in parts("Dr. Low went. He saw it. Did he? Yes.")[1:])


def test_no_word_is_lost_in_the_parts():
    generator = random.Random(0)
    for _ in range(50):
        text = " ".join(generator.choice(["aa", "bb.", "cc?", "dd:", "ee\n", "ff", "gg!"]) for _ in range(30))
        found = parts(text)
        assert normalise(" ".join(found[1:] or found)) == normalise(text)


def test_word_windows_overlap_by_half_and_end_with_the_text():
    words = [f"w{number}" for number in range(21)]
    starts = [0, 4, 8, 12, 13]
    assert word_windows(" ".join(words), 8) == [" ".join(words[start : start + 8]) for start in starts]
    assert word_windows("?", 8) == []


@pytest.mark.parametrize("text", [" " * 200_000, "\n " * 100_000, ". " * 100_000, "a " * 100_000, ':"' * 100_000])
def test_no_text_takes_long(text):
    started = time.perf_counter()
    parts(f"{text}x")
    assert time.perf_counter() - started < 5
