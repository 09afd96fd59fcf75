"""Conditions of a batch: trees of tensors with a leading dim; what is no tensor, or has no dims, is for all."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["check_rows", "expand_rows", "n_rows", "repeat_rows", "take_rows"]


def check_rows(what: str, cond: Any, n: int) -> None:
    """Checks that there is a condition for each sample.

    Args:
        what: Beginning of messages.
        cond: Conditions, or `None` for the null condition.
        n: Number of samples.

    Raises:
        ValueError: If there are more or fewer.
    """
    if cond is not None and (rows := n_rows(cond)) != n:
        raise ValueError(f"{what}: {n} samples and {rows} conditions; one each is needed.")


def take_rows(cond: Any, index: Tensor) -> Any:
    """Some rows.

    Args:
        cond: Conditions.
        index: Which, `(b,)` int64.

    Returns:
        Their conditions.
    """
    return tree_map(lambda c: c[index.to(c.device)] if _has_rows(c) else c, cond)


def repeat_rows(cond: Any, times: int) -> Any:
    """All rows, several times over.

    Args:
        cond: Conditions of n rows.
        times: How often.

    Returns:
        Conditions of `times * n` rows: all of them, then all of them again.
    """
    return tree_map(lambda c: c.repeat(times, *[1] * (c.ndim - 1)) if _has_rows(c) else c, cond)


def expand_rows(cond: Any, n: int) -> Any:
    """One row as many, without a copy.

    Args:
        cond: Conditions of one row.
        n: How many.

    Returns:
        Conditions of n rows.
    """
    return tree_map(lambda c: c.expand(n, *c.shape[1:]) if _has_rows(c) else c, cond)


def n_rows(cond: Any) -> int:
    """How many rows there are.

    Args:
        cond: Conditions.

    Returns:
        The leading dim.

    Raises:
        ValueError: If there is none, or tensors differ in it.
    """
    sizes = {len(leaf) for leaf in tree_leaves(cond) if _has_rows(leaf)}
    if len(sizes) != 1:
        if not sizes:
            raise ValueError(f"conditions must be tensors with a leading batch dim, got {type(cond).__name__}.")
        raise ValueError(f"conditions must be tensors with one leading batch dim, got sizes {sorted(sizes)}.")
    return sizes.pop()


def _has_rows(c: Any) -> bool:
    return isinstance(c, Tensor) and c.ndim > 0
