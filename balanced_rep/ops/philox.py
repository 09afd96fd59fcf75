r"""Counter-based randomness, keyed by (seed, item): the same bits on every backend, chunk size and worker count.

Word j of item i is word ``j % 4`` of Philox4x32-10 (Salmon et al., SC 2011) with key ``seed`` and counter
``(j // 4, i)``, each 64 bits wide, low half first. Normals come from Box-Muller on word pairs, evaluated in float32
with nothing but correctly rounded multiply, add and square root, never fused, so that every backend rounds alike: the
logarithm, sine and cosine are the polynomials below (errors under 6e-9, below float32 rounding).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanced_rep.kernels import _supports
from balanced_rep.ops._library import define
from balanced_rep.ops._registry import Impl, OpSpec

__all__ = ["PHILOX_BITS", "PHILOX_NORMAL", "philox_bits", "philox_normal", "philox_rademacher"]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# ln(1 + x) = x P(x) on [sqrt(1/2) - 1, sqrt(2) - 1]; on [-1/2, 1/2] sin(a pi/2) = a S(a^2) and
# cos(a pi/2) = 1 + a^2 C(a^2).
LOG = (
    1.0, -0.49999988079071045, 0.33333346247673035, -0.2500157952308655, 0.20000939071178436,
    -0.1660836935043335, 0.14199650287628174, -0.13266031444072723, 0.12806610763072968, -0.07451186329126358,
)  # fmt: skip
SIN = (1.5707963705062866, -0.6459640860557556, 0.07969257980585098, -0.004681266378611326, 0.0001582063123350963)
COS = (-1.2337005138397217, 0.253669410943985, -0.02086152881383896, 0.0009067399078048766)
LN2 = 0.6931471824645996
SQRT_HALF_BITS = 0x3F3504F3

_MASK = 0xFFFFFFFF


def philox_bits(items: int | Tensor, n: int, *, seed: int) -> Tensor:
    """Uniform 32-bit words.

    Args:
        items: An item number, or int64 items ``(b,)``; the result is on their device, of a number on torch's default.
        n: Words per item.
        seed: 0 to 2^64 - 1.

    Returns:
        int64 ``(n,)`` or ``(b, n)``, values 0 to 2^32 - 1.

    Raises:
        TypeError: If items are not int64, or ``n`` or ``seed`` is no int.
        ValueError: If an item number, ``n`` or ``seed`` is out of range.
    """
    return _call("philox_bits", items, n, seed)


def philox_normal(items: int | Tensor, n: int, *, seed: int) -> Tensor:
    """Standard normal numbers; magnitudes reach 5.77, where 24-bit uniforms end.

    Args:
        items: An item number, or int64 items ``(b,)``; the result is on their device, of a number on torch's default.
        n: Numbers per item.
        seed: 0 to 2^64 - 1.

    Returns:
        float32 ``(n,)`` or ``(b, n)``.

    Raises:
        TypeError: If items are not int64, or ``n`` or ``seed`` is no int.
        ValueError: If an item number, ``n`` or ``seed`` is out of range.
    """
    return _call("philox_normal", items, n, seed)


def philox_rademacher(items: int | Tensor, n: int, *, seed: int) -> Tensor:
    """Signs -1 or 1 with equal probability, float32: the lowest bit of each word.

    Args:
        items: An item number, or int64 items ``(b,)``; the result is on their device, of a number on torch's default.
        n: Signs per item.
        seed: 0 to 2^64 - 1.

    Returns:
        float32 ``(n,)`` or ``(b, n)``.

    Raises:
        TypeError: If items are not int64, or ``n`` or ``seed`` is no int.
        ValueError: If an item number, ``n`` or ``seed`` is out of range.
    """
    return (1 - 2 * (philox_bits(items, n, seed=seed) & 1)).float()


def philox_bits_reference(items: Tensor, seed: int, n: int) -> Tensor:
    """The definition, in int64 arithmetic: ``items`` (b,) -> (b, n)."""
    block = torch.arange((n + 3) // 4, device=items.device)
    c = [
        *(w.expand(items.shape[0], -1) for w in (block & _MASK, block >> 32 & _MASK)),
        *(w.unsqueeze(1).expand(-1, block.shape[0]) for w in (items & _MASK, items >> 32 & _MASK)),
    ]
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(ROUNDS):
        # The product of two 32-bit words wraps in int64, but its bits are right; >> is arithmetic, so mask.
        p0, p1 = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
        c = [p1 >> 32 & _MASK ^ c[1] ^ k0, p1 & _MASK, p0 >> 32 & _MASK ^ c[3] ^ k1, p0 & _MASK]
        k0, k1 = k0 + WEYL[0] & _MASK, k1 + WEYL[1] & _MASK
    return torch.stack(c, -1).reshape(items.shape[0], c[0].shape[1] * 4)[:, :n].contiguous()


def philox_normal_reference(items: Tensor, seed: int, n: int) -> Tensor:
    """The definition, in float32: one rounding per written operation."""
    words = philox_bits_reference(items, seed, n + n % 2)
    # torch.sqrt of float32 is off by an ulp on some CPUs; through float64 the float32 result is correctly rounded.
    radius = (-2.0 * _log_uniform(words[:, ::2])).double().sqrt().float()
    cos, sin = _cos_sin_turn(words[:, 1::2])
    return torch.stack([radius * cos, radius * sin], -1).flatten(1)[:, :n].contiguous()


def _log_uniform(word: Tensor) -> Tensor:
    """ln u of u = (top 24 bits + 1) / 2^24, in (0, 1]."""
    u = ((word >> 8) + 1).float() * 2.0**-24
    bits = u.view(torch.int32)
    exponent = bits - SQRT_HALF_BITS >> 23  # u = m 2^exponent with m in [sqrt(1/2), sqrt(2))
    x = (bits - (exponent << 23)).view(torch.float32) - 1.0
    return exponent.float() * LN2 + x * _horner(LOG, x)


def _cos_sin_turn(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi word / 2^32: the nearest quarter turn, and a rest of 24 bits within half a quarter."""
    quarter = word + 2**29 >> 30
    a = (word - (quarter << 30) >> 6).float() * 2.0**-24
    z = a * a
    cos, sin = z * _horner(COS, z) + 1.0, a * _horner(SIN, z)
    swap, flip_cos, flip_sin = quarter & 1 == 1, quarter + 1 & 2 == 2, quarter & 2 == 2
    c, s = torch.where(swap, sin, cos), torch.where(swap, cos, sin)
    return torch.where(flip_cos, -c, c), torch.where(flip_sin, -s, s)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x
        value = value + c
    return value


