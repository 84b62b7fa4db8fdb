"""Results found by content, and the files that show them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecoprompt.files import append_line, write_text_atomic
from ecoprompt.processes import from_main, is_main

RETAIN = "retain"
"""The run whose values the forget set's are compared with."""
ARROWS = {"higher": "↑", "lower": "↓", "closer to retain": "≈", "closer to chance": "~"}


class Store:
    """Values by key in a file of JSON lines that several processes may append to and that survives being killed.

    What is put in at once is one line, so it is there whole or not at all: a line that was cut off is passed over. Of
    several values of a key the last one counts. What other processes append after the file was opened is not seen.
    Of the processes of a launcher, the main one reads and writes the file for all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        for values, seconds in _records(from_main(lambda: path.read_bytes() if path.exists() else b"")):
            self._keep(values, seconds)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Any:
        """The value under key `name`, None if there is none."""
        return self._values.get(name)

    def seconds(self, name: str) -> float:
        """The share of `name` in the seconds that it took to make what was put in with it."""
        return self._seconds.get(name, 0.0)

    def put_many(self, pairs: Sequence[tuple[str, Any]], seconds: float = 0.0) -> None:
        """Append all (key, value), which took `seconds` to make, whole or, if the process is killed, not at all."""
        if not pairs:
            return
        values = dict(pairs)
        if is_main():
            append_line(self.path, json.dumps({"values": values, "seconds": seconds}, separators=(",", ":")))
        self._keep(values, seconds)

    def _keep(self, values: Mapping[str, Any], seconds: float) -> None:
        self._values.update(values)
        self._seconds.update(dict.fromkeys(values, seconds / len(values)))


def _records(raw: bytes) -> Iterable[tuple[dict[str, Any], float]]:
    for line in raw.split(b"\n"):
        try:
            record = json.loads(line)
            if record["values"]:
                yield dict(record["values"]), float(record["seconds"])
        except (ValueError, TypeError, KeyError):
            continue


def key(**parts: Any) -> str:
    """SHA-256, in hexadecimal, of what determines a result, as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
    """Write table.csv, table.md, summary.json and rows.jsonl; their paths.

    `summary["runs"]` maps a run to its `metrics`, `seconds` and `gate`. Two keys are optional: `columns`, the
    metrics that the short tables show, and `better`, the direction of each metric.
    """
    texts = {
        "table.csv": csv_table(summary),
        "table.md": _markdown(summary),
        "summary.json": to_json(summary) + "\n",
        "rows.jsonl": "".join(to_json(row, indent=None) + "\n" for row in rows),
    }
    for name, text in texts.items():
        write_text_atomic(folder / name, text)
    return [folder / name for name in texts]


def error_rate(errors: int, prompts: int) -> tuple[float, float, float]:
    """(rate, low, high): the share of errors and its exact 95 % interval (Clopper and Pearson, 1934); NaN of none."""
    from scipy.stats import binomtest

    if prompts == 0:
        return math.nan, math.nan, math.nan
    interval = binomtest(errors, prompts).proportion_ci()
    return errors / prompts, float(interval.low), float(interval.high)


