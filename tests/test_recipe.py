"""The recipe: read strictly, all mistakes at once, `--set`, `[sweep]`, and the canonical form."""

from __future__ import annotations

import contextlib
import datetime
import time
import tomllib

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecoprompt.recipe import OPEN, digest, find_recipe, load_recipe, parse_model, parse_recipe, resolve_runs, shipped
from ecoprompt.registry import InputError
from ecoprompt.sweep import NAMING, parse_override

WHOLE = """
seed = 3
[model]
name = "phi-1.5"
[data]
forget = "tofu/forget10"
[gate]
threshold = 0.9
[tokens]
select = "phrases"
names = ["Hsiao Yun-Hwa"]
[corruption]
method = "rand_noise_first_n"
strength = 4
[run.retain]
model = "./retain"
[run.original]
[run.eco]
forget = true
[[evaluate]]
benchmark = "tofu"
limit = { retain = 300 }
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def tables(**changed):
    return {**tomllib.loads(WHOLE), **changed}


def problems(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    return list(caught.value.problems)


def problems_of(raw):
    """All problems of a recipe's tables, without the name of where they stand."""
    told = problems(parse_recipe, raw, "here")
    assert all(sentence.startswith("here: ") for sentence in told)
    return [sentence.removeprefix("here: ") for sentence in told]


def names_of(raw):
    return [run.name for run in resolve_runs(parse_recipe(raw, "here"))]


def test_a_whole_recipe_with_its_defaults():
    recipe = parse_recipe(tables(), "here")
    assert recipe.seed == 3
    assert (recipe.model.name, recipe.model.dtype, recipe.model.attention) == ("phi-1.5", "auto", "auto")
    assert recipe.gate.kind == "linear"
    assert recipe.gate.parameters["word_ngrams"] == 2
    assert recipe.tokens.scope == "prompt"
    assert recipe.tokens.parameters == {"names": ["Hsiao Yun-Hwa"]}
    assert recipe.corruption.parameters == {"dims": 1, "strength": 4.0}
    assert list(recipe.run) == ["retain", "original", "eco"]
    assert recipe.run["eco"].forget
    assert recipe.evaluate[0].limit == {"retain": 300}


def test_an_empty_recipe_has_defaults_for_everything():
    recipe = parse_recipe({}, "here")
    assert (recipe.seed, recipe.gate.threshold, recipe.tokens.select, recipe.corruption) == (0, 0.5, "all", None)
    assert resolve_runs(recipe) == []


def test_a_classifier_makes_the_gate_a_transformer():
    recipe = parse_recipe(tables(gate={"classifier": "someone/something"}), "here")
    assert recipe.gate.kind == "transformer"
    assert recipe.gate.parameters["max_length"] == 512


