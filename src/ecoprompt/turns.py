"""The turns of a conversation, found in a rendered prompt by the tokenizer's own chat template."""

from __future__ import annotations

import functools
import itertools
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
    """What a chat template writes before all turns, between an answer and the next question (of which `end` closes the
    answer), and after a question."""

    head: str
    between: str
    end: str
    close: str

    @property
    def open(self) -> str:
        """What stands right before every user turn: the common end of `head` and of `between` past the answer's end."""
        pairs = zip(reversed(self.head), reversed(self.between.removeprefix(self.end)), strict=False)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        return "".join(character for character, _ in same)[::-1]


@functools.lru_cache(maxsize=64)
def _chat_format(tokenizer: PreTrainedTokenizerBase, template: str) -> _ChatFormat | None:
    """Learn a template's format by rendering markers; None if it cannot be told where a turn begins and ends."""
    import jinja2

    marks = ["\u27e6first\u27e7", "\u27e6answer\u27e7", "\u27e6second\u27e7"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        rest = render(tokenizer, messages)
        answered = str(tokenizer.apply_chat_template(messages[:2], tokenize=False))
    except (ValueError, TypeError, ArithmeticError, LookupError, jinja2.TemplateError):
        return None
    pieces = []
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    end = os.path.commonprefix([answered.partition(marks[1])[2], pieces[2]])
    learnt = _ChatFormat(head=pieces[0], between=pieces[2], end=end, close=rest)
    told_apart = learnt.open.strip() and learnt.close.strip() and learnt.between != learnt.open
    return learnt if told_apart and pieces[1].startswith(learnt.close.rstrip()) else None


def turns(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Turn]:
    """The turns of a rendered conversation (system, user, assistant), found by the tokenizer's own chat template.

    The turns cover the text without a gap. A text that is not such a conversation is one turn.
    """
    whole = [Turn(0, len(text), readable(tokenizer, text))]
    learnt = _chat_format(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else None
    if learnt is None or learnt.open not in text:
        return whole
    header, _, body = text.partition(learnt.open)
    rounds = body.split(learnt.between)
    if not all(learnt.close.rstrip() in part for part in rounds):
        return whole
    found: list[Turn] = []
    position = 0
    system = readable(tokenizer, header)
    if system and system != readable(tokenizer, learnt.head.removesuffix(learnt.open)):
        found.append(Turn(0, len(header), system))  # not the template's own system prompt, but somebody's
        position = len(header)
    cursor = len(header) + len(learnt.open)
    for number, part in enumerate(rounds):
        asked, close, answered = part.partition(learnt.close.rstrip())
        last = number == len(rounds) - 1
        end = cursor + len(asked) + len(close)
        if last:  # text past the last question belongs to it: who wrote it cannot be told
            content = readable(tokenizer, f"{asked} {answered}").strip()
            found.append(Turn(position, len(text), content))
            continue
        found.append(Turn(position, end, readable(tokenizer, asked)))
        position = cursor + len(part) + len(learnt.between) - len(learnt.open)
        found.append(Turn(end, position, readable(tokenizer, answered)))
        cursor += len(part) + len(learnt.between)
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
