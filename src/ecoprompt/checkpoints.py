"""What is kept of a training: checkpoints to go on from, and in the end the model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from ecoprompt import processes
from ecoprompt.files import write_text_atomic, writing
from ecoprompt.learning import Course
from ecoprompt.lessons import ABOUT
from ecoprompt.results import to_json

CHECKPOINT = "checkpoint-"


def newest(folder: Path | None) -> str | None:
    """The newest checkpoint that is whole; what a killed process left half written is removed."""
    if folder is None:
        return None
    found = sorted(folder.glob(f"{CHECKPOINT}*"), key=lambda path: int(path.name.removeprefix(CHECKPOINT)))
    ranks = range(processes.count()) if processes.count() > 1 else ()
    for path in reversed(found):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())  # which the main process writes last
            if all((path / f"rng_state_{rank}.pth").exists() for rank in ranks):
                return str(path)
        shutil.rmtree(path)
    return None


def trained_before(folder: Path, digest: str) -> dict[str, Any] | None:
    """What the folder of a model says of its training, if that was the one that `digest` stands for."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if about.get("digest") != digest:
        return None
    shutil.rmtree(_place(folder, digest), ignore_errors=True)  # it was killed when it had all but ended
    return about


def checkpoints_of(folder: Path, how: str) -> Path:
    """Where the training of the model `folder` keeps its checkpoints; those of another way of training go."""
    wanted = _place(folder, how)
    with processes.main_first():
        if processes.is_main():
            _drop_checkpoints(folder, but=wanted)
        wanted.mkdir(parents=True, exist_ok=True)
    return wanted


def _place(folder: Path, how: str) -> Path:
    return folder.with_name(f".{folder.name}-{how}")


def _drop_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Remove the checkpoints that the model `folder` was trained through."""
    for place in folder.parent.glob(f".{folder.name}-" + "[0-9a-f]" * 16):
        if place != but:
            shutil.rmtree(place)


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    course: Course,
    about: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a trained model with its tokenizer, whole or not at all, in place of `folder`; its checkpoints go.

    `weights` are those of a model that is spread over processes, of which the main one writes.
    """
    if not processes.is_main():
        return
    if course.lora is not None:
        model = model.merge_and_unload()
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with without_bars(), writing(folder):
        dtype = getattr(torch, course.stored)
        if weights is None:
            model.to(dtype).save_pretrained(part)
        else:
            model.save_pretrained(part, state_dict={name: weight.to(dtype) for name, weight in weights.items()})
        tokenizer.save_pretrained(part)
    write_text_atomic(part / ABOUT, to_json(about))
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():  # moved before it is removed, so that no folder is half a model
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)
    _drop_checkpoints(folder)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Leaves out what transformers shows of its writing, which would go to a pipe as well."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
