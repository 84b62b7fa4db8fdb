"""Unlearns in weight space by a named method, to compare with: a model trained away from the forget set."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ecoprompt.checkpoints import checkpoints_of, save_model, trained_before
from ecoprompt.data import Source, check_columns, load_rows
from ecoprompt.files import read_text
from ecoprompt.learning import BaselineTable
from ecoprompt.lessons import Lesson, Lessons, baseline_table, lessons_of, most_tokens
from ecoprompt.losses import Method, Scored
from ecoprompt.models import Loaded, load_model
from ecoprompt.pack import OUTPUT
from ecoprompt.processes import check_agreement, from_main, several
from ecoprompt.recipe import Recipe, digest
from ecoprompt.registry import InputError, Progress, methods, plugins, quiet
from ecoprompt.training import (
    NOTHING,
    Example,
    Loss,
    Step,
    collate,
    encode_lesson,
    run_trainer,
    to_train,
    with_adapters,
)

IDK = Path(__file__).parent / "idk.txt"
BASELINES = "baselines"
ORIGINAL = "_original"


def baseline(recipe: Recipe, output: Path = OUTPUT, progress: Progress = quiet) -> tuple[Path, dict[str, Any]]:
    """Trains [model] by the method of [baseline], into `output`/<recipe>/baselines/<method>; the folder, and the cost.

    One that was made in the same way stays as it is, and one whose training was interrupted goes on. An epoch is one
    pass over the forget set, each of whose rows meets a row of the retain set, another one in every epoch.
    """
    table = baseline_table(recipe)
    method: Method = methods[table.loss]
    lessons = lessons_of(recipe)
    refusals = read_refusals(table.idk, len(lessons.forget)) if "idk" in method.reads() else []
    loaded = load_model(to_train(recipe.model))
    folder = output / recipe.name / BASELINES / table.loss
    settings = table.model_dump(mode="json", exclude={"parameters"}) | table.parameters | several()
    taught = [[vars(one) for one in part] for part in (lessons.forget, lessons.retain)]
    how = digest(settings, recipe.seed, loaded.fingerprint, taught, refusals)
    check_agreement(how)
    before = from_main(lambda: trained_before(folder, how))
    if before is not None:
        return folder, before
    pairs = Pairs(lessons, refusals, method, loaded, table, most_tokens(recipe, table), recipe.seed)
    loss = loss_of(method, table, loaded, recipe.seed)
    model = with_adapters(loaded.model, table, recipe.seed)
    _freeze(model, method, table)
    checkpoints = checkpoints_of(folder, how)
    what = f"unlearning by {table.loss}"
    trained = run_trainer(model, pairs, pairs.batch, table, recipe.seed, what, progress, checkpoints, loss)
    about = {"loss": table.loss, "digest": how, **trained.about(), "settings": settings, "plugins": plugins}
    save_model(model, loaded.tokenizer, folder, table, about, trained.weights)
    return folder, about


def read_refusals(file: str | None, rows: int) -> list[str]:
    """The answers that a model is to prefer: sentences to draw from, or one for each of the forget set's `rows`."""
    if file is None or file.endswith(".txt"):
        found = [line.strip() for line in read_text(Path(file) if file else IDK).splitlines() if line.strip()]
        if not found:
            raise InputError(f"{file}: found no sentence, expected one a line")
        return found
    answers = load_rows(Source(path=file))
    check_columns(answers, {"answer": str})
    if len(answers) != rows:
        raise InputError(f"{file}: found {len(answers)} rows, expected one for each of the forget set's {rows}")
    return [row["answer"] for row in answers]


