"""Reads what a language model is called with, and refuses what the guard cannot follow."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

from ecoprompt.registry import InputError, UnguardedError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODES = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")
"""The modes of `generate` that are guarded; another one raises before the model sees the prompt."""
REFUSED = (
    *("inputs_embeds", "custom_generate", "negative_prompt_ids", "prefill_chunk_size", "token_healing"),
    *("use_mtp", "speculation_type", "assistant_early_exit", "assistant_ensemble_weight"),
)
"""Arguments and settings of `generate` under which the model reads something else than prompt and new tokens, or its
answer is not its own."""
BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods that pack the prompts of many requests into one row of a forward."""
CONTINUING = ("past_key_values", "cache_params", "past_key_value", "state")
"""The arguments of a forward that hold what the model has read before."""
READ = (
    *("input_ids", "attention_mask", "position_ids", "cache_position", "head_mask", *CONTINUING),
    *("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "num_logits_to_keep"),
)
"""The arguments of a forward, other than settings, that put nothing before the model that the gate does not see."""


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT model or a data-parallel wrapper: what all calls come down to."""
    from torch import nn

    if hasattr(model, "get_base_model"):
        return unwrapped(model.get_base_model())
    wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return unwrapped(model.module) if wrapped else model


def input_embedding(model: PreTrainedModel) -> nn.Module:
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


def shape(embedding: nn.Module) -> tuple[int, int]:
    """(tokens, hidden size) of an embedding table."""
    tokens, size = getattr(embedding.weight, "shape", (0, 0))
    return int(tokens), int(size)


def second_paths(model: PreTrainedModel, embedding: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that could read token ids past the input embedding, by name: see `reads_tokens`.

    They are the other tables large enough to hold a vocabulary, and what takes `input_ids` after the embedding: routers
    and n-gram tables, and the layers that hand the ids to them. What also takes `inputs_embeds` (images put in the
    place of their marks) hands on no ids by itself.
    """

    def could(module: Any) -> bool:
        if hasattr(module, "num_embeddings"):
            return module is not embedding and bool(module.num_embeddings >= shape(embedding)[0] // 2)
        takes = inspect.signature(module.forward).parameters
        named = any(name.endswith("input_ids") for name in takes) and "inputs_embeds" not in takes
        return named and embedding not in module.modules()

    return [(name, module) for name, module in model.named_modules() if could(module)]


def reads_tokens(value: Any, ids: Tensor) -> bool:
    """Whether an argument is the token ids `ids` [B, T] or made of them: as many whole numbers that are no positions.

    Positions rise by one at most from one column to the next.
    """
    if not hasattr(value, "is_floating_point") or value.is_floating_point() or value.numel() != ids.numel():
        return False
    return same(value.flatten(), ids.flatten()) or bool((value.diff() > 1).any())


def refuse_compiled(model: PreTrainedModel, embedding: nn.Module) -> None:
    """Raises InputError if code compiled before, which passes over hooks, embeds the token ids."""
    for name, module in model.named_modules():
        own = vars(module).get("forward")
        compiled = module._compiled_call_impl is not None or hasattr(own, "_torchdynamo_orig_callable")
        if (compiled or hasattr(module, "_orig_mod")) and embedding in module.modules():
            raise InputError(f"{name or type(model).__name__} is compiled, and compiled code may pass over the guard")


def arguments_of(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name, those of `**kwargs` among them."""
    if not args:  # nothing to look up, and `generate` calls so at every step
        return dict(kwargs)
    signature = inspect.signature(getattr(module, "forward", module))
    bound: dict[str, Any] = signature.bind_partial(*args, **kwargs).arguments
    rest = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
    further = bound.pop(rest[0], {}) if rest else {}
    return {**bound, **further}


def refuse_unread(arguments: dict[str, Any]) -> None:
    """Raises UnguardedError for a forward that puts before the model what the guard does not read."""
    for name, value in arguments.items():
        if name in CONTINUING and is_filled(value):
            raise UnguardedError(f"{name} continues a prompt that the guard did not see")
        if name not in READ and _is_input(name, value):
            raise UnguardedError(f"'{name}' is an input of the model that the guard does not read")


def _is_input(name: str, value: Any) -> bool:
    """Whether an argument may carry a prompt; settings cannot, nor segment numbers (0 and 1), nor an empty table."""
    if name == "token_type_ids" and hasattr(value, "tolist"):
        return not all(number in (0, 1) for number in value.flatten().tolist())
    return not isinstance(value, (bool, int, float, str, NoneType)) and not (isinstance(value, dict) and not value)


def same(ids: Any, other: Tensor) -> bool:
    """Whether two tensors of token ids are equal, wherever they are."""
    return getattr(ids, "shape", None) == other.shape and bool((ids.cpu() == other.cpu()).all())


def is_filled(cache: Any) -> bool:
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


def cache_of(named: dict[str, Any]) -> Any:
    """The cache among the arguments or the outputs of a forward, if there is one."""
    return next((named[name] for name in CONTINUING if named.get(name) is not None), None)


def held_by(cache: Any) -> int | None:
    """How many tokens of each row a cache holds; None if it holds some and does not say."""
    if not is_filled(cache):
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # a state of linear attention, which knows no length
        return None


def columns_of(ids: Tensor, mask: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """By row of `ids` [B, T], the columns that hold tokens.

    Without a mask, runs of the padding token at either end are padding, and so is, in a batch, what a caller
    fills up its rows with: zeros, as lm-evaluation-harness does. Raises UnguardedError for a mask that hides text.
    """
    pad = tokenizer.pad_token_id
    blank = {0, pad, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    if mask is not None and getattr(mask, "shape", None) != ids.shape:
        raise UnguardedError("the guard reads attention masks of shape [batch, tokens] only")
    columns = []
    for number, row in enumerate(ids.tolist()):
        if mask is None:
            fills = {pad, 0} if len(ids) > 1 else {pad}
            held = [column for column, token in enumerate(row) if token not in fills]
            held = list(range(held[0], held[-1] + 1)) if held else []
        else:
            held = mask[number].nonzero().flatten().tolist()
            # Not every model heeds the mask (of a state space model's single row, say), and what a masked column
            # gives can be read off the logits. So no text may hide there.
            if held and not {row[column] for column in set(range(len(row))).difference(held)} <= blank:
                raise UnguardedError("attention_mask hides tokens that are not padding; leave them out instead")
        columns.append(held or list(range(len(row))))
    return columns


def refuse_packed(position_ids: Any, columns: Sequence[Sequence[int]]) -> None:
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


def parts_that_embed(model: PreTrainedModel) -> list[nn.Module]:
    """The parts of the model that could be called instead of it, with embeddings of the caller's own."""
    return [
        module
        for module in model.modules()
        if module is not model and "inputs_embeds" in inspect.signature(module.forward).parameters
    ]


def wrap(model: Any, name: str, call: Callable[..., Any]) -> Callable[[], None]:
    """Put `call(original, args, kwargs)` in place of a method of the model; returns what takes it off again.

    Wrappers may come off in any order: one below another does nothing from then on, and goes with it.
    """
    original, own = getattr(model, name), name in vars(model)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return call(original, args, kwargs) if vars(wrapper)["on"] else original(*args, **kwargs)

    def undo() -> None:
        vars(wrapper)["on"] = False
        while not vars(top := vars(model).get(name, call)).get("on", True):
            below, kept = vars(top)["below"]
            delattr(model, name)
            if kept:
                setattr(model, name, below)

    vars(wrapper).update(on=True, below=(original, own))
    setattr(model, name, wrapper)
    return undo


def generation_settings(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    """The generation config that a call of `generate` comes to; raises UnguardedError for one that is not guarded."""
    given = arguments.get("generation_config") or model.generation_config
    config = copy.deepcopy(given)
    if given is not model.generation_config and hasattr(config, "update"):
        for name, value in model.generation_config.to_diff_dict().items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)
    config.update(**{name: value for name, value in arguments.items() if hasattr(config, name)})
    for name in REFUSED:
        if arguments.get(name) is not None or getattr(config, name, None) not in (None, False):
            raise UnguardedError(f"generate with {name} is not guarded")
    if getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
        raise UnguardedError("generate with guidance_scale is not guarded")
    if is_filled(arguments.get("past_key_values")):
        raise UnguardedError("past_key_values continues a prompt that the guard did not see")
    mode = str(config.get_generation_mode(arguments.get("assistant_model")).value)
    if mode not in MODES:
        raise UnguardedError(f"generate in mode '{mode}' is not guarded; guarded are: {', '.join(MODES)}")
    if config.cache_implementation == "paged":
        raise UnguardedError("generate with a 'paged' cache is not guarded")
    return config
