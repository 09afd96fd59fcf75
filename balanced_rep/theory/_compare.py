"""Comparing learned weights with a closed form, in ways that what the loss leaves free cannot disturb.

A stored sample may be split over several parallel columns (only the sum of their squared norms is determined), and a
generalizing block may be rotated (only ``W W^T`` is). Letters: d entries, p and q columns, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from balanced_rep.theory._data import as_samples

__all__ = ["ColumnMatch", "gram_error", "match_columns", "merge_parallel_columns", "principal_angles"]


@dataclass(frozen=True, eq=False)
class ColumnMatch:
    """Which column stores which sample.

    Attributes:
        column: For each sample the column that is given to it, ``(N,)`` int64; no column serves two samples, and -1
            says that none was left.
        cosine: Cosine between the sample and its column, ``(N,)``; NaN without one.
        norm: Norm of the column, ``(N,)``; NaN without one.
    """

    column: Tensor
    cosine: Tensor
    norm: Tensor


def merge_parallel_columns(W: Tensor, *, cosine: float = 0.98, dead: float = 1e-3) -> Tensor:
    """Joins columns that point the same way into one of the same ``W W^T``: ``|w|^2 = sum_j |w_j|^2``.

    Columns are joined if a chain of cosines above ``cosine`` links them. Function and penalty of a tied autoencoder do
    not change where they are exactly parallel.

    Args:
        W: Columns, ``(d, p)``.
        cosine: Least cosine of parallel columns.
        dead: Columns with a norm of at most this share of the largest are dropped.

    Returns:
        The joined columns, ``(d, q)``, those with the largest norm first.

    Raises:
        ValueError: If ``W`` is no finite matrix, or ``cosine`` or ``dead`` is not between 0 and 1.

    Example:
        >>> import torch
        >>> merge_parallel_columns(torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]]))
        tensor([[5., 0.],
                [0., 1.]])
    """
    W = as_samples(W)
    if not 0 < cosine < 1:
        raise ValueError(f"merge_parallel_columns: cosine must be between 0 and 1, got {cosine}.")
    if not 0 <= dead < 1:
        raise ValueError(f"merge_parallel_columns: dead must be from 0 to below 1, got {dead}.")
    norms = W.double().norm(dim=0)
    alive = W.double()[:, norms > dead * norms.max()]
    unit = torch.nn.functional.normalize(alive, dim=0)
    linked = unit.T @ unit > cosine
    merged = []
    left = torch.ones(alive.shape[1], dtype=torch.bool, device=W.device)
    while left.any():
        group = torch.zeros_like(left)
        group[left.nonzero()[0]] = True
        while (grown := group | (linked[:, group].any(dim=1) & left)).sum() > group.sum():
            group = grown
        left &= ~group
        columns = alive[:, group]
        along = columns @ (unit[:, group].T @ unit[:, group].mean(dim=1))  # weighs long columns more
        merged.append(along / along.norm() * columns.norm())
    if not merged:
        return W.new_zeros(W.shape[0], 0)
    joined = torch.stack(merged, dim=1)
    return joined[:, joined.norm(dim=0).argsort(descending=True, stable=True)].to(W.dtype)


def gram_error(W: Tensor, V: Tensor) -> float:
    """``|W W^T - V V^T|_F / |V V^T|_F``: blind to rotations and to the splitting of columns.

    Args:
        W: Found, ``(d, p)``.
        V: Wanted, ``(d, q)``.

    Returns:
        The relative error.

    Raises:
        ValueError: If the numbers of rows differ.
    """
    W, V = as_samples(W).double(), as_samples(V).double()
    if W.shape[0] != V.shape[0]:
        raise ValueError(f"gram_error: W has {W.shape[0]} rows and V {V.shape[0]}; both are (entries, units).")
    r = torch.linalg.qr(torch.cat([W, V], dim=1)).R  # in this basis the difference needs no d x d matrix
    a, b = r[:, : W.shape[1]], r[:, W.shape[1] :]
    return float((a @ a.T - b @ b.T).norm() / (b @ b.T).norm())


def principal_angles(W: Tensor, V: Tensor, k: int | None = None) -> Tensor:
    """Angles between the spaces of the leading left singular vectors.

    Args:
        W: ``(d, p)``.
        V: ``(d, q)``.
        k: Vectors of each; default: the smaller of the two numerical ranks.

    Returns:
        ``(k,)`` radians, increasing. The mean of their squared cosines is the overlap of the two spaces.

    Raises:
        ValueError: If the numbers of rows differ or ``k`` is larger than a rank.
    """
    W, V = as_samples(W).double(), as_samples(V).double()
    if W.shape[0] != V.shape[0]:
        raise ValueError(f"principal_angles: W has {W.shape[0]} rows and V {V.shape[0]}; both are (entries, units).")
    bases = []
    for A in (W, V):
        u, s, _ = torch.linalg.svd(A, full_matrices=False)
        bases.append(u[:, s > s.max() * max(A.shape) * torch.finfo(s.dtype).eps])
    k = min(b.shape[1] for b in bases) if k is None else k
    if not 1 <= k <= min(b.shape[1] for b in bases):
        raise ValueError(f"principal_angles: k must be from 1 to the ranks {[b.shape[1] for b in bases]}, got {k}.")
    a, b = (basis[:, :k] for basis in bases)
    cosines = torch.linalg.svdvals(a.T @ b)
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).flip(0)  # small angles keep their digits in the sine
    return torch.atan2(sines, cosines)


def match_columns(W: Tensor, X: Tensor) -> ColumnMatch:
    """Gives each sample the column that points to it, so that the sum of cosines is largest.

    Args:
        W: Columns, ``(d, p)``; merge parallel ones before.
        X: Samples, ``(N, d)``.

    Returns:
        The assignment.

    Raises:
        ValueError: If the numbers of entries differ.
    """
    from scipy.optimize import linear_sum_assignment

    X = as_samples(X).double()
    W = as_samples(W).double() if W.numel() else W.double()  # no column is left of a dead network
    if W.shape[0] != X.shape[1]:
        raise ValueError(f"match_columns: columns have {W.shape[0]} entries and samples {X.shape[1]}.")
    cosines = torch.nn.functional.normalize(X, dim=1) @ torch.nn.functional.normalize(W, dim=0)  # (N, p)
    rows, columns = (torch.as_tensor(i, device=W.device) for i in linear_sum_assignment(-cosines.cpu().numpy()))
    column = torch.full((len(X),), -1, device=W.device)
    cosine, norm = torch.full((2, len(X)), torch.nan, dtype=W.dtype, device=W.device)
    column[rows], cosine[rows], norm[rows] = columns, cosines[rows, columns], W.norm(dim=0)[columns]
    return ColumnMatch(column, cosine, norm)
