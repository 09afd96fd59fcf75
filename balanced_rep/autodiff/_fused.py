"""The fused ops of :mod:`balanced_rep.ops` on stacks: slot 0 is the primal, the others are its tangents.

Every function takes stacks ``(1 + K, *shape)`` and returns one, contiguous or, where the first is, channels last.
Inside a trace the op is the registered one, so that compilers see it; else it writes where the result is wanted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from balanced_rep.ops._registry import OpSpec
from balanced_rep.ops.activation_jvp import ACTIVATION_JVP, GATED_ACTIVATION_JVP, as_rows
from balanced_rep.ops.attention_jvp import ATTENTION_JVP
from balanced_rep.ops.norm_jvp import GROUP_NORM_JVP, SOFTMAX_JVP

__all__ = ["activation", "attention", "channels_last", "fresh", "gated", "group_norm", "row_norm", "softmax", "strides"]


def channels_last(s: Tensor) -> bool:
    """Whether the slots ``(B, C, ...)`` have their channels innermost in memory, and nothing between."""
    return s.dim() > 3 and s.stride(2) == 1 and not s.is_contiguous() and s.movedim(2, -1).is_contiguous()


def fresh(s: Tensor) -> Tensor:
    """An uninitialised stack of the shape of ``s``: channels last if ``s`` is, else contiguous."""
    if channels_last(s):
        return s.new_empty(s.movedim(2, -1).shape).movedim(-1, 2)
    return s.new_empty(s.shape)


def strides(s: Tensor) -> tuple[int, ...]:
    """Those of a slot of ``fresh(s)``."""
    if channels_last(s) or s.is_contiguous():
        return s.stride()[1:]
    return tuple(math.prod(s.shape[i + 1 :]) for i in range(1, s.dim()))


def _into(spec: OpSpec, out: Tensor, *args: Any) -> None:
    """Runs an op, its results going to slot 0 and the other slots of ``out``."""
    if torch._C._len_torch_dispatch_stack():
        y, dy = getattr(torch.ops.balanced_rep, spec.name)(*args)
        out[0].copy_(y)
        out[1:].copy_(dy)
    else:
        spec(*args, out=(out[0], out[1:]))


def _rows(s: Tensor) -> Tensor:
    """(1 + K, R, n): one row per slot if slots are dense."""
    if channels_last(s):
        s = s.movedim(2, -1)
    return s.view(s.shape[0], 1, s[0].numel()) if s.is_contiguous() else as_rows(s, 1)


def activation(s: Tensor, kind: str) -> Tensor:
    """``f(x)`` for a kind of :data:`balanced_rep.ops.activation_jvp.KINDS`."""
    out, x = fresh(s), _rows(s)
    _into(ACTIVATION_JVP, _rows(out) if channels_last(s) else out.view(x.shape), x[0], x[1:], kind)
    return out


def gated(h: Tensor, g: Tensor, kind: str) -> Tensor:
    """``h f(g)``, two stacks of one shape."""
    out = fresh(h)
    alike = channels_last(h) == channels_last(g) and h.is_contiguous() == g.is_contiguous()
    a, b = (_rows(h), _rows(g)) if alike else (as_rows(h, 1), as_rows(g, 1))
    into = _rows(out) if alike and channels_last(h) else out.reshape(a.shape)
    _into(GATED_ACTIVATION_JVP, into, a[0], a[1:], b[0], b[1:], kind)
    return out if into.data_ptr() == out.data_ptr() else out.copy_(into.view(out.shape))


def group_norm(
    s: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, silu: bool
) -> Tensor:
    """Group norm of slots ``(B, C, ...)``, with SiLU behind it or not."""
    out = fresh(s)
    flat = (*s.shape[:3], math.prod(s.shape[3:]))
    x = s.reshape(flat)
    _into(GROUP_NORM_JVP, out.view(flat), x[0], x[1:], num_groups, weight, bias, eps, silu)
    return out


def row_norm(spec: OpSpec, s: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer or RMS norm over the last dim; ``weight`` and ``bias`` are ``(1, D)`` or one row per sample."""
    samples = max(1 if w is None else w.shape[0] for w in (weight, bias))
    shape = (s.shape[0], samples, math.prod(s.shape[1:-1]) // max(samples, 1), s.shape[-1])
    out, x = s.new_empty(s.shape), s.reshape(shape)
    _into(spec, out.view(shape), x[0], x[1:], weight, bias, eps)
    return out


def softmax(s: Tensor, dim: int) -> Tensor:
    """Softmax over dim ``dim`` of the stack."""
    last = s.movedim(dim, -1)
    shape = (s.shape[0], math.prod(last.shape[1:-1]), last.shape[-1])
    out, x = s.new_empty(last.shape), last.reshape(shape)
    _into(SOFTMAX_JVP, out.view(shape), x[0], x[1:])
    return out.movedim(-1, dim)


def attention(
    q: Tensor, k: Tensor, v: Tensor, moving: tuple[bool, bool, bool], mask: Tensor | None, is_causal: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attention on (1 + K, B, heads, n, channels); what does not move has one slot.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        moving: Which of them have tangents.
        mask: As for the op.
        is_causal: As for the op.
        scale: As for the op.

    Returns:
        ``(1 + K, B, H, N, c)``, in memory as (1 + K, B, N, H, c).
    """
    stacks = (q, k, v)
    slots = next(s.shape[0] for s, moves in zip(stacks, moving, strict=True) if moves)
    _, b, h, n, _ = q.shape
    out = q.new_empty((slots, b, n, h, v.shape[-1])).transpose(2, 3)
    tangents = [s[1:] if moves else None for s, moves in zip(stacks, moving, strict=True)]
    _into(ATTENTION_JVP, out, *(s[0] for s in stacks), *tangents, mask, is_causal, scale)
    return out
