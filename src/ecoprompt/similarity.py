"""Row metrics of how near a generated text is to the true one, and the gap between two runs that is made of them."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from ecoprompt.hub import check_at_hand
from ecoprompt.metrics import LogProb, direction, exp, rouge
from ecoprompt.registry import InputError, aggregates, metrics

if TYPE_CHECKING:
    from ecoprompt.metrics import Values

SIMILARITIES = ("rouge_1", "rouge_2", "rouge_l", "bleu", "sacrebleu", "meteor")
"""The keys under which a subset has the metrics that `similarity_gap` averages by itself."""
BERT = "distilbert/distilbert-base-uncased"
"""The model whose token embeddings `bertscore` compares, as in the paper."""


@metrics.register
@direction("higher")
def rouge_1(generation: str, target: str) -> float:
    """ROUGE-1: F1 of the stemmed words that generation and target share, in [0, 1]."""
    return float(rouge("rouge1", generation, target).fmeasure)


@metrics.register
@direction("higher")
def rouge_2(generation: str, target: str) -> float:
    """ROUGE-2: F1 of the pairs of neighbouring stemmed words that generation and target share, in [0, 1]."""
    return float(rouge("rouge2", generation, target).fmeasure)


@metrics.register
@direction("higher")
def rouge_l(generation: str, target: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of the stemmed words of both texts, in [0, 1]."""
    return float(rouge("rougeL", generation, target).fmeasure)


@metrics.register
@direction("higher")
def rouge_lsum(generation: str, target: str) -> float:
    """ROUGE-Lsum: ROUGE-L line by line, each line of the target against all lines of the generation, in [0, 1]."""
    return float(rouge("rougeLsum", generation, target).fmeasure)


@metrics.register
@direction("higher")
def bleu(generation: str, target: str) -> float:
    """BLEU of up to four tokens in a row, not smoothed, in [0, 1]: 0 where the texts share no four tokens in a row.

    Papineni et al. (2002), with mteval's 13a tokens, as in the `bleu` of Hugging Face's evaluate.
    """
    from sacrebleu import corpus_bleu

    return float(corpus_bleu([generation], [[target]], smooth_method="none").score) / 100


@metrics.register
@direction("higher")
def sacrebleu(generation: str, target: str) -> float:
    """BLEU by sacrebleu's `sentence_bleu`, in [0, 1]: `bleu` smoothed, so that few texts have 0.

    A count of zero is taken for a half, the next one for a quarter and so on, and of a text of less than four tokens
    only the shorter runs count.
    """
    from sacrebleu import sentence_bleu

    return float(sentence_bleu(generation, [target]).score) / 100


@metrics.register
@direction("higher")
def meteor(generation: str, target: str) -> float:
    """METEOR by nltk, of words that are the same or have the same Porter stem, in [0, 1].

    No synonyms: WordNet would have to be downloaded. So it is at most what is published with it. Words are those of
    nltk's tokenizer, without its (downloaded) division into sentences; the weights are nltk's.
    """
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(_words(target), _words(generation), wordnet=_NoSynonyms()))


class _NoSynonyms:
    """What stands in WordNet's place."""

    def synsets(self, word: str) -> tuple[()]:
        return ()


@functools.lru_cache(maxsize=4096)
def _words(text: str) -> list[str]:
    from nltk.tokenize import NLTKWordTokenizer

    return list(NLTKWordTokenizer().tokenize(text))


@functools.cache
def _scorer() -> Any:
    """bert-score's scorer on the first five layers of BERT, which are its own choice.

    Raises InputError without the extra, and EcopromptError where the model cannot be had.
    """
    try:
        from bert_score import BERTScorer
    except ImportError:
        raise InputError("the metric 'bertscore' needs bert-score: pip install 'ecoprompt[bertscore]'") from None
    check_at_hand(f"the metric 'bertscore' reads the model '{BERT}', which", BERT, instead="")
    return BERTScorer(model_type=BERT, num_layers=5)


@metrics.register
@direction("higher", ready=_scorer, model=BERT)
def bertscore(generation: str, target: str) -> float:
    """BERTScore F1 by distilbert-base-uncased, not rescaled (extra `bertscore`); 0 for an empty generation."""
    return float(_scorer().score([generation], [target])[2][0]) if generation.strip() else 0.0


@metrics.register
@direction("higher")
def exact_match(generation: str, target: str) -> float:
    """1 if the generation is the target, but for white space around both, else 0."""
    return float(generation.strip() == target.strip())


@metrics.register
@direction("higher")
def unique_token_ratio(generation: str) -> float:
    """Share of different ones among the generation's words and marks, in [0, 1]: low where it repeats itself.

    0 for an empty one. Words as in `meteor`, not a model's tokens, so that it compares models that have different ones.
    """
    words = _words(generation)
    return len(set(words)) / len(words) if words else 0.0


@metrics.register
@direction("lower")
def perplexity(reread: LogProb) -> float:
    """Perplexity, >= 1, of the generation after its prompt, as the recipe's `[model]` reads it without a guard.

    Read row by row, so that no padding counts. An empty generation has no perplexity and its row no value.
    """
    return exp(-reread.mean)


@aggregates.register
@direction("lower", of=SIMILARITIES)
def similarity_gap(
    values: Values, retain: Values | None, *, subset: str = "forget", metrics: list[str] | None = None
) -> float | None:
    """Mean over `metrics` (keys of the subset's) of |mean - the retain run's mean|, >= 0; None without a retain run.

    The paper's average similarity gap. By itself over ROUGE-1, 2 and L, BLEU, sacreBLEU and METEOR.
    """
    if retain is None:
        return None
    pairs = [(values[f"{subset}/{key}"], retain[f"{subset}/{key}"]) for key in metrics or SIMILARITIES]
    return math.fsum(abs(float(ours.mean()) - float(theirs.mean())) for ours, theirs in pairs) / len(pairs)
