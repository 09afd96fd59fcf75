"""Adding a direction to the representations of a model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from balanced_rep.stats._record_time import Moment, TimestepSource
from balanced_rep.steering._direction import Direction

__all__ = ["Strength", "levels_after", "steer", "window"]

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
        ValueError: If a layer of the direction is not in the model, or does not have as many units.
        TypeError: If `model` is neither a module nor a pipeline.
    """
    root, layers = _layers(model, direction)
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
                now["strength"] = strength(levels[0])

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
    """
    return lambda level: strength if low <= level <= high else 0.0


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
            raise ValueError(f"steer: the model has no layer {name!r}; the direction was made with another one.")
        found[name] = (modules[own], vector)
    return model, found


def _hook(name: str, module: nn.Module, at: str, kind: str, vector: Tensor, now: dict[str, Any]) -> Callable[[], None]:
    def add(h: Tensor) -> Tensor:
        strength = now["strength"]
        if strength is None or (not isinstance(strength, Tensor) and strength == 0):
            return h  # bit for bit
        dim = 1 if kind == "map" else h.ndim - 1
        if h.shape[dim] != len(vector):
            raise ValueError(f"steer: {name} has {h.shape[dim]} units and its vector {len(vector)}.")
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


def levels_after(sigmas: Sequence[float], start: float, end: float) -> tuple[float, float]:
    """The window of noise levels between two fractions of a schedule.

    Args:
        sigmas: Decreasing levels, the last one 0.
        start: Fraction of the steps after which it begins.
        end: Fraction of the steps after which it ends.

    Returns:
        Smallest and largest level; empty (high < low) if no step is in between.
    """
    steps = sigmas[:-1]
    chosen = steps[round(start * len(steps)) : round(end * len(steps))]
    return (chosen[-1], chosen[0]) if chosen else (1.0, 0.0)
