"""The randomized SVD under the names and arguments of torch and scikit-learn: change one import.

``niter`` becomes the number of blocks with which the Krylov iteration is at least as accurate, on the spectra of
bench/bench_svd.py, as that many power iterations.
"""

from __future__ import annotations

import numbers
import secrets
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from balanced_rep.linalg._plan import Options, as_integer
from balanced_rep.linalg._randomized import decompose
from balanced_rep.linalg._result import SVDResult

__all__ = ["pca_lowrank", "randomized_svd_sklearn", "svd_lowrank"]


def svd_lowrank(
    A: Tensor, q: int | None = 6, niter: int | None = 2, M: Tensor | None = None, *, seed: int | tuple[int, int] = 0
) -> SVDResult:
    """In place of ``torch.svd_lowrank``: the q leading triples of ``A - M``.

    Differences: the same result on every call (``seed``), a certificate in ``result.info``, half types and a right
    gradient.

    Args:
        A: ``(..., m, n)``.
        q: Triples; unlike there, all of them are accurate, none is oversampling.
        niter: Power iterations of the twin that accuracy has to match.
        M: Subtracted from A, broadcast.
        seed: Key of the random start.

    Returns:
        ``(U, S, V)``, V ``(..., n, q)`` and not transposed, with ``.info``.

    Raises:
        ValueError: If q or ``niter`` is negative, or M does not fit.
        TypeError: If one is no integer, or A or M no tensor.
    """
    _check_tensor("svd_lowrank: A", A)
    niter = as_integer("svd_lowrank: niter", 2 if niter is None else niter, 0)
    q = as_integer("svd_lowrank: q", 6 if q is None else q, 0)
    found = _like(A if M is None else _less(A, M), q, niter, seed=seed)
    return SVDResult(found.U, found.S, found.Vh.mH, info=found.info)


def pca_lowrank(
    A: Tensor, q: int | None = None, center: bool = True, niter: int = 2, *, seed: int | tuple[int, int] = 0
) -> SVDResult:
    """In place of ``torch.pca_lowrank``: principal components of samples in rows.

    Args:
        A: ``(..., m, n)``, m samples.
        q: Components, by default ``min(6, m, n)``.
        center: Whether the mean of each column is subtracted.
        niter: Power iterations of the twin that accuracy has to match.
        seed: Key of the random start.

    Returns:
        ``(U, S, V)``: ``A V`` are the components of the samples.

    Raises:
        ValueError: If q is out of range or ``niter`` is negative.
        TypeError: If one is no integer, or A no tensor.
    """
    _check_tensor("pca_lowrank: A", A)
    m, n = A.shape[-2:]
    q = as_integer("pca_lowrank: q", min(6, m, n) if q is None else q, 0)
    if q > min(m, n):
        raise ValueError(f"pca_lowrank: q={q}; expected is 0 to min(m, n) = {min(m, n)}")
    niter = as_integer("pca_lowrank: niter", niter, 0)
    found = _like(A, q, niter, center=center, seed=seed)
    return SVDResult(found.U, found.S, found.Vh.mH, info=found.info)


