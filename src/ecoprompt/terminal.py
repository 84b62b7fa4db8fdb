"""What commands print with: tables, progress and messages, each where a pipe or a terminal expects it."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from ecoprompt import processes
from ecoprompt.files import check_writable

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console

    from ecoprompt.registry import Progress

FULL = (errno.ENOSPC, errno.EDQUOT)
"""A disk, or a user's share of it, that holds no more."""


def message(error: Exception) -> tuple[str, int]:
    """What a user is told of an error, and the exit status."""
    from ecoprompt.registry import EcopromptError, place_in, plugins

    if processes.lost_another(error):
        time.sleep(2 * PATIENCE)  # in which it speaks for itself, and the launcher ends this one
        return "another process has ended before its time; what was finished is kept", 1
    if isinstance(error, EcopromptError):
        return str(error), error.exit_status
    if isinstance(error, OSError) and error.strerror:
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        if error.errno in FULL:
            return f"{place}{error.strerror}; make room and start the same again: what was finished is kept", 1
        return f"{place}{error.strerror} (--debug shows where)", 1
    own = place_in(error, [getattr(sys.modules.get(Path(name).stem), "__file__", None) for name in plugins])
    return f"{own}{type(error).__name__}: {error} (--debug shows where)", 1


PATIENCE = 5.0
"""Seconds that a process which failed lets the main one speak, and its launcher end it: most often all fail alike."""


def hush() -> None:
    """Of several processes, the main one alone is heard."""
    if not processes.is_main():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def speak_up() -> None:
    """Let a process be heard whose failure is its own: when the main one has not failed by now."""
    if not processes.is_main():
        time.sleep(PATIENCE)
        sys.stderr = sys.__stderr__


def drop_output() -> None:
    """Let what is still to be printed go nowhere: nobody reads it, and the interpreter would complain at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(told: str, status: int) -> NoReturn:
    """Print an error on stderr and end with an exit status."""
    for line in told.splitlines() or [""]:
        # A message may quote a stranger's file, which is not to move the cursor or to recolour the terminal.
        print("ecoprompt:", "".join(x if x.isprintable() else ascii(x)[1:-1] for x in line), file=sys.stderr)
    if processes.count() > 1:  # not to wait for the others, who may be waiting for this one
        sys.stderr.flush()
        os._exit(status)
    raise typer.Exit(status)


def console(stderr: bool = False) -> Console:
    """Colours and control codes go to a terminal only, whatever FORCE_COLOR says."""
    from rich.console import Console

    class OurConsole(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704  (Rich calls it where it has caught the error, and would exit with status 1)

    stream = sys.stderr if stderr else sys.stdout
    return OurConsole(stderr=stderr, highlight=False, force_terminal=stream.isatty())


def show(*tables: Any) -> None:
    """Tables on standard output; off a terminal a row is a line, as long as COLUMNS says or as it is, not filled up."""
    here = console()
    if here.is_terminal:
        here.print(*tables, sep="\n")
        return
    from rich.console import Console

    for one in tables:
        asked = os.environ.get("COLUMNS", "")
        width = int(asked) if asked.isdecimal() and int(asked) else 1000
        wide = Console(file=io.StringIO(), width=width, highlight=False, force_terminal=False)
        wide.print(one)
        print("\n".join(line.rstrip() for line in wide.file.getvalue().splitlines()))  # type: ignore[attr-defined]


@contextlib.contextmanager
def progress_bar(folder: Path | None = None) -> Iterator[Progress]:
    """Progress with the time left on a terminal's stderr, nothing elsewhere, of work that writes to `folder`; raises
    EcopromptError before any if nothing can be written there."""
    if folder is not None:
        check_writable(folder)
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    here = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=here, transient=True, disable=not here.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        shown = ""

        def report(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                bar.reset(task, description=what, total=total, completed=done)
                shown = what
            bar.update(task, completed=done, total=total)

        yield report


def number(
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


def one_of(option: str, *names: str) -> Callable[[str], str]:
    """A parser of an option that is one of `names`."""

    def parse(text: str) -> str:
        if text not in names:
            known = ", ".join(f"'{name}'" for name in names)
            raise typer.BadParameter(f"'{text}' is not one of {known}.", param_hint=f"'{option}'")
        return text

    return parse


def print_json(document: Any) -> None:
    """One document on standard output."""
    from ecoprompt.results import to_json

    print(to_json(document))


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C raises KeyboardInterrupt, put off while torch is imported: its C++ code would abort the process."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        threading.Timer(0.05, signal.raise_signal, [number]).start()
    else:
        signal.default_int_handler(number, frame)