def test_a_calibrated_threshold():
    gate = {"threshold": {"calibrate": "conformal", "false_positive_rate": 0.001}}
    assert parse_recipe(tables(gate=gate), "here").gate.threshold.held_out == 0.25


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"sede": 1}, "'sede': a recipe has no key 'sede'; did you mean 'seed'?"),
        (
            {"float": 1},
            "'float': a recipe has no key 'float'; known: baseline, benchmark, corruption, data, evaluate, ",
        ),
        ({"seed": -1}, "'seed': found -1, expected a number of at least 0"),
        ({"seed": 1.5}, "'seed': found 1.5, expected a whole number"),
        ({"seed": True}, "'seed': found true, expected a whole number"),
        ({"seed": datetime.date(2024, 5, 1)}, "'seed': found datetime.date(2024, 5, 1), expected a whole number"),
        ({"name": "a/b"}, "'name': found 'a/b', expected "),
        ({"name": ".."}, "'name': found '..', expected "),
        ({"model": "phi-1.5"}, "'model': found 'phi-1.5', expected a table"),
        ({"model": {"name": 5}}, "'model.name': found 5, expected a text"),
        ({"model": {"name": "x", "dtyp": 1}}, "'model.dtyp': [model] has no key 'dtyp'; did you mean 'dtype'?"),
        (
            {"model": {"name": "x", "dtype": "int8"}},
            "'model.dtype': found 'int8', expected 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        ({"model": {"name": "x", "batch_tokens": 0}}, "'model.batch_tokens': found 0, expected a number of at least 1"),
        ({"data": {}}, "'data.forget': this key is needed"),
        ({"data": 4}, "'data': found 4, expected a table"),
        (
            {"data": {"forget": "tofu/forget11"}},
            "'data.forget': no forget set 'tofu/forget11'; did you mean 'tofu/forg",
        ),
        ({"data": {"forget": "tofu"}}, "'data.forget': no forget set 'tofu'; known: tofu/forget01, "),
        ({"data": {"forget": "tufo/forget10"}}, "'data.forget': no benchmark 'tufo'; did you mean 'tofu'?"),
        ({"gate": {"kind": "liner"}}, "'gate.kind': there is no gate kind 'liner'; did you mean 'linear'?"),
        ({"gate": {"kind": 5}}, "'gate.kind': found 5, expected a text"),
        ({"gate": {"features": "many"}}, "'gate.features': found 'many', expected a whole number"),
        ({"gate": {"fetures": 4}}, "'gate.fetures': gate kind 'linear' has no key 'fetures'; did you mean 'features'?"),
        ({"gate": {"c": float("inf")}}, "'gate.c': found inf, expected a finite number"),
        ({"gate": {"threshold": 2}}, "'gate.threshold': found 2, expected a number of at most 1 or a table"),
        ({"gate": {"threshold": float("nan")}}, "'gate.threshold': found nan, expected a finite number or a table"),
        (
            {"gate": {"threshold": {"calibrate": "conformal", "false_positive_rate": 1}}},
            "'gate.threshold.false_positive_rate': found 1, expected a number below 1",
        ),
        (
            {"gate": {"threshold": {"calibrate": "konformal", "false_positive_rate": 0.1}}},
            "'gate.threshold.calibrate': found 'konformal', expected 'conformal'",
        ),
        ({"gate": {"parameters": {"c": 1.0}}}, "'gate.parameters': gate kind 'linear' has no key 'parameters'; "),
        ({"tokens": {"select": "alll"}}, "'tokens.select': there is no token selector 'alll'; did you mean 'all'?"),
        ({"tokens": {"scope": "answer"}}, "'tokens.scope': found 'answer', expected 'prompt' or 'sequence'"),
        ({"tokens": {"names": ["x"]}}, "'tokens.names': token selector 'all' has no key 'names'; none is known"),
        ({"tokens": {"select": "phrases"}}, "'tokens.names': this key is needed"),
        ({"tokens": {"select": "phrases", "names": []}}, "'tokens.names': found [], expected at least 1 of them"),
        (
            {"corruption": {"method": "rand_noise_firstn"}},
            "'corruption.method': there is no corruption 'rand_noise_firstn'; did you mean 'rand_noise_first_n'?",
        ),
        ({"corruption": {"strength": 3}}, "'corruption.method': this key is needed"),
        ({"corruption": {"method": "zero_out_top_k"}}, "'corruption.dims': this key is needed"),
        (
            {"corruption": {"method": "rand_noise_top_k", "strength": "5"}},
            "'corruption.strength': found '5', expected a number",
        ),
        (
            {"corruption": {"method": "shuffle", "dim": 3}},
            "'corruption.dim': corruption 'shuffle' has no key 'dim'; none is known",
        ),
        ({"corruption": 5}, "'corruption': found 5, expected a table"),
        ({"run": {"a": {"forget": 1}}}, "'run.a.forget': found 1, expected true or false"),
        ({"run": {"a": {"froget": True}}}, "'run.a.froget': [run.a] has no key 'froget'; did you mean 'forget'?"),
        ({"run": {"int": {"prefix": 1}}}, "'run.int.prefix': found 1, expected a text"),
        ({"run": {"a": 5}}, "'run.a': found 5, expected a table"),
        ({"run": []}, "'run': found [], expected a table"),
        (
            {"run": {"a": {"corruption": {"method": "shuffle"}}}},
            "'run.a.corruption': a run with its own corruption needs forget = true",
        ),
        (
            {"run": {"a": {"forget": True, "corruption": {"method": "suffle"}}}},
            "'run.a.corruption.method': there is no corruption 'suffle'; did you mean 'shuffle'?",
        ),
        ({"model": {}, "run": {"a": {}}}, "'run.a.model': [run.a] names no model and there is no [model] name"),
        ({"evaluate": {"benchmark": "tofu"}}, "'evaluate': found {'benchmark': 'tofu'}, expected a list"),
        ({"evaluate": [{}]}, "'evaluate.0.benchmark': this key is needed"),
        ({"evaluate": [{"benchmark": "tof"}]}, "'evaluate.0.benchmark': no benchmark 'tof'; did you mean 'tofu'?"),
        (
            {"evaluate": [{"benchmark": "tofu", "limit": 0}]},
            "'evaluate.0.limit': found 0, expected a number of at least 1 or a table",
        ),
        (
            {"evaluate": [{"benchmark": "tofu", "limit": {"retain": 0}}]},
            "'evaluate.0.limit.retain': found 0, expected a number of at least 1",
        ),
        (
            {"evaluate": [{"benchmark": "tofu", "limit": {"retian": 5}}]},
            "'evaluate.0.limit.retian': no such subset of tofu; did you mean 'retain'?",
        ),
        ({"sweep": 5}, "'sweep': found 5, expected a table"),
        ({"sweep": [{"seed": [1]}]}, "'sweep': found [{'seed': [1]}], expected a table"),
        ({"sweep": {"seed": 5}}, "'sweep.seed': found 5, expected a list of at least one value"),
        ({"sweep": {"seed": []}}, "'sweep.seed': found [], expected a list of at least one value"),
        (
            {"sweep": {"data.forget": ["tofu/forget01"]}},
            "'sweep.data.forget': cannot be swept; what can: seed, model, ",
        ),
        ({"sweep": {"name": ["x"]}}, "'sweep.name': cannot be swept; what can: "),
        ({"sweep": {"a b": [1]}}, "'sweep.a b': cannot be swept; what can: "),
        ({"sweep": {"run": [{"x": {}}]}}, "'sweep.run': cannot be swept; what can: "),
        ({"sweep": {"run.ecco.prefix": ["x"]}}, "'sweep.run.ecco.prefix': there is no run 'ecco'; did you mean 'eco'?"),
        (
            {"run": 5, "sweep": {"run.eco.prefix": ["x"]}},
            "'sweep.run.eco.prefix': there is no run 'eco'; none is known",
        ),
        ({"sweep": {"seed.x": [1]}}, "'seed.x': cannot be set, as 'seed' is 3 and not a table"),
        ({"sweep": {"corruption.strenth": [1]}}, "'corruption.strenth': corruption 'rand_noise_first_n' has no key "),
        ({"sweep": {"corruption.strength": [1, "5"]}}, "'corruption.strength': found '5', expected a number"),
        ({"sweep": {"corruption.method": ["shufle"]}}, "'corruption.method': there is no corruption 'shufle'; did you"),
        ({"sweep": {"seed": [1, datetime.date(2024, 5, 1)]}}, "'seed': found datetime.date(2024, 5, 1), expected a wh"),
        ({"sweep": {"run.eco.forget": [True, 0]}}, "'run.eco.forget': found 0, expected true or false"),
    ],
)
def test_every_kind_of_mistake_is_one_sentence(changed, sentence):
    raw = {key: value for key, value in tables(**changed).items() if value is not None}
    told = [one for one in problems_of(raw) if one.startswith(sentence)]
    assert len(told) == 1, problems_of(raw)


