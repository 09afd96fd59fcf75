r"""Activations with K tangents: the derivative once per element of the primal, then one product per tangent.

The kinds f are ``"silu"`` :math:`x \sigma(x)`, ``"gelu"`` :math:`x \Phi(x)` and ``"gelu_tanh"``, its tanh form.

Letters: R rows, n elements of a row, K tangents.

The ops, each returning ``(y, dy)``:

- ``activation_jvp(x, dx, kind)``: ``x (R, n)``, ``dx (K, R, n)``; :math:`y = f(x)`, :math:`\dot y = f'(x) \dot x`;
- ``gated_activation_jvp(h, dh, g, dg, kind)``, all ``(R, n)`` and ``(K, R, n)``: :math:`y = h f(g)` (GEGLU, SwiGLU),
  :math:`\dot y = f(g) \dot h + h f'(g) \dot g`.

Inputs may have any strides; rows usually have unit stride, and h and g are the two halves of one tensor. Outputs have
unit stride along n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.kernels import _supports
from balanced_rep.ops._jvp import check_tangents, define_jvp, wide
from balanced_rep.ops._library import run
from balanced_rep.ops._registry import Impl, OpSpec

__all__ = [
    "ACTIVATION_JVP",
    "GATED_ACTIVATION_JVP",
    "KINDS",
    "activation_jvp",
    "gated_activation_jvp",
    "gelu_derivative",
    "silu_derivative",
]


def silu_derivative(x: Tensor) -> Tensor:
    """d/dx x g = g (1 + x (1 - g)), g = sigmoid(x)."""
    g = torch.sigmoid(x)
    return torch.addcmul(g, x * g, 1 - g)


def gelu_derivative(x: Tensor, approximate: str = "none") -> Tensor:
    """d/dx x Phi(x) = Phi(x) + x phi(x), or that of the tanh form."""
    if approximate == "none":
        density = torch.exp(x * x * -0.5)
        return torch.addcmul(0.5 + 0.5 * torch.erf(x * math.sqrt(0.5)), x, density, value=1 / math.sqrt(2 * math.pi))
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + a * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (c * (1 + 3 * a * x * x))


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, silu_derivative),
    "gelu": (F.gelu, gelu_derivative),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda x: gelu_derivative(x, "tanh")),
}


def activation_jvp(x: Tensor, dx: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """An activation and K Jacobian-vector products of it.

    Args:
        x: Any shape.
        dx: Tangents ``(K, *x.shape)``.
        kind: "silu", "gelu" or "gelu_tanh".

    Returns:
        ``y`` of the shape and dtype of ``x`` and ``dy`` of those of ``dx``.

    Raises:
        TypeError: If ``x`` or ``dx`` is no floating-point tensor.
        ValueError: If the shapes do not fit or the kind is unknown.
        BackendError: If a backend is forced that cannot run this call.
    """
    check_tangents("activation_jvp", "x", x, dx)
    _check_kind("activation_jvp", kind)
    y, dy = run(ACTIVATION_JVP, as_rows(x), as_rows(dx, 1), kind)
    return y.view(x.shape), dy.view(dx.shape)


def gated_activation_jvp(h: Tensor, dh: Tensor, g: Tensor, dg: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``h f(g)``, the gated form of an activation f, and K Jacobian-vector products of it.

    Args:
        h: What is gated, any shape.
        dh: Its tangents ``(K, *h.shape)``.
        g: The gate, of the shape of ``h``.
        dg: Its tangents ``(K, *h.shape)``.
        kind: f: "silu", "gelu" or "gelu_tanh".

    Returns:
        ``y`` of the shape and dtype of ``h`` and ``dy`` of those of ``dh``.

    Raises:
        TypeError: If an input is no floating-point tensor, or dtypes differ.
        ValueError: If the shapes do not fit or the kind is unknown.
        BackendError: If a backend is forced that cannot run this call.
    """
    check_tangents("gated_activation_jvp", "h", h, dh)
    check_tangents("gated_activation_jvp", "g", g, dg)
    if h.shape != g.shape or dh.shape != dg.shape:
        raise ValueError(f"gated_activation_jvp: h {tuple(h.shape)} and g {tuple(g.shape)} must have one shape and K")
    if h.dtype != g.dtype or dh.dtype != dg.dtype:
        raise TypeError(
            f"gated_activation_jvp: h and g are {h.dtype} and {g.dtype}, their tangents {dh.dtype} and {dg.dtype}; one "
            "dtype each is needed"
        )
    _check_kind("gated_activation_jvp", kind)
    y, dy = run(GATED_ACTIVATION_JVP, as_rows(h), as_rows(dh, 1), as_rows(g), as_rows(dg, 1), kind)
    return y.view(h.shape), dy.view(dh.shape)


def _check_kind(op: str, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"{op}: kind={kind!r}; accepted are {', '.join(map(repr, KINDS))}")


def as_rows(x: Tensor, extra: int = 0) -> Tensor:
    """(R, n) with unit stride along n, behind ``extra`` dims: a view wherever strides allow."""
    front, inner = x.shape[:extra], x.shape[extra:]
    if not inner:
        return x.reshape(*front, 1, 1)
    x = x if x.stride(-1) == 1 or inner[-1] == 1 else x.contiguous()
    return x.reshape(*front, math.prod(inner[:-1]), inner[-1])


def activation_jvp_reference(x: Tensor, dx: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The definition, differentiable, in float32 at least."""
    f, derivative = KINDS[kind]
    v = wide(x)
    return f(v).to(x.dtype), (wide(dx) * derivative(v)).to(dx.dtype)


def gated_activation_jvp_reference(h: Tensor, dh: Tensor, g: Tensor, dg: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The definition, differentiable, in float32 at least."""
    f, derivative = KINDS[kind]
    a, v = wide(h), wide(g)
    fv = f(v)
    return (a * fv).to(h.dtype), (wide(dh) * fv + wide(dg) * (a * derivative(v))).to(dh.dtype)


def _outputs(x: Tensor, dx: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), dx.new_empty(dx.shape)


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.randn(4, 21, 130, generator=generator, dtype=torch.float64).to(dtype)
    return x[0] * 3, x[1:], "gelu"


def _gated_inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    both = torch.randn(4, 21, 130, generator=generator, dtype=torch.float64).to(dtype)
    h, g = both.chunk(2, -1)
    return h[0], h[1:], g[0], g[1:], "gelu"


def _impls(name: str) -> dict[str, Impl]:
    return {
        "cpp": Impl(f"balanced_rep.ops._cpp_jvp:{name}", _supports.cpp_jvp),
        "triton": Impl(f"balanced_rep.kernels.triton.activation_jvp:{name}", _supports.triton_jvp),
    }


_TOLERANCE = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (1e-6, 1e-6),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1e-3),
}

ACTIVATION_JVP = OpSpec(
    "activation_jvp", activation_jvp_reference, _impls("activation_jvp"), _inputs, _TOLERANCE, outputs=_outputs
)
GATED_ACTIVATION_JVP = OpSpec(
    "gated_activation_jvp",
    gated_activation_jvp_reference,
    _impls("gated_activation_jvp"),
    _gated_inputs,
    _TOLERANCE,
    outputs=_outputs,
)

define_jvp(ACTIVATION_JVP, "(Tensor x, Tensor dx, str kind)")
define_jvp(GATED_ACTIVATION_JVP, "(Tensor h, Tensor dh, Tensor g, Tensor dg, str kind)")
