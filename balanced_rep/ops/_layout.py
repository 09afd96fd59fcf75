"""Checks an activation and views it as (kept..., reduced..., pooled...), the layout that every statistics op takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "POOLS", "Layout", "arrange", "pool_vjp", "pooled_float64"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
POOLS = {None: 0, "max": 1, "mean": 2}


class Layout(NamedTuple):
    """A view of the input and how its dims are to be read.

    Attributes:
        x: Strided view, dims ordered (kept..., reduced..., pooled...).
        n_kept: Number of leading dims that stay in the result.
        n_pooled: Number of trailing dims that are pooled first.
        pool: 0 none, 1 max, 2 mean.
    """

    x: Tensor
    n_kept: int
    n_pooled: int
    pool: int


def arrange(
    x: Tensor, dim: int | Sequence[int] | None, pool: str | None = None, pool_dim: int | Sequence[int] | None = None
) -> Layout:
    """Checks the arguments and permutes ``x`` (a view: nothing is copied).

    Args:
        x: Activation of any shape and strides; float32, float16, bfloat16 or float64.
        dim: Dims to reduce, counted in the *pooled* tensor, as if ``pool`` had been applied before; ``None`` for all.
        pool: ``None``, ``"max"`` or ``"mean"``.
        pool_dim: Dims of ``x`` to pool; by default the spatial dims of ``(N, C, *spatial)`` and the token dim
            of ``(N, T, D)``.

    Returns:
        The layout.

    Raises:
        TypeError: If ``x`` is no tensor or not of an accepted dtype or layout, or a dim is no integer.
        ValueError: If dims are out of range or repeated, or the pooling is unclear or empty.
    """
    _check_tensor(x)
    if pool not in POOLS:
        raise ValueError(f"pool must be None, 'max' or 'mean', got {pool!r}")
    pooled = _pooled_dims(x, pool, pool_dim)
    rest = [d for d in range(x.ndim) if d not in pooled]
    reduced = [rest[d] for d in _normalise(dim, len(rest), "dim", tuple(x.shape[d] for d in rest))]
    kept = [d for d in rest if d not in reduced]
    return Layout(x.permute((*kept, *reduced, *pooled)), len(kept), len(pooled), POOLS[pool])


def pooled_float64(x: Tensor, n_kept: int, n_pooled: int, pool: int) -> Tensor:
    """The reference front end: the pooled values in float64, shape ``(*kept, n)``."""
    kept, n_cells = x.shape[:n_kept], math.prod(x.shape[x.ndim - n_pooled :])
    n = math.prod(x.shape[n_kept : x.ndim - n_pooled])
    v = x.double().reshape(*kept, n, n_cells)
    if pool == 0:
        return v.squeeze(-1)
    return v.amax(-1) if pool == POOLS["max"] else v.mean(-1)


def pool_vjp(x: Tensor, n_pooled: int, pool: int, value_vjp: Callable[[Tensor], Tensor]) -> Tensor:
    """Cotangent of ``x`` from that of the pooled values; ties of a maximum share it, as in ``amax``.

    Args:
        x: Dims (kept..., reduced..., pooled...).
        n_pooled: Number of pooled dims.
        pool: 0 none, 1 max, 2 mean.
        value_vjp: Takes the pooled values in float64, pooled dims kept with size 1; returns their cotangent.

    Returns:
        The cotangent, in the shape and dtype of ``x``.
    """
    values = x.double()
    dims = tuple(range(x.ndim - n_pooled, x.ndim))
    if pool == 0:
        g = value_vjp(values)
    elif pool == POOLS["max"]:
        v = values.amax(dims, keepdim=True)
        tie = (values == v).double()
        g = value_vjp(v) * tie / tie.sum(dims, keepdim=True)
    else:
        g = (value_vjp(values.mean(dims, keepdim=True)) / math.prod(x.shape[d] for d in dims)).expand(x.shape)
    return g.to(x.dtype)


def _check_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch tensor, numpy array or cupy array, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        hint = "use torch.view_as_real or x.abs()" if x.is_complex() else "convert it with x.float()"
        raise TypeError(f"x has dtype {x.dtype}; accepted are {accepted}: {hint}")
    if x.layout != torch.strided:
        raise TypeError(f"x has layout {x.layout}; accepted is torch.strided: convert it with x.to_dense()")


def _pooled_dims(x: Tensor, pool: str | None, pool_dim: int | Sequence[int] | None) -> list[int]:
    if pool is None:
        if pool_dim is not None:
            raise ValueError(f"pool_dim={pool_dim} is given without pool; pass pool='max' or pool='mean' as well")
        return []
    if pool_dim is None:
        if x.ndim < 3:
            raise ValueError(
                f"pool={pool!r} finds no spatial or token dim in shape {tuple(x.shape)}: by default dims 2.. of "
                "(N, C, *spatial) and dim 1 of (N, T, D) are pooled; name others with pool_dim"
            )
        pool_dim = 1 if x.ndim == 3 else tuple(range(2, x.ndim))
    dims = _normalise(pool_dim, x.ndim, "pool_dim", tuple(x.shape))
    if any(x.shape[d] == 0 for d in dims):
        raise ValueError(f"pool={pool!r} over dims {tuple(dims)} of shape {tuple(x.shape)}: a pooled dim is empty")
    if not dims:
        raise ValueError(f"pool={pool!r} needs at least one dim, got pool_dim={pool_dim}")
    return dims


def _normalise(dim: int | Sequence[int] | None, ndim: int, name: str, shape: tuple[int, ...]) -> list[int]:
    if dim is None:
        return list(range(ndim))
    dims: list[Any] = list(dim) if isinstance(dim, Sequence) and not isinstance(dim, str) else [dim]
    if not all(isinstance(d, Integral) and not isinstance(d, bool) for d in dims):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {dim!r}")
    places = max(ndim, 1)  # a scalar counts as one value, as in torch.std
    if not all(-places <= d < places for d in dims):
        raise ValueError(f"{name}={dim} is out of range for shape {shape}: dims go from {-places} to {places - 1}")
    if ndim == 0:
        return []
    out = [int(d) % ndim for d in dims]
    if len(set(out)) != len(out):
        raise ValueError(f"{name}={dim} names a dim of shape {shape} twice")
    return sorted(out)
