"""The tables of a recipe that train a model's weights: `[finetune]` and `[baseline]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ecoprompt.registry import benchmarks, nearest
from ecoprompt.sources import Table


class LoraTable(Table):
    """Low-rank adapters in place of all weights (extra `lora`), merged into the weights at the end."""

    rank: Annotated[int, Field(ge=1)] = Field(8, description="of the adapters")
    alpha: Annotated[int, Field(ge=1)] = Field(16, description="the adapters are scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="in the adapters")
    targets: list[str] = Field([], description="names of the modules that get them; default: every linear layer")


class Course(Table):
    """How weights are trained, with a cosine schedule."""

    epochs: Annotated[float, Field(gt=0)] = Field(5.0, description="passes over the data")
    batch_size: Annotated[int, Field(ge=1)] = Field(4, description="examples on a device at once, that is of a process")
    accumulation: Annotated[int, Field(ge=1)] = Field(1, description="batches of an optimiser step")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(2e-5, description="the highest")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="share of the steps in which it rises")
    optimizer: Literal["adamw", "sophia"] = Field("adamw", description="or the second-order Sophia-G, as in SOUL")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="of the optimiser")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="longer gradients are clipped; 0: none is")
    learn: Literal["answer", "all"] = Field("answer", description="the loss is over answers, or over questions too")
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="tokens of an example; a longer answer is cut, a text divided; default: the benchmark's"
    )
    by_length: bool = Field(
        False, description="batches of like length, which saves padding; `accumulation` mixes the lengths of a step"
    )
    save_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps between two checkpoints to go on from; default: one after each epoch"
    )
    arithmetic: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the float32 weights; auto: bfloat16 on a GPU that has it, float32 on a CPU"
    )
    stored: Literal["float32", "bfloat16", "float16"] = Field("float32", description="data type of the saved weights")
    lora: LoraTable | None = Field(None, description="train low-rank adapters instead of all weights")

    @model_validator(mode="after")
    def _can_go_on(self) -> Course:
        if self.by_length and self.save_steps is not None:
            raise ValueError("found 'by_length' and 'save_steps', but it can go on from the end of an epoch only")
        return self


class FinetuneTable(Course):
    """How the model subject to unlearning is made, and a retain model that differs in the forget set alone."""

    base: str | None = Field(None, description="alias, Hub id or folder of the model to start from")
    config: dict[str, Any] | None = Field(
        None, description="or of one to make from scratch: its `model_type`, and other keys of its configuration"
    )
    tokenizer: str | None = Field(None, description="with `config`: whose tokenizer it takes")
    vocabulary: Annotated[int, Field(ge=300)] | None = Field(
        None, description="or the size of one to train on the same data, a byte-level BPE"
    )
    also: list[str] = Field([], description="subsets of the benchmark whose answers both models learn as well")
    models: Annotated[list[Literal["full", "retain"]], Field(min_length=1)] = Field(
        ["full", "retain"], description="which are made: trained on all, and on all but the forget set"
    )

    @model_validator(mode="after")
    def _has_one_start(self) -> FinetuneTable:
        if (self.base is None) == (self.config is None):
            raise ValueError("expected either 'base' or 'config'")
        if self.base is not None and (self.tokenizer or self.vocabulary):
            raise ValueError("'tokenizer' and 'vocabulary' go with 'config'; 'base' brings its own")
        if self.config is not None and (self.tokenizer is None) == (self.vocabulary is None):
            raise ValueError("with 'config', expected either 'tokenizer' or 'vocabulary'")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("'config' has no 'model_type', such as \"llama\"")
        return self


class BaselineTable(Course):
    """A method that unlearns in weight space, to compare with; the other keys are the parameters of the method."""

    loss: str = Field("npo", description="method; `--loss` on the command line")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the highest; by itself the method's: 1e-5, of `rmu` 5e-5, of `undial` 1e-4"
    )
    idk: str | None = Field(
        None,
        description="file of the answers that `idk` and `dpo` prefer: a text of one a line, drawn at random, or rows "
        "with an `answer` for each of the forget set's; default: sentences that come with the package",
    )
    parameters: dict[str, Any] = {}


def check_training(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with training, beyond what its own tables say."""
    problems = []
    data, model = (raw[name] if isinstance(raw.get(name), dict) else {} for name in ("data", "model"))
    subject = str(data.get("forget")).partition("/")[0]
    for name in (name for name in ("finetune", "baseline") if name in raw):
        if "data" not in raw:
            problems.append(f"'{name}': training needs [data] forget")
        if subject in benchmarks and benchmarks[subject].training is None:
            problems.append(f"'{name}': benchmark '{subject}' does not say what a model is trained on")
    if "baseline" in raw and "name" not in model:
        problems.append("'baseline': there is no [model] name, the model subject to unlearning")
    finetune = raw.get("finetune")
    also = finetune.get("also") if isinstance(finetune, dict) and subject in benchmarks else None
    for number, subset in enumerate(also if isinstance(also, list) else []):
        kept = [known for known, table in benchmarks[subject].subsets.items() if not table.forget]
        if isinstance(subset, str) and subset not in kept:
            problems.append(f"'finetune.also.{number}': no such subset to keep; {nearest(subset, kept)}")
    return problems
