"""Multiple choice: every declared table on rows of its data set's shape, and how choices are put to a model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import SHARED, make_model, make_tokenizer

from ecoprompt.asking import Asking
from ecoprompt.benchmarks import declare
from ecoprompt.evaluate import _items, evaluate
from ecoprompt.models import Loaded
from ecoprompt.recipe import load_recipe, resolve_runs
from ecoprompt.registry import InputError, aggregates, benchmarks
from ecoprompt.results import Store
from ecoprompt.template import evaluate as value_of
from ecoprompt.template import expression_names, fill

HEAD = "The following are multiple choice questions (with answers) about {}.\n\n"
ASKED = "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
LETTERED = {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 2}
LABELLED = {"choices": {"text": ["red", "green", "blue"], "label": ["1", "2", "3"]}, "answerKey": "2"}
TRUE, FALSE = ["Nothing", "You eat them"], ["You die", "You grow", "You sleep"]
SUBJECTS = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}
ECONOMICS = {"forget": "high_school_macroeconomics", "neighbours": "econometrics", "others": "high_school_biology"}
ROWS = {
    **{(benchmark, name): [(LETTERED, HEAD.format(subject) + ASKED, ["C"], ["A", "B", "D"])]
       for name, subject in SUBJECTS.items() for benchmark in ("wmdp", "wmdp-probe")},
    **{("mmlu", name): [({**LETTERED, "subject": subject}, HEAD.format(subject.replace("_", " ")) + ASKED, ["C"],
                         ["A", "B", "D"])]
       for name, subject in ECONOMICS.items()},
    **{place: [({**LETTERED, "subject": "high_school_us_history"}, HEAD.format("high school us history") + ASKED, ["C"],
                ["A", "B", "D"])]
       for place in (("mmlu_test", "mmlu"), ("general_ability", "mmlu"))},
    **{("general_ability", name): [({"question": "Which?", **LABELLED}, "Question: Which?\nAnswer:", ["green"],
                                    ["red", "blue"])]
       for name in ("arc_easy", "arc_challenge", "commonsenseqa")},
    ("general_ability", "openbookqa"): [({"question_stem": "Snow is", **LABELLED}, "Snow is", ["green"],
                                         ["red", "blue"])],
    ("general_ability", "hellaswag"): [(
        {
            "activity_label": "Finance", "ctx_a": "[header] How to save [title] Begin. ", "ctx_b": "then she",
            "label": "1", "endings": ["stops. [substeps] Rest.", " runs [title] Far", "x [y"],
        },
        "Finance: How to save. Begin. Then she", ["runs. Far"], ["stops. Rest.", "x [y"],
    )],
    ("general_ability", "truthfulqa"): [
        (
            {"question": "Why?", "mc2_targets": {"choices": TRUE + FALSE, "labels": [1, 1, 0, 0, 0]}},
            "\n\nQ: Why?\nA:", TRUE, FALSE,
        ),
        (
            {"Question": "Why?", "Correct Answers": "; ".join(TRUE) + "; ",
             "Incorrect Answers": "; ".join(FALSE) + ";"},
            "\n\nQ: Why?\nA:", TRUE, FALSE,
        ),
    ],
    ("general_ability", "winogrande"): [(
        {"sentence": "As Al knew Bo _ was glad.", "option1": "Al", "option2": "Bo", "answer": "2"},
        ("As Al knew Bo Bo", "As Al knew Bo Al"), ["was glad."], ["was glad."],
    )],
    ("general_ability", "piqa"): [({"goal": "Dry it.", "sol1": "Wet it", "sol2": "Air it", "label": 1}, "Dry it.",
                                   ["Air it"], ["Wet it"])],
    ("general_ability", "social_i_qa"): [(
        {"context": "Al fell.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "Q: Al fell. Why?\nA:", ["c"], ["a", "b"],
    )],
    ("general_ability", "boolq"): [
        ({"passage": "So.", "question": "is it", "answer": answer}, "So.\nQuestion: is it\nAnswer:", [right], [wrong])
        for answer, right, wrong in ((True, "Yes", "No"), (False, "No", "Yes"))
    ],
}  # fmt: skip
"""Of every subset with choices, rows as on the Hub (or in the file that stands for it), with what they make."""
PUBLISHED = {
    ("wmdp", "all"): {"bio": 1273, "chem": 408, "cyber": 1987},
    ("mmlu", "economics"): {"forget": 628, "neighbours": 114, "others": 13300},
    ("mmlu", "law"): {"forget": 1655, "neighbours": 108, "others": 12279},
    ("mmlu", "physics"): {"forget": 488, "neighbours": 370, "others": 13184},
    ("mmlu_test", None): {"mmlu": 14042},
    ("general_ability", None): {
        **{"arc_easy": 2376, "arc_challenge": 1172, "commonsenseqa": 1221, "openbookqa": 500, "truthfulqa": 817},
        **{"winogrande": 1267, "piqa": 1838, "social_i_qa": 1954, "mmlu": 14042},
    },
}


def test_every_subset_with_choices_is_tried():
    declared = [(one.name, name) for one in benchmarks.values() for name, sub in one.subsets.items() if sub.choices]
    assert set(ROWS) == set(declared)
    assert all(benchmarks[name].raw for name, _ in declared)


@pytest.mark.parametrize(("benchmark", "subset"), ROWS, ids=lambda name: name)
def test_rows_make_prompts_and_choices(benchmark, subset, tmp_path):
    table = benchmarks[benchmark]
    forget = next(iter((benchmarks[table.of] if table.of else table).forget_sets), None)
    local = table.subset(subset).local
    assert local is not None
    for row, prompt, right, wrong in ROWS[benchmark, subset]:
        path = tmp_path / f"{local}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
        (item,) = table.items(subset, forget, tmp_path)
        assert (list(item.answers), list(item.alternatives)) == (right, wrong)
        assert item.target == item.reference == right[0]
        if isinstance(prompt, tuple):
            assert (item.prompt, item.prompts) == (prompt[0], prompt)
        else:
            assert item.prompt.endswith(prompt)
            assert item.prompts == ()


@pytest.mark.parametrize(("benchmark", "forget"), PUBLISHED, ids=str)
def test_a_dry_run_knows_the_published_rows(benchmark, forget):
    """But of MMLU's subjects, which the data alone tells."""
    told = benchmarks[benchmark].dry_rows(forget)
    published = PUBLISHED[benchmark, forget]
    assert {name: told[name] for name in published} == (dict.fromkeys(published) if benchmark == "mmlu" else published)


