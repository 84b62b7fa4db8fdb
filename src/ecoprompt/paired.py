"""What the values of rows say beyond their mean: its standard error, and how two runs differ on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE = 0.95


class Paired(NamedTuple):
    """The mean of the differences of paired values, its 95 % interval, and the p-value of there being none."""

    difference: float
    low: float
    high: float
    p: float


def standard_error(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Standard error of the mean, by the sample's deviation (n - 1); NaN of fewer than two or not finite values."""
    found = np.asarray(values, dtype=float)
    if found.size < 2 or not np.isfinite(found).all():
        return math.nan
    return float(found.std(ddof=1)) / math.sqrt(found.size)


def paired(ours: Sequence[float] | NDArray[np.float64], theirs: Sequence[float] | NDArray[np.float64]) -> Paired:
    """How much larger `ours` are than `theirs`, value by value: Student's paired t-test.

    Rows that never differ show no difference, with an interval of no width and p = 1. All is NaN where a value is not
    finite, all but the difference of a single row.
    """
    from scipy.stats import t

    mine, other = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if not np.isfinite(mine).all() or not np.isfinite(other).all() or not mine.size:
        return Paired(math.nan, math.nan, math.nan, math.nan)
    difference, error = float((mine - other).mean()), standard_error(mine - other)
    if error == 0:
        return Paired(difference, difference, difference, float(difference == 0))
    reach = error * float(t.ppf((1 + CONFIDENCE) / 2, max(mine.size - 1, 1)))
    p = 2 * float(t.sf(abs(difference) / error, max(mine.size - 1, 1)))
    return Paired(difference, difference - reach, difference + reach, p)
