"""The search methods of `zeroth.minimise`: each asks for evaluations until it is stopped or says why it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field

from ecoprompt.registry import searches
from ecoprompt.zeroth import Evaluation, Search

Size = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]

CLEAR = 0.1
"""An objective that is lower by this share of another is so for more than its noise."""
DEEP = 0.5
"""An objective that is lower than both its neighbours by this share of theirs marks the basin of the minimum."""
MARGIN = 0.2
"""Share of a bracket at either end into which no step goes: every step makes it smaller by at least that."""
NEAR = 0.1
"""The same around a parabola's lowest point, which needs points on both of its sides."""
LOPSIDED = 3.0
"""A bracket whose halves differ by more than this factor is cut in the larger half, parabola or not."""
PATIENCE = 4
"""Steps without a gain, at most, before the radius around a vector is halved."""
FARTHEST = 0.25
"""The largest radius around a vector, in the unit of the space."""


@searches.register
def adaptive(
    search: Search,
    start: np.ndarray,
    *,
    radius: Annotated[Share, Field(description="first step, as a share of the range between the bounds")] = 1 / 8,
    finest: Annotated[Share, Field(description="smallest step, as a share of that range")] = 1 / 512,
    directions: Annotated[Count, Field(description="two-point estimates of a vector that make one step")] = 2,
) -> str:
    """Pairs outward from the start until the minimum is bracketed, then secants or parabolas inside the bracket.

    A bracket is two neighbours whose residuals differ in sign, or a point far below both its neighbours; where there
    is neither, the pairs go on to the bounds. A vector moves as one first, exactly as a single number would, so that
    it ends no farther from its target; then in random directions at right angles, each estimated by a pair, with a
    radius that doubles with every gain and halves when several steps in a row gain nothing.
    """
    line = _Line(search, search.space.to_unit(start))
    _outward(line, radius)
    while (distance := _between(line, finest)) is not None:
        line.visit(distance)
    if search.space.size > 1:
        _descend(search, radius, finest, directions)
    return "finest"


@searches.register
def published(
    search: Search,
    start: np.ndarray,
    *,
    learning_rate: Annotated[Size, Field(description="what the slope is multiplied by")] = 100.0,
    epsilon: Annotated[Size, Field(description="half the distance of the two points")] = 0.0999,
    floor: Annotated[Size, Field(description="the least value that an update may give")] = 0.1,
    steps: Annotated[Count, Field(description="updates, of two evaluations each")] = 10,
    stop_below: Annotated[float | None, Field(description="the metric at a new value that ends the search")] = None,
) -> str:
    """The update of the code published with the paper: it lowers the metric itself, whatever the target.

    σ ← max(σ - learning_rate * g, floor) with g = (m(σ + epsilon) - m(max(σ - epsilon, 1e-8))) / (2 * epsilon). The
    published start is 0.1. Unlike there, both points see the same noise, and no point leaves the bounds: give 1e-8 as
    the lower one to have its points. The last value is evaluated too, so ten steps need a budget of 21; with
    `stop_below` each value is, as there, and they need 30. A vector moves as one.
    """
    values = start
    for step in range(steps):
        seed = search.seed + step
        ahead = search.measure(values + epsilon, seed)
        behind = search.measure(np.maximum(values - epsilon, 1e-8), seed)
        slope = _slope(ahead.metric, behind.metric, epsilon)
        values = np.clip(np.maximum(values - learning_rate * slope, floor), search.space.low, search.space.high)
        if stop_below is not None:
            metric = search.measure(values, seed).metric
            if metric is not None and metric < stop_below:
                return "stop_below"
    search.measure(values, search.seed + steps - 1)
    return "steps"


