"""What logits still tell of the right choice: vectors of logits as compact texts, and a linear probe over them."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def packed(logits: NDArray[Any]) -> str:
    """Logits [V] as base64 of half-precision numbers."""
    with np.errstate(over="ignore"):
        return base64.b64encode(logits.astype("<f2").tobytes()).decode()


def unpacked(text: str) -> NDArray[np.float32]:
    """The logits [V] that were packed; what half precision cannot hold is its largest number."""
    found: NDArray[np.float32] = np.nan_to_num(np.frombuffer(base64.b64decode(text), "<f2")).astype(np.float32)
    return found


def probed(logits: Sequence[NDArray[np.float32]], labels: Sequence[int]) -> list[float | None]:
    """Of n rows, by logits [V] and right label: None for the first half, on which logistic regression is fitted, and of
    the others 1 where it then finds the label, else 0."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    half = (len(labels) + 1) // 2
    learnt, asked = np.stack(logits[:half]), logits[half:]
    guesses = np.full(len(asked), labels[0])
    if len(set(labels[:half])) > 1 and asked:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        with warnings.catch_warnings():  # where it is not yet at its best, it is near enough
            warnings.simplefilter("ignore", ConvergenceWarning)
            guesses = probe.fit(learnt, labels[:half]).predict(np.stack(asked))
    return [None] * half + [float(guess == label) for guess, label in zip(guesses, labels[half:], strict=True)]
