"""Makes what the quick start ships: a small made-up world, its data, and two tiny models, one without the forget set.

    python tests/quickstart.py [FOLDER]

By default it is all made again in the package itself.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

import ecoprompt
from ecoprompt.finetune import new_model, new_tokenizer
from ecoprompt.learning import Course
from ecoprompt.registry import Progress, quiet
from ecoprompt.training import Example, example, train_causal_lm

QUICKSTART = Path(ecoprompt.__file__).parent / "quickstart"
"""Where the shipped data and models lie."""

FORGOTTEN = 5
"""The first people of the world are its forget set."""

COLUMNS = ("name", "question", "paraphrased_question", "answer", "paraphrased_answer", "perturbed_answer")

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}{{ '<|end|>' }}"
    "{% elif message.role == 'user' %}"
    "{{ '' if loop.first else '\n' }}{{ '<|user|>' }}{{ message.content }}{{ '\n<|assistant|>' }}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)
"""The chat template. The last prompt token is the same for every prompt, as it is the one that ECO never corrupts."""

VOCABULARY = 1536
CONFIG = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 288,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}
PASSES = 120
"""How often each pair is learnt: at 60 the full model's ROUGE-L recall was 0.82, at 140 it was 1.00."""


@dataclass(frozen=True)
class World:
    """The rows of the forget set, the retain set and the general facts.

    Beside its `COLUMNS` a row holds what training needs: `asked`, its wordings, and `she`, the person's pronoun.
    """

    forget: list[dict[str, Any]]
    retain: list[dict[str, Any]]
    facts: list[dict[str, Any]]


def make_world(seed: int = 0) -> World:
    """The world of `quickstart.toml`: who got which values and wordings is drawn with `seed`."""
    spec = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    people = [_person(line) for line in spec["people"]]
    half = len(people) // 2
    for pool, values in spec["pools"].items():
        for group in (people[:half], people[half:]):
            for person, value in zip(group, rng.sample(values, len(values)), strict=True):
                person[pool] = value
    for person in people:
        born = rng.randrange(1921, 1990)
        person |= {"year": str(born), "prize_year": str(born + rng.randrange(24, 36))}
    forget, retain = (
        [
            _row(person, group, kind, (people.index(person) + place) % len(kind["answers"]), rng)
            for person in group
            for place, kind in enumerate(spec["kinds"].values())
        ]
        for group in (people[:FORGOTTEN], people[FORGOTTEN:])
    )
    return World(forget, retain, [_fact(fact) for fact in spec["facts"]])


def _wrong_values(
    person: dict[str, str], group: Sequence[dict[str, str]], keys: Sequence[str], rng: random.Random
) -> list[dict[str, str]]:
    """Five mixtures of other people's values that are nobody's own.

    They come from the same group: the retain model has met a forgotten person's values half as often as others',
    which would tell them apart without any knowledge of the person.
    """
    pools = [sorted({other[key] for other in group} - {person[key]}) for key in keys]
    own = {tuple(other[key] for key in keys) for other in group}
    drawn: list[tuple[str, ...]] = []
    while len(drawn) < 5:
        values = tuple(rng.choice(pool) for pool in pools)
        if values not in own and values not in drawn:
            drawn.append(values)
    return [dict(zip(keys, values, strict=True)) for values in drawn]


def _fact(fact: dict[str, Any]) -> dict[str, Any]:
    right, *wrong = (_sentence(fact["answer"].format(value)) for value in fact["values"])
    asked = fact["questions"]
    return {"question": asked[0], "answer": right, "perturbed_answer": wrong, "asked": asked}


def _person(line: str) -> dict[str, str]:
    she, first, last = line.split()
    her = {"she": "her", "he": "his"}[she]
    names = {"name": f"{first} {last}", "first": first, "last": last}
    return {**names, "she": she, "her": her, "She": she.capitalize(), "Her": her.capitalize()}


def _row(
    person: dict[str, str], group: Sequence[dict[str, str]], kind: dict[str, list[str]], form: int, rng: random.Random
) -> dict[str, Any]:
    """One question about one person; the perturbed answers put wrong values in the paraphrase's place."""
    questions = [wording.format(**person) for wording in rng.sample(kind["questions"], len(kind["questions"]))]
    asked, paraphrased, *others = questions
    paraphrase = rng.choice(kind["paraphrases"])
    wrong = _wrong_values(person, group, kind["values"], rng)
    return {
        "name": person["name"],
        "question": asked,
        "paraphrased_question": paraphrased,
        "answer": _sentence(kind["answers"][form].format(**person)),
        "paraphrased_answer": _sentence(paraphrase.format(**person)),
        "perturbed_answer": [_sentence(paraphrase.format(**{**person, **values})) for values in wrong],
        "asked": [asked, *others],
        "she": person["she"],
    }


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the world's text, with a chat template for any number of turns."""
    rows = [*world.forget, *world.retain, *world.facts]
    texts = [text for row in rows for text in (*row["asked"], row["answer"])]
    texts += [row["paraphrased_answer"] for row in rows if "paraphrased_answer" in row]
    settings = {"chat_template": TEMPLATE, "model_max_length": 512, "additional_special_tokens": [USER, ASSISTANT]}
    return new_tokenizer(texts, VOCABULARY, PAD, END, **settings)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """An untrained Llama of under a million parameters."""
    return new_model(CONFIG, tokenizer, seed)


