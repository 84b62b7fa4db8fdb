"""What the values of rows say beyond their mean: its standard error, and how two runs differ on the same rows."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = Sequence[float] | NDArray[np.float64]

CONFIDENCE = 0.95
Columns = Mapping[str, Mapping[Hashable, float]]


class Paired(NamedTuple):
    """The mean of the differences of paired values, its 95 % interval, and the p-value of there being none."""

    difference: float
    low: float
    high: float
    p: float


def by_column(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[Hashable, float]]]:
    """By run and column ("subset_metric") the values of rows, as in rows.jsonl, by what was asked; NaN for None."""
    found: dict[str, dict[str, dict[Hashable, float]]] = {}
    for row in rows:
        place = row["benchmark"], row["subset"], row["index"], row["prompt"]
        for name, value in row["values"].items():
            of_column = found.setdefault(row["run"], {}).setdefault(f"{row['subset']}_{name}", {})
            of_column[place] = math.nan if value is None else float(value)
    return found


def shared(ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float]) -> tuple[list[float], list[float]]:
    """The values of the rows that have one on both sides, paired."""
    both = [place for place in ours if place in theirs]
    return [ours[place] for place in both], [theirs[place] for place in both]


def standard_error(values: Values) -> float:
    """Standard error of the mean, by the sample's deviation (n - 1); NaN of fewer than two or not finite values."""
    found = np.asarray(values, dtype=float)
    if found.size < 2 or not np.isfinite(found).all():
        return math.nan
    return float(found.std(ddof=1)) / math.sqrt(found.size)


def mean_error(errors: Sequence[float]) -> float:
    """Standard error of the mean of independent values with these standard errors."""
    return math.hypot(*errors) / len(errors)


def paired(ours: Values, theirs: Values) -> Paired:
    """How much larger `ours` are than `theirs`, value by value: Student's paired t-test.

    Rows that never differ show no difference, with an interval of no width and p = 1. All is NaN where a value is not
    finite, all but the difference of a single row.
    """
    return paired_mean([(ours, theirs)])


def paired_mean(groups: Sequence[tuple[Values, Values]]) -> Paired:
    """As `paired`, of the mean of the groups' means: its degrees of freedom are those of Welch and Satterthwaite."""
    from scipy.stats import t

    pairs = [(np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)) for ours, theirs in groups]
    if not all(one.size and np.isfinite(one).all() for pair in pairs for one in pair):
        return Paired(math.nan, math.nan, math.nan, math.nan)
    apart = [ours - theirs for ours, theirs in pairs]
    difference = float(np.mean([one.mean() for one in apart]))
    errors = list(map(standard_error, apart))
    error = mean_error(errors)
    if error == 0:
        return Paired(difference, difference, difference, float(difference == 0))
    shares = [(one / math.hypot(*errors)) ** 2 for one in errors]
    freedom = 1 / sum(share**2 / max(one.size - 1, 1) for share, one in zip(shares, apart, strict=True))
    reach = error * float(t.ppf((1 + CONFIDENCE) / 2, freedom))
    p = 2 * float(t.sf(abs(difference) / error, freedom))
    return Paired(difference, difference - reach, difference + reach, p)


def errors(columns: Columns, averages: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The standard error of the mean of every column, and of the `averages` of columns."""
    found = {name: standard_error(list(values.values())) for name, values in columns.items()}
    means = {name: [found[one] for one in of] for name, of in averages.items() if {*of} <= {*found}}
    return found | {name: mean_error(some) for name, some in means.items()}


def differences(
    columns: Columns, original: Columns | None, averages: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]] | None:
    """How much every column, and the `averages` of columns, are above the original run's, over the rows with a value in
    both; None for that run itself and without one."""
    if original is None or columns is original:
        return None
    pairs = {name: shared(values, original.get(name, {})) for name, values in columns.items()}
    groups = {name: [pair] for name, pair in pairs.items() if pair[0]}
    groups |= {name: [pairs[one] for one in of] for name, of in averages.items() if {*of} <= {*groups}}
    return {name: paired_mean(some)._asdict() for name, some in groups.items()}
