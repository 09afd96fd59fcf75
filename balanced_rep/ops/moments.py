r"""Moments: ten mergeable sums of an activation in one read, from which every representation statistic follows.

Letters: v pooled values, n their number, mu their mean, :math:`m_k = \sum_j (v_j - \mu)^k`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from balanced_rep.kernels import _supports
from balanced_rep.ops._layout import arrange, pool_vjp, pooled_float64
from balanced_rep.ops._library import define, run
from balanced_rep.ops._registry import Impl, OpSpec

__all__ = ["FIELDS", "MOMENTS", "moments", "moments_reference"]

FIELDS = ("n", "mean", "m2", "m3", "m4", "l1", "min", "max", "n_active", "n_nonfinite")


def moments(
    x: Tensor,
    dim: int | Sequence[int] | None = -1,
    *,
    pool: str | None = None,
    pool_dim: int | Sequence[int] | None = None,
    threshold: float = 0.0,
) -> Tensor:
    r"""Count, mean, central moment sums, L1, extremes and counts over ``dim``, in one read of ``x``.

    Args:
        x: Activation, any shape and strides; float32, float16, bfloat16 or float64.
        dim: Dims to reduce, counted in the pooled tensor; ``None`` for all.
        pool: ``None``, ``"max"`` or ``"mean"`` over ``pool_dim`` in front of the statistics.
        pool_dim: Dims of ``x`` to pool; by default the spatial dims of ``(N, C, *spatial)`` and the token dim
            of ``(N, T, D)``.
        threshold: A value is active if it is greater than this, in the units of ``x``.

    Returns:
        float64 tensor ``(10, *kept)`` on the device of ``x``. The fields, in the order of :data:`FIELDS`, are
        n, the mean, :math:`m_2, m_3, m_4` with :math:`m_k = \sum_j (v_j - \mu)^k`, :math:`\sum_j |v_j|`, min, max,
        the number of active values and the number of values that are NaN or infinite. An empty reduction gives
        n = 0 with min = inf and max = -inf, the neutral element of a merge.

    Raises:
        TypeError: If ``x`` is not a strided floating-point tensor of an accepted dtype, or a dim is no integer.
        ValueError: If dims are out of range or repeated, or the pooling is unclear or empty.
        BackendError: If a backend is forced that cannot run this call.

    Example:
        >>> moments(torch.tensor([[1.0, 2.0, 3.0]]))[:3].squeeze(-1).tolist()
        [3.0, 2.0, 2.0]
    """
    layout = arrange(x, dim, pool, pool_dim)
    return run(MOMENTS, layout.x, layout.n_kept, layout.n_pooled, layout.pool, float(threshold))


def moments_reference(x: Tensor, n_kept: int, n_pooled: int, pool: int, threshold: float) -> Tensor:
    """The definition, in float64 and differentiable; ``x`` has dims (kept..., reduced..., pooled...)."""
    v = pooled_float64(x, n_kept, n_pooled, pool)  # (*kept, n)
    kept, n = v.shape[:-1], v.shape[-1]
    if n == 0:
        zeros, inf = v.new_zeros(kept), v.new_full(kept, math.inf)
        return torch.stack([zeros] * 6 + [inf, -inf] + [zeros] * 2)
    low, high = v.amin(-1), v.amax(-1)
    mean = v.mean(-1)
    dust = torch.where((low == high) & low.isfinite(), low - mean, 0.0)  # a constant row has exactly zero moments
    mean = mean + dust.detach()
    d = v - mean.unsqueeze(-1)
    return torch.stack(
        [
            torch.full_like(mean, n),
            mean,
            d.square().sum(-1),
            d.pow(3).sum(-1),
            d.pow(4).sum(-1),
            v.abs().sum(-1),
            low,
            high,
            (v > threshold).sum(-1).to(v.dtype),
            (~v.isfinite()).sum(-1).to(v.dtype),
        ]
    )


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.randn(37, 515, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype), 1, 0, 0, 0.0


MOMENTS = OpSpec(
    name="moments",
    reference=moments_reference,
    impls={
        "cuda": Impl("balanced_rep.kernels.cuda:moments", _supports.cuda_moments),
        "triton": Impl("balanced_rep.kernels.triton.moments:moments", _supports.triton_moments),
        "cpp": Impl("balanced_rep.ops._cpp:moments", _supports.cpp_tensor),
    },
    inputs=_inputs,
    # m3 of a symmetric sample is near zero: atol covers n * eps * std^3. float16 and bfloat16 are exact in float32.
    tolerance={
        torch.float64: (1e-12, 1e-9),
        torch.float32: (2e-6, 2e-3),
        torch.float16: (2e-6, 2e-3),
        torch.bfloat16: (2e-6, 2e-3),
    },
)


def _fake(x: Tensor, n_kept: int, n_pooled: int, pool: int, threshold: float) -> Tensor:
    return x.new_empty((len(FIELDS), *x.shape[:n_kept]), dtype=torch.float64)


def _vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, n_kept: int, *rest: Any) -> tuple[Tensor, int]:
    assert in_dims[0] is not None  # vmap calls the rule only when a tensor is batched, and x is the only one
    return torch.ops.balanced_rep.moments(x.movedim(in_dims[0], 0), n_kept + 1, *rest), 1


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.n_kept, ctx.n_pooled, ctx.pool, _ = inputs
    ctx.save_for_backward(x, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, state = ctx.saved_tensors
    g = pool_vjp(x, ctx.n_pooled, ctx.pool, lambda v: _value_vjp(v, state, grad, ctx.n_kept))
    return g, None, None, None, None


def _value_vjp(v: Tensor, state: Tensor, grad: Tensor, n_kept: int) -> Tensor:
    r"""Cotangent of the values, in float64.

    With :math:`d = v - \mu`: :math:`g_\mu / n + 2 g_2 d + 3 g_3 (d^2 - m_2 / n) + 4 g_4 (d^3 - m_3 / n)
    + g_1 \operatorname{sign} v`, and an even split of the cotangents of min and max among ties, as ``amin`` does.

    Args:
        v: Values, pooled dims kept with size 1.
        state: Output of the op, ``(10, *kept)``.
        grad: Cotangent of ``state``.
        n_kept: Number of kept dims.

    Returns:
        Cotangent of ``v``.
    """
    wide = (slice(None), *[slice(None)] * n_kept, *[None] * (v.ndim - n_kept))
    n, mean, m2, m3, _, _, low, high, _, _ = state[wide].unbind(0)
    _, g_mean, g2, g3, g4, g_l1, g_low, g_high, _, _ = grad[wide].unbind(0)
    d = v - mean
    g = g_mean / n + 2 * g2 * d + 3 * g3 * (d.square() - m2 / n) + 4 * g4 * (d.pow(3) - m3 / n) + g_l1 * v.sign()
    reduced = tuple(range(n_kept, v.ndim))
    for g_end, end in ((g_low, low), (g_high, high)):
        tie = (v == end).double()
        count = tie.sum(reduced, keepdim=True) if reduced else tie
        g = g + torch.where(tie > 0, g_end / count, 0.0)
    return g


define(
    MOMENTS,
    "(Tensor x, int n_kept, int n_pooled, int pool, float threshold) -> Tensor",
    fake=_fake,
    vmap=_vmap,
    backward=_backward,
    setup_context=_setup_context,
)
