"""The minimiser: what holds of every method, what each finds in closed form, and traces that go on exactly."""

from __future__ import annotations

import json
import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecoprompt.registry import EcopromptError, InputError, searches
from ecoprompt.zeroth import Measured, Space, minimise

STRENGTH = Space(0.01, 1000)
DIMS = Space(1, 2048, integer=True)
WHOLE_RANGE = math.log(1000 / 0.01)


class Box:
    """A black box that counts its calls and may be killed at one of them."""

    def __init__(self, function, killed_at=None):
        self.function, self.killed_at, self.calls = function, killed_at, []

    def __call__(self, values, seed):
        self.calls.append((tuple(values), seed))
        if len(self.calls) == self.killed_at:
            raise KeyboardInterrupt
        return self.function(values, seed)


def distance(metric, target, signed=True):
    """|metric - target| of the first value."""

    def measure(values, seed):
        value = metric(float(values[0]))
        return Measured(abs(value - target), value, value - target if signed else None)

    return measure


def plain(function):
    """A function of an array as a black box without a target."""
    return lambda values, seed: Measured(float(function(values)), float(function(values)))


def erratic(salt):
    """A box without any shape: each value at each seed has an objective of its own, now and then none at all."""

    def measure(values, seed):
        draw = random.Random(f"{values.tolist()} {seed} {salt}")
        value = draw.choice([draw.gauss(0, 1), draw.gauss(0, 1e6), 0.5, math.nan, math.inf, -math.inf])
        return Measured(abs(value), value, value)

    return measure


def smooth(salt):
    """A box whose metric rises with every value, from 0 or below towards 1."""
    target = random.Random(salt).uniform(0.1, 0.9)

    def measure(values, seed):
        value = float(np.tanh(np.arcsinh(values).mean() / 5))
        return Measured(abs(value - target) + 0.01, value, value - target)

    return measure


def told(found):
    """The evaluations without what differs from one run to the next: how long they took."""
    return [replace(one, seconds=0.0) for one in found.evaluations]


@st.composite
def problems(draw):
    """A box, and the arguments of a search over it."""
    integer, scale = draw(st.booleans()), draw(st.sampled_from(["log", "linear"]))
    if integer:
        low = draw(st.integers(1, 50))
        high = low + draw(st.integers(1, 3000))
    else:
        low = draw(st.floats(1e-3, 10) if scale == "log" else st.floats(-100, 100))
        high = low + draw(st.floats(0.1, 1e4))
    space = Space(low, high, scale, integer, draw(st.sampled_from([1, 1, 2, 5])))
    share = draw(st.lists(st.floats(0, 1), min_size=space.size, max_size=space.size))
    start = [low + one * (high - low) for one in share]
    box = draw(st.sampled_from([erratic, smooth]))(draw(st.integers(0, 9)))
    options = {"method": draw(st.sampled_from(sorted(searches))), "seed": draw(st.integers(0, 3))}
    return box, np.clip(start, low, high), space, options | {"budget": draw(st.integers(1, 40))}


@settings(max_examples=150, deadline=None)
@given(problems())
def test_what_holds_of_every_method(problem):
    function, start, space, options = problem
    box = Box(function)
    try:
        found = minimise(box, start, space, **options)
    except EcopromptError:
        assert not any(math.isfinite(function(np.array(values), seed).objective) for values, seed in box.calls)
        return
    made = found.evaluations
    assert [(one.parameter, one.seed) for one in made] == box.calls
    assert 1 <= len(made) <= options["budget"]
    assert [one.number for one in made] == list(range(1, len(made) + 1))
    assert all(space.low <= value <= space.high for one in made for value in one.parameter)
    assert all(len(one.parameter) == space.size for one in made)
    assert found.best == min(made, key=lambda one: (one.objective, one.number))
    assert (found.stopped == "tolerance") == (made[-1].objective <= 0)
    if space.integer:
        assert all(value == int(value) for one in made for value in one.parameter)
        assert len({one.parameter for one in made}) == len(made)
    assert len({(one.parameter, one.seed) for one in made}) == len(made)


