"""Eigenvalues and eigenvectors of small Gram matrices, thousands at once.

The small problems inside the randomized decompositions. On CUDA devices the batched Jacobi method of the vendor's
library ends at order 32; the kernel here has a block for each matrix up to order 128 (docs/ops/gram_eigh.md). On the
CPU LAPACK is faster than the same method would be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanced_rep.kernels import _supports
from balanced_rep.ops._library import define, run
from balanced_rep.ops._registry import Impl, OpSpec

__all__ = ["GRAM_EIGH", "gram_eigh"]


def gram_eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors of positive semidefinite matrices.

    Args:
        g: float64 ``(B, n, n)``, symmetric and positive semidefinite to rounding; the lower triangle is read. On CUDA
            devices an indefinite matrix gives NaN.

    Returns:
        Eigenvalues ``(B, n)`` and eigenvectors ``(B, n, n)`` as orthonormal rows, the sum of whose entries is not
        negative.

    Raises:
        TypeError: If ``g`` is not float64.
        ValueError: If it is not a stack of square matrices.

    Example:
        >>> values, vectors = gram_eigh(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64))
        >>> torch.allclose(values, torch.tensor([[3.0, 1.0]], dtype=torch.float64))
        True
    """
    if g.dtype != torch.float64:
        raise TypeError(f"gram_eigh: g is {g.dtype}; float64 is needed, convert it with g.double()")
    if g.ndim != 3 or g.shape[1] != g.shape[2]:
        raise ValueError(f"gram_eigh: g has shape {tuple(g.shape)}; expected is (B, n, n)")
    return run(GRAM_EIGH, g)


def gram_eigh_reference(g: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, by LAPACK: (B, n, n) -> (B, n), (B, n, n)."""
    values, vectors = torch.linalg.eigh(g.double())
    rows = vectors.mT.flip(-2)
    return values.flip(-1), rows * torch.where(rows.detach().sum(-1, keepdim=True) < 0, -1.0, 1.0)


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.randn(3, 24, 24, generator=generator, dtype=torch.float64)
    return ((x @ x.mT).to(dtype),)


def _fake(g: Tensor) -> tuple[Tensor, Tensor]:
    return g.new_empty(g.shape[:2]), torch.empty_like(g, memory_format=torch.contiguous_format)


def _vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    assert in_dims[0] is not None
    g = g.movedim(in_dims[0], 0)
    found = torch.ops.balanced_rep.gram_eigh(g.flatten(0, 1))
    return tuple(value.unflatten(0, g.shape[:2]) for value in found), (0, 0)


GRAM_EIGH = define(
    OpSpec(
        name="gram_eigh",
        reference=gram_eigh_reference,
        impls={"cuda": Impl("balanced_rep.kernels.cuda:gram_eigh", _supports.cuda_gram_eigh)},
        inputs=_inputs,
        # Eigenvectors of the inputs, whose eigenvalues lie apart, move by rounding over the gap.
        tolerance={torch.float64: (1e-10, 1e-10)},
    ),
    "(Tensor g) -> (Tensor, Tensor)",
    fake=_fake,
    vmap=_vmap,
)
