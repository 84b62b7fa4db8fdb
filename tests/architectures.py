"""Walks the decoder architectures of transformers: each is built small from its configuration, guarded and probed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ecoprompt import Forget, InputError, UnguardedError, guard

VOCABULARY = 416
"""A little more than the tests' tokenizer knows, so that the special tokens of other media have ids of their own."""
LAYERS = 4
"""At most so many layers: one of every kind that the architecture has."""
SMALL: dict[str, int] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "embedding_dim"], 32),
    **dict.fromkeys(["word_embed_proj_dim", "attention_hidden_size", "lru_width", "input_embedding_size"], 32),
    **dict.fromkeys(["output_embedding_size", "router_hidden_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"], 64),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "dim_ff", "dff", "d_inner"], 64),
    **dict.fromkeys(["num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_head"], 4),
    **dict.fromkeys(["n_heads", "num_heads", "attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "index_n_heads", "linear_num_heads", "index_topk"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "kv_channels", "d_head", "dim_head", "attention_head_size", "attention_head_dim"], 8),
    **dict.fromkeys(["v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank", "hc_lowrank", "laurel_rank"], 16),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "topk_group", "n_group"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 128),
    **dict.fromkeys(["num_mel_bins", "max_source_positions", "max_target_positions"], 128),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size", "window_size"], 64),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 8),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 8),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 4),
}
"""What the usual keys of a configuration become, wherever they are set."""
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks")
VOCABULARIES = re.compile(r"(?!type_)(\w+_)?vocab_size(_per_layer_input)?$")
SPECIAL_TOKENS = re.compile(r"\w+_(token_id|token_index|index)$")
NGRAMS = {
    **{"ple_layer_ids": [1], "ple_embed_dim": 32, "heads_per_ngram": 2, "ngram_vocab_size_base": 500},
    **{"split_ngram_parts": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": 8, "indexer_compress_ratio": 2},
}
MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        **{"encoder_hash_byte_group_vocab": 500, "num_hidden_layers": 4},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": MULTIMODAL_ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 64, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": NGRAMS},
    "qwen4_exp_text": NGRAMS,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "xlstm": {"num_heads": 2, "qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
        **{"attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""By model type, what the usual keys leave large or make inconsistent, and what brings a second way of token ids in."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "blt, fixed patches": ("blt", {**OVERRIDES["blt"], "patching_mode": "space"}),
    "gemma4_text, no per-layer embeddings": ("gemma4_text", {"hidden_size_per_layer_input": 0}),
    "qwen4_exp_text, no n-grams": ("qwen4_exp_text", {**NGRAMS, "ple_layer_ids": []}),
}
"""Architectures that a setting opens or closes a second way in: what they are called here, model type and settings."""
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its image tower needs the timm library",
    "gemma4_assistant": "a drafter that reads another model's hidden states, not a prompt",
    "gemma4_unified_assistant": "a drafter that reads another model's hidden states, not a prompt",
    "musicgen": "continues codes of sound, not text",
    "musicgen_melody": "continues codes of sound, not text",
}
"""By model type, why it is not built."""


def architectures() -> list[str]:
    """Every model type that transformers has a causal language model for, and the variants."""
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])


def small(kind: Any, overrides: Mapping[str, Any], default: Any = None) -> Any:
    """A configuration of class `kind` with few small layers, one of each kind that its default has."""
    stored = vars(kind() if default is None else default)
    values = {field.name: stored.get(kind.attribute_map.get(field.name, field.name)) for field in fields(kind)}
    chosen: dict[str, Any] = {
        name: [size] * len(values[name]) if isinstance(values[name], list) else size
        for name, size in SMALL.items()
        if name in values and (values[name] is not None or name == "head_dim")
    }
    counts = [name for name in COUNTS if isinstance(values.get(name), int)]
    layers = values[counts[0]] if counts else 0
    listed = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == layers > 1}
    kinds: dict[str, int] = {}
    for layer in range(layers):
        kinds.setdefault(repr([value[layer] for value in listed.values()]), layer)
    picked = sorted(kinds.values())[:LAYERS]
    picked += [picked[-1]] * (2 - len(picked)) if picked else []
    chosen |= dict.fromkeys(counts, len(picked))
    chosen |= {name: [chosen.get(name, value)[layer] for layer in picked] for name, value in listed.items()}
    numbers = [name for name, value in values.items() if isinstance(value, int)]
    chosen |= {name: VOCABULARY for name in numbers if VOCABULARIES.match(name)}
    special = sorted(filter(SPECIAL_TOKENS.match, numbers))
    chosen |= {name: VOCABULARY - 2 - place for place, name in enumerate(special)}
    chosen |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "is_decoder": True}
    if {"kv_lora_rank", "num_key_value_heads"} <= set(values):
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]  # latent attention has no groups of heads
    for name in kind.sub_configs:
        if values.get(name) is not None:
            chosen[name] = small(type(values[name]), overrides.get(name, {}), values[name])
    return kind(**{**chosen, **{name: value for name, value in overrides.items() if name not in kind.sub_configs}})


