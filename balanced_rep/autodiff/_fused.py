"""The fused ops of :mod:`balanced_rep.ops` on a primal and its tangents.

Every function takes primals ``x`` and tangents ``dx`` ``(K, *x.shape)`` and returns the stack ``(1 + K, *y.shape)``,
or the pair ``(y, dy)`` where the tangents have a dtype of their own. Results are contiguous or, where ``x`` and ``dx``
are, channels last. Inside a trace the op is the registered one, so that compilers see it; else it writes where the
result is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from balanced_rep.ops._registry import OpSpec
from balanced_rep.ops.activation_jvp import ACTIVATION_JVP, GATED_ACTIVATION_JVP, as_rows
from balanced_rep.ops.attention_jvp import ATTENTION_JVP
from balanced_rep.ops.norm_jvp import GROUP_NORM_JVP, SOFTMAX_JVP

__all__ = [
    "Result", "activation", "attention", "channels_last", "contiguous_strides", "gated", "group_norm", "is_tracing",
    "joined", "plainly_channels_last", "row_norm", "scaled", "softmax", "strides", "summed", "summed_product",
]  # fmt: skip

Result = Tensor | tuple[Tensor, Tensor]
Fill = Callable[[Tensor, Tensor], None]


def is_tracing() -> bool:
    """Whether calls are being written down."""
    return bool(torch._C._len_torch_dispatch_stack())


def channels_last(s: Tensor) -> bool:
    """Whether the slots ``(B, C, ...)`` of a stack have their channels innermost in memory, and nothing between."""
    return s.dim() > 3 and s.stride(2) == 1 and not s.is_contiguous() and s.movedim(2, -1).is_contiguous()


def plainly_channels_last(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` in channels last with the strides by which torch knows it: those of a batch of one are free."""
    inner = x.permute(0, 2, 3, 1)
    return inner.view(inner.shape).permute(0, 3, 1, 2)


def _layout(x: Tensor, dx: Tensor) -> str:
    """``"contiguous"`` or ``"channels_last"`` if both are dense in that order, else ``"any"``."""
    if x.is_contiguous() and dx.is_contiguous():
        return "contiguous"
    return "channels_last" if channels_last(x.unsqueeze(0)) and channels_last(dx) else "any"


def strides(x: Tensor, dx: Tensor) -> tuple[int, ...]:
    """Strides of a slot of the result."""
    return contiguous_strides(x.shape) if _layout(x, dx) == "any" else x.stride()


def contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _filled(
    x: Tensor, dx: Tensor, layout: str, fill: Fill, shape: tuple[int, ...] | None = None, *, one_dtype: bool = False
) -> Any:
    """A result of a shape, by default that of ``x``, that ``fill(y, dy)`` writes."""
    shape = tuple(x.shape) if shape is None else shape

    def fresh(dtype: torch.dtype, *slots: int) -> Tensor:
        if layout != "channels_last":
            return x.new_empty((*slots, *shape), dtype=dtype)
        b, c, *rest = shape
        return x.new_empty((*slots, b, *rest, c), dtype=dtype).movedim(-1, len(slots) + 1)

    if one_dtype or x.dtype == dx.dtype:
        stack = fresh(x.dtype, 1 + dx.shape[0])
        fill(stack[0], stack[1:])
        return stack
    y, dy = fresh(x.dtype), fresh(dx.dtype, dx.shape[0])
    fill(y, dy)
    return y, dy


def _into(spec: OpSpec, out: tuple[Tensor, Tensor], *args: Any) -> None:
    """Runs an op, its results going into ``out``."""
    if is_tracing():
        for to, value in zip(out, getattr(torch.ops.balanced_rep, spec.name)(*args), strict=True):
            to.copy_(value)
    else:
        spec(*args, out=out)


def joined(x: Tensor, dx: Tensor) -> Tensor:
    """Both in one new stack."""

    def fill(y: Tensor, dy: Tensor) -> None:
        y.copy_(x)
        dy.copy_(dx)

    return _filled(x, dx, _layout(x, dx), fill, one_dtype=True)


def _rows(t: Tensor, extra: int, layout: str) -> Tensor:
    """``t`` as (R, n) behind ``extra`` dims: one row if it is dense."""
    if layout == "any":
        return as_rows(t, extra)
    t = t if layout == "contiguous" else t.movedim(1 + extra, -1)
    return t.view(*t.shape[:extra], 1, math.prod(t.shape[extra:]))


def activation(x: Tensor, dx: Tensor, kind: str) -> Result:
    """``f(x)`` for a kind of :data:`balanced_rep.ops.activation_jvp.KINDS`."""
    layout = _layout(x, dx)

    def fill(y: Tensor, dy: Tensor) -> None:
        rows, drows = _rows(x, 0, layout), _rows(dx, 1, layout)
        _into(ACTIVATION_JVP, (_rows(y, 0, layout), _rows(dy, 1, layout)), rows, drows, kind)

    return _filled(x, dx, layout, fill)


