"""Results found by content, and the tables, files and plots that show them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

ARROWS = {"higher": "↑", "lower": "↓", "closer to retain": "≈"}


class Store:
    """Values by key in a file of JSON lines that several processes may append to and that survives being killed.

    A line that was cut off is passed over; of several values of a key the last one counts. What other
    processes append after the file was opened is not seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = dict(_records(path.read_bytes())) if path.exists() else {}

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Any:
        """The value under key `name`, None if there is none."""
        return self._values.get(name)

    def put_many(self, pairs: Sequence[tuple[str, Any]]) -> None:
        """Append all (key, value) in one write, so that being killed tears at most the last of them."""
        if not pairs:
            return
        lines = [json.dumps({"key": name, "value": value}, separators=(",", ":")) + "\n" for name, value in pairs]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            left = memoryview(_torn(file) + "".join(lines).encode())
            while left:
                left = left[file.write(left) :]
        self._values.update(pairs)


def _records(raw: bytes) -> Iterable[tuple[str, Any]]:
    for line in raw.split(b"\n"):
        try:
            record = json.loads(line)
            yield record["key"], record["value"]
        except (ValueError, TypeError, KeyError):
            continue


def _torn(file: io.FileIO) -> bytes:
    """The line end that is owed to a last line which a killed process left unfinished."""
    if file.seek(0, os.SEEK_END) == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def key(**parts: Any) -> str:
    """SHA-256, in hexadecimal, of what determines a result, as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader finds the old file or the new one, whole, whenever the writer is killed."""
    _write_atomic(path, text.encode())


