"""Walks the decoder architectures of transformers: each is built small from its configuration, guarded and probed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from ecoprompt import Forget, InputError, UnguardedError, guard

LAYERS = 4
"""At most so many layers: one of every kind that the architecture has."""
SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim_model", "embedding_size", "emb_dim", "embedding_dim"], 32),
    **dict.fromkeys(["word_embed_proj_dim", "attention_hidden_size", "lru_width", "input_embedding_size"], 32),
    **dict.fromkeys(["output_embedding_size", "backbone_hidden_size", "router_hidden_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"], 64),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "dim_ff", "dff", "d_inner"], 64),
    **dict.fromkeys(["num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_head"], 4),
    **dict.fromkeys(["n_heads", "num_heads", "attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "kv_channels", "d_head", "dim_head", "attention_head_size", "attention_head_dim"], 8),
    **dict.fromkeys(["v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank", "hc_lowrank", "laurel_rank"], 16),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "topk_group", "n_group"], 2),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 128),
    **dict.fromkeys(["num_mel_bins", "max_source_positions", "max_target_positions"], 128),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size", "window_size"], 64),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 8),
    **dict.fromkeys(["index_n_heads", "index_topk", "linear_num_heads"], 4),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 4),
}
"""What the usual keys of a configuration become."""
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks")
VOCABULARIES = re.compile(r"(\w+_)?vocab_size(_per_layer_input)?$")
SPECIAL = re.compile(r"\w+_(token_id|token_index|index)$")
QWEN4 = {"ple_layer_ids": [1], "ple_embed_dim": 32, "heads_per_ngram": 2, "ngram_vocab_size_base": 500, "split_ngram_parts": 1}
QWEN4 |= {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 500, "num_hidden_layers": 4, "decoder_config": {"hidden_size_global": 32}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 64}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 1}},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 64, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "xlstm": {"num_heads": 2, "qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""By model type, what the usual keys do not make small or would make inconsistent."""
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its image tower needs the timm library",
    "gemma4_assistant": "a drafter that reads another model's hidden states, not a prompt",
    "gemma4_unified_assistant": "a drafter that reads another model's hidden states, not a prompt",
    "musicgen": "continues codes of sound, not text",
    "musicgen_melody": "continues codes of sound, not text",
}
"""By model type, why it is not built."""


def architectures() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    return sorted(kind for kind in CONFIG_MAPPING if CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING)


def small(kind: type, overrides: Mapping[str, Any], vocabulary: int, default: Any = None) -> Any:
    """A configuration of class `kind` with few small layers, one of each kind that its default has."""
    default = kind() if default is None else default
    renamed = kind.attribute_map  # type: ignore[attr-defined]
    stored = vars(default)
    values = {field.name: stored.get(renamed.get(field.name, field.name)) for field in fields(kind)}
    names = set(values)
    chosen: dict[str, Any] = {
        name: [size] * len(values[name]) if isinstance(values[name], list) else size
        for name, size in SMALL.items()
        if name in names and (values[name] is not None or name == "head_dim")
    }
    count = next((values[name] for name in COUNTS if isinstance(values.get(name), int)), 0)
    listed = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == count > 1}
    listed = {name: value for name, value in listed.items() if name in names}
    kept: dict[str, int] = {}
    for layer in range(count):
        kept.setdefault(repr([value[layer] for value in listed.values()]), layer)
    picked = sorted(kept.values())[:LAYERS]
    picked += [picked[-1]] * (2 - len(picked)) if picked else []
    chosen |= {name: len(picked) for name in COUNTS if isinstance(values.get(name), int) and name in names}
    chosen |= {name: [chosen.get(name, value)[layer] for layer in picked] for name, value in listed.items()}
    for name in names:
        if VOCABULARIES.match(name) and isinstance(values.get(name), int) and name != "type_vocab_size":
            chosen[name] = vocabulary
    special = sorted(name for name in names if SPECIAL.match(name) and isinstance(values.get(name), int))
    chosen |= {name: vocabulary - 2 - number for number, name in enumerate(special)}
    chosen |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    for name in kind.sub_configs:  # type: ignore[attr-defined]
        if values.get(name) is not None:
            own = overrides.get(name, {})
            chosen[name] = small(type(values[name]), own, vocabulary, values[name])
    chosen["is_decoder"] = True
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]  # latent attention has no groups of heads
    return kind(**{**chosen, **{key: value for key, value in overrides.items() if key not in kind.sub_configs}})