def gate_report(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was measured of a gate, each set with the `rate` of its errors and the 95 % `interval` of that."""
    rates = [error_rate(entry["errors"], entry["prompts"]) for entry in measured]
    return [
        {**entry, "rate": rate, "interval": [low, high]}
        for entry, (rate, low, high) in zip(measured, rates, strict=True)
    ]


def gate_cells(measured: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A table of how often a gate errs on each of its data sets, its head first."""
    cells = [["prompts of", "prompts", "missed", "falsely flagged", "rate", "95 % interval"]]
    for entry in gate_report(measured):
        errors = str(entry["errors"])
        missed, alarms = (errors, "") if entry["flag"] else ("", errors)
        rate = (
            [f"{entry['rate']:.2%}", "{:.2%} to {:.2%}".format(*entry["interval"])] if entry["prompts"] else ["–"] * 2
        )
        cells.append([str(entry["data"]), str(entry["prompts"]), missed, alarms, *rate])
    return cells


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


def grids_of(summary: Mapping[str, Any]) -> Iterable[tuple[str, str, list[list[str]]]]:
    """(run, title, cells) of each benchmark under pressure that a guarded run was evaluated on."""
    for benchmark, sets in summary.get("grids", {}).items():
        kinds = list(dict.fromkeys(kind for columns in sets.values() for kind in columns))
        for run, entry in summary["runs"].items():
            if not entry.get("gate"):
                continue
            flagged = {name: columns["none"].endswith("_missed") for name, columns in sets.items()}
            head = ["pressure", *(f"{name.replace('_', ' ')}{' missed' * flagged[name]}" for name in sets)]
            rows = [
                [kind.replace("_", " "), *(_rate(entry["metrics"].get(sets[name].get(kind, ""))) for name in sets)]
                for kind in kinds
            ]
            counts = summary.get("rows", {}).get(benchmark, {})
            prompts = ["prompts", *(str(counts.get(name, "–")) for name in sets)]
            yield run, f"{benchmark}: falsely flagged, or where it says so missed, %", [head, *rows, prompts]


def _rate(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"


def title_of(summary: Mapping[str, Any]) -> str:
    return ": ".join(str(summary[part]) for part in ("recipe", "forget") if summary.get(part))


def legend_of(summary: Mapping[str, Any], chosen: Sequence[str]) -> str | None:
    present = {summary.get("better", {}).get(name) for name in chosen}
    return ", ".join(f"{ARROWS[way]} {way} is better" for way in ARROWS if way in present) or None


def heading_of(summary: Mapping[str, Any], name: str) -> str:
    """`name` in words, with the arrow of its direction."""
    arrow = ARROWS.get(summary.get("better", {}).get(name, ""))
    return name.replace("_", " ") + (f" {arrow}" if arrow else "")


def _every(summary: Mapping[str, Any]) -> list[str]:
    """All metrics of all runs, each once, in their order."""
    return list(dict.fromkeys(name for run in summary["runs"].values() for name in run["metrics"]))


def chosen_columns(summary: Mapping[str, Any]) -> list[str]:
    every = _every(summary)
    return [name for name in summary.get("columns") or every if name in every]


def _gate_columns(summary: Mapping[str, Any]) -> list[str]:
    gates = [run.get("gate") or {} for run in summary["runs"].values()]
    names = dict.fromkeys(name for gate in gates for name in gate)
    return [name for name in names if any(isinstance(gate.get(name), (int, float)) for gate in gates)]


def seconds_of(run: Mapping[str, Any]) -> str:
    return "–" if run.get("seconds") is None else f"{run['seconds']:.1f}"


def csv_table(summary: Mapping[str, Any]) -> str:
    """All metrics, unrounded, one run a row."""
    every, gate_columns = _every(summary), _gate_columns(summary)
    costs = list(dict.fromkeys(part for run in summary["runs"].values() for part in run.get("training") or {}))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    beside = [f"gate_{name}" for name in gate_columns] + [f"training_{part}" for part in costs]
    writer.writerow(["run", *every, *beside, "seconds"])
    for name, run in summary["runs"].items():
        gate, training = run.get("gate") or {}, run.get("training") or {}
        cells = [*(run["metrics"].get(column) for column in every), *(gate.get(column) for column in gate_columns)]
        writer.writerow([name, *cells, *(training.get(part) for part in costs), run.get("seconds")])
    return file.getvalue()


def cells_of(summary: Mapping[str, Any]) -> list[list[str]]:
    """The table of runs and chosen metrics, with standard errors where they are known, its head first."""
    chosen = chosen_columns(summary)
    cells = [["run", *(heading_of(summary, name) for name in chosen), "seconds"]]
    for name, run in summary["runs"].items():
        cells.append([name, *(with_error(run, column) for column in chosen), seconds_of(run)])
    return cells


def cost_cells_of(summary: Mapping[str, Any]) -> list[list[str]]:
    """What the training of the runs' models cost, each model once, its head first; [] where none was trained."""
    costs = {run["model"]: run["training"] for run in summary["runs"].values() if run.get("training")}
    cells = [
        [Path(model).name, seconds_of(cost), str(cost["tokens"]), f"{cost['peak_memory_mib']:.0f}"]
        for model, cost in costs.items()
    ]
    return [["trained model", "seconds", "tokens", "memory MiB"], *cells] if cells else []


def full_cells_of(summary: Mapping[str, Any]) -> list[list[str]]:
    """The table of all metrics, with the runs as columns, its head first."""
    runs = summary["runs"]
    cells = [["metric", *runs]]
    for name in _every(summary):
        cells.append([heading_of(summary, name), *(with_error(run, name) for run in runs.values())])
    for name in _gate_columns(summary):
        values = (number((run.get("gate") or {}).get(name)) for run in runs.values())
        cells.append([f"gate: {name.replace('_', ' ')}", *values])
    return cells


def paired_cells_of(summary: Mapping[str, Any]) -> list[list[str]]:
    """How far runs are from the original one, with the 95 % intervals of paired rows, its head first; [] of none."""
    runs = {name: run["paired"] for name, run in summary["runs"].items() if run.get("paired")}
    cells = [["difference to the original run", *runs]] if runs else []
    for name in _every(summary) if runs else ():
        found = [paired.get(name) for paired in runs.values()]
        if any(found):
            cells.append([heading_of(summary, name), *map(_difference, found)])
    return cells


def _difference(found: Mapping[str, float | None] | None) -> str:
    if not found:
        return "–"
    return "{} ({} to {})".format(*(number(found[part]) for part in ("difference", "low", "high")))


def with_error(run: Mapping[str, Any], column: str) -> str:
    """A value as people read it, with its standard error if that is known."""
    error = (run.get("errors") or {}).get(column)
    return number(run["metrics"].get(column)) + ("" if error is None or math.isnan(error) else f" ± {number(error)}")


def _markdown(summary: Mapping[str, Any]) -> str:
    """The table of the terminal, and below it all metrics with the runs as columns."""
    legend = legend_of(summary, _every(summary))
    grids = [part for run, title, cells in grids_of(summary) for part in (f"{run}: {title}", markdown_table(cells))]
    costs, *others = map(markdown_table, (make(summary) for make in (cost_cells_of, full_cells_of, paired_cells_of)))
    tables = [markdown_table(cells_of(summary)), costs, *grids, *others]
    return "\n\n".join(filter(None, [f"# {title_of(summary)}", *tables, legend])) + "\n"


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """A table, its head first; nothing of none."""
    if not cells:
        return ""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"\\": r"\textbackslash{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "≈": r"$\approx$"}
LATEX |= {"±": r"$\pm$", "–": "--"}


def latex_table(cells: Sequence[Sequence[str]]) -> str:
    """A tabular with the rules of the package booktabs."""
    table = str.maketrans(LATEX)
    head, *body = (" & ".join(_power(cell.translate(table)) for cell in row) + r" \\" for row in cells)
    columns = "l" + "r" * (len(cells[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"])


def _power(cell: str) -> str:
    """Scientific numbers as powers of ten."""
    return re.sub(r"(?<![\w.])(\d\.\d)e([+-]\d+)", lambda found: rf"${found[1]} \times 10^{{{int(found[2])}}}$", cell)


FORMATS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "csv": csv_table,
    "markdown": lambda summary: markdown_table(cells_of(summary)) + "\n",
    "latex": lambda summary: latex_table(cells_of(summary)) + "\n",
}
"""What a table can be printed as: all metrics unrounded, or the runs and chosen metrics."""
