"""Attention with K tangents: the softmax once for all of them, and scores only in blocks.

With S = scale q k^T (+ mask), P = softmax(S), O = P v, the tangents are H = P dS, dO = H v - rowsum(H) O + P dv, where
dS = scale (dq k^T + q dk^T). Without tangents on k and v (cross attention) two of the four products do not occur.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff._dual import Dual, is_dual, primal, slots
from balanced_rep.autodiff._registry import rule
from balanced_rep.autodiff._rules_pointwise import wide

SCORES = 1 << 21  # elements of tangent scores held at a time: 8 MB in float32


@rule("scaled_dot_product_attention", kind="attention",
      formula="t' = H v - rowsum(H) O + P t_v, H = P scale (t_q k^T + q t_k^T)")  # fmt: skip
def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if dropout_p > 0 or query.dim() < 2 or (is_causal and attn_mask is not None):
        return NotImplemented
    n_slots = slots(query, key, value, attn_mask)
    heads = query.shape[-3] if query.dim() > 2 else 1
    if enable_gqa:
        key, value = (_repeat_heads(x, heads) for x in (key, value))
    shape = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    q, k, v = (_batched(x, shape) for x in (query, key, value))
    (q0, qt), (k0, kt), (v0, vt) = q, k, v
    mask, mask_t = _mask(attn_mask, shape, query.shape[-2], key.shape[-2], is_causal, q0.device)
    y = q0.new_empty((n_slots, *shape, query.shape[-2], value.shape[-1]))
    out = y.view(n_slots, -1, *y.shape[-2:])  # (1 + K, batch x heads, rows, channels)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    for group, rows in _tiles(n_slots - 1, out.shape[1], out.shape[2], k0.shape[-2], out.device):
        pick = (group, rows)
        m = None if mask is None else _tile(mask, shape, *pick)
        mt = None if mask_t is None else _tile(mask_t, shape, *pick, extra=1)
        tile = _tangents(
            q0[pick], None if qt is None else qt[:, group, rows], k0[group], None if kt is None else kt[:, group],
            v0[group], None if vt is None else vt[:, group], m, mt, factor,
        )  # fmt: skip
        out[0, group, rows], out[1:, group, rows] = tile
    return Dual(y)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    by = heads // x.shape[-3]
    if isinstance(x, Dual):
        return Dual(x.stack.repeat_interleave(by, -3))
    return x.repeat_interleave(by, -3)


def _batched(x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Primal (b, n, d) and tangents (K, b, n, d) with all leading dims as one."""
    x0 = primal(x)
    flat = x0.expand(*shape, *x0.shape[-2:]).reshape(-1, *x0.shape[-2:])
    if not isinstance(x, Dual):
        return flat, None
    t = x.stack[1:]
    t = t.reshape(t.shape[0], *[1] * (len(shape) + 3 - t.dim()), *t.shape[1:])
    return flat, t.expand(-1, *shape, *x0.shape[-2:]).reshape(t.shape[0], -1, *x0.shape[-2:])


def _mask(
    mask: Tensor | None, shape: torch.Size, rows: int, columns: int, causal: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, and its tangents; booleans become 0 and -inf."""
    if causal:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=device).tril()
    if mask is None:
        return None, None
    m = primal(mask)
    if m.dtype == torch.bool:
        m = torch.zeros(m.shape, device=device).masked_fill_(~m, -math.inf)
    t = mask.stack[1:] if isinstance(mask, Dual) else None
    return m, t


def _tile(mask: Tensor, shape: torch.Size, group: slice, rows: slice, extra: int = 0) -> Tensor:
    """The part of a mask that belongs to a tile: broadcast dims stay as they are, ``extra`` slots stay in front."""
    rows = rows if mask.shape[-2] != 1 else slice(None)
    front, own = mask.shape[:extra], mask.shape[extra:-2]
    if all(n == 1 for n in own):
        return mask.reshape(*front, *[1] * extra, *mask.shape[-2:])[..., rows, :]
    full = mask.reshape(*front, *[1] * (len(shape) - len(own)), *own, *mask.shape[-2:])
    full = full.expand(*front, *shape, *mask.shape[-2:]).reshape(*front, -1, *mask.shape[-2:])
    return full[..., group, rows, :]


def _tiles(k: int, groups: int, rows: int, columns: int, device: torch.device) -> list[tuple[slice, slice]]:
    """Ranges of (batch x heads) and of query rows whose scores of all tangents fit the budget."""
    budget = SCORES if device.type == "cpu" else SCORES * 64
    per_row = max((1 + k) * columns, 1)
    at_once = min(max(budget // per_row, 1), max(rows, 1))
    together = min(max(budget // (per_row * at_once), 1), max(groups, 1))
    return [
        (slice(g, g + together), slice(r, r + at_once))
        for g in range(0, groups, together)
        for r in range(0, rows, at_once)
    ]


def _tangents(
    q: Tensor, qt: Tensor | None, k: Tensor, kt: Tensor | None, v: Tensor, vt: Tensor | None,
    mask: Tensor | None, mask_t: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (b, r, c) and tangents (K, b, r, c) of one tile; q (b, r, d), k (b, m, d), v (b, m, c)."""
    q, k, v = wide(q), wide(k), wide(v)
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale)
    if mask is None:
        p = torch.softmax(scores, -1)
    else:
        p = torch.ops.aten._safe_softmax(scores.add_(mask.to(scores.dtype)), -1)
    y = torch.matmul(p, v)
    h = None
    if qt is not None:
        h = torch.matmul(wide(qt), k.transpose(-1, -2))
    if kt is not None:
        other = torch.matmul(q, wide(kt).transpose(-1, -2))
        h = other if h is None else h.add_(other)
    if h is not None:
        h.mul_(scale)
    if mask_t is not None:
        h = mask_t.to(p.dtype) if h is None else h.add_(mask_t)
    t = None
    if h is not None:
        h = h * p if mask_t is not None else h.mul_(p)
        t = torch.matmul(h, v).addcmul_(h.sum(-1, keepdim=True), y, value=-1)
    if vt is not None:
        moved = torch.matmul(p, wide(vt))
        t = moved if t is None else t.add_(moved)
    assert t is not None
    return y, t


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
