"""Broken recipes, data, packs and models: one message that says what is wrong and where, exit status 2, at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ecoprompt.cli import app

RECIPE = """\
seed = 0
[model]
name = "quickstart"
[data]
forget = "tofu/forget10"
root = "data"
[gate]
kind = "linear"
threshold = 0.5
[corruption]
method = "rand_noise_first_n"
dims = 1
strength = 7.0
[run.original]
[run.eco]
forget = true
[[evaluate]]
benchmark = "tofu"
"""
ROW = {"question": "Who?", "answer": "He."}
PACK = """\
format = 1
[gate]
kind = "linear"
threshold = 0.5
[corruption]
method = "rand_noise_first_n"
dims = 1
strength = 1.0
"""
runner = CliRunner()

# what is done to the recipe, and what the message must name
RECIPES: dict[str, tuple[Callable[[str], str | bytes], list[str]]] = {
    "not TOML": (lambda text: text + "[run.x\n", ["r.toml: ", "line 19"]),
    "a key twice": (lambda text: text + 'benchmark = "tofu"\n', ["r.toml: ", "line 19"]),
    "not UTF-8": (lambda text: text.encode() + b'# na\xefve\n"', ["r.toml", "UTF-8"]),
    "empty": (lambda text: "", ["r", "[run.NAME]"]),
    "an unknown table": (
        lambda text: text + "[corupption]\n",
        ["r.toml", "'corupption'", "did you mean 'corruption'?"],
    ),
    "an unknown key": (
        lambda text: text.replace("[data]", 'dtipe = "auto"\n[data]'),
        ["r.toml", "'model.dtipe'", "did you mean 'dtype'?"],
    ),
    "a wrong type": (
        lambda text: text.replace("seed = 0", 'seed = "zero"'),
        ["r.toml", "'seed'", "found 'zero'", "expected"],
    ),
    "a value out of range": (
        lambda text: text.replace("threshold = 0.5", "threshold = 2.5"),
        ["r.toml", "'gate.threshold'", "found 2.5", "expected", "1"],
    ),
    "a wrong choice": (
        lambda text: text.replace("[corruption]", '[tokens]\nscope = "sentence"\n[corruption]'),
        ["r.toml", "'tokens.scope'", "found 'sentence'", "'prompt' or 'sequence'"],
    ),
    "an unknown corruption": (
        lambda text: text.replace("rand_noise_first_n", "rand_noise_frist_n"),
        ["r.toml", "'corruption.method'", "'rand_noise_frist_n'", "did you mean 'rand_noise_first_n'?"],
    ),
    "a corruption that nobody registered": (
        lambda text: text.replace("rand_noise_first_n", "zzz"),
        ["r.toml", "'corruption.method'", "'zzz'", "known: add_value_first_n", "--plugin"],
    ),
    "an unknown parameter": (
        lambda text: text.replace("strength", "strenght = 1\nstrength"),
        ["r.toml", "'corruption.strenght'", "did you mean 'strength'?"],
    ),
    "an unknown gate": (
        lambda text: text.replace('"linear"', '"liner"'),
        ["r.toml", "'gate.kind'", "'liner'", "did you mean 'linear'?"],
    ),
    "an unknown benchmark": (
        lambda text: text.replace('benchmark = "tofu"', 'benchmark = "tofuu"'),
        ["r.toml", "'evaluate.", "benchmark'", "'tofuu'", "did you mean 'tofu'?"],
    ),
    "an unknown forget set": (
        lambda text: text.replace("forget10", "forget11"),
        ["r.toml", "'data.forget'", "'tofu/forget11'", "did you mean 'tofu/forget"],
    ),
    "an unknown subset": (
        lambda text: text + "limit = { retian = 3 }\n",
        ["evaluate.", "limit.retian", "did you mean 'retain'?"],
    ),
    "a run without a model": (
        lambda text: text.replace('name = "quickstart"', "").replace("[run.eco]\nforget = true", ""),
        ["r.toml", "[run.original]", "no model"],
    ),
    "a guard without a corruption": (
        lambda text: text.partition("[corruption]")[0] + "[run.eco]\nforget = true\n",
        ["r.toml", "[run.eco]", "no [corruption]"],
    ),
    "a sweep of what cannot be swept": (
        lambda text: text + '[sweep]\n"data.forget" = ["tofu/forget01"]\n',
        ["r.toml", "sweep.data.forget", "cannot be swept"],
    ),
    "a sweep with a wrong value": (
        lambda text: text + '[sweep]\n"corruption.strength" = [1, "much"]\n',
        ["r.toml", "'corruption.strength'", "'much'"],
    ),
}
# options of `evaluate`, the recipe being right
OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "a --set without a value": (["--set", "seed"], ["--set seed", "expected KEY=VALUE"]),
    "a --set without a key": (["--set", "=3"], ["--set =3", "expected KEY=VALUE"]),
    "a --set of a wrong key": (["--set", "corruption.strenth=3"], ["strenth", "did you mean 'strength'?"]),
    "a --set of a wrong type": (["--set", "corruption.dims=many"], ["'corruption.dims'", "'many'", "expected"]),
    "a --set that is not TOML": (["--set", "corruption.dims=[1"], ["--set corruption.dims=[1", "not a TOML value"]),
    "a --set below a number": (["--set", "seed.x=1"], ["'seed.x'", "not a table"]),
    "no data folder": (["--set", "data.root=nowhere"], ["[data] root", "'nowhere'"]),
}
# the content of data/TOFU/forget10.jsonl, of which the gate is trained
DATA: dict[str, tuple[bytes, list[str]]] = {
    "an empty file": (b"", ["forget10.jsonl", "no rows"]),
    "a missing column": (
        json.dumps({"qestion": "Who?", "answer": "He."}).encode(),
        ["forget10.jsonl", "'question'", "expected", "did you mean 'qestion'?"],
    ),
    "a text that is none": (
        b"\n".join(json.dumps(row).encode() for row in (ROW, {**ROW, "question": 3})),
        ["forget10.jsonl:2", "'question'", "found 3", "expected"],
    ),
    "not JSON": (json.dumps(ROW).encode() + b"\n{oops}\n", ["forget10.jsonl:2", "not JSON"]),
    "not an object": (b"[1]\n", ["forget10.jsonl", "[1]", "object"]),
    "not UTF-8": (json.dumps(ROW).encode() + b'\n{"question": "na\xefve"}', ["forget10.jsonl:2", "0xef", "UTF-8"]),
}
# what is done in the working folder, the options of `chat`, and what the message must name
CHATS: dict[str, tuple[dict[str, str], list[str], list[str]]] = {
    "a folder without a model": ({"m/x": ""}, ["--model", "m"], ["'m'", "config.json"]),
    "no such folder": ({}, ["--model", "./m"], ["'./m'", "no such folder"]),
    "no such alias": ({}, ["--model", "quikstart"], ["'quikstart'", "did you mean 'quickstart'?"]),
    "a wrong dtype": ({}, ["--model", "quickstart", "--dtype", "float8"], ["dtype", "'float8'", "'float32'"]),
    "no such recipe": (
        {},
        ["--model", "quickstart", "--forget", "quikstart"],
        ["'quikstart': no pack folder, recipe or Hub id", "did you mean 'quickstart'?"],
    ),
    "no such pack beside others": (
        {"packs/one/pack/forget.toml": PACK},
        ["--model", "quickstart", "--forget", "packs/onne/pack"],
        ["'packs/onne/pack'", "did you mean 'packs/one/pack'?"],
    ),
    "a folder without a pack": ({"p/x": ""}, ["--model", "quickstart", "--forget", "p"], ["p: ", "forget.toml"]),
    "a pack that is not TOML": (
        {"p/forget.toml": PACK[:20]},
        ["--model", "quickstart", "--forget", "p"],
        ["p/forget.toml", "not a forget pack"],
    ),
    "a pack of another format": (
        {"p/forget.toml": PACK.replace("format = 1", "format = 9")},
        ["--model", "quickstart", "--forget", "p"],
        ["p/forget.toml", "9", "expected 1"],
    ),
    "a pack without a corruption": (
        {"p/forget.toml": PACK.partition("[corruption]")[0]},
        ["--model", "quickstart", "--forget", "p"],
        ["p/forget.toml", "[corruption]"],
    ),
    "a pack without a gate": (
        {"p/forget.toml": PACK},
        ["--model", "quickstart", "--forget", "p"],
        ["p/gate"],
    ),
    "a pack whose gate is damaged": (
        {"p/forget.toml": PACK, "p/gate/gate.toml": "kind = 3", "p/gate/gate.safetensors": "no weights"},
        ["--model", "quickstart", "--forget", "p"],
        ["p/gate"],
    ),
}


def check(arguments: list[str], told: list[str], *, lines: int = 1) -> None:
    """The command exits with status 2 and `lines` lines on stderr that hold `told`; in under a second."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("ECOPROMPT_DATA", None)
    seconds = []
    for _ in range(4):  # on a machine that others use, the best of a few
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "ecoprompt", *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment,
            check=False,
        )
        seconds.append(time.perf_counter() - started)
        if seconds[-1] < 1:
            break
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for part in told:
        assert part in done.stderr
    assert done.stderr.count("\n") == lines, done.stderr
    assert all(line.startswith("ecoprompt: ") for line in done.stderr.splitlines())
    assert min(seconds) < 1


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe and data for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "data" / "TOFU").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_a_broken_recipe(folder: Path, name: str) -> None:
    change, told = RECIPES[name]
    broken = change(RECIPE)
    assert broken != RECIPE
    (folder / "r.toml").write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    check(["evaluate", "r.toml"], told)


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options(name: str) -> None:
    options, told = OPTIONS[name]
    check(["evaluate", "r.toml", *options], told)


