"""Multiple choice against lm-evaluation-harness: the same rows, the same model, its own tasks and its own scoring.

    python tests/bench/harness.py [ROWS] [MODEL]

Its tasks are those that it comes with, read from local files; where the paper's prompt form is another, the task gets
that form ("ours" in the table) and only the scoring is its own. Prints the largest difference of a choice's
log-likelihood, and the score by either. Where the harness has no such score (it compares totals, or totals by
characters, where the paper compares means by tokens), "theirs" is the paper's score of its log-likelihoods.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import sys
import tempfile
from pathlib import Path

import lm_eval
import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from ecoprompt.asking import Asking, row_of
from ecoprompt.models import encode_pair, load_model
from ecoprompt.recipe import ModelTable, parse_recipe, resolve_runs
from ecoprompt.registry import benchmarks
from ecoprompt.results import Store

SHARED = Path(__file__).parents[3] / "shared"
TASKS = Path(lm_eval.__file__).parent / "tasks"
HELLASWAG = [
    {
        "activity_label": "Baking", "ctx_a": "[header] How to bake bread [title] Knead it.  ", "label": str(number % 4),
        "ctx_b": "the baker",
        "endings": [f"waits {number} hours. [step] Then eats.", " [title] Sleeps", "sings", "leaves."],
    }
    for number in range(20)
]  # fmt: skip
LONGEST = 200
"""Tokens of a row, so that prompt and answer fit the small model's 512, to which the harness would cut them."""
OURS = {
    ("general_ability", "piqa"): {"doc_to_text": "{{goal}}"},
    ("general_ability", "commonsenseqa"): {
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
    },
}
PLACES = {
    ("wmdp", "bio"): ("wmdp/wmdp_bio.yaml", "wmdp/bio.jsonl"),
    ("wmdp", "chem"): ("wmdp/wmdp_chem.yaml", "wmdp/chem.jsonl"),
    ("wmdp", "cyber"): ("wmdp/wmdp_cyber.yaml", "wmdp/cyber.jsonl"),
    ("mmlu", "neighbours"): ("mmlu/default/mmlu_econometrics.yaml", "mmlu/test.jsonl"),
    ("general_ability", "arc_easy"): ("arc/arc_easy.yaml", "arc_easy/test.jsonl"),
    ("general_ability", "arc_challenge"): ("arc/arc_challenge.yaml", "arc_challenge/test.jsonl"),
    ("general_ability", "openbookqa"): ("openbookqa/openbookqa.yaml", "openbookqa/test.jsonl"),
    ("general_ability", "social_i_qa"): ("siqa/siqa.yaml", "social_i_qa/validation.jsonl"),
    ("general_ability", "winogrande"): ("winogrande/default.yaml", "winogrande/validation.jsonl"),
    ("general_ability", "truthfulqa"): ("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa/TruthfulQA.csv"),
    ("general_ability", "hellaswag"): ("hellaswag/hellaswag.yaml", ""),
    ("general_ability", "piqa"): ("piqa/piqa.yaml", "piqa/validation.jsonl"),
    ("general_ability", "commonsenseqa"): ("commonsense_qa/default.yaml", "commonsenseqa/validation.jsonl"),
}
"""The harness's task and the local file of each subset."""


def rows_of(place: tuple[str, str]) -> list[dict]:
    """All rows, in the columns of the Hub's data set."""
    file = PLACES[place][1]
    if place[1] == "hellaswag":
        return HELLASWAG
    path = SHARED / "data" / file
    if path.suffix == ".csv":
        found = []
        with path.open() as opened:
            for row in csv.DictReader(opened):
                true, false = (row[f"{kind} Answers"].strip(" ;").split("; ") for kind in ("Correct", "Incorrect"))
                targets = {"choices": true + false, "labels": [1] * len(true) + [0] * len(false)}
                found.append({"question": row["Question"], "mc2_targets": targets, "mc1_targets": targets})
        return found
    with path.open() as opened:
        found = [json.loads(line) for line in opened]
    return [row for row in found if place[0] != "mmlu" or row["subject"] == "econometrics"]


