"""The report of an evaluation: one HTML page that holds all it shows, runs no script and asks for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecoprompt.files import write_text_atomic
from ecoprompt.plots import draw, rendered
from ecoprompt.processes import is_main
from ecoprompt.results import (
    cells_of,
    error_rate,
    full_cells_of,
    grids_of,
    legend_of,
    number,
    paired_cells_of,
    title_of,
)

TEMPLATE = "report.html"
FORGOTTEN, OTHERS = 8, 4
"""Rows of the forget set and others that are shown as examples."""


@dataclass(frozen=True)
class Example:
    """A row with what came of it in each run."""

    prompt: str
    target: str
    answers: dict[str, Mapping[str, Any]]


def examples(rows: Iterable[Mapping[str, Any]], count: int) -> list[Example]:
    """At most `count` of the rows that were asked, spread over them, each with what came of it in every run."""
    found: dict[tuple[Any, ...], Example] = {}
    for row in rows:
        place = row["benchmark"], row["subset"], row["index"]
        found.setdefault(place, Example(row["prompt"], row["target"], {})).answers[row["run"]] = row
    return list(found.values())[:: max(1, len(found) // count)][:count]


def said(row: Mapping[str, Any]) -> str:
    """What a run answered and, where it is known, what its corrupted tokens look like; without an answer the values of
    the row's metrics."""
    if "generation" in row:
        nearest = ", ".join(f"{own.strip()} → {near.strip()}" for own, near in row.get("nearest", ()) if own != near)
        return (row["generation"].strip() or "(nothing)") + (f"\n(nearest tokens: {nearest})" if nearest else "")
    return ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in row["values"].items())


def write_report(folder: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write report.html: plot, tables, the gate's errors, examples and settings; the file that is written.

    Of the processes of a launcher, the main one alone makes it.
    """
    path = folder / TEMPLATE
    if is_main():
        write_text_atomic(path, page(summary, rows))
    return path


def page(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The report as HTML; whatever data, recipe and models say is text in it."""
    import tomli_w
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("ecoprompt", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    forgotten = [row for row in rows if row["forget"]]
    others = [row for row in rows if not row["forget"]]
    return environment.get_template(TEMPLATE).render(
        title=title_of(summary),
        legend=legend_of(summary, list(summary["better"])),
        plot=_svg(summary),
        cells=cells_of(summary),
        full=full_cells_of(summary),
        paired=paired_cells_of(summary),
        gate=_gate_cells(summary),
        grids=list(grids_of(summary)),
        examples=examples(forgotten, FORGOTTEN) + examples(others, OTHERS),
        said=said,
        recipe=tomli_w.dumps(summary["resolved"]),
        versions=summary["versions"],
        hardware=summary["hardware"],
    )


def _svg(summary: Mapping[str, Any]) -> str | None:
    """The plot as an element of a page: what matplotlib writes, which escapes all text, without its XML heading."""
    figure = draw(summary)
    if figure is None:
        return None
    text = rendered(figure, "svg").decode()
    return text[text.index("<svg") :]


def _gate_cells(summary: Mapping[str, Any]) -> list[list[str]]:
    """How often the gate of each guarded run erred on the rows that were evaluated, with 95 % intervals."""
    cells = [["run", "threshold", "missed", "95 % interval", "falsely flagged", "95 % interval"]]
    for run, entry in summary["runs"].items():
        gate = entry.get("gate")
        if gate:
            missed = _rate(gate["false_negatives"], gate["forget_prompts"])
            cells.append(
                [run, f"{gate['threshold']:.4g}", *missed, *_rate(gate["false_positives"], gate["other_prompts"])]
            )
    return cells


def _rate(errors: int, prompts: int) -> list[str]:
    _, low, high = error_rate(errors, prompts)
    return [f"{errors} of {prompts}", f"{low:.2%} to {high:.2%}" if prompts else "–"]
