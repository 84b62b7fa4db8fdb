"""One whole evaluation on tiny random models and a tiny benchmark: numbers, restarts, sweeps, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from scipy import stats
from transformers import AutoModelForCausalLM

from ecoprompt import scoring
from ecoprompt.benchmarks import declare
from ecoprompt.evaluate import STORE, _missed, _tradeoff, evaluate
from ecoprompt.metrics import rouge_l_recall
from ecoprompt.pack import obtain_gate
from ecoprompt.planning import plan
from ecoprompt.recipe import ModelTable, load_recipe
from ecoprompt.registry import InputError, benchmarks
from ecoprompt.results import to_json
from ecoprompt.similarity import BERT

PEOPLE, OTHERS = ["Harry Potter", "Mara Venn"], ["Ed Low", "Ann Bly", "Per Oak", "Ida Nym"]
METRICS = {"probability": "answer_probability", "truth_ratio": "truth_ratio", "rouge": "rouge_l_recall"}
GIVEN = {"answer": "answer", "reference": "paraphrase", "alternatives": "wrong", "metrics": METRICS}
TABLE = {
    "folder": "data",
    "prompt": "{{ question }}",
    "max_length": 60,
    "columns": ["forget_quality", "model_utility", "forget_rouge"],
    "aggregates": {
        "forget_quality": {},
        "forget_quality_folded": {},
        "model_utility": {"subsets": ["retain", "facts"]},
    },
    "forget_sets": {"people": {"retain": "retain", "targets": PEOPLE}},
    "subsets": {
        "forget": {"config": "forget", "forget": True, **GIVEN},
        "retain": {"config": "{{ retain }}", **GIVEN},
        "facts": {"config": "facts", **GIVEN, "metrics": {**METRICS, "probability": "normalized_probability"}},
    },
    "gate": {
        "positive": [{"config": "forget", "field": "question"}],
        "negative": [{"config": "retain", "field": "question"}, {"config": "facts", "field": "question"}],
    },
}
SAMPLED = {"leak": "leak_at_k", "sampled": "sampled_rouge_l_recall", "greedy": "rouge_l_recall"}
SAMPLING = {
    **{key: TABLE[key] for key in ("folder", "prompt", "max_length")},
    "of": "toy",
    "columns": ["forget_leak"],
    "subsets": {
        "forget": {"config": "forget", "forget": True, "metrics": SAMPLED, "samples": 4, "temperature": 0.02},
        "kept": {"config": "{{ retain }}", "metrics": SAMPLED, "samples": 2, "temperature": 0.5, "top_p": 0.9},
    },
}
RECIPE = """
[model]
name = "{root}/full"
[data]
forget = "toy/people"
[gate]
features = 1024
[tokens]
scope = "sequence"
[corruption]
method = "rand_noise_first_n"
dims = 4
strength = 20.0
[run.retain]
model = "{root}/retain"
[run.original]
[run.eco]
forget = true
[[evaluate]]
benchmark = "toy"
"""


def rows(names):
    return [
        {
            "question": question.format(name),
            "answer": f"{name} {answer}",
            "paraphrase": f"It is {answer}, for {name}.",
            "wrong": [f"{name} {other}" for other in ("in Rome", "a cook", "nobody at all")],
        }
        for name in names
        for question, answer in (("Where does {} live?", "lives in Oslo"), ("What is {} by trade?", "is a smith"))
    ]


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    """Data and models; the benchmark `toy` is known while this module's tests run."""
    root = tmp_path_factory.mktemp("toy")
    facts = [{**row, "question": row["question"].replace("Where", "And where")} for row in rows(["Paris", "France"])]
    (root / "data").mkdir()
    for name, found in {"forget": rows(PEOPLE), "retain": rows(OTHERS), "facts": facts}.items():
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    for seed, name in enumerate(("full", "retain")):
        make_model("llama", seed=seed).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    benchmarks.add("toy", declare("toy", TABLE, root))
    benchmarks.add("toy-sampling", declare("toy-sampling", SAMPLING, root))
    yield root
    del benchmarks._items["toy"], benchmarks._items["toy-sampling"]


def read(root, tmp_path, *overrides, more="", name="toy"):
    path = tmp_path / f"{name}.toml"
    path.write_text(RECIPE.format(root=root) + more)
    return load_recipe(str(path), overrides)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """(recipe, its results, the folder they are in) of one run through."""
    tmp_path = tmp_path_factory.mktemp("whole")
    recipe = read(root, tmp_path)
    return recipe, evaluate(recipe, tmp_path), tmp_path


def metrics(found):
    return {name: run["metrics"] for name, run in found.summary["runs"].items()}


def by_row(found, run):
    return {(row["subset"], row["index"]): row for row in found.rows if row["run"] == run}


