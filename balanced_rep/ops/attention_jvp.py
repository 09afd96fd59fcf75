r"""Attention with K tangents: softmax once for all of them, and no matrix of scores in memory.

With :math:`S = s\, q k^T` (+ mask), :math:`P = \mathrm{softmax}(S)`, :math:`O = P v`, the tangents are
:math:`H = P \circ s (\dot q k^T + q \dot k^T)`, :math:`\dot O = H v - \mathrm{rowsum}(H)\, O + P \dot v`. Where keys
and values have none, as in cross attention, two of the four products do not occur.

Letters: B batch, H query heads, G heads of keys and values (H a multiple of G), N queries, M keys, d channels of
queries and keys, c of values, K tangents.

The op is ``attention_jvp(q, k, v, dq, dk, dv, mask, is_causal, scale) -> (y, dy)`` with

- ``q (B, H, N, d)``, ``k (B, G, M, d)``, ``v (B, G, M, c)``, one dtype, any strides;
- ``dq (K, B, H, N, d)``, ``dk (K, B, G, M, d)``, ``dv (K, B, G, M, c)``, one dtype, each possibly ``None``, not all;
- ``mask (B or 1, H or 1, N or 1, M or 1)``, bool (True takes part) or floating point (added to the scores), or
  ``None``; ``is_causal``: query i sees keys 0 to i, together with the mask if there is one; ``scale`` a float;
- ``y (B, H, N, c)`` and ``dy (K, B, H, N, c)``, in memory as (B, N, H, c), as torch's own attention lays it out; given
  outputs have unit stride along c.

A row that sees no key is zero, with zero tangents. Query head h reads head ``h // (H / G)`` of keys and values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from balanced_rep.kernels import _supports
from balanced_rep.ops._jvp import check_tangents, define_jvp, wide
from balanced_rep.ops._library import run
from balanced_rep.ops._registry import Impl, OpSpec

__all__ = ["ATTENTION_JVP", "attention_jvp", "attention_jvp_reference"]

SCORES = 1 << 21  # elements of scores that the reference holds at a time, all tangents together


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``scaled_dot_product_attention`` and K Jacobian-vector products of it.

    Args:
        q: Queries ``(..., H, N, d)``; the leading dims may be absent, H too.
        k: Keys ``(..., G, M, d)``; H is a multiple of G.
        v: Values ``(..., G, M, c)``.
        dq: Tangents of the queries, ``(K, *q.shape)``; ``None`` where they are constant.
        dk: Tangents of the keys, ``(K, *k.shape)`` or ``None``.
        dv: Tangents of the values, ``(K, *v.shape)`` or ``None``.
        mask: Broadcasts to ``(..., H, N, M)``: bool, True where a key takes part, or added to the scores. Constant.
        is_causal: Query i sees keys 0 to i only.
        scale: Factor of the scores, by default ``1 / sqrt(d)``.

    Returns:
        ``y (..., H, N, c)`` in the dtype of ``q`` and ``dy (K, ..., H, N, c)`` in the dtype of the tangents.

    Raises:
        TypeError: If an input is no floating-point tensor, or dtypes differ.
        ValueError: If shapes do not fit, or there is no tangent.
        BackendError: If a backend is forced that cannot run this call.

    Example:
        >>> q = torch.randn(2, 8, 100, 40)
        >>> y, dy = attention_jvp(q, q, q, dq=torch.randn(4, *q.shape))
        >>> y.shape, dy.shape
        (torch.Size([2, 8, 100, 40]), torch.Size([4, 2, 8, 100, 40]))
    """
    _check(q, k, v, {"q": (q, dq), "k": (k, dk), "v": (v, dv)})
    flat = [_as_batch(x) for x in (q, k, v)]
    tangents = [None if t is None else _as_batch(t, extra=1) for t in (dq, dk, dv)]
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    y, dy = run(ATTENTION_JVP, *flat, *tangents, _as_mask(mask, q, k), bool(is_causal), factor)
    if q.dim() == 4:
        return y, dy
    shape = (*q.shape[:-1], v.shape[-1])
    return y.reshape(shape), dy.reshape(dy.shape[0], *shape)


def _check(q: Tensor, k: Tensor, v: Tensor, pairs: dict[str, tuple[Tensor, Tensor | None]]) -> None:
    given = {name: t for name, (_, t) in pairs.items() if t is not None}
    if not given:
        raise ValueError("attention_jvp: dq, dk and dv are all None; at least one of them is needed")
    for name, t in given.items():
        check_tangents("attention_jvp", name, pairs[name][0], t)
    for what, tensors in (("q, k and v", (q, k, v)), ("the tangents", tuple(given.values()))):
        if len({t.dtype for t in tensors}) > 1:
            raise TypeError(
                f"attention_jvp: {what} are {', '.join(str(t.dtype) for t in tensors)}; one dtype is needed"
            )
    if len({t.shape[0] for t in given.values()}) > 1:
        counts = ", ".join(f"d{name}: {t.shape[0]}" for name, t in given.items())
        raise ValueError(f"attention_jvp: the numbers of tangents differ ({counts})")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() >= 2) or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"attention_jvp: got {shapes}; accepted are (..., H, N, d), (..., G, M, d), (..., G, M, c)")
    if q.shape[:-3] != k.shape[:-3]:
        raise ValueError(f"attention_jvp: got {shapes}; the dims in front of the heads must be equal (use expand)")
    if q.dim() > 2 and (k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]):
        raise ValueError(f"attention_jvp: got {shapes}; the heads of q must be a multiple of those of k and v")


