"""The denoiser's Jacobian at repeated and at never-seen digits: how much of the input around each still passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from balanced_rep.demo._metrics import Detection, detect
from balanced_rep.linalg import JacobianOperator
from balanced_rep.models import DigitsDenoiser, DigitsSplit
from balanced_rep.models._digits import Variant

__all__ = ["JacobianGroup", "JacobianRow", "jacobian_row"]

LEADING = 4


@dataclass(frozen=True)
class JacobianGroup:
    """Medians over a group of digits.

    Attributes:
        squared_norm: Of the squared Frobenius norms: the sum of all squared singular values.
        singular_values: Of the first, the second, ... singular value.
    """

    squared_norm: float
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class JacobianRow:
    """What the Jacobians of a model at one noise level say.

    Attributes:
        sigma: Noise level in data units.
        model: "repeated" or "control".
        repeated: Of the repeated training images.
        never_seen: Of the never-seen images.
        detection: The squared norm as a score, low = suspicious, the one group against the other.
    """

    sigma: float
    model: Variant
    repeated: JacobianGroup
    never_seen: JacobianGroup
    detection: Detection


def jacobian_row(
    model: DigitsDenoiser, variant: Variant, noisy: Tensor, split: DigitsSplit, sigma: float
) -> JacobianRow:
    """Exact Jacobians of `D(., sigma)`, 64 x 64 for each digit, from 64 products that all digits share.

    Args:
        model: The denoiser.
        variant: Its name.
        noisy: All digits with noise, `(1797, 1, 8, 8)`.
        split: Groups.
        sigma: Noise level.

    Returns:
        Medians of both groups, and what the squared norm detects.
    """
    n = len(split.repeated)
    points = noisy[torch.cat([split.repeated, split.held_out])]
    jacobians = JacobianOperator(lambda y: model(y, sigma), points, batch=True, reuse=False).dense()
    values = torch.linalg.svdvals(jacobians)
    squared = values.square().sum(dim=1)

    def group(part: slice) -> JacobianGroup:
        leading = values[part, :LEADING].median(dim=0).values
        return JacobianGroup(squared[part].median().item(), tuple(leading.tolist()))

    found = detect(-squared[:n], -squared[n:])
    return JacobianRow(sigma, variant, group(slice(n)), group(slice(n, None)), found)
