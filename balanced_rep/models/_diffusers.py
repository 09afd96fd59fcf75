"""Diffusers backbones as denoisers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from balanced_rep.models._architectures import CLASSES, architecture, cross_attention_values, find_taps
from balanced_rep.models._checks import check_sigmas
from balanced_rep.models._conditions import expand_rows, n_rows
from balanced_rep.models._edm import _noise_level
from balanced_rep.models._noise import ENCODING, noise
from balanced_rep.models._precondition import Prediction, TimeScale, check_prediction, coefficients, time_scale
from balanced_rep.models._protocol import Tap

__all__ = ["DiffusersDenoiser", "from_diffusers"]


class DiffusersDenoiser(nn.Module):
    """A diffusers backbone, what it predicts turned into the denoised sample; a `Denoiser`.

    Samples are what the network works on: pixels, or latents in its own scale (`encode` makes them from images).

    Attributes:
        net: The network.
        vae: Its autoencoder, if there is one.
        prediction: What the network predicts.
        time: Its time scale.
    """

    def __init__(
        self,
        net: nn.Module,
        time: TimeScale,
        prediction: Prediction,
        *,
        vae: nn.Module | None = None,
        null_condition: Any = None,
        data_range: tuple[float, float] | None = None,
        sample_shape: tuple[int, ...] | None = None,
    ) -> None:
        """Wraps a network; `from_diffusers` finds the arguments.

        Args:
            net: The network, in evaluation mode.
            time: Its time scale.
            prediction: What it predicts.
            vae: Autoencoder.
            null_condition: The condition that stands for none, with a leading dim 1.
            data_range: Of clean samples; default (-1, 1) for pixels, unbounded for latents.
            sample_shape: Of one sample; default: as the network's configuration says.

        Raises:
            ValueError: If the prediction does not belong to the time scale, or the null condition has more than one
                row.
        """
        super().__init__()
        if null_condition is not None and (rows := n_rows(null_condition)) != 1:
            raise ValueError(f"null_condition= must be one condition, with a leading dim 1, got {rows} rows.")
        self._architecture = architecture(net)
        self.net, self.vae, self.time = net, vae, time
        self.prediction: Prediction = prediction
        self.sample_shape = sample_shape or self._architecture.sample_shape(net)
        latent = vae is not None or type(net).__name__ != "UNet2DModel"
        self.data_range = data_range or ((-math.inf, math.inf) if latent else (-1.0, 1.0))
        self._taps = find_taps(net)
        own = self._architecture.null(net)
        self._null = own if null_condition is None else null_condition
        check_prediction(prediction, time)

    @property
    def layers(self) -> Mapping[str, Tap]:
        """Module name -> what is to be heard there."""
        return MappingProxyType(self._taps)

    @property
    def null_condition(self) -> Any:
        """The condition that stands for none, with a leading dim 1; `None` if there is none or it was not given."""
        like = next(self.net.parameters())
        return tree_map(lambda c: _onto(c, like), self._null)

    @property
    def cross_attention_values(self) -> Mapping[str, nn.Module]:
        """Value projections of the cross-attention in the encoder and the middle; empty without."""
        return cross_attention_values(self.net)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Noise levels of the network's first and last time."""
        return self.time.sigma_range

    def forward(self, y: Tensor, sigma: float | Tensor, cond: Any = None) -> Tensor:
        """Denoises a batch.

        Args:
            y: Noisy samples, `(batch, *sample_shape)`.
            sigma: Noise level in the units of the samples: a number, or a tensor `(batch,)`. The values of a tensor are
                not looked at, which would wait for a GPU: one outside `sigma_range` has the time of its nearer end.
            cond: Conditions with a leading dim batch; `None` for the null condition.

        Returns:
            Denoised samples, shape and dtype of `y`.

        Raises:
            ValueError: A number is outside `sigma_range`; samples have another number of channels or dims; a condition
                is needed and not given, given to a network that takes none, is not what the network takes, or not one
                for each sample.
        """
        if not isinstance(sigma, Tensor):
            check_sigmas(type(self).__name__, self, (sigma,))
        level = _noise_level(y, sigma)
        shape = self.sample_shape
        if shape is not None and (y.ndim != len(shape) + 1 or y.shape[1] != shape[0]):  # the sides may differ
            raise ValueError(
                f"This denoiser takes samples (batch, {', '.join(map(str, shape))}), got {tuple(y.shape)}."
            )
        scale, c_skip, c_out = (c.view(-1, *(1,) * (y.ndim - 1)) for c in coefficients(self.prediction, level))
        like = next(self.net.parameters())
        time = self.time.timestep(level).to(torch.promote_types(like.dtype, torch.float32))  # bfloat16 rounds 999
        prediction = self._architecture.call(self.net, (scale * y).to(like.dtype), time, self._condition(cond, len(y)))
        return c_skip * y + c_out * prediction.to(y.dtype)

    def timestep(self, sigma: float) -> float:
        """The network's time at a noise level.

        Args:
            sigma: Noise level in data units.

        Returns:
            The time.

        Raises:
            ValueError: If it is outside `sigma_range`.
        """
        low, high = self.sigma_range
        if not low * (1 - 1e-6) <= sigma <= high * (1 + 1e-6):
            raise ValueError(f"timestep: sigma={sigma:g} is outside what this model was made for, {low:g} to {high:g}.")
        return float(self.time.timestep(torch.tensor([sigma], dtype=torch.float64)))

    def sigma(self, timestep: float) -> float:
        """The noise level at one of the network's times.

        Args:
            timestep: The time; the first one is 0, for a flow a thousandth of its last.

        Returns:
            The noise level in data units.

        Raises:
            ValueError: If there is no such time; says which there are.
        """
        return float(self.time.sigma(torch.tensor([timestep], dtype=torch.float64)))

    @torch.no_grad()
    def encode(self, images: Tensor, *, seed: int | None = None, first: int = 0) -> Tensor:
        """Latents of images, in the scale that the network works on.

        Args:
            images: `(batch, channels, height, width)` in [-1, 1].
            seed: `None` takes the mean of the latent distribution, which is deterministic; a number draws from it, for
                each image by its own number, whatever the batch.
            first: Number of the first image, of those that are encoded in several calls.

        Returns:
            `(batch, *sample_shape)`.

        Raises:
            ValueError: There is no autoencoder, or the images are not floating point, of its channels and in [-1, 1].
        """
        vae: Any = self._vae("encode")
        channels = vae.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise ValueError(
                f"encode: images must be floating point (batch, {channels}, height, width), got {tuple(images.shape)} "
                f"{images.dtype}."
            )
        low, high = (float(images.min()), float(images.max())) if images.numel() else (0.0, 0.0)
        if not -1.05 <= low <= high <= 1.05:
            raise ValueError(
                f"encode: images must lie in [-1, 1], got values from {low:.4g} to {high:.4g}; not rescaled."
            )
        like = next(vae.parameters())
        latent = vae.encode(images.to(like)).latent_dist
        if seed is None:
            z = latent.mode()
        else:
            mean, items = latent.mean, torch.arange(first, first + len(images))
            z = mean + latent.std * noise(items, tuple(mean.shape[1:]), seed=seed, draw=ENCODING, like=mean)
        return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents; the samples themselves where there is no autoencoder.

        Args:
            latents: `(batch, *sample_shape)`.

        Returns:
            `(batch, channels, height, width)`, about [-1, 1].
        """
        if self.vae is None:
            return latents
        vae: Any = self.vae
        like = next(vae.parameters())
        return vae.decode(latents.to(like) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample

    def _vae(self, what: str) -> nn.Module:
        if self.vae is None:
            raise ValueError(f"{what}: this denoiser has no autoencoder; give vae= to from_diffusers.")
        return self.vae

    def _condition(self, cond: Any, n: int) -> Any:
        wanted = self._architecture.cond(self.net)
        if wanted is None:
            if cond is not None:
                raise ValueError("This denoiser is unconditional: call it with cond=None.")
            return None
        if cond is None:
            cond = self._null
            if cond is None:
                raise ValueError(
                    f"This denoiser needs a condition, {wanted}: give cond=, or null_condition= to from_diffusers, for "
                    "Stable Diffusion the embedding of an empty prompt."
                )
            cond = expand_rows(cond, n)
        elif wanted == CLASSES:
            self._check_classes(cond, n, wanted)
        else:
            self._check_prompts(cond, n, wanted)
        like = next(self.net.parameters())
        return tree_map(lambda c: _onto(c, like), cond)

    def _check_classes(self, cond: Any, n: int, wanted: str) -> None:
        whole = isinstance(cond, Tensor) and not cond.is_floating_point() and cond.dtype != torch.bool
        if not whole or cond.shape != (n,):
            got = f"{tuple(cond.shape)} {cond.dtype}" if isinstance(cond, Tensor) else type(cond).__name__
            raise ValueError(f"This denoiser needs a condition, {wanted}, integers for a batch of {n}; got {got}.")
        null = self._architecture.null(self.net)
        if null is None or cond.device.type != "cpu" or not n:  # elsewhere a look at the values would wait
            return
        last, low, high = int(null), int(cond.min()), int(cond.max())
        if low < 0 or high > last:
            raise ValueError(
                f"This denoiser knows the classes 0 to {last - 1}, and {last} for none; got {low} to {high}."
            )

    def _check_prompts(self, cond: Any, n: int, wanted: str) -> None:
        parts = cond if isinstance(cond, Mapping) else {"prompt": cond}
        for name, ndim in self._architecture.parts.items():
            part = parts.get(name)
            if not isinstance(part, Tensor) or part.ndim != ndim:
                kinds = {k: tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__ for k, c in parts.items()}
                got = kinds if isinstance(cond, Mapping) else kinds["prompt"]
                raise ValueError(f"This denoiser needs a condition, {wanted}; got {got}.")
        if (rows := n_rows(cond)) != n:
            raise ValueError(f"This denoiser needs a condition for each of {n} samples, got {rows}: {wanted}.")


def from_diffusers(
    model: Any,
    scheduler: Any = None,
    *,
    vae: Any = None,
    null_condition: Any = None,
    prediction: Prediction | None = None,
    data_range: tuple[float, float] | None = None,
    sample_shape: tuple[int, ...] | None = None,
) -> DiffusersDenoiser:
    """A diffusers network, or pipeline, as a denoiser.

    Args:
        model: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel or
            FluxTransformer2DModel; or a pipeline around one, whose scheduler and autoencoder are taken as well.
        scheduler: The scheduler it was trained with: only its noise levels and what it says of the prediction are read.
        vae: Autoencoder of a latent model.
        null_condition: The condition that stands for none, with a leading dim 1, such as the embedding of an empty
            prompt. DiT has its own.
        prediction: What the network predicts, if the scheduler says it wrongly.
        data_range: Of clean samples; default (-1, 1) for pixels, unbounded for latents.
        sample_shape: Of one sample; default: as the network's configuration says.

    Returns:
        The denoiser, its modules in evaluation mode and shared with `model`.

    Raises:
        TypeError: If the network is of another class, or the scheduler none.
        ValueError: If there is no scheduler, it does not tell the noise levels, or they do not go with what the network
            is said to predict.
    """
    parts = getattr(model, "components", None)
    if isinstance(parts, dict):
        scheduler, vae = scheduler or parts.get("scheduler"), vae or parts.get("vae")
        model = parts.get("unet") or parts.get("transformer")
    if not isinstance(model, nn.Module):
        raise TypeError(f"from_diffusers: a network or a pipeline is needed, got {type(model).__name__}.")
    found = architecture(model)
    if scheduler is None:
        raise ValueError("from_diffusers: give scheduler=: the noise levels that the network was trained with.")
    time, said = time_scale(scheduler, flow_scale=found.flow_scale)
    modules = model.eval(), None if vae is None else vae.eval()
    return DiffusersDenoiser(
        modules[0], time, prediction or said, vae=modules[1], null_condition=null_condition, data_range=data_range,
        sample_shape=sample_shape,
    ).eval()  # fmt: skip


def _onto(c: Any, like: Tensor) -> Any:
    if not isinstance(c, Tensor):
        return c
    return c.to(like.device, like.dtype if c.is_floating_point() else c.dtype)
