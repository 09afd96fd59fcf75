"""What the multi-tangent ops share: how they are registered, and the checks of a tangent's shape.

Every such op takes a primal ``x`` and its K tangents ``dx`` as plain tensors, ``dx`` with one more dim in front, and
returns ``(y, dy)``. The tangents may have a dtype of their own: ``dy`` has it too. A backend is called as
``fn(*args, out=(y, dy))`` and writes into these two. They have the shapes of ``spec.outputs(*args)`` and unit stride in
the same dim; other strides are free: in a forward pass they are slot 0 and slots 1 to K of one buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from balanced_rep.ops._library import define
from balanced_rep.ops._registry import OpSpec

__all__ = ["HALF", "check_tangents", "define_jvp", "wide"]

HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """float32 for half types: derivatives and statistics are not taken in less."""
    return x.float() if x.dtype in HALF else x


def check_tangents(op: str, name: str, x: Tensor, dx: Tensor) -> None:
    """Refuses tangents ``dx`` that do not belong to ``x``.

    Args:
        op: The op, for messages.
        name: The name of ``x`` there.
        x: The primal.
        dx: Its tangents.

    Raises:
        TypeError: If either is no floating-point tensor.
        ValueError: If shape or device do not fit.
    """
    for label, value in ((name, x), (f"d{name}", dx)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{op}: {label} is {kind}; a floating-point tensor is needed")
    if dx.shape[1:] != x.shape or dx.dim() == 0:
        hint = f": a single tangent is d{name}[None]" if dx.shape == x.shape else ""
        raise ValueError(
            f"{op}: d{name} has shape {tuple(dx.shape)}; {name} is {tuple(x.shape)}, so (K, "
            f"{', '.join(map(str, x.shape))}) is accepted{hint}"
        )
    if dx.device != x.device:
        raise ValueError(f"{op}: d{name} is on {dx.device} and {name} on {x.device}; both must be on one device")


def define_jvp(spec: OpSpec, schema: str) -> OpSpec:
    """Registers a multi-tangent op: its batching rule loops, its reverse mode is that of the reference.

    Args:
        spec: The op, with ``outputs``.
        schema: Its arguments in torch's schema language, in parentheses.

    Returns:
        ``spec``.
    """
    assert spec.outputs is not None
    return define(
        spec,
        f"{schema} -> (Tensor, Tensor)",
        fake=spec.outputs,
        vmap=_looped(spec.name),
        backward=_by_reference(spec),
        setup_context=_setup_context,
    )


def _looped(name: str) -> Callable[..., Any]:
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        op = getattr(torch.ops.balanced_rep, name)
        each = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(ts) for ts in zip(*each, strict=True)), (0, 0)

    return vmap


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.tensor_at = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensor_at))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _by_reference(spec: OpSpec) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.others)
        for i, value in zip(ctx.tensor_at, ctx.saved_tensors, strict=True):
            args[i] = value
        moving = [i for i in ctx.tensor_at if ctx.needs_input_grad[i]]

        def call(*values: Tensor) -> Any:
            filled = list(args)
            for i, value in zip(moving, values, strict=True):
                filled[i] = value
            return spec.reference(*filled)

        pulled = torch.func.vjp(call, *(args[i] for i in moving))[1](grads)
        found: list[Tensor | None] = [None] * len(args)
        for i, value in zip(moving, pulled, strict=True):
            found[i] = value
        return tuple(found)

    return backward
