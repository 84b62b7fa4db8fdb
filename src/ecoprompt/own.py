"""Benchmarks that a recipe declares: on the user's own files in a few keys, or whole as in benchmarks.toml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ecoprompt.benchmarks import declare
from ecoprompt.items import MetricName
from ecoprompt.registry import InputError, benchmarks, describe
from ecoprompt.sources import Table, Template, Texts
from ecoprompt.sweep import given

NAME = re.compile(r"[\w-]+")
_declared: set[str] = set()


FileName = Annotated[str, Field(min_length=1)]
Files = FileName | Annotated[tuple[FileName, ...], Field(strict=False, min_length=1)]


class OwnBenchmark(Table):
    """What is to be forgotten and what is to be kept, in files of your own.

    They are CSV, JSON lines, JSON, Parquet or text, beside the recipe. Rows and texts alike train the gate and are
    evaluated. With `subsets`, `gate` or `of`, it is a table as those of benchmarks.toml instead.
    """

    forget: Files = Field(description="file of what is to be forgotten, or a list of files")
    retain: Files = Field(description="file of what is to be kept, the more like the former the better; or a list")
    prompt: Template = Field("{{ question }}", description="template of a prompt over the columns of a row")
    answer: str = Field("answer", description="column of the true answer")
    targets: Texts = Field((), description="names of what is to be forgotten, for `{{ targets }}` in a run's prefix")
    metrics: dict[str, MetricName] = Field(
        {"rouge": "rouge_l_recall", "probability": "answer_probability"}, description="what is measured of an answer"
    )
    max_length: Annotated[int, Field(ge=1)] = Field(256, description="tokens of a prompt and its answer at most")

    @model_validator(mode="after")
    def _has_names_for_all_files(self) -> OwnBenchmark:
        for kind, files in (("forget", self.forget), ("retain", self.retain)):
            _subsets(kind, files)
        return self

    def declaration(self) -> dict[str, Any]:
        """The same as a table of benchmarks.toml, with the forget set `forget`."""
        forget, retain = _subsets("forget", self.forget), _subsets("retain", self.retain)
        subsets = {
            name: self._lessons(file) | {"metrics": self.metrics, "forget": name in forget}
            for name, file in (forget | retain).items()
        }
        return {
            "title": "The user's own files",
            "folder": "",
            "prompt": self.prompt,
            "max_length": self.max_length,
            "columns": [f"{name}_{metric}" for name in subsets for metric in self.metrics],
            "forget_sets": {"forget": {"retain": "retain", "targets": self.targets}},
            "subsets": subsets,
            "gate": {
                "positive": [text for file in forget.values() for text in self._texts(file)],
                "negative": [text for file in retain.values() for text in self._texts(file)],
            },
            "training": {
                "forget": [self._lessons(file) | {"plain": _is_text(file)} for file in forget.values()],
                "retain": [self._lessons(file) | {"plain": _is_text(file)} for file in retain.values()],
            },
        }

    def _lessons(self, file: str) -> dict[str, Any]:
        prompt, answer = ("{{ first_sentence }}", "rest") if _is_text(file) else (self.prompt, self.answer)
        return {"config": file, "prompt": prompt, "answer": answer}

    def _texts(self, file: str) -> list[dict[str, Any]]:
        if _is_text(file):
            return [{"config": file, "field": field} for field in ("first_sentence", "text")]
        return [{"config": file, "prompt": self.prompt}]


def _is_text(file: str) -> bool:
    """Whether it is read in passages, of each of which the first sentence asks for the rest."""
    return file.lower().endswith(".txt")


def _subsets(kind: str, files: Files) -> dict[str, str]:
    """Files by the names of their subsets: `kind`, or of several files `kind` and theirs."""
    if isinstance(files, str):
        return {kind: files}
    found: dict[str, str] = {}
    for file in files:
        name = re.sub(r"\W", "_", f"{kind}_{Path(file).stem}")
        if name in found:
            raise ValueError(f"'{found[name]}' and '{file}' would both be called '{name}', rename one of them")
        found[name] = file
    return found


def declare_own(raw: Mapping[str, Any], base: Path) -> list[str]:
    """Enter the benchmarks under [benchmark.NAME] of a recipe in the folder `base`; returns what is wrong with them.

    Those of the recipe before are taken out: there are never those of two.
    """
    while _declared:
        benchmarks.drop(_declared.pop())
    problems = []
    for name, table in given(raw, "benchmark", dict).items():
        where = f"benchmark.{name}"
        if name in benchmarks:
            problems.append(f"'{where}': '{name}' is a benchmark that comes with the package, choose another name")
        elif not NAME.fullmatch(name):
            problems.append(f"'{where}': found the name {name!r}, expected letters, digits, '-' and '_'")
        elif isinstance(table, dict):
            try:
                if not {"subsets", "gate", "of"} & table.keys():
                    table = OwnBenchmark.model_validate(table).declaration()
                benchmarks.add(name, declare(name, table, base, where))
                _declared.add(name)
            except ValidationError as error:
                problems += describe(error, OwnBenchmark, where, f"benchmark '{name}'")
            except InputError as error:
                problems += error.problems
    return problems
