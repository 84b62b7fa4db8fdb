"""What each of the processes does that test_processes.py and bench/processes.py launch.

`accelerate launch … tests/launched.py RECIPE OUTPUT COMMAND… [KEY=VALUE…]` runs the commands one after the other in the
same processes, which spares starting them anew, and writes every step's loss into a trained model's `training.json`.
COMMAND `fail` or `die` ends the last process alone, by an exception or as a lack of memory would; `spread` lets FSDP
spread models over CPUs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecoprompt import processes, terminal, training


def work(file: str, output: Path, arguments: Sequence[str]) -> None:
    """Run the commands on the recipe `file`, with keys set as on a command line."""
    from ecoprompt.baseline import baseline
    from ecoprompt.evaluate import evaluate
    from ecoprompt.finetune import finetune
    from ecoprompt.optimize import optimize
    from ecoprompt.recipe import load_recipe

    about = training.Trained.about
    training.Trained.about = lambda self: {**about(self), "losses": self.losses}  # type: ignore[method-assign]
    recipe = load_recipe(file, [one for one in arguments if "=" in one])
    functions: dict[str, Any] = {"evaluate": evaluate, "optimize": optimize, "finetune": finetune, "baseline": baseline}
    for command in (one for one in arguments if "=" not in one):
        if command == "spread":
            spread_over_cpus()
        elif command in functions:
            functions[command](recipe, output)
        elif processes.rank() == processes.count() - 1:
            if command == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the last process cannot go on")


def spread_over_cpus() -> None:
    """Let accelerate 1.15 take processes on CPUs for such as it spreads models over: PyTorch does, by gloo."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def begin_as_on_gpus(self: Any, cpu: bool = False, **settings: Any) -> None:
        begin(self, cpu, **settings)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_on_gpus


if __name__ == "__main__":
    if "fail" in sys.argv:  # the main one has nothing to say
        terminal.PATIENCE = 1.0
    terminal.hush()
    try:
        work(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    except Exception as error:  # as the command line does
        told = terminal.message(error)
        terminal.speak_up()
        terminal.fail(*told)
    processes.leave()
