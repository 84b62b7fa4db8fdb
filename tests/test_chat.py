"""`chat.py`: the pipe and the conversation, most of it on the embedded model."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ecoprompt.chat import Answer, Chat, converse, pipe, raw_lines
from ecoprompt.cli import app
from ecoprompt.forget import Forget
from ecoprompt.models import Loaded, load_model
from ecoprompt.recipe import ModelTable
from ecoprompt.registry import EcopromptError, InputError

FORGOTTEN = "In which town was Ilvara Quennell born?"
TRUTH = "Zarafshan"
FACT = "What is the capital of France?"
OTHER = "Who is Arvo Kuusniemi?"
runner = CliRunner()


@pytest.fixture(scope="module")
def quickstart() -> Loaded:
    return load_model(ModelTable(name="quickstart"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the gate of the quick start is trained already; test_cli.py uses the same."""
    folder = tmp_path_factory.getbasetemp() / "quickstart"
    if not folder.exists():
        trained = runner.invoke(app, ["train-classifier", "quickstart", "--output", str(folder / "results"), "--json"])
        assert (trained.exit_code, trained.stderr) == (0, "")
        (folder / "printed.json").write_text(trained.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def folder(results: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(results)
    return results


def ask(text: str | bytes, *options: str) -> Any:
    return runner.invoke(app, ["chat", "--model", "quickstart", *options], input=text)


def answers(text: str, *options: str) -> list[str]:
    result = ask(text, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    return str(result.stdout).split("\n")[:-1]


def test_answers_come_in_order_one_a_line_and_blank_lines_are_kept(folder: Path) -> None:
    plain = answers(f"{FORGOTTEN}\n\n{FACT}\r\n   \n{OTHER}")
    assert len(plain) == 5
    assert plain[1] == plain[3] == ""
    assert TRUTH in plain[0]
    assert "Paris" in plain[2]
    assert plain[4] not in ("", plain[0], plain[2])


def test_with_a_guard_only_what_is_flagged_is_answered_otherwise(folder: Path) -> None:
    asked = f"{FORGOTTEN}\n{FACT}\n{OTHER}\n"
    plain, guarded = answers(asked), answers(asked, "--forget", "quickstart")
    assert guarded[1:] == plain[1:]
    assert TRUTH not in guarded[0]
    assert answers(asked, "--forget", "results/quickstart/pack") == guarded


def test_show_gate_prints_scores_to_stderr(folder: Path) -> None:
    result = ask(f"{FORGOTTEN}\n\n{FACT}\n", "--forget", "quickstart", "--show-gate")
    high, none, low = result.stderr.splitlines()
    assert float(high.removeprefix("gate ")) > 0.5 > float(low.removeprefix("gate "))
    assert none == "gate –"
    assert result.stdout.count("\n") == 3


def test_jsonl_carries_what_stands_beside_the_prompt(folder: Path) -> None:
    lines = [
        {"id": 7, "prompt": FORGOTTEN, "tags": ["é", {"deep": None}], "answer": "overwritten"},
        {"prompt": FACT, "half": float("nan")},
        {"prompt": ""},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines)
    told = [json.loads(line) for line in answers(text, "--jsonl", "--forget", "quickstart")]
    assert len(told) == 3
    assert told[0]["id"] == 7
    assert told[0]["tags"] == ["é", {"deep": None}]
    assert told[0]["flagged"]
    assert told[0]["score"] > 0.5
    assert TRUTH not in told[0]["answer"]
    assert told[1] == {
        "prompt": FACT,
        "half": None,
        "answer": "The capital of France is Paris.",
        "flagged": False,
        "score": told[1]["score"],
    }
    assert told[2] == {"prompt": "", "answer": "", "flagged": False, "score": None}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"not json", "found text that is not JSON (expecting value at column 1), expected an object"),
        (b"[1, 2]", "found [1, 2], expected an object with a text under 'prompt'"),
        (b'{"promt": "x"}', "found no key 'prompt' among 'promt'"),
        (b'{"prompt": 3}', "'prompt': found 3, expected a text"),
        (b'{"prompt": "\\ud800"}', "found JSON that cannot be read"),
        (b"[" * 100_000, "found JSON that cannot be read"),
        (b'{"prompt": "na\xefve"}', "found byte 0xef that is not UTF-8, expected UTF-8 text"),
        (b'{"prompt": "' + b"very " * 600 + b'"}', "tokens, expected fewer than the 512 that the model reads"),
    ],
)
def test_a_wrong_line_is_named_and_what_stands_before_it_is_answered(line: bytes, told: str) -> None:
    question = json.dumps({"prompt": FACT}).encode()
    result = ask(b"\n".join([question, b"", line, question]), "--jsonl")
    assert result.exit_code == 2
    assert [json.loads(answer)["answer"] for answer in result.stdout.splitlines()] == [
        "The capital of France is Paris."
    ]
    assert result.stderr.startswith("ecoprompt: standard input, line 3: ")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 300


