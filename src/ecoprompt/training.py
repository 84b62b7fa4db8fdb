"""Training of causal language models on `transformers.Trainer`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ecoprompt.registry import InputError, Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that has no part in the loss."""


@dataclass(frozen=True)
class Example:
    """One sequence to train on: its token ids, and as many labels, `IGNORED` where nothing is learnt."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


def example(prompt: Sequence[int], completion: Sequence[int], *, loss: Literal["completion", "all"]) -> Example:
    """A prompt with its completion; the loss is over the completion's tokens, or over `all`."""
    ids = (*prompt, *completion)
    return Example(ids, ids if loss == "all" else (*([IGNORED] * len(prompt)), *completion))


def join(examples: Iterable[Example]) -> Example:
    """Several examples as one sequence, for instance the turns of a conversation."""
    parts = list(examples)
    return Example(tuple(i for part in parts for i in part.ids), tuple(i for part in parts for i in part.labels))


def collate(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """A right-padded batch, `input_ids`, `attention_mask` and `labels` [B, T]; no padding is attended to or learnt."""
    length = max(len(one.ids) for one in examples)
    rows = [(one, length - len(one.ids)) for one in examples]
    return {
        "input_ids": torch.tensor([[*one.ids, *([pad] * short)] for one, short in rows]),
        "attention_mask": torch.tensor([[1] * len(one.ids) + [0] * short for one, short in rows]),
        "labels": torch.tensor([[*one.labels, *([IGNORED] * short)] for one, short in rows]),
    }


def train_causal_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    epochs: float = 5.0,
    batch_size: int = 4,
    accumulation: int = 1,
    learning_rate: float = 2e-5,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    bf16: bool = False,
    by_length: bool = False,
    seed: int = 0,
    what: str = "training",
    progress: Progress = quiet,
) -> list[float]:
    """Trains `model` in place and returns the loss of each optimiser step (mean per learnt token, in nats).

    AdamW with a cosine schedule; `warmup` is the fraction of all steps over which the learning rate rises.
    `by_length` batches sequences of similar length, which saves padding. Nothing is written to disk.
    Raises InputError if there is nothing to learn.
    """
    if not any(label != IGNORED for one in examples for label in one.labels[1:]):
        raise InputError(f"{what}: there is no token to learn in {len(examples)} examples")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=learning_rate,
            warmup_steps=warmup,
            lr_scheduler_type="cosine",
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            bf16=bf16,
            seed=seed,
            train_sampling_strategy="group_by_length" if by_length else "random",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        report = _Report(what, progress)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_Sequences(examples),
            data_collator=lambda rows: collate([row["example"] for row in rows], pad),
            callbacks=[report],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return report.losses


class _Sequences(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples as `Trainer` wants them: `input_ids` is there for its length-grouped sampler to measure."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.examples[index].ids, "example": self.examples[index]}


class _Report(TrainerCallback):  # type: ignore[misc]
    """Hands a training's steps to `progress` and keeps their losses."""

    def __init__(self, what: str, progress: Progress) -> None:
        self.what = what
        self.progress = progress
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(self.what, state.global_step, state.max_steps)
