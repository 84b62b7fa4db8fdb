"""What is wrong with the tables of a recipe beyond their types: names that point to nothing, and what is lacking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ecoprompt.registry import InputError, benchmarks, corruptions, nearest, show
from ecoprompt.sweep import given
from ecoprompt.template import template_names

STRENGTHS = (0.01, 1000.0)
"""The bounds of a strength that is searched for, unless the recipe says others."""


def check_runs(raw: Mapping[str, Any]) -> list[str]:
    """What runs need and neither they nor the other tables say."""
    problems = []
    model, gate = given(raw, "model", dict), given(raw, "gate", dict)
    known = _evaluated(raw)
    gate_alone = bool(known) and not any(benchmark.asks_model for benchmark in known)
    for name, run in given(raw, "run", dict).items():
        if not isinstance(run, dict):
            continue
        found, guarded = [], given(run, "forget", bool)
        if "model" not in run and "name" not in model and not gate_alone:
            found.append(("model", f"[run.{name}] names no model and there is no [model] name"))
        if guarded and "corruption" not in run and "corruption" not in raw and not gate_alone:
            found.append(("forget", f"[run.{name}] has forget = true, but there is no [corruption]"))
        if guarded and "data" not in raw and "classifier" not in gate:
            lacking = "neither [data] forget nor [gate] classifier"
            found.append(("forget", f"[run.{name}] has forget = true, but there is {lacking}"))
        try:
            template_names(given(run, "prefix", str))
        except InputError as error:
            found.append(("prefix", str(error)))
        if "corruption" in run and not guarded:
            found.append(("corruption", "a run with its own corruption needs forget = true"))
        problems += [f"'run.{name}.{key}': {problem}" for key, problem in found]
    if gate_alone and gate.get("check") == "answer":
        problems.append("'gate.check': no model is asked, so there is no answer to check")
    return problems


def _evaluated(raw: Mapping[str, Any]) -> list[Any]:
    """The benchmarks to evaluate that there are, each with the subsets that are read."""
    entries = given(raw, "evaluate", list)
    named = [(given(entry, "benchmark", str), given(entry, "subsets", list)) for entry in entries]
    return [benchmarks[name].only(subsets or None) for name, subsets in named if name in benchmarks]


def check_benchmarks(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names of benchmarks, of their subsets and of the forget set."""
    problems = []
    data, entries = given(raw, "data", dict), given(raw, "evaluate", list)
    forget, broken = data.get("forget"), set(given(raw, "benchmark", dict)) - set(benchmarks)
    for number, entry in enumerate(entries):
        name = entry.get("benchmark") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in broken:
            continue
        above = [given(other, "benchmark", str) for other in entries[:number]]
        problems += [f"'evaluate.{number}.{key}': {one}" for key, one in _check_entry(entry, name, above, forget)]
    for number, name in enumerate(given(data, "checks", list)):
        if isinstance(name, str) and (name not in benchmarks or benchmarks[name].gate is None):
            known = [known for known, benchmark in benchmarks.items() if benchmark.gate and not benchmark.forget_sets]
            problems.append(f"'data.checks.{number}': no prompts for gates called '{name}'; {nearest(name, known)}")
    if isinstance(forget, str):
        name, _, forget_set = forget.partition("/")
        if name not in benchmarks and name not in broken:
            problems.append(f"'data.forget': no benchmark '{name}'; {nearest(name, benchmarks)}")
        elif name in benchmarks and forget_set not in benchmarks[name].forget_sets:
            known = [f"{name}/{known}" for known in benchmarks[name].forget_sets]
            problems.append(f"'data.forget': no forget set '{forget}'; {nearest(forget, known)}")
    return problems


