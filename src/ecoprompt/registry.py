"""Errors that users see, and the tables of named functions that recipes choose from."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


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


def nearest(name: str, names: Iterable[str]) -> str:
    """A half-sentence that names the valid name closest to `name`, or lists them all if none is close."""
    known = sorted(names)
    folded = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{folded[close[0]]}'?"
    return f"known: {', '.join(known)}" if known else "none is known"


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
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._items[name] = item

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
            raise InputError(f"there is no {self.kind} '{name}'; {nearest(name, items)}")
        return items[name]

    def schema(self, name: str) -> type[BaseModel]:
        """The pydantic model of the keyword-only parameters of `name`; unknown keys are refused."""
        if name not in self._schemas:
            from pydantic import ConfigDict, create_model

            function = self[name]
            fields: dict[str, Any] = {}
            for parameter in inspect.signature(function).parameters.values():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    annotation = parameter.annotation
                    if isinstance(annotation, str):
                        annotation = eval(annotation, vars(inspect.getmodule(function)))  # noqa: S307
                    default = ... if parameter.default is inspect.Parameter.empty else parameter.default
                    fields[parameter.name] = (annotation, default)
            config = ConfigDict(extra="forbid", frozen=True, strict=True)
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


def describe(error: ValidationError, schema: type[BaseModel], where: str, what: str) -> list[str]:
    """One sentence for each key that a pydantic `error` finds fault with: what was found, what was expected."""
    sentences: dict[str, str] = {}
    branches = {table.__name__ for table in _tables(schema)} | {"float", "int", "str", "bool"}
    for problem in error.errors(include_url=False):
        path = [str(step) for step in problem["loc"] if not _is_branch(step, branches)]
        key = ".".join([where, *path] if where else path)
        sentence = _describe_one(problem, schema, path, what)
        # A union reports each of its branches: join them under one key, and let the deepest speak.
        if key in sentences and " expected " in sentence:
            sentences[key] += " or " + sentence.partition(" expected ")[2]
        else:
            sentences[key] = sentence
    deepest = [key for key in sentences if not any(other.startswith(key + ".") for other in sentences if key)]
    return [f"'{key}': {sentences[key]}" if key else sentences[key] for key in deepest]


def _describe_one(problem: Mapping[str, Any], schema: type[BaseModel], path: Sequence[str], what: str) -> str:
    if problem["type"] == "extra_forbidden":
        names = _fields_at(schema, problem["loc"][:-1])
        table = f"[{'.'.join(path[:-1])}]" if path[:-1] else what
        return f"{table} has no key '{path[-1]}'; {nearest(path[-1], names)}"
    if problem["type"] == "missing":
        return "this key is needed"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    found = problem["input"]
    expected = re.sub(r"^(Input should (be|have)|[A-Z]\w+ should (be|have)) ", "", problem["msg"])
    expected = re.sub(r"a valid dictionary or instance of \w+", "a table", expected)
    return f"found {found!r}, expected {expected}"


def _is_branch(step: object, names: set[str]) -> bool:
    """Whether a step of a pydantic location names the branch of a union, which no recipe shows."""
    return isinstance(step, str) and (
        step in names or re.match(r"(dict|list|tuple)\[|constrained-|function-", step) is not None
    )


def _tables(schema: Any) -> list[type[BaseModel]]:
    """All pydantic models that the fields of `schema` are made of."""
    from pydantic import BaseModel

    found: list[type[BaseModel]] = []
    for field in schema.model_fields.values():
        for member in _members(field.annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                found += [member, *_tables(member)]
    return found


def _fields_at(schema: type[BaseModel], path: Sequence[object]) -> list[str]:
    """The keys that are valid in the table at `path` of `schema`."""
    from pydantic import BaseModel

    here: Any = schema
    for step in path:
        if isinstance(step, str) and isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get(step)
            here = field.annotation if field is not None else here
        tables = [t for t in _members(here) if isinstance(t, type) and issubclass(t, BaseModel)]
        here = tables[0] if tables else here
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []


def _members(annotation: Any) -> list[Any]:
    """An annotation and the types inside it: `dict[str, Run] | None` gives Run among others."""
    inner = [member for argument in getattr(annotation, "__args__", ()) for member in _members(argument)]
    return [annotation, *inner]


corruptions = Registry("corruption", "ecoprompt.corruption")
selectors = Registry("token selector", "ecoprompt.tokens")
gates = Registry("gate kind", "ecoprompt.gate")
metrics = Registry("metric", "ecoprompt.metrics")
aggregates = Registry("aggregate", "ecoprompt.metrics")
benchmarks = Registry("benchmark", "ecoprompt.benchmarks")