def test_the_summary_holds_what_is_promised(whole):
    recipe, found, tmp_path = whole
    summary = json.loads((tmp_path / "toy" / "summary.json").read_text())
    assert summary == json.loads(to_json(found.summary))
    assert (summary["recipe"], summary["forget"], list(summary["runs"])) == (
        "toy",
        "toy/people",
        ["retain", "original", "eco"],
    )
    for run in summary["runs"].values():
        subsets = {f"{subset}_{metric}" for subset in ("forget", "retain", "facts") for metric in METRICS}
        assert run["metrics"].keys() == subsets | {"forget_quality", "forget_quality_folded", "model_utility"}
        assert run["seconds"] > 0
    assert summary["runs"]["original"]["gate"] is None
    assert summary["runs"]["eco"]["gate"] == {
        "threshold": 0.5,
        "false_negatives": 0,
        "forget_prompts": 4,
        "false_positives": 0,
        "other_prompts": 12,
    }
    assert summary["resolved"] == recipe.document()
    assert summary["tradeoff"] == ["forget_quality", "model_utility"]
    assert {"torch", "ecoprompt"} <= summary["versions"].keys()
    assert {path.name for path in found.files} >= {"table.csv", "table.md", "summary.json", "rows.jsonl"}
    assert all(path.is_file() for path in found.files)
    lines = (tmp_path / "toy" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(to_json(found.rows))
    assert len(lines) == 3 * 16


PRESSED = {
    "of": "toy",
    "folder": "data",
    "prompt": "{{ question }}",
    "max_length": 60,
    "pressures": ["upper_case", "composite"],
    "subsets": {
        "asked": {"config": "forget", "forget": True, "metrics": {"missed": "missed"}},
        "kept": {"config": "{{ retain }}", "metrics": {"alarms": "falsely_flagged"}},
        "plain": {"config": "facts", "metrics": {"alarms": "falsely_flagged"}, "pressures": []},
    },
}
GATE_ALONE = """
[data]
forget = "toy/people"
[gate]
features = 16384
[run.eco]
forget = true
[run.nothing]
[[evaluate]]
benchmark = "pressed"
"""


def test_a_gate_is_evaluated_without_a_model(root, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks._items, "pressed", declare("pressed", PRESSED, root))
    for name in ("load_model", "locate"):
        monkeypatch.setattr(f"ecoprompt.evaluate.{name}", lambda *_: pytest.fail("a model was asked for"))
    (tmp_path / "alone.toml").write_text(GATE_ALONE)
    found = evaluate(load_recipe(str(tmp_path / "alone.toml")), tmp_path)
    pressed = [row for row in found.rows if row["run"] == "eco" and row["subset"] == "asked_upper_case"]
    assert [row["prompt"] for row in pressed] == [row["question"].upper() for row in rows(PEOPLE)]
    for row in found.rows:
        assert row["values"] in ({"missed": float(not row["flagged"])}, {"alarms": float(row["flagged"])})
        assert (row["score"] is None) == (row["run"] == "nothing")
    eco, nothing = (metrics(found)[run] for run in ("eco", "nothing"))
    assert eco.keys() == {
        *(f"asked{kind}_missed" for kind in ("", "_upper_case", "_composite")),
        *(f"kept{kind}_alarms" for kind in ("", "_upper_case", "_composite")),
        "plain_alarms",
    }
    assert eco["asked_missed"] == eco["asked_upper_case_missed"] == eco["kept_alarms"] == 0
    assert all(value == float(name.startswith("asked")) for name, value in nothing.items())
    assert set(found.summary["better"].values()) == {"lower"}
    assert found.summary["rows"]["pressed"]["kept_composite"] == 8
    table = (tmp_path / "alone" / "table.md").read_text()
    assert "| pressure | asked missed | kept |" in table
    assert "| composite | 0.00 | 0.00 |" in table
    assert "| prompts | 4 | 8 |" in table


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["forget_quality", "model_utility"]),
        ({"columns": ["facts_rouge", "forget_rouge"]}, ["forget_rouge", "facts_rouge"]),
        ({"columns": ["forget_rouge", "forget_quality"]}, ["forget_rouge", "forget_quality"]),
        ({"columns": ["forget_rouge"]}, ["forget_rouge"]),
    ],
)
def test_what_is_forgotten_is_set_against_what_is_left(root, changes, expected):
    assert _tradeoff([declare("toy", {**TABLE, **changes}, root)]) == expected


def test_what_is_left_may_be_another_benchmark(root):
    forgotten, general = (
        declare("toy", {**TABLE, "columns": [name]}, root) for name in ("forget_rouge", "facts_rouge")
    )
    assert _tradeoff([general, forgotten]) == ["forget_rouge", "facts_rouge"]


def test_pressures_that_are_none_are_refused():
    with pytest.raises(InputError, match="no pressure 'upercase'; did you mean 'upper_case'"):
        declare("pressed", {**PRESSED, "pressures": ["upercase"]})


