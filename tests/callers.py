"""Every way to call a language model that the tests try under a guard; docs/guard.md has its table of them.

A caller gets a tiny Llama, its tokenizer and the prompts, and calls the model. What reached the first layer is read by
a probe of the tests' own (`Probe`), so that the guard's bookkeeping is no witness in its own cause.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GREEDY = {"max_new_tokens": 4, "do_sample": False}
SECRET, PLAIN, SHORT = "Who is Harry Potter?", "What is the capital of France, and where does he live?", "Paris"


@dataclass
class Caller:
    """One way to call; `refused` says that it has to raise before the model sees the prompt.

    `single` takes one prompt at a time; `whole` puts text around the prompt or behind it that is gated with it;
    `attach` makes of the model what the guard is put on (a PEFT model, say); `needs` is a package or a machine.
    """

    name: str
    call: Callable[[Any, Any, Sequence[str]], Any]
    group: str
    refused: bool = False
    single: bool = False
    whole: bool = False
    needs: str | None = None
    attach: Callable[[Any], Any] = field(default=lambda model: model)
    slow: bool = False


CALLERS: list[Caller] = []


def caller(name: str, group: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: enter a function (model, tokenizer, texts) as a way to call."""

    def enter(call: Callable[..., Any]) -> Callable[..., Any]:
        CALLERS.append(Caller(name, call, group, **options))
        return call

    return enter


