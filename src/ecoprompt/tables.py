"""The tables that a terminal shows, made with Rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ecoprompt.results import chosen_columns, gate_cells, grids_of, heading_of, legend_of, number, seconds_of, title_of

if TYPE_CHECKING:
    from rich.table import Table

    from ecoprompt.zeroth import Evaluation


def table(summary: Mapping[str, Any], columns: Sequence[str] | None = None) -> Table:
    """The runs as rows and the chosen metrics (default: `summary["columns"]`) as columns, for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    chosen = list(columns or chosen_columns(summary))
    runs = summary["runs"]
    timed = any(run.get("seconds") is not None for run in runs.values())
    # Text, not str: a run may be called eco[corruption.strength=5], which Rich would take for markup.
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.title, shown.caption = Text(title_of(summary)), legend_of(summary, chosen)
    shown.title_justify = shown.caption_justify = "left"
    shown.add_column("run", overflow="fold")
    for name in chosen:
        # One word a line and no wrapping: only names of runs are ever folded to fit the terminal, no number is cut.
        shown.add_column(Text(heading_of(summary, name, gap="\n")), justify="right", no_wrap=True)
    if timed:
        shown.add_column("seconds", justify="right", no_wrap=True)
    for name, run in runs.items():
        seconds = [seconds_of(run)] if timed else []
        shown.add_row(Text(name), *(number(run["metrics"].get(column)) for column in chosen), *seconds)
    return shown


def side_by_side(
    prompts: Sequence[str], answers: Mapping[str, Sequence[str]], targets: Sequence[str] | None = None
) -> Table:
    """Each prompt with the true answer (if given) and the answer of every run below it, for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE, show_header=False)
    shown.add_column(no_wrap=True, style="dim")
    shown.add_column(overflow="fold")
    for index, prompt in enumerate(prompts):
        shown.add_row("prompt", Text(prompt, style="bold"))
        if targets is not None:
            shown.add_row("true answer", Text(targets[index]))
        for run, texts in answers.items():
            shown.add_row(Text(run), Text(texts[index].strip() or "(nothing)"))
        shown.add_section()
    return shown


def gate_table(measured: Sequence[Mapping[str, Any]], threshold: float) -> Table:
    """How often a gate errs on each of its data sets, for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=f"gate, threshold {threshold:.4g}", title_justify="left", box=box.SIMPLE_HEAD)
    head, *rows = gate_cells(measured)
    shown.add_column(head[0], overflow="fold")
    for heading in head[1:]:
        shown.add_column(heading, justify="right")
    for name, *cells in rows:
        shown.add_row(Text(name), *cells)
    return shown


def grid_tables(summary: Mapping[str, Any]) -> list[Table]:
    """For each run and benchmark under pressure, tables of kinds and at most six sets with the gate's error rates."""
    shown = []
    for run, title, whole in grids_of(summary):
        for first in range(1, len(whole[0]), 6):
            cells = [[row[0], *row[first : first + 6]] for row in whole]
            shown.append(_grid_table(f"{run}: {title}", cells))
    return shown


def _grid_table(title: str, cells: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.title, shown.title_justify = Text(title), "left"
    for column, heading in enumerate(cells[0]):
        shown.add_column(Text(heading.replace(" ", "\n")), justify="right" if column else "left", no_wrap=True)
    for row in cells[1:]:
        shown.add_row(*map(Text, row))
    return shown


def search_table(evaluations: Sequence[Evaluation], best: Evaluation, metric: str, target: float) -> Table:
    """The evaluations of a search in their order, the best one marked, for the terminal."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.caption, shown.caption_justify = (
        f"target of {metric.replace('_', ' ')}: {number(target)}; * the nearest",
        "left",
    )
    for name in ("evaluation", "parameter", metric.replace("_", " "), "distance", "seconds"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in evaluations:
        values = " ".join(f"{value:.4g}" for value in one.parameter[:4]) + (" …" if len(one.parameter) > 4 else "")
        mark = f"{'* ' if one == best else ''}{one.number}"
        shown.add_row(mark, values, number(one.metric), number(one.objective), f"{one.seconds:.1f}")
    return shown


def training_table(made: Mapping[Any, Mapping[str, Any]]) -> Table:
    """Models that were trained, by their folders: how their losses moved, and what that cost, for the terminal."""
    cells = [["model", "steps", "first loss", "last loss", "seconds", "tokens", "memory MiB"]]
    for folder, about in made.items():
        losses = [f"{about[name]:.4g}" for name in ("first_loss", "last_loss")]
        costs = [f"{about['seconds']:.1f}", str(about["tokens"]), f"{about['peak_memory_mib']:.0f}"]
        cells.append([str(folder), str(about["steps"]), *losses, *costs])
    return _grid_table("", cells)
