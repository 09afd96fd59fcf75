"""Custom ``torch.autograd.Function`` classes: they pass by ``__torch_function__``, so their ``apply`` is watched.

Run unwatched, a Function's ``forward`` would be differentiated as written, and its own ``jvp`` ignored: wrong for a
straight-through estimator, say. The patch is in place only while some thread is inside ``br.jvp``, and acts only on
calls that carry tangents.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch._functorch import utils as functorch_utils
from torch.autograd import Function
from torch.utils import _pytree as pytree

from balanced_rep.autodiff._dual import Dual
from balanced_rep.autodiff._errors import FallbackError, UnsupportedError
from balanced_rep.autodiff._fallback import fallback
from balanced_rep.autodiff._registry import RULES
from balanced_rep.autodiff._session import calling_module, current

__all__ = ["watch_functions"]

_lock = threading.Lock()
_depth = 0
_original_apply = Function.__dict__["apply"]
_original_unwrap = functorch_utils.unwrap_dead_wrappers


def _has_duals(args: Any) -> bool:
    return any(isinstance(x, Dual) for x in pytree.tree_leaves(args))


def _apply(cls: type, *args: Any, **kwargs: Any) -> Any:
    session = current()
    if session is None or not _has_duals((args, kwargs)):
        return _original_apply.__get__(None, cls)(*args, **kwargs)
    if (entry := RULES.get(cls)) is not None:
        session.calls["rule", cls.__name__] += 1
        with torch._C.DisableTorchFunctionSubclass():
            return entry.fn(*args, **kwargs)
    if cls.jvp is Function.jvp or cls.setup_context is Function.setup_context:
        lacks = "no jvp" if cls.jvp is Function.jvp else "no setup_context, which torch.func needs for its jvp"
        raise UnsupportedError(
            f"br.jvp: the autograd.Function {cls.__name__}{calling_module()} has {lacks}; differentiating the code of "
            f"its forward could be wrong. Register a rule: br.autodiff.register_rule({cls.__name__}, rule)."
        )
    if session.strict:
        raise FallbackError(f"br.jvp: strict=True, and the autograd.Function {cls.__name__} has no multi-tangent rule.")
    session.calls["fallback", cls.__name__] += 1
    with torch._C.DisableTorchFunctionSubclass():
        apply = _original_apply.__get__(None, cls)
        return fallback(apply, cls.__name__, args, kwargs, inplace=False)


def _unwrap(args: Any) -> Any:
    """Every ``apply`` calls this: those that were taken off their class before the patch are caught here."""
    if current() is not None and _has_duals(args):
        cls = sys._getframe(1).f_locals.get("cls")
        name = getattr(cls, "__name__", "?")
        raise UnsupportedError(
            f"br.jvp: `{name}.apply` was stored in a variable before br.jvp ran{calling_module()}, and is not seen. "
            f"Call {name}.apply(...) by its class, or register a rule for the function that calls it."
        )
    return _original_unwrap(args)


@contextlib.contextmanager
def watch_functions() -> Iterator[None]:
    """Watches ``apply`` of every autograd.Function inside the block."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            Function.apply = classmethod(_apply)  # pyright: ignore[reportAttributeAccessIssue]
            functorch_utils.unwrap_dead_wrappers = _unwrap
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                Function.apply = _original_apply  # pyright: ignore[reportAttributeAccessIssue]
                functorch_utils.unwrap_dead_wrappers = _original_unwrap
