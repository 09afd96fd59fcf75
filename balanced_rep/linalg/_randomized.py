"""Randomized SVD of dense matrices, one or a batch, and of operators, with an error certificate."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack

from balanced_rep.linalg._dense import dense_svd
from balanced_rep.linalg._external import is_operator
from balanced_rep.linalg._gradient import differentiable_svd
from balanced_rep.linalg._operator_svd import operator_svd
from balanced_rep.linalg._plan import Options, full_precision
from balanced_rep.linalg._result import ConvergenceWarning, SVDResult
from balanced_rep.ops._arrays import as_array, as_tensor
from balanced_rep.ops._guard import needs_reference

__all__ = ["decompose", "randomized_svd"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def randomized_svd(
    A: Any,
    k: int,
    *,
    tol: float | None = None,
    oversampling: int = 8,
    block: int | None = None,
    rounds: int | None = None,
    precision: str = "auto",
    center: bool = False,
    seed: int | tuple[int, int] = 0,
    check_finite: bool = True,
) -> SVDResult:
    r"""The k leading singular triples of a matrix, a batch of matrices or an operator, with an error certificate.

    Small matrices, and large parts of a spectrum, are decomposed exactly; otherwise a block Krylov iteration reads A
    ``2 rounds - 1`` times (docs/linalg/randomized_svd.md). ``result.info.rel_error`` is the relative error of the
    approximation in the Frobenius norm, measured and not predicted.

    Args:
        A: ``(..., m, n)``: torch tensor, numpy or cupy array of any float or complex dtype and any strides; half types
            are computed in float32. Or an operator: anything with ``shape`` and ``@``, whose transpose has one of the
            names ``mH, H, adjoint, mT, T`` (scipy's ``LinearOperator``, sparse matrices, :class:`JacobianOperator`).
        k: Triples; more than ``min(m, n)`` gives ``min(m, n)``, and ``info.notes`` says so.
        tol: Go on until a round lowers the error by less than this, relatively: the error is then within about ``tol``
            of that of the best approximation of rank k. In a batch each matrix stops by itself. Without it the number
            of rounds is fixed.
        oversampling: Columns beyond k that the choice of ``block`` and of method allows for.
        block: Columns per round; by default the multiple of 16 nearest to (k + oversampling) / 2, or half of it where
            that is faster: on the CPU for float32 rows, without ``tol``.
        rounds: Blocks of the Krylov space, by default 5, or 9 half as wide ones, or as many as k needs; with ``tol``
            the largest number of them.
        precision: "full"; "bfloat16" for the rounds in front of a last pass in full precision, for float32 matrices
            and a ``tol`` of at least 1e-3; "auto" takes "bfloat16" where that is faster. Matrices whose
            singular values fall too steeply for it are done again in full.
        center: Subtract the mean of each column first (principal components of samples in rows).
        seed: Key of the random start, or (seed, item). Matrix i of a batch has item i, and starts as a call on it alone
            with ``seed=(seed, i)`` does; on a CPU, with the same number of threads and order in memory, it comes out
            bit for bit as there.
        check_finite: Refuse NaN and infinities before any work is done; takes no extra read of A. Without it the
            triples and ``rel_error`` of a matrix that holds some are NaN, and the others as they would be alone.

    Returns:
        ``(U, S, Vh)``: ``(..., m, k)``, ``(..., k)``, ``(..., k, n)`` in the library and on the device of ``A``, in its
        dtype (float32 for half types), with ``.info``.

    Raises:
        ValueError: If A holds NaN or infinities, has no two dims, or an argument is out of range.
        TypeError: If A is neither an array of floating-point numbers nor an operator, if an operator has no transpose
            or its products have another dtype than it says, or inside a ``torch.func`` transform.

    Example:
        >>> import torch
        >>> A = torch.randn(300, 20) @ torch.randn(20, 200)
        >>> U, S, Vh = result = randomized_svd(A, 25)
        >>> int(result.info.rank), torch.allclose((U * S) @ Vh, A, atol=1e-3)
        (20, True)
    """
    return decompose(A, Options.checked(k, tol, oversampling, block, rounds, precision, center, seed, check_finite))


def decompose(A: Any, options: Options) -> SVDResult:
    """:func:`randomized_svd` with checked arguments."""
    if is_operator(A):
        return _warned(operator_svd(A, options))
    tensor, library = _as_tensor(A)
    if tensor.ndim < 2:
        raise ValueError(f"randomized_svd: A has shape {tuple(tensor.shape)}; at least two dims (..., m, n) are needed")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"randomized_svd: A is {tensor.dtype}; convert it with A.float() or A.double()")
    if tensor.is_meta:
        raise TypeError("randomized_svd: A is on the meta device, where there are no numbers")
    if get_interpreter_stack() or needs_reference():
        raise TypeError(
            "randomized_svd: no rule for torch.func transforms. A batch needs no vmap, (..., m, n) is taken as it is; "
            "reverse mode works through requires_grad"
        )
    with full_precision(tensor.device):
        if tensor.requires_grad and torch.is_grad_enabled():
            result = differentiable_svd(tensor, options)
        else:
            with torch.no_grad():
                result = dense_svd(tensor.detach().resolve_conj().resolve_neg(), options)
        result = SVDResult(*(value.resolve_conj() for value in result), info=result.info)
    if library != "torch":
        info = result.info.map(lambda value: as_array(value, library))
        result = SVDResult(*(as_array(value.contiguous(), library) for value in result), info=info)
    return _warned(result)


def _as_tensor(A: Any) -> tuple[Tensor, str]:
    if isinstance(A, np.ndarray) and A.dtype.kind == "c" and A.dtype.isnative and not hasattr(A, "mask"):
        return torch.from_numpy(np.array(A, copy=True)), "numpy"
    return as_tensor(A)


def _warned(result: SVDResult) -> SVDResult:
    # Of those that hold NaN, let through by check_finite=False, the triples themselves say so.
    converged = torch.as_tensor(result.info.converged) | torch.as_tensor(result.info.rel_error).isnan()
    if not bool(converged.all()):
        missing = int((~converged).sum())
        warnings.warn(
            f"{missing} of {converged.numel()} decompositions "
            f"did not reach tol in the rounds allowed; info.converged says which. Allow more rounds, or a larger tol.",
            ConvergenceWarning,
            stacklevel=4,
        )
    return result