@settings(max_examples=60, deadline=None)
@given(problems(), st.data())
def test_a_search_killed_anywhere_goes_on_to_the_same_end(problem, data):
    _, start, space, options = problem
    function = smooth(data.draw(st.integers(0, 9)))
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "new" / "er" / "trace.jsonl"
        whole = minimise(function, start, space, **options)
        killed = Box(function, killed_at=data.draw(st.integers(1, len(whole.evaluations))))
        with pytest.raises(KeyboardInterrupt):
            minimise(killed, start, space, trace=trace, **options)
        left = Box(function)
        assert told(minimise(left, start, space, trace=trace, **options)) == told(whole)
        assert killed.calls[:-1] + left.calls == [(one.parameter, one.seed) for one in whole.evaluations]
        again = Box(function)
        assert told(minimise(again, start, space, trace=trace, **options)) == told(whole)
        assert again.calls == []


@pytest.mark.parametrize("method", list(searches))
def test_a_trace_cut_off_at_any_byte_is_gone_on_with(method, tmp_path):
    trace = tmp_path / "trace.jsonl"
    box = smooth(3)
    whole = minimise(box, 2.0, STRENGTH, method=method, trace=trace, budget=5)
    raw = trace.read_bytes()
    for length in range(0, len(raw), 7):
        trace.write_bytes(raw[:length])
        found = minimise(box, 2.0, STRENGTH, method=method, trace=trace, budget=5)
        assert told(found) == told(whole)
        complete = minimise(Box(box, killed_at=1), 2.0, STRENGTH, method=method, trace=trace, budget=5)
        assert told(complete) == told(whole)


def test_a_trace_has_a_line_for_the_settings_and_one_for_each_evaluation(tmp_path):
    trace = tmp_path / "trace.jsonl"
    found = minimise(
        plain(lambda values: math.nan if values[0] > 2 else values[0]), 1.0, STRENGTH, trace=trace, budget=4
    )
    header, *lines = map(json.loads, trace.read_text().splitlines())
    assert header["search"]["method"] == "adaptive"
    assert header["search"]["parameters"] == {"radius": 0.125, "finest": 1 / 512, "directions": 2}
    assert [line["number"] for line in lines] == [1, 2, 3, 4]
    assert [tuple(line["parameter"]) for line in lines] == [one.parameter for one in found.evaluations]
    assert set(lines[0]) == {"number", "parameter", "seed", "objective", "metric", "residual", "seconds"}
    assert all((line["objective"] is None) == (line["parameter"][0] > 2) for line in lines)


def test_a_trace_goes_on_under_a_larger_budget_and_another_tolerance(tmp_path):
    trace = tmp_path / "trace.jsonl"
    box = smooth(1)
    short = minimise(box, 2.0, STRENGTH, trace=trace, budget=3)
    assert short.stopped == "budget"
    longer = Box(box)
    found = minimise(longer, 2.0, STRENGTH, trace=trace, budget=6, tolerance=1e-9)
    assert told(found)[:3] == told(short)
    assert len(longer.calls) == 3
    assert told(minimise(Box(box, killed_at=1), 2.0, STRENGTH, trace=trace, budget=3)) == told(short)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"method": "grid"}, "method was 'adaptive' and is 'grid'"),
        ({"parameters": {"radius": 0.2}}, "parameters was"),
        ({"start": 3.0}, r"start was \[2.0\] and is \[3.0\]"),
        ({"space": Space(0.01, 999)}, "space was"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"identity": "another model"}, "identity was '' and is 'another model'"),
    ],
)
def test_the_trace_of_another_search_is_refused_and_kept(tmp_path, change, differs):
    trace = tmp_path / "trace.jsonl"
    arguments = {"start": 2.0, "space": STRENGTH}
    minimise(smooth(1), **arguments, trace=trace, budget=3)
    before = trace.read_bytes()
    with pytest.raises(InputError, match=f"the trace of another search .*{differs}"):
        minimise(smooth(1), **(arguments | change), trace=trace)
    assert trace.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["notes\n", "[1]\n", '{"key": 1}\n', "notes", '{"search": [1]}\n', pytest.param("[" * 10**5 + "\n", id="deep")],
)
def test_a_file_that_is_no_trace_is_refused_and_kept(tmp_path, content):
    trace = tmp_path / "notes.txt"
    trace.write_text(content)
    with pytest.raises(InputError, match=r"notes\.txt: found what is not the trace"):
        minimise(smooth(1), 2.0, STRENGTH, trace=trace)
    assert trace.read_text() == content
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        minimise(smooth(1), 2.0, STRENGTH, trace=tmp_path)


