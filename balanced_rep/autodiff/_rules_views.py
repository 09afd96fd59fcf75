"""Functions that only rearrange elements: the same on every slot, and views stay views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from balanced_rep.autodiff._dual import Dual, is_dual, slot_dim
from balanced_rep.autodiff._errors import UnsupportedError
from balanced_rep.autodiff._fused import channels_last
from balanced_rep.autodiff._registry import RULES, Rule, rule
from balanced_rep.autodiff._session import ALONE, LayoutError, current

SAME = "t' = f(t)"
Ints = tuple[Any, ...]


def _ints(args: Ints) -> list[int]:
    """``f(2, 3)`` and ``f((2, 3))`` alike."""
    return list(args[0] if len(args) == 1 and not isinstance(args[0], int) else args)


@rule("view", kind="view", formula=SAME)
def _view(input: Dual, *shape: Any, dtype: torch.dtype | None = None, size: Any = None) -> Dual:
    s = input.stack
    to = dtype or (shape[0] if shape and isinstance(shape[0], torch.dtype) else None)
    if to is not None:
        raise RuntimeError(f"br.jvp: view({to}) of a value with tangents reinterprets its bits; use .to({to})")
    wanted = _sizes(s[0], _ints(shape or (size,)))
    try:
        return Dual(s.view(s.shape[0], *wanted))
    except RuntimeError:
        session = current()
        if channels_last(s):  # a convolution's doing: in torch it would be contiguous
            return _view_of_contiguous(input, wanted)
        if session is not None and session.channels_last:  # perhaps too, farther up
            raise LayoutError from None
        if s.stride(0) >= max((st * (n - 1) for st, n in zip(s.stride()[1:], s.shape[1:], strict=True)), default=0):
            raise  # the primal alone could not be viewed so either
        return reshaped(input, s.reshape(s.shape[0], *wanted))


def _view_of_contiguous(x: Dual, shape: list[int]) -> Dual:
    """Gives ``x`` itself a contiguous buffer first, unless something else looks at the one it has."""
    s = x.stack.contiguous()
    if torch._C._storage_Use_Count(x.stack.untyped_storage()._cdata) <= ALONE:
        x.become(s)
    return reshaped(x, s.view(s.shape[0], *shape))


def reshaped(x: Dual, y: Tensor) -> Dual:
    """``y``, a view or a copy of the stack of ``x`` as its layout has it, which may not be torch's.

    Args:
        x: What was reshaped.
        y: The result.

    Returns:
        The result, remembered in case that one of them is written into.
    """
    if (session := current()) is not None:
        session.remember_reshape(x.stack, y)
    return Dual(y)


@rule("reshape", kind="view", formula=SAME)
def _reshape(input: Dual, *shape: Any, **kwargs: Any) -> Dual:
    s = input.stack
    return reshaped(input, s.reshape(s.shape[0], *_sizes(s[0], _ints(shape or (kwargs["shape"],)))))


def _sizes(x: Tensor, shape: list[int]) -> list[int]:
    """``shape`` with -1 filled in: the slots must not take part in it."""
    if -1 not in shape or shape.count(-1) > 1:
        return shape
    rest = math.prod(n for n in shape if n != -1)
    if rest == 0 or x.numel() % rest:
        raise RuntimeError(f"shape '{shape}' is invalid for input of size {x.numel()}")
    return [x.numel() // rest if n == -1 else n for n in shape]


@rule("view_as", "reshape_as", kind="view", formula=SAME)
def _reshape_as(input: Tensor, other: Tensor) -> Tensor:
    if not isinstance(input, Dual):
        return input.reshape(other.shape)
    return reshaped(input, input.stack.reshape(input.stack.shape[0], *other.shape))


@rule("permute", kind="view", formula=SAME)
def _permute(input: Dual, *dims: Any, **kwargs: Any) -> Dual:
    n = input.dim()
    return Dual(input.stack.permute(0, *(slot_dim(d, n) for d in _ints(dims or (kwargs["dims"],)))))


@rule("transpose", kind="view", formula=SAME)
def _transpose(input: Dual, dim0: int = 0, dim1: int = 0, **kwargs: int) -> Dual:
    dim0, dim1 = kwargs.get("axis0", dim0), kwargs.get("axis1", dim1)
    n = input.dim()
    at = slot_dim(dim0, n), slot_dim(dim1, n)
    return Dual(input.stack.transpose(*at)) if n else input


@rule("movedim", kind="view", formula=SAME)
def _movedim(input: Dual, source: Any, destination: Any) -> Dual:
    n = input.dim()
    a, b = ([slot_dim(d, n) for d in ([dims] if isinstance(dims, int) else dims)] for dims in (source, destination))
    return Dual(input.stack.movedim(a, b)) if n else input


@rule("t", kind="view", formula=SAME)
def _t(input: Dual) -> Dual:
    if input.dim() > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, but self is {input.dim()}D")
    return input if input.dim() < 2 else Dual(input.stack.transpose(1, 2))


def _reversed(input: Dual) -> Dual:
    return Dual(input.stack.permute(0, *range(input.dim(), 0, -1)))


def _matrix_transposed(input: Dual) -> Dual:
    if input.dim() == 1:
        raise RuntimeError("tensor.mT is only supported on matrices or batches of matrices, got 1-D tensor")
    return Dual(input.stack.transpose(-1, -2)) if input.dim() else input  # as torch has it, with a warning


def _adjoint(input: Dual) -> Dual:
    return _conj(_matrix_transposed(input))


def _real(input: Dual) -> Dual:
    return Dual(input.stack.real) if input.is_complex() else input


for _name, _fn in {
    "T": _reversed, "mT": _matrix_transposed, "H": _adjoint, "mH": _adjoint, "real": _real,
    "imag": lambda input: Dual(input.stack.imag),
}.items():  # fmt: skip
    RULES[getattr(Tensor, _name).__get__] = Rule(_name, "view", _fn, SAME)
RULES[torch.adjoint] = RULES[Tensor.adjoint] = Rule("adjoint", "view", _adjoint, SAME)
for _name, _fn in {"real": _real, "imag": lambda input: Dual(input.stack.imag)}.items():
    RULES[getattr(torch, _name)] = Rule(_name, "view", _fn, SAME)


@rule("conj", kind="view", formula=SAME)
def _conj(input: Dual) -> Dual:
    return Dual(input.stack.conj()) if input.is_complex() else input


@rule("resolve_conj", "resolve_neg", kind="view", formula=SAME)
def _resolved(input: Dual) -> Dual:
    s = input.stack.resolve_conj().resolve_neg()
    return input if s is input.stack else Dual(s)


@rule("conj_physical", kind="view", formula=SAME)
def _conj_copied(input: Dual) -> Dual:
    return Dual(input.stack.conj_physical()) if input.is_complex() else input


@rule("positive", kind="view", formula=SAME)
def _positive(input: Dual) -> Dual:
    return input


def _slice(input: Dual, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Dual:
    return Dual(torch.ops.aten.slice(input.stack, slot_dim(dim, input.dim()), start, end, step))


RULES[torch.ops.aten.alias] = Rule("alias", "view", _positive, SAME)
RULES[torch.ops.aten.slice] = Rule("slice", "view", _slice, SAME)


@rule("unsqueeze", kind="view", formula=SAME)
def _unsqueeze(input: Dual, dim: int) -> Dual:
    n = input.dim() + 1
    return Dual(input.stack.unsqueeze(slot_dim(dim, n)))


@rule("squeeze", kind="view", formula=SAME)
def _squeeze(input: Dual, *dim: Any, **kwargs: Any) -> Dual:
    s = input.stack
    dims = _ints(dim or (kwargs["dim"],)) if dim or "dim" in kwargs else range(input.dim())
    keep = [slot_dim(d, input.dim()) for d in dims] if input.dim() else []
    return Dual(s.squeeze([d for d in keep if s.shape[d] == 1]))


@rule("flatten", kind="view", formula=SAME)
def _flatten(input: Dual, start_dim: int = 0, end_dim: int = -1) -> Dual:
    s = input.stack
    if s.dim() == 1:
        return Dual(s.unsqueeze(1))
    return reshaped(input, s.flatten(slot_dim(start_dim, input.dim()), slot_dim(end_dim, input.dim())))


@rule("unflatten", kind="view", formula=SAME)
def _unflatten(input: Dual, dim: int, sizes: Any) -> Dual:
    return Dual(input.stack.unflatten(slot_dim(dim, input.dim()), sizes))


@rule("expand", "broadcast_to", kind="view", formula=SAME)
def _expand(input: Dual, *sizes: Any, size: Any = None) -> Dual:
    shape = _ints(sizes or (size,))
    return Dual(_aligned(input, len(shape)).expand(-1, *shape))


@rule("expand_as", kind="view", formula=SAME)
def _expand_as(input: Tensor, other: Tensor) -> Tensor:
    return _expand(input, other.shape) if isinstance(input, Dual) else input.expand(other.shape)


def _aligned(x: Dual, ndim: int) -> Tensor:
    s = x.stack
    return s if s.dim() > ndim else s.reshape(s.shape[0], *[1] * (ndim + 1 - s.dim()), *s.shape[1:])


@rule("broadcast_tensors", kind="view", formula=SAME)
def _broadcast_tensors(*tensors: Any) -> list[Tensor]:
    xs = tensors[0] if len(tensors) == 1 and not isinstance(tensors[0], Tensor) else tensors
    shape = torch.broadcast_shapes(*(x.shape for x in xs))
    return [_expand(x, shape) if is_dual(x) else x.expand(shape) for x in xs]


def _meshgrid(*tensors: Any, indexing: str | None = None) -> tuple[Tensor, ...]:
    xs: Any = tensors[0] if len(tensors) == 1 and not isinstance(tensors[0], Tensor) else tensors
    order = [1, 0, *range(2, len(xs))] if indexing == "xy" and len(xs) > 1 else [*range(len(xs))]
    torch.meshgrid(*(x.primal if isinstance(x, Dual) else x for x in xs), indexing=indexing or "ij")  # checks
    sizes = [xs[i].numel() for i in order]

    def spread(x: Tensor, at: int) -> Tensor:
        shape = [n if i == at else 1 for i, n in enumerate(sizes)]
        return _expand(_reshape(x, shape), sizes) if isinstance(x, Dual) else x.reshape(shape).expand(sizes)

    return tuple(spread(x, order.index(i)) for i, x in enumerate(xs))


# Several arguments may carry tangents, so it is no view of the first one.
for _f in (torch.meshgrid, torch._C._VariableFunctions.meshgrid):  # pyright: ignore[reportAttributeAccessIssue]
    RULES[_f] = Rule("meshgrid", "structure", _meshgrid, SAME)


@rule("unbind", kind="view", formula=SAME)
def _unbind(input: Dual, dim: int = 0) -> tuple[Dual, ...]:
    return tuple(Dual(p) for p in input.stack.unbind(slot_dim(dim, input.dim())))


RULES[Tensor.__iter__] = Rule("__iter__", "view", lambda input: iter(_unbind(input)), SAME)


@rule("select", kind="view", formula=SAME)
def _select(input: Dual, dim: int, index: int) -> Dual:
    return Dual(input.stack.select(slot_dim(dim, input.dim()), index))


@rule("narrow", kind="view", formula=SAME)
def _narrow(input: Dual, dim: int, start: Any, length: int) -> Dual:
    return Dual(input.stack.narrow(slot_dim(dim, input.dim()), start, length))


@rule("diagonal", kind="view", formula=SAME)
def _diagonal(input: Dual, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Dual:
    n = input.dim()
    return Dual(input.stack.diagonal(offset, slot_dim(dim1, n), slot_dim(dim2, n)))


RULES[torch.linalg.diagonal] = Rule(
    "linalg_diagonal", "view", lambda A, *, offset=0, dim1=-2, dim2=-1: _diagonal(A, offset, dim1, dim2), SAME
)
RULES[Tensor.unfold] = Rule(
    "unfold",
    "view",
    lambda input, dimension, size, step: Dual(input.stack.unfold(slot_dim(dimension, input.dim()), size, step)),
    SAME,
)


@rule("view_as_complex", "view_as_real", kind="view", formula=SAME)
def _as_complex(input: Dual) -> Dual:
    s = input.stack
    if input.is_complex():
        return Dual(torch.view_as_real(s))
    if s.stride(-1) == 1 and s.stride(0) % 2 and not any(n % 2 for n in s.stride()[1:-1]):
        raise UnsupportedError(
            f"br.jvp: view_as_complex of a part of a tensor with an odd number of elements ({s.stride(0)}): tangents "
            "lie behind each other in memory, and not all at even places. Use torch.view_as_complex(x.clone())"
        )
    return Dual(torch.view_as_complex(s))


RULES[Tensor.__getitem__] = Rule("__getitem__", "view", lambda input, index: getitem(input, index), SAME)


def stack_index(index: Any, ndim: int) -> tuple[Any, ...]:
    """The index into the stack that is ``index`` into each slot.

    Args:
        index: What stands in the brackets.
        ndim: Dims of the tensor.

    Returns:
        A tuple for the stack. Advanced indices that are not adjacent go in front in torch; :func:`moves_front` says so.

    Raises:
        TypeError: If an index carries tangents.
    """
    parts = index if isinstance(index, tuple) or _is_tuple(index) else (index,)
    parts = tuple(_index_tensor(p) if isinstance(p, list) else p for p in parts)
    if any(is_dual(p) for p in parts):
        raise TypeError("br.jvp: tensors used as indices must be integers or booleans")
    return (slice(None), *parts)


def _is_tuple(index: Any) -> bool:
    """Whether torch takes a list for a tuple: if it is short, and more than numbers are in it."""
    kinds = (Tensor, Sequence, slice, EllipsisType, type(None))
    return isinstance(index, list) and len(index) < 32 and any(isinstance(part, kinds) for part in index)


def _index_tensor(index: list[Any]) -> Tensor:
    """A list between brackets; an empty one has integers in it."""
    found = torch.tensor(index)
    return found if found.numel() else found.long()


def moves_front(index: tuple[Any, ...]) -> bool:
    """Whether torch may put the dims of the index tensors first, in front of the slots: they are not side by side."""
    if any(isinstance(p, bool) for p in index):
        return True
    # Integers, 0-dim tensors among them, select first and leave no dim behind.
    kept = [p for p in index if not isinstance(p, int) and not (isinstance(p, Tensor) and p.dim() == 0)]
    at = [i for i, p in enumerate(kept) if not (isinstance(p, slice) or p is None or p is Ellipsis)]
    return bool(at) and at[-1] - at[0] + 1 != len(at)


def getitem(input: Any, index: Any) -> Any:
    """``input[index]``.

    Args:
        input: Usually a Dual.
        index: Anything that torch takes.

    Returns:
        A view for basic indexing, a copy for tensors as indices.
    """
    s = input.stack
    full = stack_index(index, input.dim())
    if moves_front(full[1:]):
        return Dual(torch.stack([slot[full[1:]] for slot in s.unbind()]))
    return Dual(s[full])
