"""`optimize`: the search on held-out rows, its targets, what it leaves in the pack, and what it refuses."""

from __future__ import annotations

import json
import shutil
import tomllib
from typing import Annotated

import numpy as np
import pytest
from pydantic import Field
from typer.testing import CliRunner

from ecoprompt import optimize as module
from ecoprompt import recipe as recipes
from ecoprompt import scoring
from ecoprompt.cli import app
from ecoprompt.evaluate import _with_learned as _learned_runs
from ecoprompt.evaluate import evaluate, runs_of
from ecoprompt.models import aliases
from ecoprompt.optimize import Objective, draw, held_out, optimize, search_of
from ecoprompt.pack import learned_corruption, load_pack, obtain_gate, train_classifier
from ecoprompt.planning import plan
from ecoprompt.recipe import load_recipe
from ecoprompt.registry import InputError, corruptions, quiet
from ecoprompt.results import Store

NAME = "quickstart-search"
TEN_ROWS = "optimize.held_out=0.25"


def read(*overrides):
    return load_recipe(NAME, [TEN_ROWS, *overrides])


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search on the quick start's world, and where its results are."""
    folder = tmp_path_factory.mktemp("search")
    return optimize(read(), folder), folder


def test_the_search_ends_on_its_target_and_tells_the_pack(searched):
    learned, folder = searched
    assert learned.about["stopped"] == "tolerance"
    assert abs(learned.about["reached"] - learned.about["target"]) <= 0.01
    assert 0.1 < learned.about["target"] < 0.3  # what a model that never saw them scores
    assert len(learned.found.evaluations) <= 16
    assert learned.found.evaluations[0].parameter == (0.1,)
    pack = tomllib.loads((learned.pack / "forget.toml").read_text())
    assert (
        pack["corruption"]
        == learned.corruption
        == {
            "method": "rand_noise_first_n",
            "dims": 1,
            "strength": learned.found.best.parameter[0],
        }
    )
    assert pack["learned"] == learned.about
    assert load_pack(learned.pack).corruption == learned.corruption
    assert "| learned | by `adaptive`: forget_rouge" in (learned.pack / "README.md").read_text()
    assert learned_corruption(read(), folder).parameters["strength"] == learned.corruption["strength"]


def test_it_evaluates_what_it_learned_on_rows_that_the_search_did_not_read(searched):
    learned, folder = searched
    found = evaluate(read("evaluate.limit={ retain = 30 }"), folder)
    strength = learned.corruption["strength"]
    told = f'learned: rand_noise_first_n, {{"dims": 1, "strength": {strength}}}; used by eco'
    assert found.notes == [told]
    _, apart = held_out(read(), read().optimize)
    evaluated = {row["index"] for row in found.rows if row["forget"]}
    assert len(apart) == learned.about["rows"] == 10
    assert {item.index for item in apart} | evaluated == set(range(40))
    assert {item.index for item in apart} & evaluated == set()
    assert found.summary["runs"]["eco"]["metrics"]["forget_quality"] > 0.05
    assert plan(read())["rows"]["quickstart"]["forget"] == len(evaluated)


def test_what_is_learned_takes_no_other_corruption_s_place(searched):
    """Not of a point of a sweep, not of a run with its own, nor of a run on another model."""
    learned, folder = searched
    strength = learned.corruption["strength"]
    swept, _ = _with_learned(read('sweep={ "corruption.strength" = [0.1, 1.0] }'), folder)
    assert swept == {"eco[corruption.strength=0.1]": 0.1, "eco[corruption.strength=1.0]": 1.0}
    own = 'run.own={ forget = true, corruption = { method = "rand_noise_first_n", strength = 0.1 } }'
    other = 'run.other={ forget = true, model = "quickstart-retain" }'
    runs, notes = _with_learned(read(own, other), folder)
    assert runs == {"eco": strength, "own": 0.1, "other": 0.1}
    assert notes[0].endswith("; used by eco")


