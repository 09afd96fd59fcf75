"""Ends a forward from inside a hook, and says no where that would harm.

The signal is a `BaseException`, so that no `except Exception` in a model can swallow it. It unwinds the model's frames
to the root call, where an instance-level `_call_impl` turns it into a `None` result: hooks of the root that expect its
output are skipped with the rest, as they are when a forward raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import nn

__all__ = ["Stop", "catch_at_root", "frames_outside", "refuse_stop", "refuse_used_output"]

_CALL = "_call_impl"
_PIPELINES = {"DiffusionPipeline", "ModularPipeline", "ModularPipelineBlocks"}
_SHARDED = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"}
_REMEDY = "Use stop=False here"


class Stop(BaseException):
    """Unwinds a forward whose wanted layers have all been recorded.

    Attributes:
        owner: The record that stops; nobody else may swallow the signal.
    """

    def __init__(self, owner: object) -> None:
        super().__init__("balanced_rep.record ended this forward")
        self.owner = owner


def catch_at_root(model: nn.Module, call: Callable[[Callable[..., Any], Any, Any], Any]) -> Callable[[], None]:
    """Routes calls of ``model`` through ``call(original, args, kwargs)``.

    Args:
        model: The root.
        call: Runs the original call and may return something else.

    Returns:
        A function that restores the model.
    """
    original = getattr(model, _CALL)
    before = vars(model).get(_CALL)

    def through(*args: Any, **kwargs: Any) -> Any:
        return call(original, args, kwargs)

    def restore() -> None:
        if vars(model).get(_CALL) is not through:
            return
        if before is None:
            del vars(model)[_CALL]
        else:
            vars(model)[_CALL] = before

    vars(model)[_CALL] = through
    return restore


def refuse_stop(model: nn.Module) -> None:
    """Raises if ending a forward half-way would leave the model in a bad state.

    Raises:
        RuntimeError: If a module is sharded, or has hooks that put state back after its forward.
    """
    for name, module in model.named_modules():
        what = f"record: stop=True is refused: module {name!r}" if name else "record: stop=True is refused: the model"
        sharded = _SHARDED.intersection(c.__name__ for c in type(module).__mro__)
        if sharded:
            raise RuntimeError(
                f"{what} is wrapped in {min(sharded)}, which has to see the end of every forward to stay in step with "
                f"its other devices. {_REMEDY}, or record and call the plain module (`model.module`)"
            )
        if _restores_state(getattr(module, "_hf_hook", None)):
            raise RuntimeError(
                f"{what} has an accelerate hook ({type(module._hf_hook).__name__}) that moves its weights back after "
                f"the forward; a stopped forward would leave them where they are. {_REMEDY}, or load the model without "
                "offloading"
            )
        if hooks := getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
            raise RuntimeError(
                f"{what} has diffusers hooks ({', '.join(map(str, hooks))}: offloading, casting or caching) that put "
                f"state back after the forward. {_REMEDY}, or remove the hooks first"
            )


def refuse_used_output(model: nn.Module, outside: frozenset[int]) -> None:
    """Raises if code between the body of the ``with`` and this call of ``model`` is known to use its output.

    Args:
        model: The root that is being called.
        outside: What :func:`frames_outside` said when the ``with`` was entered.

    Raises:
        RuntimeError: If another module or a diffusers pipeline is calling.
    """
    call_impl = nn.Module._call_impl.__code__
    for frame in _frames(sys._getframe(1)):
        if id(frame) in outside:
            return
        caller = None
        if frame.f_code is call_impl:
            caller = f"{type(frame.f_locals['self']).__name__}, another module,"
        elif (pipeline := _owner(frame)) is not None:
            caller = f"the pipeline {pipeline.__name__}"
        if caller:
            raise RuntimeError(
                f"record: stop=True is refused: {type(model).__name__} is being called by {caller} which needs its "
                "output, and a stopped forward has none. Call the model directly, as in "
                f"`with record(unet, ..., stop=True): unet(x, t, cond)`, or use stop=False"
            )


def frames_outside() -> frozenset[int]:
    """The frames around the ``with`` statement that is being entered, for :func:`refuse_used_output`."""
    # Told apart by identity and not held: holding a frame would keep its local variables alive. Those of contextlib
    # are left out, because they end before the body runs and another frame may get their address.
    return frozenset(id(f) for f in _frames(sys._getframe(2)) if f.f_globals.get("__name__") != "contextlib")


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _owner(frame: FrameType) -> type | None:
    """The pipeline class whose method this frame runs."""
    # Found by the code's qualified name: frame.f_locals would copy, and keep alive, the variables of the caller.
    owner = frame.f_globals.get(frame.f_code.co_qualname.partition(".")[0])
    if isinstance(owner, type) and _PIPELINES.intersection(c.__name__ for c in owner.__mro__):
        return owner
    return None


def _restores_state(hook: Any) -> bool:
    """True for every accelerate hook but those that only move inputs (an AlignDevicesHook without offload)."""
    if hook is None:
        return False
    if parts := getattr(hook, "hooks", None):  # accelerate's SequentialHook
        return any(map(_restores_state, parts))
    return type(hook).__name__ != "ModelHook" and getattr(hook, "offload", True) is not False
