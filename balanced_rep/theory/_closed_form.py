r"""Closed-form local minima of the two-layer ReLU autoencoder: Theorem 3.1 and Corollaries 3.2 to 3.4 of the paper.

The objective (Equation 6), for one noise level :math:`\sigma`:

.. math::  L = \frac1n \sum_i E_\epsilon \| W_2 [W_1^T (x_i + \sigma\epsilon)]_+ - x_i \|^2
           + \lambda (\|W_1\|_F^2 + \|W_2\|_F^2).

Cluster k has weight :math:`\rho_k` (its share of the samples) and second moment *about zero*
:math:`S_k = \sum_j s_{kj} u_{kj} u_{kj}^T`. Its block of the tied minimum has

.. math::  W_k W_k^T = \sum_j g_{kj} u_{kj} u_{kj}^T, \qquad g_{kj} = \frac{s_{kj} - \lambda/\rho_k}{s_{kj} + \sigma^2}

over the directions with :math:`s_{kj} > \lambda/\rho_k` that units are spent on. A sample stored alone is a cluster of
rank one: its column is :math:`r x` with :math:`r^2 = (\|x\|^2 - \lambda/\rho) / (\|x\|^4 + \sigma^2 \|x\|^2)`.

Where sources differ: the noise enters as :math:`\sigma^2` (the main text prints :math:`\sigma` once), the norm in r is
:math:`\|x\|_2^4`, and the penalty is :math:`\lambda`, not :math:`\lambda/2`; all three are checked against numerical
minima in the tests.

Letters: n samples of d entries, M clusters, p hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from balanced_rep.models._checks import check_counts
from balanced_rep.theory._clusters import (
    Cluster,
    check_scales,
    distinct,
    rotated_block,
    sample_weights,
    spectra,
    unit_counts,
)
from balanced_rep.theory._data import as_samples, cluster_index

__all__ = [
    "ClosedForm",
    "closed_form",
    "closed_form_weights",
    "column_scale",
    "memorization_threshold",
    "minimal_loss",
    "optimal_allocation",
    "population_loss",
]

Regime = Literal["memorization", "generalization", "mixed"]


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """A closed-form minimum.

    Attributes:
        W: Encoder and decoder, ``(d, p)``, in the dtype of the samples; unused units are zero columns at the end.
        block: Cluster that each unit belongs to, ``(p,)``; -1 for unused units.
        gains: For each cluster the eigenvalues g of ``W_k W_k^T``, ``(p_k,)`` float64, decreasing; 0 for a unit that
            the penalty kills.
        loss: The objective at ``W`` if every unit is active on all of its own cluster and on nothing else.
        own_active: Share of pairs (unit, noise-free sample of its cluster) in which the unit is active. The formula is
            exact at 1.
        other_active: The same for samples of other clusters. The formula is exact at 0.
    """

    W: Tensor
    block: Tensor
    gains: tuple[Tensor, ...]
    loss: float
    own_active: float
    other_active: float

    @property
    def allocation(self) -> tuple[int, ...]:
        """Units of each cluster that are not dead."""
        return tuple(int((g > 0).sum()) for g in self.gains)


def closed_form(
    X: Tensor,
    labels: Tensor | None = None,
    *,
    sigma: float,
    lam: float,
    p: int | Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> ClosedForm:
    r"""The minimum of Theorem 3.1 for samples in clusters, with the rotation that the ReLU asks for.

    The theorem leaves an orthogonal factor free in each block, but its formula holds only where all units of a block
    are active on the whole cluster. Plain eigenvectors are not: about half of their units are off. Here each block is
    rotated so that all of its units see the cluster mean equally, :math:`W_k^T \bar x_k \propto (1, ..., 1)`. It needs
    a mean that dominates the spread: do not centre a cluster that is to be generalized.

    Args:
        X: Samples, ``(n, d)``; computed in float64.
        labels: Cluster of each sample, ``(n,)`` integers. ``None`` makes each distinct sample a cluster.
        sigma: Noise level, positive.
        lam: Penalty, not negative.
        p: Units: a budget, spent where it lowers the objective most; or the number for each cluster in the order of
            the sorted labels; ``None`` for every direction that is worth a unit.
        weights: How often each sample counts, ``(n,)``, not negative; scaled to the mean 1. Default: once.

    Returns:
        Weights and what belongs to them.

    Raises:
        ValueError: If an argument is out of range or does not fit.

    Example:
        >>> import torch
        >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
        >>> closed_form(x, sigma=0.5, lam=0.1).gains[0]  # (4 - 0.2) / (4 + 0.25)
        tensor([0.8941], dtype=torch.float64)
    """
    X = as_samples(X)
    check_scales(sigma, lam)
    labels = distinct(X) if labels is None else labels
    clusters = spectra(X, cluster_index(X, labels), sample_weights(X, weights))
    counts = unit_counts(clusters, sigma, lam, p)
    blocks, gains = [], []
    for cluster, count in zip(clusters, counts, strict=True):
        g = cluster.gains(sigma, lam)[:count]
        gains.append(torch.nn.functional.pad(g, (0, count - len(g))))
        blocks.append(rotated_block(cluster, g[g > 0]))
    block = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor([b.shape[1] for b in blocks]))
    W, n_units = torch.cat(blocks, dim=1), sum(counts) if not isinstance(p, int) else p
    n_dead = n_units - W.shape[1]
    W = torch.nn.functional.pad(W, (0, n_dead))
    block = torch.nn.functional.pad(block, (0, n_dead), value=-1)
    own, other = _active(X, W, block, cluster_index(X, labels))
    loss = _minimal_loss(clusters, counts, sigma, lam)
    return ClosedForm(W.to(X.dtype), block, tuple(gains), loss, own, other)


def closed_form_weights(
    X: Tensor,
    *,
    sigma: float,
    lam: float,
    regime: Regime,
    labels: Tensor | None = None,
    p: int | Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The weights of one of the paper's three corollaries; :func:`closed_form` tells more about them.

    Args:
        X: Samples, ``(n, d)``.
        sigma: Noise level.
        lam: Penalty.
        regime: "memorization" (Corollary 3.2): each distinct sample its own column, copies counted; p at least their
            number. "generalization" (3.3): clusters by ``labels``, or all samples as one. "mixed" (3.4): the same with
            ``labels`` that set repeated samples apart, which become single columns.
        labels: Cluster of each sample, ``(n,)``.
        p: Units, as in :func:`closed_form`.
        weights: How often each sample counts.

    Returns:
        ``W1 = W2 = W``, ``(d, p)``.

    Raises:
        ValueError: If the regime is unknown, or ``labels`` or ``p`` do not go with it.
    """
    X = as_samples(X)
    if regime == "memorization":
        if labels is not None:
            raise ValueError("closed_form_weights: memorization takes no labels: every distinct sample is stored.")
        n_distinct = int(distinct(X).max()) + 1
        if isinstance(p, int) and p < n_distinct:
            raise ValueError(
                f"closed_form_weights: memorization needs a unit for each of the {n_distinct} distinct samples, p={p}."
            )
    elif regime == "generalization":
        labels = torch.zeros(len(X), dtype=torch.int64, device=X.device) if labels is None else labels
    elif regime == "mixed":
        if labels is None:
            raise ValueError("closed_form_weights: the mixed regime needs labels that set repeated samples apart.")
    else:
        raise ValueError(f"regime must be 'memorization', 'generalization' or 'mixed', got {regime!r}.")
    return closed_form(X, labels, sigma=sigma, lam=lam, p=p, weights=weights).W


