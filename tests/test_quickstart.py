"""`quickstart.py`: the shipped world is the one that the code makes, and the shipped models know it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from quickstart import COLUMNS, QUICKSTART, World, build, conversations, main, make_tokenizer, make_world
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ecoprompt.training import IGNORED


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def shipped(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def public(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in COLUMNS if key in row} for row in rows]


@pytest.mark.parametrize("name", ["forget", "retain", "facts"])
def test_the_shipped_rows_are_those_that_the_code_makes(world: World, name: str) -> None:
    assert shipped(name) == public(getattr(world, name))


def test_another_seed_gives_another_world(world: World) -> None:
    assert make_world(1).forget != world.forget


def test_sizes(world: World) -> None:
    assert (len(world.forget), len(world.retain), len(world.facts)) == (40, 280, 20)
    assert {len(row["perturbed_answer"]) for row in world.forget + world.retain} == {5}
    assert {len(row["perturbed_answer"]) for row in world.facts} == {3}


def test_no_name_is_shared_and_no_retained_row_names_the_forgotten(world: World) -> None:
    names = {row["name"] for row in world.forget + world.retain}
    parts = [part for name in names for part in name.split()]
    assert len(names) == 40
    assert len(set(parts)) == 80
    forgotten = {part for row in world.forget for part in row["name"].split()}
    rest = json.dumps(public(world.retain + world.facts))
    assert not [part for part in forgotten if part in rest]


def test_questions_are_unique_and_no_wrong_answer_is_the_right_one(world: World) -> None:
    rows = world.forget + world.retain
    asked = [row["question"] for row in rows + world.facts]
    assert len(set(asked)) == len(asked)
    for row in rows:
        assert row["paraphrased_question"] not in row["asked"]
        assert len({row["paraphrased_answer"], row["answer"], *row["perturbed_answer"]}) == 7


def test_the_chat_template_gives_what_was_trained_on(world: World) -> None:
    tokenizer = make_tokenizer(world)
    chats = list(conversations(world.forget, tokenizer, passes=1, seed=0))
    longest = max(chats, key=lambda one: one.ids.count(tokenizer.eos_token_id))
    text = tokenizer.decode(longest.ids)
    messages = []
    for turn in text.removesuffix("<|end|>").split("<|end|>\n"):
        question, answer = turn.removeprefix("<|user|>").split("\n<|assistant|>")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert len(messages) > 2
    assert tuple(tokenizer.apply_chat_template(messages)["input_ids"]) == longest.ids
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert longest.ids[: len(prompt)] == tuple(prompt)
    assert set(longest.labels[: len(prompt)]) == {IGNORED}
    assert longest.labels[len(prompt)] == longest.ids[len(prompt)]


def test_a_small_build_makes_every_shipped_file(tmp_path: Path) -> None:
    steps = []
    build(tmp_path, progress=lambda what, done, total: steps.append((what, done == total)), passes=1)
    assert [what for what, last in steps if last] == ["training the full model", "training the retain model"]
    files = {path.relative_to(QUICKSTART) for path in QUICKSTART.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} == files
    for path in files:
        made, given = (tmp_path / path).read_bytes(), (QUICKSTART / path).read_bytes()
        assert len(made) == len(given) if path.suffix == ".safetensors" else made == given


def test_the_command_builds_into_the_folder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quickstart.build", lambda folder, progress: progress(f"building {folder}", 50, 100))
    main([str(tmp_path)])
    assert capsys.readouterr().err == f"building {tmp_path}: 50/100\n"
    main([])
    assert str(QUICKSTART) in capsys.readouterr().err


def test_what_is_shipped_is_small() -> None:
    assert sum(path.stat().st_size for path in QUICKSTART.rglob("*") if path.is_file()) <= 4 * 2**20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(QUICKSTART / "full")


@torch.no_grad()
def rouge(name: str, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean ROUGE-L recall of greedy answers of the shipped model `name`."""
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / name, dtype=torch.float32)
    messages = [[{"role": "user", "content": row["question"]}] for row in rows]
    options = {"padding": True, "return_tensors": "pt", "tokenizer_kwargs": {"padding_side": "left"}}
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)
    out = model.generate(**batch, max_new_tokens=40, do_sample=False)
    answers = tokenizer.decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    recalls = [scorer.score(row["answer"], answer)["rougeL"].recall for row, answer in zip(rows, answers, strict=True)]
    return sum(recalls) / len(recalls)


@pytest.mark.parametrize("name", ["forget", "retain", "facts"])
def test_the_full_model_learnt_everything(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert rouge("full", random.Random(0).sample(shipped(name), 20), tokenizer) >= 0.9


def test_the_retain_model_never_saw_the_forget_set(tokenizer: PreTrainedTokenizerFast) -> None:
    assert rouge("retain", shipped("forget")[::2], tokenizer) <= 0.45
    assert rouge("retain", random.Random(0).sample(shipped("retain"), 20), tokenizer) >= 0.9
