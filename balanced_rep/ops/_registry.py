"""One op, one record: the reference defines the result, every other backend must agree with it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["ORDER", "REGISTRY", "BackendError", "Impl", "OpSpec", "backend", "forced_backend", "missing", "register"]

ENV_VAR = "BALANCED_REP_BACKEND"
ORDER = ("cuda", "triton", "cpp", "reference")  # fastest first; the reference always fits

logger = logging.getLogger("balanced_rep")

_UNSET = "unset"  # distinguishes backend(None), which asks for automatic choice, from no backend() block at all
_forced: ContextVar[str | None] = ContextVar("balanced_rep_backend", default=_UNSET)


class BackendError(RuntimeError):
    """Raised when the requested backend cannot run a call; says why, and which backends can."""


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    Attributes:
        target: ``"module:function"``, imported on first use, so that importing ``balanced_rep``
            imports neither Triton nor a compiled extension.
        supports: Takes the arguments of the op; returns ``None`` when the call fits, else the reason as text.
    """

    target: str
    supports: Callable[..., str | None]

    @functools.cached_property
    def fn(self) -> Callable[..., Any]:
        """The imported function."""
        module, name = self.target.split(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class OpSpec:
    """Everything that dispatch, tests, benchmarks, ``balanced-rep doctor`` and the docs know about an op.

    Attributes:
        name: The op's name; ``torch.ops.balanced_rep.<name>`` is its registered form.
        reference: Plain torch in float64, differentiable in both modes: the definition of the result.
        impls: Backend name to implementation; a backend that is absent is not implemented.
        inputs: ``inputs(generator, dtype) -> tuple`` of arguments for one representative call.
        tolerance: dtype of the input to ``(rtol, atol)`` against the float64 reference.
        outputs: For an op whose implementations write into given memory: takes the arguments, returns uninitialised
            outputs. They are called as ``fn(*args, out=outputs)``; the reference returns its results.
    """

    name: str
    reference: Callable[..., Any]
    impls: dict[str, Impl] = field(default_factory=dict)
    inputs: Callable[[torch.Generator, torch.dtype], tuple[Any, ...]] | None = None
    tolerance: dict[torch.dtype, tuple[float, float]] = field(default_factory=dict)
    outputs: Callable[..., tuple[torch.Tensor, ...]] | None = None

    def why_not(self, backend_name: str, *args: Any) -> str | None:
        """``None`` if the backend can run this call, else the reason it cannot."""
        if backend_name == "reference":
            return None
        impl = self.impls.get(backend_name)
        return "not implemented for this op" if impl is None else impl.supports(*args)

    def explain(self, *args: Any) -> dict[str, str | None]:
        """Every backend, in the order of automatic choice, with ``None`` or the reason it cannot run this call."""
        return {name: self.why_not(name, *args) for name in ORDER}

    def choose(self, *args: Any) -> str:
        """Picks the backend for a call.

        Args:
            *args: The arguments of the call.

        Returns:
            Its name.

        Raises:
            BackendError: If a backend is forced that cannot run it.
        """
        forced = forced_backend()
        if forced is None:
            return next(name for name in ORDER if self.why_not(name, *args) is None)
        if (reason := self.why_not(forced, *args)) is not None:
            able = ", ".join(name for name, why in self.explain(*args).items() if why is None)
            raise BackendError(
                f"{self.name}: backend {forced!r} cannot run this call: {reason}. Backends that can: {able}."
            )
        return forced

    def __call__(self, *args: Any, out: tuple[torch.Tensor, ...] | None = None) -> Any:
        choice = self.choose(*args)
        _log_choice(self.name, choice)
        if self.outputs is None:
            return self.reference(*args) if choice == "reference" else self.impls[choice].fn(*args)
        out = self.outputs(*args) if out is None else out
        if choice == "reference":
            for given, value in zip(out, self.reference(*args), strict=True):
                given.copy_(value)
        else:
            self.impls[choice].fn(*args, out=out)
        return out


@functools.cache
def _log_choice(op: str, choice: str) -> None:
    """Logs each (op, backend) pair once per process."""
    logger.info("%s runs on backend %r", op, choice)


REGISTRY: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Adds an op to the registry.

    Args:
        spec: The op.

    Returns:
        ``spec``.

    Raises:
        ValueError: If the name is taken or a backend is unknown.
    """
    if spec.name in REGISTRY:
        raise ValueError(f"op {spec.name!r} is registered twice")
    if unknown := set(spec.impls) - set(ORDER):
        raise ValueError(f"op {spec.name!r} names unknown backends {sorted(unknown)}; known: {', '.join(ORDER)}")
    REGISTRY[spec.name] = spec
    return spec


def _checked(name: str, origin: str) -> str:
    if name not in ORDER:
        raise BackendError(f"{origin} asks for backend {name!r}; known backends: {', '.join(ORDER)}.")
    return name


def forced_backend() -> str | None:
    """The backend asked for by :func:`backend` or ``BALANCED_REP_BACKEND``.

    Returns:
        Its name; ``None`` means automatic choice.

    Raises:
        BackendError: If the environment variable names no known backend.
    """
    name = _forced.get()
    if name != _UNSET:
        return name
    name = os.environ.get(ENV_VAR) or None
    return None if name is None else _checked(name, ENV_VAR)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Forces one backend inside the block, in this thread.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``; ``None`` chooses automatically even where
            ``BALANCED_REP_BACKEND`` is set.

    Yields:
        Nothing.

    Raises:
        BackendError: Here, if the name is unknown; at the call inside the block, if the backend cannot run it.
    """
    token = _forced.set(None if name is None else _checked(name, "backend()"))
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def missing(module: str) -> str | None:
    """``None`` if ``module`` can be found, else a reason that names it. Nothing is imported."""
    try:
        found = importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a missing parent package; a half-initialised module
        found = False
    return None if found else f"{module} is not installed"