def _as_batch(x: Tensor, extra: int = 0) -> Tensor:
    """(B, heads, n, channels), with ``extra`` dims in front."""
    inner = x.dim() - extra
    if inner == 4:
        return x
    front = x.shape[:extra]
    return x.reshape(*front, -1, *x.shape[-3:]) if inner > 2 else x.reshape(*front, 1, 1, *x.shape[-2:])


def _as_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention_jvp: mask is {mask.dtype}; accepted are bool and floating point")
    full = (*q.shape[:-1], k.shape[-2])
    try:
        broadcasts = torch.broadcast_shapes(mask.shape, full) == full
    except RuntimeError:
        broadcasts = False
    if not broadcasts or mask.device != q.device:
        raise ValueError(
            f"attention_jvp: mask has shape {tuple(mask.shape)} on {mask.device}; it has to broadcast to {full} on "
            f"{q.device}"
        )
    mask = mask.reshape(*[1] * (max(len(full), 4) - mask.dim()), *mask.shape)
    if mask.dim() == 4:
        return mask
    same = all(n == 1 for n in mask.shape[:-3])
    return mask.reshape(1, *mask.shape[-3:]) if same else mask.expand(*full[:-3], *mask.shape[-3:]).flatten(0, -4)


def attention_jvp_reference(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    mask: Tensor | None, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, differentiable, in float32 at least; scores exist for a block of queries at a time."""
    heads, n, m = q.shape[-3], q.shape[-2], k.shape[-2]
    by = heads // k.shape[-3]
    k, v, dk, dv = (x if x is None or by == 1 else x.repeat_interleave(by, -3) for x in (k, v, dk, dv))  # pyright: ignore
    tangent = next(t for t in (dq, dk, dv) if t is not None)
    step = max(SCORES // max((1 + tangent.shape[0]) * q.shape[0] * heads * m, 1), 1)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], n, m)
    parts = []
    for start in range(0, max(n, 1), step):
        rows = slice(start, min(start + step, n))
        seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril()[rows] if is_causal else None
        parts.append(
            _rows(
                wide(q[..., rows, :]), wide(k), wide(v), None if dq is None else wide(dq[..., rows, :]),
                None if dk is None else wide(dk), None if dv is None else wide(dv),
                None if mask is None else mask[..., rows, :], seen, scale,
            )
        )  # fmt: skip
    y, dy = (torch.cat(ts, -2) for ts in zip(*parts, strict=True))
    return y.to(q.dtype), dy.to(tangent.dtype)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    mask: Tensor | None, seen: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and tangents of some queries; ``seen`` is the part of the causal mask that belongs to them."""
    p = _softmax(_masked(q @ k.mT * scale, mask, seen))
    y = p @ v
    scores = [x for x in (None if dq is None else dq @ k.mT, None if dk is None else q @ dk.mT) if x is not None]
    terms = [] if dv is None else [p @ dv]
    if scores:
        h = p * (sum(scores[1:], scores[0]) * scale)
        terms.append(h @ v - h.sum(-1, keepdim=True) * y)
    return y, sum(terms[1:], terms[0])


def _masked(s: Tensor, mask: Tensor | None, seen: Tensor | None) -> Tensor:
    for m in (mask, seen):
        if m is not None:
            s = s.masked_fill(~m, -math.inf) if m.dtype == torch.bool else s + m
    return s


def _softmax(s: Tensor) -> Tensor:
    """Softmax over the last dim; a row of -inf is zero, and so is its derivative."""
    blind = (s == -math.inf).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(blind, 0), -1).masked_fill(blind, 0)


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    tangent = next(t for t in (dq, dk, dv) if t is not None)
    b, h, n = q.shape[:3]
    y = q.new_empty((b, n, h, v.shape[-1])).transpose(1, 2)
    return y, tangent.new_empty((tangent.shape[0], b, n, h, v.shape[-1])).transpose(2, 3)


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = draw(2, 4, 37, 40), draw(2, 2, 53, 40), draw(2, 2, 53, 24)
    tangents = (draw(3, *x.shape) for x in (q, k, v))
    mask = torch.rand(2, 1, 37, 53, generator=generator) > 0.2
    return q, k, v, *tangents, mask, False, 0.2


ATTENTION_JVP = OpSpec(
    name="attention_jvp",
    reference=attention_jvp_reference,
    impls={
        "cpp": Impl("balanced_rep.ops._cpp_jvp:attention_jvp", _supports.cpp_attention_jvp),
        "triton": Impl("balanced_rep.kernels.triton.attention_jvp:attention_jvp", _supports.triton_attention_jvp),
    },
    inputs=_inputs,
    # Tangents of this input are of size 3; half types round each of them once, and inputs not at all.
    tolerance={
        torch.float64: (1e-11, 1e-11),
        torch.float32: (2e-5, 2e-5),
        torch.float16: (2e-3, 2e-3),
        torch.bfloat16: (1.6e-2, 1e-2),
    },
    outputs=_outputs,
)

define_jvp(
    ATTENTION_JVP,
    "(Tensor q, Tensor k, Tensor v, Tensor? dq, Tensor? dk, Tensor? dv, Tensor? mask, bool is_causal, float scale)",
)