@searches.register
def spsa(
    search: Search,
    start: np.ndarray,
    *,
    a: Annotated[Size, Field(description="size of the steps")] = 0.1,
    c: Annotated[Size, Field(description="size of the perturbations")] = 0.1,
    stability: Annotated[float, Field(ge=0, description="A: the larger, the shorter the first steps")] = 1.0,
    directions: Annotated[Count, Field(description="estimates that are averaged for a step")] = 1,
    steps: Annotated[Count, Field(description="steps, of two evaluations for each direction")] = 100,
) -> str:
    """Simultaneous perturbation with its usual gains, in the unit of the space: 1 from bound to bound.

    x ← x - a_k g with a_k = a / (k + 1 + A)^0.602, and g the mean of (f(x + c_k d) - f(x - c_k d)) / (2 c_k) * d over
    directions d of random signs, c_k = c / (k + 1)^0.101 (Spall, 1998, An overview of the simultaneous perturbation
    method, section "Implementation"). Each pair has a seed of its own, the same on both sides.
    """
    point = search.space.to_unit(start)
    for step in range(steps):
        reach = c / (step + 1) ** 0.101
        gradient = np.zeros(search.space.size)
        for draw in range(directions):
            signs = search.random.choice([-1.0, 1.0], search.space.size)
            ahead, behind = search.pair(point, reach * signs, search.seed + step * directions + draw)
            gradient += _slope(ahead.objective, behind.objective, reach) * signs / directions
        point = np.clip(point - a / (step + 1 + stability) ** 0.602 * gradient, 0.0, 1.0)
    search.at(point)
    return "steps"


@searches.register
def grid(
    search: Search,
    start: np.ndarray,
    *,
    points: Annotated[int, Field(ge=2, description="how many")] = 16,
) -> str:
    """Evenly spaced points from bound to bound, in the scale of the space; the start is not used. A vector moves as
    one."""
    for share in np.linspace(0.0, 1.0, points):
        search.at(np.full(search.space.size, share))
    return "points"


def _slope(ahead: float | None, behind: float | None, reach: float) -> float:
    """The two-point estimate of a slope; 0 where a side has no finite value, as nothing is known then."""
    if ahead is None or behind is None:
        return 0.0
    slope = (ahead - behind) / (2 * reach)
    return slope if math.isfinite(slope) else 0.0


Visited = tuple[float, Evaluation]
"""A distance from the start of a line, in the unit of the space, and the evaluation there."""


class _Line:
    """Evaluations of a point that moves as one, each parameter once, with their distances from where it started."""

    def __init__(self, search: Search, centre: np.ndarray) -> None:
        self._search, self._centre = search, centre
        self._visited: dict[tuple[float, ...], Visited] = {}
        self.low, self.high = -float(centre.max()), 1.0 - float(centre.min())

    def visit(self, distance: float) -> Evaluation:
        """The evaluation at a distance; one whose parameter was visited keeps the distance that it had."""
        found = self._search.at(self._centre + distance)
        self._visited.setdefault(found.parameter, (distance, found))
        return found

    def is_new(self, distance: float) -> bool:
        """Whether a distance leads to a parameter that was not visited."""
        space = self._search.space
        return space.settle(space.from_unit(self._centre + distance)) not in self._visited

    @property
    def visited(self) -> list[Visited]:
        """What was visited, by distance."""
        return sorted(self._visited.values(), key=lambda one: one[0])

    def around_best(self) -> tuple[Visited | None, Visited, Visited | None]:
        """The lowest evaluation and its neighbours; None where it is the outermost."""
        visited = self.visited
        index = min(range(len(visited)), key=lambda at: visited[at][1].objective)
        before = visited[index - 1] if index else None
        return before, visited[index], visited[index + 1] if index + 1 < len(visited) else None

    def crossing(self) -> tuple[Visited, Visited] | None:
        """Neighbours whose residuals differ in sign: of several pairs, the one with the lowest evaluation."""
        visited = self.visited
        pairs = zip(visited, visited[1:], strict=False)
        crossings = [(low, high) for low, high in pairs if _residual(low) * _residual(high) < 0]
        return min(crossings, key=lambda pair: min(one.objective for _, one in pair), default=None)

    def bracketed(self) -> bool:
        """Whether the minimum is known to lie between two points that were visited."""
        before, (_, best), after = self.around_best()
        neighbours = [one[1].objective if one else math.inf for one in (before, after)]
        deep = max(neighbours) < math.inf and _lower(best.objective, min(neighbours), DEEP)
        return deep or self.crossing() is not None


def _lower(one: float, other: float, share: float) -> bool:
    return one < other - share * abs(other)


def _residual(visited: Visited) -> float:
    return visited[1].residual or 0.0


def _outward(line: _Line, radius: float) -> None:
    """Visit pairs ever farther from the start until the minimum is bracketed or both bounds are reached; while one
    end is clearly lower than the other, that side alone."""
    left = right = 0.0
    lowest = highest = line.visit(0.0)
    while not line.bracketed() and (left > line.low or right < line.high):
        go_left, go_right = left > line.low, right < line.high
        if go_left and go_right:
            below, above = lowest.objective, highest.objective
            go_left, go_right = not _lower(above, below, CLEAR), not _lower(below, above, CLEAR)
        if go_right:
            right = min(right + radius, line.high)
            highest = line.visit(right)
        if go_left and line.crossing() is None:
            left = max(left - radius, line.low)
            lowest = line.visit(left)