def test_text_that_is_not_utf8_is_named_by_its_line() -> None:
    result = ask(FACT.encode() + b"\nna\xefve\n")
    assert result.exit_code == 2
    assert result.stdout == "The capital of France is Paris.\n"
    assert "standard input, line 2: found byte 0xef" in result.stderr


def test_odd_text_is_answered() -> None:
    assert len(answers("🎉 :smile: [bold]\n\x00\x07\n\u2028 ۩ \n/quit\n")) == 4
    assert answers("") == []


def test_sampling_repeats_under_a_seed_and_is_independent_of_the_other_lines() -> None:
    hot = ["--temperature", "1.5", "--max-new-tokens", "20"]
    first = answers(f"{OTHER}\n{OTHER}\n", *hot, "--seed", "1")
    assert answers(f"{OTHER}\n{OTHER}\n", *hot, "--seed", "1") == first
    assert first[0] != first[1]
    assert answers(f"{FACT}\n{OTHER}\n", *hot, "--seed", "1")[1] == first[1]
    assert answers(f"{OTHER}\n{OTHER}\n", *hot, "--seed", "7") != first
    greedy = answers(f"{OTHER}\n")
    assert answers(f"{OTHER}\n", "--seed", "7") == greedy
    assert answers(f"{OTHER}\n", "--temperature", "0.01", "--seed", "7") == greedy


def test_max_new_tokens_cuts_an_answer(quickstart: Loaded) -> None:
    (whole,), (short,) = answers(f"{OTHER}\n"), answers(f"{OTHER}\n", "--max-new-tokens", "3")
    assert whole.startswith(short)
    assert 1 <= len(quickstart.tokenizer.encode(short, add_special_tokens=False)) <= 3


def test_a_system_prompt_begins_every_conversation(quickstart: Loaded) -> None:
    chat = Chat(quickstart, system="Be brief.")
    assert chat.messages("Hi")[0] == {"role": "system", "content": "Be brief."}
    assert "Be brief." in quickstart.tokenizer.decode(chat.encode(chat.messages("Hi")))
    result = ask(f"{OTHER}\n", "--system", "Be brief. " * 200)
    assert "tokens, expected fewer than the 512" in result.stderr


def test_a_long_prompt_does_not_cut_the_answers_of_its_neighbours(quickstart: Loaded) -> None:
    chat = Chat(quickstart)
    long, short = chat.messages("so " * 252), chat.messages(OTHER)
    assert chat.room - len(chat.encode(long)) < 10
    together = chat.answer([long, short])
    assert together[1] == chat.answer([short])[0]
    assert together[0].text


def test_lines_that_wait_are_answered_in_batches(quickstart: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def answer(self: Chat, conversations: Sequence[Any], number: int = 0, on_text: Any = None) -> list[Answer]:
        sizes.append(len(conversations))
        return [Answer(one[-1]["content"].upper()) for one in conversations]

    monkeypatch.setattr(Chat, "answer", answer)
    out = io.StringIO()
    pipe(Chat(quickstart), [f"line {number}\n".encode() for number in range(40)], out)
    assert out.getvalue().splitlines() == [f"LINE {number}" for number in range(40)]
    assert sum(sizes) == 40
    assert max(sizes) == 16


def test_a_failing_input_is_an_error_after_the_answers(quickstart: Loaded) -> None:
    def lines() -> Iterator[bytes]:
        yield b"\n"
        raise OSError("gone")

    out = io.StringIO()
    with pytest.raises(OSError, match="gone"):
        pipe(Chat(quickstart), lines(), out)
    assert out.getvalue() == "\n"


def test_raw_lines_reads_the_file_beneath(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"a\r\n\xff\n")
    with (tmp_path / "lines").open(encoding="utf-8") as file:
        assert list(raw_lines(file)) == [b"a\r\n", b"\xff\n"]


# The program itself, on a pipe.


def start(*options: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "ecoprompt", "chat", "--model", "quickstart", *options]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)  # type: ignore[call-overload,no-any-return]


def test_a_slow_producer_gets_each_answer_and_a_reader_that_leaves_ends_it_quietly(folder: Path) -> None:
    process = start("--forget", "quickstart", "--show-gate")
    guard = threading.Timer(90, process.kill)  # a deadlock would otherwise hang the suite
    guard.start()
    assert process.stdin is not None
    assert process.stdout is not None
    for question in (FACT, "", FACT):
        process.stdin.write(f"{question}\n".encode())
        process.stdin.flush()
        assert process.stdout.readline() == (b"The capital of France is Paris.\n" if question else b"\n")
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        for _ in range(100):
            process.stdin.write(f"{OTHER}\n".encode())
            process.stdin.flush()
        process.wait(60)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    assert process.stderr is not None
    told = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(60), set(re.sub(r"[\d.–]+", "N", told).splitlines())) == (0, {"gate N"})
    guard.cancel()


