"""Errors that users see, and the tables of named functions that recipes choose from."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


MANY, LISTED = 20, 40
"""Of more names than these the beginning of one may name it; more than those are not all listed."""
F = TypeVar("F", bound=Callable[..., Any])

Progress = Callable[[str, int, int], None]
"""What long work reports to: (what is being done, how much is done, of how much)."""


def quiet(what: str, done: int, total: int) -> None:
    """The `Progress` that tells nobody."""


class EcopromptError(Exception):
    """Anything that ends a command with one message; `exit_status` 1 says that the work failed."""

    exit_status = 1


class InputError(EcopromptError):
    """What the user gave is wrong: one or several problems, each a full sentence. Exit status 2."""

    exit_status = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UnguardedError(EcopromptError):
    """The guard refuses a call that it cannot gate, before the model sees the prompt."""


def first_line(error: Exception) -> str:
    """What an error says, up to the end of its first line; its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def nearest(name: str, names: Iterable[str]) -> str:
    """A half-sentence that names the valid name closest to `name`, or lists them all if none is close.

    Names that differ in signs or case only are the same. Of many names, the closest to one that is only begun are the
    shortest that begin so.
    """
    known, bare = sorted(names), _bare(name)
    many = len(known) > MANY
    folded = {other.lower(): other for other in known}
    close = [other for other in known if bare and _bare(other) == bare][:1]
    if many and len(bare) > 2 and not close:
        begun = [other for other in known if _bare(other).startswith(bare)]
        close = sorted(begun, key=lambda other: (len(other), other))[:3]
    close = close or [folded[other] for other in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)]
    if close:
        meant = "' or '".join(close)
        return f"did you mean '{meant}'?"
    if len(known) > LISTED:
        return f"known are {len(known)}: {', '.join(known[:MANY])} and so on"
    return f"known: {', '.join(known)}" if known else "none is known"


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


