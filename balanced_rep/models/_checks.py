"""Checks of what an analysis is asked to look at, with messages that say what to do."""

from __future__ import annotations

import inspect
import itertools
import operator
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from balanced_rep.models._protocol import Denoiser
from balanced_rep.stats._record_layers import near_names

__all__ = [
    "check_counts", "check_denoised", "check_denoiser", "check_device", "check_images", "check_like", "check_path",
    "check_sigmas", "resolve_layers",
]  # fmt: skip

SLACK = 0.05  # of the data range: codecs and resampling overshoot a little


def check_denoiser(what: str, D: object) -> None:
    """Checks that a model looks like a `Denoiser` and is called like one.

    Args:
        what: Beginning of messages.
        D: The model.

    Raises:
        TypeError: If it does not; says what is missing.
    """
    wrap = "A network that predicts noise or velocity is wrapped by an adapter of balanced_rep.models; see `Denoiser`."
    name = type(D).__name__
    if not isinstance(D, Denoiser):
        lacking = [m for m in ("layers", "null_condition", "data_range", "sigma_range") if not hasattr(D, m)]
        raise TypeError(f"{what}: {name} is no denoiser: it has no {', '.join(lacking) or 'call'}. {wrap}")
    signature = inspect.signature(D.forward if isinstance(D, nn.Module) else D.__call__)
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise TypeError(f"{what}: {name} is called as {signature}, a denoiser as (y, sigma, cond). {wrap}") from error
    if [p for p in signature.parameters.values() if p.name in ("timestep", "timesteps", "t")]:
        raise TypeError(f"{what}: {name} is called as {signature} with a timestep, a denoiser with sigma. {wrap}")


def check_device(what: str, device: torch.device | str) -> None:
    """Checks that a device is there, by making a tensor on it.

    Args:
        what: Beginning of messages.
        device: The device.

    Raises:
        ValueError: If torch cannot use it; says why, as torch does.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError says that torch was built without CUDA
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"{what}: the device {str(device)!r} cannot be used here: {reason} (torch {torch.__version__}). Give cpu, "
            "or install a torch that was built for it."
        ) from error


def check_counts(what: str, **counts: Any) -> None:
    """Checks numbers of things, such as of samples at once: those of numpy and torch, too.

    Args:
        what: Beginning of messages.
        **counts: Name to number.

    Raises:
        ValueError: If one is no whole number, or below 1.
    """
    for name, count in counts.items():
        try:
            number = operator.index(count)
        except TypeError:
            number = 0
        if number < 1:
            raise ValueError(f"{what}: {name} must be at least 1, a whole number, got {count!r}.")


def check_like(y: Tensor, weight: Tensor) -> None:
    """Checks that samples go with the weights of a network that converts nothing itself.

    Args:
        y: Samples.
        weight: A weight.

    Raises:
        ValueError: If dtype or device differ; torch would only say that a product of matrices is not possible.
    """
    differ = y.dtype != weight.dtype and not torch.is_autocast_enabled(y.device.type)
    if differ or y.device != weight.device:
        raise ValueError(
            f"Samples are {y.dtype} on {y.device}, the weights of this model {weight.dtype} on {weight.device}. "
            f"Convert the samples, .to({str(weight.device)!r}, {weight.dtype}), or the model."
        )


def check_denoised(what: str, D: object, y: Tensor, denoised: object) -> None:
    """Checks what a denoiser returned: a result of another shape would be spread over the samples.

    Args:
        what: Beginning of messages.
        D: The denoiser.
        y: What it was called with.
        denoised: What it returned.

    Raises:
        TypeError: If that is no tensor.
        ValueError: If it has another shape.
    """
    if not isinstance(denoised, Tensor):
        raise TypeError(f"{what}: {type(D).__name__} returned {type(denoised).__name__}, a denoiser returns a tensor.")
    if denoised.shape != y.shape:
        raise ValueError(
            f"{what}: {type(D).__name__} returned {tuple(denoised.shape)} for samples {tuple(y.shape)}; a denoiser "
            "returns one denoised sample for each, of the same shape."
        )


def _moves_itself(D: nn.Module) -> bool:
    """Whether hooks of accelerate move weights or samples during a call: where they are before it says nothing."""
    return any(hasattr(module, "_hf_hook") for module in D.modules())


def check_images(what: str, D: Denoiser, x: Tensor, *, slack: float = SLACK) -> None:
    """Checks samples against a denoiser; nothing is rescaled.

    Args:
        what: Beginning of messages.
        D: The denoiser.
        x: `(n, *sample_shape)`.
        slack: How far samples may leave the data range, as a share of it.

    Raises:
        ValueError: If dtype, device, shape or range is wrong.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{what}: samples must be a floating-point tensor (n, *sample_shape), got {got}.")
    shape = getattr(D, "sample_shape", None)
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        latent = hasattr(D, "encode") and getattr(D, "vae", D) is not None  # a network on pixels has nothing to encode
        encode = " Encode images first: D.encode(images)." if latent else ""
        raise ValueError(
            f"{what}: this model takes samples of shape (n, {', '.join(map(str, shape))}), got {tuple(x.shape)}; they "
            f"are not resized.{encode}"
        )
    weight = None if not isinstance(D, nn.Module) or _moves_itself(D) else next(D.parameters(), None)
    if weight is not None and weight.device != x.device:
        raise ValueError(f"{what}: samples are on {x.device} and the model on {weight.device}; move one of them.")
    if not x.numel():
        return
    low, high = D.data_range
    least, most = float(x.min()), float(x.max())  # NaN compares false and is found by the score
    beyond = slack * (high - low)
    if least < low - beyond or most > high + beyond:
        raise ValueError(
            f"{what}: samples run from {least:.4g} to {most:.4g}, those of this model from {low:g} to {high:g}; they "
            "are not rescaled. Rescale them to that range."
        )
    if low < 0 and least >= 0 and most <= 1 and x.numel() >= 1024 and len(x) >= 4:
        warnings.warn(
            f"{what}: all samples lie between 0 and 1, those of this model between {low:g} and {high:g}: is a factor "
            "missing?",
            UserWarning,
            stacklevel=4,
        )


