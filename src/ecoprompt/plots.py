"""The plots of results, drawn where matplotlib (extra `plot`) is installed."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoprompt.files import write_bytes_atomic
from ecoprompt.processes import is_main
from ecoprompt.results import RETAIN, chosen_columns, heading_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ecoprompt.zeroth import Evaluation

MARKED = 12
"""Points of a line that are told apart by their values."""
LONGEST = 80
"""Letters of the legend that fit beside each other."""


@dataclass
class Line:
    """Runs that a plot joins: one alone, or the points of a sweep; `key` is what is swept, `values` where in words."""

    name: str
    key: str | None = None
    runs: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    style: dict[str, Any] = field(default_factory=dict)


def lines_of(runs: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """The lines that runs are on: at the point {"corruption.strength": "5"}, `eco` is at 5 on its line over that key.

    What else is swept names the line: a number as it is, a table by what it is (`corruption=zero_out_top_k dims=2`).
    """
    lines: dict[tuple[str, str | None], Line] = {}
    for run, entry in runs.items():
        name, swept = entry.get("base", run), entry.get("point", {})
        key = next((key for key, value in swept.items() if _is_number(value)), None)
        others = [value if _is_number(value) else value.split()[0] for other, value in swept.items() if other != key]
        named = f"{name}: {', '.join(others)}" if others else name
        line = lines.setdefault((named, key), Line(named, key))
        line.runs.append(run)
        line.values.append(swept[key] if key else "")
    for number, line in enumerate(lines.values()):
        ring = {"fillstyle": "none", "markersize": 9, "markeredgewidth": 2, "linestyle": "none", "zorder": 3}
        marker = "os^DvPX"[number // 10 % 7]
        line.style = {"color": f"C{number % 10}", "marker": marker} | (ring if len(line.runs) == 1 else {})
    return list(lines.values())


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def write_plots(folder: Path, summary: Mapping[str, Any]) -> list[Path]:
    """Write plot.png and plot.svg, and return their paths: none without matplotlib, or without numbers to show.

    Of the processes of a launcher, the main one alone draws.
    """
    figure = draw(summary) if is_main() else None
    if figure is None:
        return []
    paths = [folder / "plot.png", folder / "plot.svg"]
    for path in paths:
        write_bytes_atomic(path, rendered(figure, path.suffix[1:]))
    return paths


def draw(summary: Mapping[str, Any]) -> Figure | None:
    """What is left against what is forgotten, one point a run; below, both over each number that a sweep changes.

    `summary["tradeoff"]` names the two metrics; without, they are the first two that the tables show. None without
    matplotlib, or without numbers to show.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    runs = list(summary["runs"])
    chosen = summary.get("tradeoff") or chosen_columns(summary)[:2]
    shown = [name for name in chosen if not all(map(math.isnan, _values(summary, name, runs)))]
    lines = lines_of(summary["runs"])
    swept = [key for key in dict.fromkeys(line.key for line in lines if len(line.runs) > 1) if key]
    rows = [["tradeoff"] * 2] * (len(shown) == 2) + [[f"{key}/{name}" for name in shown] for key in swept if shown]
    if not rows:
        return None
    names = [line.name if len(line.name) <= LONGEST else f"{line.name[: LONGEST - 1]}…" for line in lines]
    beside = max(1, min(4, LONGEST // (max(map(len, names)) + 7)))
    figure = Figure(figsize=(7, 0.8 + 3 * len(rows) + 0.22 * -(-len(names) // beside)), layout="constrained")
    panels: dict[str, Axes] = figure.subplot_mosaic([row if len(row) == 2 else row * 2 for row in rows])
    if len(shown) == 2:
        _draw_tradeoff(panels["tradeoff"], summary, lines, *shown)
    for key in swept:
        for name in shown:
            _draw_curve(panels[f"{key}/{name}"], summary, lines, key, name)
    handles = [panels[rows[0][0]].plot([], [], **line.style)[0] for line in lines]
    legend = figure.legend(handles, names, loc="outside lower center", ncols=beside)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a run's name is no mathematics
    return figure


def _values(summary: Mapping[str, Any], column: str, runs: Sequence[str]) -> list[float]:
    found = [summary["runs"][run]["metrics"].get(column) for run in runs]
    return [math.nan if value is None or not math.isfinite(value) else float(value) for value in found]


def _draw_tradeoff(axes: Axes, summary: Mapping[str, Any], lines: Sequence[Line], forget: str, other: str) -> None:
    """One point a run, those of a sweep joined and marked with where they are."""
    for line in lines:
        xs, ys = (_values(summary, name, line.runs) for name in (forget, other))
        axes.plot(xs, ys, **line.style)
        places: dict[tuple[float, float], list[str]] = {}
        for x, y, value in zip(xs, ys, line.values, strict=True) if 1 < len(line.runs) <= MARKED else ():
            places.setdefault((x, y), []).append(value)
        for place, values in places.items():
            if not math.isnan(sum(place)):
                text = ", ".join(values)
                axes.annotate(text, place, textcoords="offset points", xytext=(5, 5), size=8, parse_math=False)
    _set_axis(axes, "x", summary, forget)
    _set_axis(axes, "y", summary, other)
    axes.grid(alpha=0.3)


def _draw_curve(axes: Axes, summary: Mapping[str, Any], lines: Sequence[Line], key: str, name: str) -> None:
    """A metric over the number under `key`; what is not swept is a line across, of the retain run a dashed one."""
    for line in lines:
        values = _values(summary, name, line.runs)
        if line.key == key:
            points = sorted(zip(map(float, line.values), values, strict=True))
            axes.plot(*zip(*points, strict=True), **line.style)
        elif len(values) == 1:
            axes.axhline(values[0], color=line.style["color"], linestyle="--" if line.name == RETAIN else ":")
    numbers = [float(value) for line in lines if line.key == key for value in line.values]
    if 0 < min(numbers) * 10 <= max(numbers):
        axes.set_xscale("log")
    axes.set_xlabel(key, parse_math=False)
    _set_axis(axes, "y", summary, name)
    axes.grid(alpha=0.3)


def _set_axis(axes: Axes, which: str, summary: Mapping[str, Any], name: str) -> None:
    """The scale of a metric: from 0 to 1 if all its values are there, logarithmic if some are far below the largest."""
    values = [value for value in _values(summary, name, list(summary["runs"])) if not math.isnan(value)]
    if 0 < min(values) * 1000 < max(values):
        axes.set(**{f"{which}scale": "log"})
    elif min(values) >= 0 and max(values) <= 1:
        axes.set(**{f"{which}lim": (-0.08, 1.08)})
    getattr(axes, f"set_{which}label")(heading_of(summary, name), parse_math=False)


def draw_search(evaluations: Sequence[Evaluation], best: Evaluation, scale: str, parameter: str, metric: str) -> Figure:
    """The distance from the target over the parameter, with the search's path.

    Of a vector, its geometric mean stands for it.
    """
    from matplotlib.figure import Figure

    values = [math.exp(sum(map(math.log, one.parameter)) / len(one.parameter)) for one in evaluations]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    order = sorted(range(len(values)), key=values.__getitem__)
    axes.plot([values[k] for k in order], [evaluations[k].objective for k in order], "-", color="tab:blue", alpha=0.4)
    axes.scatter(values, [one.objective for one in evaluations], c=range(len(values)), cmap="viridis", zorder=3)
    for value, one in zip(values, evaluations, strict=True):
        axes.annotate(str(one.number), (value, one.objective), textcoords="offset points", xytext=(4, 4), size=8)
    found = values[evaluations.index(best)]
    axes.plot(found, best.objective, "o", mfc="none", mec="tab:red", ms=12, label=f"{found:.4g}")
    axes.set_xscale(scale)
    axes.set_xlabel(parameter, parse_math=False)
    axes.set_ylabel(metric, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def rendered(figure: Figure, kind: str = "png") -> bytes:
    """A matplotlib figure as a file of the kind "png" or "svg", the latter with its text as text."""
    from matplotlib import rc_context

    file = io.BytesIO()
    plain = {"svg.fonttype": "none", "svg.hashsalt": "ecoprompt"}
    with rc_context(plain), warnings.catch_warnings():
        # A run's name may hold letters that the font lacks; the plot shows boxes in their place.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, format=kind, metadata={"Date": None, "Creator": None} if kind == "svg" else None)
    return file.getvalue()