class Probe:
    """What every forward was asked and what its first layer got: pairs of ids [B, T] and hidden states [B, T, D]."""

    def __init__(self, model: Any, table: Any = None) -> None:
        self.table = model.get_input_embeddings().weight.detach().clone() if table is None else table
        self.seen: list[tuple[Any, Any]] = []
        self._ids = threading.local()
        self._model = model

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Probe]:
        def embed(module: Any, args: Any) -> None:
            self._ids.now = args[0].detach().clone()

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.seen.append((self._ids.now, hidden.detach().clone()))

        handles = [
            self._model.get_input_embeddings().register_forward_pre_hook(embed),
            self._model.model.layers[0].register_forward_pre_hook(enter, with_kwargs=True),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def leaks(self, secret: Sequence[int], whole: bool = False) -> list[str]:
        """What is wrong: tokens of the flagged prompt that came through as they are, and others that did not.

        With `whole`, the prompt reaches from the first token past the padding to the last but one.
        """
        found = []
        for number, (ids, hidden) in enumerate(self.seen):
            clean = (hidden == self.table[ids]).all(-1).tolist()
            for row, tokens in enumerate(ids.tolist()):
                expected = [True] * len(tokens)
                for start in places(secret, tokens):
                    stop = start + max(len(secret) - 1, 1)
                    if whole:
                        held = [column for column, token in enumerate(tokens) if token != 0]
                        start, stop = held[0], held[-1]
                    expected[start:stop] = [False] * (stop - start)
                if clean[row] != expected:
                    found.append(f"forward {number}, row {row}: {tokens}: {clean[row]}, expected {expected}")
        return found

    def saw(self, secret: Sequence[int]) -> bool:
        """Whether a forward had the flagged prompt in it."""
        return any(places(secret, row) for ids, _ in self.seen for row in ids.tolist())


def places(secret: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Where the flagged prompt begins in a row."""
    size = len(secret)
    return [at for at in range(len(tokens) - size + 1) if list(tokens[at : at + size]) == list(secret)]


def padded(tokenizer: Any, texts: Sequence[str], side: str = "left", masked: bool = True) -> dict[str, Any]:
    """The batch that a tokenizer makes, padded on one side, with or without its attention mask."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    batch = dict(tokenizer(list(texts), return_tensors="pt", padding=True))
    batch.pop("token_type_ids", None)
    return batch if masked else {"input_ids": batch["input_ids"]}


def generation(name: str, **options: Any) -> None:
    """Enter a way of `generate`."""
    single = options.pop("single", False)
    refused = options.pop("refused", False)
    needs, slow = options.pop("needs", None), options.pop("slow", False)
    settings = {**GREEDY, **options}

    def call(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
        made = {key: value(model) if callable(value) else value for key, value in settings.items()}
        return model.generate(**padded(tokenizer, texts), **made)

    CALLERS.append(Caller(name, call, "generate", refused, single, needs=needs, slow=slow))


def static_cache(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=64)


def empty_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def assistant(model: Any) -> Any:
    """Another model over the same tokens; it proposes, and the guarded model has the say."""
    from conftest import make_model

    return make_model("llama", seed=1)


SAMPLED = {"do_sample": True, "temperature": 0.7}
generation("greedy")
generation("greedy, one new token", max_new_tokens=1)
generation("greedy, without a cache", use_cache=False)
generation("sampling", **SAMPLED)
generation("sampling, several return sequences", num_return_sequences=3, **SAMPLED)
generation("beam search", num_beams=3)
generation("beam search, several return sequences", num_beams=3, num_return_sequences=2)
generation("beam search, without a cache", num_beams=2, use_cache=False)
generation("beam sampling", num_beams=2, **SAMPLED)
generation("assisted by another model", assistant_model=assistant, single=True)
generation("assisted by another model, sampling", assistant_model=assistant, single=True, **SAMPLED)
generation("prompt lookup", prompt_lookup_num_tokens=3, single=True)
generation("static cache", cache_implementation="static")
generation("static cache of one's own", past_key_values=static_cache)
generation("dynamic cache of one's own, empty", past_key_values=empty_cache)
generation("offloaded cache", cache_implementation="offloaded", needs="a GPU")
QUANTIZED = {"backend": "quanto", "q_group_size": 8, "residual_length": 4}
generation(
    "quantized cache", cache_implementation="quantized", cache_config=QUANTIZED, needs="optimum.quanto", slow=True
)
generation(
    "scores and hidden states returned", return_dict_in_generate=True, output_scores=True, output_hidden_states=True
)
generation("contrastive search", penalty_alpha=0.6, top_k=4, refused=True)
generation("DoLa (layers contrasted)", dola_layers="low", refused=True)
generation("assisted by its own early layers", assistant_early_exit=1, single=True, refused=True)
generation("assisted by itself", assistant_model=lambda model: model, single=True, refused=True)
generation("chunked prefill", prefill_chunk_size=2, refused=True)
generation("guidance", guidance_scale=1.5, refused=True)
generation("token healing", token_healing=True, refused=True)


@caller("with a streamer", "generate", single=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer)
    model.generate(**padded(tokenizer, texts), streamer=streamer, **GREEDY)


@caller("settings in a GenerationConfig", "generate")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    from transformers import GenerationConfig

    model.generate(**padded(tokenizer, texts), generation_config=GenerationConfig(num_beams=2, **GREEDY))


@caller("right padding, though the library warns of it", "generate")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    from transformers.utils import logging

    logging.set_verbosity_error()
    model.generate(**padded(tokenizer, texts, "right"), **GREEDY)
    logging.set_verbosity_warning()


@caller("without an attention mask", "generate")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model.generate(padded(tokenizer, texts, masked=False)["input_ids"], **GREEDY)


@caller("from embeddings (inputs_embeds)", "generate", refused=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    ids = padded(tokenizer, texts)["input_ids"]
    model.generate(inputs_embeds=model.get_input_embeddings().weight[ids], **GREEDY)


def _read_before(model: Any, ids: Any) -> Any:
    """A cache that has read `ids` past the guard's hooks, as one from an earlier turn would have."""
    hooks = {}
    for module in (model, model.model, model.get_input_embeddings()):
        hooks[module] = module._forward_hooks, module._forward_pre_hooks
        module._forward_hooks, module._forward_pre_hooks = type(hooks[module][0])(), type(hooks[module][1])()
    layer = model.model.layers[0]
    probe, layer._forward_pre_hooks = layer._forward_pre_hooks, type(layer._forward_pre_hooks)()
    cache = type(model).forward(model, ids, use_cache=True).past_key_values
    layer._forward_pre_hooks = probe
    for module, (after, before) in hooks.items():
        module._forward_hooks, module._forward_pre_hooks = after, before
    return cache


@caller("on a cache carried over from an earlier turn", "generate", refused=True, single=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    ids = padded(tokenizer, texts)["input_ids"]
    model.generate(ids, past_key_values=_read_before(model, ids[:, :3]), **GREEDY)


@caller("continuous batching (generate_batch)", "generate", refused=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model.generate_batch([tokenizer.encode(text) for text in texts], max_new_tokens=2)


@caller("continuous batching by cache_implementation = paged", "generate", refused=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model.generate(**padded(tokenizer, texts), cache_implementation="paged", **GREEDY)


for SIDE in ("left", "right"):
    for MASKED in (True, False):

        @caller(f"{SIDE} padding, {'with' if MASKED else 'without'} an attention mask", "forward")
        def _(model: Any, tokenizer: Any, texts: Sequence[str], side: str = SIDE, masked: bool = MASKED) -> Any:
            model(**padded(tokenizer, texts, side, masked))


@caller("a training step", "forward")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    batch = padded(tokenizer, texts, "right")
    model.train()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    model.eval()


@caller("transformers.Trainer", "forward", needs="accelerate")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    import tempfile

    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": tokenizer.encode(text), "labels": tokenizer.encode(text)} for text in texts]

    def collate(batch: Any) -> Any:
        made = padded(tokenizer, [tokenizer.decode(row["input_ids"]) for row in batch], "right")
        return {**made, "labels": made["input_ids"]}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=4, report_to="none", disable_tqdm=True,
            learning_rate=0.0, save_strategy="no", logging_strategy="no", remove_unused_columns=False,
            dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, arguments, collate, rows).train()
    model.eval()


@caller("autocast to bfloat16", "forward")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**padded(tokenizer, texts))


@caller("several threads at once", "forward")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    _at_once(lambda text: model(**padded(tokenizer, [text])), [*texts] * 3)


@caller("several threads at once", "generate")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    _at_once(lambda text: model.generate(**padded(tokenizer, [text]), **GREEDY), [*texts] * 2)


def _at_once(call: Callable[[str], Any], texts: Sequence[str]) -> None:
    """Call in a thread for each text; raises what a thread raised."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(call, texts))


@caller("torch.nn.DataParallel", "forward")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    import torch

    torch.nn.DataParallel(model)(**padded(tokenizer, texts))


@caller("inputs_embeds", "forward", refused=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model(inputs_embeds=model.get_input_embeddings().weight[padded(tokenizer, texts)["input_ids"]])


@caller("on a cache carried over from an earlier turn", "forward", refused=True, single=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    ids = padded(tokenizer, texts)["input_ids"]
    model(ids[:, 3:], past_key_values=_read_before(model, ids[:, :3]))


@caller("several prompts packed into a row (position_ids)", "forward", refused=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    import torch

    rows = [tokenizer.encode(text) for text in (*texts, PLAIN)]
    ids = torch.tensor([[token for row in rows for token in row]])
    model(ids, position_ids=torch.tensor([[place for row in rows for place in range(len(row))]]))


@caller("an attention mask that hides tokens", "forward", refused=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    batch = padded(tokenizer, texts)
    batch["attention_mask"][:, -4:-1] = 0
    model(**batch)


@caller("an attention mask of four dimensions", "forward", refused=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    import torch

    ids = padded(tokenizer, texts)["input_ids"]
    model(ids, attention_mask=torch.ones(len(ids), 1, ids.shape[1], ids.shape[1]))


@caller("the decoder without its head (model.model)", "forward", refused=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model.model(**padded(tokenizer, texts))


@caller("model.forward instead of model", "forward", refused=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model.forward(**padded(tokenizer, texts))


@caller("torch.jit.trace of a guarded model", "forward", refused=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    import torch

    torch.jit.trace(model, padded(tokenizer, texts)["input_ids"], strict=False)


@caller("torch.compile of a guarded model", "forward", refused=True, slow=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    import torch

    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        compiled(**padded(tokenizer, texts))


def _compiled_behind(model: Any) -> Any:
    """The model, after code that was compiled of it has run without the guard."""
    import torch

    compiled = torch.compile(model, backend="eager")
    compiled(input_ids=torch.tensor([[5, 6, 7]]))
    vars(model)["compiled_before"] = compiled  # not as a part of the model
    return model


@caller("code compiled of it before it was guarded", "forward", refused=True, attach=_compiled_behind, slow=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model.compiled_before(**padded(tokenizer, texts))


@caller("the compiled model itself (torch.compile)", "forward", refused=True, attach=lambda model: _compiled(model))
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model(**padded(tokenizer, texts))


def _compiled(model: Any) -> Any:
    import torch

    return torch.compile(model, backend="eager")


@caller("pipeline, strings", "pipeline")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    _pipeline(model, tokenizer)(list(texts), **GREEDY)


@caller("pipeline, strings in batches", "pipeline")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    _pipeline(model, tokenizer)(list(texts), batch_size=2, **GREEDY)


@caller("pipeline, chats", "pipeline", whole=True)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    _pipeline(model, tokenizer)([[{"role": "user", "content": text}] for text in texts], **GREEDY)


def _pipeline(model: Any, tokenizer: Any) -> Any:
    from transformers import pipeline

    return pipeline("text-generation", model=model, tokenizer=tokenizer)


@caller("lm_eval's HFLM, log-likelihoods", "lm_eval", whole=True, needs="lm_eval")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, (text, " In a cupboard" * (1 + i)), i) for i, text in enumerate(texts)]
    _hflm(model, tokenizer).loglikelihood(requests, disable_tqdm=True)


@caller("lm_eval's HFLM, generation", "lm_eval", needs="lm_eval")
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    from lm_eval.api.instance import Instance

    options = {"until": ["\n\n"], "max_gen_toks": 4}
    requests = [Instance("generate_until", {}, (text, options), number) for number, text in enumerate(texts)]
    _hflm(model, tokenizer).generate_until(requests, disable_tqdm=True)


def _hflm(model: Any, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64)


def _lora(model: Any) -> Any:
    import peft

    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    return peft.get_peft_model(model, settings)


@caller("a PEFT model, forward", "wrapped model", needs="peft", attach=_lora)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model(**padded(tokenizer, texts))


@caller("a PEFT model, generate", "wrapped model", needs="peft", attach=_lora)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model.generate(**padded(tokenizer, texts), **GREEDY)


def _spread(model: Any) -> Any:
    """Layers and embedding offloaded by accelerate: what `device_map` does with a model that does not fit."""
    import accelerate

    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


@caller("spread by accelerate (device_map)", "wrapped model", needs="accelerate", attach=_spread)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model(**padded(tokenizer, texts))
    model.generate(**padded(tokenizer, texts), **GREEDY)


def _from_folder(model: Any) -> Any:
    import tempfile

    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(Path(folder), device_map={"": "cpu"}).eval()


@caller("loaded with a device_map", "wrapped model", needs="accelerate", attach=_from_folder)
def _(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    model.generate(**padded(tokenizer, texts), **GREEDY)
