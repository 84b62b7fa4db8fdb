"""Embedding-corrupted (ECO) prompts: make a language model behave as if it had never seen some data."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecoprompt.forget import Decision, Forget
    from ecoprompt.guard import Guard, guard
    from ecoprompt.registry import EcopromptError, InputError, UnguardedError

__version__ = "0.1.0"
__all__ = ["Decision", "EcopromptError", "Forget", "Guard", "InputError", "UnguardedError", "guard"]

# Loaded when first used, so that `ecoprompt --help` and every input error answer at once.
_HOMES = {
    "Decision": "ecoprompt.forget",
    "EcopromptError": "ecoprompt.registry",
    "Forget": "ecoprompt.forget",
    "Guard": "ecoprompt.guard",
    "InputError": "ecoprompt.registry",
    "UnguardedError": "ecoprompt.registry",
    "guard": "ecoprompt.guard",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ecoprompt' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Package(types.ModuleType):
    """Keeps `ecoprompt.guard` the function: importing the module of that name would otherwise take its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        function = value.guard if name == "guard" and isinstance(value, types.ModuleType) else value
        super().__setattr__(name, function)


sys.modules[__name__].__class__ = _Package
