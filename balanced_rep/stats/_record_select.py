"""Which tensor of a module's input or output is recorded, and along which of its dims the statistics go."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

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
        extras: Further arguments of ``representation_stats``.
    """

    per: str
    pool: str | None
    pool_dim: int | Sequence[int] | None
    extras: Mapping[str, Any]

    def __call__(self, x: Tensor) -> RepresentationStats:
        """Statistics of ``x`` (batch, ...), shape (batch,) or (units,)."""
        return representation_stats(x, dim=self._dims(x), pool=self.pool, pool_dim=self.pool_dim, **self.extras)

    def _dims(self, x: Tensor) -> tuple[int, ...]:
        """The dims to reduce, counted after pooling."""
        if x.ndim < 2:
            raise ValueError(f"the tensor has shape {tuple(x.shape)}; expected is (batch, ...) with two dims or more")
        left = x.ndim
        if self.pool is not None:
            pooled = self._pooled(x)
            if 0 in pooled:
                raise ValueError(f"pool_dim={self.pool_dim} pools dim 0 of shape {tuple(x.shape)}, which is the batch")
            left -= len(pooled)
        if self.per == "sample":
            return tuple(range(1, left))
        if self.pool is not None:
            return (0,)
        unit = 2 if x.ndim == 3 else 1  # (N, T, D) keeps D, (N, C, *spatial) keeps C
        return tuple(d for d in range(x.ndim) if d != unit)

    def _pooled(self, x: Tensor) -> tuple[int, ...]:
        if self.pool_dim is None:
            return (1,) if x.ndim == 3 else tuple(range(2, x.ndim))
        dims = (self.pool_dim,) if isinstance(self.pool_dim, int) else tuple(self.pool_dim)
        return tuple(d % x.ndim for d in dims)


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