def test_lines_that_tell_of_no_evaluation_are_passed_over(tmp_path):
    trace = tmp_path / "trace.jsonl"
    whole = minimise(smooth(1), 2.0, STRENGTH, trace=trace, budget=4)
    header, *lines = trace.read_text().splitlines()
    trace.write_text("\n".join([header, "torn {", lines[0], "null", '{"number": 1}', "[" * 10**5, *lines[1:]]) + "\n")
    assert told(minimise(Box(smooth(1), killed_at=1), 2.0, STRENGTH, trace=trace, budget=4)) == told(whole)


@pytest.mark.parametrize("start", [0.1, 100.0])
def test_a_residual_straight_in_the_logarithm_takes_six_evaluations(start):
    """The start and a pair, of which one side is clearly nearer; two steps of an eighth of the range on that side until
    the sign changes; and the secant is exact."""
    for target in (3.0, 3.5, 4.0):
        found = minimise(distance(math.log, math.log(target)), start, STRENGTH, tolerance=1e-5)
        assert found.stopped == "tolerance"
        assert len(found.evaluations) == 6
        assert found.best.parameter[0] == pytest.approx(target, rel=1e-5)


@pytest.mark.parametrize("start", [0.1, 100.0])
@pytest.mark.parametrize(
    ("metric", "target"),
    [
        pytest.param(lambda s: math.log(s) ** 2, 0.0, id="quadratic"),
        pytest.param(lambda s: 1 - math.tanh(math.log(s / 3)), 1.0, id="tanh"),
        pytest.param(lambda s: 0.25 + 0.5 / (1 + s**3), 0.3, id="accuracy"),
        pytest.param(lambda s: 0.04 + 0.9 * -math.expm1(-abs(math.log(s / 3.5))), 0.0, id="statistic"),
        pytest.param(lambda s: 0.04 + 0.7 * -math.expm1(-(math.log(s / 3.5) ** 2)), 0.0, id="narrow statistic"),
    ],
)
def test_the_basin_is_found_from_afar(metric, target, start):
    """Without the sign of the residual, too: to within a tenth of what the objective falls by."""
    values = [abs(metric(s) - target) for s in np.geomspace(0.01, 1000, 2001)]
    for signed in (True, False):
        found = minimise(distance(metric, target, signed), start, STRENGTH)
        assert found.best.objective - min(values) <= 0.1 * (max(values) - min(values))


@pytest.mark.parametrize("start", [0.1, 1.0, 100.0])
def test_noise_of_two_percent_does_not_lead_astray(start):
    """At most 5 of 100 draws of noise end where the objective is farther from its least value than twice the noise."""
    lost = 0
    for draw in range(100):
        noise = np.random.default_rng(draw)
        found = minimise(
            distance(lambda s, noise=noise: 0.2 + 0.7 / (1 + (s / 3) ** 2) + 0.02 * noise.standard_normal(), 0.5),
            start,
            STRENGTH,
        )
        lost += abs(0.2 + 0.7 / (1 + (found.best.parameter[0] / 3) ** 2) - 0.5) > 0.04
    assert lost <= 5


def test_a_target_that_is_never_reached_leads_to_the_nearest_value():
    found = minimise(distance(lambda s: 0.3 + 0.6 / (1 + s), 0.25), 0.1, STRENGTH)
    assert found.best.parameter == (1000.0,)
    falling = minimise(distance(lambda s: -s, 5.0), 100.0, STRENGTH)
    assert falling.best.parameter == (0.01,)


