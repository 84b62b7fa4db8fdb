"""Attaches a forget spec to a model; the only module that touches a model's forward."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from ecoprompt.forget import Decision, Forget
from ecoprompt.pack import load_forget
from ecoprompt.registry import InputError, UnguardedError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODES = ("greedy_search", "sample")
"""The modes of `generate` that are guarded; another one raises before the model sees the prompt."""
CACHES = (None, "dynamic", "dynamic_full", "hybrid")
CONTINUING = ("past_key_values", "cache_params", "past_key_value", "state")
"""The arguments of a forward that hold what the model has read before."""
READ = (
    *("input_ids", "attention_mask", "position_ids", "cache_position", "head_mask", *CONTINUING),
    *("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "num_logits_to_keep"),
)
"""The arguments of a forward, other than settings, that put nothing before the model that the gate does not see."""
REMEMBERED = 1 << 14
"""How many prompts' decisions are kept, so that the gate sees a repeated prompt once."""


def guard(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, forget: Forget | str | Path) -> Guard:
    """A guard for `model`, to be used in a `with` block: inside it every call of the model is gated.

    `forget` is a Forget object, a recipe, a pack folder or a Hub id. Raises InputError for a model that cannot be
    guarded; calls inside the block that cannot be gated raise UnguardedError.
    """
    return Guard(model, tokenizer, forget if isinstance(forget, Forget) else load_forget(str(forget)))


@dataclass
class _Call:
    """One forward of the model: where each row's tokens stand (columns), and what was decided of the row."""

    input_ids: Tensor
    rows: list[tuple[list[int], Decision]] = field(default_factory=list)
    embedded: bool = False

    @property
    def flagged(self) -> bool:
        return any(decision.flagged for _, decision in self.rows)


@dataclass
class _Generation:
    """One call of `generate`: the attention mask it was given, and once prefilled the prompt's ids [B, P].

    `width` is the length of a row in the latest forward without a cache.
    """

    attention_mask: Tensor | None
    prompt: Tensor | None = None
    width: int = 0
    rows: list[tuple[list[int], Decision]] = field(default_factory=list)


class _State(threading.local):
    """What is under way in this thread."""

    def __init__(self) -> None:
        self.call: _Call | None = None
        self.generation: _Generation | None = None
        self.lengths: Sequence[int] | None = None


