"""The commands: parse, call one function, print. No logic."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from types import FrameType

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
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, typed as TOML: corruption.strength=50. Repeatable."
    ),
]
OutputOption = Annotated[
    Path, typer.Option("--output", metavar="DIR", file_okay=False, help="Where DIR/<recipe>/ is written.")
]
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
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            _fail("interrupted; what was finished is kept", 130)
        except BrokenPipeError:
            _drop_output()
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO):
                _drop_output()
            if debug:
                traceback.print_exc()
            _fail(*_message(error))

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


def _message(error: Exception) -> tuple[str, int]:
    """What a user is told of an error, and the exit status."""
    from ecoprompt.registry import EcopromptError

    if isinstance(error, EcopromptError):
        return str(error), error.exit_status
    if isinstance(error, OSError) and error.strerror:
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{place}{error.strerror} (--debug shows where)", 1
    return f"{type(error).__name__}: {error} (--debug shows where)", 1


def _drop_output() -> None:
    """Let what is still to be printed go nowhere: nobody reads it, and the interpreter would complain at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int) -> None:
    for line in message.splitlines() or [""]:
        # A message may quote a stranger's file, which is not to move the cursor or to recolour the terminal.
        print("ecoprompt:", "".join(x if x.isprintable() else ascii(x)[1:-1] for x in line), file=sys.stderr)
    raise typer.Exit(status)


def _console(stderr: bool = False) -> Console:
    """Colours and control codes go to a terminal only, whatever FORCE_COLOR says."""
    from rich.console import Console

    class OurConsole(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704  (Rich calls it where it has caught the error, and would exit with status 1)

    stream = sys.stderr if stderr else sys.stdout
    return OurConsole(stderr=stderr, highlight=False, force_terminal=stream.isatty())


def _show(*tables: Any) -> None:
    """Tables on standard output; off a terminal a row is a line, however long, and nothing fills it up."""
    console = _console()
    if console.is_terminal:
        console.print(*tables, sep="\n")
        return
    from rich.console import Console

    for one in tables:
        wide = Console(file=io.StringIO(), width=1000, highlight=False, force_terminal=False)
        wide.print(one)
        print("\n".join(line.rstrip() for line in wide.file.getvalue().splitlines()))  # type: ignore[attr-defined]


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


def _number(
    option: str, kind: type[int] | type[float], least: int, most: float = 2**63 - 1
) -> Callable[[Any], int | float]:
    """A parser of an option's number, from `least` to `most`."""

    def parse(text: Any) -> int | float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and least <= value <= most:
                return value
        what = "a whole number" if kind is int else "a number"
        bound = f"of at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
        raise typer.BadParameter(f"found '{text}', expected {what} {bound}", param_hint=f"'{option}'")

    return parse


@_command
def train_classifier(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: OutputOption = RESULTS,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train a recipe's gate and write a forget pack.

    The gate's threshold is calibrated as the recipe asks, and its errors are measured on each of its data sets.
    """
    from ecoprompt.pack import train_classifier
    from ecoprompt.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if dry_run:
        _print_plan(loaded, json)
        return
    with _progress() as progress:
        folder, trained = train_classifier(loaded, output, progress)
    from ecoprompt.results import gate_report
    from ecoprompt.tables import gate_table

    if json:
        measured = gate_report(trained.measured)
        _print_json({"pack": str(folder), "threshold": trained.threshold, "measured": measured, **trained.about})
        return
    _show(gate_table(trained.measured, trained.threshold))
    print(folder)


@_command
def evaluate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: OutputOption = RESULTS,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Evaluate a recipe's runs on its benchmarks.

    Prints the table of results and writes it, with every row, to DIR/<recipe>/. Started again after an
    interruption, it goes on where it was.
    """
    from ecoprompt.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    from ecoprompt.evaluate import evaluate, runs_of

    if dry_run:
        runs_of(loaded)
        _print_plan(loaded, json)
        return
    with _progress() as progress:
        found = evaluate(loaded, output, progress)
    if json:
        _print_json({name: found.summary[name] for name in ("recipe", "forget", "seed", "runs")})
        return
    from ecoprompt.tables import grid_tables, side_by_side, table

    prompts, targets, answers = found.samples()
    _show(table(found.summary), *grid_tables(found.summary))
    if prompts:
        _show(side_by_side(prompts, answers, targets))
    print(f"written: {', '.join(map(str, found.files))}", file=sys.stderr)


@_command
def chat(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="An alias, a Hub id or a folder.")],
    forget: Annotated[
        str | None,
        typer.Option(
            "--forget", metavar="FORGET", help="A recipe, a forget pack's folder or a Hub id; none: the plain model."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system prompt.")] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            parser=_number("--max-new-tokens", int, 1),
            help="The most tokens of an answer.",
        ),
    ] = 200,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            metavar="T",
            parser=_number("--temperature", float, 0, 100),
            help="0: the likeliest answer; above: sampled, the wilder the higher.",
        ),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", parser=_number("--seed", int, 0, 2**32), help="Seed of sampling.")
    ] = 0,
    show_gate: Annotated[bool, typer.Option("--show-gate", help="Show the gate's score of each prompt.")] = False,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="On a pipe: JSON objects in (prompt) and out (answer, flagged, score).")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Talk to a guarded or a plain model.

    On a terminal, a conversation; on a pipe, one prompt a line in, one answer a line out.
    """
    from ecoprompt.models import load_model, locate
    from ecoprompt.pack import load_forget
    from ecoprompt.recipe import parse_model

    settings = parse_model({"name": model, "dtype": dtype})
    locate(model)
    with _progress() as progress:
        spec = load_forget(forget, progress) if forget is not None else None
        progress("loading the model", 0, 1)
        loaded = load_model(settings)
    from ecoprompt.chat import Chat, Options, converse, pipe, raw_lines

    with Chat(loaded, spec, Options(max_new_tokens, temperature, seed, system)) as session:
        if sys.stdin.isatty() and sys.stdout.isatty() and not jsonl:
            import readline  # noqa: F401  (line editing and recall in input())

            converse(session, _console(), functools.partial(input, "> "), show_gate)
        else:
            sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
            pipe(session, raw_lines(sys.stdin), sys.stdout, jsonl, sys.stderr if show_gate else None)


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
        print(f"# run {name}: {run['model'] or 'no model'}{', guarded' if run['guarded'] else ''}")
    for benchmark, rows in planned["rows"].items():
        counts = ", ".join(f"{subset} {'?' if count is None else count}" for subset, count in rows.items())
        print(f"# rows of {benchmark}: {counts}")
    print(f"# devices: {planned['devices']}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C raises KeyboardInterrupt, put off while torch is imported: its C++ code would abort the process."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        threading.Timer(0.05, signal.raise_signal, [number]).start()
    else:
        signal.default_int_handler(number, frame)


def main() -> None:
    """The console script."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    # A stream that the caller has closed is one where nothing comes from and where nothing is seen.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    try:
        app()
    except OSError as error:  # what --help prints may have nowhere to go, too
        _drop_output()
        print(f"ecoprompt: {_message(error)[0]}", file=sys.stderr)
        sys.exit(1)
