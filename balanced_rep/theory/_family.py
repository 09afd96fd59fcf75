"""Two-layer autoencoders for many noise levels, which together can be sampled from (Figure 2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from balanced_rep.models import ReLUDAE, Tap
from balanced_rep.theory._train import train_dae

__all__ = ["DAEFamily", "geometric_levels", "train_family"]


class DAEFamily(nn.Module):
    """A `Denoiser` that uses, at each noise level, the autoencoder that was made for the nearest one."""

    def __init__(self, models: Sequence[ReLUDAE]) -> None:
        """Takes the autoencoders.

        Args:
            models: At least one, of one sample shape, for different noise levels.

        Raises:
            ValueError: If there is none, or shapes differ.
        """
        super().__init__()
        if not models or len({m.sample_shape for m in models}) != 1 or len({m.sigma for m in models}) != len(models):
            raise ValueError(
                "DAEFamily: needs autoencoders of one sample shape for different noise levels, at least one."
            )
        self.members = nn.ModuleList(sorted(models, key=lambda m: m.sigma))
        self.sample_shape, self.data_range = models[0].sample_shape, models[0].data_range
        self.sigmas = [m.sigma for m in sorted(models, key=lambda m: m.sigma)]
        self.sigma_range = (self.sigmas[0], self.sigmas[-1])

    @property
    def layers(self) -> Mapping[str, Tap]:
        """The hidden layer of each autoencoder; only that of the one in use is run."""
        units = [m.W1.shape[1] for m in self.members]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
        return {
            f"members.{i}.act": Tap(f"hidden representation at sigma {s:g}, (batch, {units[i]})")
            for i, s in enumerate(self.sigmas)
        }

    @property
    def null_condition(self) -> None:
        """There are no conditions."""
        return None

    def forward(self, y: Tensor, sigma: float | Tensor, cond: Any = None) -> Tensor:
        """Denoises a batch of one noise level.

        Args:
            y: Noisy samples, `(batch, *sample_shape)`.
            sigma: Their noise level: a number, or a tensor of equal ones.
            cond: Only `None`.

        Returns:
            Denoised samples.

        Raises:
            ValueError: Noise levels of the batch differ.
        """
        if isinstance(sigma, Tensor):
            if sigma.numel() > 1 and not bool((sigma == sigma.flatten()[0]).all()):
                raise ValueError("DAEFamily: one noise level per call; each has an autoencoder of its own.")
            sigma = float(sigma.flatten()[0])
        nearest = min(range(len(self.sigmas)), key=lambda i: abs(math.log(self.sigmas[i] / sigma)))
        return self.members[nearest](y, sigma, cond)


def train_family(
    X: Tensor,
    p: int,
    sigmas: Sequence[float],
    *,
    lam: float,
    on_model: Callable[[int], None] | None = None,
    **options: Any,
) -> DAEFamily:
    """Trains an autoencoder for each of several noise levels.

    Args:
        X: Samples, `(n, d)`.
        p: Hidden units.
        sigmas: Noise levels.
        lam: Penalty.
        on_model: Called with the number of models that are done.
        **options: Of `train_dae`.

    Returns:
        The family, ready to be sampled from.
    """
    models = []
    for sigma in sigmas:
        models.append(train_dae(X, p, sigma=sigma, lam=lam, **options).model)
        if on_model is not None:
            on_model(len(models))
    return DAEFamily(models)


def geometric_levels(low: float, high: float, n: int) -> list[float]:
    """Noise levels in equal ratios, decreasing, with a final 0.

    Args:
        low: Smallest level.
        high: Largest level.
        n: Number of positive ones.

    Returns:
        `n + 1` levels.
    """
    return [high * (low / high) ** (i / max(1, n - 1)) for i in range(n)] + [0.0]
