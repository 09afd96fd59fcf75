r"""The measures: formulas from the merged state to what a user asks for.

Letters: n values v with mean mu and central moment sums :math:`m_k`; :math:`s_2 = \sum v^2`, :math:`s_4 = \sum v^4`,
which follow safely from the central moments (the other way round is where digits are lost).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from balanced_rep.ops._arrays import as_array
from balanced_rep.ops._guard import needs_reference
from balanced_rep.stats._histogram import LogHistogram

__all__ = ["STATISTICS", "Measures"]

STATISTICS = (
    "mean", "var", "std", "skewness", "kurtosis", "l1", "l2", "l4", "l4_over_l2", "std_over_l2", "participation_ratio",
    "inverse_participation_ratio", "hoyer", "treves_rolls", "vinje_gallant", "min", "max", "absmax", "peak_to_average",
    "crest", "active_fraction",
)  # fmt: skip


def _in_range(fourth: Tensor, second: Tensor) -> Tensor:
    """Sums of fourth powers, NaN where they left float64, as they do for float64 values beyond 1e77 or below 1e-81."""
    return torch.where(fourth.isinf() | ((fourth == 0) & (second > 0)), torch.nan, fourth)


class Measures:
    """Properties of :class:`~balanced_rep.stats.RepresentationStats`, which holds the state."""

    state: Tensor
    dtype: torch.dtype
    correction: float
    histogram: LogHistogram | None
    energy_log: Tensor | None
    library: str

    @property
    def n(self) -> Any:
        """int64 number of values in each result."""
        return self._count(0)

    @property
    def n_active(self) -> Any:
        """int64 number of values above the threshold."""
        return self._count(8)

    @property
    def n_nonfinite(self) -> Any:
        """int64 number of values that are NaN or infinite."""
        return self._count(9)

    @property
    def mean(self) -> Any:
        """Mean of the values."""
        return self._out(torch.where(self._n > 0, self.state[1], torch.nan))

    @property
    def var(self) -> Any:
        """m2 / (n - correction); NaN unless n > correction."""
        return self._out(self._var)

    @property
    def std(self) -> Any:
        """Standard deviation, the paper's memorization score when ``correction=0``: high for a spiky representation."""
        return self._out(self._var.sqrt())

    @property
    def skewness(self) -> Any:
        """sqrt(n) m3 / m2^1.5, without correction; 0 for a symmetric sample, NaN for a constant one."""
        return self._out(self._n.sqrt() * (self.state[3] / self.state[2]) / self.state[2].sqrt())

    @property
    def kurtosis(self) -> Any:
        """n m4 / m2^2, 3 for a normal sample (subtract 3 for the excess); NaN for a constant sample."""
        return self._out(self._n * (_in_range(self.state[4], self.state[2]) / self.state[2]) / self.state[2])

    @property
    def l1(self) -> Any:
        """Sum of |v|."""
        return self._out(self.state[5])

    @property
    def l2(self) -> Any:
        """Euclidean norm."""
        return self._out(self._s2.sqrt())

    @property
    def l4(self) -> Any:
        """Fourth root of the sum of v^4."""
        return self._out(self._s4.sqrt().sqrt())

    @property
    def l4_over_l2(self) -> Any:
        """n^-1/4 for a flat representation, 1 for one active unit. Scale-free."""
        return self._out(self._s4.sqrt().sqrt() / self._s2.sqrt())

    @property
    def std_over_l2(self) -> Any:
        """Scale-free standard deviation: sqrt((1 - (sum v)^2 / (n s2)) / n) when ``correction=0``."""
        return self._out(self._var.sqrt() / self._s2.sqrt())

    @property
    def participation_ratio(self) -> Any:
        """s2^2 / s4: the effective number of active units, 1 for one active unit, n for a flat representation."""
        return self._out(self._s2 / (self._s4 / self._s2))

    @property
    def inverse_participation_ratio(self) -> Any:
        """s4 / s2^2, from 1 / n for a flat representation to 1 for one active unit."""
        return self._out(self._s4 / self._s2 / self._s2)

    @property
    def hoyer(self) -> Any:
        """(sqrt n - l1 / l2) / (sqrt n - 1), 0 flat to 1 one active unit (Hoyer, JMLR 5, 2004)."""
        root = self._n.sqrt()
        return self._out((root - self.state[5] / self._s2.sqrt()) / (root - 1))

    @property
    def treves_rolls(self) -> Any:
        """Activity ratio a = (l1 / n)^2 / (s2 / n), 1 / n for one active unit to 1 flat (Treves and Rolls, 1991)."""
        return self._out(self._activity)

    @property
    def vinje_gallant(self) -> Any:
        """(1 - a) / (1 - 1 / n) of the activity ratio a, 0 flat to 1 one active unit (Vinje and Gallant, 2000)."""
        return self._out((1 - self._activity) / (1 - 1 / self._n))

    @property
    def min(self) -> Any:
        """Least value."""
        return self._out(torch.where(self._n > 0, self.state[6], torch.nan))

    @property
    def max(self) -> Any:
        """Greatest value."""
        return self._out(torch.where(self._n > 0, self.state[7], torch.nan))

    @property
    def absmax(self) -> Any:
        """Greatest |v|."""
        return self._out(self._absmax)

    @property
    def peak_to_average(self) -> Any:
        """Greatest |v| over mean |v|, from 1 to n."""
        return self._out(self._absmax / (self.state[5] / self._n))

    @property
    def crest(self) -> Any:
        """Greatest |v| over root mean square, from 1 to sqrt n."""
        return self._out(self._absmax / (self._s2 / self._n).sqrt())

    @property
    def active_fraction(self) -> Any:
        """Share of the values above the threshold."""
        return self._out(self.state[8] / self._n)

    @property
    def energy_entropy(self) -> Any:
        """Entropy of the energy shares v^2 / s2 in nats, 0 to ln n; needs ``entropy=True``."""
        return self._out(self._entropy)

    @property
    def effective_number(self) -> Any:
        """exp(energy_entropy), 1 to n; needs ``entropy=True``."""
        return self._out(self._entropy.exp())

    def topk_share(self, k: float, *, return_bound: bool = False) -> Any:
        """Share of the energy in the largest values by magnitude; needs ``histogram=True``.

        Args:
            k: How many values: an int of at least 1, or a float fraction of n in (0, 1), rounded up.
            return_bound: Also return a bound on the error.

        Returns:
            The share, or ``(share, bound)``.

        Raises:
            ValueError: If ``k`` is out of range or the histogram was not kept.
            RuntimeError: Where its derivative would be asked for: it has none.
        """
        sketch = self._sketch("topk_share")
        if isinstance(k, float) and 0 < k < 1:
            count = (k * self._n * (1 - 2.0**-50)).ceil()  # 0.07 * 100 is 7.000000000000001
        elif isinstance(k, Integral) and not isinstance(k, bool) and k >= 1:
            count = torch.full_like(self._n, int(k)).minimum(self._n)
        else:
            raise ValueError(f"k must be an int >= 1 or a float fraction in (0, 1), got {k!r}")
        return self._pair(*sketch.topk_share(count, self.state[5], self._s2), return_bound)

    def gini(self, *, return_bound: bool = False) -> Any:
        """Gini index of |v|, 0 flat to 1 - 1 / n one active unit; needs ``histogram=True``.

        Args:
            return_bound: Also return a bound on the error.

        Returns:
            The index, or ``(index, bound)``.

        Raises:
            ValueError: If the histogram was not kept.
            RuntimeError: Where its derivative would be asked for: it has none.
        """
        return self._pair(*self._sketch("gini").gini(self.state[5], self._s2), return_bound)

    def quantile(self, q: float | Sequence[float], *, return_bound: bool = False) -> Any:
        """Quantiles with linear interpolation, as :func:`torch.quantile`; needs ``histogram=True``.

        Args:
            q: One or several numbers in [0, 1].
            return_bound: Also return a bound on the error, at most 1/64 of the value away from 0.

        Returns:
            The quantiles, ``(*shape)`` for one q and ``(len(q), *shape)`` for several, or ``(quantiles, bound)``.

        Raises:
            ValueError: If a q is out of range or the histogram was not kept.
            RuntimeError: Where its derivative would be asked for: it has none.
        """
        sketch = self._sketch("quantile")
        many = torch.as_tensor(q, dtype=torch.float64, device=self.state.device)
        if many.ndim > 1 or not bool(((many >= 0) & (many <= 1)).all()):
            raise ValueError(f"q must be one or several numbers in [0, 1], got {q!r}")
        value, bound = sketch.quantile(many.reshape(-1), self.state[6], self.state[7])
        if many.ndim == 0:
            value, bound = value[0], bound[0]
        return self._pair(value, bound, return_bound)

    @property
    def _n(self) -> Tensor:
        return self.state[0]

    @property
    def _var(self) -> Tensor:
        return torch.where(self._n > self.correction, self.state[2] / (self._n - self.correction), torch.nan)

    @property
    def _s2(self) -> Tensor:
        return self.state[2] + self._n * self.state[1].square()

    @property
    def _s4(self) -> Tensor:
        n, mean, m2, m3, m4 = self.state[:5].unbind(0)
        return _in_range(m4 + 4 * mean * m3 + 6 * mean.square() * m2 + n * mean.pow(4), self._s2)

    @property
    def _activity(self) -> Tensor:
        return (self.state[5] / self._n) * (self.state[5] / self._s2)

    @property
    def _absmax(self) -> Tensor:
        return torch.where(self._n > 0, torch.maximum(self.state[6].abs(), self.state[7].abs()), torch.nan)

    @property
    def _entropy(self) -> Tensor:
        if self.energy_log is None:
            raise ValueError("energy_entropy needs one more sum: call representation_stats(..., entropy=True)")
        return (self._s2.log() - self.energy_log / self._s2).clamp_min(0)

    def _sketch(self, what: str) -> LogHistogram:
        if self.histogram is None:
            raise ValueError(f"{what} needs the log-histogram: call representation_stats(..., histogram=True)")
        recorded = torch.is_grad_enabled() and self.state.requires_grad
        if recorded or needs_reference() or hasattr(self.state, "tangents"):  # the last: inside br.jvp
            raise RuntimeError(
                f"{what} has no derivative: it comes from counts. Take it under torch.no_grad() or from "
                "representation_stats(h.detach(), ...), outside of torch.func transforms and br.jvp"
            )
        return self.histogram

    def _pair(self, value: Tensor, bound: Tensor, return_bound: bool) -> Any:
        value = torch.where(self.state[9] == 0, value, math.nan)  # a NaN or infinite value leaves no rank defined
        return (self._out(value), self._out(bound)) if return_bound else self._out(value)

    def _count(self, i: int) -> Any:
        return as_array(self.state[i].long(), self.library)

    def _out(self, value: Tensor) -> Any:
        return as_array(value.to(self.dtype), self.library)
