"""Prompts read once: what a model keeps of them is selected, joined and continued; imported only with a model."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ecoprompt.models import Loaded, batches, pad

Attached = AbstractContextManager[Any]
"""What a prompt is read under: a guard, or nothing; entered for each batch."""
REFILLED = 4
"""A batch is filled up once one in so many of its rows is done, as moving the others costs as much as a step or two."""


@dataclass
class Prefill:
    """What a model has read of R rows: `cache` and `mask` [R, L], left-padded, and the `logits` [R, V] that follow."""

    cache: DynamicCache
    mask: Tensor
    logits: Tensor

    def select(self, rows: Sequence[int]) -> Prefill:
        """These rows, in this order and as often as they are named, without columns that none of them has."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        first = int(mask.argmax(1).min())
        pairs = [(layer.keys[index][:, :, first:], layer.values[index][:, :, first:]) for layer in self.cache.layers]
        return Prefill(_cache(pairs), mask[:, first:], self.logits[index])

    def join(self, other: Prefill) -> Prefill:
        """The rows of both, this one's first."""
        pairs = [
            (_stack(ours.keys, theirs.keys), _stack(ours.values, theirs.values))
            for ours, theirs in zip(self.cache.layers, other.cache.layers, strict=True)
        ]
        mask = _stack(self.mask[:, None, :, None], other.mask[:, None, :, None])[:, 0, :, 0]
        return Prefill(_cache(pairs), mask, torch.cat([self.logits, other.logits]))


class _Growing(DynamicLayer):  # type: ignore[misc]
    """A cache layer with room to grow, where transformers' own copies all that it holds at every step."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self.room = key_states, value_states, (key_states, value_states)
            return key_states, value_states
        held, new = self.keys.shape[2], key_states.shape[2]
        if self.room[0].shape[2] < held + new:
            more = (0, 0, 0, held + 2 * new)
            self.room = (functional.pad(self.keys, more), functional.pad(self.values, more))
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, held : held + new] = states
        self.keys, self.values = (room[:, :, : held + new] for room in self.room)
        return self.keys, self.values


def _cache(pairs: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that holds the keys and values of each layer, [R, H, L, D]."""
    cache = DynamicCache()
    cache.layers = [_Growing() for _ in pairs]
    for number, (keys, values) in enumerate(pairs):
        cache.update(keys, values, number)
    return cache


def _stack(*parts: Tensor) -> Tensor:
    """Tensors [R, H, L, D] along R, filled up on the left with zeros to the widest."""
    width = max(part.shape[2] for part in parts)
    return torch.cat([functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])


def parameters(model: Any) -> frozenset[str]:
    """The names of what the model's forward takes: its class's, looked at once, or what was put in its place."""
    replaced = vars(model).get("forward")
    return _parameters(type(model).forward) if replaced is None else frozenset(inspect.signature(replaced).parameters)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def read(loaded: Loaded, prompts: Sequence[Sequence[int]], longest: int, attached: Attached) -> Prefill | None:
    """What the model makes of prompts, given as token ids; None if what it keeps of them cannot be taken apart.

    That is so unless it keeps keys and values of all tokens, up to `longest` of them: not the state of a recurrent
    model, nor more than a sliding window holds.
    """
    ids, mask = pad(loaded, prompts, left=True)
    with torch.inference_mode(), attached:
        out = _forward(loaded.model, ids, mask, None, logits_to_keep=1)
    cache = getattr(out, "past_key_values", None)
    if not isinstance(cache, DynamicCache) or not all(_is_plain(layer, longest) for layer in cache.layers):
        return None
    return Prefill(_cache([(layer.keys, layer.values) for layer in cache.layers]), mask, out.logits[:, -1])


def reads_behind_padding(loaded: Loaded) -> bool:
    """Whether a model reads a prompt behind padding as it reads it alone, and what follows it as in one go.

    A decoder that counts positions from the first token, padding or not, does not; nor does one that lays a cache out
    in its own way. Tried on a few tokens, as no configuration tells, once for each model.
    """
    if loaded.model not in _behind_padding:
        _behind_padding[loaded.model] = _reads_behind_padding(loaded)
    return _behind_padding[loaded.model]


_behind_padding: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _reads_behind_padding(loaded: Loaded) -> bool:
    first, second = ([*range(2, length)] for length in (6, 9))
    try:
        before = read(loaded, [first[:-1], second[:-1]], 9, nullcontext())
        with torch.inference_mode():
            alone = [loaded.model(input_ids=pad(loaded, [ids], left=True)[0]).logits[0, -2:] for ids in (first, second)]
        if before is None:  # nothing is shared, but generate pads as well
            ids, mask = pad(loaded, [first, second], left=True)
            with torch.inference_mode():
                found = _forward(loaded.model, ids, mask, None).logits[:, -1:]
        else:
            last = torch.tensor([first[-1:], second[-1:]], device=before.mask.device)
            found = torch.cat([before.logits[:, None], follow(loaded, before, last, torch.ones_like(last))], dim=1)
    except Exception:  # whatever it is that a model of its own kind makes of this, it is not read so
        return False
    expected = torch.stack(alone)[:, -found.shape[1] :]
    finite = expected.isfinite()  # a token that can never be said is at minus infinity
    tolerance = torch.finfo(loaded.model.dtype).eps ** 0.5 * float(expected[finite].abs().max())
    same = (found - expected)[finite].abs().max() <= tolerance
    return bool(same and torch.equal(found.isfinite(), finite))


