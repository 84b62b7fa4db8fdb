"""What a benchmark's table declares about metrics and aggregates, and which of its names point to nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ecoprompt.registry import InputError, aggregates, benchmarks, nearest

if TYPE_CHECKING:
    from ecoprompt.benchmarks import Benchmark


INHERITED = ("hub", "split", "prompt", "raw", "max_length", "rows", "metrics", "subsets")
"""What a benchmark takes of the one it is `of`."""
SHARED = ("metrics", "choices", "right", "completion")
"""What a benchmark's subsets take of it."""


def whole(table: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with what it leaves to the benchmark that it is `of`, and each subset with what it leaves to `table`."""
    given, of = dict(table), table.get("of")
    if isinstance(of, str) and of in benchmarks:
        left = {key: value for key, value in benchmarks[of].declared.items() if key in INHERITED and key not in table}
        if {"folder", "local"} & table.keys():
            left.pop("hub", None)
        if "metrics" in table and "subsets" in left:
            left["subsets"] = {name: {**one, "metrics": table["metrics"]} for name, one in left["subsets"].items()}
        given |= left
    shared = {key: given[key] for key in SHARED if key in given}
    if isinstance(given.get("subsets"), Mapping):
        subsets = given["subsets"].items()
        given["subsets"] = {name: {**shared, **one} if isinstance(one, Mapping) else one for name, one in subsets}
    return given


def subsets_of(parameters: Mapping[str, Any]) -> list[str]:
    """The subsets that an aggregate is read off."""
    return list(parameters["subsets"] if "subsets" in parameters else [parameters["subset"]])


def parts(name: str, parameters: Mapping[str, Any]) -> list[str]:
    """The keys of a subset's metrics that an aggregate is made of: those it is told, or its own."""
    return list(parameters.get("metrics") or aggregates[name].of)


def averaged(benchmark: Benchmark) -> dict[str, list[str]]:
    """The aggregates that are means of columns, with these."""
    return {
        name: [f"{subset}_{part}" for subset in subsets_of(parameters) for part in parts(name, parameters)]
        for name, parameters in benchmark.aggregates.items()
        if aggregates[name].averages
    }


def bind_aggregates(table: Mapping[str, Any], where: str) -> tuple[Any, list[str]]:
    """The aggregates of a table with their defaults, and what is wrong with them."""
    given = table.get("aggregates", {})
    if not isinstance(given, Mapping):
        return given, []
    bound, problems = {}, []
    for name, parameters in given.items():
        key = f"{where}.aggregates.{name}"
        if name not in aggregates:
            problems.append(f"'{key}': there is no aggregate '{name}'; {nearest(name, aggregates)}")
        elif not isinstance(parameters, Mapping):
            problems.append(f"'{key}': found {parameters!r}, expected a table of parameters")
        else:
            try:
                bound[name] = aggregates.bind(name, parameters, key)
            except InputError as error:
                problems += error.problems
    return bound, problems


def dangling(benchmark: Benchmark, where: str) -> list[str]:
    """Names in the tables of `benchmark` that point to nothing."""
    problems = []
    known = benchmark.better()
    for number, column in enumerate(benchmark.columns):
        if column not in known:
            problems.append(f"'{where}.columns.{number}': there is no column '{column}'; {nearest(column, known)}")
    for name, parameters in benchmark.aggregates.items():
        for subset in subsets_of(parameters):
            place = f"'{where}.aggregates.{name}'"
            if subset not in benchmark.subsets:
                problems.append(f"{place}: there is no subset '{subset}'; {nearest(subset, benchmark.subsets)}")
                continue
            lacking = [part for part in parts(name, parameters) if part not in benchmark.subsets[subset].metrics]
            if lacking:
                problems.append(f"{place}: subset '{subset}' has no metric called {', '.join(lacking)}, which it reads")
    return problems
