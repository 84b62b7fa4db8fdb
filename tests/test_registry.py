"""Registries: names with suggestions, schemas read off signatures, and all mistakes told at once."""

from __future__ import annotations

import sys
import types
from typing import Annotated

import pytest
from pydantic import BaseModel, Field, ValidationError

from ecoprompt import registry
from ecoprompt.recipe import digest
from ecoprompt.registry import EcopromptError, InputError, Registry, UnguardedError, describe, nearest
from ecoprompt.terminal import message


@pytest.fixture
def shelf(monkeypatch):
    """A registry whose home is a module that fills it when imported."""
    home = types.ModuleType("a_home_for_tests")
    monkeypatch.setitem(sys.modules, home.__name__, home)
    found = Registry("spice", home.__name__)

    @found.register
    def pepper(dish, generator=None, *, grains: Annotated[int, Field(ge=1)], hot: bool = True, label: str = "p"):
        return dish, grains, hot, label

    @found.register
    def salt(dish):
        return dish

    return found


def problems_of(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def test_nearest_names_one_that_is_close_else_all():
    assert nearest("tofo", ["wmdp", "tofu"]) == "did you mean 'tofu'?"
    assert nearest("TOFU", ["wmdp", "Tofu"]) == "did you mean 'Tofu'?"
    assert nearest("xyz", ["wmdp", "tofu"]) == "known: tofu, wmdp"
    assert nearest("xyz", []) == "none is known"
    assert nearest("/", ["tofu"]) == "known: tofu"


def test_nearest_of_many_to_a_name_that_is_only_begun_are_the_shortest_that_begin_so():
    names = ["mistral-7b-v0.2", "mistral-7b-v0.1", "mistral-7b-instruct-v0.1", "biomistral-7b"]
    many = [*names, *(f"{number:03}" for number in range(20))]
    expected = "'mistral-7b-v0.1' or 'mistral-7b-v0.2' or 'mistral-7b-instruct-v0.1'"
    assert nearest("Mistral_7B", many) == f"did you mean {expected}?"
    assert nearest("llama-3", ["llama3", "llama3-chatqa"]) == "did you mean 'llama3'?"  # letters and digits alone


def test_nearest_does_not_list_a_hundred_names():
    known = [f"{number:03}" for number in range(100)]
    assert nearest("xyz", known) == f"known are 100: {', '.join(known[:20])} and so on"


def test_exit_statuses():
    assert (EcopromptError.exit_status, InputError.exit_status, UnguardedError.exit_status) == (1, 2, 1)
    assert InputError("a", "b").problems == ("a", "b")


def test_a_registry_is_a_mapping(shelf):
    assert list(shelf) == ["pepper", "salt"]
    assert len(shelf) == 2
    assert "salt" in shelf
    assert "sugar" not in shelf
    assert shelf["salt"]("soup") == "soup"


def test_an_unknown_name_gets_the_nearest(shelf):
    assert problems_of(shelf.__getitem__, "peper") == ["there is no spice 'peper'; did you mean 'pepper'?"]
    assert problems_of(shelf.bind, "x", {}) == [f"there is no spice 'x'; known: pepper, salt{OWN}"]


def test_a_name_is_registered_once(shelf):
    assert problems_of(shelf.add, "salt", None) == ["spice 'salt' is registered twice; choose another name"]


def test_the_home_is_imported_when_a_name_is_first_looked_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "late_home.py").write_text("import test_lazily\ntest_lazily.late.add('one', 1)\n")
    late = Registry("number", "late_home")
    monkeypatch.setitem(sys.modules, "test_lazily", types.SimpleNamespace(late=late))
    assert "late_home" not in sys.modules
    assert late["one"] == 1
    assert "late_home" in sys.modules
    monkeypatch.delitem(sys.modules, "late_home")


def test_the_schema_is_the_keyword_only_parameters(shelf):
    assert list(shelf.schema("pepper").model_fields) == ["grains", "hot", "label"]
    assert shelf.schema("salt").model_fields == {}
    assert shelf.schema("pepper") is shelf.schema("pepper")


def test_bind_fills_in_defaults(shelf):
    assert shelf.bind("pepper", {"grains": 3}) == {"grains": 3, "hot": True, "label": "p"}
    assert shelf.bind("salt", {}) == {}


def test_bind_tells_all_problems_at_once(shelf):
    assert problems_of(shelf.bind, "pepper", {"hot": 1, "lable": "x", "label": 5}, "soup") == [
        "'soup.grains': this key is needed",
        "'soup.hot': found 1, expected true or false",
        "'soup.label': found 5, expected a text",
        "'soup.lable': spice 'pepper' has no key 'lable'; did you mean 'label'?",
    ]
    assert problems_of(shelf.bind, "pepper", {"grains": 0}) == ["'grains': found 0, expected a number of at least 1"]
    assert problems_of(shelf.bind, "pepper", {"grains": True}) == ["'grains': found true, expected a whole number"]
    assert problems_of(shelf.bind, "salt", {"much": 1}) == ["'much': spice 'salt' has no key 'much'; none is known"]


class Inner(BaseModel):
    model_config = {"extra": "forbid", "strict": True}
    size: Annotated[float, Field(gt=0, lt=2)]


