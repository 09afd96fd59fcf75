r"""attention_jvp in Triton: flash attention that carries a group of tangents through one pass over keys and values.

Letters: B batch, H query heads, G heads of keys and values, N queries, M keys, d channels of queries and keys, c of
values, K tangents, T tangents of a group.

A program holds a block of queries of one head and T tangents. It walks over blocks of keys and keeps the running
maximum ``m`` of the scores, ``l = sum p`` of ``p = exp(s - m)``, ``o = p v`` and, per tangent,
``h = p o s'``, ``r = sum h`` and ``a = h v + p v'``, all rescaled when the maximum grows. At the end ``y = o / l`` and
``y' = (a - r y) / l``. Nothing of size (N, M) is in memory, and every input and output crosses it once: programs that
share keys and values are neighbours in the grid, and find them in the L2 cache.

Scores and values of the primal, two matrix products, are computed anew for each group of T: of the ``2 + 4 K`` products
of self-attention (``2 + 2 K`` where keys and values have no tangents) it makes ``2 ceil(K / T) + 4 K``. More than T
accumulators do not fit into registers, and keeping the scores would take N M numbers per head.

Scores are summed over steps of 16 or 32 channels, so that d is padded to a multiple of 16. Values and their
accumulators are tiles of a power of two, or of two such (40 is 32 + 16, 72 is 64 + 16) where that is fewer registers.
"""

# ruff: noqa: RUF005 (Triton compiles sums of tuples, not unpacking)
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a @triton.jit function is not the Python function that a type checker sees)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

__all__ = ["attention_jvp"]


@triton.jit
def _tile(ptr, row, live, stride_row, stride_col, WIDTH: tl.constexpr, first, SIZE: tl.constexpr):
    """Columns ``first`` to ``first + SIZE`` of a matrix with WIDTH columns, zero beyond them."""
    col = first + tl.arange(0, SIZE)
    mask = live[:, None]
    if WIDTH % SIZE != 0:
        mask = mask & (col < WIDTH)[None, :]
    return tl.load(ptr + row[:, None] * stride_row + col[None, :] * stride_col, mask=mask, other=0.0)


