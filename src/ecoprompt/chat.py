"""The conversation on a terminal, and the pipe: one prompt a line in, one answer a line out."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from ecoprompt.forget import Forget
from ecoprompt.guard import Guard
from ecoprompt.models import Loaded, encode, render
from ecoprompt.registry import InputError, nearest
from ecoprompt.scoring import decode, pad

if TYPE_CHECKING:
    from rich.console import Console

BATCH = 16
COMMANDS = {"/reset": "forget the conversation so far", "/quit": "leave (so does Ctrl-D)", "/help": "show this"}


@dataclass(frozen=True)
class Options:
    """How answers are made: at most `max_new_tokens`, greedy at `temperature` 0, sampled by `seed` above it."""

    max_new_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None


@dataclass(frozen=True)
class Answer:
    """An answer, and what the gate said of the latest turn: `score` is None without a guard."""

    text: str
    flagged: bool = False
    score: float | None = None


@dataclass
class Chat:
    """A model that answers, guarded if `forget` is given. Use it in a `with` block."""

    loaded: Loaded
    forget: Forget | None = None
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        self.guard = Guard(self.loaded.model, self.loaded.tokenizer, self.forget) if self.forget else None

    def __enter__(self) -> Chat:
        (self.guard or nullcontext()).__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        (self.guard or nullcontext()).__exit__(*exception)

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The messages that begin a conversation with `prompt`."""
        system = [{"role": "system", "content": self.options.system}] if self.options.system else []
        return [*system, {"role": "user", "content": prompt}]

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

        prompts = [encode(self.loaded.tokenizer, render(self.loaded.tokenizer, messages)) for messages in conversations]
        most = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        longest = max(map(len, prompts))
        if longest >= most:
            raise InputError(f"the conversation has {longest} tokens and the model reads {most}; /reset or shorten it")
        ids, mask = pad(self.loaded, prompts, left=True)
        sampling = (
            {"do_sample": True, "temperature": self.options.temperature, "top_k": 0}
            if self.options.temperature > 0
            else {}
        )
        torch.manual_seed(self.options.seed + number)
        with torch.inference_mode():
            out = self.loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(self.options.max_new_tokens, most - longest),
                streamer=_streamer(self.loaded, on_text) if on_text else None,
                **(sampling or {"do_sample": False}),
            )
        texts = [decode(self.loaded, row) for row in out[:, ids.shape[1] :].tolist()]
        if self.guard is None or self.forget is None:
            return [Answer(text) for text in texts]
        scores = [decision.turn_scores[-1] for decision in self.guard.decisions]
        return [Answer(text, not s <= self.forget.threshold, s) for text, s in zip(texts, scores, strict=True)]


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
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if line.startswith("/"):
            if line == "/quit":
                return
            if line == "/reset":
                history = []
            _explain_command(line, console)
            continue
        if not line:
            continue
        asked = [*history, {"role": "user", "content": line}] if history else chat.messages(line)
        pieces = _Pieces(console)
        try:
            (answer,) = chat.answer([asked], number, pieces)
        except KeyboardInterrupt:
            console.print("\n[dim]stopped; this turn is not kept[/dim]")
            continue
        except InputError as error:
            console.print(f"[red]{error}[/red]", highlight=False)
            continue
        mark = "  [dim]· guarded[/dim]" if answer.flagged else ""
        score = f"  [dim]· gate {answer.score:.4f}[/dim]" if show_gate and answer.score is not None else ""
        console.print(mark + score, highlight=False)
        history = [*asked, {"role": "assistant", "content": answer.text}]
        number += 1


class _Pieces:
    """Prints the pieces of an answer as they come, without the white space before the first."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.begun = False

    def __call__(self, text: str) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        self.console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()


def _explain_command(line: str, console: Console) -> None:
    if line == "/help":
        for name, what in COMMANDS.items():
            console.print(f"[dim]{name}  {what}[/dim]", highlight=False)
    elif line == "/reset":
        console.print("[dim]the conversation starts anew[/dim]")
    else:
        console.print(f"[dim]there is no command {line.split()[0]}; {nearest(line.split()[0], COMMANDS)}[/dim]")


def pipe(chat: Chat, lines: Iterable[str], out: TextIO, jsonl: bool = False, notes: TextIO | None = None) -> None:
    """Answer one prompt a line, each by itself, in order; what waits on the input is answered in one batch.

    With `jsonl`, objects with a `prompt` in, the same objects with `answer`, `flagged` and `score` out. `notes`, if
    given, gets each prompt's score. Raises InputError for a line that is no such object, with all before it answered.
    """
    number = 0
    for batch in _waiting(lines, 1 if chat.options.temperature > 0 else BATCH):
        records: list[dict[str, Any]] = []
        problem = None
        for line in batch:
            try:
                records.append(_record(line, number + len(records) + 1) if jsonl else {"prompt": line.strip()})
            except InputError as error:
                problem = error
                break
        asked = [place for place, record in enumerate(records) if record["prompt"]]
        answers = [Answer("")] * len(records)
        conversations = [chat.messages(records[place]["prompt"]) for place in asked]
        for place, answer in zip(asked, chat.answer(conversations, number) if asked else [], strict=True):
            answers[place] = answer
        for record, answer in zip(records, answers, strict=True):
            told = {**record, "answer": answer.text, "flagged": answer.flagged, "score": answer.score}
            out.write((json.dumps(told, ensure_ascii=False) if jsonl else " ".join(answer.text.split())) + "\n")
            if notes is not None:
                notes.write(f"gate {'–' if answer.score is None else format(answer.score, '.4f')}\n")
        out.flush()
        number += len(records)
        if problem is not None:
            raise problem


def _record(line: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"standard input, line {number}: found text that is not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise InputError(
            f"standard input, line {number}: expected an object with a text under 'prompt', found {line.strip()[:80]}"
        )
    return record


def _waiting(lines: Iterable[str], most: int) -> Iterator[list[str]]:
    """The lines as they come, those that wait already together, at most `most` at a time."""
    arrived: queue.Queue[str | BaseException | None] = queue.Queue(maxsize=4 * most)

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
        while batch[-1] is not None and len(batch) < most and not arrived.empty():
            batch.append(arrived.get())
        texts = [line for line in batch if isinstance(line, str)]
        if texts:
            yield texts
        if isinstance(batch[-1], UnicodeDecodeError):
            raise InputError(f"standard input is not UTF-8 text (byte {batch[-1].start})")
        if isinstance(batch[-1], BaseException):
            raise batch[-1]
        if batch[-1] is None:
            return