@pytest.mark.parametrize("name", DATA)
def test_broken_data(folder: Path, name: str) -> None:
    content, told = DATA[name]
    for part in ("retain90", "real_authors", "world_facts"):
        (folder / "data" / "TOFU" / f"{part}.jsonl").write_text(json.dumps(ROW), encoding="utf-8")
    (folder / "data" / "TOFU" / "forget10.jsonl").write_bytes(content)
    check(["train-classifier", "r.toml"], told)


@pytest.mark.parametrize("name", CHATS)
def test_wrong_models_and_packs(folder: Path, name: str) -> None:
    files, options, told = CHATS[name]
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")
    check(["chat", *options], told)


def test_all_mistakes_of_a_recipe_are_listed_at_once(folder: Path) -> None:
    broken = RECIPE.replace("seed = 0", "seed = -1").replace("dims", "dmis").replace("forget10", "forget1")
    (folder / "r.toml").write_text(broken, encoding="utf-8")
    told = ["'seed'", "found -1", "'corruption.dmis'", "did you mean 'dims'?", "'data.forget'"]
    result = runner.invoke(app, ["evaluate", "r.toml"])
    assert result.exit_code == 2
    for part in told:
        assert part in result.stderr
    assert all(line.startswith("ecoprompt: r.toml: '") for line in result.stderr.splitlines())


def test_a_recipe_that_is_not_there() -> None:
    check(["evaluate", "quikstart"], ["quikstart", "did you mean 'quickstart'?"])
    check(["evaluate", "data"], ["data", "a folder"])


def test_data_that_can_be_had_from_nowhere_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = runner.invoke(app, ["train-classifier", "r.toml"])
    assert result.exit_code == 1
    assert "ECOPROMPT_DATA" in result.stderr
    assert "HF_HUB_OFFLINE is set" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_that_cannot_be_reached_says_what_to_do() -> None:
    result = runner.invoke(app, ["chat", "--model", "nobody/nothing"], input="hi\n")
    assert result.exit_code == 1
    assert "model 'nobody/nothing' is not here and the Hub cannot be reached" in result.stderr
    assert "hf download nobody/nothing" in result.stderr