@triton.jit
def _load(ptr, row, live, stride_row, stride_col, WIDTH: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Rows of a matrix with WIDTH columns, as one tile of P0 columns or two."""
    first = _tile(ptr, row, live, stride_row, stride_col, WIDTH, 0, P0)
    if P1 == 0:
        return (first,)
    else:
        return (first, _tile(ptr, row, live, stride_row, stride_col, WIDTH, P0, P1))


@triton.jit
def _add_scores(acc, a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b^T in float32, the factors rounded to DTYPE."""
    return tl.dot(a.to(DTYPE), tl.trans(b.to(DTYPE)), acc, input_precision=PRECISION)


@triton.jit
def _add_product(acc, a, b, P1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b for accumulators and ``b`` in tiles; in the dtype of ``a``."""
    first = tl.dot(a, b[0].to(a.dtype), acc[0], input_precision=PRECISION)
    if P1 == 0:
        return (first,)
    else:
        return (first, tl.dot(a, b[1].to(a.dtype), acc[1], input_precision=PRECISION))


@triton.jit
def _scaled(acc, factor, P1: tl.constexpr):
    if P1 == 0:
        return (acc[0] * factor[:, None],)
    else:
        return (acc[0] * factor[:, None], acc[1] * factor[:, None])


@triton.jit
def _zeros(ROWS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    first = tl.zeros((ROWS, P0), tl.float32)
    if P1 == 0:
        return (first,)
    else:
        return (first, tl.zeros((ROWS, P1), tl.float32))


@triton.jit
def _store(ptr, tile, row, live, stride_row, WIDTH: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    col = FIRST + tl.arange(0, SIZE)
    mask = live[:, None]
    if FIRST + SIZE > WIDTH:
        mask = mask & (col < WIDTH)[None, :]
    tl.store(ptr + row[:, None] * stride_row + col[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attention_jvp_kernel(
    q_ptr,  # (B, H, N, d)
    k_ptr,  # (B, G, M, d)
    v_ptr,  # (B, G, M, c)
    dq_ptr,  # (K, B, H, N, d); of the three, those without HAS_ are not read
    dk_ptr,  # (K, B, G, M, d)
    dv_ptr,  # (K, B, G, M, c)
    mask_ptr,  # (B, H, N, M) uint8 (MASK 1) or floating point (MASK 2); MASK 0: not read
    y_ptr,  # (B, H, N, c), unit stride along c
    dy_ptr,  # (K, B, H, N, c), unit stride along c
    n_heads, n_shared, n, m, n_tangents, scale,  # H, H / G, N, M, K, a float
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m,  # these strides, to dy_n, in units of UNIT elements
    dq_k, dq_b, dq_h, dq_n, dk_k, dk_b, dk_h, dk_m, dv_k, dv_b, dv_h, dv_m, y_b, y_h, y_n, dy_k, dy_b, dy_h, dy_n,
    q_d, k_d, v_c, dq_d, dk_d, dv_c, mask_b, mask_h, mask_n, mask_m,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, STEP: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    UNIT: tl.constexpr, T: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block of queries, head and group of tangents: see the module. Exponentials to the base 2; sums in float32.

    ``h`` is rounded to the dtype of the tangents before both ``a`` and ``r`` add it up, so that ``a - r y`` cancels
    where the values are alike.
    """
    tangent = dy_ptr.dtype.element_ty
    primal = y_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    n_groups = tl.maximum(tl.cdiv(n_tangents, T), 1)
    n_blocks = tl.cdiv(n, QUERIES)
    group = program % n_groups
    block = program // n_groups % n_blocks
    head = program // n_groups // n_blocks % n_heads
    batch = program // n_groups // n_blocks // n_heads
    shared = head // n_shared
    row = (block * QUERIES).to(tl.int32) + tl.arange(0, QUERIES)
    live = row < n
    q_ptr += (batch * q_b + head * q_h) * UNIT
    k_ptr += (batch * k_b + shared * k_h) * UNIT
    v_ptr += (batch * v_b + shared * v_h) * UNIT
    dq_ptr += (batch * dq_b + head * dq_h) * UNIT
    dk_ptr += (batch * dk_b + shared * dk_h) * UNIT
    dv_ptr += (batch * dv_b + shared * dv_h) * UNIT
    mask_ptr += batch * mask_b + head * mask_h
    a, r = (), ()
    for _ in tl.static_range(T):
        a = a + (_zeros(QUERIES, C0, C1),)
        r = r + (tl.zeros((QUERIES,), tl.float32),)
    o = _zeros(QUERIES, C0, C1)
    total = tl.zeros((QUERIES,), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, ((block + 1) * QUERIES).to(tl.int32))
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS)
        there = key < m
        s = tl.zeros((QUERIES, KEYS), tl.float32)
        ds = ()
        for _ in tl.static_range(T):
            ds = ds + (tl.zeros((QUERIES, KEYS), tl.float32),)
        for first in range(0, D, STEP):
            q = _tile(q_ptr, row, live, q_n * UNIT, q_d, D, first, STEP)
            k = _tile(k_ptr, key, there, k_m * UNIT, k_d, D, first, STEP)
            s = _add_scores(s, q, k, primal, PRECISION)
            if HAS_DQ or HAS_DK:
                next_ds = ()
                for i in tl.static_range(T):  # the last group repeats the last tangent
                    at = tl.minimum(group * T + i, n_tangents - 1)
                    ds_i = ds[i]
                    if HAS_DQ:
                        dq = _tile(dq_ptr + at * dq_k * UNIT, row, live, dq_n * UNIT, dq_d, D, first, STEP)
                        ds_i = _add_scores(ds_i, dq, k, tangent, PRECISION)
                    if HAS_DK:
                        dk = _tile(dk_ptr + at * dk_k * UNIT, key, there, dk_m * UNIT, dk_d, D, first, STEP)
                        ds_i = _add_scores(ds_i, q, dk, tangent, PRECISION)
                    next_ds = next_ds + (ds_i,)
                ds = next_ds
        s *= scale * 1.4426950408889634
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None])
        if MASK > 0:
            given = tl.load(
                mask_ptr + row[:, None] * mask_n + key[None, :] * mask_m, mask=live[:, None] & there[None, :], other=0
            )
            if MASK == 1:
                seen = seen & (given != 0)
            else:
                s += given.to(tl.float32) * 1.4426950408889634
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # so far nothing is seen
        p = tl.exp2(s - base[:, None])
        keep = tl.exp2(top - base)
        top = new
        total = total * keep + tl.sum(p, 1)
        v = _load(v_ptr, key, there, v_m * UNIT, v_c, C, C0, C1)
        o = _add_product(_scaled(o, keep, C1), p.to(primal), v, C1, PRECISION)
        next_a, next_r = (), ()
        for i in tl.static_range(T):
            at = tl.minimum(group * T + i, n_tangents - 1)
            a_i, r_i = _scaled(a[i], keep, C1), r[i] * keep
            if HAS_DQ or HAS_DK:
                h = (p * (ds[i] * scale)).to(tangent)
                r_i += tl.sum(h.to(tl.float32), 1)
                a_i = _add_product(a_i, h, v, C1, PRECISION)
            if HAS_DV:
                dv = _load(dv_ptr + at * dv_k * UNIT, key, there, dv_m * UNIT, dv_c, C, C0, C1)
                a_i = _add_product(a_i, p.to(tangent), dv, C1, PRECISION)
            next_a, next_r = next_a + (a_i,), next_r + (r_i,)
        a, r = next_a, next_r
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)  # a row that sees nothing is zero
    y_ptr += (batch * y_b + head * y_h) * UNIT
    dy_ptr += (batch * dy_b + head * dy_h) * UNIT
    o = _scaled(o, inverse, C1)
    first = row < tl.where(group == 0, n, 0)  # one group writes y
    _store(y_ptr, o[0], row, first, y_n * UNIT, C, 0, C0)
    if C1 > 0:
        _store(y_ptr, o[1], row, first, y_n * UNIT, C, C0, C1)
    for i in tl.static_range(T):
        at = group * T + i
        wanted = row < tl.where(at < n_tangents, n, 0)
        drift = r[i] * inverse
        here = dy_ptr + at * dy_k * UNIT
        _store(here, a[i][0] * inverse[:, None] - drift[:, None] * o[0], row, wanted, dy_n * UNIT, C, 0, C0)
        if C1 > 0:
            _store(here, a[i][1] * inverse[:, None] - drift[:, None] * o[1], row, wanted, dy_n * UNIT, C, C0, C1)


