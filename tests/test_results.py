"""The store under torn writes, and every form in which results are shown."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers.models import WordLevel

from ecoprompt import cli, results
from ecoprompt.files import writing
from ecoprompt.results import (
    FORMATS,
    Store,
    cells_of,
    cost_cells_of,
    key,
    number,
    paired_cells_of,
    to_json,
    write_results,
    write_text_atomic,
)
from ecoprompt.tables import comparison_tables, cost_tables, gate_table, side_by_side, table

SUMMARY = {
    "recipe": "tofu-mini",
    "forget": "tofu/forget10",
    "columns": ["forget_quality", "model_utility", "forget_rouge"],
    "better": {"forget_quality": "higher", "forget_rouge": "closer to retain", "retain_truth_ratio": "lower"},
    "runs": {
        "retain": {
            "metrics": {"forget_quality": 1.0, "model_utility": 0.6166, "forget_rouge": 0.17},
            "seconds": 12.34,
            "gate": None,
        },
        "original": {
            "metrics": {"forget_quality": 1.06e-239, "model_utility": 0.6227, "forget_rouge": 0.984},
            "seconds": None,
        },
        "eco[corruption.strength=5]": {
            "metrics": {"forget_quality": None, "model_utility": 0.6227, "retain_truth_ratio": math.nan},
            "seconds": 3.0,
            "gate": {"false_negatives": 0.0, "false_positives": 0.001, "kind": "linear", "checks": {"a": 0.5}},
        },
    },
    "resolved": {"path": Path("a/b"), "value": np.float32(0.5), "values": np.arange(3)},
}


def shown(what, width=80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(what)
    return file.getvalue()


def reopened(path) -> Store:
    return Store(path)


def test_a_store_keeps_values_over_a_restart(tmp_path):
    store = Store(tmp_path / "new" / "rows.jsonl")
    assert store.get("a") is None
    store.put_many([("a", {"x": [1, None, "é\u2028"]}), ("b", 0.1 + 0.2)])
    store.put_many([("a", "newer")])
    for one in (store, reopened(store.path)):
        assert one.get("a") == "newer"
        assert one.get("b") == 0.1 + 0.2
        assert "c" not in one
        assert len(one) == 2


def test_a_store_keeps_infinities(tmp_path):
    Store(tmp_path / "rows.jsonl").put_many([("a", [math.inf, -math.inf])])
    assert reopened(tmp_path / "rows.jsonl").get("a") == [math.inf, -math.inf]


def test_a_value_has_its_share_of_the_seconds(tmp_path):
    store = Store(tmp_path / "rows.jsonl")
    store.put_many([("a", 1), ("b", 2)], 3.0)
    store.put_many([("c", 1)], 0.5)
    for one in (store, reopened(store.path)):
        assert [one.seconds(name) for name in "abcd"] == [1.5, 1.5, 0.5, 0.0]


def test_nothing_to_put_makes_no_file(tmp_path):
    Store(tmp_path / "rows.jsonl").put_many([])
    assert not (tmp_path / "rows.jsonl").exists()


def test_all_pairs_go_into_one_write(tmp_path, monkeypatch):
    sizes = []

    class Counting(io.FileIO):
        def write(self, data):
            sizes.append(len(data))
            return super().write(data)

    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Counting(self, mode.replace("b", "")))
    Store(path).put_many([(f"key{number}", "x" * 5000) for number in range(50)])
    monkeypatch.undo()
    assert sizes == [path.stat().st_size]


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_last_line_is_passed_over_and_closed(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    Store(path).put_many([("z", 0)])
    Store(path).put_many([("a", 1), ("b", 22)])
    path.write_bytes(path.read_bytes()[:-cut])
    store = reopened(path)
    # Only the line end was lost after a cut of one; any other takes both, as they were put in at once.
    assert [store.get(name) for name in "zab"] == [0, *([1, 22] if cut == 1 else [None, None])]
    store.put_many([("c", 3)])
    again = reopened(path)
    assert [again.get(name) for name in "zabc"] == [*(store.get(name) for name in "zab"), 3]


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\x00\x00\n[1]\n{"values": 3, "seconds": 1}\n{"values": {"a": 2}}\n5\n\xff\xfe\n\n'
        b'{"values": {}, "seconds": 1}\n'
        b'{"values": {"a": 1}, "seconds": 0}\n'
    )
    assert reopened(path).get("a") == 1


def test_a_neighbours_torn_line_does_not_eat_ours(tmp_path):
    path = tmp_path / "rows.jsonl"
    store = Store(path)
    store.put_many([("a", 1)])
    with path.open("ab") as file:
        file.write(b'{"values":{"kil')
    store.put_many([("b", 2)])
    assert (reopened(path).get("a"), reopened(path).get("b")) == (1, 2)


def test_several_processes_append_to_one_store(tmp_path):
    path = tmp_path / "rows.jsonl"
    program = (
        "import sys; from pathlib import Path; from ecoprompt.results import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for n in range(40): store.put_many([(f'{sys.argv[2]}-{n}-{m}', 'x' * 500) for m in range(5)])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(results.__file__).parents[1])}
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(path), name], env=environment) for name in ("a", "b", "c")
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(reopened(path)) == 3 * 40 * 5


def test_a_key_depends_on_content_not_on_order():
    assert key(a=1, b={"c": 2, "d": [1, 2]}) == key(b={"d": (1, 2), "c": 2}, a=1)
    assert key(a=1) != key(a=2) != key(b=2)
    # SHA-256 of the two characters {}, as any other tool gives it.
    assert key() == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_the_cost_of_training_stands_beside_what_came_of_it_and_only_there(tmp_path):
    cost = {"seconds": 61.25, "tokens": 38504, "peak_memory_mib": 552.4}
    of = {"retain": ("models/retain90", cost), "original": (None, {}), "npo": ("baselines/npo", {**cost, "tokens": 7})}
    runs = {name: {"metrics": {"a": 0.5}, "model": model, "training": cost} for name, (model, cost) in of.items()}
    runs["eco"] = runs["retain"]
    summary = {"recipe": "costs", "runs": runs}
    assert cost_cells_of(summary) == [
        ["trained model", "seconds", "tokens", "memory MiB"],
        ["retain90", "61.2", "38504", "552"],
        ["npo", "61.2", "7", "552"],
    ]
    assert [" ".join(line.split()) for line in shown(*cost_tables(summary)).splitlines()[2:]] == [
        "retain90 61.2 38504 552",
        "npo 61.2 7 552",
    ]
    csv_file, markdown, *_ = write_results(tmp_path, summary, [])
    lines = [line.split(",") for line in csv_file.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == ["run", "a", "training_seconds", "training_tokens", "training_peak_memory_mib", "seconds"]
    assert lines[2:4] == [["original", "0.5", "", "", "", ""], ["npo", "0.5", "61.25", "7", "552.4", ""]]
    assert "| npo | 61.2 | 7 | 552 |" in markdown.read_text(encoding="utf-8")
    runs |= dict.fromkeys(runs, {"metrics": {"a": 0.5}, "model": "models/retain90"})
    assert (cost_cells_of(summary), cost_tables(summary)) == ([], [])
    csv_file, markdown, *_ = write_results(tmp_path, summary, [])
    assert "training" not in csv_file.read_text(encoding="utf-8")
    assert "trained" not in markdown.read_text(encoding="utf-8")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def fill(path, kind):
    """Writes more than 64 KiB in the way of each library."""
    if kind == "torch":
        torch.save({"a": torch.zeros(1 << 16)}, path)
    elif kind == "safetensors":
        save_file({"a": torch.zeros(1 << 16)}, path)
    elif kind == "tokenizers":
        vocabulary = {str(number): number for number in range(1 << 14)}
        tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="0")).save(str(path))
    elif kind == "store":
        Store(path).put_many([("a", "b" * (1 << 17))])
    else:
        write_text_atomic(path, "b" * (1 << 17))


@pytest.mark.parametrize("kind", ["torch", "safetensors", "tokenizers", "store", "text"])
def test_a_full_disk_is_the_same_error_whoever_writes(small_disk, kind):
    path = small_disk / "deep" / "file"
    with pytest.raises(OSError, match=str(path)) as raised, writing(path):
        fill(path, kind)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))


def test_what_has_to_do_with_no_disk_stays_what_it_was(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path / "file"):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(OSError, match="other") as raised, writing(tmp_path / "file"):
        raise FileNotFoundError(errno.ENOENT, "no such file", "other")
    assert raised.value.filename == "other"


def test_a_key_of_what_is_not_json_is_refused():
    with pytest.raises(TypeError):
        key(a=object())


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.txt"
    write_text_atomic(path, "first é\n")
    assert path.read_bytes() == "first é\n".encode()

    def fail(self, target):
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_text_atomic(path, "second")
    assert path.read_bytes() == "first é\n".encode()
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_what_a_killed_process_left_half_written_goes_with_the_next_writing(tmp_path):
    path, long_ago = tmp_path / "a[1].txt", time.time() - 3600
    left, fresh, other = (tmp_path / name for name in (".a[1].txt.17", ".a[1].txt.18", ".a[1].txt.old"))
    for file in (left, fresh, other):
        file.write_text("half")
    for file in (left, other):
        os.utime(file, (long_ago, long_ago))
    write_text_atomic(path, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, fresh, other])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.000"),
        (1.0, "1.000"),
        (0.98765, "0.988"),
        (-0.5, "-0.500"),
        (0.001, "0.001"),
        (0.00099, "9.9e-04"),
        (1.06e-239, "1.1e-239"),
        (1234567.0, "1.2e+06"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (400, "400"),
        (np.float64(0.25), "0.250"),
    ],
)
def test_numbers_are_short_and_small_ones_scientific(value, text):
    assert number(value) == text


def test_json_is_strict_and_plain():
    document = {"a": math.nan, "b": (np.float64(1.5), np.int64(2)), 3: Path("x"), "c": np.array([1.0, math.inf])}
    text = to_json(document | {"d": {"é"}, "e": True})
    assert "é" in text
    expected = {"a": None, "b": [1.5, 2], "3": "x", "c": [1.0, None], "d": ["é"], "e": True}
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == expected


def test_the_terminal_table_shows_runs_chosen_metrics_and_directions():
    text = shown(table(SUMMARY))
    assert "tofu-mini: tofu/forget10" in text
    assert "quality ↑" in text
    assert "rouge ≈" in text
    for cell in ("1.000", "1.1e-239", "0.617", "0.984", "12.3", "–"):
        assert cell in text
    assert "truth ratio" not in text
    assert "↑ higher is better, ≈ closer to retain is better" in text
    assert "↓" not in text


def test_a_run_name_in_brackets_is_no_markup():
    assert "eco[corruption.strength=5]" in shown(table(SUMMARY), width=120)


def test_a_narrow_terminal_folds_names_but_cuts_no_number():
    text = shown(table(SUMMARY), width=56)
    assert max(map(len, text.splitlines())) <= 56
    assert "1.1e-239" in text
    assert "…" not in text


def test_the_columns_of_the_table_can_be_chosen():
    text = shown(table({**SUMMARY, "columns": ["retain_truth_ratio"]}))
    assert "nan" in text
    assert "quality" not in text
    assert "↓ lower is better" in text


def test_without_choice_direction_or_times_all_metrics_are_shown():
    bare = {"runs": {"retain": {"metrics": {"rouge": 0.5}}, "eco": {"metrics": {"probability": 0.25}}}}
    text = shown(table(bare))
    for cell in ("rouge", "probability", "0.500", "0.250"):
        assert cell in text
    assert "seconds" not in text
    assert "better" not in text


def test_answers_stand_side_by_side():
    answers = {"original": ["Blue [red]", " In Oslo.\n"], "eco[corruption.strength=5]": ["No idea.", "  "]}
    text = shown(side_by_side(["What colour?", "Where?"], answers, ["Blue", "Oslo"]))
    first = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert first == ["prompt", "true", "original", "eco[corruption.strength=5]"] * 2
    for part in ("true answer", "Blue [red]", "In Oslo.", "No idea.", "(nothing)", "eco[corruption.strength=5]"):
        assert part in text


def test_all_files_are_written(tmp_path):
    paths = write_results(tmp_path / "out", SUMMARY, [{"run": "eco", "index": 0, "rouge": math.nan, "text": "é"}])
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"table.csv", "table.md", "summary.json", "rows.jsonl"} <= {path.name for path in paths}

    text = (tmp_path / "out" / "table.csv").read_text(encoding="utf-8")
    cells = list(csv.DictReader(io.StringIO(text)))
    assert [row["run"] for row in cells] == list(SUMMARY["runs"])
    assert cells[1]["forget_quality"] == "1.06e-239"
    assert cells[1]["seconds"] == cells[2]["forget_quality"] == cells[0]["gate_false_positives"] == ""
    assert cells[2]["gate_false_positives"] == "0.001"
    assert "gate_kind" not in cells[0]

    document = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert document["runs"]["original"]["metrics"]["forget_quality"] == 1.06e-239
    assert document["runs"]["eco[corruption.strength=5]"]["metrics"]["retain_truth_ratio"] is None
    assert document["resolved"] == {"path": "a/b", "value": 0.5, "values": [0, 1, 2]}

    (row,) = (tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(row) == {"run": "eco", "index": 0, "rouge": None, "text": "é"}


def test_the_markdown_tables_are_whole(tmp_path):
    summary = {**SUMMARY, "runs": SUMMARY["runs"] | {"a|b": {"metrics": {"x_y": 1.0}}}}
    write_results(tmp_path, summary, [])
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# tofu-mini: tofu/forget10"
    assert "| run | forget quality ↑ | model utility | forget rouge ≈ | seconds |" in lines
    assert "| original | 1.1e-239 | 0.623 | 0.984 | – |" in lines
    assert "| metric | retain | original | eco[corruption.strength=5] | a\\|b |" in lines
    assert "| retain truth ratio ↓ | – | – | nan | – |" in lines
    assert "| gate: false positives | – | – | 0.001 | – |" in lines
    assert (tmp_path / "rows.jsonl").read_text() == ""


def test_standard_errors_stand_beside_the_values_where_there_is_room(tmp_path):
    runs = {"eco": {"metrics": {"x": 0.5, "y": 0.25}, "errors": {"x": 0.0125, "y": math.nan}}}
    assert cells_of({"runs": runs}) == [["run", "x", "y", "seconds"], ["eco", "0.500 ± 0.013", "0.250", "–"]]
    write_results(tmp_path, {"runs": runs}, [])
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("0.500 ± 0.013") == 2
    assert "0.500±0.013" in shown(table({"runs": runs}))


def test_differences_to_the_original_run_stand_with_their_intervals(tmp_path):
    runs = {
        "original": {"metrics": {"x": 0.5, "y": 1.0}, "paired": None},
        "eco": {"metrics": {"x": 0.25}, "paired": {"x": {"difference": -0.25, "low": -0.5, "high": 0.0, "p": 0.05}}},
        "nan": {
            "metrics": {"x": None},
            "paired": {"x": {"difference": None, "low": math.nan, "high": None, "p": None}},
        },
    }
    rows = [["difference to the original run", "eco", "nan"], ["x", "-0.250 (-0.500 to 0.000)", "– (nan to –)"]]
    assert paired_cells_of({"runs": runs}) == rows
    write_results(tmp_path, {"runs": runs}, [])
    assert "| x | -0.250 (-0.500 to 0.000) |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert paired_cells_of(SUMMARY) == []


def test_latex_is_booktabs_with_everything_escaped():
    runs = {r"a&b%c$d#e_f{g}~^\ ": {"metrics": {"forget_x": 1.06e-239, "y": 1234567.0}, "errors": {"forget_x": 0.5}}}
    printed = FORMATS["latex"]({"runs": runs, "better": {"forget_x": "higher", "y": "closer to retain"}})
    escaped = r"a\&b\%c\$d\#e\_f\{g\}\textasciitilde{}\textasciicircum{}\textbackslash{} "
    assert printed.splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"run & forget x $\uparrow$ & y $\approx$ & seconds \\",
        r"\midrule",
        escaped + r" & $1.1 \times 10^{-239}$ $\pm$ 0.500 & $1.2 \times 10^{6}$ & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_the_formats_are_those_of_the_command():
    assert set(cli.FORMATS) == set(FORMATS)
    assert list(csv.DictReader(io.StringIO(FORMATS["csv"](SUMMARY))))[1]["forget_quality"] == "1.06e-239"
    assert FORMATS["markdown"](SUMMARY).splitlines()[3] == "| original | 1.1e-239 | 0.623 | 0.984 | – |"


GENERAL = "mmlu arc_easy arc_challenge commonsenseqa hellaswag openbookqa truthfulqa winogrande piqa social_i_qa boolq"


@pytest.mark.parametrize("width", [40, 80, 130])
def test_many_runs_and_columns_fit_the_terminal_and_no_number_is_cut(width):
    names = [f"{name}_accuracy" for name in GENERAL.split()] + ["a_metric_of_unreasonablelengthindeed"]
    runs = {
        f"eco[corruption=zero_out_top_k dims={dims}%,seed={dims}]": {
            "metrics": {name: (number_ + dims) * 10.0 ** -(number_ * dims) for number_, name in enumerate(names)},
            "seconds": 12345.6,
        }
        for dims in range(1, 13)
    }
    text = shown(table({"recipe": "general", "runs": runs, "better": dict.fromkeys(names, "higher")}), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for run in runs.values():
        for value in run["metrics"].values():
            assert re.search(rf"(?<!\S){re.escape(number(value))}(?!\S)", text)
    assert text.count("accuracy ↑") == 11
    assert len({line.count("seconds") for line in text.splitlines()} - {0}) == 1
    assert "↑ higher is better" in text


def test_columns_that_fit_stand_in_one_table():
    columns = {f"metric_{number_}": 0.5 for number_ in range(6)}
    text = shown(table({"runs": {"eco[corruption.strength=0.125]": {"metrics": columns}}}), 80)
    assert sum(line.startswith("run") for line in text.splitlines()) == 1
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(("columns", "shown_errors"), [(4, True), (6, False)])
def test_standard_errors_are_shown_where_they_fit(columns, shown_errors):
    names = [f"metric_{number_}" for number_ in range(columns)]
    values = {"metrics": dict.fromkeys(names, 0.25), "errors": dict.fromkeys(names, 0.0125), "seconds": 1.5}
    exact = {"metrics": dict.fromkeys(names, 0.5), "errors": dict.fromkeys(names, math.nan)}
    text = shown(table({"runs": {"eco-zero-out": values, "original": exact}}))
    assert max(map(len, text.splitlines())) <= 80
    assert sum(line.startswith("run") for line in text.splitlines()) == 1
    assert text.count("0.250±0.013" if shown_errors else " 0.250 ") == text.count("0.500") == columns
    assert ("± standard error" in text) == shown_errors == ("±" in text)


def test_the_other_tables_fit_too():
    measured = [
        {"data": "retain set, without punctuation, in upper case", "prompts": 30000, "errors": 12, "flag": False}
    ]
    compared = {
        "a": "results/one",
        "b": "results/two",
        "rows": {"both": 12345, "a_alone": 1234567, "b_alone": 0},
        "better": {"forget_quality_folded": "higher"},
        "runs": {
            "eco": {
                "forget_quality_folded": {
                    "a": 1e-9,
                    "b": 2e-9,
                    "difference": 1e-9,
                    "interval": [-1.5e-9, 3.5e-9],
                    "p": 1e-12,
                    "rows": 12345,
                },
                "x": {"a": None, "b": 0.5, "difference": None, "interval": None, "p": None, "rows": None},
            }
        },
    }
    for one in (gate_table(measured, 0.5), *comparison_tables(compared)):
        text = shown(one)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
    text = "".join(map(shown, comparison_tables(compared)))
    for cell in ("A: results/one", "forget quality", "-1.5e-09 to 3.5e-09", "1.0e-12", "12345", "B - A"):
        assert cell in text
