"""The guard: what it corrupts, what it leaves alone to the last bit, and what it refuses because it could leak."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, pipeline

import ecoprompt
from ecoprompt import Forget, Guard, InputError, UnguardedError, guard
from ecoprompt.models import encode, pad, render

SECRET, PLAIN, SHORT = "Who is Harry Potter?", "What is the capital of France, and where does he live?", "Paris"
NOISE = {"method": "rand_noise_first_n", "dims": 4, "strength": 50.0}
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def forget(keyword_gate):
    return Forget(gate=keyword_gate, corruption=NOISE)


def batch(tokenizer, texts, side="left", masked=True):
    ids, mask = pad(
        SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(device="cpu")),
        [tokenizer.encode(text) for text in texts],
        side == "left",
    )
    return {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}


@contextlib.contextmanager
def embedded(model):
    """The embeddings that reach the first layer, call by call: an own hook, after the guard's."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    yield seen
    handle.remove()


def seen_by(model, tokenizer, forget, **inputs):
    """(embeddings without, embeddings with the guard) [B, T, D] and the guard's decisions."""
    with torch.no_grad():
        clean = model.get_input_embeddings()(inputs["input_ids"])
        with guard(model, tokenizer, forget) as attached, embedded(model) as seen:
            model(**inputs)
    return clean, seen[0], attached.decisions


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def changed(clean, corrupted):
    """By row, the columns whose embeddings differ."""
    return [row.nonzero().flatten().tolist() for row in (clean != corrupted).any(-1)]


def without_trace(model):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and "generate" not in vars(model)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_unflagged_rows_are_computed_as_without_the_guard(family_model, tokenizer, forget, side, masked):
    for texts in ([PLAIN], [PLAIN, SHORT], [SHORT, SECRET, PLAIN, SECRET]):
        inputs = batch(tokenizer, texts, side, masked)
        before = logits(family_model, **inputs)
        with guard(family_model, tokenizer, forget) as attached:
            during = logits(family_model, **inputs)
        flags = [text == SECRET for text in texts]
        assert [decision.flagged for decision in attached.decisions] == flags
        for row, flagged in enumerate(flags):
            if flagged:
                assert not torch.allclose(before[row, -1], during[row, -1], atol=1e-3)
            elif family_model.config.model_type == "mixtral" and any(flags):  # its experts' sums follow the batch
                torch.testing.assert_close(during[row], before[row], rtol=0, atol=1e-6)
            else:
                assert torch.equal(before[row], during[row])
    assert without_trace(family_model)
    assert torch.equal(logits(family_model, **inputs), before)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_exactly_the_decided_positions_change(family_model, tokenizer, forget, side, masked):
    inputs = batch(tokenizer, [SECRET, PLAIN], side, masked)
    clean, corrupted, decisions = seen_by(family_model, tokenizer, forget, **inputs)
    count, width = len(tokenizer.encode(SECRET)), inputs["input_ids"].shape[1]
    start = width - count if side == "left" else 0
    assert decisions[0].positions == tuple(range(count - 1))  # neither padding nor the last prompt token
    assert changed(clean, corrupted) == [list(range(start, start + count - 1)), []]
    assert torch.equal(clean[..., NOISE["dims"] :], corrupted[..., NOISE["dims"] :])


def test_positional_ids_and_mask_are_read_as_well(model, tokenizer, forget):
    inputs = batch(tokenizer, [SECRET, PLAIN])
    by_name = seen_by(model, tokenizer, forget, **inputs)[1]
    with torch.no_grad(), guard(model, tokenizer, forget), embedded(model) as seen:
        model(*inputs.values())
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"].bool())
    assert all(torch.equal(again, by_name) for again in seen)


def test_a_flagged_prompt_of_a_single_token_is_corrupted(model, tokenizer):
    forget = Forget(gate=lambda texts: [1.0] * len(texts), corruption=NOISE)
    (token,) = tokenizer.encode("P")
    clean, corrupted, _ = seen_by(model, tokenizer, forget, input_ids=torch.tensor([[0, 0, token]]))
    assert changed(clean, corrupted) == [[2]]
    with torch.no_grad(), guard(model, tokenizer, forget), embedded(model) as seen:
        model.generate(torch.tensor([[token]]), attention_mask=torch.ones(1, 1), **GREEDY)
    assert changed(clean[:, 2:], seen[0]) == [[0]]


def test_a_row_without_a_token_is_gated_as_a_whole(model, tokenizer, forget):
    ids = torch.tensor([[0] * 5, [263] * 5])
    _, _, decisions = seen_by(model, tokenizer, forget, input_ids=ids, attention_mask=torch.zeros_like(ids))
    assert [decision.text for decision in decisions] == [tokenizer.decode(row) for row in ids]
    flag_all = Forget(gate=lambda texts: [1.0] * len(texts), corruption=NOISE)
    clean, corrupted, _ = seen_by(model, tokenizer, flag_all, input_ids=ids, attention_mask=torch.zeros_like(ids))
    assert changed(clean, corrupted) == [[0, 1, 2, 3]] * 2


def test_a_mask_cannot_hide_text(model, tokenizer, forget):
    ids = torch.tensor([tokenizer.encode(f"{SECRET} {SHORT}")])
    mask = torch.zeros_like(ids)
    mask[0, -1] = 1
    last = torch.ones_like(ids)
    last[0, -1] = 0  # a word of one token, whose logits could be read
    with guard(model, tokenizer, forget), embedded(model) as seen:
        for hiding in (mask, last):
            with pytest.raises(UnguardedError, match="hides tokens"):
                model(ids, attention_mask=hiding)
        with pytest.raises(UnguardedError, match="hides tokens"):
            model.generate(ids, attention_mask=mask, **GREEDY)
    assert not seen


