"""What a model is trained on: the questions with their answers, or the texts, of a forget set and of its retain set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ecoprompt.benchmarks import Benchmark, parse_forget
from ecoprompt.data import check_columns
from ecoprompt.models import encode, encode_pair, render, render_answer
from ecoprompt.recipe import Recipe
from ecoprompt.registry import InputError
from ecoprompt.sources import ForgetSet, GateTexts, TrainingSources, TrainingTexts, prompts, read
from ecoprompt.training import Example, example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ecoprompt.learning import Course


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
    benchmark, forget_set, training, root = _subject(recipe)
    forget, retain = (
        [lesson for texts in part for lesson in _lessons(benchmark, texts, forget_set, root)]
        for part in (training.forget, training.retain)
    )
    further = [item for subset in also for item in benchmark.items(subset, forget_set, root)]
    return Lessons(forget, retain + [Lesson(item.prompt, item.target) for item in further])


def count_lessons(recipe: Recipe, also: Sequence[str] = ()) -> dict[str, int | None]:
    """How many rows that is, None where only a download would tell; no text is read off them."""
    benchmark, forget_set, training, root = _subject(recipe)
    counts: dict[str, list[int | None]] = {
        "forget": [benchmark._count(texts, forget_set, root) for texts in training.forget],
        "retain": [benchmark._count(texts, forget_set, root) for texts in training.retain],
    }
    counts["retain"] += [benchmark._count(benchmark.subset(name), forget_set, root) for name in also]
    return {name: None if None in found else sum(map(int, filter(None, found))) for name, found in counts.items()}


def retain_name(recipe: Recipe) -> str:
    """The name of the recipe's retain set."""
    return _subject(recipe)[1].retain


def most_tokens(recipe: Recipe, course: Course) -> int:
    """The tokens of an example at most."""
    return course.max_length or _subject(recipe)[0].max_length


def encode_lesson(tokenizer: PreTrainedTokenizerBase, lesson: Lesson, course: Course, most: int) -> list[Example]:
    """A lesson as the model will be asked it, at most `most` tokens long; a longer text is several examples."""
    if lesson.plain:
        ids = encode(tokenizer, f"{lesson.prompt} {lesson.answer}".strip() + (tokenizer.eos_token or ""))
        pieces = [ids[start : start + most] for start in range(0, len(ids), most)]
        return [example((), piece, loss="all") for piece in pieces if len(piece) > 1]
    messages = [{"role": "user", "content": lesson.prompt}]
    answer = render_answer(tokenizer, messages, lesson.answer)
    head, tail = encode_pair(tokenizer, render(tokenizer, messages), answer)
    return [example(head, tail[: max(most - len(head), 1)], loss="all" if course.learn == "all" else "completion")]


def _subject(recipe: Recipe) -> tuple[Benchmark, ForgetSet, TrainingSources, Path | None]:
    if recipe.data is None:
        raise InputError(f"{recipe.name}: training needs [data] forget")
    benchmark, forget_set = parse_forget(recipe.data.forget)
    if benchmark.training is None:
        raise InputError(f"benchmark '{benchmark.name}' does not say what a model is trained on (no [training] table)")
    return benchmark, forget_set, benchmark.training, Path(recipe.data.root) if recipe.data.root else None


def _lessons(benchmark: Benchmark, texts: TrainingTexts, forget_set: ForgetSet, root: Path | None) -> list[Lesson]:
    source = benchmark._source(texts, forget_set)
    rows = read(source, texts, forget_set, root)
    check_columns(rows, source, {texts.answer: str})
    asked = prompts(rows, source, GateTexts(prompt=texts.prompt), benchmark.prompt)
    return [Lesson(prompt, row[texts.answer], texts.plain) for prompt, row in zip(asked, rows, strict=True)]
