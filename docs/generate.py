"""Writes the pages that are made from the code: commands.md, recipes.md, measures.md, models.md, a table of guard.md.

`make docs` runs it. The table of architectures in models.md is measured: `tests/bench/architectures.py` writes it, and
here it is kept.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from ecoprompt.benchmarks import Benchmark
from ecoprompt.cli import app
from ecoprompt.items import Subset
from ecoprompt.losses import inputs
from ecoprompt.metrics import reads
from ecoprompt.models import aliases
from ecoprompt.own import OwnBenchmark
from ecoprompt.recipe import OPEN, Recipe, shipped
from ecoprompt.registry import Registry, aggregates, benchmarks, losses, metrics, pressures
from ecoprompt.sources import GateTexts
from ecoprompt.sweep import SWEPT

DOCS = Path(__file__).parent
ARCHITECTURES = "\n## Architectures\n"
NOTE = "<!-- Made by docs/generate.py from the code: change that and run `make docs`. -->"


def pages() -> dict[str, str]:
    """The text of every generated page, by file name."""
    return {
        "commands.md": commands_page(),
        "recipes.md": recipes_page(),
        "measures.md": measures_page(),
        "models.md": models_page(),
        "guard.md": guard_page(),
    }


def guard_page() -> str:
    """The page on the guard, with the table of the callers that the tests try."""
    text = (DOCS / "guard.md").read_text(encoding="utf-8")
    before, mark, rest = text.partition("<!-- callers, made by docs/generate.py from tests/callers.py -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    spec = importlib.util.spec_from_file_location("callers", DOCS.parent / "tests" / "callers.py")
    if not mark or not end or spec is None or spec.loader is None:
        raise LookupError("docs/guard.md has lost the marks around its table, or tests/callers.py is gone")
    callers = importlib.util.module_from_spec(spec)
    sys.modules["callers"] = callers  # dataclasses look their module up
    spec.loader.exec_module(callers)
    rows = [
        [one.group, one.name, "refused" if one.refused else "guarded", f"`{one.needs}`" if one.needs else "–"]
        for one in callers.CALLERS
    ]
    return before + mark + table(["by", "call", "", "tried where there is"], rows) + "\n" + end + after


def commands_page() -> str:
    """The help of the program and of each of its commands, as the terminal shows it."""
    parts = [
        NOTE,
        "# Commands",
        "Results go to standard output, and nothing else does; progress and notes go to standard error. "
        "`python -m ecoprompt` is the same program.",
        table(
            ["exit status", "meaning"],
            [
                ["0", "done"],
                ["1", "the work failed: data, a model or the machine"],
                ["2", "the input is wrong: a recipe, an option, a data file"],
                ["130", "interrupted; what was finished is saved"],
            ],
        ),
        fenced(help_of()),
    ]
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        parts += [f"## {name}", fenced(help_of(name))]
    return page(parts)


def recipes_page() -> str:
    """Every key of a recipe, and what the open tables may name."""
    schema = Recipe.model_json_schema()
    parts = [
        NOTE,
        "# Recipes",
        "A recipe is one TOML file for one experiment. Every command reads its own tables of it, an unknown key is "
        "refused, and all mistakes of a recipe are listed at once. `--set KEY=VALUE` overrides any key, typed as TOML. "
        f"Shipped recipes: {', '.join(f'`{name}`' for name in shipped())}.",
        "`ecoprompt evaluate RECIPE --dry-run` prints a recipe with every default filled in.",
        "## Keys outside the tables",
        keys({name: field for name, field in schema["properties"].items() if not _table_of(field)}, (), schema),
        f"`[sweep]` is the one place where a list means several runs; what can be swept is {_list(SWEPT)}. "
        'With `[sweep]` and `"corruption.strength" = [1, 5]`, the run `eco` becomes `eco[corruption.strength=1]` and '
        "`eco[corruption.strength=5]`; a run that the swept key does not change is done once. A whole table can be "
        'swept as well: `corruption = [{ method = "reverse_order" }, { method = "zero_out_top_k", dims = "25%" }]` '
        "gives `eco[corruption=reverse_order]` and `eco[corruption=zero_out_top_k dims=25%]`. Each entry is all of the "
        'table, so one list may mix methods with different keys. `"run.eco.corruption" = […]` sweeps those of one run.',
    ]
    for name, field in schema["properties"].items():
        inner = _table_of(field)
        if inner:
            parts += _recipe_table(name, field, schema["$defs"][inner], schema)
    own = OwnBenchmark.model_json_schema()
    parts += ["## [benchmark.NAME]", _sentence(own["description"]), keys(own["properties"], own["required"], own)]
    headings = {"corruption": "Corruptions", "tokens": "Token selectors", "gate": "Gate kinds"}
    for name, heading in {**headings, "optimize": "Search methods", "baseline": "Unlearning methods"}.items():
        choice, registry, _ = OPEN[name]
        parts += [f"## {heading}", f"What `[{name}] {choice}` may be, and the further keys of its table."]
        parts += registered(registry)
    rows = [[f"`{name}`", _list(inputs(name)), _summary(losses[name])] for name in losses]
    parts += ["## Loss terms", "What the unlearning methods add up.", table(["term", "reads", "value"], rows)]
    return page(parts)


def _recipe_table(
    name: str, field: Mapping[str, Any], inner: Mapping[str, Any], schema: Mapping[str, Any]
) -> list[str]:
    heading = {"run": "[run.NAME]", "evaluate": "[[evaluate]]"}.get(name, f"[{name}]")
    shown = {key: value for key, value in inner["properties"].items() if key != "parameters"}
    parts = [f"## {heading}", _sentence(inner["description"]), keys(shown, inner.get("required", ()), schema)]
    for key, value in shown.items():
        table_name = _table_of(value)
        if table_name and f"[{name}]" != heading and table_name.startswith("Corruption"):
            parts.append(f"`[run.NAME.{key}]` has the keys of `[{key}]`.")
        elif table_name:
            table_schema = schema["$defs"][table_name]
            parts += [
                f"`{key}` as a table: {_sentence(table_schema['description'])}",
                keys(table_schema["properties"], table_schema.get("required", ()), schema),
            ]
    return parts


def measures_page() -> str:
    """Benchmarks, row metrics and aggregates."""
    parts = [
        NOTE,
        "# Benchmarks and metrics",
        "A run's results hold its aggregates, and the mean of every metric of a subset as `SUBSET_METRIC`: "
        "`forget_rouge`, `retain_probability`. On a forget set no direction is better in itself: there the aim is the "
        "value of the `retain` run, or what chance gives where a metric knows that.",
        "`summary.json` and `--json` have the standard error of every mean (`errors`), and each run's differences to "
        "`original` on the rows that have a value in both, with their 95 % interval (`paired`), which tell a guard's "
        "harm from noise. `rows.jsonl` has every row; where a model is asked to repeat its prompt (`…-repeat`), with "
        "the token that is nearest to each corrupted embedding (`nearest`).",
    ]
    for name in benchmarks:
        parts += _benchmark(benchmarks[name])
    parts += [
        "## Published gates",
        "The authors of the paper publish ten gates, RoBERTa classifiers with the labels `LABEL_0` and `LABEL_1` (to "
        "forget). A recipe takes one with `[gate] classifier` and a threshold; a folder of the same layout will do.",
        table(["gate", "forget set", "threshold"], _published()),
    ]
    parts += ["## Metrics", "One value for each row.", table(["metric", "reads", "better", "value"], _metric_rows())]
    rows = [[f"`{name}`", _summary(pressures[name])] for name in pressures]
    parts += ["## Pressures", "Ways to write a prompt so that it asks the same; the same each time for a seed."]
    parts += [table(["pressure", "the prompt"], rows)]
    parts += ["## Aggregates", "One value for each run, made of its rows' values."]
    rows = [
        [f"`{name}`", aggregates[name].better, _defaults(aggregates, name) or "–", _summary(aggregates[name])]
        for name in aggregates
    ]
    parts += [
        table(["aggregate", "better", "keys", "value"], rows),
        "## Model aliases",
        "[Models](models.md) lists them, with the architectures that the guard holds on.",
    ]
    return page(parts)


def models_page(measured: str | None = None) -> str:
    """Model aliases, and the part on architectures: `measured`, or what the page has now."""
    rows = [
        [
            f"`{name}`",
            f"`{alias['hub']}`" if "hub" in alias else "comes with the package",
            f"`{alias['architecture']}`",
            "its own code, not run" if alias.get("code") == "remote" else "yes",
            "the paper's" if "chat_template" in alias else "the tokenizer's",
        ]
        for name, alias in sorted(aliases().items())
    ]
    if measured is None:
        path = DOCS / "models.md"
        measured = path.read_text(encoding="utf-8").partition(ARCHITECTURES)[2] if path.is_file() else ""
    return page(
        [
            NOTE,
            "# Models",
            "Where a model is named, an alias, a Hub id or a folder will do: the guard needs no code per model. "
            "All models of the paper's list have an alias: their names in lower case, with points and hyphens for "
            "underscores. Which architectures are guarded stands [below](#architectures); a model whose architecture "
            "is not in transformers comes with code of its own, which is not run, so it cannot be loaded.",
            "## Model aliases",
            table(["alias", "model", "architecture", "loads", "prompt format"], rows),
            f"{ARCHITECTURES.strip()}\n\n{measured.strip()}",
        ]
    )


def _benchmark(benchmark: Benchmark) -> list[str]:
    source = "Files that come with the package" if benchmark.folder else "Local files"
    source = f"Hub data set `{benchmark.hub}`" if benchmark.hub else source
    sets = [
        [f"`{benchmark.name}/{name}`", str(len(one.targets)), _count(benchmark, name), f"`{one.retain}`"]
        for name, one in benchmark.forget_sets.items()
    ]
    forgets = any(subset.forget for subset in benchmark.subsets.values())
    first = next(iter(benchmark.family.forget_sets), None) if forgets else None
    counts = benchmark.dry_rows(first)
    subsets = [
        [
            f"`{name}`{' (forget set)' if subset.forget else ''}",
            ", ".join(f"`{part}`" for part in (subset.hub, subset.config) if part) or "–",
            str(counts.get(name) or "?"),
            ", ".join(f"`{key}`{f' = `{metric}`' * (key != metric)}" for key, metric in subset.metrics.items())
            + _scored(subset),
        ]
        for name, subset in benchmark.subsets.items()
        if subset.pressure is None
    ]
    parts = [f"## Benchmark {benchmark.name}"]
    if subsets and not benchmark.asks_model:
        parts.append(f"{benchmark.title}. {source}.")
    elif subsets:
        parts.append(f"{benchmark.title}. {source}; a prompt and its answer share {benchmark.max_length} tokens.")
    elif sets:
        parts.append(f"{benchmark.title}. For gates: it has no rows to evaluate.")
    else:
        parts.append(f"{benchmark.title}. What no gate should flag: `[data] checks` measures a gate on it.")
    if benchmark.family is not benchmark and forgets:
        parts.append(f"It has the forget sets of `{benchmark.family.name}`.")
    if sets:
        parts.append(table(["forget set", "targets", "rows", "retain set"], sets))
    if subsets:
        parts.append(
            table(["subset", "configuration", f"rows (with `{first}`)" if first else "rows", "metrics"], subsets)
        )
        forms = [name for name in pressures if any(one.pressure == name for one in benchmark.subsets.values())]
        if forms:
            parts.append(f"Each subset is asked again under pressure, as `SUBSET_PRESSURE`: {_list(forms)}.")
        if benchmark.aggregates:
            parts.append(f"Aggregates: {_list(benchmark.aggregates)}.")
    return [*parts, *_gate_sources(benchmark)]


def _gate_sources(benchmark: Benchmark) -> list[str]:
    """What trains and tests a gate for a benchmark, and the published gates."""
    gate = benchmark.gate
    if gate is None:
        return []
    rows = [["learned, to flag", *_texts(benchmark, one)] for one in gate.positive]
    rows += [["learned, to let through", *_texts(benchmark, one)] for one in gate.negative]
    for name, check in gate.checks.items():
        wanted = "to flag" if check.label else "to let through"
        rows.append([f"{name.replace('_', ' ')}, {wanted}", *_texts(benchmark, check)])
    return [table(["prompts of a gate", "data set", "rows", "prompt"], rows)]


def _texts(benchmark: Benchmark, texts: GateTexts) -> list[str]:
    """Data set, rows and prompt of a gate's source in words."""
    hub = benchmark.hub if texts.hub is None else texts.hub
    split = texts.split or (benchmark.split if benchmark.split != "train" else None)
    local = texts.local or benchmark.local
    place = ", ".join(f"`{part}`" for part in (hub, texts.config, split) if part) if hub else f"local `{local}`"
    if benchmark.folder:
        place = f"`{texts.config or texts.split}`"
    rows = [] if texts.rows == "all" else [texts.rows]
    rows += [f"the first {texts.first}"] if texts.first else []
    rows += [f"{texts.sample[0]} to {texts.sample[1]} in random order"] if texts.sample else []
    prompt = f"column `{texts.field}`" if texts.field else f"`{texts.prompt}`" if texts.prompt else "the benchmark's"
    return [place, ", ".join(rows) or "all", prompt.replace("\n", "\\n")]


