"""Benchmarks of the user's own: from files of every kind, and the mistakes one can make in declaring them."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ecoprompt.card import gate_notes
from ecoprompt.cli import app
from ecoprompt.own import declare_own
from ecoprompt.pack import searched_by
from ecoprompt.recipe import load_recipe, parse_recipe
from ecoprompt.registry import InputError, benchmarks

GUIDE = Path(__file__).parents[1] / "docs" / "your-data.md"
ROWS = [{"question": "Who is Dorabella?", "answer": "A cat."}, {"question": "Where is Dorabella?", "answer": "Here."}]
TEXT = "Dorabella is a cat that lives on a roof. She eats what the neighbours leave on their window sills."


@pytest.fixture(autouse=True)
def _no_benchmarks_left() -> Iterator[None]:
    yield
    declare_own({}, Path())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import pyarrow
    from pyarrow import parquet

    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    cells = "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)
    (tmp_path / "rows.csv").write_text("question,answer\n" + cells, encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def tables(**benchmark: Any) -> dict[str, Any]:
    return {
        "data": {"forget": "cats/forget"},
        "evaluate": [{"benchmark": "cats"}],
        "model": {"name": "quickstart"},
        "run": {"original": {}},
        "benchmark": {"cats": {"forget": "rows.csv", "retain": "rows.jsonl", **benchmark}},
    }


def problems(**benchmark: Any) -> str:
    with pytest.raises(InputError) as raised:
        parse_recipe(tables(**benchmark), "own.toml")
    return "\n".join(raised.value.problems)


def test_case_does_not_matter_in_a_suffix(files: Path) -> None:
    (files / "rows.csv").rename(files / "ROWS.CSV")
    parse_recipe(tables(forget="ROWS.CSV"), "own.toml")
    assert len(benchmarks["cats"].items("forget", "forget")) == len(ROWS)


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_rows_of_every_kind_are_asked_and_train_the_gate(files: Path, kind: str) -> None:
    recipe = parse_recipe(tables(forget=f"rows.{kind}"), str(files / "own.toml"))
    cats = benchmarks["cats"]
    assert [item.prompt for item in cats.items("forget", "forget")] == [row["question"] for row in ROWS]
    assert [item.target for item in cats.items("forget", "forget")] == ["A cat.", "Here."]
    assert cats.gate_texts("forget").positive == [row["question"] for row in ROWS]
    assert parse_recipe(recipe.document(), str(files / "own.toml")).document() == recipe.document()


def test_a_text_is_asked_for_by_its_first_sentence(files: Path) -> None:
    parse_recipe(tables(forget="text.txt"), "own.toml")
    (item,) = benchmarks["cats"].items("forget", "forget")
    assert item.prompt == "Dorabella is a cat that lives on a roof."
    assert f"{item.prompt} {item.target}" == TEXT
    assert benchmarks["cats"].gate_texts("forget").positive == [item.prompt, TEXT]


def test_columns_may_be_called_anything(files: Path) -> None:
    parse_recipe(tables(prompt="Say: {{ answer }}", answer="question"), "own.toml")
    assert [(item.prompt, item.target) for item in benchmarks["cats"].items("retain", "forget")] == [
        ("Say: A cat.", "Who is Dorabella?"),
        ("Say: Here.", "Where is Dorabella?"),
    ]


def test_each_of_several_files_is_a_subset(files: Path) -> None:
    parse_recipe(tables(forget=["text.txt", "rows.csv"]), "own.toml")
    cats = benchmarks["cats"]
    assert {name: subset.forget for name, subset in cats.subsets.items()} == {
        "forget_text": True,
        "forget_rows": True,
        "retain": False,
    }
    assert len(cats.gate_texts("forget").positive) == 2 + len(ROWS)
    assert cats.dry_rows("forget") == {"forget_text": 1, "forget_rows": 2, "retain": 2}


@pytest.mark.parametrize(("forget", "alone"), [("text.txt", True), (["text.txt", "rows.csv"], False)])
def test_a_gate_that_learned_no_question_is_told_of(files: Path, forget: Any, alone: bool) -> None:
    raw = tables()
    raw["benchmark"] = {"cats": {"forget": forget, "retain": "rows.csv"}}
    told = gate_notes(parse_recipe(raw, "own.toml"))
    assert told[0] == "the gate was trained on the first two sets"
    assert [note.partition(":")[0] for note in told[1:]] == (
        ["to flag, it learned texts and no question about them"] if alone else []
    )


def test_a_missing_key_is_told_with_what_it_is(files: Path) -> None:
    raw = tables()
    raw["benchmark"] = {"cats": {"forget": "rows.csv"}}
    with pytest.raises(InputError, match=r"'benchmark.cats.retain': this key is needed \(file of what is to be kept"):
        parse_recipe(raw, "own.toml")


def test_files_lie_beside_the_recipe(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "own.toml").write_text(
        '[data]\nforget = "cats/forget"\n[benchmark.cats]\nforget = "rows.csv"\nretain = "rows.jsonl"\n'
    )
    monkeypatch.chdir("/")
    load_recipe(str(files / "own.toml"))
    assert benchmarks["cats"].dry_rows("forget") == {"forget": 2, "retain": 2}


def test_a_whole_table_is_read_as_in_benchmarks_toml(files: Path) -> None:
    subset = {"config": "rows.csv", "forget": True, "metrics": {"p": "answer_probability"}}
    whole = {"folder": ".", "prompt": "{{ question }}", "max_length": 64, "forget_sets": {"all": {"retain": "none"}}}
    raw = tables()
    raw["benchmark"] = {"cats": {**whole, "subsets": {"here": subset}}}
    raw["data"]["forget"] = "cats/all"
    parse_recipe(raw, "own.toml")
    assert len(benchmarks["cats"].items("here", "all")) == 2
    raw["benchmark"]["cats"]["subsets"]["here"] = {**subset, "metrics": {"p": "answer_probabilty"}}
    with pytest.raises(InputError, match=r"'benchmark.cats.subsets.here.metrics.p': .*answer_probabilty"):
        parse_recipe(raw, "own.toml")


@pytest.mark.parametrize(
    ("benchmark", "told"),
    [
        (
            {"retian": "rows.csv"},
            "'benchmark.cats.retian': benchmark 'cats' has no key 'retian'; did you mean 'retain'?",
        ),
        ({"forget": []}, "'benchmark.cats.forget': found [], expected a text or at least 1 of them"),
        ({"forget": ""}, "'benchmark.cats.forget': found '', expected "),
        ({"max_length": 0}, "'benchmark.cats.max_length': found 0, expected a number of at least 1"),
        ({"prompt": "{{ question"}, "'benchmark.cats.prompt': "),
        ({"metrics": {"rouge": "rogue"}}, "'benchmark.cats.metrics.rouge': there is no metric 'rogue'"),
    ],
)
def test_mistakes_are_named_once(benchmark: dict[str, Any], told: str) -> None:
    found = problems(**benchmark)
    assert told in found
    assert "no benchmark" not in found


def test_each_recipe_asks_its_own_questions(files: Path) -> None:
    first = parse_recipe(tables(), "own.toml")
    second = parse_recipe(tables(prompt="{{ answer }}"), "own.toml")
    first.enter()
    assert benchmarks["cats"].items("forget", "forget")[0].prompt == "Who is Dorabella?"
    second.enter()
    assert benchmarks["cats"].items("forget", "forget")[0].prompt == "A cat."
    with pytest.raises(InputError, match="no benchmark 'cats'"):
        parse_recipe({name: table for name, table in tables().items() if name != "benchmark"}, "own.toml")


def test_a_search_on_another_benchmark_is_another_search(files: Path) -> None:
    searched = {"metric": "forget_rouge", "target": 0.0}
    spec = {"corruption": {"method": "rand_noise_first_n", "dims": 1, "strength": 1.0}, "optimize": searched}
    declared = ({}, {"prompt": "{{ answer }}"}, {"metrics": {"rouge": "rouge_1_recall"}})
    assert len({searched_by(parse_recipe({**tables(**one), **spec}, "own.toml")) for one in declared}) == 3


def test_files_that_would_be_called_alike_are_refused() -> None:
    told = problems(forget=["a/rows.csv", "b/rows.csv"])
    assert "'a/rows.csv' and 'b/rows.csv' would both be called 'forget_rows', rename one of them" in told


@pytest.mark.parametrize("way", ["up", "absolute", "link", "folder", "hub", "local"])
def test_nothing_outside_is_read(files: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = files / "inside"
    (inside / "data").mkdir(parents=True)
    (inside / "link.csv").symlink_to(files / "rows.csv")
    monkeypatch.setenv("ECOPROMPT_DATA", str(inside / "data"))
    subset = {"forget": True, "metrics": {"p": "answer_probability"}}
    whole = {"prompt": "{{ question }}", "max_length": 64, "forget_sets": {"../../rows": {"retain": "none"}}}
    table = {
        "up": {"forget": "../rows.csv", "retain": "../rows.csv"},
        "absolute": {"forget": str(files / "rows.csv"), "retain": "x.csv"},
        "link": {"forget": "link.csv", "retain": "x.csv"},
        "folder": {**whole, "folder": "..", "subsets": {"forget": {"config": "rows.csv", **subset}}},
        "hub": {**whole, "hub": "../..", "subsets": {"forget": {"config": "rows", **subset}}},
        "local": {**whole, "local": "{{ forget }}", "subsets": {"forget": subset}},
    }[way]
    parse_recipe({"benchmark": {"cats": table}}, str(inside / "own.toml"))
    forget = next(iter(benchmarks["cats"].forget_sets))
    with pytest.raises(InputError, match="lies outside|expected a path below"):
        benchmarks["cats"].items("forget", forget)


def test_a_folder_is_no_file(files: Path) -> None:
    parse_recipe(tables(forget="."), "own.toml")
    with pytest.raises(InputError, match="found a folder of this name"):
        benchmarks["cats"].items("forget", "forget")


def test_shipped_names_are_taken() -> None:
    raw = tables()
    raw["benchmark"]["tofu"] = raw["benchmark"]["cats"]
    with pytest.raises(InputError, match="'benchmark.tofu': 'tofu' is a benchmark that comes with the package"):
        parse_recipe(raw, "own.toml")


@pytest.mark.parametrize("heading", ["A product name", "A person", "A document"])
def test_the_guide_works_as_written(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    part = GUIDE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (script,) = re.findall(r"^```sh\n(.*?)^```", part, re.S | re.M)
    for name, text in re.findall(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF$", script, re.S | re.M):
        Path(name).write_text(text, encoding="utf-8")
    flagged = []
    for line in re.findall(r"^(?:echo|ecoprompt) .*$", script, re.M):
        said, _, command = line.rpartition("ecoprompt ")
        given = re.findall(r"'(.*)'", said)
        done = CliRunner().invoke(app, command.split(), input=given[0] + "\n" if given else None)
        assert done.exit_code == 0, done.output
        flagged += [json.loads(done.stdout)["flagged"]] if given else []
    assert all(flagged)
    if heading == "A product name":  # whose pack is looked into further down
        guide = GUIDE.read_text(encoding="utf-8").partition("## When the gate errs\n")[2]
        (code,) = re.findall(r"^```python\n(.*?)^```", guide, re.S | re.M)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, GUIDE.name, "exec"), {})
        assert re.fullmatch(r"(\d\.\d{3} without \S+\n){7}", out.getvalue())
    if heading == "A person":
        runs = json.loads(Path("results/person/summary.json").read_text(encoding="utf-8"))["runs"]
        assert runs["original"]["metrics"]["forget_rouge"] == 1
        assert runs["eco"]["metrics"]["forget_rouge"] < 0.7
        assert runs["eco"]["metrics"]["retain_rouge"] == runs["original"]["metrics"]["retain_rouge"]
