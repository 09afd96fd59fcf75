"""Noise that belongs to a sample: keyed by seed, the sample's number and the draw, whatever the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from balanced_rep.ops import philox_normal

__all__ = ["ENCODING", "noise", "start_noise"]

DRAW_SHIFT = 40  # bits for the number of a sample
SAMPLING = 1 << 20  # draw that samples start from, above those of the analyses: a sample meets its own noise nowhere
ENCODING = SAMPLING + 1  # draw of an autoencoder's latents


def noise(items: Tensor, shape: tuple[int, ...], *, seed: int, draw: int, like: Tensor) -> Tensor:
    """Standard normal noise.

    Args:
        items: Number of each sample, `(b,)` int64.
        shape: Of one sample.
        seed: Key.
        draw: Number of the draw, from 0.
        like: Gives dtype and device.

    Returns:
        `(b, *shape)`.
    """
    keys = items.to(like.device) + (draw << DRAW_SHIFT)
    drawn = philox_normal(keys, math.prod(shape), seed=seed)
    return drawn.to(like.dtype if like.is_floating_point() else torch.float32).reshape(len(items), *shape)


def start_noise(n: int, shape: tuple[int, ...], *, seed: int = 0, first: int = 0, like: Tensor | None = None) -> Tensor:
    """The standard normal noise that `sample` starts from; independent of all noise that scores and edits draw.

    Args:
        n: How many.
        shape: Of one sample.
        seed: As that of `sample`.
        first: Number of the first sample.
        like: Gives dtype and device; default: float32 on the CPU.

    Returns:
        `(n, *shape)`.
    """
    like = torch.empty(0) if like is None else like
    return noise(torch.arange(first, first + n), shape, seed=seed, draw=SAMPLING, like=like)
