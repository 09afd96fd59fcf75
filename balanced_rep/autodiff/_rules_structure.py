"""Linear functions that copy: joining, selecting by index, padding, casting; the same on every slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff._dual import Dual, is_differentiable, is_dual, lift, primal, slot_dim, slots
from balanced_rep.autodiff._fused import channels_last, plainly_channels_last
from balanced_rep.autodiff._inplace import writable
from balanced_rep.autodiff._pending import Apart
from balanced_rep.autodiff._registry import RULES, Rule, rule
from balanced_rep.autodiff._rules_views import SAME, moves_front, reshaped, stack_index
from balanced_rep.autodiff._session import current


@rule("contiguous", kind="structure", formula=SAME)
def _contiguous(input: Dual, memory_format: torch.memory_format = torch.contiguous_format) -> Dual:
    if input.is_contiguous(memory_format=memory_format):
        return _itself(input)
    if input.is_apart and memory_format == torch.contiguous_format:
        value, tangents = input.parts
        y = Dual.later(Apart(value.contiguous(), tangents.contiguous()))
        if (session := current()) is not None:
            session.remember_copy(input, y)
        return y
    return reshaped(input, _reformat(input, memory_format).stack)


def _itself(x: Dual) -> Dual:
    """``x`` where no copy is needed; in the layout of torch one might be."""
    session = current()
    if session is None or not session.channels_last:
        return x
    if x.is_apart:
        y = Dual.later(Apart(*x.parts))
        session.remember_copy(x, y)
        return y
    session.remember_reshape(x.stack, x.stack)
    return Dual(x.stack.detach())  # a tensor of its own: so it is seen whether both are still in use


@rule("ravel", kind="view", formula=SAME)
def _ravel(input: Dual) -> Dual:
    x = _contiguous(input)
    return reshaped(x, x.stack.flatten(1) if x.dim() else x.stack.unsqueeze(1))


@rule("clone", kind="structure", formula=SAME)
def _clone(input: Dual, *, memory_format: torch.memory_format = torch.preserve_format) -> Dual:
    return _reformat(input, memory_format)


RULES[Tensor.__deepcopy__] = Rule("__deepcopy__", "structure", lambda input, memo: _clone(input), SAME)


def _reformat(x: Dual, memory_format: torch.memory_format) -> Dual:
    s = x.stack
    if memory_format in (torch.contiguous_format, torch.preserve_format):
        return Dual(s.clone(memory_format=memory_format))
    inner = x.dim() - 1  # channels last is a property of each slot, with its batch
    return Dual(s.flatten(0, 1).clone(memory_format=memory_format).unflatten(0, s.shape[:2])) if inner else x


@rule("to", kind="structure", formula=SAME)
def _to(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    args = tuple(primal(a) for a in args)
    if not isinstance(input, Dual):
        return input.to(*args, **kwargs)  # a constant, made like the value of a dual
    memory_format = kwargs.pop("memory_format", torch.preserve_format)
    probe = torch.empty(0, dtype=input.dtype, device=input.device)
    new = input
    if probe.to(*args, **kwargs) is not probe:
        s = input.stack.to(*args, **kwargs)
        if not (s.is_floating_point() or s.is_complex()):
            return s[0].clone()
        new = Dual(s)
    if memory_format == torch.preserve_format:
        return new
    s = new.stack
    like = torch.empty_strided(s.shape[1:], s.stride()[1:], device="meta")
    if new is input and like.to(memory_format=memory_format) is like:  # where contiguous() may copy, for a part
        return _itself(input)
    return reshaped(new, _reformat(new, memory_format).stack)


def _cast(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda input, memory_format=torch.preserve_format: _to(input, dtype, memory_format=memory_format)


for _name, _dtype in {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
    "cfloat": torch.complex64, "cdouble": torch.complex128,
}.items():  # fmt: skip
    RULES[getattr(Tensor, _name)] = Rule(_name, "structure", _cast(_dtype), SAME)


@rule("type_as", kind="structure", formula=SAME)
def _type_as(input: Tensor, other: Tensor) -> Tensor:
    return _to(input, other.dtype) if isinstance(input, Dual) else input.type(other.dtype)


@rule("type", kind="structure", formula=SAME)
def _type(input: Dual, dtype: Any = None, non_blocking: bool = False) -> Any:
    if dtype is None:
        return input.stack.type()
    return _to(input, input.stack[:0].type(dtype).dtype)


RULES[Tensor.cpu] = Rule("cpu", "structure", lambda x, *a, **k: Dual(x.stack.cpu(*a, **k)), SAME)
RULES[Tensor.cuda] = Rule("cuda", "structure", lambda x, *a, **k: Dual(x.stack.cuda(*a, **k)), SAME)


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All stacks in one dtype."""
    n, dtype = slots(*tensors), _common_dtype(tensors)
    return [lift(x, n, dtype) for x in tensors]


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


