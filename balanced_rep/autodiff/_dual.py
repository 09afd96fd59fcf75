"""A primal and its K tangents in one buffer, seen by a model as an ordinary tensor of the primal's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from balanced_rep.autodiff._errors import UnsupportedError
from balanced_rep.autodiff._fused import Result
from balanced_rep.autodiff._pending import Apart, Pending, Work
from balanced_rep.autodiff._session import current

__all__ = ["Dual", "dual", "is_differentiable", "is_dual", "lift", "primal", "slot_dim", "slot_dims", "slots"]


class Dual(Tensor):
    """A tensor of shape ``shape`` that carries K tangents.

    The buffer ``stack`` is ``(1 + K, *shape)``: slot 0 is the primal, slots 1 to K are the tangents. A view of the
    tensor is a view of the stack, so writing through one is seen through the other, as in torch. A rule reads
    ``stack``, ``primal`` and ``tangents`` and returns a new one made by :func:`dual` or ``Dual(stack)``.

    Attributes:
        pending: What the buffer will be computed by, while nobody has read it.
    """

    _stack: Tensor | None
    pending: Pending | None

    @staticmethod
    def __new__(cls, stack: Tensor) -> Dual:
        if not is_differentiable(stack.dtype):
            raise UnsupportedError(f"br.jvp: a value of {stack.dtype} has no tangents; a rule returns it as it is")
        new = _wrapper(stack, stack.stride()[1:])
        new.become(stack)
        return new

    @classmethod
    def later(cls, pending: Pending) -> Dual:
        """A tensor that is computed, or put together, when somebody reads it."""
        new = _wrapper(pending.primal.unsqueeze(0), pending.strides())
        new._stack, new.pending = None, pending
        if (session := current()) is not None:
            session.remember_pending(new)
            if session.on_dual is not None and isinstance(pending, Apart):
                session.on_dual(new, pending.tangents)
        return new

    def become(self, stack: Tensor) -> None:
        """Takes ``stack`` for its buffer; nothing may have looked at another one before."""
        self._stack, self.pending = stack, None
        if (session := current()) is not None and session.on_dual is not None:
            session.on_dual(self, stack)

    @classmethod
    def of(cls, result: Result) -> Dual:
        """The result of a fused op."""
        return Dual(result) if isinstance(result, Tensor) else cls.later(Apart(*result))

    def _finish(self) -> Apart | None:
        """Has the work done that waits; what is left is a value in two pieces, or nothing."""
        if isinstance(self.pending, Work):
            result = self.pending.done()
            if isinstance(result, Tensor):
                self.become(result)
            else:
                self.pending = Apart(*result)
        return self.pending  # pyright: ignore[reportReturnType]

    @property
    def stack(self) -> Tensor:
        """The buffer ``(1 + K, *shape)``."""
        if self.pending is not None and (apart := self._finish()) is not None:
            self.become(apart.joined())
        assert self._stack is not None
        return self._stack

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Primal and tangents, for reading only: others may share them, and the tangents have a dtype of their own."""
        if self.pending is not None and (apart := self._finish()) is not None:
            apart.checked()
            return apart.primal, apart.tangents
        return self.stack[0], self.stack[1:]

    @property
    def is_apart(self) -> bool:
        """Whether there is no buffer with both; what waits is done first."""
        return self.pending is not None and self._finish() is not None

    @property
    def slots(self) -> int:
        """1 + K."""
        return self.pending.slots if self.pending is not None else self.stack.shape[0]

    @property
    def primal(self) -> Tensor:
        """``(*shape)``, for reading only."""
        return self.parts[0]

    @property
    def tangents(self) -> Tensor:
        """``(K, *shape)``, for reading only."""
        return self.parts[1]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        shape, k = tuple(self.shape), self.slots - 1
        return f"Dual(shape={shape}, tangents={k}, dtype={self.dtype}, device={self.device})"

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
        raise UnsupportedError(
            f"br.jvp: {func} met a value with tangents below the level at which they are carried. This happens inside "
            "scripted code, in torch.tensor(x), torch.as_tensor(x, dtype), torch.full(size, x) and nn.Parameter(x), "
            "inside torch.func transforms, and in functions that disable __torch_function__. Use eager code, and x "
            "itself, x.clone(), x.to(dtype) or x.expand(size)"
        )


def _wrapper(like: Tensor, strides: tuple[int, ...]) -> Dual:
    return Tensor._make_wrapper_subclass(Dual, like.shape[1:], strides=strides, dtype=like.dtype, device=like.device)


def is_dual(x: object) -> bool:
    """Whether ``x`` carries tangents."""
    return isinstance(x, Dual)


def dual(primal: Tensor, tangents: Tensor) -> Dual:
    """Joins a primal ``(*shape)`` and tangents ``(K, *shape)`` of any dtype that casts to the primal's.

    Args:
        primal: The value.
        tangents: Its tangents.

    Returns:
        The value with its tangents.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if tangents.shape[1:] != primal.shape or tangents.dim() != primal.dim() + 1:
        raise ValueError(
            f"dual: the primal has shape {tuple(primal.shape)}, so that tangents are (K, "
            f"{', '.join(map(str, primal.shape))}); got {tuple(tangents.shape)}"
        )
    stack = primal.new_empty((1 + tangents.shape[0], *primal.shape))
    stack[0].copy_(primal)
    stack[1:].copy_(tangents)
    return Dual(stack)


def primal(x: Any) -> Any:
    """The primal of a Dual, for reading only; anything else unchanged."""
    return x.parts[0] if isinstance(x, Dual) else x


def is_differentiable(dtype: torch.dtype) -> bool:
    """Whether values of ``dtype`` have tangents: floating-point and complex ones do."""
    return dtype.is_floating_point or dtype.is_complex


def slots(*xs: object) -> int:
    """1 + K of the first Dual among ``xs``."""
    return next(x.slots for x in xs if isinstance(x, Dual))


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


def slot_dims(dim: Any, ndim: int) -> list[int]:
    """Dims of the stack that a reduction runs over; ``None`` and no dims at all mean each of ``ndim``."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(1, ndim + 1))
    return [slot_dim(d, ndim) for d in ([dim] if isinstance(dim, int) else dim)]
