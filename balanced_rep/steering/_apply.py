"""Adding a direction to the representations of a model while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any

from torch import Tensor, nn

from balanced_rep.models import Tap
from balanced_rep.stats._record_layers import near_names
from balanced_rep.stats._record_time import Moment, TimestepSource
from balanced_rep.steering._direction import Direction

__all__ = ["Strength", "another_width", "as_strengths", "levels_after", "steer", "window"]

Strength = float | Tensor | Callable[[float], float | Tensor]


@contextmanager
def steer(model: Any, direction: Direction, strength: Strength) -> Iterator[None]:
    """Adds `strength * vector` to the layers of a direction in every forward pass inside the `with`.

    The model is left as it was found, also after an error. Equation 11 of the paper.

    Args:
        model: A denoiser that the direction was made with; or a diffusers pipeline or network of the same architecture.
        direction: What to add.
        strength: A number; a tensor `(batch,)` with one for each row of the forward pass; or a function of the noise
            level of the pass (for pipelines and networks: of their timestep) that gives one of these, see `window`.

    Yields:
        Nothing.

    Raises:
        ValueError: If a layer of the direction is not in the model, or does not have as many units; or the strength is
            not finite. At once, if the number of units is known; where only a forward pass tells it, in the first.
        TypeError: If `model` is neither a module nor a pipeline, `direction` no direction or `strength` none of these.
    """
    if not isinstance(direction, Direction):
        raise TypeError(f"steer: a Direction is needed, see steering.direction, got {type(direction).__name__}.")
    root, layers = _layers(model, direction)
    if not callable(strength):
        _check_strength("steer", strength)
    now: dict[str, Any] = {"strength": None if callable(strength) else strength}
    with ExitStack() as undo:
        if callable(strength):
            source = TimestepSource(root, None)

            def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
                levels = Moment.of(source(args, kwargs)).values
                if len(set(levels)) != 1:
                    got = f"has {len(set(levels))}" if levels else "names none that is known (sigma, timestep, ...)"
                    raise ValueError(
                        f"steer: a strength that depends on the noise level needs one level per pass; this one {got}."
                    )
                now["strength"] = chosen = strength(levels[0])
                if not isinstance(chosen, Tensor):  # the values of one are left to whoever made it: a device would wait
                    _check_strength("steer", chosen)

            undo.callback(root.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name, (module, vector) in layers.items():
            undo.callback(_hook(name, module, direction.at[name], direction.kind[name], vector, now))
        yield


def window(strength: float | Tensor, low: float, high: float) -> Callable[[float], float | Tensor]:
    """A strength that acts at some noise levels (or timesteps) only.

    Args:
        strength: The strength there.
        low: Smallest level at which it acts.
        high: Largest level at which it acts.

    Returns:
        What `steer` takes.

    Raises:
        ValueError: If the strength is not finite, or no level can be between the two.
        TypeError: If the strength is neither a number nor a tensor.
    """
    _check_strength("window", strength)
    if not low <= high:
        raise ValueError(f"window: low must be at most high, got {low} and {high}: it would act nowhere.")
    return lambda level: strength if low <= level <= high else 0.0


def _check_strength(what: str, strength: Any) -> None:
    """A finite number, or a tensor of them with one for each row."""
    if not isinstance(strength, Real | Tensor):
        raise TypeError(
            f"{what}: a strength is a number, a tensor (batch,) or a function of the noise level that gives one of "
            f"these, got {strength!r}."
        )
    if isinstance(strength, Tensor) and strength.ndim > 1:
        raise ValueError(
            f"{what}: a tensor of strengths has shape () or (batch,), one for each row, got {tuple(strength.shape)}."
        )
    if not (bool(strength.isfinite().all()) if isinstance(strength, Tensor) else math.isfinite(strength)):
        raise ValueError(f"{what}: strengths must be finite, got {strength}.")


def as_strengths(what: str, strengths: Any) -> list[float]:
    """Checks a list of strengths.

    Args:
        what: Beginning of messages.
        strengths: Finite numbers, a sequence of them or a tensor `(S,)`.

    Returns:
        The numbers, at least one.

    Raises:
        ValueError: If there is none, or one is no finite number.
    """
    found = strengths.tolist() if hasattr(strengths, "tolist") else strengths
    listed = list(found) if isinstance(found, Iterable) and not isinstance(found, str) else []
    numbers = [s.item() if isinstance(s, Tensor) and not s.ndim else s for s in listed]
    if not numbers or not all(isinstance(s, Real) and math.isfinite(s) for s in numbers):
        raise ValueError(
            f"{what}: strengths must be finite numbers, at least one, such as (0.0, 0.5, 1.0), got {strengths!r}."
        )
    return [float(s) for s in numbers]


def _units(model: nn.Module, name: str, module: nn.Module, at: str) -> int | None:
    """How many units a layer has, if that is known before the model runs."""
    labelled = getattr(model, "layers", None)
    tap = labelled.get(name) if isinstance(labelled, Mapping) else None
    if isinstance(tap, Tap) and tap.at == at and tap.units is not None:
        return tap.units
    sizes = ("in_features", "in_channels") if at == "input" else ("out_features", "out_channels")
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return None
    return next(getattr(module, size) for size in sizes if hasattr(module, size))


def _layers(model: Any, direction: Direction) -> tuple[nn.Module, dict[str, tuple[nn.Module, Tensor]]]:
    """The module that is called, and the layers in it: a denoiser's `net.x` is `x` in the network itself."""
    parts = getattr(model, "components", None)
    if isinstance(parts, dict):
        model = parts.get("unet") or parts.get("transformer")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"steer: a module or a pipeline with a unet or transformer is needed, got {type(model).__name__}."
        )
    modules = dict(model.named_modules())
    found = {}
    for name, vector in direction.vectors.items():
        own = name if name in modules else name.removeprefix("net.")
        if own not in modules:
            near = near_names(own, list(modules)) or [other for other in modules if other][-3:]
            raise ValueError(
                f"steer: the model has no layer {name!r}; the direction was made with another one. It has "
                f"{'such as ' + ', '.join(near) if near else 'none'}."
            )
        units = _units(model, name, modules[own], direction.at[name])
        if units is not None and units != len(vector):
            raise ValueError(another_width("steer", name, units, vector))
        found[name] = (modules[own], vector)
    return model, found


