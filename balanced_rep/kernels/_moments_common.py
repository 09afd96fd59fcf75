"""What the moments launchers share: the empty result and the exact threshold."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["N_FIELDS", "accumulator", "exact_threshold", "neutral"]

N_FIELDS = 10


def accumulator(dtype: torch.dtype, pool: int) -> torch.dtype:
    """What values are summed in: means of windows, like float64 input, are not rounded to float32."""
    return torch.float64 if dtype == torch.float64 or pool == 2 else torch.float32


def neutral(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Moments of nothing, float64 of the given shape with the fields in front."""
    out = torch.zeros(shape, dtype=torch.float64, device=device)
    out[6], out[7] = math.inf, -math.inf
    return out


def exact_threshold(threshold: float, accumulate: torch.dtype) -> float:
    """The threshold as a number that a conversion to the accumulator leaves alone.

    For float32 it is rounded toward -inf: no float32 lies in between, so v > threshold stays exactly the same question.

    Args:
        threshold: As the caller gave it.
        accumulate: What values are summed in, see :func:`accumulator`.

    Returns:
        The rounded threshold.
    """
    if accumulate != torch.float32 or math.isnan(threshold) or math.isinf(threshold):
        return threshold
    with np.errstate(over="ignore"):
        rounded = np.float32(threshold)
    return float(np.nextafter(rounded, np.float32(-math.inf)) if float(rounded) > threshold else rounded)
