"""The processes that a launcher has started, if one has: which of them this is, and what they tell one another.

Without a launcher there is one process, and nothing here costs anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ecoprompt.registry import EcopromptError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
R = TypeVar("R")
COUNT = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
HIDDEN = ("ACCELERATE_USE", "ACCELERATE_MIXED_PRECISION")
"""How the names begin of what accelerate reads from the environment beside the processes."""
LOST = re.compile(r"closed by peer|reset by peer|remote process exited|Broken pipe")
LONGEST = timedelta(days=30)
"""A process waits for another: a gate may train for hours, and a launcher ends those that wait for a dead one."""


def count() -> int:
    """How many processes there are."""
    return _number(COUNT, 1)


def rank() -> int:
    """The number of this process, from 0."""
    return _number(RANK, 0)


def is_main() -> bool:
    """Whether this is the process that writes files and talks."""
    return count() == 1 or rank() == 0


def _number(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), default)


def join() -> PartialState:
    """Accelerate's account of the processes, which are connected by it, each with a GPU of its own if there are any."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST)


def leave() -> None:
    """Take leave of the other processes, if they were connected."""
    torch = sys.modules.get("torch")
    if torch is not None and count() > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gather(value: T) -> list[T]:
    """The value of each process, in their order, on all of them; all have to call it."""
    if count() == 1:
        return [value]
    join()
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives on the main process, on all of them; all have to call it."""
    if count() == 1:
        return make()
    join()
    from accelerate.utils import broadcast_object_list

    held: list[Any] = [make() if is_main() else None]
    broadcast_object_list(held)
    made: T = held[0]
    return made


def deal(units: Sequence[T], compute: Callable[[T], R]) -> Iterator[list[R]]:
    """What `compute` gives for `units`, round by round: each process takes one of a round, and all are given all."""
    for start in range(0, len(units), count()):
        mine = units[start + rank() : start + rank() + 1]
        yield [made for part in gather([compute(unit) for unit in mine]) for made in part]


def check_agreement(value: object) -> None:
    """Raises EcopromptError unless all processes have the same to do."""
    if count() > 1 and len(set(gather(hashlib.sha256(repr(value).encode()).digest()))) > 1:
        raise EcopromptError(
            "the processes do not ask for the same: all need the same files, versions and kind of device, and a folder "
            "of results (--output) that they share"
        )


class Order:
    """The order in which one process would take rows, and then as many of nothing as fill the batches of all.

    The main process draws it for all. Accelerate by itself would fill up with rows of the beginning.
    """

    def __init__(self, order: Any, together: int) -> None:
        self.order, self.together = order, together

    def __len__(self) -> int:
        return -(-len(self.order) // self.together) * self.together

    def __iter__(self) -> Iterator[int | None]:
        yield from from_main(lambda: list(self.order))
        yield from [None] * (len(self) - len(self.order))

    def set_epoch(self, epoch: int) -> None:
        """What the draws of an epoch are told by."""
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)


def spreads() -> bool:
    """Whether the launcher has models spread over the processes."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def several() -> dict[str, Any]:
    """What is to be said of a training's settings where several processes share it, whose batches add up."""
    return {"processes": count()} if count() > 1 else {}


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block before the others do."""
    if count() == 1:
        yield
        return
    with join().main_process_first():
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block, what accelerate and transformers do is done by this process without the others."""
    if count() == 1:
        yield
        return
    from accelerate.state import AcceleratorState

    names = [name for name in os.environ if name in (*COUNT, *RANK, "LOCAL_RANK") or name.startswith(HIDDEN)]
    hidden = {name: os.environ.pop(name) for name in names}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.update(hidden)
        AcceleratorState._reset_state(reset_partial_state=True)
        join()


def lost_another(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    return count() > 1 and isinstance(error, RuntimeError) and LOST.search(str(error)) is not None
