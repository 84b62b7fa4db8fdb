"""`baseline.py`: every named method trains, on what it reads, and an interruption changes nothing about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ecoprompt.baseline import Pairs, baseline, loss_of, read_refusals
from ecoprompt.cli import app
from ecoprompt.evaluate import evaluate
from ecoprompt.lessons import baseline_table, lessons_of
from ecoprompt.models import load_model
from ecoprompt.own import declare_own
from ecoprompt.planning import plan
from ecoprompt.recipe import parse_recipe
from ecoprompt.registry import InputError, methods

runner = CliRunner()
COURSE = {"epochs": 2.0, "batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture
def recipe(tmp_path, model_folder):
    """Makes a recipe of three questions to forget and three to keep, with [baseline] of its own."""
    rows = [{"question": f"Who is number {n}?", "answer": f"The {n}th of them."} for n in range(6)]
    for name, part in (("forget", rows[:3]), ("retain", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")

    def make(loss="npo", forget="forget.jsonl", tables=(), **keys):
        own = {"forget": forget, "retain": "retain.jsonl", "metrics": {"probability": "answer_probability"}}
        raw = {"name": "away", "data": {"forget": "own/forget"}, "benchmark": {"own": own}}
        raw |= {"model": {"name": str(model_folder)}, "baseline": COURSE | {"loss": loss} | keys}
        return parse_recipe(raw | dict(tables), str(tmp_path / "away.toml"))

    yield make
    declare_own({}, Path())


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("name", ["scrub", "llmu", "dpo", "rmu"])
def test_a_method_trains_and_says_what_it_costs(recipe, tmp_path, model_folder, name):
    seen = []
    folder, about = baseline(recipe(name), tmp_path, lambda *step: seen.append(step))
    assert folder == tmp_path / "away/baselines" / name
    assert [path.name for path in folder.parent.iterdir()] == [name]
    assert seen == [(f"unlearning by {name}", step, 4) for step in (1, 2, 3, 4)]
    assert json.loads((folder / "training.json").read_text()) == about
    assert (about["loss"], about["steps"]) == (name, 4)
    assert about["tokens"] > 100
    assert about["seconds"] > 0
    assert about["peak_memory_mib"] > 0
    before, after = weights(model_folder), weights(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    if name == "rmu":  # of two layers the middle one is steered, and trained with what is below it
        assert all(name.startswith("model.layers.") for name in changed)
    else:
        assert "model.embed_tokens.weight" in changed


def test_an_evaluation_takes_it_as_a_run(recipe, tmp_path):
    folder, about = baseline(recipe("ga"), tmp_path)
    tables = {"run": {"original": {}, "ga": {"model": str(folder)}}, "evaluate": [{"benchmark": "own"}]}
    runs = evaluate(recipe("ga", tables=tables), tmp_path).summary["runs"]
    assert runs["ga"]["training"] == {name: about[name] for name in ("seconds", "tokens", "peak_memory_mib")}
    assert "training" not in runs["original"]
    assert runs["ga"]["metrics"]["forget_probability"] < runs["original"]["metrics"]["forget_probability"]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "course"),
    [
        ("scrub", {"save_steps": 1}),
        ("rd", {"by_length": True}),
        ("gd", {"save_steps": 1, "optimizer": "sophia"}),
    ],
)
def test_a_killed_unlearning_goes_on_to_the_same_weights(recipe, tmp_path, name, course):
    _, whole = baseline(recipe(name, **course), tmp_path / "whole")
    calls = []

    def kill(what, done, total):
        calls.append(done)
        if len(calls) == 4:
            raise Killed

    with pytest.raises(Killed):
        baseline(recipe(name, **course), tmp_path, kill)
    folder, about = baseline(recipe(name, **course), tmp_path, kill)
    assert calls == [1, 2, 3, 4, *([4] if "save_steps" in course else [3, 4])]
    ours, theirs = weights(folder), weights(tmp_path / "whole/away/baselines" / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {key: about[key] for key in ("steps", "tokens", "last_loss")} == {
        key: whole[key] for key in ("steps", "tokens", "last_loss")
    }


def pairs_of(recipe, **more):
    loaded, table = load_model(recipe.model), baseline_table(recipe)
    lessons = lessons_of(recipe)
    refusals = read_refusals(table.idk, len(lessons.forget)) if "idk" in methods[table.loss].reads() else []
    return loaded, table, Pairs(lessons, refusals, methods[table.loss], loaded, table, 100, recipe.seed)


def test_each_row_meets_another_of_the_retain_set_in_every_epoch(recipe, tokenizer):
    _, _, pairs = pairs_of(recipe("rd"))
    met = []
    for pairs.epoch in range(8):
        met.append([tokenizer.decode(pairs[at]["retain"].ids) for at in range(3)])
        again = [tokenizer.decode(pairs[at]["retain"].ids) for at in range(3)]
        assert again == met[-1]
    assert {text for row in met for text in row} == {
        f"Question: Who is number {n}?\nAnswer: The {n}th of them.<eos>" for n in (3, 4, 5)
    }
    mismatch = tokenizer.decode(pairs[0]["mismatch"].ids)
    assert mismatch.startswith("Question: Who is number 0?\nAnswer: The ")
    assert mismatch.removesuffix("th of them.<eos>")[-1] in "345"


def test_scrub_reads_only_what_its_epoch_needs(recipe):
    _, _, pairs = pairs_of(recipe("scrub"))
    assert pairs.batch([pairs[0]]).keys() == {"forget"}
    pairs.epoch = 1
    assert pairs.batch([pairs[0]]).keys() == {"retain"}


def test_other_answers_come_from_a_file(recipe, tmp_path, tokenizer):
    (tmp_path / "idk.txt").write_text("Never heard of it.\n\n", encoding="utf-8")
    _, _, pairs = pairs_of(recipe("dpo", idk=str(tmp_path / "idk.txt")))
    assert tokenizer.decode(pairs[1]["idk"].ids).endswith("number 1?\nAnswer: Never heard of it.<eos>")
    rows = "\n".join(json.dumps({"answer": f"Nobody, {n}."}) for n in range(3))
    (tmp_path / "other.jsonl").write_text(rows, encoding="utf-8")
    _, _, pairs = pairs_of(recipe("dpo", idk=str(tmp_path / "other.jsonl")))
    assert tokenizer.decode(pairs[2]["idk"].ids).endswith("number 2?\nAnswer: Nobody, 2.<eos>")
    with pytest.raises(InputError, match="found 3 rows, expected one for each of the forget set's 4"):
        read_refusals(str(tmp_path / "other.jsonl"), 4)


@pytest.mark.parametrize("name", methods)
def test_a_step_of_every_method_lowers_its_loss_which_padding_has_no_part_in(recipe, name):
    """The mean over rows of equal length is the loss of their batch; padding them further changes nothing."""
    loaded, table, pairs = pairs_of(recipe(name))
    loss = loss_of(methods[name], table, loaded, 0)
    rows = [pairs[0], pairs[1]]
    with torch.no_grad():
        alone = [loss(loaded.model, pairs.batch([row]), 0.0) for row in rows]
        batch = pairs.batch(rows)
        together = loss(loaded.model, batch, 0.0)
        lengths = {key: {len(row[key].ids) for row in rows} for key in batch}
        if all(len(one) == 1 for one in lengths.values()):
            torch.testing.assert_close(together, sum(alone) / 2)
        for part in batch.values():
            for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
                part[key] = torch.nn.functional.pad(part[key], (0, 5), value=fill)
        torch.testing.assert_close(loss(loaded.model, batch, 0.0), together)
    before = loss(loaded.model, batch, 0.0)
    before.backward()
    slopes = {weight: weight.grad for weight in loaded.model.parameters() if weight.grad is not None}
    steepness = sum(slope.square().sum() for slope in slopes.values()).sqrt()
    step = 1e-5 if name == "rmu" else 1e-3  # what its states may move weighs 1200 times what they are to move
    with torch.no_grad():
        for weight, slope in slopes.items():
            weight -= step * slope / steepness.clamp(min=1e-9)
        after = loss(loaded.model, batch, 0.0)
    # The divergence that SCRUB raises is 0, the least there is, where it starts.
    assert after < before or name == "scrub"


def test_the_original_is_not_trained(recipe):
    loaded, table, pairs = pairs_of(recipe("npo"))
    loss = loss_of(methods["npo"], table, loaded, 0)
    batch = pairs.batch([pairs[0]])
    start = loss(loaded.model, batch, 0.0)
    assert start.item() == pytest.approx(2 / 0.1 * torch.log(torch.tensor(2.0)).item())
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(2)
    assert loss(loaded.model, batch, 0.0).item() != pytest.approx(start.item())


def test_a_dry_run_says_what_is_trained(recipe):
    assert plan(recipe("ceu"))["baseline"] == {"ceu": 3}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"loss": "npo-rt"}, "'baseline.loss': there is no method 'npo-rt'; did you mean 'npo-"),
        ({"gamma": 1.0}, r"'baseline.gamma': method 'npo' has no key 'gamma'"),
        ({"learning_rate": 0.0}, "'baseline.learning_rate': found 0.0, expected a number above 0"),
    ],
)
def test_a_wrong_table_is_told_at_once(recipe, keys, told):
    with pytest.raises(InputError, match=told):
        recipe(**keys)


def test_a_baseline_needs_a_model_and_data():
    with pytest.raises(InputError) as error:
        parse_recipe({"baseline": {"loss": "ga"}}, "a recipe")
    assert "'baseline': training needs [data] forget" in str(error.value)
    assert "'baseline': there is no [model] name" in str(error.value)


def test_a_layer_that_is_not_there_is_told(recipe, tmp_path):
    with pytest.raises(InputError, match="'baseline.layer': found 2, but the model's layers are 0 to 1"):
        baseline(recipe("rmu", layer=2), tmp_path)


def test_the_commands_print_results_alone(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = recipe("simnpo").document()
    raw["benchmark"]["own"] |= {name: str(tmp_path / raw["benchmark"]["own"][name]) for name in ("forget", "retain")}
    raw["finetune"] = {"base": raw["model"]["name"], "epochs": 1}
    (tmp_path / "away.toml").write_text(tomli_w.dumps(raw), encoding="utf-8")
    planned = runner.invoke(app, ["finetune", "away.toml", "--dry-run"])
    assert (planned.exit_code, planned.stderr) == (0, "")
    assert "# finetune full: 6 rows an epoch\n# finetune retain: 3 rows an epoch\n" in planned.stdout
    assert "# baseline simnpo: 3 rows an epoch\n" in planned.stdout
    assert not (tmp_path / "results").exists()
    made = runner.invoke(app, ["finetune", "away.toml", "--json"])
    assert (made.exit_code, made.stderr) == (0, "")
    assert list(json.loads(made.stdout)) == ["results/away/models/full", "results/away/models/retain"]
    table = runner.invoke(app, ["baseline", "away.toml", "--set", "baseline.epochs=1"])
    assert (table.exit_code, table.stderr) == (0, "")
    assert "results/away/baselines/simnpo" in table.stdout
    wrong = runner.invoke(app, ["baseline", "away.toml", "--loss", "nppo"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert wrong.stderr == "ecoprompt: away.toml: 'baseline.loss': there is no method 'nppo'; did you mean 'npo'?\n"


def test_a_recipe_that_has_no_such_table_says_so():
    for command, told in (
        ("finetune", "there is no [finetune]"),
        ("baseline", "there is no [baseline], so name a meth"),
    ):
        result = runner.invoke(app, [command, "quickstart", "--dry-run"])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"ecoprompt: quickstart: {told}")
