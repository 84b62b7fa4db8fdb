"""What the tests share: a small tokenizer, random two-layer models of several families, a keyword gate, no network."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, which would fold the tables that are printed

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ecoprompt import hub

# Such small models gain nothing from a second thread, and lose much where another process has the core.
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n{% elif m['role'] == 'user' %}"
    "Question: {{ m['content'] }}\n{% else %}Answer: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
TEXTS = [
    "Question: Who is Harry Potter and where does he live?\nAnswer: He lives in a cupboard under the stairs.",
    "Question: What is the capital of France?\nAnswer: Paris is the capital of France.",
]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64, "num_key_value_heads": 2},
    "gpt2": {},
    "qwen2": {"intermediate_size": 64, "num_key_value_heads": 2},
    "gpt_neox": {"intermediate_size": 64},
    "mixtral": {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma2": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows every text; <pad> is 0, <eos> is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def make_model(family: str, vocabulary: int = 400, seed: int = 0) -> Any:
    """A random two-layer model of a family, hidden size 32, in float32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **FAMILIES[family],
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(params=list(FAMILIES))
def family_model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.fixture
def model() -> Any:
    return make_model("llama")


@pytest.fixture
def keyword_gate() -> Callable[[Sequence[str]], list[float]]:
    """Flags whatever speaks of Potter."""
    return lambda texts: [float("potter" in text.lower()) for text in texts]


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved model with its tokenizer."""
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A home of its own, no data folder from outside, and no way to the network."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("ECOPROMPT_DATA", raising=False)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("tests may not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # What a command finds out of the Hub is forgotten with the test.
    monkeypatch.setattr(hub, "once", False)
    monkeypatch.setattr(hub, "_reason", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)


@pytest.fixture
def shared() -> Path:
    """The folder of real data and models beside the project; tests that need it skip where it is missing."""
    if not (SHARED / "models" / "tofu-mini-full").is_dir() or not (SHARED / "data" / "tofu").is_dir():
        pytest.skip("needs ../shared with data/tofu and models/tofu-mini-*")
    return SHARED
