"""Tensor-level wrappers of the compiled CPU kernels: pointers and strides stop here."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from balanced_rep.ops.log_histogram import N_BINS

__all__ = [
    "double_products",
    "energy_entropy",
    "extension",
    "krylov_product",
    "krylov_space",
    "log_histogram",
    "moments",
    "orthonormalise",
    "philox_bits",
    "philox_normal",
    "survey",
]

_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

_module: ModuleType | ImportError
try:
    _module = import_module("balanced_rep._C")
except ImportError as error:  # remembered: a second import attempt would hide the first cause
    _module = error


def extension() -> ModuleType:
    """The compiled module.

    Returns:
        The module.

    Raises:
        ImportError: If it did not load; the cause is the first failure.
    """
    if isinstance(_module, ImportError):
        raise ImportError(f"the compiled CPU kernels (balanced_rep._C) did not load: {_module}") from _module
    return _module


def moments(x: Tensor, n_kept: int, n_pooled: int, pool: int, threshold: float) -> Tensor:
    """float64 ``(10, *kept)``; see :func:`balanced_rep.ops.moments.moments_reference`."""
    out = _empty((10, *x.shape[:n_kept]), torch.float64)
    x = x.resolve_neg()
    extension().moments(*_view(x, n_kept, n_pooled, pool), threshold, out.data_ptr(), torch.get_num_threads())
    return out


def log_histogram(x: Tensor, top: Tensor, n_kept: int, n_pooled: int, pool: int) -> Tensor:
    """int64 ``(3, *kept, bins)``; see :func:`balanced_rep.ops.log_histogram.log_histogram_reference`."""
    out = _empty((3, *x.shape[:n_kept], N_BINS), torch.int64)
    x, top = x.resolve_neg(), top.contiguous()
    view = _view(x, n_kept, n_pooled, pool)
    extension().log_histogram(*view, top.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def energy_entropy(x: Tensor, n_kept: int, n_pooled: int, pool: int) -> Tensor:
    """float64 ``(*kept,)``; see :func:`balanced_rep.ops.energy_entropy.energy_entropy_reference`."""
    out = _empty(tuple(x.shape[:n_kept]), torch.float64)
    x = x.resolve_neg()
    extension().energy_entropy(*_view(x, n_kept, n_pooled, pool), out.data_ptr(), torch.get_num_threads())
    return out


def krylov_product(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """float64 ``(B, b, rows)`` and ``(B, b, columns)``; see :func:`balanced_rep.ops.krylov_product.krylov_product`."""
    m = m.resolve_neg()
    z = _empty((m.shape[0], v.shape[1], m.shape[1]), torch.float64)
    w = _empty(tuple(v.shape), torch.float64)
    thin_products(m, v.resolve_neg().contiguous(), z, w)
    return z, w


def thin_products(m: Tensor, v: Tensor | None, z: Tensor, w: Tensor | None) -> None:
    """Z = V M^T, or with ``v`` None as it is given, and W = Z M unless it is None; into the memory of the two.

    Args:
        m: float32 ``(B, rows, columns)``, rows or columns in one piece.
        v: float64 ``(B, b, columns)``, contiguous.
        z: float64 ``(B, b, rows)``, its rows in one piece.
        w: float64 ``(B, b, columns)``, contiguous.
    """
    if m.numel() == 0 or z.numel() == 0:
        if w is not None:
            w.zero_()
        z.zero_()
        return
    extension().krylov_product(
        m.data_ptr(), m.shape, m.stride(), z.shape[1], 0 if v is None else v.data_ptr(),
        z.data_ptr(), z.stride()[:2], v is None, 0 if w is None else w.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def krylov_space(m: Tensor, basis: Tensor, images: Tensor, width: int) -> Tensor:
    """Blocks of an orthonormal basis of the Krylov space of ``M^T M``, and their images, behind the first.

    Args:
        m: float32 ``(B, rows, columns)``; rows or columns lie in one piece.
        basis: float64 ``(B, rounds * width, n)``, rows behind each other, n at least ``columns`` and a multiple of 8.
            Of the first ``width`` rows it is taken, into the others it is written; what is behind ``columns`` is zero.
        images: float64 ``(B, rounds * width, rows or more)``: ``basis M^T`` is written there.
        width: Rows of a block.

    Returns:
        Which of the matrices are done, bool ``(B,)``: not where the rows of a block were too near to
            dependent ones for a Cholesky factor.
    """
    done = _empty((m.shape[0],), torch.bool)
    extension().krylov_space(
        m.data_ptr(), m.shape, m.stride(), width, basis.shape[1] // width, basis.data_ptr(), basis.stride()[:2],
        images.data_ptr(), images.stride()[:2], done.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return done


def double_products(x: Tensor, y: Tensor, out: Tensor, *, transposed: bool, add: bool = False) -> None:
    """``x y^T`` or ``x y``, into ``out`` or added to it; neither batch nor threads change a bit.

    Args:
        x: float64 ``(B, rows, inner)``; of all three, rows are in one piece.
        y: float64 ``(B, columns, inner)`` if ``transposed``, else ``(B, inner, columns)``.
        out: float64 ``(B, rows, columns)``.
        transposed: Which.
        add: Whether the product is added; not where ``transposed``.
    """
    batch, rows, inner = x.shape
    if inner == 0 and not add:
        out.zero_()
    if inner == 0 or out.numel() == 0:
        return
    extension().double_product(
        x.data_ptr(), x.stride()[:2], y.data_ptr(), y.stride()[:2], out.data_ptr(), out.stride()[:2],
        (batch, rows, inner, out.shape[2]), transposed, add, torch.get_num_threads(),
    )  # fmt: skip


def orthonormalise(w: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows that are orthonormal, orthogonal to a basis, and span what ``w`` adds to it.

    Args:
        w: float64 ``(B, b, n)``, contiguous, n a multiple of 8.
        basis: float64 ``(B, l, n)``, orthonormal rows, each in one piece.

    Returns:
        The rows ``(B, b, n)``, and which of the matrices they were found for, bool ``(B,)``: not where rows are too
        near to dependent ones for a Cholesky factor.
    """
    out, done = torch.empty_like(w), _empty((w.shape[0],), torch.bool)
    held, at, strides = (0, 0, (0, 0)) if basis is None else (basis.shape[1], basis.data_ptr(), basis.stride()[:2])
    extension().orthonormalise(
        w.data_ptr(), w.shape, at, held, strides, out.data_ptr(), done.data_ptr(), torch.get_num_threads()
    )
    return out, done


