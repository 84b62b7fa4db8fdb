"""`losses.py`: every term is the closed form worked out here, and padding has no part in it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from ecoprompt.losses import IGNORED, Scored, inputs
from ecoprompt.registry import InputError, losses, methods

V, D = 3, 2
LABELS = torch.tensor([[IGNORED, 1, 2, 0], [IGNORED, 2, IGNORED, IGNORED]])
"""A row of three labels after its prompt, and one of a single label that ends in padding."""
NAMES = ("forget", "forget_original", "retain", "retain_original", "idk", "idk_original", "mismatch")
FLOATS = pytest.approx


def scored(seed: int) -> Scored:
    generator = torch.Generator().manual_seed(seed)
    logits, hidden = (torch.randn(2, 4, size, generator=generator) for size in (V, D))
    return Scored(logits, LABELS, hidden)


READ = {name: scored(seed) for seed, name in enumerate(NAMES)} | {"direction": torch.tensor([0.6, 0.8])}


def value(term: str, read=READ, **keys) -> torch.Tensor:
    return losses[term](*(read[name] for name in inputs(term)), **keys)


def tokens(name: str, temperature: float = 1.0) -> list[list[tuple[list[float], int]]]:
    """By row and label: the probabilities of the token there, by `math` alone, and the label."""
    found = []
    for logits, labels in zip(READ[name].logits.tolist(), LABELS.tolist(), strict=True):
        row = []
        for place, label in enumerate(labels):
            if label != IGNORED:
                powers = [math.exp(logit / temperature) for logit in logits[place - 1]]
                row.append(([power / sum(powers) for power in powers], label))
        found.append(row)
    return found


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def flat(name: str, temperature: float = 1.0) -> list[tuple[list[float], int]]:
    return [token for row in tokens(name, temperature) for token in row]


def entropy(name: str) -> float:
    return mean(-math.log(p[label]) for p, label in flat(name))


def divergence(student: str, teacher: str, temperature: float = 1.0) -> float:
    pairs = zip(flat(teacher, temperature), flat(student, temperature), strict=True)
    return mean(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for (p, _), (q, _) in pairs)


def likelihood(name: str) -> list[float]:
    return [math.prod(p[label] for p, label in row) for row in tokens(name)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ratios(name: str) -> list[float]:
    pairs = zip(likelihood(name), likelihood(f"{name}_original"), strict=True)
    return [math.log(now / before) for now, before in pairs]


def far(name: str, targets: list[list[list[float]]]) -> float:
    """Squared distance of hidden states, a mean over dimensions, then over a row's labels, then over rows."""
    rows = []
    for states, labels, wanted in zip(READ[name].hidden.tolist(), LABELS.tolist(), targets, strict=True):
        counted = [place for place, label in enumerate(labels) if label != IGNORED]
        rows.append(mean(mean((states[at][d] - wanted[at][d]) ** 2 for d in range(D)) for at in counted))
    return mean(rows)


def undial(beta: float) -> float:
    found = []
    for (p, label), (q, _) in zip(flat("forget_original"), flat("forget"), strict=True):
        lowered = [one * math.exp(-beta * (token == label)) for token, one in enumerate(p)]
        found.append(-sum(one / sum(lowered) * math.log(b) for one, b in zip(lowered, q, strict=True)))
    return mean(found)


def ceu(spared: int) -> float:
    found = []
    for p, label in (token for row in tokens("forget") for token in row[spared:]):
        rest = [(one / (1 - p[label]), one) for token, one in enumerate(p) if token != label]
        found.append(-sum(target * math.log(one) for target, one in rest))
    return mean(found)


