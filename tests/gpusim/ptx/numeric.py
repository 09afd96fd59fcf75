"""Rounding as the hardware does it: 16-bit formats, fused multiply-add, flush to zero."""

from __future__ import annotations

import numpy as np

from ..triton_interpreter import bf16_to_f32
from .types import Type

__all__ = [
    "flush_subnormals",
    "fma",
    "fma_rounded_to_odd",
    "fmax",
    "fmin",
    "round_to_bf16",
    "round_to_half",
    "widen_half",
]

_SMALLEST_NORMAL = np.float32(2.0**-126)


def flush_subnormals(values: np.ndarray) -> np.ndarray:
    """Replace float32 subnormals by zero of the same sign (the ``.ftz`` modifier)."""
    return np.where(np.abs(values) < _SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def _float32_rounded_to_odd(values: np.ndarray) -> np.ndarray:
    """Round float64 to float32 so that a later rounding to fewer bits equals a single rounding of the float64."""
    nearest = values.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(values)
    truncated = np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)
    inexact = (truncated.astype(np.float64) != values) & np.isfinite(values)
    return np.where(inexact, (truncated.view(np.uint32) | np.uint32(1)).view(np.float32), truncated)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 or float64 once to bfloat16 bit patterns, to nearest even; NaN becomes 0x7fff as in ``cvt``."""
    values = np.asarray(values)
    if values.dtype == np.float64:
        values = _float32_rounded_to_odd(values)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def widen_half(raw: np.ndarray, kind: Type) -> np.ndarray:
    """Return the float32 values of ``f16`` or ``bf16`` bits; pairs get a last axis of length 2, low half first."""
    raw = np.ascontiguousarray(raw)
    if kind.size == 4:
        raw = raw.reshape(-1).view(np.uint16).reshape(-1, 2)
    return raw.view(np.float16).astype(np.float32) if kind.name.startswith("f16") else bf16_to_f32(raw)


def round_to_half(values: np.ndarray, kind: Type) -> np.ndarray:
    """Round to the bits of ``kind``, the inverse of :func:`widen_half`."""
    values = np.asarray(values)
    bits = values.astype(np.float16).view(np.uint16) if kind.name.startswith("f16") else round_to_bf16(values)
    return np.ascontiguousarray(bits).view(np.uint32)[..., 0] if kind.size == 4 else bits


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(s, e)`` with ``s = fl(a + b)`` and ``s + e = a + b`` exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(p, e)`` with ``p = fl(a b)`` and ``p + e = a b`` exactly (Dekker, Veltkamp splitting)."""
    product = a * b

    def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scaled = x * 134217729.0  # 2^27 + 1
        high = scaled - (scaled - x)
        return high, x - high

    a_high, a_low = split(a)
    b_high, b_low = split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _fma64(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Fused multiply-add in float64: right but for ties that a 107-bit sum would break the other way."""
    product, low = _two_product(x, y)
    total, error = _two_sum(product, z)
    exact = total + (error + low)
    return np.where(np.isfinite(exact), exact, product + z)  # splitting overflows beyond 2^996: plain arithmetic then


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return ``x y + z`` rounded once: float32 operands give float32 bits, float64 operands float64.

    A float32 product is exact in float64, and so is the sum but for the last bits. Rounding that sum to float32 is a
    second rounding, which matters only when the sum lies exactly half way: then its error decides.
    """
    if np.result_type(x, y, z) == np.float64:
        return _fma64(*np.broadcast_arrays(np.float64(x), np.float64(y), np.float64(z)))
    product = np.asarray(x).astype(np.float64) * y
    total = product + z
    half_way = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if half_way.any():
        _, error = _two_sum(product, np.broadcast_to(np.asarray(z, np.float64), product.shape))
        nudge = half_way & (error != 0)
        total = np.where(nudge, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32)


def fma_rounded_to_odd(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return ``x y + z`` of 16-bit formats in float64, so that rounding it to 16 bits is the only rounding.

    The product is exact. A sum that is not is replaced by its neighbour with an odd last bit, which is no tie.
    """
    product = x.astype(np.float64) * y
    total, error = _two_sum(product, np.asarray(z, np.float64))
    even = (error != 0) & np.isfinite(error) & (total.view(np.uint64) & np.uint64(1) == 0)
    return np.where(even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def fmin(x: np.ndarray, y: np.ndarray, *, keep_nan: bool = False) -> np.ndarray:
    """Return the smaller one; -0 is smaller than +0. A NaN gives way to a number unless it is to be kept."""
    result = (np.minimum if keep_nan else np.fmin)(x, y)
    zero = (x == 0) & (y == 0)
    if zero.any():
        either = np.where(np.signbit(x) | np.signbit(y), -0.0, 0.0).astype(result.dtype)
        return np.where(zero, either, result)
    return result


def fmax(x: np.ndarray, y: np.ndarray, *, keep_nan: bool = False) -> np.ndarray:
    """Return the larger one, as :func:`fmin` does the smaller one."""
    return -fmin(-np.asarray(x), -np.asarray(y), keep_nan=keep_nan)
