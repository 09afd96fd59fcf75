"""Tensor-level wrappers of the compiled multi-tangent kernels: they write into ``out``, the pair (y, dy)."""

from __future__ import annotations

import torch
from torch import Tensor

from balanced_rep.kernels._supports import JVP_PAIRS
from balanced_rep.ops._cpp import extension

__all__ = [
    "activation_jvp",
    "attention_jvp",
    "gated_activation_jvp",
    "group_norm_jvp",
    "layer_norm_jvp",
    "rms_norm_jvp",
    "softmax_jvp",
]

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_LAYER_NORM, _RMS_NORM, _SOFTMAX = range(3)
_NONE: tuple[int, list[int]] = (0, [])
Pair = tuple[Tensor, Tensor]


def _pair(x: Tensor, dx: Tensor) -> int:
    return JVP_PAIRS.index((x.dtype, dx.dtype))


def _real(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _strided(x: Tensor | None, dims: int | None = -1) -> tuple[int, list[int]]:
    """Address and strides, without that of the last dim."""
    return _NONE if x is None else (x.data_ptr(), list(x.stride()[:dims]))


def _unit(x: Tensor | None, dim: int = -1) -> Tensor | None:
    """``x`` with unit stride along ``dim``, one of its last two, and without pending signs."""
    if x is None:
        return None
    x = x.resolve_neg()
    if x.stride(dim) == 1 or x.shape[dim] <= 1:
        return x
    return x.contiguous() if dim == -1 else x.mT.contiguous().mT


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    mask: Tensor | None, is_causal: bool, scale: float, *, out: Pair,
) -> None:  # fmt: skip
    """See :func:`balanced_rep.ops.attention_jvp.attention_jvp_reference`."""
    tensors = [_unit(x) for x in (q, k, v, dq, dk, dv)]
    tangent = next(t for t in tensors[3:] if t is not None)
    kind = 0
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = (mask if kind == 1 else mask.to(_real(q))).expand(*q.shape[:3], k.shape[2])
    shape = [tangent.shape[0], *q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]]
    extension().attention_jvp(
        _pair(q, tangent), shape, *map(_strided, tensors), kind, _strided(mask, None), is_causal, scale,
        *map(_strided, out), torch.get_num_threads(),
    )  # fmt: skip


def group_norm_jvp(
    x: Tensor, dx: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    *, out: Pair,
) -> None:  # fmt: skip
    """See :func:`balanced_rep.ops.norm_jvp.group_norm_jvp_reference`."""
    y, dy = out
    channels_last = y.stride(1) == 1 and y.shape[1] > 1 and (y.stride(2) != 1 or y.shape[2] == 1)
    inner = -2 if channels_last else -1
    given = *(_unit(t, inner) for t in (x, dx)), y, dy
    w, b = (None if p is None else p.to(_real(x)).contiguous() for p in (weight, bias))
    strided = [_strided(t, None) for t in given]
    extension().group_norm_jvp(
        _pair(x, dx), [dx.shape[0], *x.shape, num_groups], channels_last, *strided[:2], _address(w), _address(b), eps,
        silu, *strided[2:], torch.get_num_threads(),
    )  # fmt: skip


def layer_norm_jvp(x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, out: Pair) -> None:
    """See :func:`balanced_rep.ops.norm_jvp.layer_norm_jvp_reference`."""
    _rows(_LAYER_NORM, x, dx, weight, bias, eps, out)


def rms_norm_jvp(x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, out: Pair) -> None:
    """See :func:`balanced_rep.ops.norm_jvp.rms_norm_jvp_reference`."""
    _rows(_RMS_NORM, x, dx, weight, bias, eps, out)


def softmax_jvp(x: Tensor, dx: Tensor, *, out: Pair) -> None:
    """See :func:`balanced_rep.ops.norm_jvp.softmax_jvp_reference`."""
    y, dy = out
    _rows(_SOFTMAX, x.unsqueeze(0), dx.unsqueeze(1), None, None, 0.0, (y.unsqueeze(0), dy.unsqueeze(1)))


def _rows(op: int, x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Pair) -> None:
    given = [_unit(x), _unit(dx), *out]
    w, b = (None if p is None else p.to(_real(x)).contiguous() for p in (weight, bias))
    strided = [_strided(t) for t in given]
    step = [0 if p is None or p.shape[0] == 1 else p.shape[1] for p in (w, b)]
    extension().row_jvp(
        op, _pair(x, dx), [dx.shape[0], *x.shape], *strided[:2], _address(w), step[0], _address(b), step[1], eps,
        *strided[2:], torch.get_num_threads(),
    )  # fmt: skip


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def activation_jvp(x: Tensor, dx: Tensor, kind: str, *, out: Pair) -> None:
    """See :func:`balanced_rep.ops.activation_jvp.activation_jvp_reference`."""
    _activation(x, dx, None, None, kind, out)


def gated_activation_jvp(h: Tensor, dh: Tensor, g: Tensor, dg: Tensor, kind: str, *, out: Pair) -> None:
    """See :func:`balanced_rep.ops.activation_jvp.gated_activation_jvp_reference`."""
    _activation(h, dh, g, dg, kind, out)


def _activation(x: Tensor, dx: Tensor, g: Tensor | None, dg: Tensor | None, kind: str, out: Pair) -> None:
    given = [_unit(t) for t in (x, dx, g, dg)] + list(out)
    extension().activation_jvp(
        _ACTIVATIONS.index(kind), _pair(x, dx), [dx.shape[0], *x.shape], *map(_strided, given), torch.get_num_threads()
    )
