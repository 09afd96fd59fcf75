"""All singular values: the Gram matrix of the shorter side, or LAPACK's SVD where that would lose digits."""

from __future__ import annotations

import torch
from torch import Tensor

from balanced_rep.linalg._krylov import left_vectors
from balanced_rep.linalg._matrix import Dense
from balanced_rep.linalg._small import double, eigh_descending, padded, product, thin_svd

__all__ = ["exact_triples"]


def exact_triples(M: Dense, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """The k leading triples of each matrix, and the squares of its other singular values, summed.

    float32 goes through a float64 Gram matrix: of singular values s it knows the squares to 1e-16 of the largest one,
    so that those above 1e-7 of it are right to more digits than float32 has. float64 has no such room and takes the
    SVD.

    Args:
        M: The matrices.
        k: How many, at most ``M.short``.

    Returns:
        Uh ``(B, k, long)``, S ``(B, k)`` and Vh ``(B, k, short)`` in double precision, the squared error ``(B,)``, and
        "gram" or "svd".
    """
    if M.dtype in (torch.float64, torch.complex128):
        Uh, S, Vh = thin_svd(padded(torch.cat(list(M.panels()), 1)[..., : M.short].mH.contiguous()))
        return Uh[:, :k, : M.long], S[:, :k], Vh[:, :k], S[:, k:].square().sum(-1), "svd"
    gram = sum(product(panel.mH, panel) for panel in M.panels())
    if not isinstance(gram, Tensor):  # no rows
        gram = torch.zeros((M.batch, M.short, M.short), dtype=double(M.dtype), device=M.device)
    theta, Y = eigh_descending(gram[:, : M.short, : M.short])
    S, tail, Vh = (
        theta[:, :k].clamp_min(0).sqrt(),
        theta[:, k:].clamp_min(0).sum(-1),
        padded(Y[..., :k].mH.contiguous()),
    )
    images = torch.cat([product(Vh, panel.mH) for panel in M.panels()], -1)
    return left_vectors(padded(images), S)[..., : M.long], S, Vh[..., : M.short], tail, "gram"
