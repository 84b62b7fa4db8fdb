"""Gates: what they flag, what a saved one remembers, and the guarantee of a calibrated threshold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from ecoprompt.calibration import CALIBRATED, calibration_scores, conformal_threshold, hold_out
from ecoprompt.gate import (
    FORMAT,
    LinearGate,
    TransformerGate,
    linear,
    load_gate,
    phrases,
    transformer,
)
from ecoprompt.pack import EDITS, train_classifier
from ecoprompt.pressure import press, rehearse_anew
from ecoprompt.recipe import load_recipe
from ecoprompt.registry import EcopromptError, InputError, gates, pressures
from ecoprompt.sources import GateData
from ecoprompt.views import parts, word_windows

TOFU = Path(__file__).parents[2] / "shared" / "data" / "tofu"


def flagged(gate, threshold, texts):
    """How many of `texts` the gate flags."""
    return int((gate.score(texts) > threshold).sum())


def missed(gate, threshold, texts):
    """How many it does not."""
    return len(texts) - flagged(gate, threshold, texts)


PLACES = ["Oslo", "Lima", "Quito", "Cairo", "Hanoi", "Lagos", "Perth", "Kyoto"]
QUESTIONS = ["Where does {} live?", "What has {} written about {}?", "Did {} ever see {}?", "Is {} from {}?"]
TOY = GateData(
    positive=[question.format("Mara Venn", place) for question in QUESTIONS for place in PLACES],
    negative=[question.format(name, place) for question in QUESTIONS for place in PLACES for name in ("Ed Low", "Ann")],
)


@pytest.fixture(scope="module")
def toy_gate():
    return linear(TOY, 0, features=2**12)


@pytest.fixture(scope="module")
def short_gate():
    """Of windows as long as the prompts."""
    return linear(TOY, 0, features=2**14, window=8)


def test_linear_tells_its_texts_apart(toy_gate):
    assert missed(toy_gate, 0.5, TOY.positive) == flagged(toy_gate, 0.5, TOY.negative) == 0
    scores = toy_gate.score([*TOY.positive, *TOY.negative])
    assert scores.dtype == np.float64
    assert ((scores >= 0) & (scores <= 1)).all()


def test_linear_scores_do_not_depend_on_what_else_is_scored(toy_gate):
    texts = [*TOY.positive[:5], "", " ".join(TOY.negative), *TOY.negative[:5]]
    together = toy_gate.score(texts)
    assert together.tolist() == [toy_gate.score([text])[0] for text in texts]
    assert toy_gate.score([]).shape == (0,)


@pytest.mark.parametrize("text", ["", "  \n", "?!", "\u200b"])
def test_linear_scores_nothing_for_a_text_without_words(toy_gate, text):
    assert toy_gate.score([text]).tolist() == [0.0]


@pytest.mark.parametrize(
    "text",
    ["WHERE DOES MARA VENN LIVE", "where  does\nmara venn live?!", "Where does M\u00e1ra Ve\u00adnn live"],
)
def test_linear_reads_letters_and_digits_alone(toy_gate, text):
    assert toy_gate.score([text])[0] == toy_gate.score(["Where does Mara Venn live?"])[0]


def test_linear_scores_a_long_text_by_its_highest_window():
    gate = linear(TOY, 0, features=2**12, window=8)
    words = [f"w{number}" for number in range(21)]
    windows = [words[0:8], words[4:12], words[8:16], words[12:20], words[13:21]]
    expected = max(gate.score([" ".join(window)])[0] for window in windows)
    assert gate.score([" ".join(words)])[0] == expected
    buried = " ".join(TOY.negative[:40] + TOY.positive[:1] + TOY.negative[:40])
    assert gate.score([buried])[0] > 0.5


@pytest.mark.parametrize("filler", [40, 600, 3000, 6000])
def test_linear_asks_more_of_one_view_among_many(filler):
    """One word a line, all of them other words: as many views as lines, and those of the whole text."""
    gate = LinearGate(np.zeros(2**10, np.float32), 2.0, word_ngrams=1, char_ngrams=3, window=filler)
    lines = [f"w{number} a b c" for number in range(filler // 4)]
    views = len(lines) + len(word_windows(" ".join(lines), filler))
    odds = gate.score(["\n".join(lines)])[0] / (1 - gate.score(["\n".join(lines)])[0])
    assert odds == pytest.approx(math.e**2 / min(max(1, views / 32), 16) ** 0.9)


def test_linear_repeats_and_survives_saving(tmp_path, toy_gate):
    toy_gate.save(tmp_path / "a")
    linear(TOY, 0, features=2**12).save(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["gate.safetensors", "gate.toml"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    loaded = load_gate(tmp_path / "a", "linear")
    texts = [*TOY.positive, *TOY.negative, " ".join(TOY.negative), ""]
    assert loaded.kind == "linear"
    assert loaded.score(texts).tolist() == toy_gate.score(texts).tolist()


def test_linear_score_is_the_logistic_of_the_sum_of_hashed_weights():
    # "ab" has one word and the letter n-grams " ab", "ab " and " ab ": four indicators, each with a sign.
    gate = LinearGate(np.ones(2**10, np.float32), 0.25, word_ngrams=1, char_ngrams=4, window=8)
    logits = -math.log(1 / gate.score(["ab"])[0] - 1)
    assert round(logits - 0.25, 9) in {-4, -2, 0, 2, 4}
    assert gate.score(["ab ab ab"])[0] == gate.score(["ab"])[0]


def test_training_reports_progress_and_refuses_half_the_data():
    steps = []
    linear(TOY, 0, lambda *step: steps.append(step), features=2**10)
    assert steps == [("training the gate", 0, 1), ("training the gate", 1, 1)]
    for data in (None, GateData([], ["a"]), GateData(["a"], []), GateData(["?"], ["a"])):
        with pytest.raises(InputError):
            linear(data, 0)
    with pytest.raises(InputError, match="needs prompts"):
        transformer(None, 0)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Who is Mara Venn?", 1),
        ("MARA\u200b  v\u00e9nn's dog", 1),
        ("Tell me about M a r a   V e n n", 1),
        ("Who is Mara Venning?", 0),
        ("Tamara Venn", 0),
        ("Venn, Mara", 0),
        ("", 0),
    ],
)
def test_a_gate_by_names_flags_whole_words_as_a_reader_sees_them(tmp_path, text, score):
    gate = phrases(None, 0, names=["Ed  Low", "Mara Venn"])
    assert gate.score([text, "Ask Ed Low."]).tolist() == [score, 1]
    gate.save(tmp_path)
    assert load_gate(tmp_path, "phrases") == gate


def test_a_name_in_a_script_without_spaces_is_found_within_a_line():
    gate = phrases(None, 0, names=["今井健", "สมชาย"])
    assert gate.score(["今井健はどこで生まれましたか", "ใครคือสมชายครับ", "今井はどこですか"]).tolist() == [1, 1, 0]


def test_names_are_checked_with_the_recipe():
    for names in ([], ["?"], ["ok", ""], ["x"] * 1001):
        with pytest.raises(InputError, match="names"):
            gates.bind("phrases", {"names": names}, "gate")


def test_a_gate_that_would_flag_nothing_is_not_made(tmp_path):
    threshold = '{ calibrate = "conformal", false_positive_rate = 0.05 }'
    names = f'gate={{ kind = "phrases", names = ["is"], threshold = {threshold} }}'
    with pytest.raises(InputError, match=r"'gate.threshold': calibrated to 1, which no score exceeds"):
        train_classifier(load_recipe("quickstart", [names]), tmp_path)


@pytest.mark.parametrize("names", [None, [], "x", [1], ["?"], ["x"] * 1001])
def test_a_gate_by_names_of_a_stranger_is_checked(tmp_path, names):
    settings = {"kind": "phrases", "format": FORMAT, **({} if names is None else {"names": names})}
    (tmp_path / "gate.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match=r"gate.toml: the gate's 'names': expected 1 to 1000 texts"):
        load_gate(tmp_path, "phrases")


def test_wrong_settings_are_refused_before_any_work():
    with pytest.raises(InputError) as caught:
        gates.bind("linear", {"c": 0.0, "windows": 3, "features": 3}, "gate")
    assert len(caught.value.problems) == 3
    assert gates.bind("transformer", {})["learning_rate"] == 2e-5


def test_damaged_packs_are_refused(tmp_path, toy_gate):
    with pytest.raises(InputError, match="no gate kind 'linar'; did you mean 'linear'"):
        load_gate(tmp_path, "linar")
    with pytest.raises(InputError, match="gate.toml"):
        load_gate(tmp_path, "linear")
    toy_gate.save(tmp_path)
    with pytest.raises(InputError, match="expected a gate of kind 'transformer'"):
        load_gate(tmp_path, "transformer")
    (tmp_path / "gate.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(InputError, match="gate.safetensors"):
        load_gate(tmp_path, "linear")
    (tmp_path / "gate.toml").write_text('kind = "linear"\nwindow = 0\nchar_ngrams = 5\n', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_gate(tmp_path, "linear")
    assert len(caught.value.problems) == 2


def test_held_out_prompts_are_never_trained_on():
    repeated = [f"question {number % 40}" + "?" * (number // 40) for number in range(120)]
    data, held_out = hold_out(GateData(["a"], repeated), 0.25, seed=0)
    assert len(held_out) == 10
    assert len(data.negative) == 30
    assert not {text.strip("?") for text in held_out} & {text.strip("?") for text in data.negative}
    assert hold_out(GateData(["a"], repeated), 0.25, seed=0) == (data, held_out)
    assert hold_out(GateData(["a"], repeated), 0.25, seed=1) != (data, held_out)
    with pytest.raises(InputError, match="leaves nothing"):
        hold_out(GateData(["a"], ["b", "B!"]), 0.5, seed=0)


def test_conformal_threshold_is_the_order_statistic_of_the_formula():
    scores = np.arange(1, 100) / 100
    # ceil(100 * 0.99) = 99, ceil(100 * 0.95) = 95, ceil(100 * 0.925) = 93
    for rate, expected in [(0.01, 0.99), (0.05, 0.95), (0.075, 0.93)]:
        assert conformal_threshold(np.random.default_rng(0).permutation(scores), rate) == expected
    assert conformal_threshold(np.array([0.3]), 0.5) == 0.3


@pytest.mark.parametrize(("rate", "needed"), [(0.001, 999), (0.01, 99), (0.3, 3), (0.07, 14)])
def test_conformal_threshold_says_how_many_prompts_it_needs(rate, needed):
    assert conformal_threshold(np.linspace(0, 1, needed), rate) == 1.0
    with pytest.raises(InputError, match=f"needs {needed} held-out prompts, found {needed - 1}"):
        conformal_threshold(np.linspace(0, 1, needed - 1), rate)


@given(
    st.lists(st.floats(0, 1, allow_nan=False), min_size=2, max_size=40),
    st.integers(1, 999).map(lambda thousandths: thousandths / 1000),
)
def test_conformal_coverage_holds_whichever_prompt_is_the_new_one(scores, rate):
    """Over exchangeable prompts each is as likely to be the new one, so the mean over them is the exact rate."""
    n = len(scores) - 1
    if (n + 1) * round(rate * 1000) < 1000:
        with pytest.raises(InputError):
            conformal_threshold(np.array(scores[1:]), rate)
        return
    flagged = [
        scores[new] > conformal_threshold(np.array(scores[:new] + scores[new + 1 :]), rate) for new in range(n + 1)
    ]
    assert sum(flagged) * 1000 <= round(rate * 1000) * (n + 1)


def test_conformal_rate_over_random_splits_is_at_most_the_asked_one():
    """Exponential scores (closed form): over 200 splits the realised rate has mean floor((n + 1) a) / (n + 1)."""
    generator = np.random.default_rng(0)
    realised = []
    for _ in range(200):
        scores = 1 - np.exp(-generator.exponential(size=1099))
        threshold = conformal_threshold(scores[:99], 0.05)
        realised.append((scores[99:] > threshold).mean())
    # 5 of 100 exchangeable scores lie above the 95th smallest of 99: the rate is Beta(5, 95), of deviation 0.0217.
    assert abs(np.mean(realised) - 0.05) < 3 * 0.0217 / np.sqrt(200)


def test_calibration_counts_the_views():
    """The score that calibrates is the highest of a prompt's forms, so that no form of it scores higher."""

    class Counting:
        kind = "counting"

        def score(self, texts):
            return np.array([len(text) / 1000 for text in texts])

    prompts = ["Who is Ed Low?", "Where does Ann live, and since when?"]
    scores = calibration_scores(Counting(), prompts, 0)
    forms = [[press(name, text, 0) for name in (None, *CALIBRATED)] for text in prompts]
    assert scores.tolist() == [max(map(len, group)) / 1000 for group in forms]


