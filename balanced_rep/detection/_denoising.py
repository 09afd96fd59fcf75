"""Denoising error: how far a network brings a noisy sample back."""

from __future__ import annotations

import torch
from torch import Tensor

from balanced_rep.detection._products import at_noise_level
from balanced_rep.detection._score import Batch, Score, register
from balanced_rep.models import Denoiser
from balanced_rep.models._checks import check_counts
from balanced_rep.models._noise import noise

__all__ = ["DenoisingError"]


@register
class DenoisingError(Score):
    """Mean squared error of the denoised sample: small where it is known. A strong baseline that needs no layer."""

    name = "denoising_error"
    formula = "|D(x + sigma e, sigma) - x|^2 / d, mean over draws"
    source = "the training loss; as an attack: Carlini et al., USENIX Security 2023"
    requires = frozenset({"model", "samples", "sigma"})
    direction = "low"
    cost = "one forward pass for each noise level and draw"
    many_sigmas = True

    def __init__(self, n_draws: int = 1):
        """Chooses the effort.

        Args:
            n_draws: Noise draws per sample, averaged.

        Raises:
            ValueError: If it is below 1, or no whole number.
        """
        check_counts(self.name, n_draws=n_draws)
        self.n_draws = n_draws

    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Denoises.

        Args:
            D: The denoiser.
            batch: Samples.

        Returns:
            `(1, sigmas, b)`.
        """
        assert batch.x is not None
        x, errors = batch.x, []
        drawn = [noise(batch.items, x.shape[1:], seed=batch.seed, draw=i, like=x) for i in range(self.n_draws)]
        for sigma in batch.sigmas:
            denoise = at_noise_level(self.name, D, sigma, batch.cond)
            one = [(denoise(x + sigma * e) - x).flatten(1).square().mean(dim=1).double() for e in drawn]
            errors.append(torch.stack(one).mean(dim=0))
            batch.forwards += len(batch) * self.n_draws
        return torch.stack(errors)[None]