def randomized_svd_sklearn(
    M: Any,
    n_components: int,
    *,
    n_oversamples: int = 10,
    n_iter: int | str = "auto",
    power_iteration_normalizer: str = "auto",
    transpose: bool | str = "auto",
    flip_sign: bool = True,
    random_state: Any = None,
    svd_lapack_driver: str = "gesdd",
) -> tuple[Any, Any, Any]:
    """In place of ``sklearn.utils.extmath.randomized_svd``.

    Args:
        M: Array or sparse matrix ``(m, n)``; complex ones are right here.
        n_components: Triples.
        n_oversamples: Columns beyond them.
        n_iter: Power iterations of the twin that accuracy has to match; "auto" is 7 for few components and 4 otherwise.
        power_iteration_normalizer: Ignored: every block is orthonormalised.
        transpose: Ignored: the shorter side is worked on.
        flip_sign: The largest entry of each left vector is positive; otherwise of each right vector.
        random_state: An integer, a generator, or None for another start each time.
        svd_lapack_driver: Ignored: no LAPACK SVD is taken.

    Returns:
        U, s, Vt.

    Raises:
        ValueError: If a number is negative, or M has not two dims.
        TypeError: If one is no integer, M neither an array nor a matrix, or ``random_state`` no source of randomness.
    """
    if not hasattr(M, "shape"):
        raise TypeError(
            f"randomized_svd_sklearn: M is {type(M).__name__}; an array or a sparse matrix is needed: numpy.asarray(M)"
        )
    if len(M.shape) != 2:
        raise ValueError(
            f"randomized_svd_sklearn: M has shape {tuple(M.shape)}; one matrix (m, n) is needed: randomized_svd takes "
            "batches"
        )
    k = as_integer("randomized_svd_sklearn: n_components", n_components, 0)
    if isinstance(n_iter, str) and n_iter == "auto":
        n_iter = 7 if k < 0.1 * min(M.shape) else 4
    n_iter = as_integer("randomized_svd_sklearn: n_iter", n_iter, 0, ", or 'auto'")
    oversampling = as_integer("randomized_svd_sklearn: n_oversamples", n_oversamples, 0)
    U, S, Vh = _like(M, k, n_iter, oversampling=oversampling, seed=_seed(random_state))
    if flip_sign and U.shape[0] and U.shape[1]:
        if isinstance(U, Tensor):
            turn = U.gather(0, U.abs().argmax(0, keepdim=True)).sgn()
            turn = torch.where(turn == 0, torch.ones_like(turn), turn)
            return U * turn.conj(), S, Vh * turn.mT
        turn = np.sign(np.take_along_axis(U, np.abs(U).argmax(0, keepdims=True), 0))
        turn = np.where(turn == 0, 1, turn)
        return U * turn.conj(), S, Vh * turn.T
    return U, S, Vh


def _check_tensor(what: str, A: Any) -> None:
    if not isinstance(A, Tensor):
        raise TypeError(
            f"{what} is {type(A).__module__}.{type(A).__name__}; a torch tensor is needed: torch.as_tensor(A), or call "
            "randomized_svd, which takes numpy and cupy arrays, operators and scipy's sparse matrices"
        )
    if A.ndim < 2:
        raise ValueError(f"{what} has shape {tuple(A.shape)}; at least two dims (..., m, n) are needed")


def _less(A: Tensor, M: Any) -> Tensor:
    """``A - M``, in the shape of A."""
    if not isinstance(M, Tensor):
        raise TypeError(f"svd_lowrank: M is {type(M).__module__}.{type(M).__name__}; a torch tensor is needed")
    if A.layout != torch.strided and M.layout == torch.strided:
        raise TypeError(
            "svd_lowrank: A is sparse and M dense, so that A - M has no zeros left: take A.to_dense(), or for the "
            "means of columns as M pca_lowrank(A, q), which keeps A sparse"
        )
    try:
        fits = torch.broadcast_shapes(A.shape, M.shape) == A.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"svd_lowrank: M has shape {tuple(M.shape)}; expected is {tuple(A.shape)}, or what expands to it"
        )
    return A - (M.to_dense() if A.layout == torch.strided else M)


def _like(
    A: Any, k: int, niter: int, *, oversampling: int = 8, center: bool = False, seed: int | tuple[int, int] = 0
) -> SVDResult:
    """k triples, as accurate as those of ``niter`` power iterations."""
    options = Options.checked(k, None, oversampling, None, None, "auto", center, seed, True)
    return decompose(A, replace(options, niter=niter))


def _seed(random_state: Any) -> int:
    if random_state is None:
        return secrets.randbits(63)
    if isinstance(random_state, numbers.Integral):
        return int(random_state) % 2**64
    draw = getattr(random_state, "integers", None) or getattr(random_state, "randint", None)
    if draw is None:
        raise TypeError(
            f"randomized_svd_sklearn: random_state={random_state!r}; an integer, a numpy.random.Generator or "
            "RandomState, or None is needed"
        )
    return int(draw(2**31))
