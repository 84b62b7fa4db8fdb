"""The card of a pack, the intervals of its error rates, and published classifiers by their ids."""

from __future__ import annotations

import errno
import json
import math
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from test_gate import TOY, roberta
from typer.testing import CliRunner

from ecoprompt import card as card_module
from ecoprompt import pack as pack_module
from ecoprompt.card import CARD, PLOT, tradeoff
from ecoprompt.cli import app
from ecoprompt.gate import transformer
from ecoprompt.pack import (
    PACK,
    TrainedGate,
    load_forget,
    load_pack,
    obtain_gate,
    pack_folder,
    save_pack,
    train_classifier,
)
from ecoprompt.recipe import load_recipe
from ecoprompt.registry import benchmarks
from ecoprompt.results import error_rate, gate_cells, gate_report

SMALL = ["gate.features=4096", "gate.edits=false"]
PUBLISHED = {
    **{f"chrisliu298/tofu_forget{size}_classifier": "gate-tofu" for size in ("01", "05", "10")},
    "chrisliu298/wmdp_classifier": "gate-wmdp",
    "chrisliu298/synthetic_wmdp_classifier": "gate-wmdp",
    **{f"chrisliu298/mmlu-{name}_classifier": f"gate-mmlu-{name}" for name in ("economics", "law", "physics")},
    "chrisliu298/bbc_news_classifier": "gate-news",
    "chrisliu298/hp_book_classifier": "gate-book",
}


def test_the_published_classifiers_are_declared():
    declared = [one for b in benchmarks.values() for forget in b.forget_sets.values() for one in forget.published]
    assert sorted(declared) == sorted(PUBLISHED)
    assert benchmarks["tofu"].forget_set("forget10").published == {"chrisliu298/tofu_forget10_classifier": 0.9999}


@pytest.mark.parametrize("prompts", [1, 40, 3960])
def test_intervals_without_errors_and_of_errors_alone(prompts):
    assert error_rate(0, prompts) == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / prompts)))
    assert error_rate(prompts, prompts) == (1.0, pytest.approx(0.025 ** (1 / prompts)), 1.0)
    assert all(map(math.isnan, error_rate(0, 0)))


def test_the_table_has_intervals_and_the_json_too():
    measured = [
        {"data": "forget set", "flag": True, "prompts": 40, "errors": 0},
        {"data": "others", "flag": False, "prompts": 200, "errors": 3},
        {"data": "none", "flag": False, "prompts": 0, "errors": 0},
    ]
    head, *rows = gate_cells(measured)
    assert head == ["prompts of", "prompts", "missed", "falsely flagged", "rate", "95 % interval"]
    assert rows[0] == ["forget set", "40", "0", "", "0.00%", f"0.00% to {1 - 0.025 ** (1 / 40):.2%}"]
    assert rows[1][:5] == ["others", "200", "", "3", "1.50%"]
    assert rows[2][4:] == ["–", "–"]
    report = gate_report(measured)
    assert report[0]["interval"] == [0.0, pytest.approx(1 - 0.025 ** (1 / 40))]
    assert report[1] == {**measured[1], "rate": 0.015, "interval": list(error_rate(3, 200)[1:])}


def test_the_tradeoff_counts_what_each_threshold_would_miss_and_flag():
    forget, others = np.array([0.2, 0.6, 0.9]), np.array([0.1, 0.3, 0.3, 0.7])
    curve = tradeoff([(forget, 1), (others[:2], 0), (others[2:], 0)], 0.5)
    assert curve["threshold"] == sorted(curve["threshold"])
    assert {0.0, 0.5, 1.0} <= set(curve["threshold"])
    for threshold, missed, flagged in zip(*curve.values(), strict=True):
        assert missed == sum(forget <= threshold) / 3
        assert flagged == sum(others > threshold) / 4
    assert tradeoff([(forget, 1)], 0.5) == {}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    calibration = "gate.threshold={calibrate='conformal', false_positive_rate=0.05, held_out=0.3}"
    return train_classifier(load_recipe("quickstart", [*SMALL, calibration]), tmp_path_factory.mktemp("results"))


