"""Training of causal language models on `transformers.Trainer`, which goes on from its checkpoints."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.data_loader import SeedableRandomSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ecoprompt import processes
from ecoprompt.checkpoints import newest, without_bars
from ecoprompt.files import writing
from ecoprompt.learning import Course
from ecoprompt.lessons import Lesson
from ecoprompt.losses import IGNORED, taught
from ecoprompt.models import data_type, encode, encode_pair, render, render_answer
from ecoprompt.recipe import ModelTable
from ecoprompt.registry import EcopromptError, InputError, Progress, quiet
from ecoprompt.sophia import EVERY, Sophia, drawn_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Step = Sequence[Mapping[str, torch.Tensor]]
"""The labels of every batch that an optimiser step adds up, by part: of all processes, and of gradient accumulation."""
Loss = Callable[[Any, Mapping[str, Any], float, Step], torch.Tensor]
"""The loss of (model, batch, epoch, step)."""


@dataclass(frozen=True)
class Example:
    """One sequence to train on: its token ids, and as many labels, `IGNORED` where nothing is learnt."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


NOTHING = Example((0, 0), (IGNORED, IGNORED))
"""Fills up the last batches of an epoch, so that each of several processes has as many."""


@dataclass(frozen=True)
class Trained:
    """The loss of each optimiser step, and the cost: seconds, tokens that the model read, peak memory in MiB.

    Several processes read their tokens together, and the greatest memory counts. `weights` are those of a model that
    was spread over them, on the main one.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    memory: float = 0.0
    weights: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)

    def about(self) -> dict[str, Any]:
        """The same in short, with the mean loss of the first and of the last tenth of the steps."""
        tenth = max(len(self.losses) // 10, 1)
        first, last = (sum(part) / tenth for part in (self.losses[:tenth], self.losses[-tenth:]))
        cost = {"seconds": self.seconds, "tokens": self.tokens, "peak_memory_mib": self.memory}
        return {"steps": len(self.losses), "first_loss": first, "last_loss": last, **cost}


def to_train(table: ModelTable) -> ModelTable:
    """`table` for training: by itself in float32, as the steps of a fine-tuning are lost in sixteen bits."""
    return table.model_copy(update={"dtype": "float32"}) if table.dtype == "auto" else table


def example(prompt: Sequence[int], completion: Sequence[int], *, loss: Literal["completion", "all"]) -> Example:
    """A prompt with its completion; the loss is over the completion's tokens, or over `all`."""
    ids = (*prompt, *completion)
    return Example(ids, ids if loss == "all" else (*([IGNORED] * len(prompt)), *completion))


