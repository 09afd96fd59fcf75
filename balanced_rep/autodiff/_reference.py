"""The slow definition, in torch's own transforms: taken inside other ``torch.func`` transforms, and by tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from balanced_rep.autodiff._fallback import differentiable
from balanced_rep.autodiff._inputs import Inputs

__all__ = ["jvp_reference"]


def jvp_reference(f: Callable[..., Any], inputs: Inputs, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """``vmap`` over the tangents of ``torch.func.jvp``.

    Args:
        f: Function or module; returns tensors in a pytree.
        inputs: Primals and tangents.
        kwargs: Keyword arguments of ``f``.

    Returns:
        ``f(*primals)`` and its tangents (K, ...).
    """
    moving = [i for i, t in enumerate(inputs.tangents) if t is not None]

    def call(*values: Tensor) -> Any:
        leaves = list(inputs.leaves)
        for i, value in zip(moving, values, strict=True):
            leaves[i] = value
        return f(*pytree.tree_unflatten(leaves, inputs.spec), **kwargs)

    primals = tuple(inputs.leaves[i] for i in moving)
    with differentiable():
        if inputs.n_tangents == 0:
            y = call(*primals)
            return y, pytree.tree_map(lambda v: v.new_zeros((0, *v.shape)), y)
        # Not out_dims=None for the primal: that refuses what an outer vmap has batched.
        y, tangents = torch.func.vmap(lambda *ts: torch.func.jvp(call, primals, ts)[:2])(
            *(inputs.tangents[i] for i in moving)
        )
    return pytree.tree_map(lambda v: v[0], y), tangents
