"""Calls of the multi-tangent ops for :mod:`.package`.

Those of ``calls`` are small, odd, one per kind of kernel that the launcher makes. Those of ``large`` tell about
traffic: whole tiles, as networks have them, and, with "odd" in their names, rows that begin anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "GROUP_SHARE",
    "LARGE_ACTIVATION",
    "LARGE_ATTENTION",
    "LARGE_GATED",
    "LARGE_GROUP",
    "LARGE_ROWS",
    "LARGE_SOFTMAX",
    "activation_calls",
    "attention_calls",
    "gated_calls",
    "group_calls",
    "row_calls",
    "softmax_calls",
]

Calls = dict[str, Callable[[], tuple[Any, ...]]]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _attention(
    dtype: torch.dtype, moving: str, n: int, m: int, d: int, heads: int, groups: int, tangents: int,
    tangent: torch.dtype | None = None, mask: Tensor | None = None, causal: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    primals = _draw(dtype, 1, heads, n, d), _draw(dtype, 1, groups, m, d), _draw(dtype, 1, groups, m, d)
    moves = [
        _draw(tangent or dtype, tangents, *x.shape) if name in moving else None
        for name, x in zip("qkv", primals, strict=True)
    ]
    return *primals, *moves, mask, causal, d**-0.5


def attention_calls() -> Calls:
    """Head dims of one tile and two, every set of tangents' dtypes, masks, groups of heads and of tangents."""
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    return {
        "self, float16": lambda: _attention(
            f16, "qkv", 66, 33, 40, 2, 1, 3, mask=torch.arange(33).view(1, 1, 1, 33) % 5 > 0, causal=True
        ),
        "self, float32": lambda: _attention(f32, "qkv", 33, 17, 128, 1, 1, 1),
        "cross, bfloat16": lambda: _attention(bf16, "q", 65, 35, 64, 2, 2, 2, mask=_draw(f32, 1, 2, 65, 35)),
        "keys, float32 and bfloat16": lambda: _attention(f32, "kv", 5, 18, 72, 1, 1, 2, tangent=bf16),
    }


def activation_calls() -> Calls:
    f32, bf16 = torch.float32, torch.bfloat16
    return {
        "gelu, float32": lambda: (_draw(f32, 3, 160), _draw(f32, 2, 3, 160), "gelu"),
        "silu, bfloat16, strided": lambda: (_draw(bf16, 5, 90)[:, :77], _draw(bf16, 3, 5, 90)[:, :, :77], "silu"),
        "gelu_tanh, float32 and bfloat16": lambda: (_draw(f32, 4, 512), _draw(bf16, 2, 4, 512), "gelu_tanh"),
    }


def _gated(dtype: torch.dtype, rows: int, n: int, kind: str) -> tuple[Any, ...]:
    (h, g), (dh, dg) = _draw(dtype, rows, 2 * n).chunk(2, -1), _draw(dtype, 2, rows, 2 * n).chunk(2, -1)
    return h, dh, g, dg, kind


def gated_calls() -> Calls:
    return {
        "gelu, float16": lambda: _gated(F16, 5, 320, "gelu"),
        "silu, float32, odd": lambda: _gated(F32, 5, 33, "silu"),
    }


def _rows(dtype: torch.dtype, b: int, r: int, n: int, k: int, weights: tuple[int, int]) -> tuple[Any, ...]:
    w, bias = (_draw(dtype, many, n) if many else None for many in weights)
    return _draw(dtype, b, r, n), _draw(dtype, k, b, r, n), w, bias, 1e-5


def row_calls() -> Calls:
    """Whole rows of odd and even lengths, weights shared, per sample, and absent; the longest."""
    return {
        "modulated, bfloat16": lambda: _rows(BF16, 2, 3, 1152, 2, (2, 2)),
        "odd, float32": lambda: _rows(F32, 1, 7, 75, 3, (1, 1)),
        "plain, float32": lambda: _rows(F32, 1, 2, 4096, 1, (0, 0)),
        "longest, float32": lambda: _rows(F32, 2, 1, 8185, 1, (2, 1)),
    }


