"""What training and unlearning minimise: forget terms, retain terms, and the named methods that add them up.

A term reads what a model gives for batches, by the names of its parameters: `forget` and `retain` are the two sets,
`idk` the forget set's prompts with other answers ("I don't know", say), `mismatch` the same with answers of the retain
set; `..._original` is what the model gave before it was trained. Padding, and what else no label asks for, has no part
in any term.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ecoprompt.registry import inputs_of, keys_of, losses, methods

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a token that has no part in the loss."""


@dataclass(frozen=True)
class Scored:
    """What a model gives for a batch: `logits` [B, T, V] beside the `labels` [B, T] of the tokens that it read, and
    `hidden` [B, T, D], its states after one layer, where a method reads them."""

    logits: Tensor
    labels: Tensor
    hidden: Tensor | None = None
    step: Sequence[Tensor] = ()
    """The labels of all batches that one optimiser step adds up, this one's among them; none: it is alone."""

    def mean(self, values: Tensor, counts: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of `values` where `counts(labels)`, both [B, T-1] or [B].

        Of one of several batches it is the part of their common mean, times their number: what averages them, over
        gradient accumulation or processes, gets the mean of one great batch, however the lengths are spread.
        """
        here = counts(self.labels)
        everywhere = [counts(labels).sum() for labels in self.step] or [here.sum()]
        return values.masked_fill(~here, 0.0).sum() * len(everywhere) / sum(everywhere).clamp(min=1)  # type: ignore[union-attr]

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """The log-probabilities of every next token [B, T-1, V], the next labels, and where these count [B, T-1]."""
        labels, counts = self.labels[:, 1:], learnt(self.labels)
        return self.logits[:, :-1].float().log_softmax(-1), labels.masked_fill(~counts, 0), counts

    def of_labels(self) -> tuple[Tensor, Tensor]:
        """The log-probability of every label, 0 where it does not count, and where it counts, each [B, T-1]."""
        log_probs, labels, counts = self.next()
        return log_probs.gather(-1, labels[..., None])[..., 0].masked_fill(~counts, 0.0), counts

    def of_sequences(self) -> Tensor:
        """The log-probability of every row's labels together [B]."""
        return self.of_labels()[0].sum(-1)


def learnt(labels: Tensor) -> Tensor:
    """Where the next label counts [B, T-1]."""
    return labels[:, 1:] != IGNORED


def taught(labels: Tensor) -> Tensor:
    """Which rows have a label that counts [B]; those that only fill a batch up have none."""
    return (labels != IGNORED).any(-1)


Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[Positive, Field(description="inverse temperature")]
Temperature = Annotated[Positive, Field(description="of both softmaxes")]
Exponent = Annotated[float, Field(ge=0, description="exponent of a token's weight")]
Margin = Annotated[float, Field(ge=0, description="margin")]
Length = Annotated[Positive, Field(description="length of the vector that the states are steered to")]
Lowered = Annotated[Positive, Field(description="by how much a label's logit is lowered")]
Spared = Annotated[int, Field(ge=0, description="labels at the start of a row that do not count")]
Layer = Annotated[
    int | None,
    Field(
        ge=0,
        description="the layer whose states are steered, from 0; it and the two below it are trained; by "
        "itself 7, or the middle of a smaller model",
    ),
]


def _log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def _divergence(student: Scored, teacher: Scored, temperature: float = 1.0) -> Tensor:
    """Mean Kullback-Leibler divergence of the student from the teacher per token, over the vocabulary."""
    p, q = ((one.logits[:, :-1].float() / temperature).log_softmax(-1) for one in (teacher, student))
    return temperature**2 * student.mean((p.exp() * (p - q)).sum(-1), learnt)


@losses.register
def cross_entropy(retain: Scored) -> Tensor:
    """Mean cross-entropy of the retain set's tokens, in nats."""
    return -retain.mean(retain.of_labels()[0], learnt)


@losses.register
def kl(retain: Scored, retain_original: Scored) -> Tensor:
    """KL(original ‖ model) on the retain set, per token."""
    return _divergence(retain, retain_original)


@losses.register
def distillation(retain: Scored, retain_original: Scored, *, temperature: Temperature = 4.0) -> Tensor:
    """T² · KL(original ‖ model) on the retain set at temperature T, per token (Kurmanji et al. 2023).

    The published code of ECO prompts takes the softmax over the time axis; here it is over the vocabulary.
    """
    return _divergence(retain, retain_original, temperature)


@losses.register
def same_states(retain: Scored, retain_original: Scored) -> Tensor:
    """Mean squared change of the retain set's hidden states (RMU's retain loss, Li et al. 2024, section 4)."""
    return _states(retain, retain_original.hidden)


@losses.register
def gradient_ascent(forget: Scored) -> Tensor:
    """The forget set's cross-entropy with its sign turned."""
    return -cross_entropy(forget)


@losses.register
def divergence_ascent(forget: Scored, forget_original: Scored, *, temperature: Temperature = 4.0) -> Tensor:
    """SCRUB's maximisation: the forget set's `distillation` with its sign turned."""
    return -_divergence(forget, forget_original, temperature)


@losses.register
def idk_likelihood(idk: Scored) -> Tensor:
    """Mean cross-entropy of other answers to the forget set's prompts."""
    return cross_entropy(idk)


@losses.register
def random_mismatch(mismatch: Scored) -> Tensor:
    """Mean cross-entropy of random answers of the retain set to the forget set's prompts."""
    return cross_entropy(mismatch)


@losses.register
def npo_term(forget: Scored, forget_original: Scored, *, beta: Beta = 0.1) -> Tensor:
    """-2/β · mean log σ(-β log π(y|x) / π₀(y|x)) (Zhang et al. 2024, eq. 3)."""
    ratio = forget.of_sequences() - forget_original.of_sequences()
    return -2 / beta * forget.mean(_log_sigmoid(-beta * ratio), taught)


@losses.register
def simnpo_term(forget: Scored, *, beta: Beta = 4.5, gamma: Margin = 0.0) -> Tensor:
    """-2/β · mean log σ(-β/|y| · log π(y|x) - γ) (Fan et al. 2024, SimNPO)."""
    log_probs, counts = forget.of_labels()
    per_token = log_probs.sum(-1) / counts.sum(-1).clamp(min=1)
    return -2 / beta * forget.mean(_log_sigmoid(-beta * per_token - gamma), taught)


@losses.register
def dpo_term(forget: Scored, forget_original: Scored, idk: Scored, idk_original: Scored, *, beta: Beta = 0.1) -> Tensor:
    """-2/β · mean log σ(β log π(y'|x) / π₀(y'|x) - β log π(y|x) / π₀(y|x)), where y' is the other answer.

    Rafailov et al. 2023, eq. 7, scaled as NPO is, so that both begin with gradients of one size.
    """
    preferred = idk.of_sequences() - idk_original.of_sequences()
    rejected = forget.of_sequences() - forget_original.of_sequences()
    return -2 / beta * forget.mean(_log_sigmoid(beta * (preferred - rejected)), taught)


@losses.register
def steering(forget: Scored, direction: Tensor, *, coefficient: Length = 6.5, layer: Layer = None) -> Tensor:
    """Mean squared distance of the forget set's hidden states from `coefficient` times a random unit vector [D].

    RMU's forget loss (Li et al. 2024, section 4), per dimension, as in its published code, which counts padding too.
    """
    return _states(forget, coefficient * direction)


def _states(scored: Scored, target: Tensor | None) -> Tensor:
    assert scored.hidden is not None
    assert target is not None
    apart = (scored.hidden.float() - target.float()).square().mean(-1)
    counts = scored.labels != IGNORED
    of_rows = apart.masked_fill(~counts, 0.0).sum(-1) / counts.sum(-1).clamp(min=1)
    return scored.mean(of_rows, taught)


@losses.register
def self_distillation(forget: Scored, forget_original: Scored, *, beta: Lowered = 10.0) -> Tensor:
    """Mean cross-entropy to the original's probabilities, the label's logit lowered by β (Dong et al. 2024)."""
    log_probs, labels, _ = forget.next()
    lowered = forget_original.logits[:, :-1].float()
    lowered = lowered.scatter_add(-1, labels[..., None], lowered.new_full((*labels.shape, 1), -beta))
    return -forget.mean((lowered.softmax(-1) * log_probs).sum(-1), learnt)


@losses.register
def weighted_ascent(forget: Scored, *, beta: Exponent = 1.0) -> Tensor:
    """Gradient ascent with each token weighing p^β, p its probability (Wang et al. 2025, WGA)."""
    log_probs, _ = forget.of_labels()
    return forget.mean(log_probs.detach().exp() ** beta * log_probs, learnt)


@losses.register
def saturated_ascent(forget: Scored, *, beta1: Exponent = 5.0, beta2: Exponent = 1.0) -> Tensor:
    """Gradient ascent with each token weighing p^β₁ (1 - p)^β₂, p its probability (Yang et al. 2025, SatImp)."""
    log_probs, _ = forget.of_labels()
    p = log_probs.detach().exp()
    return forget.mean(p**beta1 * (1 - p).clamp(min=0) ** beta2 * log_probs, learnt)


@losses.register
def cross_entropy_unlearning(forget: Scored, *, spared: Spared = 1) -> Tensor:
    """Mean cross-entropy to the model's own probabilities without the label (Yang 2025, arXiv 2503.01224, CE-U).

    The first `spared` labels of a row do not count, as in the paper's experiments.
    """
    log_probs, labels, _ = forget.next()

    def counts(labels: Tensor) -> Tensor:
        return learnt(labels) & (learnt(labels).cumsum(-1) > spared)

    target = log_probs.detach().scatter(-1, labels[..., None], float("-inf")).softmax(-1)
    return -forget.mean((target * log_probs).sum(-1), counts)


def inputs(term: str) -> tuple[str, ...]:
    """What loss term `term` reads: `forget`, `retain_original`, …, in the order of its parameters."""
    return inputs_of(losses[term])


class Method:
    """A named method: the sum of its terms, each times its weight, with the hyperparameters that were published.

    Its keyword-only parameters are those of its terms, and `weights`. With `alternating`, the forget terms are alone in
    the even ones of that many first epochs (from 0), and left out of all others.
    """

    def __init__(
        self, source: str, weights: Mapping[str, float], alternating: int = 0, learning_rate: float = 1e-5
    ) -> None:
        self.__doc__ = source
        self.weights = dict(weights)
        self.alternating = alternating
        self.learning_rate = learning_rate
        keys = {one.name: one for term in weights for one in keys_of(losses[term])}
        named = GenericAlias(dict, (Literal.__getitem__(tuple(weights)), Annotated[float, Field(ge=0)]))
        said = Field(description="of the terms of the loss; those not named keep theirs")
        kind = inspect.Parameter.KEYWORD_ONLY
        weighed = inspect.Parameter("weights", kind, default=self.weights, annotation=Annotated[named, said])
        self.__signature__ = inspect.Signature([*keys.values(), weighed])

    def terms(self, epoch: float = 0.0) -> list[str]:
        """The terms that have a part in the loss at `epoch`."""
        if not self.alternating:
            return list(self.weights)
        forgets = epoch < self.alternating and int(epoch) % 2 == 0
        return [term for term in self.weights if inputs(term)[0].startswith("retain") != forgets]

    def reads(self, epoch: float | None = None) -> tuple[str, ...]:
        """What the method reads at `epoch`, or ever."""
        terms = self.weights if epoch is None else self.terms(epoch)
        return tuple(dict.fromkeys(name for term in terms for name in inputs(term)))

    def __call__(self, read: Mapping[str, Any], epoch: float = 0.0, **keys: Any) -> Tensor:
        """The loss of what was read, by name."""
        weights = self.weights | keys.get("weights", {})
        parts = []
        for term in self.terms(epoch):
            own = {name: keys[name] for name in inspect.signature(losses[term]).parameters if name in keys}
            parts.append(weights[term] * losses[term](*(read[name] for name in inputs(term)), **own))
        total: Tensor = sum(parts)
        return total


_ASCENT, _RETAIN = {"gradient_ascent": 1.0}, {"cross_entropy": 1.0}

for _name, _method in {
    "ft": Method("Fine-tuning on the retain set alone.", _RETAIN),
    "ga": Method("Gradient ascent on the forget set (Maini et al. 2024, section 4.1).", _ASCENT),
    "gd": Method("Gradient difference: ascent and the retain set (Maini et al. 2024, section 4.1).", _ASCENT | _RETAIN),
    "kl": Method("Ascent, and the KL to the original on the retain set (Maini et al. 2024).", _ASCENT | {"kl": 1.0}),
    "rd": Method("Random answers beside the retain set (Liu et al. 2024).", {"random_mismatch": 1.0} | _RETAIN),
    "llmu": Method(
        "Ascent, random answers and the KL, ε₁ 0.1, ε₂ 1, ε₃ 1 (Yao et al. 2023).",
        {"gradient_ascent": 0.1, "random_mismatch": 1.0, "kl": 1.0},
    ),
    "scrub": Method(
        "Away from the original on the forget set, towards it elsewhere, α 0.001, γ 1 (Kurmanji et al. 2023).",
        {"divergence_ascent": 1.0, "distillation": 0.001, "cross_entropy": 1.0},
        alternating=4,
    ),
    "idk": Method("“I don't know” beside the retain set (Maini et al. 2024).", {"idk_likelihood": 1.0} | _RETAIN),
    "dpo": Method("“I don't know” preferred to the true answers (Rafailov et al. 2023).", {"dpo_term": 1.0}),
    "npo": Method("Negative preference optimisation (Zhang et al. 2024).", {"npo_term": 1.0}),
    "npo-gd": Method("NPO beside the retain set (Zhang et al. 2024, NPO+RT).", {"npo_term": 1.0} | _RETAIN),
    "npo-kl": Method("NPO and the KL to the original (Zhang et al. 2024, NPO+KL).", {"npo_term": 1.0, "kl": 1.0}),
    "simnpo": Method(
        "NPO by length, without the original, beside the retain set (Fan et al. 2024, for TOFU).",
        {"simnpo_term": 0.125} | _RETAIN,
    ),
    "rmu": Method(
        "Representation misdirection (Li et al. 2024, for Zephyr-7B-beta).",
        {"steering": 1.0, "same_states": 1200.0},
        learning_rate=5e-5,
    ),
    "undial": Method(
        "Self-distillation with lowered logits (Dong et al. 2024).", {"self_distillation": 1.0}, learning_rate=1e-4
    ),
    "wga": Method(
        "Weighted gradient ascent beside the retain set (Wang et al. 2025).", {"weighted_ascent": 1.0} | _RETAIN
    ),
    "satimp": Method(
        "Ascent by saturation and importance beside the retain set (Yang et al. 2025).",
        {"saturated_ascent": 0.1} | _RETAIN,
    ),
    "ceu": Method("Cross-entropy unlearning (Yang 2025, arXiv 2503.01224).", {"cross_entropy_unlearning": 1.0}),
}.items():
    methods.add(_name, _method)