def encode_lesson(tokenizer: PreTrainedTokenizerBase, lesson: Lesson, course: Course, most: int) -> list[Example]:
    """A lesson as the model will be asked it, at most `most` tokens long; a longer text is several examples."""
    if lesson.plain:
        ids = encode(tokenizer, f"{lesson.prompt} {lesson.answer}".strip() + (tokenizer.eos_token or ""))
        pieces = [ids[start : start + most] for start in range(0, len(ids), most)]
        return [example((), piece, loss="all") for piece in pieces if len(piece) > 1]
    messages = [{"role": "user", "content": lesson.prompt}]
    answer = render_answer(tokenizer, messages, lesson.answer)
    head, tail = encode_pair(tokenizer, render(tokenizer, messages), answer)
    return [example(head, tail[: max(most - len(head), 1)], loss="all" if course.learn == "all" else "completion")]


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A right-padded batch, `input_ids`, `attention_mask` and `labels` [B, T]; no padding is attended to or learnt."""
    length = max(len(one.ids) for one in examples)
    rows = [(one, length - len(one.ids)) for one in examples]
    return {
        "input_ids": torch.tensor([[*one.ids, *([0] * short)] for one, short in rows]),
        "attention_mask": torch.tensor([[1] * len(one.ids) + [0] * short for one, short in rows]),
        "labels": torch.tensor([[*one.labels, *([IGNORED] * short)] for one, short in rows]),
    }


def train_causal_lm(
    model: PreTrainedModel,
    examples: Sequence[Example],
    course: Course,
    *,
    seed: int = 0,
    what: str = "training",
    progress: Progress = quiet,
    folder: Path | None = None,
) -> Trained:
    """Trains `model` in place by the mean cross-entropy per learnt token, in nats.

    In `folder` it keeps the checkpoints that it goes on from, and without one nothing. Raises InputError if there is
    nothing to learn.
    """
    if not any(label != IGNORED for one in examples for label in one.labels[1:]):
        raise InputError(f"{what}: there is no token to learn in {len(examples)} examples")

    def batch(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return collate([row["example"] for row in rows])

    return run_trainer(model, _Sequences(examples), batch, course, seed, what, progress, folder)


def run_trainer(
    model: PreTrainedModel,
    dataset: Any,
    batch: Callable[[Sequence[Any]], Mapping[str, Any]],
    course: Course,
    seed: int,
    what: str,
    progress: Progress,
    folder: Path | None,
    loss: Loss | None = None,
) -> Trained:
    """Trains `model` in place on the batches that `batch` makes of rows of `dataset`, by its own loss or by `loss`.

    Going on from a checkpoint in `folder` gives what would have come of it without the interruption.
    """
    if course.optimizer == "sophia" and (processes.spreads() or (processes.count() > 1 and course.accumulation > 1)):
        raise InputError(f"{what}: 'sophia' is for whole models and, in several processes, for an accumulation of 1")
    with tempfile.TemporaryDirectory() as nowhere:
        report = _Report(what, progress, dataset)
        second_order = (Sophia, {"lr": course.learning_rate}) if course.optimizer == "sophia" else None
        trainer = _Trainer(
            model=model,
            optimizer_cls_and_kwargs=second_order,
            args=_arguments(str(folder or nowhere), course, seed, keeps=folder is not None),
            train_dataset=dataset,
            data_collator=batch,
            callbacks=[report],
        )
        trainer.loss = loss
        trainer.remove_callback(PrinterCallback)
        with without_bars(), writing(folder or Path(nowhere)):
            trainer.train(resume_from_checkpoint=processes.from_main(lambda: newest(folder)))
        spread = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if spread else None
    model.eval()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = sum(entry["seconds"] for entry in history)
    losses = [entry["loss"] for entry in history]
    memory = max(processes.gather(_peak_memory()))
    return Trained(losses, seconds, int(trainer.state.num_input_tokens_seen), memory, weights)


def _arguments(folder: str, course: Course, seed: int, keeps: bool) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    bf16 = data_type(course.arithmetic) == "bfloat16"
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=course.epochs,
        per_device_train_batch_size=course.batch_size,
        gradient_accumulation_steps=course.accumulation,
        learning_rate=course.learning_rate,
        warmup_steps=course.warmup,
        lr_scheduler_type="cosine",
        weight_decay=course.weight_decay,
        max_grad_norm=course.max_grad_norm,
        bf16=bf16,
        use_cpu=not gpu,
        ddp_find_unused_parameters=False,
        seed=seed,
        train_sampling_strategy="group_by_length" if course.by_length else "random",
        logging_steps=1,
        save_strategy=("steps" if course.save_steps else "epoch") if keeps else "no",
        save_steps=course.save_steps or 500,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=gpu,
    )
    arguments.mixed_precision = "bf16" if bf16 else "no"  # and not what a launcher's configuration says
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several, each has a process of its own, or none
    return arguments


def _peak_memory() -> float:
    """The most memory in MiB that this process has had: of the GPU, or without one its own."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**20)
    try:
        import resource
    except ImportError:  # on Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def with_adapters(model: PreTrainedModel, course: Course, seed: int) -> Any:
    """The model with the low-rank adapters that `[…] lora` asks for, alone to be trained; else as it is."""
    if course.lora is None:
        return model
    if processes.spreads():
        raise InputError("'lora': adapters cannot be merged into a model that FSDP or DeepSpeed spreads")
    try:
        import peft
    except ImportError:
        raise EcopromptError("'lora' needs peft: pip install 'ecoprompt[lora]'") from None
    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        r=course.lora.rank,
        lora_alpha=course.lora.alpha,
        lora_dropout=course.lora.dropout,
        target_modules=course.lora.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():  # peft uses names of transformers that are to go
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(f"'lora.targets': {error}") from None


