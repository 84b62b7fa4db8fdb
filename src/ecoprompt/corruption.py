"""Corruption functions: the embeddings of one prompt's selected tokens in, corrupted ones of the same shape out.

Each takes `embeddings` [n, D] (n selected tokens, D hidden size) and a CPU `generator`, writes nothing in place, and
returns [n, D] in the same dtype on the same device. The fourteen are those of the published code of ECO prompts
(arXiv 2406.07933, section 3.3); `dims` counts embedding dimensions and may not exceed D, `strength` is a number or a
tensor [dims]. A recipe may give `dims` as a share of D as well, which `dimensions` turns into a number before a
function is called.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from ecoprompt.registry import corruptions, show

if TYPE_CHECKING:
    from torch import Generator, Tensor


def _share(text: object) -> str:
    """A share as it is written shortest, "12.50 %" as "12.5%"; raises ValueError for what is none."""
    found = re.fullmatch(r"([0-9]{1,3}(\.[0-9]{1,12})?) ?%", text) if isinstance(text, str) else None
    if found is None or not 0 < Decimal(found[1]) <= 100:
        raise ValueError(f"found {show(text)}, expected a share such as '12.5%', above 0% and at most 100%")
    return f"{Decimal(found[1]).normalize():f}%"


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
if TYPE_CHECKING:  # what a function gets; below is what a recipe may say
    Dims = int
    Strength = float | Tensor
else:
    Dims = Annotated[
        Annotated[int, Field(ge=1)] | Annotated[str, BeforeValidator(_share)],
        Field(description='how many embedding dimensions, or what share of all of them, as in `"12.5%"`'),
    ]
    Strength = Annotated[
        Positive | Annotated[list[Positive], Field(min_length=1)],
        Field(description="standard deviation, or the value; of all dimensions, or a list with one for each"),
    ]


def dimensions(dims: int | str, size: int) -> int:
    """How many of `size` dimensions `dims` means: a share is rounded to a whole number, at least 1."""
    return dims if isinstance(dims, int) else max(1, round(size * float(dims.removesuffix("%")) / 100))


def nearest_tokens(matrix: Tensor, embeddings: Tensor) -> list[int]:
    """The row of `matrix` [V, D] that is the nearest by cosine to each of `embeddings` [n, D]: what a corrupted token
    still looks like."""
    lengths = matrix.float().norm(dim=1).clamp(min=1e-12)
    found: list[int] = (embeddings.float() @ matrix.float().T / lengths).argmax(dim=1).tolist()
    return found


def _noise(embeddings: Tensor, dims: int, generator: Generator, strength: Strength) -> Tensor:
    """N(0, strength²) of shape [n, dims] in float32. Drawn on the CPU token by token, so that neither the device nor
    the number of later tokens changes what a token gets (from 16 numbers on, PyTorch draws all in another order)."""
    import torch

    noise = torch.empty(embeddings.shape[0], dims)
    for row in noise:
        row.normal_(generator=generator)
    return strength * noise.to(embeddings.device)


def _put(embeddings: Tensor, index: Tensor | slice, values: Tensor) -> Tensor:
    """A copy of `embeddings` whose dimensions `index` are `values`: a slice, or an index [n, dims] by token.

    Values past the dtype's range are cut to it: float16 would turn a large strength into infinity.
    """
    import torch

    limits = torch.finfo(embeddings.dtype)
    values = values.clamp(limits.min, limits.max).to(embeddings.dtype)
    corrupted = embeddings.clone()
    if isinstance(index, slice):
        corrupted[:, index] = values
        return corrupted
    return corrupted.scatter(1, index, values)


def _largest(embeddings: Tensor, dims: int) -> Tensor:
    """By token, the indices [n, dims] of its largest dimensions by absolute value."""
    return embeddings.abs().topk(dims, dim=1).indices


@corruptions.register
def rand_noise_first_n(embeddings: Tensor, generator: Generator, *, dims: Dims = 1, strength: Strength) -> Tensor:
    """N(0, strength²) is added to the first dimensions."""
    first = slice(dims)
    return _put(embeddings, first, embeddings[:, first].float() + _noise(embeddings, dims, generator, strength))


@corruptions.register
def rand_noise_rand_n(embeddings: Tensor, generator: Generator, *, dims: Dims = 1, strength: Strength) -> Tensor:
    """N(0, strength²) is added to dimensions drawn at random, the same for all tokens of the prompt."""
    import torch

    drawn = torch.randperm(embeddings.shape[1], generator=generator)[:dims].to(embeddings.device)
    drawn = drawn.expand(embeddings.shape[0], dims)
    noise = _noise(embeddings, dims, generator, strength)
    return _put(embeddings, drawn, embeddings.gather(1, drawn).float() + noise)


@corruptions.register
def rand_noise_top_k(embeddings: Tensor, generator: Generator, *, dims: Dims = 1, strength: Strength) -> Tensor:
    """N(0, strength²) is added to each token's largest dimensions by absolute value."""
    top = _largest(embeddings, dims)
    return _put(embeddings, top, embeddings.gather(1, top).float() + _noise(embeddings, dims, generator, strength))


