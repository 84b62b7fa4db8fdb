"""The commands: parse, call one function, print. No logic."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ecoprompt.registry import Progress

F = TypeVar("F", bound=Callable[..., None])

app = typer.Typer(
    name="ecoprompt",
    help="Make a language model behave as if it had never seen some data: embedding-corrupted (ECO) prompts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, typed as TOML: corruption.strength=50. Repeatable."
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="Where DIR/<recipe>/ is written.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would run, needing neither model nor network.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RESULTS = Path("results")


def _command(function: F) -> F:
    """Register a command; the one place where errors become a message on stderr and an exit status."""

    @functools.wraps(function)
    def translated(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        from ecoprompt.registry import EcopromptError

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            _fail("interrupted; what was finished is saved", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except EcopromptError as error:
            if debug:
                raise
            _fail(str(error), error.exit_status)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                raise
            _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)

    # Typer reads the parameters off the signature that functools.wraps copied; --debug is every command's.
    import inspect

    signature = inspect.signature(function, eval_str=True)
    own = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption)
    translated.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # type: ignore[attr-defined]
    translated.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()} | {
        "debug": DebugOption
    }
    app.command(name=function.__name__.replace("_", "-"))(translated)
    return function


def _fail(message: str, status: int) -> None:
    for line in message.splitlines() or [""]:
        print(f"ecoprompt: {line}", file=sys.stderr)
    raise typer.Exit(status)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Progress with the time left on a terminal's stderr; nothing elsewhere."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = _console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        shown = ""

        def report(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                bar.reset(task, description=what, total=total, completed=done)
                shown = what
            bar.update(task, completed=done, total=total)

        yield report


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"ecoprompt {version('ecoprompt')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


@_command
def train_classifier(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: OutputOption = RESULTS,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train the recipe's gate, calibrate its threshold, measure its errors, and write a forget pack."""
    from ecoprompt.forget import train_classifier
    from ecoprompt.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if dry_run:
        _print_plan(loaded, json)
        return
    with _progress() as progress:
        folder, trained = train_classifier(loaded, output, progress)
    document = {"pack": str(folder), "threshold": trained.threshold, "measured": trained.measured}
    if json:
        _print_json(document)
        return
    from ecoprompt.results import gate_table

    _console().print(gate_table(trained.measured, trained.threshold))
    print(folder)


@_command
def evaluate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: OutputOption = RESULTS,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Evaluate the recipe's runs on its benchmarks; started again, it goes on where it was."""
    from ecoprompt.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if dry_run:
        _print_plan(loaded, json)
        return
    from ecoprompt.evaluate import evaluate

    with _progress() as progress:
        found = evaluate(loaded, output, progress)
    if json:
        _print_json({name: found.summary[name] for name in ("recipe", "forget", "seed", "runs")})
        return
    from ecoprompt.results import side_by_side, table

    prompts, targets, answers = found.samples()
    _console().print(table(found.summary))
    if prompts:
        _console().print(side_by_side(prompts, answers, targets))
    print(f"written: {', '.join(map(str, found.files))}", file=sys.stderr)


@_command
def chat(
    model: Annotated[str, typer.Option("--model", help="An alias, a Hub id or a folder.")],
    forget: Annotated[
        str | None,
        typer.Option("--forget", help="A recipe, a forget pack's folder or a Hub id; none: the plain model."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: greedy; above: sampled.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of sampling.")] = 0,
    show_gate: Annotated[bool, typer.Option("--show-gate", help="Show the gate's score of each prompt.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="On a pipe: JSON objects in and out.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Talk to a (guarded) model; on a pipe, one prompt a line in, one answer a line out."""
    from ecoprompt.forget import load_forget
    from ecoprompt.models import load_model, resolve
    from ecoprompt.recipe import parse_model

    settings = parse_model({"name": model, "dtype": dtype})
    resolve(model)
    with _progress() as progress:
        spec = load_forget(forget, progress) if forget is not None else None
        loaded = load_model(settings)
    from ecoprompt.chat import Chat, Options, converse, pipe

    with Chat(loaded, spec, Options(max_new_tokens, temperature, seed, system)) as session:
        if sys.stdin.isatty() and not jsonl:
            import readline  # noqa: F401  (line editing and recall in input())

            converse(session, _console(), functools.partial(input, "> "), show_gate)
        else:
            sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
            sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
            pipe(session, sys.stdin, sys.stdout, jsonl, sys.stderr if show_gate else None)


def _print_json(document: Any) -> None:
    from ecoprompt.results import to_json

    print(to_json(document))


def _print_plan(recipe: Any, json: bool) -> None:
    """What would run: the recipe with its defaults, its runs, rows and devices."""
    from ecoprompt.evaluate import plan

    planned = plan(recipe)
    if json:
        _print_json(planned)
        return
    import tomli_w

    print(tomli_w.dumps(planned["recipe"]))
    for name, run in planned["runs"].items():
        print(f"# run {name}: {run['model']}{', guarded' if run['guarded'] else ''}")
    for benchmark, rows in planned["rows"].items():
        counts = ", ".join(f"{subset} {'?' if count is None else count}" for subset, count in rows.items())
        print(f"# rows of {benchmark}: {counts}")
    print(f"# devices: {planned['devices']}")


def main() -> None:
    """The console script."""
    app()