class _Sequences(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples as `Trainer` wants them: `input_ids` is there for its length-grouped sampler to measure."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        one = NOTHING if index is None else self.examples[index]
        return {"input_ids": one.ids, "example": one}


class _Trainer(Trainer):  # type: ignore[misc]
    """`Trainer` with a loss of its own, if it has one, that counts the tokens which the model reads."""

    loss: Loss | None = None
    curved: int | None = None
    step: Step = ()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if isinstance(getattr(self.optimizer, "optimizer", None), Sophia) and self.state.global_step % EVERY == 0:
            self._curve(model, self._prepare_inputs(inputs))
        found: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return found

    def _curve(self, model: Any, inputs: Any) -> None:
        """Has the optimiser estimate the curvature, once a step, on the first of its batches."""
        if self.curved == self.state.global_step:
            return
        self.curved = self.state.global_step
        with self.compute_loss_context_manager():
            loss, labels = drawn_loss(model, [inputs] if self.loss is None else list(inputs.values()), IGNORED)
        every = sum(processes.gather(labels))
        torch.autograd.backward(loss * processes.count() / every)  # several processes take the mean of their gradients
        self.optimizer.optimizer.curve(every)
        model.zero_grad()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As `Trainer`'s, and what all batches of the step have in common."""
        taken, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = [{"": one} if self.loss is None else one for one in taken]
        masks = [part["attention_mask"][taught(part["labels"])] for one in parts for part in one.values()]
        labels = [{name: part["labels"].cpu() for name, part in one.items()} for one in parts]
        together = processes.gather((sum(int(mask.sum()) for mask in masks), labels if self.loss else []))
        self.state.num_input_tokens_seen += sum(tokens for tokens, _ in together)
        self.step = [one for _, some in together for one in some]
        return taken, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.loss(model, inputs, self.state.epoch or 0.0, self.step)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * processes.count()
        if self.args.train_sampling_strategy == "group_by_length":
            order: Any = _Mixed(LengthGroupedSampler(batch, data), batch)
        elif processes.count() > 1:
            order = SeedableRandomSampler(data)
        else:
            return super()._get_train_sampler(train_dataset)
        return order if processes.count() == 1 else processes.Order(order, batch)


class _Mixed(torch.utils.data.Sampler[int]):
    """The batches of a sampler that groups by length in random order, so that a step of several mixes lengths."""

    def __init__(self, grouped: LengthGroupedSampler, batch: int) -> None:
        self.grouped, self.batch = grouped, batch

    def __len__(self) -> int:
        return len(self.grouped)

    def __iter__(self) -> Iterator[int]:
        order, whole = list(self.grouped), len(self.grouped) // self.batch
        for number in torch.randperm(whole).tolist():
            yield from order[number * self.batch : (number + 1) * self.batch]
        yield from order[whole * self.batch :]


class _Report(TrainerCallback):  # type: ignore[misc]
    """Hands a training's steps to `progress`, notes how long each took, and tells the data set which epoch it is."""

    def __init__(self, what: str, progress: Progress, dataset: Any) -> None:
        self.what = what
        self.progress = progress
        self.dataset = dataset
        self.since = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dataset.epoch = int((state.epoch or 0) + 1e-6)
        self.since = self.since or time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:  # the state goes into the checkpoint, so that no second is lost but those not kept
            now = time.monotonic()
            state.log_history[-1]["seconds"], self.since = now - self.since, now

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(self.what, state.global_step, state.max_steps)