def _call(name: str, items: int | Tensor, n: int, seed: int) -> Tensor:
    for what, value in (("n", n), ("seed", seed)):
        if not isinstance(value, int):
            raise TypeError(f"{what} must be an int, got {type(value).__name__}: convert it with int()")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if isinstance(items, int) and not -(2**63) <= items < 2**63:
        raise ValueError(f"an item number must be in [-2^63, 2^63), got {items}")
    many = torch.tensor([items]) if isinstance(items, int) else items
    if not isinstance(many, Tensor):
        raise TypeError(f"items must be an int or an int64 tensor (b,), got {type(items).__name__}")
    if many.dtype != torch.int64 or many.ndim != 1:
        raise TypeError(f"items must be an int or an int64 tensor (b,), got {many.dtype} of shape {tuple(many.shape)}")
    signed = seed - 2**64 if seed >= 2**63 else seed  # an op takes a signed 64-bit integer; the bits are the same
    out = getattr(torch.ops.balanced_rep, name)(many, signed, n)
    return out[0] if isinstance(items, int) else out


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    items = torch.randint(-(2**62), 2**62, (5,), generator=generator, dtype=dtype)
    return items, 0x1234_5678_9ABC_DEF0, 263


def _spec(name: str, reference: Any, out: torch.dtype) -> OpSpec:
    spec = OpSpec(
        name=name,
        reference=reference,
        impls={
            "cuda": Impl(f"balanced_rep.kernels.cuda:{name}", _supports.cuda_items),
            "triton": Impl(f"balanced_rep.kernels.triton.philox:{name}", _supports.triton_items),
            "cpp": Impl(f"balanced_rep.ops._cpp:{name}", _supports.cpp_items),
        },
        inputs=_inputs,
        tolerance={torch.int64: (0.0, 0.0)},  # the same bits
    )

    def fake(items: Tensor, seed: int, n: int) -> Tensor:
        return items.new_empty((items.shape[0], n), dtype=out)

    def vmap(info: Any, in_dims: tuple[int | None, ...], items: Tensor, seed: int, n: int) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        items = items.movedim(in_dims[0], 0)
        flat = getattr(torch.ops.balanced_rep, name)(items.flatten(), seed, n)
        return flat.unflatten(0, items.shape), 0

    return define(spec, "(Tensor items, int seed, int n) -> Tensor", fake=fake, vmap=vmap)


PHILOX_BITS = _spec("philox_bits", philox_bits_reference, torch.int64)
PHILOX_NORMAL = _spec("philox_normal", philox_normal_reference, torch.float32)
