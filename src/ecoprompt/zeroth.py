"""Zeroth-order minimisation of a black box over a scalar or a vector: evaluations alone, each kept in a trace."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ecoprompt.files import append_line, write_text_atomic
from ecoprompt.processes import from_main, is_main
from ecoprompt.registry import EcopromptError, InputError, Progress, quiet, searches, show

Scale = Literal["log", "linear"]
RULES = 1
"""Of how the methods choose their points; raised with any change of them, as an older trace would not be followed."""


@dataclass(frozen=True)
class Measured:
    """What the black box returns: `objective` is minimised, `metric` is what it was made of, `residual` the signed
    distance of the metric from its target, where there is one."""

    objective: float
    metric: float
    residual: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation; an objective that was not a finite number is infinite, such a metric or residual None."""

    number: int
    parameter: tuple[float, ...]
    seed: int
    objective: float
    metric: float | None
    residual: float | None
    seconds: float


@dataclass(frozen=True)
class Found:
    """The evaluation with the lowest objective (of equals the first), all of them in order, and what ended the search:
    "tolerance", "budget", or what the method says."""

    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    stopped: str


@dataclass(frozen=True)
class Space:
    """What a parameter may be: `size` numbers between the same bounds, whole ones if `integer`.

    Methods work in its unit: 0 at `low`, 1 at `high`, and even steps between them in the logarithm if `scale` is "log".
    Raises InputError for bounds that are none.
    """

    low: float
    high: float
    scale: Scale = "log"
    integer: bool = False
    size: int = 1

    def __post_init__(self) -> None:
        low, high = self.low, self.high
        if self.scale not in get_args(Scale):
            raise InputError(f"found the scale {self.scale!r}, expected 'log' or 'linear'")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InputError(f"found the bounds {low:g} and {high:g}, expected two finite numbers, the lower one first")
        if self.scale == "log" and low <= 0:
            raise InputError(f"found the lower bound {low:g}, expected one above 0 for a logarithmic scale")
        if self.integer and not (float(low).is_integer() and float(high).is_integer()):
            raise InputError(f"found the bounds {low:g} and {high:g}, expected whole numbers for a whole parameter")
        if self.size < 1:
            raise InputError(f"found {self.size} parameters, expected at least one")

    def settle(self, parameter: np.ndarray) -> tuple[float, ...]:
        """`parameter` within the bounds, rounded to a whole number or to six digits.

        Six digits are more than any evaluation tells apart; they make a parameter found on one machine or by another
        version of numpy the same on the next, and fit to be written into a recipe.
        """
        inside = [min(max(value, self.low), self.high) for value in map(float, parameter)]
        rounded = [float(round(value)) if self.integer else float(f"{value:.6g}") for value in inside]
        return tuple(float(min(max(value, self.low), self.high)) + 0.0 for value in rounded)

    def to_unit(self, parameter: Sequence[float] | np.ndarray) -> np.ndarray:
        """[size] values from 0 to 1 for a parameter in its own measure."""
        low, high, values = self._scaled(self.low), self._scaled(self.high), self._scaled(parameter)
        return np.asarray((values - low) / (high - low))

    def from_unit(self, point: np.ndarray) -> np.ndarray:
        """[size] values in their own measure for a point in the unit; what lies outside is moved to the bound."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        values = low + np.clip(point, 0.0, 1.0) * (high - low)
        return np.asarray(np.exp(values) if self.scale == "log" else values)

    def _scaled(self, values: Any) -> np.ndarray:
        array = np.asarray(values, dtype=np.float64)
        return np.log(array) if self.scale == "log" else array


class Stop(Exception):
    """Ends a method from inside an evaluation; `reason` is what `Found.stopped` says."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Search:
    """The black box as a method sees it: counted, bounded, and never asked twice for what is known.

    A real parameter is known with its seed; a whole number whatever the seed, as there are few of them.
    """

    def __init__(
        self,
        function: Callable[[np.ndarray, int], Measured],
        space: Space,
        seed: int,
        limits: tuple[int, float],
        trace: Trace,
        progress: Progress,
    ) -> None:
        self.space = space
        self.seed = seed
        self.random = np.random.default_rng(seed)
        self.evaluations: list[Evaluation] = []
        self._function = function
        self._budget, self._tolerance = limits
        self._trace = trace
        self._progress = progress
        self._known: dict[object, Evaluation] = {}
        self._recorded: dict[object, Evaluation] = {}
        for record in trace.recorded:
            self._recorded.setdefault(self._key(record.parameter, record.seed), record)

    def at(self, point: np.ndarray, seed: int | None = None) -> Evaluation:
        """The evaluation at a point in the unit of the space, by default under the seed of the search."""
        return self.measure(self.space.from_unit(point), seed)

    def pair(self, point: np.ndarray, step: np.ndarray, seed: int | None = None) -> tuple[Evaluation, Evaluation]:
        """The evaluations on both sides of a point in the unit, under the same seed: at `+ step` and at `- step`."""
        return self.at(point + step, seed), self.at(point - step, seed)

    def measure(self, parameter: np.ndarray, seed: int | None = None) -> Evaluation:
        """The evaluation at a parameter in its own measure: known, from the trace, or made now. Raises Stop."""
        seed = self.seed if seed is None else seed
        settled = self.space.settle(parameter)
        key = self._key(settled, seed)
        if key in self._known:
            return self._known[key]
        number = len(self.evaluations) + 1
        if number > self._budget:
            raise Stop("budget")
        if key in self._recorded:
            found = replace(self._recorded[key], number=number)
        else:
            found = self._evaluate(number, settled, seed)
            self._trace.append(found)
        self._known[key] = found
        self.evaluations.append(found)
        self._progress("searching", number, self._budget)
        if found.objective <= self._tolerance:
            raise Stop("tolerance")
        return found

    def _evaluate(self, number: int, parameter: tuple[float, ...], seed: int) -> Evaluation:
        start = time.perf_counter()
        measured = self._function(np.array(parameter), seed)
        seconds = round(time.perf_counter() - start, 3)
        objective = float(measured.objective)
        return Evaluation(
            number,
            parameter,
            seed,
            objective if math.isfinite(objective) else math.inf,
            _finite(measured.metric),
            _finite(measured.residual),
            seconds,
        )

    def _key(self, parameter: tuple[float, ...], seed: int) -> object:
        return parameter if self.space.integer else (parameter, seed)