@pytest.mark.parametrize(
    ("without", "key", "words"),
    [
        ("corruption", "'run.eco.forget'", "there is no [corruption]"),
        ("data", "'run.eco.forget'", "there is neither [data] forget nor [gate] classifier"),
    ],
)
def test_a_guarded_run_needs_a_corruption_and_a_gate(without, key, words):
    raw = tables()
    del raw[without]
    (sentence,) = problems_of(raw)
    assert sentence.startswith(key)
    assert words in sentence
    raw["gate"] = {"classifier": "someone/something"}
    if without == "data":
        assert parse_recipe(raw, "here").data is None


@pytest.mark.parametrize("values", [[], 5, "7"])
def test_what_is_no_list_to_sweep_is_told_once(values):
    assert len(problems_of(tables(sweep={"corruption.strength": values}))) == 1


def test_all_mistakes_at_once():
    raw = tables(
        sede=1,
        seed=-1,
        model={"nam": "x", "dtype": "int8"},
        data={"forget": "tofu/forget11"},
        gate={"kind": "liner", "threshold": 2},
        tokens={"select": "alll", "scope": "x"},
        corruption={"method": "rand_noise_first_n", "strength": -1},
        run={"a": {"forget": 1}, "b": {"corruption": {"method": "shuffle"}}, "c": {"corruption": {"method": "shufle"}}},
        evaluate=[{"benchmark": "tof", "limit": 0}],
        sweep={"corruption.dims": [1, 0], "tokens.scope": ["prompt", "y"]},
    )
    found = [sentence.partition("': ")[0][1:] for sentence in problems_of(raw)]
    assert sorted(found) == sorted(
        ["sede", "seed", "model.nam", "model.dtype", "data.forget", "gate.kind", "gate.threshold", "tokens.select"]
        + ["tokens.scope", "corruption.strength", "run.a.forget", "run.a.model", "run.b.model", "run.b.corruption"]
        + ["run.c.model", "run.c.corruption.method", "run.c.corruption", "evaluate.0.benchmark", "evaluate.0.limit"]
        + ["corruption.dims", "tokens.scope"]
    )


