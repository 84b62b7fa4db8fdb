"""The house's order: who imports whom, how long anything is, and what loads without torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ecoprompt

PACKAGE = Path(ecoprompt.__file__).parent
ORDER = (
    [
        "registry",
        "processes",
        "files",
        "hub",
        "zeroth",
        "searches",
        "template",
        "sweep",
        "checks",
        "corruption",
        "losses",
        "sophia",
        "probe",
        "metrics",
        "paired",
        "passages",
        "data",
        "models",
        "similarity",
        "turns",
        "pressure",
        "views",
        "sources",
        "items",
    ]
    + [
        "benchmarks",
        "own",
        "learning",
        "recipe",
        "lessons",
        "results",
        "plots",
        "report",
        "compare",
        "tables",
        "tokens",
        "gate_training",
        "classifier",
        "gate",
        "calibration",
        "forget",
        "verdicts",
        "card",
        "pack",
        "calls",
        "answers",
        "guard",
        "prefill",
        "sampling",
        "scoring",
        "asking",
        "evaluate",
        "planning",
        "optimize",
        "checkpoints",
        "training",
        "finetune",
        "baseline",
    ]
    + ["chat", "terminal", "printing", "cli"]
)
"""DESIGN, section 3: a module imports only from those before it. `gate_training`, `classifier`, `sweep`, `sources`,
`calibration`, `card`, `turns`, `verdicts`, `calls`, `learning`, `lessons`, `checkpoints` and `sophia` are parts of
modules that follow them, `template` of what makes prompts, `files` of what reads a pack, `hub` of the models and the
data, `similarity` of the metrics, `passages` of the data, `planning` and `printing` of the commands."""
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
HEAVY = ["torch", "transformers", "sklearn", "spacy", "datasets"]


def tree(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


class Imports(ast.NodeVisitor):
    """All imports of a module but those for the type checker alone: wherever they stand."""

    def __init__(self, module):
        self.names = []
        self.visit(tree(module))

    def visit_If(self, node):
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node):
        self.names += [alias.name for alias in node.names]

    def visit_ImportFrom(self, node):
        assert node.level == 0, "imports are absolute"
        whole = node.module in ("ecoprompt",)
        self.names += [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]


def functions(module):
    return [node for node in ast.walk(tree(module)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def run(code_or_arguments, *, cwd):
    """Run Python and return (status, stdout, stderr, heavy modules loaded)."""
    report = f"import json, sys; sys.stderr.write('\\nLOADED' + json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    if isinstance(code_or_arguments, list):
        start = f"import atexit, sys\nsys.argv = {['ecoprompt', *code_or_arguments]!r}"
        code = f"{start}\natexit.register(lambda: exec({report!r}))\nfrom ecoprompt.cli import main\nmain()"
    else:
        code = f"{code_or_arguments}\n{report}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    error, _, loaded = done.stderr.rpartition("\nLOADED")
    return done.returncode, done.stdout, error, json.loads(loaded)


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_above_it(module):
    above = set(ORDER[: ORDER.index(module)])
    own = {name.split(".")[1] for name in Imports(module).names if name.startswith("ecoprompt.")}
    assert own <= above, f"{module} imports {sorted(own - above)}"


@pytest.mark.parametrize("module", [*MODULES, "__init__", "__main__"])
def test_sizes(module):
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions(module)}
    assert {name: size for name, size in long.items() if size > 60} == {}


@pytest.mark.parametrize("module", MODULES)
def test_click_is_never_imported(module):
    assert not any(name.split(".")[0] == "click" for name in Imports(module).names)


@pytest.mark.parametrize("module", MODULES)
def test_a_bare_exception_is_caught_only_at_the_top_or_with_a_reason(module):
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            reason = lines[node.lineno - 2].strip().startswith("#") or "#" in lines[node.lineno - 1]
            broad = caught in ("Exception", "BaseException", "everything")
            assert not broad or module == "cli" or reason, f"{module}:{node.lineno} catches {caught}"


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("cli", "printing", "terminal")])
def test_only_the_commands_print(module):
    calls = [node.func for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls)


@pytest.mark.parametrize("module", [*MODULES, "__init__"])
def test_the_module_says_its_one_job(module):
    assert ast.get_docstring(tree(module))


def test_help_loads_nothing_heavy_and_answers_at_once(tmp_path):
    status, out, _, loaded = run(["--help"], cwd=tmp_path)
    assert status == 0
    assert "evaluate" in out
    assert loaded == []
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ecoprompt", "--help"], capture_output=True, check=True, cwd=tmp_path)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    assert run("import ecoprompt\necoprompt.InputError", cwd=tmp_path)[3] == []
    # The tables that a recipe is checked against, and the corruptions among them.
    names = "corruptions, selectors, gates, metrics, benchmarks"
    assert run(f"from ecoprompt.registry import {names}\n[len(t) for t in ({names})]", cwd=tmp_path)[3] == []


@pytest.mark.parametrize("command", ["evaluate", "train-classifier"])
def test_a_bad_recipe_loads_nothing_heavy(tmp_path, command):
    (tmp_path / "bad.toml").write_text(
        "sede = 1\n[corruption]\nmethod = 'x'\n[gate]\nkind = 'y'\n[tokens]\nselect = 'z'"
    )
    start = time.perf_counter()
    status, out, error, loaded = run([command, "bad.toml"], cwd=tmp_path)
    assert time.perf_counter() - start < 5  # a second on a machine that is idle
    assert status == 2
    assert out == ""
    assert len(error.splitlines()) == 4
    assert all(line.startswith("ecoprompt: bad.toml: '") for line in error.splitlines())
    assert loaded == []


@pytest.mark.parametrize("arguments", [["nowhere"], ["tofu", "--set", "seed"], ["tofu", "--set", "gate.kind=x"]])
def test_other_mistakes_load_nothing_heavy(tmp_path, arguments):
    status, out, error, loaded = run(["evaluate", *arguments], cwd=tmp_path)
    assert (status, out, loaded) == (2, "", [])
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["evaluate", "tofu"], ["evaluate", "quickstart", "--json"]])
def test_a_dry_run_loads_nothing_heavy(tmp_path, arguments):
    status, out, error, loaded = run([*arguments, "--dry-run"], cwd=tmp_path)
    assert (status, error, loaded) == (0, "", [])
    assert "run" in out
    assert list(tmp_path.iterdir()) == []
