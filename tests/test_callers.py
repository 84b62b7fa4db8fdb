"""Every caller of a guarded model: flagged prompts are corrupted on their way in, or the call is refused."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from callers import CALLERS, PLAIN, SECRET, SHORT, Probe, padded
from conftest import make_model

from ecoprompt import Forget, InputError, UnguardedError, guard

NOISE = {"method": "rand_noise_first_n", "dims": 4, "strength": 50.0}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def forget():
    return Forget(gate=lambda texts: [float("potter" in text.lower()) for text in texts], corruption=NOISE)


def possible(caller):
    if caller.needs == "a GPU":
        return torch.cuda.is_available()
    try:
        return caller.needs is None or importlib.util.find_spec(caller.needs) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize(
    "caller",
    [pytest.param(one, id=f"{one.group}: {one.name}", marks=[pytest.mark.slow] if one.slow else []) for one in CALLERS],
)
def test_no_flagged_prompt_reaches_the_first_layer_as_it_is(caller, forget, tokenizer):
    if not possible(caller):
        pytest.skip(f"needs {caller.needs}")
    batches = [[SECRET], [PLAIN]] if caller.single else [[SECRET, PLAIN, SHORT], [SECRET], [PLAIN, SECRET]]
    secret = tokenizer.encode(" Harry Potter" if caller.whole else SECRET)
    for texts in batches:
        plain = make_model("llama")
        table = plain.get_input_embeddings().weight.detach().clone()
        model = caller.attach(plain)
        probe = Probe(getattr(model, "get_base_model", lambda model=model: model)(), table)
        with probe():
            if caller.refused:
                with pytest.raises((UnguardedError, InputError)), guard(model, tokenizer, forget):
                    caller.call(model, tokenizer, texts)
                assert not probe.seen
                continue
            with guard(model, tokenizer, forget):
                caller.call(model, tokenizer, texts)
        assert probe.seen
        assert probe.leaks(secret, caller.whole) == []
        if SECRET in texts:
            assert probe.saw(secret)


def test_the_probe_would_see_a_leak(tokenizer):
    model = make_model("llama")
    probe = Probe(model)
    with probe():
        model(**padded(tokenizer, [SECRET, PLAIN]))
    assert len(probe.leaks(tokenizer.encode(SECRET))) == 1


def test_two_guards_corrupt_each_their_own(forget, tokenizer):
    """Also when they are taken off in the order in which they were put on."""
    other = Forget(gate=lambda texts: [float("capital" in text) for text in texts], corruption=NOISE)
    model = make_model("llama")
    one, two = guard(model, tokenizer, forget), guard(model, tokenizer, other)
    one.__enter__()
    two.__enter__()
    probe = Probe(model)
    with probe():
        model(**padded(tokenizer, [SECRET, PLAIN, SHORT]))
    ids, hidden = probe.seen[0]
    corrupted = [sum(row) for row in (hidden != probe.table[ids]).any(-1).tolist()]
    assert corrupted == [len(tokenizer.encode(SECRET)) - 1, len(tokenizer.encode(PLAIN)) - 1, 0]
    one.__exit__()
    with Probe(model)() as probe:
        model.generate(**padded(tokenizer, [SECRET, PLAIN]), max_new_tokens=2, do_sample=False)
    assert probe.leaks(tokenizer.encode(PLAIN)) == []
    two.__exit__()
    with Probe(model)() as probe:
        model.generate(**padded(tokenizer, [SECRET, PLAIN]), max_new_tokens=2, do_sample=False)
    assert len(probe.leaks(tokenizer.encode(SECRET))) == 1


def test_generations_are_those_of_the_corrupted_prompt_in_every_mode(forget, tokenizer):
    """Assisted decoding, caches and beams of width one are other ways to the same greedy answer."""
    model = make_model("llama")
    for text in (SECRET, PLAIN):
        batch = padded(tokenizer, [text])
        with guard(model, tokenizer, forget):
            greedy = model.generate(**batch, max_new_tokens=8, do_sample=False)
            for options in (
                {"use_cache": False},
                {"cache_implementation": "static"},
                {"prompt_lookup_num_tokens": 3},
                {"assistant_model": make_model("llama", seed=1)},
            ):
                assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False, **options), greedy)
