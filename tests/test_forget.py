"""The forget spec: what it decides and refuses; and the pack: what was written comes back, what is damaged says so."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from ecoprompt import Forget, InputError, UnguardedError
from ecoprompt import forget as forget_module
from ecoprompt import pack as pack_module
from ecoprompt.gate import linear, load_gate
from ecoprompt.models import render
from ecoprompt.pack import PACK, TrainedGate, load_forget, load_pack, obtain_gate, pack_folder, train_classifier
from ecoprompt.recipe import load_recipe
from ecoprompt.registry import EcopromptError, corruptions
from ecoprompt.sources import GateData

NOISE = {"method": "rand_noise_first_n", "strength": 1.0}
PROMPTS = ["Who is Ilvara Quennell?", "Where was Teodric Amsberg born?", "What is the capital of France?", ""]


def no_gate(texts):
    return [0.0] * len(texts)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"corruption": {}}, "'corruption.method': this key is needed"),
        ({"corruption": {"method": "rand_nois_first_n", "strength": 1.0}}, "did you mean 'rand_noise_first_n'?"),
        ({"corruption": {"method": "rand_noise_first_n"}}, "'corruption.strength': this key is needed"),
        ({"corruption": {**NOISE, "dims": 0}}, "'corruption.dims'"),
        ({"corruption": {**NOISE, "dims": "110%"}}, "'corruption.dims': found '110%'"),
        ({"corruption": {**NOISE, "dim": 1}}, "did you mean 'dims'?"),
        ({"corruption": {**NOISE, "strength": math.nan}}, "'corruption.strength'"),
        ({"corruption": "rand_noise_first_n"}, "'corruption': found 'rand_noise_first_n', expected a table"),
        ({"tokens": "al"}, "did you mean 'all'?"),
        ({"tokens": {"select": "phrases"}}, "'tokens.names': this key is needed"),
        ({"tokens": {"scope": "answer"}}, "'tokens.scope': found 'answer'"),
        ({"tokens": 3}, "'tokens': found 3"),
        ({"threshold": 2}, "'gate.threshold': found 2, expected a number from 0 to 1"),
        ({"threshold": math.nan}, "'gate.threshold': found nan"),
        ({"threshold": "0.5"}, "'gate.threshold': found '0.5'"),
        ({"gate": "linear"}, "'gate': found 'linear', expected a gate or a function"),
        ({"seed": "one"}, "'seed': found 'one'"),
    ],
)
def test_what_is_wrong_with_a_forget_spec_is_said_at_once(changes, problem):
    with pytest.raises(InputError) as caught:
        Forget(**{"gate": no_gate, "corruption": NOISE, **changes})
    assert problem in str(caught.value)


def test_defaults_are_filled_in():
    spec = Forget(no_gate, NOISE)
    assert spec.corruption == {**NOISE, "dims": 1}
    assert spec.tokens == {"select": "all", "scope": "prompt"}


@pytest.mark.parametrize(
    "gate",
    [
        lambda texts: [0.9 if "Potter" in text else 0.5 for text in texts],
        lambda texts: np.array([0.9 if "Potter" in text else 0.5 for text in texts]),
        lambda texts: torch.tensor([0.9 if "Potter" in text else 0.5 for text in texts]),
        lambda texts: [math.nan if "Potter" in text else 0.0 for text in texts],  # what is not known is not let through
        type("Gate", (), {"score": lambda self, texts: ["Potter" in text for text in texts]})(),
    ],
)
def test_any_function_is_a_gate(tokenizer, gate):
    decisions = Forget(gate, NOISE).decide(
        tokenizer, [tokenizer.encode(text) for text in ("Potter?", "Paris?", "Potter?")]
    )
    assert [decision.flagged for decision in decisions] == [True, False, True]
    assert [bool(decision.positions) for decision in decisions] == [True, False, True]
    assert [decision.text for decision in decisions] == ["Potter?", "Paris?", "Potter?"]


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_positions_of_short_prompts(tokenizer, length):
    (decision,) = Forget(lambda texts: [1.0] * len(texts), NOISE).decide(tokenizer, [[270] * length])
    assert decision.flagged
    assert decision.positions == {0: (), 1: (0,), 2: (0,), 3: (0, 1)}[length]


def test_a_turn_that_begins_inside_a_token_is_still_corrupted(tokenizer, monkeypatch):
    """A flagged turn without a token that starts in it corrupts the token that it is part of, not nothing."""
    from ecoprompt.turns import Turn

    spec = Forget(lambda texts: [float("x" in text) for text in texts], NOISE, context=0)
    monkeypatch.setattr(forget_module, "to_text", lambda tokenizer, ids: ("aax b", [(0, 3), (3, 5)]))
    monkeypatch.setattr(
        forget_module, "turns", lambda tokenizer, text: [Turn(0, 2, "aa"), Turn(2, 3, "x"), Turn(3, 5, "b")]
    )
    (decision,) = spec.decide(tokenizer, [[5, 6]])
    assert decision.positions == (0,)


def test_corrupt_copies_and_changes_its_positions_alone(tokenizer):
    spec = Forget(lambda texts: [1.0] * len(texts), {**NOISE, "dims": 2})
    ids = tokenizer.encode("Who is Harry Potter?")
    (decision,) = spec.decide(tokenizer, [ids])
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.randn(len(ids), 8, dtype=dtype)
        kept = before.clone()
        after = spec.corrupt(before, decision)
        assert torch.equal(before, kept)
        assert after.dtype == dtype
        assert torch.equal(after[-1], before[-1])
        assert (after[:-1, :2] != before[:-1, :2]).all()
        assert torch.equal(after[:, 2:], before[:, 2:])


@pytest.mark.parametrize(("share", "dims"), [("25%", 2), ("1%", 1), ("100%", 8)])
def test_a_share_of_the_hidden_size_is_that_many_of_its_dimensions(tokenizer, share, dims):
    ids = tokenizer.encode("Who is Harry Potter?")
    given = torch.randn(len(ids), 8)
    corrupted = []
    for asked in (share, dims):
        spec = Forget(lambda texts: [1.0] * len(texts), {**NOISE, "dims": asked})
        spec.check_hidden_size(8)
        corrupted.append(spec.corrupt(given, *spec.decide(tokenizer, [ids])))
    assert torch.equal(*corrupted)


def test_more_dims_than_the_model_has_are_refused():
    spec = Forget(no_gate, {**NOISE, "dims": 9})
    spec.check_hidden_size(9)
    with pytest.raises(InputError, match="found 9, expected at most the model's hidden size, 8"):
        spec.check_hidden_size(8)
    Forget(no_gate, {"method": "shuffle"}).check_hidden_size(1)


def test_extend_gives_each_answer_noise_of_its_own(tokenizer):
    messages = [{"role": "user", "content": "Potter?"}, {"role": "assistant", "content": "Who?"}]
    messages.append({"role": "user", "content": "Paris?"})
    prompt = tokenizer.encode(render(tokenizer, messages))
    answers = [prompt + tokenizer.encode(text) for text in (" In a cupboard", " No one")]
    spec = Forget(
        lambda texts: [float("Potter" in text) for text in texts],
        NOISE,
        tokens={"select": "all", "scope": "sequence"},
        context=0,
    )
    (decision,) = spec.decide(tokenizer, [prompt])
    # Only the last turn takes in the answer, and it is not flagged.
    extended = [spec.extend(tokenizer, decision, ids, len(prompt)) for ids in answers]
    assert [one.positions for one in extended] == [decision.positions] * 2
    everything = Forget(lambda texts: [1.0] * len(texts), NOISE, tokens={"scope": "sequence"})
    (decision,) = everything.decide(tokenizer, [prompt])
    one, two = (everything.extend(tokenizer, decision, ids, len(prompt)) for ids in answers)
    assert one.positions == tuple(range(len(answers[0]) - 1))
    assert one.selections[0] == two.selections[0]
    assert one.selections[-1].seed_ids != two.selections[-1].seed_ids
    assert everything.extend(tokenizer, decision, prompt, len(prompt)) is decision


@pytest.fixture
def recipe():
    """The quick start with a smaller gate."""
    return load_recipe("quickstart", ["gate.features=4096", "gate.edits=false"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A pack as `train-classifier` writes it."""
    recipe = load_recipe("quickstart", ["gate.features=4096", "gate.edits=false"])
    return train_classifier(recipe, tmp_path_factory.mktemp("results"))