def _between(line: _Line, finest: float) -> float | None:
    """Where to look next inside the bracket, None once it is finer than `finest` or holds nothing new."""
    crossing = line.crossing()
    if crossing is not None:
        (low, _), (high, _) = crossing
        wanted = [_secant(*crossing), (low + high) / 2] if high - low >= finest else []
    else:
        wanted = _parabola(*line.around_best(), finest)
    return next((distance for distance in wanted if line.is_new(distance)), None)


def _secant(low: Visited, high: Visited) -> float:
    """Where the residual would be 0 if it were straight between two points, kept away from both."""
    share = _residual(low) / (_residual(low) - _residual(high))
    return low[0] + min(max(share, MARGIN), 1 - MARGIN) * (high[0] - low[0])


def _parabola(before: Visited | None, best: Visited, after: Visited | None, finest: float) -> list[float]:
    """Distances to try around the best point: where the parabola through the three is lowest, then the middle of the
    larger and of the smaller gap; none where both gaps are finer than `finest`."""
    here = best[0]
    ends = [one for one in (before, after) if one is not None]
    ends.sort(key=lambda one: -abs(one[0] - here))
    if not ends or abs(ends[0][0] - here) < finest:
        return []
    middles = [(one[0] + here) / 2 for one in ends]
    if len(ends) < 2 or abs(ends[0][0] - here) > LOPSIDED * abs(ends[1][0] - here):
        return middles
    (low, below), (high, above) = sorted(ends, key=lambda one: one[0])
    falling = (best[1].objective - below.objective) / (here - low)
    rising = (above.objective - best[1].objective) / (high - here)
    lowest = (low + here) / 2 - falling * (high - low) / 2 / (rising - falling) if rising > falling else math.nan
    if not math.isfinite(lowest):
        return middles
    margin = NEAR * (high - low)
    if abs(lowest - here) < max(finest, margin):
        lowest = here + math.copysign(max(finest, margin), ends[0][0] - here)
    return [min(max(lowest, low + margin), high - margin), *middles]


def _descend(search: Search, radius: float, finest: float, directions: int) -> None:
    """Lower the best evaluation of a vector further, along random directions at right angles."""
    size = search.space.size
    basis = _directions(size, search.random)
    pairs = min(directions, size)
    patience = max(1, min(size // pairs, PATIENCE))
    best = min(search.evaluations, key=lambda one: one.objective)
    failed = 0
    while radius >= finest:
        here, step = search.space.to_unit(best.parameter), np.zeros(size)
        found = [best]
        for _ in range(pairs):
            direction = next(basis)
            ahead, behind = search.pair(here, radius * direction)
            step += _vertex(ahead.objective, best.objective, behind.objective, radius) * direction
            found += [ahead, behind]
        closest = min([*found, search.at(here + step)], key=lambda one: one.objective)
        if closest.objective < best.objective:
            best, radius, failed = closest, min(2 * radius, FARTHEST), 0
        else:
            failed += 1
            if failed == patience:
                radius, failed = radius / 2, 0


def _vertex(ahead: float, here: float, behind: float, radius: float) -> float:
    """How far ahead the parabola through three objectives is lowest, at most two radii; a radius downhill where it
    has no lowest point, and 0 where one of them is not finite."""
    slope = (ahead - behind) / (2 * radius)
    curvature = (ahead - 2 * here + behind) / radius**2
    if not (math.isfinite(slope) and math.isfinite(curvature)):
        return 0.0
    if curvature <= 0:
        return -math.copysign(radius, slope) if slope else 0.0
    return min(max(-slope / curvature, -2 * radius), 2 * radius)


def _directions(size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Random directions [size], each at right angles to those before it, and to all ones, until they span the space;
    then anew. The largest entry of each is 1 or -1."""
    spanned = [np.ones(size) / math.sqrt(size)]
    while True:
        if len(spanned) == size:
            spanned = []
        direction = random.standard_normal(size)
        for earlier in spanned:
            direction -= (direction @ earlier) * earlier
        direction /= np.linalg.norm(direction)
        spanned.append(direction)
        yield direction / np.abs(direction).max()
