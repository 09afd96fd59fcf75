"""One pass: ``f`` on Duals, under the interceptor, perhaps only as far as a named module."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from balanced_rep.autodiff._errors import UnsupportedError
from balanced_rep.autodiff._functions import watch_functions
from balanced_rep.autodiff._intercept import Interceptor
from balanced_rep.autodiff._session import Session, active

__all__ = ["Stop", "capture", "check_module", "run"]


class Stop(BaseException):
    """Ends a forward whose wanted activation is there; not an Exception, so that no model swallows it."""


def run(f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], session: Session) -> Any:
    """Calls ``f`` with everything in place that makes its functions carry tangents."""
    before = _rng_state()
    if "torch._dynamo" in sys.modules:  # else nothing can be compiled
        result = torch._dynamo.disable(_eagerly)(f, args, kwargs, session)  # pyright: ignore[reportCallIssue]
    else:
        result = _call(f, args, kwargs, session)
    if before is not None and not torch.equal(before, torch.get_rng_state()):
        raise UnsupportedError(
            "br.jvp: f changed torch's random number generator: it drew random numbers in code that is not seen here "
            "(compiled extensions, another library), or called torch.manual_seed. Every chunk of tangents would belong "
            "to a different function. Call model.eval(), or draw the numbers outside and pass them in."
        )
    return result


def _eagerly(f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], session: Session) -> Any:
    """Compiled parts of ``f`` run as they were written: a compiler cannot see through a Dual."""
    with _stance:
        return _call(f, args, kwargs, session)


class _SharedStance:
    """``set_stance("force_eager")`` for threads: the stance is the process's, so the last to leave restores it."""

    def __init__(self) -> None:
        self._lock, self._inside, self._held = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._held.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._held.close()


_stance = _SharedStance()


def _call(f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], session: Session) -> Any:
    with torch.no_grad(), watch_functions(), active(session), Interceptor(session):
        return f(*args, **kwargs)


def _rng_state() -> torch.Tensor | None:
    """State of the CPU generator, unless a tracer is on."""
    if torch._C._len_torch_dispatch_stack():
        return None
    return torch.get_rng_state()


def check_module(f: Any) -> None:
    """Refuses modules that tangents cannot follow, before anything runs.

    Args:
        f: What is to be differentiated.

    Raises:
        UnsupportedError: If a part of it is scripted or its replicas run in other threads.
        TypeError: If it cannot be called.
    """
    if not callable(f):
        raise TypeError(f"br.jvp: f is a {type(f).__name__}, which cannot be called")
    if isinstance(f, torch.jit.ScriptFunction):
        raise UnsupportedError("br.jvp: f is a scripted function, which tangents cannot follow; use the eager one")
    if not isinstance(f, nn.Module):
        return
    for name, module in f.named_modules():
        what = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"br.jvp: {what} is scripted or traced, where tangents cannot follow; use the eager one"
            )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise UnsupportedError(
                f"br.jvp: {what} is a DataParallel over {len(module.device_ids)} devices, whose replicas run in other "
                "threads; use model.module"
            )


def capture(f: nn.Module, output: str) -> Callable[..., Any]:
    """``f`` as a function that returns the output of its module ``output``, and stops there.

    Args:
        f: The model.
        output: Name of a module in it.

    Returns:
        A function of the same arguments.

    Raises:
        TypeError: If ``f`` is no module.
        ValueError: If it has no such module.
    """
    if not isinstance(f, nn.Module):
        raise TypeError(f"br.jvp: output={output!r} needs f to be a torch.nn.Module, got {type(f).__name__}")
    root = getattr(f, "_orig_mod", f)
    try:
        module = root.get_submodule(output)
    except AttributeError:
        import difflib

        near = difflib.get_close_matches(output, [n for n, _ in root.named_modules() if n], n=5)
        hint = f"; near names: {', '.join(map(repr, near))}" if near else ""
        raise ValueError(f"br.jvp: the model has no module {output!r}{hint}") from None
    # A stopped forward would leave offloaded weights where they are.
    stop = not any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in root.modules())

    def to_output(*args: Any, **kwargs: Any) -> Any:
        found: list[Any] = []

        def keep(_module: nn.Module, _args: Any, out: Any) -> None:
            if not found:
                found.append(out)
            if stop:
                raise Stop

        with _hooked(module, keep), contextlib.suppress(Stop):
            root(*args, **kwargs)
        if not found:
            raise ValueError(f"br.jvp: the model ran without calling its module {output!r}")
        return found[0]

    return to_output


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
