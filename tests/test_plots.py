"""What the plots of results show, read off the figures themselves."""

from __future__ import annotations

import math
import sys
from xml.etree import ElementTree

import pytest

from ecoprompt.plots import draw, lines_of, rendered, write_plots

pytest.importorskip("matplotlib")


def swept(*pairs, **others):
    """A summary with (strength, forget, utility) as the points of a sweep, and (forget, utility) of other runs."""
    runs = {name: {"metrics": {"forget": forget, "kept": kept}} for name, (forget, kept) in others.items()}
    for strength, forget, kept in pairs:
        point = {"base": "eco", "point": {"corruption.strength": str(strength)}}
        runs[f"eco at {strength}"] = point | {"metrics": {"forget": forget, "kept": kept}}
    return {"runs": runs, "better": {"forget": "closer to retain", "kept": "higher"}}


def data(line):
    return [tuple(point) for point in line.get_xydata().tolist()]


def drawn(axes):
    """The points of all lines that have any."""
    return [found for found in map(data, axes.get_lines()) if found]


def test_runs_are_on_lines_by_what_is_swept():
    points = [{"corruption.strength": "5", "seed": "1"}, {"corruption.strength": "7", "seed": "1"}]
    points += [{"corruption": f"zero_out_top_k dims={dims}"} for dims in ("25%", "2")] + [{"model": "a,b[=c]"}]
    runs = {"retain": {}} | {str(point): {"base": "eco", "point": point} for point in points}
    found = [(line.name, line.key, len(line.runs), line.values) for line in lines_of(runs)]
    assert found == [
        ("retain", None, 1, [""]),
        ("eco: 1", "corruption.strength", 2, ["5", "7"]),
        ("eco: zero_out_top_k", None, 2, ["", ""]),
        ("eco: a,b[=c]", None, 1, [""]),
    ]


def test_the_tradeoff_has_a_point_a_run_and_joins_a_sweep():
    summary = swept((1, 0.9, 0.5), (10, 0.2, 0.4), retain=(0.25, 0.5), original=(1.0, None))
    figure = draw(summary)
    tradeoff, forget, kept = figure.axes
    assert drawn(tradeoff)[0] == [(0.25, 0.5)]
    assert math.isnan(drawn(tradeoff)[1][0][1])
    assert drawn(tradeoff)[2] == [(0.9, 0.5), (0.2, 0.4)]
    assert [text.get_text() for text in tradeoff.texts] == ["1", "10"]
    assert (tradeoff.get_xlabel(), tradeoff.get_ylabel()) == ("forget ≈", "kept ↑")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["retain", "original", "eco"]
    assert drawn(forget) == [[(0, 0.25), (1, 0.25)], [(0, 1.0), (1, 1.0)], [(1, 0.9), (10, 0.2)]]
    assert [line.get_linestyle() for line in forget.get_lines()[:3]] == ["--", ":", "-"]
    assert drawn(kept)[-1] == [(1, 0.5), (10, 0.4)]
    assert {axes.get_xscale() for axes in (forget, kept)} == {"log"}


def test_a_curve_is_drawn_in_the_order_of_its_numbers_on_the_axis_that_suits_them():
    figure = draw(swept((4, 1e-9, 12.0), (3, 0.5, 3.0)))
    _, forget, kept = figure.axes
    assert drawn(kept)[-1] == [(3, 3.0), (4, 12.0)]
    assert (forget.get_xscale(), forget.get_yscale(), kept.get_yscale()) == ("linear", "log", "linear")
    assert kept.get_ylim()[1] > 12


def test_the_columns_are_those_that_the_summary_names():
    summary = swept(retain=(0.1, 0.2), eco=(0.3, 0.4))
    (axes,) = draw({**summary, "tradeoff": ["kept", "forget"]}).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("kept ↑", "forget ≈")
    assert axes.get_xlim() == axes.get_ylim() == (-0.08, 1.08)


@pytest.mark.parametrize("runs", [{}, {"retain": (None, None)}, {"retain": (0.5, None), "eco": (0.5, math.nan)}])
def test_there_is_no_plot_of_nothing(tmp_path, runs):
    assert write_plots(tmp_path, swept(**runs)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_of_one_metric_is_a_curve_alone():
    (axes,) = draw(swept((1, 0.9, None), (2, 0.5, None))).axes
    assert drawn(axes) == [[(1, 0.9), (2, 0.5)]]


def test_it_is_written_as_png_and_svg_whatever_the_runs_are_called(tmp_path):
    summary = swept(**{"漢 $x_$": (0.5, 0.5), "_<script>&": (0.1, 0.2), "--><b>": (0.1, 0.3)})
    loaded = "matplotlib.pyplot" in sys.modules  # which keeps every figure
    png, svg = write_plots(tmp_path, summary)
    assert png.read_bytes().startswith(b"\x89PNG")
    texts = [node.text for node in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"漢 $x_$", "_<script>&", "--><b>", "forget ≈"} <= set(texts)
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    assert rendered(draw(summary), "svg") == svg.read_bytes()


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_plots(tmp_path, swept(eco=(0.1, 0.2))) == []
