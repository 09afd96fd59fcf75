"""Chooses the kernel of ``csrc/cuda/moments.cu``, its tiles and its grid from sizes and strides alone.

So the same call always sums in the same order, and all of this can be tested without a device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from balanced_rep.kernels._driver import Kernel
from balanced_rep.kernels._strided import Dim, Strided

__all__ = ["LAYOUT", "THREADS", "Plan", "plan"]

THREADS = 256
_LONG = ("n_kept", "n_kept0", "n_red0", "n_red1", "n_pool0", "n_pool1", "stride_kept0", "stride_kept1", "stride_kept2",
         "stride_red0", "stride_red1", "stride_red2", "stride_pool0", "stride_pool1")  # fmt: skip
_SHORT = ("n_kept1", "inner_shift", "tiles_kept0", "tiles_red0", "tiles_red1", "n_tiles", "tiles_per_segment",
          "n_segments")  # fmt: skip
LAYOUT = np.dtype([(name, np.int64) for name in _LONG] + [(name, np.uint32) for name in _SHORT], align=True)
_PARAMETERS = (None, None, None, None, np.dtype(np.float64), LAYOUT)
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}
_POOLS = {1: "Maximum", 2: "Mean"}
_MAX_SEGMENTS = 1024  # of a row; longer rows have more tiles in a segment
_SEGMENT_BYTES = 1024  # of a row that a segment reads, if there are blocks enough
_MANY_BLOCKS = 256


class Geometry(NamedTuple):
    """What a block covers; the numbers are those of the ``Geometry`` types in the source.

    Attributes:
        expression: The kernel, template arguments included.
        columns: Kept indices.
        tile: Reduced indices at a time.
        splits: Whether several blocks may share a row.
    """

    expression: str
    columns: int
    tile: int
    splits: bool = True


class Plan(NamedTuple):
    """A launch, up to the addresses.

    Attributes:
        kernel: What to launch.
        layout: Its description of the input, a scalar of type :data:`LAYOUT`.
        blocks: Size of the grid.
        n_segments: Blocks that share a row.
        row_tiles: Groups of rows, each with a ticket counter of its own.
    """

    kernel: Kernel
    layout: np.generic
    blocks: int
    n_segments: int
    row_tiles: int


def plan(view: Strided, dtype: torch.dtype, address: int, pool: int) -> Plan:
    """The launch for a view that :func:`balanced_rep.kernels._supports.cuda_moments` has nothing against.

    Args:
        view: Blocks of the three groups of dims.
        dtype: Of the elements.
        address: Of the first element: how it is aligned decides on the width of loads.
        pool: 0 none, 1 max, 2 mean.

    Returns:
        The plan.
    """
    geometry = _geometry(view, dtype, address, pool)
    kept, reduced, pooled = view.padded()
    inner = min(_power_of_two(reduced[0].size), geometry.tile)
    tiles = math.ceil(reduced[0].size / inner), math.ceil(reduced[1].size / (geometry.tile // inner))
    n_tiles = tiles[0] * tiles[1] * reduced[2].size
    tiles_kept0 = math.ceil(kept[0].size / geometry.columns)
    row_tiles = tiles_kept0 * kept[1].size * kept[2].size
    per_segment = _tiles_per_segment(geometry, dtype.itemsize, n_tiles, row_tiles)
    n_segments = math.ceil(n_tiles / per_segment)
    values = (
        math.prod(d.size for d in kept), kept[0].size, reduced[0].size, reduced[1].size, pooled[0].size, pooled[1].size,
        *(d.stride for d in (*kept, *reduced, *pooled)),
        kept[1].size, inner.bit_length() - 1, tiles_kept0, *tiles, n_tiles, per_segment, n_segments,
    )  # fmt: skip
    kernel = Kernel("moments.cu", f"balanced_rep::{geometry.expression}", _PARAMETERS)
    return Plan(kernel, np.array([values], LAYOUT)[0], row_tiles * n_segments, n_segments, row_tiles)


def _tiles_per_segment(geometry: Geometry, itemsize: int, n_tiles: int, row_tiles: int) -> int:
    """How many tiles of a row one block walks through.

    Args:
        geometry: What a block covers.
        itemsize: Bytes of an element.
        n_tiles: Tiles of a row.
        row_tiles: Groups of rows.

    Returns:
        The fewest that keep the number of segments within its limit; more where the 80 bytes that a segment leaves
        behind would otherwise be many beside what it reads, if there are still blocks enough to fill a device.
    """
    if not geometry.splits:
        return n_tiles
    worthwhile = math.ceil(_SEGMENT_BYTES / (geometry.tile * itemsize))
    affordable = n_tiles * row_tiles // _MANY_BLOCKS
    return max(math.ceil(n_tiles / _MAX_SEGMENTS), min(worthwhile, affordable, n_tiles), 1)


def _geometry(view: Strided, dtype: torch.dtype, address: int, pool: int) -> Geometry:
    name, itemsize = f"balanced_rep::{_NAMES[dtype]}", dtype.itemsize
    if pool:
        windows = view.pooled[0].size >= 16 and view.pooled[0].stride < view.reduced[0].stride
        return Geometry(f"moments_pooled<{name}, balanced_rep::{_POOLS[pool]}, {_cpp(windows)}>", 1, THREADS)
    kept0, red0 = view.kept[0], view.reduced[0]
    if kept0.size >= 8 and kept0.stride < red0.stride:
        wide = itemsize == 2 and _aligned(view, kept0, 2, address, itemsize)
        return Geometry(f"moments_columns<{name}, {_cpp(wide)}>", 64 if wide else 32, THREADS // 32 * 16)
    vector = 16 // itemsize
    wide = red0.size >= vector and _aligned(view, red0, vector, address, itemsize)
    items = 32 if wide and itemsize == 2 else 16
    if math.prod(d.size for d in view.reduced) <= 2 * 32 * items:
        return Geometry(f"moments_warps<{name}, {_cpp(wide)}>", THREADS // 32, 32 * items, splits=False)
    return Geometry(f"moments_rows<{name}, {_cpp(wide)}>", 1, THREADS * items)


def _aligned(view: Strided, along: Dim, count: int, address: int, itemsize: int) -> bool:
    """Whether ``count`` neighbours along a block start at a multiple of their size wherever a load starts."""
    others = (d for group in (view.kept, view.reduced) for d in group if d is not along and d.size > 1)
    return along.stride == 1 and address % (count * itemsize) == 0 and all(d.stride % count == 0 for d in others)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


def _cpp(value: bool) -> str:
    return "true" if value else "false"
