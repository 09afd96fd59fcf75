"""Scores from distances between images: among generations of a prompt, and to the training images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from balanced_rep.detection._score import Batch, Score, register
from balanced_rep.models import Denoiser, sample
from balanced_rep.models._checks import check_counts
from balanced_rep.models._conditions import take_rows

__all__ = ["GenerationDensity", "NearestReference", "tiled_distance"]


def tiled_distance(a: Tensor, b: Tensor, tiles: int) -> Tensor:
    """Largest root mean squared difference over a grid of tiles.

    One large patch in common, such as a uniform background, does not make two images near.

    Args:
        a: `(n, c, h, w)`.
        b: `(m, c, h, w)`.
        tiles: Tiles per side; h and w are cut as evenly as possible.

    Returns:
        `(n, m)` float64.
    """
    rows, columns = (torch.tensor_split(torch.arange(size), tiles) for size in a.shape[-2:])
    worst = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for i in rows:
        for j in columns:
            if len(i) and len(j):
                here = (slice(None), slice(None), slice(int(i[0]), int(i[-1]) + 1), slice(int(j[0]), int(j[-1]) + 1))
                p, q = a[here].flatten(1).double(), b[here].flatten(1).double()
                worst = torch.maximum(worst, torch.cdist(p, q) / p.shape[1] ** 0.5)
    return worst


@register
class GenerationDensity(Score):
    """How near to each other images of one prompt come out: small if they are the same again and again."""

    name = "generation_density"
    formula = "mean (or min) over pairs of generations of the tiled L2 distance"
    source = "Carlini et al., USENIX Security 2023"
    requires = frozenset({"model", "condition"})
    direction = "low"
    cost = "n_images x n_steps x 2 forward passes"

    def __init__(
        self,
        n_images: int = 4,
        n_steps: int = 50,
        guidance: float = 7.5,
        tiles: int = 4,
        reduce: Literal["mean", "min"] = "mean",
    ):
        """Chooses the effort.

        Args:
            n_images: Generations per prompt.
            n_steps: Sampling steps.
            guidance: Of the sampling.
            tiles: Tiles per side.
            reduce: Over pairs.

        Raises:
            ValueError: If there are fewer than two images, or `reduce` is neither.
        """
        if n_images < 2 or n_steps < 1 or tiles < 1 or reduce not in ("mean", "min"):
            raise ValueError(
                "generation_density: n_images >= 2, n_steps >= 1, tiles >= 1 and reduce 'mean' or 'min', got "
                f"{n_images}, {n_steps}, {tiles} and {reduce!r}."
            )
        check_counts(self.name, n_images=n_images, n_steps=n_steps, tiles=tiles)
        self.n_images, self.n_steps, self.guidance = n_images, n_steps, guidance
        self.tiles, self.reduce = tiles, reduce

    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Generates and compares.

        Args:
            D: The denoiser.
            batch: Conditions.

        Returns:
            `(b,)`.
        """
        n = self.n_images
        cond = take_rows(batch.cond, torch.arange(len(batch)).repeat_interleave(n))
        options = {"n_steps": self.n_steps, "guidance": self.guidance, "seed": batch.seed}
        made = sample(D, len(batch) * n, cond=cond, first=int(batch.items[0]) * n, **options)
        batch.forwards += len(made) * self.n_steps * (1 if self.guidance == 1 else 2)
        decode: Callable[[Tensor], Tensor] | None = getattr(D, "decode", None)
        images = made if decode is None else decode(made)
        pair = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)
        found = [tiled_distance(group, group, self.tiles).cpu()[pair] for group in images.split(n)]
        return torch.stack([d.mean() if self.reduce == "mean" else d.min() for d in found])


@register
class NearestReference(Score):
    """Distance to the nearest training image, over what is usual there: small for a copy. Needs no model."""

    name = "nearest_reference"
    formula = "|x - x_1| / (alpha * mean over the k nearest training images of |x - x_j|)"
    source = "Carlini et al., USENIX Security 2023"
    requires = frozenset({"samples", "reference"})
    direction = "low"
    cost = "no forward pass; distances to all training images"

    def __init__(self, k: int = 50, alpha: float = 0.5):
        """Chooses the calibration.

        Args:
            k: Neighbours that say what is usual.
            alpha: A factor in the denominator.

        Raises:
            ValueError: If one is out of range.
        """
        if k < 1 or not alpha > 0:
            raise ValueError(f"nearest_reference: k must be at least 1 and alpha positive, got {k} and {alpha}.")
        check_counts(self.name, k=k)
        self.k, self.alpha = k, alpha

    def prepare(self, D: Denoiser | None, reference: Any) -> Tensor:
        """Flattens the training images.

        Args:
            D: Not used.
            reference: `(N, *sample_shape)`.

        Returns:
            `(N, d)`.

        Raises:
            ValueError: If there are none, or one is not finite.
        """
        if not isinstance(reference, Tensor) or reference.ndim < 2 or not len(reference):
            raise ValueError("nearest_reference: reference= must be training samples (N, *sample_shape), at least one.")
        flat = reference.flatten(1)
        if not flat.isfinite().all():
            bad = (~flat.isfinite()).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(
                f"nearest_reference: {len(bad)} of {len(flat)} training samples are not finite, the first of them "
                f"number {bad[0]}; leave these out."
            )
        return flat

    def compute(self, D: Denoiser | None, batch: Batch) -> Tensor:
        """Looks for neighbours.

        Args:
            D: Not used.
            batch: Samples.

        Returns:
            `(b,)`.

        Raises:
            ValueError: If samples and training images differ in shape.
        """
        assert batch.x is not None
        x, reference = batch.x.flatten(1), batch.reference
        if x.shape[1] != reference.shape[1]:
            raise ValueError(
                f"nearest_reference: samples have {x.shape[1]} entries and training images {reference.shape[1]}."
            )
        distance = torch.cdist(x.double(), reference.double())
        near = distance.topk(min(self.k, distance.shape[1]), largest=False).values
        return near[:, 0] / (self.alpha * near.mean(dim=1)).clamp_min(torch.finfo(torch.float64).tiny)
