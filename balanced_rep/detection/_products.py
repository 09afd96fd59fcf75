"""A denoiser and products with its Jacobian, for a batch of samples, primal and tangents in the same passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from balanced_rep.autodiff import jvp
from balanced_rep.linalg._probes import probes
from balanced_rep.models import Denoiser
from balanced_rep.models._checks import check_denoised

__all__ = ["Products", "at_noise_level", "jacobian", "products"]

COLUMNS = 16  # tangents per pass


@dataclass(frozen=True, eq=False)
class Products:
    """One pass.

    Attributes:
        value: The function at the point, `(b, m)`.
        directions: `(k, n)`, the same for all samples.
        images: Their products with each sample's Jacobian, `(k, b, m)`.
        weight: 1 over the number of directions for random ones, 1 for unit vectors: what a sum over all passes is
            multiplied with to give a trace or a squared Frobenius norm.
    """

    value: Tensor
    directions: Tensor
    images: Tensor
    weight: float


def at_noise_level(what: str, D: Denoiser, sigma: float, cond: Any) -> Callable[[Tensor], Tensor]:
    """A denoiser as a function of the samples alone.

    Args:
        what: Beginning of messages.
        D: The denoiser.
        sigma: Noise level.
        cond: Conditions.

    Returns:
        The function; it refuses a result that has not the shape of the samples.
    """

    def denoise(y: Tensor) -> Tensor:
        denoised = D(y, sigma, cond)
        check_denoised(what, D, y, denoised)
        return denoised

    return denoise


def products(f: Callable[[Tensor], Tensor], x: Tensor, n_probes: int, *, seed: int) -> Iterator[Products]:
    """Products with random probes, or with all unit vectors if these are no more.

    Args:
        f: Function of `(b, *shape)` that treats samples apart.
        x: The points.
        n_probes: Number of Rademacher probes.
        seed: Of the probes.

    Yields:
        Passes of up to sixteen directions.
    """
    n = x[0].numel()
    exact = n <= n_probes
    count = n if exact else n_probes
    for start in range(0, count, COLUMNS):
        k = min(COLUMNS, count - start)
        if exact:
            w = torch.zeros(k, n, dtype=x.dtype, device=x.device)
            w[torch.arange(k), torch.arange(start, start + k)] = 1
        else:
            w = probes(start, k, n, "rademacher", seed, x)
        tangents = w[:, None].expand(-1, len(x), -1).reshape(k, *x.shape)
        value, images = jvp(f, x, tangents)
        yield Products(value.flatten(1), w, images.flatten(2), 1.0 if exact else 1 / count)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The whole Jacobian of each sample.

    Args:
        f: As above.
        x: The points, `(b, *shape)` with n entries each.

    Returns:
        `(b, m, n)`.
    """
    n = x[0].numel()
    return torch.cat([p.images for p in products(f, x, n, seed=0)]).permute(1, 2, 0)