class Guard:
    """A forget spec attached to a model while the `with` block lasts.

    `decisions` are those of the latest prompts, one for each row of the batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, forget: Forget) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.forget = forget
        self.decisions: list[Decision] = []
        self._embedding = _input_embedding(model)
        self._inner = getattr(model, "base_model", model)
        forget.check_hidden_size(_shape(self._embedding)[1])
        self._known: OrderedDict[tuple[int, ...], Decision] = OrderedDict()
        self._state, self._lock = _State(), threading.Lock()
        self._handles: list[Any] = []
        self._undo_generate: Callable[[], None] = lambda: None

    def __enter__(self) -> Guard:
        if self._handles:
            raise InputError("this guard is attached already")
        _refuse_compiled(self.model, self._embedding)
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
            self._embedding.register_forward_hook(self._corrupt, with_kwargs=True),
            *(
                module.register_forward_pre_hook(functools.partial(self._refuse_second_path, name), with_kwargs=True)
                for name, module in _second_embeddings(self.model, self._embedding)
            ),
        ]
        if self._inner is not self.model:
            self._handles.append(self._inner.register_forward_pre_hook(self._refuse_alone))
        if hasattr(self.model, "generate"):
            self._undo_generate = self._guard_generate()
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._undo_generate()

    def decide(self, prompts: Sequence[Sequence[int]]) -> list[Decision]:
        """What the gate says of prompts, given as token ids without padding. A prompt is scored once."""
        keys = [tuple(ids) for ids in prompts]
        remembered = {key: self._known.get(key) for key in keys}  # at once, as other threads may make room
        decided = {key: decision for key, decision in remembered.items() if decision is not None}
        new = [key for key in remembered if key not in decided]
        decided |= zip(new, self.forget.decide(self.tokenizer, new), strict=True)
        with self._lock:
            self._known.update(decided)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return [decided[key] for key in keys]

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
        state, generation = self._state, self._state.generation
        state.call = None  # there is one left if a keyboard interrupt ended the forward before
        arguments = _arguments(module, args, kwargs)
        if arguments.get("inputs_embeds") is not None:
            raise UnguardedError("a guarded model takes token ids; inputs_embeds cannot be gated")
        ids = arguments.get("input_ids")
        if ids is None or ids.dim() != 2:
            raise UnguardedError("a guarded model needs input_ids of shape [batch, tokens]")
        if generation is None:
            rows = self._gate(ids, arguments)
        elif generation.prompt is None:
            given = generation.attention_mask
            if getattr(arguments.get("attention_mask"), "shape", None) != ids.shape:  # generate drops masks of ones
                if given is not None and len(given) and given.dim() == 2:
                    given = given.repeat_interleave(len(ids) // len(given), 0)
                arguments = {**arguments, "attention_mask": given}
            rows = generation.rows = self._gate(ids, arguments)
            generation.prompt, generation.width = ids, ids.shape[1]
        else:
            rows = self._continue(arguments, generation)
        state.call = _Call(ids, rows)

    def _gate(self, ids: Tensor, arguments: dict[str, Any]) -> list[tuple[list[int], Decision]]:
        """Decide every row of a prefill; raises UnguardedError for what is not one whole prompt a row."""
        for name, value in arguments.items():
            if name in CONTINUING and _is_filled(value):
                raise UnguardedError(f"{name} continues a prompt that the guard did not see")
            if name not in READ and _is_input(name, value):
                raise UnguardedError(f"'{name}' is an input of the model that the guard does not read")
        columns = self._columns(ids, arguments.get("attention_mask"))
        _refuse_packed(arguments.get("position_ids"), columns)
        tokens = [[int(row[column]) for column in present] for row, present in zip(ids.tolist(), columns, strict=True)]
        lengths = [len(row) for row in tokens] if self._state.lengths is None else self._state.lengths
        if len(lengths) != len(tokens) or any(not 0 <= n <= len(row) for n, row in zip(lengths, tokens, strict=True)):
            raise UnguardedError("prompt_lengths does not fit the batch that the model was called with")
        prompts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        self.decisions = [
            self.forget.extend(self.tokenizer, decision, row, length)
            for decision, row, length in zip(self.decide(prompts), tokens, lengths, strict=True)
        ]
        return list(zip(columns, self.decisions, strict=True))

    def _columns(self, ids: Tensor, mask: Any) -> list[list[int]]:
        """By row, the columns that hold tokens. Without a mask, runs of the padding token at either end are padding."""
        if mask is not None and getattr(mask, "shape", None) != ids.shape:
            raise UnguardedError("the guard reads attention masks of shape [batch, tokens] only")
        pad = self.tokenizer.pad_token_id
        columns = []
        for number, row in enumerate(ids.tolist()):
            if mask is None:
                held = [column for column, token in enumerate(row) if token != pad]
                held = list(range(held[0], held[-1] + 1)) if held else []
            else:
                held = mask[number].nonzero().flatten().tolist()
                # Not every model heeds the mask (of a state space model's single row, say), and what a masked column
                # gives can be read off the logits. So no text may hide there: one token, repeated, is padding.
                if len({row[column] for column in set(range(len(row))).difference(held)} - {pad}) > 1:
                    raise UnguardedError("attention_mask hides tokens that are not padding; leave them out instead")
            columns.append(held or list(range(len(row))))
        return columns

    def _continue(self, arguments: dict[str, Any], generation: _Generation) -> list[tuple[list[int], Decision]]:
        """What to corrupt once the prompt is prefilled: nothing of one new token; the prompt again without a cache.

        A forward that is no step of this generation (a logits processor may do one) is gated by itself.
        """
        assert generation.prompt is not None
        ids, (rows, width) = arguments["input_ids"], generation.prompt.shape
        if any(_is_filled(arguments.get(name)) for name in CONTINUING):
            if ids.shape == (rows, 1):
                return []
            raise UnguardedError("generate took a step that the guard cannot follow")
        if ids.shape == (rows, generation.width + 1) and _same(ids[:, :width], generation.prompt):
            generation.width += 1
            return generation.rows
        return self._gate(ids, arguments)

    def _corrupt(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        call = self._state.call
        if call is None:
            raise UnguardedError("the input embedding of a guarded model was called by itself; call the model")
        if not _same(next(iter((*args, *kwargs.values())), None), call.input_ids):
            raise UnguardedError("the model embeds something other than the token ids it was called with")
        call.embedded = True
        if not call.flagged:
            return None
        corrupted = output.clone()
        for row, (columns, decision) in enumerate(call.rows):
            if decision.flagged:
                corrupted[row, columns] = self.forget.corrupt(output[row, columns], decision)
        return corrupted

    def _refuse_alone(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._state.call is None:
            raise UnguardedError("a part of a guarded model was called by itself; call the model")

    def _refuse_second_path(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._state.call
        read = next(iter((*args, *kwargs.values())), None)
        if call is not None and call.flagged and read is not None and _same(read.flatten(), call.input_ids.flatten()):
            raise UnguardedError(f"'{name}' is a second way from the token ids into this model; it is not supported")

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, self._state.call = self._state.call, None
        if call is not None and output is not None and call.flagged and not call.embedded:
            raise UnguardedError("the model did not use its input embedding, so its answer is not guarded")

    def _guard_generate(self) -> Callable[[], None]:
        """Wrap `model.generate` so that prefill is told from decoding; returns what takes the wrapper off again."""
        original = self.model.generate
        own = "generate" in vars(self.model)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not self._handles:
                return original(*args, **kwargs)
            self._check_generate(_arguments(original, args, kwargs))
            outer, self._state.generation = self._state.generation, _Generation(kwargs.get("attention_mask"))
            try:
                return original(*args, **kwargs)
            finally:
                self._state.generation = outer

        def undo() -> None:
            if vars(self.model).get("generate") is generate:
                del self.model.generate
                if own:
                    self.model.generate = original

        self.model.generate = generate
        return undo

    def _check_generate(self, arguments: dict[str, Any]) -> None:
        """Raises UnguardedError for a call of `generate` that is not guarded."""
        for name in ("inputs_embeds", "custom_generate", "negative_prompt_ids", "assistant_model"):
            if arguments.get(name) is not None:
                raise UnguardedError(f"generate with {name} is not guarded")
        cache = arguments.get("past_key_values")
        if _is_filled(cache):
            raise UnguardedError("past_key_values continues a prompt that the guard did not see")
        if getattr(cache, "is_compileable", False):
            raise UnguardedError(f"generate with a {type(cache).__name__} is not guarded")
        given = arguments.get("generation_config") or self.model.generation_config
        config = copy.deepcopy(given)
        if given is not self.model.generation_config and hasattr(config, "update"):
            for name, value in self.model.generation_config.to_diff_dict().items():
                if getattr(config, name, None) is None:
                    setattr(config, name, value)
        config.update(**{name: value for name, value in arguments.items() if hasattr(config, name)})
        mode = str(config.get_generation_mode(arguments.get("assistant_model")).value)
        if mode not in MODES:
            raise UnguardedError(f"generate in mode '{mode}' is not guarded; guarded are: {', '.join(MODES)}")
        if config.cache_implementation not in CACHES:
            raise UnguardedError(f"generate with a '{config.cache_implementation}' cache is not guarded")
        for name in ("prefill_chunk_size", "guidance_scale"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise UnguardedError(f"generate with {name} is not guarded")


def _input_embedding(model: PreTrainedModel) -> nn.Module:
    """The module that turns token ids into embeddings; raises InputError for a model that cannot be guarded."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise InputError(f"{name} is not a transformers model")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder; the guard is for decoder-only language models")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "hidden_size_per_layer_input", None):
        raise InputError(f"{name} embeds token ids in every layer; a guard of its input embedding would leak")
    embedding: nn.Module | None = model.get_input_embeddings()
    if embedding is None or not hasattr(embedding, "weight"):
        raise InputError(f"{name} has no input embedding to guard")
    return embedding


