"""Attaches a forget spec to a model; the only module that touches a model's forward."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ecoprompt.answers import generate_checked, prompt_of
from ecoprompt.calls import (
    BATCHING,
    CONTINUING,
    arguments_of,
    cache_of,
    columns_of,
    generation_settings,
    held_by,
    input_embedding,
    parts_that_embed,
    reads_tokens,
    refuse_compiled,
    refuse_packed,
    refuse_unread,
    same,
    second_paths,
    shape,
    unwrapped,
    wrap,
)
from ecoprompt.corruption import nearest_tokens
from ecoprompt.forget import Decision, Forget
from ecoprompt.pack import load_forget
from ecoprompt.registry import InputError, UnguardedError
from ecoprompt.verdicts import Verdicts

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = list[tuple[list[int], Decision]]
"""By row of a batch: the columns that hold its prompt's tokens, and what was decided of it."""


def guard(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, forget: Forget | str | Path) -> Guard:
    """A guard for `model`, to be used in a `with` block: inside it every call of the model is gated, outside none.

    `forget` is a Forget object, a recipe, a pack folder or a Hub id. Raises InputError for a model that cannot be
    guarded; calls inside the block that cannot be gated raise UnguardedError.
    """
    return Guard(model, tokenizer, forget if isinstance(forget, Forget) else load_forget(str(forget)))


@dataclass
class _Call:
    """One forward of the model: its token ids [B, T], what was decided of their rows, and whose step it is."""

    input_ids: Tensor
    rows: Rows = field(default_factory=list)
    step_of: _Generation | None = None
    cache: Any = None
    embedded: bool = False

    @property
    def flagged(self) -> bool:
        return any(decision.flagged for _, decision in self.rows)


@dataclass
class _Generation:
    """One call of `generate`: the token ids [B, P] and the attention mask it was given, None where none was.

    Once prefilled, `prompt` has a row for each sequence that is generated, `rows` is what was decided of them,
    `latest` are the ids of its latest forward [B, T], and `cache` is what this forward left behind.
    """

    prompt: Tensor | None
    attention_mask: Tensor | None
    rows: Rows | None = None
    latest: Tensor | None = None
    cache: Any = None


class _State(threading.local):
    """What is under way in this thread."""

    def __init__(self) -> None:
        self.call: _Call | None = None
        self.generation: _Generation | None = None
        self.lengths: Sequence[int] | None = None