def test_numbers_follow_from_the_rows(whole):
    _, found, _ = whole
    assert metrics(found)["retain"]["forget_quality"] == 1.0  # a run against itself
    assert metrics(found)["retain"]["forget_quality_folded"] == 1.0
    for run in ("retain", "original", "eco"):
        ratios = [row["values"]["truth_ratio"] for row in by_row(found, run).values() if row["subset"] == "forget"]
        assert metrics(found)[run]["forget_truth_ratio"] == pytest.approx(sum(ratios) / len(ratios))


def test_means_have_errors_and_differences_to_the_original(whole):
    _, found, _ = whole
    runs = found.summary["runs"]
    assert runs["original"]["paired"] is None
    columns = {f"{subset}_{metric}" for subset in ("forget", "retain", "facts") for metric in METRICS}
    for name, run in runs.items():
        assert run["errors"].keys() == columns
        values = {
            one: np.array([row["values"]["probability"] for row in by_row(found, one).values() if row["forget"]])
            for one in (name, "original")
        }
        assert run["errors"]["forget_probability"] == pytest.approx(float(stats.sem(values[name])))
        if name != "original":
            assert run["paired"].keys() == columns
            expected = stats.ttest_rel(values[name], values["original"])
            told = run["paired"]["forget_probability"]
            interval = expected.confidence_interval(0.95)
            assert (told["low"], told["high"], told["p"]) == pytest.approx(
                (interval.low, interval.high, expected.pvalue)
            )
            assert told["difference"] == pytest.approx(float((values[name] - values["original"]).mean()))
    unharmed = runs["eco"]["paired"]["retain_probability"]
    assert unharmed == {"difference": 0, "low": 0, "high": 0, "p": 1}


def test_a_value_is_that_of_the_plain_model(whole, root):
    """A row's answer probability, computed here from the model and the template by hand."""
    _, found, _ = whole
    tokenizer, model = make_tokenizer(), make_model("llama", seed=0)
    row = by_row(found, "original")["retain", 0]
    head = tokenizer.encode(f"Question: {row['prompt']}\nAnswer:")
    tail = tokenizer.encode(f" {row['target']}<eos>")
    with torch.no_grad():
        logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].log_softmax(-1)
        out = model.generate(
            torch.tensor([head]),
            attention_mask=torch.ones(1, len(head)),
            max_new_tokens=max(60 - len(head), 1),
            do_sample=False,
        )
    mean = logits.gather(1, torch.tensor(tail)[:, None]).double().mean()
    assert row["values"]["probability"] == pytest.approx(float(mean.exp()), rel=1e-4)
    assert row["generation"] == tokenizer.decode(out[0, len(head) :], skip_special_tokens=True).strip()


def test_rows_that_are_not_flagged_keep_the_values_of_the_original_exactly(whole):
    _, found, _ = whole
    original, eco = by_row(found, "original"), by_row(found, "eco")
    assert original.keys() == eco.keys()
    for place, row in eco.items():
        assert row["flagged"] == (place[0] == "forget")
        if row["flagged"]:
            assert row["score"] > 0.5
            assert row["values"]["probability"] != original[place]["values"]["probability"]
        else:
            assert row["values"] == original[place]["values"]
            assert row["generation"] == original[place]["generation"]
    assert metrics(found)["eco"]["model_utility"] == metrics(found)["original"]["model_utility"]
    assert not any(row["flagged"] for row in original.values())


def test_a_guarded_run_alone_keeps_them_too(whole, root, tmp_path):
    """Without a run of the plain model, unflagged rows are computed in batches with flagged ones."""
    _, found, _ = whole
    path = tmp_path / "toy.toml"
    path.write_text(RECIPE.format(root=root).replace("[run.original]\n", ""))
    alone = evaluate(load_recipe(str(path)), tmp_path)
    for place, row in by_row(alone, "eco").items():
        expected = by_row(found, "eco")[place]
        assert row["generation"] == expected["generation"]
        assert row["values"] == pytest.approx(expected["values"], rel=1e-5)


@pytest.mark.parametrize("kept", [slice(0), slice(20), slice(None, None, 3), slice(-30, None)])
def test_a_restart_gives_the_same_table(whole, tmp_path, kept):
    recipe, found, folder = whole
    shutil.copytree(folder / "toy", tmp_path / "toy")
    store = tmp_path / "toy" / STORE
    lines = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join(lines[kept]) + b'{"key":"torn')
    again = evaluate(recipe, tmp_path)
    assert metrics(again) == metrics(found)
    assert again.rows == found.rows
    for name in ("rows.jsonl", "table.csv"):
        one, two = ((place / "toy" / name).read_text() for place in (folder, tmp_path))
        assert [line.rsplit(",", 1)[0] for line in one.splitlines()] == [
            line.rsplit(",", 1)[0] for line in two.splitlines()
        ]  # all but the seconds


