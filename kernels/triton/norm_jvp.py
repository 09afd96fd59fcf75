r"""layer_norm_jvp, rms_norm_jvp and softmax_jvp in Triton: the statistics of a row once, two averages per tangent.

A program holds some rows in registers, whole, and walks through a group of tangents: every input and output crosses
memory once. Where there are few rows a group is smaller than K, and the primal is read again for each group, from the
L2 cache. Letters as in :mod:`balanced_rep.ops.norm_jvp`.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a @triton.jit function is not the Python function that a type checker sees)

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from balanced_rep.kernels._jvp_plan import group_size, unit_last

__all__ = ["layer_norm_jvp", "rms_norm_jvp", "softmax_jvp"]

_TILE = 2048  # elements of a program, unless a row is longer
_LAYER_NORM, _RMS_NORM, _SOFTMAX = range(3)


@triton.jit
def _row_jvp_kernel(
    x_ptr,  # (B, R, D), stride (x_b, x_r, 1)
    dx_ptr,  # (K, B, R, D), stride (dx_k, dx_b, dx_r, 1)
    weight_ptr,  # (B or 1, D), stride (w_b, 1); not read unless WEIGHT
    bias_ptr,  # (B or 1, D), stride (bias_b, 1); not read unless BIAS
    y_ptr,  # (B, R, D), stride (y_b, y_r, 1)
    dy_ptr,  # (K, B, R, D), stride (dy_k, dy_b, dy_r, 1)
    n_samples, n_rows, n, n_tangents, per_group, eps,
    x_b, x_r, dx_k, dx_b, dx_r, w_last, w_b, bias_last, bias_b, y_b, y_r, dy_k, dy_b, dy_r,
    KIND: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, which COLS >= D holds whole, and ``per_group`` tangents; all arithmetic in float32.

    Products are not fused with sums: the two lanes of an exchange would then add a pair to different bits.
    """
    program = tl.program_id(0).to(tl.int64)
    n_groups = tl.maximum(tl.cdiv(n_tangents, per_group), 1)
    group = program % n_groups
    index = (program // n_groups * ROWS + tl.arange(0, ROWS))[:, None]
    batch, row = index // n_rows, index % n_rows
    col = tl.arange(0, COLS)[None, :]
    live = (batch < n_samples) & (col < n)
    first = (batch < tl.where(group == 0, n_samples, 0)) & (col < n)
    x_ptr += batch * x_b + row * x_r + col
    dx_ptr += batch * dx_b + row * dx_r + col
    y_ptr += batch * y_b + row * y_r + col
    dy_ptr += batch * dy_b + row * dy_r + col
    begin, end = group * per_group, tl.minimum((group + 1) * per_group, n_tangents)
    if KIND == 2:
        x = tl.load(x_ptr, mask=live, other=float("-inf")).to(tl.float32)
        x = tl.where(batch < n_samples, x, 0.0)  # a row that is not there has no maximum
        y = tl.exp(x - tl.max(x, 1)[:, None])
        y = y / tl.sum(y, 1)[:, None]
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=first)
        for k in range(begin, end):
            h = y * tl.load(dx_ptr + k * dx_k, mask=live, other=0.0).to(tl.float32)
            tl.store(dy_ptr + k * dy_k, (h - y * tl.sum(h, 1)[:, None]).to(dy_ptr.dtype.element_ty), mask=live)
    else:
        x = tl.load(x_ptr, mask=live, other=0.0).to(tl.float32)
        if KIND == 0:
            x = tl.where(col < n, x - tl.sum(x, 1)[:, None] / n, 0.0)
        r = tl.rsqrt(tl.sum(x * x, 1) / n + eps)[:, None]
        unit = x * r
        if WEIGHT:
            w = tl.load(weight_ptr + tl.minimum(batch, w_last) * w_b + col, mask=live, other=0.0).to(tl.float32)
            y, slope = unit * w, r * w
        else:
            y, slope = unit, tl.broadcast_to(r, (ROWS, COLS))
        if BIAS:
            y += tl.load(bias_ptr + tl.minimum(batch, bias_last) * bias_b + col, mask=live, other=0.0).to(tl.float32)
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=first)
        for k in range(begin, end):
            t = tl.load(dx_ptr + k * dx_k, mask=live, other=0.0).to(tl.float32)
            z = t - unit * (tl.sum(t * unit, 1) / n)[:, None]
            if KIND == 0:
                z -= (tl.sum(t, 1) / n)[:, None]
            tl.store(dy_ptr + k * dy_k, (slope * z).to(dy_ptr.dtype.element_ty), mask=live)


