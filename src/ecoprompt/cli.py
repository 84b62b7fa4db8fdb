"""The commands: parse, call one function, print. No logic."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ecoprompt import hub, processes, terminal
from ecoprompt.printing import print_compared, print_evaluated, print_gate, print_learned, print_plan, print_trained
from ecoprompt.registry import load_plugin
from ecoprompt.terminal import number, one_of

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
PluginOption = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="Run your own Python file first, for what it registers. Repeatable."),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RESULTS = Path("results")
FORMATS = ("latex", "markdown", "csv")
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar=f"<{'|'.join(FORMATS)}>",
        parser=one_of("--format", *FORMATS),
        help="Print the table as this, and no more.",
    ),
]
TWO = "folders, or names of recipes under DIR. Takes the place of RECIPE."


def _command(function: F) -> F:
    """Register a command; the one place where errors become a message on stderr and an exit status."""

    @functools.wraps(function)
    def translated(*args: Any, plugin: list[Path] | None = None, debug: bool = False, **kwargs: Any) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        hub.once = True
        try:
            for file in plugin or []:
                load_plugin(file)
            function(*args, **kwargs)
            sys.stdout.flush()
            processes.leave()
        except KeyboardInterrupt:
            terminal.fail("interrupted; what was finished is kept", 130)
        except BrokenPipeError:
            terminal.drop_output()
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (*terminal.FULL, errno.EIO):
                terminal.drop_output()
            told = terminal.message(error)
            terminal.speak_up()
            if debug:
                traceback.print_exc()
            terminal.fail(*told)

    # Typer reads the parameters off the signature that functools.wraps copied; these two are every command's.
    signature = inspect.signature(function, eval_str=True)
    parameters = [
        *signature.parameters.values(),
        inspect.Parameter("plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=PluginOption),
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption),
    ]
    translated.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    translated.__annotations__ = {one.name: one.annotation for one in parameters}
    app.command(name=function.__name__.replace("_", "-"))(translated)
    return function


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
    """Train a recipe's gate and write a forget pack.

    The gate's threshold is calibrated as the recipe asks, and its errors are measured on each of its data sets.
    """
    from ecoprompt.pack import train_classifier
    from ecoprompt.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if dry_run:
        from ecoprompt.planning import gate_part

        print_plan(gate_part(loaded), json)
        return
    with terminal.progress_bar(output / loaded.name) as progress:
        folder, trained = train_classifier(loaded, output, progress)
    print_gate(loaded, folder, trained, json)


@_command
def optimize(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: OutputOption = RESULTS,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the search to DIR/<recipe>/optimize.png.")] = False,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Learn a corruption's strength or dims.

    The metric that [optimize] names is brought to its target on a held-out part of the forget set, and what is found
    is written into the forget pack. Started again after an interruption, it goes on where it was.
    """
    from ecoprompt.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    from ecoprompt.optimize import check_plot, draw, optimize, search_of

    search_of(loaded)
    if plot:
        check_plot()
    if dry_run:
        print_plan(loaded, json)
        return
    with terminal.progress_bar(output / loaded.name) as progress:
        learned = optimize(loaded, output, progress)
    drawn = draw(loaded, learned, output) if plot else None
    print_learned(learned, drawn, json)


def _recipe_or_comparison(context: typer.Context, recipe: str | None) -> str | None:
    if recipe is None and context.params.get("compare") is None:
        raise typer.BadParameter("Missing argument 'RECIPE', or --compare A B.")
    return recipe


