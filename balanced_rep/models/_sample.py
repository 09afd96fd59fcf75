r"""Sampling with any `Denoiser`: the probability-flow equation in the noise level.

.. math::  dy / d\sigma = (y - D(y, \sigma)) / \sigma

A step of Euler's method, :math:`y' = D + \frac{\sigma'}{\sigma} (y - D)`, is the DDIM step (eta = 0) in these
coordinates, so that the same lines serve networks of every parametrisation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from balanced_rep.models._checks import check_counts, check_path
from balanced_rep.models._conditions import check_rows, take_rows
from balanced_rep.models._noise import start_noise
from balanced_rep.models._protocol import Denoiser

__all__ = ["PathStep", "denoising_path", "sample", "sigma_schedule"]


@dataclass(frozen=True, eq=False)
class PathStep:
    """A step of sampling.

    Attributes:
        index: Number of the step, from 0.
        sigma: Noise level of ``y``.
        y: Noisy samples, `(batch, *sample_shape)`.
        denoised: What the denoiser makes of them, guidance included.
    """

    index: int
    sigma: float
    y: Tensor
    denoised: Tensor


def sigma_schedule(D: Denoiser, n_steps: int, *, rho: float = 7.0, sigma_max: float | None = None) -> list[float]:
    """Noise levels from the largest of a denoiser to its smallest and 0 (Karras et al. 2022, Equation 5).

    Args:
        D: The denoiser; its `sigma_range` gives the ends.
        n_steps: Number of steps, so that `n_steps + 1` levels are returned.
        rho: Larger values spend more steps on small levels.
        sigma_max: First level, instead of the largest.

    Returns:
        The levels, decreasing, the last one 0.

    Raises:
        ValueError: If `n_steps` is below 1, `rho` is not positive, or the denoiser has no finite largest level and none
            is given.
    """
    check_counts("sigma_schedule", n_steps=n_steps)
    if not 0 < rho < math.inf:
        raise ValueError(f"sigma_schedule: rho must be positive and finite, got {rho}.")
    low, high = D.sigma_range
    high = high if sigma_max is None else sigma_max
    if not math.isfinite(high) or not 0 < low <= high:
        raise ValueError(
            f"sigma_schedule: need 0 < smallest <= largest noise level, both finite, got {low} and {high}; give "
            "sigma_max="
        )
    ends = high ** (1 / rho), low ** (1 / rho)
    steps = max(1, n_steps - 1)
    return [(ends[0] + i / steps * (ends[1] - ends[0])) ** rho for i in range(n_steps)] + [0.0]


def denoising_path(
    D: Denoiser, y: Tensor, sigmas: Sequence[float], *, cond: Any = None, guidance: float = 1.0
) -> Iterator[PathStep]:
    """Walks from noisy samples to clean ones, a step at a time.

    Args:
        D: The denoiser.
        y: Samples at noise level `sigmas[0]`, `(batch, *sample_shape)`.
        sigmas: Decreasing noise levels that the denoiser was made for; the last one may be 0.
        cond: Condition of the samples.
        guidance: Classifier-free guidance: `D(null) + guidance (D(cond) - D(null))`. At 1, or without condition, the
            denoiser is evaluated once per step.

    Returns:
        Iterator over the steps: each before it is taken, and after the last one a step at `sigmas[-1]` with the result
        in both fields.

    Raises:
        ValueError: If the levels do not decrease, or one is outside the denoiser's range; before the first step.
    """
    return _walk(D, y, check_path("denoising_path", D, sigmas), cond, guidance)


@torch.no_grad()
def _walk(D: Denoiser, y: Tensor, sigmas: Sequence[float], cond: Any, guidance: float) -> Iterator[PathStep]:
    for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        denoised = D(y, sigma, cond)
        if cond is not None and guidance != 1:
            plain = D(y, sigma, None)
            denoised = plain + guidance * (denoised - plain)
        yield PathStep(index, sigma, y, denoised)
        y = denoised + following / sigma * (y - denoised)
    yield PathStep(len(sigmas) - 1, sigmas[-1], y, y)


def sample(
    D: Denoiser,
    n: int,
    *,
    n_steps: int = 40,
    sigmas: Sequence[float] | None = None,
    sample_shape: tuple[int, ...] | None = None,
    cond: Any = None,
    guidance: float = 1.0,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Draws samples from noise; sample i is the same for every `n` and `batch_size`, up to rounding.

    Args:
        D: The denoiser.
        n: How many.
        n_steps: Steps of the default schedule.
        sigmas: Noise levels instead.
        sample_shape: Of one sample; default: `D.sample_shape`.
        cond: Conditions, one per sample.
        guidance: See `denoising_path`.
        seed: Of the noise, counter-based.
        first: Number of the first sample: `sample(D, 2, first=3)` continues `sample(D, 3)`.
        batch_size: Samples at once.

    Returns:
        Samples, `(n, *sample_shape)`, on the device and in the dtype of the denoiser.

    Raises:
        ValueError: If the shape of a sample is not known, `sigmas` are not levels of this denoiser, there is not a
            condition for each sample, or a number is out of range.
    """
    if n < 0 or first < 0 or batch_size < 1:
        raise ValueError(
            f"sample: n and first must be at least 0 and batch_size at least 1, got {n}, {first} and {batch_size}."
        )
    shape = sample_shape or getattr(D, "sample_shape", None)
    check_rows("sample", cond, n)
    if shape is None:
        raise ValueError("sample: this denoiser does not say what a sample looks like; give sample_shape=.")
    levels = check_path("sample", D, sigma_schedule(D, n_steps) if sigmas is None else sigmas)
    like = next(iter(D.parameters()), torch.empty(0)) if isinstance(D, torch.nn.Module) else torch.empty(0)
    done = []
    for start in range(0, n, batch_size):
        items = torch.arange(start, min(n, start + batch_size))
        noise = start_noise(len(items), shape, seed=seed, first=first + start, like=like)
        *_, last = denoising_path(D, levels[0] * noise, levels, cond=take_rows(cond, items), guidance=guidance)
        done.append(last.y)
    return torch.cat(done) if done else like.new_empty((0, *shape))
