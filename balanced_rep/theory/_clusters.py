"""Spectra of weighted clusters, and how units are spent on them: the parts that the closed forms are made of.

Letters: n samples of d entries, M clusters, r eigenvalues of a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

__all__ = ["Cluster", "check_scales", "distinct", "rotated_block", "sample_weights", "spectra", "unit_counts"]


@dataclass(frozen=True)
class Cluster:
    """Spectrum of a cluster: weight rho, mean (d,), eigenvalues (r,) decreasing and eigenvectors (d, r) of S."""

    rho: float
    mean: Tensor
    s: Tensor
    u: Tensor

    def gains(self, sigma: float, lam: float) -> Tensor:
        """g of every direction, not negative."""
        return ((self.s - lam / self.rho) / (self.s + sigma**2)).clamp_min(0)

    def savings(self, sigma: float, lam: float) -> Tensor:
        """By how much one unit spent on each direction lowers the objective."""
        return self.rho * (self.s - lam / self.rho).clamp_min(0).square() / (self.s + sigma**2)


def rotated_block(cluster: Cluster, g: Tensor) -> Tensor:
    """``U sqrt(g) H`` with the reflection H that makes all columns see the mean equally, (d, len(g))."""
    W = cluster.u[:, : len(g)] * g.sqrt()
    seen = W.T @ cluster.mean
    norm, k = seen.norm(), len(g)
    if k < 2 or norm <= 1e-12 * cluster.mean.norm() or norm == 0:
        return W  # a single unit, or a centred cluster that no rotation makes active
    v = seen / norm - 1 / math.sqrt(k)
    if float(v @ v) < 1e-28:
        return W
    return W - 2 * torch.outer(W @ v, v) / (v @ v)


def spectra(X: Tensor, index: Tensor, weights: Tensor) -> list[Cluster]:
    """Spectra in float64; eigenvectors point along the mean, so that the result does not depend on LAPACK's signs."""
    X = X.double()
    found = []
    for k in range(int(index.max()) + 1):
        rows, w = X[index == k], weights[index == k]
        total = w.sum()
        if total == 0:
            raise ValueError(f"closed_form: all samples of cluster {k} have weight 0; leave the cluster out.")
        scaled = rows * (w / total).sqrt()[:, None]
        if len(rows) < X.shape[1]:
            _, root, vh = torch.linalg.svd(scaled, full_matrices=False)
            s, u = root.square(), vh.T
        else:
            s, u = (t.flip(-1) for t in torch.linalg.eigh(scaled.T @ scaled))
        mean = (rows * (w / total)[:, None]).sum(dim=0)
        u = u * torch.where(mean @ u < 0, -1.0, 1.0)
        found.append(Cluster(float(total / len(X)), mean, s.clamp_min(0), u))
    return found


def unit_counts(clusters: list[Cluster], sigma: float, lam: float, p: int | Sequence[int] | None) -> list[int]:
    """Units of each cluster."""
    if p is not None and not isinstance(p, Integral):
        counts = list(p) if isinstance(p, Iterable) else []
        if len(counts) != len(clusters) or not all(c == int(c) >= 0 for c in counts):
            raise ValueError(f"p must be a whole number, or one for each of the {len(clusters)} clusters, got {p}.")
        return [int(c) for c in counts]
    savings = [c.savings(sigma, lam) for c in clusters]
    if p is None:
        return [int((s > 0).sum()) for s in savings]
    if p < 1:
        raise ValueError(f"p must be at least 1, got {p}.")
    flat = torch.cat(savings)
    owner = torch.repeat_interleave(torch.arange(len(savings)), torch.tensor([len(s) for s in savings]))
    taken = flat.argsort(descending=True, stable=True)[:p].cpu()
    taken = taken[flat.cpu()[taken] > 0]
    return torch.bincount(owner[taken], minlength=len(clusters)).tolist()


def distinct(X: Tensor) -> Tensor:
    """Number of each sample's value: equal samples share it; numbered in the order of their first appearance."""
    inverse = X.unique(dim=0, return_inverse=True)[1]
    first = torch.full((int(inverse.max()) + 1,), len(X), dtype=torch.int64, device=X.device)
    first = first.scatter_reduce(0, inverse, torch.arange(len(X), device=X.device), "amin")
    return first.argsort().argsort()[inverse]


def sample_weights(X: Tensor, weights: Tensor | None, *, normalise: bool = True) -> Tensor:
    if weights is None:
        return torch.ones(len(X), dtype=torch.float64, device=X.device)
    w = torch.as_tensor(weights).detach().to(X.device, torch.float64)
    if w.shape != X.shape[:1] or not bool((w >= 0).all()) or not bool(w.sum() > 0) or not bool(w.isfinite().all()):
        raise ValueError(
            f"weights must be {len(X)} finite numbers, not negative, not all 0, got shape {tuple(w.shape)}."
        )
    return w * (len(w) / w.sum()) if normalise else w


def check_scales(sigma: float, lam: float) -> None:
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be a positive number, got {sigma}.")
    if not (lam >= 0 and math.isfinite(lam)):
        raise ValueError(f"lam must be a finite number >= 0, got {lam}.")
