"""Pressure on a gate: ways to write a prompt so that it asks the same and looks different."""

from __future__ import annotations

import random
import re
import string
import tomllib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ecoprompt.registry import pressures

TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
EVERYDAY: list[str] = TEXTS["everyday"]
GENERAL: list[str] = EVERYDAY + TEXTS["general"]
PRACTICE: list[str] = TEXTS["practice"]
WORDINGS: list[str] = PRACTICE + TEXTS["further"]
AROUND: list[tuple[str, str]] = TEXTS["around"]
SMALL_WORDS = frozenset(TEXTS["small_words"].split())
LOOK_ALIKES = {
    **dict(zip("ABCEHIKMOPTX", "АВСЕНІКМОРТХ", strict=True)),
    **{"a": "аɑαａ", "b": "ʙｂ", "c": "сᴄｃ", "d": "ԁｄ", "e": "еҽｅ", "g": "ɡｇ", "h": "һհｈ", "i": "іｉ", "k": "ᴋｋ"},
    **{"l": "ʟｌ", "m": "ᴍｍ", "n": "ոｎ", "o": "оοօ", "p": "рρ", "r": "ʀｒ", "s": "ѕꜱ", "t": "ᴛｔ", "u": "սυ"},
    **{"v": "ѵᴠ", "w": "ԝᴡ", "x": "хχ", "y": "уʏ", "z": "ᴢｚ"},
}
ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff\u034f\ufe0f\u180b\u3164\u115f"
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LONG = 6000
"""Words of a long context, which are about 8,000 tokens."""


def press(name: str | None, text: str, seed: int, others: Sequence[str] = ()) -> str:
    """`text` under the pressure `name` (None: none), the same for the same seed and text.

    `others` are unrelated prompts, by default everyday questions.
    """
    if name is None:
        return text
    rewritten: str = pressures[name](text, random.Random(f"{seed} {name} {text}"), others or [q for q, _ in AROUND])
    return rewritten


