"""Results that wait for the function that reads them, and values whose tangents are not behind their primal.

A rule returns ``Dual.later(work)``. Reading its ``stack`` or ``parts`` has the work done. A rule for the next function
may look at ``pending`` instead and take the work along, in one pass over the tangents: SiLU behind a group norm, scale
and shift behind a layer norm, a gate in front of a GELU, a sum behind a product with a constant.

A value is :class:`Apart` where its tangents have a dtype of their own, or where they are another value's: adding a
constant moves no tangent. Before anything is written in place, all that wait are settled, so that they see their
sources as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from balanced_rep.autodiff import _fused
from balanced_rep.autodiff._errors import UnsupportedError
from balanced_rep.autodiff._fused import Result
from balanced_rep.ops._registry import OpSpec

__all__ = ["Activated", "Apart", "NormedGroups", "NormedRows", "Pending", "Scaled", "Viewed", "Work"]


@dataclass(eq=False)
class Pending:
    """A primal and its tangents, or what they will be computed from.

    Attributes:
        primal: ``(*shape)``.
        tangents: ``(K, *shape)``.
    """

    primal: Tensor
    tangents: Tensor

    def __post_init__(self) -> None:
        self._versions = [(x, x._version) for x in vars(self).values() if _is_tracked(x)]

    @property
    def slots(self) -> int:
        """1 + K."""
        return 1 + self.tangents.shape[0]

    def strides(self) -> tuple[int, ...]:
        """Strides that a slot of the stack will have."""
        return self.primal.stride()

    def checked(self) -> Self:
        """Refuses to go on with sources that are no longer what they were.

        Returns:
            ``self``.

        Raises:
            UnsupportedError: If a source was written behind the interceptor's back, so that the result would be wrong.
        """
        if any(x._version != version for x, version in self._versions):
            raise UnsupportedError(
                f"br.jvp: a tensor that {type(self).__name__} was to read was changed in place by code that "
                "__torch_function__ does not see; use functions that return new tensors there"
            )
        return self


def _is_tracked(x: object) -> bool:
    return isinstance(x, Tensor) and not x.is_inference()


@dataclass(eq=False)
class Apart(Pending):
    """The value itself, in two pieces that nobody may write into."""

    def joined(self) -> Tensor:
        """A stack of its own, in the dtype of the primal."""
        self.checked()
        return _fused.joined(self.primal, self.tangents)


@dataclass(eq=False)
class Viewed(Apart):
    """A view of a value that is in two pieces.

    Attributes:
        again: The stack of the view, once the value that it is a view of has one.
    """

    again: Callable[[], Tensor]

    def joined(self) -> Tensor:
        """A view of the stack of what it is a view of."""
        return self.again()


@dataclass(eq=False)
class Work(Pending):
    """A function of a primal and its tangents, elementwise or normalising: the result has their shape and dtypes."""

    def strides(self) -> tuple[int, ...]:
        """As the fused ops lay results out."""
        return _fused.strides(self.primal, self.tangents)

    def compute(self) -> Result:
        """The result."""
        raise NotImplementedError

    def done(self) -> Result:
        """The result; autocast has had its say when the function was called, and the pass may be over."""
        with torch.no_grad(), torch.autocast(self.primal.device.type, enabled=False):
            return self.checked().compute()


@dataclass(eq=False)
class NormedGroups(Work):
    """Group norm."""

    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def compute(self, *, silu: bool = False) -> Result:
        """The result, with SiLU behind the norm or not."""
        args = (self.num_groups, self.weight, self.bias, self.eps)
        return _fused.group_norm(self.primal, self.tangents, *args, silu=silu)


@dataclass(eq=False)
class NormedRows(Work):
    """Layer or RMS norm over the last dim; weight and bias ``(1, D)`` or ``(B, D)``."""

    spec: OpSpec
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def strides(self) -> tuple[int, ...]:
        """Contiguous."""
        return _fused.contiguous_strides(self.primal.shape)

    def compute(self) -> Result:
        """The result."""
        return _fused.row_norm(self.spec, self.primal, self.tangents, self.weight, self.bias, self.eps)

    def _row(self, x: object) -> Tensor | None:
        """``x`` as (1, D) or (B, D), if it is one row for all or for each sample."""
        s = self.primal
        if not isinstance(x, Tensor) or x.dtype != s.dtype or x.device != s.device or not 0 < x.dim() <= s.dim():
            return None
        shape = (*[1] * (s.dim() - x.dim()), *x.shape)
        if shape[-1] != s.shape[-1] or any(n != 1 for n in shape[1:-1]):
            return None
        if len(shape) == 1 or shape[0] == 1:
            return x.reshape(1, shape[-1])
        return x.reshape(shape[0], shape[-1]) if len(shape) > 2 and shape[0] == s.shape[0] else None

    def times(self, factor: object) -> NormedRows | None:
        """The norm multiplied by a constant, if that is one row."""
        row = self._row(factor)
        if row is None:
            return None
        weight = row if self.weight is None else self.weight * row
        return self._with(weight, None if self.bias is None else self.bias * row)

    def plus(self, shift: object) -> NormedRows | None:
        """The norm plus a constant, if that is one row."""
        row = self._row(shift)
        if row is None:
            return None
        return self._with(self.weight, row if self.bias is None else self.bias + row)

    def _with(self, weight: Tensor | None, bias: Tensor | None) -> NormedRows:
        return NormedRows(self.primal, self.tangents, self.spec, weight, bias, self.eps)


@dataclass(eq=False)
class Activated(Work):
    """SiLU, GELU or its tanh form."""

    kind: str

    def compute(self) -> Result:
        """The result."""
        return _fused.activation(self.primal, self.tangents, self.kind)


@dataclass(eq=False)
class Scaled(Work):
    """Product with a constant that broadcasts to a slot."""

    factor: Tensor

    def compute(self) -> Result:
        """The result."""
        return _fused.scaled(self.primal, self.tangents, self.factor)