def test_a_mistake_that_every_point_of_a_sweep_has_is_told_once():
    raw = tables(seed=-1, sweep={"corruption.strength": [1, 2, 3]})
    assert problems_of(raw) == ["'seed': found -1, expected a number of at least 0"]


def test_bad_toml_names_file_and_line(write):
    path = write("seed = 0\n[model\n")
    (sentence,) = problems(load_recipe, path)
    assert sentence.startswith(f"{path}: not valid TOML: ")
    assert "line 2" in sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'name = "\xff"', "not UTF-8 text (byte 8)"),
        ("seed = 0\nseed = 1", "not valid TOML: "),
        (f"seed = {'1' * 5000}", "not valid TOML: "),
        (f"a = {'[' * 100_000}", "not valid TOML: "),
    ],
)
def test_files_that_cannot_be_read(write, content, words):
    path = write(content)
    (sentence,) = problems(load_recipe, path)
    assert sentence.startswith(f"{path}: {words}")


def test_a_byte_order_mark_does_no_harm(write):
    assert load_recipe(write(b"\xef\xbb\xbfseed = 4")).seed == 4


def test_a_recipe_is_found_by_path_or_shipped_name(write, tmp_path, monkeypatch):
    path = write("seed = 4")
    assert str(find_recipe(path)) == path
    monkeypatch.chdir(tmp_path)
    for reference in ("tofu", "tofu.toml", "recipes/tofu.toml", "recipes/tofu"):
        assert find_recipe(reference) == shipped()["tofu"]
    assert load_recipe("mine.toml").name == "mine"
    (tmp_path / "tofu").write_text("seed = 9")
    assert load_recipe("tofu").seed == 9


def test_a_missing_recipe_gets_the_nearest_shipped_name(tmp_path):
    missing = "there is no such file, and no such shipped recipe"
    assert problems(load_recipe, "tufo.toml") == [f"tufo.toml: {missing}; did you mean 'tofu'?"]
    assert problems(load_recipe, "./x/tofu.toml") == [f"./x/tofu.toml: {missing}; did you mean 'tofu'?"]
    assert problems(load_recipe, "zzz") == [f"zzz: {missing}; known: {', '.join(sorted(shipped()))}"]
    assert "this is a folder, not a recipe" in problems(load_recipe, str(tmp_path))[0]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my recipe (2).toml", "my-recipe-2-"),
        (".hidden.toml", "hidden"),
        ("v1.2.toml", "v1.2"),
        ("größe.toml", "größe"),
    ],
)
def test_the_name_is_the_files(write, file, name):
    assert load_recipe(write("seed = 1", file)).name == name
    assert load_recipe(write("name = 'other'", file)).name == "other"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("corruption.strength=50", ("corruption", "parameters", "strength"), 50.0),
        ("corruption.strength = 5e1", ("corruption", "parameters", "strength"), 50.0),
        ("seed=7", ("seed",), 7),
        ("seed=7 # lucky", ("seed",), 7),
        ("model.name=./phi-1_5_retain95", ("model", "name"), "./phi-1_5_retain95"),
        ("model.name=llama2", ("model", "name"), "llama2"),
        ('model.name="7"', ("model", "name"), "7"),
        ("data.forget=tofu/forget05", ("data", "forget"), "tofu/forget05"),
        (
            "model.chat_template=\"{{ messages[0]['content'] }}\"",
            ("model", "chat_template"),
            "{{ messages[0]['content'] }}",
        ),
        ("run.eco.forget=false", ("run", "eco", "forget"), False),
        ("run.retain.prefix=", ("run", "retain", "prefix"), ""),
        ("run.retain.prefix=a = b", ("run", "retain", "prefix"), "a = b"),
        ('tokens.names=["A B", "C"]', ("tokens", "parameters", "names"), ["A B", "C"]),
        ("evaluate.limit=10", ("evaluate", 0, "limit"), 10),
        ("evaluate.limit={ forget = 5 }", ("evaluate", 0, "limit"), {"forget": 5}),
        ("evaluate.limit.forget=5", ("evaluate", 0, "limit"), {"retain": 300, "forget": 5}),
        ('run."a=b".model=x=y', ("run", "a=b", "model"), "x=y"),
        ('run."my run".model=x', ("run", "my run", "model"), "x"),
        ('sweep."corruption.strength"=[1, 5]', ("sweep",), {"corruption.strength": [1, 5]}),
    ],
)
def test_set_is_typed_as_toml(write, override, path, value):
    here = load_recipe(write(WHOLE), [override])
    for step in path:
        here = here[step] if isinstance(here, (dict, list)) else getattr(here, step)
    assert here == value
    assert type(here) is type(value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed", "--set seed: expected KEY=VALUE, as in corruption.strength=50"),
        ("=5", "--set =5: expected KEY=VALUE"),
        ("#x=5", "--set #x=5: expected KEY=VALUE"),
        ("a b=5", "--set a b=5: expected KEY=VALUE"),
        ("[a]\nb=5", "--set [a]\nb=5: expected KEY=VALUE"),
        ("a..b=5", "--set a..b=5: expected KEY=VALUE"),
        ("tokens.names=[A]", "--set tokens.names=[A]: '[A]' is not a TOML value; a text with such signs needs quotes"),
        ("model.name=it's", "--set model.name=it's: 'it's' is not a TOML value; "),
        ("seed=1\nname='x'", "--set seed=1\nname='x': "),
        ("seed.x=5", "'seed.x': cannot be set, as 'seed' is 3 and not a table"),
        ("model.name.x=5", "'model.name.x': cannot be set, as 'model.name' is 'phi-1.5' and not a table"),
    ],
)
def test_a_bad_override_is_told(write, override, sentence):
    (told,) = problems(load_recipe, write(WHOLE), [override])
    assert told.startswith(sentence)


