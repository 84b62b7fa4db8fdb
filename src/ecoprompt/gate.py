"""Gates: classifiers that say how likely a prompt asks about what must be forgotten."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import tomli_w
from pydantic import Field

from ecoprompt.classifier import flagged_label, load_classifier
from ecoprompt.files import read_shapes, read_toml
from ecoprompt.models import data_type
from ecoprompt.pressure import rehearse, rehearse_anew
from ecoprompt.registry import EcopromptError, InputError, Progress, gates, nearest, quiet
from ecoprompt.sources import GateData
from ecoprompt.views import normalise, parts, word_windows

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Count = Annotated[int, Field(ge=1)]
Size = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

SETTINGS, WEIGHTS = "gate.toml", "gate.safetensors"
LIMITS = {"word_ngrams": 8, "char_ngrams": 16, "window": 2**16, "max_length": 2**20, "batch_size": 2**12}
"""Past these a saved gate's settings would take a machine's memory for one long prompt."""
MOST_FEATURES = 2**26
MOST_NAMES = 1000
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, Japanese, Chinese and Korean: no space is between a name and what follows it."""
VIEWS, MOST, DISCOUNT = 32, 16, 0.9
FORMAT = 3
"""Of what gates read of a text, practise on and are calibrated on; raised with any of these, as a gate made for others
says nothing about them."""