@rule("cat", kind="structure", formula=SAME)
def _cat(tensors: Sequence[Tensor], dim: int = 0, **kwargs: int) -> Dual:
    dim = kwargs.get("axis", dim)
    kept = [x for x in tensors if x.shape != (0,)] or list(tensors)
    d, dtype, n = slot_dim(dim, kept[0].dim()), _common_dtype(tensors), slots(*tensors)
    if all(is_dual(x) for x in kept):
        if any(x.is_apart for x in kept) and d > 1:  # pyright: ignore[reportAttributeAccessIssue]
            values, tangents = zip(*(x.parts for x in kept), strict=True)  # pyright: ignore[reportAttributeAccessIssue]
            t = torch.cat([_rows(x) for x in tangents], d - 1).unflatten(0, tangents[0].shape[:2])
            return Dual.later(Apart(torch.cat(values, d - 1), t))
        stacks = _joined(kept)
        if d > 1 and channels_last(stacks[0]):  # torch knows the layout of four dims
            rows = torch.cat([_rows(s) for s in stacks], d - 1)
            return Dual(rows.unflatten(0, stacks[0].shape[:2]))
        return Dual(torch.cat(stacks, d))
    # Zeros of the tensors without tangents are written once, into the result.
    shape = list(kept[0].shape)
    shape[d - 1] = sum(x.shape[d - 1] for x in kept)
    y = primal(kept[0]).new_empty((n, *shape), dtype=dtype)
    torch.cat([primal(x).to(dtype) for x in kept], d - 1, out=y[0])
    at = 0
    for x in kept:
        part = y[1:].narrow(d, at, x.shape[d - 1])
        part.copy_(x.stack[1:]) if isinstance(x, Dual) else part.zero_()
        at += x.shape[d - 1]
    return Dual(y)


def _rows(s: Tensor) -> Tensor:
    """(slots, B, ...) as (slots B, ...), in the same layout."""
    rows = s.flatten(0, 1)
    return plainly_channels_last(rows) if channels_last(s) and rows.dim() == 4 else rows


@rule("stack", kind="structure", formula=SAME)
def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Dual:
    d = slot_dim(dim, tensors[0].dim() + 1)
    return Dual(torch.stack(_joined(tensors), d))


def _hstack(tensors: Sequence[Tensor]) -> Tensor:
    xs = [x.reshape(1) if x.dim() == 0 else x for x in tensors]
    return torch.cat(xs, 0 if xs[0].dim() == 1 else 1)


def _vstack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(1, -1) if x.dim() < 2 else x for x in tensors], 0)


for _f, _rule in {torch.hstack: _hstack, torch.vstack: _vstack, torch.row_stack: _vstack}.items():
    RULES[_f] = Rule(_f.__name__, "composite", _rule, SAME)


def _along(name: str, *, dims: bool = False) -> Callable[..., Tensor]:
    """A function whose only reference to dims is its argument ``dim`` or ``dims``."""

    def apply(input: Dual, *args: Any, **kwargs: Any) -> Tensor:
        n = input.dim()
        args = tuple(args)
        if dims:
            chosen = kwargs.get("dims", args[-1] if args and not isinstance(args[-1], int) else args)
            chosen = [chosen] if isinstance(chosen, int) else list(chosen)
            return Dual(getattr(torch, name)(input.stack, [slot_dim(d, n) for d in chosen]))
        d = slot_dim(kwargs["dim"] if "dim" in kwargs else args[0], n)
        if (dtype := kwargs.get("dtype")) is not None and not is_differentiable(dtype):
            return getattr(torch, name)(input.primal, *args, **kwargs)
        rest = args if "dim" in kwargs else args[1:]
        return Dual(getattr(torch, name)(input.stack, d, *rest, **{k: v for k, v in kwargs.items() if k != "dim"}))

    return rule(name, kind="structure", formula=SAME)(apply)


