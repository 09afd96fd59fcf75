"""What the randomized methods see of a matrix: two products, with the longer side first.

M stands for the worked-on matrix, long x short: A itself or its conjugate transpose. Vectors are rows. Letters: B
matrices, b vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from balanced_rep.linalg._small import aligned, double, has_extension, padded, product, real
from balanced_rep.ops._registry import forced_backend
from balanced_rep.ops.krylov_product import KRYLOV_PRODUCT
from balanced_rep.ops.moments import FIELDS, moments

__all__ = ["Dense", "Products", "Survey", "exponent_outside", "is_turned", "scaled_by", "survey"]

PANEL = 2**20  # entries of M that are converted at a time

# Outside these exponents of the largest magnitude, a product or the square of a sum could leave the range.
SAFE_EXPONENTS = {torch.float32: 40, torch.float64: 300}


class Products(Protocol):
    """M ``(B, long, short)`` by its products.

    Attributes:
        batch: B.
        long: Rows.
        short: Columns, at most as many as rows.
        dtype: What products take and give.
        device: Where.
        norm_squared: Squared Frobenius norm ``(B,)``, float64; None where it is not known.
        separable: Whether some of the matrices can be left out of further products.
    """

    batch: int
    long: int
    short: int
    dtype: torch.dtype
    device: torch.device
    norm_squared: Tensor | None
    separable: bool

    def forward(self, R: Tensor) -> Tensor:
        """``R M^H``: rows ``(B, b, short)`` to ``(B, b, long)``."""
        ...

    def adjoint(self, Z: Tensor) -> Tensor:
        """``Z M``: rows ``(B, b, long)`` to ``(B, b, short)``."""
        ...

    def select(self, index: Tensor) -> Products:
        """Only the matrices of these numbers."""
        ...


@dataclass(frozen=True)
class Survey:
    """What one read of a stack of matrices tells.

    Attributes:
        norm_squared: Squared Frobenius norms, float64 ``(B,)``.
        absmax: Largest magnitudes, float64 ``(B,)``; of finite matrices.
        finite: Whether there is no NaN or infinity, ``(B,)``.
    """

    norm_squared: Tensor
    absmax: Tensor
    finite: Tensor


def survey(A: Tensor) -> Survey:
    r"""Norms, magnitudes and finiteness of matrices, in one read.

    float32 in memory has a kernel for it. Otherwise the moments of all entries give the sum of squares as :math:`m_2 +
    n \mu^2`, taken around a pivot and in float64.

    Args:
        A: ``(B, m, n)``.

    Returns:
        What was seen.
    """
    values = torch.view_as_real(A).flatten(-2) if A.is_complex() else A
    rows = values if values.stride(-1) == 1 else values.mT
    if _has_survey(rows):
        return _survey(rows)
    state = dict(zip(FIELDS, moments(values.detach(), dim=(-2, -1)).unbind(0), strict=True))
    norm_squared = state["m2"] + state["n"] * state["mean"].square()
    absmax = torch.maximum(state["min"].abs(), state["max"].abs())
    return Survey(norm_squared, absmax, state["n_nonfinite"] == 0)


def exponent_outside(absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Exponents e of matrices that have to be multiplied by 2^-e before anything is squared; 0 for the others."""
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    exponent = torch.frexp(absmax).exponent
    return torch.where((exponent.abs() > SAFE_EXPONENTS[real]) & (absmax > 0) & absmax.isfinite(), exponent, 0)


def scaled_by(A: Tensor, exponent: Tensor) -> Tensor:
    """``A * 2^exponent`` for ``A (B, m, n)`` and ``exponent (B,)``, in two steps that both stay in range."""
    half = exponent.div(2, rounding_mode="floor")
    for e in (half, exponent - half):
        A = A * torch.exp2(e.to(real(A.dtype)))[:, None, None]
    return A


