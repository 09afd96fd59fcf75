"""The timestep (or noise level) of a forward: where the model was given it, and whether it is a wanted one."""

from __future__ import annotations

import functools
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TIMESTEP_NAMES", "Moment", "TimestepArg", "TimestepSource", "read_all", "wanted_timesteps"]

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas", "noise_labels", "c_noise", "time")
TimestepArg = str | int | Callable[[tuple[Any, ...], dict[str, Any]], Any] | None


@dataclass
class Moment:
    """The timestep argument of one forward.

    Attributes:
        source: Its values, or a flat copy of the tensor; values in accelerator memory are read only when asked for.
        dtype: dtype in which the model was given it.
    """

    source: tuple[float, ...] | Tensor
    dtype: torch.dtype = torch.float64

    @classmethod
    def of(cls, value: Any) -> Moment:
        """Takes a number or a tensor without waiting for a device; anything else has no values."""
        if isinstance(value, Tensor):
            return cls(value.detach().reshape(-1).clone(), value.dtype)
        if isinstance(value, Real):
            return cls((float(value),))
        return cls(())

    @property
    def deferred(self) -> bool:
        """The values are in accelerator memory, and nobody has waited for them yet."""
        return isinstance(self.source, Tensor) and self.source.device.type not in {"cpu", "meta"}

    @property
    def values(self) -> tuple[float, ...]:
        """One value or one per sample, each the shortest decimal that rounds to the number given; ``()`` if unknown."""
        read_all([self])
        return self.source if isinstance(self.source, tuple) else ()

    def known(self) -> tuple[float, ...]:
        """:attr:`values`; raises if there are none."""
        if values := self.values:
            return values
        raise ValueError(
            "record: no timestep was found in the arguments of the model; say where it is with timestep_arg= "
            "(a parameter name, a position, or a function of args and kwargs)"
        )

    def per_row(self, rows: int) -> tuple[float, ...]:
        """The timestep of each of ``rows`` samples.

        Args:
            rows: Number of samples.

        Returns:
            ``rows`` values.

        Raises:
            ValueError: If no timestep is known, or several that do not fit the samples.
        """
        if not rows:
            return ()
        values = self.known()
        if len(set(values)) == 1:
            return (values[0],) * rows
        if len(values) != rows:
            raise ValueError(f"record: {len(values)} different timesteps do not fit an activation of {rows} samples")
        return values

    def match(self, value: float, wanted: Iterable[float]) -> float | None:
        """The wanted timestep that ``value`` stands for: the same in :attr:`dtype`, or within a millionth of it."""
        for w in wanted:
            if math.isclose(value, w, rel_tol=1e-6) or _round(w, self.dtype) == _round(value, self.dtype):
                return w
        return None


def read_all(moments: Iterable[Moment]) -> None:
    """Replaces tensors by their values, in one transfer per device and dtype."""
    unread: defaultdict[tuple[torch.device, torch.dtype], list[Moment]] = defaultdict(list)
    for moment in moments:
        if isinstance(moment.source, Tensor) and not moment.source.is_meta:
            unread[moment.source.device, moment.source.dtype].append(moment)
    for (_, dtype), group in unread.items():
        sources = [m.source for m in group if isinstance(m.source, Tensor)]
        values = iter(torch.cat(sources).double().tolist())
        for moment, source in zip(group, sources, strict=True):
            moment.source = tuple(_shortest(next(values), dtype) for _ in range(source.numel()))


class TimestepSource:
    """Finds the timestep in the arguments of the model.

    Without ``where`` it is the keyword, or the parameter of the model's signature, that bears one of
    :data:`TIMESTEP_NAMES`, the earlier name first.
    """

    def __init__(self, model: nn.Module, where: TimestepArg = None) -> None:
        self._where = where
        self._positions, open_ended = _parameters(model)
        if isinstance(where, str) and not open_ended and where not in self._positions:
            raise ValueError(
                f"record: timestep_arg={where!r} is no parameter of {type(model).__name__}.forward, "
                f"which takes {', '.join(self._positions) or 'none'}"
            )

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument, or ``None`` if it was not passed."""
        if callable(self._where):
            return self._where(args, kwargs)
        if isinstance(self._where, int):
            return args[self._where] if -len(args) <= self._where < len(args) else None
        for name in TIMESTEP_NAMES if self._where is None else (self._where,):
            if name in kwargs:
                return kwargs[name]
            position = self._positions.get(name)
            if position is not None and position < len(args):
                return args[position]
        return None


def wanted_timesteps(timesteps: float | Iterable[float] | Tensor | None) -> tuple[float, ...] | None:
    """The values of ``timesteps=``.

    Args:
        timesteps: One value, several, or ``None`` for all.

    Returns:
        Floats, or ``None``.

    Raises:
        ValueError: If there are none.
    """
    if timesteps is None:
        return None
    if isinstance(timesteps, Tensor):
        values = Moment.of(timesteps).values
    else:
        values = tuple(float(t) for t in (timesteps if isinstance(timesteps, Iterable) else (timesteps,)))
    if not values:
        raise ValueError("record: timesteps is empty; pass None to record every forward")
    return values


def _parameters(model: nn.Module) -> tuple[dict[str, int], bool]:
    """Positions of the named positional parameters, and whether other names may be passed too."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward without a signature, such as a builtin
        return {}, True
    positions = {p.name: i for i, p in enumerate(parameters) if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}}
    return positions, any(p.kind in {p.VAR_KEYWORD, p.KEYWORD_ONLY} for p in parameters)


@functools.lru_cache(maxsize=4096)
def _shortest(value: float, dtype: torch.dtype) -> float:
    if not dtype.is_floating_point or dtype == torch.float64 or not math.isfinite(value):
        return value
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if _round(candidate, dtype) == value:
            return candidate
    return value


def _round(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype, device="cpu").item() if dtype.is_floating_point else value
