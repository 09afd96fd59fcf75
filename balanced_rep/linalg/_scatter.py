"""Leading eigenpairs of a scatter matrix: all of them where it is small, a block Krylov iteration where it is large."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from balanced_rep.linalg._small import eigh_descending, gaussian, orthonormal_rows, orthonormalise, padded, product

__all__ = ["leading"]

WHOLE_SPECTRUM = 1024  # features up to which all eigenvalues are computed
RESIDUAL = 1e-4  # of the leading eigenpairs beyond that, relatively; values err by its square over their gap


def leading(rows: Tensor, k: int, gram: bool) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues and vectors of a scatter matrix.

    Args:
        rows: The matrix ``(n, n)``, or rows ``(l, n)`` B of which it is ``B^T B``; float64.
        k: How many.
        gram: Whether it is the matrix.

    Returns:
        Eigenvalues ``(k,)`` and vectors ``(k, n)``.
    """
    if gram and len(rows) > WHOLE_SPECTRUM and (found := _searched(rows, k)) is not None:
        return found
    if gram:
        theta, V = eigh_descending(rows)
        return theta[:k].clamp_min(0), V[:, :k].mT.contiguous()
    theta, Y = eigh_descending(rows @ rows.mT)
    return theta[:k].clamp_min(0), orthonormal_rows((Y[:, :k].mT @ rows).unsqueeze(0))[0]


def _searched(M: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The same by Rayleigh-Ritz in a block Krylov space, until each residual is small; None if that does not pay.

    Args:
        M: Scatter matrix ``(n, n)``.
        k: How many.

    Returns:
        Eigenvalues ``(k,)`` and vectors ``(k, n)``.
    """
    n, block, item = len(M), -(-(k + 8) // 16) * 8, torch.zeros(1, dtype=torch.int64, device=M.device)
    rounding = n * torch.finfo(M.dtype).eps

    def draw(stream: int) -> Tensor:
        return gaussian(item, block, n, seed=0, stream=stream, dtype=M.dtype)

    basis, images = M.new_empty((1, 0, n + -n % 8)), M.new_empty((1, 0, n + -n % 8))
    fresh, stream = draw(0), 1
    while basis.shape[1] + block <= n // 4:
        R = orthonormalise(fresh, basis if basis.shape[1] else None, functools.partial(draw, stream))
        Z = padded(product(R[..., :n], M.unsqueeze(0)))
        basis, images, fresh, stream = torch.cat([basis, R], 1), torch.cat([images, Z], 1), Z[..., :n], stream + 1
        theta, Y = eigh_descending(product(basis, images.mH))
        theta, Y = theta[:, :k].clamp_min(0), Y[..., :k].mH
        vectors = product(Y, basis)
        rest = torch.linalg.vector_norm(product(Y, images) - theta.unsqueeze(-1) * vectors, dim=-1)
        if basis.shape[1] >= k + 8 and bool((rest <= RESIDUAL * theta + rounding * theta[:, :1]).all()):
            return theta[0], vectors[0, :, :n]
    return None
