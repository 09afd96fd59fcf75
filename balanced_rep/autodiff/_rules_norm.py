r"""Normalisations: statistics of the primal once, then two averages per tangent.

With x^ = (x - mean) r, r = 1 / std over a group, the tangent of x^ is r (t - <t> - x^ <t x^>), where < > is the mean
over the group; RMS norm has no mean to take off, softmax is y (t - <y, t>). Sums are taken in float32 at least.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff import _fused
from balanced_rep.autodiff._dual import Dual, is_dual, slot_dim, slot_dims
from balanced_rep.autodiff._errors import UnsupportedError
from balanced_rep.autodiff._pending import NormedGroups, NormedRows
from balanced_rep.autodiff._registry import RULES, Rule, rule
from balanced_rep.autodiff._session import calling_module
from balanced_rep.ops._jvp import wide
from balanced_rep.ops._registry import OpSpec
from balanced_rep.ops.norm_jvp import LAYER_NORM_JVP, RMS_NORM_JVP


@rule("group_norm", kind="norm", formula="t' = w r (t - <t> - x^ <t x^>) over each group")
def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:  # fmt: skip
    if is_dual(weight) or is_dual(bias) or not isinstance(input, Dual) or not input.is_floating_point():
        return NotImplemented
    if input.dim() < 2 or num_groups < 1 or input.shape[1] % num_groups or not input.numel():
        F.group_norm(input.primal, num_groups, weight, bias, eps)  # raises, unless it is empty
    return Dual.later(NormedGroups(*input.parts, num_groups, weight, bias, eps))


@rule("layer_norm", kind="norm", formula="t' = w r (t - <t> - x^ <t x^>) over each row")
def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:  # fmt: skip
    if is_dual(weight) or is_dual(bias) or not isinstance(input, Dual) or not input.is_floating_point():
        return NotImplemented
    return _row_norm(LAYER_NORM_JVP, input, normalized_shape, weight, bias, eps)


@rule("rms_norm", kind="norm", formula="t' = w r (t - x^ <t x^>) over each row, x^ = x r, r = 1 / rms")
def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    if is_dual(weight) or not isinstance(input, Dual) or not input.is_floating_point():
        return NotImplemented
    eps = torch.finfo(wide(input.primal[:0]).dtype).eps if eps is None else eps
    return _row_norm(RMS_NORM_JVP, input, normalized_shape, weight, None, eps)


def _row_norm(
    spec: OpSpec, input: Dual, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Dual:
    given = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    sizes = tuple(input.shape[input.dim() - len(given) :])
    for w in (weight, bias):
        if given != sizes or not given or (w is not None and tuple(w.shape) != given):
            F.layer_norm(input.primal, given, weight, bias)  # raises
    weight, bias = (None if w is None else w.reshape(1, -1) for w in (weight, bias))
    x, dx = input.parts
    if len(given) == 1:
        return Dual.later(NormedRows(x, dx, spec, weight, bias, eps))
    rows = NormedRows(x.flatten(-len(given)), dx.flatten(-len(given)), spec, weight, bias, eps)
    return Dual(Dual.of(rows.done()).stack.view(input.slots, *input.shape))


@rule("batch_norm", kind="norm", formula="t' = w t / sqrt(running_var + eps) (eval mode; refused in training)")
def _batch_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *_: Any,
) -> Any:  # fmt: skip
    if training and running_mean is not None:
        raise UnsupportedError(
            f"br.jvp: batch normalisation is in training mode{calling_module()}: it would change the running "
            "statistics, and samples would depend on each other. Call model.eval()."
        )
    moving = any(is_dual(v) for v in (running_mean, running_var, weight, bias))
    if training or moving or running_var is None or not isinstance(input, Dual):
        return NotImplemented
    s = input.stack
    y = torch.empty_like(s)
    y[0].copy_(F.batch_norm(s[0], running_mean, running_var, weight, bias, eps=eps))
    scale = torch.rsqrt(wide(running_var) + eps)
    scale = scale if weight is None else scale * wide(weight)
    torch.mul(s[1:], scale.to(s.dtype).view(-1, *[1] * (s.dim() - 3)), out=y[1:])
    return Dual(y)


RULES[torch.batch_norm] = Rule(
    "batch_norm",
    "norm",
    lambda x, w, b, mean, var, training, momentum, eps, *_: _batch_norm(x, mean, var, w, b, training, momentum, eps),
    "t' = w t / sqrt(running_var + eps) (eval mode; refused in training)",
)


@rule("softmax", kind="norm", formula="t' = y (t - <y, t>)")
def _softmax(
    input: Dual, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None, **_: Any
) -> Any:
    if isinstance(_stacklevel, torch.dtype):  # torch.softmax(x, dim, dtype)
        dtype = _stacklevel
    if dim is None or not (dtype or input.dtype).is_floating_point or input.dim() == 0:
        return NotImplemented
    x, dx = input.parts
    if dtype is not None and dtype != x.dtype:
        x, dx = x.to(dtype), dx.to(dtype)
    return Dual.of(_fused.softmax(x, dx, slot_dim(dim, input.dim()) - 1))


@rule("log_softmax", kind="norm", formula="t' = t - <y, t>")
def _log_softmax(input: Dual, dim: int | None = None, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    dtype = next((a for a in args if isinstance(a, torch.dtype)), dtype)
    if dim is None:
        return NotImplemented
    s = input.stack if dtype is None else input.stack.to(dtype)
    d = slot_dim(dim, input.dim())
    y = torch.empty_like(s)
    y[0].copy_(torch.log_softmax(s[0], d - 1))
    t, p = wide(s[1:]), torch.softmax(wide(s[0]), d - 1)
    y[1:].copy_(t - (t * p).sum(d, keepdim=True))
    return Dual(y)


@rule("logsumexp", kind="norm", formula="t' = <softmax(x), t>")
def _logsumexp(input: Dual, dim: Any, keepdim: bool = False) -> Dual:
    s = input.stack
    dims = slot_dims(dim, input.dim())
    if not dims:
        return Dual(torch.cat([torch.logsumexp(s[0], ()).unsqueeze(0), s[1:]]))
    inner = [d - 1 for d in dims]
    y0 = torch.logsumexp(s[0], inner, keepdim=True)
    t = (s[1:] * torch.exp(s[0] - y0)).sum(dims, keepdim=True)
    y = torch.cat([y0.unsqueeze(0), t])
    return Dual(y if keepdim else y.squeeze(dims))


def _spread(name: str) -> None:
    """var and std over dims: t' = 2 <x - mean, t> / (n - correction), and the square root of it."""

    def apply(input: Dual, dim: Any = None, *args: Any, correction: Any = 1, keepdim: bool = False, **kw: Any) -> Any:
        unbiased = kw.get("unbiased", dim if isinstance(dim, bool) else (args[0] if args else None))
        keepdim = args[1] if len(args) > 1 else keepdim
        correction = correction if unbiased is None else int(unbiased)
        dims = None if isinstance(dim, bool) else kw.get("axis", dim)
        s = input.stack
        at = slot_dims(dims, input.dim())
        inner = [d - 1 for d in at]
        if correction is None or s.dim() == 1 or s.is_complex():
            return NotImplemented
        x = wide(s[0])
        x = x - x.mean(inner, keepdim=True)
        n = math.prod(s.shape[d] for d in at)
        y0 = getattr(torch, name)(s[0], inner, correction=correction, keepdim=True)
        t = (wide(s[1:]) * x).sum(at, keepdim=True) * (2 / (n - correction) if n > correction else math.nan if n else 0)
        if name == "std":
            t = (t / (2 * wide(y0))).masked_fill_(y0 == 0, 0)  # zero where nothing varies, as torch has it
        y = torch.cat([y0.unsqueeze(0), t.to(s.dtype)])
        return Dual(y if keepdim else y.squeeze(at))

    rule(name, kind="norm", formula="t' = 2 <x - mean, t> / (n - c)" + (", over 2 y" if name == "std" else ""))(apply)


