"""Describes a (kept..., reduced..., pooled...) view by as few sizes and strides as it needs: what GPU kernels walk.

Dims that lie in memory as one are merged. Reduced and pooled dims are first sorted by stride, because a sum does not
ask for their order; kept dims keep theirs, because the result has it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from torch import Tensor

__all__ = ["LIMITS", "MAX_GRID", "Dim", "Strided", "blocks", "describe"]

# Strided blocks that the kernels take of each group; the innermost ones are tiled, the others enumerated.
MAX_GRID = 2**31 - 1
LIMITS = {"kept": 3, "reduced": 3, "pooled": 2}


class Dim(NamedTuple):
    """One strided block: ``size`` elements, ``stride`` elements apart."""

    size: int
    stride: int


class Strided(NamedTuple):
    """The three groups of dims, innermost first; a group without dims is one element.

    Attributes:
        kept: Blocks of the kept dims.
        reduced: Blocks of the reduced dims.
        pooled: Blocks of the pooled dims.
    """

    kept: tuple[Dim, ...]
    reduced: tuple[Dim, ...]
    pooled: tuple[Dim, ...]

    def too_many_blocks(self) -> str | None:
        """``None`` if the kernels have a stride for every block, else the reason."""
        for (name, limit), dims in zip(LIMITS.items(), self, strict=True):
            if len(dims) > limit:
                return (
                    f"the {name} dims lie in memory as {len(dims)} strided blocks, this backend takes at most {limit} "
                    "(x.contiguous() makes fewer)"
                )
        return None

    def too_many_tiles(self, smallest_tile: int) -> str | None:
        """``None`` if a grid can have a block per tile, else the reason; a tile is at least so long."""
        rows = math.prod(d.size for dims in (self.kept, self.reduced[1:]) for d in dims)
        if rows * math.ceil(self.reduced[0].size / smallest_tile) > MAX_GRID:
            return f"it would take more than {MAX_GRID} blocks, the largest grid"
        return None

    def padded(self) -> Strided:
        """The same view with exactly as many blocks as the kernels take, the outer ones of size 1."""
        return Strided(
            *(dims + (Dim(1, 0),) * (limit - len(dims)) for dims, limit in zip(self, LIMITS.values(), strict=True))
        )


def describe(x: Tensor, n_kept: int, n_pooled: int) -> Strided:
    """The strided blocks of a view with dims (kept..., reduced..., pooled...).

    Args:
        x: The view.
        n_kept: Number of leading dims that are kept.
        n_pooled: Number of trailing dims that are pooled.

    Returns:
        The blocks; sizes may be 0.
    """
    return _describe(tuple(x.shape), x.stride(), n_kept, x.ndim - n_pooled)


@functools.lru_cache(maxsize=4096)
def _describe(shape: tuple[int, ...], stride: tuple[int, ...], first: int, last: int) -> Strided:
    dims = [Dim(*pair) for pair in zip(shape, stride, strict=True)]
    return Strided(
        blocks(dims[:first], reorder=False), blocks(dims[first:last], reorder=True), blocks(dims[last:], reorder=True)
    )


def blocks(dims: list[Dim], *, reorder: bool) -> tuple[Dim, ...]:
    """Merges dims, given outermost first, that lie in memory as one.

    Args:
        dims: Sizes and strides, outermost first.
        reorder: Whether they may be visited in any order.

    Returns:
        At least one block, innermost first.
    """
    if math.prod(d.size for d in dims) == 0:
        return (Dim(0, 1),)
    dims = [d for d in dims if d.size > 1]
    if reorder:
        dims.sort(key=lambda d: -d.stride)
    merged: list[Dim] = []
    for dim in reversed(dims):
        if merged and dim.stride == merged[-1].size * merged[-1].stride:
            merged[-1] = Dim(dim.size * merged[-1].size, merged[-1].stride)
        else:
            merged.append(dim)
    return tuple(merged) or (Dim(1, 1),)