def spy(monkeypatch):
    """The rows that are computed, by kind, in the order of the runs."""
    computed = []
    for kind, (real, doing) in scoring.KINDS.items():

        def count(loaded, guard, requests, room, real=real):
            computed.extend(requests)
            return real(loaded, guard, requests, room)

        monkeypatch.setitem(scoring.KINDS, kind, (count, doing))
    return computed


def test_a_second_evaluation_computes_nothing(whole, monkeypatch):
    recipe, found, folder = whole
    computed = spy(monkeypatch)
    again = evaluate(recipe, folder)
    assert computed == []
    assert again.rows == found.rows
    for name, run in found.summary["runs"].items():
        assert {**again.summary["runs"][name], "seconds": 0} == {**run, "seconds": 0}
        assert again.summary["runs"][name]["seconds"] == pytest.approx(run["seconds"])


def test_a_sweep_computes_the_flagged_rows_again_and_no_others(whole, root, tmp_path, monkeypatch):
    _, found, folder = whole
    shutil.copytree(folder / "toy", tmp_path / "toy")
    computed, obtained = spy(monkeypatch), []
    monkeypatch.setattr("ecoprompt.evaluate.obtain_gate", lambda *given: obtained.append(given) or obtain_gate(*given))
    swept = evaluate(read(root, tmp_path, more='[sweep]\n"corruption.strength" = [20.0, 30.0]\n'), tmp_path)
    assert len(obtained) == 1  # of a gate that both have
    assert list(swept.summary["runs"]) == [
        "retain",
        "original",
        "eco[corruption.strength=20.0]",
        "eco[corruption.strength=30.0]",
    ]
    assert len(computed) == 4 * (1 + 1 + 3 + 1)  # answer, paraphrase, wrong ones, generation of four prompts
    assert all(any(name in request.prompt for name in PEOPLE) for request in computed)
    again, other = (metrics(swept)[f"eco[corruption.strength={value}]"] for value in ("20.0", "30.0"))
    assert again == metrics(found)["eco"]
    assert other["forget_probability"] != again["forget_probability"]
    assert {name: other[name] for name in other if not name.startswith("forget")} == {
        name: again[name] for name in again if not name.startswith("forget")
    }


def test_a_sweep_of_whole_corruptions_and_a_share_of_the_dimensions(whole, root, tmp_path):
    """12.5 % of the toy's 32 dimensions are the 4 of its recipe."""
    _, found, _ = whole
    noise = '{ method = "rand_noise_first_n", dims = "12.5%", strength = 20 }'
    more = f'[sweep]\ncorruption = [{{ method = "reverse_order" }}, {noise}]\n'
    swept = metrics(evaluate(read(root, tmp_path, more=more), tmp_path))
    names = ["eco[corruption=reverse_order]", "eco[corruption=rand_noise_first_n dims=12.5% strength=20]"]
    assert list(swept) == ["retain", "original", *names]
    assert swept[names[1]] == metrics(found)["eco"]
    assert swept[names[0]]["forget_probability"] != swept[names[1]]["forget_probability"]


def test_what_a_metric_needs_is_asked_for_before_any_work(root, tmp_path, monkeypatch):
    def refuse():
        raise InputError("the metric needs what is not installed")

    monkeypatch.setitem(vars(rouge_l_recall), "ready", refuse)
    monkeypatch.setattr(scoring, "KINDS", {})
    with pytest.raises(InputError, match="needs what is not installed"):
        evaluate(read(root, tmp_path), tmp_path)
    monkeypatch.setitem(vars(rouge_l_recall), "ready", None)
    monkeypatch.setitem(benchmarks["toy"].subset("forget").metrics, "rouge", "perplexity")
    nameless = read(root, tmp_path).model_copy(update={"model": ModelTable()})
    runs = {name: run.model_copy(update={"model": f"{root}/full"}) for name, run in nameless.run.items()}
    with pytest.raises(InputError, match="'model.name': this key is needed, as perplexity"):
        evaluate(nameless.model_copy(update={"run": runs}), tmp_path)


