"""Draws tokens by noise that is a function of a row's key and its step alone; imported only with a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Drawing:
    """A logits processor after which the greatest score is a draw from the model's distribution (Gumbel-max).

    `generate` draws all rows of a batch from one generator, so that a row's draws would depend on its batch.
    """

    def __init__(self, keys: Sequence[int], temperatures: Sequence[float], top_ps: Sequence[float]) -> None:
        self.keys, self.temperature, self.top_p = (
            torch.tensor(given)[:, None] for given in (keys, temperatures, top_ps)
        )
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As `at`, for all rows at one step, which this counts."""
        self.step += 1
        return self.at(range(len(scores)), [self.step - 1] * len(scores), scores)

    def at(self, rows: Sequence[int], steps: Sequence[int], scores: Tensor) -> Tensor:
        """Scores [B, V] of the tokens that come next in these rows, with the noise of each one's step."""
        index = torch.tensor(rows)
        scores = scores.float() / self.temperature[index].to(scores.device)
        top_p = self.top_p[index]
        if (top_p < 1).any():
            scores = _nucleus(scores, top_p.to(scores.device))
        keys = self.keys[index] + torch.tensor(steps)[:, None]
        return scores + gumbel(keys.to(scores.device), scores.shape[1])


def _nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """`scores` [B, V], minus infinity but for the fewest tokens of a row that come to its `top_p` [B, 1]."""
    ranked, order = scores.softmax(-1).sort(dim=-1, descending=True)
    beyond = (ranked.cumsum(-1) - ranked >= top_p) & (top_p < 1)
    return scores.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))


def gumbel(keys: Tensor, count: int) -> Tensor:
    """[B, count] numbers of the standard Gumbel distribution, a function of each row's key [B, 1] and the column alone.

    Made by hashing, in whole numbers, so that every device makes the same ones and none is made in a sequence.
    """
    columns = _mix(torch.arange(count, device=keys.device))
    bits = _mix(_mix(keys) + columns) & ((1 << 53) - 1)
    uniform = ((bits.float() + 0.5) * 2.0**-53).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finisher (Steele, Lea, Flood 2014) on 64-bit whole numbers; the masks make its shifts unsigned."""
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    bits = (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))
