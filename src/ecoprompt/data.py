"""Rows from the Hugging Face Hub or from local files, seeded samples and splits."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ecoprompt.hub import out_of_reach
from ecoprompt.passages import passages
from ecoprompt.registry import EcopromptError, InputError, nearest

T = TypeVar("T")
Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
ENVIRONMENT = "ECOPROMPT_DATA"

_MOST_PROBLEMS = 5
_KINDS = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
_EXPECTED = {str: "text", list: "a list of at least one text", object: "a value"}


@dataclass(frozen=True)
class Source:
    """Where rows come from: a data set on the Hub, or a file (`path`, whose suffix may be left out).

    `local` is where under the root a copy lies that is not called after its Hub id; without `hub`, it is all there is.
    `base` is the folder that holds the file.
    """

    hub: str | None = None
    config: str | None = None
    split: str = "train"
    path: str | None = None
    revision: str | None = None
    local: str | None = None
    base: str | None = None

    @property
    def label(self) -> str:
        """The source in words, for messages."""
        return self.path or ", ".join(part for part in (self.hub or self.local, self.config, self.split) if part)

    @property
    def stem(self) -> str:
        """What a local copy in the data set's folder is called, but for its suffix."""
        return self.config or self.split


class Rows(list[Row]):
    """Rows that know their places: `place(i)` is "file:line" or "data set: row i" of the row at index i."""

    def __init__(self, rows: Iterable[Row], origin: str, places: Sequence[str] = ()) -> None:
        super().__init__(rows)
        self.origin = origin
        self._places = places or [_row(number) for number in range(1, len(self) + 1)]

    def place(self, index: int) -> str:
        """Where the row at `index` stands; lines and rows are counted from 1."""
        return f"{self.origin}{self._places[index]}"

    def take(self, indices: Sequence[int]) -> Rows:
        """The rows at `indices`, which still know their places."""
        return Rows([self[i] for i in indices], self.origin, [self._places[i] for i in indices])


def _row(number: int) -> str:
    return f": row {number}"


def load_rows(source: Source, root: Path | None = None) -> Rows:
    """All rows of `source`, from a local file if there is one, else from the Hub (or its cache).

    Files are looked for under `root`, else under the folder that ECOPROMPT_DATA names. Raises
    InputError for a bad file and EcopromptError where the data can be had from nowhere.
    """
    path = local_file(source, root)
    return _read(path) if path is not None else _download(source, root)


@contextlib.contextmanager
def told_together(sources: Callable[[], Iterable[Source]], root: Path | None) -> Iterator[None]:
    """Adds to the error of a data set that cannot be had all of `sources` that no local file holds."""
    try:
        yield
    except InputError:
        raise
    except EcopromptError as error:
        absent = dict.fromkeys(source.label for source in sources() if local_file(source, root) is None)
        listed = f"\nNo local file holds any of what is read: {'; '.join(absent)}." if len(absent) > 1 else ""
        raise EcopromptError(f"{error}{listed}") from error


def local_file(source: Source, root: Path | None = None) -> Path | None:
    """The file that holds `source`, None if it has to come from the Hub."""
    if source.path is not None:
        path = _file(Path(source.path))
        if source.base is not None and not path.resolve().is_relative_to(Path(source.base).resolve()):
            raise InputError(
                f"{path}: lies outside '{source.base}', the recipe's folder, where its own files are to be"
            )
        return path
    for stem in _stems(source, _root(root)):
        for suffix in SUFFIXES:
            path = stem.with_name(stem.name + suffix)
            if path.is_file():
                return path
    return None