def test_masked_padding_between_tokens_hides_nothing_from_the_gate(model, tokenizer, forget):
    tokens = tokenizer.encode(SECRET)
    ids = torch.tensor([[part for token in tokens for part in (token, 0)]])
    mask = (ids != 0).long()
    clean, corrupted, decisions = seen_by(model, tokenizer, forget, input_ids=ids, attention_mask=mask)
    assert decisions[0].text == SECRET
    assert changed(clean, corrupted) == [list(range(0, 2 * len(tokens) - 2, 2))]


def test_a_batch_is_corrupted_like_its_rows_one_by_one(model, tokenizer, forget):
    texts = [SECRET, PLAIN, "Where does Potter live, and under which stairs?", SHORT]
    ids, mask = batch(tokenizer, texts).values()
    _, together, _ = seen_by(model, tokenizer, forget, input_ids=ids, attention_mask=mask)
    for row, text in enumerate(texts):
        _, alone, _ = seen_by(model, tokenizer, forget, **batch(tokenizer, [text]))
        assert torch.equal(together[row, mask[row].bool()], alone[0])


def test_noise_is_a_function_of_prompt_and_seed(model, tokenizer, keyword_gate):
    def noise(texts, row, seed=0):
        forget = Forget(gate=keyword_gate, corruption=NOISE, seed=seed)
        ids, mask = batch(tokenizer, texts).values()
        clean, corrupted, _ = seen_by(model, tokenizer, forget, input_ids=ids, attention_mask=mask)
        return (corrupted - clean)[row, mask[row].bool()]

    first = noise([SECRET, PLAIN], 0)
    torch.testing.assert_close(first, noise([PLAIN, SHORT, SECRET, SECRET], 3))
    assert not torch.allclose(first, noise([SECRET], 0, seed=1))
    other = "Who is Larry Potter?"  # as many tokens
    assert not torch.allclose(first[:-1, 0], noise([other], 0)[: len(first) - 1, 0])


def continued(model, tokenizer, forget, text, **options):
    """The continuation of embeddings that were corrupted by hand."""
    ids = torch.tensor([tokenizer.encode(text)])
    (decision,) = forget.decide(tokenizer, ids.tolist())
    corrupted = forget.corrupt(model.get_input_embeddings()(ids)[0], decision)[None]
    return model.generate(inputs_embeds=corrupted, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 4, "do_sample": False},
        {"max_new_tokens": 1, "do_sample": False},
        {"max_new_tokens": 4, "do_sample": False, "use_cache": False},
        {"max_new_tokens": 4, "do_sample": True},
        {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3},
        {"generation_config": GenerationConfig(max_new_tokens=4, do_sample=False)},
    ],
)
def test_generate_continues_the_corrupted_prompt_and_no_more(family_model, tokenizer, forget, options):
    ids = torch.tensor([tokenizer.encode(SECRET)])
    with torch.no_grad():
        torch.manual_seed(7)
        expected = continued(family_model, tokenizer, forget, SECRET, **options)
        torch.manual_seed(7)
        with guard(family_model, tokenizer, forget), embedded(family_model) as seen:
            found = family_model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(found[:, ids.shape[1] :], expected)
        for step, embeddings in enumerate(seen):
            read = found[:, : ids.shape[1] + step][:, -embeddings.shape[1] :]
            touched = changed(family_model.get_input_embeddings()(read), embeddings)
            prompt_again = embeddings.shape[1] > 1  # the prefill, and every step without a cache
            assert touched == [list(range(ids.shape[1] - 1)) if prompt_again else []] * len(found)


