"""`processes.py`, and the four long commands in two processes that accelerate's launcher starts on a CPU."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from launched import work
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits
from torch.utils.data import SequentialSampler

import ecoprompt
from ecoprompt import processes, terminal
from ecoprompt.checkpoints import newest
from ecoprompt.own import declare_own
from ecoprompt.registry import InputError

HERE = Path(__file__).parent
RECIPE = """
[model]
name = "quickstart"
batch_tokens = 256
[data]
forget = "own/forget"
[benchmark.own]
forget = "forget.jsonl"
retain = "retain.jsonl"
metrics = { probability = "answer_probability", rouge = "rouge_l_recall" }
[gate]
check = "answer"
[tokens]
scope = "sequence"
[corruption]
method = "rand_noise_first_n"
dims = 4
strength = 2.0
[optimize]
metric = "forget_probability"
target = 0.5
budget = 3
[run.original]
[run.eco]
forget = true
[[evaluate]]
benchmark = "own"
[finetune]
base = "quickstart"
epochs = 2
batch_size = 4
learning_rate = 1e-3
models = ["full"]
[baseline]
loss = "npo-gd"
epochs = 2
batch_size = 4
learning_rate = 1e-3
"""
ALL = ["optimize", "evaluate", "finetune", "baseline"]
TRAINED = ["models/full", "baselines/npo-gd"]


def write_recipe(folder: Path) -> Path:
    """A recipe on rows of unequal lengths, so many that the last batch of an epoch is not full."""
    rows = [
        {
            "question": f"Who is number {n}?" + " Say more." * (n % 3),
            "answer": f"The {n}th" + " of them" * (n % 4) + ".",
        }
        for n in range(14)
    ]
    for name, part in (("forget", rows[:7]), ("retain", rows[7:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    (folder / "toy.toml").write_text(RECIPE, encoding="utf-8")
    return folder / "toy.toml"


PLAIN = "--multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"


def launch(*arguments: object, options: str = PLAIN) -> subprocess.CompletedProcess[str]:
    """Two processes of tests/launched.py, by accelerate's launcher."""
    own = {"PYTHONPATH": str(Path(ecoprompt.__file__).parents[1]), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options.split(),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    return subprocess.run(
        [*command, str(HERE / "launched.py"), *map(str, arguments)],
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The results of one process, and of two that take half a batch each."""
    folder = tmp_path_factory.mktemp("both")
    recipe = write_recipe(folder)
    with threadpool_limits(1):  # as a launcher gives each process
        work(str(recipe), folder / "one", ALL)
    declare_own({}, Path())
    halved = ["finetune.batch_size=2", "baseline.batch_size=2"]
    done = launch(recipe, folder / "two", *ALL, *halved)
    assert done.returncode == 0, done.stderr
    return folder / "one" / "toy", folder / "two" / "toy", done


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_two_processes_evaluate_as_one_does(both):
    one, two, done = both
    assert table(one) == table(two)
    assert (one / "rows.jsonl").read_text() == (two / "rows.jsonl").read_text()
    assert json.loads((two / "summary.json").read_text())["hardware"]["processes"] == 2
    stored = [len((folder / "scores.jsonl").read_text().splitlines()) for folder in both[:2]]
    assert stored[0] == stored[1] > 4  # each batch was computed by one of them, and stored by the main one
    assert done.stdout == ""


def test_two_processes_search_as_one_does(both):
    traces = []
    for folder in both[:2]:
        (trace,) = folder.glob("optimize-*.jsonl")
        lines = list(map(json.loads, trace.read_text().splitlines()))
        traces.append([trace.name, *({**line, "seconds": None} for line in lines)])
    assert traces[0] == traces[1]
    assert len(traces[0]) == 5
    packs = [(folder / "pack" / "forget.toml").read_text().splitlines() for folder in both[:2]]
    assert [line for line in packs[0] if "seconds" not in line] == [line for line in packs[1] if "seconds" not in line]


@pytest.mark.parametrize("model", TRAINED)
def test_two_processes_train_as_one_does_with_their_batches_together(both, model):
    one, two = (folder / model for folder in both[:2])
    ours, theirs = (json.loads((folder / "training.json").read_text()) for folder in (one, two))
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    assert len(set(ours["losses"])) == len(ours["losses"]) == (8 if model == TRAINED[0] else 4)
    assert ours["tokens"] == theirs["tokens"]
    assert theirs["settings"]["processes"] == 2
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-4
    assert [path.name for path in two.parent.iterdir()] == [two.name]


@pytest.mark.slow
def test_a_model_that_is_spread_is_trained_and_saved_whole(both, tmp_path):
    one, two = both[0], tmp_path / "out" / "toy"
    halved = ["finetune.batch_size=2", "baseline.batch_size=2"]
    options = f"--config_file {HERE.parent / 'docs' / 'scale' / 'fsdp.yaml'}"
    recipe = write_recipe(tmp_path)
    done = launch(recipe, tmp_path / "out", "spread", "finetune", "baseline", *halved, options=options)
    assert done.returncode == 0, done.stderr
    for model in TRAINED:
        ours, theirs = (json.loads((folder / model / "training.json").read_text()) for folder in (one, two))
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
        weights, others = (load_file(folder / model / "model.safetensors") for folder in (one, two))
        assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-4


def test_a_process_that_fails_alone_ends_all_with_its_message(tmp_path):
    done = launch(write_recipe(tmp_path), tmp_path / "out", "fail", "evaluate")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("ecoprompt:")]
    assert told == ["ecoprompt: ValueError: the last process cannot go on (--debug shows where)"]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all(tmp_path):
    done = launch(write_recipe(tmp_path), tmp_path / "out", "die", "evaluate")
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr


@pytest.mark.slow
def test_what_all_find_wrong_is_told_once(tmp_path):
    done = launch(write_recipe(tmp_path), tmp_path / "out", "evaluate", "sede=1")
    assert done.returncode != 0
    assert done.stderr.count("ecoprompt:") == 1


def test_without_a_launcher_there_is_one_process():
    assert (processes.count(), processes.rank(), processes.is_main(), processes.several()) == (1, 0, True, {})
    assert processes.gather("this") == ["this"]
    assert processes.from_main(lambda: 3) == 3
    assert list(processes.deal([1, 2, 3], lambda one: one * 2)) == [[2], [4], [6]]
    with processes.main_first(), processes.alone():
        processes.check_agreement("anything")
    processes.leave()


@pytest.mark.parametrize("names", [("WORLD_SIZE", "RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")])
def test_a_launcher_says_how_many_there_are(monkeypatch, names):
    for name, value in zip(names, "31", strict=True):
        monkeypatch.setenv(name, value)
    assert (processes.count(), processes.rank(), processes.is_main(), processes.several()) == (
        3,
        1,
        False,
        {"processes": 3},
    )


def test_the_last_batches_are_filled_with_nothing():
    order = processes.Order(SequentialSampler(range(5)), 4)
    assert (len(order), list(order)) == (8, [0, 1, 2, 3, 4, None, None, None])


def test_only_the_main_process_writes_and_talks(monkeypatch, tmp_path, capsys):
    from ecoprompt.files import write_text_atomic
    from ecoprompt.optimize import draw
    from ecoprompt.plots import write_plots
    from ecoprompt.recipe import Recipe
    from ecoprompt.report import write_report
    from ecoprompt.results import Store

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("ecoprompt.results.from_main", lambda make: make())
    store = Store(tmp_path / "scores.jsonl")
    store.put_many([("a", 1)])
    write_text_atomic(tmp_path / "file", "text")
    assert store.get("a") == 1
    monkeypatch.setattr("ecoprompt.plots.draw", None)
    monkeypatch.setattr("ecoprompt.report.page", None)
    assert write_plots(tmp_path, {}) == []
    write_report(tmp_path, {}, [])
    draw(Recipe(name="toy"), None, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patched:
        for name in ("stdout", "stderr"):
            patched.setattr(sys, name, getattr(sys, name))
        terminal.hush()
        print("nothing")
        sys.stdout.close()
    assert capsys.readouterr().out == ""


def test_a_checkpoint_without_every_process_s_part_is_removed(monkeypatch, tmp_path):
    for step, ranks in ((1, (0, 1)), (2, (0,))):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("trainer_state.json", *(f"rng_state_{rank}.pth" for rank in ranks)):
            (folder / name).write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert newest(tmp_path) == str(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_lost_process_is_known_by_its_error(monkeypatch):
    error = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    assert not processes.lost_another(error)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.lost_another(error)
    assert not processes.lost_another(InputError("gloo"))


@pytest.mark.parametrize("file", sorted((HERE.parent / "docs" / "scale").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_the_docs_are_accelerate_s(file):
    config = load_config_from_file(str(file))
    assert config.num_processes >= 2
    assert file.name in (HERE.parent / "docs" / "scale.md").read_text(encoding="utf-8")
