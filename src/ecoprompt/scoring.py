"""Batched log-probabilities, greedy generations and samples of any causal language model, guarded or not."""

from __future__ import annotations

import functools
import hashlib
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ecoprompt.metrics import LogProb
from ecoprompt.models import Loaded, encode, encode_pair
from ecoprompt.registry import EcopromptError, Progress, quiet
from ecoprompt.results import Store, key

if TYPE_CHECKING:
    from torch import Tensor

    from ecoprompt.guard import Guard

T = TypeVar("T")
FORMAT = 2
"""Raised whenever prompts, answers or scores come to be made in another way, so that old results are not mixed in."""
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 8192, 65536


@dataclass(frozen=True)
class Request:
    """One thing to ask of a model: the log-probability of `completion` after `prompt`, or a greedy generation.

    Both are rendered text. A generation has `max_new_tokens` >= 1 and no completion.
    """

    kind: Literal["log_prob", "generation", "sample"]
    prompt: str
    completion: str = ""
    max_new_tokens: int = 0

    def key(self, fingerprint: str, corruption: str | None) -> str:
        """What the result is stored under: all that determines it; `corruption` is None for an unflagged prompt."""
        return key(format=FORMAT, model=fingerprint, corruption=corruption, **vars(self))


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
    batch_tokens: int | None = None,
    progress: Progress = quiet,
) -> float:
    """Compute the requests, each under its key, and put the results into `store`; returns the seconds they took.

    Batches are formed of all the requests before it is asked which are stored, so that a restart computes what is
    missing in the very batches of a run that went through, and gets the same numbers to the last bit.
    """
    budget = batch_tokens or (GPU_BATCH_TOKENS if loaded.model.device.type == "cuda" else CPU_BATCH_TOKENS)
    requests = list(dict(requests).items())
    done, seconds = 0, 0.0
    for kind, compute, doing in (
        ("log_prob", _log_probs, "scoring"),
        ("generation", _generations, "generating"),
        ("sample", _samples, "sampling"),
    ):
        chosen = [(name, request) for name, request in requests if request.kind == kind]
        lengths = [_length(loaded, request) for _, request in chosen]
        for batch in batches(lengths, budget):
            wanted = [chosen[number] for number in batch]
            clock = f"seconds:{wanted[0][0]}"
            if any(name not in store for name in (clock, *dict(wanted))):
                started = time.perf_counter()
                values = halving(functools.partial(compute, loaded, guard), [request for _, request in wanted])
                found = {name: value for (name, _), value in zip(wanted, values, strict=True)}
                found[clock] = time.perf_counter() - started
                # What another batch has given stays: it differs in the last digits, and results are not to move.
                store.put_many([(name, value) for name, value in found.items() if name not in store])
            seconds += store.get(clock)
            done += len(batch)
            progress(doing, done, len(requests))
    return seconds


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows in batches of at most `budget` padded tokens (a longer row stands alone), longest first."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    formed: list[list[int]] = []
    for number in order:
        if formed and (len(formed[-1]) + 1) * lengths[formed[-1][0]] <= budget:
            formed[-1].append(number)
        else:
            formed.append([number])
    return formed