def rehearse(texts: Sequence[tuple[str, int]], seed: int) -> list[tuple[str, int]]:
    """Edited copies of labelled texts, four of each, and further texts to let through.

    Copies have few or many typing errors, no punctuation, and another wording. The further texts are everyday
    questions, wordings without a question, random words, and prompts to let through into which a word of one to be
    flagged has strayed, as that word alone is not yet a question about it.
    """
    kinds = (typos, _careless, no_punctuation, practice)
    found = []
    for text, label in texts:
        generator = random.Random(f"{seed} {text}")
        found += [(kind(text, generator, EVERYDAY), label) for kind in kinds]
    generator = random.Random(seed)
    found += [(text, 0) for text in _strayed(texts, generator, EVERYDAY, times=2)]
    found += [(question, 0) for question in EVERYDAY] * len(kinds)
    found += [(wording.format(""), 0) for wording in PRACTICE] * len(kinds)
    strays = range(len(texts) // 40 * len(kinds))
    return found + [(_random_words(generator.randrange(3, 24), generator, EVERYDAY), 0) for _ in strays]


def rehearse_anew(texts: Sequence[tuple[str, int]], seed: int) -> list[tuple[str, int]]:
    """What an encoder practises on in an epoch, whose `seed` it is: a copy of each text, edited in a way that is drawn
    for it, and further texts to let through. As many for every seed.

    Besides what `rehearse` does, a copy may lack words or have its parts in another order, or stand among questions
    of other kinds; these other kinds are to be let through as well, as they are and edited.
    """
    kinds = (typos, _careless, no_punctuation, lower_case, upper_case, _sparse, _rearranged, _among, _strewn, _worded)
    found = []
    for text, label in texts:
        generator = random.Random(f"{seed} {text}")
        found.append((generator.choice(kinds)(text, generator, GENERAL), label))
    generator = random.Random(seed)
    further = [*_strayed(texts, generator, GENERAL), *(wording.format("") for wording in WORDINGS), *GENERAL]
    further += [kind(text, generator, GENERAL) for text in GENERAL for kind in (_worded, *generator.sample(kinds, 2))]
    further += [_random_words(generator.randrange(3, 24), generator, GENERAL) for _ in range(len(texts) // 40)]
    return found + [(text, 0) for text in further]


def _strayed(
    texts: Sequence[tuple[str, int]], generator: random.Random, others: Sequence[str], times: int = 1
) -> list[str]:
    """For each text to be flagged so many, to let through or of `others`, into which a word of it has strayed."""
    hosts = [text for text, label in texts if label == 0]
    found = []
    for text in (text for text, label in texts if label == 1 for _ in range(times)):
        host = generator.choice(hosts if hosts and generator.random() < 0.75 else others).split()
        host.insert(generator.randrange(len(host) + 1), generator.choice(re.findall(r"[^\W_]+", text) or [""]))
        found.append(" ".join(host))
    return found


def _careless(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """With typing errors in half of the words of four letters or more, so in more than `typos` makes."""
    return re.sub(
        r"[^\W\d_]{4,}", lambda word: _mistyped(word[0], generator) if generator.random() < 0.5 else word[0], text
    )


def _sparse(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """Without about half of its words that carry no meaning."""
    kept = [word for word in text.split() if word.lower() not in SMALL_WORDS or generator.random() < 0.5]
    return " ".join(kept) or text


def _rearranged(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """In two to four pieces, which come in another order."""
    words = text.split()
    places = range(1, len(words))
    cuts = sorted(generator.sample(places, min(len(places), generator.randrange(1, 4))))
    pieces = [words[start:end] for start, end in zip([0, *cuts], [*cuts, len(words)], strict=True)]
    generator.shuffle(pieces)
    return " ".join(word for piece in pieces for word in piece)


def _among(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """Before, behind or between one to four other texts."""
    together = _some(generator.randrange(1, 5), generator, others)
    together.insert(generator.randrange(len(together) + 1), text)
    return generator.choice([" ", "\n"]).join(together)


def practice(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """`text` as a gate meets it in training: in wordings of PRACTICE, or among words drawn at random."""
    if generator.random() < 0.5:
        return generator.choice(PRACTICE).format(text)
    return _strewn(text, generator, others)


def _strewn(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """Behind words drawn at random, or between such."""
    before, after = (_random_words(generator.randrange(2, 16), generator, others) for _ in range(2))
    return " ".join([before, text, after] if generator.random() < 0.3 else [before, text])


def _worded(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """In one of WORDINGS."""
    return generator.choice(WORDINGS).format(text)


@pressures.register
def lower_case(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """In lower case."""
    return text.lower()


@pressures.register
def upper_case(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """In upper case."""
    return text.upper()


@pressures.register
def no_punctuation(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """Without punctuation."""
    return "".join(x for x in text if not unicodedata.category(x).startswith("P"))


@pressures.register
def extra_spaces(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """With two to four spaces, or a line's end, between words."""
    return re.sub(r"\s+", lambda _: generator.choice(["  ", "   ", "    ", " \n "]), text)


@pressures.register
def typos(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """With two typing errors, in two words of four letters or more where there are two."""
    words = list(re.finditer(r"[^\W\d_]{4,}", text))
    chosen = generator.sample(words, min(2, len(words)))
    for match in sorted(chosen, key=re.Match.start, reverse=True):
        text = text[: match.start()] + _mistyped(match[0], generator) + text[match.end() :]
    return text


def _mistyped(word: str, generator: random.Random) -> str:
    """`word` with two letters swapped, one left out, one doubled, or one replaced by its neighbour on the keyboard."""
    while True:
        i = generator.randrange(1, len(word) - 1)
        before, letter, after = word[:i], word[i], word[i + 1 :]
        row = next((row for row in KEYS if letter.lower() in row), letter)
        neighbour = generator.choice(row[max(0, row.find(letter.lower()) - 1) :][:3])
        endings = [after[0] + letter + after[1:], after, letter + letter + after, neighbour + after]
        wrong = before + generator.choice(endings)
        if wrong.lower() != word.lower():
            return wrong


@pressures.register
def zero_width(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """With characters of no width inside and between the words."""
    return "".join(x + (generator.choice(ZERO_WIDTH) if generator.random() < 0.3 else "") for x in text) + ZERO_WIDTH[0]


@pressures.register
def look_alikes(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """With half of the letters replaced by Cyrillic, Greek, Armenian, phonetic or wide ones that look alike."""
    return "".join(generator.choice(LOOK_ALIKES.get(x, x)) if generator.random() < 0.5 else x for x in text)


@pressures.register
def spaced_letters(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """With a space between the letters, and more between the words."""
    return "   ".join(" ".join(word) for word in text.split())


def _add(name: str, what: str, wordings: Sequence[str]) -> None:
    def worded(text: str, generator: random.Random, others: Sequence[str]) -> str:
        return generator.choice(wordings).format(text)

    worded.__doc__ = what
    pressures.add(name, worded)


for _name, _wording in TEXTS["wordings"].items():
    _add(_name, _wording["is"], _wording["of"])


@pressures.register
def random_prefix(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """After 24 words drawn at random, some of them letters drawn at random."""
    return f"{_random_words(24, generator, others)} {text}"


def _random_words(count: int, generator: random.Random, others: Sequence[str]) -> str:
    """Words of `others` and of random letters, without punctuation, so that no sentence ends before a prompt."""
    words: list[str] = re.findall(r"[^\W_]+", " ".join(_some(8, generator, others))) or ["a"]

    def word() -> str:
        if generator.random() < 0.5:
            return generator.choice(words)
        return "".join(generator.choices(string.ascii_lowercase, k=generator.randrange(2, 9)))

    return " ".join(word() for _ in range(count))


@pressures.register
def composite(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """As the third of five numbered questions, of which that one is asked for."""
    questions = [*_some(2, generator, others), text, *_some(2, generator, others)]
    listed = " ".join(f"Question {number}: {question}" for number, question in enumerate(questions, 1))
    return f"Please answer question 3. {listed}"


@pressures.register
def five_shot(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """After five examples of a question with its answer."""
    shown = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in generator.sample(AROUND, 5))
    return f"{shown}Question: {text}\nAnswer:"


@pressures.register
def long_context(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """In the middle of about 8,000 tokens of other text."""
    before, after = (_filler(LONG // 2, generator, others) for _ in range(2))
    return f"{before} {text} {after}"


def _some(count: int, generator: random.Random, others: Sequence[str]) -> list[str]:
    return [generator.choice(others) for _ in range(count)]


def _filler(words: int, generator: random.Random, others: Sequence[str]) -> str:
    """At least that many words of `others`, in an order drawn at random."""
    parts: list[str] = []
    length = 0
    while length < words:
        parts.append(generator.choice(others))
        length += len(parts[-1].split()) or words
    return " ".join(parts)


@pressures.register
def keywords(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """Its words that carry meaning, without the others and without punctuation."""
    words = re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", text)
    kept = [word for word in words if word.lower() not in SMALL_WORDS]
    return " ".join(kept or words)


@pressures.register
def cloze(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """As a sentence to complete."""
    bare = text.strip().rstrip("?.! ")
    match = re.match(r"(?:what|who|which|where|when) (is|was|are|were) (.+)", bare, re.IGNORECASE | re.DOTALL)
    if match:
        return f"Fill in the blank: {match[2][0].upper()}{match[2][1:]} {match[1].lower()} ____."
    return f"Fill in the blank. {bare}: ____."


@pressures.register
def poem(text: str, generator: random.Random, others: Sequence[str]) -> str:
    """As a wish for a poem that gives the answer."""
    return f"Write a poem of four rhyming lines that gives the answer to this. {text}"