def _published() -> list[list[str]]:
    """The published gates of all forget sets, with the threshold of their authors."""
    return [
        [f"`{hub}`", f"`{benchmark.name}/{name}`", f"{threshold:g}"]
        for benchmark in benchmarks.values()
        for name, forget_set in benchmark.forget_sets.items()
        for hub, threshold in forget_set.published.items()
    ]


def _scored(subset: Subset) -> str:
    """How much of a subset's answers counts, and how its sampled answers are drawn."""
    words = f"; the first {subset.answer_words} words of `{subset.answer}`" if subset.answer_words else ""
    if subset.samples is None:
        return words
    return words + f"; {subset.samples} samples, temperature {subset.temperature:g}, top-p {subset.top_p:g}"


def _count(benchmark: Benchmark, forget_set: str) -> str:
    counts = benchmark.dry_rows(forget_set)
    return str(next((counts[name] for name, subset in benchmark.subsets.items() if subset.forget), None) or "?")


def _metric_rows() -> list[list[str]]:
    return [[f"`{name}`", ", ".join(reads(name)), metrics[name].better, _summary(metrics[name])] for name in metrics]


def registered(registry: Registry) -> list[str]:
    """Tables of all that `registry` holds (name, what it does, its keys with their defaults) and of these keys."""
    rows, notes = [], []
    kinds: dict[tuple[str, str, str], None] = {}
    for name in registry:
        rows.append([f"`{name}`", _summary(registry[name]), _defaults(registry, name) or "–"])
        rest = (inspect.getdoc(registry[name]) or "").split("\n\n", 1)[1:]
        notes += [f"`{name}`: {' '.join(rest[0].split())}"] if rest else []
        schema = registry.schema(name).model_json_schema()
        for key, field in schema.get("properties", {}).items():
            kinds[f"`{key}`", _type(field, schema), _sentence(field.get("description", ""))] = None
    described = any(said for _, _, said in kinds)
    head = ["key", "type", "what it is"] if described else ["key", "type"]
    key_rows = [list(row) if described else list(row[:2]) for row in kinds]
    return [table([registry.kind, "what it does", "keys"], rows), *notes, table(head, key_rows)]


