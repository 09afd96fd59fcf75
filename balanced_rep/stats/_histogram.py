"""What a log-histogram tells: top-k energy share, Gini index and quantiles, each with its own error bound.

Everything is computed in units of ``2**top`` (energies in units of its square), so that no scale overflows.
Formulas and bounds: docs/ops/log_histogram.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from balanced_rep.ops.log_histogram import BINS_PER_OCTAVE, CENTRE, N_BINS, OCTAVES, REST_BITS

__all__ = ["LogHistogram", "window_top"]

_LOWEST = -1100  # below every float64: a sample of zeros, or an empty one, leaves the window to what it is merged with
_ROUNDING = 2.0**-22  # float64 mantissas are cut to 23 bits, and totals come from the moments
_REST_MAX = 2**REST_BITS - 1


def window_top(absmax: Tensor) -> Tensor:
    """int64 exponent with ``absmax < 2**top``; a little headroom for pooled means that round differently."""
    top = torch.frexp(absmax * (1 + 2.0**-18)).exponent.long()
    return torch.where(absmax.isfinite() & (absmax > 0), top, _LOWEST)


def _geometry(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, lower edge over scale and lower edge of the 1024 magnitude bins, ascending, in units of 2**top."""
    # Not cached: tensors made in inference mode or inside a trace may not be used outside of it.
    bins = torch.arange(CENTRE, device=device)
    scale = torch.exp2((bins // BINS_PER_OCTAVE - OCTAVES).double())
    step = 1 + (bins % BINS_PER_OCTAVE).double() / BINS_PER_OCTAVE
    return scale, step, scale * step


@dataclass(frozen=True, eq=False)
class LogHistogram:
    """Integer table of :mod:`balanced_rep.ops.log_histogram`, one per sample.

    Attributes:
        table: int64 ``(3, *shape, N_BINS)``: count, sum r, sum r^2 of every bin.
        top: int64 ``(*shape,)``: the window ends at ``2**top``.
    """

    table: Tensor
    top: Tensor

    def merge(self, other: LogHistogram) -> LogHistogram:
        """Histogram of both samples together: exact, and the same in any order."""
        top = torch.maximum(self.top, other.top)
        return LogHistogram(self._moved_to(top) + other._moved_to(top), top)

    def _moved_to(self, top: Tensor) -> Tensor:
        """The table in a window that ends at ``top``; bins that fall below it join the centre bin."""
        shift = ((top - self.top) * BINS_PER_OCTAVE).unsqueeze(-1)
        bins = torch.arange(N_BINS, device=top.device) - CENTRE
        size = bins.abs() - shift
        target = CENTRE + torch.where(size > 0, size * bins.sign(), 0)
        moved = torch.zeros_like(self.table).scatter_add(-1, target.expand_as(self.table), self.table)
        rests = moved[1:]
        rests[..., CENTRE] = 0  # a rest only means something inside its bin
        return moved

    def _magnitudes(self, l1: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, sum |v| and sum v^2 of [centre, 1024 bins ascending]; the centre has what is left of the totals."""
        count, r1, r2 = (self.table[..., CENTRE + 1 :] + self.table[..., :CENTRE].flip(-1)).double()
        r2 = torch.where(self._uncertain(r1), (r1.square() / count.clamp_min(1) + r1 * _REST_MAX) / 2, r2)
        scale, step, _ = _geometry(self.table.device)
        r1, r2 = r1 * 2.0**-23, r2 * 2.0**-46
        size = scale * (count * step + r1)
        square = scale.square() * (count * step.square() + 2 * step * r1 + r2)
        unit = torch.exp2(-self.top.double())
        rest = [(total - part.sum(-1)).clamp_min(0) for total, part in ((l1 * unit, size), (energy * unit**2, square))]
        centre = self.table[0, ..., CENTRE].double()
        all_count, all_size, all_square = (
            torch.cat([c.unsqueeze(-1), b], -1) for c, b in ((centre, count), (rest[0], size), (rest[1], square))
        )
        return all_count, all_size, all_square

    def topk_share(self, k: Tensor, l1: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the energy sum v^2 in the k largest |v|, and a bound on its error.

        Whole bins are exact. Of the bin that holds rank k, between (its mean energy) and (the most that its edge
        allows) times the remaining ranks belong to the share; the middle is returned.

        Args:
            k: ``(*shape,)`` numbers of values.
            l1: Sum of |v| from the moments.
            energy: Sum of v^2 from the moments.

        Returns:
            Share and bound, ``(*shape,)`` each.
        """
        count, _, square = (t.flip(-1) for t in self._magnitudes(l1, energy))
        scale, _, low = _geometry(self.table.device)
        edge = torch.cat([low[:1], low + scale / BINS_PER_OCTAVE]).flip(-1)
        through = count.cumsum(-1)
        taken = (k.unsqueeze(-1) - (through - count)).clamp_min(0).minimum(count)
        least = torch.where(count > 0, square * taken / count, 0.0)
        most = torch.where(taken == count, square, torch.minimum(square, taken * edge.square()))
        total = square.sum(-1)
        low_share, high_share = least.sum(-1) / total, most.sum(-1) / total
        r1 = self.table[1, ..., CENTRE + 1 :] + self.table[1, ..., :CENTRE].flip(-1)
        rounding = torch.where(self._uncertain(r1).any(-1), 2.0**-12, _ROUNDING)
        return (low_share + high_share) / 2, (high_share - low_share) / 2 + rounding

    @staticmethod
    def _uncertain(r1: Tensor) -> Tensor:
        """Whether the int64 sum of r^2 of a bin may have wrapped, which takes more than 2^27 values in it.

        By Jensen it lies between ``r1**2 / count`` and ``r1 * _REST_MAX``. Their middle is right to 2^-13 of the
        energy of the bin, and a share of energies to 2^-12.

        Args:
            r1: Sum of r of every bin.

        Returns:
            bool, shape of ``r1``.
        """
        return r1.double() * _REST_MAX >= 2.0**63

    def gini(self, l1: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
        """Gini index of |v| and a bound on its error.

        Pairs in different bins count exactly; pairs in one bin of width 2^-5 relative add at most 2^-7 of
        (count share) x (L1 share), and at most the whole product in the centre bin. The middle is returned.

        Args:
            l1: Sum of |v| from the moments.
            energy: Sum of v^2 from the moments.

        Returns:
            Index and bound, ``(*shape,)`` each.
        """
        count, size, _ = self._magnitudes(l1, energy)
        n, total = count.sum(-1, keepdim=True), size.sum(-1, keepdim=True)
        before = count.cumsum(-1) - count
        across = (size * (2 * before + count - n) / (n * total)).sum(-1)
        product = count * size / (n * total)
        within = product[..., 0] + product[..., 1:].sum(-1) / (4 * BINS_PER_OCTAVE)
        return across + within / 2, within / 2 + _ROUNDING

    def quantile(self, q: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Quantiles with linear interpolation between ranks, and a bound on the error of each.

        A value is taken at the middle of its bin, so it is off by at most 2^-6 of itself, or by 2**(top - 32) near 0.

        Args:
            q: Numbers in [0, 1], float64, 1-d.
            low: Least value, from the moments.
            high: Greatest value, from the moments.

        Returns:
            Quantiles and bounds, ``(len(q), *shape)`` each.
        """
        count = self.table[0]
        through = count.cumsum(-1)
        n = through[..., -1]
        rank = q.reshape(-1, *[1] * n.ndim) * (n - 1).clamp_min(0)
        middles, halves = self._middles()
        value, bound = torch.zeros_like(rank), torch.zeros_like(rank)
        for at, weight in ((rank.floor(), 1 - rank.frac()), (rank.ceil(), rank.frac())):
            wanted = at.long().movedim(0, -1).contiguous()  # (*shape, len(q))
            index = torch.searchsorted(through, wanted, right=True).clamp_max(N_BINS - 1)
            value = value + weight * middles[index].movedim(-1, 0)
            bound = torch.maximum(bound, halves[index].movedim(-1, 0))
        unit = torch.exp2(self.top.double())
        empty = n == 0
        value = torch.where(empty, torch.nan, torch.minimum(torch.maximum(value * unit, low), high))
        return value, bound * unit

    def _middles(self) -> tuple[Tensor, Tensor]:
        scale, _, low = _geometry(self.table.device)
        half = scale / (2 * BINS_PER_OCTAVE)
        zero = low.new_zeros(1)
        middles = torch.cat([-(low + half).flip(-1), zero, low + half])
        return middles, torch.cat([half.flip(-1), low[:1], half])