def test_an_override_of_an_unknown_key_is_refused(write):
    path = write(WHOLE)
    assert problems(load_recipe, path, ["corruption.strenth=5"]) == [
        f"{path}: 'corruption.strenth': corruption 'rand_noise_first_n' has no key 'strenth'; did you mean 'strength'?"
    ]


def test_runs_without_a_sweep():
    runs = resolve_runs(parse_recipe(tables(), "here"))
    assert [(run.name, run.model.name, run.guarded) for run in runs] == [
        ("retain", "./retain", False),
        ("original", "phi-1.5", False),
        ("eco", "phi-1.5", True),
    ]
    assert runs[0].gate is None
    assert runs[2].seed == 3
    assert runs[2].corruption.parameters["strength"] == 4.0


def test_a_run_may_have_its_own_corruption_model_and_prefix():
    own = {"forget": True, "model": "m", "prefix": "p", "corruption": {"method": "zero_out_top_k", "dims": 9}}
    recipe = parse_recipe(tables(run={"eco": {"forget": True}, "zero": own}), "here")
    eco, zero = resolve_runs(recipe)
    assert eco.corruption.method == "rand_noise_first_n"
    assert (zero.model.name, zero.prefix, zero.corruption.method) == ("m", "p", "zero_out_top_k")
    assert zero.corruption.parameters == {"dims": 9}


def test_a_sweep_repeats_only_what_it_changes():
    raw = tables(sweep={"corruption.strength": [1, 5, 2.5]})
    assert names_of(raw) == [
        "retain",
        "original",
        "eco[corruption.strength=1]",
        "eco[corruption.strength=5]",
        "eco[corruption.strength=2.5]",
    ]
    strengths = [
        run.corruption.parameters["strength"] for run in resolve_runs(parse_recipe(raw, "here")) if run.guarded
    ]
    assert strengths == [1, 5, 2.5]


def test_a_sweep_of_two_keys_is_every_combination():
    raw = tables(sweep={"corruption.strength": [1, 5], "run.retain.model": ["a", "b"]})
    raw["run"]["own"] = {"forget": True, "corruption": {"method": "shuffle"}}
    assert names_of(raw) == [
        "retain[run.retain.model=a]",
        "retain[run.retain.model=b]",
        "original",
        "eco[corruption.strength=1]",
        "eco[corruption.strength=5]",
        "own",
    ]
    raw["sweep"]["seed"] = [0, 1]
    assert "eco[corruption.strength=5,seed=1]" in names_of(raw)
    assert [name for name in names_of(raw) if name.startswith("own")] == ["own[seed=0]", "own[seed=1]"]


def test_a_sweep_of_tables_and_a_sweep_of_one_value():
    calibrated = {"calibrate": "conformal", "false_positive_rate": 0.01}
    raw = tables(sweep={"gate.threshold": [0.5, calibrated]})
    assert names_of(raw)[2:] == [
        "eco[gate.threshold=0.5]",
        "eco[gate.threshold=conformal false_positive_rate=0.01]",
    ]
    assert names_of(tables(sweep={"corruption.strength": [9]})) == ["retain", "original", "eco"]
    assert names_of(tables(sweep={"corruption.strength": [9, 9]})) == ["retain", "original", "eco"]


def test_a_value_that_is_swept_need_not_be_stated_elsewhere():
    raw = tables(corruption={"method": "rand_noise_first_n"}, sweep={"corruption.strength": [7, 8]})
    assert parse_recipe(raw, "here").corruption.parameters == {"dims": 1, "strength": 7.0}
    assert names_of(raw)[2:] == ["eco[corruption.strength=7]", "eco[corruption.strength=8]"]
    raw = tables(sweep={"corruption": [{"method": "shuffle"}, {"method": "zero_out_top_k", "dims": 3}]})
    del raw["corruption"]
    assert len(names_of(raw)) == 4


