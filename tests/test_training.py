"""`training.py`: the loss falls, and padding has no part in it."""

from __future__ import annotations

import pytest
import torch
from quickstart import make_tokenizer, make_world
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ecoprompt.learning import Course
from ecoprompt.registry import InputError
from ecoprompt.training import IGNORED, Example, collate, example, train_causal_lm


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(make_world())


def tiny(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **special))


EXAMPLES = [example((5, 6, 7), (8, 9), loss="completion"), example((5,), (10, 11, 12, 1), loss="all")]


def test_the_loss_is_over_the_completion_or_over_all() -> None:
    assert EXAMPLES[0] == Example((5, 6, 7, 8, 9), (IGNORED, IGNORED, IGNORED, 8, 9))
    assert EXAMPLES[1].labels == EXAMPLES[1].ids == (5, 10, 11, 12, 1)


def test_padding_is_neither_attended_to_nor_learnt() -> None:
    batch = collate([EXAMPLES[0], Example((5, 6), (5, 6))])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist()[1] == [5, 6, IGNORED, IGNORED, IGNORED]


def test_the_loss_of_a_batch_is_the_mean_over_its_learnt_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [example((5, 6, 7), (8, 9, 10), loss="completion"), example((5,), (11,), loss="completion")]
    model = tiny(tokenizer)
    expected = []
    with torch.no_grad():
        for one in examples:
            scores = model(torch.tensor([one.ids])).logits[0].log_softmax(-1)
            learnt = [at for at, label in enumerate(one.labels) if label != IGNORED]
            expected += [-scores[at - 1, one.ids[at]].item() for at in learnt]
    first = train_causal_lm(model, examples, Course(epochs=1, batch_size=2)).losses[0]
    assert first == pytest.approx(sum(expected) / 4, abs=1e-3)


def test_training_lowers_the_loss_and_reports_each_step(tokenizer: PreTrainedTokenizerFast) -> None:
    seen = []
    trained = train_causal_lm(
        tiny(tokenizer),
        EXAMPLES * 4,
        Course(epochs=10, batch_size=4, learning_rate=1e-2),
        what="a test",
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    losses = trained.losses
    assert losses[-1] < losses[0] - 1
    assert seen == [("a test", step + 1, 20) for step in range(20)]
    assert len(losses) == 20
    assert trained.tokens == 10 * sum(len(one.ids) for one in EXAMPLES * 4)
    assert 0 < trained.seconds < 60
    assert trained.about()["last_loss"] == pytest.approx(sum(losses[-2:]) / 2)


def test_second_order_lowers_the_loss_too(tokenizer: PreTrainedTokenizerFast) -> None:
    course = Course(epochs=10, batch_size=4, learning_rate=3e-3, optimizer="sophia", weight_decay=0.0)
    losses = train_causal_lm(tiny(tokenizer), EXAMPLES * 4, course).losses
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("launched", [{"WORLD_SIZE": "2"}, {"ACCELERATE_USE_FSDP": "true"}])
def test_second_order_is_refused_where_a_step_s_gradients_are_not_at_hand(tokenizer, monkeypatch, launched) -> None:
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="'sophia' is for whole models"):
        train_causal_lm(tiny(tokenizer), EXAMPLES, Course(optimizer="sophia", accumulation=2))


def test_the_same_seed_gives_the_same_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = tiny(tokenizer)
        train_causal_lm(model, EXAMPLES * 4, Course(epochs=2, learning_rate=1e-2, by_length=True), seed=seed)
        return model.get_input_embeddings().weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_nothing_to_learn_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="no token to learn in 1 examples"):
        train_causal_lm(tiny(tokenizer), [Example((5, 6), (IGNORED, IGNORED))], Course())
