"""Trains the gate of every shipped gate recipe on real data and prints how often it errs, as Markdown.

`ECOPROMPT_DATA=../shared/data python tests/bench/gates.py [NAME ...]`: minutes on one core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ecoprompt.pack import train_classifier
from ecoprompt.recipe import load_recipe
from ecoprompt.results import gate_cells, markdown_table

GATES = {
    "tofu forget01": ["gate-tofu", "data.forget=tofu/forget01"],
    "tofu forget05": ["gate-tofu", "data.forget=tofu/forget05"],
    "tofu forget10": ["gate-tofu"],
    "wmdp": ["gate-wmdp"],
    "mmlu economics": ["gate-mmlu-economics"],
    "mmlu law": ["gate-mmlu-law"],
    "mmlu physics": ["gate-mmlu-physics"],
    "news": ["gate-news", "data.forget=wikinews/2019"],
    "book": ["gate-book"],
}


def main() -> None:
    for name in sys.argv[1:] or GATES:
        recipe, *overrides = GATES[name]
        with tempfile.TemporaryDirectory() as folder:
            _, gate = train_classifier(load_recipe(recipe, overrides), Path(folder))
        about = gate.about["trained"]
        learned = f"{about['positive']} + {about['negative']} prompts in {about['seconds']} s"
        print(f"\n### {name}\n\nThreshold {gate.threshold:.4f}; trained on {learned}.\n")
        print(markdown_table(gate_cells(gate.measured)), flush=True)


if __name__ == "__main__":
    main()