class Gate(Protocol):
    """Scores in 0..1 for prompts, 1 for what must be forgotten; of a text's views the highest score counts."""

    @property
    def kind(self) -> str: ...
    def score(self, texts: Sequence[str]) -> np.ndarray: ...
    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class LinearGate:
    """Logistic regression on which hashed n-grams of words and of letters occur in a window of `window` words.

    Reads letters and digits alone: case, accents, look-alikes and white space change no score. Whether an n-gram
    occurs counts, not its share of the text, so that words around a question do not dilute it; and each sentence is
    judged on its own as well. Past VIEWS of them, the odds of the highest are divided by (views / VIEWS) ** DISCOUNT,
    as in a long document one of many views looks like a question by chance; at most by MOST ** DISCOUNT, about
    12, so that padding hides what is flagged clearly no better the longer it is.
    """

    weights: np.ndarray
    intercept: float
    word_ngrams: int
    char_ngrams: int
    window: int
    kind: ClassVar[str] = "linear"
    NUMBERS: ClassVar[Sequence[str]] = ("word_ngrams", "char_ngrams", "window")

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """[N] scores, each the same whatever else is in `texts`; 0 for a text without any letter or digit."""
        windows = [[view for part in parts(text) for view in word_windows(part, self.window)] for text in texts]
        flat = list(dict.fromkeys(window for group in windows for window in group))
        if not flat:
            return np.zeros(len(texts))
        features = _ngrams(flat, self.word_ngrams, self.char_ngrams, len(self.weights))
        logits = dict(zip(flat, features @ self.weights.astype(np.float64) + self.intercept, strict=True))
        highest = [max((logits[window] for window in group), default=-np.inf) for group in windows]
        many = np.clip([len(group) / VIEWS for group in windows], 1, MOST)
        scores: np.ndarray = np.exp(-np.logaddexp(0.0, DISCOUNT * np.log(many) - highest))
        return scores

    def save(self, folder: Path) -> None:
        """Write the weights (safetensors) and what the features depend on (TOML)."""
        from safetensors.numpy import save_file

        _save_settings(self, folder, self.NUMBERS)
        save_file({"weights": self.weights, "intercept": np.array([self.intercept])}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> LinearGate:
        """The gate that `save` wrote to `folder`. Raises InputError if it is damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        settings = _settings(folder, cls.kind, cls.NUMBERS)
        if any(math.prod(shape) > MOST_FEATURES for shape in read_shapes(folder / WEIGHTS).values()):
            raise InputError(f"{folder / WEIGHTS}: found more than {MOST_FEATURES} weights, expected fewer")
        try:
            tensors = load_file(folder / WEIGHTS)
            weights, intercept = tensors["weights"], float(tensors["intercept"].item())
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{folder / WEIGHTS}: not the weights of a linear gate ({error})") from None
        if weights.ndim != 1 or len(weights) < 2 or len(weights) % 2 or not np.isfinite(weights.sum() + intercept):
            raise InputError(f"{folder / WEIGHTS}: expected an even number of finite weights, found {weights.shape}")
        return cls(weights, intercept, **settings)


@gates.register
def linear(
    data: GateData | None,
    seed: int,
    progress: Progress = quiet,
    *,
    word_ngrams: Annotated[int, Field(ge=1, le=8)] = 2,
    char_ngrams: Annotated[int, Field(ge=3, le=16)] = 5,
    features: Annotated[int, Field(ge=2, le=2**26, multiple_of=2)] = 2**18,
    c: Size = 1.0,
    rarity: Annotated[float, Field(ge=0)] = 2.0,
    window: Annotated[int, Field(ge=2, le=2**16)] = 32,
    edits: bool = True,
) -> LinearGate:
    """Trained in seconds on a CPU: n-grams of 1 to `word_ngrams` words and of 3 to `char_ngrams` letters.

    Half of the `features` hash the words, half the letters; `c` is the inverse strength of the regularisation, which
    an n-gram in d of N texts is spared by a factor of log(N / d) to the power of `rarity`. With `edits`, each text is
    learned from again with typing errors, without punctuation and in other wordings, and everyday questions and random
    words are learned as what is to be let through. Classes weigh the same whatever their sizes.
    """
    from sklearn.linear_model import LogisticRegression

    data = _trainable(data)
    progress("training the gate", 0, 1)
    if not all(any(map(normalise, side)) for side in (data.positive, data.negative)):
        raise InputError("the gate's prompts to flag, or those to let through, have not a single letter or digit")
    texts = [(text, 1) for text in data.positive] + [(text, 0) for text in data.negative]
    if edits:
        texts += rehearse(texts, ~seed)  # a caller tests it with the edits of `seed`
    rows = [(part, label) for text, label in texts for part in word_windows(text, window)]
    labels = [label for _, label in rows]
    inputs = _ngrams([part for part, _ in rows], word_ngrams, char_ngrams, features)
    scale = _rarity(inputs, rarity)
    inputs.data *= scale[inputs.indices]
    fitted = LogisticRegression(C=c, class_weight="balanced", tol=1e-4, max_iter=10_000).fit(inputs, labels)
    progress("training the gate", 1, 1)
    # Rounded before the first use, so that the gate scores the same after it was saved and loaded.
    weights = (fitted.coef_[0] * scale).astype(np.float32)
    return LinearGate(weights, float(fitted.intercept_[0]), word_ngrams, char_ngrams, window)


def _rarity(inputs: csr_matrix, power: float) -> np.ndarray:
    """[features] log(N / d) ** `power` of features in d of N rows, of mean square 1 over all that occur."""
    rows = np.bincount(inputs.indices, minlength=inputs.shape[1])
    scale = np.log(max(inputs.shape[0], 2) / (1 + np.minimum(rows, inputs.shape[0] / 2))) ** power
    return np.asarray(scale / np.sqrt((scale**2 * rows).sum() / rows.sum()))


def _ngrams(windows: Sequence[str], word_ngrams: int, char_ngrams: int, features: int) -> csr_matrix:
    """[windows, features] signed indicators of the n-grams; hashing needs no vocabulary, so nothing is fitted."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = functools.partial(HashingVectorizer, lowercase=False, norm=None, binary=True, n_features=features // 2)
    words = vectorizer(token_pattern=r"\S+", ngram_range=(1, word_ngrams))
    letters = vectorizer(analyzer="char_wb", ngram_range=(3, char_ngrams))
    return hstack([words.transform(windows), letters.transform(windows)], format="csr")


@dataclass(frozen=True)
class PhraseGate:
    """Certain of a text in which one of `names` stands, folded as a reader sees it: as whole words, where its script
    has spaces between words."""

    names: list[str]
    kind: ClassVar[str] = "phrases"

    def __post_init__(self) -> None:
        named = isinstance(self.names, list) and all(isinstance(one, str) and normalise(one) for one in self.names)
        if not named or not 1 <= len(self.names) <= MOST_NAMES:
            raise InputError(f"the gate's 'names': expected 1 to {MOST_NAMES} texts, each with a letter or a digit")

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """[N] scores, each 1 or 0."""
        names = [name if UNSPACED.search(name) else f" {name} " for name in map(normalise, self.names)]
        folded = [f" {normalise(text)} " for text in texts]
        return np.array([float(any(name in text for name in names)) for text in folded])

    def save(self, folder: Path) -> None:
        """Write the names (TOML)."""
        _save_settings(self, folder, ["names"])

    @classmethod
    def load(cls, folder: Path) -> PhraseGate:
        """The gate that `save` wrote to `folder`. Raises InputError if it is damaged."""
        settings = _settings(folder, cls.kind, ["names"])
        try:
            return cls(**settings)
        except InputError as error:
            raise InputError(f"{folder / SETTINGS}: {error}") from None


GateNames = Annotated[list[Annotated[str, Field(pattern=r"[^\W_]")]], Field(min_length=1, max_length=MOST_NAMES)]


@gates.register
def phrases(data: GateData | None, seed: int, progress: Progress = quiet, *, names: GateNames) -> PhraseGate:
    """Not trained: flags where `names` occur as whole words, whatever their case, accents and look-alikes."""
    return PhraseGate(names)


class TransformerGate:
    """A sequence classifier with two labels, of which one says that a prompt is to be forgotten."""

    kind = "transformer"
    NUMBERS = ("max_length", "batch_size")

    def __init__(self, model: Any, tokenizer: Any, max_length: int, batch_size: int) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        if model.config.num_labels != 2:
            raise InputError(f"the gate's classifier has {model.config.num_labels} labels, expected 2")
        self.flagged = flagged_label(model.config.id2label)
        if not tokenizer.is_fast:
            raise InputError("the gate's classifier has no fast tokenizer, so a long prompt cannot be cut into windows")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.window = min(max_length, tokenizer.model_max_length, _positions(model))
        if self.window - tokenizer.num_special_tokens_to_add() < 2:
            raise InputError(f"'max_length': the gate's windows of {self.window} tokens leave no room for text")

    def windows(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """The token ids of each text, in windows that overlap by half."""
        if not texts:
            return []
        room = self.window - self.tokenizer.num_special_tokens_to_add()
        encoded = self.tokenizer(
            list(texts), truncation=True, max_length=self.window, stride=room // 2, return_overflowing_tokens=True
        )
        found: list[list[list[int]]] = [[] for _ in texts]
        for ids, text in zip(encoded["input_ids"], encoded["overflow_to_sample_mapping"], strict=True):
            found[text].append(ids)
        return found

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """[N] scores, each the same but for rounding whatever else is in `texts`. Raises EcopromptError on NaN."""
        import torch

        views = [parts(text) for text in texts]
        for text, seen in zip(texts, views, strict=True):
            if text != seen[0] and not seen[0].isascii():  # in other scripts folding may lose what a model can read
                seen.append(text)
        owners = [number for number, seen in enumerate(views) for _ in seen]
        cut = zip(owners, self.windows([view for seen in views for view in seen]), strict=True)
        windows = sorted([(owner, ids) for owner, found in cut for ids in found], key=lambda window: len(window[1]))
        highest = np.zeros(len(texts))
        for start in range(0, len(windows), self.batch_size):
            rows, ids = zip(*windows[start : start + self.batch_size], strict=True)
            batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            with torch.inference_mode():
                logits = self.model(**batch.to(self.model.device)).logits
            scores = logits.double().softmax(-1)[:, self.flagged].cpu().numpy()
            if not np.isfinite(scores).all():
                raise EcopromptError("the gate's classifier gives scores that are not numbers")
            np.maximum.at(highest, list(rows), scores)
        return highest

    def save(self, folder: Path) -> None:
        """Write a model folder (safetensors, tokenizer) and the gate's own settings (TOML)."""
        _save_settings(self, folder, self.NUMBERS)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path) -> TransformerGate:
        """The gate that `save` wrote to `folder`. Raises InputError if it is damaged."""
        settings = _settings(folder, cls.kind, cls.NUMBERS)
        return cls(*load_classifier(str(folder)), **settings)


@gates.register
def transformer(
    data: GateData | None,
    seed: int,
    progress: Progress = quiet,
    *,
    classifier: str | None = None,
    base: str = "FacebookAI/roberta-base",
    epochs: Count = 30,
    batch_size: Count = 16,
    learning_rate: Size = 2e-5,
    weight_decay: Annotated[float, Field(ge=0)] = 0.1,
    warmup_ratio: Share = 0.1,
    beta1: Share = 0.9,
    beta2: Share = 0.98,
    epsilon: Size = 1e-6,
    max_length: Count = 512,
    select_at: Share = 0.5,
    arithmetic: Literal["auto", "float32", "bfloat16"] = "auto",
    edits: bool = True,
) -> TransformerGate:
    """A published `classifier`, loaded as it is, or else `base` fine-tuned with AdamW and a cosine schedule.

    The defaults are the paper's. The loss weighs each class by its inverse frequency, and the epoch kept is the one
    that misses the fewest training prompts to flag at the threshold `select_at`, then flags the fewest others.
    Every window of a training text carries the text's label. With `edits`, each text is learned from a second time in
    each epoch, with an edit or in another wording that is drawn anew, and texts of many other kinds are learned as
    what is to be let through. Arithmetic is in bfloat16 on a GPU that has it, or where `arithmetic` says so.
    """
    if classifier is not None:
        return TransformerGate(*load_classifier(classifier), max_length, batch_size)
    data = _trainable(data)
    from transformers import set_seed

    from ecoprompt.gate_training import fine_tune

    set_seed(seed)
    labelled = load_classifier(base, num_labels=2, id2label={0: "retain", 1: "forget"})
    gate = TransformerGate(*labelled, max_length, batch_size)
    sizes = {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size, "seed": seed}
    sizes["bf16"] = data_type(arithmetic) == "bfloat16"
    schedule = {"num_train_epochs": epochs, "learning_rate": learning_rate, "warmup_steps": warmup_ratio}
    adam = {"weight_decay": weight_decay, "adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": epsilon}
    texts = [(text, 1) for text in data.positive] + [(text, 0) for text in data.negative]

    def edited(epoch: int) -> list[tuple[str, int]]:
        return rehearse_anew(texts, ~seed - epoch) if edits else []  # a caller tests it with the edits of `seed`

    settings = sizes | schedule | adam
    fine_tune(gate.model, gate.tokenizer, gate.windows, texts, edited, progress, select_at, settings)
    return gate


def _positions(model: Any) -> int:
    """How many tokens `model` has positions for; RoBERTa's begin after the padding index."""
    embedding = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embedding, "padding_idx", None)
    positions: int = getattr(model.config, "max_position_embeddings", 2**31)
    return positions if padding is None else positions - padding - 1