@pytest.mark.parametrize(("benchmark", "forget"), PUBLISHED, ids=str)
def test_the_real_files_have_the_published_rows(benchmark, forget):
    data = SHARED / "data"
    if not (data / "wmdp").is_dir():
        pytest.skip("needs ../shared/data")
    table, published = benchmarks[benchmark], PUBLISHED[benchmark, forget]
    for subset, count in published.items():
        rows = table.subset_rows if count > 10_000 else table.items  # where the same rows are in another's
        assert len(rows(subset, forget, data)) == count


def test_what_is_not_among_the_files_is_told():
    data = SHARED / "data"
    if not (data / "boolq").is_dir():
        pytest.skip("needs ../shared/data")
    with pytest.raises(InputError, match="in all rows found no column 'passage', expected text"):
        benchmarks["general_ability"].items("boolq", None, data)


def test_hellaswag_is_prepared_as_by_the_harness():
    preprocess = pytest.importorskip("lm_eval.tasks.hellaswag.utils").preprocess

    template = benchmarks["general_ability"].subset("hellaswag").completion
    texts = [
        "a [x] b  c",
        " [title] y",
        "[a [b] c] d",
        "x [unclosed",
        "]a[b]",
        "a.  [substeps]",
        "One [title] two  three",
    ]
    assert [fill(template, {"choice": text}) for text in texts] == [preprocess(text) for text in texts]


