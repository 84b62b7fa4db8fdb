"""Answers that the gate reads before anybody does: generated again, corrupted, where it flags one with its question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ecoprompt.calls import columns_of
from ecoprompt.registry import UnguardedError

if TYPE_CHECKING:
    from torch import Tensor

    from ecoprompt.guard import Guard

STATEFUL = ("past_key_values", "logits_processor", "stopping_criteria")
"""Arguments of `generate` that are not after it what they were before, so that nothing can be generated again."""


def prompt_of(arguments: dict[str, Any]) -> Tensor | None:
    """The token ids that `generate` is given."""
    ids: Tensor | None = arguments.get("inputs")
    return arguments.get("input_ids") if ids is None else ids


def generate_checked(
    guard: Guard, generate: Callable[[dict[str, Any]], Any], arguments: dict[str, Any], config: Any
) -> Any:
    """Generate, let the gate read each question with its answer, and generate again with the flagged ones corrupted.

    They are flagged from then on. Nothing is streamed before it is checked. Raises UnguardedError for a call that
    cannot be repeated, or whose result is more than tokens.
    """
    ids = prompt_of(arguments)
    if ids is None or config.return_dict_in_generate or any(arguments.get(name) is not None for name in STATEFUL):
        raise UnguardedError(
            'check = "answer" needs generate to take input_ids, to return tokens alone, and to run without '
            + ", ".join(STATEFUL)
        )
    streamer = arguments.pop("streamer", None)
    found = generate(arguments)
    again = _refuted(guard, ids, arguments.get("attention_mask"), found)
    if again:
        copies = len(found) // len(ids)
        # All of it, as what is given by row (a function that says which tokens are allowed, say) knows rows by number.
        fresh = generate(arguments)
        found = _replace_rows(found, fresh, [row * copies + n for row in again for n in range(copies)], config)
    if streamer is not None:
        streamer.put(ids.cpu())
        for token in found[0, ids.shape[1] :].cpu():
            streamer.put(token[None])
        streamer.end()
    return found


def _refuted(guard: Guard, ids: Tensor, mask: Any, found: Tensor) -> list[int]:
    """The rows of `ids` [B, P] whose last turn the gate lets through alone and flags with an answer in `found`
    [B * k, T]."""
    columns = columns_of(ids, mask, guard.tokenizer)
    prompts = [[int(row[column]) for column in present] for row, present in zip(ids.tolist(), columns, strict=True)]
    copies, threshold = len(found) // len(ids), guard.forget.threshold
    passed = [row for row, one in enumerate(guard.decide(prompts)) if one.turn_scores[-1] <= threshold]
    places = [(row, row * copies + number) for row in passed for number in range(copies)]
    answers = [guard.tokenizer.decode(found[place, ids.shape[1] :], skip_special_tokens=True) for _, place in places]
    refuted = guard.overrule([prompts[row] for row, _ in places], [answer.strip() for answer in answers])
    return sorted({row for (row, _), flagged in zip(places, refuted, strict=True) if flagged})


def _replace_rows(found: Tensor, fresh: Tensor, rows: Sequence[int], config: Any) -> Tensor:
    """`found` [B, T] with `rows` as they are in `fresh` [B, S], the shorter of the two filled up with padding."""
    from torch.nn.functional import pad

    width = max(found.shape[1], fresh.shape[1])
    ends = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    fill = config.pad_token_id if config.pad_token_id is not None else ends or 0
    found, fresh = (pad(one, (0, width - one.shape[1]), value=fill) for one in (found, fresh))
    found[list(rows)] = fresh[list(rows)]
    return found
