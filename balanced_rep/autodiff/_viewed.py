"""Views of a value whose primal and tangents lie apart: the same view of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

from balanced_rep.autodiff._dual import Dual
from balanced_rep.autodiff._pending import Viewed

__all__ = ["view_apart"]


def view_apart(view: Callable[..., Any], x: Dual, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a rule that takes every slot alike on the primal and on the tangents.

    Args:
        view: The rule.
        x: Its first argument.
        args: The others.
        kwargs: And keyword arguments.

    Returns:
        What the rule returns, each Dual of it apart. If ``x`` is put together later, they become views of its buffer.
    """
    primal, tangents = x.parts
    of_primal, tree = pytree.tree_flatten(view(Dual(primal.unsqueeze(0)), *args, **kwargs))
    of_tangents = pytree.tree_leaves(view(Dual(tangents), *args, **kwargs))

    def again(i: int) -> Callable[[], Any]:
        return lambda: pytree.tree_leaves(view(x, *args, **kwargs))[i].stack

    found = []
    for i, (p, t) in enumerate(zip(of_primal, of_tangents, strict=True)):
        both = isinstance(p, Dual)
        found.append(Dual.later(Viewed(p.stack[0], t.stack, again(i))) if both else p)
    return pytree.tree_unflatten(found, tree)
