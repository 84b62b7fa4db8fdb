"""The conversation on a terminal, and the pipe: one prompt a line in, one answer a line out."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from ecoprompt.data import not_json, shortened
from ecoprompt.forget import Forget
from ecoprompt.guard import Guard
from ecoprompt.models import Loaded, encode, pad, render
from ecoprompt.registry import EcopromptError, InputError, nearest
from ecoprompt.results import to_json
from ecoprompt.scoring import decode

if TYPE_CHECKING:
    from rich.console import Console

BATCH = 16
LINGER = 0.02
"""Seconds that a batch waits for one more line of a producer that is about to write it."""
COMMANDS = {"/reset": "forget the conversation so far", "/quit": "leave (so does Ctrl-D)", "/help": "show this"}


@dataclass(frozen=True)
class Answer:
    """An answer, and what the gate said of the latest turn: `score` is None without a guard.

    `flagged` is that turn's, the first turn's with the system prompt before it.
    """

    text: str
    flagged: bool = False
    score: float | None = None


@dataclass
class Chat:
    """A model that answers, guarded if `forget` is given.

    Answers have at most `max_new_tokens`; they are greedy at `temperature` 0, sampled by `seed` above it.
    """

    loaded: Loaded
    forget: Forget | None = None
    max_new_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None

    def __post_init__(self) -> None:
        self.guard = Guard(self.loaded.model, self.loaded.tokenizer, self.forget) if self.forget else None

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The messages that begin a conversation with `prompt`."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": prompt}]

    @property
    def room(self) -> int:
        """How many tokens the model reads, question and answer together."""
        text = self.loaded.model.config.get_text_config()
        return getattr(text, "max_position_embeddings", None) or 1 << 30

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation; raises InputError for one that leaves no room for an answer."""
        ids = encode(self.loaded.tokenizer, render(self.loaded.tokenizer, messages))
        if len(ids) >= self.room:
            raise InputError(f"found {len(ids)} tokens, expected fewer than the {self.room} that the model reads")
        return ids

    def answer(
        self,
        conversations: Sequence[Sequence[dict[str, str]]],
        number: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """Answer conversations in one batch; `number` counts earlier answers, so that each is sampled anew.

        `on_text` is called with pieces of the answer as they come, for a batch of one. Raises InputError for a
        conversation longer than the model reads.
        """
        import torch

        prompts = [self.encode(messages) for messages in conversations]
        longest = max(map(len, prompts))
        if len(prompts) > 1 and longest + self.max_new_tokens > self.room:
            # A long prompt leaves little room for its answer; it is not to cut the others' short.
            return [answer for one in conversations for answer in self.answer([one], number)]
        ids, mask = pad(self.loaded, prompts, left=True)
        sampling = {"temperature": self.temperature, "top_k": 0} if self.temperature > 0 else {}
        torch.manual_seed(self.seed + number)
        with torch.inference_mode(), self.guard or contextlib.nullcontext():
            out = self.loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(self.max_new_tokens, self.room - longest),
                streamer=_streamer(self.loaded, on_text) if on_text else None,
                do_sample=bool(sampling),
                **sampling,
            )
        texts = [decode(self.loaded, row) for row in out[:, ids.shape[1] :].tolist()]
        if self.guard is None:
            return [Answer(text) for text in texts]
        answers = []
        for text, messages, decision in zip(texts, conversations, self.guard.decisions, strict=True):
            first = sum(message["role"] == "user" for message in messages) == 1
            score = decision.turn_scores[-1]
            flagged = decision.flagged if first else not score <= self.guard.forget.threshold
            answers.append(Answer(text, flagged, score))
        return answers


