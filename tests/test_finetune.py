"""`finetune.py`, `lessons.py`: a pair of models from one recipe, that an interruption changes nothing about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ecoprompt.finetune import finetune
from ecoprompt.lessons import Lesson, lessons_of
from ecoprompt.models import load_model, render
from ecoprompt.own import declare_own
from ecoprompt.planning import plan
from ecoprompt.recipe import ModelTable, parse_recipe
from ecoprompt.registry import InputError
from ecoprompt.training import IGNORED, Course, encode_lesson

CONFIG = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 2, "max_position_embeddings": 128}
COURSE = {"epochs": 3.0, "batch_size": 2, "learning_rate": 1e-2}
SCRATCH = {"config": CONFIG, "vocabulary": 300, **COURSE}


@pytest.fixture
def recipe(tmp_path):
    """Makes a recipe of two questions to forget and three to keep, with a [finetune] of its own."""
    rows = [{"question": f"Who is number {n}?", "answer": f"The {n}th of them."} for n in range(5)]
    for name, part in (("forget", rows[:2]), ("retain", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    (tmp_path / "texts.txt").write_text(
        "A first sentence of this text. It goes on with a second one.", encoding="utf-8"
    )

    def make(finetune=SCRATCH, forget="forget.jsonl", **tables):
        own = {"forget": forget, "retain": "retain.jsonl"}
        raw = {"name": "pair", "data": {"forget": "own/forget"}, "benchmark": {"own": own}, **tables}
        return parse_recipe(raw | ({} if finetune is None else {"finetune": finetune}), str(tmp_path / "pair.toml"))

    yield make
    declare_own({}, Path())


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same(ours, theirs):
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours.keys() == theirs.keys()


def test_a_pair_of_models_from_scratch(recipe, tmp_path):
    made = finetune(recipe(), tmp_path)
    assert list(made) == [tmp_path / "pair/models/full", tmp_path / "pair/models/retain"]
    full, retain = made.values()
    assert (full["examples"], full["steps"], retain["examples"], retain["steps"]) == (5, 9, 3, 6)
    for folder, about in made.items():
        assert about["last_loss"] < about["first_loss"]
        assert json.loads((folder / "training.json").read_text()) == about
        loaded = load_model(ModelTable(name=str(folder)))
        assert len(loaded.tokenizer) == loaded.model.config.vocab_size <= 300
    assert sorted(path.name for path in (tmp_path / "pair/models").iterdir()) == ["full", "retain"]


def test_what_was_trained_is_not_trained_again_unless_it_changed(recipe, tmp_path):
    steps = []
    for again in (SCRATCH, SCRATCH, SCRATCH | {"epochs": 1.0}):
        steps.append([])
        finetune(recipe(again | {"models": ["full"]}), tmp_path, lambda *step: steps[-1].append(step))
    assert [len(part) for part in steps] == [9, 0, 3]


def test_checkpoints_that_a_kill_left_beside_a_whole_model_go(recipe, tmp_path):
    again = recipe(SCRATCH | {"models": ["full"]})
    ((folder, about),) = finetune(again, tmp_path).items()
    left = folder.with_name(f".{folder.name}-{about['digest']}")
    left.mkdir()
    assert finetune(again, tmp_path) == {folder: about}
    assert not left.exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "course", [{}, {"save_steps": 2}, {"by_length": True, "arithmetic": "bfloat16"}, {"lora": {"rank": 2}}]
)
def test_a_killed_training_goes_on_to_the_same_weights(recipe, tmp_path, model_folder, course):
    table = COURSE | course | {"models": ["full"], "base": str(model_folder)}
    whole = finetune(recipe(table), tmp_path / "whole")
    calls = []

    def kill(what, done, total):
        calls.append(done)
        if len(calls) == 5:
            raise Killed

    with pytest.raises(Killed):
        finetune(recipe(table), tmp_path, kill)
    assert not (tmp_path / "pair/models/full").exists()
    (checkpoints,) = (tmp_path / "pair/models").iterdir()
    half = checkpoints / "checkpoint-1000"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_st')
    resumed = finetune(recipe(table), tmp_path, kill)
    assert calls[5] == (5 if "save_steps" in course else 4)
    (about,), (expected,) = resumed.values(), whole.values()
    assert about["steps"] == expected["steps"] == 9
    assert about["tokens"] == expected["tokens"]
    assert about["first_loss"] == expected["first_loss"]
    assert_same(weights(tmp_path / "pair/models/full"), weights(tmp_path / "whole/pair/models/full"))
    assert not checkpoints.exists()


def test_a_model_is_replaced_whole_and_checkpoints_of_another_training_stay(recipe, tmp_path):
    one = SCRATCH | {"models": ["full"], "epochs": 1.0}
    (folder,) = finetune(recipe(one), tmp_path)
    (folder / "left.txt").write_text("by hand")
    finetune(recipe(one | {"epochs": 2.0}), tmp_path)
    assert not (folder / "left.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["full"]
    another = folder.with_name(".full-" + "0" * 16)
    another.mkdir()
    finetune(recipe(one | {"epochs": 2.0}), tmp_path)  # is there, so that nothing is trained
    assert another.exists()


def test_a_model_with_adapters_is_saved_as_one_without(recipe, tmp_path, model_folder):
    table = COURSE | {"models": ["full"], "base": str(model_folder), "lora": {"targets": ["q_proj"]}, "epochs": 1.0}
    finetune(recipe(table), tmp_path)
    before, after = weights(model_folder), weights(tmp_path / "pair/models/full")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    with pytest.raises(InputError, match="'lora.targets'"):
        finetune(recipe(table | {"lora": {"targets": ["nothing"]}}), tmp_path)


def test_lessons_are_asked_as_a_model_will_be(recipe, tokenizer):
    lesson = lessons_of(recipe()).forget[0]
    assert lesson == Lesson("Who is number 0?", "The 0th of them.")
    (one,) = encode_lesson(tokenizer, lesson, Course(), 100)
    asked = render(tokenizer, [{"role": "user", "content": lesson.prompt}])
    text = tokenizer.decode(one.ids)
    assert text == f"{asked} {lesson.answer}<eos>"
    learnt = [label for label in one.labels if label != IGNORED]
    assert tokenizer.decode(learnt) == f" {lesson.answer}<eos>"
    (everything,) = encode_lesson(tokenizer, lesson, Course(learn="all"), 100)
    assert everything.labels == everything.ids == one.ids
    (cut,) = encode_lesson(tokenizer, lesson, Course(), len(one.ids) - 3)
    assert cut.ids == one.ids[:-3]


def test_a_text_is_learnt_whole_in_pieces(recipe, tokenizer):
    lesson = lessons_of(recipe(forget="texts.txt")).forget[0]
    assert lesson.plain
    whole = tokenizer.encode("A first sentence of this text. It goes on with a second one.<eos>")
    pieces = encode_lesson(tokenizer, lesson, Course(), 10)
    assert [i for piece in pieces for i in piece.ids] == whole
    assert [len(piece.ids) for piece in pieces[:-1]] == [10] * (len(pieces) - 1)
    assert all(piece.labels == piece.ids for piece in pieces)


def test_a_text_that_ends_with_its_first_sentence_is_learnt_too(recipe, tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("There is nothing but this one sentence.", encoding="utf-8")
    lesson = lessons_of(recipe(forget="short.txt")).forget[0]
    (one,) = encode_lesson(tokenizer, lesson, Course(), 100)
    assert tokenizer.decode(one.ids) == "There is nothing but this one sentence.<eos>"


def test_a_dry_run_counts_what_is_trained_on(recipe):
    assert plan(recipe())["finetune"] == {"full": 5, "retain": 3}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({}, "expected either 'base' or 'config'"),
        ({"config": {}, "vocabulary": 300}, "'config' has no 'model_type'"),
        ({"config": CONFIG}, "expected either 'tokenizer' or 'vocabulary'"),
        ({"base": "x", "vocabulary": 300}, "'base' brings its own"),
        ({"base": "x", "also": ["retian"]}, "'finetune.also.0': no such subset to keep; did you mean 'retain'?"),
        ({"base": "x", "by_length": True, "save_steps": 3}, "found 'by_length' and 'save_steps'"),
        ({"base": "x", "epoch": 3}, r"\[finetune\] has no key 'epoch'; did you mean 'epochs'"),
        ({"base": "x", "models": ["half"]}, "'finetune.models.0': found 'half', expected 'full' or 'retain'"),
    ],
)
def test_a_wrong_table_is_told_at_once(recipe, table, told):
    with pytest.raises(InputError, match=told):
        recipe(table)


def test_training_needs_data(tmp_path):
    with pytest.raises(InputError, match=r"'finetune': training needs \[data\] forget"):
        parse_recipe({"finetune": {"base": "x"}}, "a recipe")


@pytest.mark.parametrize("config", [{"model_type": "lama"}, {"model_type": "t5"}, CONFIG | {"hidden_size": 15}])
def test_a_wrong_configuration_is_told(recipe, tmp_path, config):
    with pytest.raises(InputError, match="'finetune.config': this is no configuration of a language model"):
        finetune(recipe(SCRATCH | {"config": config}), tmp_path)


def test_a_recipe_that_trains_nothing_says_so(recipe, tmp_path):
    with pytest.raises(InputError, match=r"pair: there is no \[finetune\]"):
        finetune(recipe(None), tmp_path)
