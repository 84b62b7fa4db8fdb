"""Sophia-G, the second-order optimiser that unlearning has been tried with (SOUL, Jia et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

EVERY = 10
"""Steps between two estimates of the curvature."""


class Sophia(torch.optim.Optimizer):
    """Steps of the gradient's mean over the curvature's, none longer than the learning rate (Liu et al. 2023, alg. 3).

    `betas` are the decay rates of both means, `gamma` scales the curvature. Before the first `curve` every step has
    the length of the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.2,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.05,
        epsilon: float = 1e-12,
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "gamma": gamma, "epsilon": epsilon}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Moves every weight that has a gradient."""
        for group, weight in self._trained():
            mean = self._mean(weight, "gradient").lerp_(weight.grad, 1 - group["betas"][0])
            scale = (group["gamma"] * self._mean(weight, "curvature")).clamp(min=group["epsilon"])
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * (mean / scale).clamp(-1, 1))

    @torch.no_grad()
    def curve(self, labels: int) -> None:
        """Takes the gradients at hand, of the mean of `drawn_loss` over that many labels, into the curvature's mean."""
        for group, weight in self._trained():
            self._mean(weight, "curvature").lerp_(labels * weight.grad.square(), 1 - group["betas"][1])

    def _trained(self) -> list[tuple[dict[str, Any], Any]]:
        return [(group, one) for group in self.param_groups for one in group["params"] if one.grad is not None]

    def _mean(self, weight: Any, name: str) -> torch.Tensor:
        kept: dict[str, torch.Tensor] = self.state[weight]
        return kept.setdefault(name, torch.zeros_like(weight))


def drawn_loss(model: Any, batches: Sequence[Mapping[str, torch.Tensor]], ignored: int) -> tuple[torch.Tensor, int]:
    """The cross-entropy of labels that the model draws itself, where the batches have any, summed, and their number.

    The squared gradient of the mean, times the number, estimates the diagonal of the Gauss-Newton matrix (Liu et al.
    2023, alg. 2).
    """
    logits = []
    for batch in batches:
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logits.append(found[:, :-1][batch["labels"][:, 1:] != ignored].float())
    every = torch.cat(logits)
    drawn = every.detach().softmax(-1).multinomial(1)[:, 0]
    return torch.nn.functional.cross_entropy(every, drawn, reduction="sum"), len(drawn)
