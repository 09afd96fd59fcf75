"""Two-layer autoencoders for many noise levels, which together can be sampled from (Figure 2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from balanced_rep.models import ReLUDAE, Tap
from balanced_rep.models._edm import _noise_level
from balanced_rep.theory._train import train_dae

__all__ = ["DAEFamily", "geometric_levels", "train_family"]


class DAEFamily(nn.Module):
    """A `Denoiser` that uses, at each noise level, the autoencoder that was made for the nearest one.

    The representation of the one in use is the output of the submodule `act`.
    """

    def __init__(self, models: Sequence[ReLUDAE]) -> None:
        """Takes the autoencoders.

        Args:
            models: At least one, of one sample shape and number of units, for different noise levels.

        Raises:
            ValueError: If there is none, or shapes differ.
        """
        super().__init__()
        shapes = {(m.sample_shape, m.W1.shape) for m in models}
        if len(shapes) != 1 or len({m.sigma for m in models}) != len(models):
            raise ValueError(
                "DAEFamily: needs autoencoders of one sample shape and number of units for different noise levels, at "
                "least one."
            )
        self.members = nn.ModuleList(sorted(models, key=lambda m: m.sigma))
        self.sample_shape, self.data_range = models[0].sample_shape, models[0].data_range
        self.sigmas = [m.sigma for m in sorted(models, key=lambda m: m.sigma)]
        self.sigma_range = (self.sigmas[0], self.sigmas[-1])
        self.act = nn.Identity()

    @property
    def layers(self) -> Mapping[str, Tap]:
        """The one tap: the hidden layer of the autoencoder in use."""
        units = self._member(0).W1.shape[1]
        text = f"hidden representation of the autoencoder for the noise level, (batch, {units})"
        return {"act": Tap(text, units=units)}

    @property
    def null_condition(self) -> None:
        """There are no conditions."""
        return None

    def forward(self, y: Tensor, sigma: float | Tensor, cond: Any = None) -> Tensor:
        """Denoises a batch.

        Args:
            y: Noisy samples, `(batch, *sample_shape)`.
            sigma: Noise level: a number, or a tensor `(batch,)`.
            cond: Only `None`.

        Returns:
            Denoised samples.

        Raises:
            ValueError: A condition is given.
        """
        if cond is not None:
            raise ValueError("This denoiser is unconditional: call it with cond=None.")
        levels = _noise_level(y, sigma).double().log()
        table = torch.tensor(self.sigmas, dtype=torch.float64, device=y.device).log()
        nearest = (levels[:, None] - table).abs().argmin(dim=1)
        rows = [(self._member(i), (nearest == i).nonzero().flatten()) for i in nearest.unique().tolist()]
        order = torch.cat([index for _, index in rows]).argsort() if rows else nearest
        h = self.act(torch.cat([m.represent(y[index]) for m, index in rows])[order] if rows else y.flatten(1))
        parts = [(h[index] @ m.W2.T).reshape(-1, *self.sample_shape) for m, index in rows]
        return torch.cat(parts)[order] if rows else y

    def _member(self, i: int) -> ReLUDAE:
        return cast(ReLUDAE, self.members[i])


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

    Raises:
        ValueError: If these are no positive levels in order, or n is below 1.
    """
    if n < 1 or not 0 < low <= high < math.inf:
        raise ValueError(f"geometric_levels: need 0 < low <= high, both finite, and n >= 1, got {low}, {high} and {n}.")
    return [high * (low / high) ** (i / max(1, n - 1)) for i in range(n)] + [0.0]