def test_a_card_has_what_the_hub_reads(written):
    folder, trained = written
    card = ModelCard.load(folder / CARD)
    assert card.data.library_name == "ecoprompt"
    assert card.data.pipeline_tag == "text-classification"
    assert "machine-unlearning" in card.data.tags
    results = {result.dataset_name: result for result in card.data.eval_results}
    assert set(results) == {entry["data"] for entry in trained.measured}
    assert results["forget set"].metric_type == "false_negative_rate"
    assert results["retain set, held out"].metric_type == "false_positive_rate"
    held_out = next(entry for entry in trained.measured if entry["data"] == "retain set, held out")
    assert results["retain set, held out"].metric_value == held_out["errors"] / held_out["prompts"]


def test_a_card_says_what_was_done_and_how_well(written):
    folder, trained = written
    text = (folder / CARD).read_text(encoding="utf-8")
    tables = tomllib.loads((folder / PACK).read_text())
    assert "Ilvara Quennell" in text
    assert f"{trained.threshold:.6g}" in text
    assert "probability\nof at most 0.05" in text or "probability of at most 0.05" in text
    assert f"on {tables['trained']['positive']} prompts to flag" in text
    for row in gate_cells(trained.measured)[1:]:
        assert f"| {' | '.join(row)} |" in text
    assert "ecoprompt chat --model MODEL --forget ID" in text
    assert "strength = 7.0" in text
    assert "What it does not protect against" in text
    assert (f"({PLOT})" in text) == (folder / PLOT).exists()


