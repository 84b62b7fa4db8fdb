"""What is wrong with the tables of a recipe beyond their types: names that point to nothing, and what is lacking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecoprompt.registry import InputError, benchmarks, corruptions, nearest, show
from ecoprompt.template import template_names

STRENGTHS = (0.01, 1000.0)
"""The bounds of a strength that is searched for, unless the recipe says others."""


def check_runs(raw: Mapping[str, Any]) -> list[str]:
    """What runs need and neither they nor the other tables say."""
    problems = []
    model, gate, runs = (raw.get(name, {}) for name in ("model", "gate", "run"))
    gate_alone = not _asks_model(raw)
    for name, run in runs.items() if isinstance(runs, dict) else ():
        if not isinstance(run, dict):
            continue
        if "model" not in run and isinstance(model, dict) and "name" not in model and not gate_alone:
            problems.append(f"'run.{name}.model': [run.{name}] names no model and there is no [model] name")
        if run.get("forget") is True and "corruption" not in run and "corruption" not in raw and not gate_alone:
            problems.append(f"'run.{name}.forget': [run.{name}] has forget = true, but there is no [corruption]")
        if run.get("forget") is True and "data" not in raw and isinstance(gate, dict) and "classifier" not in gate:
            lacking = "neither [data] forget nor [gate] classifier"
            problems.append(f"'run.{name}.forget': [run.{name}] has forget = true, but there is {lacking}")
        try:
            template_names(run["prefix"]) if isinstance(run.get("prefix"), str) else None
        except InputError as error:
            problems.append(f"'run.{name}.prefix': {error}")
        if "corruption" in run and run.get("forget", False) is False:
            problems.append(f"'run.{name}.corruption': a run with its own corruption needs forget = true")
    if gate_alone and isinstance(gate, dict) and gate.get("check") == "answer":
        problems.append("'gate.check': no model is asked, so there is no answer to check")
    return problems


def _asks_model(raw: Mapping[str, Any]) -> bool:
    """Whether a benchmark of the recipe needs a language model; a recipe without a benchmark is taken to."""
    known = _evaluated(raw)
    return any(benchmark.asks_model for benchmark in known) or not known


def _evaluated(raw: Mapping[str, Any]) -> list[Any]:
    """The benchmarks to evaluate that there are, each with the subsets that are read."""
    found = []
    for entry in raw["evaluate"] if isinstance(raw.get("evaluate"), list) else []:
        name = entry.get("benchmark") if isinstance(entry, dict) else None
        if isinstance(name, str) and name in benchmarks:
            subsets = entry.get("subsets")
            found.append(benchmarks[name].only(subsets if isinstance(subsets, list) else None))
    return found


def _check_subject(raw: Mapping[str, Any], number: int, name: str) -> list[str]:
    """What is wrong with evaluating benchmark `name` where another's forget set is to be forgotten."""
    data, benchmark = raw.get("data"), benchmarks[name]
    forget = data.get("forget") if isinstance(data, dict) else None
    subject = forget.partition("/")[0] if isinstance(forget, str) else name
    forgets = any(subset.forget for subset in benchmark.subsets.values())
    of = benchmark.family.name
    if not forgets or subject in (name, of) or subject not in benchmarks:
        return []
    return [
        f"'evaluate.{number}.benchmark': '{name}' measures the forgetting of {of}, and '{forget}' is to be forgotten"
    ]


