"""Fine-tuning the `transformer` gate with the Hugging Face Trainer; imported only when one is trained."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ecoprompt import processes
from ecoprompt.registry import Progress

Labelled = Sequence[tuple[str, int]]
Row = dict[str, Any]
"""A window of a text, as `input_ids`, with the text's label, as `labels`."""


def fine_tune(
    model: Any,
    tokenizer: Any,
    windows_of: Callable[[Sequence[str]], list[list[list[int]]]],
    texts: Labelled,
    edited: Callable[[int], Labelled],
    progress: Progress,
    select_at: float,
    settings: Mapping[str, Any],
) -> None:
    """Train `model` in place and leave it with the weights of its best epoch.

    Texts with label 1 are to be flagged; every window of a text (token ids, as `windows_of` cuts it) carries its label.
    In epoch n the texts `edited(n)` are learned from as well, as many in each; of a long one, a window drawn for the
    epoch. Each class weighs by its inverse frequency in the loss. The best epoch misses the fewest of `texts` at the
    threshold `select_at`, then flags the fewest others; of equals, the latest.
    """

    def drawn(epoch: int) -> list[Row]:
        further, generator = edited(epoch), random.Random(epoch)
        found = zip(windows_of([text for text, _ in further]), further, strict=True)
        return [{"input_ids": generator.choice(windows), "labels": label} for windows, (_, label) in found]

    windows = windows_of([text for text, _ in texts])
    labels = [label for _, label in texts]
    rows = [{"input_ids": ids, "labels": label} for found, label in zip(windows, labels, strict=True) for ids in found]
    practice = Practice(rows, drawn)
    starts = np.cumsum([0, *map(len, windows[:-1])])
    positive = np.array(labels) == 1
    counts = np.bincount([practice[number]["labels"] for number in range(len(practice))], minlength=2)
    weight = torch.tensor(len(practice) / (2 * counts), dtype=torch.float32)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits.float()
        return torch.nn.functional.cross_entropy(logits, labels, weight=weight.to(logits.device))

    def errors(prediction: Any) -> dict[str, float]:
        scores = torch.tensor(prediction.predictions).double().softmax(-1)[:, 1].numpy()
        scores = np.maximum.reduceat(scores, starts)
        misses, alarms = (scores[positive] <= select_at).sum(), (scores[~positive] > select_at).sum()
        # Missing one weighs more than flagging all others; without the others, an epoch that flags everything wins.
        return {"errors": float(misses + alarms / len(labels))}

    best = BestEpoch(progress)
    with processes.alone(), tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            _arguments(folder, settings),
            DataCollatorWithPadding(tokenizer),
            train_dataset=practice,
            eval_dataset=rows,
            compute_loss_func=loss,
            compute_metrics=errors,
            callbacks=[best, practice],
        )
        # It prints to stdout, which carries results alone.
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.load_state_dict(best.weights)
    model.eval()


class Practice(TrainerCallback, Dataset[Row]):  # type: ignore[misc]
    """The rows to learn from: some of every epoch, and those that are edited anew for each."""

    def __init__(self, rows: list[Row], edited: Callable[[int], list[Row]]) -> None:
        self.rows, self.edited = rows, edited
        self.epoch, self.further = 0, edited(0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = round(state.epoch)
        if epoch != self.epoch:
            self.epoch, self.further = epoch, self.edited(epoch)

    def __len__(self) -> int:
        return len(self.rows) + len(self.further)

    def __getitem__(self, number: int) -> Row:
        first = len(self.rows)
        return self.rows[number] if number < first else self.further[number - first]


class BestEpoch(TrainerCallback):  # type: ignore[misc]
    """Reports each step and keeps the weights of the epoch with the fewest errors, in memory."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.errors = math.inf
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress("training the gate", state.global_step, state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        errors = kwargs["metrics"]["eval_errors"]
        if errors <= self.errors:
            self.errors = errors
            self.weights = {name: tensor.cpu().clone() for name, tensor in kwargs["model"].state_dict().items()}


def _arguments(folder: str, settings: Mapping[str, Any]) -> TrainingArguments:
    """Trainer arguments that evaluate each epoch, write no checkpoint and report nowhere."""
    arguments = TrainingArguments(
        output_dir=folder,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        # The loss is a mean over the batch already, so that nothing is left to scale by the number of devices.
        average_tokens_across_devices=False,
        **settings,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs one, so that a batch is what the recipe says
    return arguments