@pytest.mark.parametrize("options", [GREEDY, {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("masked", [True, False])
def test_generations_of_unflagged_rows_are_those_without_the_guard(family_model, tokenizer, forget, masked, options):
    inputs = batch(tokenizer, [SECRET, PLAIN, SHORT], masked=masked)
    torch.manual_seed(3)
    before = family_model.generate(**inputs, **options)
    torch.manual_seed(3)
    with guard(family_model, tokenizer, forget):
        during = family_model.generate(**inputs, **options)
    copies = options.get("num_return_sequences", 1)
    assert torch.equal(before[copies:, : during.shape[1]], during[copies:])
    torch.manual_seed(3)
    assert torch.equal(before, family_model.generate(**inputs, **options))


def test_only_own_handles_are_removed(model, tokenizer, forget):
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda *args: seen.append("embedding"))
    model.register_forward_hook(lambda *args: seen.append("model"))
    model.register_forward_pre_hook(lambda *args: seen.append("before"))
    with guard(model, tokenizer, forget):
        model(**batch(tokenizer, [SECRET]))
    assert seen == ["before", "embedding", "model"]
    model(**batch(tokenizer, [SECRET]))
    assert seen == ["before", "embedding", "model"] * 2


class Broken(Exception):
    pass


def fail(*args):
    raise Broken


def test_exceptions_leave_the_model_as_it_was(model, tokenizer, forget):
    inputs = batch(tokenizer, [SECRET, PLAIN])
    before = logits(model, **inputs)
    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(Broken), guard(model, tokenizer, forget):
        model(**inputs)
    with pytest.raises(Broken), guard(model, tokenizer, forget) as attached:
        model.generate(**inputs, **GREEDY)
    assert attached._state.call is None
    assert attached._state.generation is None
    handle.remove()
    with pytest.raises(Broken), guard(model, tokenizer, forget):
        fail()
    assert without_trace(model)
    assert torch.equal(logits(model, **inputs), before)


def test_an_interrupt_inside_forward_leaves_nothing_that_a_later_call_could_use(model, tokenizer, forget):
    plain, secret = batch(tokenizer, ["Who is Larry Potto?"]), batch(tokenizer, [SECRET])

    def interrupt(*args):
        raise KeyboardInterrupt

    with guard(model, tokenizer, forget):
        handle = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**plain)
        handle.remove()
        with pytest.raises(UnguardedError):
            model.get_input_embeddings()(secret["input_ids"])
        corrupted = logits(model, **secret)
    assert not torch.allclose(corrupted, logits(model, **secret))


def test_a_gate_that_fails_lets_nothing_through(model, tokenizer):
    for gate in (
        fail,
        lambda texts: [],
        lambda texts: [None for _ in texts],
        lambda texts: [[0.0, 1.0] for _ in texts],
    ):
        forget = Forget(gate=gate, corruption=NOISE)
        with guard(model, tokenizer, forget), embedded(model) as seen:
            with pytest.raises((Broken, InputError)):
                model(**batch(tokenizer, [SECRET]))
            with pytest.raises((Broken, InputError)):
                model.generate(**batch(tokenizer, [SECRET]), **GREEDY)
        assert not seen


def test_guards_nest(model, tokenizer, forget):
    inputs = batch(tokenizer, [SECRET, "What is the capital of France?", SHORT])
    france = Forget(gate=lambda texts: [float("France" in text) for text in texts], corruption=NOISE)
    with guard(model, tokenizer, forget):
        outer = logits(model, **inputs)
        with guard(model, tokenizer, france) as inner:
            both = logits(model, **inputs)
            model.generate(**inputs, **GREEDY)
        assert [decision.flagged for decision in inner.decisions] == [False, True, False]
        assert torch.equal(logits(model, **inputs), outer)
        model.generate(**inputs, **GREEDY)
    assert torch.equal(both[[0, 2]], outer[[0, 2]])
    assert not torch.allclose(both[1], outer[1])
    assert without_trace(model)


def test_a_guard_can_be_attached_again_but_not_twice(model, tokenizer, forget):
    attached = Guard(model, tokenizer, forget)
    with attached, pytest.raises(InputError, match="attached already"):
        attached.__enter__()
    with attached:
        model(**batch(tokenizer, [SECRET]))
        assert attached.decisions[0].flagged
    assert without_trace(model)


def mixed_step(model, tokenizer):
    """A cache that has read the secret."""
    ids = torch.tensor([tokenizer.encode(SECRET)])
    return model(ids, use_cache=True).past_key_values


UNSUPPORTED = {
    "inputs_embeds": lambda m, ids, cache: m(inputs_embeds=torch.zeros(1, 3, 32)),
    "inputs_embeds beside ids": lambda m, ids, cache: m(ids, inputs_embeds=torch.zeros(1, 3, 32)),
    "no ids": lambda m, ids, cache: m(),
    "flat ids": lambda m, ids, cache: m(ids[0]),
    "ids of three dimensions": lambda m, ids, cache: m(ids[None]),
    "continued cache": lambda m, ids, cache: m(ids[:, :1], past_key_values=cache),
    "4D mask": lambda m, ids, cache: m(ids, attention_mask=torch.ones(1, 1, ids.shape[1], ids.shape[1])),
    "mask of another width": lambda m, ids, cache: m(ids, attention_mask=torch.ones(1, ids.shape[1] + 1)),
    "mask by name": lambda m, ids, cache: m(ids, attention_mask={"full_attention": None}),
    "packed": lambda m, ids, cache: m(ids, position_ids=torch.tensor([[*range(3), *range(ids.shape[1] - 3)]])),
    "flat positions": lambda m, ids, cache: m(ids, position_ids=torch.arange(ids.shape[1])),
    "three positions": lambda m, ids, cache: m(ids, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1)),
    "packed by lengths": lambda m, ids, cache: m(ids, cu_seq_lens_q=torch.tensor([0, 3, ids.shape[1]])),
    "an image": lambda m, ids, cache: m(ids, pixel_values=torch.zeros(1, 3, 8, 8)),
    "text as segments": lambda m, ids, cache: m(ids, token_type_ids=ids),
    "embedding": lambda m, ids, cache: m.get_input_embeddings()(ids),
    "inner model": lambda m, ids, cache: m.model(ids),
    "inner model with embeddings": lambda m, ids, cache: m.model(inputs_embeds=torch.zeros(1, 3, 32)),
    "forward": lambda m, ids, cache: m.forward(ids),
    "generate from embeddings": lambda m, ids, cache: m.generate(inputs_embeds=torch.zeros(1, 3, 32), **GREEDY),
    "generate on a cache": lambda m, ids, cache: m.generate(ids, past_key_values=cache, **GREEDY),
    "early exit": lambda m, ids, cache: m.generate(ids, assistant_early_exit=1, **GREEDY),
    "the model as its own assistant": lambda m, ids, cache: m.generate(ids, assistant_model=m, **GREEDY),
    "several tokens a step": lambda m, ids, cache: m.generate(ids, use_mtp=True, **GREEDY),
    "the assistant's say": lambda m, ids, cache: m.generate(
        ids, assistant_model=make_model("llama"), assistant_ensemble_weight=0.5, do_sample=True, max_new_tokens=2
    ),
    "healed tokens": lambda m, ids, cache: m.generate(ids, token_healing=True, **GREEDY),
    "continuous batching": lambda m, ids, cache: m.generate_batch(ids.tolist(), max_new_tokens=2),
    "continuous batching by hand": lambda m, ids, cache: m.init_continuous_batching(),
    "contrastive": lambda m, ids, cache: m.generate(ids, penalty_alpha=0.6, top_k=4, **GREEDY),
    "layers contrasted": lambda m, ids, cache: m.generate(ids, dola_layers="low", **GREEDY),
    "paged cache": lambda m, ids, cache: m.generate(ids, cache_implementation="paged", **GREEDY),
    "chunked prefill": lambda m, ids, cache: m.generate(ids, prefill_chunk_size=2, **GREEDY),
    "guidance": lambda m, ids, cache: m.generate(ids, guidance_scale=1.5, **GREEDY),
    "custom": lambda m, ids, cache: m.generate(ids, custom_generate=lambda **kwargs: kwargs, **GREEDY),
    "generate with another mask": lambda m, ids, cache: m.generate(
        ids.repeat(3, 1), attention_mask=torch.ones(2, ids.shape[1]), **GREEDY
    ),
}


