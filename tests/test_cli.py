"""`cli.py`: streams, JSON, dry runs, exit statuses, interruption."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ecoprompt
from ecoprompt import pack as pack_module
from ecoprompt import recipe, terminal
from ecoprompt.cli import app
from ecoprompt.evaluate import Evaluated
from ecoprompt.results import FORMATS, write_results
from ecoprompt.tables import table

INTERRUPTIBLE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ecoprompt.cli import main; main()"
)
SMALL = ["--set", "evaluate.limit=6", "--set", "model.batch_tokens=600"]
runner = CliRunner()
ROOM = "make room and start the same again: what was finished is kept"
FULL = f"No space left on device; {ROOM}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": 120, **options}
    return subprocess.run(
        [sys.executable, "-m", "ecoprompt", *arguments], capture_output=True, text=True, encoding="utf-8", **options
    )


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"ecoprompt {ecoprompt.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["chat", "-h"], ["evaluate", "-h"]])
def test_help_is_a_result(arguments: list[str]) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")
    assert result.stderr == ""
    assert "..." not in result.stdout.partition("\n")[2]  # nothing is cut
    assert "range>" not in result.stdout


def test_every_command_has_its_help() -> None:
    listed = runner.invoke(app, ["-h"]).stdout.partition("Commands:")[2]
    for name in ("train-classifier", "evaluate", "chat"):
        assert re.search(rf"^  {name} +\S.*\.$", listed, re.MULTILINE)


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        assert command("--help").returncode == 0
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize(("columns", "widest"), [("", 1000), ("80", 80), ("wide", 1000)])
def test_a_table_on_a_pipe_is_as_wide_as_columns_says(monkeypatch, capsys, columns: str, widest: int) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    metrics = {f"metric_number_{number}": 1.0 for number in range(20)}
    terminal.show(table({"recipe": "many", "runs": {"eco": {"metrics": metrics}}}))
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= widest
    assert sum(line.startswith("eco") for line in printed) == (1 if widest == 1000 else 3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Usage:"),
        (["evalaute"], "No such command 'evalaute'. Did you mean 'evaluate'?"),
        (["evaluate"], "Missing argument 'RECIPE'"),
        (["evaluate", "quickstart", "--format", "html"], "'--format': 'html' is not one of 'latex', 'markdown', 'csv'"),
        (["evaluate", "--compare", "a"], "requires 2 arguments"),
        (["evaluate", "quickstart", "--jsn"], "No such option: --jsn"),
        (["evaluate", "quickstart", "--set"], "'--set' requires an argument"),
        (["chat"], "Missing option '--model'"),
        (["chat", "--model", "quickstart", "--seed", "x"], "'--seed': found 'x', expected a whole number from 0 to"),
        (["chat", "--model", "quickstart", "--temperature", "nan"], "found 'nan', expected a number from 0 to 100"),
        (["chat", "--model", "quickstart", "--max-new-tokens", "0"], "expected a whole number of at least 1"),
        (["evaluate", "quickstart", "--output", __file__], "is a file"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], told: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("Error:") == bool(arguments)
    assert result.stdout == ""


GATES = [name for name in recipe.shipped() if name.startswith("gate-")]
EXPERIMENTS = [name for name in recipe.shipped() if name not in GATES]


@pytest.mark.parametrize("name", [*GATES, *(f"recipes/{name}.toml" for name in GATES)])
def test_dry_run_of_every_shipped_recipe_of_a_gate(folder: Path, name: str) -> None:
    result = runner.invoke(app, ["train-classifier", name, "--dry-run"])
    assert (result.exit_code, result.stderr) == (0, "")
    printed = tomllib.loads(result.stdout)  # what is no TOML is a comment
    assert printed["name"] == Path(name).stem
    for benchmark in (printed["data"]["forget"].partition("/")[0], *printed["data"]["checks"]):
        assert f"# rows of {benchmark}: " in result.stdout
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", [*EXPERIMENTS, *(f"recipes/{name}.toml" for name in EXPERIMENTS)])
def test_dry_run_of_every_shipped_recipe(folder: Path, name: str) -> None:
    stem = Path(name).stem
    result = runner.invoke(app, ["evaluate", name, "--dry-run"])
    assert (result.exit_code, result.stderr) == (0, "")
    printed = tomllib.loads(result.stdout)  # what is no TOML is a comment
    assert printed["name"] == stem
    assert printed["gate"]["threshold"]
    assert f"# rows of {printed['evaluate'][0]['benchmark']}: " in result.stdout
    assert "# devices: " in result.stdout
    document = json.loads(runner.invoke(app, ["evaluate", name, "--dry-run", "--json"]).stdout)
    tables = {"optimize": "search", "finetune": "finetune", "baseline": "baseline"}
    planned = {told for table, told in tables.items() if table in printed}
    assert set(document) == {"recipe", "runs", "rows", "fetches", "devices"} | planned
    assert {name.partition("[")[0] for name in document["runs"]} == set(printed["run"])
    for name, run in document["runs"].items():
        assert f"# run {name}: " in result.stdout
        assert run["guarded"] == name.startswith("eco")
    assert list(folder.iterdir()) == []


def test_a_dry_run_of_a_gate_alone_says_nothing_of_the_evaluation(folder: Path) -> None:
    result = runner.invoke(app, ["train-classifier", "quickstart-search", "--dry-run"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert (
        {"data", "gate", "tokens", "corruption"}
        <= set(tomllib.loads(result.stdout))
        <= {*("name", "seed", "model", "data", "gate", "tokens", "corruption")}
    )
    assert [line.partition(":")[0] for line in result.stdout.splitlines() if line.startswith("#")] == [
        "# rows of quickstart",
        "# devices",
    ]
    planned = json.loads(runner.invoke(app, ["train-classifier", "wmdp", "--dry-run", "--json"]).stdout)
    assert (planned["runs"], planned["fetches"][-1]) == ({}, "chrisliu298/wmdp_classifier")
    (folder / "bare.toml").write_text("seed = 1\n", encoding="utf-8")
    refused = runner.invoke(app, ["train-classifier", "bare.toml", "--dry-run"])
    assert (refused.exit_code, refused.stderr.count("needs [data] forget")) == (2, 1)


def test_what_a_dry_run_prints_is_a_recipe_that_does_the_same(folder: Path) -> None:
    first = runner.invoke(app, ["evaluate", "quickstart", "--dry-run"]).stdout
    (folder / "again.toml").write_text(first, encoding="utf-8")
    assert runner.invoke(app, ["evaluate", "again.toml", "--dry-run"]).stdout == first


def test_the_device_plan_needs_no_torch() -> None:
    code = "import sys; from ecoprompt.cli import app; app(standalone_mode=False); print('torch' in sys.modules)"
    arguments = [sys.executable, "-c", code, "evaluate", "tofu", "--dry-run"]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "False"


def test_debug_shows_the_traceback_and_nothing_else_does() -> None:
    plain, debug = command("evaluate", "nope"), command("evaluate", "nope", "--debug")
    assert plain.returncode == 2
    assert plain.stderr.startswith("ecoprompt: nope: there is no such ")
    assert plain.stderr.count("\n") == 1
    assert debug.stderr.startswith("Traceback")
    assert debug.stderr.endswith(plain.stderr)
    assert debug.returncode == 2


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (RuntimeError("boom"), 1, "ecoprompt: RuntimeError: boom (--debug shows where)\n"),
        (PermissionError(13, "Permission denied", "there"), 1, "ecoprompt: there: Permission denied (--debug"),
        (OSError("odd"), 1, "ecoprompt: OSError: odd (--debug shows where)\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, f"ecoprompt: a/b: {FULL}\n"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, f"ecoprompt: Disk quota exceeded; {ROOM}\n"),
        (ecoprompt.EcopromptError("no luck"), 1, "ecoprompt: no luck\n"),
        (ecoprompt.InputError("one", "two"), 2, "ecoprompt: one\necoprompt: two\n"),
        (KeyboardInterrupt(), 130, "ecoprompt: interrupted; what was finished is kept\n"),
    ],
)
def test_an_error_is_a_message_and_a_status(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, told: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(recipe, "load_recipe", fail)
    result = runner.invoke(app, ["evaluate", "quickstart"])
    assert result.exit_code == status
    assert result.stderr.startswith(told)
    assert result.stdout == ""
    debug = runner.invoke(app, ["evaluate", "quickstart", "--debug"])
    assert debug.exit_code == status
    assert debug.stderr.endswith(result.stderr)
    assert ("Traceback" in debug.stderr) == isinstance(error, Exception)


@pytest.mark.parametrize("name", ["train-classifier", "evaluate"])
def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "quickstart").write_text("a file where the results are to be")
    result = runner.invoke(app, [name, "quickstart", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr == f"ecoprompt: {tmp_path / 'quickstart'}: Not a directory; --output DIR writes elsewhere\n"


def test_ctrl_c_waits_until_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's C++ code aborts the process if it meets a KeyboardInterrupt while it is being initialised."""
    module = types.ModuleType("torch")
    module.__spec__ = types.SimpleNamespace(_initializing=True)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "torch", module)
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    terminal.interrupt(signal.SIGINT, None)
    deadline = time.monotonic() + 10
    while not raised and time.monotonic() < deadline:
        time.sleep(0.01)
    assert raised == [signal.SIGINT]
    module.__spec__ = None
    with pytest.raises(KeyboardInterrupt):
        terminal.interrupt(signal.SIGINT, None)


