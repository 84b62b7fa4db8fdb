"""A row as it is asked and scored, and how a table declares its choices where an answer is to be chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import model_validator

from ecoprompt.data import Row
from ecoprompt.registry import InputError
from ecoprompt.sources import Table, Template, as_value_error
from ecoprompt.template import evaluate, expression_names, fill, template_names


@dataclass(frozen=True)
class Item:
    """A row as it is asked and scored; `index` is its number in the data set, from 0.

    Of several right answers (`answers`) the first is the target. `prompts` are those of the answers and then of the
    alternatives where each has its own; `place` is where the target stood among the choices.
    """

    benchmark: str
    subset: str
    index: int
    prompt: str
    target: str
    reference: str
    alternatives: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    place: int = 0


OWN = {"row", "choice"}
"""Names that are no columns."""
Expression = Annotated[str, as_value_error(expression_names)]


class Choosing(Table):
    """The choices of a row, told by expressions (Jinja) over its columns, of which `row` is all.

    `choices` is the list of their texts; `right` the place of the right one, from 0, or the list of those that are
    right. `completion` is what a model is to say for a {{ choice }}, which the prompt may hold as well.
    """

    choices: Expression | None = None
    right: Expression | None = None
    completion: Template = "{{ choice }}"

    @model_validator(mode="after")
    def _has_both(self) -> Choosing:
        if (self.choices is None) != (self.right is None):
            raise ValueError("found one of 'choices' and 'right' without the other")
        return self

    def names(self, prompt: str) -> set[str]:
        """The columns that the choices and their `prompt` are made of."""
        expressions = [expression_names(one) for one in (self.choices, self.right) if one is not None]
        return set().union(*expressions, template_names(self.completion), template_names(prompt)) - OWN


def choose(table: Choosing, prompt: str, row: Row, place: str) -> dict[str, Any]:
    """What a row's Item holds of its choices; raises InputError, at `place`, unless some are right and some wrong."""
    try:
        texts, right = _choices(table, {**row, "row": row})
        order = [*right, *(number for number in range(len(texts)) if number not in right)]
        values: list[Row] = [{**row, "row": row, "choice": texts[number]} for number in order]
        said, prompts = (tuple(fill(template, one) for one in values) for template in (table.completion, prompt))
    except InputError as error:
        raise InputError(*(f"{place}: {one}" for one in error.problems)) from None
    return {
        "target": said[0],
        "reference": said[0],
        "answers": said[: len(right)],
        "alternatives": said[len(right) :],
        "prompt": prompts[0],
        "prompts": prompts if len(set(prompts)) > 1 else (),
        "place": right[0],
    }


def _choices(table: Choosing, values: Row) -> tuple[list[str], list[int]]:
    """The texts of all choices, and the places of the right ones."""
    assert table.choices is not None
    assert table.right is not None
    texts, found = evaluate(table.choices, values), evaluate(table.right, values)
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"'{table.choices}' gives {texts!r}, expected a list of texts")
    if isinstance(found, int):
        right = [int(found)] if 0 <= found < len(texts) else []
    else:
        right = [number for number, text in enumerate(texts) if isinstance(found, list) and text in found]
    if not 0 < len(right) < len(texts):
        raise InputError(
            f"of the choices {texts}, '{table.right}' gives {found!r} as right, expected some, but not all"
        )
    return texts, right