class Guard:
    """A forget spec attached to a model while the `with` block lasts.

    `decisions` are those of the latest prompts, one for each row of the batch. Guards that differ in corruption and
    seed alone may share `verdicts`, so that gate and token selector see each prompt once among them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        forget: Forget,
        verdicts: Verdicts | None = None,
    ) -> None:
        if not hasattr(tokenizer, "pad_token_id") or not callable(tokenizer):
            raise InputError(f"found {type(tokenizer).__name__} as the tokenizer, expected the model's own")
        self.model = unwrapped(model)
        self.tokenizer = tokenizer
        self.forget = forget
        self.verdicts = Verdicts(forget, tokenizer) if verdicts is None else verdicts
        self.verdicts.check_shared(forget, tokenizer)
        self.decisions: list[Decision] = []
        refuse_compiled(model, input_embedding(self.model))
        self._embedding = input_embedding(self.model)
        forget.check_hidden_size(shape(self._embedding)[1])
        self._state, self._lock = _State(), threading.Condition()
        self._generating: Counter[int] = Counter()
        self._handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Guard:
        if self._handles:
            raise InputError("this guard is attached already")
        refuse_compiled(self.model, self._embedding)
        _drop_compiled()
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
            self._embedding.register_forward_hook(self._corrupt, with_kwargs=True),
            *(
                module.register_forward_pre_hook(functools.partial(self._refuse_second_path, name), with_kwargs=True)
                for name, module in second_paths(self.model, self._embedding)
            ),
        ]
        for part in parts_that_embed(self.model):
            self._handles.append(part.register_forward_pre_hook(self._refuse_alone))
        wrapped = {"generate": self._generate, **dict.fromkeys(BATCHING, _refuse_batching)}
        self._undo = [wrap(self.model, name, call) for name, call in wrapped.items() if hasattr(self.model, name)]
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:  # a generation of another thread is guarded to its end
            self._lock.wait_for(lambda: not set(self._generating) - {threading.get_ident()})
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for undo in self._undo:
            undo()
        _drop_compiled()

    def decide(self, prompts: Sequence[Sequence[int]]) -> list[Decision]:
        """What the gate says of prompts, given as token ids without padding. A prompt is scored once."""
        return self.verdicts.decide(prompts)

    def overrule(self, prompts: Sequence[Sequence[int]], answers: Sequence[str]) -> list[bool]:
        """Which prompts the gate flags when it reads them with these answers; from now on they are flagged alone."""
        return self.verdicts.overrule(prompts, answers)

    def nearest(self, ids: Sequence[int], decision: Decision) -> tuple[tuple[str, str], ...]:
        """The corrupted tokens of a prompt without padding, each with the token whose embedding is the nearest to what
        became of its own. Not inside the `with` block, where an embedding is read by the model alone."""
        import torch

        with torch.inference_mode():
            embedded = self._embedding(torch.tensor([list(ids)], device=self.model.device))[0]
            corrupted = self.forget.corrupt(embedded, decision)[list(decision.positions)]
            found = nearest_tokens(self._embedding.weight, corrupted)  # type: ignore[arg-type]
        pairs = ((ids[position], near) for position, near in zip(decision.positions, found, strict=True))
        return tuple((self.tokenizer.decode([own]), self.tokenizer.decode([near])) for own, near in pairs)

    @contextlib.contextmanager
    def prompt_lengths(self, lengths: Sequence[int]) -> Iterator[None]:
        """Inside the block, the first `lengths[i]` tokens of row i are its prompt and the rest is a given answer.

        For teacher-forced scoring: the gate judges the prompt alone, and the scope says what becomes of the answer.
        """
        outer, self._state.lengths = self._state.lengths, lengths
        try:
            yield
        finally:
            self._state.lengths = outer

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        state, generation = self._state, self._state.generation
        state.call = None  # there is one left if a keyboard interrupt ended the forward before
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            raise UnguardedError("a guarded model cannot be traced, as the traced one would not be guarded")
        arguments = arguments_of(module, args, kwargs)
        if arguments.get("inputs_embeds") is not None:
            raise UnguardedError("a guarded model takes token ids; inputs_embeds cannot be gated")
        ids = arguments.get("input_ids")
        if ids is None or ids.dim() != 2:
            raise UnguardedError("a guarded model needs input_ids of shape [batch, tokens]")
        rows = None
        if generation is not None:
            follow = self._prefill if generation.rows is None else self._continue
            rows = follow(ids, arguments, generation)
        # A forward that is no step of this generation (a streamer or a logits processor may do one) is gated by itself.
        step_of = generation if rows is not None else None
        rows = self._gate(ids, arguments) if rows is None else rows
        # New tokens behind a prompt are nothing to corrupt, so it does not matter which they are.
        state.call = _Call(ids.clone() if rows else ids, rows, step_of, cache_of(arguments))

    def _prefill(self, ids: Tensor, arguments: dict[str, Any], generation: _Generation) -> Rows | None:
        """Decide the prompts of a generation; what follows them in a row are tokens that an assistant proposes.

        None for a forward of something else.
        """
        given = ids if generation.prompt is None else generation.prompt
        if not len(given) or len(ids) % len(given):
            return None
        copies = len(ids) // len(given)
        given = given.repeat_interleave(copies, 0)
        if not same(ids[:, : given.shape[1]], given):
            return None
        mask = generation.attention_mask
        if mask is not None and mask.dim() == 2:
            mask = mask.repeat_interleave(copies, 0)
        generation.rows = self._gate(ids[:, : given.shape[1]], {**arguments, "attention_mask": mask})
        generation.prompt, generation.latest = given, ids.clone()
        return generation.rows

    def _gate(self, ids: Tensor, arguments: dict[str, Any]) -> Rows:
        """Decide every row of a prefill; raises UnguardedError for what is not one whole prompt a row."""
        refuse_unread(arguments)
        columns = columns_of(ids, arguments.get("attention_mask"), self.tokenizer)
        refuse_packed(arguments.get("position_ids"), columns)
        tokens = [[int(row[column]) for column in present] for row, present in zip(ids.tolist(), columns, strict=True)]
        lengths = [len(row) for row in tokens] if self._state.lengths is None else self._state.lengths
        if len(lengths) != len(tokens) or any(not 1 <= n <= len(row) for n, row in zip(lengths, tokens, strict=True)):
            raise UnguardedError("prompt_lengths does not fit the batch that the model was called with")
        prompts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        self.decisions = [
            self.verdicts.extend(decision, row, length)
            for decision, row, length in zip(self.decide(prompts), tokens, lengths, strict=True)
        ]
        return list(zip(columns, self.decisions, strict=True))

    def _continue(self, ids: Tensor, arguments: dict[str, Any], generation: _Generation) -> Rows | None:
        """What to corrupt once the prompt is prefilled: nothing of new tokens; the prompt again without a cache.

        None for a forward that is no step of this generation.
        """
        assert generation.prompt is not None
        assert generation.latest is not None
        cache, (rows, width) = cache_of(arguments), generation.prompt.shape
        held = held_by(cache)
        if held != 0:
            if cache is not generation.cache:
                return None
            if len(ids) == rows and (ids.shape[1] == 1 if held is None else held >= width):
                return []
            raise UnguardedError("generate took a step that the guard cannot follow")
        if ids.shape != (rows, generation.latest.shape[1] + 1) or not same(ids[:, :width], generation.prompt):
            return None
        written = set(map(tuple, generation.latest.tolist()))  # of beams, rows go on from one another
        if not written.issuperset(map(tuple, ids[:, :-1].tolist())):
            return None
        generation.latest = ids.clone()
        return generation.rows

    def _corrupt(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        call = self._state.call
        if call is None:
            raise UnguardedError("the input embedding of a guarded model was called by itself; call the model")
        given = next(iter((*args, *kwargs.values())), None)
        if not (same(given, call.input_ids) if call.rows else getattr(given, "shape", None) == call.input_ids.shape):
            raise UnguardedError("the model embeds something other than the token ids it was called with")
        call.embedded = True
        if not call.flagged:
            return None
        corrupted = output.clone()
        for row, (columns, decision) in enumerate(call.rows):
            if decision.flagged:
                corrupted[row, columns] = self.forget.corrupt(output[row, columns], decision)
        hooks = module._forward_hooks.values()
        if sum(getattr(hook, "__func__", None) is Guard._corrupt for hook in hooks) > 1:
            self._refuse_undone(call, module.forward(*args, **kwargs), corrupted)
        return corrupted

    def _refuse_undone(self, call: _Call, clean: Tensor, corrupted: Tensor) -> None:
        """Raises UnguardedError where this guard has put right what another guard on the model corrupted."""
        for row, (columns, decision) in enumerate(call.rows):
            if decision.flagged:
                kept = [columns[position] for position in decision.positions]
                if clean[row, kept].isclose(corrupted[row, kept], rtol=1e-3, atol=1e-5).all(-1).any():
                    raise UnguardedError("two guards on this model undo each other's corruption")

    def _refuse_alone(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._state.call is None:
            raise UnguardedError("a part of a guarded model was called by itself, or compiled; call the model as it is")

    def _refuse_second_path(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._state.call
        given = (*args, *kwargs.values())
        if call is not None and call.flagged and any(reads_tokens(value, call.input_ids) for value in given):
            raise UnguardedError(f"'{name}' is a second way from the token ids into this model; it is not supported")

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, self._state.call = self._state.call, None
        if call is not None and call.step_of is not None:
            left = {name: getattr(output, name, None) for name in CONTINUING}
            call.step_of.cache = call.cache if cache_of(left) is None else cache_of(left)
        if call is not None and output is not None and call.flagged and not call.embedded:
            raise UnguardedError("the model did not use its input embedding, so its answer is not guarded")

    def _generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`generate` under the guard: prompt told from what follows it, and the answer checked if that is wanted."""
        arguments = arguments_of(original, args, kwargs)
        config = generation_settings(self.model, arguments)
        assistant = arguments.get("assistant_model")
        if assistant is not None and self._embedding in assistant.modules():
            raise UnguardedError("generate with an assistant that shares the model's embedding is not guarded")
        arguments["disable_compile"] = True  # what a static cache is compiled for on a GPU passes over hooks
        if self.forget.check == "answer":
            return generate_checked(self, functools.partial(self._follow, original), arguments, config)
        return self._follow(original, arguments)

    def _follow(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """`original(**arguments)`, a call of `generate`, with its forwards told apart."""
        generation = _Generation(prompt_of(arguments), arguments.get("attention_mask"))
        outer, self._state.generation = self._state.generation, generation
        with self._lock:
            self._generating[threading.get_ident()] += 1
        try:
            return original(**arguments)
        finally:
            self._state.generation = outer
            if generation.rows is not None:  # not what a forward of something else inside it was about
                self.decisions = [decision for _, decision in generation.rows]
            with self._lock:
                self._generating[threading.get_ident()] -= 1
                self._generating += Counter()  # drops those at zero
                self._lock.notify_all()


def _drop_compiled() -> None:
    """Have compiled code made anew when it is called next: hooks that came or went since would be passed over."""
    import torch

    torch.compiler.reset()


def _refuse_batching(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    raise UnguardedError("continuous batching packs many prompts into one row, which is not guarded; use generate")
