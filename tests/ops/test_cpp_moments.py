"""Moments in C++ at the edges of its own cuts: vectors, chunks, panels, blocks, segments; on every instruction set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from balanced_rep.ops import _cpp
from balanced_rep.ops.moments import moments_reference
from balanced_rep.testing import DISTRIBUTIONS, activations, assert_moments_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CHUNK, RUN, PANEL, BLOCK, SEGMENT = 4096, 8192, 256, 1024, 65536  # of csrc/cpu


def check(x, n_kept=1, n_pooled=0, pool=0, threshold=0.05):
    got = _cpp.moments(x, n_kept, n_pooled, pool, threshold)
    want = moments_reference(x, n_kept, n_pooled, pool, threshold)
    tight = x.dtype == torch.float64
    rel, shape_rel = (1e-12, 1e-11) if tight else (1e-6, 1e-5)
    assert_moments_close(got, want, rel=rel, shape_rel=shape_rel, value_rel=1e-12 if pool == 2 else 0.0)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_around_every_cut(isa, dtype):
    lengths = [1, 2, *(w + d for w in (4, 8, 16, 32, 64, 128, 1024, CHUNK, RUN, SEGMENT) for d in (-1, 0, 1))]
    for n in [*lengths, 2 * RUN + 5, SEGMENT * 3 // 2, 2 * SEGMENT + 17]:
        check(activations("normal", (2, n), dtype, seed=n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_around_every_cut(isa, dtype):
    # In float64 the reference, too, rounds its mean: mean / std = 1000 is left to the long double test.
    distribution = "normal" if dtype == torch.float64 else "offset"
    widths = [*range(1, 20), 31, 32, 33, 63, 65, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 3, 2 * BLOCK + 37]
    for width in widths:
        for rows in (1, 2, 7, 9, 65):
            check(activations(distribution, (rows, width), dtype, seed=width).T)
    for rows in (63, 64, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 9):
        check(activations(distribution, (rows, 40), dtype, seed=rows).T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_hostile_values(isa, distribution, dtype):
    check(activations(distribution, (3, 9001), dtype))
    check(activations(distribution, (3, 2, 700), dtype).transpose(1, 2), 1)
    check(activations(distribution, (33, 600), dtype).T)
    check(activations(distribution, (600, 33), dtype).T)
    check(activations(distribution, (600, 5), dtype).T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [1, 2])
def test_pooled_layouts(isa, pool, dtype):
    for spatial in ((1, 1), (2, 2), (4, 4), (7, 7), (16, 16), (3, 70)):
        nchw = activations("normal", (3, 21, *spatial), dtype)
        for x in (nchw, nchw.contiguous(memory_format=torch.channels_last)):
            check(x, 1, 2, pool)
            check(x.transpose(0, 1), 1, 2, pool)
            check(x, 2, 2, pool)
            check(x, 0, 2, pool)
            check(x[..., :1, :], 1, 2, pool)
    tokens = activations("normal", (3, 11, 530), dtype)
    check(tokens.transpose(1, 2), 1, 1, pool)
    check(tokens.permute(2, 0, 1), 1, 1, pool)
    nan = tokens.clone()
    nan[1, 3, 7] = math.nan
    assert check(nan.transpose(1, 2), 1, 1, pool)[9].tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(isa, dtype):
    x = activations("normal", (4, 6, 10, 40), dtype)
    views = [
        x.permute(1, 0, 2, 3), x.permute(3, 1, 2, 0), x.permute(2, 3, 0, 1), x[:, ::2, :, ::3], x[:, :, 3:7, 5:30],
        x[:1].expand(4, -1, -1, -1), x[:, :, :1, :].expand(-1, -1, 10, -1), x.unfold(3, 5, 2).flatten(0, 1),
        x.as_strided((30, 9), (1, 1)), x.as_strided((9, 30, 4), (40, 1, 7)),
    ]  # fmt: skip
    for view in views:
        for n_kept in range(view.ndim + 1):
            check(view, n_kept)


def test_long_runs_inside_a_strided_reduction(isa):
    check(activations("step", (3, 2, 2500)).transpose(0, 1), 1)
    check(activations("step", (3, 2, 70_000)).transpose(0, 1), 1)


@pytest.mark.parametrize("pool", [0, 1, 2])
def test_threads_do_not_change_a_bit(isa, pool):
    before = torch.get_num_threads()
    shapes = [(5, 150_000), (2000, 700), (70_000, 9), (40_000, 30)]
    for shape in shapes:
        x = activations("heavy", shape) if pool == 0 else activations("heavy", (2, *shape)).movedim(0, -1)
        for view in (x, x.transpose(0, 1)):
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(_cpp.moments(view, 1, int(pool > 0), pool, 0.0))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_first_pivot_that_misses(isa, dtype):
    """The sample that sets the first pivot sees one level only, far from the rest."""
    for level in (0.0, 3.0, 1000.0):
        x = activations("normal", (2, 3000), dtype) * 0.01 + level
        x[:, :1500:] = -level
        check(x)
        check(x.view(2, 300, 10).transpose(0, 1).reshape(300, 20).T)


def test_columns_of_very_different_size(isa):
    x = activations("normal", (400, 64)) * torch.logspace(-30, 30, 64)
    check(x.T)
    x[:, 5] = math.inf
    x[7, 9] = math.nan
    x[200, 9] = 3e38
    check(x.T)


def test_float64_against_long_double(isa):
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double is no wider than float64 here")
    for distribution in ("normal", "offset", "tiny", "large", "heavy"):
        x = activations(distribution, (3, 10_001), torch.float64)
        v = x.numpy().astype(np.longdouble)
        mean = v.mean(1, keepdims=True)
        want = np.stack([mean[:, 0], *(((v - mean) ** k).sum(1) for k in (2, 3, 4))])
        for got in (_cpp.moments(x, 1, 0, 0, 0.0)[1:5], _cpp.moments(x.T.contiguous().T, 1, 0, 0, 0.0)[1:5]):
            scale = np.stack(
                [np.abs(want[0]) + np.sqrt(want[1] / 10_001), want[1], np.sqrt(want[1] * want[3]), want[3]]
            )
            assert (np.abs(got.numpy() - want) <= 1e-12 * scale).all(), distribution


def test_the_sign_of_zero_and_constants(isa):
    x = torch.zeros(3, 5000)
    x[1] = -0.0
    x[2, ::2] = -0.0
    assert _cpp.moments(x, 1, 0, 0, 0.0)[1:6].abs().max() == 0
    for value in (0.1, -3e38, 1e-42, 7.0):
        for view in (torch.full((3, 9001), value), torch.full((9001, 30), value).T):
            m = _cpp.moments(view, 1, 0, 0, 0.0)
            assert (m[1] == view[0, 0].double()).all()
            assert (m[2:5] == 0).all()


def test_an_expanded_reduction_counts_every_repetition(isa):
    row = activations("offset", (2, 600))
    got = check(row[:, None, :].expand(2, 7, 600))
    assert got[0].tolist() == [4200, 4200]
    assert torch.equal(got[2], 7 * check(row)[2])