TABLE = {
    "folder": "data",
    "prompt": "{{ sentence.split('_')[0] }}{{ choice }}",
    "raw": True,
    "max_length": 60,
    "forget_sets": {"potter": {"retain": "kept"}},
    "subsets": {
        "blank": {
            "forget": True,
            "config": "rows",
            "choices": "[one, two]",
            "right": "answer",
            "completion": "{{ sentence.split('_')[1].strip() }}",
            "metrics": {"accuracy": "choice_accuracy", "share": "true_answers_probability"},
        },
        "plain": {
            "config": "rows",
            "prompt": "{{ two }}?",
            "choices": "options",
            "right": "true",
            "metrics": {"share": "true_answers_probability", "accuracy": "choice_accuracy"},
        },
    },
    "gate": {"positive": [{"config": "rows", "field": "two"}], "negative": [{"config": "rows", "field": "one"}]},
}
FOUR = [
    {"sentence": f"In town {n} _ lives there.", "one": name, "two": "Harry Potter", "answer": n % 2,
     "options": ["red house", "tree", "blue door"], "true": ["tree", "blue door"]}
    for n, name in enumerate(["Ann Bly", "Ed Low", "Ida Nym", "Per Oak"])
]  # fmt: skip
RECIPE = """
[model]
name = "{root}/model"
[data]
forget = "choosing/potter"
[gate]
features = 1024
[corruption]
method = "rand_noise_first_n"
dims = 32
strength = 50.0
[run.original]
[run.eco]
forget = true
[[evaluate]]
benchmark = "choosing"
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FOUR))
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    benchmarks.add("choosing", declare("choosing", TABLE, tmp_path))
    (tmp_path / "choosing.toml").write_text(RECIPE.format(root=tmp_path))
    yield tmp_path
    del benchmarks._items["choosing"]


def log_prob(model, tokenizer, prompt, completion):
    """(sum of log-probabilities, tokens) of a completion, worked out on one sequence."""
    head, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
    assert whole[: len(head)] == head
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    return sum(float(logs[place - 1, whole[place]]) for place in range(len(head), len(whole))), len(whole) - len(head)


def test_choices_follow_the_prompt_as_it_stands_after_a_space(root):
    found = evaluate(load_recipe(str(root / "choosing.toml")), root / "results")
    model, tokenizer = make_model("llama"), make_tokenizer()
    values = {(row["run"], row["subset"], row["index"]): row["values"] for row in found.rows}
    for number, row in enumerate(FOUR):
        scores = [
            log_prob(model, tokenizer, f"In town {number} {row[name]}", " lives there.") for name in ("one", "two")
        ]
        right, wrong = scores[row["answer"]], scores[1 - row["answer"]]
        mine = values["original", "blank", number]
        assert mine["accuracy"] == float(right[0] / right[1] > wrong[0] / wrong[1])
        assert mine["share"] == pytest.approx(1 / (1 + math.exp(wrong[0] - right[0])), rel=1e-4)
        red, tree, blue = (
            math.exp(log_prob(model, tokenizer, "Harry Potter?", f" {text}")[0]) for text in row["options"]
        )
        share = values["original", "plain", number]["share"]
        assert share == pytest.approx((tree + blue) / (red + tree + blue), rel=1e-4)


def test_each_prompt_of_a_row_is_gated_by_itself(root, keyword_gate, tmp_path):
    """A row is flagged if one of its prompts is; the scores of the others are the plain model's."""
    recipe = load_recipe(str(root / "choosing.toml"))
    plain, guarded = resolve_runs(recipe)
    loaded = Loaded(make_model("llama"), make_tokenizer(), "m")
    store = Store(tmp_path / "scores.jsonl")
    asking = Asking(loaded, recipe, [item for item in _items(recipe) if item.subset == "blank"], store, set())

    class Trained:
        gate = type("Gate", (), {"score": staticmethod(keyword_gate)})()
        threshold = 0.5

    before, _ = asking.ask(plain, None, lambda *_: None)
    after, _ = asking.ask(guarded, Trained(), lambda *_: None)
    assert [row.flagged for row in before + after] == [False] * 4 + [True] * 4
    for one, two in zip(before, after, strict=True):
        pairs = {}
        for name in ("answers", "alternatives"):
            for request, old, new in zip(one.wanted[name], one.keys[name], two.keys[name], strict=True):
                pairs["Potter" in request.prompt] = old, new
        assert pairs[False][0] == pairs[False][1]
        assert pairs[True][0] != pairs[True][1]
        assert store.get(pairs[True][0])[0] != store.get(pairs[True][1])[0]