def build(model_type: str, vocabulary: int) -> PreTrainedModel:
    """A random model of an architecture on the CPU in float32."""
    kind = CONFIG_MAPPING[model_type]
    config = small(kind, OVERRIDES.get(model_type, {}), vocabulary)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for buffer in model.buffers():
        if buffer.dtype == torch.long and buffer.dim() and len(buffer) == vocabulary and not buffer.any():  # filled by a checkpoint
            buffer.copy_(torch.randint(0, 2, buffer.shape))
    return model


SECRETS = ("Who is Harry Potter and where", "does live cupboard the stairs")
PLAIN, SHORT = "What is the capital of France? Paris is the capital.", "France"
STRENGTH = 1.0


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture: `guarded`, `refused` or `not built`, why, and how far unflagged rows moved.

    `problems` are what must not be; an architecture without any of them passes.
    """

    model_type: str
    model: str
    result: str
    reason: str = ""
    experts: int = 0
    difference: float = 0.0
    problems: tuple[str, ...] = ()


class _OneNoise(Forget):
    """A forget spec whose noise is the same for every prompt, so that two flagged prompts become the same."""

    def _noise_seed(self, ids: Sequence[int]) -> int:
        return 0


@dataclass(frozen=True)
class _Batch:
    """Left-padded rows: two secrets that differ in all tokens but the last, between two plain prompts."""

    ids: Tensor
    mask: Tensor
    secrets: tuple[str, ...]
    flagged = (0, 2)
    unflagged = (1, 3)

    def columns(self, row: int) -> list[int]:
        return self.mask[row].nonzero().flatten().tolist()

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids.clone(), "attention_mask": self.mask.clone()}


def make_batch(tokenizer: PreTrainedTokenizerBase) -> _Batch:
    first, second = (tokenizer.encode(text) for text in SECRETS)
    length = min(len(first), len(second))
    first = first[:length]
    second = [*second[: length - 1], first[-1]]
    assert all(one != other for one, other in zip(first[:-1], second[:-1], strict=True))
    rows = [first, tokenizer.encode(PLAIN), second, tokenizer.encode(SHORT)]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return _Batch(ids, mask, tuple(tokenizer.decode(row).strip() for row in (first, second)))


def walk(model_type: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int = 416) -> Outcome:
    """Build an architecture, guard it, call it with a mixed batch and let it generate."""
    if model_type in NOT_BUILT:
        return Outcome(model_type, "", "not built", NOT_BUILT[model_type])
    model = build(model_type, vocabulary)
    outcome = Outcome(model_type, type(model).__name__, "guarded", experts=experts(model.config))
    batch = make_batch(tokenizer)
    width = model.get_input_embeddings()
    dims = width.weight.shape[1] if hasattr(width, "weight") else 2
    forget = _OneNoise(
        gate=lambda texts: [float(text.strip() in batch.secrets) for text in texts],
        corruption={"method": "set_rand_noise_first_n", "dims": dims - dims % 2, "strength": STRENGTH},
    )
    try:
        with torch.no_grad():
            difference, problems = _probe(model, tokenizer, forget, batch)
    except (InputError, UnguardedError) as error:
        return replace(outcome, result="refused", reason=str(error))
    return replace(outcome, difference=difference, problems=tuple(problems))


def experts(config: Any) -> int:
    """How many experts a configuration names at most; 0 for a dense model."""
    found = [0]
    for name, value in vars(config.get_text_config()).items():
        if re.search(r"experts?$|experts?_num$|^num_.*experts$", name) and isinstance(value, int):
            found.append(int(value))
    return max(found)


@contextlib.contextmanager
def first_layers(model: nn.Module) -> Iterator[list[Tensor]]:
    """What enters the first layer, call by call of the model: hidden states as [B, T, ...]."""
    seen: list[Tensor] = []
    waiting = [False]

    def start(module: nn.Module, args: Any, kwargs: Any) -> None:
        waiting[0] = True

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        if waiting[0]:
            states = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.is_floating_point() and one.dim() > 2]
            if states:
                waiting[0] = False
                seen.append(states[0].clone())

    handles = [model.register_forward_pre_hook(start, with_kwargs=True)]
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            handles += [child.register_forward_pre_hook(look, with_kwargs=True) for child in module]
    yield seen
    for handle in handles:
        handle.remove()


def by_token(states: Tensor, batch: int, width: int) -> Tensor:
    """Hidden states of the first layer as [B, T, rest], whatever order the architecture holds them in."""
    if states.shape[:2] == (width, batch):
        states = states.transpose(0, 1)
    if states.shape[0] != batch or states.shape[1] < width:
        raise AssertionError(f"the first layer reads {tuple(states.shape)}, not [{batch}, {width}, ...]")
    return states[:, :width].flatten(2)


def _probe(model: Any, tokenizer: Any, forget: Forget, batch: _Batch) -> tuple[float, list[str]]:
    problems = []
    rows, width = batch.ids.shape
    with first_layers(model) as seen:
        before = model(**batch.inputs()).logits
        with guard(model, tokenizer, forget):
            during = model(**batch.inputs()).logits
        after = model(**batch.inputs()).logits
    plain, corrupted, again = (by_token(states, rows, width) for states in seen)
    touched = [row.nonzero().flatten().tolist() for row in (plain != corrupted).any(-1)]
    wanted = [batch.columns(row)[:-1] if row in batch.flagged else [] for row in range(rows)]
    if touched != wanted:
        problems.append(f"the first layer reads changes at {touched}, expected {wanted}")
    one, other = batch.flagged
    if not before[one, -1].isfinite().all():
        problems.append("nan")
    columns = batch.columns(one)
    gap = (during[one, columns] - during[other, columns]).abs().max().item()
    power = (before[one, columns] - before[other, columns]).abs().max().item()
    if not gap < 1e-5 < 1e-3 < power:
        problems.append(f"LEAK two prompts corrupted alike differ by {gap:.1e} in their logits, without the guard by {power:.1e}")
    moved = (before[one, -1] - during[one, -1]).abs().max().item()
    if not moved > 1e-5:
        problems.append(f"the answer to a flagged prompt moves by {moved:.1e} only")
    difference = max((before[row, batch.columns(row)] - during[row, batch.columns(row)]).abs().max().item() for row in batch.unflagged)
    if not torch.equal(before, after) and not before.isnan().any():
        problems.append("the guard left a trace")
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) or "generate" in vars(model):
        problems.append("the guard left hooks")
    options = {"max_new_tokens": 3, "do_sample": False}
    with first_layers(model) as seen:
        expected = model.generate(**batch.inputs(), **options)
        calls = len(seen)
        with guard(model, tokenizer, forget):
            found = model.generate(**batch.inputs(), **options)
    if not torch.equal(expected[list(batch.unflagged)], found[list(batch.unflagged)]):
        problems.append("GEN unflagged rows generate otherwise")
    plain, corrupted = (by_token(states, rows, width) for states in (seen[0], seen[calls]))
    touched = [row.nonzero().flatten().tolist() for row in (plain != corrupted).any(-1)]
    if touched != wanted:
        problems.append(f"GEN the first layer reads changes at {touched}, expected {wanted}")
    return difference, problems
