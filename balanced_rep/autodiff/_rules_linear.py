"""Linear layers and products: one call on all slots, so that weights are read once.

The bias, and any constant, goes to slot 0 alone. Where both factors carry tangents the product rule adds one more call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff._dual import Dual, is_differentiable, is_dual, lift, primal, slot_dim, slot_dims, slots
from balanced_rep.autodiff._fused import plainly_channels_last
from balanced_rep.autodiff._pending import Apart
from balanced_rep.autodiff._products import linear
from balanced_rep.autodiff._registry import RULES, Rule, rule
from balanced_rep.autodiff._rules_structure import broadcast, on_rows
from balanced_rep.autodiff._session import current

PRODUCT = "t' = t_a b + a t_b"


@rule("linear", kind="linear", formula="t' = t W^T (+ x t_W^T + t_b)")
def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Dual:
    if is_dual(weight):
        y = _matmul(input, Dual(weight.stack.transpose(-1, -2)) if weight.dim() > 1 else weight).stack
    elif not isinstance(input, Dual):  # only the bias moves
        y = lift(F.linear(input, weight), slots(bias))
    elif _works_apart(bias):
        return _apart("linear", input, weight, bias, lambda x, w, b: linear(x, w) if b is None else F.linear(x, w, b))
    else:
        y = linear(input.stack, weight)
    return Dual(_add_bias(y, bias, 0))


def _works_apart(bias: Any) -> bool:
    """Whether this pass takes primals and tangents by themselves."""
    session = current()
    return session is not None and not is_dual(bias) and (session.tangent_dtype or session.tape) is not None


def _apart(
    name: str, x: Dual, weight: Tensor, bias: Tensor | None, f: Callable[..., Tensor], options: Hashable = ()
) -> Dual:
    """A linear layer on a primal, which may be known from an earlier run, and on tangents in their own dtype."""
    session = current()
    assert session is not None
    value, tangents = x.parts
    primal_of = partial(f, value, weight, bias)
    y = primal_of() if session.tape is None else session.tape.kept(name, value, weight, bias, options, primal_of)
    dtype = session.tangent_dtype or tangents.dtype
    return Dual.later(Apart(y, f(tangents.to(dtype), session.cast(weight, dtype), None)))


def _add_bias(y: Tensor, bias: Tensor | None, behind: int) -> Tensor:
    """Adds the bias to slot 0, or slot by slot if it has tangents; ``behind`` dims follow the channels."""
    if bias is None:
        return y
    shape = (-1, *[1] * behind)
    if isinstance(bias, Dual):
        b = bias.stack
        return y.add_(b.reshape(b.shape[0], *[1] * (y.dim() - behind - 2), *b.shape[1:], *[1] * behind))
    y[0].add_(bias.view(shape))
    return y


def _channels_last(x: Dual, spatial: int) -> bool:
    """Whether to convolve in channels last: what follows keeps the layout, so that few inputs have to be copied."""
    session = current()
    fast = spatial == 2 and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    if not fast or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if session is not None and session.keep_layout:
        return False
    if session is not None:
        session.channels_last = True
    return True


def _convolution(name: str, spatial: int) -> None:
    conv = getattr(F, name)

    def apply(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if is_dual(weight) or not isinstance(input, Dual):
            return NotImplemented
        last = _channels_last(input, spatial)

        def on(rows: Tensor, weight: Tensor = weight, bias: Tensor | None = None) -> Tensor:
            if last and rows.dim() == 4:
                rows = plainly_channels_last(rows.contiguous(memory_format=torch.channels_last))
            return conv(rows, weight, bias, *args, **kwargs)

        def on_tangents_too(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if x.dim() <= spatial + 2:
                return on(x, weight, bias)
            return on(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2])

        if _works_apart(bias) and input.dim() == spatial + 2:
            return _apart(name, input, weight, bias, on_tangents_too, str((args, kwargs)))
        y = on_rows(on, input, spatial + 2)
        return Dual(_add_bias(y.stack, bias, spatial))

    rule(name, kind="linear", formula="t' = conv(t, W)")(apply)


for _n in (1, 2, 3):
    _convolution(f"conv{_n}d", _n)
    _convolution(f"conv_transpose{_n}d", _n)


@rule("matmul", "mm", "bmm", "mv", "dot", kind="linear", formula=PRODUCT)
def _matmul(input: Tensor, other: Any = None, **kwargs: Any) -> Dual:
    a, b = input, next(iter(kwargs.values())) if other is None else other  # or mat2=, vec=, tensor=
    if not is_dual(b) and a.dim() > 1:
        return Dual(torch.matmul(_slots_first(a, b.dim()), b))
    if not is_dual(a) and b.dim() > 1 and a.dim() > 1:
        return Dual(torch.matmul(a, _slots_first(b, a.dim())))
    n = max(a.dim(), b.dim(), 2)
    a2, b2 = _as_matrices(a, n, row=True), _as_matrices(b, n, row=False)
    y = _bilinear(torch.matmul, a2, b2)
    y = y.squeeze(-2) if a.dim() == 1 else y
    return Dual(y.squeeze(-1) if b.dim() == 1 else y)


RULES[Tensor.__rmatmul__] = Rule("__rmatmul__", "linear", lambda input, other: _matmul(other, input), PRODUCT)


def _slots_first(x: Tensor, other_ndim: int) -> Tensor:
    """The stack of ``x`` with batch dims added behind the slots, so that those of the other factor broadcast."""
    s = x.stack  # pyright: ignore[reportAttributeAccessIssue]
    missing = max(other_ndim - x.dim(), 0)
    return s.reshape(s.shape[0], *[1] * missing, *s.shape[1:]) if missing else s


def _as_matrices(x: Tensor, ndim: int, *, row: bool) -> Tensor | Dual:
    """``x``, its stack if it has one, as matrices with ``ndim`` dims."""
    v = x.stack if isinstance(x, Dual) else x
    if x.dim() == 1:
        v = v.unsqueeze(-2) if row else v.unsqueeze(-1)
    if not isinstance(x, Dual):
        return v
    return Dual(v.reshape(v.shape[0], *[1] * (ndim + 1 - v.dim()), *v.shape[1:]))


def _bilinear(f: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Slots of ``f(a, b)``, linear in either."""
    if not is_dual(b):
        return f(a.stack, b)  # pyright: ignore[reportAttributeAccessIssue]
    if not is_dual(a):
        return f(a, b.stack)  # pyright: ignore[reportAttributeAccessIssue]
    y = f(a.stack, b.stack[0])  # pyright: ignore[reportAttributeAccessIssue]
    y[1:].add_(f(a.stack[0], b.stack[1:]))  # pyright: ignore[reportAttributeAccessIssue]
    return y


