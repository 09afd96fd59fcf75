r"""activation_jvp and gated_activation_jvp in Triton: f and f' once per element, then one product per tangent.

A program holds a tile of the primal, y and the derivative in registers, and walks through a group of tangents: every
input and output crosses memory once. Where there are few tiles a group is smaller than K, and the primal is read again
for each group, from the L2 cache.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a @triton.jit function is not the Python function that a type checker sees)

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from balanced_rep.kernels._jvp_plan import group_size, merged_rows

__all__ = ["activation_jvp", "gated_activation_jvp"]

_TILE = 1024  # elements of a program
_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _value_and_derivative(x, KIND: tl.constexpr):
    """f and f' in float32. tanh(u) is 2 sigmoid(2 u) - 1, so that the tanh form of GELU is x sigmoid(2 u)."""
    if KIND == 1:
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * phi, phi + x * (tl.exp(x * x * -0.5) * 0.3989422804014327)
    else:
        if KIND == 0:
            u, slope = x, 1.0
        else:
            square = x * x
            u = 1.5957691216057308 * x * (1.0 + 0.044715 * square)  # 2 sqrt(2 / pi) (x + a x^3)
            slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
        g = tl.sigmoid(u)
        bend = g * tl.sigmoid(-u)  # g (1 - g)
        return x * g, g + tl.where(bend == 0.0, 0.0, x * slope * bend)  # far out the factors may be infinite


@triton.jit
def _activation_jvp_kernel(
    x_ptr,  # (R, n), stride (x_r, 1); x, or h if GATED
    dx_ptr,  # (K, R, n), stride (dx_k, dx_r, 1)
    g_ptr,  # (R, n), the gate; not read unless GATED
    dg_ptr,  # (K, R, n)
    y_ptr,  # (R, n), stride (y_r, 1)
    dy_ptr,  # (K, R, n), stride (dy_k, dy_r, 1)
    n_rows, n, n_tangents, per_group, x_r, g_r, y_r, dx_k, dx_r, dg_k, dg_r, dy_k, dy_r,
    GATED: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS by COLS elements and ``per_group`` tangents; all arithmetic in float32."""
    n_tiles = tl.cdiv(n, COLS)
    program = tl.program_id(0).to(tl.int64)
    n_groups = tl.maximum(tl.cdiv(n_tangents, per_group), 1)
    group = program % n_groups
    row = (program // n_groups // n_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    col = (program // n_groups % n_tiles * COLS + tl.arange(0, COLS))[None, :]
    live = (row < n_rows) & (col < n)
    x = tl.load(x_ptr + row * x_r + col, mask=live, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(g_ptr + row * g_r + col, mask=live, other=0.0).to(tl.float32)
        factor, derivative = _value_and_derivative(gate, KIND)
        y = x * factor
        derivative = x * derivative
    else:
        y, derivative = _value_and_derivative(x, KIND)
    first = row < tl.where(group == 0, n_rows, 0)
    tl.store(y_ptr + row * y_r + col, y.to(y_ptr.dtype.element_ty), mask=first & live)
    for k in range(group * per_group, tl.minimum((group + 1) * per_group, n_tangents)):
        t = tl.load(dx_ptr + k * dx_k + row * dx_r + col, mask=live, other=0.0).to(tl.float32)
        if GATED:
            tg = tl.load(dg_ptr + k * dg_k + row * dg_r + col, mask=live, other=0.0).to(tl.float32)
            t = t * factor + tg * derivative
        else:
            t = t * derivative
        tl.store(dy_ptr + k * dy_k + row * dy_r + col, t.to(dy_ptr.dtype.element_ty), mask=live)


def activation_jvp(x: Tensor, dx: Tensor, kind: str, *, out: tuple[Tensor, Tensor]) -> None:
    """An activation and its tangents; see :func:`balanced_rep.ops.activation_jvp.activation_jvp_reference`.

    Args:
        x: ``(R, n)``.
        dx: ``(K, R, n)``.
        kind: "silu", "gelu" or "gelu_tanh".
        out: ``y (R, n)`` and ``dy (K, R, n)``, unit stride along n; written to.
    """
    _launch((x,), (dx,), kind, out)


def gated_activation_jvp(
    h: Tensor, dh: Tensor, g: Tensor, dg: Tensor, kind: str, *, out: tuple[Tensor, Tensor]
) -> None:
    """``h f(g)`` and its tangents; see :func:`balanced_rep.ops.activation_jvp.gated_activation_jvp_reference`.

    Args:
        h: ``(R, n)``.
        dh: ``(K, R, n)``.
        g: The gate, ``(R, n)``.
        dg: ``(K, R, n)``.
        kind: "silu", "gelu" or "gelu_tanh".
        out: ``y (R, n)`` and ``dy (K, R, n)``, unit stride along n; written to.
    """
    _launch((h, g), (dh, dg), kind, out)


def _launch(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], kind: str, out: tuple[Tensor, Tensor]) -> None:
    if out[0].numel() == 0:
        return
    primals, tangents, (y, dy) = merged_rows(primals, tangents, out)
    (n_rows, n), n_tangents = y.shape, dy.shape[0]
    cols = min(triton.next_power_of_2(n), _TILE)
    rows = _TILE // cols
    programs = triton.cdiv(n_rows, rows) * triton.cdiv(n, cols)
    per_group = group_size(programs, n_tangents)
    (x, g), (dx, dg) = (primals[0], primals[-1]), (tangents[0], tangents[-1])
    with torch.cuda.device_of(y):
        _activation_jvp_kernel[(programs * max(triton.cdiv(n_tangents, per_group), 1),)](
            x, dx, g, dg, y, dy,
            n_rows, n, n_tangents, per_group, x.stride(0), g.stride(0), y.stride(0),
            *dx.stride()[:2], *dg.stride()[:2], *dy.stride()[:2],
            GATED=len(primals) == 2, KIND=_KINDS[kind], ROWS=rows, COLS=cols, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
