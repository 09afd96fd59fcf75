r"""Both products of a block Krylov round, :math:`Z = V M^T` and :math:`W = Z M`, in one read of M.

M is tall, V a block of few rows. A panel of rows of M is multiplied twice while it lies in the cache of the processor;
a BLAS library reads M twice and copies it into a layout of its own each time (docs/ops/krylov_product.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanced_rep.kernels import _supports
from balanced_rep.ops._library import define, run
from balanced_rep.ops._registry import Impl, OpSpec

__all__ = ["KRYLOV_PRODUCT", "krylov_product"]


def krylov_product(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``Z = V M^T`` and ``W = Z M``.

    Args:
        m: float32 ``(B, rows, columns)``, any strides.
        v: float64 ``(B, b, columns)``; rounded to float32 in front of the first product, as Z is of the second.

    Returns:
        Z ``(B, b, rows)`` and W ``(B, b, columns)``, float64. Sums over columns are taken in float32, as are those over
        a chunk of less than 980 rows, or a sixteenth of them; further sums over rows in float64. Neither number of
        threads nor batch has an influence.

    Raises:
        TypeError: If the dtypes are others.
        ValueError: If the shapes do not fit.

    Example:
        >>> m, v = torch.randn(3, 500, 60), torch.randn(3, 8, 60, dtype=torch.float64)
        >>> z, w = krylov_product(m, v)
        >>> torch.allclose(z.float(), v.float() @ m.mT, atol=1e-4)
        True
    """
    if m.dtype != torch.float32 or v.dtype != torch.float64:
        raise TypeError(f"krylov_product: m is {m.dtype} and v {v.dtype}; float32 and float64 are needed")
    if m.ndim != 3 or v.ndim != 3 or m.shape[0] != v.shape[0] or m.shape[2] != v.shape[2]:
        raise ValueError(
            f"krylov_product: m has shape {tuple(m.shape)} and v {tuple(v.shape)}; expected are (B, rows, columns) and "
            "(B, b, columns)"
        )
    return run(KRYLOV_PRODUCT, m, v)


def krylov_product_reference(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64: (B, rows, columns), (B, b, columns) -> (B, b, rows), (B, b, columns)."""
    wide = m.double()
    z = v.double() @ wide.mT
    return z, z @ wide


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    m = torch.randn(2, 130, 40, generator=generator, dtype=torch.float64)
    return m.to(dtype), torch.randn(2, 20, 40, generator=generator, dtype=torch.float64)


def _fake(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty((*v.shape[:2], m.shape[1])), torch.empty_like(v, memory_format=torch.contiguous_format)


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], m: Tensor, v: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    m, v = (
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip((m, v), in_dims, strict=True)
    )
    found = torch.ops.balanced_rep.krylov_product(m.flatten(0, 1), v.flatten(0, 1))
    return tuple(value.unflatten(0, m.shape[:2]) for value in found), (0, 0)


KRYLOV_PRODUCT = define(
    OpSpec(
        name="krylov_product",
        reference=krylov_product_reference,
        impls={"cpp": Impl("balanced_rep.ops._cpp:krylov_product", _supports.cpp_krylov_product)},
        inputs=_inputs,
        # Sums of `columns` and of `rows` float32 products; what cancels leaves its rounding.
        tolerance={torch.float32: (1e-5, 2e-4)},
    ),
    "(Tensor m, Tensor v) -> (Tensor, Tensor)",
    fake=_fake,
    vmap=_vmap,
)
