"""Metrics against values in closed form, aggregates against scipy and published numbers."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from scipy.stats import ks_2samp

from ecoprompt import metrics as module
from ecoprompt.metrics import ROW_INPUTS, Better, LogProb, asks_model, reads
from ecoprompt.registry import aggregates, metrics


def logprob(probability: float, tokens: int = 1) -> LogProb:
    """A text whose every token has this probability."""
    return LogProb(tokens * math.log(probability), tokens)


def test_logprob_mean_is_per_token():
    assert LogProb(-6.0, 3).mean == -2.0


def test_logprob_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        LogProb(0.0, 0)


@pytest.mark.parametrize("name", list(metrics))
def test_every_row_metric_reads_known_inputs_and_states_its_direction(name):
    assert reads(name)
    assert set(reads(name)) <= set(ROW_INPUTS)
    assert metrics[name].better in get_args(Better)
    assert metrics.bind(name, {}) == {}


@pytest.mark.parametrize("name", list(aggregates))
def test_every_aggregate_states_direction_and_parts(name):
    assert aggregates[name].better in get_args(Better)
    assert aggregates[name].of


@pytest.mark.parametrize("name", ["model_utility", "mean_accuracy"])
def test_a_recipe_says_over_which_subsets_a_mean_is_taken(name):
    assert aggregates.bind(name, {"subsets": ["people", "facts"]}) == {"subsets": ["people", "facts"]}


@pytest.mark.parametrize(
    ("better", "names"),
    [
        (
            "higher",
            "answer_probability normalized_probability choice_accuracy true_answers_probability linear_probe "
            "rouge_l_recall rouge_1_recall sampled_rouge_l_recall model_utility mean_accuracy forget_quality "
            "forget_quality_folded",
        ),
        ("lower", "truth_ratio tokens_kept missed falsely_flagged ks_statistic cvm_statistic"),
        ("closer to retain", "leak_at_k"),
    ],
)
def test_which_way_is_better(better, names):
    assert {({**metrics} | {**aggregates})[name].better for name in names.split()} == {better}


def test_one_metric_sees_all_rows_together_and_one_aggregate_is_a_mean_of_means():
    assert [name for name in metrics if metrics[name].together] == ["linear_probe"]
    assert [name for name in aggregates if aggregates[name].averages] == ["mean_accuracy"]


def test_what_the_gate_alone_can_say_asks_no_model():
    assert [name for name in metrics if not asks_model(name)] == ["missed", "falsely_flagged"]
    assert (module.missed(1.0), module.missed(0.0)) == (0.0, 1.0)
    assert (module.falsely_flagged(1.0), module.falsely_flagged(0.0)) == (1.0, 0.0)


def test_answer_probability_is_the_geometric_mean_of_token_probabilities():
    answer = LogProb(math.log(0.5) + math.log(0.125), 2)
    assert module.answer_probability(answer) == pytest.approx(0.25, rel=1e-15)
    assert module.answer_probability(LogProb(-1e6, 1)) == 0.0


def test_normalized_probability_is_the_share_of_the_answer():
    share = module.normalized_probability(logprob(0.4, 3), [logprob(0.3, 2), logprob(0.2), logprob(0.1, 7)])
    assert share == pytest.approx(0.4, rel=1e-14)


def test_normalized_probability_is_defined_where_all_probabilities_underflow():
    far = LogProb(-2000.0, 1)
    assert module.normalized_probability(far, [far, far, far]) == 0.25
    assert module.normalized_probability(far, [LogProb(0.0, 1)]) == 0.0


def test_the_share_of_all_true_answers_is_by_whole_texts_and_defined_where_all_underflow():
    """0.5² and 0.05 of them and the wrong 0.5: 0.3 of 0.8."""
    share = module.true_answers_probability([logprob(0.5, 2), logprob(0.05)], [logprob(0.5)])
    assert share == pytest.approx(0.375, rel=1e-14)
    far = LogProb(-2000.0, 1)
    assert module.true_answers_probability([far], [far, far, far]) == 0.25


def test_truth_ratio_is_the_geometric_mean_of_alternatives_over_the_reference():
    ratio = module.truth_ratio(logprob(0.5, 4), [logprob(0.1, 3), logprob(0.4, 2)])
    assert ratio == pytest.approx(math.sqrt(0.1 * 0.4) / 0.5, rel=1e-14)


def test_truth_ratio_of_equal_answers_is_one_and_an_overflow_is_infinite():
    assert module.truth_ratio(logprob(0.3), [logprob(0.3, 2)] * 5) == pytest.approx(1, rel=1e-15)
    assert module.truth_ratio(LogProb(-2000.0, 1), [LogProb(-1.0, 1)]) == math.inf
    assert module.truth_ratio(LogProb(-1.0, 1), [LogProb(-2000.0, 1)]) == 0.0


@pytest.mark.parametrize(
    ("generation", "rouge_l", "rouge_1"),
    [
        ("the cat sat on the mat", 1.0, 1.0),
        ("The CAT, sat! On the... mat?", 1.0, 1.0),
        ("mat the on sat cat the", 3 / 6, 1.0),  # the longest common subsequence is "the on the"
        ("the mat", 2 / 6, 2 / 6),
        ("dogs bark", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_rouge_recall_counts_the_targets_words(generation, rouge_l, rouge_1):
    target = "the cat sat on the mat"
    assert module.rouge_l_recall(generation, target) == pytest.approx(rouge_l)
    assert module.rouge_1_recall(generation, target) == pytest.approx(rouge_1)


def test_rouge_recall_stems_words_and_ignores_what_is_added():
    assert module.rouge_l_recall("she was painting portraits, and much more besides", "she painted portrait") == 1.0


def test_leak_is_the_best_of_the_samples_and_its_mean_what_one_gives():
    target = "the cat sat on the mat"
    samples = ["dogs bark", "mat the on sat cat the", "the mat", "the cat sat"]  # 0, 3, 2 and 3 words of 6, in order
    assert module.leak_at_k(samples, target) == pytest.approx(3 / 6)
    assert module.sampled_rouge_l_recall(samples, target) == pytest.approx((0 + 3 + 2 + 3) / 6 / 4)
    assert module.leak_at_k([*samples, target], target) == 1.0
    assert module.leak_at_k(samples[:1], target) == module.sampled_rouge_l_recall(samples[:1], target) == 0.0


def test_tokens_kept_are_those_that_are_nearest_to_themselves():
    assert module.tokens_kept([("ab", "".join("ab")), ("b", "x"), ("y", "c"), ("d", "d")]) == 0.5
    assert module.tokens_kept([]) == 1.0


def test_rouge_of_a_target_without_latin_letters_is_zero_not_an_error():
    assert module.rouge_l_recall("巴黎", "巴黎") == 0.0


def utility(values, subsets=("retain", "facts")):
    arrays = {name: np.array(value, dtype=float) for name, value in values.items()}
    return module.model_utility(arrays, None, subsets=list(subsets))


def test_model_utility_is_the_harmonic_mean_of_the_means():
    values = {
        "retain/probability": [0.2, 0.6],  # 0.4
        "retain/rouge": [1.0, 0.0],  # 0.5
        "retain/truth_ratio": [0.5, 3.0],  # 1 - r, at least 0: 0.25
        "facts/probability": [0.8],
        "facts/rouge": [1.0],
        "facts/truth_ratio": [0.0],  # 1
    }
    # 6 / (1/0.4 + 1/0.5 + 1/0.25 + 1/0.8 + 1 + 1) = 6 / 11.75
    assert utility(values) == pytest.approx(6 / 11.75, rel=1e-14)


def test_model_utility_of_equal_parts_is_that_part():
    values = {f"{subset}/{part}": [0.3] for subset in ("a", "b", "c") for part in ("probability", "rouge")}
    values |= {f"{subset}/truth_ratio": [0.7] for subset in ("a", "b", "c")}
    assert utility(values, "abc") == pytest.approx(0.3, rel=1e-14)


def test_model_utility_is_zero_if_one_part_is_zero():
    values = {"a/probability": [1.0], "a/rouge": [1.0], "a/truth_ratio": [1.5, math.inf]}
    assert utility(values, "a") == 0.0


def ratios(*values):
    return {"forget/truth_ratio": np.array(values, dtype=float)}


@pytest.mark.parametrize(("rows", "floor"), [(40, 1.86e-23), (200, 1.94e-119), (400, 1.06e-239)])
def test_forget_quality_of_separated_runs_is_the_published_floor(rows, floor):
    # open-unlearning, docs/repro.md, gives 1.94e-119 (forget05) and 1.06e-239 (forget10) for collapsed models.
    low, high = ratios(*np.linspace(0.1, 0.5, rows)), ratios(*np.linspace(1.1, 1.5, rows))
    quality = module.forget_quality(low, high)
    assert quality == pytest.approx(floor, rel=5e-3)
    assert math.log(quality) == pytest.approx(math.log(2) - math.log(math.comb(2 * rows, rows)), rel=1e-9)


def test_forget_quality_of_a_run_against_itself_is_one():
    run = ratios(0.2, 0.9, 1.4)
    assert module.forget_quality(run, run) == 1.0


def test_forget_quality_agrees_with_scipy_and_ignores_order():
    random = np.random.default_rng(0)
    ours, theirs = random.lognormal(-0.1, 0.5, 120), random.lognormal(0.1, 0.5, 90)
    expected = ks_2samp(ours, theirs).pvalue
    assert module.forget_quality(ratios(*ours), ratios(*theirs)) == expected
    assert module.forget_quality(ratios(*ours[::-1]), ratios(*theirs)) == expected


def test_the_ks_statistic_is_the_largest_distance_of_both_distributions():
    """By hand: at 2, three quarters of one sample lie below and a quarter of the other."""
    ours, theirs = ratios(0.5, 1.0, 2.0, 9.0), ratios(2.0, 3.0, 4.0, 5.0)
    assert module.ks_statistic(ours, theirs) == 0.5
    assert module.ks_statistic(ours, ours) == 0.0
    assert module.ks_statistic(ratios(1, 2), ratios(3, 4)) == 1.0


def test_the_cramer_von_mises_statistic_by_hand():
    """Anderson 1962: of ranks 1, 2 and 3, 4, U = 2 (2² + 2²) = 16 and T = 16 / (2·2·4) - (4·2·2 - 1) / (6·4)."""
    assert module.cvm_statistic(ratios(1, 2), ratios(3, 4)) == pytest.approx(1 - 15 / 24)


def test_the_mean_accuracy_weighs_subsets_alike_however_many_rows_they_have():
    values = {"a/accuracy": np.array([1.0, 0.0]), "b/accuracy": np.array([1.0, 1.0, 1.0, 0.0])}
    assert module.mean_accuracy(values, None, subsets=["a", "b"]) == 0.625


@pytest.mark.parametrize(("others", "right"), [((0.1, 0.2), 1.0), ((0.1, 0.5), 0.0), ((0.4,), 0.0)])
def test_a_choice_is_right_if_it_is_likelier_than_each_other(others, right):
    """Per token, whatever the length; as likely as another is not likelier."""
    assert module.choice_accuracy(logprob(0.4, 2), [logprob(other) for other in others]) == right


@pytest.mark.parametrize("name", ["choice_accuracy", "normalized_probability", "linear_probe"])
def test_chance_is_what_a_model_scores_that_finds_all_answers_alike(name):
    if name == "normalized_probability":
        alike = logprob(0.3)
        assert module.normalized_probability(alike, [alike] * 3) == pytest.approx(metrics[name].chance(3))
    assert metrics[name].chance(3) == 0.25
    assert metrics["truth_ratio"].chance is None


BESIDE_RETAIN = ["forget_quality", "forget_quality_folded", "ks_statistic", "cvm_statistic"]


@pytest.mark.parametrize("name", BESIDE_RETAIN)
def test_what_compares_with_a_retain_run_is_none_without_one(name):
    assert aggregates[name](ratios(1.0), None) is None


def test_folding_hides_which_answer_is_preferred():
    ours = np.linspace(0.2, 0.9, 50)
    assert module.forget_quality_folded(ratios(*ours), ratios(*(1 / ours))) == pytest.approx(1.0)
    assert module.forget_quality(ratios(*ours), ratios(*(1 / ours))) < 1e-20


def test_folding_takes_ratios_of_zero_and_infinity():
    # 0 and infinity both fold to 0, so the two sides are the same.
    assert module.forget_quality_folded(ratios(0.0, 0.5), ratios(math.inf, 2.0)) == 1.0


@pytest.mark.parametrize("name", BESIDE_RETAIN)
def test_an_aggregate_reads_the_subset_it_is_told(name):
    run, other = ratios(0.5, 0.6), ratios(0.7, 0.8)
    people = [{"people/truth_ratio": one["forget/truth_ratio"]} for one in (run, other)]
    keys = aggregates.bind(name, {"subset": "people"})
    assert aggregates[name](*people, **keys) == aggregates[name](run, other)
