"""Corruptions: what holds for all that are registered, and what each does, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ecoprompt.corruption import dimensions, nearest_tokens
from ecoprompt.registry import InputError, corruptions

ROWS = torch.tensor([[1.0, -5.0, 3.0, 2.0], [-2.0, 0.5, -1.0, 4.0], [0.25, 6.0, -7.0, -0.5]])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_DIMS = [name for name in corruptions if "dims" in corruptions.schema(name).model_fields]


def apply(method, embeddings, seed=0, **parameters):
    """A corruption as a recipe would have it: bound to its schema, with a generator and whole dimensions of its own."""
    known = corruptions.schema(method).model_fields
    bound = corruptions.bind(method, {key: value for key, value in parameters.items() if key in known})
    if "dims" in bound:
        bound["dims"] = dimensions(bound["dims"], embeddings.shape[1])
    return corruptions[method](embeddings, torch.Generator().manual_seed(seed), **bound)


def embeddings(n=6, size=32, dtype=torch.float32, seed=1):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("method", corruptions)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 40])
@pytest.mark.parametrize("dims", [1, 7, 32, "0.1%", "30%", "100%"])
def test_conformance(method, dtype, n, dims):
    given = embeddings(n, dtype=dtype)
    before = given.clone()
    corrupted = apply(method, given, dims=dims, strength=2.0)
    assert corrupted.shape == given.shape
    assert corrupted.dtype == given.dtype
    assert corrupted.device == given.device
    assert torch.equal(given, before)
    assert corrupted.isfinite().all()
    assert torch.equal(corrupted, apply(method, given, dims=dims, strength=2.0))
    if n:
        corrupted.zero_()
        assert torch.equal(given, before), "the result shares memory with what was given"


@pytest.mark.parametrize("method", corruptions)
def test_every_corruption_changes_several_tokens(method):
    given = embeddings(40)
    assert not torch.equal(apply(method, given, dims=3, strength=2.0), given)


@pytest.mark.parametrize("method", corruptions)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_huge_strength_stays_finite(method, dtype):
    given = embeddings(20, dtype=dtype) * 100
    assert apply(method, given, dims=32, strength=1e6).isfinite().all()
    assert apply(method, given, dims=32, strength=3e38).isfinite().all()


@pytest.mark.parametrize("method", WITH_DIMS)
@pytest.mark.parametrize(("share", "dims"), [("3%", 1), ("12.5%", 4), ("50%", 16), ("98%", 31), ("100%", 32)])
def test_a_share_of_the_dimensions_does_what_that_many_do(method, share, dims):
    given = embeddings(9)
    parameters = {"strength": 3.0}
    assert torch.equal(apply(method, given, dims=share, **parameters), apply(method, given, dims=dims, **parameters))


@pytest.mark.parametrize(
    ("share", "size", "dims"),
    [
        ("12.5%", 2048, 256),
        ("12.5%", 4096, 512),
        ("100%", 4096, 4096),
        ("33.3%", 10, 3),
        ("16%", 10, 2),
        ("0.001%", 32, 1),
        (5, 4, 5),
    ],
)
def test_dims_are_counted_where_the_hidden_size_is_known(share, size, dims):
    assert dimensions(share, size) == dims


@pytest.mark.parametrize("method", WITH_DIMS)
@pytest.mark.parametrize(
    "wrong",
    [
        "0%",
        "0.0%",
        "100.1%",
        "-5%",
        "25",
        "%",
        "1e1%",
        "٣%",
        "25%\n",
        " 25%",
        "many",
        "nan%",
        "9" * 400 + "%",
        True,
        [1],
    ],
)
def test_what_is_no_share_is_refused(method, wrong):
    with pytest.raises(InputError, match="'dims': found .*, expected a whole number or a share such as '12.5%'"):
        apply(method, embeddings(), dims=wrong, strength=1.0)


def test_a_share_is_kept_in_one_form():
    bound = [corruptions.bind("zero_out_top_k", {"dims": share})["dims"] for share in ("12.50 %", "012.5%", "12.5%")]
    assert bound == ["12.5%"] * 3


@pytest.mark.parametrize("method", WITH_DIMS)
def test_exactly_dims_dimensions_of_each_token_are_touched(method):
    given = embeddings(9) + 0.01
    for dims in (1, 5, 32):
        changed = (apply(method, given, dims=dims, strength=3.0) != given).sum(1)
        assert changed.tolist() == [dims] * 9


@pytest.mark.parametrize("method", [name for name in WITH_DIMS if "strength" in corruptions.schema(name).model_fields])
def test_what_takes_a_strength_touches_one_dimension_unless_it_is_told(method):
    given = embeddings(9)
    assert (apply(method, given, strength=3.0) != given).sum(1).tolist() == [1] * 9
    assert corruptions.bind(method, {"strength": [0.5]})["strength"] == [0.5]
    for wrong in ([], [0.0], [math.inf]):
        with pytest.raises(InputError, match="'strength"):
            corruptions.bind(method, {"strength": wrong})


@pytest.mark.parametrize("method", [name for name in corruptions if "noise" in name])
@pytest.mark.parametrize("dims", [1, 3, 16, 20])
def test_a_tokens_noise_depends_on_no_later_token(method, dims):
    given = embeddings(50)
    whole = apply(method, given, dims=dims, strength=2.0)
    for n in (1, 5, 15, 16, 17, 40):
        assert torch.equal(apply(method, given[:n], dims=dims, strength=2.0), whole[:n])


@pytest.mark.parametrize("method", [name for name in corruptions if "noise" in name])
def test_noise_is_another_under_another_seed_and_scales_with_the_strength(method):
    given = embeddings(5)
    zero = torch.zeros_like(given)
    first = apply(method, given, seed=0, dims=4, strength=2.0)
    assert not torch.equal(first, apply(method, given, seed=1, dims=4, strength=2.0))
    one, ten = (apply(method, zero, dims=4, strength=strength) for strength in (1.0, 10.0))
    torch.testing.assert_close(ten, one * 10)
    with pytest.raises(InputError, match="above 0"):  # it would change nothing
        apply(method, zero, dims=4, strength=0.0)


@pytest.mark.parametrize("method", [name for name in corruptions if "noise" in name])
def test_noise_has_the_strength_as_its_standard_deviation(method):
    drawn = apply(method, torch.zeros(4000, 8), dims=8, strength=3.0).flatten()
    # 32000 draws: the mean is within 5 standard errors of 0, the variance within 5 of 9 (its own is 9 * sqrt(2 / N)).
    assert abs(drawn.mean()) < 5 * 3 / math.sqrt(32000)
    assert abs(drawn.var() - 9) < 5 * 9 * math.sqrt(2 / 32000)


def test_rand_noise_first_n_adds_to_the_first_dimensions():
    given = embeddings(6)
    noise = apply("rand_noise_first_n", torch.zeros(6, 32), dims=2, strength=3.0)
    corrupted = apply("rand_noise_first_n", given, dims=2, strength=3.0)
    assert torch.equal(corrupted[:, 2:], given[:, 2:])
    torch.testing.assert_close(corrupted[:, :2], given[:, :2] + noise[:, :2])


def test_rand_noise_rand_n_takes_the_same_dimensions_for_all_tokens_and_others_for_another_seed():
    given = embeddings(6)
    touched = []
    for seed in range(5):
        changed = apply("rand_noise_rand_n", given, seed=seed, dims=3, strength=3.0) != given
        assert (changed == changed[0]).all()
        assert changed[0].sum() == 3
        touched.append(tuple(changed[0].nonzero().flatten().tolist()))
    assert len(set(touched)) > 1


def test_rand_noise_top_k_adds_to_the_largest_by_absolute_value():
    changed = apply("rand_noise_top_k", ROWS, dims=2, strength=1.0) != ROWS
    assert changed.tolist() == [[False, True, True, False], [True, False, False, True], [False, True, True, False]]


def test_set_rand_noise_first_n_replaces_and_so_forgets_what_was_there():
    one = apply("set_rand_noise_first_n", ROWS, dims=2, strength=3.0)
    other = apply("set_rand_noise_first_n", ROWS + 100, dims=2, strength=3.0)
    assert torch.equal(one[:, :2], other[:, :2])
    assert torch.equal(one[:, 2:], ROWS[:, 2:])


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("zero_out_first_n", {"dims": 2}, [[0, 0, 3, 2], [0, 0, -1, 4], [0, 0, -7, -0.5]]),
        ("zero_out_top_k", {"dims": 2}, [[1, 0, 0, 2], [0, 0.5, -1, 0], [0.25, 0, 0, -0.5]]),
        ("flip_sign_first_n", {"dims": 3}, [[-1, 5, -3, 2], [2, -0.5, 1, 4], [-0.25, -6, 7, -0.5]]),
        ("flip_sign_top_k", {"dims": 1}, [[1, 5, 3, 2], [-2, 0.5, -1, -4], [0.25, 6, 7, -0.5]]),
        ("add_value_first_n", {"dims": 2, "strength": 10}, [[11, 5, 3, 2], [8, 10.5, -1, 4], [10.25, 16, -7, -0.5]]),
        ("add_value_least_k", {"dims": 2, "strength": 10}, [[11, 5, 3, 2], [8, 0.5, 9, 4], [0.25, 6, 3, 9.5]]),
        ("sub_value_first_n", {"dims": 1, "strength": 10}, [[-9, -5, 3, 2], [-12, 0.5, -1, 4], [-9.75, 6, -7, -0.5]]),
        ("sub_value_top_k", {"dims": 2, "strength": 10}, [[1, -5, -7, -8], [-2, -9.5, -1, -6], [-9.75, -4, -7, -0.5]]),
        ("reverse_order", {}, [[0.25, 6, -7, -0.5], [-2, 0.5, -1, 4], [1, -5, 3, 2]]),
    ],
)
def test_by_hand(method, parameters, expected):
    assert apply(method, ROWS, **parameters).tolist() == expected


def test_the_nearest_token_is_that_of_the_least_angle_however_long():
    matrix = torch.tensor([[1.0, 0.0], [0.0, 0.1], [-5.0, -5.0], [0.0, 0.0]])
    embeddings = torch.tensor([[9.0, 1.0], [0.1, 0.2], [-1.0, -2.0]])
    assert nearest_tokens(matrix, embeddings) == [0, 1, 2]
    assert nearest_tokens(matrix, matrix[:3]) == [0, 1, 2]


@pytest.mark.parametrize("method", ["reverse_order", "shuffle"])
def test_permutations_keep_the_tokens(method):
    given = embeddings(30)
    corrupted = apply(method, given)
    assert sorted(corrupted.tolist()) == sorted(given.tolist())
    assert torch.equal(apply(method, given[:1]), given[:1])


def test_shuffle_is_another_order_under_another_seed():
    given = embeddings(30)
    assert not torch.equal(apply("shuffle", given, seed=0), apply("shuffle", given, seed=1))


def test_shuffle_never_leaves_several_tokens_where_they_stood():
    given = embeddings(2)
    assert all(torch.equal(apply("shuffle", given, seed=seed), given.flip(0)) for seed in range(20))


def test_values_past_the_dtype_are_cut_to_its_range():
    corrupted = apply("add_value_first_n", torch.zeros(1, 2, dtype=torch.float16), dims=1, strength=1e6)
    assert corrupted.tolist() == [[65504.0, 0.0]]


@pytest.mark.parametrize("method", corruptions)
def test_schemas(method):
    fields = corruptions.schema(method).model_fields
    assert set(fields) <= {"dims", "strength"}
    assert ("strength" in fields) == ("noise" in method or "value" in method)
    for wrong in ({"dims": 0}, {"strength": -1.0}, {"strength": math.inf}, {"strength": math.nan}, {"dims": 1.5}):
        with pytest.raises(InputError):
            corruptions.bind(method, {"dims": 1, "strength": 1.0, **wrong})
    assert corruptions[method].__doc__.endswith(".")