def sample(rows: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` rows, in their original order; a smaller sample is part of a larger one."""
    return [rows[index] for index in sorted(_shuffled(len(rows), seed)[:limit])]


def split(rows: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(the rest, the held-out `fraction` of the rows), drawn by seed, both in their original order."""
    held_out = set(_shuffled(len(rows), seed)[: round(fraction * len(rows))])
    kept = [row for index, row in enumerate(rows) if index not in held_out]
    return kept, [rows[index] for index in sorted(held_out)]


def _shuffled(count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def opening(text: str, words: int | None) -> str:
    """`text` up to the end of its word number `words`, as it is written there; all of it for None."""
    if words is None:
        return text
    rest = text.split(maxsplit=words)[words:]
    return text.removesuffix("".join(rest)).rstrip()


def check_columns(rows: Rows, columns: Mapping[str, type]) -> None:
    """Raises InputError that names the first bad rows with what was found and what was expected.

    `str` asks for a text, `list` for a list of at least one text, `object` for anything but null.
    """
    absent = [name for name in columns if not any(name in row for row in rows)]
    problems = [f"{rows.origin}: in all rows {_mismatch(rows[0], name, columns[name])}" for name in absent if rows]
    present = [(name, kind) for name, kind in columns.items() if name not in absent]
    for index, row in enumerate(rows):
        mismatches = (_mismatch(row, name, kind) for name, kind in present)
        problems += [f"{rows.place(index)}: {found}" for found in mismatches if found]
    if problems:
        _refuse(problems)


def _mismatch(row: Row, name: str, kind: type) -> str | None:
    if name not in row:
        return f"found no column '{name}', expected {_EXPECTED[kind]}; {nearest(name, row)}"
    value = row[name]
    if kind is str:
        right = _is_text(value)
    elif kind is list:
        right = isinstance(value, list) and bool(value) and all(map(_is_text, value))
    else:
        right = value is not None
    return None if right else f"column '{name}': found {_show(value)}, expected {_EXPECTED[kind]}"


def _is_text(value: object) -> bool:
    """Whether it is a text that is not blank and that UTF-8 can hold (JSON allows lone surrogates)."""
    try:
        return isinstance(value, str) and value.strip() != "" and value.encode() != b""
    except UnicodeEncodeError:
        return False


def shortened(value: object) -> str:
    """A value as JSON of at most 60 letters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _show(value: object) -> str:
    """A value as JSON, shortened, with its kind."""
    text = shortened(value)
    if value is None or isinstance(value, bool):
        return text
    return f"{text} ({_KINDS.get(type(value), type(value).__name__)})"


def _refuse(problems: Sequence[str]) -> NoReturn:
    more = len(problems) - _MOST_PROBLEMS
    raise InputError(*problems[:_MOST_PROBLEMS], *([f"and {more} more problems of this kind"] if more > 0 else []))


def _root(root: Path | None) -> Path | None:
    """The folder of local data sets; a folder that was named and is not there is a mistake."""
    named = root or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    if named is not None and not named.is_dir():
        key = "[data] root" if root else ENVIRONMENT
        raise InputError(f"{key}: found no folder '{named}', expected one that holds data sets; {_neighbour(named)}")
    return named


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f"'{path.parent}' is not there either"
    hint = nearest(path.name, [other.name for other in path.parent.iterdir()])
    return hint if hint.startswith("did") else f"'{path.parent}' is there"


def check_below(path: str) -> None:
    """Raises InputError for a path that leads out of the folder of local data sets."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise InputError(f"found '{path}', expected a path below the folder of local data sets")


def _stems(source: Source, root: Path | None) -> list[Path]:
    """The files, without their suffixes, that may be a local copy."""
    for part in (source.hub, source.local, source.stem):
        check_below(part or "")
    own = [root / source.local] if root is not None and source.local else []
    return [*own, *(folder / source.stem for folder in _folders(source, root))]


def _folders(source: Source, root: Path | None) -> list[Path]:
    if root is None or source.hub is None:
        return []
    name = source.hub.rpartition("/")[2]
    return list(dict.fromkeys([root / source.hub, root / name, root / name.lower()]))


def _file(path: Path) -> Path:
    """`path`, or the first of `path` with a known suffix; raises InputError if there is none."""
    suffixed = [path.with_name(path.name + suffix) for suffix in SUFFIXES] if path.name else []
    for candidate in (path, *suffixed):
        if candidate.is_file():
            return candidate
    found = "a folder" if path.is_dir() else "no file"
    held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else ""
    hint = f"it holds {held or 'nothing'}" if path.is_dir() else _neighbour(path)
    raise InputError(f"{path}: found {found} of this name, expected a {', '.join(SUFFIXES)} file; {hint}")


def _read(path: Path) -> Rows:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: found a file of an unknown kind, expected {', '.join(SUFFIXES)}")
    rows: list[Row] = []
    places, problems = [], []
    try:
        for place, found in reader(path):
            if isinstance(found, str):
                problems.append(f"{path}{place}: {found}")
            else:
                rows.append(found)
                places.append(place)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if problems:
        _refuse(problems)
    if not rows:
        raise InputError(f"{path}: found no rows, expected at least one")
    return Rows(rows, str(path), places)


Found = Iterator[tuple[str, Row | str]]
"""The places in a file, each with the row that is there, or what is wrong with it."""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, ended by line feeds only: texts may hold other Unicode line separators."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            yield number, _decoded(path, number, raw)


def _decoded(path: Path, line: int, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        found = f"byte 0x{error.object[error.start]:02x} that is not UTF-8"
        raise InputError(f"{path}:{line}: found {found}, expected UTF-8 text") from None


def _read_json_lines(path: Path) -> Found:
    expected = "expected one JSON object a line"
    for number, line in _lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f":{number}", f"found {not_json(error)}, {expected}"
            else:
                yield f":{number}", row if isinstance(row, dict) else f"found {_show(row)}, {expected}"


def not_json(error: Exception) -> str:
    """What was found where JSON could not be read."""
    if isinstance(error, json.JSONDecodeError):
        return f"text that is not JSON ({error.msg.lower().removesuffix(' at')} at column {error.colno})"
    why = "nested too deeply" if isinstance(error, RecursionError) else error
    return f"JSON that cannot be read ({why})"


def _read_json(path: Path) -> Found:
    """A JSON list of objects, or JSON Lines under this suffix, as files on the Hub often are."""
    text = _decoded(path, 1, path.read_bytes())
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(path)
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise InputError(f"{path}:{line}: found {not_json(error)}, expected a list of JSON objects") from None
    for number, value in enumerate(values, 1):
        yield _row(number), value if isinstance(value, dict) else f"found {_show(value)}, expected a JSON object"


def _read_csv(path: Path) -> Found:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                yield f":{start}", f"found {len(cells)} cells, expected {len(header)} as in the header"
            elif cells:
                yield f":{start}", dict(zip(header, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: found a row that is not CSV ({error}), expected cells") from None


def _read_parquet(path: Path) -> Found:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: found a file that is not Parquet ({error}), expected Parquet") from None
    yield from ((_row(number), row) for number, row in enumerate(rows, 1))


def _read_text(path: Path) -> Found:
    """A plain text in passages of whole sentences: columns `text`, `first_sentence` and `rest`."""
    text = _decoded(path, 1, path.read_bytes())
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(line.endswith("?") for line in lines):
        wanted = "put questions into a CSV or JSON lines file, with columns question and answer"
        raise InputError(f"{path}: each of its lines is a question, but a text is read in passages; {wanted}")
    found = passages(text)
    yield from ((_row(number), dict(passage)) for number, passage in enumerate(found, 1))


_READERS = dict(zip(SUFFIXES, (_read_json_lines, _read_json, _read_csv, _read_parquet, _read_text), strict=True))


def _download(source: Source, root: Path | None) -> Rows:
    if source.hub is None:
        where = _root(root)
        raise InputError(
            f"'{source.local}' is not to be had from the Hub: put {source.local}.jsonl (or another of "
            f"{', '.join(SUFFIXES)}) into the folder that [data] root or {ENVIRONMENT} names"
            + (f"; '{where}' does not have it" if where else "")
        )
    why = out_of_reach()
    try:
        import datasets

        loaded = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
        return Rows([dict(row) for row in loaded], source.label)
    # Whatever goes wrong between here and the Hub (network, access, a misspelt name), the remedy is the same.
    except Exception as error:
        raise EcopromptError(_unavailable(source, root, why or f"{type(error).__name__}: {error}")) from error


def _unavailable(source: Source, root: Path | None, reason: str) -> str:
    folders = _folders(source, _root(root))
    there = next((folder for folder in folders if folder.is_dir()), None)
    if there is not None:
        names = [path.stem for path in there.iterdir() if path.suffix in SUFFIXES]
        looked = f"'{there}' has no '{source.stem}' in it; {nearest(source.stem, names)}"
    elif folders:
        looked = f"looked for the folders {', '.join(str(folder) for folder in folders)}"
    else:
        looked = "no folder of local data sets is named"
    return (
        f"data set '{source.label}' is neither here nor could it be had from the Hub ({reason.splitlines()[0]})\n"
        f"To read it from files, put {source.stem}.jsonl into DIR/{source.hub} and name DIR in {ENVIRONMENT} or "
        f"[data] root ({looked}); or run where the network reaches huggingface.co."
    )
