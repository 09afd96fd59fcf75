"""Functions that cut a tensor along a dim, or give it dims: the same on every slot, and views stay views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from balanced_rep.autodiff._dual import Dual, slot_dim
from balanced_rep.autodiff._registry import RULES, Rule, rule
from balanced_rep.autodiff._rules_views import SAME

_OTHER_NAMES = ("sections", "indices_or_sections", "tensor_indices_or_sections", "split_size")


def _pieces(name: str, first: str) -> Callable[..., Any]:
    def pieces(input: Dual, *args: Any, dim: int = 0, **kwargs: Any) -> tuple[Dual, ...]:
        how = args[0] if args else next(kwargs[key] for key in (first, *_OTHER_NAMES) if kwargs.get(key) is not None)
        dim = args[1] if len(args) > 1 else dim
        return tuple(Dual(p) for p in getattr(input.stack, name)(how, slot_dim(dim, input.dim())))

    return rule(name, kind="view", formula=SAME)(pieces)


for _name, _first in {
    "chunk": "chunks", "split": "split_size_or_sections", "split_with_sizes": "split_sizes", "tensor_split": "indices",
}.items():  # fmt: skip
    _pieces(_name, _first)


def _pieces_along(name: str, least: int, dim_of_many: int) -> None:
    """``hsplit``, ``vsplit`` and ``dsplit``: ``tensor_split`` along a dim of their own."""

    def pieces(input: Dual, *args: Any, **kwargs: Any) -> tuple[Dual, ...]:
        how: Any = next(iter((*args, *kwargs.values())))
        how = args if len(args) > 1 else how
        dim = min(dim_of_many, input.dim() - 1)
        if input.dim() < least:
            raise RuntimeError(f"torch.{name} requires a tensor with at least {least} dims, but got {input.dim()}")
        if isinstance(how, int) and (how < 1 or input.shape[dim] % how):
            raise RuntimeError(f"torch.{name}: dim {dim} of size {input.shape[dim]} is not divisible by {how}")
        return tuple(Dual(p) for p in input.stack.tensor_split(how, dim + 1))

    rule(name, kind="view", formula=SAME)(pieces)


_pieces_along("hsplit", 1, 1)
_pieces_along("vsplit", 2, 0)
_pieces_along("dsplit", 3, 2)


def _at_least(n: int) -> Callable[..., Any]:
    def grown(*tensors: Any) -> Any:
        several = not isinstance(tensors[0], Tensor) or len(tensors) > 1
        xs = tensors[0] if several and len(tensors) == 1 else tensors
        found = tuple(_grown(x, n) for x in xs)
        return found if several else found[0]

    return grown


def _grown(x: Tensor, n: int) -> Tensor:
    if not isinstance(x, Dual):
        return getattr(torch, f"atleast_{n}d")(x)
    s = x.stack
    while s.dim() <= n:  # in front, but behind for a matrix in three dims
        s = s.unsqueeze(-1 if s.dim() == 3 else 1)
    return x if s is x.stack else Dual(s)


# Several arguments may carry tangents, so they are no views of the first one.
for _n in (1, 2, 3):
    for _f in (getattr(torch, f"atleast_{_n}d"), getattr(torch._C._VariableFunctions, f"atleast_{_n}d")):  # pyright: ignore[reportAttributeAccessIssue]
        RULES[_f] = Rule(f"atleast_{_n}d", "structure", _at_least(_n), SAME)


@rule("sum_to_size", kind="view", formula=SAME)
def _sum_to_size(input: Dual, *size: Any) -> Dual:
    shape, s = list(size[0] if len(size) == 1 and not isinstance(size[0], int) else size), input.stack
    if tuple(shape) == tuple(input.shape):
        return input
    more = input.dim() - len(shape)
    summed = [d for d in range(input.dim()) if d < more or (shape[d - more] == 1 != input.shape[d])]
    if more < 0 or any(d >= more and shape[d - more] not in (1, input.shape[d]) for d in range(input.dim())):
        raise RuntimeError(f"size {shape} is not expandable to size {list(input.shape)}")
    return Dual(s.sum([d + 1 for d in summed], keepdim=True).reshape(s.shape[0], *shape))
