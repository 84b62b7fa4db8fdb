"""Two evaluations set against each other: runs of the same name, row by row."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecoprompt.files import read_json, read_text
from ecoprompt.paired import by_column, paired, shared
from ecoprompt.registry import InputError, nearest

MOST = 1 << 31
"""Bytes of a summary or of the rows of an evaluation."""


@dataclass(frozen=True)
class Results:
    """What an evaluation wrote: its folder and summary, and by run and column the value of each row."""

    folder: Path
    summary: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Mapping[Hashable, float]]]


def compare(first: str, second: str, output: Path) -> dict[str, Any]:
    """By run and metric: `a`, `b`, `difference` (b - a), and its 95 % `interval` and `p` on the `rows` of both.

    `first` and `second` are folders of results, or names of recipes whose results are under `output`. What is no mean
    over rows has neither interval nor p. `rows` counts the rows that were asked in `both`, or in one `a_alone` or
    `b_alone`. Raises InputError for folders without results, and for results that share no run or no row.
    """
    places = [_find(reference, output) for reference in (first, second)]
    problems = [place for place in places if isinstance(place, str)]
    if problems:
        raise InputError(*dict.fromkeys(problems))
    a, b = (_read(place) for place in places if isinstance(place, Path))
    runs = [run for run in a.summary["runs"] if run in b.summary["runs"]]
    if not runs:
        names = [", ".join(one.summary["runs"]) for one in (a, b)]
        raise InputError(f"{first} and {second} have no run of the same name: {names[0]}; {names[1]}")
    ours, theirs = _asked(runs, a, b), _asked(runs, b, a)
    if not ours & theirs:
        raise InputError(f"{first} and {second} share no row: no prompt was asked in both and read by the same metric")
    return {
        "a": str(a.folder),
        "b": str(b.folder),
        "better": {**b.summary.get("better", {}), **a.summary.get("better", {})},
        "rows": {"both": len(ours & theirs), "a_alone": len(ours - theirs), "b_alone": len(theirs - ours)},
        "runs": {run: _compare_run(run, a, b) for run in runs},
    }


def _asked(runs: Sequence[str], one: Results, other: Results) -> set[Hashable]:
    """The rows that were asked in `one`, of the metrics that both have."""
    columns = [(run, name, values) for run in runs for name, values in one.rows.get(run, {}).items()]
    return {place for run, name, values in columns if name in other.rows.get(run, {}) for place in values}


def _find(reference: str, output: Path) -> Path | str:
    """The folder of results that `reference` names, or what is wrong with it."""
    for folder in (Path(reference), output / reference):
        if (folder / "summary.json").is_file() and (folder / "rows.jsonl").is_file():
            return folder
    known = [path.parent.name for path in output.glob("*/summary.json")]
    return f"--compare {reference}: found no results (summary.json, rows.jsonl) there or in {output}; " + nearest(
        reference, known
    )


def _read(folder: Path) -> Results:
    """The results in a folder; raises InputError for files that no evaluation wrote."""
    summary = read_json(folder / "summary.json", MOST)
    try:
        rows = by_column(map(json.loads, filter(None, read_text(folder / "rows.jsonl", MOST).split("\n"))))
        for run in summary["runs"].values():
            dict(run["metrics"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder}: these are not the results of an evaluation ({error!r})") from None
    return Results(folder, summary, rows)


def _compare_run(run: str, a: Results, b: Results) -> dict[str, dict[str, Any]]:
    ours, theirs = (one.summary["runs"][run]["metrics"] for one in (a, b))
    return {
        name: _compare_rows(a.rows.get(run, {}).get(name, {}), b.rows.get(run, {}).get(name, {}))
        or _compare_values(ours[name], theirs[name])
        for name in ours
        if name in theirs
    }


def _compare_rows(a: Mapping[Hashable, float], b: Mapping[Hashable, float]) -> dict[str, Any] | None:
    """The means over the rows that both were asked, and the paired test; None without such rows."""
    ours, theirs = shared(a, b)
    if not ours:
        return None
    difference, low, high, p = paired(theirs, ours)
    means = {"a": sum(ours) / len(ours), "b": sum(theirs) / len(ours)}
    return {**means, "difference": difference, "interval": [low, high], "p": p, "rows": len(ours)}


def _compare_values(a: float | None, b: float | None) -> dict[str, Any]:
    difference = None if a is None or b is None else b - a
    return {"a": a, "b": b, "difference": difference, "interval": None, "p": None, "rows": None}
