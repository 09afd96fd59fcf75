"""Results that wait for the function that reads them: it may take their work along, in one pass over the tangents.

A rule returns ``Dual.later(pending)``. Reading its ``stack`` settles it. A rule for the next function may look at
``pending`` instead: SiLU behind a group norm, scale and shift behind a layer norm, a gate in front of a GELU, a sum
behind a product with a constant. Before anything is written in place, all that wait are settled, so that they see
their sources as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from balanced_rep.autodiff import _fused
from balanced_rep.autodiff._errors import UnsupportedError
from balanced_rep.ops._registry import OpSpec

__all__ = ["Activated", "NormedGroups", "NormedRows", "Pending", "Scaled"]


@dataclass(eq=False)
class Pending:
    """A function of a stack, elementwise or normalising: the result has its shape and dtype.

    Attributes:
        source: The stack.
    """

    source: Tensor

    def __post_init__(self) -> None:
        self._versions = [(x, x._version) for x in self.reads() if not x.is_inference()]

    def reads(self) -> list[Tensor]:
        """Everything that :meth:`compute` will read."""
        return [x for x in vars(self).values() if isinstance(x, Tensor)]

    def strides(self) -> tuple[int, ...]:
        """Strides that a slot of the result will have."""
        return _fused.strides(self.source)

    def compute(self) -> Tensor:
        """The stack of the result."""
        raise NotImplementedError

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

    def stack(self) -> Tensor:
        """The stack of the result; autocast has had its say when the function was called."""
        with torch.no_grad(), torch.autocast(self.source.device.type, enabled=False):  # perhaps after the pass
            return self.checked().compute()


@dataclass(eq=False)
class NormedGroups(Pending):
    """Group norm."""

    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def compute(self, *, silu: bool = False) -> Tensor:
        """The stack, with SiLU behind the norm or not."""
        return _fused.group_norm(self.source, self.num_groups, self.weight, self.bias, self.eps, silu=silu)


@dataclass(eq=False)
class NormedRows(Pending):
    """Layer or RMS norm over the last dim; weight and bias ``(1, D)`` or ``(B, D)``."""

    spec: OpSpec
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def compute(self) -> Tensor:
        """The stack."""
        return _fused.row_norm(self.spec, self.source, self.weight, self.bias, self.eps)

    def _row(self, x: object) -> Tensor | None:
        """``x`` as (1, D) or (B, D), if it is one row for all or for each sample."""
        s = self.source
        if not isinstance(x, Tensor) or x.dtype != s.dtype or x.device != s.device or x.dim() == 0:
            return None
        shape = (*[1] * (s.dim() - 1 - x.dim()), *x.shape)
        if len(shape) != s.dim() - 1 or shape[-1] != s.shape[-1] or any(n != 1 for n in shape[1:-1]):
            return None
        if len(shape) == 1 or shape[0] == 1:
            return x.reshape(1, shape[-1])
        return x.reshape(shape[0], shape[-1]) if len(shape) > 2 and shape[0] == s.shape[1] else None

    def times(self, factor: object) -> NormedRows | None:
        """The norm multiplied by a constant, if that is one row."""
        row = self._row(factor)
        if row is None:
            return None
        weight = row if self.weight is None else self.weight * row
        return NormedRows(self.source, self.spec, weight, None if self.bias is None else self.bias * row, self.eps)

    def plus(self, shift: object) -> NormedRows | None:
        """The norm plus a constant, if that is one row."""
        row = self._row(shift)
        if row is None:
            return None
        return NormedRows(self.source, self.spec, self.weight, row if self.bias is None else self.bias + row, self.eps)


@dataclass(eq=False)
class Activated(Pending):
    """SiLU, GELU or its tanh form."""

    kind: str

    def compute(self) -> Tensor:
        """The stack."""
        return _fused.activation(self.source, self.kind)


@dataclass(eq=False)
class Scaled(Pending):
    """Product with a constant that broadcasts to a slot."""

    factor: Tensor

    def compute(self) -> Tensor:
        """The stack."""
        return torch.mul(self.source, self.factor, out=_fused.fresh(self.source))
