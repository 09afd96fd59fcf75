"""Pairwise merge of moment states, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_moments"]


def merge_moments(a: Tensor, b: Tensor) -> Tensor:
    """State ``(10, *shape)`` of two samples together.

    Central moments by the pairwise update of Pebay (SAND2008-6212, 2008); a sample with NaN or infinite values keeps
    the IEEE value of its mean and NaN moments, as one read of both samples would give.

    Args:
        a: State of one sample, fields as in :data:`balanced_rep.ops.moments.FIELDS`.
        b: State of the other.

    Returns:
        State of both.
    """
    na, ma, a2, a3, a4 = a[:5].unbind(0)
    nb, mb, b2, b3, b4 = b[:5].unbind(0)
    n = na + nb
    # With nothing on one side the weights are 0 and 1 and every correction vanishes.
    ra, rb = na / n.clamp_min(1), nb / n.clamp_min(1)
    d = torch.where((na > 0) & (nb > 0), mb - ma, 0.0)
    finite = d.isfinite()
    mean = torch.where(na == 0, mb, torch.where(finite, ma + d * rb, ma + mb))
    d = torch.where(finite, d, torch.nan)
    cross = d * d * na * rb
    m2 = a2 + b2 + cross
    m3 = a3 + b3 + cross * d * (ra - rb) + 3 * d * (ra * b2 - rb * a2)
    m4 = (
        a4 + b4
        + cross * d * d * (ra * ra - ra * rb + rb * rb)
        + 6 * d * d * (ra * ra * b2 + rb * rb * a2)
        + 4 * d * (ra * b3 - rb * a3)
    )  # fmt: skip
    low, high = torch.minimum(a[6], b[6]), torch.maximum(a[7], b[7])
    return torch.stack([n, mean, m2, m3, m4, a[5] + b[5], low, high, a[8] + b[8], a[9] + b[9]])
