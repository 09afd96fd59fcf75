"""Networks that come with their EDM preconditioning: `net(x, sigma, class_labels)` returns the denoised sample."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from balanced_rep.models._edm import _noise_level
from balanced_rep.models._protocol import Tap

__all__ = ["EDMNetworkDenoiser", "from_edm"]


class EDMNetworkDenoiser(nn.Module):
    """A preconditioned EDM network as a `Denoiser`; made by `from_edm`.

    Attributes:
        net: The network.
        sample_shape: Shape of one sample.
        label_dim: Number of classes, 0 for an unconditional network.
    """

    def __init__(
        self,
        net: nn.Module,
        sample_shape: tuple[int, ...],
        *,
        sigma_range: tuple[float, float],
        label_dim: int = 0,
        data_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        """Wraps a network.

        Args:
            net: Called as `net(x, sigma, class_labels)` with `sigma` of shape `(batch,)` and one-hot labels.
            sample_shape: Shape of one sample.
            sigma_range: Noise levels it was trained for.
            label_dim: Number of classes, 0 for an unconditional network.
            data_range: Of clean samples.
        """
        super().__init__()
        self.net, self.sample_shape, self.label_dim = net, tuple(sample_shape), label_dim
        self.sigma_range, self.data_range = sigma_range, data_range
        self._taps = {
            f"net.{name}.conv1": Tap(
                f"activation behind the second norm of {name}, (batch, channels, h, w)", "input", "map"
            )
            for name, module in net.named_modules()
            if all(isinstance(getattr(module, part, None), nn.Module) for part in ("norm0", "conv0", "norm1", "conv1"))
        }

    @property
    def layers(self) -> Mapping[str, Tap]:
        """Module name -> what is to be heard there."""
        return MappingProxyType(self._taps)

    @property
    def null_condition(self) -> Tensor | None:
        """All labels zero, `(1, label_dim)`; `None` for an unconditional network."""
        return torch.zeros(1, self.label_dim, device=next(self.net.parameters()).device) if self.label_dim else None

    def forward(self, y: Tensor, sigma: float | Tensor, cond: Any = None) -> Tensor:
        """Denoises a batch.

        Args:
            y: Noisy samples, `(batch, *sample_shape)`.
            sigma: Noise level in data units: a number, or a tensor `(batch,)`.
            cond: Class numbers `(batch,)`, or labels `(batch, label_dim)`; `None` for no class.

        Returns:
            Denoised samples, shape and dtype of `y`.

        Raises:
            ValueError: A condition is given to an unconditional network.
        """
        if cond is not None and not self.label_dim:
            raise ValueError("This denoiser is unconditional: call it with cond=None.")
        labels = None
        if self.label_dim:
            labels = y.new_zeros(len(y), self.label_dim) if cond is None else cond
            if labels.ndim == 1:
                labels = nn.functional.one_hot(labels.long(), self.label_dim)
            labels = labels.to(y)
        return self.net(y, _noise_level(y, sigma), labels).to(y.dtype)


def from_edm(net: Any, *, data_range: tuple[float, float] = (-1.0, 1.0)) -> EDMNetworkDenoiser:
    """An EDM network, preconditioning included, as a denoiser.

    Sizes and noise levels are read from the attributes that such networks carry: `img_channels`, `img_resolution`,
    `label_dim`, `sigma_min`, `sigma_max`. Representations are what the second convolution of each block (a module with
    `norm0`, `conv0`, `norm1`, `conv1`) is called with.

    Args:
        net: The network, with its weights. A published pickle becomes safetensors by `balanced-rep convert`, without
            running what is in it; load them into the network that your own code makes.
        data_range: Of clean samples.

    Returns:
        The denoiser, in evaluation mode.

    Raises:
        TypeError: If the network lacks one of the attributes.
    """
    lacking = [name for name in ("img_channels", "img_resolution", "sigma_min", "sigma_max") if not hasattr(net, name)]
    if lacking or not isinstance(net, nn.Module):
        raise TypeError(
            f"from_edm: {type(net).__name__} has no {', '.join(lacking) or 'modules'}. Wrap a raw network "
            "F(x, c_noise) in EDMDenoiser instead."
        )
    parts: Any = net
    size = parts.img_resolution
    return EDMNetworkDenoiser(
        parts, (parts.img_channels, size, size), label_dim=int(getattr(net, "label_dim", 0)), data_range=data_range,
        sigma_range=(max(float(parts.sigma_min), 2e-3), min(float(parts.sigma_max), 80.0)),
    ).eval()  # fmt: skip
