"""One function without a rule: ``torch.func.jvp`` of it, for all tangents at once by ``vmap``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from balanced_rep.autodiff._dual import Dual, dual
from balanced_rep.autodiff._errors import UnsupportedError
from balanced_rep.autodiff._session import calling_module, current

__all__ = ["differentiable", "fallback"]

WRONG_UNDER_VMAP = ("index_fill",)
_GROUP_NORMS = (F.group_norm, torch.group_norm)


class _ContiguousGroupNorm(TorchFunctionMode):
    """torch's forward mode of group_norm fails on an input that is not contiguous."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _GROUP_NORMS and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """torch's own forward mode, without its two traps: fused attention has no forward formula, group_norm views."""
    with sdpa_kernel(SDPBackend.MATH), _ContiguousGroupNorm():
        yield


def fallback(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, inplace: bool) -> Any:
    """Differentiates ``func`` by torch.func.

    Args:
        func: The function.
        name: Its name for messages.
        args: Its arguments, with Duals.
        kwargs: And keyword arguments.
        inplace: It writes into its first argument; a copy of that is given to it and returned.

    Returns:
        What the function returns, with Duals for floating-point tensors.

    Raises:
        UnsupportedError: If torch has no forward-mode derivative of it.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)]
    stacks = [_dense(leaves[i].stack) for i in where]
    primals, tangents = tuple(s[0] for s in stacks), tuple(s[1:] for s in stacks)
    others: list[Any] = []
    layout: list[Any] = []

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, value in zip(where, values, strict=True):
            filled[i] = value
        a, k = pytree.tree_unflatten(filled, spec)
        if inplace:
            a = (a[0].clone(), *a[1:])
        outputs, tree = pytree.tree_flatten(func(*a, **k))
        others[:] = [None if isinstance(o, Tensor) else o for o in outputs]
        layout[:] = [tree, [isinstance(o, Tensor) for o in outputs]]
        return tuple(o for o in outputs if isinstance(o, Tensor))

    def one(*ts: Tensor) -> Any:
        return torch.func.jvp(call, primals, ts)

    if not inplace:
        _refuse_aliases(call, primals, name)
    values, tangents_out = _all_tangents(one, tangents, name)
    found = iter(zip(values, tangents_out, strict=True))
    tree, tensor_at = layout
    return pytree.tree_unflatten(
        [_join(*next(found)) if at else other for at, other in zip(tensor_at, others, strict=True)], tree
    )


def _refuse_aliases(call: Callable[..., Any], primals: tuple[Tensor, ...], name: str) -> None:
    """A view would become a copy here, and writes through it would be missed: finding that out costs the primal."""
    given = {x.untyped_storage()._cdata for x in primals}
    with torch.no_grad():
        found = call(*primals)
    if any(_storage(x) in given for x in found):
        raise UnsupportedError(
            f"br.jvp: {name} returns a view of its input{calling_module()}, and has no rule; use reshape, indexing, or "
            "a function that copies."
        )


def _storage(x: Tensor) -> int | None:
    return x.untyped_storage()._cdata if x.layout == torch.strided else None


def _dense(stack: Tensor) -> Tensor:
    """A copy of what may lie on itself in memory (expand, unfold): torch's forward mode writes into its tangents."""
    overlaps = torch._debug_has_internal_overlap(stack)  # pyright: ignore[reportPrivateImportUsage]
    return stack.contiguous() if overlaps else stack


def _join(value: Tensor, tangents: Tensor) -> Tensor:
    return dual(value, tangents) if value.is_floating_point() or value.is_complex() else value


def _all_tangents(one: Callable[..., Any], tangents: tuple[Tensor, ...], name: str) -> Any:
    with differentiable():
        try:
            if any(wrong in name for wrong in WRONG_UNDER_VMAP):
                raise RuntimeError("torch.func.vmap takes the first tangent for all")
            return torch.func.vmap(one, out_dims=(None, 0))(*tangents)  # pyright: ignore[reportArgumentType]
        except (RuntimeError, NotImplementedError, ValueError, IndexError) as error:
            first = error
        try:  # without a batching rule: one tangent at a time
            each = [one(*(t[k] for t in tangents)) for k in range(tangents[0].shape[0])]
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedError(
                f"br.jvp: {name} has no rule, and torch cannot differentiate it in forward mode"
                f"{calling_module()}: {_one_line(error)} Register a rule with br.autodiff.register_rule."
            ) from error
    if (session := current()) is not None:
        session.reasons[name] = f"one tangent at a time: {_one_line(first)}"
    return each[0][0], tuple(torch.stack(ts) for ts in zip(*(ts for _, ts in each), strict=True))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 200 else text[:197] + "..."