def test_a_flat_objective_is_looked_at_from_bound_to_bound():
    found = minimise(plain(lambda values: 1.0), 1.0, STRENGTH)
    seen = sorted(math.log(one.parameter[0] / 0.01) / WHOLE_RANGE for one in found.evaluations)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    assert max(np.diff(seen)) <= 1 / 8 + 1e-6
    assert found.best.number == 1


@pytest.mark.parametrize("best", [1, 2, 37, 700, 2048])
def test_an_integer_is_found_to_the_finest_step(best):
    """Which is 1.5 % here: exactly where it is small."""
    found = minimise(distance(lambda dims: dims, best), 64, DIMS, budget=24)
    assert abs(found.best.parameter[0] - best) <= best * (2048 ** (1 / 512) - 1)
    assert len({one.parameter for one in found.evaluations}) == len(found.evaluations)


def test_a_few_integers_are_all_looked_at_if_need_be():
    found = minimise(plain(lambda values: 1.0), 2, Space(1, 4, "linear", integer=True))
    assert sorted(one.parameter[0] for one in found.evaluations) == [1, 2, 3, 4]
    assert found.stopped == "finest"


def test_what_is_not_a_number_counts_as_the_worst():
    def overflowing(values):
        return math.nan if values[0] > 10 else abs(math.log(values[0] / 5))

    found = minimise(plain(overflowing), 100.0, STRENGTH)
    assert found.evaluations[0].objective == math.inf
    assert found.evaluations[0].metric is None
    assert found.best.parameter[0] == pytest.approx(5, rel=0.1)
    with pytest.raises(EcopromptError, match="none of the 1[0-6] evaluations gave a finite objective"):
        minimise(plain(lambda values: math.nan), 1.0, STRENGTH)


def test_no_objective_below_zero_holds_a_search_up():
    found = minimise(plain(lambda values: -5.0), 1.0, STRENGTH, tolerance=-math.inf)
    assert found.stopped in ("budget", "finest")
    bent = minimise(plain(lambda values: math.log(values[0] / 3) ** 2 - 100), 0.1, STRENGTH, tolerance=-math.inf)
    assert bent.best.objective == pytest.approx(-100, abs=0.05)


OPTIMUM = np.array([1.5, 2.5, 4.0, 8.0])
MIX = np.array([[1, 0.5, 0, 0], [0, 1, 0.5, 0], [0, 0, 1, 0.5], [0.5, 0, 0, 1]])


def apart(values):
    return float(np.sqrt(np.mean(np.log(values / OPTIMUM) ** 2)))


def coupled(values):
    return float(np.sqrt(np.mean((MIX @ np.log(values / OPTIMUM)) ** 2)))


@pytest.mark.parametrize("function", [apart, coupled])
@pytest.mark.parametrize("start", [0.1, 3.0])
def test_a_vector_ends_nearer_than_a_shared_number(function, start):
    """Less than half as far away as the best shared number, which is the geometric mean where nothing is coupled."""
    shared = min(function(np.full(4, s)) for s in np.geomspace(0.01, 1000, 2001))
    found = minimise(plain(function), start, replace(STRENGTH, size=4), budget=64)
    assert found.best.objective < shared / 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 30), st.sampled_from([0.01, 0.1, 3.0, 1000.0]), st.integers(2, 6))
def test_a_vector_ends_at_least_as_near_as_the_number_it_starts_from(salt, budget, start, size):
    """Under any budget, if the objective is the same for equal values however many they are (but for rounding)."""
    box = smooth(salt)
    scalar = minimise(box, start, STRENGTH, budget=budget)
    vector = minimise(box, start, replace(STRENGTH, size=size), budget=budget)
    assert vector.best.objective <= scalar.best.objective + 1e-12


def test_one_step_along_all_directions_solves_a_round_quadratic():
    """Three pairs at right angles to the shared number, each with an exact parabola, and the point that they give: what
    is left is the error of the shared number, which is less than the finest step."""
    shared = minimise(plain(lambda values: apart(values) ** 2), 3.0, replace(STRENGTH, size=4), budget=1000)
    line = next(one.number for one in shared.evaluations if len(set(one.parameter)) > 1) - 1
    found = minimise(
        plain(lambda values: apart(values) ** 2),
        3.0,
        replace(STRENGTH, size=4),
        parameters={"directions": 3},
        budget=line + 3 * 2 + 1,
    )
    assert found.best.number == line + 7
    assert found.best.objective <= (WHOLE_RANGE / 512) ** 2