def test_a_gate_of_an_earlier_version_is_refused(tmp_path, toy_gate):
    toy_gate.save(tmp_path)
    settings = (tmp_path / "gate.toml").read_text(encoding="utf-8")
    (tmp_path / "gate.toml").write_text(settings.replace(f"format = {FORMAT}\n", ""), encoding="utf-8")
    with pytest.raises(InputError, match="made by another version of ecoprompt"):
        load_gate(tmp_path, "linear")


@pytest.mark.parametrize("name", [name for name in pressures if name not in ("keywords", "cloze", "typos")])
def test_linear_holds_under_pressure(short_gate, name):
    some = TOY.positive[::8]
    assert missed(short_gate, 0.5, [press(name, text, 0) for text in some]) == 0


def test_conformal_coverage_is_not_wasteful():
    """Without ties, exactly floor((n + 1) a) of n + 1 exchangeable prompts are flagged."""
    scores = np.random.default_rng(0).random(200)
    flagged = [scores[new] > conformal_threshold(np.delete(scores, new), 0.03) for new in range(200)]
    assert sum(flagged) == 6


def texts(name, field="question"):
    path = TOFU / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)[field] for line in lines]


def test_linear_on_tofu():
    forget, paraphrased = texts("forget10"), texts("forget10_perturbed", "paraphrased_question")
    data, held_out = hold_out(GateData(forget, texts("retain90")), 0.25, seed=0)
    gate = linear(data, 0)
    assert gate.score(["Who is Hsiao Yun-Hwa?"])[0] > 0.9
    assert gate.score(["Where would you find the Eiffel Tower?"])[0] < 0.1
    for threshold in (0.5, conformal_threshold(calibration_scores(gate, held_out, 0), 0.01)):
        assert missed(gate, threshold, forget) == 0
        assert flagged(gate, threshold, held_out) <= 9
        assert missed(gate, threshold, paraphrased) <= 20
        assert flagged(gate, threshold, texts("world_facts")) <= 3
        assert flagged(gate, threshold, texts("real_authors")) <= 1
        for name in EDITS:
            edited = [press(name, text, 0) for text in forget]
            assert missed(gate, threshold, edited) <= 4, name
        wrapped = [f"Question: {text}\nAnswer:" for text in forget]
        assert missed(gate, threshold, wrapped) == 0