@pytest.fixture
def pack(written, tmp_path):
    """A copy of the pack that may be damaged."""
    return Path(shutil.copytree(written[0], tmp_path / "pack"))


def test_a_pack_decides_as_what_was_written(written, pack, tokenizer):
    loaded = load_pack(pack)
    assert loaded.threshold == written[1].threshold == 0.5
    assert loaded.corruption == {"method": "rand_noise_first_n", "dims": 1, "strength": 7.0}
    assert loaded.tokens == {"select": "all", "scope": "sequence"}
    assert loaded.gate.score(PROMPTS).tolist() == written[1].gate.score(PROMPTS).tolist()
    direct = Forget(written[1].gate, loaded.corruption, 0.5, loaded.tokens)
    ids = [tokenizer.encode(text) for text in PROMPTS]
    assert loaded.decide(tokenizer, ids) == direct.decide(tokenizer, ids)
    assert [decision.flagged for decision in loaded.decide(tokenizer, ids)] == [True, True, False, False]


def test_a_pack_holds_nothing_that_can_carry_code(pack, recipe, tmp_path):
    assert {path.suffix for path in pack.rglob("*") if path.is_file()} - {".png"} == {".toml", ".safetensors", ".md"}
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    from ecoprompt.gate import TransformerGate

    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "is"]))
    config = BertConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=2
    )
    gate = TransformerGate(BertForSequenceClassification(config), BertTokenizerFast(str(words)), 16, 4)
    pack_module.save_pack(tmp_path / "other", recipe, TrainedGate(gate, 0.5, []), 0, "")
    suffixes = {path.suffix for path in (tmp_path / "other").rglob("*") if path.is_file()}
    assert suffixes <= {".toml", ".safetensors", ".json", ".md"}
    torch.testing.assert_close(load_pack(tmp_path / "other").gate.score(["who is"]), gate.score(["who is"]))


