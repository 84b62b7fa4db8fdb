"""Batched log-probabilities, greedy generations and samples of any causal language model, guarded or not."""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ecoprompt import processes
from ecoprompt.calls import shape
from ecoprompt.metrics import LogProb
from ecoprompt.models import Loaded, batches, encode, encode_pair, pad
from ecoprompt.probe import packed
from ecoprompt.registry import EcopromptError, Progress, quiet
from ecoprompt.results import Store, key

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ecoprompt.guard import Guard
    from ecoprompt.sampling import Drawing

FORMAT = 5
"""Raised whenever prompts, answers or scores come to be made in another way, so that old results are not mixed in."""
MOST_TOKENS = 8192
"""Padded tokens of a batch on a CPU, where more gain nothing; on a GPU it may be eight times as many."""
CPU_LOGITS, GPU_LOGITS = 1 << 26, 1 << 29
"""Logits that may be computed at once."""
POOLED = 4
"""How many times the tokens of a batch one of generations holds, which is stored whole."""
GOING_ON = 2
"""How many times its tokens are generated at once: beside keys and values there is little."""
Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""The token ids of a prompt and of what follows it."""
Scored = tuple[float, int]
"""The log-probability of a completion, and how many of its first tokens are the likeliest."""


@dataclass(frozen=True)
class Request:
    """What to ask of a model: the log-probability of `completion` after `prompt`, a generation, or the logits there.

    All are rendered text. A generation has `max_new_tokens` >= 1 and no completion; its first tokens may be known, as
    its `start`.
    """

    kind: Literal["log_prob", "generation", "sample", "logits"]
    prompt: str
    completion: str = ""
    max_new_tokens: int = 0
    start: tuple[int, ...] = field(default=(), compare=False, repr=False, kw_only=True)

    def key(self, fingerprint: str, corruption: str | None) -> str:
        """What the result is stored under: all that determines it; `corruption` is None for an unflagged prompt."""
        determines = {name: value for name, value in vars(self).items() if name != "start"}
        return key(format=FORMAT, model=fingerprint, corruption=corruption, **determines)


@dataclass(frozen=True)
class Sample(Request):
    """One of the sampled generations of a prompt, told from the others by its `number`.

    Drawn at `temperature` > 0 from the fewest tokens whose probabilities come to `top_p`, by noise that is a function
    of (`seed`, prompt, `number`) alone, so that neither the batch nor the order nor a restart changes what is drawn.
    """

    number: int = 0
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0

    def noise_key(self) -> int:
        """63 bits that stand for (seed, prompt, number)."""
        text = f"{self.seed}:{self.number}:{self.prompt}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def answer(
    loaded: Loaded,
    requests: Sequence[tuple[str, Request]],
    store: Store,
    guard: Guard | None = None,
    room: Room | None = None,
    progress: Progress = quiet,
) -> float:
    """Compute the requests, each under its key, and put the results into `store`; returns the seconds they took.

    `guard` is not attached: it is where a prompt is read. Processes share the batches, and get all results. Batches are
    formed of all the requests before it is asked which are stored, and are stored whole, so that a restart computes
    what is missing in those of a run that went through, and gets the same numbers to the last bit, if memory lasts.
    """
    room = room or Room(loaded)
    unique = dict(requests)
    processes.check_agreement(list(unique))
    done = 0
    for kind, (compute, doing) in KINDS.items():
        chosen = [(name, request) for name, request in unique.items() if request.kind == kind]
        if kind == "generation" and guard is None:
            chosen = _started(loaded, unique, chosen, store)
        units = _units(loaded, [request for _, request in chosen], room.first)
        wanted = [dict(one for one in map(chosen.__getitem__, unit) if one[0] not in store) for unit in units]
        done += len(chosen) - sum(map(len, wanted))
        if units:
            progress(doing, done, len(unique))
        fill = functools.partial(_fill, functools.partial(compute, loaded, guard), room)
        for filled in processes.deal([unit for unit in wanted if unit], fill):
            for values, seconds in filled:
                store.put_many(list(values.items()), seconds)
                done += len(values)
            progress(doing, done, len(unique))
    return math.fsum(map(store.seconds, unique))


def _fill(compute: Callable[..., list[Any]], room: Room, unit: Mapping[str, Request]) -> tuple[dict[str, Any], float]:
    """The values of a unit by their keys, and the seconds that they took."""
    started = time.perf_counter()
    values = room.fit(functools.partial(compute, list(unit.values())))
    return dict(zip(unit, values, strict=True)), time.perf_counter() - started


def _started(
    loaded: Loaded, requests: Mapping[str, Request], generations: Sequence[tuple[str, Request]], store: Store
) -> list[tuple[str, Request]]:
    """The generations with what scoring tells of their beginning: as much of a completion as is the likeliest, token by
    token, after its prompt. A model that has learnt its answers by heart has generated them so."""
    known: dict[str, tuple[int, ...]] = {}
    for name, request in requests.items():
        if request.kind == "log_prob" and (agreed := store.get(name)[2]) > len(known.get(request.prompt, ())):
            known[request.prompt] = _pair(loaded.tokenizer, request.prompt, request.completion)[1][:agreed]
    return [(name, replace(request, start=known.get(request.prompt, ()))) for name, request in generations]


class Room:
    """How many tokens a batch may hold, padding counted: as asked for, else by the memory there is.

    Where memory runs out all the same, it is halved, for good. `shares` turns False where a model turns out to keep
    of a prompt what cannot be taken apart.
    """

    def __init__(self, loaded: Loaded, tokens: int | None = None) -> None:
        self.first = self.tokens = tokens or min(processes.gather(_affordable(loaded.model)))
        cuda = loaded.model.device.type == "cuda"
        self._logits: int = (GPU_LOGITS if cuda else CPU_LOGITS) // shape(loaded.model.get_input_embeddings())[0]
        self.shares = True
        self._loaded = loaded

    @property
    def pads(self) -> bool:
        """Whether the model may be given padded prompts."""
        from ecoprompt.prefill import reads_behind_padding

        return reads_behind_padding(self._loaded)

    def width(self, tokens: int, read: int) -> int:
        """What a row of `tokens` counts for, of which the logits are computed at `read` positions."""
        return max(tokens, math.ceil(read * self.tokens / max(1, self._logits)))

    def fit(self, compute: Callable[[Room], list[Any]]) -> list[Any]:
        """`compute(self)`, again with half the room whenever memory is out; raises EcopromptError if nothing helps."""
        import torch

        while True:
            try:
                return compute(self)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                    raise
                if self.tokens == 1:
                    raise EcopromptError(
                        "out of memory on a single row; load the model in a smaller dtype or quantized"
                    ) from None
            torch.cuda.empty_cache()
            self.tokens, self._logits = max(1, self.tokens // 2), self._logits // 2


def log_prob(value: Any) -> LogProb:
    """A stored value as the LogProb it was."""
    return LogProb(float(value[0]), int(value[1]))


def _affordable(model: PreTrainedModel) -> int:
    """The tokens of a batch for which a quarter of the memory beside the weights should do, within bounds."""
    import torch

    cuda = model.device.type == "cuda"
    if cuda:
        memory = torch.cuda.get_device_properties(model.device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 1
    hidden = shape(model.get_input_embeddings())[1]
    token = 4 * layers * hidden * model.dtype.itemsize  # keys and values, and as much again while they are computed
    return int(max(MOST_TOKENS // 64, min(MOST_TOKENS * (8 if cuda else 1), (memory - weights) // 4 // token)))


@functools.lru_cache(maxsize=1 << 17)
def _pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    head, tail = encode_pair(tokenizer, prompt, completion)
    return tuple(head), tuple(tail)


def _units(loaded: Loaded, requests: Sequence[Request], tokens: int) -> list[list[int]]:
    """The places of requests of one kind in batches that are computed and stored whole.

    Completions of one prompt stay together; of generations a batch holds several times what is generated at once.
    """
    pairs = [_pair(loaded.tokenizer, request.prompt, request.completion) for request in requests]
    lengths = [len(h) + len(t) + request.max_new_tokens for (h, t), request in zip(pairs, requests, strict=True)]
    if any(request.kind != "log_prob" for request in requests):
        order = sorted(range(len(pairs)), key=lambda number: -len(pairs[number][0]))
        formed = batches([lengths[number] for number in order], POOLED * tokens)
        return [[order[place] for place in batch] for batch in formed]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (head, _) in enumerate(pairs):
        groups.setdefault(head, []).append(number)
    together = list(groups.values())
    longest = [max(lengths[number] for number in group) for group in together]
    formed = batches(longest, tokens, [len(group) for group in together])
    return [[number for place in batch for number in together[place]] for batch in formed]


def _log_probs(loaded: Loaded, guard: Guard | None, requests: Sequence[Request], room: Room) -> list[Any]:
    """[sum of the completion's natural log-probabilities, its number of tokens, how many of the first of these are the
    likeliest] of each request."""
    pairs = [_pair(loaded.tokenizer, request.prompt, request.completion) for request in requests]
    tails = [len(tail) for _, tail in pairs]
    if not all(tails):
        raise EcopromptError(f"an answer without a token has no probability: {requests[tails.index(0)].prompt!r}")
    found = None
    if (
        room.shares
        and room.pads
        and (guard is None or guard.forget.scope == "prompt")
        and len({head for head, _ in pairs}) < len(pairs)
    ):
        found = _after_shared_prompts(loaded, guard, pairs, room)
        room.shares = found is not None
    if found is None:
        found = _after_their_own(loaded, guard, pairs, room)
    return [[total, tail, agreed] for (total, agreed), tail in zip(found, tails, strict=True)]


def _after_shared_prompts(
    loaded: Loaded, guard: Guard | None, pairs: Sequence[Pair], room: Room
) -> list[Scored] | None:
    """The score of each completion, where each prompt is read once; None if the model cannot be read so."""
    from ecoprompt.prefill import follow, read

    heads = list(dict.fromkeys(head for head, _ in pairs))
    longest = max(len(head) + len(tail) for head, tail in pairs)
    found: list[Scored] = [(0.0, 0)] * len(pairs)
    for chunk in batches(list(map(len, heads)), room.tokens):
        prompts = [heads[number] for number in chunk]
        before = read(loaded, prompts, longest, guard or nullcontext())
        if before is None:
            return None
        place = {prompt: number for number, prompt in enumerate(prompts)}
        rows = [number for number, (head, _) in enumerate(pairs) if head in place]
        first = before.logits[:, None]
        for row in rows:
            found[row] = _score(first[place[pairs[row][0]]], pairs[row][1][:1])
        rows = [row for row in rows if len(pairs[row][1]) > 1]
        widths = [room.width(before.mask.shape[1] + len(pairs[row][1]), len(pairs[row][1])) for row in rows]
        for part in batches(widths, room.tokens):
            some = [rows[number] for number in part]
            ids, mask = pad(loaded, [pairs[row][1][:-1] for row in some], left=False)
            logits = follow(loaded, before.select([place[pairs[row][0]] for row in some]), ids, mask)
            for values, row in zip(logits, some, strict=True):
                (begun, agreed), (total, more) = found[row], _score(values, pairs[row][1][1:])
                found[row] = begun + total, agreed + more * agreed
    return found


def _after_their_own(loaded: Loaded, guard: Guard | None, pairs: Sequence[Pair], room: Room) -> list[Scored]:
    """The score of each completion, where each is read with its prompt in one go."""
    import torch

    from ecoprompt.prefill import parameters

    least = min(len(head) for head, _ in pairs)
    widths = [room.width(len(head) + len(tail), len(head) + len(tail) - least) for head, tail in pairs]
    found: list[Scored] = [(0.0, 0)] * len(pairs)
    with torch.inference_mode(), guard or nullcontext():
        for chunk in batches(widths, room.tokens):
            heads, tails = [pairs[row][0] for row in chunk], [pairs[row][1] for row in chunk]
            ids, mask = pad(loaded, [head + tail for head, tail in zip(heads, tails, strict=True)], left=False)
            first = min(map(len, heads)) - 1  # logits at position t are of the token at t + 1
            kept: dict[str, Any] = {}
            if "logits_to_keep" in parameters(loaded.model):
                kept["logits_to_keep"] = torch.arange(first, ids.shape[1] - 1, device=ids.device)
            with guard.prompt_lengths(list(map(len, heads))) if guard else nullcontext():
                logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
            logits = logits if kept else logits[:, first:-1]
            for values, row, head, tail in zip(logits, chunk, heads, tails, strict=True):
                start = len(head) - 1 - first
                found[row] = _score(values[start:], tail)
    return found


def _score(logits: Tensor, tokens: Sequence[int]) -> Scored:
    """The log-probability of T tokens by their logits [at least T, V], and how many of the first are the likeliest."""
    import torch

    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    logits = logits[: len(tokens)].float()
    wanted = logits.gather(1, chosen)
    agreed = (logits.argmax(1, keepdim=True) == chosen).cumprod(0).sum()
    return float((wanted - logits.logsumexp(1, keepdim=True)).double().sum()), int(agreed)


def _continuations(loaded: Loaded, guard: Guard | None, requests: Sequence[Request], room: Room) -> list[str]:
    """The continuation of each prompt as text, cut at its own `max_new_tokens`: greedy, or drawn if all are samples."""
    from ecoprompt.prefill import continuations

    drawn = [request for request in requests if isinstance(request, Sample)]
    draw = _drawing(drawn)

    def pick(logits: Tensor, rows: Sequence[int], steps: Sequence[int]) -> Tensor:
        return (draw.at(rows, steps, logits) if draw else logits).argmax(-1)

    prompts = [encode(loaded.tokenizer, request.prompt) for request in requests]
    limits = [request.max_new_tokens for request in requests]
    starts = [request.start[:limit] for request, limit in zip(requests, limits, strict=True)]
    slots = max(1, GOING_ON * room.tokens // max(map(operator.add, map(len, prompts), limits)))
    made = (
        continuations(loaded, prompts, starts, limits, slots, pick, guard or nullcontext())
        if room.shares and room.pads
        else None
    )
    if made is None:
        room.shares, made = False, []
        slots = slots if room.pads else 1
        for start in range(0, len(prompts), slots):
            part = slice(start, start + slots)
            made += _generate(loaded, guard, prompts[part], limits[part], drawn[part])
    return [decode(loaded, row) for row in made]


def _logits(loaded: Loaded, guard: Guard | None, requests: Sequence[Request], room: Room) -> list[str]:
    """The logits that follow each prompt, packed."""
    from ecoprompt.prefill import last_logits

    prompts = [encode(loaded.tokenizer, request.prompt) for request in requests]
    return [packed(row) for row in last_logits(loaded, prompts, room.tokens * room.pads, guard or nullcontext())]


def _drawing(drawn: Sequence[Sample]) -> Drawing | None:
    if not drawn:
        return None
    from ecoprompt.sampling import Drawing

    return Drawing([one.noise_key() for one in drawn], [one.temperature for one in drawn], [one.top_p for one in drawn])


def _generate(
    loaded: Loaded, guard: Guard | None, prompts: Sequence[list[int]], limits: Sequence[int], drawn: Sequence[Sample]
) -> list[list[int]]:
    """What transformers' own `generate` gives, for models whose memory of a prompt cannot be taken apart."""
    import torch

    ids, mask = pad(loaded, prompts, left=True)
    draw = _drawing(drawn)
    settings: dict[str, Any] = {"logits_processor": [draw]} if draw else {}
    with torch.inference_mode(), guard or nullcontext():
        out = loaded.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max(limits), do_sample=False, **settings
        )
    return [row[:limit] for row, limit in zip(out[:, ids.shape[1] :].tolist(), limits, strict=True)]


def decode(loaded: Loaded, ids: Sequence[int]) -> str:
    """Generated token ids as text, without special tokens and surrounding white space."""
    return str(loaded.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


KINDS: dict[str, tuple[Callable[..., list[Any]], str]] = {
    "log_prob": (_log_probs, "scoring"),
    "generation": (_continuations, "generating"),
    "sample": (_continuations, "sampling"),
    "logits": (_logits, "reading logits"),
}
"""What computes each kind of request, and what that is called while it lasts."""