def _with_learned(recipe, folder):
    runs, notes = _learned_runs(recipe, runs_of(recipe), folder)
    return {run.name: run.corruption.parameters["strength"] for run in runs if run.guarded}, notes


@pytest.mark.parametrize(
    "override",
    ["model.batch_tokens=512", "optimize.budget=9", "optimize.tolerance=0.5", "evaluate.limit={ retain = 3 }"],
)
def test_what_does_not_touch_the_search_leaves_what_it_learned(searched, tmp_path, override):
    learned, folder = searched
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert learned_corruption(read(override), tmp_path) is not None
    obtain_gate(read(override), read(override).gate, 0, tmp_path)
    train_classifier(read(override), tmp_path)
    assert tomllib.loads((tmp_path / NAME / "pack" / "forget.toml").read_text())["corruption"] == learned.corruption


def test_another_recipe_has_learned_nothing(searched):
    _, folder = searched
    for override in (
        "corruption.strength=0.2",
        "optimize.held_out=0.5",
        "data.forget=quickstart/people",
        "tokens.scope=prompt",
    ):
        known = learned_corruption(read(override), folder) is not None
        assert known == override.startswith("data")
    assert learned_corruption(read(), folder / "elsewhere") is None


def test_a_search_that_was_killed_goes_on(searched, tmp_path, monkeypatch):
    learned, _ = searched
    real, asked = Objective.__call__, []

    def dying(self, parameter, seed):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(tuple(parameter))
        return real(self, parameter, seed)

    monkeypatch.setattr(Objective, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        optimize(read(), tmp_path)
    first = list(asked)
    asked.clear()
    monkeypatch.setattr(Objective, "__call__", lambda *args: asked.append(tuple(args[1])) or real(*args))
    again = optimize(read(), tmp_path)
    whole = [one.parameter for one in learned.found.evaluations]
    assert (first, asked) == (whole[:4], whole[4:])
    assert again.corruption == learned.corruption
    assert [one.metric for one in again.found.evaluations] == [one.metric for one in learned.found.evaluations]


def test_what_a_search_computed_another_finds(searched, monkeypatch):
    """A grid over the same strengths asks the model nothing new; only what is searched by differs."""
    learned, folder = searched
    seen = []
    monkeypatch.setitem(scoring.KINDS, "generation", (lambda *args: seen.append(args), ""))
    low = learned.found.evaluations[0].parameter[0]
    other = read(
        "optimize.method=grid", "optimize.points=2", f"optimize.bounds=[{low}, {learned.corruption['strength']}]"
    )
    found = optimize(other, folder)
    assert seen == []
    assert found.corruption["strength"] == pytest.approx(learned.corruption["strength"])


@pytest.mark.parametrize("method", ["published", "spsa", "grid"])
def test_every_method_can_search(tmp_path, method):
    found = optimize(read(f"optimize.method={method}", "optimize.budget=3"), tmp_path)
    assert 1 <= len(found.found.evaluations) <= 3
    assert found.about["search"] == method
    assert found.found.best.objective == min(one.objective for one in found.found.evaluations)


def test_dims_are_searched_in_whole_numbers(tmp_path):
    overrides = (
        'corruption={ method = "zero_out_top_k", dims = "25%" }',
        "optimize.parameter=dims",
        "optimize.budget=6",
    )
    found = optimize(read(*overrides), tmp_path)
    assert all(value.is_integer() for one in found.found.evaluations for value in one.parameter)
    assert type(found.corruption["dims"]) is int
    assert found.found.evaluations[0].parameter == (hidden_size() / 4,)


def hidden_size():
    path = recipes.Path(recipes.__file__).parent / aliases()["quickstart"]["path"] / "config.json"
    return json.loads(path.read_text())["hidden_size"]


def test_a_vector_has_a_strength_for_each_dimension(searched, tmp_path):
    learned, _ = searched
    overrides = ("corruption.dims=4", "optimize.tolerance=0.0", "optimize.budget=8")
    scalar = optimize(read(*overrides), tmp_path)
    vector = optimize(read(*overrides, "optimize.vector=true", "optimize.budget=12"), tmp_path)
    assert len(vector.corruption["strength"]) == 4
    assert vector.found.best.objective <= scalar.found.best.objective
    assert load_pack(vector.pack).corruption == vector.corruption


@pytest.fixture(scope="module")
def retained(tmp_path_factory):
    """The retain model's values of all rows of the forget set, by index."""
    recipe = load_recipe(
        "quickstart", ["run={ retain = { model = 'quickstart-retain' } }", "evaluate.limit={ retain = 1, facts = 1 }"]
    )
    found = evaluate(recipe, tmp_path_factory.mktemp("retained"))
    return {row["index"]: row["values"] for row in found.rows if row["forget"]}


@pytest.mark.parametrize("metric", ["forget_truth_ratio", "forget_probability", "ks_statistic"])
def test_the_target_is_what_the_retain_model_scores(retained, tmp_path, metric):
    recipe = read(f"optimize.metric={metric}")
    table, corruption = search_of(recipe)
    objective = Objective(recipe, table, corruption, Store(tmp_path / "store.jsonl"))
    retain = module._retain_run(recipe, table)
    objective.compare_with(retain, module.quiet)
    objective.attach(None, module.quiet)
    assert objective.read == {"truth_ratio"} if metric != "forget_probability" else {"probability"}
    values = [retained[item.index] for item in objective.items]
    expected = 0.0 if metric == "ks_statistic" else np.mean([one[metric.removeprefix("forget_")] for one in values])
    assert objective.target == pytest.approx(expected, abs=1e-4)


def test_a_surrogate_stands_for_the_retain_model():
    recipe = read("optimize.surrogate=quickstart")
    assert module._retain_run(recipe, recipe.optimize).model.name == "quickstart-retain"
    alone = read("optimize.surrogate=quickstart", "run={ eco = { forget = true } }")
    assert module._retain_run(alone, alone.optimize).model.name == "quickstart"
    without = read("optimize.target=0.2", "run={ eco = { forget = true } }")
    assert module._retain_run(without, without.optimize) is None


def test_the_search_is_drawn(searched, tmp_path):
    learned, _ = searched
    path = draw(read(), learned, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optimize.metric=model_utility"], "no [[evaluate]] has 'model_utility' of a forget set"),
        (["optimize.metric=forget_roug"], "did you mean 'forget_rouge'?"),
        (["evaluate.subsets=['retain']"], "no [[evaluate]] has 'forget_rouge' of a forget set"),
        (["evaluate.subsets=['forgot']"], "no such subset of quickstart; did you mean 'forget'?"),
        (["evaluate.subsets=[]"], "'evaluate.0.subsets': found []"),
        (["optimize.method=adaptiv"], "did you mean 'adaptive'?"),
        (["optimize.target=chance"], "'forget_rouge' has no value that chance gives"),
        (["optimize.parameter=dims", "corruption={ method = 'reverse_order' }"], "'reverse_order' has no 'dims'"),
        (["corruption={ method = 'zero_out_top_k', dims = 3 }"], "'zero_out_top_k' has no 'strength'"),
        (["optimize.vector=true", "optimize.parameter=dims"], "only a strength can be one for each dimension"),
        (["optimize.bounds=[5, 1]"], "expected two numbers above 0, the smaller first"),
        (["optimize.bounds=[0, 1]"], "expected two numbers above 0, the smaller first"),
        (["optimize.parameter=['dims']"], "found ['dims'], expected 'strength' or 'dims'"),
        (["optimize.points=3"], "has no key 'points'"),
        (["optimize.held_out=1.5"], "expected a number below 1"),
        (["corruption.strength=0.001"], "found 0.001, where a search from 0.01 to 1000.0 cannot start"),
        (["optimize.bounds=[1, 5]"], "found 0.1, where a search from 1 to 5 cannot start"),
        (["corruption.strength=[0.1]"], "say `vector = true`"),
        (["optimize.scale=linear", "optimize.bounds=[0, 1]"], "expected two numbers above 0"),
        (
            ["optimize.metric=ks_statistic", "optimize.target=0.1", "run={ eco = { forget = true } }"],
            "'ks_statistic' needs [run.retain] or [optimize] surrogate to compare with",
        ),
        (["run={ eco = { forget = true } }"], "neither [run.retain] nor [optimize] surrogate"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(overrides, told):
    with pytest.raises(InputError) as error:
        read(*overrides)
    assert told in str(error.value)


def test_bounds_beyond_what_a_corruption_takes_are_refused(monkeypatch, tmp_path):
    def faint(embeddings, generator, *, strength: Annotated[float, Field(gt=0, le=1)] = 0.5): ...

    monkeypatch.setattr(corruptions, "_items", {**corruptions._items, "faint": faint})
    told = r"'optimize.bounds' \(0.01 to 1000 unless said\): found 1000.0, expected a number of at most 1"
    with pytest.raises(InputError, match=told):
        read("corruption={ method = 'faint' }")
    read("corruption={ method = 'faint', strength = 0.5 }", "optimize.bounds=[0.1, 1.0]")
    wide = read(
        "corruption={ method = 'zero_out_top_k', dims = 3 }", "optimize.parameter=dims", "optimize.bounds=[1, 999]"
    )
    objective = Objective(wide, wide.optimize, wide.corruption, Store(tmp_path / "scores"))
    with pytest.raises(InputError, match="'optimize.bounds': found 999, expected at most the model's hidden size, "):
        objective.attach(None, quiet)


def test_a_recipe_without_a_search_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no \[optimize\]"):
        optimize(load_recipe("quickstart", []), tmp_path)
    done = CliRunner().invoke(app, ["optimize", "quickstart"])
    assert done.exit_code == 2
    with pytest.raises(InputError, match="leaves no row"):
        held_out(read("optimize.held_out=0.001"), read("optimize.held_out=0.001").optimize)


def test_a_search_of_all_rows_leaves_none_to_evaluate(tmp_path):
    with pytest.raises(InputError, match="leaves no row of the forget set to evaluate"):
        evaluate(read("optimize.held_out=0.995"), tmp_path)


def test_a_pack_that_a_search_left_is_written_anew_for_the_gate_of_the_next(tmp_path):
    gate = 'gate={ kind = "linear", threshold = THRESHOLD }'
    for threshold in (0.5, 0.7):
        recipe = read(gate.replace("THRESHOLD", str(threshold)), "optimize.budget=1")
        assert load_pack(optimize(recipe, tmp_path).pack).threshold == threshold


def test_evaluated_before_it_is_searched_the_recipe_counts(tmp_path):
    recipe = read("evaluate.limit=2", "corruption.strength=3.0")
    found = evaluate(recipe, tmp_path)
    assert found.notes == ["[optimize] has not been run with these tables, so [corruption] is used as it stands"]


def test_the_command_prints_the_path_and_what_it_found(searched, tmp_path):
    learned, folder = searched
    runner = CliRunner()
    asked = ["optimize", NAME, "--set", TEN_ROWS, "--output", str(folder)]
    done = runner.invoke(app, [*asked, "--plot"])
    assert done.exit_code == 0
    assert f"strength = {learned.corruption['strength']}" in done.stdout
    assert (folder / NAME / "optimize.png").exists()
    document = json.loads(runner.invoke(app, [*asked, "--json"]).stdout)
    assert document["corruption"] == learned.corruption
    assert [one["number"] for one in document["trace"]] == list(range(1, len(learned.found.evaluations) + 1))
    assert "[optimize]" in runner.invoke(app, ["optimize", NAME, "--dry-run"]).stdout