@pytest.mark.parametrize("call", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_cannot_be_gated_is_refused_before_the_model_runs(model, tokenizer, forget, call):
    inputs = batch(tokenizer, [SECRET, PLAIN])
    cache = mixed_step(model, tokenizer)
    with guard(model, tokenizer, forget):
        expected, generated = logits(model, **inputs), model.generate(**inputs, **GREEDY)
        ran = []
        handle = model.model.layers[0].register_forward_hook(lambda *args: ran.append(1))
        for ids in ([tokenizer.encode(SECRET)], [tokenizer.encode(PLAIN)]):
            with pytest.raises(UnguardedError):
                call(model, torch.tensor(ids), cache)
        handle.remove()
        assert not ran
        assert torch.equal(logits(model, **inputs), expected)  # and the guard works on
        assert torch.equal(model.generate(**inputs, **GREEDY), generated)
    assert without_trace(model)


def test_settings_of_the_model_itself_are_refused_too(model, tokenizer, forget):
    ids = torch.tensor([tokenizer.encode(PLAIN)])
    model.generation_config.prefill_chunk_size = 3
    with guard(model, tokenizer, forget):
        with pytest.raises(UnguardedError, match="prefill_chunk_size"):
            model.generate(ids, max_new_tokens=2)
        with pytest.raises(
            UnguardedError, match="prefill_chunk"
        ):  # what an object leaves open, the model's own fill in
            model.generate(ids, generation_config=GenerationConfig(max_new_tokens=2))


def test_generating_behind_the_wrapper_stays_guarded(model, tokenizer, forget):
    ids = torch.tensor([tokenizer.encode(SECRET)])
    with guard(model, tokenizer, forget), embedded(model) as seen, pytest.raises(UnguardedError, match="continues"):
        type(model).generate(model, ids, **GREEDY)
    assert changed(model.get_input_embeddings()(ids), seen[0]) == [list(range(ids.shape[1] - 1))]


def test_an_emptied_first_layer_does_not_make_a_cache_look_new(model, tokenizer, forget):
    cache = mixed_step(model, tokenizer)
    cache.layers[0] = DynamicCache(config=model.config).layers[0]
    with guard(model, tokenizer, forget), pytest.raises(UnguardedError, match="continues"):
        model(torch.tensor([tokenizer.encode(PLAIN)]), past_key_values=cache)
    with guard(model, tokenizer, forget):  # an empty cache is none
        model.generate(torch.tensor([tokenizer.encode(PLAIN)]), past_key_values=DynamicCache(), **GREEDY)
        model(torch.tensor([tokenizer.encode(PLAIN)]), past_key_values=DynamicCache())


@pytest.mark.filterwarnings("ignore")
def test_a_state_space_model_is_guarded(tokenizer, forget):
    config = AutoConfig.for_model("mamba", vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([tokenizer.encode(SECRET)])
    state = model(ids[:, :3], use_cache=True).cache_params
    with guard(model, tokenizer, forget) as attached:
        with pytest.raises(UnguardedError, match="cache_params"):
            model(ids[:, 3:], cache_params=state)
        model.generate(ids, pad_token_id=0, **GREEDY)
        assert attached.decisions[0].flagged


def test_second_uses_of_the_embedding_and_second_tables_are_refused(tokenizer, forget, model):
    gpt2, ids = make_model("gpt2"), torch.tensor([tokenizer.encode(SECRET)])
    plain = torch.full_like(ids, tokenizer.encode("P")[0])
    with guard(gpt2, tokenizer, forget), pytest.raises(UnguardedError):
        gpt2(plain, token_type_ids=ids)  # GPT-2 embeds these as if they were text
    model.further = nn.Embedding(400, 32)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: model.further(ids.flatten()) and None)
    with guard(model, tokenizer, forget), pytest.raises(UnguardedError, match="second way"):
        model(ids)


def test_models_that_would_leak_are_refused_when_attaching(model, tokenizer, forget, keyword_gate):
    wide = Forget(gate=keyword_gate, corruption={**NOISE, "dims": 33})
    with pytest.raises(InputError, match="hidden size, 32"):
        guard(model, tokenizer, wide)
    config = AutoConfig.for_model("t5", vocab_size=400, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    from transformers import AutoModelForSeq2SeqLM

    with pytest.raises(InputError, match="encoder-decoder"):
        guard(AutoModelForSeq2SeqLM.from_config(config), tokenizer, forget)
    with pytest.raises(InputError, match="not a transformers model"):
        guard(nn.Linear(2, 2), tokenizer, forget)
    model.config.hidden_size_per_layer_input = 8
    with pytest.raises(InputError, match="every layer"):
        guard(model, tokenizer, forget)


@pytest.mark.parametrize("wrong", ["llama", SimpleNamespace(pad_token_id=0), len])
def test_what_is_no_tokenizer_is_refused(model, forget, wrong):
    with pytest.raises(InputError, match=f"found {type(wrong).__name__} as the tokenizer"):
        guard(model, wrong, forget)


def test_a_model_that_embeds_elsewhere_is_refused(model, tokenizer, forget):
    with guard(model, tokenizer, forget):
        own, model.model.embed_tokens = model.model.embed_tokens, nn.Embedding(400, 32)
        with pytest.raises(UnguardedError, match="did not use its input embedding"):
            model(**batch(tokenizer, [PLAIN, SECRET]))
        model(**batch(tokenizer, [PLAIN]))  # nothing is lost where nothing is to be corrupted
        model.model.embed_tokens = own
    assert without_trace(model)


def test_the_nearest_to_tokens_in_reverse_order_are_these_tokens(model, tokenizer, keyword_gate):
    attached, ids = guard(model, tokenizer, Forget(keyword_gate, {"method": "reverse_order"})), tokenizer.encode(SECRET)
    words = [tokenizer.decode([token]) for token in ids[:-1]]
    (decision,) = attached.decide([ids])
    assert attached.nearest(ids, decision) == tuple(zip(words, reversed(words), strict=True))


def test_a_compiled_model_is_refused(model, tokenizer, forget):
    model.compile(backend="eager")
    with pytest.raises(InputError, match="compiled"), guard(model, tokenizer, forget):
        pass
    assert without_trace(model)


def test_code_compiled_before_is_made_anew_inside_and_after(model, tokenizer, forget, monkeypatch):
    dropped = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: dropped.append(True))
    with guard(model, tokenizer, forget):
        assert len(dropped) == 1
    assert len(dropped) == 2


def test_a_model_without_generate_is_guarded(model, tokenizer, forget):
    inputs = batch(tokenizer, [SECRET, PLAIN])
    with torch.no_grad():
        before = model.model(**inputs)[0]
        with guard(model.model, tokenizer, forget):
            during = model.model(**inputs)[0]
    assert torch.equal(before[1], during[1])
    assert not torch.allclose(before[0], during[0])
    assert without_trace(model)


def test_a_forward_inside_generate_is_gated_by_itself(model, tokenizer, forget):
    """A logits processor or a streamer may call the model; what it reads there is a prompt like any other."""
    plain, secret = batch(tokenizer, ["Who is Larry Potto?"]), batch(tokenizer, [SECRET])
    before = logits(model, **secret)
    found = []

    def processor(ids, scores):
        found.extend([logits(model, **secret), model.generate(**secret, **GREEDY)])
        return scores

    class Streamer:
        def put(self, value):
            found.append(logits(model, **secret))

        def end(self):
            pass

    expected = model.generate(**plain, **GREEDY)
    with guard(model, tokenizer, forget):
        corrupted, answer = logits(model, **secret), model.generate(**secret, **GREEDY)
        for use_cache in (True, False):
            again = model.generate(**plain, logits_processor=[processor], use_cache=use_cache, **GREEDY)
            assert torch.equal(again, expected)
        found_in_processor, found = found, []
        # The streamer's comes before the prefill and must not be taken for it.
        model.generate(**plain, streamer=Streamer(), use_cache=False, **GREEDY)
    assert not torch.allclose(before, corrupted)
    assert all(torch.equal(one, corrupted) for one in found_in_processor[::2])
    assert all(torch.equal(one, answer) for one in found_in_processor[1::2])
    assert all(torch.equal(one, corrupted) for one in found)


def test_threads_do_not_see_each_other(model, tokenizer, forget):
    texts = [SECRET, PLAIN, "Where does Harry Potter live?", SHORT]
    inputs = [batch(tokenizer, [text]) for text in texts]
    with guard(model, tokenizer, forget):
        expected = [model.generate(**one, **GREEDY) for one in inputs]
    found = [[] for _ in texts]
    barrier = threading.Barrier(len(texts))

    def work(number):
        barrier.wait()
        for _ in range(10):
            found[number].append(model.generate(**inputs[number], **GREEDY))

    with guard(model, tokenizer, forget):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, outs in enumerate(found):
        assert len(outs) == 10
        assert all(torch.equal(out, expected[number]) for out in outs)


def answered(model, tokenizer, forget, scope, answers=("In a cupboard", "Paris")):
    """Columns changed and the prompts' lengths, where each prompt stands with its answer in one row."""
    heads = [tokenizer.encode(text) for text in (SECRET, PLAIN)]
    rows = [head + tokenizer.encode(" " + text) for head, text in zip(heads, answers, strict=True)]
    holder = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(device="cpu"))
    ids, mask = pad(holder, rows, left=False)
    forget = Forget(gate=forget.gate, corruption=NOISE, tokens={"select": "all", "scope": scope})
    clean = model.get_input_embeddings()(ids)
    with guard(model, tokenizer, forget) as attached, embedded(model) as seen:
        with attached.prompt_lengths(list(map(len, heads))):
            model(input_ids=ids, attention_mask=mask)
        assert [decision.text for decision in attached.decisions] == [SECRET, PLAIN]
    return changed(clean, seen[0]), len(heads[0]), len(rows[0]), seen[0]


