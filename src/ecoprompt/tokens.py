"""Token selectors: which characters of a flagged prompt are corrupted, and which tokens these are."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ecoprompt.hub import check_at_hand
from ecoprompt.registry import InputError, first_line, nearest, selectors

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.matcher import PhraseMatcher

Span = tuple[int, int]
Names = Annotated[list[str], Field(min_length=1)]

ENTITY_PIPES = {"ner", "beam_ner", "entity_ruler", "span_ruler"}


def mask(select: str, parameters: Mapping[str, Any], text: str, offsets: Sequence[Span]) -> list[bool]:
    """Which tokens of `text` the selector `select` picks; all False where it finds nothing.

    `offsets` are each token's (start, end) in `text`. A token is picked if it shares a character other than white
    space with a selected span, so a leading space that belongs to a token does not count, and special tokens, which
    have no width, are picked by `all` alone. Raises InputError for an unknown selector, model or label.
    """
    if select == "all":
        return [True] * len(offsets)
    selected = bytearray(len(text))
    for start, end in selectors[select](text, **parameters):
        for position in range(max(start, 0), min(end, len(text))):
            selected[position] = not text[position].isspace()
    return [any(selected[start:end]) for start, end in offsets]


def all_tokens(text: str) -> list[Span]:
    """The whole text; `mask` takes this to include the special tokens."""
    return [(0, len(text))]


selectors.add("all", all_tokens)


@selectors.register
def phrases(text: str, *, names: Names) -> list[Span]:
    """Where `names` occur as whole words, in any case, with any white space and with or without accents."""
    from spacy.tokens import Doc

    nlp, matcher = _matcher(tuple(names))
    words = [word for word in nlp.make_doc(text) if not word.is_space]
    found = matcher(Doc(nlp.vocab, words=[word.text for word in words]))
    return [(words[first].idx, words[last - 1].idx + len(words[last - 1])) for _, first, last in found]


@selectors.register
def spacy(text: str, *, model: str = "en_core_web_sm", labels: Names = ["PERSON"]) -> list[Span]:  # noqa: B006
    """The entities with one of `labels` that the spaCy pipeline `model` (a name or a folder) finds."""
    nlp = _spacy_pipeline(model)
    known = {
        label
        for name in nlp.pipe_names
        if nlp.get_pipe_meta(name).factory in ENTITY_PIPES
        for label in nlp.pipe_labels.get(name, [])
    }
    _check_labels(labels, known, f"the spaCy model '{model}'")
    nlp.max_length = max(nlp.max_length, len(text) + 1)
    return [(entity.start_char, entity.end_char) for entity in nlp(text).ents if entity.label_ in labels]


@selectors.register
def ner(text: str, *, model: str = "dslim/bert-base-NER", labels: Names | None = None) -> list[Span]:
    """The entities (with one of `labels`, else all) that a token classifier (a Hub id or a folder) finds.

    Runs on the CPU; a text longer than the classifier reads goes in windows that overlap by a quarter.
    """
    pipeline = _ner_pipeline(model)
    known = {label.removeprefix("B-").removeprefix("I-") for label in pipeline.model.config.id2label.values()}
    _check_labels(labels or [], known - {"O"}, f"the token classifier '{model}'")
    if not text.strip():
        return []
    found = pipeline(text, stride=pipeline.tokenizer.model_max_length // 4)
    return [(entity["start"], entity["end"]) for entity in found if labels is None or entity["entity_group"] in labels]


def _check_labels(labels: Sequence[str], known: set[str], model: str) -> None:
    """Refuse a label that the model never gives; a model that does not tell its labels is taken at its word."""
    unknown = [label for label in labels if known and label not in known]
    if unknown:
        raise InputError(*(f"{model} has no label '{label}'; {nearest(label, known)}" for label in unknown))


@functools.cache
def _matcher(names: tuple[str, ...]) -> tuple[Language, PhraseMatcher]:
    """A tokenizer for English and a matcher of `names` over its words."""
    import spacy
    from spacy.matcher import PhraseMatcher

    if not all(name.strip() for name in names):
        raise InputError("the token selector 'phrases' has an empty name among 'names'")
    nlp = spacy.blank("en")
    # The limit protects parsers, which need memory per character; nothing is parsed here.
    nlp.max_length = 2**31
    matcher = PhraseMatcher(nlp.vocab, attr="LOWER")
    matcher.add("names", [nlp.make_doc(form) for name in names for form in _forms(" ".join(name.split()))])
    return nlp, matcher


def _forms(name: str) -> list[str]:
    """`name` with its accents composed, decomposed and left out: the same to a reader, three strings to a matcher."""
    decomposed = unicodedata.normalize("NFD", name)
    bare = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return sorted({unicodedata.normalize("NFC", name), decomposed, bare} - {""})


@functools.cache
def _spacy_pipeline(model: str) -> Language:
    import spacy

    try:
        return spacy.load(model)
    except OSError:
        raise InputError(
            f"the spaCy model '{model}' is not there: install it with 'python -m spacy download {model}', "
            "or give the folder of a spaCy pipeline"
        ) from None


@functools.cache
def _ner_pipeline(model: str) -> Any:
    import transformers

    what = f"the token classifier '{model}'"
    if not Path(model).is_dir():
        check_at_hand(what, model)
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        classifier = transformers.AutoModelForTokenClassification.from_pretrained(
            model, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{what} cannot be loaded ({first_line(error)}); give one with safetensors weights") from None
    if not tokenizer.is_fast:
        raise InputError(f"{what} has no fast tokenizer, so its entities have no positions")
    positions = getattr(classifier.config, "max_position_embeddings", 512)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return transformers.pipeline(
        "token-classification", model=classifier, tokenizer=tokenizer, aggregation_strategy="simple", device="cpu"
    )
