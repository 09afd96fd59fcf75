"""What ``f`` returns: primal and tangents apart, in the structure of the output, dataclasses included."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from balanced_rep.autodiff._dual import Dual
from balanced_rep.autodiff._fused import channels_last

__all__ = ["Collected", "split_output", "tree_map"]


def _is_plain_dataclass(x: Any) -> bool:
    return dataclasses.is_dataclass(x) and not isinstance(x, type) and type(x) not in pytree.SUPPORTED_NODES


def tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """``pytree.tree_map`` that goes into dataclasses that nobody registered with torch as well."""

    def leaf(x: Any) -> Any:
        if not _is_plain_dataclass(x):
            return fn(x)
        new = copy.copy(x)
        for field in dataclasses.fields(x):
            object.__setattr__(new, field.name, tree_map(fn, getattr(x, field.name)))
        return new

    return pytree.tree_map(leaf, tree, is_leaf=_is_plain_dataclass)


def split_output(output: Any, n_tangents: int, *, contiguous: bool = False) -> tuple[Any, Any, int, int]:
    """Takes an output of ``f`` apart.

    Args:
        output: What ``f`` returned, with Duals.
        n_tangents: K of this pass.
        contiguous: Turn back tensors that are channels last.

    Returns:
        The primals; the tangents, where a tensor that does not depend on the input has zeros and anything else
        ``None``; how many tensors there are; how many of them carry tangents.
    """
    count = [0, 0]

    def settled(x: Any) -> Any:
        if isinstance(x, Dual) and contiguous and channels_last(x.stack):
            return Dual(x.stack.contiguous())
        return x

    def value(x: Any) -> Any:
        count[0] += isinstance(x, Tensor)
        count[1] += isinstance(x, Dual)
        if isinstance(x, Dual):
            return x.stack[0]
        return x.detach() if isinstance(x, Tensor) and x.grad_fn is not None else x  # f may have enabled gradients

    def tangent(x: Any) -> Any:
        if isinstance(x, Dual):
            return x.stack[1:]
        return x.new_zeros((n_tangents, *x.shape)) if isinstance(x, Tensor) else None

    output = tree_map(settled, output)
    values, tangents = tree_map(value, output), tree_map(tangent, output)
    return values, tangents, count[0], count[1]


class Collected:
    """Tangents of chunk after chunk, written into one result.

    Args:
        n_tangents: K of all chunks together.
    """

    def __init__(self, n_tangents: int) -> None:
        self.n = n_tangents
        self.tree: Any = None
        self.at = 0

    def add(self, tree: Any, k: int) -> None:
        """Adds the tangents of one chunk.

        Args:
            tree: Tangents (k, ...) in the structure of the output.
            k: How many.

        Raises:
            RuntimeError: If the output has another structure than in the chunk before.
        """
        if self.at == 0 and k == self.n:
            self.tree, self.at = tree, k
            return
        if self.at == 0:
            self.tree = tree_map(lambda t: t.new_empty((self.n, *t.shape[1:])) if isinstance(t, Tensor) else t, tree)
        parts: list[Any] = []
        tree_map(parts.append, tree)
        wholes: list[Any] = []
        tree_map(wholes.append, self.tree)
        if [getattr(p, "shape", (0,))[1:] for p in parts] != [getattr(w, "shape", (0,))[1:] for w in wholes]:
            raise RuntimeError("br.jvp: the output has another structure in one chunk of tangents than in another")
        for whole, part in zip(wholes, parts, strict=True):
            if isinstance(part, Tensor):
                whole[self.at : self.at + k].copy_(part)
        self.at += k