def test_a_full_disk_is_one_message() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        arguments = [sys.executable, "-m", "ecoprompt", "evaluate", "quickstart", "--dry-run"]
        result = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, f"ecoprompt: {FULL}\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, "-m", "ecoprompt", "evaluate", "quickstart", "--dry-run"]
    result = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_of_a_table_that_leaves_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        terminal.console().print("a table")


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_is_an_empty_one(stream: str) -> None:
    number = {"stdin": "0", "stdout": "1", "stderr": "2"}[stream]
    line = f'"$0" -m ecoprompt evaluate quickstart --dry-run {number}>&-'
    result = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def printed(stream: io.StringIO) -> str:
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.console().print("[red]x[/red]")
        return stream.getvalue()

    assert printed(Screen()) == "\x1b[31mx\x1b[0m\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert printed(io.StringIO()) == "x\n"
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(Screen()) == "x\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of results after `train-classifier`, and what `--json` printed; test_chat.py uses the same."""
    folder = tmp_path_factory.getbasetemp() / "quickstart"
    if not folder.exists():
        result = runner.invoke(app, ["train-classifier", "quickstart", "--output", str(folder / "results"), "--json"])
        assert (result.exit_code, result.stderr) == (0, "")
        (folder / "printed.json").write_text(result.stdout, encoding="utf-8")
    return folder / "results", json.loads((folder / "printed.json").read_text(encoding="utf-8"))