MIXED = [
    {"method": "reverse_order"},
    {"dims": "25%", "method": "zero_out_top_k"},
    {"method": "rand_noise_top_k", "dims": 2, "strength": 5},
]


def test_a_sweep_over_whole_corruptions_mixes_methods_with_different_keys():
    raw = tables(sweep={"corruption": MIXED})
    recipe = parse_recipe(raw, "here")
    runs = resolve_runs(recipe)
    assert [run.name for run in runs] == [
        "retain",
        "original",
        "eco[corruption=reverse_order]",
        "eco[corruption=zero_out_top_k dims=25%]",
        "eco[corruption=rand_noise_top_k dims=2 strength=5]",
    ]
    assert [(run.corruption.method, run.corruption.parameters) for run in runs[2:]] == [
        ("reverse_order", {}),
        ("zero_out_top_k", {"dims": "25%"}),
        ("rand_noise_top_k", {"dims": 2, "strength": 5.0}),
    ]
    assert recipe.corruption.method == "rand_noise_first_n", "the table that is stated is not mixed with those swept"
    assert recipe.corruption.parameters == {"dims": 1, "strength": 4.0}
    assert names_of(recipe.document()) == [run.name for run in runs]
    del raw["corruption"]
    assert parse_recipe(raw, "here").corruption.method == "reverse_order"
    assert names_of(raw) == [run.name for run in runs]


def test_a_run_may_have_a_sweep_over_corruptions_of_its_own():
    raw = tables(sweep={"run.own.corruption": MIXED})
    raw["run"]["own"] = {"forget": True}
    assert names_of(raw) == [
        "retain",
        "original",
        "eco",
        "own[run.own.corruption=reverse_order]",
        "own[run.own.corruption=zero_out_top_k dims=25%]",
        "own[run.own.corruption=rand_noise_top_k dims=2 strength=5]",
    ]
    raw["run"]["own"]["corruption"] = {"method": "add_value_least_k", "strength": 1}
    own = parse_recipe(raw, "here").run["own"].corruption
    assert (own.method, own.parameters) == ("add_value_least_k", {"dims": 1, "strength": 1.0})
    assert len(names_of(raw)) == 6


def test_a_table_may_be_swept_together_with_a_key_in_it():
    """Whichever of them comes first in the recipe."""
    whole = [{"method": "zero_out_top_k"}, {"method": "flip_sign_top_k"}]
    for sweep in (
        {"corruption": whole, "corruption.dims": [1, 2]},
        {"corruption.dims": [1, 2], "corruption": whole},
    ):
        found = {
            (run.corruption.method, run.corruption.parameters["dims"])
            for run in resolve_runs(parse_recipe(tables(sweep=sweep), "here"))
            if run.guarded
        }
        assert found == {(table["method"], dims) for table in whole for dims in (1, 2)}


@pytest.mark.parametrize(
    ("sweep", "name"),
    [
        ({"tokens": [{"select": "phrases", "names": ["A, B", "C"]}, {}]}, 'tokens=phrases names=["A\\u002c B" C]'),
        ({"tokens": [{"select": "phrases", "names": ["A", "B C"]}, {}]}, 'tokens=phrases names=[A "B C"]'),
        ({"tokens.names": [["A", "B"], ["C"]]}, "tokens.names=[A B]"),
        ({"run.eco.prefix": ["You know, nothing", "x"]}, 'run.eco.prefix="You know\\u002c nothing"'),
        ({"run.eco.prefix": ["You know nothing", "x"]}, "run.eco.prefix=You know nothing"),
        ({"model": [{"name": "a/b", "dtype": "float16"}, {"name": "c"}]}, "model=a/b dtype=float16"),
        ({"gate": [{"classifier": "a/b", "threshold": 0.9}, {}]}, "gate={classifier=a/b threshold=0.9}"),
        (
            {"gate": [{"threshold": {"calibrate": "conformal", "false_positive_rate": 0.1}, "kind": "linear"}, {}]},
            "gate=linear threshold={conformal false_positive_rate=0.1}",
        ),
    ],
)
def test_a_swept_value_has_no_comma_in_a_runs_name(sweep, name):
    assert f"eco[{name}]" in names_of(tables(sweep=sweep))


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"method": "shufle"}, "'sweep.corruption.1.method': there is no corruption 'shufle'; did you mean 'shuffle'?"),
        ({"dims": 3}, "'sweep.corruption.1.method': this key is needed"),
        ({"method": "zero_out_top_k"}, "'sweep.corruption.1.dims': this key is needed"),
        ({"method": "zero_out_top_k", "dims": "0%"}, "'sweep.corruption.1.dims': found '0%', expected a whole number "),
        ({"method": "shuffle", "dims": 3}, "'sweep.corruption.1.dims': corruption 'shuffle' has no key 'dims'; none "),
        (5, "'sweep.corruption.1': found 5, expected a table"),
        ("shuffle", "'sweep.corruption.1': found 'shuffle', expected a table"),
    ],
)
@pytest.mark.parametrize("stated", [True, False])
def test_a_mistake_in_a_swept_table_names_its_entry(entry, sentence, stated):
    raw = tables(sweep={"corruption": [{"method": "shuffle"}, entry, {"method": "reverse_order"}]})
    if not stated:
        del raw["corruption"]
    (told,) = problems_of(raw)
    assert told.startswith(sentence)
    raw["sweep"]["corruption"] = [entry, entry]
    assert [one.partition("': ")[0] for one in problems_of(raw)] == [
        sentence.partition("': ")[0].replace(".1", f".{number}") for number in (0, 1)
    ]
    raw["sweep"] = {"run.eco.corruption": [{"method": "shuffle"}, entry]}
    assert problems_of(raw)[-1].startswith(sentence.replace("sweep.", "sweep.run.eco."))


