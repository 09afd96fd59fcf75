"""Sizes of the GPU kernels of multi-tangent ops: what depends on shapes and strides alone."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["group_size", "merged_rows", "unit_last"]

_ENOUGH_PROGRAMS = 1024  # keeps every multiprocessor of a large device busy


def group_size(programs: int, n_tangents: int, enough: int = _ENOUGH_PROGRAMS) -> int:
    """How many tangents one program takes: all, unless there are few programs for each.

    Args:
        programs: Programs that share a tangent.
        n_tangents: K.
        enough: Programs that keep a device busy.

    Returns:
        At least 1.
    """
    return max(math.ceil(n_tangents / math.ceil(enough / programs)), 1)


def unit_last(x: Tensor) -> Tensor:
    """``x`` with unit stride along its last dim and without pending signs."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def merged_rows(
    primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], out: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """The arguments of an elementwise op as one long row each, if the rows of all of them follow on each other.

    Args:
        primals: ``(R, n)``.
        tangents: ``(K, R, n)``.
        out: ``(R, n)`` and ``(K, R, n)``.

    Returns:
        The same, with unit stride along n; ``(1, R n)`` and ``(K, 1, R n)`` where that is a view.
    """
    primals, tangents = tuple(map(unit_last, primals)), tuple(map(unit_last, tangents))
    n_rows, n = out[0].shape
    if n_rows == 1 or any(t.stride(-2) != n for t in (*primals, *tangents, *out)):
        return primals, tangents, out
    return (
        tuple(t.view(1, n_rows * n) for t in primals),
        tuple(t.view(-1, 1, n_rows * n) for t in tangents),
        (out[0].view(1, -1), out[1].view(-1, 1, n_rows * n)),
    )