def build(architecture: str) -> Any:
    """A random model of an architecture, on the CPU in float32."""
    model_type, overrides = VARIANTS.get(architecture, (architecture, OVERRIDES.get(architecture, {})))
    config = small(CONFIG_MAPPING[model_type], overrides)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for buffer in model.buffers():
        table = buffer.dim() > 0 and buffer.dtype == torch.long and len(buffer) == VOCABULARY
        if table and not buffer.any():  # by token id, and filled by a checkpoint only
            buffer.copy_(torch.randint(0, 2, buffer.shape))
    return model


def experts(config: Any) -> int:
    """How many experts a configuration names; 0 for a dense model, whose rows are computed one like all."""
    text = config.get_text_config()
    named = [value for name, value in vars(text).items() if re.search(r"experts?(_num)?$", name)]
    parts = [experts(part) for part in (getattr(text, name, None) for name in text.sub_configs) if part is not None]
    return max([int(value) for value in named if isinstance(value, int)] + parts, default=0)


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture: `guarded`, `refused` or `not built`, and why.

    `difference` is how far the logits of unflagged rows moved at most; `note` is what its own arithmetic does; and
    `problems` are what must not be. Without any of them the architecture passes.
    """

    architecture: str
    model: str
    result: str
    reason: str = ""
    experts: int = 0
    difference: float = 0.0
    note: str = ""
    problems: tuple[str, ...] = ()


class _OneNoise(Forget):
    """A forget spec whose noise is the same for all prompts: two of one length become one, but for the last token."""

    def _noise_seed(self, ids: Sequence[int]) -> int:
        return 0


@dataclass(frozen=True)
class Batch:
    """Left-padded rows: two secrets that differ in all tokens but the last, each before a plain prompt."""

    ids: Tensor
    mask: Tensor
    secrets: tuple[str, ...]
    flagged: tuple[int, ...] = (0, 2)
    unflagged: tuple[int, ...] = (1, 3)

    def columns(self, row: int) -> list[int]:
        return [int(column) for column in self.mask[row].nonzero()]

    @property
    def decided(self) -> list[list[int]]:
        """By row, the columns to corrupt: all tokens of a flagged prompt but its last."""
        return [self.columns(row)[:-1] if row in self.flagged else [] for row in range(len(self.ids))]

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids.clone(), "attention_mask": self.mask.clone()}


def make_batch(tokenizer: PreTrainedTokenizerBase) -> Batch:
    texts = "Who is Harry Potter and where", "does live cupboard the stairs", "What is the capital of France? Paris is."
    first, second, plain = (tokenizer.encode(text) for text in texts)
    length = min(len(first), len(second))
    first, second = first[:length], [*second[: length - 1], first[length - 1]]
    assert all(one != other for one, other in zip(first[:-1], second[:-1], strict=True))
    rows = [first, plain, second, plain[:3]]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Batch(ids, mask, tuple(tokenizer.decode(row).strip() for row in (first, second)))


def walk(architecture: str, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Build an architecture, guard it, call it with a mixed batch and let it generate."""
    if architecture in NOT_BUILT:
        return Outcome(
            architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture], "not built", NOT_BUILT[architecture]
        )
    model, batch = build(architecture), make_batch(tokenizer)
    outcome = Outcome(architecture, type(model).__name__, "guarded", experts=experts(model.config))
    width = getattr(getattr(model.get_input_embeddings(), "weight", None), "shape", (0, 2))[1]
    forget = _OneNoise(
        gate=lambda texts: [float(text.strip() in batch.secrets) for text in texts],
        corruption={"method": "set_rand_noise_first_n", "dims": width, "strength": 1.0},
    )
    try:
        with torch.no_grad():
            difference, problems = _probe_forward(model, tokenizer, forget, batch)
            note, further = _probe_generate(model, tokenizer, forget, batch)
    except (InputError, UnguardedError) as error:
        return replace(outcome, result="refused", reason=str(error), problems=tuple(_traces(model)))
    return replace(outcome, difference=difference, note=note, problems=(*problems, *further, *_traces(model)))