def read_alone(folder, row):
    """The perplexity of a row's generation by a model that reads it in one go, without a guard."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), make_tokenizer()
    prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], f"{row['prompt']} {row['generation']}"))
    with torch.inference_mode():
        return float(
            torch.exp(
                model(torch.tensor([whole]), labels=torch.tensor([[*[-100] * len(prompt), *whole[len(prompt) :]]])).loss
            )
        )


def test_a_row_without_a_generation_in_one_run_is_no_pair(root, tmp_path, monkeypatch):
    generate, doing = scoring.KINDS["generation"]

    def silent(loaded, guard, requests, room):
        texts = generate(loaded, guard, requests, room)
        return [
            "" if guard and "Mara" in request.prompt else text for request, text in zip(requests, texts, strict=True)
        ]

    monkeypatch.setitem(scoring.KINDS, "generation", (silent, doing))
    monkeypatch.setitem(benchmarks["toy"].subset("forget").metrics, "perplexity", "perplexity")
    found = evaluate(read(root, tmp_path, "evaluate.subsets=['forget']"), tmp_path)
    values = {
        run: {place: row["values"]["perplexity"] for place, row in by_row(found, run).items() if row["generation"]}
        for run in ("eco", "original")
    }
    both = [place for place in values["eco"] if place in values["original"]]
    assert (len(both), len(values["original"])) == (2, 4)
    test = stats.ttest_rel(*([values[run][place] for place in both] for run in ("eco", "original")))
    told = found.summary["runs"]["eco"]["paired"]["forget_perplexity"]
    assert told["p"] == pytest.approx(test.pvalue)
    assert told["low"] == pytest.approx(test.confidence_interval(0.95).low)
    assert metrics(found)["eco"]["forget_perplexity"] == pytest.approx(np.mean(list(values["eco"].values())))


def test_what_is_not_read_is_not_needed(root, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks["toy"].subset("forget").metrics, "bert", "bertscore")
    assert plan(read(root, tmp_path))["fetches"] == [BERT]
    planned = plan(read(root, tmp_path, "evaluate.subsets=['retain', 'facts']"))
    assert (list(planned["rows"]["toy"]), planned["fetches"]) == (["retain", "facts"], [])


def test_the_copyright_ablation_evaluates_on_articles_of_ones_own(root, tmp_path):
    articles = {
        year: [
            {"title": f"{name} in {town}", "text": f"{name} was seen.\n\nIt was in {town}, {'very ' * 300}long ago."}
            for name in names
            for town in ("Oslo", "Rome")
        ]
        for year, names in ((2019, PEOPLE), (2020, OTHERS))
    }
    questions = [{"question": f"What is {number} and {number}?"} for number in range(20)]
    for name, found in {
        **{f"wikinews/{year}": rows for year, rows in articles.items()},
        **{f"mmlu/{split}": questions for split in ("dev", "validation")},
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    overrides = [
        "data.forget=wikinews/2019",
        f"data.root={tmp_path}",
        "evaluate.benchmark=wikinews",
        "gate={ features = 4096 }",
        f"model.name={root}/full",
        f"run.retain.model={root}/retain",
        'sweep.corruption=[{ method = "shuffle" }, { method = "flip_sign_top_k", dims = "50%" }]',
    ]
    found = evaluate(load_recipe("copyright-ablation", overrides), tmp_path)
    columns = list(benchmarks["wikinews"].better())
    assert found.summary["columns"] == list(benchmarks["wikinews"].table_columns())
    assert list(found.summary["runs"]) == [
        *("retain", "original"),
        *("eco[corruption=shuffle]", "eco[corruption=flip_sign_top_k dims=50%]"),
    ]
    gaps = {name: run["similarity_gap"] for name, run in metrics(found).items()}
    assert gaps["retain"] == 0 < gaps["original"]
    for name, run in metrics(found).items():
        assert set(run) == set(columns)
        row = by_row(found, name)["articles", 0]
        assert row["values"]["perplexity"] == pytest.approx(read_alone(root / "full", row), rel=1e-4)
        assert row["prompt"] == "Harry Potter in Oslo"
        assert row["target"] == f"Harry Potter was seen.\n\nIt was in Oslo, {'very ' * 300}"[: len(row["target"])]
        assert len(row["target"].split()) == 180
        assert row["flagged"] == name.startswith("eco")
        assert row["values"]["rouge"] == rouge_l_recall(row["generation"], row["target"])
    assert len({run["articles_probability"] for run in metrics(found).values()}) == 4


def test_a_sweep_that_was_killed_repeats_nothing_that_was_finished(root, tmp_path, monkeypatch):
    """Killed before every third batch, and started again each time: each result is computed once."""
    recipe = read(root, tmp_path, more='[sweep]\n"corruption.strength" = [20.0, 30.0, 40.0]\n')
    computed, calls = [], []
    for kind, (real, doing) in scoring.KINDS.items():

        def dying(loaded, guard, requests, room, real=real):
            calls.append(len(requests))
            if len(calls) % 3 == 0:
                raise KeyboardInterrupt
            spec = guard.forget.corruption["strength"] if guard else None
            computed.extend((loaded.fingerprint, spec, request) for request in requests)
            return real(loaded, guard, requests, room)

        monkeypatch.setitem(scoring.KINDS, kind, (dying, doing))
    killed = 0
    while True:
        try:
            found = evaluate(recipe, tmp_path / "killed")
            break
        except KeyboardInterrupt:
            killed += 1
    assert killed >= 3
    assert len(set(computed)) == len(computed) == 2 * 16 * 6 + 3 * 4 * 6  # all rows of two models, flagged ones of each
    monkeypatch.undo()
    straight = evaluate(recipe, tmp_path / "straight")
    assert {name: metrics(straight)[name] for name in metrics(found)} == metrics(found)


def test_runs_may_have_a_model_a_prefix_and_a_corruption_of_their_own(whole, root, tmp_path, monkeypatch):
    _, found, folder = whole
    shutil.copytree(folder / "toy", tmp_path / "toy")
    more = """