def _added_product(name: str, factors: str, sum_dim: int | None = None) -> None:
    """``beta input + alpha product``: addmm and its kin."""
    first, second = factors.split()

    def apply(input: Tensor, *args: Tensor, beta: float = 1, alpha: float = 1, **kwargs: Tensor) -> Dual:
        a = args[0] if args else kwargs[first]
        b = args[1] if len(args) > 1 else kwargs[second]
        y = _matmul(a, b).stack if is_dual(a) or is_dual(b) else lift(torch.matmul(a, b), slots(input))
        y = y if sum_dim is None else y.sum(sum_dim + 1)
        y = y if alpha == 1 else y * alpha
        if input.dtype != y.dtype:
            raise RuntimeError(f"{name}: input is {input.dtype} and the product {y.dtype}; one dtype is needed")
        added = broadcast(input, y.shape[1:])
        if beta == 0:  # even NaN is ignored
            return Dual(y)
        if isinstance(added, Dual):
            y.add_(added.stack, alpha=beta)
        else:
            y[0].add_(added, alpha=beta)
        return Dual(y)

    rule(name, kind="linear", formula="t' = beta t + alpha (t_a b + a t_b)")(apply)


_added_product("addmm", "mat1 mat2")
_added_product("addmv", "mat vec")
_added_product("baddbmm", "batch1 batch2")
_added_product("addbmm", "batch1 batch2", sum_dim=0)