def column_scale(X: Tensor, *, sigma: float, lam: float, copies: Tensor | None = None) -> Tensor:
    r"""The factor r of a stored sample: its column is :math:`r x` (Corollaries 3.2 and 3.4).

    .. math::  r_i = \sqrt{ (\|x_i\|^2 - n\lambda/m_i) / (\|x_i\|^4 + \sigma^2 \|x_i\|^2) },

    where n counts all copies and :math:`m_i` those of sample i.

    Args:
        X: Distinct samples, ``(N, d)``.
        sigma: Noise level.
        lam: Penalty.
        copies: m, ``(N,)``; default: one each.

    Returns:
        r, ``(N,)``; 0 for a sample below the memorization threshold, that is zero, or that occurs 0 times.

    Raises:
        ValueError: If an argument is out of range.
    """
    X = as_samples(X)
    check_scales(sigma, lam)
    m = sample_weights(X, copies, normalise=False)
    square = X.double().square().sum(dim=1)
    kept = (1 - m.sum() * lam / m / square).clamp_min(0)  # over square once: its square can leave the range
    return torch.where((square > 0) & (m > 0), kept / (square + sigma**2), 0.0).sqrt().to(X.dtype)


def memorization_threshold(X: Tensor, *, lam: float, n: int) -> Tensor:
    r"""How often a sample has to occur among n to be stored: more than :math:`n \lambda / \|x\|^2` times.

    Args:
        X: Samples, ``(N, d)``.
        lam: Penalty.
        n: Number of training samples, copies counted.

    Returns:
        The thresholds, ``(N,)``.

    Raises:
        ValueError: If the penalty is negative or not finite, or n below 1.
    """
    X = as_samples(X)
    check_counts("memorization_threshold", n=n)
    check_scales(1.0, lam)
    return (n * lam / X.double().square().sum(dim=1)).to(X.dtype)


