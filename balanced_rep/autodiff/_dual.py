"""A primal and its K tangents in one buffer, seen by a model as an ordinary tensor of the primal's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from balanced_rep.autodiff._session import current

__all__ = ["Dual", "dual", "is_dual", "lift", "primal", "slot_dim", "slots"]


class Dual(Tensor):
    """A tensor of shape ``shape`` that carries K tangents.

    The buffer ``stack`` is ``(1 + K, *shape)``: slot 0 is the primal, slots 1 to K are the tangents. A view of the
    tensor is a view of the stack, so writing through one is seen through the other, as in torch. A rule reads
    ``stack``, ``primal`` and ``tangents`` and returns a new one made by :func:`dual` or ``Dual(stack)``.

    Attributes:
        stack: The buffer.
    """

    stack: Tensor

    @staticmethod
    def __new__(cls, stack: Tensor) -> Dual:
        new = Tensor._make_wrapper_subclass(
            cls, stack.shape[1:], strides=stack.stride()[1:], dtype=stack.dtype, device=stack.device
        )
        new.stack = stack
        if (session := current()) is not None and session.on_dual is not None:
            session.on_dual(new)
        return new

    @property
    def primal(self) -> Tensor:
        """``(*shape)``: a view of slot 0."""
        return self.stack[0]

    @property
    def tangents(self) -> Tensor:
        """``(K, *shape)``: a view of the other slots."""
        return self.stack[1:]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        s = self.stack
        return f"Dual(shape={tuple(s.shape[1:])}, tangents={s.shape[0] - 1}, dtype={s.dtype}, device={s.device})"

    def __format__(self, spec: str) -> str:
        return format(self.stack[0].item(), spec) if self.stack.dim() == 1 and spec else repr(self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from balanced_rep.autodiff._intercept import intercept

        return intercept(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from balanced_rep.autodiff._errors import UnsupportedError

        raise UnsupportedError(
            f"br.jvp: {func} met a value with tangents below the level at which they are carried. This happens inside "
            "scripted code, in torch.tensor(x) and nn.Parameter(x) (which cut the tangent off), inside torch.func "
            "transforms, and in functions that disable __torch_function__. Use eager code, and x itself or x.clone()"
        )


def is_dual(x: object) -> bool:
    """Whether ``x`` carries tangents."""
    return isinstance(x, Dual)


def dual(primal: Tensor, tangents: Tensor) -> Dual:
    """Joins a primal ``(*shape)`` and tangents ``(K, *shape)`` of any dtype that casts to the primal's."""
    stack = primal.new_empty((1 + tangents.shape[0], *primal.shape))
    stack[0].copy_(primal)
    stack[1:].copy_(tangents)
    return Dual(stack)


def primal(x: Any) -> Any:
    """Slot 0 of a Dual; anything else unchanged."""
    return x.stack[0] if isinstance(x, Dual) else x


def slots(*xs: object) -> int:
    """1 + K of the first Dual among ``xs``."""
    return next(x.stack.shape[0] for x in xs if isinstance(x, Dual))


def lift(x: Tensor, n_slots: int, dtype: torch.dtype | None = None) -> Tensor:
    """The stack of ``x``; zeros are written out for a tensor without tangents, so only where nothing else will do."""
    if isinstance(x, Dual):
        return x.stack if dtype is None else x.stack.to(dtype)
    stack = x.new_zeros((n_slots, *x.shape), dtype=dtype or x.dtype)
    stack[0].copy_(x)
    return stack


def slot_dim(dim: int, ndim: int) -> int:
    """Dim of the stack that is dim ``dim`` of a tensor with ``ndim`` dims; torch's own error if out of range."""
    n = max(ndim, 1)
    if not -n <= dim < n:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {dim})")
    return dim % n + 1