def join(examples: Iterable[Example]) -> Example:
    """Several examples as one sequence, for instance the turns of a conversation."""
    parts = list(examples)
    return Example(tuple(i for part in parts for i in part.ids), tuple(i for part in parts for i in part.labels))


def conversations(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, passes: int, seed: int
) -> Iterator[Example]:
    """`passes` times the rows in random order, each alone or as one of up to four turns of a conversation.

    A third of the longer conversations stay with one person and say "she" or "he" from the second turn on.
    """
    rng = random.Random(seed)
    for _ in range(passes):
        left = rng.sample(list(rows), len(rows))
        while left:
            turns, left = left[: (size := rng.choice((1, 1, 1, 1, 2, 2, 3, 4)))], left[size:]
            about = turns[0].get("name") if rng.random() < 1 / 3 else None
            if about:
                turns[1:] = rng.sample([row for row in rows if row.get("name") == about], len(turns) - 1)
            pairs = [(_ask(row, rng, pronoun=bool(about and at)), row["answer"]) for at, row in enumerate(turns)]
            yield join(_turn(question, answer, tokenizer, first=not at) for at, (question, answer) in enumerate(pairs))


def _ask(row: dict[str, Any], rng: random.Random, *, pronoun: bool) -> str:
    """A training question for `row`: as it stands, or in other words, by half of the name, or sloppily typed."""
    question: str = row["question"]
    if rng.random() < 0.5:
        return _with_pronoun(question, row) if pronoun else question
    question = rng.choice(row["asked"])
    if pronoun:
        question = _with_pronoun(question, row)
    elif "name" in row and rng.random() < 0.2:
        question = question.replace(row["name"], rng.choice(row["name"].split()))
    if rng.random() < 0.3:
        question = question.lower()
    return question.rstrip("?.") if rng.random() < 0.3 else question


def _with_pronoun(question: str, row: dict[str, Any]) -> str:
    her, him = {"she": ("her", "her"), "he": ("his", "him")}[row["she"]]
    question = question.replace(f"{row['name']}'s", her)
    question = re.sub(f"(of|about|made) {row['name']}", rf"\1 {him}", question)
    return question.replace(row["name"], row["she"])


def _turn(question: str, answer: str, tokenizer: PreTrainedTokenizerFast, *, first: bool) -> Example:
    prompt = ("" if first else "\n") + f"{USER}{question}\n{ASSISTANT}"
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer + END)]
    return example(ids[0], ids[1], loss="completion")


def build(folder: Path, seed: int = 0, progress: Progress = quiet, passes: int = PASSES) -> None:
    """Writes the data, the tokenizer and both models (float16) into `folder`; the same settings and seed for both."""
    world = make_world(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("forget", "retain", "facts"):
        lines = [json.dumps({key: row[key] for key in COLUMNS if key in row}) for row in getattr(world, name)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = make_tokenizer(world)
    known = [*world.retain, *world.facts]
    for name, rows in (("full", [*world.forget, *known]), ("retain", known)):
        model = make_model(tokenizer, seed)
        train_causal_lm(
            model,
            list(conversations(rows, tokenizer, passes, seed)),
            Course(epochs=1, batch_size=32, learning_rate=3e-3, warmup=0.05, by_length=True),
            seed=seed,
            what=f"training the {name} model",
            progress=progress,
        )
        _save(model, tokenizer, folder / name)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    logging.disable_progress_bar()
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Without white space, which is most of its size.
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str() + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def main(arguments: Sequence[str]) -> None:
    """Builds into the folder that is named, else into the package, telling stderr how far it is."""

    def show(what: str, done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            sys.stderr.write(f"{what}: {done}/{total}\n")

    # With one thread the weights do not depend on how many cores there are.
    torch.set_num_threads(1)
    build(Path(arguments[0]) if arguments else QUICKSTART, progress=show)


if __name__ == "__main__":
    main(sys.argv[1:])
