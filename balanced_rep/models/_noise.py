"""Noise that belongs to a sample: keyed by seed, the sample's number and the draw, whatever the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from balanced_rep.ops import philox_normal

__all__ = ["noise"]

DRAW_SHIFT = 40  # bits for the number of a sample


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