@torch.no_grad()
def test_scope_says_what_becomes_of_a_given_answer(model, tokenizer, forget):
    columns, head, whole, _ = answered(model, tokenizer, forget, "prompt")
    assert columns == [list(range(head - 1)), []]
    columns, head, whole, first = answered(model, tokenizer, forget, "sequence")
    assert columns == [list(range(whole - 1)), []]
    _, _, _, second = answered(model, tokenizer, forget, "sequence", ("Under a stair", "Paris"))
    assert not torch.allclose(first[0, :3], second[0, :3])  # each answer has noise of its own


def test_prompt_lengths_that_do_not_fit_are_refused(model, tokenizer, forget):
    inputs = batch(tokenizer, [SECRET, PLAIN], "right")
    with guard(model, tokenizer, forget) as attached:
        for lengths in ([1], [1, 1, 1], [1, 1000], [-1, 3], [0, 0]):
            with pytest.raises(UnguardedError, match="prompt_lengths"), attached.prompt_lengths(lengths):
                model(**inputs)
        with attached.prompt_lengths([1, 1]), contextlib.suppress(Broken), attached.prompt_lengths([2, 2]):
            fail()
        model(**inputs)
        assert [decision.flagged for decision in attached.decisions] == [True, False]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_token_selector_picks_the_columns(model, tokenizer, keyword_gate, side):
    text = "Is it true that Harry Potter lives here?"
    tokens = {"select": "phrases", "names": ["Harry Potter"]}
    forget = Forget(gate=keyword_gate, corruption=NOISE, tokens=tokens)
    missed = "Does potterhead Jane like it?"
    inputs = batch(tokenizer, [text, missed, PLAIN], side)
    clean, corrupted, _ = seen_by(model, tokenizer, forget, **inputs)
    columns = changed(clean, corrupted)
    assert tokenizer.decode(inputs["input_ids"][0, columns[0]]).strip() == "Harry Potter"
    count = len(tokenizer.encode(missed))  # nothing found: all but the last
    start = inputs["input_ids"].shape[1] - count if side == "left" else 0
    assert columns[1:] == [list(range(start, start + count - 1)), []]