@corruptions.register
def set_rand_noise_first_n(embeddings: Tensor, generator: Generator, *, dims: Dims = 1, strength: Strength) -> Tensor:
    """The first dimensions are replaced by N(0, strength²)."""
    return _put(embeddings, slice(dims), _noise(embeddings, dims, generator, strength))


@corruptions.register
def zero_out_first_n(embeddings: Tensor, generator: Generator, *, dims: Dims) -> Tensor:
    """The first dimensions are set to zero."""
    return _put(embeddings, slice(dims), embeddings[:, :dims] * 0)


@corruptions.register
def zero_out_top_k(embeddings: Tensor, generator: Generator, *, dims: Dims) -> Tensor:
    """Each token's largest dimensions by absolute value are set to zero."""
    top = _largest(embeddings, dims)
    return _put(embeddings, top, embeddings.gather(1, top) * 0)


@corruptions.register
def flip_sign_first_n(embeddings: Tensor, generator: Generator, *, dims: Dims) -> Tensor:
    """The first dimensions change their sign."""
    return _put(embeddings, slice(dims), -embeddings[:, :dims])


@corruptions.register
def flip_sign_top_k(embeddings: Tensor, generator: Generator, *, dims: Dims) -> Tensor:
    """Each token's largest dimensions by absolute value change their sign."""
    top = _largest(embeddings, dims)
    return _put(embeddings, top, -embeddings.gather(1, top))


@corruptions.register
def add_value_first_n(embeddings: Tensor, generator: Generator, *, dims: Dims = 1, strength: Strength) -> Tensor:
    """The strength is added to the first dimensions."""
    return _put(embeddings, slice(dims), embeddings[:, :dims].float() + strength)


@corruptions.register
def add_value_least_k(embeddings: Tensor, generator: Generator, *, dims: Dims = 1, strength: Strength) -> Tensor:
    """The strength is added to each token's smallest dimensions by value."""
    least = embeddings.topk(dims, dim=1, largest=False).indices
    return _put(embeddings, least, embeddings.gather(1, least).float() + strength)


@corruptions.register
def sub_value_first_n(embeddings: Tensor, generator: Generator, *, dims: Dims = 1, strength: Strength) -> Tensor:
    """The strength is subtracted from the first dimensions."""
    return _put(embeddings, slice(dims), embeddings[:, :dims].float() - strength)


@corruptions.register
def sub_value_top_k(embeddings: Tensor, generator: Generator, *, dims: Dims = 1, strength: Strength) -> Tensor:
    """The strength is subtracted from each token's largest dimensions by value."""
    top = embeddings.topk(dims, dim=1).indices
    return _put(embeddings, top, embeddings.gather(1, top).float() - strength)


@corruptions.register
def reverse_order(embeddings: Tensor, generator: Generator) -> Tensor:
    """The selected tokens' embeddings stand in reverse order."""
    return embeddings.flip(0)


@corruptions.register
def shuffle(embeddings: Tensor, generator: Generator) -> Tensor:
    """The selected tokens' embeddings stand in random order, never in their own unless there is but one."""
    import torch

    order = own = torch.arange(embeddings.shape[0])
    while len(own) > 1 and torch.equal(order, own):
        order = torch.randperm(len(own), generator=generator)
    return embeddings[order.to(embeddings.device)]