class Pairs(torch.utils.data.Dataset[dict[str, Any]]):
    """The forget set's examples, each with one of the retain set and with other answers, as a method reads them.

    What an example meets is drawn from the seed, the epoch and its number, so that an interruption changes nothing.
    """

    epoch = 0

    def __init__(
        self,
        lessons: Lessons,
        refusals: Sequence[str],
        method: Method,
        loaded: Loaded,
        table: BaselineTable,
        most: int,
        seed: int,
    ) -> None:
        self.method, self.seed = method, seed
        self.refusals, self.own_refusals = refusals, table.idk is not None and not table.idk.endswith(".txt")
        self.encode: Callable[[Lesson], list[Example]] = lambda one: encode_lesson(loaded.tokenizer, one, table, most)
        self.forget = [(at, one) for at, lesson in enumerate(lessons.forget) for one in self.encode(lesson)]
        self.retain = [(at, one) for at, lesson in enumerate(lessons.retain) for one in self.encode(lesson)]
        self.lessons = lessons

    def __len__(self) -> int:
        return len(self.forget)

    def names(self) -> list[str]:
        """The batches that the method reads in this epoch."""
        read = (name.removesuffix(ORIGINAL) for name in self.method.reads(self.epoch))
        return [name for name in dict.fromkeys(read) if name != "direction"]

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        if index is None:
            return dict.fromkeys(self.names(), NOTHING)
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        at, forget = self.forget[index]
        met, retain = rng.choice(self.retain)
        found: dict[str, Example] = {"forget": forget, "retain": retain}
        asked, wrong = self.lessons.forget[at], self.lessons.retain[met].answer
        if self.refusals:
            sentence = self.refusals[at] if self.own_refusals else rng.choice(self.refusals)
            found["idk"] = self.encode(Lesson(asked.prompt, sentence, asked.plain))[0]
        if "mismatch" in self.names():
            found["mismatch"] = self.encode(Lesson(asked.prompt, wrong, asked.plain))[0]
        # The sampler that groups by length measures `input_ids`.
        return {"input_ids": forget.ids} | {name: found[name] for name in self.names()}

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
        """The rows' examples by name, each [B, T] of its own length."""
        return {name: collate([row[name] for row in rows]) for name in self.names()}


def loss_of(method: Method, table: BaselineTable, loaded: Loaded, seed: int) -> Loss:
    """The loss of a model on the batches that `method` reads; what the original gives for them is not trained."""
    reads = method.reads()
    original: Any = None
    if any(name.endswith(ORIGINAL) for name in reads):
        original = copy.deepcopy(loaded.model).requires_grad_(False)
    layer = _layer(loaded.model, table) if "direction" in reads else None
    size = loaded.model.config.get_text_config().hidden_size
    direction = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    direction = (direction / direction.norm()).to(loaded.model.device)

    def loss(model: Any, batches: Mapping[str, Any], epoch: float, step: Step = ()) -> torch.Tensor:
        read: dict[str, Any] = {"direction": direction}
        for name in (name for name in method.reads(epoch) if name != "direction"):
            with torch.set_grad_enabled(not name.endswith(ORIGINAL)):
                asked = original if name.endswith(ORIGINAL) else model
                part = name.removesuffix(ORIGINAL)
                read[name] = _score(asked, batches[part], layer, [labels[part] for labels in step])
        return method(read, epoch, **table.parameters)

    return loss


def _score(
    model: Any, batch: Mapping[str, torch.Tensor], layer: int | None, step: Sequence[torch.Tensor] = ()
) -> Scored:
    found = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=layer is not None,
        use_cache=False,
    )
    hidden = None if layer is None else found.hidden_states[layer + 1]
    return Scored(found.logits, batch["labels"], hidden, step)


def _layer(model: Any, table: BaselineTable) -> int:
    """The layer that is steered."""
    count: int = model.config.get_text_config().num_hidden_layers
    layer = table.parameters["layer"]
    if layer is not None and layer >= count:
        raise InputError(f"'baseline.layer': found {layer}, but the model's layers are 0 to {count - 1}")
    return min(7, count // 2) if layer is None else int(layer)


def _freeze(model: Any, method: Method, table: BaselineTable) -> None:
    """Leaves, where a layer is steered, that one and the two below it to be trained."""
    if "direction" not in method.reads():
        return
    layer, count = _layer(model, table), model.config.get_text_config().num_hidden_layers
    layers = next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == count)
    trained = {id(weight) for one in layers[max(layer - 2, 0) : layer + 1] for weight in one.parameters()}
    for weight in model.parameters():
        weight.requires_grad_(weight.requires_grad and id(weight) in trained)