@rule("einsum", kind="linear", formula="t' = the sum over its factors of einsum with one replaced by its tangents")
def _einsum(*args: Any) -> Any:
    equation, operands = args[0], args[1:]
    if not isinstance(equation, str):
        return NotImplemented
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    inputs, output = _explicit(equation.replace(" ", ""))
    slot = next(c for c in "zyxwvutsrqponmlkjihgfedcbaZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in equation)
    moving = [i for i, x in enumerate(operands) if is_dual(x)]
    y = None
    for i in moving:
        stack = operands[i].stack if y is None else operands[i].stack[1:]
        terms = [slot + term if j == i else term for j, term in enumerate(inputs)]
        values = [stack if j == i else primal(x) for j, x in enumerate(operands)]
        part = torch.einsum(f"{','.join(terms)}->{slot}{output}", *values)
        if y is None:
            y = part if len(moving) == 1 or part._base is None else part.clone()
        else:
            y[1:].add_(part)
    assert y is not None
    return Dual(y)


def _explicit(equation: str) -> tuple[list[str], str]:
    """Terms and output of an equation; without an arrow, the letters that occur once, in order."""
    left, arrow, output = equation.partition("->")
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        output = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return left.split(","), output


def _reduction(name: str) -> None:
    def apply(input: Dual, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **kwargs: Any) -> Tensor:
        dim = kwargs.get("axis", dim)
        if dtype is not None and not is_differentiable(dtype):
            return getattr(torch, name)(input.primal, dim, keepdim=keepdim, dtype=dtype)
        s, dims = input.stack, slot_dims(dim, input.dim())
        if not dims:
            return Dual(s.to(dtype) if dtype else s.clone())
        return Dual(getattr(torch, name)(s, dims, keepdim=keepdim, dtype=dtype))

    rule(name, kind="linear", formula=f"t' = {name}(t)")(apply)


_reduction("sum")
_reduction("mean")


def _resampling(name: str, ndim: int | None) -> None:
    f = getattr(F, name)

    def apply(input: Dual, *args: Any, **kwargs: Any) -> Dual:
        return on_rows(lambda rows: f(rows, *args, **kwargs), input, ndim or input.dim())

    rule(name, kind="linear", formula="t' = f(t)")(apply)


for _name, _ndim in {
    "interpolate": None, "upsample": None, "upsample_nearest": None, "upsample_bilinear": None,
    "avg_pool1d": 3, "avg_pool2d": 4, "avg_pool3d": 5, "adaptive_avg_pool1d": 3, "adaptive_avg_pool2d": 4,
    "adaptive_avg_pool3d": 5, "channel_shuffle": None,
}.items():  # fmt: skip
    _resampling(_name, _ndim)


def _selected(values: Tensor, indices: Tensor, stack: Tensor, dim: int, keepdim: bool) -> Dual:
    """Slots of what an index picks along ``dim``."""
    at = indices if keepdim else indices.unsqueeze(dim - 1)
    t = stack[1:].gather(dim, at.expand(stack.shape[0] - 1, *at.shape))
    y = values.new_empty((stack.shape[0], *values.shape))
    y[0].copy_(values)
    y[1:].copy_(t if keepdim else t.squeeze(dim))
    return Dual(y)


def _extreme(name: str) -> None:
    f = getattr(torch, name)

    def apply(input: Dual, *args: Any, **kwargs: Any) -> Any:
        by_dim = "dim" in kwargs or (args and isinstance(args[0], int))
        if not by_dim or is_dual(next(iter(args), None)):
            return NotImplemented
        found = f(input.stack[0], *args, **kwargs)
        dim = slot_dim(kwargs.get("dim", args[0] if args else -1), input.dim())
        keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
        return type(found)((_selected(found[0], found[1], input.stack, dim, keepdim), found[1]))

    rule(name, kind="linear", formula="t' = t at the index of the extreme")(apply)


_extreme("max")
_extreme("min")


@rule("sort", kind="linear", formula="t' = t in the order of x")
def _sort(input: Dual, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    found = torch.sort(input.stack[0], dim=dim, descending=descending, stable=stable)
    return type(found)((_selected(found[0], found[1], input.stack, slot_dim(dim, input.dim()), keepdim=True), found[1]))


@rule("topk", kind="linear", formula="t' = t at the indices of the largest")
def _topk(input: Dual, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    found = torch.topk(input.stack[0], k, dim, largest, sorted)
    return type(found)((_selected(found[0], found[1], input.stack, slot_dim(dim, input.dim()), keepdim=True), found[1]))


def _max_pool(spatial: int) -> None:
    pool = getattr(F, f"max_pool{spatial}d_with_indices")

    def with_indices(input: Dual, *args: Any, **kwargs: Any) -> tuple[Dual, Tensor]:
        kwargs.pop("return_indices", None)
        s = input.stack
        values, indices = pool(s[0], *args, **kwargs)
        flat = s.flatten(-spatial)
        picked = _selected(values.flatten(-spatial), indices.flatten(-spatial), flat, flat.dim() - 1, keepdim=True)
        return Dual(picked.stack.unflatten(-1, values.shape[-spatial:])), indices

    def apply(input: Dual, *args: Any, **kwargs: Any) -> Any:
        found = with_indices(input, *args[:5], **{k: v for k, v in kwargs.items() if k != "return_indices"})
        return found if kwargs.get("return_indices") else found[0]

    formula = "t' = t at the index of the maximum"
    rule(f"max_pool{spatial}d", kind="linear", formula=formula)(apply)
    rule(f"max_pool{spatial}d_with_indices", kind="linear", formula=formula)(with_indices)


for _n in (1, 2, 3):
    _max_pool(_n)
