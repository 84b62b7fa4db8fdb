"""Fine-tuning the `transformer` gate with the Hugging Face Trainer; imported only when one is trained."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ecoprompt import processes
from ecoprompt.registry import Progress


def fine_tune(
    model: Any,
    tokenizer: Any,
    windows: Sequence[Sequence[list[int]]],
    labels: Sequence[int],
    judged: int,
    progress: Progress,
    select_at: float,
    settings: Mapping[str, Any],
) -> None:
    """Train `model` in place on the `windows` of each text and leave it with the weights of its best epoch.

    Texts with label 1 are to be flagged. Each class weighs by its inverse frequency in the loss. The best epoch, of
    the first `judged` texts, misses the fewest at the threshold `select_at`, then flags the fewest others; of equals,
    the latest.
    """
    rows = [{"input_ids": ids, "labels": label} for group, label in zip(windows, labels, strict=True) for ids in group]
    starts = np.cumsum([0, *map(len, windows[: judged - 1])])
    counts = np.bincount(np.repeat(labels, list(map(len, windows))), minlength=2)
    positive = np.array(labels[:judged]) == 1
    weight = torch.tensor(len(rows) / (2 * counts), dtype=torch.float32)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight.to(outputs.logits.device))

    def errors(prediction: Any) -> dict[str, float]:
        scores = torch.tensor(prediction.predictions).double().softmax(-1)[:, 1].numpy()
        scores = np.maximum.reduceat(scores, starts)
        misses, alarms = (scores[positive] <= select_at).sum(), (scores[~positive] > select_at).sum()
        # Missing one weighs more than flagging all others; without the others, an epoch that flags everything wins.
        return {"errors": float(misses + alarms / judged)}

    best = BestEpoch(progress)
    with processes.alone(), tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            _arguments(folder, settings),
            DataCollatorWithPadding(tokenizer),
            train_dataset=rows,
            eval_dataset=rows[: sum(map(len, windows[:judged]))],
            compute_loss_func=loss,
            compute_metrics=errors,
            callbacks=[best],
        )
        # It prints to stdout, which carries results alone.
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.load_state_dict(best.weights)
    model.eval()


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
        dataloader_pin_memory=torch.cuda.is_available(),
        # The loss is a mean over the batch already, so that nothing is left to scale by the number of devices.
        average_tokens_across_devices=False,
        **settings,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs one, so that a batch is what the recipe says
    return arguments
