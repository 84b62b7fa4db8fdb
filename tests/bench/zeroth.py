"""Prints how many evaluations the search methods need on made-up objectives, as Markdown.

`python tests/bench/zeroth.py`, without any model: the objective is |m(s) - target| with a metric m that falls from one
plateau to another as the logarithm of the strength s grows ("distance"), the same with a target just below the lower
plateau ("beyond"), or a Kolmogorov-Smirnov statistic that is 0.02 to 0.06 at the best strength and 0.6 to 1.0 far from
it on either side, and has no sign ("statistic"). The best strength is between 1 and 10. In half of the rows, noise with
a standard deviation of 0.02 is drawn anew for every strength.

A second table is of vectors: by how much the method `adaptive` lowers the objective further than one shared number can,
in the median case. Each entry has a best strength of its own, within a factor of 5.6 of a shared one.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ecoprompt.zeroth import Found, Measured, Space, minimise

SPACE = Space(0.01, 1000)
PLAIN = Space(1e-8, 1000)
"""For the published search, which steps below the lower bound of the others."""
METHODS = {
    "adaptive": [0.1, 1, 100],
    "published": [0.1],
    "spsa": [0.1, 1, 100],
    "grid": [1],
}


@dataclass(frozen=True)
class Case:
    metric: Callable[[float], float]
    target: float | None
    best: float
    least: float

    def objective(self, strength: float) -> float:
        return abs(self.metric(strength) - (self.target or 0.0))

    def near(self, strength: float, noise: float) -> bool:
        """Within 15 % of the best strength, or in its objective within 0.02, or twice the noise, of the least."""
        slack = self.objective(strength) - self.least
        return abs(math.log(strength) - math.log(self.best)) <= math.log(1.15) or slack <= max(0.02, 2 * noise)


def distance(random: np.random.Generator, beyond: bool = False) -> Case:
    best, steepness = random.uniform(1, 10), random.uniform(1, 4)
    high, low = random.uniform(0.6, 1), random.uniform(0.2, 0.3) if beyond else random.uniform(0, 0.3)
    target = low - random.uniform(0, 0.05) if beyond else low + (high - low) * random.uniform(0.15, 0.85)
    shift = 0.0 if beyond else math.log((high - target) / (target - low))

    def metric(strength: float) -> float:
        return low + (high - low) / (1 + math.exp(steepness * math.log(strength / best) + shift))

    return Case(metric, target, math.inf if beyond else best, low - target if beyond else 0.0)


def statistic(random: np.random.Generator) -> Case:
    best, least, power = random.uniform(1, 10), random.uniform(0.02, 0.06), random.choice([1.0, 1.5, 2.0])
    widths, ends = random.uniform(0.6, 1.6, 2), random.uniform(0.6, 1, 2)

    def metric(strength: float) -> float:
        side = int(strength > best)
        far = (abs(math.log(strength / best)) / widths[side]) ** power
        return least + (ends[side] - least) * (1 - math.exp(-far))

    return Case(metric, None, best, least)


KINDS = {"distance": distance, "beyond": lambda random: distance(random, beyond=True), "statistic": statistic}


def search(case: Case, noise: float, random: np.random.Generator, method: str, start: float) -> Found:
    def measure(values: np.ndarray, seed: int) -> Measured:
        metric = case.metric(float(values[0])) + noise * random.standard_normal()
        residual = None if case.target is None else metric - case.target
        return Measured(abs(metric if residual is None else residual), metric, residual)

    return minimise(measure, start, PLAIN if method == "published" else SPACE, method=method)


def needed(case: Case, noise: float, found: Found) -> int | None:
    """After how many evaluations the best one so far was near the minimum, and stayed so; None if it is not."""
    count, best = None, math.inf
    for one in found.evaluations:
        if one.objective < best:
            best = one.objective
            near = case.near(one.parameter[0], noise)
            count = (count or one.number) if near else None
    return count


def rows(cases: int) -> Iterator[str]:
    yield "| objective | noise | method | start | not found | needed: median | 90 % | 99 % | made | excess |"
    yield "| --- |" + " --- |" * 9
    for kind, make in KINDS.items():
        for noise in (0.0, 0.02):
            for method, start in [(method, start) for method, starts in METHODS.items() for start in starts]:
                counts, made, excess = [], [], []
                for number in range(cases):
                    random = np.random.default_rng(number)
                    case = make(random)
                    found = search(case, noise, random, method, start)
                    counts.append(needed(case, noise, found))
                    made.append(len(found.evaluations))
                    excess.append(case.objective(found.best.parameter[0]) - case.least)
                good = [count for count in counts if count is not None]
                shares = [f"{np.percentile(good, share):.0f}" if good else "–" for share in (50, 90, 99)]
                lost = 100 * (cases - len(good)) / cases
                yield (
                    f"| {kind} | {noise:g} | {method} | {start:g} | {lost:.1f} % | {' | '.join(shares)} | "
                    f"{np.mean(made):.1f} | {np.mean(excess):.4f} |"
                )


def apart(size: int, random: np.random.Generator) -> Callable[[np.ndarray], float]:
    """The root of the mean squared distance from the best vector, in the logarithm and as a share of the range."""
    best = random.uniform(0.45, 0.65) + random.uniform(-0.15, 0.15, size)
    return lambda values: float(np.sqrt(np.mean((np.log(values / 0.01) / math.log(1e5) - best) ** 2)))


def coupled(size: int, random: np.random.Generator) -> Callable[[np.ndarray], float]:
    """The same through a random matrix."""
    best = random.uniform(0.45, 0.65) + random.uniform(-0.15, 0.15, size)
    mix = np.eye(size) + random.standard_normal((size, size)) / math.sqrt(size)
    return lambda values: float(np.sqrt(np.mean((mix @ (np.log(values / 0.01) / math.log(1e5) - best)) ** 2)))


def saturated(size: int, random: np.random.Generator) -> Callable[[np.ndarray], float]:
    """A statistic that grows with the distance from 0.04 towards 0.94."""
    distance_of = apart(size, random)
    return lambda values: 0.04 - 0.9 * math.expm1(-distance_of(values) / 0.15)


def share(function: Callable[[np.ndarray], float], size: int, budget: int, noise: Callable[[], float]) -> float:
    """The objective at the vector that is found, as a share of that at the best shared number."""

    def measure(values: np.ndarray, seed: int) -> Measured:
        metric = function(values) + noise()
        return Measured(metric, metric)

    found = minimise(measure, 0.1, Space(0.01, 1000, size=size), budget=budget, tolerance=-math.inf)
    shared = min(function(np.full(size, strength)) for strength in np.geomspace(0.01, 1000, 501))
    return function(np.array(found.best.parameter)) / shared


def vector_rows(cases: int) -> Iterator[str]:
    yield "| entries | budget | noise | apart | coupled | statistic |"
    yield "| --- |" + " --- |" * 5
    for size, budget in ((2, 32), (4, 48), (16, 100), (64, 200)):
        for noise in (0.0, 0.005):
            cells = []
            for make in (apart, coupled, saturated):
                randoms = [np.random.default_rng(number) for number in range(cases)]
                draws = [functools.partial(random.normal, 0.0, noise) for random in randoms]
                shares = [share(make(size, r), size, budget, draw) for r, draw in zip(randoms, draws, strict=True)]
                cells.append(f"{np.median(shares):.2f}")
            yield f"| {size} | {budget} | {noise:g} | {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="random cases for each row; of vectors a tenth")
    cases = parser.parse_args().cases
    for line in (*rows(cases), "", *vector_rows(math.ceil(cases / 10))):
        print(line, flush=True)