def test_both_sides_of_a_pair_see_the_same_seed():
    straight = plain(lambda values: 1 + 0.001 * float(np.log(values).sum()))
    options = {"seed": 7, "budget": 8}
    seeds = [one.seed for one in minimise(straight, 3.0, STRENGTH, method="spsa", **options).evaluations]
    assert seeds == [7, 7, 8, 8, 9, 9, 10, 10]
    seeds = [one.seed for one in minimise(straight, 3.0, STRENGTH, method="published", **options).evaluations]
    assert seeds == [7, 7, 8, 8, 9, 9, 10, 10]
    assert {one.seed for one in minimise(straight, 3.0, STRENGTH, **options).evaluations} == {7}


def test_the_published_update_by_hand():
    """The metric is 1 - σ / 1000, so every slope inside is -0.001 and every step 0.1. In the first step the backward
    point, 0.1 - 0.0999, is not clipped; the divisor is 0.1998 either way."""
    box = Box(lambda values, seed: Measured(abs(1 - values[0] / 1000 - 0.5), 1 - values[0] / 1000))
    found = minimise(box, 0.1, Space(1e-8, 1000), method="published", parameters={"steps": 2}, budget=100, tolerance=-1)
    values = [values[0] for values, _ in box.calls]
    assert values == pytest.approx([0.1999, 0.0001, 0.2999, 0.1001, 0.3], rel=1e-6)
    assert found.stopped == "steps"


def test_the_published_update_clips_backwards_but_not_its_divisor():
    """The metric is 3 σ; with epsilon 0.5 the points are 0.6 and 1e-8, the slope 1.8 / 1 instead of 3, the new value
    0.1 - 1.8 * 0.01 = 0.082, which the floor of 0.09 lifts; its metric, 0.27, is below 0.28."""
    box = Box(lambda values, seed: Measured(3 * values[0], 3 * values[0]))
    parameters = {"epsilon": 0.5, "learning_rate": 0.01, "floor": 0.09}
    arguments = {"method": "published", "budget": 100, "tolerance": -1}
    space = Space(1e-8, 1000)
    found = minimise(box, 0.1, space, parameters=parameters | {"stop_below": 0.28}, **arguments)
    assert [values[0] for values, _ in box.calls] == pytest.approx([0.6, 1e-8, 0.09], rel=1e-6)
    assert found.stopped == "stop_below"
    box.calls.clear()
    minimise(box, 0.1, space, parameters=parameters | {"steps": 1, "floor": 0.001}, **arguments)
    assert box.calls[-1][0][0] == pytest.approx(0.082, rel=1e-6)


def test_a_step_of_simultaneous_perturbation_by_hand():
    """f is 2 x in the unit of a linear space from 0 to 10: its slope is 2 and the first step 2 a / 2^0.602."""
    box = Box(lambda values, seed: Measured(values[0] / 5, 0.0))
    parameters = {"a": 0.05, "c": 0.2, "steps": 1, "directions": 3}
    minimise(box, 6.0, Space(0, 10, "linear"), method="spsa", parameters=parameters, tolerance=-1)
    pairs, last = box.calls[:-1], box.calls[-1][0][0]
    assert [{values[0] for values, _ in pairs[at : at + 2]} for at in (0, 2, 4)] == [{4.0, 8.0}] * 3
    assert [seed for _, seed in pairs] == [0, 0, 1, 1, 2, 2]
    assert last == pytest.approx(10 * (0.6 - 0.05 / 2**0.602 * 2), rel=1e-5)


