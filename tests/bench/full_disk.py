"""Runs the four long commands on a disk that is too small, larger each time, and then on one that is large enough.

`python tests/bench/full_disk.py [--sizes 8] [COMMAND …]`, from the project's root folder, by whoever may mount a tmpfs
(root, or below `unshare --map-root-user --mount`); else it says so and does nothing. Where the disk is full, a command
has to end with status 1 and one message that names a file and says what to do; nothing that was finished may be lost,
and what lay there before stays as it is. In the end every file has to say what it says where there was always room.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from killed import COMMANDS, PAGE, contents, differing, finished, live, load

TOLD = re.compile(r"ecoprompt: (\S+): No space left on device; make room and start the same again: .*")


def main() -> int:
    """Exit status 0 if all was as it should be, or no disk could be mounted, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commands", nargs="*", metavar="COMMAND", default=list(COMMANDS))
    parser.add_argument("--sizes", type=int, default=8)
    options = parser.parse_args()
    load()
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in options.commands:
                problems += fill(name, Path(folder) / name, options.sizes)
        except PermissionError as error:
            print(f"skipped: {error}")
    print(f"problems: {len(problems)}")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def fill(name: str, folder: Path, sizes: int) -> list[str]:
    """Runs a command on a disk of so many sizes; what went wrong."""
    folder.mkdir()
    with disk(folder / "large", 1 << 28) as large:
        life = live(name, large)
        expected, room = contents(large), life.pages
        steps = [room * number // sizes for number in range(sizes)] + [room - (1 << number) for number in range(6)]
        with disk(folder / "small", 1 << 28) as small:
            shutil.copytree(large, small / "earlier")
            held = os.statvfs(small).f_blocks - os.statvfs(small).f_bfree
            problems = []
            for pages in sorted(steps):
                resize(small, (held + pages) * PAGE)
                problems += start(name, small, expected)
            resize(small, 1 << 28)
            problems += start(name, small, expected, ends=True)
            return problems + [f"{name}: {path} differs" for path in differing(expected, contents(small / "now"))]


def start(name: str, small: Path, expected: dict[str, object], ends: bool = False) -> list[str]:
    """One start on a disk that may be too small, or on which it `ends`; what went wrong."""
    before = finished(small / "now")
    life = live(name, small / "now")
    told = [line for line in life.said.splitlines() if not line.startswith(("note: ", "written: "))]
    found = TOLD.fullmatch(told[0]) if len(told) == 1 else None
    ended = "done" if life.status == 0 else found[1].removeprefix(f"{small}/now/") if found else "?"
    print(f"{name}: {os.statvfs(small).f_blocks * PAGE // 1024} KiB: {ended}")
    fits, full = life.status == 0 and not told, life.status == 1 and found is not None and not ends
    problems = [] if fits or full else [f"{name}: {life.said}"]
    after = finished(small / "now")
    lost = [what for what, had in before.items() if after.get(what, 0) < had]
    problems += [f"{name}: {what} was lost" for what in lost]
    return problems + [f"{name}: earlier {path} differs" for path in differing(expected, contents(small / "earlier"))]


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of its own at `folder`; PermissionError where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def resize(folder: Path, size: int) -> None:
    """Gives a disk another size, whatever lies on it."""
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


if __name__ == "__main__":
    sys.exit(main())