def softmax_calls() -> Calls:
    return {
        "float32": lambda: (_draw(F32, 5, 256), _draw(F32, 2, 5, 256)),
        "odd, float16": lambda: (_draw(F16, 9, 77), _draw(F16, 3, 9, 77)),
    }


def _group(
    dtype: torch.dtype, c: int, s: int, k: int, groups: int, *, silu: bool, last: bool = False
) -> tuple[Any, ...]:
    x, dx = _draw(dtype, 1, c, s), _draw(dtype, k, 1, c, s)
    if last:
        x, dx = x.mT.contiguous().mT, dx.mT.contiguous().mT
    return x, dx, groups, _draw(dtype, c), _draw(dtype, c), 1e-5, silu


def group_calls() -> Calls:
    """Contiguous and channels last, with SiLU and without, short and long."""
    return {
        "SiLU, float16": lambda: _group(F16, 20, 256, 2, 2, silu=True),
        "channels last, float32": lambda: _group(F32, 20, 63, 2, 2, silu=True, last=True),
        "odd, float32": lambda: _group(F32, 6, 701, 1, 2, silu=False),
        "long, channels last, float32": lambda: _group(F32, 10, 2048, 1, 1, silu=True, last=True),
    }


LARGE_ACTIVATION: Calls = {
    "32 x 1280, float32": lambda: (_draw(F32, 32, 1280), _draw(F32, 4, 32, 1280), "silu"),
    "33 x 1277 odd, bfloat16": lambda: (
        _draw(BF16, 33, 1291)[:, :1277], _draw(BF16, 4, 33, 1291)[..., :1277], "gelu_tanh"
    ),
}  # fmt: skip
LARGE_GATED: Calls = {"32 x 1280, float16": lambda: _gated(F16, 32, 1280, "gelu")}
LARGE_ROWS: Calls = {
    "64 x 1152 modulated, bfloat16": lambda: _rows(BF16, 2, 32, 1152, 4, (2, 2)),
    "64 x 320, float32": lambda: _rows(F32, 1, 64, 320, 4, (1, 1)),
    "33 x 1291 odd, float32": lambda: _rows(F32, 1, 33, 1291, 4, (1, 1)),
    "33 x 1291 odd, bfloat16": lambda: _rows(BF16, 1, 33, 1291, 4, (1, 1)),
}
LARGE_SOFTMAX: Calls = {
    "64 x 1024, float32": lambda: (_draw(F32, 64, 1024), _draw(F32, 4, 64, 1024)),
    "128 x 77 odd, float16": lambda: (_draw(F16, 128, 77), _draw(F16, 4, 128, 77)),
}
LARGE_GROUP: Calls = {
    "4 groups of 10 x 4096, float16": lambda: _group(F16, 40, 4096, 4, 4, silu=True),
    "4 groups of 10 x 1024 odd, channels last, float16": lambda: _group(F16, 40, 1024, 4, 4, silu=True, last=True),
    "2 groups of 4 x 2223 odd, float32": lambda: _group(F32, 8, 2223, 2, 2, silu=False),
}
# The first is 16 programs of 32 warps, of which the smallest of the modelled devices runs 108 at a time; a cache of
# 40 MB serves them all.
GROUP_SHARE = {"4 groups of 10 x 4096, float16": 40 * 10**6 * 16 // 108}
LARGE_ATTENTION: Calls = {
    "self, 128 x 128 x 64, float16": lambda: _attention(F16, "qkv", 128, 128, 64, 4, 4, 2),
    "self, 128 x 128 x 72 odd, bfloat16": lambda: _attention(BF16, "qkv", 128, 128, 72, 2, 2, 2),
    "self, 64 x 64 x 80, float32": lambda: _attention(F32, "qkv", 64, 64, 80, 2, 2, 2),
    "cross, 256 x 77 x 40 odd, float16": lambda: _attention(F16, "q", 256, 77, 40, 4, 4, 4),
}