def halving(compute: Callable[[list[T]], list[Any]], batch: list[T]) -> list[Any]:
    """`compute(batch)`, in halves where the device runs out of memory; raises EcopromptError if one row is too much."""
    import torch

    try:
        return compute(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise EcopromptError(
                "out of memory on a single row; load the model in a smaller dtype or quantized"
            ) from None
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    return halving(compute, batch[:middle]) + halving(compute, batch[middle:])


def log_prob(value: Any) -> LogProb:
    """A stored value as the LogProb it was."""
    return LogProb(float(value[0]), int(value[1]))


def _length(loaded: Loaded, request: Request) -> int:
    head, tail = encode_pair(loaded.tokenizer, request.prompt, request.completion)
    return len(head) + len(tail) + request.max_new_tokens


def _log_probs(loaded: Loaded, guard: Guard | None, requests: Sequence[Request]) -> list[list[float]]:
    """[sum of the completion's natural log-probabilities, its number of tokens] of each request."""
    import torch

    pairs = [encode_pair(loaded.tokenizer, request.prompt, request.completion) for request in requests]
    heads, tails = [len(head) for head, _ in pairs], [len(tail) for _, tail in pairs]
    if not all(tails):
        raise EcopromptError(f"an answer without a token has no probability: {requests[tails.index(0)].prompt!r}")
    ids, mask = pad(loaded, [head + tail for head, tail in pairs], left=False)
    first = min(heads) - 1  # logits at position t are of the token at t + 1
    kept: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(loaded.model.forward).parameters:
        kept["logits_to_keep"] = torch.arange(first, ids.shape[1] - 1, device=ids.device)
    with torch.inference_mode():
        if guard is None:
            logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
        else:
            with guard.prompt_lengths(heads):
                logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
        logits = logits if kept else logits[:, first:-1]
        totals = []
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            rows = logits[row, head - 1 - first : head - 1 - first + tail].float().log_softmax(-1)
            totals.append(rows.gather(1, ids[row, head : head + tail, None]).double().sum().item())
    return [[total, tail] for total, tail in zip(totals, tails, strict=True)]


def _generations(loaded: Loaded, guard: Guard | None, requests: Sequence[Request]) -> list[str]:
    """The greedy continuation of each prompt, cut at its own `max_new_tokens`; a guard is on the model already."""
    return _continuations(loaded, requests)


def _samples(loaded: Loaded, guard: Guard | None, requests: Sequence[Sample]) -> list[str]:
    """A sampled continuation for each request, otherwise as `_generations`."""
    return _continuations(loaded, requests, logits_processor=[_Drawing(requests)])


def _continuations(loaded: Loaded, requests: Sequence[Request], **settings: Any) -> list[str]:
    """The continuations that `generate` finds greedily under further `settings`, which may change the scores."""
    import torch

    prompts = [encode(loaded.tokenizer, request.prompt) for request in requests]
    ids, mask = pad(loaded, prompts, left=True)
    longest = max(request.max_new_tokens for request in requests)
    with torch.inference_mode():
        out = loaded.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, **settings
        )
    new = out[:, ids.shape[1] :].tolist()
    return [decode(loaded, row[: request.max_new_tokens]) for row, request in zip(new, requests, strict=True)]


class _Drawing:
    """A logits processor after which the greatest score is a draw from the model's distribution (Gumbel-max).

    `generate` draws all rows of a batch from one generator, so that a row's draws would depend on its batch.
    """

    def __init__(self, requests: Sequence[Sample]) -> None:
        import torch

        self.keys = torch.tensor([[request.noise_key()] for request in requests])
        self.temperature = torch.tensor([[request.temperature] for request in requests])
        self.top_p = torch.tensor([[request.top_p] for request in requests])
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of the tokens that come next, with the noise of this step."""
        scores = scores.float() / self.temperature.to(scores.device)
        if (self.top_p < 1).any():
            scores = _nucleus(scores, self.top_p.to(scores.device))
        noise = gumbel(self.keys.to(scores.device) + self.step, scores.shape[1])
        self.step += 1
        return scores + noise


def _nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """`scores` [B, V], minus infinity but for the fewest tokens of a row that come to its `top_p` [B, 1]."""
    ranked, order = scores.softmax(-1).sort(dim=-1, descending=True)
    beyond = (ranked.cumsum(-1) - ranked >= top_p) & (top_p < 1)
    return scores.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))


def gumbel(keys: Tensor, count: int) -> Tensor:
    """[B, count] numbers of the standard Gumbel distribution, a function of each row's key [B, 1] and the column alone.

    Made by hashing, in whole numbers, so that every device makes the same ones and none is made in a sequence.
    """
    import torch

    columns = _mix(torch.arange(count, device=keys.device))
    bits = _mix(_mix(keys) + columns) & ((1 << 53) - 1)
    uniform = ((bits.float() + 0.5) * 2.0**-53).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finisher (Steele, Lea, Flood 2014) on 64-bit whole numbers; the masks make its shifts unsigned."""
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    bits = (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


def decode(loaded: Loaded, ids: Sequence[int]) -> str:
    """Generated token ids as text, without special tokens and surrounding white space."""
    return str(loaded.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def pad(loaded: Loaded, rows: Sequence[Sequence[int]], left: bool) -> tuple[Any, Any]:
    """Token ids and attention mask, each [B, T], padded on one side."""
    import torch

    width = max(map(len, rows))
    fill = loaded.tokenizer.pad_token_id or 0
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids.to(loaded.model.device), mask.to(loaded.model.device)