def test_train_classifier_prints_its_errors_and_the_pack(
    trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, document = trained
    pack = output / "quickstart" / "pack"
    assert document["pack"] == str(pack)
    assert document["threshold"] == 0.5
    assert {"data", "flag", "prompts", "errors"} <= set(document["measured"][0])
    assert {path.name for path in pack.iterdir()} - {"tradeoff.png"} == {"forget.toml", "gate", "README.md"}
    gate = pack_module.TrainedGate(gate=None, threshold=0.5, measured=document["measured"])  # type: ignore[arg-type]
    monkeypatch.setattr(pack_module, "train_classifier", lambda *arguments: (pack, gate))
    result = runner.invoke(app, ["train-classifier", "quickstart"])
    assert (result.exit_code, result.stderr) == (0, "note: the gate was trained on the first two sets\n")
    assert result.stdout.splitlines()[-1] == str(pack)
    assert "forget set" in result.stdout
    assert "\x1b" not in result.stdout


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """A command that SIGINT reaches even where the test runner itself ignores it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
    return subprocess.Popen([sys.executable, "-c", INTERRUPTIBLE, *arguments], env=environment, **options)


def stored(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def test_interrupted_in_the_middle_it_goes_on_where_it_was(folder: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    """And what it prints: with stderr on a terminal and stdout on a pipe, progress there and one JSON document here."""
    shutil.copytree(trained[0], folder / "results")
    scores = folder / "results" / "quickstart" / "scores.jsonl"
    process = start("evaluate", "quickstart", *SMALL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while len(stored(scores)) < 20 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (out, err) == (b"", b"ecoprompt: interrupted; what was finished is kept\n")
    kept = stored(scores)
    assert len(kept) >= 20
    assert not (scores.parent / "summary.json").exists()

    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def watch() -> None:
        with contextlib.suppress(OSError):  # how Linux says that the terminal's other side is closed
            while piece := os.read(ours, 4096):
                seen.append(piece)

    watcher = threading.Thread(target=watch)
    process = start("evaluate", "quickstart", *SMALL, "--json", stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    watcher.start()
    out, _ = process.communicate(timeout=90)
    watcher.join()
    os.close(ours)
    assert process.returncode == 0
    after = stored(scores)
    assert after[: len(kept)] == kept
    keys = [key for line in after for key in json.loads(line)["values"]]
    assert len(set(keys)) == len(keys)  # nothing was computed twice
    bar = b"".join(seen).decode()
    assert "eco: " in bar
    assert bar.endswith("\x1b[2K")  # it vanishes
    check_json(out.decode())

    again = runner.invoke(app, ["evaluate", "quickstart", *SMALL])
    assert (again.exit_code, "\x1b" in again.output) == (0, False)
    assert again.stderr.startswith("written: results/quickstart/table.csv, ")
    assert again.stderr.count("\n") == 1
    lines = again.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("retain", "original", "eco"))] == [
        "retain",
        "original",
        "eco",
    ]
    assert again.stdout.count("true answer") == 3
    assert all(line == line.rstrip() for line in lines)  # nothing fills a line up, and a row is a line
    assert stored(scores) == after


def check_json(text: str) -> None:
    """One document with the keys that scripts rely on."""
    document = json.loads(text)
    assert document["recipe"] == "quickstart"
    assert list(document["runs"]) == ["retain", "original", "eco"]
    needed = {"forget_quality", "model_utility", "forget_rouge", "forget_probability", "forget_truth_ratio"}
    for name, run in document["runs"].items():
        assert {*needed, "forget_quality_folded", "retain_rouge"} <= set(run["metrics"])
        assert run["seconds"] > 0
        assert (run["gate"] is not None) == (name == "eco")
    assert {"false_negatives", "false_positives", "threshold"} <= set(document["runs"]["eco"]["gate"])
    metrics = {name: run["metrics"] for name, run in document["runs"].items()}
    assert metrics["eco"]["model_utility"] == pytest.approx(metrics["original"]["model_utility"], abs=5e-4)


def test_a_point_of_a_sweep_is_a_run(folder: Path) -> None:
    sweep = ["--set", 'sweep={"corruption.strength"=[1, 5]}', "--dry-run", "--json"]
    document = json.loads(runner.invoke(app, ["evaluate", "quickstart", *sweep]).stdout)
    assert list(document["runs"]) == [
        "retain",
        "original",
        "eco[corruption.strength=1]",
        "eco[corruption.strength=5]",
    ]


@pytest.fixture
def evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluated:
    """What an evaluation of the quick start found, made up here, so that none is run."""
    metrics = {"forget_quality": 0.25, "model_utility": 0.5}
    summary = {
        "runs": {name: {"metrics": metrics, "seconds": 1.0, "gate": None} for name in ("retain", "eco")},
        "better": dict.fromkeys(metrics, "higher"),
        "resolved": {"seed": 0},
        "versions": {},
        "hardware": {"machine": "", "threads": 1, "gpus": []},
        **{"recipe": "quickstart", "forget": None, "seed": 0},
    }
    place = {"benchmark": "b", "subset": "s", "index": 0, "forget": True, "prompt": "Q", "target": "A"}
    rows = [{"run": run, **place, "flagged": False, "values": {"rouge": 0.5}} for run in summary["runs"]]
    found = Evaluated(summary, rows, write_results(folder / "results" / "quickstart", summary, rows))
    monkeypatch.setattr("ecoprompt.evaluate.evaluate", lambda *arguments: found)
    return found


@pytest.mark.parametrize("form", ["latex", "markdown", "csv"])
def test_the_table_is_printed_in_a_format_and_nothing_else(evaluated: Evaluated, form: str) -> None:
    result = runner.invoke(app, ["evaluate", "quickstart", "--format", form])
    assert (result.exit_code, result.stdout) == (0, FORMATS[form](evaluated.summary))
    assert result.stderr.startswith("written: ")


def test_the_report_is_written_on_request(evaluated: Evaluated) -> None:
    result = runner.invoke(app, ["evaluate", "quickstart", "--report", "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["recipe"] == "quickstart"
    assert "<title>quickstart</title>" in Path("results/quickstart/report.html").read_text(encoding="utf-8")


def test_two_results_are_compared(evaluated: Evaluated) -> None:
    both = ["evaluate", "--compare", "quickstart", "results/quickstart"]
    result = runner.invoke(app, both)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "A: results/quickstart" in result.stdout
    assert "forget quality ↑  0.250  0.250  0.000" in result.stdout
    document = json.loads(runner.invoke(app, [*both, "--json"]).stdout)
    assert document["runs"]["eco"]["forget_quality"]["difference"] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--compare", "nowhere", "nowhere"], "ecoprompt: --compare nowhere: found no results"),
        (["quickstart", "--compare", "quickstart", "quickstart"], "expected --output or --json alone"),
        (["--compare", "quickstart", "quickstart", "--report"], "expected --output or --json alone"),
        (["quickstart", "--json", "--format", "csv"], "--json and --format: expected one of the two"),
    ],
)
def test_what_does_not_go_together_is_one_message(evaluated: Evaluated, arguments: list[str], told: str) -> None:
    result = runner.invoke(app, ["evaluate", *arguments])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert told in result.stderr
