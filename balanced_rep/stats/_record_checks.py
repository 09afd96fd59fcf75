"""What a `record` complains about: calls that were not said which, layers that never ran, transforms around a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch._C._functorch import peek_interpreter_stack

__all__ = ["Overheard", "check_calls", "check_ran", "refuse_transforms"]


@dataclass
class Overheard:
    """What a record noticed but did not record; it explains why nothing was.

    Attributes:
        outside: Layers that ran outside a call of the model.
        threads: Number of calls of the model by other threads.
        timesteps: Timesteps of forwards that were not wanted.
    """

    outside: set[str] = field(default_factory=set)
    threads: int = 0
    timesteps: set[float] = field(default_factory=set)


def refuse_transforms() -> None:
    """Raises where a statistic taken from inside a forward would be wrong, or belong to a trace.

    Raises:
        RuntimeError: Under `torch.func` transforms, forward-mode AD, tracing, compiling or CUDA graph capture.
    """
    if peek_interpreter_stack() is not None:
        reason = "inside a torch.func transform (vmap, grad, jvp, ...); call the model on a plain batch instead"
    elif torch.autograd.forward_ad._current_level >= 0:
        reason = "inside forward_ad.dual_level, as recorded statistics carry no tangent; call the model outside of it"
    elif torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or _makes_a_graph():
        reason = "while the model is being compiled, exported or traced; record the eager model"
    elif torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        reason = "while a CUDA graph is being captured; record before or after"
    else:
        return
    raise RuntimeError(f"record: a model cannot be recorded {reason}")


def _makes_a_graph() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def check_calls(name: str, kind: str, shapes: Sequence[object], wanted: int | str | None) -> None:
    """Checks the calls that one layer got in one forward against ``call=``.

    Args:
        name: The layer.
        kind: Its type.
        shapes: What it was called with or gave, per call.
        wanted: The value of ``call=``.

    Raises:
        ValueError: If ``call=`` does not say which call is meant, or means one that was not made.
    """
    calls = len(shapes)
    if wanted is None and calls > 1:
        raise ValueError(
            f"{_made(name, kind, shapes)}. Say which call to record: call=0 to call={calls - 1}, call=-1 for the "
            'last, or call="all"'
        )
    if isinstance(wanted, int) and 0 < calls <= wanted:
        raise ValueError(f"{_made(name, kind, shapes)}; there is no call={wanted} (counted from 0)")


def _made(name: str, kind: str, shapes: Sequence[object]) -> str:
    on = ", ".join(str(tuple(shape)) if isinstance(shape, torch.Size) else str(shape) for shape in shapes)
    return f"record: layer {name!r} ({kind}) was called {len(shapes)} times in one forward, on {on}"


def check_ran(
    forwards: int, totals: Mapping[str, int], named: Sequence[str], found: Sequence[str], overheard: Overheard
) -> None:
    """Checks, when a record closes, that there is something in it.

    Args:
        forwards: Number of recorded forwards.
        totals: Calls of each layer in all of them.
        named: Layers asked for by name; each has to have run.
        found: Layers found by a pattern; one has to have run.
        overheard: What else happened.

    Raises:
        RuntimeError: If a layer ran zero times.
    """
    if not forwards:
        raise RuntimeError(f"record: nothing was recorded: {_why_nothing(overheard)}")
    silent = [name for name in named if not totals[name]]
    if found and not any(totals[name] for name in found):
        silent += found
    if silent:
        listed = ", ".join(map(repr, silent[:6])) + (f", ... ({len(silent)} in all)" if len(silent) > 6 else "")
        raise RuntimeError(
            f"record: ran zero times in {forwards} forward(s): {listed}. The model may skip the layer, use its weights "
            "without calling it (as fused attention does with a projection), or run compiled code, which ignores hooks"
        )


def _why_nothing(overheard: Overheard) -> str:
    if overheard.timesteps:
        seen = ", ".join(f"{t:g}" for t in sorted(overheard.timesteps)[:12])
        return f"no forward was at one of timesteps=; seen: {seen}"
    if overheard.outside:
        return (
            f"{', '.join(map(repr, sorted(overheard.outside)[:3]))} ran, but not through a call of the model itself: a "
            "method of it (as vae.encode), model.forward, or a part was called. Record the module that is called"
        )
    if overheard.threads:
        return (
            f"other threads called the model {overheard.threads} times, and a record hears only the thread that opened "
            "it. Open it in the thread that calls the model; DataParallel is not supported"
        )
    return (
        "the model was not called inside the `with`, or a compiled version of it was, which ignores hooks that are "
        "added later"
    )
