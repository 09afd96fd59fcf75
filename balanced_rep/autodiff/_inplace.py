"""Writing into tensors: in-place functions, ``out=``, and item assignment.

An in-place function runs as its ordinary form, and the result is copied into the stack of its first argument. Views
share memory with what they are views of, slot by slot, so that the write is seen where torch would show it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanced_rep.autodiff._dual import Dual
from balanced_rep.autodiff._errors import UnsupportedError
from balanced_rep.autodiff._pending import Viewed
from balanced_rep.autodiff._session import Session

__all__ = ["is_inplace", "writable", "write_back"]

WRITES_ONCE = ("zero_", "fill_", "masked_fill_", "relu_", "relu", "copy_")  # a second time changes nothing


def is_inplace(func: Any, name: str) -> bool:
    """Whether ``func`` writes into its first argument and returns it."""
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.is_mutable
    if isinstance(func, torch._ops.OpOverloadPacket):
        name = name.split(".")[-1]
    return name.endswith("_") and not name.endswith("__")


def writable(target: Any, name: str, session: Session) -> Dual:
    """``target`` as a Dual that can be written into.

    A plain buffer that was made during this pass and that nothing else looks at becomes a Dual in place, with zero
    tangents so far. Anything else that is plain belongs to the caller or to the model.

    Args:
        target: What is written into.
        name: The function, for the message.
        session: This pass.

    Returns:
        ``target``.

    Raises:
        UnsupportedError: If it is plain and not such a buffer.
    """
    if isinstance(target, Dual):
        return target
    if not isinstance(target, Tensor):
        raise UnsupportedError(f"br.jvp: {name} writes a value with tangents into a {type(target).__name__}")
    if not target.is_floating_point() and not target.is_complex():
        raise UnsupportedError(f"br.jvp: {name} writes a value with tangents into {target.dtype}, which has none")
    if session.is_fresh(target) and torch._C._storage_Use_Count(target.untyped_storage()._cdata) <= 2:
        return _with_zero_tangents(target, session.n_slots)
    raise UnsupportedError(
        f"br.jvp: {name} writes a value with tangents into a tensor of shape {tuple(target.shape)} that has none and "
        "belongs to the model or the caller (or is a view): the tangents would be lost. Make the buffer inside the "
        "function (torch.zeros, x.new_zeros) and write into it directly, or use torch.cat, torch.stack or torch.where"
    )


def _with_zero_tangents(target: Tensor, n_slots: int) -> Dual:
    """Makes a Dual of ``target`` itself: nothing is left that code below ``__torch_function__`` would read stale."""
    # As torch.utils.swap_tensors does, which takes no tensor that somebody has a weak reference to, as tracers have.
    stack = target.new_zeros((n_slots, *target.shape))
    stack[0].copy_(target)
    new: Any = Dual(stack)
    torch._C._swap_tensor_impl(target, new)  # pyright: ignore[reportAttributeAccessIssue]
    target.__class__, new.__class__, new.__dict__ = Dual, Tensor, {}
    target.become(stack)  # pyright: ignore[reportAttributeAccessIssue]
    return target  # pyright: ignore[reportReturnType]


def _refuse_overlap(target: Dual, name: str) -> None:
    """Refuses to write where elements of a view share memory, as those of ``x.unfold(0, 2, 1)`` do."""
    if name in WRITES_ONCE:
        return
    reach = 0
    for stride, size in sorted(zip(target.stride(), target.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise UnsupportedError(
                f"br.jvp: {name} writes into a view of shape {tuple(target.shape)} whose elements share memory "
                "(expand, unfold): the result would depend on the order of writing. Write into a clone"
            )
        reach += stride * (size - 1)


def write_back(target: Any, result: Any, name: str, session: Session) -> Any:
    """Copies the result of an ordinary function into ``target``, as its in-place form would.

    Args:
        target: First argument of an in-place function, or ``out``.
        result: What the ordinary form returned.
        name: The function, for messages.
        session: This pass.

    Returns:
        ``target``.

    Raises:
        RuntimeError: If the result does not fit.
    """
    if result is target or not isinstance(result, Tensor):
        return target
    if session.has_reshaped:
        session.check_layout(target.stack if isinstance(target, Dual) else target)
    if tuple(result.shape) != tuple(target.shape):
        raise RuntimeError(
            f"br.jvp: {name}: the result has shape {tuple(result.shape)} and cannot be written into "
            f"{tuple(target.shape)}"
        )
    if isinstance(result, Dual):
        target = writable(target, name, session)
    elif not isinstance(target, Dual):
        return target.copy_(result)
    with torch._C.DisableTorchFunctionSubclass():
        _refuse_overlap(target, name)
        if isinstance(result, Dual):
            if target.pending is not None and not isinstance(target.pending, Viewed):  # there is no buffer to fill
                target.become(result.stack.to(target.dtype, copy=True))
            elif target.stack is not result.stack:
                target.stack.copy_(result.stack)
        else:
            s = _once(target.stack) if name in ("zero_", "fill_") else target.stack
            at = tuple(slice(0, n) for n in s.shape[1:])
            s[0].copy_(result[at])
            s[1:].zero_()
    return target


def _once(s: Tensor) -> Tensor:
    """Without the repetitions of an expanded tensor, into which torch lets constants be written."""
    for d, (stride, size) in enumerate(zip(s.stride(), s.shape, strict=True)):
        s = s.narrow(d, 0, 1) if stride == 0 and size > 1 else s
    return s
