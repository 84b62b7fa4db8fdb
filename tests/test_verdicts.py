"""Verdicts: each prompt is put to gate and token selector once, by however many guards and threads."""

from __future__ import annotations

import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_tokenizer

from ecoprompt import Forget, Guard, InputError
from ecoprompt.registry import selectors
from ecoprompt.verdicts import Verdicts

SECRET, PLAIN, SHORT = "Who is Harry Potter?", "What is the capital of France?", "Paris"
NOISE = {"method": "rand_noise_first_n", "dims": 4, "strength": 50.0}
OTHERS = [{**NOISE, "strength": 2.0}, {"method": "zero_out_top_k", "dims": 8}, {**NOISE, "dims": 1}]


@pytest.fixture
def gated():
    """The texts that the gate was asked about."""
    return []


@pytest.fixture
def selected(monkeypatch):
    """The texts that the token selector was asked about."""
    found = []

    def counted(text):
        found.append(text)
        return [(0, len(text))]

    monkeypatch.setitem(selectors._items, "counted", counted)
    return found


@pytest.fixture
def forget(gated, selected, keyword_gate):
    tokens = {"select": "counted", "scope": "sequence"}
    return Forget(lambda texts: gated.extend(texts) or keyword_gate(texts), NOISE, tokens=tokens)


def guards_of(model, tokenizer, forget):
    """Guards that share their verdicts and differ in corruption and seed, and the verdicts."""
    shared = Verdicts(forget, tokenizer)
    specs = [dataclasses.replace(forget, corruption=one, seed=seed) for seed, one in enumerate(OTHERS)]
    return [Guard(model, tokenizer, spec, shared) for spec in [forget, *specs]], shared


def test_guards_that_share_ask_gate_and_selector_once(model, tokenizer, forget, gated, selected):
    guards, _ = guards_of(model, tokenizer, forget)
    ids = torch.tensor([tokenizer.encode(SECRET)])
    found = []
    for guard in guards:
        with guard, torch.no_grad():
            found.append(model(ids).logits)
            model.generate(ids, max_new_tokens=2, do_sample=False)
        assert guard.decisions == guards[0].decisions
    assert gated == [SECRET]
    assert selected == [SECRET]
    assert not any(torch.equal(one, found[0]) for one in found[1:])  # each corrupts in its own way


def test_an_answer_is_put_to_the_selector_once(model, tokenizer, forget, gated, selected):
    guards, _ = guards_of(model, tokenizer, forget)
    heads = [tokenizer.encode(SECRET), tokenizer.encode(PLAIN)]
    answers = [" He lives in a cupboard", " No one"]
    for guard in guards:
        for answer in answers:
            for head in heads:
                with guard, guard.prompt_lengths([len(head)]), torch.no_grad():
                    model(torch.tensor([head + tokenizer.encode(answer)]))
                (decision,) = guard.decisions
                reaches_answer = any(position >= len(head) for position in decision.positions)
                assert decision.flagged == reaches_answer == (head is heads[0])
    assert gated == [SECRET, PLAIN]
    assert selected == [SECRET, *(SECRET + answer for answer in answers)]


def test_an_answer_is_decided_by_where_its_prompt_ends(tokenizer, keyword_gate):
    shared = Verdicts(Forget(keyword_gate, NOISE, tokens={"scope": "sequence"}), tokenizer)
    ids = tokenizer.encode(f"{SECRET} {SHORT}")
    for length in (len(tokenizer.encode(SECRET)), len(ids) - 1, len(ids)):
        (decision,) = shared.decide([ids[:length]])
        expected = shared.forget.extend(tokenizer, decision, ids, length)
        assert [shared.extend(decision, ids, length) for _ in range(2)] == [expected] * 2


