r"""group_norm_jvp in Triton, with SiLU behind it where asked.

A program has one group of one sample and some tangents. A group is too long for registers (40960 elements in the
first layers of a UNet), so it is walked through: twice for mean and variance, then per tangent once for its two
averages and once for the result. What is read again is a group's primal and one tangent of it, some hundred kilobytes,
and comes from the L2 cache: long groups have programs of many warps, so that few of them are under way at a time, the
programs of one group follow on each other and share its primal, and every pass begins where the one before it ended.

Letters as in :mod:`balanced_rep.ops.norm_jvp`. A group is a matrix in memory, of channels by positions, or of
positions by channels in channels last.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a @triton.jit function is not the Python function that a type checker sees)

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from balanced_rep.kernels._jvp_plan import group_size, unit_last

__all__ = ["group_norm_jvp"]

_WARPS = ((1 << 16, 32), (1 << 14, 16), (0, 8))  # of a program, for groups of so many bytes or more
_RESIDENT_WARPS = 4096  # of a large device, at the kernel's registers; programs beyond them wait


@triton.jit
def _place(i, n_outer, n_inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Indices of tile ``i``, and which of them are inside."""
    across = tl.cdiv(n_inner, INNER)
    outer = (i // across * OUTER + tl.arange(0, OUTER))[:, None]
    inner = (i % across * INNER + tl.arange(0, INNER))[None, :]
    return outer, inner, (outer < n_outer) & (inner < n_inner)


@triton.jit
def _load(ptr, outer, inner, live, outer_stride):
    return tl.load(ptr + outer * outer_stride + inner, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _affine(
    unit, weight_ptr, bias_ptr, outer, inner, n_outer, n_inner,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """w x + b, and w, which broadcasts to it."""
    if LAST:
        channel, mask = inner, inner < n_inner
    else:
        channel, mask = outer, outer < n_outer
    if WEIGHT:
        w = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        unit = unit * w
    else:
        w = tl.full(channel.shape, 1.0, tl.float32)
    if BIAS:
        unit += tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    return unit, w


@triton.jit
def _group_norm_jvp_kernel(
    x_ptr,  # (B, C, S), unit stride along S, or along C if LAST; its stride along the other is x_outer
    dx_ptr,  # (K, B, C, S)
    weight_ptr,  # (C,), contiguous; not read unless WEIGHT
    bias_ptr,  # (C,), contiguous; not read unless BIAS
    y_ptr,  # (B, C, S)
    dy_ptr,  # (K, B, C, S)
    n_norms, channels, n_outer, n_inner, n_tangents, per_group, eps,  # groups of a sample, channels of one
    x_b, x_c, x_outer, dx_k, dx_b, dx_c, dx_outer, y_b, y_c, y_outer, dy_k, dy_b, dy_c, dy_outer,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One group and ``per_group`` tangents, in tiles of OUTER by INNER. All arithmetic in float32."""
    program = tl.program_id(0).to(tl.int64)
    n_groups = tl.maximum(tl.cdiv(n_tangents, per_group), 1)
    group = program % n_groups
    channel = program // n_groups % n_norms * channels
    batch = program // n_groups // n_norms
    x_ptr += batch * x_b + channel * x_c
    dx_ptr += batch * dx_b + channel * dx_c
    y_ptr += batch * y_b + channel * y_c
    dy_ptr += batch * dy_b + channel * dy_c
    weight_ptr += channel
    bias_ptr += channel
    n = n_outer * n_inner
    n_tiles = tl.cdiv(n_outer, OUTER) * tl.cdiv(n_inner, INNER)
    total = tl.zeros((OUTER, INNER), tl.float32)
    for i in range(0, n_tiles):
        outer, inner, live = _place(i, n_outer, n_inner, OUTER, INNER)
        total += _load(x_ptr, outer, inner, live, x_outer)
    mean = tl.sum(tl.sum(total, 1), 0) / n
    total = tl.zeros((OUTER, INNER), tl.float32)
    for i in range(0, n_tiles):
        outer, inner, live = _place(n_tiles - 1 - i, n_outer, n_inner, OUTER, INNER)
        c = tl.where(live, _load(x_ptr, outer, inner, live, x_outer) - mean, 0.0)
        total += c * c
    r = tl.rsqrt(tl.sum(tl.sum(total, 1), 0) / n + eps)
    if group == 0:
        for i in range(0, n_tiles):
            outer, inner, live = _place(i, n_outer, n_inner, OUTER, INNER)
            unit = (_load(x_ptr, outer, inner, live, x_outer) - mean) * r
            y, _ = _affine(unit, weight_ptr, bias_ptr, outer, inner, n_outer, n_inner, WEIGHT, BIAS, LAST)
            if SILU:
                y = y * tl.sigmoid(y)
            tl.store(y_ptr + outer * y_outer + inner, y.to(y_ptr.dtype.element_ty), mask=live)
    for k in range(group * per_group, tl.minimum((group + 1) * per_group, n_tangents)):
        t_ptr = dx_ptr + k * dx_k
        plain = tl.zeros((OUTER, INNER), tl.float32)
        along = tl.zeros((OUTER, INNER), tl.float32)
        for i in range(0, n_tiles):
            outer, inner, live = _place(n_tiles - 1 - i, n_outer, n_inner, OUTER, INNER)
            t = _load(t_ptr, outer, inner, live, dx_outer)
            plain += t
            along += t * ((_load(x_ptr, outer, inner, live, x_outer) - mean) * r)
        shift, slope = tl.sum(tl.sum(plain, 1), 0) / n, tl.sum(tl.sum(along, 1), 0) / n
        for i in range(0, n_tiles):
            outer, inner, live = _place(i, n_outer, n_inner, OUTER, INNER)
            unit = (_load(x_ptr, outer, inner, live, x_outer) - mean) * r
            y, w = _affine(unit, weight_ptr, bias_ptr, outer, inner, n_outer, n_inner, WEIGHT, BIAS, LAST)
            z = (_load(t_ptr, outer, inner, live, dx_outer) - shift - unit * slope) * (r * w)
            if SILU:
                g = tl.sigmoid(y)
                z = z * (g + y * (g * tl.sigmoid(-y)))
            tl.store(dy_ptr + k * dy_k + outer * dy_outer + inner, z.to(dy_ptr.dtype.element_ty), mask=live)


def group_norm_jvp(
    x: Tensor, dx: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    *, out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Group norm and its tangents; see :func:`balanced_rep.ops.norm_jvp.group_norm_jvp_reference`.

    Args:
        x: ``(B, C, S)``.
        dx: ``(K, B, C, S)``.
        num_groups: Groups of channels.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: Added to the variance.
        silu: Whether SiLU follows.
        out: ``y (B, C, S)`` and ``dy (K, B, C, S)``, unit stride along C or S; written to.
    """
    y, dy = out
    if y.numel() == 0:
        return
    (batch, n_channels, s), n_tangents = y.shape, dy.shape[0]
    channels = n_channels // num_groups
    last = y.stride(1) == 1 and n_channels > 1 and (y.stride(2) != 1 or s == 1)
    x, dx = (unit_last(t.mT).mT if last else unit_last(t) for t in (x, dx))
    w, b = (x if p is None else p.contiguous() for p in (weight, bias))  # x stands where nothing is read
    n_outer, n_inner = (s, channels) if last else (channels, s)
    warps = next(warps for least, warps in _WARPS if channels * s * dx.element_size() >= least)
    outer, inner = _tile_shape(n_outer, n_inner, 128 * warps)
    per_group = group_size(batch * num_groups, n_tangents, _RESIDENT_WARPS // warps)
    warps = warps if torch.version.hip is None else warps // 2  # AMD's have 64 lanes
    strides = (step for t in (x, dx, y, dy) for step in (*t.stride()[:-1], t.stride(-1 if last else -2)))
    with torch.cuda.device_of(x):
        _group_norm_jvp_kernel[(batch * num_groups * max(triton.cdiv(n_tangents, per_group), 1),)](
            x, dx, w, b, y, dy,
            num_groups, channels, n_outer, n_inner, n_tangents, per_group, eps, *strides,
            WEIGHT=weight is not None, BIAS=bias is not None, SILU=silu, LAST=last, OUTER=outer, INNER=inner,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def _tile_shape(n_outer: int, n_inner: int, tile: int) -> tuple[int, int]:
    """Powers of two, ``tile`` elements or fewer, that cover a group with the fewest elements beyond its end."""

    def shape(inner: int) -> tuple[int, int]:
        return min(triton.next_power_of_2(n_outer), tile // inner), inner

    def covered(inner: int) -> int:
        outer, inner = shape(inner)
        return triton.cdiv(n_outer, outer) * outer * triton.cdiv(n_inner, inner) * inner

    widest = min(triton.next_power_of_2(n_inner), tile)
    # 32 at least: a thread loads 16 bytes at a time; the wider of two that cover the same
    return shape(min((widest >> i for i in range(8) if widest >> i >= min(32, widest)), key=covered))
