r"""group_norm_jvp in Triton, with SiLU behind it where asked.

A program has one group of one sample and some tangents. A group is too long for registers (40960 elements in the
first layers of a UNet), so it is walked through: twice for mean and variance, then per tangent once for its two
averages and once for the result. What is read again is a group's primal and one tangent of it, some hundred kilobytes,
and comes from the cache. Programs of one group follow on each other and share its primal.

Letters as in :mod:`balanced_rep.ops.norm_jvp`; n elements of a group, numbered along memory.
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

_BLOCK = 2048  # elements of a group that a program holds at a time


@triton.jit
def _load(ptr, e, n, inner, outer_stride, inner_stride, FLAT: tl.constexpr):
    """Elements ``e`` of a group in float32; zero beyond its end."""
    if FLAT:
        offset = e
    else:
        offset = e // inner * outer_stride + e % inner * inner_stride
    return tl.load(ptr + offset, mask=e < n, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, e, end, inner, outer_stride, inner_stride, FLAT: tl.constexpr):
    if FLAT:
        offset = e
    else:
        offset = e // inner * outer_stride + e % inner * inner_stride
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=e < end)


@triton.jit
def _affine(unit, weight_ptr, bias_ptr, e, n, inner, WEIGHT: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr):
    """w x + b and w, for the channels of the elements ``e``."""
    channel = e % inner if LAST else e // inner
    w = tl.full(unit.shape, 1.0, tl.float32)
    if WEIGHT:
        w = tl.load(weight_ptr + channel, mask=e < n, other=0.0).to(tl.float32)
        unit = unit * w
    if BIAS:
        unit += tl.load(bias_ptr + channel, mask=e < n, other=0.0).to(tl.float32)
    return unit, w


@triton.jit
def _group_norm_jvp_kernel(
    x_ptr,  # (B, C, S); every stride of a group is given as that of its inner and outer dim
    dx_ptr,  # (K, B, C, S)
    weight_ptr,  # (C,), contiguous; not read unless WEIGHT
    bias_ptr,  # (C,), contiguous; not read unless BIAS
    y_ptr,  # (B, C, S)
    dy_ptr,  # (K, B, C, S)
    n_norms, channels, n, inner, n_tangents, per_group, eps,  # groups of a sample, channels of one
    x_b, x_c, x_outer, x_inner, dx_k, dx_b, dx_c, dx_outer, dx_inner,
    y_b, y_c, y_outer, y_inner, dy_k, dy_b, dy_c, dy_outer, dy_inner,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, FLAT: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One group and ``per_group`` tangents. LAST: channels are the inner dim. All arithmetic in float32."""
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
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        total += _load(x_ptr, start + lane, n, inner, x_outer, x_inner, FLAT)
    mean = tl.sum(total, 0) / n
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        e = start + lane
        c = tl.where(e < n, _load(x_ptr, e, n, inner, x_outer, x_inner, FLAT) - mean, 0.0)
        total += c * c
    r = tl.rsqrt(tl.sum(total, 0) / n + eps)
    if group == 0:
        for start in range(0, n, BLOCK):
            e = start + lane
            unit = (_load(x_ptr, e, n, inner, x_outer, x_inner, FLAT) - mean) * r
            y, _ = _affine(unit, weight_ptr, bias_ptr, e, n, inner, WEIGHT, BIAS, LAST)
            if SILU:
                y = y * tl.sigmoid(y)
            _store(y_ptr, y, e, n, inner, y_outer, y_inner, FLAT)
    for k in range(group * per_group, tl.minimum((group + 1) * per_group, n_tangents)):
        t_ptr = dx_ptr + k * dx_k
        plain = tl.zeros((BLOCK,), tl.float32)
        along = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            e = start + lane
            t = _load(t_ptr, e, n, inner, dx_outer, dx_inner, FLAT)
            plain += t
            along += t * ((_load(x_ptr, e, n, inner, x_outer, x_inner, FLAT) - mean) * r)
        shift, slope = tl.sum(plain, 0) / n, tl.sum(along, 0) / n
        for start in range(0, n, BLOCK):
            e = start + lane
            unit = (_load(x_ptr, e, n, inner, x_outer, x_inner, FLAT) - mean) * r
            y, w = _affine(unit, weight_ptr, bias_ptr, e, n, inner, WEIGHT, BIAS, LAST)
            z = (_load(t_ptr, e, n, inner, dx_outer, dx_inner, FLAT) - shift - unit * slope) * (r * w)
            if SILU:
                g = tl.sigmoid(y)
                z = z * (g + y * (g * tl.sigmoid(-y)))
            _store(dy_ptr + k * dy_k, z, e, n, inner, dy_outer, dy_inner, FLAT)


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
    flat = not last and all(s == 1 or t.stride(-1) == 1 for t in (x, dx, y, dy))
    flat = flat and all(channels == 1 or t.stride(-2) == s for t in (x, dx, y, dy))
    w, b = (x if p is None else p.contiguous() for p in (weight, bias))  # x stands where nothing is read
    per_group = group_size(batch * num_groups, n_tangents)
    order = (-2, -1) if last else (-1, -2)

    def strides(t: Tensor) -> tuple[int, ...]:
        return *t.stride()[:-1], *(t.stride(d) for d in reversed(order))

    with torch.cuda.device_of(x):
        _group_norm_jvp_kernel[(batch * num_groups * max(triton.cdiv(n_tangents, per_group), 1),)](
            x, dx, w, b, y, dy,
            num_groups, channels, channels * s, channels if last else s, n_tangents, per_group, eps,
            *strides(x), *strides(dx), *strides(y), *strides(dy),
            WEIGHT=weight is not None, BIAS=bias is not None, SILU=silu, FLAT=flat, LAST=last,
            BLOCK=min(_BLOCK, triton.next_power_of_2(channels * s)), num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
