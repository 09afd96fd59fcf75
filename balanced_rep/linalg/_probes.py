"""Hutchinson's estimators, on counter-based probes: probe i is the same whatever the chunk, device or batch.

With E[w w^T] = I, the averages over probes of <w, A w>, w * (A w) and |A w|^2 estimate trace, diagonal and squared
Frobenius norm. Rademacher probes have the smallest variance for the first two (2 |A|_F^2 less the diagonal's part for a
symmetric A; 4 of it for Gaussian ones).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from balanced_rep.ops import philox_normal, philox_rademacher

__all__ = ["Estimate", "Probe", "RunningMean", "probes"]

Probe = Literal["rademacher", "gaussian"]


@dataclass(frozen=True)
class Estimate:
    """A value and how well it is known.

    Attributes:
        value: The estimate, or the exact value.
        standard_error: Of ``value``, from the spread over probes; zero where exact, NaN for a single probe.
        n_probes: Products that were taken.
        exact: Whether the value is exact up to rounding.
    """

    value: Tensor
    standard_error: Tensor
    n_probes: int
    exact: bool


def probes(first: int, count: int, n: int, kind: Probe, seed: int, like: Tensor) -> Tensor:
    """Probes ``first`` to ``first + count``.

    Args:
        first: Number of the first probe.
        count: How many.
        n: Length of each.
        kind: "rademacher" or "gaussian".
        seed: Key of the randomness.
        like: Gives dtype and device.

    Returns:
        ``(count, n)``.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in ("rademacher", "gaussian"):
        raise ValueError(f"probe={kind!r}; known are 'rademacher' and 'gaussian'")
    items = torch.arange(first, first + count, device=like.device)
    draw = philox_rademacher if kind == "rademacher" else philox_normal
    return draw(items, n, seed=seed).to(like.dtype)


class RunningMean:
    """Mean and standard error of samples that come in groups, in float64 (Chan's update)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: Tensor | None = None
        self.m2: Tensor | None = None

    def add(self, samples: Tensor) -> None:
        """Adds samples (count, ...)."""
        x = samples.double()
        count, mean = x.shape[0], x.mean(0)
        m2 = (x - mean).square().sum(0)
        if self.mean is None or self.m2 is None:
            self.n, self.mean, self.m2 = count, mean, m2
            return
        delta, total = mean - self.mean, self.n + count
        self.m2 = self.m2 + m2 + delta.square() * (self.n * count / total)
        self.mean = self.mean + delta * (count / total)
        self.n = total

    def estimate(self, dtype: torch.dtype) -> Estimate:
        """The result.

        Args:
            dtype: Of value and error.

        Returns:
            Mean with its standard error.

        Raises:
            ValueError: If nothing was added.
        """
        if self.mean is None or self.m2 is None:
            raise ValueError("no probes were drawn")
        error = (self.m2 / (self.n * (self.n - 1))).sqrt() if self.n > 1 else torch.full_like(self.mean, math.nan)
        return Estimate(self.mean.to(dtype), error.to(dtype), self.n, exact=False)