class Registry(Mapping[str, Any]):
    """Named things of one kind; if they are functions, their keyword-only parameters are their schema in a recipe.

    `home` is the module that fills this table; it is imported when a name is first looked
    up, so that a recipe can be checked against it by modules that stand above it.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind = kind
        self.home = home
        self._items: dict[str, Any] = {}
        self._schemas: dict[str, type[BaseModel]] = {}

    def register(self, function: F) -> F:
        """Decorator: enter `function` under its own name."""
        self.add(function.__name__, function)
        return function

    def add(self, name: str, item: Any) -> None:
        """Enter something that is declared, not programmed, under `name`."""
        if name in self._items:
            raise InputError(f"{self.kind} '{name}' is registered twice; choose another name")
        self._items[name] = item
        if _running:
            _entered[name] = _running[-1]

    def drop(self, name: str) -> None:
        """Take out what is entered under `name`, if anything is."""
        self._items.pop(name, None)
        _entered.pop(name, None)
        self._schemas.pop(name, None)

    def _load(self) -> dict[str, Any]:
        importlib.import_module(self.home)
        return self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())

    def __contains__(self, name: object) -> bool:
        return name in self._load()

    def __getitem__(self, name: str) -> Any:
        items = self._load()
        if name not in items:
            raise InputError(f"there is no {self.unknown(name)}")
        return items[name]

    def unknown(self, name: str) -> str:
        """What a message says of a name that nobody entered."""
        hint = nearest(name, self)
        own = "" if hint.startswith("did you") or plugins else "; or --plugin with the file of yours that registers it"
        return f"{self.kind} '{name}'; {hint}{own}"

    def schema(self, name: str) -> type[BaseModel]:
        """The pydantic model of the keyword-only parameters of `name`; unknown keys are refused."""
        if name not in self._schemas:
            from pydantic import ConfigDict, create_model

            fields: dict[str, Any] = {
                one.name: (one.annotation, ... if one.default is inspect.Parameter.empty else one.default)
                for one in keys_of(self[name])
            }
            config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
            self._schemas[name] = create_model(name, __config__=config, **fields)
        return self._schemas[name]

    def bind(self, name: str, parameters: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """`parameters` checked against the schema of `name`, with every default filled in.

        `where` is the key path under which they stand. Raises InputError with all problems at once.
        """
        from pydantic import ValidationError

        schema = self.schema(name)
        try:
            return schema.model_validate(dict(parameters)).model_dump()
        except ValidationError as error:
            raise InputError(*describe(error, schema, where, f"{self.kind} '{name}'")) from None


@functools.cache
def inputs_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what `function` is called with, in their order; the keyword-only parameters are a recipe's."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind is not inspect.Parameter.KEYWORD_ONLY)


def keys_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The keyword-only parameters of `function`, with their annotations as they are meant where it stands."""
    found = [
        one for one in inspect.signature(function).parameters.values() if one.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return [
        one.replace(annotation=eval(one.annotation, inspect.unwrap(function).__globals__))  # noqa: S307
        if isinstance(one.annotation, str)
        else one
        for one in found
    ]


plugins: dict[str, str] = {}
"""The digest of each Python file that `load_plugin` ran, by its name."""
_running: list[str] = []
_entered: dict[str, str] = {}


def place_in(error: BaseException, files: Iterable[str | None]) -> str:
    """How a message begins of an error: with the file and line of its last step in one of `files`, if there is one."""
    steps, own = traceback.extract_tb(error.__traceback__), set(files)
    return next((f"{step.filename}:{step.lineno}: " for step in reversed(steps) if step.filename in own), "")


def load_plugin(file: Path) -> None:
    """Run a Python file of the user's own, which registers corruptions, loss terms, methods and the like.

    Only a caller may name one, never a recipe or a pack, which may be a stranger's.
    """
    if not file.is_file() or file.suffix != ".py":
        raise InputError(f"--plugin {file}: expected a Python file")
    name, digest = file.stem, hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    known = None if name in sys.modules else importlib.util.find_spec(name)
    if name in sys.modules or (known and Path(known.origin or "").resolve() != file.resolve()):
        raise InputError(f"--plugin {file}: there is a module '{name}' already, rename the file")
    for registry in (corruptions, selectors, gates, pressures, metrics, benchmarks, searches, losses):
        len(registry)  # the package's own names come first, so that a plug-in's is the one registered twice
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    _running.append(digest)
    try:
        spec.loader.exec_module(module)
    except InputError as error:
        del sys.modules[name]
        raise InputError(f"--plugin {file}: {error}") from None
    except Exception as error:  # whatever the user's own code raises
        del sys.modules[name]
        place = place_in(error, [module.__file__])
        raise InputError(f"--plugin {file}: {place}{type(error).__name__}: {error} (--debug shows where)") from error
    finally:
        _running.clear()
    plugins[file.name] = digest


def plugged(document: str) -> list[str]:
    """The digests of the plug-ins that entered a name which stands in a JSON document, as a string of its own."""
    return sorted({digest for name, digest in _entered.items() if json.dumps(name) in document})


def describe(error: ValidationError, schema: type[BaseModel], where: str, what: str) -> list[str]:
    """One sentence for each key that a pydantic `error` finds fault with: what was found, what was expected."""
    sentences: dict[tuple[str, ...], str] = {}
    for problem in error.errors(include_url=False):
        path, _ = _walk(schema, problem["loc"])
        sentence = _describe_one(problem, schema, path, what)
        # A union reports each of its branches: join them under one key, and let the deepest speak.
        if path in sentences and " expected " in sentence:
            sentences[path] += " or " + sentence.rpartition(" expected ")[2]
        else:
            sentences[path] = sentence
    deepest = [
        path for path in sentences if not any(path and path == other[: len(path)] != other for other in sentences)
    ]
    keys = {path: ".".join([where, *path] if where else path) for path in deepest}
    return [f"'{key}': {sentences[path]}" if key else sentences[path] for path, key in keys.items()]


_EXPECTED = {
    "bool_type": "true or false",
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "at least {min_length} of them",
}
"""What pydantic expected, by its type of error, in the words of a recipe."""


def _describe_one(problem: Mapping[str, Any], schema: type[BaseModel], path: Sequence[str], what: str) -> str:
    if problem["type"] == "extra_forbidden":
        _, table = _walk(schema, problem["loc"][:-1])
        names = getattr(table, "model_fields", {})
        place = f"[{'.'.join(path[:-1])}]" if path[:-1] else what
        return f"{place} has no key '{path[-1]}'; {nearest(path[-1], names)}"
    if problem["type"] == "missing":
        _, table = _walk(schema, problem["loc"][:-1])
        field = getattr(table, "model_fields", {}).get(path[-1]) if path else None
        return f"this key is needed ({field.description})" if field and field.description else "this key is needed"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    found = show(problem["input"])
    expected = re.sub(r"^(Input|[A-Z]\w+) should (be |have )?", "", problem["msg"])
    expected = _EXPECTED.get(problem["type"], expected.replace("{", "{{").replace("}", "}}"))
    limits = {key: f"{value:g}" if isinstance(value, float) else value for key, value in problem.get("ctx", {}).items()}
    return f"found {found}, expected {expected.format(**limits)}"


def show(value: object) -> str:
    """A value found in a recipe, for a message: shortened, with true and false as TOML writes them."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _walk(schema: type[BaseModel], location: Sequence[object]) -> tuple[tuple[str, ...], Any]:
    """What a recipe shows of a pydantic location (the branches of unions left out), and the type that stands there."""
    path: list[str] = []
    here: Any = schema
    for step in location:
        branches = _branches(here)
        if len(branches) > 1:
            kind = str(step).removeprefix("constrained-").partition("[")[0]
            here = next((b for b in branches if getattr(b, "__name__", "") == kind), None)
            continue
        path.append(str(step))
        here = branches[0] if branches else None
        if hasattr(here, "model_fields"):
            field = here.model_fields.get(step)
            here = field.annotation if field is not None else None
        else:
            inner = typing.get_args(here)[isinstance(step, str) :]
            here = inner[0] if inner else None
    branches = _branches(here)
    return tuple(path), branches[0] if len(branches) == 1 else here


def _branches(annotation: Any) -> list[Any]:
    """The members of a union without None, or the one type that `annotation` is; what annotates them is left out."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _branches(members[0])
    if origin in (typing.Union, types.UnionType):
        return [branch for member in members if member is not type(None) for branch in _branches(member)]
    return [] if annotation is None else [annotation]


corruptions = Registry("corruption", "ecoprompt.corruption")
selectors = Registry("token selector", "ecoprompt.tokens")
gates = Registry("gate kind", "ecoprompt.gate")
pressures = Registry("pressure", "ecoprompt.pressure")
metrics = Registry("metric", "ecoprompt.similarity")
aggregates = Registry("aggregate", "ecoprompt.similarity")
benchmarks = Registry("benchmark", "ecoprompt.benchmarks")
searches = Registry("search method", "ecoprompt.searches")
losses = Registry("loss term", "ecoprompt.losses")
methods = Registry("method", "ecoprompt.losses")