def _write_atomic(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def to_json(document: Any, indent: int | None = 2) -> str:
    """`document` as strict JSON: numbers that JSON cannot hold become null, numpy's become plain, paths text."""
    return json.dumps(_plain(document), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def number(value: Any) -> str:
    """A result as people read it: 3 decimals, scientific below 0.001 and from 100,000 on, "–" for none."""
    if value is None:
        return "–"
    if isinstance(value, (str, bool, int)) or not math.isfinite(value):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.001 or abs(value) >= 1e5 else f"{value:.3f}"


def write_results(folder: Path, summary: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Write table.csv, table.md, summary.json, rows.jsonl and, where matplotlib is installed, plot.png; their paths.

    `summary["runs"]` maps a run to its `metrics`, `seconds` and `gate`. Two keys are optional: `columns`, the
    metrics that the short tables show, and `better`, the direction of each metric.
    """
    texts = {
        "table.csv": _csv(summary),
        "table.md": _markdown(summary),
        "summary.json": to_json(summary) + "\n",
        "rows.jsonl": "".join(to_json(row, indent=None) + "\n" for row in rows),
    }
    for name, text in texts.items():
        write_text_atomic(folder / name, text)
    plot = _plot(summary)
    if plot is not None:
        _write_atomic(folder / "plot.png", plot)
    return [folder / name for name in (*texts, *(["plot.png"] if plot is not None else []))]


def table(summary: Mapping[str, Any], columns: Sequence[str] | None = None) -> Table:
    """The runs as rows and the chosen metrics (default: `summary["columns"]`) as columns, for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    chosen = list(columns or _chosen(summary))
    runs = summary["runs"]
    timed = any(run.get("seconds") is not None for run in runs.values())
    # Text, not str: a run may be called eco[corruption.strength=5], which Rich would take for markup.
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.title, shown.caption = Text(_title(summary)), _legend(summary, chosen)
    shown.title_justify = shown.caption_justify = "left"
    shown.add_column("run", overflow="fold")
    for name in chosen:
        # One word a line and no wrapping: only names of runs are ever folded to fit the terminal, no number is cut.
        shown.add_column(Text(_heading(summary, name, gap="\n")), justify="right", no_wrap=True)
    if timed:
        shown.add_column("seconds", justify="right", no_wrap=True)
    for name, run in runs.items():
        seconds = [_seconds(run)] if timed else []
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

    shown = Table(title=f"gate, threshold {threshold:.4g}", title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("prompts of")
    for heading in ("prompts", "missed", "falsely flagged", "rate"):
        shown.add_column(heading, justify="right")
    for entry in measured:
        errors, prompts = entry["errors"], entry["prompts"]
        missed, alarms = (str(errors), "") if entry["flag"] else ("", str(errors))
        shown.add_row(entry["data"], str(prompts), missed, alarms, f"{errors / prompts:.2%}" if prompts else "–")
    return shown


def grid_tables(summary: Mapping[str, Any]) -> list[Table]:
    """For each run and benchmark under pressure, tables of kinds and at most six sets with the gate's error rates."""
    shown = []
    for run, title, whole in _grids(summary):
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
    for number, heading in enumerate(cells[0]):
        shown.add_column(Text(heading.replace(" ", "\n")), justify="right" if number else "left", no_wrap=True)
    for row in cells[1:]:
        shown.add_row(*map(Text, row))
    return shown


def grid(subsets: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The column of the first metric of each subset, by the pressures it is put under; "none" is the first of these."""
    found: dict[str, dict[str, str]] = {}
    for name, subset in subsets.items():
        if subset.pressure is None:
            kinds = {"none": name} | {kind: f"{name}_{kind}" for kind in subset.pressures}
            found[name] = {kind: f"{full}_{next(iter(subset.metrics))}" for kind, full in kinds.items()}
    return found


def count_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many rows of each benchmark's subsets each run was asked."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["run"] == rows[0]["run"]:
            of = counts.setdefault(row["benchmark"], {})
            of[row["subset"]] = of.get(row["subset"], 0) + 1
    return counts


def _grids(summary: Mapping[str, Any]) -> Iterable[tuple[str, str, list[list[str]]]]:
    """(run, title, cells) of each benchmark under pressure that a guarded run was evaluated on."""
    for benchmark, sets in summary.get("grids", {}).items():
        kinds = list(dict.fromkeys(kind for columns in sets.values() for kind in columns))
        for run, entry in summary["runs"].items():
            if not entry.get("gate"):
                continue
            head = ["pressure", *(name.replace("_", " ") for name in sets)]
            rows = [
                [kind.replace("_", " "), *(_rate(entry["metrics"].get(sets[name].get(kind, ""))) for name in sets)]
                for kind in kinds
            ]
            counts = summary.get("rows", {}).get(benchmark, {})
            prompts = ["prompts", *(str(counts.get(name, "–")) for name in sets)]
            yield run, f"{benchmark}, missed (forget) or falsely flagged (others), %", [head, *rows, prompts]


def _rate(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"


def _title(summary: Mapping[str, Any]) -> str:
    return ": ".join(str(summary[part]) for part in ("recipe", "forget") if summary.get(part))


def _legend(summary: Mapping[str, Any], chosen: Sequence[str]) -> str | None:
    words = {"higher": "higher is better", "lower": "lower is better", "closer to retain": "closer to retain is better"}
    present = {summary.get("better", {}).get(name) for name in chosen}
    return ", ".join(f"{ARROWS[way]} {words[way]}" for way in ARROWS if way in present) or None


def _heading(summary: Mapping[str, Any], name: str, gap: str = " ") -> str:
    """`name` in words, with the arrow of its direction."""
    arrow = ARROWS.get(summary.get("better", {}).get(name, ""))
    return name.replace("_", gap) + (f" {arrow}" if arrow else "")


def _every(summary: Mapping[str, Any]) -> list[str]:
    """All metrics of all runs, each once, in their order."""
    return list(dict.fromkeys(name for run in summary["runs"].values() for name in run["metrics"]))


def _chosen(summary: Mapping[str, Any]) -> list[str]:
    every = _every(summary)
    return [name for name in summary.get("columns") or every if name in every]


def _gate_columns(summary: Mapping[str, Any]) -> list[str]:
    gates = [run.get("gate") or {} for run in summary["runs"].values()]
    names = dict.fromkeys(name for gate in gates for name in gate)
    return [name for name in names if any(isinstance(gate.get(name), (int, float)) for gate in gates)]


def _seconds(run: Mapping[str, Any]) -> str:
    return "–" if run.get("seconds") is None else f"{run['seconds']:.1f}"


def _csv(summary: Mapping[str, Any]) -> str:
    """All metrics, unrounded, one run a row."""
    every, gate_columns = _every(summary), _gate_columns(summary)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", *every, *(f"gate_{name}" for name in gate_columns), "seconds"])
    for name, run in summary["runs"].items():
        gate = run.get("gate") or {}
        cells = [*(run["metrics"].get(column) for column in every), *(gate.get(column) for column in gate_columns)]
        writer.writerow([name, *cells, run.get("seconds")])
    return file.getvalue()


def _markdown(summary: Mapping[str, Any]) -> str:
    """The table of the terminal, and below it all metrics with the runs as columns."""
    runs, chosen = summary["runs"], _chosen(summary)
    short = [["run", *(_heading(summary, name) for name in chosen), "seconds"]]
    for name, run in runs.items():
        short.append([name, *(number(run["metrics"].get(column)) for column in chosen), _seconds(run)])
    full = [["metric", *runs]]
    for name in _every(summary):
        full.append([_heading(summary, name), *(number(run["metrics"].get(name)) for run in runs.values())])
    for name in _gate_columns(summary):
        full.append(
            [f"gate: {name.replace('_', ' ')}", *(number((r.get("gate") or {}).get(name)) for r in runs.values())]
        )
    legend = _legend(summary, _every(summary))
    grids = [part for run, title, cells in _grids(summary) for part in (f"{run}: {title}", _markdown_table(cells))]
    parts = [f"# {_title(summary)}", _markdown_table(short), *grids, _markdown_table(full), legend or ""]
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown_table(cells: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def _plot(summary: Mapping[str, Any]) -> bytes | None:
    """PNG with one panel a chosen metric and one point a run; None without matplotlib or without a number to show."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None

    runs = summary["runs"]
    panels = {name: [_coordinate(run["metrics"].get(name)) for run in runs.values()] for name in _chosen(summary)[:4]}
    panels = {name: points for name, points in panels.items() if not all(map(math.isnan, points))}
    if not panels:
        return None
    figure = Figure(figsize=(2.5 + 2.6 * len(panels), 1.4 + 0.3 * len(runs)), layout="constrained")
    for axes, (name, points) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        axes.plot(points, range(len(runs)), "o", color="tab:blue")
        finite = [point for point in points if not math.isnan(point)]
        if 0 < min(finite) < 0.001:
            axes.set_xscale("log")
        elif min(finite) >= 0 and max(finite) <= 1:
            axes.set_xlim(-0.05, 1.05)
        axes.set_title(_heading(summary, name), fontsize="small", parse_math=False)
        axes.set_yticks(range(len(runs)), list(runs), parse_math=False)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A run's name may hold letters that the font lacks; the plot shows boxes in their place.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, format="png")
    return file.getvalue()


def _coordinate(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)
