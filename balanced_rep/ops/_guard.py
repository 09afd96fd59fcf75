"""Looks at the functorch stack, so that a library op is never asked for a derivative that it does not have.

A ``torch.library`` op has no forward-mode rule: under ``torch.func.jvp``, ``jacfwd`` or ``hessian`` it would return a
*zero tangent without an error*, and ``torch.func.grad`` inside another transform raises deep inside torch. So a public
op asks :func:`needs_reference` first and takes its differentiable reference when any level of the stack, at any depth,
takes derivatives. Pure ``vmap`` stacks go to the library op, which has a batching rule; plain reverse mode
(``requires_grad``) goes there too, through its registered backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch._C._functorch import TransformType, get_interpreter_stack

__all__ = ["needs_reference", "traced_as_constant"]

F = TypeVar("F", bound=Callable)

# Functionalize is not a derivative, but an op under it is being traced for one often enough; the reference is safe.
_SAFE = (TransformType.Vmap,)


def traced_as_constant(fn: F) -> F:
    """What ``torch.compiler.assume_constant_result`` does, without importing ``torch._dynamo``: that takes seconds."""
    fn._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return fn


@traced_as_constant
def needs_reference() -> bool:
    """Whether some ``torch.func`` level other than ``vmap``, or a ``forward_ad.dual_level``, is active.

    ``torch.compile`` enters the same transforms while it traces and guards on the stack, so the answer at trace time
    stays right for the compiled graph.

    Returns:
        True if only the differentiable reference is right here.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    stack = get_interpreter_stack()
    return stack is not None and any(level.key() not in _SAFE for level in stack)
