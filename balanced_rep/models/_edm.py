"""EDM preconditioning: a raw network becomes a denoiser in data units (Karras et al. 2022, Table 1, column "Ours").

    D(y, sigma) = c_skip y + c_out F(c_in y, c_noise)

    c_skip = s^2 / (sigma^2 + s^2)              c_in    = 1 / sqrt(sigma^2 + s^2)
    c_out  = sigma s / sqrt(sigma^2 + s^2)      c_noise = ln(sigma) / 4

with `s = sigma_data`, the standard deviation of the data. The inputs of F have unit variance at every noise level, and
so have the targets it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from balanced_rep.models._protocol import Tap, taps

__all__ = ["EDMDenoiser", "edm_loss"]


class EDMDenoiser(nn.Module):
    """A network `net(x, c_noise)` with EDM preconditioning around it.

    The network is the submodule `net`, so its layers are recorded under names that start with `net.`.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        sigma_data: float = 0.5,
        layers: Mapping[str, str | Tap] | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
        sigma_range: tuple[float, float] = (0.002, 80.0),
    ) -> None:
        """Wraps a network.

        Args:
            net: Called as `net(x, c_noise)` with `x` of shape `(batch, *sample_shape)` and `c_noise` of shape
                `(batch,)`; returns the shape of `x`.
            sigma_data: Standard deviation of the data, in data units.
            layers: The taps, see `Denoiser.layers`.
            data_range: Smallest and largest value of a clean sample.
            sigma_range: Noise levels the network was trained for.

        Raises:
            ValueError: `sigma_data` is not positive, a range is reversed, or `layers` names a module that is not there.
        """
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"EDMDenoiser: sigma_data must be positive, got {sigma_data}.")
        if not data_range[0] < data_range[1] or not 0 <= sigma_range[0] <= sigma_range[1]:
            raise ValueError(
                f"EDMDenoiser: ranges go from the smallest to the largest, got {data_range} and {sigma_range}."
            )
        self.net = net
        self.sigma_data = float(sigma_data)
        self.data_range = data_range
        self.sigma_range = sigma_range
        self._layers = taps(layers or {})
        missing = sorted(self._layers.keys() - dict(self.named_modules()).keys())
        if missing:
            raise ValueError(f"EDMDenoiser: layers names modules that do not exist: {missing}.")

    @property
    def layers(self) -> Mapping[str, Tap]:
        """Module name -> what is to be heard there."""
        return MappingProxyType(self._layers)

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample, if the network has one and says so."""
        return getattr(self.net, "sample_shape", None)

    @property
    def null_condition(self) -> None:
        """There are no conditions."""
        return None

    def forward(self, y: Tensor, sigma: float | Tensor, cond: Any = None) -> Tensor:
        """Denoises a batch.

        Args:
            y: Noisy samples, `(batch, *sample_shape)`, in data units.
            sigma: Noise level in data units: one positive number, or a tensor `()`, `(1,)` or `(batch,)`.
            cond: Only `None`: this denoiser is unconditional.

        Returns:
            Denoised samples, shape and dtype of `y`.

        Raises:
            ValueError: `cond` is given, or `sigma` is not positive or has the wrong shape.
        """
        if cond is not None:
            raise ValueError("This denoiser is unconditional: call it with cond=None.")
        level = _noise_level(y, sigma)  # (batch,)
        s2 = self.sigma_data**2
        wide = level.view(-1, *(1,) * (y.ndim - 1))  # (batch, 1, ...)
        total = wide.square() + s2
        c_skip = s2 / total
        c_out = wide * self.sigma_data * total.rsqrt()
        return c_skip * y + c_out * self.net(y * total.rsqrt(), level.log() / 4)

    def extra_repr(self) -> str:
        """Adds the constants to `repr`.

        Returns:
            The constants as text.
        """
        return f"sigma_data={self.sigma_data}, data_range={self.data_range}, sigma_range={self.sigma_range}"


def _noise_level(y: Tensor, sigma: float | Tensor) -> Tensor:
    """The noise level of every sample, `(batch,)`, on the device and in the dtype of `y`."""
    if y.ndim < 2 or not y.is_floating_point():
        raise ValueError(
            f"A denoiser takes floating-point samples (batch, *sample_shape), got {tuple(y.shape)} {y.dtype}."
        )
    if isinstance(sigma, Tensor):  # values are not checked: that would wait for the device
        if sigma.ndim > 1 or sigma.numel() not in (1, y.shape[0]):
            raise ValueError(f"sigma must be a number or have shape ({y.shape[0]},), got {tuple(sigma.shape)}.")
        return sigma.to(y).reshape(-1).expand(y.shape[0])
    if not isinstance(sigma, Real):
        raise TypeError(f"sigma must be a number or a tensor (batch,), got {type(sigma).__name__}.")
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}.")
    if sigma == math.inf:
        raise ValueError(f"sigma must be finite, got {sigma}.")
    return torch.full((y.shape[0],), float(sigma), dtype=y.dtype, device=y.device)


def edm_loss(denoiser: EDMDenoiser, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Denoising loss with the weight that gives every noise level the same share at the start of training.

    `mean over batch and entries of (sigma^2 + s^2) / (sigma s)^2 * (D(x + sigma noise, sigma) - x)^2`

    Args:
        denoiser: The denoiser to train.
        x: Clean samples, `(batch, *sample_shape)`.
        sigma: Noise levels in data units, `(batch,)`.
        noise: Standard normal noise, shape of `x`.

    Returns:
        The loss, a scalar. About 1 for an untrained network that returns zero on data of standard deviation `s`.
    """
    s2 = denoiser.sigma_data**2
    wide = sigma.view(-1, *(1,) * (x.ndim - 1))  # (batch, 1, ...)
    weight = (wide.square() + s2) / (wide.square() * s2)
    return (weight * (denoiser(x + wide * noise, sigma) - x).square()).mean()
