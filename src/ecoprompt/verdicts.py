"""Remembers what a gate and a token selector said of prompts, so that guards which share it ask them once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ecoprompt.forget import Decision, Forget
from ecoprompt.registry import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEMBERED = 1 << 14
"""How many prompts' decisions are kept, how many of prompts with an answer, and how many overruled questions."""


class Verdicts:
    """What a forget spec decides of prompts, each put to its gate and its token selector once.

    It keeps the `size` latest of each. Guards that share it may differ in corruption and seed. A question that an
    answer gave away is flagged for all of them. Threads may share it too; those that ask the same at the same moment
    may both put it to the gate.
    """

    def __init__(self, forget: Forget, tokenizer: PreTrainedTokenizerBase, size: int = REMEMBERED) -> None:
        self.size = size
        self.forget = forget
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._decided, self._extended, self._overruled = (_Memory(size) for _ in range(3))

    def check_shared(self, forget: Forget, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises InputError for a forget spec or a tokenizer under which prompts may be decided in another way."""
        other = self.forget.differences(forget) + ["tokenizer"] * (tokenizer is not self.tokenizer)
        if other:
            raise InputError(
                f"the verdicts are of another {', '.join(other)}; guards share them if they differ in corruption and "
                "seed alone"
            )

    def decide(self, prompts: Sequence[Sequence[int]]) -> list[Decision]:
        """What is decided of prompts, given as token ids without padding; one call of the gate for all new ones."""
        keys = [tuple(ids) for ids in prompts]
        with self._lock:
            memory = self._decided  # `overrule` puts an empty one in its place
            remembered = {key: memory.recall(key) for key in keys}
        new = [key for key, decision in remembered.items() if decision is None]
        if new:
            fresh = dict(zip(new, self.forget.decide(self.tokenizer, new, self._overruled), strict=True))
            remembered |= fresh
            with self._lock:
                memory.keep(fresh)
        return [remembered[key] for key in keys]

    def extend(self, decision: Decision, ids: Sequence[int], prompt: int) -> Decision:
        """The decision on a prompt, the first `prompt` of `ids`, carried over to the answer that follows it."""
        if not decision.flagged:
            return decision
        key = (prompt, tuple(ids))
        with self._lock:
            memory = self._extended
            before, extended = memory.recall(key) or (None, None)
        if extended is None or before != decision:  # more of the prompt's turns may have been flagged since
            extended = self.forget.extend(self.tokenizer, decision, ids, prompt)
            if extended is not decision:
                with self._lock:
                    memory.keep({key: (decision, extended)})
        return extended

    def overrule(self, prompts: Sequence[Sequence[int]], answers: Sequence[str]) -> list[bool]:
        """Which prompts the gate flags when it reads them with these answers; from now on they are flagged alone."""
        judged = self.forget.judge(self.tokenizer, prompts, answers)
        flagged = {read: score for read, score in judged if not score <= self.forget.threshold}
        if flagged:
            with self._lock:
                self._overruled.keep(flagged)
                # What other threads are deciding as before ends up in the memories that are left behind.
                self._decided, self._extended = _Memory(self.size), _Memory(self.size)
        return [read in flagged for read, _ in judged]


class _Memory(OrderedDict[Any, Any]):
    """The `size` entries that were put in or recalled last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def recall(self, key: Any) -> Any:
        """The entry, None if there is none."""
        if key in self:
            self.move_to_end(key)
        return self.get(key)

    def keep(self, entries: Mapping[Any, Any]) -> None:
        """Put the entries in, and those that have long not been asked for out."""
        self.update(entries)
        while len(self) > self.size:
            self.popitem(last=False)
