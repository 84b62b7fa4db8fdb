"""A text in passages of whole sentences, as books are asked for."""

from __future__ import annotations

import functools
import itertools
from typing import Any

LENGTH = 190
"""Words of a passage: about 256 tokens of English, the length of the paper's."""
_LEAST = 5
"""Words of a sentence; what is shorter, a heading or an exclamation, belongs to the next."""
_OPENING = "\"'([“‘«"


def passages(text: str) -> list[dict[str, str]]:
    """`text` in passages, each with its `text`, its `first_sentence` and the `rest` (empty only in a sole sentence).

    A passage ends with the sentence that makes it LENGTH words long, at least the second. The paper counts tokens of
    the model; words give every model the same passages.
    """
    found: list[list[str]] = [[]]
    for sentence in sentences(" ".join(text.split())):
        if len(found[-1]) > 1 and sum(len(one.split()) for one in found[-1]) >= LENGTH:
            found.append([])
        found[-1].append(sentence)
    if len(found) > 1 and len(found[-1]) == 1:
        found[-2:] = [found[-2] + found[-1]]
    return [{"text": " ".join(some), "first_sentence": some[0], "rest": " ".join(some[1:])} for some in found if some]


def sentences(text: str) -> list[str]:
    """The sentences of a text in one line, by spaCy's rules for English; joined with spaces they are the text."""
    nlp = _sentencizer()
    nlp.max_length = max(nlp.max_length, len(text) + 1)
    starts = [_opened(text, span.start_char) for span in nlp(text).sents]
    borders = [start for start in starts if text[start - 1 : start] == " "]
    found: list[str] = []
    for start, end in itertools.pairwise([0, *borders, len(text) + 1]):
        if found and len(found[-1].split()) < _LEAST:
            found[-1] += f" {text[start : end - 1]}"
        else:
            found.append(text[start : end - 1])
    return [one for one in found if one]


def _opened(text: str, start: int) -> int:
    """Where a sentence starts with the quotation marks before it, which spaCy leaves with the sentence before."""
    before = text[max(0, start - 8) : start]
    return start - len(before) + len(before.rstrip(_OPENING))


@functools.cache
def _sentencizer() -> Any:
    import spacy

    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    return nlp
