"""Text metrics against the libraries that they stand on and values in closed form."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from ecoprompt import similarity
from ecoprompt.metrics import LogProb
from ecoprompt.registry import EcopromptError, InputError, aggregates, metrics

CAT = "the cat sat on the mat"
TEXTS = [
    ("the mat", CAT),
    ("A cat had sat on the mats.\nIt was black, and it purred.", "It was black and purring.\nThe cat sat on the mat."),
    ("", CAT),
    ("“Oh dear!” said the Rabbit; then it ran away, away, away.", "The rabbit ran away: “Oh dear, oh dear!”"),
]
SAME = ("rouge_1", "rouge_2", "rouge_l", "rouge_lsum", "bleu", "sacrebleu", "exact_match")


@pytest.mark.parametrize(("generation", "target"), TEXTS)
def test_rouge_and_bleu_are_those_of_their_libraries(generation, target):
    kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}
    found = RougeScorer(list(kinds.values()), use_stemmer=True).score(target, generation)
    for name, kind in kinds.items():
        assert metrics[name](generation, target) == found[kind].fmeasure
    plain, smoothed = BLEU(smooth_method="none"), BLEU(effective_order=True)
    assert similarity.bleu(generation, target) == plain.corpus_score([generation], [[target]]).score / 100
    assert similarity.sacrebleu(generation, target) == smoothed.sentence_score(generation, [target]).score / 100


@pytest.mark.parametrize("name", SAME)
def test_a_text_is_all_like_itself_and_nothing_like_another(name):
    assert metrics[name](CAT, CAT) == pytest.approx(1)
    assert metrics[name]("dogs bark", CAT) == 0
    assert metrics[name]("", CAT) == 0


def test_rouge_in_closed_form():
    assert similarity.rouge_1("the mat", CAT) == pytest.approx(2 * 1 * (2 / 6) / (1 + 2 / 6))
    assert similarity.rouge_2("the cat", CAT) == pytest.approx(2 * 1 * (1 / 5) / (1 + 1 / 5))
    assert similarity.rouge_l("mat the on sat cat the", CAT) == pytest.approx(3 / 6)
    assert similarity.rouge_lsum("on the mat\nthe cat sat", "the cat sat\non the mat") == 1
    assert similarity.rouge_l("on the mat\nthe cat sat", "the cat sat\non the mat") == pytest.approx(3 / 6)


def test_bleu_in_closed_form_and_what_parts_it_from_sacrebleu():
    longer = (6 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** (1 / 4)
    assert similarity.bleu(f"{CAT} all day", CAT) == pytest.approx(longer)
    assert similarity.sacrebleu(f"{CAT} all day", CAT) == pytest.approx(longer)
    assert similarity.bleu("the cat sat on", CAT) == pytest.approx(math.exp(1 - 6 / 4))
    # 3 of 4 tokens, 1 of 3 pairs; no run of three (of 2) and of four (of 1), which 1/2 and 1/4 stand for.
    assert similarity.sacrebleu("a b c d", "a b x d") == pytest.approx((3 / 4 * 1 / 3 * 0.5 / 2 * 0.25 / 1) ** (1 / 4))
    assert similarity.bleu("a b c d", "a b x d") == 0
    assert (similarity.sacrebleu("a b", "a b"), similarity.bleu("a b", "a b")) == (pytest.approx(1), 0)


def test_meteor_in_closed_form_needs_no_download():
    precision, recall, chunks, matches = 3 / 3, 3 / 4, 1, 3  # "cats" by its stem
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    assert similarity.meteor("The cats sat", "the cat sat down") == pytest.approx(
        mean * (1 - 0.5 * (chunks / matches) ** 3)
    )
    assert similarity.meteor("", CAT) == similarity.meteor("dogs bark", CAT) == 0
    assert similarity.meteor("the feline", "the cat") == similarity.meteor("the dog", "the cat")  # no synonyms


def test_exact_match_passes_over_white_space_around_only():
    assert similarity.exact_match(" a b\n", "a b") == 1
    assert similarity.exact_match("a  b", "a b") == 0


@pytest.mark.parametrize(("text", "ratio"), [("", 0), ("no, no, no", 2 / 5), ("all of it.", 1), ("ha " * 50, 1 / 50)])
def test_unique_token_ratio_counts_words_and_marks(text, ratio):
    assert similarity.unique_token_ratio(text) == pytest.approx(ratio)


def test_perplexity_is_the_geometric_mean_of_inverse_probabilities():
    assert similarity.perplexity(LogProb(math.log(0.5) + math.log(0.125), 2)) == pytest.approx(4)
    assert similarity.perplexity(LogProb(-1e6, 1)) == math.inf


def test_the_similarity_gap_is_the_mean_distance_of_means():
    ours = {"forget/rouge_l": np.array([0.2, 0.6]), "forget/bleu": np.array([0.1, 0.1])}
    theirs = {"forget/rouge_l": np.array([0.1, 0.1, 0.1]), "forget/bleu": np.array([0.3])}
    gap = similarity.similarity_gap(ours, theirs, metrics=["rouge_l", "bleu"])
    assert gap == pytest.approx((abs(0.4 - 0.1) + abs(0.1 - 0.3)) / 2)
    assert similarity.similarity_gap(ours, ours, metrics=["rouge_l"]) == 0
    assert similarity.similarity_gap(ours, None, metrics=["rouge_l"]) is None
    every = {f"news/{key}": np.array([0.25]) for key in aggregates["similarity_gap"].of}
    assert similarity.similarity_gap(every, {key: value * 3 for key, value in every.items()}, subset="news") == 0.5


def test_bertscore_says_what_it_needs(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "bert_score":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"'bertscore' needs bert-score: pip install 'ecoprompt\[bertscore\]'"):
        metrics["bertscore"].ready()


def test_bertscore_is_bert_scores_f1(tmp_path, monkeypatch):
    bert_score = pytest.importorskip("bert_score", reason="needs the extra 'bertscore'")
    import torch
    from transformers import BertTokenizer, DistilBertConfig, DistilBertModel

    with pytest.raises(EcopromptError, match="'distilbert/distilbert-base-uncased', which is not here"):
        metrics["bertscore"].ready()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(CAT.split()), "dog"]
    numbered = {word: number for number, word in enumerate(words)}
    BertTokenizer(vocab=numbered, model_max_length=32).save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"dim": 16, "n_heads": 2, "hidden_dim": 16, "n_layers": 5, "max_position_embeddings": 32}
    DistilBertModel(DistilBertConfig(vocab_size=len(words), **shape)).save_pretrained(tmp_path)
    _, _, f1 = bert_score.score(["the dog sat"], [CAT], model_type=str(tmp_path), num_layers=5)
    monkeypatch.setattr(similarity, "BERT", str(tmp_path))
    monkeypatch.setattr(similarity, "check_at_hand", lambda *_, **__: None)
    monkeypatch.setattr(similarity, "_scorer", similarity._scorer.__wrapped__)
    assert similarity.bertscore("the dog sat", CAT) == float(f1[0]) < 1
    assert similarity.bertscore(CAT, CAT) == pytest.approx(1)
    assert similarity.bertscore(" ", CAT) == 0
