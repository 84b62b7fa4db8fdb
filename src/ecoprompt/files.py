"""Reading files that a stranger wrote: inside their folder, bounded, and without any code; and writing whole ones."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import stat
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ecoprompt.processes import is_main
from ecoprompt.registry import EcopromptError, InputError

MOST_TEXT = 1 << 20
"""Bytes of a recipe, of a pack's forget.toml, of a settings or a config file."""
MOST_VOCABULARY = 64 << 20
"""Bytes of a tokenizer's file."""
MOST_DOTS = 500
"""Dots of a line of TOML."""
DEEPEST = 20
"""Tables inside tables."""
CODE = {".bin", ".ckpt", ".dill", ".dll", ".dylib", ".gguf", ".h5", ".joblib", ".mar", ".msgpack", ".npy", ".npz"}
CODE |= {".onnx", ".pickle", ".pkl", ".pt", ".pt2", ".pth", ".py", ".pyc", ".pyd", ".sh", ".so", ".zip"}
"""Suffixes of what runs or may run when it is opened, or is no part of a pack."""
CLASSIFIER = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
) + ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")
"""The files of a classifier that are read, and the only ones that are fetched."""


def read_text(path: Path, most: int = MOST_TEXT, what: str = "") -> str:
    """The text of a regular file of at most `most` bytes; raises InputError, which begins with `what`, for others."""
    where = f"{path}: {what}"
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise InputError(f"{where}found what is not a regular file")
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{where}cannot be read ({error.strerror or error})") from None
    if len(raw) > most:
        raise InputError(f"{where}found more than {most} bytes")
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}not UTF-8 text (byte {error.start})") from None


def read_toml(path: Path, what: str = "") -> dict[str, Any]:
    """The tables of a TOML file; raises InputError, which begins with `what`, for one that is not to be read."""
    text = read_text(path, what=what)
    where = f"{path}: {what or 'not valid TOML: '}"
    # A dotted key ends with its line, and the parser's time grows with the square of its steps.
    if any(line.count(".") > MOST_DOTS for line in text.split("\n")):
        raise InputError(
            f"{where}found a line of more than {MOST_DOTS} dots; break it (a long text needs triple quotes)"
        )
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{where}found what is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}{error}") from None
    problem = _unfit(tables)
    if problem is not None:
        raise InputError(f"{where}{problem}")
    return tables


def read_json(path: Path, most: int = MOST_TEXT) -> dict[str, Any]:
    """The object in a JSON file; raises InputError for one that is not to be read."""
    try:
        document = json.loads(read_text(path, most))
    except RecursionError:
        raise InputError(f"{path}: found JSON that is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: found no JSON object")
    return document


def _unfit(tables: dict[str, Any]) -> str | None:
    """What is wrong with the values of a file: depth, or whole numbers past the 64 bits that TOML has."""
    level: list[Any] = [tables]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for one in level:
            inner += one.values() if isinstance(one, dict) else one
        if any(isinstance(one, int) and not -(2**63) <= one < 2**63 for one in inner):
            return "found a whole number of more than 64 bits"
        level = [one for one in inner if isinstance(one, (dict, list))]
        if not level:
            return None
    return "found what is nested too deeply"


def check_folder(folder: Path, codeless: bool = True) -> None:
    """Raises InputError unless `folder` holds files and folders alone, no link that leads out of it, nothing that runs.

    In a snapshot of the Hub's cache, links lead to the files of the same repository. `codeless = False` lets files
    that may run lie there, unopened, as they do in published classifiers beside their safetensors.
    """
    root = _root(folder)
    for path in _walk(folder):
        if not path.resolve().is_relative_to(root):
            raise InputError(f"{path}: found a link that leads out of the folder")
        if not path.is_dir() and not path.is_file():
            raise InputError(f"{path}: found what is not a regular file")
        if codeless and path.suffix.lower() in CODE:
            raise InputError(f"{path}: found what may hold code, expected TOML, JSON, text and safetensors alone")


def _root(folder: Path) -> Path:
    here = folder.resolve()
    cached = here.parent.name == "snapshots" and here.parents[1].name.startswith(("models--", "datasets--"))
    return here.parents[1] if cached else here


def _walk(folder: Path, most: int = 1000) -> Iterator[Path]:
    """What is in a folder and its folders; links are not followed, nor is what tools keep in hidden folders read."""
    found = 0
    for here, folders, files in os.walk(folder):
        inside = sorted([*folders, *files])
        found += len(inside)
        if found > most:
            raise InputError(f"{folder}: found more than {most} files, expected a pack or a classifier")
        yield from (Path(here, name) for name in inside)
        folders[:] = [name for name in folders if not name.startswith(".")]


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a safetensors file, read off its header alone.

    Raises InputError for a file that is cut off, or whose header claims what the file does not hold.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file, or one that is cut off ({error})") from None


ABANDONED = 600
"""Seconds after which a half-written file is one that a killed process left."""
FULL = re.compile(r"No space left|os error 28|PytorchStreamWriter|iostream error|unexpected pos \d+ vs")
"""What safetensors, tokenizers and torch say where they can write no further."""


def check_writable(folder: Path) -> None:
    """Raises EcopromptError at once if nothing can be written to `folder`, or to where it is to be made."""
    import tempfile

    try:
        tempfile.TemporaryFile(dir=next(one for one in (folder, *folder.parents) if one.exists())).close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # there may be nothing left to write
            return
        raise EcopromptError(f"{folder}: {error.strerror}; --output DIR writes elsewhere") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes the folder of a file that is to be written; if it cannot be, an OSError says which file that was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise
    # Of tokenizers, a bare Exception. Torch does not say why it cannot write: it hardly ever is anything else.
    except Exception as error:
        if FULL.search(str(error)) is None:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def append_line(path: Path, line: str) -> None:
    """Append a line in one write that is on the disk at the end, after closing one that a killed process left torn."""
    with writing(path), path.open("ab+", buffering=0) as file:
        owed = ""
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            owed = "" if file.read(1) == b"\n" else "\n"
        left = memoryview(f"{owed}{line}\n".encode())
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader finds the old file or the new one, whole, whenever the writer is killed.

    Of the processes of a launcher, the main one alone writes.
    """
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """As `write_text_atomic`, of bytes."""
    if not is_main():
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
            with contextlib.suppress(FileNotFoundError):  # what another process has put in its place by now
                if left.suffix[1:].isdecimal() and left.stat().st_mtime < time.time() - ABANDONED:
                    left.unlink()