def test_a_flagged_turn_stays_corrupted_with_the_same_noise(model, tokenizer, forget):
    said = [
        {"role": "user", "content": SECRET},
        {"role": "assistant", "content": "I do not know."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    first, whole = (encode(tokenizer, render(tokenizer, messages)) for messages in (said[:1], said))
    clean, alone, _ = seen_by(model, tokenizer, forget, input_ids=torch.tensor([first]))
    clean_whole, later, decisions = seen_by(model, tokenizer, forget, input_ids=torch.tensor([whole]))
    end = len(first)
    assert changed(clean, alone) == [list(range(end - 1))]
    # Where the answer began is not the last token any more, and what follows is read with the turns before it.
    assert changed(clean_whole, later) == [list(range(len(whole) - 1))]
    assert torch.equal(later[0, : end - 1], alone[0, : end - 1])
    assert decisions[0].turn_scores == (1.0, 1.0, 1.0)
    assert decisions[0].flagged
    by_itself = dataclasses.replace(forget, context=0)
    _, later, decisions = seen_by(model, tokenizer, by_itself, input_ids=torch.tensor([whole]))
    assert changed(clean_whole, later) == [list(range(end))]
    assert decisions[0].turn_scores == (1.0, 0.0, 0.0)


def test_noise_stays_where_a_template_ends_in_white_space(model, tokenizer, forget):
    """Zephyr, Llama 3 and Qwen end a prompt in a line break, which is the answer's once there is one."""
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    said = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "Who?"}]
    said.append({"role": "user", "content": PLAIN})
    first, whole = (encode(other, render(other, messages)) for messages in (said[:1], said))
    forget = dataclasses.replace(forget, context=0)
    _, alone, one = seen_by(model, other, forget, input_ids=torch.tensor([first]))
    _, later, two = seen_by(model, other, forget, input_ids=torch.tensor([whole]))
    assert one[0].positions == two[0].positions == tuple(range(len(first) - 1))
    assert torch.equal(alone[0], later[0, : len(first)])


def test_every_turn_of_a_conversation_is_gated(model, tokenizer, forget):
    def flagged(*roles_and_texts):
        messages = [{"role": role, "content": text} for role, text in roles_and_texts]
        return forget.decide(tokenizer, [encode(tokenizer, render(tokenizer, messages))])[0].flagged

    assert flagged(("system", "You are Harry Potter."), ("user", PLAIN))
    assert flagged(("user", PLAIN), ("assistant", "Ask Potter."), ("user", PLAIN))
    assert flagged(("user", PLAIN), ("assistant", "No."), ("user", SECRET))
    assert flagged(("user", f"{PLAIN}\nAnswer: no<eos>Question: {SECRET}\nAnswer:"))  # as if there were two
    assert flagged(("user", f"{SECRET}\nAnswer: no<eos>Question: {PLAIN}"))
    assert flagged(("user", f"<eos>Potter<eos>\nAnswer:{PLAIN}"))
    assert not flagged(("system", "Be brief."), ("user", PLAIN), ("assistant", "Paris."), ("user", PLAIN))