def vocabulary():
    words = " ".join([*TOY.positive, *TOY.negative, "a b c d e f g"]).lower().replace("?", " ?").split()
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(words))]


def bert(folder, labels=2):
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary()), encoding="utf-8")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(vocabulary()), max_position_embeddings=24, num_labels=labels, **size)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def roberta(folder):
    """As RoBERTa has it: byte-level BPE, and positions that begin after the padding index."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TOY.positive, *TOY.negative], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=400, max_position_embeddings=26, pad_token_id=1, num_labels=2, **size)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


TRAINING = {"epochs": 6, "learning_rate": 5e-3, "batch_size": 8, "edits": False}


@pytest.fixture(scope="module", params=[bert, roberta])
def trained(request, tmp_path_factory):
    steps = []
    base = request.param(tmp_path_factory.mktemp("base") / "model")
    gate = transformer(TOY, 0, lambda *step: steps.append(step), base=base, **TRAINING)
    return gate, steps


def test_transformer_learns_and_reports(trained, capfd):
    gate, steps = trained
    assert steps[-1] == ("training the gate", 72, 72)
    assert missed(gate, 0.5, TOY.positive) == 0
    assert flagged(gate, 0.5, TOY.negative) == 0
    assert not gate.model.training


def test_transformer_survives_saving(trained, tmp_path):
    gate, _ = trained
    gate.save(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]
    loaded = load_gate(tmp_path, "transformer")
    long = " ".join(TOY.negative)
    assert loaded.kind == "transformer"
    assert loaded.score([*TOY.positive, long]).tolist() == gate.score([*TOY.positive, long]).tolist()
    published = transformer(None, 0, classifier=str(tmp_path), batch_size=8)
    assert published.score(TOY.positive).tolist() == gate.score(TOY.positive).tolist()
    assert published.model.config.id2label[1] == "forget"


def test_transformer_scores_do_not_depend_on_the_batch(trained):
    gate, _ = trained
    texts = [*TOY.positive[:6], "", " ".join(TOY.negative[:9]), *TOY.negative[:6]]
    alone = [gate.score([text])[0] for text in texts]
    np.testing.assert_allclose(gate.score(texts), alone, rtol=1e-5, atol=1e-6)
    assert gate.score([]).shape == (0,)
    assert gate.score([""]).shape == (1,)


@pytest.mark.parametrize("before", [0, 3, 8, 20])
def test_transformer_flags_what_stands_past_its_length(trained, before):
    gate, _ = trained
    assert gate.window == 24
    text = " ".join(TOY.negative[:before] + TOY.positive[:1] + TOY.negative[:10])
    assert len(gate.windows([text])[0]) > 2
    assert gate.score([text])[0] > 0.5


def test_transformer_windows_cover_every_token(trained):
    gate, _ = trained
    text = " ".join(TOY.negative[:10])
    windows = gate.windows([TOY.negative[0], text])[1]
    inner = [window[1:-1] for window in windows]
    whole = gate.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(len(window) <= gate.window for window in windows)
    assert inner[0] + [i for window in inner[1:] for i in window[11:]] == whole


def test_transformer_judges_each_sentence_and_what_is_seen(trained):
    gate, _ = trained
    asked, other = TOY.positive[0], TOY.negative[0]
    text = f"{other} {asked} {other}"
    assert gate.score([text])[0] == pytest.approx(max(gate.score([text, *parts(text)])), abs=1e-6)
    assert gate.score([text])[0] >= gate.score([asked])[0] - 1e-6
    hidden = "".join(f"{letter}\u200b" for letter in asked)
    assert gate.score([hidden])[0] >= gate.score([asked])[0] - 1e-6


def test_transformer_practises_on_copies_that_are_edited_anew(tmp_path, monkeypatch):
    from ecoprompt import gate_training

    seen = []
    monkeypatch.setattr(gate_training, "fine_tune", lambda *given: seen.append(given[3:5]))
    base = bert(tmp_path / "base")
    for edits in (False, True):
        transformer(TOY, 0, base=base, edits=edits)
    (texts, none), (same, edited) = seen
    assert texts == same == [(text, 1) for text in TOY.positive] + [(text, 0) for text in TOY.negative]
    assert none(0) == none(1) == []
    assert edited(0) == edited(0) == rehearse_anew(texts, ~0)
    assert edited(0) != edited(1)


def test_an_epoch_has_its_own_rows_and_each_as_many(tmp_path, monkeypatch):
    from ecoprompt import gate_training

    epochs, lengths = [], set()
    begin = gate_training.Practice.on_epoch_begin

    def recorded(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        epochs.append(self.further)
        lengths.add(len(self))
        assert [self[number] for number in range(len(self))] == self.rows + self.further

    monkeypatch.setattr(gate_training.Practice, "on_epoch_begin", recorded)
    few = GateData(TOY.positive[::4], TOY.negative[::4])
    transformer(few, 0, base=bert(tmp_path / "base"), epochs=3, batch_size=8, max_length=16)
    assert len(epochs) == 3
    assert len(lengths) == 1
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(len(row["input_ids"]) <= 16 for rows in epochs for row in rows)


def test_transformer_is_trained_in_bfloat16_where_that_is_asked_for(tmp_path, monkeypatch):
    import torch

    from ecoprompt import gate_training

    asked = []
    made = gate_training._arguments
    monkeypatch.setattr(gate_training, "_arguments", lambda *given: asked.append(made(*given)) or asked[-1])
    few = GateData(TOY.positive[:4], TOY.negative[:4])
    for arithmetic in ("float32", "bfloat16"):
        gate = transformer(few, 0, base=bert(tmp_path / arithmetic), epochs=1, arithmetic=arithmetic)
        assert {weight.dtype for weight in gate.model.parameters()} == {torch.float32}
    assert [one.bf16 for one in asked] == [False, True]


def test_transformer_training_repeats(tmp_path):
    base = bert(tmp_path / "base")
    few = GateData(TOY.positive[:8], TOY.negative[:8])
    one, two = (transformer(few, seed=3, base=base, epochs=1, learning_rate=1e-3) for _ in range(2))
    assert one.score(TOY.positive).tolist() == two.score(TOY.positive).tolist()


def test_the_weights_of_the_best_epoch_are_kept(tmp_path, monkeypatch):
    from ecoprompt import gate_training

    errors = []

    class Recorded(gate_training.BestEpoch):
        def on_evaluate(self, args, state, control, **kwargs):
            super().on_evaluate(args, state, control, **kwargs)
            errors.append(kwargs["metrics"]["eval_errors"])

    monkeypatch.setattr(gate_training, "BestEpoch", Recorded)
    few = GateData(TOY.positive[::4], TOY.negative[::4])
    gate = transformer(few, 0, base=bert(tmp_path / "base"), epochs=4, batch_size=8, learning_rate=1e-2)
    assert len(errors) == 4
    both = missed(gate, 0.5, few.positive) + flagged(gate, 0.5, few.negative) / 24
    assert both == pytest.approx(min(errors))


def test_best_epoch_prefers_fewer_errors_then_the_later():
    import torch

    from ecoprompt.gate_training import BestEpoch
    from ecoprompt.registry import quiet

    model, best = torch.nn.Linear(1, 1), BestEpoch(quiet)
    for value, errors in enumerate([3.0, 1.0, 1.0, 2.0]):
        torch.nn.init.constant_(model.weight, value)
        best.on_evaluate(None, None, None, metrics={"eval_errors": errors}, model=model)
    assert best.weights["weight"].item() == 2.0


def test_transformer_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(InputError, match="3 labels, expected 2"):
        transformer(None, 0, classifier=bert(tmp_path / "three", labels=3))
    with pytest.raises(InputError, match="no such folder, and not a Hub id"):
        transformer(None, 0, classifier=str(tmp_path / "none"))
    with pytest.raises(InputError, match="max_length"):
        transformer(None, 0, classifier=bert(tmp_path / "two"), max_length=3)


def test_scores_that_are_not_numbers_fail(tmp_path):
    import torch

    gate = transformer(None, 0, classifier=bert(tmp_path / "two"))
    assert isinstance(gate, TransformerGate)
    torch.nn.init.constant_(gate.model.classifier.weight, math.nan)
    with pytest.raises(EcopromptError, match="not numbers"):
        gate.score(["a"])
