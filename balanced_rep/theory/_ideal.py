r"""Denoisers with a closed form: of a training set, and of a Gaussian.

Their Jacobians are covariances: :math:`J_D(y) = \mathrm{Cov}[x \mid y] / \sigma^2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from balanced_rep.models._checks import check_like
from balanced_rep.models._edm import _noise_level
from balanced_rep.models._protocol import Tap
from balanced_rep.theory._clusters import sample_weights
from balanced_rep.theory._data import as_samples

__all__ = ["EmpiricalDenoiser", "GaussianDenoiser"]


class EmpiricalDenoiser(nn.Module):
    r"""The best denoiser of a finite training set, which memorizes it; a `Denoiser` (Equation 3 of the paper).

    .. math::  D(y, \sigma) = \sum_i w_i(y) x_i, \qquad w(y) = \mathrm{softmax}_i(\log m_i - \|y - x_i\|^2 / 2\sigma^2)

    The weights are the output of the submodule `posterior`, so that `record` sees them. Takes ``n d`` products for
    each sample of ``y``.

    Attributes:
        samples: The training set, `(n, d)`.
    """

    samples: Tensor
    centre: Tensor
    bias: Tensor
    log_weights: Tensor

    def __init__(
        self, samples: Tensor, *, weights: Tensor | None = None, data_range: tuple[float, float] = (-1.0, 1.0)
    ) -> None:
        """Takes the training set.

        Args:
            samples: `(n, *sample_shape)`, floating point.
            weights: How often each sample counts, `(n,)`; default: once.
            data_range: Smallest and largest value of a clean sample.
        """
        super().__init__()
        self.sample_shape = tuple(samples.shape[1:])
        X = as_samples(samples.flatten(1) if samples.ndim > 1 else samples)
        centre = X.double().mean(dim=0)  # logits are differences of large numbers: centred and in float64
        self.register_buffer("samples", X.clone())
        self.register_buffer("centre", centre)
        self.register_buffer("bias", (X.double() - centre).square().sum(dim=1) / 2)
        self.register_buffer("log_weights", sample_weights(X, weights).log())
        self.posterior = nn.Softmax(dim=1)
        self.data_range = data_range
        self.sigma_range = (1e-6, math.inf)

    @property
    def layers(self) -> Mapping[str, Tap]:
        """The one tap: the weights of the training samples."""
        n = len(self.samples)
        return MappingProxyType({"posterior": Tap(f"weight of each training sample, (batch, {n})", units=n)})

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
            Denoised samples, shape and dtype of `y`.

        Raises:
            ValueError: `cond` is given, or a shape is wrong.
        """
        if cond is not None:
            raise ValueError("This denoiser is unconditional: call it with cond=None.")
        if tuple(y.shape[1:]) != self.sample_shape:
            raise ValueError(f"Samples of this model have shape (batch, *{self.sample_shape}), got {tuple(y.shape)}.")
        level = _noise_level(y, sigma).double()[:, None]
        X = self.samples.double() - self.centre
        logits = ((y.flatten(1).double() - self.centre) @ X.T - self.bias) / level.square() + self.log_weights
        return (self.posterior(logits) @ X + self.centre).to(y.dtype).reshape(y.shape)


class GaussianDenoiser(nn.Module):
    r"""The best denoiser of Gaussian data, :math:`\mu + \Sigma (\Sigma + \sigma^2 I)^{-1} (y - \mu)`; a `Denoiser`.

    Linear, with a symmetric Jacobian that is known: for checking what works on a denoiser. With a singular covariance
    its local dimension is the rank.
    """

    mean: Tensor
    vectors: Tensor
    values: Tensor

    def __init__(
        self, mean: Tensor, covariance: Tensor, *, data_range: tuple[float, float] = (-math.inf, math.inf)
    ) -> None:
        """Takes the moments of the data.

        Args:
            mean: `(*sample_shape)`, with d entries.
            covariance: `(d, d)`, symmetric, positive semidefinite.
            data_range: Smallest and largest value of a clean sample.

        Raises:
            ValueError: The shapes do not fit, or the covariance is not finite, symmetric and positive semidefinite.
        """
        super().__init__()
        d = mean.numel()
        if covariance.shape != (d, d):
            raise ValueError(f"GaussianDenoiser: covariance must be ({d}, {d}), got {tuple(covariance.shape)}.")
        if not mean.isfinite().all() or not covariance.isfinite().all():
            raise ValueError("GaussianDenoiser: mean and covariance must be finite.")
        values, vectors = torch.linalg.eigh(covariance)
        rounding = 100 * d * torch.finfo(covariance.dtype).eps * values.abs().max()
        if not bool(((covariance - covariance.mT).abs() <= rounding).all()) or not bool((values >= -rounding).all()):
            raise ValueError("GaussianDenoiser: the covariance must be symmetric and positive semidefinite.")
        self.register_buffer("mean", mean.clone())
        self.register_buffer("vectors", vectors)
        self.register_buffer("values", values.clamp_min(0))
        self.project = nn.Identity()
        self.sample_shape = tuple(mean.shape)
        self.data_range = data_range
        self.sigma_range = (1e-6, math.inf)

    @property
    def layers(self) -> Mapping[str, Tap]:
        """The one tap: coordinates along the eigenvectors."""
        text = f"shrunk coordinates along the eigenvectors, (batch, {len(self.values)})"
        return MappingProxyType({"project": Tap(text, units=len(self.values))})

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
            Denoised samples, shape of `y`.

        Raises:
            ValueError: `cond` is given, or a shape, dtype or device is wrong.
        """
        if cond is not None:
            raise ValueError("This denoiser is unconditional: call it with cond=None.")
        if tuple(y.shape[1:]) != self.sample_shape:
            raise ValueError(f"Samples of this model have shape (batch, *{self.sample_shape}), got {tuple(y.shape)}.")
        check_like(y, self.mean)
        variance = _noise_level(y, sigma)[:, None].square()
        coordinates = (y - self.mean).flatten(1) @ self.vectors
        shrunk = self.project(coordinates * (self.values / (self.values + variance)))
        return self.mean + (shrunk @ self.vectors.T).reshape(y.shape)
