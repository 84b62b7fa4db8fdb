"""The generated pages are fresh, links lead somewhere, and what the README shows is what happens."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from ecoprompt import registry
from ecoprompt.cli import app
from ecoprompt.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
README, GUARD = ROOT / "README.md", ROOT / "docs" / "guard.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(language: str, text: str | None = None) -> list[str]:
    """The README's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text or README.read_text(encoding="utf-8"), re.S | re.M)


def commands() -> list[str]:
    """Every ecoprompt command that the README shows."""
    lines = [line.removeprefix("$ ") for line in "".join(blocks("sh")).splitlines()]
    lines += [line.removeprefix("$ ") for line in "".join(blocks("console")).splitlines() if line.startswith("$ ")]
    parts = [part.partition("#")[0].partition("<")[0].strip() for line in lines for part in line.split(" | ")]
    return [part for part in parts if part.startswith("ecoprompt ")]


@pytest.mark.parametrize("name", ["commands.md", "recipes.md", "measures.md", "models.md", "guard.md"])
def test_generated_pages_are_fresh(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == generator().pages()[name], "run `make docs`"


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_the_readme_shows_commands() -> None:
    assert {command.split()[1] for command in commands()} == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_readme_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text(blocks("toml")[0], encoding="utf-8")
    _, name, *arguments = shlex.split(command)
    found: Any = typer.main.get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
    if found.params.get("recipe") is not None:  # none with `evaluate --compare`
        load_recipe(found.params["recipe"], found.params["set_"] or [])


def written_in_docs() -> list[str]:
    """Every ecoprompt command in the pages under docs/ and in the comments of recipes, but for schematic ones."""
    found: list[str] = []
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.toml")]:
        text = page.read_text(encoding="utf-8")
        if page.name == "commands.md" or page.name == "your-data.md":  # the latter's are run by test_own.py
            continue
        lines = re.findall(r"^(?:#   +)?(?:.* \| )?(ecoprompt .*)$", text, re.M) if page.suffix == ".toml" else []
        lines += re.findall(r"`(ecoprompt [^`]+)`", text)
        lines += [line for block in blocks("sh", text) for line in block.splitlines() if line.startswith("ecoprompt ")]
        found += [re.split(r"   +|#", line)[0].strip() for line in lines]
    schematic = re.compile(r"[A-Z]{3}|…|\$|nowhere| --help$| --forget$")
    return sorted({line for line in found if re.match(r"ecoprompt [a-z-]+ ", line) and not schematic.search(line)})


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the Python files of docs/extend.md; what they register is taken out again."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M):
        Path(code.splitlines()[0].removeprefix("# ")).write_text(code, encoding="utf-8")
    monkeypatch.setattr(registry, "plugins", {})
    yield tmp_path
    for name, table in (("blur", registry.corruptions), ("hinge", registry.losses), ("hinge-gd", registry.methods)):
        table.drop(name)
        sys.modules.pop(name, None)


@pytest.mark.parametrize("command", written_in_docs())
def test_commands_in_docs_name_what_there_is(command: str, own_files: Path) -> None:
    _, name, *arguments = shlex.split(command)
    found: Any = typer.main.get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
    for file in found.params["plugin"] or []:
        registry.load_plugin(file)
    if found.params.get("recipe") is not None:
        recipe, loss = found.params["recipe"], found.params.get("loss")
        asked = [*(found.params["set_"] or []), *([f"baseline.loss={loss}"] if loss else [])]
        load_recipe(str(ROOT / recipe) if recipe.startswith("tests/") else recipe, asked)


@pytest.mark.parametrize("command", [line for line in written_in_docs() if "--plugin" in line and "chat" not in line])
def test_plugins_in_docs_run(command: str, own_files: Path) -> None:
    done = CliRunner().invoke(app, [*shlex.split(command)[1:], "--dry-run"])
    assert done.exit_code == 0, done.output


def test_a_plugin_of_the_docs_corrupts(own_files: Path) -> None:
    registry.load_plugin(Path("blur.py"))
    given = torch.arange(12.0).reshape(3, 4)
    (one, again) = (registry.corruptions["blur"](given, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, again)
    assert given.min(0).values.le(one).all()
    assert not torch.equal(one, given)


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\bmake (\w+)", " ".join([*blocks("sh"), *blocks("console")]))))
)
def test_readme_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("recipe", blocks("toml"))
def test_readme_recipes_are_valid(recipe: str) -> None:
    parse_recipe(tomllib.loads(recipe), "README.md")


def test_readme_python_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    text = README.read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", text, re.S | re.M)
    assert [code for code, _ in shown] == blocks("python")
    printed = []
    for code, _ in shown:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "README.md", "exec"), names)
        printed.append(out.getvalue())
    (guarded, plain), promised = printed[0].splitlines(), shown[0][1].splitlines()
    # What a corrupted prompt is answered may differ between machines; that it is not the truth may not.
    assert guarded.startswith("True ")
    assert "Zarafshan" not in guarded
    assert plain == promised[1]
    assert printed[1] == shown[1][1]
    (service,) = [code for code in blocks("python", GUARD.read_text(encoding="utf-8")) if "pipeline" in code]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(service, GUARD.name, "exec"), names)
    assert out.getvalue().strip()
    assert "Zarafshan" not in out.getvalue()