def another_width(what: str, name: str, units: int, vector: Tensor) -> str:
    """What is said of a layer and a vector that differ in size."""
    return (
        f"{what}: layer {name!r} of this model has {units} units and its vector {len(vector)}; the direction was made "
        "with another model. Make it with this one, or one of the same architecture."
    )


def _hook(name: str, module: nn.Module, at: str, kind: str, vector: Tensor, now: dict[str, Any]) -> Callable[[], None]:
    def add(h: Tensor) -> Tensor:
        strength = now["strength"]
        if strength is None or (not isinstance(strength, Tensor) and strength == 0):
            return h  # bit for bit
        dim = 1 if kind == "map" else h.ndim - 1
        if h.shape[dim] != len(vector):
            raise ValueError(another_width("steer", name, h.shape[dim], vector))
        tail = h.ndim - 1 - dim
        v = vector.to(h.device, h.dtype).view(-1, *[1] * tail)
        if isinstance(strength, Tensor):
            strength = strength.to(h.device, h.dtype)
            if strength.ndim == 1:
                if len(strength) != len(h):
                    raise ValueError(f"steer: {len(strength)} strengths for a batch of {len(h)}.")
                strength = strength.view(-1, *[1] * (h.ndim - 1))
        return h + strength * v

    def before(_module: nn.Module, args: Any) -> tuple[Any, ...]:
        return add(args[0]), *args[1:]

    def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return add(output)

    if at == "input":
        return module.register_forward_pre_hook(before).remove
    return module.register_forward_hook(after).remove


def levels_after(sigmas: Sequence[float], steps: Sequence[float]) -> tuple[float, float]:
    """The window of noise levels between two fractions of a schedule.

    Args:
        sigmas: Decreasing levels, the last one that of the result.
        steps: Fractions of the steps after which the window begins and ends.

    Returns:
        Smallest and largest level.

    Raises:
        ValueError: If these are no two fractions in order, or no step is in between.
    """
    ends = [float(step) for step in steps] if isinstance(steps, Iterable) else []
    if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1:
        raise ValueError(
            "steered_samples: steps= must be two fractions of the schedule, 0 <= start < end <= 1, got "
            f"{steps}; a window that is empty or reversed edits nothing."
        )
    n = len(sigmas) - 1
    first, last = (round(share * n) for share in ends)
    if first == last:
        raise ValueError(
            f"steered_samples: steps=({ends[0]:g}, {ends[1]:g}) holds none of the {n} steps; take a wider window, or "
            "more steps."
        )
    return sigmas[last - 1], sigmas[first]