@_command
def evaluate(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A TOML file, or the name of a shipped recipe.", callback=_recipe_or_comparison
        ),
    ] = None,
    set_: SetOption = None,
    output: OutputOption = RESULTS,
    report: Annotated[
        bool, typer.Option("--report", help="Write DIR/<recipe>/report.html, a page to look at.")
    ] = False,
    format_: FormatOption = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", is_eager=True, help="Set two earlier results side by side: " + TWO),
    ] = None,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Evaluate a recipe's runs on its benchmarks.

    Prints the table of results and writes it, with every row, to DIR/<recipe>/. Started again after an
    interruption, it goes on where it was.
    """
    if compare is not None:
        print_compared(compare, output, json, alone=not (recipe or set_ or report or format_ or dry_run))
        return
    from ecoprompt.recipe import load_recipe
    from ecoprompt.registry import InputError

    if json and format_:
        raise InputError("--json and --format: expected one of the two")
    loaded = load_recipe(recipe or "", set_ or [])
    from ecoprompt.evaluate import evaluate, runs_of

    if dry_run:
        runs_of(loaded)
        print_plan(loaded, json)
        return
    with terminal.progress_bar(output / loaded.name) as progress:
        found = evaluate(loaded, output, progress)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if report:
        from ecoprompt.report import write_report

        found.files.append(write_report(output / loaded.name, found.summary, found.rows))
    if json:
        terminal.print_json({name: found.summary[name] for name in ("recipe", "forget", "seed", "runs")})
        return
    print_evaluated(found, format_)
    print(f"written: {', '.join(map(str, found.files))}", file=sys.stderr)


@_command
def finetune(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: OutputOption = RESULTS,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train the model to unlearn from, and a retain model.

    They are written to DIR/<recipe>/models/. Started again after an interruption, it goes on where it was.
    """
    from ecoprompt.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    from ecoprompt.lessons import check_lessons, finetune_table

    table = finetune_table(loaded)
    if dry_run:
        print_plan(loaded, json)
        return
    check_lessons(loaded, table.base, table.also)
    with terminal.progress_bar(output / loaded.name) as progress:
        from ecoprompt.finetune import finetune

        print_trained(finetune(loaded, output, progress), json)


@_command
def baseline(
    recipe: RecipeArgument,
    loss: Annotated[
        str | None,
        typer.Option("--loss", metavar="METHOD", help="A named method, as in npo; default: [baseline] loss."),
    ] = None,
    set_: SetOption = None,
    output: OutputOption = RESULTS,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Unlearn in weight space, to compare with.

    By a method of the literature: ft, ga, gd, kl, rd, llmu, scrub, idk, dpo, npo, npo-gd, npo-kl, simnpo, rmu, undial,
    wga, satimp or ceu. The model is written to DIR/<recipe>/baselines/METHOD/, with what it cost. Started again after
    an interruption, it goes on where it was.
    """
    from ecoprompt.recipe import load_recipe

    loaded = load_recipe(recipe, [*(set_ or []), *([f"baseline.loss={loss}"] if loss else [])])
    from ecoprompt.lessons import baseline_table, check_lessons

    baseline_table(loaded)
    if dry_run:
        print_plan(loaded, json)
        return
    check_lessons(loaded, loaded.model.name)
    with terminal.progress_bar(output / loaded.name) as progress:
        from ecoprompt.baseline import baseline

        print_trained(dict([baseline(loaded, output, progress)]), json)


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
            parser=number("--max-new-tokens", int, 1),
            help="The most tokens of an answer.",
        ),
    ] = 200,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            metavar="T",
            parser=number("--temperature", float, 0, 100),
            help="0: the likeliest answer; above: sampled, the wilder the higher.",
        ),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", parser=number("--seed", int, 0, 2**32), help="Seed of sampling.")
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
    with terminal.progress_bar() as progress:
        spec = load_forget(forget, progress) if forget is not None else None
        progress("loading the model", 0, 1)
        loaded = load_model(settings)
    from ecoprompt.chat import Chat, converse, pipe, raw_lines

    session = Chat(loaded, spec, max_new_tokens, temperature, seed, system)
    if sys.stdin.isatty() and sys.stdout.isatty() and not jsonl:
        import readline  # noqa: F401  (line editing and recall in input())

        converse(session, terminal.console(), functools.partial(input, "> "), show_gate)
    else:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        pipe(session, raw_lines(sys.stdin), sys.stdout, jsonl, sys.stderr if show_gate else None)


def main() -> None:
    """The console script."""
    terminal.hush()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, terminal.interrupt)
    # A stream that the caller has closed is one where nothing comes from and where nothing is seen.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    try:
        app()
    except OSError as error:  # what --help prints may have nowhere to go, too
        terminal.drop_output()
        print(f"ecoprompt: {terminal.message(error)[0]}", file=sys.stderr)
        sys.exit(1)
