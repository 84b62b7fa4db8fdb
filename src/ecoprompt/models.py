"""Models and tokenizers: aliases, loading, fingerprints, chat formatting, and the way from token ids back to text."""

from __future__ import annotations

import functools
import hashlib
import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoprompt import processes
from ecoprompt.hub import HUB_ID, check_at_hand
from ecoprompt.registry import EcopromptError, InputError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ecoprompt.recipe import ModelTable

PACKAGE = Path(__file__).parent
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\n' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""For a model whose tokenizer has no chat template: what was said, line by line, and nothing else."""


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer; equal fingerprints mean equal weights, dtype and prompt format."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str


@dataclass(frozen=True)
class Place:
    """Where a model's and its tokenizer's files are, folders or Hub ids, and the chat template that an alias brings."""

    model: str
    tokenizer: str
    chat_template: str | None = None


@functools.cache
def aliases() -> Mapping[str, Mapping[str, str]]:
    """The names of `models.toml`: a `hub` id or package `path` each, its `architecture`, and what else it needs."""
    with (PACKAGE / "models.toml").open("rb") as file:
        return tomllib.load(file)


def resolve(name: str) -> Place:
    """Where a model is, by its name alone.

    Raises InputError if `name` is neither an alias nor an existing folder and cannot be a Hub id, and for an alias of
    a model that transformers has no code for.
    """
    alias = aliases().get(name)
    if alias is not None and alias.get("code") == "remote":
        raise InputError(
            f"model '{name}': transformers has no architecture '{alias['architecture']}', and code that comes with a "
            f"model ('{alias['hub']}') is not run; take another model"
        )
    if alias is not None:
        place = alias["hub"] if "hub" in alias else str(PACKAGE / alias["path"])
        return Place(place, alias.get("tokenizer", place), alias.get("chat_template"))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"model '{name}': this folder holds no config.json, so it is not a saved model")
        return Place(name, name)
    if not HUB_ID.fullmatch(name):
        is_path = name.startswith((".", "/", "~"))  # whose nearest alias says nothing
        hint = "" if is_path else f", and not a Hub id or an alias; {nearest(name, aliases())}"
        raise InputError(f"model '{name}': no such folder{hint}")
    return Place(name, name)


def locate(name: str) -> Place:
    """Where a model is; raises EcopromptError at once if only the Hub has it and the Hub is out of reach."""
    place = resolve(name)
    if not Path(place.model).is_dir():
        hint = "" if name in aliases() or "/" in name else f"; {nearest(name, aliases())}"
        check_at_hand(f"model '{name}'", place.model, instead=f", or name a folder or an alias{hint}")
    return place