_spread("var")
_spread("std")


def _vector_norm(
    input: Dual, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    if ord != 2 or dtype not in (None, input.dtype) or input.is_complex():
        return NotImplemented
    s = input.stack
    at = slot_dims(dim, input.dim())
    if not at:
        return NotImplemented
    y0 = torch.linalg.vector_norm(s[0], 2, [d - 1 for d in at], keepdim=True)
    t = (wide(s[1:]) * wide(s[0])).sum(at, keepdim=True) / wide(y0)
    y = torch.cat([y0.unsqueeze(0), t.masked_fill(y0 == 0, 0).to(s.dtype)])
    return Dual(y if keepdim else y.squeeze(at))


def _norm(input: Dual, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None, **_: Any) -> Any:
    return _vector_norm(input, 2 if p in (2, "fro", None) else p, dim, keepdim, dtype=dtype)


RULES[torch.linalg.vector_norm] = Rule("vector_norm", "norm", _vector_norm, "t' = <x, t> / y")
for _f in (torch.norm, Tensor.norm):
    RULES[_f] = Rule("norm", "norm", _norm, "t' = <x, t> / y")


@rule("normalize", kind="composite", formula="t' = (t - y <y, t>) / |x|")
def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor:
    return input / torch.linalg.vector_norm(input, p, dim, keepdim=True).clamp_min(eps).expand_as(input)
