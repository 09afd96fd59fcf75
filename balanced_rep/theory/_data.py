r"""Data of the theory: how separable clusters are, and a subset that is.

Definition 3.1 of the paper: samples in clusters with means :math:`\bar x_k` are :math:`(\alpha, \beta)`-separable if

.. math::  \|x_{k,j} - \bar x_k\| \le \alpha \|\bar x_k\|, \qquad \cos(\bar x_k, \bar x_l) \le \beta \quad (k \ne l).

Letters: n samples of d entries, M clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from balanced_rep.models._checks import check_counts

__all__ = ["Separability", "as_samples", "cluster_index", "separability", "separable_subset"]


@dataclass(frozen=True)
class Separability:
    r"""How separable labelled samples are.

    Attributes:
        alpha: Largest distance of a sample to its cluster mean, over the norm of that mean.
        beta: Largest cosine between two cluster means; -1 for a single cluster. Theorem 3.1 needs it negative.
        min_norm: Smallest norm of a cluster mean.
        n_clusters: M.
        max_clusters: How many clusters there can be at this ``beta``: :math:`1 + 1/|\beta|`, rounded down, and never
            more than d + 1; ``None`` if ``beta`` is not negative. The sum of M unit vectors has a squared norm of at
            most :math:`M + M (M - 1) \beta`, which must not be negative.
    """

    alpha: float
    beta: float
    min_norm: float
    n_clusters: int
    max_clusters: int | None

    @property
    def separable(self) -> bool:
        """Whether the cosines are negative, as Theorem 3.1 asks."""
        return self.beta < 0

    def margin(self, gains: Sequence[Tensor]) -> float:
        r"""The margin of Theorem 3.1.

        .. math::  \gamma = \min_k \|\bar x_k\| \cdot \min\{ s_{min} c(\alpha) / \sqrt{p_k} - s_{max} \alpha,\;
                   s_{max} |\beta| / 2 \},

        where s are the singular values of the blocks. The paper leaves c open; here
        :math:`c(\alpha) = \sqrt{1 - \alpha^2}`, the least share of a mean that lies along the leading eigenvector of
        its cluster's second moment. Noise much below it flips no unit.

        Args:
            gains: Eigenvalues of W_k W_k^T of each cluster, as in :attr:`ClosedForm.gains`; zeros are left out.

        Returns:
            The margin; not positive if the theorem says nothing about these data.
        """
        if not self.separable or self.alpha >= 1:
            return -math.inf
        found = []
        for g in gains:
            s = g[g > 0].sqrt()
            if len(s):
                own = float(s.min()) * math.sqrt(1 - self.alpha**2) / math.sqrt(len(s)) - float(s.max()) * self.alpha
                found.append(min(own, float(s.max()) * abs(self.beta) / 2))
        return self.min_norm * min(found, default=-math.inf)


def separability(X: Tensor, labels: Tensor | None = None) -> Separability:
    """Measures Definition 3.1 on labelled samples.

    Args:
        X: Samples, ``(n, d)``, floating point.
        labels: Cluster of each sample, ``(n,)`` integers; ``None`` makes every sample a cluster of its own.

    Returns:
        The measures, computed in float64.

    Raises:
        ValueError: If shapes are wrong, a value is not finite, or a cluster mean is zero.

    Example:
        >>> import torch
        >>> s = separability(torch.tensor([[1.0, 0.0], [-1.0, 0.1]]))
        >>> s.separable, s.max_clusters
        (True, 2)
    """
    X = as_samples(X).double()
    index = cluster_index(X, labels)
    n_clusters = int(index.max()) + 1
    count = torch.bincount(index, minlength=n_clusters)
    means = X.new_zeros(n_clusters, X.shape[1]).index_add_(0, index, X) / count[:, None]
    norms = means.norm(dim=1)
    if not (norms > 0).all():
        bad = int((norms == 0).nonzero()[0])
        raise ValueError(f"separability: the mean of cluster {bad} is zero, and it has no direction. Centre less.")
    alpha = float(((X - means[index]).norm(dim=1) / norms[index]).max())
    cosines = (means / norms[:, None]) @ (means / norms[:, None]).T
    cosines.fill_diagonal_(-1.0)
    beta = float(cosines.max().clamp(-1, 1))
    bound = None if beta >= 0 else min(math.floor(1 + 1 / abs(beta) + 1e-9), X.shape[1] + 1)
    return Separability(alpha, beta, float(norms.min()), n_clusters, bound)


def separable_subset(X: Tensor, n: int, *, seed: int = 0, trials: int = 64) -> Tensor:
    """Chooses samples that point away from each other once their mean is taken off: what memorization theory needs.

    Greedy, from ``trials`` random starts: each further sample is the one whose largest cosine to those chosen so far,
    about the mean of all of ``X``, is smallest. The best of the subsets, by their largest cosine after centring by
    the subset's own mean, is returned. Random subsets of images are rarely separable; those of five mostly are.

    Args:
        X: Samples, ``(N, d)``.
        n: How many to choose, from 2 to N.
        seed: Of the starts.
        trials: Number of starts.

    Returns:
        Indices ``(n,)``; ``X[indices] - X[indices].mean(0)`` are the samples to train on.

    Raises:
        ValueError: If ``n`` is out of range, or ``trials`` below 1.
    """
    X = as_samples(X).double()
    if not 2 <= n <= len(X):
        raise ValueError(f"separable_subset: n must be from 2 to the number of samples, {len(X)}, got {n}.")
    check_counts("separable_subset", n=n, trials=trials)
    unit = torch.nn.functional.normalize(X - X.mean(0), dim=1)
    starts = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))[:trials].to(X.device)
    best, best_cosine = starts[:n], math.inf
    for start in starts:
        chosen = [int(start)]
        worst = unit @ unit[start]  # largest cosine of each candidate to those chosen
        for _ in range(n - 1):
            worst[chosen[-1]] = math.inf
            chosen.append(int(worst.argmin()))
            worst = torch.maximum(worst, unit @ unit[chosen[-1]])
        index = torch.tensor(chosen, device=X.device)
        own = torch.nn.functional.normalize(X[index] - X[index].mean(0), dim=1)
        cosine = float((own @ own.T).fill_diagonal_(-1.0).max())
        if cosine < best_cosine:
            best, best_cosine = index, cosine
    return best


def as_samples(X: Tensor) -> Tensor:
    """Checks samples.

    Args:
        X: ``(n, d)``.

    Returns:
        ``X`` without its graph.

    Raises:
        ValueError: If it is no finite floating-point matrix with at least one row and one column.
        TypeError: If it is no tensor.
    """
    if not isinstance(X, Tensor):
        raise TypeError(f"X must be a tensor (samples, entries), got {type(X).__name__}; torch.as_tensor makes one.")
    if X.ndim != 2 or not X.is_floating_point() or X.numel() == 0:
        raise ValueError(
            f"X must be floating point (samples, entries) and not empty, got {tuple(X.shape)} {X.dtype}; "
            "flatten images first: images.flatten(1)."
        )
    if not X.isfinite().all():
        row = int((~X.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"X holds NaN or infinity, first in sample {row}.")
    return X.detach()


def cluster_index(X: Tensor, labels: Tensor | None) -> Tensor:
    """Labels as numbers from 0 without gaps.

    Args:
        X: Samples, ``(n, d)``.
        labels: ``(n,)`` integers, or ``None`` for a cluster each.

    Returns:
        ``(n,)`` int64.

    Raises:
        ValueError: If the labels do not fit the samples.
    """
    if labels is None:
        return torch.arange(len(X), device=X.device)
    labels = torch.as_tensor(labels)
    if labels.shape != X.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels must be integers of shape ({len(X)},), one per sample, got {tuple(labels.shape)} {labels.dtype}."
        )
    return labels.to(X.device).unique(return_inverse=True)[1]
