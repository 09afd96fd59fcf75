"""Matrices whose singular values are known or hurt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from balanced_rep.linalg import SVDResult

KINDS = ("zero", "identity", "clustered", "geometric", "deficient", "duplicates", "tiny", "huge")
SPECTRA = ("poly", "slow", "exp", "steep", "noise", "equal")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers; complex ones have normal parts."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(m: int, n: int, S: Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix with these singular values and random singular vectors, rounded to ``dtype``."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    r = min(m, n)
    U = torch.linalg.qr(normal(m, r, seed=2 * seed, dtype=wide)).Q
    V = torch.linalg.qr(normal(n, r, seed=2 * seed + 1, dtype=wide)).Q
    return ((U * S.to(wide)) @ V.mH).to(dtype)


def spectrum(kind: str, r: int, k: int) -> Tensor:
    """r singular values, the first of which is 1."""
    i = torch.arange(1, r + 1, dtype=torch.float64)
    if kind == "poly":
        return 1 / i
    if kind == "slow":
        return i**-0.5
    if kind == "exp":
        return 10 ** (-2 * (i - 1) / k)  # 0.01 at k
    if kind == "steep":
        return 10 ** (-6 * (i - 1) / k)
    if kind == "noise":
        return torch.where(i <= k, 10 ** (-(i - 1) / (2 * k)), 0.02)
    if kind == "equal":
        return torch.ones(r, dtype=torch.float64)
    raise ValueError(kind)


def lapack_like(kind: str, m: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """One of :data:`KINDS`, after the test matrices of LAPACK's SVD drivers."""
    r = min(m, n)
    i = torch.arange(r, dtype=torch.float64)
    if kind == "zero":
        return torch.zeros(m, n, dtype=dtype)
    if kind == "identity":
        return torch.eye(m, n, dtype=dtype)
    eps = torch.finfo(dtype).eps
    S = {
        "clustered": torch.where(i == 0, 1.0, eps),
        "geometric": eps ** (i / max(r - 1, 1)),
        "deficient": torch.where(i < math.ceil(r / 2), 1 / (i + 1), 0.0),
    }.get(kind, 1 - i / (2 * max(r, 1)))
    A = with_spectrum(m, n, S, seed, dtype)
    if kind == "duplicates" and n > 1:
        A[:, n // 2 :] = A[:, : n - n // 2]
    wide = dtype in (torch.float64, torch.complex128)
    return A * {"tiny": 1e-200 if wide else 1e-30, "huge": 1e200 if wide else 1e30}.get(kind, 1.0)


def errors(A: Tensor, result: SVDResult) -> tuple[Tensor, Tensor, Tensor]:
    """Relative error, that of the best approximation, and the true singular values; float64."""
    wide = torch.complex128 if A.is_complex() else torch.float64
    U, S, Vh = (X.to(wide) for X in result)
    true = torch.linalg.svdvals(A.to(wide))
    norm = true.square().sum(-1).sqrt()
    error = torch.linalg.matrix_norm(A.to(wide) - (U * S.unsqueeze(-2)) @ Vh)
    return error / norm, true[..., S.shape[-1] :].square().sum(-1).sqrt() / norm, true
