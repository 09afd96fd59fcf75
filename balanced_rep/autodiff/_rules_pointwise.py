"""Elementwise functions: the derivative once per element of the primal, then one product per tangent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff import _fused
from balanced_rep.autodiff._dual import Dual, is_dual, primal, slots
from balanced_rep.autodiff._pending import Activated, Apart, NormedGroups, NormedRows, Scaled
from balanced_rep.autodiff._registry import RULES, Rule, rule
from balanced_rep.ops._jvp import wide

Derivative = Callable[..., Tensor]


def _elementwise(name: str, derivative: Derivative, formula: str, *, holomorphic: bool = True) -> None:
    value = getattr(F, name, None) or getattr(torch, name)

    def apply(input: Dual, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("inplace", None)
        if any(is_dual(a) for a in (*args, *kwargs.values())) or (input.is_complex() and not holomorphic):
            return NotImplemented
        s = input.stack
        y0 = value(s[0], *args, **kwargs)
        y = torch.empty_like(s) if y0.shape == s.shape[1:] else s.new_empty((s.shape[0], *y0.shape))
        y[0].copy_(y0)
        torch.mul(s[1:], derivative(wide(s[0]), *args, **kwargs), out=y[1:])  # rounded once, to the type of y
        return Dual(y)

    rule(name, kind="pointwise", formula=formula)(apply)


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    return torch.where(x * beta > threshold, 1.0, torch.sigmoid(x * beta))


def _mish(x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


def _elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > 0, 1.0, alpha * torch.exp(x))


def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > 0, 1.0, torch.exp(x / alpha))


SELU = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717  # scale, alpha


def _selu(x: Tensor) -> Tensor:
    return SELU[0] * torch.where(x > 0, 1.0, SELU[1] * torch.exp(x))


def _sech2(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    return 1 - y * y


def _sigmoid(x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    return y * (1 - y)


for _name, _derivative, _formula in (
    ("sigmoid", _sigmoid, "t' = t y (1 - y)"),
    ("tanh", _sech2, "t' = t (1 - y^2)"),
    ("softplus", _softplus, "t' = t sigmoid(beta x)"),
    ("logsigmoid", lambda x: torch.sigmoid(-x), "t' = t sigmoid(-x)"),
    ("mish", _mish, "t' = t (u + x (1 - u^2) sigmoid(x)), u = tanh(softplus(x))"),
    ("elu", _elu, "t' = t (1 or alpha e^x)"),
    ("celu", _celu, "t' = t (1 or e^(x / alpha))"),
    ("selu", _selu, "t' = t scale (1 or alpha e^x)"),
    ("exp", torch.exp, "t' = t y"),
    ("exp2", lambda x: torch.exp2(x) * math.log(2), "t' = t y ln 2"),
    ("expm1", torch.exp, "t' = t e^x"),
    ("log", torch.reciprocal, "t' = t / x"),
    ("log1p", lambda x: 1 / (1 + x), "t' = t / (1 + x)"),
    ("log2", lambda x: 1 / (x * math.log(2)), "t' = t / (x ln 2)"),
    ("sqrt", lambda x: 0.5 / torch.sqrt(x), "t' = t / (2 y)"),
    ("rsqrt", lambda x: -0.5 * torch.rsqrt(x).pow(3), "t' = -t y^3 / 2"),
    ("square", lambda x: 2 * x, "t' = 2 x t"),
    ("reciprocal", lambda x: -1 / (x * x), "t' = -t y^2"),
    ("sin", torch.cos, "t' = t cos x"),
    ("cos", lambda x: -torch.sin(x), "t' = -t sin x"),
    ("atan", lambda x: 1 / (1 + x * x), "t' = t / (1 + x^2)"),
    ("erf", lambda x: torch.exp(-x * x) * (2 / math.sqrt(math.pi)), "t' = t 2 e^(-x^2) / sqrt(pi)"),
    ("abs", torch.sgn, "t' = t sgn(x)"),
):
    _elementwise(_name, _derivative, _formula, holomorphic=_name != "abs")


@rule("silu", kind="pointwise", formula="t' = t g (1 + x (1 - g)), g = sigmoid(x)")
def _silu(input: Dual, inplace: bool = False) -> Any:
    if not input.is_floating_point():
        return NotImplemented
    if isinstance(pending := input.pending, NormedGroups):
        return Dual.of(pending.checked().compute(silu=True))
    return Dual.later(Activated(*input.parts, "silu"))


@rule("gelu", kind="pointwise", formula="t' = t (Phi(x) + x phi(x)), or of the tanh form")
def _gelu(input: Dual, approximate: str = "none") -> Any:
    if not input.is_floating_point() or approximate not in ("none", "tanh"):
        return NotImplemented
    return Dual.later(Activated(*input.parts, "gelu" if approximate == "none" else "gelu_tanh"))


def _gated(name: str, closed: Callable[..., Tensor], slope: Callable[..., float], formula: str) -> None:
    """Piecewise linear: tangents pass where the gate is open, else are scaled; a NaN passes no closed gate."""
    value = getattr(F, name, None) or getattr(torch, name)

    def apply(input: Dual, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("inplace", None)
        if any(is_dual(a) for a in (*args, *kwargs.values())):
            return NotImplemented
        y0 = value(input.stack[0], *args, **kwargs)
        s = _align(input.stack, y0.dim())
        y = _empty(s, s.shape[0], y0.shape, y0.dtype)
        y[0].copy_(y0)
        shut, by = closed(s[0], *args, **kwargs), slope(*args, **kwargs)
        y[1:].copy_(s[1:].masked_fill(shut, 0) if by == 0 else torch.where(shut, s[1:] * by, s[1:]))
        return Dual(y)

    rule(name, kind="pointwise", formula=formula)(apply)


def _zero(*_: Any, **__: Any) -> float:
    return 0.0


def _outside(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    shut = torch.zeros_like(x, dtype=torch.bool)
    if min is not None:
        shut = shut | (x < min)
    return shut if max is None else shut | (x > max)


_gated("relu", lambda x: x <= 0, _zero, "t' = t where x > 0")
_gated("relu6", lambda x: (x <= 0) | (x >= 6), _zero, "t' = t where 0 < x < 6")
_gated("hardtanh", lambda x, min_val=-1.0, max_val=1.0: (x <= min_val) | (x >= max_val), _zero, "t' = t inside")
_gated("clamp", _outside, _zero, "t' = t inside the bounds")
_gated("clamp_min", lambda x, min: x < min, _zero, "t' = t above the bound")
_gated("clamp_max", lambda x, max: x > max, _zero, "t' = t below the bound")
_gated("threshold", lambda x, threshold, value: x <= threshold, _zero, "t' = t above the threshold")
_gated(
    "leaky_relu", lambda x, negative_slope=0.01: x <= 0, lambda negative_slope=0.01: negative_slope, "t' = t or slope t"
)


@rule("rrelu", kind="composite", formula="t' = t or (lower + upper) / 2 t (eval mode; refused in training)")
def _rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Any:
    return NotImplemented if training else F.leaky_relu(input, (lower + upper) / 2)


_elementwise(
    "hardswish",
    lambda x: torch.where(x <= -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0)),
    "t' = t (x / 3 + 1/2) between -3 and 3",
)
_elementwise("hardsigmoid", lambda x: torch.where((x > -3) & (x < 3), 1 / 6, 0.0), "t' = t / 6 between -3 and 3")


@rule("neg", kind="pointwise", formula="t' = -t")
def _neg(input: Dual) -> Dual:
    return Dual(-input.stack)


@rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
      kind="pointwise", formula="t' = t (eval mode; refused in training)")  # fmt: skip
def _dropout(input: Dual, p: float = 0.5, training: bool = True, inplace: bool = False, **kwargs: Any) -> Any:
    return NotImplemented if (kwargs.get("train", training) and p > 0) else input


# Two operands ----------------------------------------------------------------------------------------------------


def _plain(x: Any) -> bool:
    return not isinstance(x, Dual)


def _align(s: Tensor, ndim: int) -> Tensor:
    """A stack whose slots have ``ndim`` dims."""
    return s if s.dim() > ndim else s.reshape(s.shape[0], *[1] * (ndim + 1 - s.dim()), *s.shape[1:])


def _ndim(x: Any) -> int:
    return x.dim() if isinstance(x, Tensor) else 0


def _result(x: Any, y: Any) -> tuple[torch.Size, torch.dtype, int]:
    """Shape and dtype that torch gives ``x op y``, and dims."""
    shapes = [v.shape for v in (x, y) if isinstance(v, Tensor)]
    shape = shapes[0] if shapes[0] == shapes[-1] else torch.broadcast_shapes(*shapes)  # which takes its time
    if _ndim(x) and _ndim(y):  # without a look at values, which may still wait
        return shape, torch.promote_types(x.dtype, y.dtype), len(shape)
    return shape, torch.result_type(*(_typed(v) for v in (x, y))), len(shape)


def _typed(x: Any) -> Any:
    """Something of the dtype and kind of ``x``, as type promotion tells tensors, 0-dim tensors and numbers apart."""
    return torch.empty([0] * x.dim(), dtype=x.dtype) if isinstance(x, Dual) else x


def _of(x: Any, ndim: int, dtype: torch.dtype) -> Tensor:
    """The stack of ``x`` with slots of ``ndim`` dims, for a result of dtype ``dtype``."""
    s = _align(x.stack, ndim)
    return s.to(dtype) if x.dim() == 0 else s  # with slots in front it is no tensor without dims to torch any more


def _empty(like: Tensor, n_slots: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised stack, in the memory layout of ``like`` if that has its shape."""
    if like.shape == (n_slots, *shape):
        return torch.empty_like(like, dtype=dtype)
    return like.new_empty((n_slots, *shape), dtype=dtype)