def minimise(
    function: Callable[[np.ndarray, int], Measured],
    start: float | Sequence[float] | np.ndarray,
    space: Space,
    *,
    method: str = "adaptive",
    parameters: Mapping[str, Any] | None = None,
    budget: int = 16,
    tolerance: float = 0.0,
    seed: int = 0,
    trace: Path | None = None,
    identity: str = "",
    progress: Progress = quiet,
) -> Found:
    """The parameter in `space` at which `function` (of [size] values and a seed) has the lowest objective found.

    A number as `start` stands for all `size` of them. At most `budget` evaluations are made; one with an objective of
    at most `tolerance` ends the search. Every evaluation is appended to `trace` as it is made, and a search that finds
    its own trace there goes on with it, to the same end as one that was never killed; budget and tolerance may have
    changed since. `identity` is further text that tells apart what is searched (a model, a data set). An objective that
    is not a finite number counts as the worst.

    Raises InputError for a start outside the bounds, unknown or wrong parameters of the method, and the trace of
    another search; EcopromptError if no evaluation gave a number.
    """
    first = _start(start, space)
    if budget < 1 or math.isnan(tolerance) or seed < 0:
        raise InputError(
            f"found a budget of {budget}, a tolerance of {tolerance:g} and the seed {seed}, expected at least one "
            "evaluation, a number, and a seed of at least 0"
        )
    bound = searches.bind(method, parameters or {})
    settings = {"rules": RULES, "method": method, "parameters": bound, "start": first.tolist(), "space": asdict(space)}
    kept = Trace(trace, {**settings, "seed": seed, "identity": identity})
    search = Search(function, space, seed, (budget, tolerance), kept, progress)
    try:
        stopped = searches[method](search, first, **bound)
    except Stop as stop:
        stopped = stop.reason
    best = min(search.evaluations, key=lambda one: one.objective)
    if best.objective == math.inf:
        raise EcopromptError(f"none of the {len(search.evaluations)} evaluations gave a finite objective")
    return Found(best, tuple(search.evaluations), stopped)


def _start(start: float | Sequence[float] | np.ndarray, space: Space) -> np.ndarray:
    values = np.asarray(start, dtype=np.float64)
    if values.ndim == 0:
        values = np.full(space.size, values)
    if values.shape != (space.size,):
        raise InputError(f"found a start of shape {list(values.shape)}, expected {space.size} numbers or one for all")
    if not np.all((values >= space.low) & (values <= space.high)):
        outside = next(value for value in values if not space.low <= value <= space.high)
        raise InputError(f"found the start {outside:g}, expected one from {space.low:g} to {space.high:g}")
    return np.array(space.settle(values))


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


class Trace:
    """The evaluations of one search in a file of JSON lines, of which the first holds the settings of that search.

    A line that a killed process left unfinished is passed over. Without a path nothing is kept. Of the processes of a
    launcher, the main one reads and writes the file for all. Raises InputError if the file holds anything else, or the
    trace of a search with other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        self.recorded: list[Evaluation] = []
        if path is None:
            return
        header = json.dumps({"search": settings})
        try:
            raw = from_main(lambda: path.read_bytes() if path.exists() else b"")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
        if not raw or (b"\n" not in raw and header.encode().startswith(raw)):
            write_text_atomic(path, header + "\n")
            return
        first, *lines = raw.split(b"\n")
        _check_same(path, first, json.loads(header)["search"])
        self.recorded = [record for record in map(_record, lines) if record is not None]

    def append(self, evaluation: Evaluation) -> None:
        """Write one evaluation, so that being killed tears at most this one."""
        if self._path is None or not is_main():
            return
        kept = asdict(evaluation)
        if evaluation.objective == math.inf:
            kept["objective"] = None
        append_line(self._path, json.dumps(kept, allow_nan=False))


def _check_same(path: Path, first: bytes, settings: Mapping[str, Any]) -> None:
    """Raises InputError that names what differs, unless the first line of a trace holds these settings."""
    try:
        found = json.loads(first)["search"]
        different = [name for name in settings if found.get(name) != settings[name]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: found what is not the trace of a search; name another file") from None
    if different:
        told = "; ".join(f"{name} was {show(found.get(name))} and is {show(settings[name])}" for name in different)
        raise InputError(f"{path}: found the trace of another search ({told}); name another file or remove this one")


def _record(line: bytes) -> Evaluation | None:
    try:
        record = json.loads(line)
        objective = math.inf if record["objective"] is None else float(record["objective"])
        return Evaluation(**{**record, "parameter": tuple(map(float, record["parameter"])), "objective": objective})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