def check_sigmas(what: str, D: Denoiser, sigmas: Sequence[float]) -> tuple[float, ...]:
    """Checks noise levels.

    Args:
        what: Beginning of messages.
        D: The denoiser.
        sigmas: Noise levels in data units; 0 stands for none and passes.

    Returns:
        The levels.

    Raises:
        ValueError: If one is outside the denoiser's range or NaN, or there is none.
        TypeError: If one is no number.
    """
    if not len(sigmas):
        raise ValueError(f"{what}: no noise level is given.")
    low, high = D.sigma_range
    for sigma in sigmas:
        if not isinstance(sigma, Real) and not (isinstance(sigma, Tensor) and sigma.numel() == 1):
            raise TypeError(f"{what}: a noise level is one number for all samples, got {sigma!r}.")
        if sigma and not low * (1 - 1e-6) <= sigma <= high * (1 + 1e-6):
            raise ValueError(
                f"{what}: sigma={float(sigma):g} is outside what this model was made for, {low:g} to {high:g} in data "
                "units."
            )
    return tuple(sigmas)


def check_path(what: str, D: Denoiser, sigmas: Sequence[float]) -> tuple[float, ...]:
    """Checks the noise levels of a walk from noise to samples.

    Args:
        what: Beginning of messages.
        D: The denoiser.
        sigmas: Noise levels in data units.

    Returns:
        The levels.

    Raises:
        ValueError: If they do not decrease, or one but the last is outside the denoiser's range.
        TypeError: If they are no sequence of numbers.
    """
    if not isinstance(sigmas, Iterable):
        raise TypeError(f"{what}: noise levels must be a sequence of numbers, got {sigmas!r}.")
    levels = check_sigmas(what, D, tuple(float(s) for s in sigmas))
    if not levels[0] or not all(a > b for a, b in itertools.pairwise(levels)):
        shown = ", ".join(f"{s:g}" for s in levels[:8]) + (", ..." if len(levels) > 8 else "")
        raise ValueError(f"{what}: noise levels must decrease, and only the last one may be 0; got {shown}.")
    return levels


def resolve_layers(what: str, D: Denoiser, layers: str | Sequence[str] | None) -> tuple[str, ...]:
    """Finds the layers to look at.

    Args:
        what: Beginning of messages.
        D: The denoiser.
        layers: Names from `D.layers`; `None` for all of them.

    Returns:
        The names.

    Raises:
        ValueError: If a name is not in `D.layers` or given twice, or there is none.
        TypeError: If the denoiser is no module, so that nothing can be listened to; or a name is no text.
    """
    if not isinstance(D, nn.Module):
        raise TypeError(f"{what}: {type(D).__name__} is no torch.nn.Module: its layers cannot be listened to.")
    known = list(D.layers)
    given = known if layers is None else [layers] if isinstance(layers, str) else layers
    names = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what}: layers must be a name or a sequence of names, got {layers!r}.")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"{what}: layer {twice[0]!r} is given twice.")
    for name in names:
        if name not in known:
            near = near_names(name, known) or known[-3:]
            there = ", a module without a label," if name in dict(D.named_modules()) else ""
            raise ValueError(
                f"{what}: {name!r}{there} is not among the layers that this model labels; such as {', '.join(near)}. "
                "D.layers lists them with what they are."
            )
    if not names:
        why = "this model labels no layers" if not known else "no layer is given; layers=None takes all"
        raise ValueError(f"{what}: {why}.")
    return tuple(names)
