"""The forget spec (gate, token selector, corruption), and what it decides of a prompt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ecoprompt.corruption import dimensions
from ecoprompt.models import to_text
from ecoprompt.registry import EcopromptError, InputError, UnguardedError, corruptions, selectors
from ecoprompt.tokens import mask
from ecoprompt.turns import Turn, readable, turns

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


Probabilities = Sequence[float] | np.ndarray


class Scorer(Protocol):
    """A gate's one duty: the probability, for each text, that it asks about what must be forgotten."""

    def score(self, texts: Sequence[str]) -> Probabilities: ...


@dataclass(frozen=True)
class Selection:
    """The tokens of one flagged turn that are corrupted: their positions, and the turn's token ids, which seed noise.

    Under scope `sequence` a given answer belongs to the turn, so each answer to a prompt gets noise of its own, as if
    it were drawn anew (the published code draws anew at every call; noise shared by the answers would not
    part the right one from the wrong ones).
    """

    positions: tuple[int, ...]
    seed_ids: tuple[int, ...]


@dataclass(frozen=True)
class Decision:
    """What the gate said of one prompt: its text, the highest score of its turns, and the positions corrupted.

    Positions count from the prompt's first token, padding left out. `turn_scores` are those of a conversation's turns
    in order, the latest last.
    """

    text: str
    score: float
    flagged: bool
    turn_scores: tuple[float, ...] = ()
    selections: tuple[Selection, ...] = field(default=(), repr=False)

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(sorted(position for selection in self.selections for position in selection.positions))