def survey(m: Tensor) -> Tensor:
    """Sums of squares and largest magnitudes of float32 matrices.

    Args:
        m: ``(B, rows, columns)``, rows in one piece.

    Returns:
        float64 ``(B, 2)``. The sum is finite where all entries are; otherwise the magnitude is that of some.
    """
    out = _empty((m.shape[0], 2), torch.float64)
    extension().survey(m.data_ptr(), m.shape, m.stride(), out.data_ptr(), torch.get_num_threads())
    return out


def philox_bits(items: Tensor, seed: int, n: int) -> Tensor:
    """int64 ``(b, n)``; see :func:`balanced_rep.ops.philox.philox_bits_reference`."""
    return _philox(extension().philox_bits, items, seed, n, torch.int64)


def philox_normal(items: Tensor, seed: int, n: int) -> Tensor:
    """float32 ``(b, n)``; see :func:`balanced_rep.ops.philox.philox_normal_reference`."""
    return _philox(extension().philox_normal, items, seed, n, torch.float32)


def _philox(kernel: Any, items: Tensor, seed: int, n: int, dtype: torch.dtype) -> Tensor:
    items = items.contiguous()
    out = _empty((items.shape[0], n), dtype)
    kernel(items.data_ptr(), items.shape[0], seed, n, out.data_ptr(), torch.get_num_threads())
    return out


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Host memory, whatever ``torch.device(...)`` block or default device is around: a kernel writes to its address."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _view(x: Tensor, n_kept: int, n_pooled: int, pool: int) -> tuple[Any, ...]:
    """Address, dtype, sizes and strides of (kept..., reduced..., pooled...), the first arguments of every kernel."""
    shape, strides, last = tuple(x.shape), x.stride(), x.ndim - n_pooled
    return (
        x.data_ptr(), _CODES[x.dtype],
        shape[:n_kept], strides[:n_kept],
        shape[n_kept:last], strides[n_kept:last],
        shape[last:], strides[last:],
        pool,
    )  # fmt: skip
