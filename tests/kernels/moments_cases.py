"""Inputs for the moments kernels: each kernel, each shape of tile, one to several tiles; and difficult numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from balanced_rep.ops.moments import moments_reference
from balanced_rep.testing import assert_moments_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


class Call(NamedTuple):
    """Arguments of one call."""

    x: Tensor
    n_kept: int
    n_pooled: int = 0
    pool: int = 0
    threshold: float = 0.1


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inside(x: Tensor, start: int, *pitch: int) -> Tensor:
    """The values of ``x`` as a view into a larger buffer of NaN: what lies around it must not be read."""
    buffer = x.new_full((start + math.prod(pitch),), torch.nan)
    view = buffer[start:].view(*pitch)[tuple(slice(n) for n in x.shape)]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[torch.dtype], Call]] = {
    "one value": lambda t: Call(normal(1, 1, dtype=t), 1),
    "no kept dims": lambda t: Call(normal(1009, dtype=t), 0),
    "no reduced dims": lambda t: Call(normal(5, 7, dtype=t), 2),
    "short rows": lambda t: Call(normal(19, 511, dtype=t), 1),
    "short aligned rows": lambda t: Call(normal(9, 512, dtype=t), 1),
    "two tiles of a warp": lambda t: Call(normal(3, 520, dtype=t), 1),
    "odd rows in segments": lambda t: Call(normal(2, 8193, dtype=t), 1),
    "aligned rows in segments": lambda t: Call(normal(2, 16392, dtype=t), 1),
    "rows off by one element": lambda t: Call(inside(normal(3, 4100, dtype=t), 1, 3, 4104), 1),
    "pitched rows": lambda t: Call(inside(normal(3, 1100, dtype=t), 0, 3, 1104), 1),
    "columns": lambda t: Call(normal(300, 70, dtype=t).t(), 1),
    "odd columns": lambda t: Call(inside(normal(130, 35, dtype=t), 1, 130, 37).t(), 1),
    "per channel of (B, C, H, W)": lambda t: Call(normal(6, 3, 9, 40, dtype=t).transpose(0, 1), 1),
    "channels of a slice": lambda t: Call(inside(normal(3, 2, 50, 60, dtype=t), 0, 3, 2, 50, 64).transpose(0, 1), 1),
    "per channel, channels last": lambda t: Call(normal(2, 9, 9, 24, dtype=t).permute(0, 3, 1, 2), 2),
    "kept in three blocks": lambda t: Call(inside(normal(2, 3, 4, 33, dtype=t), 3, 3, 4, 5, 40), 3),
    "reduced in three blocks": lambda t: Call(inside(normal(2, 3, 4, 33, dtype=t), 3, 2, 4, 5, 40), 1),
    "reversed order": lambda t: Call(normal(4, 5, 6, 7, dtype=t).permute(3, 2, 1, 0), 2),
    "expanded": lambda t: Call(normal(3, 1, 5, dtype=t).expand(3, 300, 5), 1),
    "max of windows": lambda t: Call(normal(2, 300, 5, 7, dtype=t), 1, 2, 1),
    "max of small windows": lambda t: Call(normal(2, 300, 2, 2, dtype=t), 1, 2, 1),
    "mean of windows": lambda t: Call(normal(2, 300, 6, 6, dtype=t), 1, 2, 2),
    "max, channels last": lambda t: Call(normal(2, 5, 4, 300, dtype=t).permute(0, 3, 1, 2), 1, 2, 1),
    "mean over tokens": lambda t: Call(normal(2, 21, 300, dtype=t).transpose(1, 2), 1, 1, 2),
    "max of cut windows": lambda t: Call(inside(normal(2, 40, 5, 7, dtype=t), 0, 2, 40, 8, 8), 1, 2, 1),
    "mean of everything": lambda t: Call(normal(3, 400, dtype=t), 1, 1, 2),
}  # fmt: skip


def _spoiled(*values: float) -> Tensor:
    x = normal(2, 600)
    for i, value in enumerate(values):
        x[i % 2, (37 * i + 5) % 600] = value
    return x


def _largest(dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max if dtype != torch.float64 else 1e75  # where the reference can still take d^4
    x = normal(2, 600).sign() * largest
    x[1] = largest
    x[1, 3] *= 0.5
    return x


def difficult(dtype: torch.dtype) -> dict[str, Tensor]:
    """Two rows of 600 values by name: numbers that are hard to add up."""
    half, tiny = dtype == torch.float16, torch.finfo(dtype).smallest_normal
    rows = {
        "mean 1000 std": normal(2, 600) + (30 if dtype.itemsize == 2 else 1000),
        "1e-20": normal(2, 600) * (1e-6 if half else 1e-20),
        "1e15": normal(2, 600) * (1e4 if half else 1e15),
        "subnormal": normal(2, 600) * (0.1 * tiny if dtype != torch.float64 else 1e-70),
        "largest": _largest(dtype),
        "rectified": normal(2, 600).relu(),
        "heavy tails": normal(2, 600).pow(5),
        "constant": torch.full((2, 600), 0.1, dtype=torch.float64),
        "constant after a while": torch.cat([torch.full((2, 7), 0.5), torch.full((2, 593), 0.1)], 1).double(),
        "zero": torch.zeros(2, 600, dtype=torch.float64),
        "one NaN": _spoiled(math.nan),
        "one inf": _spoiled(math.inf),
        "-inf and NaN": _spoiled(-math.inf, math.nan),
        "both inf": _spoiled(math.inf, -math.inf, -math.inf, math.inf),
        "all NaN": torch.full((2, 600), math.nan, dtype=torch.float64),
        "all inf": torch.full((2, 600), math.inf, dtype=torch.float64),
    }
    return {name: x.to(dtype) for name, x in rows.items()}


def spoiled_windows(dtype: torch.dtype, pool: int, *, channels_last: bool) -> Call:
    """Four samples of 40 windows of 20 cells: one NaN, one inf, both inf in one window, and a constant sample."""
    x = normal(4, 40, 20)
    x[0, 7, 13], x[1, 30, 19], x[2, 2, 3], x[2, 2, 4], x[3] = math.nan, math.inf, -math.inf, math.inf, 0.25
    x[0, 8], x[1, 31] = -math.inf, -1.0
    x = x.to(dtype)
    return Call(x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x, 1, 1, pool)


def check(got: Tensor, call: Call) -> None:
    """Compares with the float64 reference within the accuracy that the op promises.

    Raises:
        AssertionError: Naming the field.
    """
    exact = call.x.dtype == torch.float64
    rel, averaged = 1e-12 if exact else 1e-6, call.pool == 2
    assert_moments_close(
        got, moments_reference(*call), rel=rel, shape_rel=10 * rel, value_rel=1e-12 if averaged else 0.0
    )
    assert not (got[2] < 0).any()
    assert not (got[4] < 0).any()


def check_difficult(run: Callable[..., Tensor], dtype: torch.dtype, *, columns: bool) -> None:
    """One call with all of :func:`difficult` as rows, or as columns, which the kernels cut into more pieces.

    Raises:
        AssertionError: Naming the numbers and the field.
    """
    named = difficult(dtype)
    x = torch.cat(list(named.values()))
    call = Call(x.t().contiguous().t() if columns else x, 1)
    got = run(*call)
    for i, name in enumerate(named):
        try:
            check(got[:, 2 * i : 2 * i + 2], call._replace(x=call.x[2 * i : 2 * i + 2]))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


# Layouts that between them reach every kernel of moments.cu.
EVERY_KERNEL = (
    "short rows",
    "short aligned rows",
    "odd rows in segments",
    "aligned rows in segments",
    "columns",
    "odd columns",
    "max of windows",
    "max of small windows",
    "mean of windows",
    "mean over tokens",
)
FEW = ("short rows", "aligned rows in segments", "columns", "max of windows", "mean over tokens")


def cases(thorough: dict[torch.dtype, tuple[str, ...]]) -> list[Any]:
    """Parameters ``(dtype, layout)``: every layout of every dtype, marked slow unless it is in ``thorough``."""
    return [
        pytest.param(
            dtype, name, id=f"{NAMES[dtype]}-{name}", marks=() if name in thorough[dtype] else pytest.mark.slow
        )
        for dtype in DTYPES
        for name in LAYOUTS
    ]
