r"""moments in Triton: one kernel reduces tiles, a second one merges the tiles of a row in index order. No atomics.

Letters: v pooled values of a row, n their number, m_k = sum (v - mean)^k. A *tile* is ROWS kept indices by
OUTER * INNER reduced ones; it is held in registers and reduced twice. All float64 arithmetic on float32 input is in the
second kernel, which has few numbers to deal with: every thread of a program would repeat it in the first one.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a @triton.jit function is not the Python function that a type checker sees)

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import triton
import triton.language as tl
from balanced_rep.kernels._moments_common import N_FIELDS, accumulator, exact_threshold, neutral
from balanced_rep.kernels._strided import Strided, describe

__all__ = ["moments"]

_N_RAW = 12  # n, pivot, e, m2, m3, m4, l1, min, max, active, non-finite, u: see _tile_kernel
_MERGED = 256  # tiles of a row that one program of the second kernel merges


@triton.jit
def _add_extremes(total_a, low_a, high_a, counts_a, total_b, low_b, high_b, counts_b):
    """Minimum and maximum drop NaN here; the L1 sum, which cannot lose one, brings it back."""
    return total_a + total_b, tl.minimum(low_a, low_b), tl.maximum(high_a, high_b), counts_a + counts_b


@triton.jit
def _add_powers(l1_a, d1_a, d2_a, d3_a, d4_a, l1_b, d1_b, d2_b, d3_b, d4_b):
    return l1_a + l1_b, d1_a + d1_b, d2_a + d2_b, d3_a + d3_b, d4_a + d4_b


@triton.jit
def _power_of_two(magnitude):
    """The largest power of two <= magnitude, kept where its inverse is a normal number too, and that inverse."""
    if magnitude.dtype == tl.float64:
        bits = magnitude.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        bits = tl.minimum(tl.maximum(bits, 0x0010000000000000), 0x7FD0000000000000)
        unit = bits.to(tl.float64, bitcast=True)
        inverse = (0x7FE0000000000000 - bits).to(tl.float64, bitcast=True)
    else:
        bits = magnitude.to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.minimum(tl.maximum(bits, 0x00800000), 0x7E800000)
        unit = bits.to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    return unit, inverse


@triton.jit
def _merge(
    n_a, mean_a, m2_a, m3_a, m4_a, l1_a, low_a, high_a, active_a, bad_a,
    n_b, mean_b, m2_b, m3_b, m4_b, l1_b, low_b, high_b, active_b, bad_b,
):  # fmt: skip
    """Moments of the union of a and b (Chan et al. 1979, Pébay 2008); an empty side is neutral.

    With d = mean_b - mean_a, p = n_a / n, q = n_b / n: mean = p mean_a + q mean_b, m2 = m2_a + m2_b + d^2 n_a q,
    m3 = m3_a + m3_b + d^3 n_a q (p - q) + 3 d (p m2_b - q m2_a),
    m4 = m4_a + m4_b + d^4 n_a q (p^2 - p q + q^2) + 6 d^2 (p^2 m2_b + q^2 m2_a) + 4 d (p m3_b - q m3_a).

    Written so that exchanging a and b leaves every bit alone if nothing is fused (p q n for n_a q): a reduction tree
    computes both in different lanes, and any of them may be the one that stores. Two divisions and no more: each is a
    call, and what lives across it costs registers.

    Returns:
        The ten fields.
    """
    n = n_a + n_b
    some = tl.maximum(n, 1.0)
    p, q = n_a / some, n_b / some
    d = tl.where(n_a * n_b > 0, mean_b - mean_a, 0.0)
    dd, nq = d * d, p * q * some
    m2 = (m2_a + m2_b) + dd * nq
    m3 = (m3_a + m3_b) + dd * nq * (d * (p - q)) + 3.0 * (d * (p * m2_b - q * m2_a))
    m4 = (m4_a + m4_b) + dd * dd * nq * ((p * p + q * q) - p * q) + 6.0 * (dd * (p * p * m2_b + q * q * m2_a))
    m4 += 4.0 * (d * (p * m3_b - q * m3_a))
    mean = p * mean_a + q * mean_b  # inf, NaN as in a sum
    low = tl.minimum(low_a, low_b, propagate_nan=tl.PropagateNan.ALL)
    high = tl.maximum(high_a, high_b, propagate_nan=tl.PropagateNan.ALL)
    return n, mean, m2, m3, m4, l1_a + l1_b, low, high, active_a + active_b, bad_a + bad_b


@triton.jit
def _pooled(
    x_ptr, live, n_pool0, n_pool1, stride_pool0, stride_pool1,
    POOL: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Maximum (NaN propagates) or mean over the window of every live value: (ROWS, TILE) pointers -> values."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    window = tl.arange(0, BLOCK)
    empty = float("-inf") if POOL == 1 else 0.0
    acc = tl.full((live.shape[0], live.shape[1], BLOCK), empty, ACC)
    for outer in range(n_pool1):
        for start in range(0, n_pool0, BLOCK):
            inner = tl.cast(start, tl.int64) + window
            offset = inner * stride_pool0 + tl.cast(outer, tl.int64) * stride_pool1
            mask = live[:, :, None] & (inner < n_pool0)[None, None, :]
            x = tl.load(x_ptr[:, :, None] + offset[None, None, :], mask=mask, other=empty).to(ACC)
            if POOL == 1:
                acc = tl.maximum(acc, x, propagate_nan=tl.PropagateNan.ALL)
            else:
                acc += x
    if POOL == 1:
        return tl.reduce(acc, 2, _larger)
    return tl.sum(acc, 2) / (tl.cast(n_pool0, ACC) * tl.cast(n_pool1, ACC))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tile_kernel(
    x_ptr,  # (kept2, kept1, kept0, red2, red1, red0, pool1, pool0), all strides given
    out_ptr,  # (_N_RAW, n_kept, n_tiles) float32, or float64 if WIDE; strides (field_stride, stride_row, stride_tile)
    threshold_bits,  # a float64, as int64 bits
    n_kept0, n_kept1, n_red0, n_red1, n_pool0, n_pool1,
    tiles_kept, tiles_red0, tiles_red1, n_tiles, field_stride, stride_row, stride_tile,
    stride_kept0, stride_kept1, stride_kept2,
    stride_red0, stride_red1, stride_red2,
    stride_pool0, stride_pool1,
    POOL: tl.constexpr,  # 0 none, 1 max, 2 mean
    KEPT_FIRST: tl.constexpr,  # neighbouring programs take neighbouring kept indices
    ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, POOL_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # sums in float64
):  # fmt: skip
    """Moments of one tile: ROWS kept indices by up to OUTER * INNER reduced ones, each maybe the pool of a window.

    First reduction: sum, min, max, counts. Then a power of two u <= absmax scales the deviations d = (v - pivot) / u
    from the rounded mean exactly, so that d^4 neither overflows nor underflows, and the second reduction takes
    sum |v| / u and sum d^k. With e = sum d / n, which is what the pivot lacks of being the mean, m2 = sum d^2 - n e^2,
    m3 = sum d^3 - 3 e sum d^2 + 2 n e^3, m4 = sum d^4 - 4 e sum d^3 + 6 e^2 sum d^2 - 3 n e^4, in units of u^k.
    All in float32 unless WIDE.
    """
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    program = tl.program_id(0).to(tl.int64)
    if KEPT_FIRST:
        rows_tile = program % (tl.num_programs(0) // n_tiles)
        tile = program // (tl.num_programs(0) // n_tiles)
    else:
        rows_tile = program // n_tiles
        tile = program % n_tiles

    kept0 = (rows_tile % tiles_kept) * ROWS + tl.arange(0, ROWS)
    kept = rows_tile // tiles_kept
    row_offset = kept0 * stride_kept0 + (kept % n_kept1) * stride_kept1 + (kept // n_kept1) * stride_kept2
    first0 = (tile % tiles_red0) * INNER
    first1 = (tile // tiles_red0 % tiles_red1) * OUTER
    element = tl.arange(0, OUTER * INNER)
    red0, red1 = first0 + element % INNER, first1 + element // INNER
    offset = red0 * stride_red0 + red1 * stride_red1 + (tile // tiles_red0 // tiles_red1) * stride_red2
    live_row = kept0 < n_kept0
    live = live_row[:, None] & ((red0 < n_red0) & (red1 < n_red1))[None, :]
    n = (tl.minimum(INNER, n_red0 - first0) * tl.minimum(OUTER, n_red1 - first1)).to(ACC)

    pointers = x_ptr + row_offset[:, None] + offset[None, :]
    if POOL == 0:
        # A mask that changes along memory makes loads narrow, unless the size is known to be a multiple of 16. (The
        # compiler makes one narrow load of two that differ in the mask alone.)
        if (first0 + INNER <= n_red0) & (first1 + OUTER <= n_red1):
            v = tl.load(pointers, mask=live_row[:, None], other=0.0, cache_modifier=".cg").to(ACC)
        else:
            v = tl.load(pointers, mask=live, other=0.0).to(ACC)
    else:
        v = _pooled(pointers, live, n_pool0, n_pool1, stride_pool0, stride_pool1, POOL, POOL_BLOCK, WIDE)
        v = tl.where(live, v, 0.0)

    threshold = tl.cast(threshold_bits, tl.int64).to(tl.float64, bitcast=True).to(ACC)
    infinity = float("inf")
    counts = (live & (v > threshold)).to(tl.int32) + (live & ~(tl.abs(v) < infinity)).to(tl.int32) * 65536
    small = 1.0 / 65536  # keeps the sum of a tile of the largest float finite
    total, low, high, counts = tl.reduce(
        (v * small, tl.where(live, v, infinity), tl.where(live, v, -infinity), counts), 1, _add_extremes
    )
    pivot = tl.minimum(tl.maximum(total / n * 65536, low), high)
    unit, scale = _power_of_two(tl.maximum(-low, high))
    d = tl.where(live, v * scale[:, None] - (pivot * scale)[:, None], 0.0)
    dd = d * d
    l1, d1, d2, d3, d4 = tl.reduce((tl.abs(v * scale[:, None]), d, dd, dd * d, dd * dd), 1, _add_powers)

    n_nonfinite = counts >> 16
    bad, lost = n_nonfinite > 0, l1 != l1
    e = tl.where(bad, 0.0, d1 / n)
    ne2 = n * e * e
    out_ptr += (kept * n_kept0 + kept0) * stride_row + tile * stride_tile
    tl.store(out_ptr, tl.zeros_like(low) + n, mask=live_row)
    tl.store(out_ptr + field_stride, tl.where(bad, total / n, pivot), mask=live_row)  # inf, NaN as a plain sum has them
    tl.store(out_ptr + 2 * field_stride, e, mask=live_row)
    tl.store(out_ptr + 3 * field_stride, d2 - ne2, mask=live_row)
    tl.store(out_ptr + 4 * field_stride, d3 - 3 * e * d2 + 2 * ne2 * e, mask=live_row)
    tl.store(out_ptr + 5 * field_stride, d4 - 4 * e * d3 + 6 * e * e * d2 - 3 * ne2 * e * e, mask=live_row)
    tl.store(out_ptr + 6 * field_stride, l1, mask=live_row)
    tl.store(out_ptr + 7 * field_stride, tl.where(lost, l1, low), mask=live_row)
    tl.store(out_ptr + 8 * field_stride, tl.where(lost, l1, high), mask=live_row)
    tl.store(out_ptr + 9 * field_stride, (counts & 65535).to(ACC), mask=live_row)
    tl.store(out_ptr + 10 * field_stride, n_nonfinite.to(ACC), mask=live_row)
    tl.store(out_ptr + 11 * field_stride, unit, mask=live_row)


@triton.jit
def _field(parts_ptr, field_stride, live, other):
    return tl.load(parts_ptr + field_stride, mask=live, other=other).to(tl.float64)


@triton.jit
def _merge_kernel(
    parts_ptr,  # (_N_RAW if RAW else N_FIELDS, n_rows, n_parts), strides (n_rows * n_parts, stride_row, stride_part)
    out_ptr,  # (N_FIELDS, n_rows, n_groups) float64, contiguous
    n_rows, n_parts, n_groups, stride_row, stride_part,
    RAW: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merges PARTS neighbouring parts of a row into one, in float64, in the fixed order of the reduction tree."""
    program = tl.program_id(0).to(tl.int64)
    group = program % n_groups
    row = program // n_groups * ROWS + tl.arange(0, ROWS)
    part = group * PARTS + tl.arange(0, PARTS)
    live = (row < n_rows)[:, None] & (part < n_parts)[None, :]
    parts_ptr += row[:, None] * stride_row + part[None, :] * stride_part
    stride = tl.cast(n_rows, tl.int64) * n_parts
    inf = float("inf")
    n = _field(parts_ptr, 0, live, 0.0)
    mean = _field(parts_ptr, stride, live, 0.0)
    if RAW:
        unit = _field(parts_ptr, 11 * stride, live, 1.0)
        square = unit * unit
        mean += _field(parts_ptr, 2 * stride, live, 0.0) * unit
        m2 = _field(parts_ptr, 3 * stride, live, 0.0) * square
        m3 = _field(parts_ptr, 4 * stride, live, 0.0) * square * unit
        m4 = _field(parts_ptr, 5 * stride, live, 0.0) * square * square
        l1 = _field(parts_ptr, 6 * stride, live, 0.0) * unit
        parts_ptr += stride
    else:
        m2 = _field(parts_ptr, 2 * stride, live, 0.0)
        m3 = _field(parts_ptr, 3 * stride, live, 0.0)
        m4 = _field(parts_ptr, 4 * stride, live, 0.0)
        l1 = _field(parts_ptr, 5 * stride, live, 0.0)
    low = _field(parts_ptr, 6 * stride, live, inf)
    high = _field(parts_ptr, 7 * stride, live, -inf)
    n_active = _field(parts_ptr, 8 * stride, live, 0.0)
    n_nonfinite = _field(parts_ptr, 9 * stride, live, 0.0)
    n, mean, m2, m3, m4, l1, low, high, n_active, n_nonfinite = tl.reduce(
        (n, mean, m2, m3, m4, l1, low, high, n_active, n_nonfinite), 1, _merge
    )
    bad = n_nonfinite > 0
    constant = low == high  # not so if they are NaN
    out_ptr += row * n_groups + group
    stride = tl.cast(n_rows, tl.int64) * n_groups
    live_row = row < n_rows
    nan = float("nan")
    tl.store(out_ptr, n, mask=live_row)
    tl.store(out_ptr + stride, tl.where(constant & ~bad, low, mean), mask=live_row)
    tl.store(out_ptr + 2 * stride, tl.where(bad, nan, tl.where(constant, 0.0, tl.maximum(m2, 0.0))), mask=live_row)
    tl.store(out_ptr + 3 * stride, tl.where(bad, nan, tl.where(constant, 0.0, m3)), mask=live_row)
    tl.store(out_ptr + 4 * stride, tl.where(bad, nan, tl.where(constant, 0.0, tl.maximum(m4, 0.0))), mask=live_row)
    tl.store(out_ptr + 5 * stride, l1, mask=live_row)
    tl.store(out_ptr + 6 * stride, low, mask=live_row)
    tl.store(out_ptr + 7 * stride, high, mask=live_row)
    tl.store(out_ptr + 8 * stride, n_active, mask=live_row)
    tl.store(out_ptr + 9 * stride, n_nonfinite, mask=live_row)


