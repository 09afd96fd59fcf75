"""Attention with K tangents: the softmax once for all of them, and scores only in blocks that stay in cache.

With S = scale q k^T (+ mask), P = softmax(S), O = P v, the tangents are H = P dS, dO = H v - rowsum(H) O + P dv, where
dS = scale (dq k^T + q dk^T). Without tangents on k and v (cross attention) two of the four products do not occur.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff import _fused
from balanced_rep.autodiff._dual import Dual, is_dual
from balanced_rep.autodiff._registry import rule
from balanced_rep.autodiff._rules_linear import _matmul
from balanced_rep.autodiff._rules_norm import _softmax
from balanced_rep.autodiff._rules_pointwise import _mul, _sum
from balanced_rep.autodiff._viewed import view_apart


@rule("scaled_dot_product_attention", kind="attention",
      formula="t' = H v - rowsum(H) O + P t_v, H = P scale (t_q k^T + q t_k^T)")  # fmt: skip
def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    given = (query, key, value)
    same = len({x.dtype for x in given}) == 1 and query.is_floating_point()
    if dropout_p > 0 or not same or any(x.dim() < 2 for x in given) or (is_causal and attn_mask is not None):
        return NotImplemented
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa and (query.shape[-3] % key.shape[-3] or key.shape[-3] != value.shape[-3]):
        return NotImplemented  # torch says what is wrong
    if is_dual(attn_mask):
        return _with_moving_mask(query, key, value, attn_mask, factor, enable_gqa)
    if max(x.dim() for x in given) == 3 and not enable_gqa:
        return _of_samples(query, key, value, attn_mask, is_causal, factor)
    heads = (query.shape[-3], key.shape[-3]) if enable_gqa else _common_heads(given)
    lead = _broadcast([x.shape[:-3] for x in given])
    q, k, v = (_canonical(x, lead, h) for x, h in zip(given, (heads[0], heads[1], heads[1]), strict=True))
    if len({t.dtype for _, t in (q, k, v) if t is not None}) > 1:
        q, k, v = ((x, None if t is None else t.to(x.dtype)) for x, t in (q, k, v))
    if attn_mask is not None:
        n = max(query.dim(), key.dim())
        _check_mask(attn_mask, torch.Size((*lead, heads[0], query.shape[-2], key.shape[-2])[-n:]))
    mask = None if attn_mask is None else _mask(attn_mask, lead, heads[0], query.shape[-2], key.shape[-2])
    y = _fused.attention(q, k, v, mask, is_causal, factor)
    deep = max(x.dim() for x in given) > 2
    shape = (*lead, *heads[:1], query.shape[-2], value.shape[-1]) if deep else (query.shape[-2], value.shape[-1])
    if isinstance(y, Tensor):
        return Dual(y.reshape(y.shape[0], *shape))
    return Dual.of((y[0].reshape(shape), y[1].reshape(y[1].shape[0], *shape)))


def _of_samples(query: Any, key: Any, value: Any, mask: Tensor | None, is_causal: bool, scale: float) -> Any:
    """Three dims: samples with one head each, as the result lies in memory: (B, N, c)."""
    if mask is not None:
        (lead,) = torch.broadcast_shapes(*(x.shape[-3:-2] for x in (query, key, value)))
        _check_mask(mask, torch.Size((lead, query.shape[-2], key.shape[-2])))
        mask = mask.unsqueeze(-3) if mask.dim() == 3 else mask

    def with_head(x: Any) -> Any:
        return _of_both(lambda s: s.unsqueeze(-3), x) if is_dual(x) else x.unsqueeze(-3)

    q, k, v = map(with_head, (query, key, value))
    y = _attention(q, k, v, mask, is_causal=is_causal, scale=scale)
    return _of_both(lambda s: s.squeeze(-3), y)


def _of_both(view: Callable[[Tensor], Tensor], x: Dual) -> Dual:
    def rule(x: Dual) -> Dual:
        return Dual(view(x.stack))

    return view_apart(rule, x, (), {}) if x.is_apart else rule(x)


def _common_heads(tensors: tuple[Tensor, ...]) -> tuple[int, int]:
    (heads,) = _broadcast([x.shape[-3:-2] for x in tensors]) or (1,)
    return heads, heads


def _broadcast(shapes: list[torch.Size]) -> torch.Size:
    return shapes[0] if all(s == shapes[0] for s in shapes) else torch.broadcast_shapes(*shapes)


def _canonical(x: Tensor, lead: torch.Size, heads: int) -> tuple[Tensor, Tensor | None]:
    """Primal as (B, heads, n, channels), and tangents with K in front, if there are any."""

    def expanded(t: Tensor, extra: int) -> Tensor:
        front, inner = t.shape[:extra], t.shape[-2:]
        t = t.reshape(*front, *[1] * (len(lead) + 3 + extra - t.dim()), *t.shape[extra:])
        t = t.expand(*front, *lead, heads, *inner)
        return t if len(lead) == 1 else t.reshape(*front, math.prod(lead), heads, *inner)

    if not isinstance(x, Dual):
        return expanded(x, 0), None
    value, tangents = x.parts
    return expanded(value, 0), expanded(tangents, 1)


def _check_mask(mask: Tensor, scores: torch.Size) -> None:
    """torch adds the mask to the scores in place: it may be smaller than they are, never larger."""
    if mask.dim() > len(scores) or any(n not in (1, m) for n, m in zip(mask.shape[::-1], scores[::-1], strict=False)):
        raise RuntimeError(
            f"br.jvp: scaled_dot_product_attention: attn_mask has shape {tuple(mask.shape)}, which does not broadcast "
            f"to the scores {tuple(scores)} (batch of the query, heads, queries, keys)"
        )


def _mask(mask: Tensor, lead: torch.Size, heads: int, rows: int, columns: int) -> Tensor:
    """(B or 1, H or 1, rows or 1, columns or 1)."""
    mask = mask.reshape(*[1] * (len(lead) + 3 - mask.dim()), *mask.shape)
    if len(lead) == 1:
        return mask
    if all(n == 1 for n in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _with_moving_mask(query: Any, key: Any, value: Any, mask: Any, scale: float, enable_gqa: bool) -> Dual:
    """Scores in memory: a mask that depends on the input is rare."""
    if enable_gqa:
        key, value = (_repeat_heads(x, query.shape[-3]) for x in (key, value))
    turned = Dual(key.stack.mT) if isinstance(key, Dual) else key.mT
    scores = _matmul(query, turned) if is_dual(query) or is_dual(turned) else query @ turned
    weights = _softmax(_sum(_mul(scores, scale) if is_dual(scores) else scores * scale, mask), -1)
    return _matmul(weights, value)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    by = heads // x.shape[-3]
    return Dual(x.stack.repeat_interleave(by, -3)) if isinstance(x, Dual) else x.repeat_interleave(by, -3)


@rule("multi_head_attention_forward", kind="composite", formula="in projections, attention, out projection")
def _multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None, static_k: Tensor | None = None, static_v: Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    odd = (bias_k, bias_v, static_k, static_v, add_zero_attn or None, key_padding_mask)
    if any(x is not None for x in odd) or (training and dropout_p > 0):
        return NotImplemented
    if need_weights and not is_dual(query) and not is_dual(key):
        return NotImplemented
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight) if in_proj_weight is None else in_proj_weight.chunk(3)
    q, k, v = (
        _split_heads(F.linear(x, w, b), num_heads) for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, num_heads)) if query.dim() == 3 else attn_mask
    causal = is_causal and attn_mask is None
    if need_weights:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights_out = scores.softmax(-1)
        y = weights_out @ v
    else:
        mask = ~attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
        y, weights_out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal), None
    y = y.transpose(-2, -3).flatten(-2)  # (B, L, E)
    y = F.linear(y if query.dim() == 2 else y.transpose(0, 1), out_proj_weight, out_proj_bias)
    if weights_out is not None and average_attn_weights:
        weights_out = weights_out.mean(-3)
    return y, weights_out


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(L, B, E) or (L, E) to ([B,] heads, L, E / heads)."""
    x = x.unflatten(-1, (heads, -1))
    return x.permute(1, 2, 0, 3) if x.dim() == 4 else x.transpose(0, 1)