CLOSED = {
    "cross_entropy": ({}, lambda: entropy("retain")),
    "kl": ({}, lambda: divergence("retain", "retain_original")),
    "distillation": ({"temperature": 3.0}, lambda: 9 * divergence("retain", "retain_original", 3.0)),
    "same_states": ({}, lambda: far("retain", READ["retain_original"].hidden.tolist())),
    "gradient_ascent": ({}, lambda: -entropy("forget")),
    "divergence_ascent": ({"temperature": 3.0}, lambda: -9 * divergence("forget", "forget_original", 3.0)),
    "idk_likelihood": ({}, lambda: entropy("idk")),
    "random_mismatch": ({}, lambda: entropy("mismatch")),
    "npo_term": ({"beta": 0.8}, lambda: mean(-2.5 * math.log(sigmoid(-0.8 * x)) for x in ratios("forget"))),
    "simnpo_term": (
        {"beta": 2.5, "gamma": 0.3},
        lambda: mean(
            -0.8 * math.log(sigmoid(2.5 * mean(-math.log(p[label]) for p, label in row) - 0.3))
            for row in tokens("forget")
        ),
    ),
    "dpo_term": (
        {"beta": 0.8},
        lambda: mean(
            -2.5 * math.log(sigmoid(0.8 * (won - lost)))
            for won, lost in zip(ratios("idk"), ratios("forget"), strict=True)
        ),
    ),
    "steering": ({"coefficient": 5.0}, lambda: far("forget", [[[3.0, 4.0]] * 4] * 2)),
    "self_distillation": ({"beta": 2.0}, lambda: undial(2.0)),
    "weighted_ascent": (
        {"beta": 1.5},
        lambda: mean(p[label] ** 1.5 * math.log(p[label]) for p, label in flat("forget")),
    ),
    "saturated_ascent": (
        {"beta1": 2.0, "beta2": 3.0},
        lambda: mean(p[label] ** 2 * (1 - p[label]) ** 3 * math.log(p[label]) for p, label in flat("forget")),
    ),
    "cross_entropy_unlearning": ({"spared": 1}, lambda: ceu(1)),
}


@pytest.mark.parametrize("term", losses)
def test_a_term_is_its_closed_form(term):
    keys, closed = CLOSED[term]
    assert value(term, **keys).item() == FLOATS(closed(), rel=1e-5)


@pytest.mark.parametrize("spared", [0, 2])
def test_cross_entropy_unlearning_spares_as_many_labels_of_a_row_as_it_is_told(spared):
    assert value("cross_entropy_unlearning", spared=spared).item() == FLOATS(ceu(spared), rel=1e-5)


def test_the_label_that_does_not_count_is_the_one_that_torch_passes_over():
    logits = READ["retain"].logits[:, :-1].transpose(1, 2)
    torch.testing.assert_close(value("cross_entropy"), cross_entropy(logits, LABELS[:, 1:]))


def test_npo_weighs_the_gradient_as_its_paper_says():
    """Zhang et al. 2024, section 3: the gradient is that of ascent, each row weighing 2 π^β / (π^β + π₀^β)."""
    beta = 0.7
    forget = Scored(READ["forget"].logits.double().requires_grad_(), LABELS)
    by_npo = torch.autograd.grad(value("npo_term", READ | {"forget": forget}, beta=beta), forget.logits)[0]
    now, before = (torch.tensor(likelihood(name)) ** beta for name in ("forget", "forget_original"))
    weights = 2 * now / (now + before)
    by_hand = torch.autograd.grad((weights * forget.of_sequences()).mean(), forget.logits)[0]
    torch.testing.assert_close(by_npo, by_hand, rtol=1e-5, atol=1e-7)


def test_npo_nears_gradient_ascent_as_beta_nears_zero():
    forget = Scored(READ["forget"].logits.double().requires_grad_(), LABELS)
    by_npo = torch.autograd.grad(value("npo_term", READ | {"forget": forget}, beta=1e-4), forget.logits)[0]
    ascent = torch.autograd.grad(forget.of_sequences().mean(), forget.logits)[0]
    torch.testing.assert_close(by_npo, ascent, rtol=1e-3, atol=1e-6)


def test_simnpo_is_npo_of_geometric_means_against_one():
    """-2/β log(1 / (1 + (p̄ᵝ e^γ))), with p̄ the geometric mean of a row's probabilities."""
    beta, gamma = 2.5, 0.3
    means = [one ** (1 / len(row)) for one, row in zip(likelihood("forget"), tokens("forget"), strict=True)]
    expected = mean(2 / beta * math.log(1 + one**beta * math.exp(gamma)) for one in means)
    assert value("simnpo_term", beta=beta, gamma=gamma).item() == FLOATS(expected, rel=1e-5)