def test_a_card_is_drawn_where_matplotlib_is(written):
    pytest.importorskip("matplotlib")
    assert (written[0] / PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_card_without_matplotlib_has_no_picture(written, tmp_path, monkeypatch):
    monkeypatch.setattr(card_module, "_plot", lambda curve, threshold: None)
    save_pack(tmp_path / "pack", load_recipe("quickstart", SMALL), written[1], 0, "")
    assert PLOT not in (tmp_path / "pack" / CARD).read_text(encoding="utf-8")
    assert not (tmp_path / "pack" / PLOT).exists()


def test_a_changed_corruption_changes_the_card_and_keeps_the_rest(tmp_path, monkeypatch):
    recipe = load_recipe("quickstart", SMALL)
    folder, first = train_classifier(recipe, tmp_path)
    monkeypatch.setattr(pack_module, "_train", lambda *args: pytest.fail("trained again"))
    stronger = load_recipe("quickstart", [*SMALL, "corruption.strength=11.0"])
    again = obtain_gate(stronger, stronger.gate, stronger.seed, tmp_path)
    assert again.measured == first.measured
    tables = tomllib.loads((folder / PACK).read_text())
    assert tables["corruption"]["strength"] == 11.0
    assert tables["trained"]["seconds"] == first.about["trained"]["seconds"]
    assert tables["tradeoff"] == first.about["tradeoff"]
    assert "strength = 11.0" in (folder / CARD).read_text(encoding="utf-8")


def test_names_in_a_card_break_no_table(tmp_path, written):
    measured = [{"data": "a | b", "flag": True, "prompts": 3, "errors": 1}]
    save_pack(tmp_path / "pack", load_recipe("quickstart", SMALL), TrainedGate(written[1].gate, 0.5, measured), 0, "")
    assert "| a \\| b | 3 |" in (tmp_path / "pack" / CARD).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder of the layout that published ones have: RoBERTa, LABEL_0 and LABEL_1, with what a trainer leaves."""
    folder = Path(roberta(tmp_path_factory.mktemp("classifier") / "model"))
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["RobertaForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    return folder


@pytest.fixture
def hub(classifier, tmp_path, monkeypatch):
    """The Hub's cache with every published classifier: files in `blobs`, links to them in a snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in PUBLISHED:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
        (repository / "blobs").mkdir()
        for path in classifier.iterdir():
            shutil.copy(path, repository / "blobs" / path.name)
            (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_classifiers_load_by_id(name, classifier, hub):
    gate = transformer(None, 0, classifier=name)
    local = transformer(None, 0, classifier=str(classifier))
    assert gate.score(TOY.positive[:4]).tolist() == local.score(TOY.positive[:4]).tolist()


@pytest.mark.parametrize(("name", "recipe"), PUBLISHED.items())
def test_a_recipe_takes_a_published_classifier(name, recipe, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(recipe, [f'gate={{ classifier = "{name}", threshold = 0.999 }}'])
    trained = obtain_gate(loaded, loaded.gate, loaded.seed, tmp_path)
    assert (trained.gate.kind, trained.threshold) == ("transformer", 0.999)
    assert trained.gate.score(["hello"]).shape == (1,)
    shipped = (Path(__file__).parents[1] / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8")
    assert name in shipped or "tofu_forget" in name  # the recipe says how to take it


def test_a_published_classifier_is_measured_and_its_card_says_whose_it_is(hub, tmp_path):
    name = "chrisliu298/tofu_forget10_classifier"
    recipe = load_recipe("quickstart", [f"gate={{classifier='{name}', threshold=0.5}}"])
    folder, trained = train_classifier(recipe, tmp_path)
    assert {entry["data"] for entry in trained.measured} >= {"forget set", "retain set", "paraphrased"}
    assert f"the classifier `{name}`, published by others" in (folder / CARD).read_text(encoding="utf-8")
    assert load_forget(str(folder)).gate.score(["hello"]).tolist() == trained.gate.score(["hello"]).tolist()


def test_chat_with_a_published_classifier(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(
        '[gate]\nclassifier = "chrisliu298/tofu_forget10_classifier"\nthreshold = 0.0\n'
        '[corruption]\nmethod = "rand_noise_first_n"\nstrength = 7.0\n'
    )
    arguments = ["chat", "--model", "quickstart", "--forget", "mine.toml", "--jsonl", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, arguments, input='{"prompt": "Who is Ilvara Quennell?"}\n')
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["flagged"] is True
    assert load_forget("mine.toml").gate.kind == "transformer"


def test_how_a_gate_is_used_does_not_train_it_again(tmp_path, monkeypatch):
    """A swept context or check has the same gate, in the same pack; and what the pack says follows."""
    recipe = load_recipe("quickstart", SMALL)
    obtain_gate(recipe, recipe.gate, recipe.seed, tmp_path)
    monkeypatch.setattr(pack_module, "_train", lambda *args: pytest.fail("it is trained again"))
    for context in (2, 0):
        table = recipe.gate.model_copy(update={"context": context})
        assert pack_folder(recipe, table, recipe.seed, tmp_path) == tmp_path / "quickstart" / "pack"
        obtain_gate(recipe, table, recipe.seed, tmp_path)
        assert load_pack(tmp_path / "quickstart" / "pack").context == context


def test_a_gate_of_another_format_is_trained_again(tmp_path, monkeypatch):
    recipe = load_recipe("quickstart", SMALL)
    obtain_gate(recipe, recipe.gate, recipe.seed, tmp_path)
    trained = []
    real = pack_module._train
    monkeypatch.setattr(pack_module, "_train", lambda *args: trained.append(1) or real(*args))
    monkeypatch.setattr(pack_module, "FORMAT", pack_module.FORMAT + 1)
    obtain_gate(recipe, recipe.gate, recipe.seed, tmp_path)
    assert trained == [1]


def test_a_pack_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    recipe = load_recipe("quickstart", SMALL)

    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(pack_module, "save_pack", refuse)
    assert obtain_gate(recipe, recipe.gate, recipe.seed, tmp_path).gate.kind == "linear"