_along("index_select")
_along("flip", dims=True)
_along("cumsum")


@rule("roll", kind="structure", formula=SAME)
def _roll(input: Dual, shifts: Any, dims: Any = ()) -> Dual:
    s, n = input.stack, input.dim()
    if not n:
        return Dual(s.clone())
    if dims == () or dims is None:
        return Dual(s.flatten(1).roll(shifts, 1).view(s.shape))
    return Dual(s.roll(shifts, [slot_dim(d, n) for d in ([dims] if isinstance(dims, int) else dims)]))


@rule("gather", kind="structure", formula=SAME)
def _gather(input: Dual, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Dual:
    s = input.stack
    return Dual(s.gather(slot_dim(dim, input.dim()), index.expand(s.shape[0], *index.shape)))


@rule("repeat", "tile", kind="structure", formula=SAME)
def _repeat(input: Dual, *repeats: Any, **kwargs: Any) -> Dual:
    given: Any = repeats or (kwargs.get("repeats", kwargs.get("dims")),)
    by: list[int] = list(given[0] if len(given) == 1 and not isinstance(given[0], int) else given)
    by = [1] * (input.dim() - len(by)) + by
    s = input.stack
    return Dual(s.reshape(s.shape[0], *[1] * (len(by) - input.dim()), *s.shape[1:]).repeat(1, *by))


@rule("repeat_interleave", kind="structure", formula=SAME)
def _repeat_interleave(input: Dual, repeats: Any, dim: int | None = None, **kwargs: Any) -> Dual:
    s = input.stack.flatten(1) if dim is None else input.stack
    return Dual(s.repeat_interleave(repeats, 1 if dim is None else slot_dim(dim, input.dim()), **kwargs))


for _name in ("tril", "triu"):
    rule(_name, kind="structure", formula=SAME)(
        lambda input, diagonal=0, name=_name: Dual(getattr(torch, name)(input.stack, diagonal))
    )


def _pixels(name: str, factor: str) -> None:
    def apply(input: Dual, *args: Any, **kwargs: Any) -> Dual:
        by = args[0] if args else kwargs[factor]
        return on_rows(lambda rows: getattr(F, name)(rows, by), input, max(input.dim(), 4))  # a sample alone has three

    rule(name, kind="structure", formula=SAME)(apply)


_pixels("pixel_shuffle", "upscale_factor")
_pixels("pixel_unshuffle", "downscale_factor")


def on_rows(f: Callable[[Tensor], Tensor], x: Dual, batched_ndim: int) -> Dual:
    """``f`` on the slots as part of the batch.

    Args:
        f: Takes (batch, ...), each row by itself.
        x: (batch, ...) with ``batched_ndim`` dims, or one dim less: a single sample, for which slots are the batch.
        batched_ndim: Dims that ``f`` takes.

    Returns:
        Result with the slots apart again.
    """
    if x.is_apart and x.dim() == batched_ndim and x.tangents.dtype != x.dtype:
        value, t = x.parts
        return Dual.later(Apart(f(value), f(t.flatten(0, 1)).unflatten(0, t.shape[:2])))
    s = x.stack
    if s.dim() == batched_ndim:
        return Dual(f(s))
    return Dual(f(s.flatten(0, 1)).unflatten(0, s.shape[:2]))


@rule("pad", kind="structure", formula="t' = pad(t) with zeros, or with what the mode repeats")
def _pad(input: Dual, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Dual:
    if input.is_apart and not value and len(pad) // 2 < input.dim():
        return on_rows(lambda rows: F.pad(rows, pad, mode=mode), input, input.dim())
    s = input.stack
    if mode == "constant":
        if channels_last(s) and len(pad) // 2 < input.dim():
            y = on_rows(lambda rows: F.pad(rows, pad), input, input.dim()).stack
        else:
            y = F.pad(s, pad)
        if value:
            y[0].copy_(F.pad(s[0], pad, value=value))
        return Dual(y)
    return on_rows(lambda rows: F.pad(rows, pad, mode=mode), input, len(pad) // 2 + 2)


RULES[F.unfold] = Rule(
    "unfold", "structure", lambda input, *a, **k: on_rows(lambda r: F.unfold(r, *a, **k), input, 4), SAME
)
RULES[F.fold] = Rule("fold", "structure", lambda input, *a, **k: on_rows(lambda r: F.fold(r, *a, **k), input, 3), SAME)


@rule("masked_fill", kind="structure", formula="t' = t where not mask, else 0")
def _masked_fill(input: Any, mask: Tensor, value: Any) -> Tensor:
    if is_dual(value):
        return _where(mask, value if value.dtype == input.dtype else Dual(value.stack.to(input.dtype)), input)
    s = input.stack
    s = s.reshape(s.shape[0], *[1] * (mask.dim() - input.dim()), *s.shape[1:])  # a mask may have more dims
    y = s.masked_fill(mask, 0)
    y[0].copy_(s[0].masked_fill(mask, value))
    return Dual(y)


@rule("where", kind="structure", formula="t' = where(condition, t_a, t_b)")
def _where(condition: Tensor, input: Any = None, other: Any = None, **kwargs: Any) -> Any:
    a, b = kwargs.get("self", input), other
    if a is None and b is None:
        return torch.where(primal(condition))
    y0 = torch.where(condition, primal(a), primal(b))
    n = y0.dim()
    at, bt = (_tangents(x, n, y0.dtype) if is_dual(x) else y0.new_zeros(()) for x in (a, b))
    y = y0.new_empty((slots(a, b), *y0.shape))
    y[0].copy_(y0)
    y[1:].copy_(torch.where(condition, at, bt))  # which broadcasts where only y0 is larger
    return Dual(y)


RULES[Tensor.where] = Rule(
    "where",
    "structure",
    lambda input, condition, other: _where(condition, input, other),
    "t' = where(condition, t_a, t_b)",
)


def _tangents(x: Any, ndim: int, dtype: torch.dtype) -> Tensor:
    t = x.stack[1:].to(dtype)
    return t.reshape(t.shape[0], *[1] * (ndim + 1 - t.dim()), *t.shape[1:])


def _setitem(input: Any, index: Any, value: Any) -> None:
    session = current()
    assert session is not None
    if is_dual(value):
        input = writable(input, "item assignment", session)
    full = stack_index(index, input.dim())
    s = input.stack
    if session.has_reshaped:
        session.check_layout(s)
    values = value.stack if is_dual(value) else None
    if values is None:
        s[0][full[1:]] = primal(value)
        s[1:][full] = 0
        return
    if moves_front(full[1:]):
        for slot, v in zip(s.unbind(), values.unbind(), strict=True):
            slot[full[1:]] = v
        return
    target = s[full]
    if target.dim() > values.dim():  # broadcast behind the slots, as torch does in front
        values = values.reshape(values.shape[0], *[1] * (target.dim() - values.dim()), *values.shape[1:])
    while values.dim() > target.dim() and values.shape[1] == 1:
        values = values.squeeze(1)
    s[full] = values.to(s.dtype)


RULES[Tensor.__setitem__] = Rule("__setitem__", "structure", _setitem, "t[index] = t_value")


def _filled(input: Tensor, value: Any) -> Tensor:
    return broadcast(value if is_dual(value) else torch.as_tensor(value), input.shape)


def _copy(input: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    return broadcast(src, input.shape)


def broadcast(x: Tensor, shape: torch.Size) -> Tensor:
    """``x`` expanded to a shape, slot by slot.

    Args:
        x: A tensor, with tangents or not.
        shape: What it broadcasts to.

    Returns:
        A view.
    """
    if not isinstance(x, Dual):
        return x.expand(shape)
    s = x.stack
    return Dual(s.reshape(s.shape[0], *[1] * (len(shape) + 1 - s.dim()), *s.shape[1:]).expand(-1, *shape))


RULES[Tensor.copy_] = Rule("copy_", "structure", _copy, SAME)
RULES[Tensor.fill_] = Rule("fill_", "structure", lambda input, value: _filled(input, value), "t' = 0")
RULES[Tensor.zero_] = Rule("zero_", "structure", lambda input: torch.zeros(()).expand(input.shape), "t' = 0")
