"""Calls of the multi-tangent ops for :mod:`.package`: small, odd, one per kind of kernel that the launcher makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["attention_calls"]


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


def attention_calls() -> dict[str, Callable[[], tuple[Any, ...]]]:
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