def optimal_allocation(
    X: Tensor, labels: Tensor, *, sigma: float, lam: float, p: int, weights: Tensor | None = None
) -> Tensor:
    r"""How a budget of units is best divided among clusters.

    A unit spent on direction (k, j) lowers the objective by
    :math:`\rho_k (s_{kj} - \lambda/\rho_k)_+^2 / (s_{kj} + \sigma^2)`; the p largest are taken. Units that nothing is
    gained from are not allocated.

    Args:
        X: Samples, ``(n, d)``.
        labels: Cluster of each sample, ``(n,)``.
        sigma: Noise level.
        lam: Penalty.
        p: The budget.
        weights: How often each sample counts.

    Returns:
        Units of each cluster, ``(M,)`` int64, in the order of the sorted labels.
    """
    X = as_samples(X)
    check_scales(sigma, lam)
    clusters = spectra(X, cluster_index(X, labels), sample_weights(X, weights))
    return torch.tensor(unit_counts(clusters, sigma, lam, p))


def minimal_loss(
    X: Tensor,
    labels: Tensor | None = None,
    *,
    sigma: float,
    lam: float,
    p: int | Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> float:
    r"""The objective at the minimum of :func:`closed_form`, which takes the same arguments.

    .. math::  L^* = \sum_k \Big[ \rho_k \mathrm{tr} S_k
               - \sum_{j \le p_k} \frac{\rho_k (s_{kj} - \lambda/\rho_k)_+^2}{s_{kj} + \sigma^2} \Big]

    Args:
        X: Samples, ``(n, d)``.
        labels: Cluster of each sample.
        sigma: Noise level.
        lam: Penalty.
        p: Units.
        weights: How often each sample counts.

    Returns:
        The loss.
    """
    X = as_samples(X)
    check_scales(sigma, lam)
    clusters = spectra(X, cluster_index(X, distinct(X) if labels is None else labels), sample_weights(X, weights))
    return _minimal_loss(clusters, unit_counts(clusters, sigma, lam, p), sigma, lam)


def population_loss(W: Tensor, S: Tensor, *, sigma: float) -> float:
    r"""Denoising error of an all-active block on data of second moment S, without the penalty.

    .. math::  \mathrm{tr}[(I - A) S (I - A)^T] + \sigma^2 \|A\|_F^2, \qquad A = W W^T,

    which is :math:`s \sigma^2 / (s + \sigma^2)` per direction of the optimum. Corollary 3.3 as printed has the first
    term only, which is the bias and no bound of the error.

    Args:
        W: Block, ``(d, p)``.
        S: Second moment about zero, ``(d, d)``, of data that need not be those W was made from.
        sigma: Noise level.

    Returns:
        The expected squared error.

    Raises:
        ValueError: If a shape or the noise level is wrong, or a number not finite.
    """
    W, S = as_samples(W), as_samples(S)
    check_scales(sigma, 0.0)
    if S.shape != (len(W), len(W)):
        raise ValueError(
            f"population_loss: S must be ({len(W)}, {len(W)}), as W is {tuple(W.shape)}; got {tuple(S.shape)}."
        )
    A = W.double() @ W.double().T
    rest = torch.eye(len(A), dtype=A.dtype, device=A.device) - A
    return float((rest @ S.double() * rest).sum() + sigma**2 * A.square().sum())


def _minimal_loss(clusters: list[Cluster], counts: list[int], sigma: float, lam: float) -> float:
    kept = [float(c.savings(sigma, lam)[:k].sum()) for c, k in zip(clusters, counts, strict=True)]
    return sum(c.rho * float(c.s.sum()) for c in clusters) - sum(kept)


def _active(X: Tensor, W: Tensor, block: Tensor, index: Tensor) -> tuple[float, float]:
    """Shares of active pairs of unit and sample: within their cluster, and across clusters."""
    used = block >= 0
    on = X.double() @ W[:, used.to(W.device)] > 0
    own = index[:, None] == block[used].to(index.device)
    inside = float(on[own].double().mean()) if own.any() else math.nan
    across = float(on[~own].double().mean()) if (~own).any() else 0.0
    return inside, across
