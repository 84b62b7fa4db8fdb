"""The tables that a terminal shows, made with Rich."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from ecoprompt.results import (
    ARROWS,
    chosen_columns,
    cost_cells_of,
    gate_cells,
    grids_of,
    heading_of,
    legend_of,
    number,
    seconds_of,
    title_of,
    with_error,
)

if TYPE_CHECKING:
    from ecoprompt.zeroth import Evaluation

WORD = 14
"""Letters of a heading's word on one line."""
NAME = 16
"""The least letters of a run's name on one line, where the columns do not fit beside the whole of it."""


@dataclass(frozen=True)
class RunsTable:
    """The runs as rows and metrics as columns, in as many parts below each other as the terminal's width asks for.

    Standard errors stand beside the values where they ask for no more room.
    """

    summary: Mapping[str, Any]
    columns: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        runs = self.summary["runs"]
        plain, with_errors = self._columns(errors=False), self._columns(errors=True)
        widths = _widths(plain)
        names = ["run", *runs]
        longest = max(map(cell_len, names))
        # As few parts as names on several lines allow, then names on as few lines as these parts allow.
        rooms = range(min(NAME, longest), longest + 1)
        room = max(rooms, key=lambda room: (-len(_parts(widths, options.max_width - room)), room))
        parts, wider = (_parts(one, options.max_width - room) for one in (widths, _widths(with_errors)))
        fit = with_errors != plain and len(wider) == len(parts)
        columns = with_errors if fit else plain
        yield Text(title_of(self.summary), style="table.title")
        for number_of_part, part in enumerate(wider if fit else parts):
            cells = zip(names, *(columns[place] for place in part), strict=True)
            yield from [Text("")] * (number_of_part > 0)
            yield plain_table(list(cells), room)
        legend = [legend_of(self.summary, self.columns), "± standard error" if fit else None]
        yield Text(", ".join(filter(None, legend)), style="table.caption")

    def _columns(self, errors: bool) -> list[list[str]]:
        runs = self.summary["runs"].values()
        columns = [self._column(name, errors) for name in self.columns]
        timed = any(run.get("seconds") is not None for run in runs)
        return [*columns, ["seconds", *map(seconds_of, runs)]] if timed else columns

    def _column(self, name: str, errors: bool) -> list[str]:
        """The heading of a metric, a word a line, and its cells."""
        *words, last = [part for word in heading_of(self.summary, name).split() for part in textwrap.wrap(word, WORD)]
        if words and last in ARROWS.values():
            last = f"{words.pop()} {last}"
        runs = self.summary["runs"].values()
        values = (
            with_error(run, name).replace(" ", "") if errors else number(run["metrics"].get(name)) for run in runs
        )
        return ["\n".join([*words, last]), *values]


def _widths(columns: Sequence[Sequence[str]]) -> list[int]:
    return [2 + max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """The places of columns, those that fit beside each other together."""
    parts: list[list[int]] = []
    left = 0
    for place, width in enumerate(widths):
        if width > left or not parts:
            parts.append([])
            left = room
        parts[-1].append(place)
        left -= width
    return parts


def table(summary: Mapping[str, Any]) -> RunsTable:
    """The runs as rows and the chosen metrics as columns, for the terminal."""
    return RunsTable(summary, chosen_columns(summary))


def plain_table(cells: Sequence[Sequence[str]], room: int | None = None, title: str = "") -> Table:
    """A table, its head first; its first column is folded to `room` letters, or what is left, and no other is cut."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    if title:
        shown.title, shown.title_justify = Text(title), "left"
    # Text, not str: a run may be called eco[corruption.strength=5], which Rich would take for markup.
    head, *rows = cells
    shown.add_column(Text(head[0]), overflow="fold", width=room)
    for heading in head[1:]:
        shown.add_column(Text(heading), justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def side_by_side(prompts: Sequence[str], answers: Mapping[str, Sequence[str]], targets: Sequence[str]) -> Table:
    """Each prompt with the true answer and the answer of every run below it, for the terminal."""
    shown = Table(box=box.SIMPLE, show_header=False)
    shown.add_column(max_width=2 * NAME, overflow="fold", style="dim")
    shown.add_column(overflow="fold")
    for index, prompt in enumerate(prompts):
        shown.add_row("prompt", Text(prompt, style="bold"))
        shown.add_row("true answer", Text(targets[index]))
        for run, texts in answers.items():
            shown.add_row(Text(run), Text(texts[index].strip() or "(nothing)"))
        shown.add_section()
    return shown


def gate_table(measured: Sequence[Mapping[str, Any]], threshold: float) -> Table:
    """How often a gate errs on each of its data sets, for the terminal."""
    head, *rows = gate_cells(measured)
    return plain_table([_folded(head, rows), *rows], title=f"gate, threshold {threshold:.4g}")


def cost_tables(summary: Mapping[str, Any]) -> list[Table]:
    """What the training of the runs' models cost, for the terminal; no table where none was trained."""
    cells = cost_cells_of(summary)
    return [plain_table(cells)] if cells else []


def grid_tables(summary: Mapping[str, Any]) -> list[Table]:
    """For each run and benchmark under pressure, tables of kinds and at most six sets with the gate's error rates."""
    shown = []
    for run, title, whole in grids_of(summary):
        for first in range(1, len(whole[0]), 6):
            head, *rows = ([row[0], *row[first : first + 6]] for row in whole)
            shown.append(plain_table([_folded(head, rows), *rows], title=f"{run}: {title}"))
    return shown


def _folded(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The headings on as many lines as the columns below them are narrow; no word is broken."""
    widths = [max(map(cell_len, column), default=0) for column in zip(*rows, strict=True)] or [0] * len(head)
    folded = [
        "\n".join(textwrap.wrap(heading, max(width, 1), break_long_words=False))
        for heading, width in zip(head, widths, strict=True)
    ]
    return [head[0], *folded[1:]]


def comparison_tables(compared: Mapping[str, Any]) -> list[RenderableType]:
    """For each run of both evaluations its metrics side by side, with the difference, its interval and its p-value."""
    shown: list[RenderableType] = [Text(f"A: {compared['a']}\nB: {compared['b']}")]
    for run, metrics in compared["runs"].items():
        cells = [["metric", "A", "B", "B - A", "95 % interval", "p", "rows"]]
        for name, found in metrics.items():
            low_high = found["interval"]
            interval = "–" if low_high is None else " to ".join(map(number, low_high))
            values = [number(found[key]) for key in ("a", "b", "difference")]
            cells.append([heading_of(compared, name), *values, interval, number(found["p"]), number(found["rows"])])
        shown.append(plain_table(cells, title=f"\n{run}"))
    legend = legend_of(compared, list(compared["better"]))
    tested = "p: paired t-test over the rows that both were asked, for each metric alone"
    rows, apart = compared["rows"], None
    if rows["a_alone"] or rows["b_alone"]:
        apart = f"rows asked in both: {rows['both']}, in A alone: {rows['a_alone']}, in B alone: {rows['b_alone']}"
    return [*shown, Text("\n".join(filter(None, [apart, legend, tested])), style="table.caption")]


def search_table(evaluations: Sequence[Evaluation], best: Evaluation, metric: str, target: float) -> Table:
    """The evaluations of a search in their order, the best one marked, for the terminal."""
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
    return plain_table(cells)
