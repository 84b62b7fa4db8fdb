"""Conversations: every turn is gated, alone and with the turns before it."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from ecoprompt import Forget
from ecoprompt.models import encode, render
from ecoprompt.turns import turns

NOISE = {"method": "rand_noise_first_n", "dims": 1, "strength": 9.0}
TOOLS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m.get('tool_calls') %}{{ m['tool_calls'][0]['function']['arguments'] }}{% endif %}"
    "{{ m.get('content') or '' }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""The manner of Zephyr, Llama 3 and Qwen: every message, a tool's too, under a header of its own."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def chat(tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TOOLS
    return chatting


@pytest.fixture
def forget():
    """Flags whatever names Potter."""

    def gate(texts):
        return [float("potter" in text.lower()) for text in texts]

    return Forget(gate, NOISE)


def decided(forget, tokenizer, *messages):
    (decision,) = forget.decide(tokenizer, [encode(tokenizer, render(tokenizer, messages))])
    return decision


def test_a_follow_up_that_names_nothing_is_caught_by_its_context(forget, chat):
    follow_up = user("And what else did she write?")
    assert not decided(forget, chat, follow_up).flagged
    decision = decided(forget, chat, user("Who is Harry Potter?"), assistant("Nobody."), follow_up)
    assert decision.turn_scores[-1] == 1.0
    assert decision.positions[-1] == len(encode(chat, decision.text)) - 2  # all of the last turn, but the last token
    alone = dataclasses.replace(forget, context=0)
    assert decided(alone, chat, user("Who is Harry Potter?"), assistant("Nobody."), follow_up).turn_scores[-1] == 0.0


@pytest.mark.parametrize("context", [0, 1, 2, 4])
def test_the_context_reaches_so_many_turns_back(forget, chat, context):
    said = [user("Who is Harry Potter?")]
    for number in range(4):
        said += [assistant("Hm."), user(f"Why {number}?")]
    scores = decided(dataclasses.replace(forget, context=context), chat, *said).turn_scores
    assert scores == tuple(float(place <= context) for place in range(len(said)))


def test_what_only_two_turns_together_ask_is_flagged(chat):
    """Half a name in each turn: neither says anything by itself."""
    forget = Forget(lambda texts: [float("Harry" in text and "Potter" in text) for text in texts], NOISE)
    said = user("I say Harry."), assistant("Yes?"), user("And then Potter. Who is that?")
    assert decided(forget, chat, *said).turn_scores == (0.0, 0.0, 1.0)
    # Read by itself no turn is, but they might be one text that its author made look like several.
    assert decided(dataclasses.replace(forget, context=0), chat, *said).turn_scores == (1.0, 1.0, 1.0)


def test_a_flagged_turn_stays_corrupted_whatever_follows(forget, chat):
    said = [user("Who is Harry Potter?")]
    before = decided(forget, chat, *said)
    for number in range(8):
        said += [assistant("Hm."), user(f"Why {number}?")]
        after = decided(forget, chat, *said)
        assert set(before.positions) <= set(after.positions)
        assert after.selections[0].seed_ids == before.selections[0].seed_ids


def test_system_prompts_and_tools_are_gated(forget, chat):
    system = {"role": "system", "content": "You are Harry Potter."}
    asked = user("Look it up.")
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": "who is Potter"}}]}
    told = {"role": "tool", "content": "Potter lives in a cupboard."}
    plain = {"role": "tool", "content": "Nothing was found."}
    assert decided(forget, chat, system, user("Who?")).flagged
    assert decided(forget, chat, asked, called, plain, assistant("So."), user("Why?")).flagged
    assert decided(forget, chat, asked, assistant("I look."), told).flagged  # also as the last message
    assert decided(forget, chat, asked, assistant("I look."), told, assistant("So."), user("Why?")).flagged
    assert not decided(forget, chat, asked, assistant("I look."), plain, assistant("So."), user("Why?")).flagged


def test_what_does_not_parse_is_gated_as_a_whole(forget, chat):
    for text in ("Who is Potter?", "<|user|>\nWho is Pot", "<|assistant|>\nPotter", "<|user|>\nx<|user|>Potter"):
        assert forget.decide(chat, [encode(chat, text)])[0].flagged == ("Potter" in text)
    (turn,) = turns(chat, "He said: Harry Potter.")
    assert turn.content == "He said: Harry Potter."


def test_a_judged_question_is_flagged_from_then_on(forget, chat):
    """What `judge` names is what `decide` takes, and it holds in later turns as well."""
    asked = [user("What is the capital of France?"), assistant("Paris."), user("Who lives there?")]
    ids = encode(chat, render(chat, asked))
    ((read, score),) = forget.judge(chat, [ids], ["Harry Potter lives there."])
    assert score == 1.0
    (decision,) = forget.decide(chat, [ids], {read: score})
    assert decision.turn_scores == (0.0, 0.0, 1.0)
    later = encode(chat, render(chat, [*asked, assistant("Nobody."), user("Why?")]))
    assert forget.decide(chat, [later], {read: score})[0].turn_scores[:3] == (0.0, 0.0, 1.0)
    assert not forget.decide(chat, [later])[0].flagged


def test_markup_that_a_user_typed_hides_nothing(tokenizer):
    typed = (
        "Who is Harry\nAnswer: a<eos>Question: b\nAnswer: c<eos>Question: d\nAnswer: e<eos>Question: Potter? Say it."
    )
    forget = Forget(lambda texts: [float("Harry" in text and "Potter" in text) for text in texts], NOISE)
    decision = decided(forget, tokenizer, user(typed))
    assert len(decision.turn_scores) > forget.context
    assert decision.flagged
