"""Two results set against each other: pairing, tests, and what is refused."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console
from scipy.stats import ttest_rel

from ecoprompt.compare import compare
from ecoprompt.registry import InputError
from ecoprompt.tables import comparison_tables


def write(folder, values, run="eco", metrics=None, prompt="Q{}"):
    """Results of one run whose rows have these values of a metric, by index."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "run": run,
            "benchmark": "b",
            "subset": "s",
            "index": index,
            "prompt": prompt.format(index),
            "values": {"m": value},
        }
        for index, value in values.items()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {"better": {"s_m": "higher"}, "runs": {run: {"metrics": {"s_m": 0.5, **(metrics or {})}}}}
    (folder / "summary.json").write_text(json.dumps(document))
    return str(folder)


def test_rows_are_paired_by_what_was_asked_and_tested(tmp_path):
    ours, theirs = {0: 0.1, 1: 0.5, 2: 0.3, 3: 0.9}, {3: 0.7, 2: 0.6, 1: 0.9, 9: 0.0, 0: 0.3}
    a = write(tmp_path / "a", ours, metrics={"quality": 0.25, "lost": None, "alone": 1.0})
    b = write(tmp_path / "b", theirs, metrics={"quality": 0.75, "lost": 0.5})
    found = compare(a, b, tmp_path)
    assert (found["a"], found["b"], list(found["runs"])) == (a, b, ["eco"])
    metric = found["runs"]["eco"]["s_m"]
    test = ttest_rel([theirs[index] for index in ours], list(ours.values()))
    assert metric["difference"] == pytest.approx(0.175)  # (0.2 + 0.4 + 0.3 - 0.2) / 4
    assert (metric["a"], metric["b"], metric["rows"]) == (pytest.approx(0.45), pytest.approx(0.625), 4)
    assert metric["p"] == pytest.approx(test.pvalue)
    assert metric["interval"] == pytest.approx(list(test.confidence_interval(0.95)))
    untested = {"interval": None, "p": None, "rows": None}
    assert found["runs"]["eco"]["quality"] == {"a": 0.25, "b": 0.75, "difference": 0.5, **untested}
    assert found["runs"]["eco"]["lost"] == {"a": None, "b": 0.5, "difference": None, **untested}
    assert "alone" not in found["runs"]["eco"]
    assert found["rows"] == {"both": 4, "a_alone": 0, "b_alone": 1}


def test_results_without_a_common_row_are_refused(tmp_path):
    a = write(tmp_path / "a", {0: 0.0, 1: 1.0})
    b = write(tmp_path / "b", {0: 1.0, 1: 1.0}, prompt="Q{}?")
    with pytest.raises(InputError, match="share no row"):
        compare(a, b, tmp_path)


def test_rows_of_one_side_alone_are_told_of(tmp_path):
    a, b = write(tmp_path / "a", {0: 0.0, 1: 1.0, 2: 1.0}), write(tmp_path / "b", {1: 1.0, 2: 0.5})
    console = Console(width=80, file=io.StringIO())
    console.print(*comparison_tables(compare(a, b, tmp_path)))
    assert "rows asked in both: 2, in A alone: 1, in B alone: 0" in console.file.getvalue()
    console.print(*comparison_tables(compare(a, a, tmp_path)))
    assert console.file.getvalue().count("alone: ") == 2


def test_a_value_that_is_none_leaves_no_test(tmp_path):
    a, b = write(tmp_path / "a", {0: None, 1: 1.0}), write(tmp_path / "b", {0: 1.0, 1: 1.0})
    assert math.isnan(compare(a, b, tmp_path)["runs"]["eco"]["s_m"]["p"])


def test_results_are_found_by_the_name_of_their_recipe(tmp_path):
    write(tmp_path / "results" / "one", {0: 0.5})
    write(tmp_path / "results" / "two", {0: 1.0})
    assert compare("one", "two", tmp_path / "results")["runs"]["eco"]["s_m"]["difference"] == 0.5


def test_wrong_folders_are_named_all_at_once(tmp_path):
    write(tmp_path / "one", {0: 0.5})
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        compare("oen", str(tmp_path / "empty"), tmp_path)
    first, second = caught.value.problems
    assert first.startswith("--compare oen: found no results (summary.json, rows.jsonl) there or in ")
    assert first.endswith("did you mean 'one'?")
    assert f"--compare {tmp_path / 'empty'}: found no results" in second


def test_results_without_a_common_run_are_refused(tmp_path):
    a, b = write(tmp_path / "a", {0: 0.5}, run="eco[x=1]"), write(tmp_path / "b", {0: 0.5}, run="eco")
    with pytest.raises(InputError, match=r"have no run of the same name: eco\[x=1\]; eco"):
        compare(a, b, tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", "{}"),
        ("summary.json", '{"runs": {"eco": 3}}'),
        ("rows.jsonl", "{"),
        ("rows.jsonl", "[1]"),
        ("rows.jsonl", '{"run": "eco"}'),
    ],
)
def test_damaged_results_are_one_message(tmp_path, file, text):
    a = write(tmp_path / "a", {0: 0.5})
    (tmp_path / "a" / file).write_text(text)
    with pytest.raises(InputError) as caught:
        compare(a, a, tmp_path)
    assert len(caught.value.problems) == 1
    assert str(tmp_path / "a") in str(caught.value)