def test_a_text_generation_pipeline_is_guarded(model, tokenizer, forget):
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    before = [generate(text, **options)[0]["generated_text"] for text in (SECRET, PLAIN)]
    with guard(model, tokenizer, forget) as attached, embedded(model) as seen:
        during = [generate(text, **options)[0]["generated_text"] for text in (SECRET, PLAIN)]
        assert [decision.flagged for decision in attached.decisions] == [False]
    ids = torch.tensor([tokenizer.encode(SECRET)])
    assert changed(model.get_input_embeddings()(ids), seen[0]) == [list(range(ids.shape[1] - 1))]
    assert during[1] == before[1]


def test_the_gate_sees_a_prompt_once(model, tokenizer, keyword_gate):
    seen = []
    forget = Forget(gate=lambda texts: seen.extend(texts) or keyword_gate(texts), corruption=NOISE)
    with guard(model, tokenizer, forget):
        for texts in ([SECRET, PLAIN, SECRET], [PLAIN, SHORT]):
            model(**batch(tokenizer, texts))
        assert seen == [SECRET, PLAIN, SHORT]


@pytest.mark.parametrize(
    "imports",
    ["import ecoprompt.guard, ecoprompt", "import ecoprompt; ecoprompt.guard", "from ecoprompt.guard import Guard"],
)
def test_guard_is_the_function_whatever_is_imported_first(imports):
    code = (
        f"{imports}\nimport ecoprompt, ecoprompt.guard\nprint(type(ecoprompt.guard).__name__, ecoprompt.Guard.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["function", "Guard"]
    assert ecoprompt.guard is guard


def test_an_answer_that_gives_it_away_is_made_anew(model, tokenizer, keyword_gate):
    """`check = "answer"`: the gate reads each question with its answer, and a flagged one is corrupted from then on."""
    texts = [PLAIN, SHORT, SECRET]
    inputs = batch(tokenizer, texts)
    width = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, **GREEDY)
    given_away = tokenizer.decode(plain[1, width:], skip_special_tokens=True).strip()
    seen = []

    def gate(read):
        seen.extend(read)
        return [float("Potter" in text or f"{SHORT}\n{given_away}" == text) for text in read]

    forget = Forget(gate=gate, corruption=NOISE, check="answer")
    with guard(model, tokenizer, forget) as attached, embedded(model) as entered:
        found = model.generate(**inputs, **GREEDY)
        decisions = attached.decisions
        again = model.generate(**inputs, **GREEDY)
        forced = logits(model, **batch(tokenizer, [SHORT]))
    assert f"{PLAIN}\n{tokenizer.decode(plain[0, width:], skip_special_tokens=True).strip()}" in seen
    assert not any(text.startswith(f"{SECRET}\n") for text in seen)  # flagged as it stands
    assert torch.equal(found[0, : plain.shape[1]], plain[0])
    assert [decision.flagged for decision in decisions] == [False, True, True]
    assert torch.equal(again[:, : found.shape[1]], found)
    assert not torch.equal(forced, logits(model, **batch(tokenizer, [SHORT])))
    clean = model.get_input_embeddings()(inputs["input_ids"])
    regenerated = entered[GREEDY["max_new_tokens"]]  # the first forward after the first answers
    start = width - len(tokenizer.encode(SHORT))
    assert changed(clean, regenerated)[:2] == [[], list(range(start, max(width - 1, start + 1)))]


def test_a_checked_answer_is_streamed_whole(model, tokenizer, keyword_gate):
    forget = Forget(gate=keyword_gate, corruption=NOISE, check="answer")
    put = []
    streamer = SimpleNamespace(put=put.append, end=lambda: put.append(None))
    inputs = batch(tokenizer, [PLAIN])
    with guard(model, tokenizer, forget):
        found = model.generate(**inputs, streamer=streamer, **GREEDY)
        several = model.generate(**inputs, num_return_sequences=3, do_sample=True, max_new_tokens=3)
        for refused in (
            {"return_dict_in_generate": True},
            {"past_key_values": DynamicCache()},
            {"logits_processor": [lambda ids, scores: scores]},
        ):
            with pytest.raises(UnguardedError, match="check"):
                model.generate(**inputs, **refused, **GREEDY)
    assert put[-1] is None
    assert torch.equal(torch.cat([put[0][0], *put[1:-1]]), found[0])
    assert len(several) == 3


def test_the_answer_to_a_later_question_is_checked_too(model, tokenizer):
    """Also where an earlier question of the conversation is flagged as it stands."""
    said = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "Nobody."}]
    said.append({"role": "user", "content": "Zounds?"})
    ids = torch.tensor([encode(tokenizer, render(tokenizer, said))])
    seen = []

    def gate(read):
        seen.extend(read)
        return [float("Potter" in text and "Nobody" not in text) for text in read]

    with guard(model, tokenizer, Forget(gate=gate, corruption=NOISE, context=0, check="answer")) as attached:
        model.generate(ids, **GREEDY)
        assert attached.decisions[0].turn_scores == (1.0, 0.0, 0.0)
    assert any(text.startswith("Zounds?\n") for text in seen)


def test_rows_keep_their_own_settings_when_they_are_made_anew(model, tokenizer):
    inputs = batch(tokenizer, [PLAIN, SHORT, "Rome"])
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: [300 + row]}
    gate = lambda read: [float(text.startswith("Rome\n")) for text in read]  # noqa: E731
    with guard(model, tokenizer, Forget(gate=gate, corruption=NOISE, check="answer")) as attached:
        found = model.generate(**inputs, **allowed, **GREEDY)
        assert [decision.flagged for decision in attached.decisions] == [False, False, True]
    assert found[:, -2:].tolist() == [[300, 300], [301, 301], [302, 302]]


