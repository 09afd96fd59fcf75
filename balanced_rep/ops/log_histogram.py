r"""Log-histogram: the mergeable sketch behind top-k energy share, Gini and quantiles, all in integers.

Each sample has a window of 32 octaves below ``2**top``; an octave has 32 equal bins for each sign. Bins are sorted by
value: 1024 negative ones, one centre bin for everything outside the window (zeros and values below
:math:`2^{top - 32}`), 1024 positive ones. With :math:`|v| = 2^e (1 + f)` and q = floor(:math:`2^{23} f`), the bin
within the octave is the 5 leading bits of q and r is the 18 others. A bin keeps its count, sum r and sum :math:`r^2`:
exact integers, so that merging is exact in any order and on any device, and the sums of :math:`|v|` and :math:`v^2` of
a bin follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanced_rep.kernels import _supports
from balanced_rep.ops._layout import pooled_float64
from balanced_rep.ops._library import define
from balanced_rep.ops._registry import Impl, OpSpec

__all__ = ["BINS_PER_OCTAVE", "CENTRE", "LOG_HISTOGRAM", "N_BINS", "OCTAVES", "REST_BITS", "log_histogram_reference"]

OCTAVES = 32
BINS_PER_OCTAVE = 32
CENTRE = OCTAVES * BINS_PER_OCTAVE
N_BINS = 2 * CENTRE + 1
REST_BITS = 18  # 23 mantissa bits of float32, less 5 for the bin


def log_histogram_reference(x: Tensor, top: Tensor, n_kept: int, n_pooled: int, pool: int) -> Tensor:
    """The definition, in integers.

    Args:
        x: Dims (kept..., reduced..., pooled...).
        top: int64 ``(*kept,)``: every finite value of the sample is below ``2**top`` in magnitude.
        n_kept: Number of kept dims.
        n_pooled: Number of pooled dims.
        pool: 0 none, 1 max, 2 mean.

    Returns:
        int64 ``(3, *kept, N_BINS)``: the count, sum r and sum r^2 of every bin.
    """
    v = pooled_float64(x, n_kept, n_pooled, pool)
    mantissa, exponent = torch.frexp(v.abs())  # |v| = mantissa * 2^exponent, mantissa in [1/2, 1)
    octave = exponent.long() - 1 - (top.unsqueeze(-1) - OCTAVES)
    q = ((2 * mantissa - 1) * 2**23).long()
    inside = v.isfinite() & (v != 0) & (octave >= 0) & (octave < OCTAVES)
    offset = 1 + octave * BINS_PER_OCTAVE + (q >> REST_BITS)
    index = torch.where(inside, CENTRE + torch.where(v < 0, -offset, offset), CENTRE)
    rest = torch.where(inside, q & 2**REST_BITS - 1, 0)
    empty = torch.zeros((*v.shape[:-1], N_BINS), dtype=torch.int64, device=v.device)
    return torch.stack([empty.scatter_add(-1, index, w) for w in (torch.ones_like(rest), rest, rest * rest)])


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.randn(7, 515, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.frexp(x.double().abs().amax(-1)).exponent.long(), 1, 0, 0


LOG_HISTOGRAM = OpSpec(
    name="log_histogram",
    reference=log_histogram_reference,
    impls={"cpp": Impl("balanced_rep.ops._cpp:log_histogram", _supports.cpp_tensor)},
    inputs=_inputs,
    tolerance=dict.fromkeys((torch.float64, torch.float32, torch.float16, torch.bfloat16), (0.0, 0.0)),
)


def _fake(x: Tensor, top: Tensor, n_kept: int, n_pooled: int, pool: int) -> Tensor:
    return x.new_empty((3, *x.shape[:n_kept], N_BINS), dtype=torch.int64)


def _vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, top: Tensor, n_kept: int, *rest: Any) -> Any:
    x, top = (
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in ((x, in_dims[0]), (top, in_dims[1]))
    )
    return torch.ops.balanced_rep.log_histogram(x, top, n_kept + 1, *rest), 1


define(
    LOG_HISTOGRAM,
    "(Tensor x, Tensor top, int n_kept, int n_pooled, int pool) -> Tensor",
    fake=_fake,
    vmap=_vmap,
)
