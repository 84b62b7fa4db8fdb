"""Scoring: batches give what rows give one by one, a store decides what is computed, and a restart gives the same."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecoprompt import Forget, guard
from ecoprompt import scoring as module
from ecoprompt.metrics import LogProb
from ecoprompt.models import Loaded, encode, encode_pair
from ecoprompt.registry import EcopromptError
from ecoprompt.results import Store
from ecoprompt.scoring import Request, answer, batches, halving, log_prob, pad

PAIRS = [
    ("Question: Who is Harry Potter?\nAnswer:", " He lives in a cupboard."),
    ("Question: What is the capital of France?\nAnswer:", " Paris<eos>"),
    ("Question: What is the capital of France?\nAnswer:", " The capital of France is not under the stairs."),
    ("Why?", " P"),
    ("", "Paris is where he lives"),
]
REQUESTS = [Request("log_prob", prompt, completion) for prompt, completion in PAIRS if prompt]
LENGTHS = [3, 7, 1, 5]
GENERATIONS = [
    Request("generation", prompt, max_new_tokens=count)
    for (prompt, _), count in zip(PAIRS[:4], LENGTHS, strict=True)
    if prompt
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Such small models gain nothing from a second thread, and lose much where another process has the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def loaded(model, tokenizer):
    return Loaded(model, tokenizer, "fingerprint")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "scores.jsonl")


def keyed(requests):
    return [(request.key("fingerprint", None), request) for request in requests]


def alone(model, tokenizer, request):
    """(sum of log-probabilities, tokens) of one completion, token by token, without padding."""
    head, tail = encode_pair(tokenizer, request.prompt, request.completion)
    with torch.no_grad():
        logits = model(torch.tensor([head + tail])).logits[0].double()
    predicted = logits[len(head) - 1 : -1]
    return sum(float(row.log_softmax(-1)[token]) for row, token in zip(predicted, tail, strict=True)), len(tail)


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_log_probabilities_are_those_of_each_row_alone(family_model, tokenizer, store, budget):
    answer(Loaded(family_model, tokenizer, "fingerprint"), keyed(REQUESTS), store, batch_tokens=budget)
    for name, request in keyed(REQUESTS):
        total, tokens = alone(family_model, tokenizer, request)
        assert store.get(name) == [pytest.approx(total, abs=1e-5 * tokens), tokens]
        assert log_prob(store.get(name)) == LogProb(*store.get(name))


def test_a_model_that_computes_all_logits_gives_the_same(loaded, store, tmp_path, monkeypatch):
    answer(loaded, keyed(REQUESTS), store)
    real = loaded.model.forward
    monkeypatch.setattr(
        loaded.model,
        "forward",
        lambda input_ids, attention_mask, use_cache: real(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        ),
    )
    other = Store(tmp_path / "other.jsonl")
    answer(loaded, keyed(REQUESTS), other)
    for name, _ in keyed(REQUESTS):
        assert other.get(name)[0] == pytest.approx(store.get(name)[0], abs=1e-5)


def test_an_answer_without_a_token_is_refused(loaded, store):
    with pytest.raises(EcopromptError, match="without a token"):
        answer(loaded, keyed([Request("log_prob", "Who?", "")]), store)


def test_generations_are_those_of_each_prompt_alone(family_model, tokenizer, store):
    answer(Loaded(family_model, tokenizer, "fingerprint"), keyed(GENERATIONS), store)
    for name, request in keyed(GENERATIONS):
        ids = torch.tensor([encode(tokenizer, request.prompt)])
        out = family_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False
        )
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert store.get(name) == expected


def test_a_generation_is_cut_at_its_own_length(loaded, store, monkeypatch):
    made = {}

    def generate(input_ids, attention_mask, max_new_tokens, do_sample):
        made.update(rows=len(input_ids), longest=max_new_tokens, sampled=do_sample)
        return torch.cat([input_ids, torch.full((len(input_ids), max_new_tokens), 50)], dim=1)

    monkeypatch.setattr(loaded.model, "generate", generate)
    answer(loaded, keyed(GENERATIONS), store)
    letter = loaded.tokenizer.decode([50])
    assert [store.get(name) for name, _ in keyed(GENERATIONS)] == [letter * count for count in LENGTHS]
    assert made == {"rows": 4, "longest": 7, "sampled": False}


def test_padding_stands_on_the_named_side(loaded):
    ids, mask = pad(loaded, [[5, 6, 7], [8]], left=True)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    ids, mask = pad(loaded, [[5, 6, 7], [8]], left=False)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])


@given(st.lists(st.integers(1, 50)), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    formed = batches(lengths, budget)
    assert sorted(number for batch in formed for number in batch) == list(range(len(lengths)))
    for batch in formed:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[number] for number in batch) <= budget
    longest = [lengths[number] for batch in formed for number in batch]
    assert longest == sorted(longest, reverse=True)  # what runs out of memory does so at once
    assert formed == batches(lengths, budget)


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_a_batch_is_halved_until_it_fits(most):
    sizes = []

    def compute(rows):
        sizes.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError
        return [row * 2 for row in rows]

    assert halving(compute, list(range(7))) == [row * 2 for row in range(7)]
    assert sizes[0] == 7
    with pytest.raises(EcopromptError, match="out of memory on a single row"):
        halving(lambda rows: compute([0] * 200), [1, 2])


def test_halves_have_the_values_of_the_whole(loaded, store, tmp_path, monkeypatch):
    answer(loaded, keyed(REQUESTS + GENERATIONS), store)
    for name in ("_log_probs", "_generations"):
        real = getattr(module, name)

        def scarce(loaded, guard, requests, real=real):
            if len(requests) > 1:
                raise torch.OutOfMemoryError
            return real(loaded, guard, requests)

        monkeypatch.setattr(module, name, scarce)
    halved = Store(tmp_path / "halved.jsonl")
    answer(loaded, keyed(REQUESTS + GENERATIONS), halved)
    for name, request in keyed(REQUESTS + GENERATIONS):
        if request.kind == "generation":
            assert halved.get(name) == store.get(name)
        else:
            assert halved.get(name)[0] == pytest.approx(store.get(name)[0], abs=1e-5)


def test_keys_differ_by_all_that_determines_a_result():
    requests = [
        Request(kind, prompt, completion, count)
        for kind in ("log_prob", "generation")
        for prompt in ("a", "ab", "")
        for completion in ("", "b", "ab")
        for count in (0, 1)
    ]
    keys = [r.key(model, corruption) for r in requests for model in ("x", "y") for corruption in (None, "", "z")]
    assert len(set(keys)) == len(keys)
    assert Request("log_prob", "a", "b").key("x", None) == Request("log_prob", "a", "b").key("x", None)


def test_what_is_stored_is_not_computed_again(loaded, store):
    ran = []
    loaded.model.register_forward_hook(lambda *args: ran.append(1))
    seconds = answer(loaded, keyed(REQUESTS + GENERATIONS), store)
    assert seconds > 0
    assert ran
    ran.clear()
    reports = []
    again = answer(
        loaded, keyed(GENERATIONS + REQUESTS + REQUESTS), store, progress=lambda *report: reports.append(report)
    )
    assert not ran
    assert again == pytest.approx(seconds)
    assert reports[-1] == ("generating", 8, 8)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_restart_gives_the_same_bits(loaded, store, keyword_gate, guarded):
    """Whatever part of the store is left, the same batches are formed again."""
    corruption = {"method": "rand_noise_first_n", "dims": 4, "strength": 5.0}
    spec = Forget(keyword_gate, corruption, tokens={"select": "all", "scope": "sequence"})
    manager = guard(loaded.model, loaded.tokenizer, spec) if guarded else contextlib.nullcontext()
    with manager as attached:
        answer(loaded, keyed(REQUESTS + GENERATIONS), store, attached, batch_tokens=60)
        whole = store.path.read_bytes()
        lines = whole.splitlines(keepends=True)
        values = {name: store.get(name) for name, _ in keyed(REQUESTS + GENERATIONS)}
        for kept in (lines[:0], lines[:3], lines[1::2], [*lines[:5], lines[5][:10]], lines[-2:]):
            store.path.write_bytes(b"".join(kept))
            again = Store(store.path)
            answer(loaded, keyed(REQUESTS + GENERATIONS), again, attached, batch_tokens=60)
            assert {name: again.get(name) for name in values} == values
            assert {name: Store(store.path).get(name) for name in values} == values


def test_a_guarded_model_scores_flagged_rows_differently_and_others_the_same(
    family_model, tokenizer, store, tmp_path, keyword_gate
):
    loaded = Loaded(family_model, tokenizer, "fingerprint")
    answer(loaded, keyed(REQUESTS + GENERATIONS), store)
    other = Store(tmp_path / "guarded.jsonl")
    corruption = {"method": "rand_noise_first_n", "dims": 8, "strength": 50.0}
    with guard(family_model, tokenizer, Forget(keyword_gate, corruption)) as attached:
        answer(loaded, keyed(REQUESTS + GENERATIONS), other, attached)
    for name, request in keyed(REQUESTS + GENERATIONS):
        if "Potter" in request.prompt:
            if request.kind == "log_prob":
                assert abs(other.get(name)[0] - store.get(name)[0]) > 1e-3
        elif family_model.config.model_type == "mixtral" and request.kind == "log_prob":
            assert other.get(name)[0] == pytest.approx(store.get(name)[0], abs=1e-5)
        else:
            assert other.get(name) == store.get(name)


def test_scopes_and_answers_as_a_single_row_has_them(loaded, store, keyword_gate):
    """A batch of answers to one flagged prompt: each row is corrupted as it would be alone."""
    spec = Forget(
        keyword_gate, {"method": "rand_noise_first_n", "dims": 4, "strength": 5.0}, tokens={"scope": "sequence"}
    )
    requests = [Request("log_prob", PAIRS[0][0], text) for text in (" He lives.", " Paris is it, who knows?", " No")]
    with guard(loaded.model, loaded.tokenizer, spec) as attached:
        answer(loaded, keyed(requests), store, attached)
    for name, request in keyed(requests):
        head, tail = encode_pair(loaded.tokenizer, request.prompt, request.completion)
        (decision,) = spec.decide(loaded.tokenizer, [head])
        decision = spec.extend(loaded.tokenizer, decision, head + tail, len(head))
        with torch.no_grad():
            embeddings = loaded.model.get_input_embeddings()(torch.tensor(head + tail))
            logits = loaded.model(inputs_embeds=spec.corrupt(embeddings, decision)[None]).logits[0]
        rows = logits[len(head) - 1 : -1].log_softmax(-1)
        assert decision.positions == tuple(range(len(head + tail) - 1))
        expected = float(rows.gather(1, torch.tensor(tail)[:, None]).sum())
        assert store.get(name)[0] == pytest.approx(expected, abs=1e-4)