def check_benchmarks(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names of benchmarks, of their subsets and of the forget set."""
    problems = []
    broken = set(raw["benchmark"] if isinstance(raw.get("benchmark"), dict) else ()) - set(benchmarks)
    entries = raw["evaluate"] if isinstance(raw.get("evaluate"), list) else []
    for number, entry in enumerate(entries):
        name = entry.get("benchmark") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in broken:
            continue
        if name not in benchmarks:
            problems.append(f"'evaluate.{number}.benchmark': no benchmark '{name}'; {nearest(name, benchmarks)}")
            continue
        problems += _check_subject(raw, number, name)
        if not benchmarks[name].subsets:
            problems.append(f"'evaluate.{number}.benchmark': '{name}' has no rows to evaluate, only prompts for gates")
        for other in (entry.get("benchmark") for entry in entries[:number] if isinstance(entry, dict)):
            if (
                isinstance(other, str)
                and other in benchmarks
                and {*benchmarks[other].better()} & {*benchmarks[name].better()}
            ):
                problems.append(f"'evaluate.{number}.benchmark': its results are named like those of '{other}' above")
        for key, kind in (("limit", dict), ("subsets", list)):
            for subset in entry[key] if isinstance(entry.get(key), kind) else ():
                if isinstance(subset, str) and subset not in benchmarks[name].subsets:
                    hint = nearest(subset, benchmarks[name].subsets)
                    problems.append(f"'evaluate.{number}.{key}.{subset}': no such subset of {name}; {hint}")
    data = raw["data"] if isinstance(raw.get("data"), dict) else {}
    checks = data["checks"] if isinstance(data.get("checks"), list) else []
    for number, name in enumerate(checks):
        if isinstance(name, str) and (name not in benchmarks or benchmarks[name].gate is None):
            known = [known for known, benchmark in benchmarks.items() if benchmark.gate and not benchmark.forget_sets]
            problems.append(f"'data.checks.{number}': no prompts for gates called '{name}'; {nearest(name, known)}")
    forget = data.get("forget")
    if isinstance(forget, str):
        name, _, forget_set = forget.partition("/")
        if name not in benchmarks and name not in broken:
            problems.append(f"'data.forget': no benchmark '{name}'; {nearest(name, benchmarks)}")
        elif name in benchmarks and forget_set not in benchmarks[name].forget_sets:
            known = [f"{name}/{known}" for known in benchmarks[name].forget_sets]
            problems.append(f"'data.forget': no forget set '{forget}'; {nearest(forget, known)}")
    return problems


def check_optimize(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with the search for a corruption, beyond what its own tables say."""
    table = raw.get("optimize")
    if not isinstance(table, dict):
        return []
    problems = [f"'optimize': a search needs [{name}]" for name in ("data", "corruption") if name not in raw]
    known = _evaluated(raw)
    columns = [column for benchmark in known for column in benchmark.forget_columns()]
    metric, target = table.get("metric"), table.get("target", "retain")
    if isinstance(metric, str) and metric not in columns:
        problems.append(
            f"'optimize.metric': no [[evaluate]] has '{metric}' of a forget set; {nearest(metric, columns)}"
        )
    runs = raw.get("run")
    if target == "retain" and "surrogate" not in table and not (isinstance(runs, dict) and "retain" in runs):
        problems.append("'optimize.target': there is neither [run.retain] nor [optimize] surrogate to take it from")
    compares = metric in columns and any(metric in one.aggregates for one in known)
    if compares and "surrogate" not in table and not (isinstance(runs, dict) and "retain" in runs):
        problems.append(f"'optimize.metric': '{metric}' needs [run.retain] or [optimize] surrogate to compare with")
    if target == "chance" and metric in columns and not any(one.chance(str(metric)) for one in known):
        problems.append(f"'optimize.target': '{metric}' has no value that chance gives; say a number")
    return problems + _check_parameter(raw, table)


def _check_start(corruption: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """What is wrong with where the search starts."""
    parameter, bounds = table.get("parameter", "strength"), table.get("bounds")
    start = corruption.get(parameter)
    if isinstance(start, list) and table.get("vector") is not True:
        return [f"'corruption.{parameter}': found a list, where the search of one number starts; say `vector = true`"]
    low, high = bounds if isinstance(bounds, list) and len(bounds) == 2 else STRENGTHS
    numbers = [one for one in (start if isinstance(start, list) else [start]) if isinstance(one, (int, float))]
    known = isinstance(low, (int, float)) and isinstance(high, (int, float))
    known = known and (parameter == "strength" or bounds is not None)  # the most dims are the model's
    if known and not all(low <= one <= high for one in numbers):
        return [f"'corruption.{parameter}': found {show(start)}, where a search from {low} to {high} cannot start"]
    return []


def _check_parameter(raw: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """What is wrong with the parameter that is searched for, and with its bounds."""
    problems = []
    corruption = raw.get("corruption")
    method = corruption.get("method") if isinstance(corruption, dict) else None
    if isinstance(method, str) and method in corruptions:
        takes = corruptions.schema(method).model_fields
        parameter = table.get("parameter", "strength")
        if parameter not in takes:
            problems.append(f"'optimize.parameter': '{method}' has no '{parameter}'; {nearest(str(parameter), takes)}")
    if table.get("vector") is True and table.get("parameter", "strength") != "strength":
        problems.append("'optimize.vector': only a strength can be one for each dimension")
    if method is not None and isinstance(corruption, dict):
        problems += _check_start(corruption, table)
    bounds = table.get("bounds")
    pair = bounds if isinstance(bounds, list) and all(isinstance(bound, (int, float)) for bound in bounds) else []
    if len(pair) == 2 and not 0 < pair[0] < pair[1]:
        problems.append(f"'optimize.bounds': found {show(bounds)}, expected two numbers above 0, the smaller first")
    return problems