@dataclass(frozen=True)
class Forget:
    """A forget spec: who is flagged (`gate` above `threshold`), which tokens, and how they are corrupted.

    `gate` is a gate or any function texts -> probabilities. `tokens` is a token selector's name, or a table of
    `select`, `scope` and the selector's parameters; `corruption` is a table of `method` and its parameters. A turn of a
    conversation is read alone and with as many as `context` turns before it. With `check = "answer"` a generated
    answer is read too, together with its question. Raises InputError for a name or a parameter that does not exist.
    """

    gate: Scorer | Callable[[list[str]], Probabilities]
    corruption: Mapping[str, Any]
    threshold: float = 0.5
    tokens: str | Mapping[str, Any] = "all"
    seed: int = 0
    context: int = 4
    check: str = "prompt"

    def __post_init__(self) -> None:
        self._check_types()
        tokens = {"select": self.tokens} if isinstance(self.tokens, str) else dict(self.tokens)
        scope, select = tokens.pop("scope", "prompt"), tokens.pop("select", "all")
        corruption = dict(self.corruption)
        if "method" not in corruption:
            raise InputError("'corruption.method': this key is needed")
        if scope not in ("prompt", "sequence"):
            raise InputError(f"'tokens.scope': found {scope!r}, expected 'prompt' or 'sequence'")
        method = corruption.pop("method")
        tokens = {"select": select, "scope": scope, **selectors.bind(select, tokens, "tokens")}
        object.__setattr__(self, "tokens", tokens)
        bound = corruptions.bind(method, corruption, "corruption")
        object.__setattr__(self, "corruption", {"method": method, **bound})

    def _check_types(self) -> None:
        problems = [
            f"'{name}': found {value!r}, expected {expected}"
            for name, value, expected, right in (
                ("gate", self.gate, "a gate or a function", hasattr(self.gate, "score") or callable(self.gate)),
                ("gate.threshold", self.threshold, "a number from 0 to 1", is_probability(self.threshold)),
                ("tokens", self.tokens, "a name or a table", isinstance(self.tokens, (str, Mapping))),
                ("corruption", self.corruption, "a table", isinstance(self.corruption, Mapping)),
                ("seed", self.seed, "a whole number", type(self.seed) is int),
                ("gate.context", self.context, "a whole number >= 0", type(self.context) is int and self.context >= 0),
                ("gate.check", self.check, "'prompt' or 'answer'", self.check in ("prompt", "answer")),
            )
            if not right
        ]
        if problems:
            raise InputError(*problems)

    def differences(self, other: Forget) -> list[str]:
        """The keys, but for corruption and seed, in which two specs differ; if none, they decide of prompts alike."""
        names = [name for name in ("threshold", "tokens", "context", "check") if vars(self)[name] != vars(other)[name]]
        # A gate's tables are not compared, only whether it is the same object or the same function.
        alike = self.gate is other.gate or (not hasattr(self.gate, "score") and self.gate == other.gate)
        return names if alike else ["gate", *names]

    @property
    def scope(self) -> str:
        assert isinstance(self.tokens, Mapping)
        return str(self.tokens["scope"])

    def decide(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        overruled: Mapping[str, float] | None = None,
    ) -> list[Decision]:
        """Gate prompts, given as token ids without padding, turn by turn; one call of the gate for all of them.

        `overruled` are scores that outdo the gate's, by the turn as it is read with those before it (see `judge`).
        """
        texts = [to_text(tokenizer, ids) for ids in prompts]
        said = [turns(tokenizer, text) for text, _ in texts]
        views = [[(turn.content, self._in_context(row, number)) for number, turn in enumerate(row)] for row in said]
        # Markup that a user typed may split one text into turns, so several turns are read as one text as well.
        wholes = [
            readable(tokenizer, text) if len(row) > 1 else None for (text, _), row in zip(texts, said, strict=True)
        ]
        found = [*wholes, *(view for row in views for pair in row for view in pair)]
        contents = list(dict.fromkeys(view for view in found if view is not None))
        scores = dict(zip(contents, self._scores(contents), strict=True))
        decisions, more = [], overruled or {}
        for ids, (text, offsets), row, read, whole in zip(prompts, texts, said, views, wholes, strict=True):
            heard = tuple(_highest(scores[one], scores[other], more.get(other, 0.0)) for one, other in read)
            if whole is not None and all(score <= self.threshold for score in heard):
                heard = tuple(_highest(score, scores[whole]) for score in heard)
            flagged = [turn for turn, score in zip(row, heard, strict=True) if not score <= self.threshold]
            picked = [self._select(text, offsets, ids, turn) for turn in flagged]
            decisions.append(Decision(text, _highest(0.0, *heard), bool(flagged), heard, tuple(picked)))
        return decisions

    def _in_context(self, row: Sequence[Turn], number: int) -> str:
        """What a turn says, after the turns before it."""
        parts = [turn.content for turn in row[max(0, number - self.context) : number + 1]]
        return "\n".join(part for part in parts if part)

    def judge(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], answers: Sequence[str]
    ) -> list[tuple[str, float]]:
        """By prompt: its last turn as it is read with those before it, and the score of that with the answer."""
        read = []
        for ids in prompts:
            row = turns(tokenizer, to_text(tokenizer, ids)[0])
            read.append(self._in_context(row, len(row) - 1))
        both = [f"{question}\n{answer}" for question, answer in zip(read, answers, strict=True)]
        return list(zip(read, self._scores(both), strict=True))

    def _scores(self, texts: list[str]) -> list[float]:
        """The gate's score of each text; raises InputError for what no gate may say. NaN may be, and is flagged."""
        if not texts:
            return []
        said = self.gate.score(texts) if hasattr(self.gate, "score") else self.gate(texts)
        try:
            scores = [float(score) for score in said]
        except (TypeError, ValueError):
            raise InputError(f"the gate gave {said!r:.80}, expected a number for each text") from None
        if len(scores) != len(texts):
            raise InputError(f"the gate gave {len(scores)} scores for {len(texts)} texts")
        if not all(0 <= score <= 1 or math.isnan(score) for score in scores):
            raise InputError(f"the gate gave the scores {scores!r:.80}, expected numbers from 0 to 1")
        return scores

    def extend(
        self, tokenizer: PreTrainedTokenizerBase, decision: Decision, ids: Sequence[int], prompt: int
    ) -> Decision:
        """The decision on a prompt (the first `prompt` of `ids`), carried over to the answer that follows it.

        Under scope `sequence` the answer's tokens, all but the last, belong to the prompt's last turn.
        """
        if self.scope == "prompt" or not decision.flagged or len(ids) == prompt:
            return decision
        text, offsets = to_text(tokenizer, ids)
        asked = turns(tokenizer, decision.text)
        asked[-1] = replace(asked[-1], end=len(text))
        scored = zip(asked, decision.turn_scores, strict=True)
        picked = [self._select(text, offsets, ids, turn) for turn, score in scored if not score <= self.threshold]
        return replace(decision, selections=tuple(picked))

    def _select(self, text: str, offsets: Sequence[tuple[int, int]], ids: Sequence[int], turn: Turn) -> Selection:
        """The tokens of one flagged turn that are corrupted; where the selector finds none, all of them.

        The last token never is: it is where the model starts to answer. A sole token is the exception.
        """
        assert isinstance(self.tokens, Mapping)
        inside = [number for number, (start, _) in enumerate(offsets) if turn.start <= start < turn.end]
        if turn.end >= len(text):  # special tokens at the very end may have no character of their own
            inside = [*inside, *range(inside[-1] + 1 if inside else 0, len(ids))]
        # A turn may begin inside a token of the one before; a turn without any token of its own corrupts that one.
        inside = inside or [n for n, (start, end) in enumerate(offsets) if start < turn.end and turn.start < end]
        inside = inside or list(range(len(ids)))
        most = [number for number in inside if number != len(ids) - 1] or inside
        parameters = {key: value for key, value in self.tokens.items() if key not in ("select", "scope")}
        shifted = [(offsets[number][0] - turn.start, offsets[number][1] - turn.start) for number in inside]
        chosen = mask(str(self.tokens["select"]), parameters, text[turn.start : turn.end], shifted)
        found = [number for number, hit in zip(inside, chosen, strict=True) if hit and number in set(most)]
        # White space at its end belongs to the turn only while it is the last one: noise must not change with that.
        seeding = [ids[number] for number in inside if text[offsets[number][0] : turn.end].strip()]
        return Selection(tuple(found or most), tuple(seeding))

    def corrupt(self, embeddings: Tensor, decision: Decision) -> Tensor:
        """A copy of one row's embeddings [T, D], padding left out, with the decision's positions corrupted.

        The noise of a turn is a function of (seed, the turn's tokens, corruption method) alone.
        """
        import torch

        parameters = {key: value for key, value in self.corruption.items() if key != "method"}
        if "dims" in parameters:
            parameters["dims"] = dimensions(parameters["dims"], embeddings.shape[1])
        if isinstance(parameters.get("strength"), list):
            parameters["strength"] = torch.tensor(parameters["strength"], device=embeddings.device)
        method = corruptions[self.corruption["method"]]
        corrupted = embeddings.clone()
        for selection in decision.selections:
            generator = torch.Generator().manual_seed(self._noise_seed(selection.seed_ids))
            index = torch.tensor(selection.positions, dtype=torch.long, device=embeddings.device)
            found = method(embeddings[index], generator, **parameters)
            if found.shape != embeddings[index].shape:
                shapes = f"{list(found.shape)}, expected {list(embeddings[index].shape)}"
                raise EcopromptError(f"'{self.corruption['method']}' made embeddings of shape {shapes}")
            corrupted[index] = found
            if torch.equal(corrupted[index], embeddings[index]):
                raise UnguardedError(
                    f"'{self.corruption['method']}' leaves the {len(index)} selected token(s) of a flagged prompt "
                    "as they are; select more tokens or take another corruption"
                )
        return corrupted

    def _noise_seed(self, ids: Sequence[int]) -> int:
        key = f"{self.seed}:{self.corruption['method']}:{','.join(map(str, ids))}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")

    def check_hidden_size(self, size: int) -> None:
        """Raises InputError if the corruption asks for more dimensions than the model has, or not for as many as it has
        strengths."""
        if (dims := dimensions(self.corruption.get("dims", 0), size)) > size:
            raise InputError(f"'corruption.dims': found {dims}, expected at most the model's hidden size, {size}")
        strengths = self.corruption.get("strength")
        if isinstance(strengths, list) and len(strengths) != dims:
            raise InputError(f"'corruption.strength': found {len(strengths)}, expected one for each of {dims} dims")


def _highest(*scores: float) -> float:
    """The highest score; not a number if one of them is not, so that what is not known is flagged."""
    return math.nan if any(map(math.isnan, scores)) else max(scores)


def is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