class Tiling(NamedTuple):
    """Compile-time sizes of the kernel.

    Attributes:
        queries: Queries of a program.
        keys: Keys of a step.
        tangents: T, those of a program.
        num_warps: Its warps.
        step: Channels of a step of the scores.
    """

    queries: int
    keys: int
    tangents: int
    num_warps: int
    step: int


def pieces(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """One or two powers of two, at least 16 each, that together hold the channels of the values.

    Args:
        width: c.
        dtype: Of the primal.

    Returns:
        The sizes of the tiles; the second is 0 where there is one only. Wide or float32 tiles are not split: two
        accumulators then cost more registers than the channels that they save.
    """
    whole = max(16, triton.next_power_of_2(width))
    rest = max(16, triton.next_power_of_2(width - whole // 2))
    split = whole in (64, 128) and rest < whole // 2 and dtype != torch.float32
    return (whole // 2, rest) if split else (whole, 0)


def choose_tiling(
    d: int, c: int, n_tangents: int, dtype: torch.dtype, *, crossing: bool, mixed: bool = False
) -> Tiling:
    """Sizes that keep accumulators in registers on every architecture.

    Args:
        d: Channels of queries and keys.
        c: Channels of values.
        n_tangents: K.
        dtype: Of the primal.
        crossing: Whether the queries alone have tangents.
        mixed: Whether the tangents are in another dtype, so that operands are converted on the way.

    Returns:
        The sizes.
    """
    step = 32 if triton.cdiv(d, 32) * 2 == triton.cdiv(d, 16) else 16
    width = sum(pieces(c, dtype))
    if dtype == torch.float32:
        if mixed and width == 64:  # 4 warps, or steps of 16, lack a register or two on some architectures
            return Tiling(32, 16, 1, 8, 32)
        return Tiling(32 if width <= 128 else 16, 16, 1, 4 if width <= 64 else 8, step)
    if width <= 64:
        pair = n_tangents > 1 and (crossing or width <= 48)
        return Tiling(64, 16, 2 if pair else 1, 4, step)
    if width <= 128:
        return Tiling(64, 16, 1, 4 if width <= 96 else 8, step)
    return Tiling(32, 16, 1, 8, step)


def common_unit(tensors: Sequence[Tensor]) -> int:
    """What the strides of all tensors, but the last, are multiples of.

    The kernel multiplies strides by it, and so the compiler knows that rows are aligned: Triton by itself looks for
    multiples of 16 only, which head dims like 40 and 72 are not.

    Args:
        tensors: The operands and outputs.

    Returns:
        8 or 4 elements, where addresses are aligned to 16 bytes too; else 1.
    """
    strides = [s for t in tensors for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n != 1]
    if any(t.data_ptr() % 16 for t in tensors):
        return 1
    return next((unit for unit in (8, 4) if all(s % unit == 0 for s in strides)), 1)


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    mask: Tensor | None, is_causal: bool, scale: float, *, out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Attention and its tangents; see :func:`balanced_rep.ops.attention_jvp.attention_jvp_reference`.

    Args:
        q: ``(B, H, N, d)``.
        k: ``(B, G, M, d)``.
        v: ``(B, G, M, c)``.
        dq: ``(K, B, H, N, d)`` or None.
        dk: ``(K, B, G, M, d)`` or None.
        dv: ``(K, B, G, M, c)`` or None.
        mask: Broadcasts to ``(B, H, N, M)``, bool or floating point, or None.
        is_causal: Query i sees keys 0 to i only.
        scale: Factor of the scores.
        out: ``y (B, H, N, c)`` and ``dy (K, B, H, N, c)``, unit stride along c; written to.
    """
    y, dy = out
    if y.numel() == 0 and dy.numel() == 0:
        return
    (batch, heads, n, d), (_, shared, m, c) = q.shape, v.shape
    n_tangents = dy.shape[0]
    primals = [t.resolve_neg() for t in (q, k, v)]
    # an operand that is absent is not read; its place is taken by one that is there
    tangents = [None if t is None or n_tangents == 0 else t.resolve_neg() for t in (dq, dk, dv)]
    has_dq, has_dk, has_dv = (t is not None for t in tangents)
    filled = [x.unsqueeze(0) if t is None else t for x, t in zip(primals, tangents, strict=True)]
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    seen = primals[0][..., :1] if mask is None else _as_readable(mask)
    seen = seen.expand(batch, heads, n, m if kind else 1)
    mixed = dy.dtype != q.dtype
    tiling = choose_tiling(d, c, n_tangents, q.dtype, crossing=not (has_dk or has_dv), mixed=mixed)
    unit = common_unit((*primals, *filled, y, dy))
    c0, c1 = pieces(c, q.dtype)
    programs = batch * heads * triton.cdiv(n, tiling.queries) * max(triton.cdiv(n_tangents, tiling.tangents), 1)
    with torch.cuda.device_of(q):
        _attention_jvp_kernel[(programs,)](
            *primals, *filled, seen, y, dy,
            heads, heads // shared, n, m, n_tangents, scale,
            *(s // unit for t in (*primals, *filled, y, dy) for s in t.stride()[:-1]),
            *(t.stride(-1) for t in (*primals, *filled)), *seen.stride(),
            HAS_DQ=has_dq, HAS_DK=has_dk, HAS_DV=has_dv, MASK=kind, CAUSAL=is_causal,
            D=d, STEP=tiling.step, C=c, C0=c0, C1=c1,
            UNIT=unit, T=tiling.tangents, QUERIES=tiling.queries, KEYS=tiling.keys, PRECISION="tf32x3",
            num_warps=tiling.num_warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip


def _as_readable(mask: Tensor) -> Tensor:
    """The mask in a dtype that the kernel reads."""
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8)
    return mask.float() if mask.dtype == torch.float64 else mask