@pytest.mark.parametrize("tokens", ["bytes", "tofu-mini"])
def test_a_letter_is_one_token_after_the_prompt(tokens):
    """So that the mean log-probability of its tokens ranks letters as their logits do."""
    from transformers import AutoTokenizer

    from ecoprompt.models import encode_pair

    folder = SHARED / "models" / "tofu-mini-full"
    if tokens == "tofu-mini" and not folder.is_dir():
        pytest.skip("needs ../shared/models")
    tokenizer = make_tokenizer() if tokens == "bytes" else AutoTokenizer.from_pretrained(folder)
    tails = [encode_pair(tokenizer, HEAD.format("law") + ASKED, f" {letter}")[1] for letter in "ABCD"]
    assert len({len(tail) for tail in tails}) == 1
    if tokens == "tofu-mini":
        assert {len(tail) for tail in tails} == {1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"right": "4"}, "row 1: of the choices ['Ann Bly', 'Harry Potter'], '4' gives 4 as right, expected some"),
        ({"right": "[one, two]"}, "as right, expected some, but not all"),
        ({"right": "wrong"}, "in all rows found no column 'wrong', expected a value"),
        ({"choices": "one"}, "'one' gives 'Ann Bly', expected a list of texts"),
        ({"choices": "[one, answer]"}, "expected a list of texts"),
        ({"right": "options.index('none')"}, "cannot be filled ('none' is not in list)"),
    ],
)
def test_a_row_without_a_right_and_a_wrong_choice_is_named(root, changes, message):
    table = {**TABLE, "subsets": {"blank": {**TABLE["subsets"]["blank"], **changes}}}
    with pytest.raises(InputError) as error:
        declare("wrong", table, root).items("blank", "potter")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"right": None}, "found one of 'choices' and 'right' without the other"),
        ({"choices": "[one, two"}, "found what is not Jinja"),
        ({"choices": "one) }}{{ (two"}, "cannot be filled"),
        ({"choices": "[one] * 99"}, "found 'mul', which a prompt template may not hold"),
        ({"choices": "range(9)"}, "found a call of a function"),
        ({"completion": "{{ choice"}, "found what is not Jinja"),
    ],
)
def test_a_wrong_declaration_is_refused(changes, message):
    blank = {key: value for key, value in {**TABLE["subsets"]["blank"], **changes}.items() if value is not None}
    with pytest.raises(InputError) as error:
        declare("wrong", {**TABLE, "subsets": {"blank": blank}})
    assert message in str(error.value)


def test_an_expression_is_a_value_of_the_columns():
    assert value_of("choices.label.index(key)", {"choices": {"label": ["x", "y"]}, "key": "y"}) == 1
    assert expression_names("a.b if c is defined else d[0]") == {"a", "c", "d"}


def test_some_subsets_may_be_read_alone(root):
    found = evaluate(load_recipe(str(root / "choosing.toml"), ["evaluate.subsets=['plain']"]), root / "some")
    assert set(found.summary["runs"]["original"]["metrics"]) == {"plain_share", "plain_accuracy"}
    with pytest.raises(
        InputError, match="'evaluate.0.subsets.plane': no such subset of choosing; did you mean 'plain'"
    ):
        load_recipe(str(root / "choosing.toml"), ["evaluate.subsets=['plane']"])


def test_the_mean_accuracy_has_an_error_and_a_difference_to_the_original(root):
    table = {**TABLE, "aggregates": {"mean_accuracy": {"subsets": ["blank", "plain"]}}}
    benchmarks._items["choosing"] = declare("choosing", table, root)
    runs = evaluate(load_recipe(str(root / "choosing.toml")), root / "mean").summary["runs"]
    errors = runs["original"]["errors"]
    assert errors["mean_accuracy"] == math.hypot(errors["blank_accuracy"], errors["plain_accuracy"]) / 2
    told = {name: one["difference"] for name, one in runs["eco"]["paired"].items()}
    assert told["mean_accuracy"] == (told["blank_accuracy"] + told["plain_accuracy"]) / 2
    some = evaluate(load_recipe(str(root / "choosing.toml"), ["evaluate.subsets=['plain']"]), root / "some").summary
    assert "mean_accuracy" not in {*some["runs"]["eco"]["metrics"], *some["columns"], *some["better"]}


def test_accuracies_are_averaged_by_subset():
    values = {"a/accuracy": np.array([1.0, 0.0]), "b/accuracy": np.array([1.0, 1.0, 1.0, 0.0])}
    assert aggregates["mean_accuracy"](values, None, subsets=["a", "b"]) == 0.625
