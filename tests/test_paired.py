"""Standard errors and paired differences, by scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ecoprompt.paired import differences, errors, paired, standard_error


def test_the_standard_error_is_scipys_and_a_shares():
    values = np.random.default_rng(0).normal(size=50)
    assert standard_error(values) == pytest.approx(float(stats.sem(values)))
    right = [1.0] * 30 + [0.0] * 70
    assert standard_error(right) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_a_paired_difference_is_students():
    generator = np.random.default_rng(1)
    ours, theirs = generator.normal(size=(2, 40))
    found = paired(ours, theirs)
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert found == pytest.approx((float(np.mean(ours - theirs)), interval.low, interval.high, expected.pvalue))


def test_what_never_differs_has_no_interval():
    assert paired([0.0, 1.0, 1.0], [0.0, 1.0, 1.0]) == (0, 0, 0, 1)
    assert paired([2.0, 3.0], [1.0, 2.0]) == (1, 1, 1, 0)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0, math.inf], [1.0, math.inf]), ([math.nan], [1.0])])
def test_what_cannot_be_compared_is_not_a_number(ours, theirs):
    assert all(map(math.isnan, paired(ours, theirs)))
    assert math.isnan(standard_error(ours))


def test_a_single_row_has_a_difference_and_no_interval():
    difference, *rest = paired([1.0], [0.25])
    assert difference == 0.75
    assert all(map(math.isnan, rest))


def test_a_mean_of_columns_has_an_error_and_a_difference():
    generator = np.random.default_rng(2)
    ours, theirs = ({"a_x": generator.normal(size=30), "b_x": generator.normal(0, 3, size=9)} for _ in range(2))
    columns, original = ({name: dict(enumerate(one)) for name, one in side.items()} for side in (ours, theirs))
    found = errors(columns, {"mean": ["a_x", "b_x"], "lost": ["a_x", "c_x"]})
    assert found == {name: pytest.approx(float(stats.sem(one))) for name, one in ours.items()} | {
        "mean": pytest.approx(math.sqrt(stats.sem(ours["a_x"]) ** 2 + stats.sem(ours["b_x"]) ** 2) / 2)
    }
    told = differences(columns, original, {"mean": ["a_x", "b_x"], "lost": ["a_x", "c_x"]})
    assert told.keys() == {"a_x", "b_x", "mean"}
    # Half of what Welch's test says of the differences of one column and the other's, their sign turned.
    one, other = (ours[name] - theirs[name] for name in ours)
    welch = stats.ttest_ind(one, -other, equal_var=False)
    interval = welch.confidence_interval(0.95)
    expected = (one.mean() + other.mean()) / 2, interval.low / 2, interval.high / 2, welch.pvalue
    assert tuple(told["mean"].values()) == pytest.approx(expected)


def test_rows_are_paired_by_what_was_asked():
    ours, theirs = {"x": {3: 1.0, 1: 5.0, 2: 2.0}, "y": {1: 1.0}}, {"x": {1: 4.0, 2: 2.5, 4: 9.0}, "y": {2: 1.0}}
    assert differences(ours, theirs, {}) == {"x": paired([5.0, 2.0], [4.0, 2.5])._asdict()}
    assert differences(ours, ours, {}) is None
    assert differences(ours, None, {}) is None
