"""Views as strided blocks, and the plan of a CUDA launch: every element in exactly one place."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balanced_rep.kernels import _supports
from balanced_rep.kernels._moments_plan import LAYOUT, plan
from balanced_rep.kernels._strided import Dim, blocks, describe
from tests.kernels.moments_cases import LAYOUTS


def test_what_lies_in_memory_as_one_is_merged():
    x = torch.empty(4, 6, 8, 10)
    assert describe(x, 1, 0) == ((Dim(4, 480),), (Dim(480, 1),), (Dim(1, 1),))
    assert describe(x, 2, 2) == ((Dim(24, 80),), (Dim(1, 1),), (Dim(80, 1),))
    assert describe(x.permute(0, 2, 3, 1), 3, 0) == ((Dim(80, 1), Dim(4, 480)), (Dim(6, 80),), (Dim(1, 1),))
    assert describe(x[:, :, :5], 1, 0).reduced == (Dim(50, 1), Dim(6, 80))


def test_reduced_dims_may_be_visited_in_any_order():
    assert describe(torch.empty(4, 6, 8).permute(2, 0, 1), 0, 0).reduced == (Dim(192, 1),)
    assert describe(torch.empty(4, 6, 8).permute(2, 0, 1), 3, 0).kept == (Dim(24, 8), Dim(8, 1))


def test_dims_of_size_zero_and_one():
    assert blocks([Dim(3, 7), Dim(0, 1)], reorder=False) == (Dim(0, 1),)
    assert blocks([Dim(1, 100), Dim(1, 1)], reorder=True) == (Dim(1, 1),)
    assert blocks([], reorder=True) == (Dim(1, 1),)


def test_too_many_blocks_is_a_reason(monkeypatch):
    monkeypatch.setattr(_supports, "cuda_items", lambda x: None)
    monkeypatch.setattr(_supports, "triton_items", lambda x: None)
    x = torch.empty(2, 4, 2, 4, 2, 4, 2, 4)[:, ::2, :, ::2, :, ::2, :, ::2]
    for supports in (_supports.cuda_moments, _supports.triton_moments):
        assert "the reduced dims lie in memory as 4 strided blocks, this backend takes at most 3" in supports(x, 0, 0)
        assert supports(x[0, :, 0, :, 0], 1, 0) is None
        assert "float8" in supports(torch.empty(2, dtype=torch.float8_e4m3fn), 0, 0)


def test_too_large_a_grid_is_a_reason(monkeypatch):
    monkeypatch.setattr(_supports, "cuda_items", lambda x: None)
    rows = torch.empty(1).expand(2**31, 1)
    assert "more than 2147483647 blocks" in _supports.cuda_moments(rows, 1, 0)
    assert _supports.cuda_moments(rows[1:], 1, 0) is None


def touched(todo):
    """Walks the grid as moments.cu does: for every row, the offsets of its elements in the order of its segments."""
    at = {name: int(todo.layout[name]) for name in LAYOUT.names}
    columns = 1 if "rows" in todo.kernel.expression or "pooled" in todo.kernel.expression else None
    columns = columns or (8 if "warps" in todo.kernel.expression else 64 if "true" in todo.kernel.expression else 32)
    tile_size = {"pooled": 256, "columns": 128}.get(todo.kernel.expression.split("_")[2].split("<")[0])
    if tile_size is None:
        items = 32 if "float16, true" in todo.kernel.expression else 16
        tile_size = items * (32 if "warps" in todo.kernel.expression else 256)
    inner, outer = 1 << at["inner_shift"], tile_size >> at["inner_shift"]
    assert inner * outer == tile_size
    assert todo.blocks == todo.row_tiles * todo.n_segments < 2**31
    rows = {}
    for row_tile, segment in itertools.product(range(todo.row_tiles), range(todo.n_segments)):
        kept, first = row_tile // at["tiles_kept0"], row_tile % at["tiles_kept0"] * columns
        begin = segment * at["tiles_per_segment"]
        end = min(begin + at["tiles_per_segment"], at["n_tiles"])
        assert begin < end, "a segment without tiles would never store"
        for tile in range(begin, end):
            rest, red0 = divmod(tile, at["tiles_red0"])
            red2, red1 = divmod(rest, at["tiles_red1"])
            r0 = np.arange(red0 * inner, min((red0 + 1) * inner, at["n_red0"]))
            r1 = np.arange(red1 * outer, min((red1 + 1) * outer, at["n_red1"]))
            assert len(r0)
            assert len(r1)
            inside = r0 * at["stride_red0"] + r1[:, None] * at["stride_red1"] + red2 * at["stride_red2"]
            for kept0 in range(first, min(first + columns, at["n_kept0"])):
                start = kept0 * at["stride_kept0"] + kept % at["n_kept1"] * at["stride_kept1"]
                start += kept // at["n_kept1"] * at["stride_kept2"]
                rows.setdefault(kept * at["n_kept0"] + kept0, []).append((start + inside).ravel())
    assert set(rows) == set(range(at["n_kept"]))
    return [np.sort(np.concatenate(rows[row])) for row in range(at["n_kept"])]


def check_plan(x, n_kept, n_pooled, pool):
    view = describe(x, n_kept, n_pooled)
    if view.too_many_blocks():
        return
    todo = plan(view, x.dtype, x.data_ptr() if x.numel() < 10**6 else 0, pool)
    first = x[(..., *[0] * n_pooled)]
    index = torch.arange(math.prod(x.shape)).reshape(x.shape)  # only its shape counts
    offsets = sum((i * s for i, s in zip(np.indices(first.shape), first.stride(), strict=True)), np.zeros(first.shape))
    want = np.sort(np.asarray(offsets, int).reshape(math.prod(x.shape[:n_kept]), -1), 1)
    got = touched(todo)
    assert len(got) == len(want) == math.prod(index.shape[:n_kept])
    assert all(np.array_equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_element_is_in_one_tile(dtype, layout):
    x, n_kept, n_pooled, pool, _ = LAYOUTS[layout](dtype)
    check_plan(x, n_kept, n_pooled, pool)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_element_is_in_one_tile_of_any_view(data):
    n_dims = data.draw(st.integers(0, 4))
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 9, 40]), min_size=n_dims, max_size=n_dims))
    pitch = [n + data.draw(st.sampled_from([0, 0, 1, 4])) for n in shape]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.float64]))
    x = torch.empty(pitch, dtype=dtype)[tuple(slice(n) for n in shape)]
    x = x.permute(data.draw(st.permutations(range(n_dims))))
    n_kept = data.draw(st.integers(0, n_dims))
    n_pooled = data.draw(st.integers(0, n_dims - n_kept))
    check_plan(x, n_kept, n_pooled, 1 if n_pooled else 0)


def test_long_rows_have_few_segments_of_many_tiles():
    x = torch.empty(1).expand(10**7 + 1)
    todo = plan(describe(torch.empty(1, device="meta").expand(1, 10**7 + 1), 1, 0), torch.float32, 0, 0)
    assert todo.n_segments <= 1024
    assert int(todo.layout["tiles_per_segment"]) * todo.n_segments >= int(todo.layout["n_tiles"]) >= x.numel() // 4096


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.empty(4, 8192), "moments_rows<balanced_rep::float32, true>"),
        (torch.empty(4, 8191), "moments_rows<balanced_rep::float32, false>"),
        (torch.empty(4 * 8192 + 1)[1:].view(4, 8192), "moments_rows<balanced_rep::float32, false>"),
        (torch.empty(4, 8194)[:, :8192], "moments_rows<balanced_rep::float32, false>"),
        (torch.empty(4, 8196)[:, :8193], "moments_rows<balanced_rep::float32, true>"),
        (torch.empty(4, 16384)[:, ::2], "moments_rows<balanced_rep::float32, false>"),
        (torch.empty(9, 512), "moments_warps<balanced_rep::float32, true>"),
        (torch.empty(9, 3), "moments_warps<balanced_rep::float32, false>"),
        (torch.empty(64, 64).half().t(), "moments_columns<balanced_rep::float16, true>"),
        (torch.empty(64, 63).half().t(), "moments_columns<balanced_rep::float16, false>"),
        (torch.empty(64, 64).t(), "moments_columns<balanced_rep::float32, false>"),
        (torch.empty(64, 7).t(), "moments_warps<balanced_rep::float32, false>"),
    ],
)
def test_which_kernel(x, expected):
    assert plan(describe(x, 1, 0), x.dtype, x.data_ptr(), 0).kernel.expression == f"balanced_rep::{expected}"
