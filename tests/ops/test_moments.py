"""The moments op: layouts, hostile values, and bad input, on every backend that runs here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import balanced_rep as br
from balanced_rep.ops import moments
from balanced_rep.ops._registry import ORDER
from balanced_rep.ops.moments import FIELDS, MOMENTS, moments_reference
from balanced_rep.testing import DISTRIBUTIONS, activations, assert_moments_close

HERE = [b for b in ORDER if MOMENTS.why_not(b, torch.zeros(2, 3), 1, 0, 0, 0.0) is None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=HERE)
def on(request):
    with br.backend(request.param):
        yield request.param


def check(x, **kwargs):
    with br.backend("reference"):
        want = moments(x.double(), **kwargs)
    got = moments(x, **kwargs)
    tight = x.dtype == torch.float64
    rel, shape_rel = (1e-12, 1e-11) if tight else (1e-6, 1e-5)
    value_rel = rel if kwargs.get("pool") == "mean" else 0.0
    assert_moments_close(got, want, rel=rel, shape_rel=shape_rel, value_rel=value_rel)
    return got


def test_fields_by_hand(on):
    m = dict(zip(FIELDS, moments(torch.tensor([1.0, -2.0, 4.0]), threshold=1.0).tolist(), strict=True))
    assert m == {"n": 3, "mean": 1, "m2": 18, "m3": 0, "m4": 162, "l1": 7, "min": -2, "max": 4, "n_active": 1,
                 "n_nonfinite": 0}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_hostile_values(on, distribution, dtype):
    for n in (1, 7, 1000, 4097):
        check(activations(distribution, (3, n), dtype, seed=n))
    check(activations(distribution, (300, 5), dtype), dim=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, (0, 2), (1, 3), (0, 2, 3), (1, 2, 3), None], ids=str)
def test_any_dims_of_any_strides(on, dim, dtype):
    x = activations("normal", (3, 10, 7, 6), dtype)
    views = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "sliced": activations("normal", (6, 10, 7, 18), dtype)[::2, :, :, ::3],
        "expanded": x[:, :1].expand(-1, 10, -1, -1),
    }
    for view in views.values():
        check(view, dim=dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_pooling_in_front(on, pool, dim, dtype):
    x = activations("normal", (4, 70, 5, 3), dtype)
    for view in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(0, 1)):
        got = check(view, dim=dim, pool=pool)
        values = view.double().flatten(2)
        pooled = values.amax(-1) if pool == "max" else values.mean(-1)
        torch.testing.assert_close(got[1], moments(pooled, dim)[1], rtol=1e-6, atol=1e-6)
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(moments(tokens, pool=pool), moments(x, pool=pool), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments(x, pool=pool, pool_dim=(3, 2)), moments(x, pool=pool))


def test_pooling_keeps_nan(on):
    x = torch.zeros(2, 3, 4, 4)
    x[1, 2, 3, 3] = math.nan
    for pool in ("max", "mean"):
        m = moments(x, pool=pool)
        assert m[9].tolist() == [0, 1]
        assert m[7].isnan().tolist() == [False, True]


def test_nonfinite_values_are_counted_and_propagated(on):
    x = torch.tensor([[1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [math.inf, -math.inf, 0.0], [1.0, 2.0, 3.0]])
    m = moments(x)
    assert m[9].tolist() == [1, 1, 2, 0]
    assert m[2:5].isnan().all(0).tolist() == [True, True, True, False]
    assert m[1, 1] == math.inf
    assert m[1, [0, 2]].isnan().all()
    assert m[6, 1:].tolist() == [1, -math.inf, 1]
    assert m[[6, 7], 0].isnan().all()
    assert m[8].tolist() == [2, 3, 1, 3]


@pytest.mark.parametrize("where", [0, 3, 4095, 4096, 9999])
def test_one_nan_anywhere_is_found(on, where):
    x = torch.ones(2, 10000)
    x[1, where] = math.nan
    assert moments(x)[9].tolist() == [0, 1]


def test_empty_reductions_are_the_neutral_element(on):
    want = [0.0] * 6 + [math.inf, -math.inf, 0.0, 0.0]
    assert moments(torch.zeros(2, 0)).T.tolist() == [want, want]
    assert moments(torch.zeros(0, 3), dim=0).T.tolist() == [want] * 3
    assert moments(torch.zeros(0)).tolist() == want
    assert moments(torch.zeros(0, 3)).shape == (10, 0)


def test_one_value(on):
    for dim in (-1, 0, (), None):
        assert moments(torch.tensor(-3.0), dim).tolist() == [1, -3, 0, 0, 0, 3, -3, -3, 0, 0]
    with pytest.raises(ValueError, match=r"dim=1 is out of range for shape \(\): dims go from -1 to 0"):
        moments(torch.tensor(-3.0), 1)


def test_dims_may_be_integers_of_numpy(on):
    x = activations("normal", (3, 4))
    assert torch.equal(moments(x, np.int64(-2)), moments(x, 0))


def test_threshold_is_compared_in_float64(on):
    x = torch.tensor([0.1], dtype=torch.float32)  # 0.1 rounds up in float32
    assert moments(x, threshold=0.1)[8] == 1
    assert moments(x, threshold=float(x))[8] == 0
    assert moments(x, threshold=-math.inf)[8] == 1
    assert moments(x, threshold=1e300)[8] == 0


def test_more_than_2_to_the_31_elements_by_construction(on):
    if on != "cpp":
        pytest.skip("the others take minutes for this")
    row = torch.arange(8, dtype=torch.float32)
    m = moments(row.expand(2**28 + 1, 8), dim=0)  # stride 0: 2^31 + 8 elements in 32 bytes
    assert m[0].tolist() == [2**28 + 1] * 8
    assert m[1].tolist() == row.tolist()


def test_offsets_beyond_2_to_the_31(on):
    """A view whose last element lies further than 2^31 elements away, on 4 kB of real memory."""
    if on == "reference":
        pytest.skip("the reference is torch's own indexing")
    base = torch.empty(2**31 + 4096, dtype=torch.float16)  # virtual memory: only the two pages that are read exist
    x = base.as_strided((2, 64), (2**31 + 1024, 1))
    x.copy_(activations("normal", (2, 64), torch.float16))
    check(x)


def test_the_same_bits_again_and_for_any_number_of_threads(on):
    if on == "reference":
        pytest.skip("torch's own sums depend on the number of threads")
    x = activations("heavy", (3, 200_000))
    before = torch.get_num_threads()
    want = moments(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(moments(x), want)
        assert torch.equal(moments(x[1]), want[:, 1])
    torch.set_num_threads(before)


def test_lazy_negative_views_are_resolved(on):
    x = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    check(x)


@given(
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=4),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_dims(shape, data):
    x = activations("normal", tuple(shape)) if shape else torch.tensor(0.5)
    order = data.draw(st.permutations(range(len(shape))))
    dims = data.draw(st.none() | st.lists(st.sampled_from(range(len(shape))), unique=True)) if shape else None
    check(x.permute(order), dim=dims)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"dtype torch.int64; accepted are float32, float16, bfloat16, float64"),
        (torch.zeros(3, dtype=torch.bool), "dtype torch.bool"),
        (torch.zeros(3, dtype=torch.complex64), "view_as_real"),
        (torch.zeros(3).to_sparse(), "to_dense"),
        ([1.0, 2.0], "got list"),
    ],
)
def test_wrong_input_types(x, message):
    with pytest.raises(TypeError, match=message):
        moments(x)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 2}, "dim=2 is out of range for shape"),
        ({"dim": (0, -2)}, "twice"),
        ({"pool": "median"}, "pool must be None, 'max' or 'mean'"),
        ({"pool": "max"}, "no spatial or token dim"),
        ({"pool_dim": 1}, "without pool"),
        ({"pool": "max", "pool_dim": 5}, "pool_dim=5 is out of range"),
        ({"pool": "max", "pool_dim": ()}, "at least one dim"),
    ],
)
def test_wrong_dims(kwargs, message):
    with pytest.raises(ValueError, match=message):
        moments(torch.zeros(3, 4), **kwargs)


@pytest.mark.parametrize("dim", [0.5, True, "01", {0, 1}, (0, None)], ids=str)
def test_dims_that_are_no_integers(dim):
    with pytest.raises(TypeError, match=r"dim must be an int or a sequence of ints, got"):
        moments(torch.zeros(3, 4), dim=dim)
    with pytest.raises(TypeError, match=r"pool_dim must be an int or a sequence of ints, got"):
        moments(torch.zeros(3, 4), pool="max", pool_dim=dim)


def test_an_empty_pooled_dim_is_refused():
    with pytest.raises(ValueError, match="a pooled dim is empty"):
        moments(torch.zeros(2, 3, 0), pool="max", pool_dim=2)


def test_vmap_over_any_dim(on):
    x = activations("normal", (4, 5, 6))
    for d in range(3):
        got = torch.vmap(moments, in_dims=d, out_dims=1)(x)
        torch.testing.assert_close(got, moments(x.movedim(d, 0)))


def test_compiled(on):
    f = torch.compile(lambda x: moments(x.relu(), dim=(1, 2)), fullgraph=True, backend="aot_eager")
    x = activations("normal", (3, 4, 5))
    torch.testing.assert_close(f(x), moments(x.relu(), dim=(1, 2)))


def test_the_reference_is_the_formula():
    x = activations("heavy", (4, 50), torch.float64)
    m = moments_reference(x, 1, 0, 0, 0.0)
    torch.testing.assert_close(m[2], x.var(-1, correction=0) * 50)
    torch.testing.assert_close(m[5], x.norm(p=1, dim=-1))