def layer_norm_jvp(
    x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, out: tuple[Tensor, Tensor]
) -> None:
    """Layer norm and its tangents; see :func:`balanced_rep.ops.norm_jvp.layer_norm_jvp_reference`.

    Args:
        x: ``(B, R, D)``.
        dx: ``(K, B, R, D)``.
        weight: ``(1, D)``, ``(B, D)`` or None.
        bias: The same.
        eps: Added to the variance.
        out: ``y (B, R, D)`` and ``dy (K, B, R, D)``, unit stride along D; written to.
    """
    _launch(_LAYER_NORM, x, dx, weight, bias, eps, out)


def rms_norm_jvp(
    x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, out: tuple[Tensor, Tensor]
) -> None:
    """RMS norm and its tangents; see :func:`balanced_rep.ops.norm_jvp.rms_norm_jvp_reference`.

    Args:
        x: ``(B, R, D)``.
        dx: ``(K, B, R, D)``.
        weight: ``(1, D)``, ``(B, D)`` or None.
        bias: The same.
        eps: Added to the mean square.
        out: ``y (B, R, D)`` and ``dy (K, B, R, D)``, unit stride along D; written to.
    """
    _launch(_RMS_NORM, x, dx, weight, bias, eps, out)


def softmax_jvp(x: Tensor, dx: Tensor, *, out: tuple[Tensor, Tensor]) -> None:
    """Softmax and its tangents; see :func:`balanced_rep.ops.norm_jvp.softmax_jvp_reference`.

    Args:
        x: ``(R, D)``.
        dx: ``(K, R, D)``.
        out: ``y (R, D)`` and ``dy (K, R, D)``, unit stride along D; written to.
    """
    y, dy = out
    _launch(_SOFTMAX, x.unsqueeze(0), dx.unsqueeze(1), None, None, 0.0, (y.unsqueeze(0), dy.unsqueeze(1)))


def _launch(
    kind: int, x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    y, dy = out
    if y.numel() == 0:
        return
    x, dx = unit_last(x), unit_last(dx)
    w, b = (x[:, 0] if p is None else unit_last(p) for p in (weight, bias))  # x stands where nothing is read
    (samples, n_rows, n), n_tangents = x.shape, dx.shape[0]
    cols = triton.next_power_of_2(n)
    rows = max(1, min(_TILE // cols, triton.next_power_of_2(samples * n_rows)))
    programs = triton.cdiv(samples * n_rows, rows)
    per_group = group_size(programs, n_tangents)
    with torch.cuda.device_of(x):
        _row_jvp_kernel[(programs * max(triton.cdiv(n_tangents, per_group), 1),)](
            x, dx, w, b, y, dy,
            samples, n_rows, n, n_tangents, per_group, eps,
            *x.stride()[:2], *dx.stride()[:3], *_rows(w), *_rows(b),
            *y.stride()[:2], *dy.stride()[:3],
            KIND=kind, WEIGHT=weight is not None, BIAS=bias is not None, ROWS=rows, COLS=cols,
            num_warps=min(16, max(4, cols // 512)), enable_fp_fusion=False,
        )  # fmt: skip


def _rows(p: Tensor) -> tuple[int, int]:
    """The last row of the weights, and the stride between rows."""
    # Of a single row the stride is its length: a stride of 0, which 16 divides, would have the compiler choose loads
    # of 16 bytes, for x as well, beside rows of x that allow no such loads.
    return p.shape[0] - 1, p.stride(0) if p.shape[0] > 1 else p.shape[-1]
