"""The card of a forget pack: what it forgets, how its gate was trained and how often it errs, ready for the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ecoprompt.benchmarks import parse_forget
from ecoprompt.files import write_bytes_atomic, write_text_atomic
from ecoprompt.gate import is_taught
from ecoprompt.plots import rendered
from ecoprompt.recipe import Recipe
from ecoprompt.results import gate_cells, gate_report, markdown_table
from ecoprompt.template import fill

CARD, PLOT = "README.md", "tradeoff.png"


def tradeoff(scores: Sequence[tuple[np.ndarray, int]], threshold: float) -> dict[str, list[float]]:
    """What share of prompts to flag (label 1) a gate would miss and of others falsely flag, by its threshold.

    `scores` are those of several sets with their labels, which are pooled.
    """
    pooled = {label: np.concatenate([np.zeros(0), *(one for one, of in scores if of == label)]) for label in (0, 1)}
    if not len(pooled[0]) or not len(pooled[1]):
        return {}
    steps = np.concatenate([[0.0], np.geomspace(1e-4, 1, 40)])
    spread = [np.quantile(pooled[1], steps), np.quantile(pooled[0], 1 - steps), [0.0, threshold, 1.0]]
    thresholds = np.unique(np.concatenate(spread))
    return {
        "threshold": thresholds.tolist(),
        "missed": [float((pooled[1] <= one).mean()) for one in thresholds],
        "falsely_flagged": [float((pooled[0] > one).mean()) for one in thresholds],
    }


def write_card(folder: Path, name: str, pack: Mapping[str, Any]) -> None:
    """Write README.md and, where matplotlib is installed, tradeoff.png; `pack` are the tables of its forget.toml."""
    plot = _plot(pack.get("tradeoff", {}), pack["gate"]["threshold"])
    if plot is not None:
        write_bytes_atomic(folder / PLOT, plot)
    write_text_atomic(folder / CARD, f"{_header(name, pack)}\n{_text(name, pack, plot is not None)}")


def _header(name: str, pack: Mapping[str, Any]) -> str:
    """The Hub's metadata in YAML, of which JSON is a part."""
    results = [
        {
            "task": {"type": "text-classification", "name": "prompt gate"},
            "dataset": {"type": re.sub(r"\W+", "-", entry["data"]), "name": entry["data"]},
            "metrics": [
                {
                    "type": "false_negative_rate" if entry["flag"] else "false_positive_rate",
                    "value": entry["rate"],
                    "name": "missed" if entry["flag"] else "falsely flagged",
                }
            ],
        }
        for entry in gate_report(pack["measured"])
        if entry["prompts"]
    ]
    metadata = {
        "library_name": "ecoprompt",
        "pipeline_tag": "text-classification",
        "tags": ["ecoprompt", "forget-pack", "machine-unlearning", "embedding-corrupted-prompts"],
        "datasets": pack["trained"].get("datasets", []),
        "metrics": ["false_negative_rate", "false_positive_rate"],
        "model-index": [{"name": name, "results": results}] if results else [],
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items() if value]
    return "\n".join(["---", *lines, "---", ""])


def _text(name: str, pack: Mapping[str, Any], plotted: bool) -> str:
    trained, gate, measured = pack["trained"], pack["gate"], pack["measured"]
    subject = f"`{trained['forget']}`" if "forget" in trained else "what its gate was trained for"
    targets = f": {', '.join(trained['targets'])}" if trained.get("targets") else ""
    values = {
        "name": name,
        "subject": subject + targets,
        "settings": markdown_table([["part", "setting"], *_settings(pack)]),
        "training": _training(trained, gate),
        "threshold": f"{gate['threshold']:.6g}",
        "taught": is_taught(gate["kind"], trained.get("settings", {})),
        "measured": markdown_table(gate_cells(measured)) if measured else "Not measured.",
        "plot": PLOT if plotted else "",
    }
    return fill(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"), values)


def _settings(pack: Mapping[str, Any]) -> list[list[str]]:
    """The forget spec in words: gate, tokens, corruption."""
    gate = pack["gate"]
    read = "".join(f", {key} = {json.dumps(gate[key])}" for key in ("context", "check") if key in gate)
    rows = [["gate", f"{gate['kind']}, threshold {gate['threshold']:.6g}{read}"]]
    rows += [[part, _listed(pack.get(part, {})) or "none yet"] for part in ("tokens", "corruption")]
    if "learned" in pack:
        rows.append(["learned", "by `{search}`: {metric} {reached:.4g} for {target:.4g}".format(**pack["learned"])])
    return [*rows, ["seed", str(pack["seed"])]]


def _listed(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items())


def _training(trained: Mapping[str, Any], gate: Mapping[str, Any]) -> str:
    settings, calibration = trained.get("settings", {}), trained.get("calibration")
    said = [f"Kind `{gate['kind']}`"]
    if settings:
        said.append("with " + _listed(settings))
    if "positive" in trained:
        said.append(f"on {trained['positive']} prompts to flag and {trained['negative']} to let through")
        said.append(f"in {trained['seconds']:.1f} seconds")
    how = f"{', '.join(said)}."
    if settings.get("classifier"):
        how = f"It was not: it is the classifier `{settings['classifier']}`, published by others, as it stands."
    elif not is_taught(gate["kind"], settings):
        how = f"It was not: it is of the kind `{gate['kind']}`, as it stands, with {_listed(settings)}."
    if not calibration:
        return f"{how} The threshold was set by hand."
    return (
        f"{how} The threshold was calibrated on {trained['held_out']} further prompts to let through, which it was not "
        "trained on (split conformal prediction): a new prompt of their kind is falsely flagged with a probability "
        f"of at most {calibration['false_positive_rate']:g}."
    )


def _plot(curve: Mapping[str, Sequence[float]], threshold: float) -> bytes | None:
    """PNG of missed against falsely flagged; None without matplotlib or without a curve."""
    if not curve or find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve["falsely_flagged"], curve["missed"], ".-", color="tab:blue", markersize=4)
    near = min(range(len(curve["threshold"])), key=lambda place: abs(curve["threshold"][place] - threshold))
    chosen = curve["falsely_flagged"][near], curve["missed"][near]
    axes.plot(*chosen, "o", color="tab:red", label=f"threshold {threshold:.4g}")
    # Both are often far below one per cent, and zero among them: logarithmic, but linear near zero.
    axes.set_xscale("symlog", linthresh=1e-4)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("share falsely flagged")
    axes.set_ylabel("share missed")
    axes.grid(alpha=0.3)
    axes.legend()
    return rendered(figure)


def gate_notes(recipe: Recipe) -> list[str]:
    """What is to be known before its error rates are believed of a gate that the recipe trained."""
    if recipe.data is None or not is_taught(recipe.gate.kind, recipe.gate.parameters):
        return []
    texts = parse_forget(recipe.data.forget)[0].gate_sources().positive
    alone = all(one.field in ("first_sentence", "text") for one in texts)
    questions = (
        "to flag, it learned texts and no question about them: name a CSV file of such questions beside the texts"
    )
    return ["the gate was trained on the first two sets", *([questions] if alone else [])]
