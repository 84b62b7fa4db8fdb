"""Counts which small faults in a module its tests find; prints a Markdown table, and above it the faults left unfound.

`python tests/bench/mutants.py corruption metrics [--sample 200] [--seed 0] [--record FILE]`, from the project's root
folder; needs `pip install cosmic-ray`, whose operators make the faults: every other operator or comparison, a number
more or less, a condition turned, a loop not entered, a decorator left out. What does not compile, or stands in an
annotation, is left out. Each is tried in a process forked from one that holds what takes long to import, by those tests
of `tests/test_MODULE.py` that reach the faulty statement, the fastest first. `cosmic-ray exec` starts each from nothing
and takes some ten times as long, and mutmut passes over decorated functions: nearly all of three of these modules.

`--record` notes what became of each; another run with the same file goes on where one ended. Sampled faults come in the
same order whatever the size of the sample. Exit status 1 if fewer than 85 % of a module's faults were found.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gc
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

MODULES = ["corruption", "metrics", "losses", "zeroth", "guard"]
HELD = ["torch", "transformers", "scipy.stats", "rouge_score.rouge_scorer", "sklearn.linear_model", "pydantic"]
HELD += [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2", "qwen2", "gpt_neox", "mixtral")]
# What is held was imported before pytest could rewrite its assertions, of which it warns; warnings are errors.
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]


@dataclass(frozen=True)
class Mutant:
    """A module's text with one fault, the lines of the faulty statement, and whether they are run by an import."""

    text: str
    line: int
    lines: frozenset[int]
    imported: bool

    @property
    def key(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def main() -> int:
    """Exit status 1 if fewer than 85 % of a module's mutants were found, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument("--sample", type=int, help="so many mutants of each module, drawn at random; by itself all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="a file that keeps what became of each mutant")
    options = parser.parse_args()
    for name in HELD:
        importlib.import_module(name)
    shares = [tried(module, options) for module in options.modules]
    print("\n| module | mutants | found | not found | share |\n| --- | ---: | ---: | ---: | ---: |")
    for module, (found, total) in zip(options.modules, shares, strict=True):
        print(f"| `{module}.py` | {total} | {found} | {total - found} | {found / total:.1%} |")
    return int(any(found < 0.85 * total for found, total in shares))


def tried(module: str, options: argparse.Namespace) -> tuple[int, int]:
    """How many mutants of a module were found, of how many; prints the others."""
    package = importlib.util.find_spec("ecoprompt")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).with_name(f"{module}.py")
    these = list(mutants(path, options.sample, options.seed))
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(path, Path(folder), options.record or Path(folder) / "record")
        trial.run(these)
        left = [mutant for mutant in these if not trial.known()[mutant.key]]
    for mutant in left:
        print(f"{path.name}:{mutant.line}", *changed(path.read_text(encoding="utf-8"), mutant.text), sep="\n")
    return len(these) - len(left), len(these)


def mutants(path: Path, sample: int | None, seed: int) -> Iterator[Mutant]:
    """Every mutant of a module in random order, or the first `sample` of them."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.commands.init import _operators

    source = path.read_text(encoding="utf-8")
    tree, early, parsed = ast.parse(source), lines_at_import(path), pickle.dumps(get_ast(source))
    nodes = list(ast_nodes(get_ast(source)))
    places = [
        (operator, number, index, begins)
        for _, _, operator in _operators({})
        for number, node in enumerate(nodes)
        for index, (begins, _) in enumerate(operator.mutation_positions(node))
        if not any(first <= begins < last for first, last in annotations(tree))
    ]
    random.Random(seed).shuffle(places)
    made = 0
    for operator, number, index, begins in places:
        root = pickle.loads(parsed)
        node = next(itertools.islice(ast_nodes(root), number, None))
        siblings = node.parent.children
        place = siblings.index(node)
        siblings[place : place + 1] = filter(None, [operator.mutate(node, index)])
        with contextlib.suppress(SyntaxError):
            compile(root.get_code(), path, "exec")
            if made == sample:
                return
            made += 1
            lines = statement_at(tree, begins[0])
            yield Mutant(root.get_code(), begins[0], lines, bool(lines & early))


@functools.cache
def annotations(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end: what they say is not evaluated."""
    found = [getattr(node, name, None) for node in ast.walk(tree) for name in ("annotation", "returns")]
    return [((one.lineno, one.col_offset), (one.end_lineno, one.end_col_offset)) for one in found if one is not None]


def statement_at(tree: ast.Module, line: int) -> frozenset[int]:
    """The lines of the innermost statement at a line, of a compound one those before its body."""
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
            if first <= line <= (node.end_lineno or first):
                spans.append((first, node))
    first, inner = max(spans, key=lambda span: span[0])
    body = getattr(inner, "body", None)
    return frozenset(range(first, max(line, body[0].lineno - 1 if body else (inner.end_lineno or first)) + 1))


def lines_at_import(path: Path) -> set[int]:
    """The lines of a module that are run when it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"

        def run() -> int:
            import coverage

            cover = coverage.Coverage(data_file=None, include=[str(path)], config_file=False)
            with cover.collect():
                importlib.import_module(f"ecoprompt.{path.stem}")
            told.write_text(json.dumps(cover.get_data().lines(str(path))), encoding="utf-8")
            return 0

        assert forked(run, 600) == 0
        return set(json.loads(told.read_text(encoding="utf-8")))


def changed(source: str, mutant: str) -> list[str]:
    """The lines that differ, as they were and as they are."""
    old, new = source.splitlines(), mutant.splitlines()
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    end = len(old) - same if len(old) == len(new) else len(old) - len(new)
    while len(old) == len(new) and end > 1 and old[same + end - 1] == new[same + end - 1]:
        end -= 1
    return [f"- {line}" for line in old[same : same + end]] + [
        f"+ {line}" for line in new[same : same + end - len(old) + len(new)]
    ]


class Trial:
    """The tests of a module against its mutants; a plugin of pytest."""

    def __init__(self, path: Path, folder: Path, record: Path) -> None:
        self.path, self.record, self.told = path, record, folder / "told"
        self.tests = f"tests/test_{path.stem}.py"
        self.name = f"ecoprompt.{path.stem}"
        self.left: list[Mutant] = []

    def known(self) -> dict[str, bool]:
        """By the key of a mutant that was tried, whether it was found."""
        lines = self.record.read_text(encoding="utf-8").splitlines() if self.record.exists() else []
        return {line.split()[0]: line.split()[1] == "found" for line in lines}

    def run(self, these: list[Mutant]) -> None:
        """Try what is not known yet; raises AssertionError if the tests fail without a fault."""
        import pytest

        known = self.known()
        self.left = [mutant for mutant in these if mutant.key not in known]
        if not self.left:
            return
        assert forked(lambda: int(pytest.main([*PYTEST, self.tests], plugins=[self])), 86400) == 0
        limit = 60 + 5 * sum(seconds for seconds, _ in json.loads(self.told.read_text(encoding="utf-8")).values())
        for mutant in self.left:
            if mutant.imported:
                self.note(mutant, functools.partial(self.import_and_test, mutant), limit)

    def note(self, mutant: Mutant, test: Callable[[], int], limit: float) -> None:
        """Record whether a mutant's tests fail, or do not end in the seconds that they may take."""
        found = "unfound" if forked(test, limit) == 0 else "found"
        with self.record.open("a", encoding="utf-8") as file:
            file.write(f"{mutant.key} {found} {self.path.name}:{mutant.line}\n")

    def pytest_runtestloop(self, session: Any) -> bool:
        """What pytest calls once it has collected the tests: each mutant of a function in a process of its own."""
        gc.freeze()  # what is held is neither looked through nor copied in those
        if forked(lambda: self.watch(session), 86400) != 0:
            session.testsfailed = 1
            return True
        reached = json.loads(self.told.read_text(encoding="utf-8"))
        items = sorted(session.items, key=lambda item: reached[item.nodeid][0])
        for mutant in self.left:
            if not mutant.imported:
                chosen = [item for item in items if mutant.lines & set(reached[item.nodeid][1])]
                limit = 30 + 5 * sum(reached[item.nodeid][0] for item in chosen)
                self.note(mutant, functools.partial(self.exchange_and_test, session, mutant, chosen), limit)
        return True

    def watch(self, session: Any) -> int:
        """0 if all tests pass; tells of each the seconds and the lines of the module that it reaches."""
        import coverage

        cover = coverage.Coverage(data_file=None, include=[str(self.path)], config_file=False)
        seconds = {}
        with cover.collect():
            for item in session.items:
                cover.switch_context(item.nodeid)
                started = time.perf_counter()
                passed_all(session, [item])
                seconds[item.nodeid] = time.perf_counter() - started
        lines: dict[str, list[int]] = {name: [] for name in seconds}
        for line, names in cover.get_data().contexts_by_lineno(str(self.path)).items():
            for name in lines.keys() & set(names):
                lines[name].append(line)
        self.told.write_text(json.dumps({name: (seconds[name], lines[name]) for name in seconds}), encoding="utf-8")
        return int(session.testsfailed)

    def exchange_and_test(self, session: Any, mutant: Mutant, chosen: list[Any]) -> int:
        """0 if the tests pass with the code of the module's functions exchanged for the mutant's."""
        codes = dict(_codes(compile(mutant.text, str(self.path), "exec")))
        for function in _functions(sys.modules[self.name], self.path):
            function.__code__ = codes[function.__code__.co_qualname]
        return int(not passed_all(session, chosen))

    def import_and_test(self, mutant: Mutant) -> int:
        """0 if the tests pass with the mutant imported as the module."""
        import pytest

        path, full = self.path, self.name

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> Any:
                return compile(mutant.text, str(path), "exec")

        class Finder:
            @staticmethod
            def find_spec(name: str, *_: Any) -> ModuleSpec | None:
                if name != full:
                    return None
                return importlib.util.spec_from_file_location(name, path, loader=Loader(name, str(path)))

        sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]
        importlib.import_module(full)
        return int(pytest.main([*PYTEST, self.tests]))


def passed_all(session: Any, items: list[Any]) -> bool:
    """Whether the tests pass, run until one fails."""
    for item, following in itertools.zip_longest(items, items[1:]):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return False
    return True


def _codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    yield code.co_qualname, code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _functions(holder: ModuleType | type, path: Path) -> Iterator[Any]:
    """The functions of a module and of its classes that the file holds, without what is wrapped around them."""
    for item in vars(holder).values():
        if inspect.isclass(item) and isinstance(holder, ModuleType) and item.__module__ == holder.__name__:
            yield from _functions(item, path)
        function = inspect.unwrap(getattr(item, "fget", item))
        if inspect.isfunction(function) and function.__code__.co_filename == str(path):
            yield function


def forked(run: Callable[[], int], seconds: float) -> int | None:
    """What `run` returns in a process of its own, which says nothing; 1 where it raises, None where it takes longer."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(nowhere, stream)
            status = run()
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    sys.exit(main())
