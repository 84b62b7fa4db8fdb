"""Prompt templates: the part of Jinja that can neither run code nor take more than a moment, whoever wrote them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ecoprompt.registry import InputError, nearest

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.environment import TemplateExpression

T = TypeVar("T")

LONGEST = 20_000
"""Characters of a template; what is longer is nobody's prompt."""
LARGEST = 1_000_000
"""Characters of a filled template."""
TOO_LONG = f"the prompt gets longer than {LARGEST} characters"
_DEEPEST = 2
_PARTS = 100
"""Names, values and steps of one expression, of which each step makes a text or a list of LARGEST at most."""
_NODES = (
    {"Template", "Output", "TemplateData", "Name", "Const", "List", "Tuple", "Getattr", "Getitem", "Slice", "Filter"}
    | {"Call", "If", "CondExpr", "Compare", "Operand", "And", "Or", "Not", "Test", "For", "Concat", "Add", "Sub"}
    | {"Div", "FloorDiv", "Neg", "Pos"}
)
_CASES = {"capitalize", "lower", "title", "upper"}
_FILTERS = _CASES | {"default", "e", "first", "int", "join", "last", "length", "list", "replace", "string", "trim"}
_FILTERS |= {"unbracketed"}
_METHODS = _CASES | {"endswith", "index", "lstrip", "removeprefix", "removesuffix", "replace", "rstrip", "split"}
_METHODS |= {"startswith", "strip"}


def fill(template: str, values: Mapping[str, Any]) -> str:
    """`template` (Jinja, sandboxed) rendered with `values`; raises InputError for a name that is not among them."""
    return _filled(template, values, lambda: _bounded(_template(template).generate(values)))


def evaluate(expression: str, values: Mapping[str, Any]) -> Any:
    """What `expression`, the inside of a template's {{ }}, comes to with `values`; raises as `fill` does."""
    return _filled(_printed(expression), values, lambda: _within(_expression(expression)(values)))


def expression_names(expression: str) -> set[str]:
    """The names that `expression` uses; raises InputError as `template_names` does."""
    names = template_names(_printed(expression))
    _filled(_printed(expression), {}, lambda: _expression(expression))
    return names


def _filled(template: str, values: Mapping[str, Any], compute: Callable[[], T]) -> T:
    """`compute()`, with what goes wrong told as InputError."""
    import jinja2

    try:
        return compute()
    except jinja2.UndefinedError as error:
        unknown = sorted(template_names(template) - set(values))
        hints = [f"'{name}' ({nearest(name, values)})" for name in unknown] or [str(error)]
        raise InputError(f"template '{_short(template)}': found the unknown name {', '.join(hints)}") from None
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, RecursionError) as error:
        raise InputError(f"template '{_short(template)}': cannot be filled ({error})") from None


def template_names(template: str, *, printed: bool = False) -> set[str]:
    """The names that `template` uses; with `printed`, only those that it prints as they are: {{ name }}.

    Raises InputError for what is not Jinja, and for what no prompt needs and a hostile template would use: macros,
    assignments, products, powers, formats, calls of functions, loops in loops in loops.
    """
    import jinja2
    from jinja2 import meta, nodes

    try:
        tree = _tree(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"template '{_short(template)}': found what is not Jinja ({error.message})") from None
    names: set[str] = meta.find_undeclared_variables(tree)
    shown = {one.name for output in tree.find_all(nodes.Output) for one in output.nodes if isinstance(one, nodes.Name)}
    return names & shown if printed else names


def _tree(template: str) -> Any:
    """The syntax tree of a template that may be filled; raises InputError for one that may not."""
    problem = f"found {len(template)} characters, expected {LONGEST} at most" if len(template) > LONGEST else None
    try:
        tree = None if problem else _environment().parse(template)
        problem = problem or _unfit(tree, 0)
    except RecursionError:
        problem = "found what is nested too deeply"
    if problem is not None:
        raise InputError(f"template '{_short(template)}': {problem}")
    return tree


def _bounded(pieces: Iterable[str]) -> str:
    """All pieces as one text; raises ValueError as soon as they are longer than any prompt."""
    found, length = [], 0
    for piece in pieces:
        found.append(piece)
        length += len(piece)
        if length > LARGEST:
            raise ValueError(TOO_LONG)
    return "".join(found)


