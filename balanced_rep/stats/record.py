"""`record`: representation statistics of chosen layers while a model runs, without keeping an activation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from balanced_rep.stats._record_hooks import Options, Recorder
from balanced_rep.stats._record_layers import Layer, LayerSpec, resolve_layers
from balanced_rep.stats._record_results import Recording
from balanced_rep.stats._record_select import Reduction, Select
from balanced_rep.stats._record_time import TimestepArg, TimestepSource, wanted_timesteps

__all__ = ["Recording", "record"]


def record(
    model: nn.Module,
    layers: LayerSpec,
    at: Literal["input", "output"] = "output",
    *,
    call: int | Literal["all"] | None = None,
    select: Select = None,
    pool: Literal["max", "mean"] | None = None,
    pool_dim: int | Sequence[int] | None = None,
    per: Literal["sample", "unit"] = "sample",
    correction: float = 0,
    threshold: float = 0.0,
    histogram: bool = False,
    entropy: bool = False,
    timesteps: float | Iterable[float] | Tensor | None = None,
    timestep_arg: TimestepArg = None,
    stop: bool = False,
) -> Recorder:
    """Statistics of the inputs or outputs of layers during every call of ``model`` inside the ``with``.

    Each tensor is reduced where it is produced; only ten float64 numbers per sample (or unit) are kept, on the device
    they are on, and no hook waits for the device.

    Args:
        model: The module that will be called.
        layers: Exact module names (``str``), compiled patterns that must match a whole name, or several of them.
        at: Read what the layer is called with or what it returns.
        call: Which call to record of a layer that the model calls several times in a forward: ``k`` counted from 0,
            ``-1`` for the last, ``"all"`` for each under the key ``(name, k)``. ``None`` expects one call and raises
            at the second.
        select: Which tensor of a structured input or output: an index, a keyword, key or attribute, or a path of
            them; ``None`` takes the first tensor.
        pool: ``"max"`` or ``"mean"`` over spatial or token dims in front of the statistics.
        pool_dim: The dims to pool; by default dims 2.. of (N, C, *spatial) and dim 1 of (N, T, D).
        per: ``"sample"``: one result per sample, over everything else, shape (samples,). ``"unit"``: one per channel
            of (N, C, *spatial) or feature of (N, D) or (N, T, D), over everything else and merged over forwards.
        correction: Degrees of freedom that ``std`` and ``var`` subtract.
        threshold: A value is active if it is greater than this.
        histogram: Also keep what ``topk_share``, ``gini`` and ``quantile`` need.
        entropy: Also keep what ``energy_entropy`` needs.
        timesteps: Record only samples at these timesteps (or noise levels); other forwards are left alone.
        timestep_arg: Where the model gets its timestep: a parameter name, a position, or a function of
            ``(args, kwargs)``. By default a parameter named timestep, t, sigma or the like.
        stop: End each recorded forward as soon as all layers have been recorded: the call of the model returns
            ``None``. Only for direct calls of the model.

    Returns:
        A context manager that gives the :class:`Recording`, a mapping of layer names to statistics.

    Raises:
        TypeError: If ``model`` is not a module or ``layers`` are no names.
        ValueError: If a layer is not found or cannot be heard, or an argument is out of range or unclear.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> with record(model, "1") as recording:
        ...     y = model(torch.randn(4, 3))
        >>> recording["1"].std.shape
        torch.Size([4])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(_not_a_module(model))
    _check_choice("at", at, ("input", "output"))
    _check_choice("per", per, ("sample", "unit"))
    _check_choice("pool", pool, (None, "max", "mean"))
    if call not in (None, "all") and (isinstance(call, bool) or not isinstance(call, int) or call < -1):
        raise ValueError(f'record: call must be None, "all", -1 or an index from 0, got {call!r}')
    if pool is None and pool_dim is not None:
        raise ValueError(f"record: pool_dim={pool_dim} is given without pool; pass pool='max' or pool='mean' as well")
    if not (math.isfinite(correction) and correction >= 0) or math.isnan(threshold):
        raise ValueError(
            "record: correction must be a finite number >= 0 and threshold a number, got "
            f"correction={correction!r}, threshold={threshold!r}"
        )
    found = resolve_layers(model, layers)
    if stop:
        _check_stop_call(call, found)
    reduction = Reduction(per, pool, pool_dim, float(correction), float(threshold), histogram, entropy)
    options = Options(at, call, select, reduction, wanted_timesteps(timesteps), stop)
    return Recorder(model, found, TimestepSource(model, timestep_arg), options)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"record: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_stop_call(call: int | str | None, layers: list[Layer]) -> None:
    """A stopped forward never shows later calls, so which one is meant has to be clear before."""
    if call in (-1, "all"):
        raise ValueError(
            f"record: call={call!r} with stop=True: which call is the last is known only at the end of the forward; "
            "give an index (call=0 is the first)"
        )
    if call is None:
        for layer in layers:
            if next(layer.module.parameters(), None) is None and next(layer.module.buffers(), None) is None:
                raise ValueError(
                    f"record: layer {layer.name!r} ({type(layer.module).__name__}) has no weights, and models often "
                    "call such a layer several times; stop=True would end the forward at the first call and hide the "
                    'others. Give call= (0 is the first; `recording.calls` of a run with call="all" counts them), or '
                    'record at="input" of the layer that comes next'
                )


def _not_a_module(model: Any) -> str:
    message = f"record: model must be a torch.nn.Module, got {type(model).__name__}"
    parts = getattr(model, "components", None)  # diffusers pipelines
    if isinstance(parts, dict):
        modules = [f".{name}" for name, part in parts.items() if isinstance(part, nn.Module)]
        message += f"; pass the part of the pipeline that is to be recorded: one of {', '.join(modules)}"
    return message
