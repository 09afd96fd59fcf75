"""How far a denoiser is a linear map where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from balanced_rep.autodiff import jvp
from balanced_rep.models import Denoiser
from balanced_rep.models._checks import check_sigmas

__all__ = ["Linearity", "local_linearity"]


@dataclass(frozen=True, eq=False)
class Linearity:
    """How far J y explains D(y).

    Attributes:
        error: `|J y - D(y)| / |D(y)|`, `(n,)`: 0 for a function that is linear through the origin around y, such as a
            ReLU network without biases.
        cosine: Cosine between the two, `(n,)`.
        gain: `|J y| / |D(y)|`, `(n,)`.
    """

    error: Tensor
    cosine: Tensor
    gain: Tensor


@torch.no_grad()
def local_linearity(D: Denoiser, y: Tensor, sigma: float, *, cond: Any = None) -> Linearity:
    """Compares a denoiser with its own linearisation, by one Jacobian-vector product.

    Args:
        D: The denoiser.
        y: Noisy samples, `(n, *sample_shape)`.
        sigma: Their noise level.
        cond: Conditions.

    Returns:
        Error, cosine and gain.

    Raises:
        ValueError: If the noise level is not one of this denoiser.
    """
    check_sigmas("local_linearity", D, (sigma,))
    value, tangent = jvp(lambda z: D(z, sigma, cond), y, y[None])
    d, j = value.flatten(1).double(), tangent[0].flatten(1).double()
    return Linearity(
        (j - d).norm(dim=1) / d.norm(dim=1),
        torch.nn.functional.cosine_similarity(j, d, dim=1),
        j.norm(dim=1) / d.norm(dim=1),
    )
