"""CUDA C++ launchers: pointers, strides and the grid stop here; the kernels are in ``csrc/cuda``."""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor

from balanced_rep.kernels._driver import CupyDriver, Kernel, Launcher
from balanced_rep.kernels._moments_common import N_FIELDS, accumulator, exact_threshold, neutral
from balanced_rep.kernels._moments_plan import THREADS, plan
from balanced_rep.kernels._strided import describe
from balanced_rep.kernels._supports import MAX_ORDER, eigh_shared_bytes

__all__ = ["gram_eigh", "moments", "philox_bits", "philox_normal"]

launch = Launcher(CupyDriver())

_INT64 = np.dtype(np.int64)
_PHILOX_PARAMETERS = (None, None, _INT64, _INT64, _INT64, _INT64)
PHILOX_BITS = Kernel("philox.cu", "balanced_rep::philox_bits", _PHILOX_PARAMETERS)
PHILOX_NORMAL = Kernel("philox.cu", "balanced_rep::philox_normal", _PHILOX_PARAMETERS)
GRAM_EIGH = Kernel(
    "gram_eigh.cu",
    "balanced_rep::gram_eigh",
    (None, None, None, np.dtype(np.int32)),
    shared_bytes=eigh_shared_bytes(MAX_ORDER),
)
EIGH_TEAM, EIGH_THREADS = 16, 512  # threads of a pair of columns, and of a block at most

_tickets: dict[Hashable, Tensor] = {}


def moments(x: Tensor, n_kept: int, n_pooled: int, pool: int, threshold: float) -> Tensor:
    """Moments of a (kept..., reduced..., pooled...) view; see :func:`balanced_rep.ops.moments.moments_reference`.

    Args:
        x: Any strided view that :func:`balanced_rep.kernels._supports.cuda_moments` accepts.
        n_kept: Number of leading dims that are kept.
        n_pooled: Number of trailing dims that are pooled.
        pool: 0 none, 1 max, 2 mean.
        threshold: A value is active if it is greater than this.

    Returns:
        float64 ``(10, *kept)``.
    """
    x = x.detach().resolve_neg()
    shape = (N_FIELDS, *x.shape[:n_kept])
    if x.numel() == 0:
        return neutral(shape, x.device)
    todo = plan(describe(x, n_kept, n_pooled), x.dtype, x.data_ptr(), pool)
    out = torch.empty(shape, dtype=torch.float64, device=x.device)
    parts, tickets = out, out  # not looked at by a block that has its rows to itself
    if todo.n_segments > 1:
        parts = torch.empty((todo.n_segments, *shape), dtype=torch.float64, device=x.device)
        tickets = zeroed_tickets(todo.row_tiles, x.device)
    limit = np.float64(exact_threshold(threshold, accumulator(x.dtype, pool)))
    launch(todo.kernel, todo.blocks, THREADS, (x, parts, out, tickets, limit, todo.layout), x.device)
    return out


def zeroed_tickets(count: int, device: torch.device) -> Tensor:
    """Ticket counters at zero; the kernel that uses them leaves them at zero.

    One set per stream, because kernels on one stream follow each other. A launch that is captured into a graph gets a
    set of its own, zeroed inside the graph.

    Args:
        count: How many, at least.
        device: Where.

    Returns:
        An int32 tensor.
    """
    key = launch.driver.stream_key(device)
    kept = None if key is None else _tickets.get(key)
    if kept is None or kept.numel() < count:
        kept = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        if key is not None:
            _tickets[key] = kept
    return kept


def philox_bits(items: Tensor, seed: int, n: int) -> Tensor:
    """Uniform 32-bit words; see :func:`balanced_rep.ops.philox.philox_bits_reference`.

    Args:
        items: int64 ``(b,)``.
        seed: A signed 64-bit integer.
        n: Words per item.

    Returns:
        int64 ``(b, n)``.
    """
    return _philox(PHILOX_BITS, items, seed, n, torch.int64)


def philox_normal(items: Tensor, seed: int, n: int) -> Tensor:
    """Standard normal numbers; see :func:`balanced_rep.ops.philox.philox_normal_reference`.

    Args:
        items: int64 ``(b,)``.
        seed: A signed 64-bit integer.
        n: Numbers per item.

    Returns:
        float32 ``(b, n)``.
    """
    return _philox(PHILOX_NORMAL, items, seed, n, torch.float32)


def _philox(kernel: Kernel, items: Tensor, seed: int, n: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty((items.shape[0], n), dtype=dtype, device=items.device)
    if out.numel() > 0:
        blocks = math.ceil(items.shape[0] * math.ceil(n / 4) / THREADS)
        sizes = (np.int64(items.shape[0]), np.int64(items.stride(0)), np.int64(seed), np.int64(n))
        launch(kernel, blocks, THREADS, (items, out, *sizes), items.device)
    return out


def gram_eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; see :func:`balanced_rep.ops.gram_eigh.gram_eigh_reference`.

    Args:
        g: float64 ``(B, n, n)``, n at most 128.

    Returns:
        ``(B, n)`` and ``(B, n, n)``.
    """
    g = g.detach().resolve_neg().contiguous()
    batch, n = g.shape[:2]
    values, vectors = g.new_empty((batch, n)), torch.empty_like(g)
    if g.numel() > 0:
        threads = min(math.ceil(n / 2 * EIGH_TEAM / 32) * 32, EIGH_THREADS)
        args = (g, values, vectors, np.int32(n))
        launch(GRAM_EIGH, batch, threads, args, g.device, shared_bytes=eigh_shared_bytes(n))
    return values, vectors