def last_logits(
    loaded: Loaded, prompts: Sequence[Sequence[int]], tokens: int, attached: Attached
) -> list[NDArray[np.float32]]:
    """The logits [V] that follow each prompt, computed in batches of at most so many padded tokens; 0: one by one."""
    found: dict[int, NDArray[np.float32]] = {}
    for chunk in batches(list(map(len, prompts)), tokens):
        ids, mask = pad(loaded, [prompts[number] for number in chunk], left=True)
        with torch.inference_mode(), attached:
            logits = _forward(loaded.model, ids, mask, None, logits_to_keep=1).logits[:, -1]
        found |= zip(chunk, logits.float().cpu().numpy(), strict=True)
    return [found[number] for number in range(len(prompts))]


def _is_plain(layer: Any, longest: int) -> bool:
    kind = type(layer)
    fits = kind is DynamicLayer or (kind is DynamicSlidingWindowLayer and longest < layer.sliding_window)
    return fits and bool(layer.is_initialized)


def follow(loaded: Loaded, before: Prefill, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits [R, T, V] after each of the tokens `ids` [R, T], right-padded, that follow `before`, which grows."""
    whole = torch.cat([before.mask, mask], dim=1)
    with torch.inference_mode():
        out = _forward(loaded.model, ids, whole, before.cache)
    before.mask = whole
    logits: Tensor = out.logits
    return logits


def _forward(model: Any, ids: Tensor, mask: Tensor, cache: DynamicCache | None, **kept: Any) -> Any:
    known = parameters(model)
    given: dict[str, Any] = {name: value for name, value in kept.items() if name in known}
    if "position_ids" in known:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given)


def continuations(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    starts: Sequence[Sequence[int]],
    limits: Sequence[int],
    slots: int,
    pick: Callable[[Tensor, list[int], list[int]], Tensor],
    attached: Attached,
) -> list[list[int]] | None:
    """The token ids that follow each prompt, `starts[i]` first, until one ends the text or there are `limits[i]`.

    `slots` rows are continued at a time; what is done makes room for the next. `pick(logits, rows, steps)` chooses the
    tokens of the rows from logits [R, V], where each has `steps` already. None if the model cannot be read so.
    """
    ends = _ends(loaded.model)
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    made = [_whole(start, ends) for start in starts]

    def goes_on(row: int) -> bool:
        return len(made[row]) < limits[row] and ends.isdisjoint(made[row][-1:])

    waiting = deque(filter(goes_on, range(len(prompts))))
    active: list[int] = []
    state: Prefill | None = None
    while waiting or active:
        going = [place for place, row in enumerate(active) if goes_on(row)]
        if state is not None and (not going or (len(active) - len(going)) * REFILLED >= len(active)):
            state, active = state.select(going) if going else None, [active[place] for place in going]
        if waiting and (slots - len(active)) * REFILLED >= slots:
            new = [waiting.popleft() for _ in range(min(slots - len(active), len(waiting)))]
            fresh = _read_each_once(loaded, [[*prompts[row], *made[row]] for row in new], longest, attached)
            if fresh is None:
                return None
            state, active = fresh if state is None else state.join(fresh), active + new
        if state is None:
            continue
        tokens = pick(state.logits, active, [len(made[row]) for row in active])
        for row, token in zip(active, tokens.tolist(), strict=True):
            if goes_on(row):
                made[row].append(token)
        if any(map(goes_on, active)):
            state.logits = follow(loaded, state, tokens[:, None], torch.ones_like(tokens[:, None]))[:, -1]
    return made


def _read_each_once(
    loaded: Loaded, prompts: Sequence[Sequence[int]], longest: int, attached: Attached
) -> Prefill | None:
    """`read` of prompts of which some may be the same."""
    different = list(dict.fromkeys(map(tuple, prompts)))
    found = read(loaded, different, longest, attached)
    if found is None or len(different) == len(prompts):
        return found
    place = {prompt: number for number, prompt in enumerate(different)}
    return found.select([place[tuple(prompt)] for prompt in prompts])


def _whole(start: Sequence[int], ends: frozenset[int]) -> list[int]:
    """`start` up to where it ends the text."""
    end = next((place for place, token in enumerate(start) if token in ends), len(start))
    return list(start[: end + 1])


def _ends(model: Any) -> frozenset[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
