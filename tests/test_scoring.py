"""Scoring: batches give what rows give one by one, a store decides what is computed, and a restart gives the same."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import architectures
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from transformers import AutoConfig, AutoModelForCausalLM

from ecoprompt import Forget, guard, prefill, scoring
from ecoprompt.metrics import LogProb
from ecoprompt.models import Loaded, encode, encode_pair, pad
from ecoprompt.registry import EcopromptError
from ecoprompt.results import Store
from ecoprompt.sampling import gumbel
from ecoprompt.scoring import Request, Room, Sample, answer, batches, log_prob

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
SAMPLES = [
    Sample("sample", prompt, max_new_tokens=count, number=number, temperature=temperature, top_p=top_p)
    for (prompt, _), count in zip(PAIRS[:4], LENGTHS, strict=True)
    for number, (temperature, top_p) in enumerate([(1.0, 1.0), (1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
]
LETTERS = {"a": 0.5, "b": 0.25, "c": 0.15, "d": 0.07, "e": 0.03}


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
    loaded = Loaded(family_model, tokenizer, "fingerprint")
    answer(loaded, keyed(REQUESTS), store, room=Room(loaded, budget))
    for name, request in keyed(REQUESTS):
        total, tokens = alone(family_model, tokenizer, request)
        assert store.get(name)[:2] == [pytest.approx(total, abs=1e-5 * tokens), tokens]
        assert log_prob(store.get(name)) == LogProb(*store.get(name)[:2])


@pytest.mark.parametrize("requests", [REQUESTS, REQUESTS[:1]])
def test_a_model_that_computes_all_logits_gives_the_same(loaded, store, tmp_path, monkeypatch, requests):
    answer(loaded, keyed(requests), store)
    real = loaded.model.forward
    monkeypatch.setattr(
        loaded.model,
        "forward",
        lambda input_ids, attention_mask, use_cache, past_key_values=None: real(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, past_key_values=past_key_values
        ),
    )
    other = Store(tmp_path / "other.jsonl")
    answer(loaded, keyed(requests), other)
    for name, _ in keyed(requests):
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


@pytest.mark.parametrize("shares", [True, False])
def test_a_generation_is_cut_at_its_own_length_or_where_the_text_ends(loaded, store, monkeypatch, shares):
    """A head that gives "a" three times and then the end: each answer is as long as the smaller of both."""
    letter, end = loaded.tokenizer.convert_tokens_to_ids("a"), loaded.tokenizer.eos_token_id

    class Head(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:2], 400)
            ends = loaded.model.steps >= 3
            logits[:, :, end if ends else letter] = 1
            loaded.model.steps += 1
            return logits

    assert Room(loaded).pads  # tried before steps are counted
    loaded.model.steps, loaded.model.lm_head = 0, Head()
    monkeypatch.setattr(prefill, "read", prefill.read if shares else lambda *args: None)
    if not shares:
        loaded.model.generation_config.eos_token_id = end
    answer(loaded, keyed(GENERATIONS), store)
    assert [store.get(name) for name, _ in keyed(GENERATIONS)] == ["a" * min(count, 3) for count in LENGTHS]


def test_what_is_done_makes_room(loaded, store, monkeypatch):
    """Twelve answers, two at a time: each is what it is alone, in fewer steps than one pair after another."""
    limits = [1, 40, 2, 3, 30, 1, 2, 20, 4, 1, 9, 5]
    prompts = [f"{PAIRS[0][0]} {'so ' * number}" for number in range(len(limits))]
    requests = [Request("generation", p, max_new_tokens=n) for p, n in zip(prompts, limits, strict=True)]
    widths = []
    monkeypatch.setattr(scoring, "POOLED", 100)
    loaded.model.register_forward_hook(lambda module, args, out: widths.append(len(out.logits)))
    longest = max(len(encode(loaded.tokenizer, p)) + n for p, n in zip(prompts, limits, strict=True))
    answer(loaded, keyed(requests), store, room=Room(loaded, longest))
    assert max(widths) == 2
    assert len(widths) < sum(max(pair) for pair in zip(limits[::2], limits[1::2], strict=True))
    for name, request in keyed(requests):
        ids = torch.tensor([encode(loaded.tokenizer, request.prompt)])
        settings = {"max_new_tokens": request.max_new_tokens, "do_sample": False}
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert store.get(name) == loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_samples_are_the_same_in_any_batch_and_order(family_model, tokenizer, store, tmp_path, budget):
    loaded = Loaded(family_model, tokenizer, "fingerprint")
    answer(loaded, keyed(SAMPLES), store)
    again = Store(tmp_path / "again.jsonl")
    answer(loaded, keyed(SAMPLES[::-1][:-3]), again, room=Room(loaded, budget))
    assert {name: again.get(name) for name, _ in keyed(SAMPLES[3:])} == {
        name: store.get(name) for name, _ in keyed(SAMPLES[3:])
    }
    drawn = [store.get(name) for name, request in keyed(SAMPLES) if request.max_new_tokens == max(LENGTHS)]
    assert len(set(drawn)) == len(drawn)  # numbers 0 and 1 differ in nothing else
    other = Sample("sample", PAIRS[1][0], max_new_tokens=7, seed=1)
    answer(loaded, [("other", other)], store)
    assert store.get("other") not in drawn


def test_the_guard_is_on_while_sampling(loaded, store, tmp_path, keyword_gate):
    """Both are drawn by the same noise, so what changes a draw is the corruption; a low temperature shows it."""
    draws = [
        Sample("sample", prompt, "", 7, number, temperature=0.02) for prompt, _ in PAIRS[:2] for number in range(4)
    ]
    answer(loaded, keyed(draws), store)
    other = Store(tmp_path / "guarded.jsonl")
    spec = Forget(keyword_gate, {"method": "rand_noise_first_n", "dims": 8, "strength": 50.0})
    answer(loaded, keyed(draws), other, guard(loaded.model, loaded.tokenizer, spec))
    for name, request in keyed(draws):
        assert (store.get(name) != other.get(name)) == ("Potter" in request.prompt)


def lettered(model, tokenizer):
    """`model` with a head that gives LETTERS their probabilities after any text, and no other token."""
    head = torch.nn.Linear(32, 400)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, -torch.inf)
    for letter, probability in LETTERS.items():
        head.bias.data[tokenizer.convert_tokens_to_ids(letter)] = float(np.log(probability))
    model.lm_head = head
    return Loaded(model, tokenizer, "fingerprint")


@pytest.mark.parametrize(
    ("temperature", "top_p", "weights"),
    [
        (1.0, 1.0, list(LETTERS.values())),
        (2.0, 1.0, [probability**0.5 for probability in LETTERS.values()]),
        (0.5, 1.0, [probability**2 for probability in LETTERS.values()]),
        (1.0, 0.75, [0.5, 0.25, 0, 0, 0]),  # a and b come to 0.75
        (1.0, 0.76, [0.5, 0.25, 0.15, 0, 0]),
        (2.0, 0.01, [1, 0, 0, 0, 0]),
    ],
)
def test_samples_follow_the_models_distribution(model, tokenizer, store, temperature, top_p, weights):
    """2,000 answers of two letters: each letter by itself, and the pairs, have the frequencies that they should."""
    draws = [Sample("sample", "Why?", "", 2, number, 0, temperature, top_p) for number in range(2000)]
    answer(lettered(model, tokenizer), keyed(draws), store)
    drawn = [store.get(name) for name, _ in keyed(draws)]
    single = np.array(weights) / sum(weights)
    for position in range(2):
        counts = np.array([sum(text[position] == letter for text in drawn) for letter in LETTERS])
        assert counts[single == 0].sum() == 0
        assert single.max() == 1 or chisquare(counts[single > 0], 2000 * single[single > 0]).pvalue > 0.001
    pairs = np.outer(single, single).ravel()
    counts = np.array([drawn.count(one + two) for one in LETTERS for two in LETTERS])
    assert counts.sum() == 2000
    assert single.max() == 1 or chisquare(counts[pairs > 0], 2000 * pairs[pairs > 0]).pvalue > 0.001


def test_noise_is_gumbels_and_a_row_s_does_not_depend_on_the_others():
    keys = torch.tensor([[0], [1], [2**63 - 1], [12345]])
    noise = gumbel(keys, 5000)
    assert torch.isfinite(noise).all()
    assert torch.equal(gumbel(keys[2:3], 5000), noise[2:3])
    assert torch.equal(gumbel(keys, 10), noise[:, :10])
    for row in (*noise, noise[:, :1000].flatten()):
        assert kstest(row.numpy(), "gumbel_r").pvalue > 0.001
    assert np.abs(np.corrcoef(noise.numpy()) - np.eye(4)).max() < 4 / 5000**0.5


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


@pytest.mark.parametrize("most", [1, 3, 100, 5000])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError, lambda: RuntimeError("[enforce fail] can't allocate memory")]
)
def test_the_room_is_halved_until_a_batch_fits(loaded, most, error):
    room, seen = Room(loaded, 4000), []

    def compute(room):
        seen.append(room.tokens)
        if room.tokens > most:
            raise error()
        return [1, 2]

    assert room.fit(compute) == [1, 2]
    assert (
        seen
        == [tokens for tokens in (4000, 2000, 1000, 500, 250, 125, 62, 31, 15, 7, 3, 1) if tokens * 2 > most][
            : len(seen)
        ]
    )
    assert room.tokens <= most
    seen.clear()
    assert room.fit(compute) == [1, 2]  # it stays small
    assert seen == [room.tokens]


def test_one_row_that_does_not_fit_is_an_error(loaded):
    def compute(room):
        raise torch.OutOfMemoryError

    with pytest.raises(EcopromptError, match="out of memory on a single row"):
        Room(loaded, 100).fit(compute)
    with pytest.raises(RuntimeError, match="something else"):
        Room(loaded, 100).fit(lambda room: (_ for _ in ()).throw(RuntimeError("something else")))


def test_little_room_has_the_values_of_much(loaded, store, tmp_path, monkeypatch):
    """Memory that is out in the middle of a batch costs nothing but time."""
    every = REQUESTS + GENERATIONS + SAMPLES
    answer(loaded, keyed(every), store)
    real = loaded.model.forward

    def scarce(input_ids, **kwargs):
        if input_ids.numel() > 60:
            raise torch.OutOfMemoryError
        return real(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", scarce)
    little = Store(tmp_path / "little.jsonl")
    answer(loaded, keyed(every), little)
    for name, request in keyed(every):
        if request.kind != "log_prob":
            assert little.get(name) == store.get(name)
        else:
            assert little.get(name)[0] == pytest.approx(store.get(name)[0], abs=1e-5)


def test_a_prompt_is_read_once_for_all_its_completions(family_model, tokenizer, store):
    """Of one-token completions its last logits say all; of others what it left behind is continued."""
    shapes = []
    assert Room(Loaded(family_model, tokenizer, "fingerprint")).pads  # tried before calls are counted
    family_model.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.logits.shape[:2])))
    choices = [Request("log_prob", PAIRS[0][0], letter) for letter in "abcd"]
    assert {len(encode_pair(tokenizer, one.prompt, one.completion)[1]) for one in choices} == {1}
    loaded = Loaded(family_model, tokenizer, "fingerprint")
    answer(loaded, keyed(choices), store)
    assert shapes == [(1, 1)]
    shapes.clear()
    longer = [Request("log_prob", PAIRS[0][0], text) for text in (" He lives.", " Paris is it, who knows?", " No")]
    answer(loaded, keyed(longer), store)
    longest = max(len(encode_pair(tokenizer, one.prompt, one.completion)[1]) for one in longer)
    assert shapes == [(1, 1), (3, longest - 1)]


@pytest.mark.parametrize("right", [0, 2, 5])
def test_what_was_scored_as_likeliest_is_not_generated_again(loaded, store, tmp_path, monkeypatch, right):
    """Of its own answer to a prompt, all; of one that leaves it after some tokens, these."""
    prompt, limit = PAIRS[0][0], 5
    ids = encode(loaded.tokenizer, prompt)
    out = loaded.model.generate(torch.tensor([ids]), max_new_tokens=limit, do_sample=False)[0, len(ids) :].tolist()
    other = next(token for token in range(60, 70) if token not in out)
    said = tuple([*out[:right], other] if right < limit else out)  # as tokens: as text they may be others
    monkeypatch.setattr(scoring, "_pair", lambda tokenizer, text, completion: (tuple(ids), said if completion else ()))
    every = keyed([Request("log_prob", prompt, "said"), Request("generation", prompt, max_new_tokens=limit)])
    answer(loaded, every[1:], store)
    again, steps = Store(tmp_path / "again.jsonl"), []
    assert Room(loaded).pads  # tried before steps are counted
    loaded.model.register_forward_hook(lambda *args: steps.append(1))
    answer(loaded, every, again)
    assert again.get(every[0][0])[2] == right
    assert again.get(every[1][0]) == store.get(every[1][0])
    assert len(steps) == 1 + limit - right
    assert every[1][1].key("x", None) == replace(every[1][1], start=(1, 2)).key("x", None)


def test_of_tokens_that_are_alike_the_first_is_the_likeliest():
    """As `argmax` chooses it; another that is as likely is not what a model would have said."""
    logits = torch.tensor([[1.0, 5.0, 5.0], [2.0, 1.0, 0.0]])
    assert scoring._score(logits, (1, 0))[1] == 2
    assert scoring._score(logits, (2, 0))[1] == 0
    assert scoring._score(logits, (1, 0))[0] == pytest.approx(float(logits.log_softmax(-1)[[0, 1], [1, 0]].sum()))


def test_a_start_ends_where_it_ends_the_text(loaded):
    end = loaded.tokenizer.eos_token_id
    made = prefill.continuations(loaded, [[5, 6]], [[7, end, 8]], [9], 1, lambda *args: None, contextlib.nullcontext)
    assert made == [[7, end]]


def test_keys_differ_by_all_that_determines_a_result():
    requests = [
        Request(kind, prompt, completion, count)
        for kind in ("log_prob", "generation")
        for prompt in ("a", "ab", "")
        for completion in ("", "b", "ab")
        for count in (0, 1)
    ]
    requests += [
        Sample("sample", "a", "", 1, number, seed, temperature, top_p)
        for number in (0, 1)
        for seed in (0, 1)
        for temperature in (0.5, 1.0)
        for top_p in (0.5, 1.0)
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
    every = REQUESTS + GENERATIONS + SAMPLES[:6]
    corruption = {"method": "rand_noise_first_n", "dims": 4, "strength": 5.0}
    spec = Forget(keyword_gate, corruption, tokens={"select": "all", "scope": "sequence"})
    spared = guard(loaded.model, loaded.tokenizer, spec) if guarded else None
    answer(loaded, keyed(every), store, spared, room=Room(loaded, 60))
    lines = store.path.read_bytes().splitlines(keepends=True)
    values = {name: store.get(name) for name, _ in keyed(every)}
    assert len(lines) > 3
    for kept in (lines[:0], lines[:3], lines[1::2], [*lines[:2], lines[2][:-10]], lines[-2:]):
        store.path.write_bytes(b"".join(kept))
        again = Store(store.path)
        answer(loaded, keyed(every), again, spared, room=Room(loaded, 60))
        assert {name: again.get(name) for name in values} == values
        assert {name: Store(store.path).get(name) for name in values} == values


def test_a_guarded_model_scores_flagged_rows_differently_and_others_the_same(
    family_model, tokenizer, store, tmp_path, keyword_gate
):
    loaded = Loaded(family_model, tokenizer, "fingerprint")
    every = REQUESTS + GENERATIONS + SAMPLES
    answer(loaded, keyed(every), store)
    other = Store(tmp_path / "guarded.jsonl")
    corruption = {"method": "rand_noise_first_n", "dims": 8, "strength": 50.0}
    answer(loaded, keyed(every), other, guard(family_model, tokenizer, Forget(keyword_gate, corruption)))
    for name, request in keyed(every):
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
    answer(loaded, keyed(requests), store, guard(loaded.model, loaded.tokenizer, spec))
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


def both_ways(model, tokenizer, tmp_path, monkeypatch):
    """(results where a prompt is read once, or None if it cannot be; the plain way's) for each request."""
    loaded = Loaded(model, tokenizer, "fingerprint")
    every = keyed([*REQUESTS, *GENERATIONS])
    read, plain = Store(tmp_path / "read.jsonl"), Store(tmp_path / "plain.jsonl")
    rooms = []
    monkeypatch.setattr(scoring, "Room", lambda *args: rooms.append(Room(*args)) or rooms[-1])
    answer(loaded, every, read)
    (room,) = rooms
    shared = room.shares
    monkeypatch.setattr(prefill, "read", lambda *args: None)
    answer(loaded, every, plain)
    monkeypatch.undo()
    return shared, [(request, read.get(name), plain.get(name)) for name, request in every]


def check_both(found, tolerance=1e-5):
    for request, once, plain in found:
        if request.kind == "log_prob":
            assert once[1:] == plain[1:]
            assert once[0] == pytest.approx(plain[0], abs=tolerance * plain[1])
        else:
            assert once == plain


@pytest.mark.parametrize(
    ("architecture", "shares"),
    [("bloom", True), ("falcon", True), ("gemma3", True), ("phi3", True), ("mamba", False), ("jamba", False)],
)
def test_what_is_kept_of_a_prompt_is_continued_where_it_can_be(architecture, shares, tokenizer, tmp_path, monkeypatch):
    model = architectures.build(architecture)
    shared, found = both_ways(model, tokenizer, tmp_path, monkeypatch)
    assert shared == shares
    check_both(found)


@pytest.mark.parametrize(("window", "shares"), [(100, True), (12, False)])
def test_a_window_that_holds_all_of_a_text_is_continued(window, shares, tokenizer, tmp_path, monkeypatch):
    config = AutoConfig.for_model(
        "mistral", vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_key_value_heads=2, sliding_window=window, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    shared, found = both_ways(AutoModelForCausalLM.from_config(config).eval(), tokenizer, tmp_path, monkeypatch)
    assert shared == shares
    check_both(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "padded"), [("bart", False), ("roberta", False), ("mamba", True), ("opt", True)]
)
def test_a_model_that_misreads_padding_gets_none(architecture, padded, tokenizer, tmp_path, monkeypatch):
    model = architectures.build(architecture)
    loaded = Loaded(model, tokenizer, "x")
    assert Room(loaded).pads == padded
    alone = [Request("generation", prompt, max_new_tokens=4) for prompt in ("Who?", "Where does he live now?")]
    together, apart = Store(tmp_path / "together"), Store(tmp_path / "apart")
    answer(loaded, keyed(alone), together)
    for one in keyed(alone):
        answer(loaded, [one], apart)
    assert [together.get(name) for name, _ in keyed(alone)] == [apart.get(name) for name, _ in keyed(alone)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures.architectures())
@pytest.mark.filterwarnings("ignore")
def test_every_architecture_scores_the_same_both_ways(architecture, tokenizer, tmp_path, monkeypatch):
    try:
        model = architectures.build(architecture)
    except Exception as error:  # such as those that tests/test_architectures.py lists
        pytest.skip(f"not built: {error!r:.80}")
    _, found = both_ways(model, tokenizer, tmp_path, monkeypatch)
    check_both(found, 1e-4)
