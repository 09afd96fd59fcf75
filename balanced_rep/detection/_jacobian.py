r"""Scores from the Jacobian of the denoiser in the sample: its norm, its rank, and the local dimension.

In the units of the data the score function is :math:`s(y) = (D(y) - y) / \sigma^2`, and its Jacobian
:math:`(J_D - I) / \sigma^2`. Networks of other parametrisations get here by their adapter.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from balanced_rep.detection._products import at_noise_level, jacobian, products
from balanced_rep.detection._score import Batch, Score, register
from balanced_rep.linalg import jacobian_spectrum
from balanced_rep.models import Denoiser
from balanced_rep.models._checks import check_counts
from balanced_rep.models._conditions import take_rows
from balanced_rep.models._noise import noise

__all__ = ["FLIPD", "JacobianNorm", "JacobianRank"]

DENSE = 4096  # entries of a sample up to which whole Jacobians are taken


def _point(batch: Batch, noisy: bool) -> Tensor:
    assert batch.x is not None
    if not noisy:
        return batch.x
    return batch.x + batch.sigmas[0] * noise(batch.items, batch.x.shape[1:], seed=batch.seed, draw=0, like=batch.x)


@register
class JacobianNorm(Score):
    """Squared Frobenius norm of the denoiser's Jacobian: small where every direction is denoised away."""

    name = "jacobian_norm"
    formula = "|J_D(x + sigma e)|_F^2"
    source = "Zhang et al., ICLR 2026, Appendix B.3 (spectra); Hutchinson's estimate"
    requires = frozenset({"model", "samples", "sigma"})
    direction = "low"
    cost = "n_probes Jacobian-vector products, and a forward pass for every sixteen of them"

    def __init__(self, n_probes: int = 64, noisy: bool = True):
        """Chooses the effort.

        Args:
            n_probes: Random probes; exact from unit vectors if a sample has no more entries.
            noisy: Take the Jacobian at the noisy sample instead of the clean one.

        Raises:
            ValueError: If `n_probes` is below 1.
        """
        check_counts(self.name, n_probes=n_probes)
        self.n_probes, self.noisy = n_probes, noisy

    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Sums squared products.

        Args:
            D: The denoiser.
            batch: Samples.

        Returns:
            `(b,)`.
        """
        total = torch.zeros(len(batch), dtype=torch.float64)
        point = _point(batch, self.noisy)
        denoise = at_noise_level(self.name, D, batch.sigmas[0], batch.cond)
        for p in products(denoise, point, self.n_probes, seed=batch.seed):
            total += p.weight * p.images.double().square().sum(dim=(0, 2)).cpu()
            batch.forwards += len(batch)
            batch.tangents += len(batch) * len(p.directions)
        return total


@register
class JacobianRank(Score):
    """Rank of the denoiser's Jacobian: effective, from all singular values, or stable, from the leading ones."""

    name = "jacobian_rank"
    formula = "(sum_i s_i)^2 / sum_i s_i^2, or sum_i s_i^2 / s_1^2; s = singular values of J_D(x + sigma e)"
    source = "Zhang et al., ICLR 2026, Appendix B.3"
    requires = frozenset({"model", "samples", "sigma"})
    direction = "low"
    cost = "a Jacobian-vector product for each entry of a sample; for the stable rank, some tens of them"

    def __init__(self, kind: Literal["effective", "stable"] = "effective", n_probes: int = 32, noisy: bool = True):
        """Chooses the rank and the point.

        Args:
            kind: "effective" takes whole Jacobians, of samples with up to 4096 entries; "stable" the leading singular
                value and an estimate of the norm, of samples of any size.
            n_probes: Random probes for the norm of the stable rank.
            noisy: Take the Jacobian at the noisy sample instead of the clean one.

        Raises:
            ValueError: If `kind` is neither, or `n_probes` below 2.
        """
        if kind not in ("effective", "stable") or n_probes < 2:
            raise ValueError(
                f"jacobian_rank: kind must be 'effective' or 'stable' and n_probes >= 2, got {kind!r}, {n_probes}."
            )
        check_counts(self.name, n_probes=n_probes)
        self.kind, self.n_probes, self.noisy = kind, n_probes, noisy

    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Takes whole Jacobians.

        Args:
            D: The denoiser.
            batch: Samples.

        Returns:
            `(b,)`.

        Raises:
            ValueError: If samples have more entries than whole Jacobians are taken of.
        """
        point = _point(batch, self.noisy)
        if self.kind == "stable":
            return self._stable(D, batch, point)
        n = point[0].numel()
        if n > DENSE:
            raise ValueError(f"jacobian_rank: samples have {n} entries, more than {DENSE}; take kind='stable'.")
        J = jacobian(at_noise_level(self.name, D, batch.sigmas[0], batch.cond), point).double()
        batch.forwards += len(batch) * -(-n // 16)
        batch.tangents += len(batch) * n
        finite = J.isfinite().flatten(1).all(dim=1)
        s = torch.linalg.svdvals(J.where(finite[:, None, None], 0.0))
        return (s.sum(dim=1).square() / s.square().sum(dim=1)).where(finite, torch.nan)

    def _stable(self, D: Denoiser, batch: Batch, point: Tensor) -> Tensor:
        sigma = batch.sigmas[0]
        finite = at_noise_level(self.name, D, sigma, batch.cond)(point).isfinite().flatten(1).all(dim=1)
        batch.forwards += len(batch)
        if not finite.any():
            return torch.full((len(batch),), torch.nan, dtype=torch.float64)
        # One sample that is not finite would stop the others: another one stands in for it, and its rank is left out.
        rows = torch.arange(len(batch), device=finite.device).where(finite, finite.nonzero()[0])
        denoise = at_noise_level(self.name, D, sigma, take_rows(batch.cond, rows))
        found = jacobian_spectrum(denoise, point[rows], 1, batch=True, n_probes=self.n_probes, seed=batch.seed)
        info = found.svd.info
        rounds, columns = (torch.as_tensor(v, dtype=torch.float64).mean() for v in (info.rounds, info.passes))
        batch.forwards += len(batch) * (float(rounds) + -(-self.n_probes // 8))
        batch.tangents += len(batch) * (float(columns) + self.n_probes)
        return found.stable_rank.double().where(finite, torch.nan)


@register
class FLIPD(Score):
    r"""Local intrinsic dimension at a sample: small where the model has collapsed around it.

    :math:`d + \sigma^2 \mathrm{tr} \nabla s + \sigma^2 |s|^2`, which is
    :math:`\mathrm{tr} J_D + |D(x) - x|^2 / \sigma^2`.
    """

    name = "flipd"
    formula = "tr J_D(x, sigma) + |D(x, sigma) - x|^2 / sigma^2"
    source = "Kamkari et al., NeurIPS 2024; as a memorization score Ross et al., ICLR 2025"
    requires = frozenset({"model", "samples", "sigma"})
    direction = "low"
    cost = "n_probes Jacobian-vector products, and a forward pass for every sixteen of them"

    def __init__(self, n_probes: int = 16):
        """Chooses the effort.

        Args:
            n_probes: Random probes for the trace; exact from unit vectors if a sample has no more entries.

        Raises:
            ValueError: If it is below 1.
        """
        check_counts(self.name, n_probes=n_probes)
        self.n_probes = n_probes

    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Estimates the trace.

        Args:
            D: The denoiser.
            batch: Samples; no noise is added.

        Returns:
            `(b,)`.
        """
        assert batch.x is not None
        x, sigma = batch.x, batch.sigmas[0]
        trace = torch.zeros(len(batch), dtype=torch.float64)
        error = trace
        for p in products(at_noise_level(self.name, D, sigma, batch.cond), x, self.n_probes, seed=batch.seed):
            trace = trace + p.weight * torch.einsum("kbn,kn->b", p.images.double(), p.directions.double()).cpu()
            error = (p.value - x.flatten(1)).double().square().sum(dim=1).cpu()
            batch.forwards += len(batch)
            batch.tangents += len(batch) * len(p.directions)
        return trace + error / sigma**2
