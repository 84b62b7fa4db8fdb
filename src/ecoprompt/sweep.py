"""Key paths into the plain tables of a recipe: what `--set` overrides, and the points of a `[sweep]`."""

from __future__ import annotations

import copy
import itertools
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ecoprompt.registry import InputError, nearest, show

MOST = 10_000
"""Combinations of a sweep: each is checked before any is run."""
SWEPT = ("seed", "model", "gate", "tokens", "corruption", "run")


def points(raw: Mapping[str, Any]) -> Iterable[tuple[dict[str, str], dict[str, Any]]]:
    """Each combination of a sweep as (its values as text by key, the tables without the sweep); without one, one."""
    sweep = raw.get("sweep", {})
    for values in itertools.product(*sweep.values()):
        point = copy.deepcopy({key: value for key, value in raw.items() if key != "sweep"})
        for key, value in zip(sweep, values, strict=True):
            set_key(point, key_path(key), copy.deepcopy(value))
        yield {key: _show(value) for key, value in zip(sweep, values, strict=True)}, point


def check_sweep(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys of a sweep, and with lists that the schema would refuse as well."""
    sweep, runs = raw.get("sweep", {}), raw.get("run")
    known = list(runs) if isinstance(runs, dict) else []
    if not isinstance(sweep, dict):
        return [f"'sweep': found {show(sweep)}, expected a table"]
    problems = []
    for key, values in sweep.items():
        path = key_path(key)
        if not path or path[0] not in SWEPT or path == ["run"]:
            problems.append(f"'sweep.{key}': cannot be swept; what can: {', '.join(SWEPT)}")
        elif path[0] == "run" and path[1] not in known:
            problems.append(f"'sweep.{key}': there is no run '{path[1]}'; {nearest(path[1], known)}")
        if not isinstance(values, list) or not values:
            problems.append(f"'sweep.{key}': found {show(values)}, expected a list of at least one value")
    count = math.prod(len(values) for values in sweep.values() if isinstance(values, list))
    if count > MOST:
        problems.append(f"'sweep': found {count} combinations, expected {MOST} at most")
    return problems


def merge(under: Any, over: Any) -> Any:
    """Tables with the keys of both, those of `over` before those of `under`."""
    if not isinstance(under, dict) or not isinstance(over, Mapping):
        return over
    return {**under, **{key: merge(under.get(key), value) for key, value in over.items()}}


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def parse_override(override: str) -> tuple[list[str], Any]:
    """`corruption.strength=50` as its key path and its value, typed as TOML; a bare word is a string."""
    signs = (place for place, letter in enumerate(override) if letter == "=")
    sign = next((place for place in signs if key_path(override[:place].strip())), None)  # a quoted key may hold one too
    if sign is None:
        raise InputError(f"--set {override}: expected KEY=VALUE, as in corruption.strength=50")
    path, value = key_path(override[:sign].strip()), override[sign + 1 :]
    try:
        tables = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        tables = {} if any(mark in value for mark in "\"'[]{}\n") else {"value": value}
    if list(tables) != ["value"]:
        raise InputError(f"--set {override}: '{value}' is not a TOML value; a text with such signs needs quotes")
    return path, tables["value"]


def key_path(key: str) -> list[str]:
    """The steps of a dotted key as TOML reads it, none if it is no key."""
    path: list[str] = []
    try:
        table: Any = tomllib.loads(f"{key} = 0") if "\n" not in key else {}
    except (ValueError, RecursionError):
        return []
    while isinstance(table, dict) and table:
        ((step, table),) = table.items()
        path.append(step)
    return path


def set_key(raw: Any, path: Sequence[str], value: Any, above: str = "") -> None:
    """Set the key at `path`, in every entry where a list of tables lies on the way."""
    if isinstance(raw, list):
        for entry in raw:
            set_key(entry, path, value, above)
    elif not isinstance(raw, dict):
        raise InputError(f"'{above}{'.'.join(path)}': cannot be set, as '{above[:-1]}' is {show(raw)} and not a table")
    elif len(path) == 1:
        raw[path[0]] = value
    else:
        set_key(raw.setdefault(path[0], {}), path[1:], value, f"{above}{path[0]}.")