def test_a_grid_is_even_in_the_scale():
    found = minimise(plain(lambda values: 1.0), 1.0, Space(1, 10000), method="grid", parameters={"points": 5})
    assert [one.parameter[0] for one in found.evaluations] == [1, 10, 100, 1000, 10000]
    assert found.stopped == "points"
    space = Space(0, 4, "linear", size=2)
    found = minimise(plain(lambda values: 1.0), 0.0, space, method="grid", parameters={"points": 3})
    assert [one.parameter for one in found.evaluations] == [(0.0, 0.0), (2.0, 2.0), (4.0, 4.0)]


def test_an_objective_of_zero_is_good_enough_unless_it_is_told_otherwise():
    found = minimise(plain(lambda values: 0.0), 1.0, STRENGTH)
    assert (len(found.evaluations), found.stopped) == (1, "tolerance")


def test_an_evaluation_says_how_long_it_took(monkeypatch):
    ticks = iter([10.0, 12.34567])
    monkeypatch.setattr("ecoprompt.zeroth.time.perf_counter", lambda: next(ticks))
    assert minimise(plain(lambda values: 0.0), 1.0, STRENGTH).best.seconds == 2.346


def test_what_lies_outside_a_space_is_moved_to_its_bounds():
    space = Space(1, 100, size=4)
    points = np.array([-0.5, 0.0, 0.5, 1.5])
    assert space.from_unit(points) == pytest.approx([1, 1, 10, 100])
    assert space.to_unit([1, 1, 10, 100]) == pytest.approx([0, 0, 0.5, 1])
    assert repr(Space(-1, 1, "linear").settle(np.array([-0.0]))) == "(0.0,)"


@pytest.mark.parametrize("start", [0.01, 1000.0])
def test_a_search_may_start_at_a_bound(start):
    assert minimise(smooth(1), start, STRENGTH, budget=1).best.parameter == (start,)


@pytest.mark.parametrize("name", list(searches))
def test_every_method_says_what_it_does(name):
    assert searches[name].__doc__
    assert all(field.description for field in searches.schema(name).model_fields.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "found the lower bound 0, expected one above 0"),
        ((-1, 1), "found the lower bound -1, expected one above 0"),
        ((1, 1), "found the bounds 1 and 1, expected two finite numbers"),
        ((2, 1), "found the bounds 2 and 1, expected two finite numbers, the lower one first"),
        ((1, math.inf), "found the bounds 1 and inf"),
        ((math.nan, 1), "found the bounds nan and 1"),
        ((1, 2, "cubic"), "found the scale 'cubic', expected 'log' or 'linear'"),
        ((1, 2.5, "log", True), "found the bounds 1 and 2.5, expected whole numbers"),
        ((1, 2, "log", False, 0), "found 0 parameters"),
    ],
)
def test_a_space_that_is_none_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Space(*arguments)


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        (0.001, {}, "found the start 0.001, expected one from 0.01 to 1000"),
        (math.nan, {}, "found the start nan"),
        ([1, 2], {}, r"found a start of shape \[2\], expected 1 numbers or one for all"),
        ([1, 2], {"space": replace(STRENGTH, size=3)}, r"found a start of shape \[2\], expected 3 numbers"),
        (
            [0.01, 1000, 2000],
            {"space": replace(STRENGTH, size=3)},
            "found the start 2000, expected one from 0.01 to 1000",
        ),
        (1, {"method": "adaptiv"}, "no search method 'adaptiv'; did you mean 'adaptive'?"),
        (1, {"parameters": {"raduis": 1}}, "no key 'raduis'; did you mean 'radius'?"),
        (1, {"parameters": {"radius": 0}}, "'radius': found 0, expected a number above 0"),
        (1, {"budget": 0}, "found a budget of 0"),
        (1, {"tolerance": math.nan}, "a tolerance of nan"),
        (1, {"seed": -1}, "the seed -1"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_it_begins(tmp_path, start, options, message):
    box = Box(smooth(1))
    with pytest.raises(InputError, match=message):
        minimise(box, start, **{"space": STRENGTH, "trace": tmp_path / "trace.jsonl"} | options)
    assert box.calls == []
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told():
    heard = []
    found = minimise(smooth(1), 1.0, STRENGTH, budget=5, progress=lambda *what: heard.append(what))
    assert heard == [("searching", number, 5) for number in range(1, len(found.evaluations) + 1)]
