"""The declared benchmarks, the schema of a benchmark, and the rows that they make of data."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from ecoprompt.benchmarks import PACKAGE, Benchmark, declare, parse_forget
from ecoprompt.data import ENVIRONMENT
from ecoprompt.items import Item
from ecoprompt.registry import InputError, aggregates, benchmarks, metrics
from ecoprompt.results import legend_of

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_tofu = pytest.mark.skipif(
    not (DATA / "tofu").is_dir(), reason="the TOFU files (../shared/data/tofu) are not here"
)
QUICKSTART = [PACKAGE / "quickstart" / f"{name}.jsonl" for name in ("forget", "retain", "facts")]
needs_quickstart = pytest.mark.skipif(
    not all(path.is_file() for path in QUICKSTART), reason="the data of the quick start is not made yet"
)

TABLE = {
    "title": "A small world",
    "folder": "world",
    "prompt": "Q: {{ question }}",
    "max_length": 64,
    "columns": ["forget_quality", "forget_ratio", "retain_rouge"],
    "aggregates": {"forget_quality": {"subset": "forget"}, "model_utility": {"subsets": ["retain"]}},
    "forget_sets": {
        "one": {"retain": "rest1", "targets": ["Ada", "Eve"]},
        "two": {"retain": "rest2"},
    },
    "subsets": {
        "forget": {
            "forget": True,
            "config": "{{ forget }}_long",
            "reference": "paraphrase",
            "alternatives": "wrong",
            "metrics": {"ratio": "truth_ratio", "truth_ratio": "truth_ratio"},
        },
        "retain": {
            "config": "{{ retain }}",
            "prompt": "{{ question }}?",
            "alternatives": "wrong",
            "metrics": {
                "probability": "normalized_probability",
                "truth_ratio": "truth_ratio",
                "rouge": "rouge_l_recall",
            },
        },
    },
    "gate": {
        "positive": [{"config": "{{ forget }}_long", "field": "question"}],
        "negative": [{"config": "{{ retain }}", "field": "question"}, {"config": "facts", "field": "text"}],
        "checks": {"asked otherwise": {"config": "{{ forget }}_long", "field": "paraphrase", "label": 1}},
    },
    "rows": {"one_long": 7},
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def put(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def world(tmp_path):
    put(
        tmp_path / "world" / "one_long.jsonl",
        [{"question": f"f{n}", "answer": f"a{n}", "paraphrase": f"p{n}", "wrong": ["x", "y"]} for n in range(4)],
    )
    put(
        tmp_path / "world" / "rest1.jsonl",
        [{"question": f"r{n}", "answer": f"b{n}", "wrong": ["z"]} for n in range(30)],
    )
    put(tmp_path / "world" / "facts.jsonl", [{"text": "t0"}, {"text": "t1"}])
    return declare("small", TABLE, base=tmp_path)


def changed(**changes):
    """TABLE with values at dotted paths (`__` for the dot); None removes."""
    table = copy.deepcopy(TABLE)
    for path, value in changes.items():
        *steps, last = path.split("__")
        here = table
        for step in steps:
            here = here[step]
        if value is None:
            del here[last]
        else:
            here[last] = value
    return table


def refused(where=None, **changes) -> tuple[str, ...]:
    with pytest.raises(InputError) as error:
        declare("small", changed(**changes), where=where)
    return error.value.problems


def test_names_and_directions(world):
    assert world.name == "small"
    assert world.forget_set("one").name == "one"
    assert world.forget_set("one").targets == ("Ada", "Eve")
    assert world.forget_set("two").targets == ()
    assert world.subset("retain").name == "retain"
    assert world.better() == {
        "forget_quality": "higher",
        "model_utility": "higher",
        "forget_ratio": "closer to retain",
        "forget_truth_ratio": "closer to retain",
        "retain_probability": "higher",
        "retain_truth_ratio": "lower",
        "retain_rouge": "higher",
    }
    assert world.table_columns() == ("forget_quality", "forget_ratio", "retain_rouge")
    assert world.aggregates == {"forget_quality": {"subset": "forget"}, "model_utility": {"subsets": ["retain"]}}


def test_the_table_shows_all_columns_by_default():
    benchmark = declare("small", changed(columns=None))
    assert benchmark.table_columns() == tuple(benchmark.better())


def test_defaults_of_aggregates_are_filled_in():
    table = changed(aggregates__forget_quality={})
    assert declare("small", table).aggregates["forget_quality"] == {"subset": "forget"}


def test_a_benchmark_cannot_be_changed(world):
    with pytest.raises(ValueError, match="frozen"):
        world.title = "another"


def test_items_carry_prompt_answers_and_row_number(world):
    items = world.items("forget", "one")
    assert items[1] == Item("small", "forget", 1, "Q: f1", "a1", "p1", ("x", "y"))
    assert [item.index for item in items] == [0, 1, 2, 3]
    assert world.items("forget", world.forget_set("one")) == items


def test_a_subset_has_its_own_prompt_and_its_answer_is_the_reference(world):
    assert world.items("retain", "one")[2] == Item("small", "retain", 2, "r2?", "b2", "b2", ("z",))


def test_of_a_long_answer_its_opening_counts(world, tmp_path):
    answers = ["one  two\n\nthree four", " one ", "one two three "]
    put(
        tmp_path / "world" / "long.jsonl", [{"question": "q", "answer": text, "wrong": ["a b c d"]} for text in answers]
    )
    long = declare("small", changed(subsets__retain__config="long", subsets__retain__answer_words=3), base=tmp_path)
    items = long.items("retain", "one")
    assert [item.target for item in items] == ["one  two\n\nthree", " one", "one two three"]
    assert [item.reference for item in items] == [item.target for item in items]
    assert {item.alternatives for item in items} == {("a b c d",)}
    assert refused(subsets__retain__answer_words=0) == (
        "'small.subsets.retain.answer_words': found 0, expected a number of at least 1",
    )


def test_only_the_answer_is_cut(world, tmp_path):
    cut = declare("small", changed(subsets__forget__answer_words=1), base=tmp_path)
    put(
        tmp_path / "world" / "one_long.jsonl",
        [{"question": "q", "answer": "a b", "paraphrase": "c d", "wrong": ["e f"]}],
    )
    (item,) = cut.items("forget", "one")
    assert (item.target, item.reference, item.alternatives) == ("a", "c d", ("e f",))


def test_a_limit_takes_a_seeded_sample(world):
    some = world.items("retain", "one", limit=5, seed=1)
    assert len(some) == 5
    assert some == world.items("retain", "one", limit=5, seed=1) != world.items("retain", "one", limit=5, seed=2)
    assert set(some) < set(world.items("retain", "one"))


def test_rows_of_the_forget_set_are_kept_apart_for_a_search(world):
    every = world.items("forget", "one")
    rest, held = (world.items("forget", "one", held_out=0.5, held=held, seed=3) for held in (False, True))
    assert len(held) == round(0.5 * len(every))
    assert sorted([*rest, *held], key=lambda item: item.index) == every
    assert set(world.items("forget", "one", held_out=0.5, seed=3, limit=1)) <= set(rest)
    assert world.items("retain", "one", held_out=0.5, seed=3) == world.items("retain", "one")
    assert world.items("retain", "one", held_out=0.5, held=True) == []


def test_gate_texts_follow_the_forget_set(world):
    texts = world.gate_texts("one")
    assert texts.positive == ["f0", "f1", "f2", "f3"]
    assert texts.negative == [*(f"r{n}" for n in range(30)), "t0", "t1"]
    assert texts.checks == {"asked otherwise": (["p0", "p1", "p2", "p3"], 1)}


def test_row_counts_come_from_the_data_where_it_is_here(world):
    assert world.dry_rows("one") == {"forget": 4, "retain": 30}
    assert world.dry_gate_rows("one") == {"positive": 4, "negative": 32, "asked otherwise": 4}


def test_row_counts_are_the_published_ones_without_the_data():
    hub = declare("small", changed(folder=None, hub="some/set"))
    assert hub.dry_rows("one") == {"forget": 7, "retain": None}
    assert hub.dry_gate_rows("one") == {"positive": 7, "negative": None, "asked otherwise": 7}


def test_a_subset_without_config_is_the_split(tmp_path):
    put(tmp_path / "some" / "set" / "test.jsonl", [{"question": "q", "answer": "a"}])
    table = {"hub": "some/set", "split": "test", "prompt": "{{ question }}", "max_length": 9}
    bare = declare("bare", table | {"subsets": {"all": {"metrics": {"rouge": "rouge_l_recall"}}}})
    assert [item.prompt for item in bare.items("all", None, tmp_path)] == ["q"]
    assert bare.table_columns() == ("all_rouge",)
    with pytest.raises(InputError, match="no \\[gate\\] table"):
        bare.gate_texts(None, tmp_path)


def test_a_forget_set_is_needed_only_where_it_is_used(world):
    with pytest.raises(InputError, match="benchmark 'small' needs a forget set; known: one, two"):
        world.items("forget", None)
    with pytest.raises(InputError, match="has no forget set 'people'"):
        world.items("forget", benchmarks["quickstart"].forget_set("people"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.forget_set("on"), "benchmark 'small' has no forget set 'on'; did you mean 'one'?"),
        (lambda b: b.subset("retian"), "benchmark 'small' has no subset 'retian'; did you mean 'retain'?"),
    ],
)
def test_a_wrong_name_gets_the_nearest(world, call, message):
    with pytest.raises(InputError) as error:
        call(world)
    assert str(error.value) == message


def test_bad_rows_are_named_by_file_and_line(world, tmp_path):
    rows = [
        {"question": "f0", "answer": "a0", "paraphrase": "p0", "wrong": ["x"]},
        {"question": 5, "answer": "a1", "paraphrase": "p1", "wrong": "x"},
    ]
    path = put(tmp_path / "world" / "one_long.jsonl", rows)
    with pytest.raises(InputError) as error:
        world.items("forget", "one")
    assert error.value.problems == (
        f"{path}:2: column 'question': found 5 (a number), expected text",
        f"{path}:2: column 'wrong': found \"x\" (text), expected a list of at least one text",
    )


def test_all_mistakes_of_a_table_come_at_once():
    found = refused(
        where="benchmark.small",
        titel="A small world",
        max_length="long",
        subsets__retain__metrics={"rouge": "rouge_l_recal", "ratio": "truth_ratio"},
        forget_sets__one__targets=["Ada", 5],
        gate__checks={"other": {"field": "question", "label": 2}},
        aggregates={"forget_qualty": {}, "model_utility": {"subset": "retain"}, "forget_quality": 5},
    )
    assert [problem.split(":")[0] for problem in found] == [
        "'benchmark.small.max_length'",
        "'benchmark.small.forget_sets.one.targets.1'",
        "'benchmark.small.subsets.retain.metrics.rouge'",
        "'benchmark.small.gate.checks.other.label'",
        "'benchmark.small.titel'",
        "'benchmark.small.aggregates.forget_qualty'",
        "'benchmark.small.aggregates.model_utility.subsets'",
        "'benchmark.small.aggregates.model_utility.subset'",
        "'benchmark.small.aggregates.forget_quality'",
    ]
    text = "\n".join(found)
    for hint in ("title", "rouge_l_recall", "forget_quality", "subsets"):
        assert f"did you mean '{hint}'?" in text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hub": "a/b"}, "'small': found both 'hub' and 'folder'"),
        ({"folder": None}, "'small': found neither 'hub' nor 'folder'"),
        ({"prompt": None}, "'small.prompt': "),
        ({"prompt": "{{ question"}, "'small.prompt': template '{{ question': found what is not Jinja"),
        ({"subsets": {}}, "'small.subsets': found {}, "),
        ({"gate__positive": []}, "'small.gate.positive': found [], "),
        (
            {"subsets__retain__config": "{{ forgot }}"},
            "'small.subsets.retain.config': template '{{ forgot }}': found the unknown name 'forgot' (did you",
        ),
        (
            {"subsets__retain__alternatives": None},
            "'small.subsets.retain': found no key for what metrics read: 'normalized_probability' reads 'alternatives'",
        ),
        (
            {"columns": ["retain_roge"]},
            "'small.columns.0': there is no column 'retain_roge'; did you mean 'retain_rouge'?",
        ),
        (
            {"aggregates": {"forget_quality": {"subset": "forgot"}}},
            "'small.aggregates.forget_quality': there is no subset 'forgot'; did you mean 'forget'?",
        ),
        (
            {"aggregates": {"model_utility": {"subsets": ["retain", "forget"]}}},
            "'small.aggregates.model_utility': subset 'forget' has no metric called probability, rouge, which it reads",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key(changes, problem):
    found = refused(**({"columns": []} | changes))
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_aggregates_that_are_no_table_are_refused():
    assert refused(columns=[], aggregates=["model_utility"])[0].startswith("'small.aggregates': found")


def test_parse_forget_gives_benchmark_and_forget_set():
    benchmark, forget_set = parse_forget("tofu/forget05")
    assert (benchmark.name, forget_set.name, forget_set.retain) == ("tofu", "forget05", "retain95")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tofu/forget1", "benchmark 'tofu' has no forget set 'forget1'; did you mean 'forget10'?"),
        ("tofo/forget10", "there is no benchmark 'tofo'; did you mean 'tofu'?"),
        ("tofu-forget10", "expected BENCHMARK/FORGET_SET; did you mean 'tofu/forget10'?"),
    ],
)
def test_parse_forget_names_the_nearest(name, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_forget(name)


@pytest.mark.parametrize("name", list(benchmarks))
def test_every_declared_benchmark_is_whole(name):
    benchmark = benchmarks[name]
    assert isinstance(benchmark, Benchmark)
    assert benchmark.name == name
    assert benchmark.title
    assert set(benchmark.table_columns()) <= set(benchmark.better())
    for subset in benchmark.subsets.values():
        assert all(metric in metrics for metric in subset.metrics.values())


def test_a_subset_says_how_answers_are_sampled():
    reading = {"subsets__forget__metrics": {"leak": "leak_at_k"}, "aggregates": None, "columns": None}
    table = changed(**reading, subsets__forget__samples=3, subsets__forget__temperature=2, subsets__forget__top_p=0.5)
    subset = declare("small", table).subset("forget")
    assert (subset.samples, subset.temperature, subset.top_p) == (3, 2.0, 0.5)
    assert refused(**reading) == (
        "'small.subsets.forget': found no key for what metrics read: 'leak_at_k' reads 'samples'",
    )
    wrong = {"samples": 0, "temperature": 0.0, "top_p": 1.5}
    problems = refused(**reading, **{f"subsets__forget__{key}": value for key, value in wrong.items()})
    assert [problem.partition(":")[0] for problem in problems] == [f"'small.subsets.forget.{key}'" for key in wrong]


def test_tofu_sampling_is_of_tofus_forget_sets_and_its_columns_are_its_own():
    tofu, sampling = benchmarks["tofu"], benchmarks["tofu-sampling"]
    assert (sampling.hub, sampling.prompt, sampling.max_length) == (tofu.hub, tofu.prompt, tofu.max_length)
    for name in tofu.forget_sets:
        assert sampling.forget_set(name) is tofu.forget_set(name)
        assert sampling.dry_rows(name) == {"forget": tofu.dry_rows(name)["forget"]}
    assert not {*sampling.better()} & {*tofu.better()}
    assert set(sampling.better().values()) == {"closer to retain"}


@pytest.mark.parametrize(
    "forget", ["bbc_news/articles", "wikinews/2019", "book/alice_in_wonderland", "book_mia/hp_book"]
)
def test_copyrighted_texts_are_compared_with_the_true_ones_and_with_the_retain_model(forget):
    benchmark, _ = parse_forget(forget)
    forgotten, others = benchmark.subsets.values()
    assert (forgotten.forget, others.forget) == (True, False)
    assert forgotten.metrics == others.metrics == benchmark.metrics
    paper = benchmark.name in ("bbc_news", "book_mia")
    similarities = ["rouge_l", "sacrebleu", "meteor", "bertscore"] if paper else list(aggregates["similarity_gap"].of)
    assert benchmark.forget_columns()["similarity_gap"] == ([forgotten.name], similarities)
    assert ("bertscore" in benchmark.metrics) == paper  # it needs an extra, and a model from the Hub
    assert benchmark.better()["similarity_gap"] == "lower"
    assert benchmark.better()[f"{forgotten.name}_rouge_l"] == "closer to retain"


def test_what_another_model_reads_is_nothing_to_search_for():
    columns = benchmarks["book"].forget_columns()
    assert "passages_rouge_l" in columns
    assert "passages_perplexity" not in columns


def test_texts_have_the_published_counts_without_data():
    assert benchmarks["bbc_news"].dry_rows("articles") == {"articles": 500, "others": 10000}
    assert benchmarks["wikinews"].dry_rows("2019") == {"articles": None, "others": None}
    assert benchmarks["book"].dry_rows("alice_in_wonderland") == {"passages": 128, "other_book": 519}
    assert benchmarks["book_mia"].dry_rows("hp_book") == {"passages": None, "other_books": 1000}


@pytest.mark.skipif(not (DATA / "books").is_dir(), reason="the books (../shared/data/books) are not here")
def test_a_books_passages_go_on_after_their_first_sentences():
    benchmark, forget_set = parse_forget("book/alice_in_wonderland")
    assert benchmark.dry_rows(forget_set, DATA) == benchmark.dry_rows(forget_set)
    item = benchmark.items("passages", forget_set, DATA)[0]
    assert item.prompt.startswith("CHAPTER I. Down the Rabbit-Hole Alice was beginning to get very tired")
    assert item.target.startswith("So she was considering in her own mind")


def test_a_passage_of_a_column_has_a_first_sentence_and_a_rest(tmp_path):
    put(
        tmp_path / "book_mia" / "train.jsonl",
        [{"snippet": f"It was {n} in the morning. Nobody knew why."} for n in range(9870)],
    )
    items = benchmarks["book_mia"].items("other_books", "hp_book", tmp_path, limit=2)
    assert all(re.fullmatch(r"It was \d+ in the morning\.", item.prompt) for item in items)
    assert {item.target for item in items} == {"Nobody knew why."}


def test_subsets_share_the_metrics_of_their_benchmark():
    table = changed(metrics={"rouge": "rouge_l"}, subsets__retain__metrics=None, aggregates=None, columns=None)
    benchmark = declare("small", table)
    assert benchmark.subset("retain").metrics == {"rouge": "rouge_l"}
    assert set(benchmark.subset("forget").metrics) == {"ratio", "truth_ratio"}


def test_a_benchmark_leaves_unstated_what_is_as_in_the_one_it_is_of():
    wmdp = benchmarks["wmdp"]
    mine = declare("mine", {"of": "wmdp", "metrics": {"probe": "linear_probe"}, "max_length": 9})
    assert (mine.hub, mine.split, mine.prompt, mine.raw, mine.rows) == (
        "cais/wmdp",
        "test",
        wmdp.prompt,
        True,
        wmdp.rows,
    )
    assert mine.max_length == 9
    assert mine.forget_set("all") is wmdp.forget_set("all")
    assert {name: one.model_copy(update={"metrics": {}}) for name, one in mine.subsets.items()} == {
        name: one.model_copy(update={"metrics": {}}) for name, one in wmdp.subsets.items()
    }
    assert {tuple(one.metrics.items()) for one in mine.subsets.values()} == {(("probe", "linear_probe"),)}
    with pytest.raises(InputError, match="'mine.of': there is no benchmark 'wmdb'; did you mean 'wmdp'?"):
        declare(
            "mine",
            {"of": "wmdb", "prompt": "{{ q }}", "max_length": 9, "local": "x", "subsets": {"a": {"metrics": {}}}},
        )


def test_a_benchmark_of_ones_own_files_takes_no_data_set_of_the_one_it_is_of():
    mine = declare("mine", {"of": "tofu", "folder": "mine", "subsets": {"a": {"answer": "said", "alternatives": "no"}}})
    assert (mine.hub, mine.folder, mine.prompt) == (None, "mine", benchmarks["tofu"].prompt)
    assert mine.subset("a").metrics == benchmarks["tofu"].metrics


def test_a_forget_set_of_choices_is_best_at_chance():
    assert set(benchmarks["wmdp"].better().values()) == {"closer to chance"}
    found = benchmarks["mmlu"].better()
    assert found == {
        "forget_accuracy": "closer to chance",
        "neighbours_accuracy": "higher",
        "others_accuracy": "higher",
    }
    assert legend_of({"better": found}, list(found)) == "↑ higher is better, ~ closer to chance is better"


def test_a_data_set_that_is_read_from_a_file_is_so_for_its_gate():
    for name, hub in (("bbc_news", "vblagoje/cc_news"), ("book_mia", "swj0419/BookMIA")):
        one = benchmarks[name]
        read = [*one.subsets.values(), *one.gate.negative, *one.gate.checks.values()]
        assert len({table.local for table in read if table.hub == hub}) == 1


def test_an_aggregate_is_made_of_the_metrics_that_it_is_told():
    gap = {"subset": "retain", "metrics": ["rouge", "roge"]}
    assert refused(columns=[], aggregates={"similarity_gap": gap}) == (
        "'small.aggregates.similarity_gap': subset 'retain' has no metric called roge, which it reads",
    )


@pytest.mark.skipif(not (DATA / "wikinews").is_dir(), reason="the news (../shared/data/wikinews) are not here")
def test_the_news_of_a_year_are_asked_for_by_title():
    benchmark, forget_set = parse_forget("wikinews/2019")
    items = benchmark.items("articles", forget_set, DATA)
    assert len(items) == benchmark.dry_rows(forget_set, DATA)["articles"] == 171
    texts = {row["title"]: row["text"] for row in benchmark.subset_rows("articles", forget_set, DATA)}
    assert all(texts[item.prompt].startswith(item.target) for item in items)
    assert all(len(item.target.split()) == min(180, len(texts[item.prompt].split())) for item in items)


def test_tofu_names_the_published_counts_without_data():
    tofu = benchmarks["tofu"]
    for name, (rows, rest) in {"forget01": (40, 3960), "forget05": (200, 3800), "forget10": (400, 3600)}.items():
        assert tofu.dry_rows(name) == {"forget": rows, "retain": 400, "real_authors": 100, "world_facts": 117}
        assert tofu.dry_gate_rows(name) == {
            "positive": rows,
            "negative": rest,
            "paraphrased": rows,
            "retain_paraphrased": 400,
            "real_authors": 100,
            "world_facts": 117,
        }
        assert len(tofu.forget_set(name).targets) == rows / 20


def test_tofu_scores_as_published():
    tofu = benchmarks["tofu"]
    assert tofu.aggregates["model_utility"] == {"subsets": ["retain", "real_authors", "world_facts"]}
    assert tofu.max_length == 200
    assert [subset.metrics["probability"] for subset in tofu.subsets.values()] == [
        "answer_probability",
        "answer_probability",
        "normalized_probability",
        "normalized_probability",
    ]
    assert {subset.metrics["rouge"] for subset in tofu.subsets.values()} == {"rouge_l_recall"}


@needs_tofu
@pytest.mark.parametrize("forget", ["forget01", "forget05", "forget10"])
def test_tofu_makes_its_rows_of_the_real_files(forget, monkeypatch):
    tofu = benchmarks["tofu"]
    published = tofu.dry_rows(forget), tofu.dry_gate_rows(forget)
    monkeypatch.setenv(ENVIRONMENT, str(DATA))
    assert (tofu.dry_rows(forget), tofu.dry_gate_rows(forget)) == published
    for subset, count in published[0].items():
        items = tofu.items(subset, forget)
        assert len(items) == count
        wrong = 5 if subset in {"forget", "retain"} else 3
        assert {len(item.alternatives) for item in items} == {wrong}
        assert all((item.reference == item.target) == (wrong == 3) for item in items[:20])
    texts = tofu.gate_texts(forget)
    assert [len(texts.positive), len(texts.negative)] == [published[1]["positive"], published[1]["negative"]]
    assert not set(texts.positive) & set(texts.negative)
    assert {name: label for name, (_, label) in texts.checks.items()} == {
        "paraphrased": 1,
        "retain_paraphrased": 0,
        "real_authors": 0,
        "world_facts": 0,
    }


@needs_tofu
@pytest.mark.parametrize("forget", ["forget01", "forget05", "forget10"])
def test_tofu_names_the_author_of_every_twenty_rows(forget):
    forget_set = benchmarks["tofu"].forget_set(forget)
    rows = benchmarks["tofu"].subset_rows("forget", forget, DATA)
    for number, name in enumerate(forget_set.targets):
        own = rows[20 * number : 20 * number + 20]
        named = sum(name.split()[-1] in f"{row['question']} {row['answer']}" for row in own)
        assert any(name in f"{row['question']} {row['answer']}" for row in own)
        assert named >= 14, name


@needs_quickstart
def test_the_quick_start_makes_its_rows_of_the_package():
    benchmark, people = parse_forget("quickstart/people")
    rows = benchmark.dry_rows(people)
    texts = benchmark.gate_texts(people)
    assert all(rows.values())
    assert len(texts.positive) == rows["forget"]
    assert len(texts.negative) == rows["retain"] + rows["facts"]
    assert len(texts.checks["paraphrased"][0]) == rows["forget"]
    assert not set(texts.positive) & set(texts.negative)
    for subset in benchmark.subsets:
        assert len(benchmark.items(subset, people)) == rows[subset]


@needs_quickstart
def test_the_quick_start_names_the_people_to_forget():
    benchmark, people = parse_forget("quickstart/people")
    texts = [item.prompt + item.target for item in benchmark.items("forget", people)]
    kept = [item.prompt + item.target for item in benchmark.items("retain", people)]
    assert people.targets
    assert all(any(name in text for text in texts) for name in people.targets)
    assert all(any(name in text for name in people.targets) for text in texts)
    assert not any(name in text for name in people.targets for text in kept)
