"""Standard errors and paired differences, by scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ecoprompt.paired import paired, standard_error


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
