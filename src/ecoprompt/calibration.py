"""A gate's threshold, calibrated on prompts to let through that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from ecoprompt.gate import Gate
from ecoprompt.pressure import press
from ecoprompt.registry import InputError
from ecoprompt.sources import GateData, folded

CALIBRATED = ("typos", "no_punctuation", "random_prefix", "composite")
"""The pressures under which a threshold is calibrated, beside the plain prompts."""


def hold_out(data: GateData, held_out: float, seed: int) -> tuple[GateData, list[str]]:
    """`data` without a random share `held_out` of its negative prompts, and these, to calibrate the threshold on.

    A prompt that occurs several times (up to case, punctuation and spaces) counts once, so none is on both sides.
    """
    unique = list({folded(text): text for text in data.negative}.values())
    held = round(held_out * len(unique))
    if not 0 < held < len(unique):
        raise InputError(
            f"'held_out': a share of {held_out} of {len(unique)} different prompts leaves nothing on one side"
        )
    order = np.random.default_rng(seed).permutation(len(unique))
    rest, out = ([unique[i] for i in sorted(part)] for part in (order[held:], order[:held]))
    return replace(data, negative=rest), out


def calibration_scores(gate: Gate, prompts: Sequence[str], seed: int) -> np.ndarray:
    """[N] the highest score of each prompt as it is and under the pressures CALIBRATED, so that every view counts."""
    forms = [press(name, text, seed) for name in (None, *CALIBRATED) for text in prompts]
    highest: np.ndarray = np.asarray(gate.score(forms)).reshape(-1, len(prompts)).max(axis=0)
    return highest


def conformal_threshold(negative_scores: np.ndarray, false_positive_rate: float) -> float:
    """The ceil((n + 1)(1 - a))-th smallest of n held-out scores: a new prompt scores higher with probability <= a.

    Split conformal prediction (Vovk et al., 2005); it holds on average over exchangeable prompts. Raises InputError
    if n < 1/a - 1, as then no score is high enough.
    """
    # In decimal fractions, as 1 - a is not exact in floating point and the rank must not be off by one.
    rate, n = Fraction(str(float(false_positive_rate))), len(negative_scores)
    if n < (needed := math.ceil(1 / rate) - 1):
        raise InputError(f"'false_positive_rate': {false_positive_rate} needs {needed} held-out prompts, found {n}")
    return float(np.sort(negative_scores)[math.ceil((n + 1) * (1 - rate)) - 1])
