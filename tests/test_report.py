"""The report: what stands on the page, that all of it is text, and that the page needs nobody."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from ecoprompt.report import examples, page, said, write_report

EVIL = "<script>alert('x')</script> & {{ 7 * 7 }} \"><img src=http://elsewhere.example/x.png>"
VOID = {"meta", "link", "path", "use"}


class Read(HTMLParser):
    """All elements with their attributes, and all text but that of the style sheet."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.open = [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def row(run, index, forget=True, **more):
    place = {"benchmark": "b", "subset": "s" if forget else "kept", "forget": forget, "index": index}
    return {"run": run, **place, "prompt": f"Prompt {index}", "target": "Oslo", "flagged": forget, **more}


def summary(run="eco"):
    gate = {"threshold": 0.5, "false_negatives": 1, "forget_prompts": 4, "false_positives": 0, "other_prompts": 0}
    return {
        "recipe": "toy",
        "forget": "toy/people",
        "columns": ["forget_quality", "kept"],
        "better": {"forget_quality": "higher", "kept": "lower"},
        "runs": {
            "original": {"metrics": {"forget_quality": 1e-9, "kept": 0.5}, "seconds": 1.0, "gate": None},
            run: {"metrics": {"forget_quality": 0.25, "kept": 0.75}, "seconds": 1.0, "gate": gate},
        },
        "resolved": {"name": "toy", "data": {"forget": run}},
        "versions": {"torch": "1.2.3"},
        "hardware": {"machine": "x86", "threads": 2, "gpus": []},
    }


def test_all_that_it_promises_is_on_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(run, index, generation=f"{run} says {index}") for run in ("original", "eco") for index in range(3)]
    found = summary()
    found["runs"]["eco"]["errors"] = {"kept": 0.0625}
    path = write_report(tmp_path, found, rows)
    assert path == tmp_path / "report.html"
    read = Read(path.read_text(encoding="utf-8"))
    assert read.open == []
    for text in ("toy: toy/people", "1.0e-09", "0.750 ± 0.062", "↑ higher is better", "1 of 4", "torch 1.2.3"):
        assert text in read.text
    for text in ("Prompt 2", "Oslo", "original says 2", "eco says 2", 'name = "toy"', "0.63% to 80.59%", "0 of 0"):
        assert text in read.text
    tags = [tag for tag, _ in read.elements]
    assert (tags.count("svg"), tags.count("article")) == (1, 3)


@pytest.mark.parametrize("plotted", [True, False])
def test_nothing_in_it_is_more_than_text(monkeypatch, plotted):
    if plotted:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr("ecoprompt.report.draw", lambda summary: None)
    rows = [{**row(EVIL, 0, generation=EVIL), "prompt": EVIL, "target": EVIL}]
    read = Read(page({**summary(EVIL), "recipe": EVIL, "versions": {EVIL: EVIL}}, rows))
    assert read.open == []
    assert read.text.count(EVIL) >= 6 + plotted
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"script", "img", "iframe", "object", "form", "base", "a"}
    assert ("svg" in tags) == plotted == ("pip install" not in read.text)
    links = [
        value
        for _, attributes in read.elements
        for name, value in attributes.items()
        if re.match(r"(xlink:)?href$|src|on|action|data$", name)
    ]
    assert all(link.startswith("#") or link == "data:," for link in links)
    policy = next(attributes for tag, attributes in read.elements if attributes.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")


def test_examples_are_spread_over_the_rows_and_hold_every_run():
    rows = [row(run, index, generation=f"{run}{index}") for run in ("a", "b") for index in range(10)]
    found = examples(rows, 3)
    assert [one.prompt for one in found] == ["Prompt 0", "Prompt 3", "Prompt 6"]
    assert [said(answer) for answer in found[1].answers.values()] == ["a3", "b3"]
    assert examples([], 3) == []


def test_rows_of_several_benchmarks_do_not_mix():
    rows = [{**row("a", 0, generation=name), "benchmark": name} for name in ("one", "two")]
    assert [said(one.answers["a"]) for one in examples(rows, 3)] == ["one", "two"]


def test_without_a_generation_the_values_are_shown():
    assert said({"values": {"exact_match": 1.0, "p": None}}) == "exact match 1.000, p –"
    assert said({"generation": " \n"}) == "(nothing)"
