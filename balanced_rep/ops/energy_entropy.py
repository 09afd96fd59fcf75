r"""Energy entropy: :math:`E = \sum_j v_j^2 \ln v_j^2`, the one further sum that entropy needs.

With :math:`s = \sum_j v_j^2`, the entropy of the energy shares :math:`v_j^2 / s` is :math:`\ln s - E / s` nats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanced_rep.kernels import _supports
from balanced_rep.ops._layout import pool_vjp, pooled_float64
from balanced_rep.ops._library import define
from balanced_rep.ops._registry import Impl, OpSpec

__all__ = ["ENERGY_ENTROPY", "energy_entropy_reference"]


def energy_entropy_reference(x: Tensor, n_kept: int, n_pooled: int, pool: int) -> Tensor:
    """The definition: float64 ``(*kept,)``; ``x`` has dims (kept..., reduced..., pooled...); 0 ln 0 = 0."""
    energy = pooled_float64(x, n_kept, n_pooled, pool).square()
    return (energy * torch.where(energy == 0, 1.0, energy).log()).sum(-1)


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(37, 515, generator=generator, dtype=torch.float64).to(dtype), 1, 0, 0


ENERGY_ENTROPY = OpSpec(
    name="energy_entropy",
    reference=energy_entropy_reference,
    impls={"cpp": Impl("balanced_rep.ops._cpp:energy_entropy", _supports.cpp_tensor)},
    inputs=_inputs,
    tolerance={
        torch.float64: (1e-12, 1e-12),
        torch.float32: (2e-6, 1e-4),  # terms of both signs: atol covers n * eps * |v^2 ln v^2|
        torch.float16: (2e-6, 1e-4),
        torch.bfloat16: (2e-6, 1e-4),
    },
)


def _fake(x: Tensor, n_kept: int, n_pooled: int, pool: int) -> Tensor:
    return x.new_empty(x.shape[:n_kept], dtype=torch.float64)


def _vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, n_kept: int, *rest: Any) -> tuple[Tensor, int]:
    assert in_dims[0] is not None
    return torch.ops.balanced_rep.energy_entropy(x.movedim(in_dims[0], 0), n_kept + 1, *rest), 0


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.n_kept, ctx.n_pooled, ctx.pool = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors

    def value_vjp(v: Tensor) -> Tensor:
        """dE/dv = 2 v (1 + ln v^2), and 0 at v = 0."""
        energy = v.square()
        return grad[(..., *[None] * (x.ndim - ctx.n_kept))] * 2 * v * (1 + torch.where(energy == 0, 1.0, energy).log())

    return pool_vjp(x, ctx.n_pooled, ctx.pool, value_vjp), None, None, None


define(
    ENERGY_ENTROPY,
    "(Tensor x, int n_kept, int n_pooled, int pool) -> Tensor",
    fake=_fake,
    vmap=_vmap,
    backward=_backward,
    setup_context=_setup_context,
)
