"""What every denoiser of this package looks like from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Denoiser", "Tap", "taps"]


@dataclass(frozen=True)
class Tap:
    """A representation worth recording.

    Attributes:
        text: What it is, in a sentence.
        at: Whether it is what the module is called with or what it returns.
        kind: Its layout: "features" `(batch, features)`, "map" `(batch, channels, *spatial)` or "tokens"
            `(batch, tokens, features)`.
        units: How many channels or features it has; `None` if that is not known before the model runs.
    """

    text: str
    at: Literal["input", "output"] = "output"
    kind: Literal["features", "map", "tokens"] = "features"
    units: int | None = None

    def __str__(self) -> str:
        return self.text


def taps(layers: Mapping[str, str | Tap]) -> dict[str, Tap]:
    """Layers as taps.

    Args:
        layers: Module name to a tap, or to the text of one that is the module's output and has features only.

    Returns:
        Module name to tap.
    """
    return {name: tap if isinstance(tap, Tap) else Tap(tap) for name, tap in layers.items()}


@runtime_checkable
class Denoiser(Protocol):
    """An estimate of the clean sample behind a noisy one, `D(y, sigma) ~ E[x | x + sigma * noise = y]`.

    The noise model is variance exploding: `y = x + sigma * noise` with standard normal noise, so `sigma` is in the
    units of the data. Adapters for networks trained with another parametrisation convert on the way in and out.

    `isinstance(obj, Denoiser)` checks that the members exist, not what they do.

    Attributes:
        layers: The representations worth recording: name of the module, as in `named_modules()` and thus usable in
            `record(D, [name], at=tap.at)`, to what they are. From the input of the network to its output.
        null_condition: What the network takes for no condition at all, such as the embedding of an empty prompt or
            the null class; `None` if it is unconditional. `cond=None` means this one.
        data_range: Smallest and largest value of a clean sample, e.g. `(-1.0, 1.0)`.
        sigma_range: Noise levels, in data units, between which the denoiser can be trusted.
    """

    @property
    def layers(self) -> Mapping[str, Tap]:
        """Module name -> what is to be heard there."""
        ...

    @property
    def null_condition(self) -> Any:
        """The condition that stands for none; `None` if there are no conditions."""
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
            cond: Whatever the network is conditioned on, a tensor or a mapping of tensors with a leading batch dim;
                `None` for the null condition.

        Returns:
            The denoised samples, shape and units of `y`.
        """
        ...