def test_a_mistake_beside_a_swept_table_is_told_where_it_stands():
    raw = tables(sweep={"corruption": [{"method": "zero_out_top_k"}], "corruption.dims": [0, 1]})
    (told,) = problems_of(raw)
    assert told.startswith("'corruption.dims': found 0, ")
    raw = tables(corruption={"method": "shufle"}, sweep={"corruption": [{"method": "shuffle"}]}, seed=-1)
    assert [one.partition("': ")[0] for one in problems_of(raw)] == ["'corruption.method", "'seed"]


def test_what_names_a_function_names_a_table_too():
    assert {choice for choice, _, _ in OPEN.values()} <= set(NAMING)


def test_many_tables_are_swept_in_no_time():
    raw = tables(sweep={"corruption": [{"method": "zero_out_top_k", "dims": dims} for dims in range(1, 201)]})
    started = time.perf_counter()
    assert len(names_of(raw)) == 202
    assert time.perf_counter() - started < 1


def test_a_sweep_over_functions_takes_the_defaults_of_each():
    raw = tables(sweep={"gate.kind": ["linear", "transformer"]})
    raw["run"]["own"] = {"forget": True, "corruption": {"strength": 5}}
    raw["sweep"]["run.own.corruption.method"] = ["rand_noise_top_k", "add_value_least_k"]
    recipe = parse_recipe(raw, "here")
    kinds = {run.gate.kind: run.gate.parameters for run in resolve_runs(recipe) if run.name.startswith("eco")}
    assert "word_ngrams" in kinds["linear"]
    assert "max_length" in kinds["transformer"]
    again = parse_recipe(recipe.document(), "there")
    assert [digest(run.gate, run.corruption) for run in resolve_runs(again)] == [
        digest(run.gate, run.corruption) for run in resolve_runs(recipe)
    ]


def test_a_sweep_over_classifiers():
    raw = tables(gate={}, sweep={"gate.classifier": ["a/b", "c/d"]})
    recipe = parse_recipe(raw, "here")
    assert [run.gate.parameters["classifier"] for run in resolve_runs(recipe) if run.guarded] == ["a/b", "c/d"]
    assert names_of(recipe.document()) == names_of(raw)


def test_the_document_has_every_default_and_reads_the_same(write):
    recipe = parse_recipe(tables(name="x", sweep={"corruption.strength": [1, 5]}), "here")
    document = recipe.document()
    assert document["corruption"] == {"method": "rand_noise_first_n", "dims": 1, "strength": 4.0}
    assert document["gate"]["word_ngrams"] == 2
    assert document["run"]["original"] == {"forget": False}
    again = parse_recipe(document, "here")
    assert again.document() == document
    assert load_recipe(write(tomli_w.dumps(document))).document() == document
    assert digest(again) == digest(recipe)
    assert [digest(run.corruption) for run in resolve_runs(again)] == [
        digest(run.corruption) for run in resolve_runs(recipe)
    ]


def test_runs_of_any_name_survive_the_document():
    recipe = parse_recipe(tables(run={"parameters": {"prefix": "x"}, "kind": {}, "a.b": {"forget": True}}), "here")
    assert list(parse_recipe(recipe.document(), "here").run) == ["parameters", "kind", "a.b"]
    raw = tables(run={"a.b": {}}, sweep={'run."a.b".prefix': ["x", "y"]})
    assert names_of(raw) == ['a.b[run."a.b".prefix=x]', 'a.b[run."a.b".prefix=y]']


