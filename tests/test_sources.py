"""Which rows train and test a gate: filters, samples, local copies, texts in chunks, and no overlap."""

from __future__ import annotations

import json

import pytest

from ecoprompt.benchmarks import declare, parse_forget
from ecoprompt.data import Source, load_rows
from ecoprompt.passages import LENGTH, passages, sentences
from ecoprompt.recipe import load_recipe, parse_recipe
from ecoprompt.registry import InputError, benchmarks
from ecoprompt.sources import GateData, without_overlap

QUESTIONS = [{"q": f"question {n}", "topic": ["ab", "cd", "ef"][n % 3], "name": f"n{n}"} for n in range(30)]
TABLE = {
    "hub": "some/set",
    "prompt": "{{ topic }}: {{ q }}",
    "max_length": 9,
    "forget_sets": {
        "one": {"retain": "rest", "where": {"topic": ["ab"]}, "neighbours": {"topic": ["cd"]}},
        "bare": {"retain": "x"},
    },
}


@pytest.fixture
def root(tmp_path):
    for name in ("some/set/train", "own/copy"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return tmp_path


def texts(root, forget="one", **reading):
    """The prompts that a check with these keys has."""
    gate = {"positive": [{"field": "name"}], "negative": [{"field": "name"}], "checks": {"x": {"label": 0, **reading}}}
    benchmark = declare("small", {**TABLE, "gate": gate})
    found = benchmark.gate_checks(forget, root)["x"][0]
    assert benchmark.dry_gate_rows(forget, root)["x"] == len(found)
    return found


def test_a_prompt_is_a_column_a_template_or_the_benchmarks(root):
    assert texts(root)[:2] == ["ab: question 0", "cd: question 1"]
    assert texts(root, field="q")[1] == "question 1"
    assert texts(root, prompt="<{{ q }}>")[1] == "<question 1>"


@pytest.mark.parametrize(
    ("rows", "topics"),
    [
        ("all", {"ab", "cd", "ef"}),
        ("forget", {"ab"}),
        ("neighbours", {"cd"}),
        ("others", {"ef"}),
        ("retain", {"cd", "ef"}),
    ],
)
def test_rows_follow_the_forget_set(root, rows, topics):
    found = texts(root, rows=rows, field="topic")
    assert set(found) == topics
    assert len(found) == 10 * len(topics)


def test_samples_share_no_row_and_make_up_the_whole(root):
    parts = [texts(root, rows="retain", sample=list(part), field="q") for part in ((0, 7), (7, 13), (13, 99))]
    assert [len(part) for part in parts] == [7, 6, 7]
    assert sorted(sum(parts, [])) == sorted(texts(root, rows="retain", field="q"))
    assert texts(root, first=3, field="q") == ["question 0", "question 1", "question 2"]


def test_a_local_copy_has_its_own_name_and_values(root):
    own = {"hub": "", "local": "own/copy", "values": {"topic": "fixed"}}
    assert texts(root, **own)[:2] == ["fixed: question 0", "fixed: question 1"]
    with pytest.raises(InputError, match="not to be had from the Hub: put own/other.jsonl"):
        texts(root, hub="", local="own/other", field="q")


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        ({"field": "q", "prompt": "{{ q }}"}, "found both 'field' and 'prompt'"),
        ({"sample": [5, 5]}, "expected its start before its end"),
        ({"local": "../../etc/passwd"}, "expected a path below the folder"),
        ({"local": "/etc/passwd"}, "expected a path below the folder"),
        ({"rows": "some"}, "'forget'"),
        ({"prompt": "{% for a in range(9) %}{% endfor %}"}, "call of a function"),
    ],
)
def test_a_wrong_reading_is_refused(root, reading, words):
    with pytest.raises(InputError) as caught:
        texts(root, **reading)
    assert words in str(caught.value)


def test_what_belongs_to_a_forget_set_must_be_said(root):
    with pytest.raises(InputError, match="only a forget set with 'where'"):
        texts(root, forget="bare", rows="forget")


def test_no_prompt_is_both_learned_and_tested():
    data = GateData(
        ["Who is  Ada?", "b"], ["c", "who is ada?"], {"x": (["C ", "d"], 0), "y": (["WHO IS ADA?", "e"], 1)}
    )
    assert without_overlap(data) == GateData(["Who is  Ada?", "b"], ["c"], {"x": (["d"], 0), "y": (["e"], 1)})


def test_a_text_file_is_read_in_passages_of_sentences(tmp_path):
    sentences = [f"This is sentence number {n} of the book, and it is a long one." for n in range(100)]
    path = tmp_path / "book.txt"
    path.write_text("CHAPTER I.\n\n" + "\n".join(sentences) + ' "Is it?" he asked.')
    rows = load_rows(Source(path=str(path)))
    assert rows[0]["first_sentence"] == f"CHAPTER I. {sentences[0]}"
    assert " ".join(row["text"] for row in rows) == " ".join(path.read_text().split())
    for row in rows:
        assert f"{row['first_sentence']} {row['rest']}".strip() == row["text"]
        assert len(row["text"].split()) < LENGTH + len(sentences[0].split())
    assert all(len(row["text"].split()) >= LENGTH for row in rows[:-1])


