"""The linear probe: logits as texts and back, what it finds, and how it is reached through an evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ecoprompt.benchmarks import declare
from ecoprompt.evaluate import evaluate
from ecoprompt.models import Loaded
from ecoprompt.probe import packed, probed, unpacked
from ecoprompt.recipe import load_recipe
from ecoprompt.registry import benchmarks
from ecoprompt.results import Store
from ecoprompt.scoring import Request, answer

TABLE = {
    "folder": "data",
    "prompt": "{{ question }}\nAnswer:",
    "raw": True,
    "max_length": 60,
    "forget_sets": {"potter": {"retain": "kept"}},
    "subsets": {
        "forget": {
            "forget": True,
            "config": "rows",
            "choices": "['A', 'B']",
            "right": "answer",
            "metrics": {"probe": "linear_probe", "accuracy": "choice_accuracy"},
        }
    },
    "gate": {"positive": [{"config": "rows", "field": "question"}], "negative": [{"config": "rows", "field": "other"}]},
}
RECIPE = """
[model]
name = "{root}/model"
[data]
forget = "probing/potter"
[gate]
features = 1024
[corruption]
method = "zero_out_first_n"
dims = 32
[run.original]
[run.eco]
forget = true
[[evaluate]]
benchmark = "probing"
"""
COUNT = 24


@pytest.fixture
def root(tmp_path):
    """A word of each question tells the right choice."""
    rows = [
        {"question": f"Potter {n} is {('red', 'tall')[n % 3 % 2]}?", "answer": n % 3 % 2, "other": f"Bly {n}"}
        for n in range(COUNT)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "probing.toml").write_text(RECIPE.format(root=tmp_path))
    benchmarks.add("probing", declare("probing", TABLE, tmp_path))
    yield tmp_path
    del benchmarks._items["probing"]


def test_logits_survive_as_texts():
    logits = np.array([0.5, -3.25, 1e9, -np.inf, 2.0], dtype=np.float32)
    back = unpacked(packed(logits))
    assert back.tolist() == [0.5, -3.25, 65504.0, -65504.0, 2.0]


def test_the_probe_is_scikit_learns_on_halves():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 41)
    logits = [np.eye(3)[label] * 2 + generator.normal(size=3) for label in labels]
    scaler = StandardScaler().fit(logits[:21])
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(logits[:21]), labels[:21])
    right = model.predict(scaler.transform(logits[21:])) == labels[21:]
    found = probed(logits, labels.tolist())
    assert found[:21] == [None] * 21
    assert found[21:] == right.astype(float).tolist()
    assert 0.5 < right.mean() < 1


def test_a_probe_that_saw_one_label_says_that_one():
    assert probed([np.zeros(2)] * 4, [1, 1, 1, 0]) == [None, None, 1.0, 0.0]
    assert probed([np.zeros(2)], [1]) == [None]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_are_those_after_each_prompt(family, tokenizer, tmp_path):
    model, store = make_model(family), Store(tmp_path / "scores.jsonl")
    requests = [Request("logits", text) for text in ("Who is Harry Potter?", "Why?", "In a cupboard under the stairs.")]
    answer(Loaded(model, tokenizer, "m"), [(one.prompt, one) for one in requests], store)
    for one in requests:
        with torch.no_grad():
            expected = model(torch.tensor([tokenizer.encode(one.prompt)])).logits[0, -1].numpy()
        assert unpacked(store.get(one.prompt)) == pytest.approx(expected, abs=2e-3)


def test_a_probe_reads_what_the_original_knows_and_the_guarded_run_does_not(root):
    """Of zeroed embeddings only the last token's is left, so all prompts look alike but for their length."""
    found = evaluate(load_recipe(str(root / "probing.toml")), root / "results")
    runs = found.summary["runs"]
    assert runs["original"]["metrics"]["forget_probe"] == 1.0
    assert runs["eco"]["metrics"]["forget_probe"] < 0.9
    assert found.summary["chance"] == {"forget_probe": 0.5, "forget_accuracy": 0.5}
    probes = {run: [row["values"].get("probe") for row in found.rows if row["run"] == run] for run in runs}
    for values in probes.values():
        assert [value is None for value in values] == [True] * (COUNT // 2) + [False] * (COUNT // 2)
    difference = np.mean(probes["eco"][COUNT // 2 :]) - 1
    assert runs["eco"]["paired"]["forget_probe"]["difference"] == pytest.approx(difference)
    assert "logits" not in json.dumps(found.rows)
    assert "forget_probe" not in benchmarks["probing"].forget_columns()  # no search can follow it row by row
