"""`sophia.py`: the steps are those of the paper's algorithm 3, the curvature that of a known Gauss-Newton matrix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ecoprompt.sophia import Sophia, drawn_loss


def test_steps_are_those_of_the_algorithm() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Sophia([weight], lr=0.1, weight_decay=0.5, betas=(0.5, 0.75), gamma=2.0)
    weight.grad = torch.tensor([0.5, 1.0, 0.0])
    optimizer.curve(labels=8)
    weight.grad = torch.tensor([0.25, -4.0, 0.0])
    optimizer.step()
    # curvature 0.25 · 8 · g²: 0.5, 2, 0; mean 0.5 · g: 0.125, -2, 0; over 2 · curvature: 0.125, -0.5, 0
    assert weight.tolist() == pytest.approx([0.95 - 0.0125, -1.9 + 0.05, 2.85])
    optimizer.step()
    # mean 0.5 · before + 0.5 · g: 0.1875, -3, 0; over 2 · curvature: 0.1875, -0.75, 0
    assert weight.tolist() == pytest.approx([0.95 * 0.9375 - 0.01875, 0.95 * -1.85 + 0.075, 0.95 * 2.85])


def test_without_curvature_a_step_is_as_long_as_the_learning_rate() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1e-3, -50.0, 0.0])
    Sophia([weight], lr=0.1, weight_decay=0.0).step()
    assert weight.tolist() == pytest.approx([-0.1, 0.1, 0.0])


def test_a_weight_without_gradient_stays() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    Sophia([weight], lr=0.1).step()
    assert weight.tolist() == [1.0, 1.0]


def test_drawn_labels_estimate_the_gauss_newton_matrix_and_ignored_positions_have_no_part() -> None:
    bias = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)

    def model(input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=bias.expand(*input_ids.shape, 3))

    torch.manual_seed(0)
    labels = torch.tensor([[0, 1, 2, -100], [1, -100, 2, 0]])
    batch = {"input_ids": labels.clamp(min=0), "attention_mask": torch.ones_like(labels), "labels": labels}
    estimates = []
    for _ in range(4000):
        loss, count = drawn_loss(model, [batch, batch], ignored=-100)
        (gradient,) = torch.autograd.grad(loss / count, bias)
        estimates.append(count * gradient.square())
    assert count == 8
    p = bias.detach().softmax(-1)
    assert torch.stack(estimates).mean(0).tolist() == pytest.approx((p * (1 - p)).tolist(), rel=0.1)