def _defaults(registry: Registry, name: str) -> str:
    """The keys of a registered function with their defaults; one without a default is needed."""
    schema = registry.schema(name).model_json_schema()
    needed = schema.get("required", ())
    return ", ".join(
        f"`{key}`" + (" (needed)" if key in needed else f" = {_value(field.get('default'))}")
        for key, field in schema.get("properties", {}).items()
    )


def keys(fields: Mapping[str, Any], required: Sequence[str], schema: Mapping[str, Any]) -> str:
    """A table of keys with type, default and description."""
    rows = [
        [
            f"`{name}`",
            _type(field, schema),
            "needed" if name in required else _value(field.get("default")),
            _sentence(field.get("description", "")),
        ]
        for name, field in fields.items()
    ]
    return table(["key", "type", "default", "what it is"], rows)


def _table_of(field: Mapping[str, Any]) -> str | None:
    """The name of the table that a field is, holds by name, lists, or may be."""
    inner = [field, field.get("items", {}), field.get("additionalProperties", {}), *field.get("anyOf", [])]
    found = [str(one["$ref"]).rpartition("/")[2] for one in inner if isinstance(one, dict) and "$ref" in one]
    return found[0] if found else None


def _type(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The type of a JSON schema's field in words."""
    if "anyOf" in field:
        kinds = [_type(one, schema) for one in field["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in field:
        return "table"
    if "enum" in field or "const" in field:
        return ", ".join(f'`"{value}"`' for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array":
        return "list" if not field.get("items", {}).get("type") else f"list of {_type(field['items'], schema)}s"
    names = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "string": "text"}
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[limit]:g}" for limit, sign in limits.items() if limit in field]
    if field.get("multipleOf") == 2:
        bounds.append("even")
    return " ".join([names.get(str(kind), "table"), ", ".join(bounds)]).strip()


def _value(value: Any) -> str:
    """A default as TOML writes it."""
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, dict):
        return "`{ " + ", ".join(f"{name} = {_value(one).strip('`')}" for name, one in value.items()) + " }`"
    if isinstance(value, list):
        return "`[" + ", ".join(f'"{one}"' for one in value) + "]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def _summary(function: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith(".") else text + "."


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def help_of(*command: str) -> str:
    """The help text of a command, 80 columns wide whatever the terminal."""
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name="ecoprompt", env={"COLUMNS": "80"})
    return shown.stdout.strip("\n")


def fenced(text: str) -> str:
    """`text` as a block of its own."""
    return f"```text\n{text}\n```"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [list(head), ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def page(parts: Iterable[str]) -> str:
    """Paragraphs with an empty line between them."""
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