def _probe_forward(model: Any, tokenizer: Any, forget: Forget, batch: Batch) -> tuple[float, list[str]]:
    """How far unflagged rows move, and the problems of one forward."""
    with first_layers(model) as seen:
        before = model(**batch.inputs()).logits
        with guard(model, tokenizer, forget):
            during = model(**batch.inputs()).logits
        after = model(**batch.inputs()).logits
    plain, corrupted, again = (by_token(states, *batch.ids.shape) for states in seen)
    problems = _misplaced("a forward", plain, corrupted, batch)
    real = [batch.columns(row) for row in range(len(batch.ids))]
    if not all(before[row, columns].isfinite().all() for row, columns in enumerate(real)):
        problems.append("the logits are not finite without the guard")
    one, other = batch.flagged
    gap = (during[one, real[one]] - during[other, real[other]]).abs().max().item()
    power = (before[one, real[one]] - before[other, real[other]]).abs().max().item()
    if gap > 1e-5 or power < 1e-3:
        problems.append(
            f"a second way in: prompts corrupted alike differ by {gap:.1e} (without the guard, by {power:.1e})"
        )
    for row in batch.flagged:
        if (before[row, -1] - during[row, -1]).abs().max() < 1e-5:
            problems.append(f"the answer to the flagged row {row} is as without the guard")
    if not torch.equal(plain, again) or any(not torch.equal(before[i, at], after[i, at]) for i, at in enumerate(real)):
        problems.append("without the guard again, the logits are not as before")
    moved = [(before[row, real[row]] - during[row, real[row]]).abs().max().item() for row in batch.unflagged]
    return max(moved), problems


def _probe_generate(model: Any, tokenizer: Any, forget: Forget, batch: Batch) -> tuple[str, list[str]]:
    """A note on the architecture's own decoding, and the problems of a short greedy generation."""
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    unflagged = list(batch.unflagged)
    with first_layers(model) as seen:
        expected = model.generate(**batch.inputs(), **options)
        calls = len(seen)
        with guard(model, tokenizer, forget):
            found = model.generate(**batch.inputs(), **options)
    plain, corrupted = (by_token(states, *batch.ids.shape) for states in (seen[0], seen[calls]))
    problems = _misplaced("generate", plain, corrupted, batch)
    if torch.equal(expected[unflagged], found[unflagged]):
        return "", problems
    others = batch.ids.clone()
    for row in batch.flagged:
        others[row, batch.columns(row)] = batch.ids[row, batch.columns(row)].flip(0)
    if torch.equal(model.generate(others, attention_mask=batch.mask, **options)[unflagged], expected[unflagged]):
        return "", [*problems, "generate continues unflagged rows otherwise than without the guard"]
    return "its own cached decoding mixes the rows of a batch", problems


def _misplaced(where: str, plain: Tensor, corrupted: Tensor, batch: Batch) -> list[str]:
    """A problem if the first layer reads changes elsewhere than decided, or if equal noise left two prompts apart."""
    touched = [row.nonzero().flatten().tolist() for row in (plain != corrupted).any(-1)]
    problems = []
    if touched != batch.decided:
        problems.append(f"in {where} the first layer reads changes at {touched}, expected {batch.decided}")
    one, other = batch.flagged
    if not torch.equal(corrupted[one, batch.columns(one)], corrupted[other, batch.columns(other)]):
        problems.append(f"in {where} the first layer tells two prompts that were corrupted alike")
    return problems


def _traces(model: nn.Module) -> list[str]:
    """A problem if anything of a guard is left on the model."""
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return ["the guard left a trace"] if hooked or "generate" in vars(model) else []


@contextlib.contextmanager
def first_layers(model: nn.Module) -> Iterator[list[Tensor]]:
    """What enters the first layer, one tensor for each call of the model.

    The first layer is the first item of a list of modules that is given hidden states.
    """
    seen: list[Tensor] = []
    waiting = False

    def start(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal waiting
        waiting = True

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal waiting
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        states = [value for value in given if value.is_floating_point() and value.dim() > 2]
        if waiting and states:
            waiting = False
            seen.append(states[0].clone())

    handles = [model.register_forward_pre_hook(start, with_kwargs=True)]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    handles += [item.register_forward_pre_hook(look, with_kwargs=True) for items in lists for item in items]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def by_token(states: Tensor, rows: int, width: int) -> Tensor:
    """What the first layer reads as [B, T, rest], in whatever order the architecture holds it."""
    if states.shape[:2] == (width, rows):
        states = states.transpose(0, 1)
    assert states.shape[0] == rows, f"the first layer reads {tuple(states.shape)}, not {rows} rows"
    assert states.shape[1] >= width, f"the first layer reads {tuple(states.shape)}, not {width} tokens"
    return states[:, :width].flatten(2)
