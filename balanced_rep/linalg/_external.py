"""Other people's linear operators: anything with ``shape`` and ``@``, and a transpose of some name.

Numpy operators (scipy's ``LinearOperator`` and sparse matrices) are fed numpy arrays, all others torch tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from balanced_rep.linalg._matrix import exponent_outside, scaled_by
from balanced_rep.linalg._small import double

__all__ = ["Centred", "External", "Turned", "is_operator"]

CANCELLED = 1 / 64  # relative error of the norm less the means, from which probes are taken instead
TRANSPOSES = ("mH", "H", "adjoint", "mT", "T")


def is_operator(A: Any) -> bool:
    """Whether ``A`` is to be used by its products: no array of any library, but with a shape and ``@``."""
    sparse = isinstance(A, Tensor) and A.layout != torch.strided
    dense = isinstance(A, (Tensor, np.ndarray)) or hasattr(A, "__dlpack__")
    return (sparse or not dense) and hasattr(A, "shape") and hasattr(A, "__matmul__")


class External:
    """An operator ``(m, n)``, or ``(B, m, n)`` of matrices side by side, with every product checked.

    Args:
        A: The operator.
        check_finite: Whether products are looked at for NaN and infinities.

    Raises:
        ValueError: If its shape is not that of matrices.
        TypeError: If its dtype is no floating one.
    """

    separable = False
    norm_squared: Tensor | None
    variation: Tensor | None  # squared norm of a sparse matrix less the means of its columns
    amplified: Tensor | None = None  # factor by which norm_squared is less accurate than the dtype

    def __init__(self, A: Any, check_finite: bool = True) -> None:
        shape = tuple(int(s) for s in A.shape or ())
        if len(shape) not in (2, 3):
            raise ValueError(f"randomized_svd: the operator has shape {shape}; expected is (m, n) or (batch, m, n)")
        if isinstance(A, Tensor):
            _check_sparse(A, shape)
        self._A, self._check, self.stacked = A, check_finite, len(shape) == 3
        self.batch, self.long, self.short = (1, *shape)[-3:]
        dtype: Any = getattr(A, "dtype", None)
        self.is_numpy = isinstance(dtype, np.dtype) or (isinstance(dtype, type) and issubclass(dtype, np.generic))
        known = dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()
        self.dtype = _torch_dtype(dtype) if self.is_numpy else known
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            raise TypeError(
                f"randomized_svd: the operator has dtype {dtype}; a floating-point or complex one is needed"
            )
        self.device = torch.device(getattr(A, "device", None) or "cpu")
        self.norm_squared, self.columns = None, 0
        self.exponent = torch.zeros(self.batch, dtype=torch.int32, device=self.device)
        self.variation = None
        if (entries := _stored_entries(A)) is not None:
            where, values = entries
            largest = values.abs().amax() if values.numel() else values.new_zeros(()).abs()
            values = scaled_by(values.reshape(1, 1, -1), -self.scale(largest.reshape(1)))[:, 0]
            self.norm_squared = values.abs().square().sum(-1)
            self.variation = _variation(values[0], where, self.long, self.short).reshape(1)

    def scale(self, largest: Tensor) -> Tensor:
        """Divides the operator by a power of two where its numbers are so large or small that squares leave the range.

        Args:
            largest: A magnitude that tells the size of each matrix, ``(B,)``.

        Returns:
            The exponents ``(B,)``.
        """
        exponent = exponent_outside(largest.double(), self.dtype)
        self.exponent = self.exponent + exponent
        return exponent

    def forward(self, R: Tensor) -> Tensor:
        """``R A^H``, by ``A @ R^H``, checked."""
        return self._apply(self._A, R.mH, self.long, "A @ V").mH

    def adjoint(self, Z: Tensor) -> Tensor:
        """``Z A``, by ``A^H @ Z^H``, checked, for Z of any magnitude."""
        if Z.numel() == 0:
            return Z.new_zeros((self.batch, Z.shape[1], self.short), dtype=double(Z.dtype))
        exponent = torch.frexp(Z.abs().amax((-2, -1), keepdim=True).to(torch.float64)).exponent
        scale = torch.exp2(exponent.double())
        product = self._apply(self._transposed(), Z.mH.to(double(Z.dtype)) / scale, self.short, "A.T @ U")
        return product.mH.to(double(Z.dtype)) * scale

    def select(self, index: Tensor) -> External:
        """All of it: the matrices of an operator cannot be taken apart."""
        return self

    def _transposed(self) -> Any:
        for name in TRANSPOSES:
            found = getattr(self._A, name, None)
            if found is None:
                continue
            found = found() if callable(found) and not hasattr(found, "__matmul__") else found
            if name in ("mT", "T") and self.dtype.is_complex:
                return _Conjugate(found)
            return found
        raise TypeError(
            f"randomized_svd: {type(self._A).__name__} has no transpose, by which a block Krylov iteration multiplies: "
            "give it .T (or .mT, .H, .mH, .adjoint()) with @. For the Jacobian of a nearly symmetric map, "
            "jacobian_svd(mode='jvp') needs none."
        )

    def _apply(self, operator: Any, X: Tensor, rows: int, name: str) -> Tensor:
        X = X.to(self.dtype)
        given = X if self.stacked else X[0]
        self.columns += X.shape[-1]
        kind = type(self._A).__name__
        try:
            got = operator @ (given.contiguous().cpu().numpy() if self.is_numpy else given.contiguous())
        except (NotImplementedError, TypeError) as error:  # scipy calls a product that was not given
            hint = " (a LinearOperator needs rmatvec or rmatmat)" if self.is_numpy else ""
            raise TypeError(f"randomized_svd: {name} of {kind} cannot be computed: {error}{hint}") from error
        if isinstance(got, np.ndarray):
            got = torch.from_numpy(np.ascontiguousarray(got)).to(self.device)
        if not isinstance(got, Tensor):
            raise TypeError(f"randomized_svd: {name} of {kind} gave {type(got).__name__}; a tensor or array is needed")
        expected = (*((self.batch,) if self.stacked else ()), rows, X.shape[-1])
        if tuple(got.shape) != expected:
            raise ValueError(
                f"randomized_svd: {name} of {kind} {tuple(self._A.shape)} gave shape {tuple(got.shape)} for "
                f"{tuple(given.shape)}; expected is {expected}"
            )
        if got.dtype != self.dtype:
            raise TypeError(
                f"randomized_svd: {name} of {kind} gave {got.dtype} for {self.dtype}; its dtype attribute has to say "
                "what its products take and give"
            )
        got = got.detach() if self.stacked else got.detach().unsqueeze(0)
        if self._check and not bool(got.isfinite().all()):
            raise ValueError(f"randomized_svd: {name} of {kind} gave NaN or infinity (check_finite=False to go on)")
        return scaled_by(got, -self.exponent) if bool(self.exponent.any()) else got


class Turned:
    """The conjugate transpose of an operator, so that the longer side comes first."""

    separable = False

    def __init__(self, inner: External | Centred) -> None:
        self.inner = inner
        self.batch, self.long, self.short = inner.batch, inner.short, inner.long
        self.dtype, self.device, self.norm_squared = inner.dtype, inner.device, inner.norm_squared
        self.amplified = inner.amplified

    @property
    def columns(self) -> int:
        """Columns applied so far."""
        return self.inner.columns

    def scale(self, largest: Tensor) -> Tensor:
        """As of the operator itself."""
        return self.inner.scale(largest)

    def forward(self, R: Tensor) -> Tensor:
        """``R A``."""
        return self.inner.adjoint(R)

    def adjoint(self, Z: Tensor) -> Tensor:
        """``Z A^H``."""
        return self.inner.forward(Z)

    def select(self, index: Tensor) -> Turned:
        """All of it."""
        return self


class Centred:
    """``P A`` with ``P = I - 1 1^T / m``: an operator less the means of its columns, without forming it.

    The means themselves are not taken: as sums over all rows in the precision of A they would be the least accurate
    numbers here, and what they miss of large ones would come out as the first singular triple.
    """

    separable = False

    def __init__(self, inner: External) -> None:
        self._inner = inner
        self.batch, self.long, self.short = inner.batch, inner.long, inner.short
        self.dtype, self.device = inner.dtype, inner.device
        self.norm_squared = self.amplified = None
        self._largest = [0.0, 0.0]  # norms of images, with and without their means
        if inner.norm_squared is not None and inner.variation is not None:
            # Products are rounded relatively to what is subtracted.
            larger = torch.where(inner.norm_squared > 0, inner.norm_squared / inner.variation, 1.0)
            if bool((larger * torch.finfo(inner.dtype).eps < CANCELLED).all()):
                self.norm_squared, self.amplified = inner.variation, larger.clamp_min(1)

    @property
    def columns(self) -> int:
        """Columns applied so far."""
        return self._inner.columns

    def scale(self, largest: Tensor) -> Tensor:
        """As of the operator itself."""
        return self._inner.scale(largest)

    def forward(self, R: Tensor) -> Tensor:
        """``R (P A)^H``."""
        Z = self._inner.forward(R)
        rest = self._less_mean(Z)
        norms = (float(torch.linalg.vector_norm(X)) for X in (Z, rest))
        self._largest = [max(pair) for pair in zip(self._largest, norms, strict=True)]
        return rest.to(self.dtype)

    def adjoint(self, Z: Tensor) -> Tensor:
        """``Z P A``."""
        return self._inner.adjoint(self._less_mean(Z))

    def _less_mean(self, Z: Tensor) -> Tensor:
        Z = Z.to(double(Z.dtype))
        return Z - Z[..., : self.long].mean(-1, keepdim=True)

    @property
    def lost(self) -> float:
        """Share of the deviations from the means that rounding of the products takes."""
        whole, rest = self._largest
        return torch.finfo(self.dtype).eps * whole / rest if rest > 0 else 0.0

    def select(self, index: Tensor) -> Centred:
        """All of it."""
        return self


class _Conjugate:
    """``conj(A^T) Z`` from a plain transpose."""

    def __init__(self, transposed: Any) -> None:
        self._transposed = transposed

    def __matmul__(self, Z: Any) -> Any:
        return (self._transposed @ Z.conj()).conj()


def _check_sparse(A: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses sparse tensors that torch cannot multiply, and those whose gradient would be lost."""
    if len(shape) == 3 or A.dense_dim() > 0:
        kind = "stacks of sparse matrices" if A.dense_dim() == 0 else "sparse tensors with dense dims"
        raise ValueError(
            f"randomized_svd: torch cannot multiply {kind}, shape {shape}; take one sparse matrix at a time, or "
            "A.to_dense()"
        )
    if A.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            "randomized_svd: no gradient of a sparse tensor; pass A.detach(), or A.to_dense() for a gradient"
        )


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype


def _variation(values: Tensor, where: Tensor, m: int, n: int) -> Tensor:
    """Squared norm of a sparse matrix less the means of its columns, by deviations, which do not cancel."""
    mean = values.new_zeros(n).index_add(0, where, values) / max(m, 1)
    zeros = m - torch.bincount(where, minlength=n)
    return (values - mean[where]).abs().square().sum() + (zeros * mean.abs().square()).sum()


def _stored_entries(A: Any) -> tuple[Tensor, Tensor] | None:
    """Columns and values ``(nnz,)``, in double precision, of a sparse matrix; None for an operator."""
    if isinstance(A, Tensor):
        coo = A.detach().to_sparse_coo().coalesce()
        return coo.indices()[1], coo.values().to(double(A.dtype))
    if type(A).__module__.startswith("scipy.sparse") and hasattr(A, "nnz"):
        coo = A.tocoo(copy=True)
        coo.sum_duplicates()
        values = torch.from_numpy(coo.data)
        return torch.from_numpy(coo.col).long(), values.to(double(values.dtype))
    return None
