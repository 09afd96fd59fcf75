"""Which tensor of a module's input or output is recorded, and along which of its dims the statistics go."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from balanced_rep.ops._layout import DTYPES, POOLS
from balanced_rep.ops.moments import MOMENTS
from balanced_rep.stats._representation import RepresentationStats, representation_stats

__all__ = ["Arguments", "Reduction", "Select", "describe", "find_tensor"]

Select = int | str | Sequence[int | str] | None


class Arguments(NamedTuple):
    """What a module was called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How a tensor becomes statistics.

    Attributes:
        per: ``"sample"`` keeps the batch dim, ``"unit"`` keeps the channel or feature dim.
        pool: ``None``, ``"max"`` or ``"mean"``.
        pool_dim: Dims to pool, or ``None`` for the usual ones.
        correction: As in :func:`representation_stats`.
        threshold: As in :func:`representation_stats`.
        histogram: As in :func:`representation_stats`.
        entropy: As in :func:`representation_stats`.
    """

    per: str
    pool: str | None
    pool_dim: int | Sequence[int] | None
    correction: float = 0.0
    threshold: float = 0.0
    histogram: bool = False
    entropy: bool = False

    _orders: dict[int, _Order] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, x: Tensor) -> RepresentationStats:
        """Statistics of ``x`` (batch, ...), shape (batch,) or (units,)."""
        order = self._orders.get(x.ndim)
        if order is None:
            order = self._orders[x.ndim] = self._order(x)
        if order.usual and _is_plain(x) and not (self.histogram or self.entropy):
            # What representation_stats does, without checks that cannot fail here and without the torch.library edge,
            # which serves traces and derivatives: behind a convolution, with cold caches, they outlast the kernel.
            n_kept, n_pooled = len(order.kept), len(order.pooled)
            state = MOMENTS(x.permute(order.all), n_kept, n_pooled, POOLS[self.pool], self.threshold)
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            return RepresentationStats(state, dtype, self.correction, self.threshold)
        return representation_stats(
            x,
            order.dim,
            self.pool,
            self.correction,
            pool_dim=self.pool_dim,
            threshold=self.threshold,
            histogram=self.histogram,
            entropy=self.entropy,
        )

    def _order(self, x: Tensor) -> _Order:
        if x.ndim < 2:
            raise ValueError(f"the tensor has shape {tuple(x.shape)}; expected is (batch, ...) with two dims or more")
        pooled = self._pooled(x.ndim)
        if 0 in pooled:
            raise ValueError(f"pool_dim={self.pool_dim} pools dim 0 of shape {tuple(x.shape)}, which is the batch")
        left = [d for d in range(x.ndim) if d not in pooled]
        if self.per == "sample":
            kept = [0]
        elif self.pool is None:
            kept = [2 if x.ndim == 3 else 1]  # (N, T, D) keeps D, (N, C, *spatial) keeps C
        else:
            kept = left[1:]
        dim = tuple(i for i, d in enumerate(left) if d not in kept)
        usual = -1 not in pooled and len(set(pooled)) == len(pooled) and bool(pooled) == (self.pool is not None)
        return _Order(tuple(kept), tuple(left[i] for i in dim), tuple(pooled), dim, usual)

    def _pooled(self, ndim: int) -> list[int]:
        if self.pool is None:
            return []
        if self.pool_dim is None:
            return [1] if ndim == 3 else list(range(2, ndim))
        dims = (self.pool_dim,) if isinstance(self.pool_dim, int) else tuple(self.pool_dim)
        return [d % ndim if -ndim <= d < ndim else -1 for d in dims]


class _Order(NamedTuple):
    """How the dims of a tensor are read.

    Attributes:
        kept: Dims of the tensor that stay.
        reduced: Dims of the tensor that are reduced.
        pooled: Dims of the tensor that are pooled first.
        dim: The reduced dims, counted after pooling.
        usual: Nothing about the pooling is in doubt.
    """

    kept: tuple[int, ...]
    reduced: tuple[int, ...]
    pooled: tuple[int, ...]
    dim: tuple[int, ...]
    usual: bool

    @property
    def all(self) -> tuple[int, ...]:
        """Dims in the order (kept..., reduced..., pooled...)."""
        return self.kept + self.reduced + self.pooled


def _is_plain(x: Tensor) -> bool:
    """A non-empty strided tensor of an accepted dtype, with memory of its own, that no mode is watching."""
    return (
        type(x) is Tensor
        and x.dtype in DTYPES
        and x.layout == torch.strided
        and x.numel() > 0
        and not x.is_meta
        and not torch._C._len_torch_dispatch_stack()
    )


def find_tensor(value: Any, select: Select) -> Tensor:
    """The tensor that ``select`` names in ``value``, or the first one, depth first.

    Args:
        value: A module's output, or its :class:`Arguments`.
        select: ``None``, an index, an attribute, key or argument name, or a path of them.

    Returns:
        The tensor.

    Raises:
        TypeError: If there is no tensor there.
        LookupError: If ``select`` does not lead anywhere.
    """
    found = value
    for step in _steps(select):
        found = _step(found, step, select)
    if (tensor := _first(found)) is None:
        where = "" if select is None else f" at select={select!r}"
        raise TypeError(f"no tensor{where} in {describe(value)}")
    return tensor


def describe(value: Any, depth: int = 2) -> str:
    """A short account of the structure of ``value`` for error messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    children = _children(value)
    if not children or depth == 0:
        return type(value).__name__
    return f"{type(value).__name__}({', '.join(f'{k}={describe(v, depth - 1)}' for k, v in children.items())})"


def _steps(select: Select) -> Sequence[int | str]:
    if select is None:
        return ()
    return (select,) if isinstance(select, int | str) else select


def _step(value: Any, step: int | str, select: Select) -> Any:
    children = _children(value)
    if isinstance(step, int) and not isinstance(value, Arguments):
        items = list(children.values())
        if -len(items) <= step < len(items):
            return items[step]
    elif step in children:
        return children[step]
    elif isinstance(step, str) and hasattr(value, step) and not isinstance(value, Arguments):
        return getattr(value, step)
    raise LookupError(f"select={select!r} finds no {step!r} in {describe(value)}")


def _children(value: Any) -> dict[int | str, Any]:
    """The parts of a container by index, key, field or argument name, in order; empty for anything else."""
    if isinstance(value, Arguments):
        return _arguments(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def _arguments(call: Arguments) -> dict[int | str, Any]:
    """Positional arguments under their index and, where the signature tells it, under their name; then keywords."""
    children: dict[int | str, Any] = dict(enumerate(call.args))
    try:
        names = [
            p.name
            for p in inspect.signature(call.module.forward).parameters.values()
            if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}
        ]
    except (TypeError, ValueError):  # a forward without a signature, such as a builtin
        names = []
    children.update(zip(names, call.args, strict=False))
    return {**children, **call.kwargs}


def _first(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    parts = (*value.args, *value.kwargs.values()) if isinstance(value, Arguments) else _children(value).values()
    for child in parts:
        if (tensor := _first(child)) is not None:
            return tensor
    return None