def test_the_oldest_are_forgotten(tokenizer, forget, gated, selected):
    shared = Verdicts(forget, tokenizer, 2)
    secret, plain, short = ([tokenizer.encode(text)] for text in (SECRET, PLAIN, SHORT))
    for prompts in (secret, plain, secret, short, secret, plain):
        shared.decide(prompts)
    assert gated == [SECRET, PLAIN, SHORT, PLAIN]
    assert [decision.flagged for decision in shared.decide(secret + plain + short)] == [True, False, False]
    (decision,) = shared.decide(secret)
    selected.clear()
    answers = [secret[0] + tokenizer.encode(text) for text in (" a", " b", " c")]
    for ids in (*answers, answers[2], answers[0]):
        shared.extend(decision, ids, len(secret[0]))
    assert selected == [SECRET + text for text in (" a", " b", " c", " a")]


def test_what_one_guard_overrules_is_flagged_for_all(model, tokenizer):
    gate = lambda texts: [float("Potter" in text or text.endswith("Rowling")) for text in texts]  # noqa: E731
    forget = Forget(gate, NOISE, tokens={"scope": "sequence"})
    (one, two, *_), shared = guards_of(model, tokenizer, forget)
    prompts = [tokenizer.encode(text) for text in (SECRET, PLAIN)]
    before = two.decide(prompts)
    assert [decision.flagged for decision in before] == [True, False]
    row = prompts[0] + tokenizer.encode(SHORT)
    extended = shared.extend(before[0], row, len(prompts[0]))
    assert one.overrule(prompts[1:], ["By Rowling"]) == [True]
    after = two.decide(prompts)
    assert [decision.flagged for decision in after] == [True, True]
    assert shared.extend(after[0], row, len(prompts[0])) == extended


def test_a_decision_that_is_overruled_while_it_is_made_is_not_remembered(tokenizer):
    asked, overruled = threading.Event(), threading.Event()

    def gate(texts):
        if list(texts) == [PLAIN] and not asked.is_set():
            asked.set()
            assert overruled.wait(60)
        return [float("Rowling" in text) for text in texts]

    shared, prompts = Verdicts(Forget(gate, NOISE), tokenizer), [tokenizer.encode(PLAIN)]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(shared.decide, prompts)
        assert asked.wait(60)
        assert shared.overrule(prompts, ["Rowling"]) == [True]
        overruled.set()
        first.result(60)
    assert shared.decide(prompts)[0].flagged


def test_threads_share_what_is_remembered(tokenizer, forget, gated):
    texts = [f"{name} {number}?" for number in range(20) for name in ("Who is Potter", "Where is Paris")]
    prompts = [tokenizer.encode(text) for text in texts]

    def work(shared, number):
        found = []
        for turn in range(40):
            some = [(number * 7 + turn * 3 + step) % len(prompts) for step in range(5)]
            found += zip(some, shared.decide([prompts[one] for one in some]), strict=True)
        return found

    for most in (len(texts), 3):  # with room for all, and with hardly any
        shared = Verdicts(forget, tokenizer, most)
        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(functools.partial(work, shared), range(8)):
                assert all(decision.text == texts[one] for one, decision in found)
                assert all(decision.flagged == ("Potter" in texts[one]) for one, decision in found)
    assert set(gated) == set(texts)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"threshold": 0.7}, "threshold"),
        ({"tokens": "all"}, "tokens"),
        ({"context": 0}, "context"),
        ({"check": "answer"}, "check"),
        ({"gate": lambda texts: [0.0 for _ in texts]}, "gate"),
        ({"threshold": 0.7, "context": 0}, "threshold, context"),
    ],
)
def test_verdicts_of_another_spec_are_refused(model, tokenizer, forget, changes, named):
    other = dataclasses.replace(forget, **changes)
    with pytest.raises(InputError, match=f"another {named};"):
        Guard(model, tokenizer, other, Verdicts(forget, tokenizer))


def test_verdicts_of_another_tokenizer_are_refused(model, tokenizer, forget):
    with pytest.raises(InputError, match="another tokenizer"):
        Guard(model, make_tokenizer(), forget, Verdicts(forget, tokenizer))


def test_the_same_function_is_the_same_gate(model, tokenizer, keyword_gate):
    one, two = (Forget(keyword_gate, corruption, seed=seed) for seed, corruption in enumerate(OTHERS[:2]))
    assert Guard(model, tokenizer, two, Verdicts(one, tokenizer)).forget is two