def test_dpo_is_a_two_way_choice_between_powers_of_likelihood_ratios():
    """Bradley and Terry: the other answer is preferred with probability r'^β / (r'^β + r^β)."""
    beta = 0.5
    won, lost = ([math.exp(beta * ratio) for ratio in ratios(name)] for name in ("idk", "forget"))
    expected = mean(-2 / beta * math.log(a / (a + b)) for a, b in zip(won, lost, strict=True))
    assert value("dpo_term", beta=beta).item() == FLOATS(expected, rel=1e-5)


def test_dpo_of_equal_answers_is_where_npo_starts():
    same = READ | {"idk": READ["forget"], "idk_original": READ["forget_original"]}
    start = READ | {"forget_original": READ["forget"]}
    expected = 2 / 0.1 * math.log(2)
    assert value("dpo_term", same).item() == FLOATS(expected)
    assert value("npo_term", start).item() == FLOATS(expected)


def test_rmu_is_the_mean_squared_error_of_the_states_that_count():
    forget, target = READ["forget"].hidden, 5.0 * READ["direction"]
    rows = [forget[0, 1:4], forget[1, 1:2]]
    expected = mean(mse_loss(row, target.expand_as(row)).item() for row in rows)
    assert value("steering", coefficient=5.0).item() == FLOATS(expected)
    now, before = READ["retain"].hidden, READ["retain_original"].hidden
    rows = [(now[0, 1:4], before[0, 1:4]), (now[1, 1:2], before[1, 1:2])]
    assert value("same_states").item() == FLOATS(mean(mse_loss(*row).item() for row in rows))


def with_padding(one: Scored) -> Scored:
    """The same with two more columns of padding, and nonsense wherever nothing counts."""
    tall = [torch.cat([part, part.new_full((2, 2, part.shape[-1]), 7.0)], 1) for part in (one.logits, one.hidden)]
    tall[0][1, 1:] = 1e4 * torch.randn(5, V, generator=torch.Generator().manual_seed(9))
    tall[1][1, 2:] = 1e4
    return Scored(tall[0], torch.cat([LABELS, LABELS.new_full((2, 2), IGNORED)], 1), tall[1])


@pytest.mark.parametrize("term", losses)
def test_padding_has_no_part_in_a_term(term):
    padded = {name: with_padding(one) if isinstance(one, Scored) else one for name, one in READ.items()}
    torch.testing.assert_close(value(term, padded), value(term))


@pytest.mark.parametrize("term", losses)
def test_a_row_of_one_label_is_worth_as_much_once_as_twice_and_one_of_none_a_number(term):
    def rows(*chosen, labels=LABELS):
        parts = {name: one for name, one in READ.items() if isinstance(one, Scored)}
        picked = {
            name: Scored(one.logits[[*chosen]], labels[[*chosen]], one.hidden[[*chosen]]) for name, one in parts.items()
        }
        return READ | picked

    torch.testing.assert_close(value(term, rows(1)), value(term, rows(1, 1)))
    assert value(term, rows(0, labels=torch.full_like(LABELS, IGNORED))).isfinite()


@pytest.mark.parametrize("name", methods)
def test_a_step_down_a_methods_gradient_lowers_its_loss(name):
    """What is called original is where training starts."""
    method, keys = methods[name], methods.bind(name, {})
    torch.manual_seed(0)
    free = {one: scored(seed) for seed, one in enumerate(("forget", "retain", "idk", "mismatch"))}
    learnt = [part.requires_grad_() for one in free.values() for part in (one.logits, one.hidden)]
    fixed = {f"{one}_original": scored(20 + seed) for seed, one in enumerate(free)}
    read = free | fixed | {"direction": READ["direction"]}
    for epoch in range(2):
        loss = method(read, epoch, **keys)
        moved = torch.autograd.grad(loss, learnt, allow_unused=True)
        with torch.no_grad():
            for part, slope in zip(learnt, moved, strict=True):
                part -= 1e-4 * (slope if slope is not None else 0)
        assert method(read, epoch, **keys) < loss


def test_a_method_is_the_weighted_sum_of_its_terms():
    expected = 0.1 * value("gradient_ascent") + value("random_mismatch") + 3 * value("kl")
    assert methods["llmu"](READ, weights={"kl": 3.0}).item() == FLOATS(expected.item())
    assert methods["npo-gd"](READ, beta=0.5).item() == FLOATS(
        (value("npo_term", beta=0.5) + value("cross_entropy")).item()
    )


