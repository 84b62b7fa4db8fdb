"""Key paths into the plain tables of a recipe: what `--set` overrides, and the points of a `[sweep]`."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ecoprompt.registry import InputError, nearest, show

T = TypeVar("T")

MOST = 10_000
"""Combinations of a sweep: each is checked before any is run."""
SWEPT = ("seed", "model", "gate", "tokens", "corruption", "run")
NAMING = ("method", "kind", "select", "loss", "calibrate", "name")
"""The key that says what a table is: in a run's name its value stands alone."""
BARE = re.compile(r"[^\s,={}\[\]\"']+")


@dataclass(frozen=True)
class Point:
    """One combination of a sweep: its values in words by key, and the recipe's tables with them, without the sweep.

    `places` gives, by the path of each key that is swept, where mistakes below it stand: in an entry of the sweep's
    list, if the list is one of tables.
    """

    labels: dict[str, str]
    tables: dict[str, Any]
    places: dict[str, str]

    def place(self, problem: str) -> str:
        """A problem of `tables` under the key where the recipe has it."""
        above = [path for path in self.places if problem.startswith((f"'{path}'", f"'{path}."))]
        path = max(above, key=len, default=None)
        return problem if path is None else f"'{self.places[path]}{problem[1 + len(path) :]}"


def points(raw: Mapping[str, Any]) -> Iterable[Point]:
    """Each combination of a sweep; without one, the tables as they are."""
    sweep = raw.get("sweep", {})
    rest = {key: value for key, value in raw.items() if key != "sweep"}
    paths = _outermost_first(sweep)
    of_tables = {key for key, values in sweep.items() if any(isinstance(value, dict) for value in values)}
    of_tables |= {key for key, path in paths.items() if path[-1] in SWEPT and path != ["seed"]}
    for numbers in itertools.product(*(range(len(values)) for values in sweep.values())):
        chosen = dict(zip(sweep, numbers, strict=True))
        tables = copy.deepcopy(rest)
        for key, path in paths.items():
            set_key(tables, path, copy.deepcopy(sweep[key][chosen[key]]))
        places = {
            ".".join(path): f"sweep.{key}.{chosen[key]}" if key in of_tables else ".".join(path)
            for key, path in paths.items()
        }
        yield Point({key: _words(sweep[key][number], inside=False) for key, number in chosen.items()}, tables, places)


def with_swept(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with the first value of each swept key that they do not state themselves."""
    tables = copy.deepcopy(dict(raw))
    for key, path in _outermost_first(raw.get("sweep", {})).items():
        set_key(tables, path, copy.deepcopy(raw["sweep"][key][0]), keep=True)
    return tables


def _outermost_first(sweep: Mapping[str, Any]) -> dict[str, list[str]]:
    """The paths of a sweep's keys, a table before the keys in it, so that both may be swept."""
    return dict(sorted(((key, key_path(key)) for key in sweep), key=lambda pair: len(pair[1])))


def _words(value: Any, inside: bool = True) -> str:
    """A swept value in a run's name, without a comma, as commas part the values there."""
    if isinstance(value, dict):
        naming = next((key for key in NAMING if isinstance(value.get(key), str)), None)
        parts = [_words(value[naming])] if naming else []
        parts += [f"{key}={_words(inner)}" for key, inner in value.items() if key != naming]
        return " ".join(parts) if naming and not inside else f"{{{' '.join(parts)}}}"
    if isinstance(value, list):
        return f"[{' '.join(map(_words, value))}]"
    if isinstance(value, str) and (BARE.fullmatch(value) if inside else "," not in value):
        return value
    return json.dumps(value, default=str).replace(",", "\\u002c")


def given(table: object, key: str, kind: type[T]) -> T:
    """What stands under `key` of a table; an empty one where there is nothing, or what its schema finds fault with."""
    found = table.get(key) if isinstance(table, dict) else None
    return found if isinstance(found, kind) else kind()


def check_sweep(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with a sweep: with its keys, with lists that are none, with how many combinations there are."""
    sweep, known = raw.get("sweep", {}), given(raw, "run", dict)
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


def set_key(raw: Any, path: Sequence[str], value: Any, above: str = "", keep: bool = False) -> None:
    """Set the key at `path`, in every entry where a list of tables lies on the way; `keep` leaves one that is there."""
    if isinstance(raw, list):
        for entry in raw:
            set_key(entry, path, value, above, keep)
    elif not isinstance(raw, dict):
        raise InputError(f"'{above}{'.'.join(path)}': cannot be set, as '{above[:-1]}' is {show(raw)} and not a table")
    elif len(path) == 1:
        raw[path[0]] = raw.get(path[0], value) if keep else value
    else:
        set_key(raw.setdefault(path[0], {}), path[1:], value, f"{above}{path[0]}.", keep)
