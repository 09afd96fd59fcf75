"""What every denoiser of this package looks like from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Denoiser"]


@runtime_checkable
class Denoiser(Protocol):
    """An estimate of the clean sample behind a noisy one, `D(y, sigma) ~ E[x | x + sigma * noise = y]`.

    The noise model is variance exploding: `y = x + sigma * noise` with standard normal noise, so `sigma` is in the
    units of the data. Adapters for networks trained with another parametrisation convert on the way in and out.

    `isinstance(obj, Denoiser)` checks that the members exist, not what they do.

    Attributes:
        layers: The taps worth recording: name of the module, as in `named_modules()` and thus usable in
            `record(D, [name])`, to a sentence on what its output is. From the input of the network to its output.
        data_range: Smallest and largest value of a clean sample, e.g. `(-1.0, 1.0)`.
        sigma_range: Noise levels, in data units, between which the denoiser can be trusted.
    """

    @property
    def layers(self) -> Mapping[str, str]:
        """Name of a tap -> what it is."""
        ...

    @property
    def data_range(self) -> tuple[float, float]:
        """Smallest and largest value of a clean sample."""
        ...

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest noise level the denoiser was made for, in data units."""
        ...

    def __call__(self, y: Tensor, sigma: float | Tensor, cond: Any = None) -> Tensor:
        """Denoises a batch.

        Args:
            y: Noisy samples, `(batch, *sample_shape)`, in data units.
            sigma: Noise level in data units: one number for all, or a tensor `(batch,)`.
            cond: Whatever the network is conditioned on; `None` for none.

        Returns:
            The denoised samples, shape and units of `y`.
        """
        ...