def test_scrub_forgets_in_the_even_ones_of_its_first_four_epochs():
    scrub = methods["scrub"]
    forgets = [scrub.reads(epoch)[0] == "forget" for epoch in (0, 0.9, 1, 2.5, 3, 4, 6)]
    assert forgets == [True, True, False, True, False, False, False]
    assert scrub(READ).item() == scrub(READ, 0).item() == FLOATS(value("divergence_ascent").item())
    assert set(scrub.reads()) == {"forget", "forget_original", "retain", "retain_original"}
    assert scrub.terms() == ["divergence_ascent"]
    expected = 0.001 * value("distillation") + value("cross_entropy")
    assert scrub(READ, 1).item() == FLOATS(expected.item())


def test_the_methods_of_the_literature_are_all_there():
    names = "ft ga gd kl rd llmu scrub idk dpo npo npo-gd npo-kl simnpo rmu undial wga satimp ceu"
    assert list(methods) == names.split()


PUBLISHED = {
    "llmu": {"weights": {"gradient_ascent": 0.1}},
    "scrub": {"weights": {"distillation": 0.001}, "temperature": 4.0},
    "dpo": {"beta": 0.1},
    "npo": {"beta": 0.1},
    "npo-gd": {"beta": 0.1},
    "npo-kl": {"beta": 0.1},
    "simnpo": {"weights": {"simnpo_term": 0.125}, "beta": 4.5, "gamma": 0.0},
    "rmu": {"weights": {"same_states": 1200.0}, "coefficient": 6.5, "layer": None},
    "undial": {"beta": 10.0},
    "wga": {"beta": 1.0},
    "satimp": {"weights": {"saturated_ascent": 0.1}, "beta1": 5.0, "beta2": 1.0},
    "ceu": {"spared": 1},
}
"""The hyperparameters of the papers that the methods name; a weight that is not here is 1."""


@pytest.mark.parametrize("name", methods)
def test_a_method_begins_from_the_published_hyperparameters(name):
    published = dict(PUBLISHED.get(name, {}))
    weights = dict.fromkeys(methods[name].weights, 1.0) | published.pop("weights", {})
    assert methods.bind(name, {}) == {"weights": weights, **published}
    assert methods[name].learning_rate == {"rmu": 5e-5, "undial": 1e-4}.get(name, 1e-5)


@pytest.mark.parametrize(
    ("name", "key", "least", "wrong"),
    [
        ("npo", "beta", 0.5, 0.0),
        ("undial", "beta", 0.5, 0.0),
        ("scrub", "temperature", 0.5, 0.0),
        ("rmu", "coefficient", 0.5, 0.0),
        ("rmu", "layer", 0, -1),
        ("simnpo", "gamma", 0.0, -0.5),
        ("wga", "beta", 0.0, -0.5),
        ("satimp", "beta1", 0.0, -0.5),
        ("ceu", "spared", 0, -1),
        ("npo", "weights", {"npo_term": 0.0}, {"npo_term": -0.5}),
    ],
)
def test_how_small_a_hyperparameter_may_be(name, key, least, wrong):
    assert methods.bind(name, {key: least})[key] == least
    with pytest.raises(InputError, match=f"'{key}"):
        methods.bind(name, {key: wrong})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"weights": {"kl": 1.0}}, "'baseline.weights.kl"),
        ({"beta": 0.0}, "'baseline.beta': found 0.0, expected a number above 0"),
        ({"betta": 0.1}, "'baseline.betta': method 'npo' has no key 'betta'; did you mean 'beta'?"),
    ],
)
def test_a_wrong_key_is_told(keys, told):
    with pytest.raises(InputError) as error:
        methods.bind("npo", keys, "baseline")
    assert str(error.value).startswith(told)


@pytest.mark.parametrize("term", losses)
def test_the_batches_of_a_step_average_to_the_loss_of_one_great_batch(term):
    """Though one has three labels and the other one: of two processes, or of gradient accumulation."""
    step = [LABELS[:1], LABELS[1:], torch.full((1, 4), IGNORED)]  # and one that only fills a batch up

    def part(number: int) -> torch.Tensor:
        row = [number % 2]
        read = {name: Scored(READ[name].logits[row], step[number], READ[name].hidden[row], step) for name in NAMES}
        return value(term, read | {"direction": READ["direction"]})

    torch.testing.assert_close(sum(map(part, range(3))) / 3, value(term))