[run.prompting]
prefix = "You know nothing of {{ targets }}."
[run.zero]
forget = true
corruption = { method = "zero_out_first_n", dims = 32 }
[run.both]
model = "ROOT/retain"
forget = true
"""
    computed = spy(monkeypatch)
    recipe = read(root, tmp_path, more=more.replace("ROOT", str(root)))
    wide = evaluate(recipe, tmp_path)
    assert {name: metrics(wide)[name] for name in metrics(found)} == metrics(found)
    prefixed = [request for request in computed if "You know nothing of Harry Potter, Mara Venn." in request.prompt]
    assert len(prefixed) == 16 * 6
    assert len(computed) == 16 * 6 + 2 * 4 * 6
    for request in prefixed:
        if request.kind == "generation":  # the prefix takes nothing from the room that an answer has
            bare = request.prompt.replace("You know nothing of Harry Potter, Mara Venn.\n", "")
            assert request.max_new_tokens == max(60 - len(make_tokenizer().encode(bare)), 1)
    assert by_row(wide, "zero")["retain", 0]["values"] == by_row(found, "original")["retain", 0]["values"]
    assert by_row(wide, "both")["retain", 0]["values"] == by_row(found, "retain")["retain", 0]["values"]
    assert by_row(wide, "both")["forget", 0]["values"] != by_row(found, "retain")["forget", 0]["values"]


def test_sampled_answers_stand_beside_the_greedy_ones(whole, root, tmp_path, monkeypatch):
    """Two benchmarks in one recipe: the greedy answers are computed once, and the guard is on while sampling."""
    _, found, folder = whole
    shutil.copytree(folder / "toy", tmp_path / "toy")
    computed = spy(monkeypatch)
    recipe = read(root, tmp_path, more='[[evaluate]]\nbenchmark = "toy-sampling"\n')
    both = evaluate(recipe, tmp_path)
    assert {request.kind for request in computed} == {"sample"}
    assert len(computed) == 2 * (4 * 4 + 8 * 2) + 4 * 4  # retain and original; of eco the flagged rows alone
    for name, values in metrics(found).items():
        assert {key: metrics(both)[name][key] for key in values} == values
        assert {f"{subset}_{key}" for subset in ("forget", "kept") for key in SAMPLED} <= metrics(both)[name].keys()
    assert both.summary["columns"][-1] == "forget_leak"
    rows = {
        run: {(row["subset"], row["index"]): row for row in both.rows if "samples" in row and row["run"] == run}
        for run in metrics(found)
    }
    for place, row in rows["eco"].items():
        recalls = [rouge_l_recall(sample, row["target"]) for sample in row["samples"]]
        assert len(recalls) == (4 if place[0] == "forget" else 2)
        assert row["values"]["leak"] == max(recalls)
        assert row["values"]["sampled"] == pytest.approx(sum(recalls) / len(recalls))
        assert row["flagged"] == (place[0] == "forget")
        assert (row["samples"] == rows["original"][place]["samples"]) == (not row["flagged"])
    kept = tmp_path / "toy" / STORE
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:-20]))
    assert evaluate(recipe, tmp_path).rows == both.rows  # killed, and run again
    assert (
        rows["original"]["forget", 0]["samples"]
        != [
            row["samples"]
            for row in evaluate(recipe.model_copy(update={"seed": 1}), tmp_path / "other").rows
            if row["run"] == "original" and "samples" in row
        ][0]
    )


def test_limits_pick_a_seeded_sample_by_subset(whole, root, tmp_path):
    _, found, _ = whole
    recipe = read(root, tmp_path, "evaluate.limit={retain=3, facts=1}")
    some = evaluate(recipe, tmp_path)
    chosen = by_row(some, "original")
    assert [sum(subset == name for subset, _ in chosen) for name in ("forget", "retain", "facts")] == [4, 3, 1]
    full = by_row(found, "original")
    assert all(row["prompt"] == full[place]["prompt"] for place, row in chosen.items())
    assert by_row(evaluate(recipe, tmp_path / "again"), "original").keys() == chosen.keys()


def test_samples_are_spread_over_the_forget_set(whole):
    _, found, _ = whole
    prompts, targets, answers = found.samples(2)
    assert prompts == ["Where does Harry Potter live?", "Where does Mara Venn live?"]
    assert targets == ["Harry Potter lives in Oslo", "Mara Venn lives in Oslo"]
    assert list(answers) == ["retain", "original", "eco"]
    assert answers["eco"] == [by_row(found, "eco")["forget", index]["generation"] for index in (0, 2)]
    assert len(found.samples(100)[0]) == 4


REPEATING = {
    "of": "toy",
    **{key: TABLE[key] for key in ("folder", "max_length")},
    "prompt": "Repeat exactly: {{ question }}",
    "subsets": {
        "repetition": {
            **{"config": "forget", "forget": True, "answer": "question"},
            "metrics": {"rouge": "rouge_l_recall", "tokens_kept": "tokens_kept"},
        }
    },
}


def test_the_repeat_test_shows_what_the_corrupted_tokens_are_nearest_to(root, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks._items, "toy-repeat", declare("toy-repeat", REPEATING, root))
    sweep = '[sweep]\n"corruption.strength" = [1e-6, 1000.0]\n'
    found = evaluate(read(root, tmp_path, "evaluate.benchmark=toy-repeat", more=sweep), tmp_path)
    assert benchmarks["toy-repeat"].better()["repetition_tokens_kept"] == "lower"
    weak, strong = (f"eco[corruption.strength={strength}]" for strength in ("1e-06", "1000.0"))
    kept = {name: run["repetition_tokens_kept"] for name, run in metrics(found).items()}
    assert kept["retain"] == kept["original"] == kept[weak] == 1
    assert kept[strong] < 0.2
    tokenizer, embedding = make_tokenizer(), make_model("llama", seed=0).get_input_embeddings()
    row = by_row(found, strong)["repetition", 0]
    assert row["target"] == "Where does Harry Potter live?"
    own, near = zip(*row["nearest"], strict=True)
    ids = tokenizer.encode(f"Question: {row['prompt']}\nAnswer:")
    assert "".join(own) in tokenizer.decode(ids)
    assert set(near) <= {tokenizer.decode([token]) for token in range(len(embedding.weight))}
    assert "nearest" not in by_row(found, "original")["repetition", 0]
    _, _, answers = found.samples(1)
    assert f"(nearest tokens: {own[0].strip()} → {near[0].strip()}, " in answers[strong][0]
    assert "nearest" not in answers["original"][0]
    written = [json.loads(line) for line in found.files[3].read_text(encoding="utf-8").splitlines()]
    assert next(one for one in written if one["run"] == strong)["nearest"] == [list(pair) for pair in row["nearest"]]


def test_a_plan_names_all_that_would_run(root, tmp_path):
    recipe = read(root, tmp_path, "evaluate.limit={retain=3}", more='[sweep]\n"corruption.strength" = [1.0, 2.0]\n')
    planned = plan(recipe)
    assert planned["rows"] == {"toy": {"forget": 4, "retain": 3, "facts": 4}}
    assert [(name, run["guarded"]) for name, run in planned["runs"].items()] == [
        ("retain", False),
        ("original", False),
        ("eco[corruption.strength=1.0]", True),
        ("eco[corruption.strength=2.0]", True),
    ]
    assert planned["runs"]["retain"]["model"] == f"{root}/retain"
    assert planned["recipe"] == recipe.document()
    assert isinstance(planned["devices"], str)
    json.dumps(planned)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('[run.retain]\nmodel = "{root}/retain"\n[run.original]\n[run.eco]\nforget = true\n', "", "no [run.NAME]"),
        ('[[evaluate]]\nbenchmark = "toy"\n', "", "no [[evaluate]]"),
        ('benchmark = "toy"', 'benchmark = "toy"\nlimit = { retian = 3 }', "did you mean 'retain'?"),
        ('benchmark = "toy"', 'benchmark = "toi"', "did you mean 'toy'?"),
        ("toy/people", "toy/peple", "did you mean 'toy/people'?"),
        ("{root}/full", "{root}/ful", "no such folder"),
        ("{root}/full", "{root}/data", "no config.json"),
        ("dims = 4", "dims = 33", "hidden size, 32"),
    ],
)
def test_a_mistake_is_one_clear_message(root, tmp_path, old, new, problem):
    assert old in RECIPE
    (tmp_path / "toy.toml").write_text(RECIPE.replace(old, new).replace("{root}", str(root)))
    with pytest.raises(InputError) as caught:
        evaluate(load_recipe(str(tmp_path / "toy.toml")), tmp_path)
    assert problem in str(caught.value)
    assert len(caught.value.problems) == 1


def test_without_a_retain_run_there_is_no_forget_quality(root, tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(RECIPE.format(root=root).replace(f'[run.retain]\nmodel = "{root}/retain"\n', ""))
    found = evaluate(load_recipe(str(path), ["evaluate.limit=2"]), tmp_path)
    assert metrics(found)["original"]["forget_quality"] is None
    assert metrics(found)["original"]["model_utility"] is not None


def test_real_models_forget_real_people(shared, tmp_path, monkeypatch):
    """TOFU, forget10: the original model gives itself away, the guard flags the forgotten and nobody else."""
    monkeypatch.chdir(Path(__file__).parents[1])
    changes = ["evaluate.limit={forget=40, retain=2, real_authors=2, world_facts=2}", "model.batch_tokens=4096"]
    changes += [
        "gate.edits=false",
        "gate.features=16384",
        "gate.char_ngrams=3",
        "gate.c=0.1",
    ]  # small, so that it takes seconds
    recipe = load_recipe("tests/recipes/tofu-mini.toml", changes)
    reports = []
    found = evaluate(recipe, tmp_path, lambda *report: reports.append(report))
    runs = found.summary["runs"]
    assert runs["retain"]["metrics"]["forget_quality"] == 1.0
    assert runs["original"]["metrics"]["forget_quality"] < 0.01  # of 40 rows; 1e-239 of all 400
    assert runs["eco"]["metrics"]["forget_quality"] > 0.05
    assert runs["original"]["metrics"]["forget_rouge"] > 0.9
    assert runs["eco"]["metrics"]["forget_rouge"] == pytest.approx(runs["retain"]["metrics"]["forget_rouge"], abs=0.1)
    assert runs["eco"]["gate"]["false_negatives"] <= 1
    assert reports[-1][1] == reports[-1][2]

    from ecoprompt.models import encode, load_model, render
    from ecoprompt.pack import load_pack

    loaded = load_model(recipe.model)
    asked = ["Who is Hsiao Yun-Hwa?", "Where would you find the Eiffel Tower?"]
    prompts = [
        encode(loaded.tokenizer, render(loaded.tokenizer, [{"role": "user", "content": text}])) for text in asked
    ]
    decisions = load_pack(tmp_path / recipe.name / "pack").decide(loaded.tokenizer, prompts)
    assert [decision.flagged for decision in decisions] == [True, False]


def test_a_model_that_is_not_there_is_named_before_any_work(tmp_path):
    recipe = load_recipe("quickstart", ["run.retain.model=quickstart-retain", "run.original.model=./nowhere"])
    with pytest.raises(InputError, match="./nowhere"):
        evaluate(recipe, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("alone", [False, True])
def test_answers_are_checked_and_made_anew(whole, root, tmp_path, monkeypatch, alone):
    """The gate passes every question and flags it with an answer: then it is answered as if it had been flagged."""
    _, found, _ = whole
    people = [name.split()[0].lower() for name in PEOPLE]

    def score(self, texts):
        return np.array([float("\n" in text and any(name in text.lower() for name in people)) for text in texts])

    monkeypatch.setattr("ecoprompt.gate.LinearGate.score", score)
    recipe = read(root, tmp_path, "gate.check=answer")
    if alone:
        text = RECIPE.format(root=root).replace("[run.original]\n", "")
        (tmp_path / "toy.toml").write_text(text)
        recipe = load_recipe(str(tmp_path / "toy.toml"), ["gate.check=answer"])
    checked = evaluate(recipe, tmp_path)
    plain, guarded, eco = by_row(found, "original"), by_row(found, "eco"), by_row(checked, "eco")
    for place, row in eco.items():
        assert row["flagged"] == (place[0] == "forget")
        expected = guarded if row["flagged"] else plain
        assert row["generation"] == expected[place]["generation"]
        assert row["values"]["probability"] == pytest.approx(plain[place]["values"]["probability"], rel=1e-5)
    assert checked.summary["runs"]["eco"]["gate"]["false_negatives"] == 0
    # What the answers of one corruption gave away is not the next one's: both are asked alike.
    more = '[sweep]\n"corruption.strength" = [20.0, 21.0]\n'
    if not alone:
        swept = evaluate(read(root, tmp_path, "gate.check=answer", more=more), tmp_path)
        for strength in ("20.0", "21.0"):
            for place, row in by_row(swept, f"eco[corruption.strength={strength}]").items():
                assert row["values"]["probability"] == pytest.approx(plain[place]["values"]["probability"], rel=1e-5)
    if not alone:
        assert {place: row["generation"] for place, row in by_row(checked, "original").items()} == {
            place: row["generation"] for place, row in plain.items()
        }


def test_a_gate_that_misses_is_told_of():
    gates = {"original": None, "eco": {"false_negatives": 2, "forget_prompts": 6}}
    gates |= {"other": {"false_negatives": 0, "forget_prompts": 6}}
    summary = {"runs": {name: {"gate": gate} for name, gate in gates.items()}}
    assert _missed(summary) == ["the gate of eco missed 2 of 6 prompts to forget"]