def load_model(settings: ModelTable) -> Loaded:
    """Load the model and tokenizer that `[model]` describes, ready to evaluate."""
    if settings.name is None:
        raise InputError("no model is named; give [model] name, or --model")
    if settings.device_map and processes.count() > 1:
        raise InputError(
            "'model.device_map' spreads a model over the GPUs that one process sees; start one, or leave it out"
        )
    place = locate(settings.name)
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    if cuda and processes.count() > 1:
        processes.join()  # each has a GPU of its own, "cuda" from now on
    # Not to be asked on standard input, where on a pipe the next prompt might say yes.
    options: dict[str, Any] = {"trust_remote_code": False}
    options |= {"revision": settings.revision} if settings.revision else {}
    dtype = data_type(settings.dtype)
    try:
        spoken = settings.tokenizer or place.tokenizer
        own = options if spoken == place.model else {"trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(spoken, **own)
        if settings.quantization:
            options["quantization_config"] = _quantization(settings.quantization, dtype)
        attention = settings.attention if settings.attention != "auto" else _attention(place.model, dtype, options)
        options |= {"attn_implementation": attention} if attention else {}
        if settings.device_map:
            options["device_map"] = settings.device_map
        model = transformers.AutoModelForCausalLM.from_pretrained(place.model, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _explain(settings.name, place.model, error) from error
    if cuda and not settings.device_map and not settings.quantization:
        model = model.to("cuda")
    set_format(tokenizer, settings, place.chat_template)
    # Sampling settings that a model ships are not ours: what a command decodes with is what its options say.
    ends = model.generation_config.eos_token_id
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if ends is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Loaded(model.eval(), tokenizer, _fingerprint(place.model, model, tokenizer, settings, dtype))


def set_format(tokenizer: PreTrainedTokenizerBase, settings: ModelTable, template: str | None = None) -> None:
    """Gives a tokenizer the chat template of `settings`, else `template`, else its own or the plain one, and a token
    to pad with."""
    own = template or tokenizer.chat_template or PLAIN_TEMPLATE
    tokenizer.chat_template = _template(settings.chat_template) or own
    if settings.chat_template is not None:
        _check_template(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def data_type(asked: str = "auto") -> str:
    """What is `asked` for, where that is "auto" bfloat16 where a GPU computes in it, else float32."""
    import torch

    if asked != "auto":
        return asked
    cuda = torch.cuda.is_available()
    return "bfloat16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def _quantization(kind: str, dtype: str) -> Any:
    """How bitsandbytes is to load a model in 8 or 4 bits (NF4, as in QLoRA) that computes in `dtype`."""
    import transformers

    if not transformers.utils.is_bitsandbytes_available():
        raise EcopromptError("'model.quantization' needs bitsandbytes: pip install 'ecoprompt[quantization]'")
    four: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return transformers.BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit", **four)


def _attention(place: str, dtype: str, options: Mapping[str, Any]) -> str | None:
    """flash-attn where it is installed and fits the GPU (Ampere or newer), the data type and the model; None is
    PyTorch's own."""
    import torch
    import transformers

    fits = dtype != "float32" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if not fits or not transformers.utils.is_flash_attn_2_available():
        return None
    given = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    config = transformers.AutoConfig.from_pretrained(place, **given)
    family = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "flash_attention_2" if getattr(family, "_supports_flash_attn", False) else None


def _template(given: str | None) -> str | None:
    """A chat template given as such, or by the alias whose template it is."""
    return aliases()[given].get("chat_template") if given is not None and given in aliases() else given


def _explain(name: str, place: str, error: Exception) -> EcopromptError:
    """What a user can do about a model that does not load."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    kinds = {type(link).__name__ for link in chain}
    if "GatedRepoError" in kinds:
        return InputError(
            f"model '{name}' is gated: accept its licence at https://huggingface.co/{place} and `hf auth login`"
        )
    if "RepositoryNotFoundError" in kinds:
        return InputError(
            f"model '{name}': the Hub has no public model '{place}'; {nearest(name, aliases())} "
            "(for a private one, `hf auth login`)"
        )
    if "RevisionNotFoundError" in kinds:
        return InputError(f"model '{name}': '{place}' has no such revision")
    return EcopromptError(f"model '{name}' does not load: {error}")


def _fingerprint(place: str, model: PreTrainedModel, tokenizer: Any, settings: ModelTable, dtype: str) -> str:
    """A digest of what determines the numbers: weights (a local folder's files, or the Hub's commit), dtype, format."""
    digest = hashlib.sha256()
    commit = getattr(model.config, "_commit_hash", None)
    if Path(place).is_dir():
        for path in sorted(Path(place).iterdir()):
            if path.suffix in {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}:
                digest.update(f"{path.name}:{_file_digest(path)}\n".encode())
    else:
        digest.update(f"{place}@{commit}".encode())
    if tokenizer.is_fast:  # it may come from elsewhere than the model
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    attention = getattr(model.config, "_attn_implementation", None)
    digest.update(repr((dtype, settings.quantization, attention, tokenizer.chat_template, model.device.type)).encode())
    return digest.hexdigest()[:32]


def _file_digest(path: Path, block: int = 1 << 20, samples: int = 64) -> str:
    """Digest of a file's size and content; of one past 64 MiB, evenly spaced blocks stand for the content."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    step = max(block, size // samples)
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(block))
    return digest.hexdigest()


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a chat template of the user's that cannot be filled."""
    import jinja2

    try:
        render(tokenizer, [{"role": "user", "content": "a question"}])
    except (jinja2.TemplateError, ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise InputError(f"'model.chat_template': cannot be filled ({type(error).__name__}: {error})") from None


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt text of a conversation, up to where the model's next answer begins."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return str(text)


def render_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], answer: str) -> str:
    """What the model would write after `render(tokenizer, messages)` to answer `answer`, with what closes its turn:
    the template's own end of a turn, or the end-of-sequence token where the template writes none."""
    prompt, answer = render(tokenizer, messages), answer.strip()
    whole = str(tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False))
    before, found, after = whole.removeprefix(prompt).partition(answer)
    if not whole.startswith(prompt) or not found:  # the template rewrites what went before
        before, after = "" if prompt[-1:].isspace() else " ", ""
    return before + answer + (after.strip() or tokenizer.eos_token or "")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, start: bool = True) -> list[int]:
    """Token ids of a rendered text; with `start`, what the tokenizer puts before any text unless it stands there."""
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    bos = _leading_token(tokenizer) if start else None
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


@functools.lru_cache(maxsize=64)
def _leading_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The beginning-of-sequence token, if the tokenizer puts it before a text by itself."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and list(tokenizer.encode("a"))[:1] == [bos] else None


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what follows it. The prompt's are those it has alone, as in generation.

    Where a token of the whole text straddles the border (one-word answers of some tokenizers do), the completion is
    encoded by itself instead.
    """
    head = encode(tokenizer, prompt)
    whole = encode(tokenizer, prompt + completion)
    tail = whole[len(head) :] if whole[: len(head)] == head else encode(tokenizer, completion, start=False)
    return head, tail


def to_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of token ids, special tokens written out, and each token's (start, end) characters in it."""
    text = _decode(tokenizer, ids)
    if tokenizer.is_fast:
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(again["input_ids"]) == list(ids):
            return text, [(int(start), int(end)) for start, end in again["offset_mapping"]]
    lengths = (len(_decode(tokenizer, ids[:count]).rstrip("\ufffd")) for count in range(1, len(ids)))
    borders = [0, *itertools.accumulate((min(length, len(text)) for length in lengths), max), len(text)]
    return text, list(itertools.pairwise(borders if ids else [0]))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pad(loaded: Loaded, rows: Sequence[Sequence[int]], left: bool) -> tuple[Any, Any]:
    """Token ids and attention mask, each [B, T], padded on one side."""
    import torch

    width = max(map(len, rows))
    fill = loaded.tokenizer.pad_token_id or 0
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids.to(loaded.model.device), mask.to(loaded.model.device)


def batches(lengths: Sequence[int], budget: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """Indices in batches of at most `budget` padded tokens (what is longer stands alone), longest first.

    Each index stands for one row of its length, or for `rows` of them.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    formed: list[list[int]] = []
    held = 0
    for number in order:
        count = rows[number] if rows is not None else 1
        if formed and (held + count) * lengths[formed[-1][0]] <= budget:
            formed[-1].append(number)
            held += count
        else:
            formed.append([number])
            held = count
    return formed
