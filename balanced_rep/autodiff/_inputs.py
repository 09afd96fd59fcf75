"""Primals and tangents as the caller gives them: checked, flattened, and said what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from balanced_rep.autodiff._dual import Dual

__all__ = ["Inputs", "read_inputs"]


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
            x if t is None else Dual(torch.cat([x.detach().unsqueeze(0), t[part].detach()]))
            for x, t in zip(self.leaves, self.tangents, strict=True)
        ]
        return tuple(pytree.tree_unflatten(filled, self.spec))

    def plain(self) -> tuple[Any, ...]:
        """Arguments of ``f`` without tangents; those that would have some are copies, which ``f`` may write into."""
        filled = [x if t is None else x.detach().clone() for x, t in zip(self.leaves, self.tangents, strict=True)]
        return tuple(pytree.tree_unflatten(filled, self.spec))


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
