"""Rows from files and from a stand-in for the Hub, samples, splits, templates, and what bad files say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet

from ecoprompt.data import (
    ENVIRONMENT,
    Rows,
    Source,
    check_columns,
    load_rows,
    local_file,
    sample,
    split,
    told_together,
)
from ecoprompt.registry import EcopromptError, InputError
from ecoprompt.template import fill, template_names

ROWS = [{"question": "Who?", "answer": "Ada"}, {"question": "Where?", "answer": "Here\u2028and there"}]
TOFU = Path(__file__).parents[2] / "shared" / "data" / "tofu"
needs_tofu = pytest.mark.skipif(not TOFU.is_dir(), reason="the TOFU files (../shared/data/tofu) are not here")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def problems(path: Path, **source) -> tuple[str, ...]:
    with pytest.raises(InputError) as error:
        load_rows(Source(path=str(path), **source))
    return error.value.problems


def write_parquet(path: Path) -> Path:
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("bom.jsonl", "\ufeff" + lines(ROWS)),
        ("blank.jsonl", "\n" + lines(ROWS) + "  \n\n"),
        ("windows.jsonl", lines(ROWS).replace("\n", "\r\n")),
        ("no_end.jsonl", lines(ROWS).rstrip("\n")),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("bom.json", "\ufeff" + json.dumps(ROWS)),
        ("lines.json", lines(ROWS)),
        ("a.csv", 'question,answer\nWho?,Ada\n"Where?","Here\u2028and there"\n'),
        ("bom.csv", "\ufeffquestion,answer\r\nWho?,Ada\r\n\r\nWhere?,Here\u2028and there\r\n"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content):
    source = Source(path=str(put(tmp_path / name, content)))
    assert load_rows(source) == ROWS


def test_parquet_gives_the_same_rows(tmp_path):
    source = Source(path=str(write_parquet(tmp_path / "a.parquet")))
    assert load_rows(source) == ROWS


def test_a_csv_cell_may_hold_lines(tmp_path):
    path = put(tmp_path / "a.csv", 'question,answer\n"Who\nis it?",Ada\nWhere?\n')
    assert problems(path) == (f"{path}:4: found 1 cells, expected 2 as in the header",)


def test_rows_that_are_taken_keep_their_places(tmp_path):
    path = put(tmp_path / "a.jsonl", "\n" + lines(ROWS))
    assert load_rows(Source(path=str(path))).take([1]).place(0) == f"{path}:3"
    assert Rows(ROWS, "a/b").take([1]).place(0) == "a/b: row 2"


def test_a_path_may_leave_its_suffix_out(tmp_path):
    put(tmp_path / "v1.5.jsonl", lines(ROWS))
    assert load_rows(Source(path=str(tmp_path / "v1.5"))) == ROWS


@pytest.mark.parametrize("folder", ["locuslab/TOFU", "TOFU", "tofu"])
def test_a_hub_data_set_is_found_under_the_root(tmp_path, monkeypatch, folder):
    put(tmp_path / folder / "forget10.jsonl", lines(ROWS))
    source = Source(hub="locuslab/TOFU", config="forget10")
    assert load_rows(source, tmp_path) == ROWS
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert load_rows(source) == ROWS


def test_a_local_copy_may_have_a_name_of_its_own(tmp_path):
    put(tmp_path / "questions" / "v1.0.jsonl", lines(ROWS))
    source = Source(hub="a/b", config="all", split="test", local="questions/v1.0")
    assert load_rows(source, tmp_path) == ROWS
    put(tmp_path / "b" / "all.jsonl", lines(ROWS[:1]))
    assert load_rows(source, tmp_path) == ROWS
    assert load_rows(Source(hub="a/b", config="all", local="questions/v2"), tmp_path) == ROWS[:1]


def test_the_root_that_is_given_comes_before_the_environment(tmp_path, monkeypatch):
    put(tmp_path / "one" / "set" / "train.jsonl", lines(ROWS))
    put(tmp_path / "two" / "set" / "train.jsonl", lines(ROWS[:1]))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "two"))
    assert load_rows(Source(hub="a/set")) == ROWS[:1]
    assert load_rows(Source(hub="a/set"), tmp_path / "one") == ROWS


def test_what_is_not_there_has_no_local_file(tmp_path):
    assert local_file(Source(hub="a/b", config="c")) is None
    assert local_file(Source(hub="a/b"), tmp_path) is None


BAD_FILES = {
    "not JSON": (
        "a.jsonl",
        '{"question": "Who?"}\n{"question": \n',
        ":2: found text that is not JSON (",
        "JSON object",
    ),
    "a list": (
        "a.jsonl",
        '{"question": "Who?"}\n\n["Who?"]\n',
        ':3: found ["Who?"] (a list)',
        "one JSON object a line",
    ),
    "too deep": ("a.jsonl", "[" * 100_000, ":1: found ", "one JSON object a line"),
    "not UTF-8": ("a.jsonl", b'{"a": "b"}\n{"a": "caf\xe9"}\n', ":2: found byte 0xe9 that is not UTF-8", "UTF-8 text"),
    "empty": ("a.jsonl", "", ": found no rows", "expected at least one"),
    "blank": ("a.jsonl", "\n \n", ": found no rows", "expected at least one"),
    "a broken list": ("a.json", '[{"a": 1},\n {"a": }]', ":2: found text that is not JSON (", "a list of JSON objects"),
    "a list of texts": ("a.json", '[{"a": 1}, "b"]', ': row 2: found "b" (text)', "a JSON object"),
    "an empty list": ("a.json", "[]", ": found no rows", "expected at least one"),
    "latin list": ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', ":2: found byte 0xff that is not UTF-8", "UTF-8 text"),
    "short row": ("a.csv", "question,answer\nWho?\n", ":2: found 1 cells", "expected 2"),
    "long row": ("a.csv", "question,answer\nWho?,Ada,Eve\n", ":2: found 3 cells", "expected 2"),
    "open quote": ("a.csv", 'question,answer\nWho?,"Ada\n', ":2: found a row that is not CSV (", "expected cells"),
    "latin cells": ("a.csv", b"question\ncaf\xe9\n", ":2: found byte 0xe9 that is not UTF-8", "UTF-8 text"),
    "header alone": ("a.csv", "question,answer\n", ": found no rows", "expected at least one"),
    "not Parquet": ("a.parquet", "question", ": found a file that is not Parquet", "expected Parquet"),
    "another kind": (
        "a.xml",
        "question",
        ": found a file of an unknown kind",
        "expected .jsonl, .json, .csv, .parquet",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_gives_one_message_with_place_found_and_expected(tmp_path, case):
    name, content, found, expected = BAD_FILES[case]
    path = put(tmp_path / name, content)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}{found}")
    assert expected in problem
    assert "\n" not in problem


def test_all_bad_lines_are_listed_up_to_five(tmp_path):
    path = put(tmp_path / "a.jsonl", '{"a": 1}\n' + "oops\n" * 7)
    found = problems(path)
    assert [problem.split(": ")[0] for problem in found[:5]] == [f"{path}:{line}" for line in range(2, 7)]
    assert found[5:] == ("and 2 more problems of this kind",)


def test_a_missing_file_names_its_neighbour(tmp_path):
    put(tmp_path / "forget10.jsonl", lines(ROWS))
    (problem,) = problems(tmp_path / "forget11")
    assert problem.startswith(f"{tmp_path / 'forget11'}: found no file of this name")
    assert "did you mean 'forget10.jsonl'?" in problem


def test_a_missing_folder_is_named(tmp_path):
    (problem,) = problems(tmp_path / "nowhere" / "a.jsonl")
    assert f"'{tmp_path / 'nowhere'}' is not there either" in problem


def test_what_lies_beside_a_missing_file_is_not_all_listed(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.csv").touch()
    (problem,) = problems(tmp_path / "forget.jsonl")
    assert problem.endswith(f"'{tmp_path}' is there")


def test_a_folder_in_place_of_a_file_says_what_it_holds(tmp_path):
    put(tmp_path / "set" / "a.jsonl", lines(ROWS))
    (problem,) = problems(tmp_path / "set")
    assert "found a folder of this name" in problem
    assert "it holds a.jsonl" in problem


@pytest.mark.parametrize("by_environment", [True, False])
def test_a_missing_root_is_a_mistake(tmp_path, monkeypatch, by_environment):
    (tmp_path / "data").mkdir()
    root = tmp_path / "dat"
    monkeypatch.setenv(ENVIRONMENT, str(root) if by_environment else "")
    with pytest.raises(InputError) as error:
        load_rows(Source(hub="a/b"), None if by_environment else root)
    assert str(error.value).startswith(ENVIRONMENT if by_environment else "[data] root")
    assert f"found no folder '{root}'" in str(error.value)
    assert "did you mean 'data'?" in str(error.value)


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_what_is_not_local_is_asked_of_the_hub(monkeypatch, tmp_path):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return iter(ROWS)

    hub(monkeypatch, load)
    assert load_rows(Source(hub="a/b", config="c", split="test", revision="r"), tmp_path) == ROWS
    assert asked == [(("a/b", "c"), {"split": "test", "revision": "r"})]


def test_what_the_hub_does_not_give_is_named_with_how_to_get_it(monkeypatch, tmp_path):
    def load(*_, **__):
        raise ConnectionError("no route\nto host")

    hub(monkeypatch, load)
    put(tmp_path / "tofu" / "forget10.jsonl", lines(ROWS))
    with pytest.raises(EcopromptError) as error:
        load_rows(Source(hub="locuslab/TOFU", config="forget11"), tmp_path)
    message = str(error.value)
    assert error.value.exit_status == 1
    for part in ("'locuslab/TOFU, forget11, train'", "HF_HUB_OFFLINE is set", ENVIRONMENT):
        assert part in message
    assert "[data] root" in message
    assert "did you mean 'forget10'?" in message


def test_all_that_is_not_here_is_told_with_the_first(tmp_path):
    put(tmp_path / "set" / "b.jsonl", lines(ROWS))
    sources = [Source("a/set", config) for config in "abcc"]
    with pytest.raises(EcopromptError) as error, told_together(lambda: sources, tmp_path):
        raise EcopromptError("a is not here")
    assert str(error.value).splitlines() == [
        "a is not here",
        "No local file holds any of what is read: a/set, a, train; a/set, c, train.",
    ]
    with pytest.raises(EcopromptError, match="^alone$"), told_together(lambda: sources[:2], tmp_path):
        raise EcopromptError("alone")


@pytest.mark.parametrize("with_root", [True, False])
def test_the_message_says_where_was_looked(monkeypatch, tmp_path, with_root):
    def load(*_, **__):
        raise ValueError("unknown config")

    hub(monkeypatch, load)
    with pytest.raises(EcopromptError) as error:
        load_rows(Source(hub="a/Set", config="c"), tmp_path if with_root else None)
    expected = str(tmp_path / "a" / "Set") if with_root else "no folder of local data sets is named"
    assert expected in str(error.value)


def checked(rows, columns):
    with pytest.raises(InputError) as error:
        check_columns(Rows(rows, "a/b, train"), columns)
    return error.value.problems


def test_good_columns_pass():
    rows = Rows([{"a": "x", "b": ["y", "z"], "c": 0, "d": False}], "a/b")
    check_columns(rows, {"a": str, "b": list})
    check_columns(rows, dict.fromkeys("abcd", object))


def test_a_column_that_no_row_has_is_named_once_with_the_nearest():
    rows = [{"qestion": "Who?", "answer": "Ada"}] * 9
    (problem,) = checked(rows, {"question": str, "answer": str})
    assert problem == ("a/b, train: in all rows found no column 'question', expected text; did you mean 'qestion'?")


def test_a_row_without_a_column_is_named_by_file_and_line(tmp_path):
    path = put(tmp_path / "a.jsonl", '{"question": "Who?"}\n\n{"qestion": "Where?"}\n')
    source = Source(path=str(path))
    with pytest.raises(InputError) as error:
        check_columns(load_rows(source), {"question": str})
    assert error.value.problems == (f"{path}:3: found no column 'question', expected text; did you mean 'qestion'?",)


@pytest.mark.parametrize(
    ("value", "kind", "found", "expected"),
    [
        (5, str, "5 (a number)", "text"),
        (None, str, "null", "text"),
        (True, str, "true", "text"),
        (["x"], str, '["x"] (a list)', "text"),
        (" \n", str, '" \\n" (text)', "text"),
        ("\ud800", str, '"\\ud800" (text)', "text"),
        ("x", list, '"x" (text)', "a list of at least one text"),
        ([], list, "[] (a list)", "a list of at least one text"),
        (["x", 5], list, '["x", 5] (a list)', "a list of at least one text"),
        (["x", None], list, '["x", null] (a list)', "a list of at least one text"),
        ({"x": 1}, list, '{"x": 1} (an object)', "a list of at least one text"),
        (None, object, "null", "a value"),
        ("y" * 99, list, '"' + "y" * 56 + "... (text)", "a list of at least one text"),
    ],
)
def test_a_value_of_the_wrong_kind_is_shown(value, kind, found, expected):
    problem = checked([{"a": value}], {"a": kind})
    assert problem == (f"a/b, train: row 1: column 'a': found {found}, expected {expected}",)


def test_bad_rows_are_listed_up_to_five():
    rows = [{"a": "x"}, *({"a": number} for number in range(8))]
    found = checked(rows, {"a": str})
    assert found[0].startswith("a/b, train: row 2:")
    assert len(found) == 6
    assert found[5] == "and 3 more problems of this kind"


def test_a_sample_is_seeded_in_order_and_nested():
    rows = [f"row {number:03}" for number in range(100)]
    small, large = sample(rows, 10, 3), sample(rows, 40, 3)
    assert small == sample(rows, 10, 3) != sample(rows, 10, 4)
    assert len(small) == 10
    assert small == sorted(small)
    assert set(small) < set(large)


@pytest.mark.parametrize("limit", [None, 3, 4])
def test_a_sample_no_smaller_than_the_rows_is_all_of_them(limit):
    assert sample("abc", limit, 0) == ["a", "b", "c"]


@pytest.mark.parametrize(("fraction", "held_out"), [(0, 0), (0.25, 25), (1, 100)])
def test_a_split_is_seeded_in_order_and_complete(fraction, held_out):
    rows = list(range(100))
    rest, held = split(rows, fraction, 7)
    assert len(held) == held_out
    assert sorted(rest + held) == rows
    assert rest == sorted(rest)
    assert held == sorted(held)
    assert (rest, held) == split(rows, fraction, 7)


def test_a_template_is_filled_and_keeps_its_line_ends():
    assert fill("Question: {{ q }}\n", {"q": "<Who> & why?", "unused": 1}) == "Question: <Who> & why?\n"
    assert fill("{% for c in choices %}{{ 'ABCD'[loop.index0] }}. {{ c }}\n{% endfor %}", {"choices": ["x", "y"]}) == (
        "A. x\nB. y\n"
    )


def test_a_text_that_is_a_list_of_questions_is_refused(tmp_path):
    (tmp_path / "asked.txt").write_text("Who made it?\n\nCan I buy one? \n")
    with pytest.raises(InputError, match=r"asked.txt: each of its lines is a question.*CSV"):
        load_rows(Source(path=str(tmp_path / "asked.txt")))
    (tmp_path / "asked.txt").write_text("Who made it?\nNobody knows.\n")
    assert len(load_rows(Source(path=str(tmp_path / "asked.txt")))) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ qestion }}", "found the unknown name 'qestion' (did you mean 'question'?)"),
        ("{{ question.nothing }}", "has no attribute 'nothing'"),
        ("{{ question", "cannot be filled"),
        ("{{ 1 // 0 }}", "cannot be filled"),
        ("{{ question + 1 }}", "cannot be filled"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_bad_template_is_refused_with_its_text(template, message):
    with pytest.raises(InputError) as error:
        fill(template, {"question": "Who?"})
    assert f"template '{template}'" in str(error.value)
    assert message in str(error.value)


def test_the_names_of_a_template_and_those_that_it_prints():
    template = "{{ a }} {{ b | upper }} {% for c in d %}{{ c }}{% endfor %}"
    assert template_names(template) == {"a", "b", "d"}
    assert template_names(template, printed=True) == {"a"}
    with pytest.raises(InputError, match="what is not Jinja"):
        template_names("{% if %}")


@needs_tofu
@pytest.mark.parametrize(("config", "rows"), [("forget10", 400), ("retain90", 3600), ("world_facts_perturbed", 117)])
def test_the_real_tofu_files_are_read_whole(config, rows):
    source = Source(hub="locuslab/TOFU", config=config)
    found = load_rows(source, TOFU.parent)
    assert len(found) == rows
    check_columns(found, {"question": str, "answer": str})
