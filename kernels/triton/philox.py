r"""philox_bits and philox_normal in Triton: the bits of :mod:`balanced_rep.ops.philox`.

A program makes ROWS items by BLOCK counters of four words each. Normals are evaluated with every operation rounded on
its own: the launcher turns fusion off.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a @triton.jit function is not the Python function that a type checker sees)

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

__all__ = ["philox_bits", "philox_normal"]

_TILE = 256  # counters of a program


@triton.jit
def _words(items_ptr, n_items, n, stride, seed_low, seed_high, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Four words each of a tile of counters, and where they go: ten rounds of Philox4x32."""
    chunks = tl.cdiv(tl.cdiv(n, 4), BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * ROWS + tl.arange(0, ROWS)
    block = program % chunks * BLOCK + tl.arange(0, BLOCK)
    item = tl.load(items_ptr + row * stride, mask=row < n_items, other=0)[:, None]
    counter = tl.broadcast_to(block[None, :], (ROWS, BLOCK))
    item = tl.broadcast_to(item, (ROWS, BLOCK))
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = item.to(tl.uint32), (item >> 32).to(tl.uint32)
    k0, k1 = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3, row, block


@triton.jit
def _store(out_ptr, n_items, n, row, block, v0, v1, v2, v3, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes four values per counter, side by side."""
    values = tl.interleave(tl.interleave(v0, v2), tl.interleave(v1, v3))  # (ROWS, 4 BLOCK)
    first = tl.min(block, 0) * 4
    column = first + tl.arange(0, 4 * BLOCK)
    live = (row < n_items)[:, None] & (column < n)[None, :]
    tl.store(out_ptr + row[:, None] * n + column[None, :], values, mask=live)


@triton.jit
def _log_uniform(word):
    """ln u of u = (top 24 bits + 1) / 2^24 = m 2^e with m in [sqrt(1/2), sqrt(2))."""
    bits = (((word >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = x * -0.07451186329126358 + 0.12806610763072968
    p = p * x + -0.13266031444072723
    p = p * x + 0.14199650287628174
    p = p * x + -0.1660836935043335
    p = p * x + 0.20000939071178436
    p = p * x + -0.2500157952308655
    p = p * x + 0.33333346247673035
    p = p * x + -0.49999988079071045
    p = p * x + 1.0
    return exponent.to(tl.float32) * 0.6931471824645996 + x * p


@triton.jit
def _cos_sin_turn(word):
    """Cosine and sine of 2 pi word / 2^32: the nearest quarter turn, and a rest of 24 bits within half a quarter."""
    quarter = (word + 0x20000000) >> 30
    rest = (word - (quarter << 30)).to(tl.int32, bitcast=True) >> 6
    a = rest.to(tl.float32) * 5.9604644775390625e-08
    z = a * a
    c = z * 0.0009067399078048766 + -0.02086152881383896
    c = c * z + 0.253669410943985
    c = c * z + -1.2337005138397217
    c = z * c + 1.0
    s = z * 0.0001582063123350963 + -0.004681266378611326
    s = s * z + 0.07969257980585098
    s = s * z + -0.6459640860557556
    s = s * z + 1.5707963705062866
    s = a * s
    swap = (quarter & 1) == 1
    first, second = tl.where(swap, s, c), tl.where(swap, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -first, first), tl.where((quarter & 2) == 2, -second, second)


@triton.jit
def _normal_pair(word_a, word_b):
    """Box-Muller."""
    radius = tl.sqrt_rn(_log_uniform(word_a) * -2.0)
    cosine, sine = _cos_sin_turn(word_b)
    return radius * cosine, radius * sine


@triton.jit
def _bits_kernel(
    items_ptr,  # (n_items,) int64, given stride
    out_ptr,  # (n_items, n) int64, contiguous
    n_items, n, stride, seed_low, seed_high,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i, j] = word j of item i."""
    c0, c1, c2, c3, row, block = _words(items_ptr, n_items, n, stride, seed_low, seed_high, ROWS, BLOCK)
    _store(
        out_ptr, n_items, n, row, block,
        c0.to(tl.int64), c1.to(tl.int64), c2.to(tl.int64), c3.to(tl.int64), ROWS, BLOCK,
    )  # fmt: skip


@triton.jit
def _normal_kernel(
    items_ptr,  # (n_items,) int64, given stride
    out_ptr,  # (n_items, n) float32, contiguous
    n_items, n, stride, seed_low, seed_high,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i, 2 j] and out[i, 2 j + 1] = Box-Muller of words 2 j and 2 j + 1 of item i."""
    c0, c1, c2, c3, row, block = _words(items_ptr, n_items, n, stride, seed_low, seed_high, ROWS, BLOCK)
    v0, v1 = _normal_pair(c0, c1)
    v2, v3 = _normal_pair(c2, c3)
    _store(out_ptr, n_items, n, row, block, v0, v1, v2, v3, ROWS, BLOCK)


def philox_bits(items: Tensor, seed: int, n: int) -> Tensor:
    """Uniform 32-bit words; see :func:`balanced_rep.ops.philox.philox_bits_reference`.

    Args:
        items: int64 ``(b,)``.
        seed: A signed 64-bit integer.
        n: Words per item.

    Returns:
        int64 ``(b, n)``.
    """
    return _launch(_bits_kernel, items, seed, n, torch.int64)


def philox_normal(items: Tensor, seed: int, n: int) -> Tensor:
    """Standard normal numbers; see :func:`balanced_rep.ops.philox.philox_normal_reference`.

    Args:
        items: int64 ``(b,)``.
        seed: A signed 64-bit integer.
        n: Numbers per item.

    Returns:
        float32 ``(b, n)``.
    """
    return _launch(_normal_kernel, items, seed, n, torch.float32)


def _launch(kernel: triton.JITFunction, items: Tensor, seed: int, n: int, dtype: torch.dtype) -> Tensor:
    n_items = items.shape[0]
    out = torch.empty((n_items, n), dtype=dtype, device=items.device)
    if out.numel() == 0:
        return out
    block = min(triton.next_power_of_2(triton.cdiv(n, 4)), _TILE)
    rows = min(triton.next_power_of_2(n_items), _TILE // block)
    grid = (triton.cdiv(n_items, rows) * triton.cdiv(triton.cdiv(n, 4), block),)
    with torch.cuda.device_of(items):
        kernel[grid](
            items, out, n_items, n, items.stride(0), seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF,
            ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