class Outer(BaseModel):
    model_config = {"extra": "forbid", "strict": True}
    either: Annotated[float, Field(ge=0)] | Inner = 0.0
    many: dict[str, Inner] = {}
    row: list[Inner] = []
    names: Annotated[list[str], Field(min_length=1)] | None = None
    limit: Annotated[int, Field(ge=1)] | dict[str, int] | None = None


@pytest.mark.parametrize(
    ("found", "sentences"),
    [
        ({"either": "x"}, ["'either': found 'x', expected a number or a table"]),
        ({"either": -1.0}, ["'either': found -1.0, expected a number of at least 0 or a table"]),
        ({"either": {"size": 3.0}}, ["'either.size': found 3.0, expected a number below 2"]),
        (
            {"either": {"sise": 1.0}},
            ["'either.size'", "'either.sise': [either] has no key 'sise'; did you mean 'size'"],
        ),
        ({"many": {"int": {"size": 0.0}}}, ["'many.int.size': found 0.0, expected a number above 0"]),
        ({"many": {"Inner": {"size": 1.0, "float": 1}}}, ["'many.Inner.float': [many.Inner] has no key 'float'; "]),
        ({"many": 3}, ["'many': found 3, expected a table"]),
        ({"row": [{"size": 1.0}, 5]}, ["'row.1': found 5, expected a table"]),
        (
            {"row": [{"seize": 1.0}]},
            ["'row.0.size'", "'row.0.seize': [row.0] has no key 'seize'; did you mean 'size'?"],
        ),
        ({"names": []}, ["'names': found [], expected at least 1 of them"]),
        ({"limit": 0}, ["'limit': found 0, expected a number of at least 1 or a table"]),
        ({"limit": {"a": "b"}}, ["'limit.a': found 'b', expected a whole number"]),
        ({"float": 1}, ["'float': an outer has no key 'float'; "]),
        ({"Inner": 1, "dict[x]": 2}, ["'Inner': an outer has no key 'Inner'", "'dict[x]': an outer has no key 'dict"]),
    ],
)
def test_describe_says_what_was_found_and_expected(found, sentences):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(found)
    told = describe(caught.value, Outer, "", "an outer")
    assert len(told) == len(sentences)
    for sentence, beginning in zip(told, sentences, strict=True):
        assert sentence.startswith(beginning)


def test_a_long_value_is_shortened():
    assert len(registry.show("x" * 500)) == 80
    assert registry.show(False) == "false"


def test_every_shipped_registry_is_filled():
    for table in (registry.corruptions, registry.selectors, registry.gates, registry.metrics, registry.benchmarks):
        assert len(table) > 0
        assert all(isinstance(name, str) for name in table)
    assert len(registry.corruptions) == 14


OWN = "; or --plugin with the file of yours that registers it"
PLUGIN = """
from __future__ import annotations
from typing import Annotated
from pydantic import Field
from ecoprompt.losses import Method
from ecoprompt.registry import losses, methods

Margin = Annotated[float, Field(gt=0, description="least")]

@losses.register
def hinge(forget, *, margin: Margin = 4.0):
    return margin

methods.add("hinge-gd", Method("Mine.", {"hinge": 2.0}))
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Where a plug-in may be written; what it registered is taken out again."""
    yield tmp_path / "a_plugin_of_tests.py"
    monkeypatch.setattr(registry, "plugins", {})
    sys.modules.pop("a_plugin_of_tests", None)
    registry.losses.drop("hinge")
    registry.methods.drop("hinge-gd")


def test_a_plugin_registers_what_a_recipe_may_name(plugin, monkeypatch):
    monkeypatch.setattr(registry, "plugins", {})
    before = digest({"loss": "hinge-gd"}), digest("other")
    plugin.write_text(PLUGIN)
    registry.load_plugin(plugin)
    assert registry.methods.bind("hinge-gd", {}) == {"margin": 4.0, "weights": {"hinge": 2.0}}
    assert registry.methods["hinge-gd"]({"forget": None}, margin=3.0) == 6.0
    assert problems_of(registry.methods.bind, "hinge-gd", {"margin": 0}) == [
        "'margin': found 0, expected a number above 0"
    ]
    assert digest({"loss": "hinge-gd"}) != before[0]
    assert digest("other") == before[1]
    assert list(registry.plugins) == [plugin.name]


def test_an_error_in_a_plugin_says_where(plugin, monkeypatch):
    monkeypatch.setattr(registry, "plugins", {})
    plugin.write_text("def fail():\n    return None.men\n")
    registry.load_plugin(plugin)
    with pytest.raises(AttributeError) as caught:
        sys.modules[plugin.stem].fail()
    assert message(caught.value)[0].startswith(f"{plugin}:2: AttributeError: ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero (--debug shows where)"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("from ecoprompt.registry import methods; methods.add('npo', 1)", "method 'npo' is registered twice"),
        (None, "expected a Python file"),
    ],
)
def test_a_plugin_that_cannot_be_run_is_an_input_error(plugin, text, told):
    if text is not None:
        plugin.write_text(f"import ecoprompt.losses\n{text}\n")
    (problem,) = problems_of(registry.load_plugin, plugin)
    assert problem.startswith(f"--plugin {plugin}: ")
    assert told in problem
    assert "a_plugin_of_tests" not in sys.modules


def test_a_plugin_does_not_take_a_modules_place(tmp_path):
    (tmp_path / "json.py").write_text("")
    (problem,) = problems_of(registry.load_plugin, tmp_path / "json.py")
    assert "there is a module 'json' already, rename the file" in problem
