r"""Normalisations with K tangents: statistics of the primal once, two averages per tangent.

With :math:`\hat x = (x - \mu) r`, :math:`r = (\sigma^2 + \epsilon)^{-1/2}` over a group of elements and
:math:`\langle\cdot\rangle` its mean, :math:`y = w \hat x + b` and
:math:`\dot y = w\, r\, (\dot x - \langle \dot x\rangle - \hat x \langle \dot x \hat x \rangle)`; RMS norm takes no
mean off. Weights and biases have no tangents. Softmax is of the same form:
:math:`\dot y = y (\dot x - \langle y, \dot x \rangle)`.

Letters: B batch, C channels, S spatial positions, R rows of one sample, D features, K tangents.

The ops, each returning ``(y, dy)``:

- ``group_norm_jvp(x, dx, num_groups, weight, bias, eps, silu)``: ``x (B, C, S)``, ``dx (K, B, C, S)``; ``weight (C,)``
  or ``None``, ``bias (C,)`` or ``None``; with ``silu`` the SiLU of the result and its tangents; the outputs have C
  innermost in memory (channels last) if ``x`` has, else S;
- ``layer_norm_jvp(x, dx, weight, bias, eps)`` and ``rms_norm_jvp(x, dx, weight, bias, eps)``: ``x (B, R, D)``,
  ``dx (K, B, R, D)``; ``weight`` and ``bias`` ``(1, D)``, or ``(B, D)`` for one per sample, as adaptive modulation has
  them, or ``None``;
- ``softmax_jvp(x, dx)``: over the last dim of ``x (R, D)``, ``dx (K, R, D)``.

Inputs may have any strides; what is fast is unit stride along S, or along C in both, and along D. Outputs have unit
stride there. Weights and biases may have any floating-point dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanced_rep.kernels import _supports
from balanced_rep.ops._jvp import check_tangents, define_jvp, wide
from balanced_rep.ops._library import run
from balanced_rep.ops._registry import Impl, OpSpec

__all__ = [
    "GROUP_NORM_JVP",
    "LAYER_NORM_JVP",
    "RMS_NORM_JVP",
    "SOFTMAX_JVP",
    "group_norm_jvp",
    "layer_norm_jvp",
    "rms_norm_jvp",
    "softmax_jvp",
]


def group_norm_jvp(
    x: Tensor, dx: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, silu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Group normalisation, optionally with SiLU behind it, and K Jacobian-vector products of it.

    Args:
        x: ``(B, C, ...)``, contiguous or channels last.
        dx: Tangents ``(K, *x.shape)``.
        num_groups: Groups of channels; divides C.
        weight: ``(C,)``, constant.
        bias: ``(C,)``, constant.
        eps: Added to the variance.
        silu: Applies SiLU to the result.

    Returns:
        ``y`` like ``x`` and ``dy`` like ``dx``.

    Raises:
        TypeError: If ``x`` or ``dx`` is no floating-point tensor.
        ValueError: If shapes do not fit.
        BackendError: If a backend is forced that cannot run this call.
    """
    check_tangents("group_norm_jvp", "x", x, dx)
    if x.dim() < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"group_norm_jvp: x is {tuple(x.shape)}; (B, C, ...) with C a multiple of {num_groups} groups")
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None and w.shape != x.shape[1:2]:
            raise ValueError(f"group_norm_jvp: {name} is {tuple(w.shape)}; ({x.shape[1]},) is accepted")
    flat, dflat = x.reshape(*x.shape[:2], -1), dx.reshape(*dx.shape[:3], -1)
    y, dy = run(GROUP_NORM_JVP, flat, dflat, num_groups, weight, bias, float(eps), silu)
    return y.view(x.shape), dy.view(dx.shape)


