"""Which rows of a data set a benchmark reads, and which prompts train and test a gate."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from ecoprompt.data import Row, Rows, Source, check_below, check_columns, load_rows
from ecoprompt.passages import passages
from ecoprompt.registry import InputError
from ecoprompt.template import fill, template_names
from ecoprompt.views import normalise

_ORDER = 42
"""Seed of the order that `sample` cuts: whatever the recipe's seed, no row trains one gate and tests another."""


@dataclass(frozen=True)
class GateData:
    """Prompts that train a gate (positive: to be flagged), and further ones that test it, with their label 1 or 0."""

    positive: list[str]
    negative: list[str]
    checks: dict[str, tuple[list[str], int]] = field(default_factory=dict)


class Table(BaseModel):
    """A table of a recipe or of a declaration: frozen, typed strictly, refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Named(Table):
    """A table that knows the key under which it was declared."""

    _name: str = PrivateAttr("")

    @property
    def name(self) -> str:
        """The key under which this table was declared."""
        return self._name


def as_value_error(check: Callable[[str], object]) -> AfterValidator:
    """A pydantic check of a text that passes on an InputError of `check` under its key."""

    def validate(text: str) -> str:
        try:
            check(text)
        except InputError as error:
            raise ValueError("; ".join(error.problems)) from None
        return text

    return AfterValidator(validate)


def _check_config(template: str) -> None:
    fill(template, {"forget": "", "retain": ""})


Texts = Annotated[tuple[str, ...], Field(strict=False)]
Template = Annotated[str, as_value_error(template_names)]
Config = Annotated[str, as_value_error(_check_config)]
Local = Annotated[Config, as_value_error(check_below)]
Place = Annotated[int, Field(ge=0)]


class ForgetSet(Named):
    """What is to be forgotten: the name of its retain set, and what a prompt calls its contents.

    In a data set that mixes both, `where` gives the values of columns that rows to forget have, and `neighbours`
    those of the rows that are most like them and are to be kept. `published` are gates on the Hub, with the thresholds
    that their authors use.
    """

    retain: str
    targets: Texts = ()
    where: dict[str, Texts] = {}
    neighbours: dict[str, Texts] = {}
    published: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}


class Reading(Table):
    """Some rows of one data set; what is None follows the benchmark.

    `rows` are those of the forget set's `where`, of its `neighbours`, the `others`, or both of these (`retain`);
    `first` takes that many from the start, `sample` those from one place to another of a fixed random order. `values`
    are columns that every row gets; with `passage`, those of the first passage of that column's text, as a text file's
    rows have them. An empty `hub` says that a local copy is all there is.
    """

    hub: str | None = None
    folder: str | None = None
    config: Config | None = None
    split: str | None = None
    local: Local | None = None
    rows: Literal["all", "forget", "retain", "neighbours", "others"] = "all"
    first: Annotated[int, Field(ge=1)] | None = None
    sample: Annotated[tuple[Place, Place], Field(strict=False)] | None = None
    values: dict[str, str] = {}
    passage: str | None = None

    @model_validator(mode="after")
    def _has_a_sample(self) -> Reading:
        if self.sample is not None and self.sample[0] >= self.sample[1]:
            raise ValueError(f"found the sample {list(self.sample)}, expected its start before its end")
        return self


class GateTexts(Reading):
    """Prompts for a gate: a text column of one data set, or a template over its columns (default: the benchmark's)."""

    field: str | None = None
    prompt: Template | None = None

    @model_validator(mode="after")
    def _has_one_text(self) -> GateTexts:
        if self.field is not None and self.prompt is not None:
            raise ValueError("found both 'field' and 'prompt'")
        return self


class GateCheck(GateTexts):
    """Prompts that test a gate; label 1 if it should flag them, else 0."""

    label: Annotated[int, Field(ge=0, le=1)]


class GateSources(Table):
    """Which prompts train a gate, and which test it."""

    positive: Annotated[tuple[GateTexts, ...], Field(strict=False, min_length=1)] = ()
    negative: Annotated[tuple[GateTexts, ...], Field(strict=False, min_length=1)] = ()
    checks: dict[str, GateCheck] = {}

    def readings(self) -> list[GateTexts]:
        """All that is read, to train and to test."""
        return [*self.positive, *self.negative, *self.checks.values()]


class TrainingTexts(Reading):
    """What a model is trained on: prompts (default: the benchmark's) with the column of their `answer`.

    `plain` ones are no questions: a prompt is how a text begins, and its answer how it goes on.
    """

    prompt: Template | None = None
    answer: str = "answer"
    plain: bool = False


class TrainingSources(Table):
    """What a model subject to unlearning was trained on: the forget set and the retain set."""

    forget: Annotated[tuple[TrainingTexts, ...], Field(strict=False, min_length=1)]
    retain: Annotated[tuple[TrainingTexts, ...], Field(strict=False, min_length=1)]


def read(source: Source, reading: Reading, forget_set: ForgetSet | None, root: Path | None) -> Rows:
    """The rows of `source` that `reading` takes."""
    rows = load_rows(source, root)
    taken = list(range(len(rows)))
    if reading.rows != "all":
        taken = _of(rows, reading.rows, forget_set)
    if reading.first is not None:
        taken = taken[: reading.first]
    if reading.sample is not None:
        start, end = reading.sample
        taken = sorted(random.Random(_ORDER).sample(taken, len(taken))[start:end])
    if len(taken) < len(rows):
        rows = rows.take(taken)
    if reading.values:
        rows[:] = [{**row, **reading.values} for row in rows]
    if reading.passage is not None:
        check_columns(rows, {reading.passage: str})
        rows[:] = [{**row, **passages(row[reading.passage])[0]} for row in rows]
    return rows


def _of(rows: Rows, which: str, forget_set: ForgetSet | None) -> list[int]:
    """The places of the rows that belong to the forget set, to its neighbours, or to neither."""
    if forget_set is None or not forget_set.where:
        raise InputError(f"{rows.origin}: only a forget set with 'where' says which rows are '{which}'")
    forget, near = forget_set.where, forget_set.neighbours
    check_columns(rows, dict.fromkeys({**forget, **near}, object))

    def kind(row: Row) -> str:
        if _matches(row, forget):
            return "forget"
        return "neighbours" if near and _matches(row, near) else "others"

    wanted = ("neighbours", "others") if which == "retain" else (which,)
    return [place for place, row in enumerate(rows) if kind(row) in wanted]


def _matches(row: Row, values: Mapping[str, tuple[str, ...]]) -> bool:
    return all(str(row[column]) in allowed for column, allowed in values.items())


def prompts(rows: Rows, template: str) -> list[str]:
    """The prompt that `template` makes of every row."""
    columns: dict[str, type] = dict.fromkeys(sorted(template_names(template)), object)
    check_columns(rows, columns | dict.fromkeys(sorted(template_names(template, printed=True)), str))
    return [fill(template, row) for row in rows]


def total(counts: Sequence[int | None]) -> int | None:
    """The sum of counts, None if one is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def without_overlap(data: GateData) -> GateData:
    """`data` without the test prompts that are trained on, and without prompts to let through that are to be flagged.

    The published code tests its WMDP gate on prompts that it has seen.
    """
    flagged = {folded(text) for text in data.positive}
    negative = [text for text in data.negative if folded(text) not in flagged]
    seen = flagged | {folded(text) for text in negative}
    checks = {
        name: ([text for text in texts if folded(text) not in seen], label)
        for name, (texts, label) in data.checks.items()
    }
    return GateData(data.positive, negative, checks)


def folded(text: str) -> str:
    """`text` without what does not tell prompts apart: case, punctuation, white space."""
    return normalise(text) or text
