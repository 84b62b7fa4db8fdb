"""A row as it is asked and scored, and the table of a subset, which declares that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from ecoprompt.data import Row, opening
from ecoprompt.metrics import ROW_INPUTS, asks_model, reads
from ecoprompt.pressure import press
from ecoprompt.registry import InputError, metrics, pressures
from ecoprompt.sources import Named, Reading, Table, Template, as_value_error
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
MetricName = Annotated[str, as_value_error(metrics.__getitem__)]
PressureName = Annotated[str, as_value_error(pressures.__getitem__)]
Pressures = Annotated[tuple[PressureName, ...], Field(strict=False)]


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


class Subset(Choosing, Reading, Named):
    """Rows of one data set and the metrics that are read off them; what is None follows the benchmark.

    `answer`, `reference` and `alternatives` name columns, for which `choices` and `right` stand where an answer is to
    be chosen; without a reference the answer is its own. `answer_words` is how many words of a long answer count, from
    its first. `samples` is how many answers are drawn for the metrics that read them, at `temperature`, from the
    likeliest tokens that together have the probability `top_p`. `pressure` rewrites the prompts; each of `pressures`
    makes a further subset of the same rows, called SUBSET_PRESSURE.
    """

    prompt: Template | None = None
    answer: str = "answer"
    answer_words: Annotated[int, Field(ge=1)] | None = None
    reference: str | None = None
    alternatives: str | None = None
    metrics: dict[str, MetricName]
    forget: bool = False
    samples: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    pressure: PressureName | None = None
    pressures: Pressures = ()

    @property
    def asks_model(self) -> bool:
        """Whether a metric reads more of a row than what the gate says of its prompt."""
        return any(map(asks_model, self.metrics.values()))

    @model_validator(mode="after")
    def _has_what_metrics_read(self) -> Subset:
        keys = {"samples": self.samples, "alternatives": self.alternatives or self.choices}
        keys |= dict.fromkeys(("answers", "logits", "place"), self.choices)
        given = set(ROW_INPUTS) - {name for name, key in keys.items() if key is None}
        pairs = [(metric, key) for metric in self.metrics.values() for key in reads(metric)]
        lacking = [f"'{metric}' reads '{key}'" for metric, key in pairs if key not in given]
        if lacking:
            raise ValueError(f"found no key for what metrics read: {', '.join(lacking)}")
        return self

    def columns_read(self, prompt: str) -> dict[str, type]:
        """The columns that are read of a row that is asked with this template, each with what it has to hold."""
        expressions = [expression_names(one) for one in (self.choices, self.right) if one is not None]
        named: set[str] = set().union(*expressions, template_names(self.completion), template_names(prompt)) - OWN
        columns: dict[str, type] = dict.fromkeys(sorted(named), object)
        columns |= dict.fromkeys(sorted(template_names(prompt, printed=True) - OWN), str)
        if self.asks_model and self.choices is None:
            columns |= {column: str for column in (self.answer, self.reference) if column is not None}
        return columns | ({self.alternatives: list} if self.alternatives is not None else {})

    def item(self, benchmark: str, prompt: str, index: int, row: Row, seed: int) -> Item:
        """`row` as it is asked with the template `prompt`, of a seed where it is asked under pressure."""
        if self.choices is not None:
            said = _choose(self, prompt, row, f"{benchmark}, {self.name}: row {index + 1}")
        else:
            said = {"prompt": fill(prompt, row), "target": self._scored(row, self.answer)}
            said["reference"] = self._scored(row, self.reference or self.answer)
            said["alternatives"] = tuple(row[self.alternatives]) if self.alternatives else ()
        said["prompt"] = press(self.pressure, said["prompt"], seed)
        said["prompts"] = tuple(press(self.pressure, one, seed) for one in said.get("prompts", ()))
        return Item(benchmark=benchmark, subset=self.name, index=index, **said)

    def _scored(self, row: Row, column: str) -> str:
        """What counts of a text of `row`: of the answer its opening, and nothing where no model is asked."""
        if not self.asks_model:
            return ""
        return opening(row[column], self.answer_words if column == self.answer else None)


def _choose(table: Choosing, prompt: str, row: Row, place: str) -> dict[str, Any]:
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