def _sum(x: Any, y: Any, alpha: Any = 1) -> Dual:
    """``x + alpha y``."""
    shape, dtype, n = _result(x, y)
    for a, b in ((x, y), (y, x)) if alpha == 1 else ():
        if (joined := _joined(a, b)) is not None:
            return joined
    if isinstance(x, Dual) and isinstance(y, Dual):
        if x.shape == y.shape and (x.is_apart or y.is_apart):
            return Dual.of(_fused.summed(x.parts, y.parts, alpha))
        return Dual(torch.add(_of(x, n, dtype), _of(y, n, dtype), alpha=alpha))
    moving = x if isinstance(x, Dual) else y
    if isinstance(x, Dual) and shape == x.shape and dtype == x.dtype:  # a constant leaves the tangents where they are
        value, tangents = x.parts
        return Dual.later(Apart(torch.add(value, y, alpha=alpha), tangents))
    s = _align(moving.stack, n)
    out = _empty(s, slots(moving), shape, dtype)
    torch.add(primal(x), primal(y), alpha=alpha, out=out[0]) if isinstance(primal(x), Tensor) else out[0].copy_(
        torch.add(primal(y) * alpha, x)
    )
    # copy_ broadcasts; out= would shrink the view to the shape of the smaller operand.
    out[1:].copy_(s[1:] if moving is x or alpha == 1 else s[1:] * alpha)
    return Dual(out)