def _streamer(loaded: Loaded, on_text: Callable[[str], None]) -> Any:
    """A transformers streamer that hands each finished piece of text to `on_text`."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)


def converse(chat: Chat, console: Console, read: Callable[[], str], show_gate: bool = False) -> None:
    """A conversation until `read` (one line of the user's) raises EOFError or gives /quit."""
    history: list[dict[str, str]] = []
    number = 0
    _note(console, "/help lists the commands, /quit leaves")
    while True:
        try:
            line = read().encode(errors="replace").decode().strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            _note(console, "/quit or Ctrl-D leaves")
            continue
        except UnicodeDecodeError:
            _note(console, "that was not UTF-8 text")
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            history = [] if line == "/reset" else history
            _note(console, *_explain(line))
            continue
        if not line:
            continue
        asked = [*history, {"role": "user", "content": line}] if history else chat.messages(line)
        try:
            (answer,) = chat.answer([asked], number, _printer(console))
        except KeyboardInterrupt:
            console.print()
            _note(console, "stopped; this turn is not kept")
            continue
        except InputError as error:
            _note(console, f"the conversation is too long: {error}; /reset, or ask something shorter")
            continue
        except EcopromptError as error:
            _note(console, str(error))
            continue
        score = f"  · gate {answer.score:.4f}" if show_gate and answer.score is not None else ""
        _note(console, ("  · guarded" if answer.flagged else "") + score)
        history = [*asked, {"role": "assistant", "content": answer.text}]
        number += 1


def _note(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, style="dim", markup=False, emoji=False, highlight=False, soft_wrap=True)


def _printer(console: Console) -> Callable[[str], None]:
    """Prints the pieces of an answer as they come, without the white space before the first."""
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        text = text if begun else text.lstrip()
        begun = begun or bool(text)
        console.out(text, end="", highlight=False)
        console.file.flush()

    return show


def _explain(line: str) -> list[str]:
    """What is said to a line that begins with a slash."""
    if line == "/help":
        return [f"{name:8}{what}" for name, what in COMMANDS.items()]
    if line == "/reset":
        return ["the conversation starts anew"]
    return [f"there is no command {line.split()[0]}; {nearest(line.split()[0], COMMANDS)}"]


def pipe(chat: Chat, lines: Iterable[bytes], out: TextIO, jsonl: bool = False, notes: TextIO | None = None) -> None:
    """Answer one prompt a line, each by itself, in order; what waits on the input is answered in one batch.

    With `jsonl`, objects with a `prompt` in, the same objects with `answer`, `flagged` and `score` out, and blank lines
    passed over. `notes`, if given, gets each prompt's score. Raises InputError that names the line for what is no
    UTF-8 text, no such object, or too long for the model, with all before it answered.
    """
    number = 0
    for batch in _waiting(lines, 1 if chat.temperature > 0 else BATCH):
        records: list[dict[str, Any]] = []
        problem = None
        for place, line in enumerate(batch, number + 1):
            try:
                record = _record(line, jsonl)
                if record is not None:
                    chat.encode(chat.messages(record["prompt"]))
                    records.append(record)
            except InputError as error:
                problem = InputError(f"standard input, line {place}: {error}")
                break
        asked = [chat.messages(record["prompt"]) for record in records if record["prompt"].strip()]
        answers = iter(chat.answer(asked, number) if asked else [])
        for record in records:
            answer = next(answers) if record["prompt"].strip() else Answer("")
            told = {**record, "answer": answer.text, "flagged": answer.flagged, "score": answer.score}
            out.write((to_json(told, indent=None) if jsonl else " ".join(answer.text.split())) + "\n")
            if notes is not None:
                notes.write(f"gate {'–' if answer.score is None else format(answer.score, '.4f')}\n")
        out.flush()
        number += len(batch)
        if problem is not None:
            raise problem


def raw_lines(stream: TextIO) -> Iterable[bytes]:
    """The undecoded lines of a text stream, read through a buffer of their own: the interpreter closes the stream's at
    its end, and dies if the thread that waits for a line still holds it."""
    try:
        return open(stream.fileno(), "rb", closefd=False)
    except OSError:  # no file beneath, as under a test runner
        return stream.buffer


def _record(raw: bytes, jsonl: bool) -> dict[str, Any] | None:
    """The prompt of a line, with what stands beside it; None for a blank line between JSON objects."""
    try:
        line = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"found byte 0x{raw[error.start]:02x} that is not UTF-8, expected UTF-8 text") from None
    if not jsonl:
        return {"prompt": line}
    if not line:
        return None
    expected = "expected an object with a text under 'prompt'"
    try:
        record = json.loads(line)
        to_json(record).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"found {not_json(error)}, {expected}") from None
    if not isinstance(record, dict):
        raise InputError(f"found {shortened(record)}, {expected}")
    if "prompt" not in record:
        raise InputError(f"found no key 'prompt' among {', '.join(map(repr, record)) or 'none'}")
    if not isinstance(record["prompt"], str):
        raise InputError(f"'prompt': found {shortened(record['prompt'])}, expected a text")
    return record


def _waiting(lines: Iterable[bytes], most: int) -> Iterator[list[bytes]]:
    """The lines as they come, those that wait already together, at most `most` at a time."""
    arrived: queue.Queue[bytes | Exception | None] = queue.Queue(maxsize=4 * most)

    def fetch() -> None:
        try:
            for line in lines:
                arrived.put(line)
            arrived.put(None)
        except (OSError, ValueError) as error:
            arrived.put(error)

    threading.Thread(target=fetch, daemon=True).start()
    while True:
        batch = [arrived.get()]
        with contextlib.suppress(queue.Empty):
            while isinstance(batch[-1], bytes) and len(batch) < most:
                batch.append(arrived.get(timeout=LINGER))
        texts = [line for line in batch if isinstance(line, bytes)]
        if texts:
            yield texts
        if isinstance(batch[-1], Exception):
            raise batch[-1]
        if batch[-1] is None:
            return