def task_of(place: tuple[str, str], path: Path) -> dict:
    """The harness's own task, its rows read from `path`."""
    task = load_yaml(TASKS / PLACES[place][0], resolve_func=True)
    for key in ("dataset_name", "training_split", "validation_split", "fewshot_split", "fewshot_config", "tag"):
        task.pop(key, None)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    return {**task, **data, **OURS.get(place, {}), "task": "-".join(place)}


def ask(loaded, benchmark: str, subset: str, root: Path, count: int, folder: Path):
    """Our items with their log-likelihoods, in the order of the row's choices, and our scores."""
    recipe = parse_recipe({"name": "x", "run": {"original": {}}, "model": {"name": "quickstart"}}, "x")
    store = Store(folder / "scores.jsonl")
    forget = "economics" if benchmark == "mmlu" else "all" if benchmark == "wmdp" else None
    items = benchmarks[benchmark].items(subset, forget, root)[:count]
    asked, _ = Asking(loaded, recipe, items, store, set()).ask(resolve_runs(recipe)[0], None, lambda *_: None)
    found = []
    for row in asked:
        several = "answers" in row.keys
        right, wrong = ([store.get(key)[:2] for key in row.keys[name]]
                        for name in ("answers" if several else "answer", "alternatives"))  # fmt: skip
        place = 0 if several else row.item.place
        found.append(wrong[:place] + right + wrong[place:])
    return items, found, [row_of(row, store, {})["values"]["accuracy"] for row in asked]


def paper_score(item, likelihoods: list[float], tokens: list[int]) -> float:
    """What the paper's rule makes of log-likelihoods."""
    if len(item.answers) > 1 or item.subset == "truthfulqa":
        shares = np.exp(np.array(likelihoods) - max(likelihoods))
        return float(shares[: len(item.answers)].sum() / shares.sum())
    means = np.array(likelihoods) / np.array(tokens)
    return float(all(means[item.place] > other for n, other in enumerate(means) if n != item.place))


def main(count: int, name: str) -> None:
    loaded = load_model(ModelTable(name=name))
    logging.disable(logging.WARNING)
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=8, device="cpu")
    prompt, letters = "Answer:", [f" {letter}" for letter in "ABCD"]
    tails = [len(encode_pair(loaded.tokenizer, prompt, letter)[1]) for letter in letters]
    print(f"tokens of ' A' to ' D' after 'Answer:': {tails}\n")
    print("| benchmark | rows | choices | largest difference | ours | theirs | harness's own | form |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for place in PLACES:
            short = (row for row in rows_of(place) if len(loaded.tokenizer.encode(json.dumps(row))) < LONGEST)
            rows = list(itertools.islice(short, count))
            local = benchmarks[place[0]].subset(place[1]).local
            path = root / f"{local}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            task = task_of(place, path)
            out = lm_eval.simple_evaluate(
                model=theirs, tasks=[task], num_fewshot=0, log_samples=True, bootstrap_iters=0,
                task_manager=TaskManager(include_defaults=False),
            )  # fmt: skip
            samples = sorted(out["samples"][task["task"]], key=lambda sample: sample["doc_id"])
            items, ours, scores = ask(loaded, *place, root, count, root / "-".join(place))
            gaps, same = [], []
            for item, mine, sample in zip(items, ours, samples, strict=True):
                told = [float(one[0][0]) for one in sample["resps"]]
                gaps += [abs(a[0] - b) for a, b in zip(mine, told, strict=True)]
                same.append(paper_score(item, told, [one[1] for one in mine]))
            own = out["results"][task["task"]]["acc,none"]
            form = "ours" if place in OURS else "made rows" if place[1] == "hellaswag" else "theirs"
            cells = [" ".join(place), len(items), len(gaps), f"{max(gaps):.1e}", f"{np.mean(scores):.4f}"]
            print("|", " | ".join(map(str, [*cells, f"{np.mean(same):.4f}", f"{own:.4f}", form])), "|", flush=True)
            assert max(gaps) < 1e-4, place
            assert abs(np.mean(scores) - np.mean(same)) < 1e-4, place


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        int(arguments[0]) if arguments else 40,
        arguments[1] if len(arguments) > 1 else str(SHARED / "models" / "tofu-mini-full"),
    )