class Tile(NamedTuple):
    """Compile-time sizes of the first kernel.

    Attributes:
        rows: Kept indices.
        inner: Indices of the innermost reduced block.
        outer: Indices of the next one.
        window: Pooled indices read at a time.
        kept_first: Whether the kept indices are the neighbours in memory.
    """

    rows: int
    inner: int
    outer: int
    window: int
    kept_first: bool


def choose_tile(view: Strided, itemsize: int, pool: int) -> Tile:
    """A tile of some thousand elements that lies along memory; smaller ones where the input would give few programs.

    Along the kept dims it has 64 bytes or more, so that rows that begin anywhere cost few sectors, and 256 reduced
    indices (512 of two bytes), so that the twelve numbers it leaves behind are few beside what it has read.

    It depends on sizes and strides alone, so that the same call always sums in the same order.

    Args:
        view: Blocks of the three groups of dims.
        itemsize: Bytes of an element.
        pool: 0 none, 1 max, 2 mean.

    Returns:
        The tile.
    """
    kept, reduced, pooled = (tuple(triton.next_power_of_2(d.size) for d in dims) for dims in view)
    numel = math.prod(d.size for dims in view for d in dims)
    large = numel >= 2**20
    budget = 4096 if large else 1024
    outer_size = reduced[1] if len(reduced) > 1 else 1
    if pool:
        along = pooled[0] >= 8 and view.pooled[0].stride < view.reduced[0].stride
        window = min(pooled[0], 128 if along else 8)
        inner = min(reduced[0], budget // window)
        return Tile(1, inner, min(outer_size, budget // window // inner), window, False)
    if view.kept[0].stride < view.reduced[0].stride and kept[0] >= 8:
        rows = min(kept[0], 32)
        length = (512 if itemsize == 2 else 256) if large else budget // rows
        inner = min(reduced[0], length)
        return Tile(rows, inner, min(outer_size, length // inner), 1, True)
    inner = min(reduced[0], budget)
    outer = min(outer_size, budget // inner)
    return Tile(min(kept[0], budget // (inner * outer)), inner, outer, 1, False)


def moments(x: Tensor, n_kept: int, n_pooled: int, pool: int, threshold: float) -> Tensor:
    """Moments of a (kept..., reduced..., pooled...) view; see :func:`balanced_rep.ops.moments.moments_reference`.

    Args:
        x: Any strided view that :func:`balanced_rep.kernels._supports.triton_moments` accepts.
        n_kept: Number of leading dims that are kept.
        n_pooled: Number of trailing dims that are pooled.
        pool: 0 none, 1 max, 2 mean.
        threshold: A value is active if it is greater than this.

    Returns:
        float64 ``(10, *kept)``.
    """
    x = x.detach().resolve_neg()
    shape = (N_FIELDS, *x.shape[:n_kept])
    if x.numel() == 0:
        return neutral(shape, x.device)
    view = describe(x, n_kept, n_pooled)
    accumulate = accumulator(x.dtype, pool)
    tile = choose_tile(view, x.element_size(), pool)
    kept, reduced, pooled = view.padded()
    tiles_kept = triton.cdiv(kept[0].size, tile.rows)
    tiles_red = triton.cdiv(reduced[0].size, tile.inner), triton.cdiv(reduced[1].size, tile.outer)
    n_rows, n_tiles = math.prod(x.shape[:n_kept]), tiles_red[0] * tiles_red[1] * reduced[2].size
    # neighbouring programs, or lanes, write neighbouring parts
    shape_parts = (_N_RAW, n_tiles, n_rows) if tile.kept_first else (_N_RAW, n_rows, n_tiles)
    parts = torch.empty(shape_parts, dtype=accumulate, device=x.device)
    parts = parts.transpose(1, 2) if tile.kept_first else parts
    with torch.cuda.device_of(x):
        _tile_kernel[(tiles_kept * kept[1].size * kept[2].size * n_tiles,)](
            x, parts, int(np.float64(exact_threshold(threshold, accumulate)).view(np.int64)),
            kept[0].size, kept[1].size, reduced[0].size, reduced[1].size, pooled[0].size, pooled[1].size,
            tiles_kept, *tiles_red, n_tiles, *parts.stride(),
            *(d.stride for d in (*kept, *reduced, *pooled)),
            POOL=pool, KEPT_FIRST=tile.kept_first,
            ROWS=tile.rows, INNER=tile.inner, OUTER=tile.outer, POOL_BLOCK=tile.window,
            WIDE=accumulate == torch.float64,
            num_warps=min(16, max(1, tile.rows * tile.inner * tile.outer * tile.window // 512)),
            enable_fp_fusion=True,
        )  # fmt: skip
        parts = _merged(parts, raw=True)
        while parts.shape[2] > 1:
            parts = _merged(parts, raw=False)
    return parts.reshape(shape)


def _merged(parts: Tensor, *, raw: bool) -> Tensor:
    """Merges up to 256 neighbouring parts of every row: ``(fields, n_rows, n_parts)`` -> ``(10, n_rows, n_groups)``."""
    _, n_rows, n_parts = parts.shape
    block = min(triton.next_power_of_2(n_parts), _MERGED)
    rows = max(1, min(triton.next_power_of_2(n_rows), 128 // block))
    n_groups = triton.cdiv(n_parts, block)
    out = torch.empty((N_FIELDS, n_rows, n_groups), dtype=torch.float64, device=parts.device)
    _merge_kernel[(triton.cdiv(n_rows, rows) * n_groups,)](
        parts, out, n_rows, n_parts, n_groups, *parts.stride()[1:],
        RAW=raw, ROWS=rows, PARTS=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