def test_a_pack_says_how_often_its_gate_errs(pack):
    tables = tomllib.loads((pack / PACK).read_text())
    assert tables["trained"]["forget"] == "quickstart/people"
    measured = {entry["data"]: entry for entry in tables["measured"]}
    assert {"forget set", "retain set", "paraphrased"} <= measured.keys()
    assert measured["forget set"] == {"data": "forget set", "flag": True, "prompts": 40, "errors": 0}
    assert not measured["retain set"]["flag"]


def edit(name, old, new):
    def damage(pack):
        text = (pack / name).read_text()
        assert old in text
        (pack / name).write_text(text.replace(old, new, 1))

    return damage


DAMAGE = {
    "no format": (edit(PACK, "format = 1", ""), "found format None, expected 1"),
    "wrong format": (edit(PACK, "format = 1", "format = 2"), "found format 2, expected 1"),
    "not TOML": (edit(PACK, "format = 1", "format 1"), "not a forget pack"),
    "not text": (lambda pack: (pack / PACK).write_bytes(b"\xff\xfe\x00"), "not a forget pack"),
    "no gate": (edit(PACK, "[gate]", "[gat]"), "'gate.kind': this key is needed"),
    "no kind": (edit(PACK, "kind", "kin"), "'gate.kind': this key is needed"),
    "unknown kind": (edit(PACK, '"linear"', '"pickle"'), "no gate kind 'pickle'"),
    "other kind": (edit(PACK, '"linear"', '"transformer"'), "gate"),
    "no threshold": (edit(PACK, "threshold", "treshold"), "'gate.threshold': found None"),
    "threshold as text": (edit(PACK, "threshold = 0.5", 'threshold = "0.5"'), "'gate.threshold': found '0.5'"),
    "threshold nobody reaches": (edit(PACK, "threshold = 0.5", "threshold = 5.0"), "'gate.threshold': found 5.0"),
    "no corruption": (edit(PACK, "[corruption]", "[corruptio]"), "no [corruption]"),
    "no method": (edit(PACK, "method", "metho"), "'corruption.method': this key is needed"),
    "wrong method": (edit(PACK, "rand_noise_first_n", "rand_noise_frist_n"), "did you mean 'rand_noise_first_n'?"),
    "wrong parameter": (edit(PACK, "dims = 1", "dims = -1"), "'corruption.dims'"),
    "no share": (edit(PACK, "dims = 1", 'dims = "1000%"'), "'corruption.dims'"),
    "corruption as text": (edit(PACK, "[corruption]", "corruption = 1\n[other]"), "corruption"),
    "wrong selector": (edit(PACK, 'select = "all"', 'select = "al"'), "did you mean 'all'?"),
    "wrong seed": (edit(PACK, "seed = 0", 'seed = "zero"'), "'seed': found 'zero'"),
    "no gate folder": (lambda pack: shutil.rmtree(pack / "gate"), "gate.toml"),
    "no weights": (lambda pack: (pack / "gate" / "gate.safetensors").unlink(), "gate.safetensors"),
    "cut weights": (lambda pack: (pack / "gate" / "gate.safetensors").write_bytes(b"\0" * 50), "gate.safetensors"),
    "empty settings": (lambda pack: (pack / "gate" / "gate.toml").write_text(""), "gate.toml"),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_pack_is_one_clear_message(pack, recipe, tmp_path, damage, problem):
    damage(pack)
    with pytest.raises(InputError) as caught:
        load_forget(str(pack))
    assert problem in str(caught.value)
    assert len(caught.value.problems) == 1
    assert str(pack) in str(caught.value) or "gate kind" in str(caught.value)


@pytest.mark.parametrize("damage", [d for name, (d, _) in DAMAGE.items() if "corruption" not in name])
def test_a_damaged_pack_is_made_again_or_its_gate_is_whole(pack, recipe, damage):
    (pack.parent / recipe.name).mkdir()
    folder = Path(shutil.move(pack, pack.parent / recipe.name / "pack"))
    damage(folder)
    trained = obtain_gate(recipe, recipe.gate, recipe.seed, folder.parents[1])
    assert (np.asarray(trained.gate.score(PROMPTS)) > trained.threshold).tolist() == [True, True, False, False]


def test_a_gate_is_trained_once_for_the_same_data_and_settings(recipe, tmp_path, monkeypatch):
    trainings = []
    train = pack_module._train
    monkeypatch.setattr(pack_module, "_train", lambda *args: trainings.append(args) or train(*args))
    first = obtain_gate(recipe, recipe.gate, 0, tmp_path)
    again = obtain_gate(recipe, recipe.gate, 0, tmp_path)
    assert len(trainings) == 1
    assert again.measured == first.measured
    assert again.gate.score(PROMPTS).tolist() == first.gate.score(PROMPTS).tolist()

    stronger = load_recipe("quickstart", ["gate.features=4096", "gate.edits=false", "corruption.strength=1"])
    obtain_gate(stronger, stronger.gate, 0, tmp_path)
    assert len(trainings) == 1  # no part of what the gate learns from
    other = load_recipe("quickstart", ["gate.features=2048", "gate.edits=false"])
    obtain_gate(other, other.gate, 0, tmp_path)
    assert len(trainings) == 2
    obtain_gate(recipe, recipe.gate, 1, tmp_path)  # another seed, as in a sweep
    assert len(trainings) == 3
    data = pack_module._gate_data(recipe)
    monkeypatch.setattr(
        pack_module, "_gate_data", lambda recipe: type(data)(data.positive[1:], data.negative, data.checks)
    )
    obtain_gate(other, other.gate, 0, tmp_path)
    assert len(trainings) == 4


def test_a_gate_that_a_sweep_changes_has_a_folder_of_its_own(recipe, tmp_path):
    assert pack_folder(recipe, recipe.gate, recipe.seed, tmp_path) == tmp_path / "quickstart" / "pack"
    other = recipe.gate.model_copy(update={"threshold": 0.9})
    folders = {pack_folder(recipe, table, seed, tmp_path) for table in (recipe.gate, other) for seed in (0, 1)}
    assert len(folders) == 4


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["save", "toml", "rmtree", "rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_being_killed_leaves_a_whole_pack_or_none(written, recipe, tmp_path, monkeypatch, step, existing):
    folder = tmp_path / "pack"
    if existing:
        shutil.copytree(written[0], folder)
    new = TrainedGate(written[1].gate, 0.75, [])

    def save():
        pack_module.save_pack(folder, recipe, new, 0, "new")

    reached = 0
    for last in range(8):  # killed before the first, the second, ... of such steps
        calls = iter(range(100))

        def killed(real, calls=calls, last=last):
            def step(*args, **kwargs):
                if next(calls) == last:
                    raise Killed
                return real(*args, **kwargs)

            return step

        with monkeypatch.context() as patch:
            if step == "save":
                patch.setattr(type(new.gate), "save", killed(type(new.gate).save))
            elif step == "toml":
                patch.setattr(pack_module, "write_text_atomic", killed(pack_module.write_text_atomic))
            elif step == "rmtree":
                patch.setattr(shutil, "rmtree", killed(shutil.rmtree))
            else:
                patch.setattr(Path, "rename", killed(Path.rename))
            try:
                save()
            except Killed:
                reached += 1
            else:
                break
            if folder.exists():
                assert load_pack(folder).threshold in ((0.5, 0.75) if existing else (0.75,))
    assert reached
    assert load_pack(folder).threshold == 0.75
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_a_threshold_is_calibrated_on_prompts_held_out(tmp_path, monkeypatch):
    recipe = load_recipe(
        "quickstart",
        [
            "gate.features=4096",
            "gate.edits=false",
            "gate.threshold={calibrate='conformal', false_positive_rate=0.05, held_out=0.3}",
        ],
    )
    folder, trained = train_classifier(recipe, tmp_path)
    assert 0 < trained.threshold < 1
    held_out = next(entry for entry in trained.measured if entry["data"] == "retain set, held out")
    assert held_out["errors"] <= 0.05 * (held_out["prompts"] + 1)
    retain = next(entry for entry in trained.measured if entry["data"] == "retain set")
    assert retain["prompts"] + held_out["prompts"] <= 300
    assert load_pack(folder).threshold == trained.threshold
    assert obtain_gate(recipe, recipe.gate, recipe.seed, tmp_path).threshold == trained.threshold
    strict = load_recipe("quickstart", ["gate.threshold={calibrate='conformal', false_positive_rate=1e-6}"])
    monkeypatch.setattr(pack_module, "_make_gate", lambda *args: pytest.fail("told only after the training"))
    with pytest.raises(InputError, match="false_positive_rate"):
        train_classifier(strict, tmp_path)


def test_a_published_classifier_is_not_trained(monkeypatch, tmp_path):
    asked = []
    recipe = load_recipe("tofu")
    monkeypatch.setattr(pack_module, "_make_gate", lambda table, texts, *rest: asked.append((table.kind, texts)))
    trained = obtain_gate(recipe, recipe.gate, 0, tmp_path)
    assert asked == [("transformer", None)]
    assert (trained.threshold, trained.measured) == (0.9999, [])
    assert not list(tmp_path.iterdir())


def test_load_forget_takes_recipes_and_folders(pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_forget(str(pack)).corruption["strength"] == 7.0
    small = tmp_path / "mine.toml"
    small.write_text(
        '[data]\nforget = "quickstart/people"\n[gate]\nfeatures = 4096\nedits = false\n'
        '[corruption]\nmethod = "shuffle"\n[run.eco]\nmodel = "quickstart"\nforget = true\n'
    )
    assert load_forget("mine.toml").corruption == {"method": "shuffle"}
    assert load_forget("results/mine/pack").gate.score(PROMPTS[:1])[0] > 0.5


def test_a_pack_of_names_is_written_and_read(tmp_path, tokenizer):
    recipe = load_recipe("quickstart", ["gate={kind='phrases', names=['Ilvara Quennell']}"])
    folder, trained = train_classifier(recipe, tmp_path)
    loaded = load_forget(str(folder))
    asked = [tokenizer.encode(text) for text in ("Who is Ilvara Quennell?", "Who is Ed Low?")]
    assert [one.flagged for one in loaded.decide(tokenizer, asked)] == [True, False]
    assert loaded.gate == trained.gate
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "It was not: it is of the kind `phrases`, as it stands, with names = " in card
    assert "trained on the first two sets" not in card


def test_load_forget_names_what_is_wrong(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain.toml").write_text('[model]\nname = "quickstart"\n')
    (tmp_path / "nodata.toml").write_text('[corruption]\nmethod = "shuffle"\n')
    for reference, problem in {
        "empty": "holds no forget.toml",
        "quickstrat": "did you mean 'quickstart'?",
        "missing.toml": "no pack folder, recipe or Hub id",
        "plain.toml": "no [corruption]",
        "nodata.toml": "needs [data] forget",
    }.items():
        with pytest.raises(InputError) as caught:
            load_forget(reference)
        assert problem in str(caught.value)
    with pytest.raises(EcopromptError, match="the pack 'somebody/something' is not here"):
        load_forget("somebody/something")


def test_a_gate_kept_by_itself_scores_the_same(tmp_path):
    gate = linear(GateData(["Who is Mara Venn?"] * 3, ["Who is Ed Low?"] * 3), 0, features=256)
    gate.save(tmp_path)
    assert load_gate(tmp_path, "linear").score(PROMPTS).tolist() == gate.score(PROMPTS).tolist()
    assert not list(tmp_path.glob("*.json"))
    assert json.dumps(gate.score(["x"]).tolist())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "expected a number for each text"),
        (0.3, "expected a number for each text"),
        (["high"], "expected a number for each text"),
        ([0.1, 0.2], "2 scores for 1 texts"),
        ([7.0], "expected numbers from 0 to 1"),
    ],
)
def test_what_no_gate_may_say(tokenizer, said, words):
    with pytest.raises(InputError, match=words):
        Forget(lambda texts: said, NOISE).decide(tokenizer, [[5, 6]])


def test_a_corruption_of_ones_own_has_to_keep_the_shape(tokenizer, monkeypatch):
    monkeypatch.setitem(corruptions._items, "narrow", lambda embeddings, generator: embeddings[:, :3])
    spec = Forget(lambda texts: [1.0 for _ in texts], {"method": "narrow"})
    (decision,) = spec.decide(tokenizer, [[5, 6, 7]])
    with pytest.raises(EcopromptError, match=r"'narrow' made embeddings of shape \[2, 3\], expected \[2, 4\]"):
        spec.corrupt(torch.randn(3, 4), decision)


def test_a_corruption_that_changes_nothing_is_refused(tokenizer):
    spec = Forget(lambda texts: [1.0 for _ in texts], {"method": "shuffle"})
    decisions = spec.decide(tokenizer, [[5], [5, 6, 7]])
    with pytest.raises(UnguardedError, match="leaves the 1 selected"):
        spec.corrupt(torch.randn(1, 4), decisions[0])
    for seed in range(20):
        again = Forget(spec.gate, {"method": "shuffle"}, seed=seed)
        embeddings = torch.randn(3, 4)
        assert not torch.equal(again.corrupt(embeddings, decisions[1])[:2], embeddings[:2])
