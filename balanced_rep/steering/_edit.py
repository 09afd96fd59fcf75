"""Editing samples at several strengths: by steering, and by two methods to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from balanced_rep.models import Denoiser, denoising_path, sigma_schedule
from balanced_rep.models._checks import check_images, check_path
from balanced_rep.models._conditions import check_rows, repeat_rows
from balanced_rep.models._noise import noise
from balanced_rep.steering._apply import as_strengths, levels_after, steer, window
from balanced_rep.steering._direction import Direction

__all__ = ["interpolated_samples", "sdedit_samples", "steered_samples"]


def steered_samples(
    D: Denoiser,
    direction: Direction,
    start: Tensor,
    strengths: Sequence[float],
    *,
    n_steps: int = 40,
    sigmas: Sequence[float] | None = None,
    steps: tuple[float, float] = (0.5, 0.95),
    cond: Any = None,
    guidance: float = 1.0,
) -> Tensor:
    """Samples from the same noise with a direction added at each of several strengths; all in one batch.

    Args:
        D: The denoiser.
        direction: What is added.
        start: Standard normal noise, `(n, *sample_shape)`; that of `sample` is `models.start_noise`.
        strengths: S strengths.
        n_steps: Steps of the default schedule.
        sigmas: Noise levels instead.
        steps: Between which fractions of the steps the direction acts; the paper's code takes the last 20 of 40 steps
            but for the last 2.
        cond: Conditions, one for each of the n.
        guidance: See `denoising_path`.

    Returns:
        `(S, n, *sample_shape)`.

    Raises:
        ValueError: If `sigmas` are not levels of this denoiser, no step is within `steps`, the start is not such noise,
            or the strengths are not finite numbers, at least one.
    """
    strengths = as_strengths("steered_samples", strengths)
    _check_batch("steered_samples", "start", D, start)
    check_rows("steered_samples", cond, len(start))
    levels = check_path("steered_samples", D, sigma_schedule(D, n_steps) if sigmas is None else sigmas)
    per_row = torch.as_tensor(strengths, dtype=start.dtype, device=start.device).repeat_interleave(len(start))
    y, many = repeat_rows(start, len(strengths)), repeat_rows(cond, len(strengths))
    with steer(D, direction, window(per_row, *levels_after(levels, steps))):
        *_, last = denoising_path(D, levels[0] * y, levels, cond=many, guidance=guidance)
    return last.y.unflatten(0, (len(strengths), len(start)))


def interpolated_samples(
    D: Denoiser,
    start: Tensor,
    strengths: Sequence[float],
    *,
    cond: Any,
    target: Any,
    n_steps: int = 40,
    sigmas: Sequence[float] | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Samples from the same noise with conditions between two: the baseline of prompt interpolation.

    Args:
        D: The denoiser.
        start: Standard normal noise, `(n, *sample_shape)`.
        strengths: S numbers from 0, the condition, to 1, the target.
        cond: Continuous conditions, one for each of the n.
        target: The conditions to move to, likewise.
        n_steps: Steps of the default schedule.
        sigmas: Noise levels instead.
        guidance: See `denoising_path`.

    Returns:
        `(S, n, *sample_shape)`.

    Raises:
        ValueError: If `sigmas` are not levels of this denoiser, the start is not such noise, the strengths are not
            finite numbers, at least one, or there are not two continuous conditions for each of the n.
    """
    strengths = as_strengths("interpolated_samples", strengths)
    _check_batch("interpolated_samples", "start", D, start)
    levels = check_path("interpolated_samples", D, sigma_schedule(D, n_steps) if sigmas is None else sigmas)
    if cond is None or target is None:
        raise ValueError(
            "interpolated_samples: both cond= and target= are needed; there is nothing between one and none."
        )
    for each in (cond, target):
        check_rows("interpolated_samples", each, len(start))

    def between(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor) or not a.ndim:
            return a
        if not a.is_floating_point():
            raise ValueError("interpolated_samples: classes cannot be interpolated; conditions must be continuous.")
        return torch.cat([torch.lerp(a, b, s) for s in strengths])

    many = tree_map(between, cond, target)
    y = repeat_rows(start, len(strengths))
    *_, last = denoising_path(D, levels[0] * y, levels, cond=many, guidance=guidance)
    return last.y.unflatten(0, (len(strengths), len(start)))


def sdedit_samples(
    D: Denoiser,
    x: Tensor,
    strengths: Sequence[float],
    *,
    cond: Any = None,
    n_steps: int = 40,
    guidance: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Noises given samples and denoises them again: SDEdit (Meng et al., ICLR 2022), the baseline of image editing.

    Args:
        D: The denoiser.
        x: Clean samples, `(n, *sample_shape)`.
        strengths: S numbers from 0, which returns `x`, to 1, which starts from the largest noise level: shares of the
            steps of the schedule that are walked.
        cond: Conditions to denoise with, one for each of the n.
        n_steps: Steps of the whole schedule.
        guidance: See `denoising_path`.
        seed: Of the noise; the same for all strengths.

    Returns:
        `(S, n, *sample_shape)`.

    Raises:
        ValueError: If a strength is not between 0 and 1, there is none, or the samples do not fit the model.
    """
    strengths = as_strengths("sdedit_samples", strengths)
    _check_batch("sdedit_samples", "x", D, x)
    check_images("sdedit_samples", D, x, slack=0.5)  # samples that a model has made overshoot
    check_rows("sdedit_samples", cond, len(x))
    if not all(0 <= s <= 1 for s in strengths):
        raise ValueError(f"sdedit_samples: strengths must be between 0 and 1, got {strengths}.")
    levels = sigma_schedule(D, n_steps)
    e = noise(torch.arange(len(x)), x.shape[1:], seed=seed, draw=0, like=x)
    edited = []
    for strength in strengths:
        rest = levels[len(levels) - 1 - round(strength * n_steps) :]
        if len(rest) == 1:
            edited.append(x)
            continue
        *_, last = denoising_path(D, x + rest[0] * e, rest, cond=cond, guidance=guidance)
        edited.append(last.y)
    return torch.stack(edited)


def _check_batch(what: str, name: str, D: Denoiser, y: Tensor) -> None:
    """A batch of samples: without its leading dim channels would pass for samples."""
    shape = getattr(D, "sample_shape", None)
    ok = isinstance(y, Tensor) and y.is_floating_point() and y.ndim >= 2
    if not ok or (shape is not None and tuple(y.shape[1:]) != tuple(shape)):
        wanted = "*sample_shape" if shape is None else ", ".join(map(str, shape))
        got = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        one = f" For one sample give {name}[None]." if isinstance(y, Tensor) and y.shape == shape else ""
        raise ValueError(f"{what}: {name} must be a floating-point tensor (n, {wanted}), got {got}.{one}")