def test_the_digest_follows_the_meaning_and_not_the_form():
    first = parse_recipe(tables(), "here")
    turned = dict(reversed(tables().items()))
    turned["corruption"] = {"strength": 4.0, "dims": 1, "method": "rand_noise_first_n"}
    assert digest(parse_recipe(turned, "there")) == digest(first)
    assert digest(first, 1) != digest(first, 2)
    assert digest(parse_recipe(tables(seed=4), "here")) != digest(first)
    # SHA-256 of the canonical JSON, worked out with sha256sum: printf '[{"a": 1, "b": [2]}]' | sha256sum
    assert digest({"b": [2], "a": 1}) == "086f5758f155b8d7"


def test_a_recipe_is_frozen():
    recipe = parse_recipe(tables(), "here")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 5


def test_the_raw_tables_are_left_alone():
    raw = tables(sweep={"corruption.strength": [1, 5]})
    resolve_runs(parse_recipe(raw, "here"))
    assert raw == tables(sweep={"corruption.strength": [1, 5]})


def test_parse_model():
    assert parse_model({"name": "x", "dtype": "float16"}).dtype == "float16"
    assert problems(parse_model, {"name": "x", "dtype": "half"}) == [
        "'dtype': found 'half', expected 'auto', 'float32', 'bfloat16' or 'float16'"
    ]
    assert problems(parse_model, {"nam": "x"}) == ["'nam': a model has no key 'nam'; did you mean 'name'?"]


WORDS = """
name seed model data gate tokens corruption run evaluate sweep kind select method strength dims names
threshold calibrate forget benchmark limit prefix parameters float int Calibration dict[str,int]
corruption.strength seed.x run.eco.forget gate.kind run.eco.corruption.method evaluate.0 classifier retain eco
root dtype
"""
KEYS = st.sampled_from(WORDS.split()) | st.text(max_size=5)
SCALARS = (
    st.sampled_from(["tofu", "tofu/forget10", "linear", "transformer", "all", "phrases", "shuffle", "rand_noise_top_k"])
    | st.none().map(lambda _: datetime.datetime(2024, 5, 1, 12))
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from([10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=5)
)
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


def reads_or_refuses(raw):
    """A recipe, of which the document reads the same, or InputError and nothing else."""
    refused: tuple[str, ...] = ()
    try:
        recipe = parse_recipe(raw, "here")
    except InputError as error:
        refused = error.problems
    assert all(sentence.startswith("here: ") for sentence in refused)
    assert not any("valid dictionary" in sentence or "Input should" in sentence for sentence in refused)
    if refused:
        return
    assert parse_recipe(recipe.document(), "here").document() == recipe.document()
    assert [run.name for run in resolve_runs(parse_recipe(recipe.document(), "here"))] == [
        run.name for run in resolve_runs(recipe)
    ]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, JUNK, max_size=6))
def test_junk_is_refused_and_never_breaks_the_reader(raw):
    reads_or_refuses(raw)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(list(tomllib.loads(WHOLE)) + ["sweep", "name"]),
    JUNK | st.dictionaries(KEYS, JUNK, max_size=3),
    st.dictionaries(KEYS, st.lists(JUNK, max_size=2), max_size=2),
)
def test_one_bad_table_in_a_good_recipe_never_breaks_the_reader(name, junk, sweep):
    reads_or_refuses(
        tables(**({"sweep": sweep} if sweep else {}), **({} if name == "sweep" and sweep else {name: junk}))
    )


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab.=[]{}\"'#\n 0123456789-_e", max_size=20) | st.text(max_size=20))
def test_any_override_sets_or_is_refused(text):
    with contextlib.suppress(InputError):
        load_recipe("quickstart", [text])


@settings(max_examples=200, deadline=None)
@given(KEYS, JUNK)
def test_a_toml_value_survives_set(key, value):
    try:
        line = tomli_w.dumps({key: {"x": value}} if isinstance(value, dict) else {key: value}).strip()
    except (TypeError, ValueError):
        return
    if "\n" in line or isinstance(value, dict):
        return
    path, read = parse_override(line)
    assert path == [key]
    assert read == value or value != value or isinstance(value, list)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_a_sweep_has_a_run_for_each_different_combination(strengths, dims):
    raw = tables(sweep={"corruption.strength": strengths, "corruption.dims": dims})
    names = names_of(raw)
    assert len(names) == len(set(names)) == 2 + len(set(strengths)) * len(set(dims))
