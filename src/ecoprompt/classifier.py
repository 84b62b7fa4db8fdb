"""Sequence classifiers from a folder or the Hub, loaded without trust in what is written there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ecoprompt.files import CLASSIFIER, MOST_VOCABULARY, check_folder, read_json, read_shapes
from ecoprompt.hub import fetch
from ecoprompt.registry import InputError, first_line

MOST_PARAMETERS = 2**31
HEAD = 2**24
"""Parameters that a new head may add to those of a model."""
_CODE = ("auto_map", "custom_pipelines", "quantization_config", "transformers_weights", "use_kernels")
"""Keys of a config.json with which transformers would run a repository's code, fetch kernels or open other files."""
_FORGET = {"1", "forget", "forgotten", "label_1", "unlearn"}
_RETAIN = {"0", "keep", "kept", "label_0", "retain", "retained"}


def load_classifier(name: str, **head: Any) -> tuple[Any, Any]:
    """The model (float32, on the GPU if there is one) and tokenizer `name`, a Hub id or a folder.

    Without `head` it must be a classifier that is complete; with it, the classes are those of `head` and are to be
    trained. Raises InputError if a file is damaged, claims more than it holds, or asks for code to be run: none is.
    """
    import torch
    import transformers

    what = f"the gate's classifier '{name}'"
    folder = Path(name) if Path(name).is_dir() else fetch(what, name, CLASSIFIER, "config.json")
    check(folder, labelled=not head)
    transformers.utils.logging.disable_progress_bar()
    safe = {"trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
        config = transformers.AutoConfig.from_pretrained(folder, **safe, **head)
        _check_size(folder, config)
        model, about = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **safe
        )
    except InputError:
        raise
    # Whatever a stranger's files make the loaders stumble over, these files are what is wrong.
    except Exception as error:
        said = first_line(error)[:300]
        raise InputError(f"{what} cannot be loaded ({said}); give one with safetensors weights") from None
    if not head and (about["missing_keys"] or about["mismatched_keys"]):
        lacking = sorted(map(str, [*about["missing_keys"], *about["mismatched_keys"]]))
        raise InputError(f"{folder}: the weights lack {', '.join(lacking[:3])}, so this is no trained classifier")
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise InputError(f"{folder}: found weights that are not finite numbers")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def check(folder: Path, labelled: bool = True) -> None:
    """Raises InputError for a classifier's folder that is not to be opened; reads no weights."""
    check_folder(folder, codeless=False)
    config = read_json(folder / "config.json")
    asked = [key for key in config if key in _CODE or "attn_implementation" in key]
    if asked:
        raise InputError(f"{folder / 'config.json'}: '{asked[0]}' could make other code run; nothing of it is loaded")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder / 'adapter_config.json'}: found an adapter, expected a whole classifier")
    tokenizer = folder / "tokenizer_config.json"
    settings = read_json(tokenizer) if tokenizer.exists() else {}
    for key in settings:
        if key in ("auto_map", "init_inputs") or key.endswith(("_file", "_files")):
            raise InputError(f"{tokenizer}: '{key}' could make other code run or other files be read")
    if (folder / "tokenizer.json").exists():
        _check_patterns(folder / "tokenizer.json", read_json(folder / "tokenizer.json", MOST_VOCABULARY))
    weights = folder / "model.safetensors"
    if not weights.is_file():
        found = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".h5", ".msgpack", ".pt"))
        instead = f" ({', '.join(found[:3])} may hold code and is not opened)" if found else ""
        raise InputError(f"{folder}: found no model.safetensors, which weights must be in{instead}")
    _check_numbers(folder / "config.json", config, read_shapes(weights))
    if labelled:
        _check_labels(folder / "config.json", config)


def _check_patterns(path: Path, tokenizer: Mapping[str, Any]) -> None:
    """Raises InputError for a regular expression that repeats a group: it may take for ever on a text made for it."""
    parts = [tokenizer.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    for key, value in _leaves(parts):
        if key == "Regex" and re.search(r"(?<!\\)\)(\+|\*|\{\d*,)", str(value)):
            raise InputError(f"{path}: found the pattern {value!r:.60}, which may take for ever to match")


def _check_numbers(path: Path, config: Mapping[str, Any], held: Mapping[str, list[int]]) -> None:
    """Sizes that the weights do not bear out would be allocated before anybody sees that they are wrong."""
    widest = max((side for shape in held.values() for side in shape), default=0)
    for key, value in _leaves(config):
        if type(value) is not int:
            continue
        most = 2**40
        if "layer" in key or "expert" in key or key in ("depth", "num_labels"):
            most = min(500, len(held))
        elif any(part in key for part in ("size", "dim", "width", "d_model", "d_ff")):
            most = widest
        elif any(part in key for part in ("position", "heads", "n_ctx", "length", "groups")):
            most = 2**18
        if abs(value) > most:
            raise InputError(f"{path}: '{key}': found {value!r:.40}, which the weights do not bear out")


def _leaves(document: Any) -> Iterator[tuple[str, Any]]:
    """All texts, numbers and the like in a JSON document, each with the key that it stands under."""
    waiting = [("", document)]
    while waiting:
        key, here = waiting.pop()
        if isinstance(here, Mapping):
            waiting += here.items()
        elif isinstance(here, list):
            waiting += ((key, value) for value in here)
        else:
            yield key, here


def _check_labels(path: Path, config: Mapping[str, Any]) -> None:
    """A classifier has two labels, and says of each once which it is."""
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    count = len(labels) if isinstance(labels, Mapping) else labels
    if not isinstance(labels, Mapping) or set(labels) != {"0", "1"} or config.get("num_labels", 2) != 2:
        raise InputError(f"{path}: the gate's classifier has {count} labels, expected 2, called 0 and 1")
    numbers = config.get("label2id")
    if isinstance(numbers, Mapping) and numbers != {str(label): int(number) for number, label in labels.items()}:
        raise InputError(f"{path}: 'label2id' and 'id2label' contradict each other")
    flagged_label(labels)


def flagged_label(labels: Mapping[Any, str]) -> int:
    """Which of two labels, 0 or 1, is that of prompts to flag; raises InputError if their names do not tell."""
    zero, one = (str(labels.get(number, labels.get(str(number)))).lower() for number in (0, 1))
    if zero in _RETAIN and one in _FORGET:
        return 1
    if zero in _FORGET and one in _RETAIN:
        return 0
    raise InputError(
        f"the gate's classifier has the labels {zero!r:.40} and {one!r:.40}, expected LABEL_0 and LABEL_1 (to be "
        "forgotten), or retain and forget"
    )


def _check_size(folder: Path, config: Any) -> None:
    """Raises InputError if the model that the configuration describes has more parameters than there are weights."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    needed = sum(weight.numel() for weight in model.parameters())
    held = sum(math.prod(shape) for shape in read_shapes(folder / "model.safetensors").values())
    if needed > held + HEAD or needed > MOST_PARAMETERS:
        raise InputError(f"{folder}: config.json describes {needed} parameters, the weights hold {held}")
