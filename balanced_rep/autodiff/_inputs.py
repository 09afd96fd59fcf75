"""Primals and tangents as the caller gives them: checked, flattened, and said what is wrong with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from balanced_rep.autodiff._dual import Dual
from balanced_rep.autodiff._errors import UnsupportedError

__all__ = ["Inputs", "check_kwargs", "read_inputs", "unwritten"]


@dataclass
class Inputs:
    """Flattened arguments of ``f``.

    Attributes:
        leaves: Leaves of the primals.
        tangents: For each leaf its tangents (K, *shape), or ``None``.
        spec: Structure of the tuple of primals.
        n_tangents: K.
    """

    leaves: list[Any]
    tangents: list[Tensor | None]
    spec: Any
    n_tangents: int

    def stacked(self, part: slice) -> tuple[Any, ...]:
        """Arguments of ``f`` with a chunk of the tangents attached."""
        filled = [
            x if t is None else Dual(_stacked(x.detach(), t[part].detach()))
            for x, t in zip(self.leaves, self.tangents, strict=True)
        ]
        return tuple(pytree.tree_unflatten(filled, self.spec))

    def plain(self) -> tuple[Any, ...]:
        """Arguments of ``f`` without tangents; those that would have some are copies, which ``f`` may write into."""
        filled = [x if t is None else x.detach().clone() for x, t in zip(self.leaves, self.tangents, strict=True)]
        return tuple(pytree.tree_unflatten(filled, self.spec))


def _stacked(x: Tensor, t: Tensor) -> Tensor:
    """Both in one buffer whose slots have the layout of the primal, if that is dense: reshapes are views by it."""
    if x.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(x):
        return torch.cat([x.unsqueeze(0), t])
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    stack = x.new_empty((1 + t.shape[0], *(x.shape[d] for d in order)))
    stack = stack.permute(0, *(1 + order.index(d) for d in range(x.dim())))
    stack[0].copy_(x)
    stack[1:].copy_(t)
    return stack


@contextlib.contextmanager
def unwritten(inputs: Inputs, kwargs: dict[str, Any]) -> Iterator[None]:
    """Refuses a function that writes into arguments without tangents: the next pass would see other values.

    Those with tangents are copies. Tensors made in inference mode have no record of being written into, and are not
    looked at.

    Args:
        inputs: Arguments of the function.
        kwargs: And keyword arguments.

    Yields:
        Once, for the call.

    Raises:
        UnsupportedError: If one of them was written into.
    """
    fixed = [x if t is None else None for x, t in zip(inputs.leaves, inputs.tangents, strict=True)]
    given, _ = pytree.tree_flatten_with_path((pytree.tree_unflatten(fixed, inputs.spec), kwargs))
    before = [(path, x, x._version) for path, x in given if isinstance(x, Tensor) and not x.is_inference()]
    yield
    for path, x, version in before:
        if x._version != version:
            first, rest = pytree.keystr(path[:1]), pytree.keystr(path[1:])
            name = ("primals" if first == "[0]" else "kwargs") + rest
            raise UnsupportedError(
                f"br.jvp: f wrote into {name}, of shape {tuple(x.shape)}: every chunk of tangents would see another "
                f"value, and the tensor has changed. Let f write into a copy: {name}.clone()"
            )


def check_kwargs(kwargs: Any) -> dict[str, Any]:
    """Keyword arguments as the caller gives them.

    Args:
        kwargs: A dict or ``None``.

    Returns:
        The dict.

    Raises:
        TypeError: If it is something else, or a key is no string.
    """
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"br.jvp: kwargs must be a dict, got {type(kwargs).__name__}; pass {{'name': value}}")
    for key in kwargs:
        if not isinstance(key, str):
            raise TypeError(f"br.jvp: kwargs must have names as keys, got {key!r}, a {type(key).__name__}")
    return dict(kwargs)


def read_inputs(primals: Any, tangents: Any) -> Inputs:
    """Checks primals against tangents.

    Args:
        primals: One argument of ``f``, or a tuple of them; each a tensor or a pytree.
        tangents: The same structure; ``None`` for an argument or leaf without.

    Returns:
        The flattened inputs.

    Raises:
        TypeError: If a kind or dtype does not fit.
        ValueError: If a structure, shape or device does not fit.
    """
    if isinstance(primals, list):
        raise TypeError(
            "br.jvp: primals is a list; pass a tuple for several arguments of f, or ([...],) for one that is a list"
        )
    several = isinstance(primals, tuple)
    args = tuple(primals) if several else (primals,)
    given = tangents if several else (tangents,)
    if not isinstance(given, tuple):
        raise TypeError(
            f"br.jvp: primals is a tuple of {len(args)}, tangents is a {type(given).__name__}; pass a tuple"
        )
    if len(given) != len(args):
        raise ValueError(f"br.jvp: {len(args)} primals but {len(given)} tangents; use None for those without")
    leaves, found, names = [], [], []
    for i, (arg, tangent) in enumerate(zip(args, given, strict=True)):
        paths, spec = pytree.tree_flatten_with_path(arg)
        keys = [
            f"primals[{i}]{pytree.keystr(path)}" if several else f"primals{pytree.keystr(path)}" for path, _ in paths
        ]
        names += keys
        leaves += [leaf for _, leaf in paths]
        found += _match(tangent, spec, len(paths), f"tangents[{i}]" if several else "tangents")
    counts = {
        name: _check(name, x, t, alone=len(leaves) == 1)
        for name, x, t in zip(names, leaves, found, strict=True)
        if t is not None
    }
    if not counts:
        raise ValueError("br.jvp: no primal has a tangent")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{k} for {name}" for name, k in counts.items())
        raise ValueError(f"br.jvp: all tangents need the same number K of leading slices, got {listed}")
    return Inputs(leaves, found, pytree.tree_structure(args), next(iter(counts.values())))


def _match(tangent: Any, spec: Any, n: int, name: str) -> list[Any]:
    """Leaves of ``tangent`` beside those of its primal."""
    if tangent is None:
        return [None] * n
    leaves, own = pytree.tree_flatten(tangent, is_leaf=lambda x: x is None)
    if own != spec:
        raise ValueError(f"br.jvp: {name} has another structure than its primal: {own} against {spec}")
    return leaves


def _check(name: str, x: Any, t: Any, *, alone: bool) -> int:
    tangent = name.replace("primals", "tangents", 1)
    if not isinstance(x, Tensor):
        raise TypeError(f"br.jvp: {name} is a {type(x).__name__}, which has no tangent; pass None as {tangent}")
    if not isinstance(t, Tensor):
        raise TypeError(f"br.jvp: {tangent} is a {type(t).__name__}; expected is a tensor (K, *{tuple(x.shape)})")
    for label, v in ((name, x), (tangent, t)):
        if isinstance(v, Dual):
            raise TypeError(
                f"br.jvp: {label} already carries tangents: br.jvp cannot be nested in itself; use torch.func"
            )
        if type(v) not in (Tensor, nn.Parameter) or v.layout != torch.strided:
            raise TypeError(
                f"br.jvp: {label} is a {type(v).__name__} with layout {v.layout}; expected is a dense tensor"
            )
    if not x.is_floating_point():
        raise TypeError(
            f"br.jvp: {name} is {x.dtype}: only floating-point inputs have tangents. Pass None as {tangent} if it is "
            "an index or a mask, or convert it"
        )
    if t.shape[1:] != x.shape or t.dim() != x.dim() + 1:
        hint = ""
        if t.shape == x.shape:
            hint = "; for a single tangent pass " + ("tangents[None]" if alone else f"{tangent} with [None]")
        raise ValueError(
            f"br.jvp: {tangent} has shape {tuple(t.shape)}; expected is (K, {', '.join(map(str, x.shape))})"
            f" for {name} of shape {tuple(x.shape)}{hint}"
        )
    if t.dtype != x.dtype:
        raise TypeError(f"br.jvp: {tangent} is {t.dtype} and {name} is {x.dtype}; pass {tangent}.to({x.dtype})")
    if t.device != x.device:
        raise ValueError(f"br.jvp: {tangent} is on {t.device} and {name} on {x.device}")
    return t.shape[0]