def is_taught(kind: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a gate of that kind learns from prompts; otherwise it is what its parameters name, as it stands."""
    return kind != PhraseGate.kind and parameters.get("classifier") is None


def _trainable(data: GateData | None) -> GateData:
    if data is None or not data.positive or not data.negative:
        needed = "prompts to be flagged and prompts to be let through"
        raise InputError(f"training a gate needs {needed}; what is both is to be flagged")
    return data


LOADERS: dict[str, Callable[[Path], Gate]] = {one.kind: one.load for one in (LinearGate, PhraseGate, TransformerGate)}


def load_gate(folder: Path, kind: str) -> Gate:
    """The gate of that kind that `Gate.save` wrote to `folder`. Raises InputError if there is none."""
    if kind not in LOADERS:
        raise InputError(f"there is no gate kind '{kind}'; {nearest(kind, LOADERS)}")
    return LOADERS[kind](folder)


def _save_settings(gate: Gate, folder: Path, names: Sequence[str]) -> None:
    settings = {name: getattr(gate, name) for name in ("kind", *names)} | {"format": FORMAT}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(tomli_w.dumps(settings), encoding="utf-8")


def _settings(folder: Path, kind: str, names: Sequence[str]) -> dict[str, Any]:
    """The settings `names` of a saved gate of that kind, if it is of today's format; its numbers are within LIMITS."""
    path = folder / SETTINGS
    settings = read_toml(path, "not the settings of a gate: ")
    if settings.get("kind") != kind:
        raise InputError(f"{path}: expected a gate of kind '{kind}', found {settings.get('kind')!r}")
    problems = [
        f"{path}: '{name}': found {settings.get(name)!r:.40}, expected a number from 1 to {LIMITS[name]}"
        for name in names
        if name in LIMITS and (type(settings.get(name)) is not int or not 1 <= settings[name] <= LIMITS[name])
    ]
    if problems:
        raise InputError(*problems)
    if settings.get("format", 1) != FORMAT:
        raise InputError(f"{path}: made by another version of ecoprompt, which reads texts otherwise; train it again")
    return {name: settings.get(name) for name in names}