def _shape(embedding: nn.Module) -> tuple[int, int]:
    """(tokens, hidden size) of an embedding table."""
    tokens, size = getattr(embedding.weight, "shape", (0, 0))
    return int(tokens), int(size)


def _second_embeddings(model: PreTrainedModel, embedding: nn.Module) -> list[tuple[str, nn.Module]]:
    """Other embedding tables large enough to hold a vocabulary."""
    from torch import nn

    enough = _shape(embedding)[0] // 2
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not embedding and module.num_embeddings >= enough
    ]


def _refuse_compiled(model: PreTrainedModel, embedding: nn.Module) -> None:
    """Raises InputError if code compiled before, which may pass over hooks, embeds the token ids."""
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None and embedding in module.modules():
            raise InputError(f"{name or type(model).__name__} is compiled, and compiled code may pass over the guard")


def _arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name, those of `**kwargs` among them."""
    signature = inspect.signature(getattr(module, "forward", module))
    bound: dict[str, Any] = signature.bind_partial(*args, **kwargs).arguments
    rest = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
    further = bound.pop(rest[0], {}) if rest else {}
    return {**bound, **further}


def _is_input(name: str, value: Any) -> bool:
    """Whether an argument may carry a prompt; settings cannot, nor can segment numbers (0 and 1)."""
    if name == "token_type_ids" and hasattr(value, "tolist"):
        return not all(number in (0, 1) for number in value.flatten().tolist())
    return not isinstance(value, (bool, int, float, str, NoneType))


def _same(ids: Any, other: Tensor) -> bool:
    """Whether two tensors of token ids are equal, wherever they are."""
    return ids is other or (getattr(ids, "shape", None) == other.shape and bool((ids.cpu() == other.cpu()).all()))


def _is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens already. What is no cache that says so counts as filled, unless it is empty."""
    if cache is None or isinstance(cache, (tuple, list)):
        return bool(cache)
    layers = getattr(cache, "layers", None)
    return not isinstance(layers, list) or any(map(_is_filled_layer, layers))


def _is_filled_layer(layer: Any) -> bool:
    state = getattr(layer, "has_previous_state", {})  # of linear attention
    if not isinstance(state, dict) or any(state.values()):
        return True
    return hasattr(layer, "get_seq_length") and int(layer.get_seq_length()) > 0


def _refuse_packed(position_ids: Any, columns: list[list[int]]) -> None:
    """Raises UnguardedError where positions do not count up by one: several prompts packed into a row."""
    if position_ids is None:
        return
    table = position_ids.tolist()
    if position_ids.dim() != 2 or len(table) not in (1, len(columns)):
        raise UnguardedError("the guard reads position_ids of shape [batch, tokens] only")
    for row, present in enumerate(columns):
        positions = [table[row if len(table) > 1 else 0][column] for column in present]
        if any(after - before != 1 for before, after in zip(positions, positions[1:], strict=False)):
            raise UnguardedError("position_ids pack several prompts into one row, which is not guarded")