def _within(found: T) -> T:
    """What an expression or a step of it makes; raises ValueError if it is longer than any prompt."""
    from jinja2 import Undefined

    if not isinstance(found, Undefined) and len(str(found)) > LARGEST:
        raise ValueError(TOO_LONG)
    return found


def _stepwise(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, a filter, with what it makes bounded."""

    @functools.wraps(step)
    def bounded(*given: Any, **named: Any) -> Any:
        return _within(step(*given, **named))

    return bounded


def _unfit(node: Any, loops: int) -> str | None:
    """What in the tree below `node` no prompt template may hold, None if all is well."""
    from jinja2 import nodes

    kind = type(node).__name__
    if kind not in _NODES:
        return f"found '{kind.lower()}', which a prompt template may not hold"
    if isinstance(node, nodes.For):
        loops += 1
        if loops > _DEEPEST or node.recursive:
            return f"found loops inside loops, expected {_DEEPEST} levels at most"
        if any(True for _ in node.iter.find_all((nodes.Concat, nodes.Add, nodes.Filter))):
            return "found a loop over a text that the template makes itself"
    if isinstance(node, nodes.Concat) and node.find(nodes.Concat):  # which may write a list out, and the list holds it
        return "found '~' inside what another '~' joins"
    if not isinstance(node, nodes.Expr):
        parts = [len([*one.find_all(nodes.Node)]) for one in node.iter_child_nodes() if isinstance(one, nodes.Expr)]
        if max(parts, default=0) > _PARTS:
            return f"found an expression of {max(parts)} parts, expected {_PARTS} at most"
    if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
        return f"found the filter '{node.name}'; known: {', '.join(sorted(_FILTERS))}"
    if isinstance(node, nodes.Call) and not (isinstance(node.node, nodes.Getattr) and node.node.attr in _METHODS):
        return "found a call of a function, expected at most a text's own: " + ", ".join(sorted(_METHODS))
    if isinstance(node, nodes.Filter | nodes.Call) and not _modest(node):
        return "found 'replace' or 'join' with a text that could make the prompt grow without end"
    return next((found for child in node.iter_child_nodes() if (found := _unfit(child, loops))), None)


def _modest(node: Any) -> bool:
    """Whether a filter or a method cannot lengthen a text much: chained, some would do it exponentially."""
    from jinja2 import nodes

    name = node.name if isinstance(node, nodes.Filter) else node.node.attr
    if name not in ("join", "replace"):
        return True
    given = [one.value for one in node.args if isinstance(one, nodes.Const) and isinstance(one.value, str)]
    if node.kwargs or node.dyn_args or node.dyn_kwargs or len(given) < len(node.args):
        return False
    if name == "replace":
        return len(given) == 2 and len(given[1]) <= len(given[0])
    return not any(inner.name == "join" for inner in node.node.find_all(nodes.Filter)) and len("".join(given)) <= 20


def _short(template: str) -> str:
    return template if len(template) <= 200 else f"{template[:200]}…"


@functools.cache
def _environment() -> Environment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["unbracketed"] = _unbracketed
    environment.filters = {name: _stepwise(step) for name, step in environment.filters.items() if name in _FILTERS}
    return environment


def _unbracketed(text: str) -> str:
    """`text` without what stands in [square brackets], up to the first that closes them."""
    if not isinstance(text, str):
        raise TypeError(f"'unbracketed' takes a text, found {text!r}")
    end = text.rfind("]") + 1  # so that every bracket before it is closed, which no search has to find out
    return re.sub(r"\[.*?\]", "", text[:end], flags=re.DOTALL) + text[end:]


@functools.lru_cache(maxsize=256)
def _template(template: str) -> Template:
    _tree(template)  # before it is compiled, as that already computes what is constant
    return _environment().from_string(template)


@functools.lru_cache(maxsize=256)
def _expression(expression: str) -> TemplateExpression:
    _tree(_printed(expression))
    return _environment().compile_expression(expression, undefined_to_none=False)


def _printed(expression: str) -> str:
    return f"{{{{ ({expression}) }}}}"