def _check_entry(
    entry: Mapping[str, Any], name: str, above: Sequence[str], forget: object
) -> Iterator[tuple[str, str]]:
    """What is wrong with evaluating benchmark `name` after those `above` where `forget` is to be forgotten, by key."""
    if name not in benchmarks:
        yield "benchmark", f"no benchmark '{name}'; {nearest(name, benchmarks)}"
        return
    benchmark = benchmarks[name]
    of = benchmark.family.name
    subject = forget.partition("/")[0] if isinstance(forget, str) else name
    if any(one.forget for one in benchmark.subsets.values()) and subject in benchmarks and subject not in (name, of):
        yield "benchmark", f"'{name}' measures the forgetting of {of}, and '{forget}' is to be forgotten"
    if not benchmark.subsets:
        yield "benchmark", f"'{name}' has no rows to evaluate, only prompts for gates"
    for other in above:
        if other in benchmarks and {*benchmarks[other].better()} & {*benchmark.better()}:
            yield "benchmark", f"its results are named like those of '{other}' above"
    for key, subsets in (("limit", given(entry, "limit", dict)), ("subsets", given(entry, "subsets", list))):
        for subset in subsets:
            if isinstance(subset, str) and subset not in benchmark.subsets:
                yield f"{key}.{subset}", f"no such subset of {name}; {nearest(subset, benchmark.subsets)}"


def check_optimize(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with the search for a corruption, beyond what its own tables say."""
    table = raw.get("optimize")
    if not isinstance(table, dict):
        return []
    problems = [f"'optimize': a search needs [{name}]" for name in ("data", "corruption") if name not in raw]
    known = _evaluated(raw)
    columns = [column for benchmark in known for column in benchmark.forget_columns()]
    metric, target = given(table, "metric", str), table.get("target", "retain")
    compared = "surrogate" in table or "retain" in given(raw, "run", dict)
    if isinstance(table.get("metric"), str) and metric not in columns:
        problems.append(
            f"'optimize.metric': no [[evaluate]] has '{metric}' of a forget set; {nearest(metric, columns)}"
        )
    if target == "retain" and not compared:
        problems.append("'optimize.target': there is neither [run.retain] nor [optimize] surrogate to take it from")
    if metric in columns and any(metric in one.aggregates for one in known) and not compared:
        problems.append(f"'optimize.metric': '{metric}' needs [run.retain] or [optimize] surrogate to compare with")
    if target == "chance" and metric in columns and not any(one.chance(metric) for one in known):
        problems.append(f"'optimize.target': '{metric}' has no value that chance gives; say a number")
    return problems + _check_parameter(given(raw, "corruption", dict), table)


def _check_parameter(corruption: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """What is wrong with the parameter that is searched for, with its bounds, and with where the search starts."""
    problems = []
    method, parameter = given(corruption, "method", str), given(table, "parameter", str) or "strength"
    vector, bounds = given(table, "vector", bool), given(table, "bounds", list)
    takes = corruptions.schema(method).model_fields if method in corruptions else {}
    if method in corruptions and parameter not in takes:
        problems.append(f"'optimize.parameter': '{method}' has no '{parameter}'; {nearest(parameter, takes)}")
    if vector and parameter != "strength":
        problems.append("'optimize.vector': only a strength can be one for each dimension")
    start: Any = corruption.get(parameter)
    inside = start if isinstance(start, list) else [start]
    limits = bounds or (STRENGTHS if parameter == "strength" else ())  # the most dims are the model's
    if isinstance(start, list) and not vector:
        found = "found a list, where the search of one number starts; say `vector = true`"
        problems.append(f"'corruption.{parameter}': {found}")
    elif len(limits) == 2 and _numbers([*limits, *inside]) and not all(limits[0] <= one <= limits[1] for one in inside):
        found = f"found {show(start)}, where a search from {limits[0]} to {limits[1]} cannot start"
        problems.append(f"'corruption.{parameter}': {found}")
    if len(bounds) == 2 and _numbers(bounds) and not 0 < bounds[0] < bounds[1]:
        problems.append(f"'optimize.bounds': found {show(bounds)}, expected two numbers above 0, the smaller first")
    elif parameter == "strength" and parameter in takes and _numbers(limits):
        others = {key: value for key, value in corruption.items() if key != "method"}
        for bound in limits:
            try:
                corruptions.bind(method, others | {"strength": bound}, "optimize.bounds")
            except InputError as error:
                wrong = [one for one in error.problems if one.startswith("'optimize.bounds.strength'")]
                by_itself = "' ({:g} to {:g} unless said)".format(*STRENGTHS)
                problems += [one.replace(".strength'", by_itself, 1) for one in wrong]
    return problems


def _numbers(values: Iterable[object]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)
