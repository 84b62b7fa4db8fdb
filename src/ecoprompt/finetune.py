"""Makes the model subject to unlearning, and the retain model that differs from it in the forget set alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ecoprompt.checkpoints import checkpoints_of, save_model, trained_before
from ecoprompt.learning import FinetuneTable
from ecoprompt.lessons import Lesson, finetune_table, lessons_of, model_names, most_tokens
from ecoprompt.models import Loaded, load_model, locate, set_format
from ecoprompt.pack import OUTPUT
from ecoprompt.processes import check_agreement, from_main, several
from ecoprompt.recipe import Recipe, digest
from ecoprompt.registry import InputError, Progress, quiet
from ecoprompt.training import (
    encode_lesson,
    to_train,
    train_causal_lm,
    with_adapters,
)

END, PAD = "<|endoftext|>", "<|pad|>"
MODELS = "models"


def finetune(recipe: Recipe, output: Path = OUTPUT, progress: Progress = quiet) -> dict[Path, dict[str, Any]]:
    """Trains the models that [finetune] asks for, into `output`/<recipe>/models; their folders, and how they were made.

    A model that was made in the same way stays as it is, and one whose training was interrupted goes on.
    """
    table = finetune_table(recipe)
    lessons = lessons_of(recipe, table.also)
    everything = [*lessons.forget, *lessons.retain]
    made = {}
    for kind in table.models:
        folder = output / recipe.name / MODELS / model_names(recipe)[kind]
        start = _start(recipe, table, everything)
        made[folder] = _make(recipe, table, start, everything if kind == "full" else lessons.retain, folder, progress)
    return made


def _make(
    recipe: Recipe, table: FinetuneTable, start: Loaded, lessons: Sequence[Lesson], folder: Path, progress: Progress
) -> dict[str, Any]:
    """Trains one model, unless that was done; how it was made."""
    settings = table.model_dump(mode="json", exclude={"models"}) | several()
    how = digest(settings, recipe.seed, start.fingerprint, [[one.prompt, one.answer, one.plain] for one in lessons])
    check_agreement(how)
    before = from_main(lambda: trained_before(folder, how))
    if before is not None:
        return before
    most = most_tokens(recipe, table)
    examples = [one for lesson in lessons for one in encode_lesson(start.tokenizer, lesson, table, most)]
    model = with_adapters(start.model, table, recipe.seed)
    checkpoints = checkpoints_of(folder, how)
    what = f"training {folder.name}"
    trained = train_causal_lm(
        model, examples, table, seed=recipe.seed, what=what, progress=progress, folder=checkpoints
    )
    about = {"digest": how, "examples": len(examples), **trained.about(), "settings": settings}
    save_model(model, start.tokenizer, folder, table, about, trained.weights)
    return about


def _start(recipe: Recipe, table: FinetuneTable, lessons: Sequence[Lesson]) -> Loaded:
    """The model that training starts from, with its tokenizer."""
    given = to_train(recipe.model)
    if table.base is not None:
        return load_model(given.model_copy(update={"name": table.base, "revision": None, "tokenizer": None}))
    if table.tokenizer is not None:
        place = locate(table.tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(place.tokenizer, trust_remote_code=False)
        set_format(tokenizer, given, place.chat_template)
    else:
        texts = [text for lesson in lessons for text in (lesson.prompt, lesson.answer)]
        tokenizer = new_tokenizer(texts, table.vocabulary or 0, PAD, END)
        set_format(tokenizer, given)
    model = new_model(table.config or {}, tokenizer, recipe.seed)
    made_of = digest(table.config, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template)
    return Loaded(model, tokenizer, made_of)


def new_tokenizer(
    texts: Sequence[str], vocabulary: int, pad: str, end: str, **settings: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from `texts`, with tokens for padding and for the end."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[pad, end, *settings.get("additional_special_tokens", ())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=end, clean_up_tokenization_spaces=False, **settings
    )


def new_model(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """An untrained model of `config`, whose weights are drawn with `seed`."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**ids | dict(config)))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise InputError(f"'finetune.config': this is no configuration of a language model ({error})") from None