class Dense:
    """Dense matrices in memory, read in rows as they are stored.

    float32 on the CPU is multiplied by the kernel of :mod:`balanced_rep.ops.krylov_product`, all else by BLAS. There
    the product with the transpose has the thin block on the left, ``Z M``: as ``M^H Z`` it takes up to fourteen times
    as long on a row-major M.
    """

    separable = True

    def __init__(self, A: Tensor, norm_squared: Tensor | None) -> None:
        M = A if A.shape[-2] >= A.shape[-1] else A.mH
        self.batch, self.long, self.short = M.shape
        self.dtype, self.device, self.norm_squared = M.dtype, M.device, norm_squared
        self._turned = is_turned(M)
        base = M.mH if self._turned else M
        self._base = aligned(base if _rows_in_memory(base) else base.contiguous())

    def forward(self, R: Tensor, room: Tensor | None = None) -> Tensor:
        """``R M^H``, with a kernel into the memory of ``room``, if it is given."""
        if self.has_kernel(R):
            Z = R.new_empty((*R.shape[:2], self.long)) if room is None else room
            _thin_products(self._rows(), R.contiguous(), Z, None)
            return Z
        R = aligned(R.to(self.dtype))
        return product(R, self._base) if self._turned else product(self._base, R.mH).mH

    def adjoint(self, Z: Tensor) -> Tensor:
        """``Z M``."""
        if self.has_kernel(Z):
            W = Z.new_empty((*Z.shape[:2], self.short))
            _thin_products(self._rows(), None, Z, W)
            return W
        Z = aligned(Z.to(self.dtype))
        return product(self._base, Z.mH).mH if self._turned else product(Z, self._base)

    def both(self, R: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``Z = R M^H``, as in :meth:`forward`, and ``Z M``: in one read of M where there is a kernel for it."""
        if self.has_kernel(R):
            Z, W = R.new_empty((*R.shape[:2], self.long)) if room is None else room, R.new_empty(R.shape)
            _thin_products(self._rows(), R.contiguous(), Z, W)
            return Z, W
        Z = self.forward(R)
        return Z, self.adjoint(Z)

    def krylov_space(self, basis: Tensor, images: Tensor, width: int) -> Tensor:
        """All blocks of ``width`` rows behind the first, ``(B, l, short or more)``, and ``(B, l, long or more)``.

        Args:
            basis: Rows of V, padded; only the first block is there.
            images: Memory for those of M V.
            width: Of a block.

        Returns:
            Which of the matrices are done, ``(B,)``.
        """
        from balanced_rep.ops._cpp import krylov_space  # the extension: not before it is needed

        return krylov_space(self._rows(), basis, images, width)

    def has_kernel(self, rows: Tensor) -> bool:
        """Whether products with these rows are those of :mod:`balanced_rep.ops.krylov_product`."""
        return (
            rows.dtype == torch.float64
            and forced_backend() in (None, "cpp")
            and KRYLOV_PRODUCT.why_not("cpp", self._base, rows) is None
        )

    def _rows(self) -> Tensor:
        return self._base.mT if self._turned else self._base

    def select(self, index: Tensor) -> Dense:
        """Only the matrices of these numbers (a copy)."""
        norm = None if self.norm_squared is None else self.norm_squared[index]
        base = self._base[index]
        return Dense(base.mH if self._turned else base, norm)

    def cast(self, dtype: torch.dtype) -> Dense:
        """The same in another precision."""
        base = self._base.to(dtype)
        return Dense(base.mH if self._turned else base, self.norm_squared)

    def panels(self, elements: int = PANEL) -> Iterator[Tensor]:
        """M in panels of rows ``(B, r, short)`` in double precision, padded; r does not depend on the batch."""
        rows = max(1, elements // max(self.short, 1))
        M = self._base.mH if self._turned else self._base
        for panel in M.split(rows, dim=1):
            yield padded(panel.to(double(self.dtype)).contiguous())


def _thin_products(*args: Any) -> None:
    from balanced_rep.ops._cpp import thin_products  # the extension: not before it is needed

    thin_products(*args)


def _has_survey(rows: Tensor) -> bool:
    return (
        rows.dtype == torch.float32
        and rows.device.type == "cpu"
        and rows.numel() > 0
        and rows.stride(-1) == 1
        and not rows.is_neg()
        and has_extension()
    )


def _survey(rows: Tensor) -> Survey:
    from balanced_rep.ops._cpp import survey  # the extension: not before it is needed

    norm_squared, absmax = survey(rows.detach()).mT.contiguous()
    return Survey(norm_squared, absmax, norm_squared.isfinite())


def is_turned(M: Tensor) -> bool:
    """Whether columns of ``M`` lie in one piece, and rows do not."""
    return not _rows_in_memory(M) and _rows_in_memory(M.mT)


def _rows_in_memory(M: Tensor) -> bool:
    """Whether rows are contiguous and one behind the other, as BLAS takes them without a copy."""
    *_, rows, columns = M.shape
    return (M.stride(-1) == 1 or columns <= 1) and (M.stride(-2) >= columns or rows <= 1) and not M.is_conj()