def layer_norm_jvp(
    x: Tensor, dx: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Layer normalisation over the last dim, and K Jacobian-vector products of it.

    Args:
        x: ``(..., D)``.
        dx: Tangents ``(K, *x.shape)``.
        weight: ``(D,)``, or ``(B, D)`` for ``x (B, ..., D)``: one for each sample; constant.
        bias: The same.
        eps: Added to the variance.

    Returns:
        ``y`` like ``x`` and ``dy`` like ``dx``.

    Raises:
        TypeError: If ``x`` or ``dx`` is no floating-point tensor.
        ValueError: If shapes do not fit.
        BackendError: If a backend is forced that cannot run this call.
    """
    return _row_norm(LAYER_NORM_JVP, x, dx, weight, bias, eps)


def rms_norm_jvp(
    x: Tensor, dx: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """RMS normalisation over the last dim, and K Jacobian-vector products of it.

    Args:
        x: ``(..., D)``.
        dx: Tangents ``(K, *x.shape)``.
        weight: ``(D,)``, or ``(B, D)`` for ``x (B, ..., D)``: one for each sample; constant.
        bias: The same; added to the result.
        eps: Added to the mean square; by default that of the dtype, as in torch.

    Returns:
        ``y`` like ``x`` and ``dy`` like ``dx``.

    Raises:
        TypeError: If ``x`` or ``dx`` is no floating-point tensor.
        ValueError: If shapes do not fit.
        BackendError: If a backend is forced that cannot run this call.
    """
    check_tangents("rms_norm_jvp", "x", x, dx)
    return _row_norm(RMS_NORM_JVP, x, dx, weight, bias, torch.finfo(wide(x).dtype).eps if eps is None else eps)


def softmax_jvp(x: Tensor, dx: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Softmax over one dim, and K Jacobian-vector products of it.

    Args:
        x: At least one dim.
        dx: Tangents ``(K, *x.shape)``.
        dim: The dim of ``x``.

    Returns:
        ``y`` like ``x`` and ``dy`` like ``dx``.

    Raises:
        TypeError: If ``x`` or ``dx`` is no floating-point tensor.
        ValueError: If the shapes do not fit or ``x`` has no dim.
        BackendError: If a backend is forced that cannot run this call.
    """
    check_tangents("softmax_jvp", "x", x, dx)
    if x.dim() == 0:
        raise ValueError("softmax_jvp: x has no dim; at least one is needed")
    at = range(x.dim())[dim]
    last, dlast = x.movedim(at, -1), dx.movedim(at + 1, -1)
    y, dy = run(SOFTMAX_JVP, *(_unit(t.reshape(*t.shape[:n], -1, x.shape[at])) for n, t in ((0, last), (1, dlast))))
    return y.view(last.shape).movedim(-1, at), dy.view(dlast.shape).movedim(-1, at + 1)


def _row_norm(
    spec: OpSpec, x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    check_tangents(spec.name, "x", x, dx)
    if x.dim() == 0:
        raise ValueError(f"{spec.name}: x has no dim; (..., D) is accepted")
    d = x.shape[-1]
    per_sample = False
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None and w.shape != (d,) and (x.dim() < 3 or w.shape != (x.shape[0], d)):
            raise ValueError(
                f"{spec.name}: {name} is {tuple(w.shape)} and x {tuple(x.shape)}; accepted are ({d},) and, with three "
                "dims of x or more, (B, D)"
            )
        per_sample = per_sample or (w is not None and w.dim() == 2)
    samples = x.shape[0] if per_sample else 1
    canonical = [_unit(t.reshape(*t.shape[:n], samples, -1, d)) for n, t in ((0, x), (1, dx))]
    rows = [w if w is None or w.dim() == 2 else w.unsqueeze(0) for w in (weight, bias)]
    y, dy = run(spec, *canonical, *rows, float(eps))
    return y.view(x.shape), dy.view(dx.shape)


def _unit(x: Tensor) -> Tensor:
    """``x`` with unit stride along its last dim."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def group_norm_jvp_reference(
    x: Tensor, dx: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """The definition, differentiable, in float32 at least."""
    b, c, s = x.shape
    groups = (num_groups, c // num_groups * s)
    y, dy = _normalised(wide(x).reshape(b, *groups), wide(dx).reshape(dx.shape[0], b, *groups), eps, centre=True)
    y, dy = y.reshape(b, c, s), dy.reshape(dx.shape[0], b, c, s)
    y, dy = _affine(y, dy, *(None if w is None else wide(w).unsqueeze(-1) for w in (weight, bias)))
    if silu:
        g = torch.sigmoid(y)
        y, dy = y * g, dy * (g * (1 + y * (1 - g)))
    return y.to(x.dtype), dy.to(dx.dtype)


def layer_norm_jvp_reference(
    x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition, differentiable, in float32 at least."""
    return _rows_reference(x, dx, weight, bias, eps, centre=True)


def rms_norm_jvp_reference(
    x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition, differentiable, in float32 at least."""
    return _rows_reference(x, dx, weight, bias, eps, centre=False)


def softmax_jvp_reference(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, differentiable, in float32 at least."""
    y, t = torch.softmax(wide(x), -1), wide(dx)
    h = y * t
    return y.to(x.dtype), (h - y * h.sum(-1, keepdim=True)).to(dx.dtype)


def _rows_reference(
    x: Tensor, dx: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centre: bool
) -> tuple[Tensor, Tensor]:
    y, dy = _normalised(wide(x), wide(dx), eps, centre=centre)
    y, dy = _affine(y, dy, *(None if w is None else wide(w).unsqueeze(1) for w in (weight, bias)))
    return y.to(x.dtype), dy.to(dx.dtype)


def _normalised(x: Tensor, t: Tensor, eps: float, *, centre: bool) -> tuple[Tensor, Tensor]:
    """Over the last dim."""
    c = x - x.mean(-1, keepdim=True) if centre else x
    r = torch.rsqrt(c.square().mean(-1, keepdim=True) + eps)
    unit = c * r
    z = t - unit * (t * unit).mean(-1, keepdim=True)
    return unit, r * (z - t.mean(-1, keepdim=True) if centre else z)


def _affine(y: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if weight is not None:
        y, dy = y * weight, dy * weight
    return (y if bias is None else y + bias), dy


def _group_outputs(x: Tensor, dx: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Channels last if ``x`` is, else contiguous."""
    if x.stride(1) == 1 and x.stride(2) != 1 and x.shape[1] > 1:
        return x.mT.new_empty(x.mT.shape).mT, dx.new_empty(dx.mT.shape).mT
    return x.new_empty(x.shape), dx.new_empty(dx.shape)


def _outputs(x: Tensor, dx: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), dx.new_empty(dx.shape)


def _draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _group_inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    x, dx, w, b = (_draw(generator, dtype, *shape) for shape in ((2, 24, 35), (3, 2, 24, 35), (24,), (24,)))
    return x + 0.5, dx, 6, w, b, 1e-5, True


def _row_inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    x, dx, w, b = (_draw(generator, dtype, *shape) for shape in ((2, 17, 75), (3, 2, 17, 75), (2, 75), (1, 75)))
    return x + 0.5, dx, w, b, 1e-5


def _softmax_inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    return _draw(generator, dtype, 19, 77) * 3, _draw(generator, dtype, 3, 19, 77)


def _impls(name: str, file: str = "norm_jvp", supports: Any = _supports.triton_row_jvp) -> dict[str, Impl]:
    return {
        "cpp": Impl(f"balanced_rep.ops._cpp_jvp:{name}", _supports.cpp_jvp),
        "triton": Impl(f"balanced_rep.kernels.triton.{file}:{name}", supports),
    }


# Sums in float32 at least, one rounding of the result in half types.
_TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1e-2),
}

GROUP_NORM_JVP = OpSpec(
    "group_norm_jvp",
    group_norm_jvp_reference,
    _impls("group_norm_jvp", "group_norm_jvp", _supports.triton_group_norm_jvp),
    _group_inputs,
    _TOLERANCE,
    outputs=_group_outputs,
)
LAYER_NORM_JVP = OpSpec(
    "layer_norm_jvp", layer_norm_jvp_reference, _impls("layer_norm_jvp"), _row_inputs, _TOLERANCE, outputs=_outputs
)
RMS_NORM_JVP = OpSpec(
    "rms_norm_jvp", rms_norm_jvp_reference, _impls("rms_norm_jvp"), _row_inputs, _TOLERANCE, outputs=_outputs
)
SOFTMAX_JVP = OpSpec(
    "softmax_jvp", softmax_jvp_reference, _impls("softmax_jvp"), _softmax_inputs, _TOLERANCE, outputs=_outputs
)

define_jvp(
    GROUP_NORM_JVP,
    "(Tensor x, Tensor dx, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu)",
)
define_jvp(LAYER_NORM_JVP, "(Tensor x, Tensor dx, Tensor? weight, Tensor? bias, float eps)")
define_jvp(RMS_NORM_JVP, "(Tensor x, Tensor dx, Tensor? weight, Tensor? bias, float eps)")
define_jvp(SOFTMAX_JVP, "(Tensor x, Tensor dx)")