def test_sentences_keep_titles_and_the_quotation_marks_that_open_them():
    said = [
        "Mr. Jones met Dr. Who on that very day.",
        '"Is it true that he is away?"',
        "('But when will he be back?')",
        "“Why, I really do not know!”",
    ]
    assert sentences(" ".join(said)) == said
    assert sentences("") == []


def test_every_passage_goes_on_after_its_first_sentence():
    long, short = f"{'word ' * 200}ends.", "It is as short as any."
    for text, starts in ((f"{long} {short} {long}", [long]), (f"{short} {long} {long} {short}", [short, long])):
        rows = passages(text)
        assert [row["first_sentence"] for row in rows] == starts
        assert " ".join(row["text"] for row in rows) == text
        assert all(row["rest"] for row in rows)
    assert passages(short) == [{"text": short, "first_sentence": short, "rest": ""}]


def test_general_questions_are_measured_where_the_recipe_asks():
    recipe = load_recipe("gate-tofu")
    assert recipe.data.checks == ["general", "mmlu_test"]
    assert set(benchmarks["general"].gate.checks) >= {"truthfulqa", "commonsenseqa", "arc_challenge", "arc_easy"}
    assert {check.label for check in benchmarks["general"].gate.checks.values()} == {0}
    wrong = {"data": {"forget": "tofu/forget10", "checks": ["genral", "tofu"]}, "evaluate": [{"benchmark": "general"}]}
    with pytest.raises(InputError) as caught:
        parse_recipe(wrong, "r")
    assert [problem.split("; ")[0] for problem in caught.value.problems[-2:]] == [
        "r: 'evaluate.0.benchmark': 'general' has no rows to evaluate, only prompts for gates",
        "r: 'data.checks.0': no prompts for gates called 'genral'",
    ]


def test_a_benchmark_that_only_tests_trains_nothing():
    with pytest.raises(InputError, match="only tests gates"):
        benchmarks["general"].gate_texts(None)


@pytest.mark.parametrize(
    ("name", "positive", "test"),
    [("economics", 79, 628), ("law", 193, 1655), ("physics", 69, 488)],
)
def test_mmlu_subjects_are_divided_as_published(shared, name, positive, test):
    """Dev has 5 rows a subject; the counts of validation and test are those of the published files."""
    benchmark, forget_set = parse_forget(f"mmlu/{name}")
    rows = benchmark.dry_gate_rows(forget_set, shared / "data")
    assert rows["positive"] == 2 * positive
    assert rows["test_questions"] == test
    assert rows["test_questions"] + rows["neighbour_subjects"] + rows["other_subjects"] == 14042


def test_mmlu_is_asked_in_the_papers_form_and_tested_on_other_questions(shared):
    data = benchmarks["mmlu"].gate_texts("economics", shared / "data")
    learned = set(data.positive) | set(data.negative)
    assert not set(data.positive) & set(data.negative)
    assert not any(learned & set(prompts) for prompts, _ in data.checks.values())
    header = "The following are multiple choice questions (with answers) about high school macroeconomics.\n\n"
    assert data.positive[0].startswith(header)
    assert [line[:3] for line in data.positive[0].splitlines()[-5:]] == ["A. ", "B. ", "C. ", "D. ", "Ans"]
    assert data.positive[0].endswith("\nAnswer:")


def test_wmdp_learns_the_generated_questions_and_is_tested_on_the_real_ones(shared):
    benchmark, forget_set = parse_forget("wmdp/all")
    kinds = {"bio": 1273, "chem": 408, "cyber": 1987}
    data = benchmark.gate_texts(forget_set, shared / "data")
    assert len(data.positive) == 300
    assert {name: len(data.checks[name][0]) for name in kinds} == kinds
    assert benchmark.gate_hubs() == ["cais/mmlu", "cais/wmdp"]

    def questions(name):
        rows = [row for kind in kinds for row in load_rows(Source(local=f"{name}/{kind}"), shared / "data")]
        return {row["question"] for row in rows}

    assert not questions("wmdp") & questions("wmdp_synthetic")


def test_news_and_books_are_divided_without_a_shared_row(shared):
    for name in ("wikinews/2019", "book/alice_in_wonderland"):
        benchmark, forget_set = parse_forget(name)
        data = benchmark.gate_texts(forget_set, shared / "data")
        assert data.positive
        learned = set(data.positive) | set(data.negative)
        assert not any(learned & set(prompts) for prompts, _ in data.checks.values())
        assert all(prompts for prompts, _ in data.checks.values())


def test_what_is_local_alone_says_where_to_put_it(tmp_path):
    benchmark, forget_set = parse_forget("book/alice_in_wonderland")
    with pytest.raises(InputError, match=r"put books/alice_in_wonderland\.jsonl .*\[data\] root or ECOPROMPT_DATA"):
        benchmark.gate_texts(forget_set, tmp_path)