def _joined(x: Any, y: Any) -> Dual | None:
    """``x + y`` together with what ``x`` waits for: a scale, or a norm if ``y`` is a constant shift."""
    pending = x.pending if isinstance(x, Dual) else None
    if isinstance(pending, NormedRows) and not isinstance(y, Dual):
        moved = pending.checked().plus(y)
        return None if moved is None else Dual.later(moved)
    if isinstance(pending, Scaled) and isinstance(y, Dual) and y.shape == x.shape and y.dtype == x.dtype:
        source = pending.checked()
        return Dual.of(_fused.summed_product(y.parts, (source.primal, source.tangents), source.factor))
    return None


@rule("add", kind="pointwise", formula="t' = t_a + alpha t_b")
def _add(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return NotImplemented if is_dual(alpha) else _sum(input, other, alpha)


@rule("sub", kind="pointwise", formula="t' = t_a - alpha t_b")
def _sub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return NotImplemented if is_dual(alpha) else _sum(input, other, -alpha)


def _rsub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return _sub(other, input, alpha=alpha)


for _f in (torch.rsub, Tensor.__rsub__):
    RULES[_f] = Rule("rsub", "pointwise", _rsub, "t' = t_b - alpha t_a")


@rule("mul", kind="pointwise", formula="t' = t_a b + a t_b")
def _mul(input: Any, other: Any) -> Dual:
    shape, dtype, n = _result(input, other)
    if _plain(input) or _plain(other):
        moving, factor = (other, input) if _plain(input) else (input, other)
        return _times_constant(moving, factor, shape, dtype, n)
    for h, g in ((input, other), (other, input)):
        if isinstance(g.pending, Activated) and h.shape == g.shape and h.dtype == g.dtype and h is not g:
            source = g.pending.checked()
            dh = h.tangents
            if dh.dtype == source.tangents.dtype:
                return Dual.of(_fused.gated(h.primal, dh, source.primal, source.tangents, source.kind))
    a, b = _align(input.stack, n), _align(other.stack, n)
    out = _empty(a, a.shape[0], shape, dtype)
    torch.mul(a, b[0], out=out)
    out[1:].addcmul_(b[1:].to(dtype), a[0].to(dtype))
    return Dual(out)


def _times_constant(moving: Dual, factor: Any, shape: torch.Size, dtype: torch.dtype, n: int) -> Dual:
    if shape == moving.shape and dtype == moving.dtype:
        if isinstance(moving.pending, NormedRows) and (scaled := moving.pending.checked().times(factor)) is not None:
            return Dual.later(scaled)
        if isinstance(factor, Tensor) and factor.dim() > 0 and dtype.is_floating_point and factor.dtype == dtype:
            return Dual.later(Scaled(*moving.parts, factor))
    return Dual(_of(moving, n, dtype) * factor)


@rule("div", kind="pointwise", formula="t' = (t_a - y t_b) / b")
def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    shape, dtype, n = _result(input, other)
    if _plain(other):
        if isinstance(other, int | float) and other == 1 and dtype == input.dtype:
            return Dual.later(Apart(*input.parts))
        return Dual(_of(input, n, dtype) / other)
    b = _align(other.stack, n)
    dtype = dtype if dtype.is_floating_point or dtype.is_complex else torch.get_default_dtype()
    y0 = torch.div(primal(input), b[0])
    out = _empty(b, b.shape[0], shape, dtype)
    out[0].copy_(y0)
    torch.mul(b[1:], -y0, out=out[1:])
    if isinstance(input, Dual):
        out[1:].add_(_align(input.stack, n)[1:])
    out[1:].div_(b[0])
    return Dual(out)


RULES[Tensor.__rdiv__] = Rule("__rdiv__", "pointwise", lambda input, other: _div(other, input), "t' = -y t / x")
RULES[Tensor.__rtruediv__] = RULES[Tensor.__rdiv__]


@rule("pow", kind="pointwise", formula="t' = t p x^(p - 1)")
def _pow(input: Any, exponent: Any) -> Any:
    if _plain(input) or isinstance(exponent, Tensor | complex):
        return NotImplemented
    s = input.stack
    y = torch.empty_like(s)
    y[0].copy_(s[0].pow(exponent))
    x = wide(s[0])
    if exponent == 0:
        y[1:].zero_()
    else:
        d = 2 * x if exponent == 2 else exponent * x.pow(exponent - 1)
        torch.mul(s[1:], d, out=y[1:])
    return Dual(y)


@rule("addcmul", kind="composite", formula="t' = t + value (t_a b + a t_b)")
def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return torch.add(input, tensor1 * tensor2, alpha=value)


@rule("addcdiv", kind="composite", formula="t' = t + value (t_a - y t_b) / b")
def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return torch.add(input, tensor1 / tensor2, alpha=value)


@rule("lerp", kind="composite", formula="t' = t_a + w (t_b - t_a) + t_w (b - a)")
def _lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:
    return input + weight * (end - input)


@rule("glu", kind="composite", formula="t' = t_a g + a g (1 - g) t_b")
def _glu(input: Tensor, dim: int = -1) -> Tensor:
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)