def gated(h: Tensor, dh: Tensor, g: Tensor, dg: Tensor, kind: str) -> Result:
    """``h f(g)``, all of one shape."""
    layout = _layout(h, dh)
    layout = layout if layout == _layout(g, dg) else "any"

    def fill(y: Tensor, dy: Tensor) -> None:
        args = [_rows(t, extra, layout) for t, extra in ((h, 0), (dh, 1), (g, 0), (dg, 1))]
        _into(GATED_ACTIVATION_JVP, (_rows(y, 0, layout), _rows(dy, 1, layout)), *args, kind)

    return _filled(h, dh, layout, fill)


def group_norm(
    x: Tensor, dx: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, silu: bool
) -> Result:
    """Group norm of ``(B, C, ...)``, with SiLU behind it or not."""
    shape = (*x.shape[:2], math.prod(x.shape[2:]))

    def fill(y: Tensor, dy: Tensor) -> None:
        out, dshape = (y.view(shape), dy.view(dy.shape[0], *shape)), (dx.shape[0], *shape)
        _into(GROUP_NORM_JVP, out, x.reshape(shape), dx.reshape(dshape), num_groups, weight, bias, eps, silu)

    return _filled(x, dx, _layout(x, dx), fill)


def row_norm(spec: OpSpec, x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Result:
    """Layer or RMS norm over the last dim; ``weight`` and ``bias`` are ``(1, D)`` or one row per sample."""
    samples = max(1 if w is None else w.shape[0] for w in (weight, bias))
    shape = (samples, math.prod(x.shape[:-1]) // max(samples, 1), x.shape[-1])

    def fill(y: Tensor, dy: Tensor) -> None:
        dshape = (dx.shape[0], *shape)
        _into(spec, (y.view(shape), dy.view(dshape)), x.reshape(shape), dx.reshape(dshape), weight, bias, eps)

    return _filled(x, dx, "contiguous", fill)


def softmax(x: Tensor, dx: Tensor, dim: int) -> Result:
    """Softmax over dim ``dim`` of ``x``, counted from the front."""
    last, dlast = x.movedim(dim, -1), dx.movedim(dim + 1, -1)
    shape = (math.prod(last.shape[:-1]), last.shape[-1])

    def fill(y: Tensor, dy: Tensor) -> None:
        dshape = (dx.shape[0], *shape)
        _into(SOFTMAX_JVP, (y.view(shape), dy.view(dshape)), last.reshape(shape), dlast.reshape(dshape))

    found = _filled(last, dlast, "contiguous", fill)
    if isinstance(found, Tensor):
        return found.movedim(-1, dim + 1)
    return found[0].movedim(-1, dim), found[1].movedim(-1, dim + 1)


def scaled(x: Tensor, dx: Tensor, factor: Tensor) -> Result:
    """``x`` times a constant that broadcasts to it."""

    def fill(y: Tensor, dy: Tensor) -> None:
        torch.mul(x, factor, out=y)
        torch.mul(dx, factor.to(dx.dtype), out=dy)

    return _filled(x, dx, _layout(x, dx), fill)


def summed(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], alpha: Any) -> Result:
    """``x + alpha y``, both of one shape."""
    (a, da), (b, db) = x, y
    dtype, ddtype = torch.promote_types(a.dtype, b.dtype), torch.promote_types(da.dtype, db.dtype)
    like, dlike = (a.to(dtype), da) if da.dtype == ddtype else (a.to(dtype), db)

    def fill(out: Tensor, dout: Tensor) -> None:
        torch.add(a, b, alpha=alpha, out=out)
        torch.add(da, db, alpha=alpha, out=dout)

    return _filled(like, dlike, _layout(a, da) if _layout(a, da) == _layout(b, db) else "any", fill)


def summed_product(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], factor: Tensor) -> Result:
    """``x + factor y``, ``x`` and ``y`` of one shape, the factor a constant that broadcasts to it."""
    (a, da), (b, db) = x, y

    def fill(out: Tensor, dout: Tensor) -> None:
        torch.addcmul(a, b, factor, out=out)
        torch.addcmul(da, db.to(da.dtype), factor.to(da.dtype), out=dout)

    return _filled(a, da, _layout(a, da), fill)


def attention(
    q: tuple[Tensor, Tensor | None], k: tuple[Tensor, Tensor | None], v: tuple[Tensor, Tensor | None],
    mask: Tensor | None, is_causal: bool, scale: float,
) -> Result:  # fmt: skip
    """Attention on primals (B, heads, n, channels) with tangents (K, ...) or none.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: As for the op.
        is_causal: As for the op.
        scale: As for the op.

    Returns:
        ``(1 + K, B, H, N, c)``, in memory as (1 + K, B, N, H, c), or the pair.
    """
    b, h, n, _ = q[0].shape
    shape, dx = (b, n, h, v[0].shape[-1]), next(t for _, t in (q, k, v) if t is not None)

    def fill(y: Tensor, dy: Tensor) -> None:
        out = (y.transpose(1, 2), dy.transpose(2, 3))
        _into(ATTENTION_JVP, out, q[0], k[0], v[0], q[1], k[1], v[1], mask, is_causal, scale)

    found = _filled(q[0], dx, "contiguous", fill, shape)
    return found.transpose(2, 3) if isinstance(found, Tensor) else (found[0].transpose(1, 2), found[1].transpose(2, 3))
