"""Calls of the multi-tangent ops for :mod:`.package`: small, odd, one per kind of kernel that the launcher makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "STREAMING",
    "UNALIGNED",
    "activation_calls",
    "attention_calls",
    "gated_calls",
    "group_calls",
    "row_calls",
    "softmax_calls",
]

# Calls of the memory-bound ops that are held to the limits of traffic, on aligned rows and on rows that begin anywhere.
# Not held: layer and RMS norm of short odd rows (75 elements: 2.8 times the sectors, which the first-level cache then
# has), slices of channels last of a few bytes, and tangents in another dtype than the primal (1.4 times the sectors).
STREAMING = {
    "activation_jvp": ("gelu, float32",),
    "gated_activation_jvp": ("gelu, float16",),
    "group_norm_jvp": ("SiLU, float16",),
    "layer_norm_jvp": ("modulated, bfloat16", "plain, float32"),
    "rms_norm_jvp": ("modulated, bfloat16", "plain, float32"),
    "softmax_jvp": ("float32",),
}
UNALIGNED = {
    "activation_jvp": ("silu, bfloat16, strided",),
    "gated_activation_jvp": ("silu, float32, odd",),
    "group_norm_jvp": ("odd, float32",),
    "softmax_jvp": ("odd, float16",),
}


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


def activation_calls() -> dict[str, Callable[[], tuple[Any, ...]]]:
    f32, bf16 = torch.float32, torch.bfloat16
    return {
        "gelu, float32": lambda: (_draw(f32, 3, 160), _draw(f32, 2, 3, 160), "gelu"),
        "silu, bfloat16, strided": lambda: (_draw(bf16, 5, 90)[:, :77], _draw(bf16, 3, 5, 90)[:, :, :77], "silu"),
        "gelu_tanh, float32 and bfloat16": lambda: (_draw(f32, 4, 512), _draw(bf16, 2, 4, 512), "gelu_tanh"),
    }


def gated_calls() -> dict[str, Callable[[], tuple[Any, ...]]]:
    def gated(dtype: torch.dtype, n: int, kind: str) -> tuple[Any, ...]:
        (h, g), (dh, dg) = _draw(dtype, 5, 2 * n).chunk(2, -1), _draw(dtype, 2, 5, 2 * n).chunk(2, -1)
        return h, dh, g, dg, kind

    return {
        "gelu, float16": lambda: gated(torch.float16, 320, "gelu"),
        "silu, float32, odd": lambda: gated(torch.float32, 33, "silu"),
    }


def row_calls() -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Whole rows of odd and even lengths, weights shared, per sample, and absent."""

    def rows(dtype: torch.dtype, b: int, r: int, n: int, k: int, weights: tuple[int, int]) -> tuple[Any, ...]:
        w, bias = (_draw(dtype, many, n) if many else None for many in weights)
        return _draw(dtype, b, r, n), _draw(dtype, k, b, r, n), w, bias, 1e-5

    return {
        "modulated, bfloat16": lambda: rows(torch.bfloat16, 2, 3, 1152, 2, (2, 2)),
        "odd, float32": lambda: rows(torch.float32, 1, 7, 75, 3, (1, 1)),
        "plain, float32": lambda: rows(torch.float32, 1, 2, 4096, 1, (0, 0)),
    }


def softmax_calls() -> dict[str, Callable[[], tuple[Any, ...]]]:
    f32, f16 = torch.float32, torch.float16
    return {
        "float32": lambda: (_draw(f32, 5, 256), _draw(f32, 2, 5, 256)),
        "odd, float16": lambda: (_draw(f16, 9, 77), _draw(f16, 3, 9, 77)),
    }


def group_calls() -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Contiguous, channels last, and slices; with SiLU and without."""

    def group(dtype: torch.dtype, b: int, c: int, s: int, k: int, groups: int, silu: bool) -> tuple[Any, ...]:
        return _draw(dtype, b, c, s), _draw(dtype, k, b, c, s), groups, _draw(dtype, c), _draw(dtype, c), 1e-5, silu

    def last(x: Tensor, dx: Tensor, *rest: Any) -> tuple[Any, ...]:
        return x.mT.contiguous().mT, dx.mT.contiguous().mT, *rest

    return {
        "SiLU, float16": lambda: group(torch.float16, 2, 20, 256, 2, 2, True),
        "channels last, float32": lambda: last(*group(torch.float32, 1, 20, 63, 2, 2, True)),
        "odd, float32": lambda: group(torch.float32, 1, 6, 701, 1, 2, False),
    }
