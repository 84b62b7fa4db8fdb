"""The turns of a conversation, found in a rendered prompt by the tokenizer's own chat template."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ecoprompt.models import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """A stretch of a prompt that is gated by itself: characters `start` to `end`; `content` is what was said there."""

    start: int
    end: int
    content: str


@dataclass(frozen=True)
class _ChatFormat:
    """What a chat template writes before all turns, right before every user turn, between a question's answer and the
    next question, and after a question."""

    head: str
    open: str
    between: str
    close: str


@functools.lru_cache(maxsize=64)
def _chat_format(tokenizer: PreTrainedTokenizerBase, template: str) -> _ChatFormat | None:
    """Learn a template's format by rendering markers; None if it cannot be told where a turn begins and ends."""
    import jinja2

    marks = ["\u27e6first\u27e7", "\u27e6answer\u27e7", "\u27e6second\u27e7"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        asked = render(tokenizer, messages)
        answered = str(tokenizer.apply_chat_template(messages[:2], tokenize=False))
    except (ValueError, TypeError, ArithmeticError, LookupError, jinja2.TemplateError):
        return None
    pieces = re.fullmatch("(.*?)".join(["", *marks, ""]), asked, re.DOTALL)
    if pieces is None:
        return None
    head, answering, between, close = pieces.groups()
    end = os.path.commonprefix([answered.partition(marks[1])[2], between])  # closes an answer
    opened = os.path.commonprefix([head[::-1], between.removeprefix(end)[::-1]])[::-1]
    close = close.rstrip()
    told_apart = opened.strip() and close and between != opened and answering.startswith(close)
    return _ChatFormat(head, opened, between, close) if told_apart else None


def turns(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Turn]:
    """The turns of a rendered conversation (system, user, assistant), found by the tokenizer's own chat template.

    The turns cover the text without a gap. A text that is not such a conversation is one turn.
    """
    whole = [Turn(0, len(text), readable(tokenizer, text))]
    learnt = _chat_format(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else None
    if learnt is None or learnt.open not in text:
        return whole
    header, _, body = text.partition(learnt.open)
    rounds = [part.partition(learnt.close) for part in body.split(learnt.between)]
    if not all(close for _, close, _ in rounds):
        return whole
    found: list[Turn] = []
    start = 0
    system = readable(tokenizer, header)
    if system and system != readable(tokenizer, learnt.head.removesuffix(learnt.open)):
        start = len(header)
        found.append(Turn(0, start, system))  # not the template's own system prompt, but somebody's
    cursor = len(header)
    for asked, close, answered in rounds[:-1]:
        end = cursor + len(learnt.open + asked + close)
        cursor = end + len(answered + learnt.between) - len(learnt.open)
        found += [Turn(start, end, readable(tokenizer, asked)), Turn(end, cursor, readable(tokenizer, answered))]
        start = cursor
    asked, _, answered = rounds[-1]
    # Text past the last question belongs to it: who wrote it cannot be told.
    found.append(Turn(start, len(text), readable(tokenizer, f"{asked} {answered}")))
    return [turn for turn in found if turn.end > turn.start]


def readable(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """`text` without the special tokens in it."""
    return _special_tokens(tokenizer).sub(" ", text).strip()


@functools.lru_cache(maxsize=64)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any special token, the longest first; those that only mark up a chat are no named ones of `tokenizer`."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
