"""What commands print of what they have done, or would do."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoprompt.terminal import print_json, show

if TYPE_CHECKING:
    from ecoprompt.evaluate import Evaluated
    from ecoprompt.optimize import Learned
    from ecoprompt.pack import TrainedGate
    from ecoprompt.recipe import Recipe


def print_gate(recipe: Recipe, folder: Path, trained: TrainedGate, json: bool) -> None:
    """How often a gate errs, its pack, and on stderr what is to be known of that."""
    from ecoprompt.card import gate_notes
    from ecoprompt.results import gate_report
    from ecoprompt.tables import gate_table

    if json:
        measured = gate_report(trained.measured)
        print_json({"pack": str(folder), "threshold": trained.threshold, "measured": measured, **trained.about})
        return
    show(gate_table(trained.measured, trained.threshold))
    print(folder)
    for note in gate_notes(recipe):
        print(f"note: {note}", file=sys.stderr)


def print_learned(learned: Learned, drawn: Path | None, json: bool) -> None:
    """The evaluations of a search, the corruption that it found, and on stderr what was written."""
    from ecoprompt.tables import search_table

    if json:
        print_json(learned.document())
        return
    about = learned.about
    show(search_table(learned.found.evaluations, learned.found.best, about["metric"], about["target"]))
    for name, value in learned.corruption.items():
        print(f"{name} = {value}")
    print(f"written: {', '.join(map(str, filter(None, [learned.pack, drawn])))}", file=sys.stderr)


def print_evaluated(found: Evaluated, form: str | None) -> None:
    """The table of results in a format, or in that of a terminal with a few answers."""
    if form is not None:
        from ecoprompt.results import FORMATS

        print(FORMATS[form](found.summary), end="")
        return
    from ecoprompt.tables import cost_tables, grid_tables, side_by_side, table

    prompts, targets, answers = found.samples()
    show(table(found.summary), *cost_tables(found.summary), *grid_tables(found.summary))
    if prompts:
        show(side_by_side(prompts, answers, targets))


def print_compared(folders: tuple[str, str], output: Path, json: bool, alone: bool) -> None:
    """Two earlier evaluations side by side."""
    from ecoprompt.compare import compare
    from ecoprompt.registry import InputError

    if not alone:
        raise InputError("--compare A B: found what is for a new evaluation as well, expected --output or --json alone")
    compared = compare(*folders, output)
    if json:
        print_json(compared)
        return
    from ecoprompt.tables import comparison_tables

    show(*comparison_tables(compared))


def print_trained(made: Mapping[Path, dict[str, Any]], json: bool) -> None:
    """The models that were trained, and what that cost."""
    from ecoprompt.tables import training_table

    if json:
        print_json({str(folder): about for folder, about in made.items()})
    else:
        show(training_table(made))


def print_plan(recipe: Recipe, json: bool) -> None:
    """What would run: the recipe with its defaults, its runs, rows, what comes from the Hub, and devices."""
    from ecoprompt.planning import plan

    planned = plan(recipe)
    if json:
        print_json(planned)
        return
    import tomli_w

    print(tomli_w.dumps(planned["recipe"]))
    for name, run in planned["runs"].items():
        print(f"# run {name}: {run['model'] or 'no model'}{', guarded' if run['guarded'] else ''}")
    for benchmark, rows in planned["rows"].items():
        counts = ", ".join(f"{subset} {'?' if count is None else count}" for subset, count in rows.items())
        print(f"# rows of {benchmark}: {counts}")
    for command in ("finetune", "baseline"):
        for name, count in planned.get(command, {}).items():
            print(f"# {command} {name}: {'?' if count is None else count} rows an epoch")
    if "search" in planned:
        print(f"# search: {', '.join(f'{name} {value}' for name, value in planned['search'].items())}")
    if planned["fetches"]:
        print(f"# fetches, unless it is here: {', '.join(planned['fetches'])}")
    print(f"# devices: {planned['devices']}")