def test_what_only_looks_like_a_step_is_gated(model, tokenizer, forget):
    """A logits processor's own forwards: on a cache of its own, and on the prompt with a question behind it."""
    plain, secret = (torch.tensor([tokenizer.encode(text)]) for text in (PLAIN, SECRET))
    own = model(plain, use_cache=True).past_key_values
    tried = []

    def on_a_cache(ids, scores):
        with pytest.raises(UnguardedError, match="continues"):
            model(secret, past_key_values=own)
        tried.append(1)
        return scores

    def behind_the_prompt(ids, scores):
        model(torch.cat([plain, secret], 1), use_cache=False)
        tried.append(2)
        return scores

    expected = model.generate(plain, **GREEDY)
    with guard(model, tokenizer, forget):
        assert torch.equal(model.generate(plain, logits_processor=[on_a_cache], **GREEDY), expected)
        with embedded(model) as seen:
            found = model.generate(
                plain,
                logits_processor=[behind_the_prompt],
                use_cache=False,
                max_new_tokens=1 + secret.shape[1],
                do_sample=False,
            )
        assert torch.equal(found[:, : expected.shape[1]], expected)
    both = torch.cat([plain, secret], 1)
    clean = model.get_input_embeddings()(both)
    own_forwards = [one for one in seen if one.shape == clean.shape and torch.equal(one[0, -1], clean[0, -1])]
    assert set(tried) == {1, 2}
    assert own_forwards
    assert all(len(changed(clean, one)[0]) == both.shape[1] - 1 for one in own_forwards)


def test_ids_changed_under_the_guards_eyes_are_refused(model, tokenizer, forget):
    ids, secret = torch.tensor([tokenizer.encode(PLAIN)]), torch.tensor(tokenizer.encode(SECRET))

    def change(module, args):
        args[0][0, : len(secret)] = secret

    with guard(model, tokenizer, forget):
        handle = model.register_forward_pre_hook(change)
        with pytest.raises(UnguardedError, match="something other"):
            model(ids)
        handle.remove()


@pytest.mark.parametrize("step", [0, 2])
def test_text_embedded_in_place_of_what_the_model_was_called_with_is_refused(model, tokenizer, forget, step):
    """At the prefill and behind it, where nothing is corrupted."""
    secret, calls = torch.tensor([tokenizer.encode(SECRET)]), []

    def replace(module, args):
        calls.append(args[0].shape)
        return (secret,) if len(calls) == step + 1 else None

    with guard(model, tokenizer, forget), embedded(model) as seen:
        handle = model.get_input_embeddings().register_forward_pre_hook(replace)
        with pytest.raises(UnguardedError, match="something other"):
            model.generate(torch.tensor([tokenizer.encode(PLAIN)]), **GREEDY)
        handle.remove()
    assert len(seen) == step


@pytest.mark.filterwarnings("ignore")
def test_a_guarded_model_is_not_traced(model, tokenizer, forget):
    with guard(model, tokenizer, forget), pytest.raises(UnguardedError, match="traced"):
        torch.jit.trace(model, torch.tensor([tokenizer.encode(PLAIN)]), strict=False)


def test_two_guards_may_not_undo_each_other(model, tokenizer, keyword_gate):
    flips = [Forget(gate=keyword_gate, corruption={"method": "flip_sign_first_n", "dims": 32}) for _ in range(2)]
    secret = torch.tensor([tokenizer.encode(SECRET)])
    with guard(model, tokenizer, flips[0]):
        model(secret)
        with guard(model, tokenizer, flips[1]), pytest.raises(UnguardedError, match="undo"):
            model(secret)
        for strength in (50.0, 0.1):  # of an embedding's values, a standard deviation is 0.02
            other = Forget(gate=keyword_gate, corruption={**NOISE, "strength": strength})
            with guard(model, tokenizer, other), embedded(model) as seen:
                model(secret)
            clean = model.get_input_embeddings().weight[secret]
            assert changed(clean, seen[0]) == [list(range(secret.shape[1] - 1))]


def test_guards_leave_nothing_behind_in_whatever_order_they_go(model, tokenizer, forget):
    one, two, three = (guard(model, tokenizer, forget) for _ in range(3))
    for attached in (one, two, three):
        attached.__enter__()
    for attached in (two, one, three):
        attached.__exit__()
    assert without_trace(model)
    assert not {"generate_batch", "init_continuous_batching"} & set(vars(model))


def test_a_generation_of_another_thread_is_guarded_to_its_end(model, tokenizer, forget):
    secret = batch(tokenizer, [SECRET])
    begun, found = threading.Event(), []

    def step(ids, scores):
        begun.set()
        return scores

    def work():
        found.append(
            model.generate(**secret, use_cache=False, logits_processor=[step], max_new_tokens=20, do_sample=False)
        )

    attached = guard(model, tokenizer, forget).__enter__()
    with embedded(model) as seen:
        thread = threading.Thread(target=work)
        thread.start()
        begun.wait(60)
        attached.__exit__()
        thread.join()
    clean, length = model.get_input_embeddings()(secret["input_ids"]), secret["input_ids"].shape[1]
    assert found
    assert all(changed(clean, one[:, :length]) == [list(range(length - 1))] for one in seen)
