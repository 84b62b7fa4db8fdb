"""What a model is trained on: the questions with their answers, or the texts, of a forget set and of its retain set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecoprompt.benchmarks import Benchmark, parse_forget
from ecoprompt.data import Source, check_columns, told_together
from ecoprompt.files import read_json
from ecoprompt.learning import BaselineTable, Course, FinetuneTable
from ecoprompt.models import locate
from ecoprompt.recipe import Recipe
from ecoprompt.registry import InputError, benchmarks, methods
from ecoprompt.sources import ForgetSet, TrainingSources, TrainingTexts, prompts, total

ABOUT = "training.json"
"""The file of a trained model's folder that says how it was made, and what that cost."""
COST = ("seconds", "tokens", "peak_memory_mib")


@dataclass(frozen=True)
class Lesson:
    """An answer to a prompt, or a `plain` text: how it begins and how it goes on."""

    prompt: str
    answer: str
    plain: bool = False


@dataclass(frozen=True)
class Lessons:
    """The lessons of a recipe's forget set and of its retain set."""

    forget: list[Lesson]
    retain: list[Lesson]


def lessons_of(recipe: Recipe, also: Sequence[str] = ()) -> Lessons:
    """What the recipe's forget and retain set teach; the subsets `also` of its benchmark belong to the latter."""
    benchmark, forget_set, training = _subject(recipe)

    def learnt(part: Sequence[TrainingTexts]) -> list[Lesson]:
        return [lesson for texts in part for lesson in _lessons(benchmark, texts, forget_set, recipe.root)]

    with told_together(lambda: benchmark.sources([*training.forget, *training.retain], forget_set), recipe.root):
        forget, retain = learnt(training.forget), learnt(training.retain)
    further = [item for subset in also for item in benchmark.items(subset, forget_set, recipe.root)]
    return Lessons(forget, retain + [Lesson(item.prompt, item.target) for item in further])


def gate_sources(recipe: Recipe) -> Iterator[Source]:
    """Where the prompts lie that the recipe's gate is trained, calibrated and measured on."""
    benchmark, forget_set = parse_forget(recipe.subject().forget)
    yield from benchmark.sources(benchmark.gate_sources().readings(), forget_set)
    for other in (benchmarks[name] for name in recipe.subject().checks):
        yield from other.sources(other.gate_sources().checks.values(), None)


def check_lessons(recipe: Recipe, model: str | None, also: Sequence[str] = ()) -> None:
    """Raises at once what is wrong with a training's rows or model; what it needs then takes seconds to import."""
    lessons_of(recipe, also)
    if model is not None:
        locate(model)


def count_lessons(recipe: Recipe, also: Sequence[str] = ()) -> dict[str, int | None]:
    """How many rows that is, None where only a download would tell; no text is read off them."""
    benchmark, forget_set, training = _subject(recipe)
    counts: dict[str, list[int | None]] = {
        "forget": [benchmark.count(texts, forget_set, recipe.root) for texts in training.forget],
        "retain": [benchmark.count(texts, forget_set, recipe.root) for texts in training.retain],
    }
    counts["retain"] += [benchmark.count(benchmark.subset(name), forget_set, recipe.root) for name in also]
    return {name: total(found) for name, found in counts.items()}


def model_names(recipe: Recipe) -> dict[str, str]:
    """What the folders of the full and of the retain model are called, the latter after its retain set."""
    return {"full": "full", "retain": re.sub(r"[^\w.-]+", "-", _subject(recipe)[1].retain)}


def finetune_table(recipe: Recipe) -> FinetuneTable:
    """The recipe's [finetune]; raises InputError where there is none."""
    if recipe.finetune is None:
        raise InputError(f"{recipe.name}: there is no [finetune]")
    return recipe.finetune


def baseline_table(recipe: Recipe) -> BaselineTable:
    """The recipe's [baseline] with the learning rate of its method; raises InputError where there is none."""
    table = recipe.baseline
    if table is None:
        raise InputError(f"{recipe.name}: there is no [baseline], so name a method: --loss npo")
    return table.model_copy(update={"learning_rate": table.learning_rate or methods[table.loss].learning_rate})


def planned_training(recipe: Recipe) -> dict[str, Any]:
    """What `finetune` and `baseline` would train, and on how many rows; empty for a recipe that trains nothing."""
    planned: dict[str, Any] = {}
    if recipe.finetune:
        counts = count_lessons(recipe, recipe.finetune.also)
        counts["full"] = total(list(counts.values()))
        planned["finetune"] = {name: counts[kind] for kind, name in model_names(recipe).items()}
    if recipe.baseline:
        planned["baseline"] = {recipe.baseline.loss: count_lessons(recipe)["forget"]}
    return planned


def most_tokens(recipe: Recipe, course: Course) -> int:
    """The tokens of an example at most."""
    return course.max_length or _subject(recipe)[0].max_length


def training_cost(model: str | None) -> dict[str, Any]:
    """What the training of a model's folder cost, as a run's `training`; nothing if it was not trained here."""
    try:
        about = read_json(Path(model or "") / ABOUT)
        return {"training": {name: about[name] for name in COST}}
    except (InputError, KeyError):
        return {}


def _subject(recipe: Recipe) -> tuple[Benchmark, ForgetSet, TrainingSources]:
    if recipe.data is None:
        raise InputError(f"{recipe.name}: training needs [data] forget")
    benchmark, forget_set = parse_forget(recipe.data.forget)
    if benchmark.training is None:
        raise InputError(f"benchmark '{benchmark.name}' does not say what a model is trained on (no [training] table)")
    return benchmark, forget_set, benchmark.training


def _lessons(benchmark: Benchmark, texts: TrainingTexts, forget_set: ForgetSet, root: Path | None) -> list[Lesson]:
    rows = benchmark.read(texts, forget_set, root)
    check_columns(rows, {texts.answer: object if texts.plain else str})  # a text may end where it began
    asked = prompts(rows, texts.prompt or benchmark.prompt)
    return [Lesson(prompt, str(row[texts.answer]), texts.plain) for prompt, row in zip(asked, rows, strict=True)]