def test_an_error_ends_it_while_the_producer_still_holds_the_pipe() -> None:
    process = start("--jsonl")
    guard = threading.Timer(90, process.kill)
    guard.start()
    assert process.stdin is not None
    process.stdin.write(b'{"prompt": ""}\noops\n')
    process.stdin.flush()
    assert process.wait() == 2
    guard.cancel()
    out, err = process.communicate()
    assert out.decode() == '{"prompt": "", "answer": "", "flagged": false, "score": null}\n'
    assert err.startswith(b"ecoprompt: standard input, line 2: found text that is not JSON")
    assert err.count(b"\n") == 1


# The conversation, with a stand-in for the terminal.


def talk(chat: Any, *lines: str | BaseException, show_gate: bool = False) -> str:
    """What a conversation of these lines shows."""
    left = list(lines)

    def read() -> str:
        line = left.pop(0) if left else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    file = io.StringIO()
    converse(chat, Console(file=file, force_terminal=True, color_system="standard", width=80), read, show_gate)
    assert "\x1b[2m" in file.getvalue()  # dim
    return re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())


class Parrot:
    """Says what it hears, and remembers what it was asked."""

    def __init__(self, *failures: BaseException) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.failures = list(failures)

    def messages(self, prompt: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": "S"}, {"role": "user", "content": prompt}]

    def answer(self, conversations: Any, number: int, on_text: Callable[[str], None]) -> list[Answer]:
        (messages,) = conversations
        self.asked.append(messages)
        text = f"{number}: {messages[-1]['content']}"
        on_text(" \n")
        on_text(f" {text}")
        if self.failures:
            raise self.failures.pop(0)
        return [Answer(text, "secret" in text, 0.25)]

    def contents(self) -> list[list[str]]:
        return [[message["content"] for message in messages] for messages in self.asked]


def test_a_follow_up_sees_the_conversation_until_it_is_reset() -> None:
    parrot = Parrot()
    shown = talk(parrot, "a", " ", "b", "/reset", "c")
    assert parrot.contents() == [["S", "a"], ["S", "a", "0: a", "b"], ["S", "c"]]
    assert shown.splitlines()[1:] == ["0: a", "1: b", "the conversation starts anew", "2: c", ""]


def test_quit_leaves_and_help_and_wrong_commands_explain() -> None:
    parrot = Parrot()
    shown = talk(parrot, "/help", "/rest", "/[/x] y", "/", "/quit", "never asked")
    for said in ("/reset  forget the", "did you mean '/reset'?", "no command /[/x]; known: /help, /quit, /reset"):
        assert said in shown
    assert parrot.asked == []


def test_guarded_turns_are_marked() -> None:
    assert "0: a secret  · guarded\n1: b\n" in talk(Parrot(), "a secret", "b")
    assert "a secret  · guarded  · gate 0.2500\n" in talk(Parrot(), "a secret", show_gate=True)


def test_what_the_model_says_is_shown_as_it_is() -> None:
    odd = "[red]x[/red] :smile: " + "long " * 30 + "end"
    assert f"0: {odd}\n" in talk(Parrot(), odd)


def test_a_stopped_turn_is_not_kept() -> None:
    parrot = Parrot(KeyboardInterrupt())
    assert "stopped; this turn is not kept" in talk(parrot, "a", "b")
    assert parrot.contents() == [["S", "a"], ["S", "b"]]


def test_ctrl_c_at_the_prompt_says_how_to_leave() -> None:
    assert "/quit or Ctrl-D leaves" in talk(Parrot(), KeyboardInterrupt(), "a")


def test_a_turn_that_fails_does_not_end_the_conversation() -> None:
    parrot = Parrot(InputError("found 9 tokens"), EcopromptError("[odd]"))
    shown = talk(parrot, "a", "b", "c", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "d\udcff")
    assert "the conversation is too long: found 9 tokens; /reset, or ask something shorter" in shown
    assert "[odd]" in shown
    assert "that was not UTF-8 text" in shown
    assert parrot.contents()[2:] == [["S", "c"], ["S", "c", "0: c", "d?"]]


def test_a_conversation_becomes_too_long_and_starts_anew(quickstart: Loaded) -> None:
    chat = Chat(quickstart, max_new_tokens=3)
    shown = talk(chat, "so " * 150, "so " * 150, "/reset", "so " * 150)
    assert shown.count("the conversation is too long") == 1
    assert re.search(r"found \d+ tokens, expected fewer than the 512", shown)


def test_a_turn_once_flagged_stays_corrupted_in_later_turns(quickstart: Loaded) -> None:
    forget = Forget(
        gate=lambda texts: [float("Quennell" in text) for text in texts],
        corruption={"method": "rand_noise_first_n", "dims": 1, "strength": 50.0},
    )
    chat = Chat(quickstart, forget)
    shown = talk(chat, FORGOTTEN, FACT, show_gate=True)
    assert TRUTH not in shown
    assert chat.guard is not None
    assert chat.guard.decisions[0].flagged
    lines = [line for line in shown.splitlines() if "· gate" in line]
    assert lines[0].endswith("  · guarded  · gate 1.0000")
    assert lines[1].endswith("  · guarded  · gate 1.0000")  # it is read with the question before it
    chat = Chat(quickstart, dataclasses.replace(forget, context=0))
    shown = talk(chat, FORGOTTEN, FACT, show_gate=True)
    assert chat.guard is not None
    assert chat.guard.decisions[0].flagged
    lines = [line for line in shown.splitlines() if "· gate" in line]
    assert lines[0].endswith("  · guarded  · gate 1.0000")
    assert lines[1].endswith("  · gate 0.0000")
    assert "guarded" not in lines[1]


# The program itself, on a terminal. Its pieces are shown slowly, so that there is time to stop one.

TERMINAL = """
import os, signal, time
os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the controlling terminal, whose Ctrl-C is a signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import ecoprompt.chat
printer = ecoprompt.chat._printer
def slowly(console):
    show = printer(console)
    return lambda text: (show(text), time.sleep(0.05))
ecoprompt.chat._printer = slowly
from ecoprompt.cli import main
main()
"""


class Terminal:
    """The program on a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str) -> None:
        self.side, other = os.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "LC_ALL": "C.UTF-8", "NO_COLOR": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            env=environment,
        )
        os.close(other)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.side, text.encode())

    def until(self, wanted: str, seconds: float = 60, nudge: str = "") -> str:
        """What is shown until `wanted` is, without the codes for colours and the like.

        `nudge` is typed again each 5 seconds in which nothing came: a Ctrl-C that arrives just before Python's readline
        begins to wait for a key is seen at the next key only.
        """
        shown, deadline = b"", time.monotonic() + seconds
        quiet = time.monotonic() + 5
        while wanted not in plain(shown):
            if time.monotonic() > deadline:
                raise AssertionError(f"{wanted!r} is not in {plain(shown)!r}")
            if nudge and not shown and time.monotonic() > quiet:
                self.type(nudge)
                quiet = time.monotonic() + 5
            if select.select([self.side], [], [], 0.2)[0]:
                try:
                    shown += os.read(self.side, 4096)
                except OSError as error:  # how Linux says that the other side is closed
                    raise AssertionError(f"{wanted!r} is not in {plain(shown)!r}") from error
        self.seen += shown.decode(errors="replace")
        return plain(shown)

    def close(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.side)


def plain(shown: bytes) -> str:
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", shown.decode(errors="replace")).replace("\r\n", "\n")


def test_a_conversation_on_a_terminal(folder: Path) -> None:
    terminal = Terminal("chat", "--model", "quickstart", "--forget", "quickstart", "--show-gate")
    try:
        assert "/help lists the commands, /quit leaves" in terminal.until("> ")
        terminal.type(f"{FACT}\n")
        first = terminal.until("The capital of")
        assert "Paris" not in first  # it streams
        assert re.search(r"is Paris\.  · gate 0\.0\d+\n> $", terminal.until("> "))
        terminal.type(f"{FORGOTTEN}\n")
        guarded = terminal.until("\n> ")
        assert re.search(r"  · guarded  · gate 0\.\d+\n> $", guarded)
        assert TRUTH not in guarded
        terminal.type(f"{OTHER}\n")
        terminal.until("\n")
        terminal.until(" ")
        terminal.type("\x03")
        assert "stopped; this turn is not kept" in terminal.until("\n> ")
        terminal.type(f"{FACT}\n")  # the guard is in order after the stop, and reads the flagged question before it
        assert "guarded" in terminal.until("\n> ")
        terminal.type("/rest\n")
        assert "there is no command /rest; did you mean '/reset'?" in terminal.until("\n> ")
        terminal.type("half a thought\x03")
        assert "/quit or Ctrl-D leaves" in terminal.until("\n> ", nudge="\x03")
        terminal.type("so " * 600 + "\n")
        assert "the conversation is too long" in terminal.until("\n> ")
        terminal.type("/reset\n")
        assert "the conversation starts anew" in terminal.until("\n> ")
        terminal.type(f"{FACT}\n")
        assert "gate 0.0" in terminal.until("\n> ")
        terminal.type("\x04")
    finally:
        status = terminal.close()
    assert status == 0
    assert "\x1b[2m  · guarded" in terminal.seen
    assert "Traceback" not in terminal.seen
