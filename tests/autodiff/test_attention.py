"""Attention: what moves, masks, grouped heads, odd sizes, tiles; nn.MultiheadAttention and the transformer layer."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanced_rep as br
from balanced_rep.autodiff import jvp
from balanced_rep.ops.attention_jvp import ATTENTION_JVP

sdpa = F.scaled_dot_product_attention


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernel, or the reference with a budget so small that rows are cut, with a rest left over."""
    if not request.param:
        yield
        return
    monkeypatch.setattr(sys.modules[ATTENTION_JVP.reference.__module__], "SCORES", request.param)
    with br.backend("reference"):
        yield


small = pytest.mark.parametrize("tiles", [0, 150, 1], indirect=True)


@small
@pytest.mark.parametrize("moving", [m for n in (1, 2, 3) for m in itertools.combinations(range(3), n)], ids=str)
def test_operands(moving: tuple[int, ...], tiles: None, agrees: Callable, draw: Callable):
    q, k, v = draw(2, 3, 5, 8), draw(2, 3, 7, 8, seed=1), draw(2, 3, 7, 9, seed=2)
    agrees(sdpa, q, k, v, moving=moving)


def _mask(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape) % 3 != 0


@small
@pytest.mark.parametrize(
    "shape", [(5, 7), (1, 7), (2, 1, 5, 7), (2, 1, 1, 7), (3, 5, 7), (2, 3, 5, 7), (1, 3, 5, 1)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "additive", "-inf"])
def test_masks(shape: tuple[int, ...], kind: str, tiles: None, agrees: Callable, draw: Callable):
    q, k, v = draw(2, 3, 5, 8), draw(2, 3, 7, 8, seed=1), draw(2, 3, 7, 9, seed=2)
    mask = _mask(shape)
    if kind == "additive":
        mask = draw(*shape)
    elif kind == "-inf":
        mask = torch.zeros(shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    agrees(lambda q, k, v: sdpa(q, k, v, attn_mask=mask), q, k, v)


def test_a_row_that_sees_nothing_is_zero(draw: Callable):
    q = draw(1, 1, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    y, t = jvp(lambda x: sdpa(x, x, x, mask), q, draw(2, 1, 1, 4, 8), strict=True)
    assert not y[0, 0, 2].any()
    assert not t[:, 0, 0, 2].any()
    assert t.isfinite().all()


def test_mask_that_moves(agrees: Callable, draw: Callable):
    q, bias = draw(2, 3, 5, 8), draw(3, 5, 5, seed=3)
    agrees(lambda x, b: sdpa(x, x, x, attn_mask=b), q, bias)
    agrees(lambda x, b: sdpa(x, x, x, attn_mask=b), q, draw(2, 3, 5, 5), moving=(1,))


@small
@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (7, 5), (1, 1)])
def test_causal(rows: int, columns: int, tiles: None, agrees: Callable, draw: Callable):
    agrees(lambda q, k: sdpa(q, k, k, is_causal=True), draw(2, 3, rows, 8), draw(2, 3, columns, 8))


@pytest.mark.parametrize("moving", [(0,), (1,), (0, 1, 2)], ids=str)
def test_grouped_heads(moving: tuple[int, ...], agrees: Callable, draw: Callable):
    q, k, v = draw(2, 6, 5, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 4)
    agrees(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), q, k, v, moving=moving)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 2, 3, 5, 8), (2, 3, 1, 40), (1, 1, 33, 72)], ids=str)
def test_shapes(shape: tuple[int, ...], agrees: Callable, draw: Callable):
    agrees(lambda x: sdpa(x, x, x), draw(*shape))


def test_broadcast_scale_and_layout(agrees: Callable, draw: Callable):
    agrees(lambda q, k: sdpa(q, k, k, scale=0.3), draw(2, 3, 5, 8), draw(1, 1, 7, 8))
    agrees(lambda q, k: sdpa(q, k, k), draw(2, 3, 5, 8), draw(2, 1, 7, 8), moving=(1,))
    agrees(
        lambda x: sdpa(*x.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2), draw(2, 5, 24)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_of_half_types_do_not_overflow(dtype: torch.dtype, draw: Callable):
    q = (draw(1, 1, 6, 64) * 40).to(dtype)
    y, t = jvp(lambda x: sdpa(x, x, x, scale=1.0), q, draw(2, 1, 1, 6, 64).to(dtype), strict=True)
    assert y.dtype == t.dtype == dtype
    assert y.isfinite().all()
    assert t.isfinite().all()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention(batch_first: bool, need_weights: bool, agrees: Callable, draw: Callable):
    torch.manual_seed(0)
    m = nn.MultiheadAttention(8, 2, batch_first=batch_first).double().eval()
    agrees(lambda x: [o for o in m(x, x, x, need_weights=need_weights) if o is not None], draw(3, 5, 8))
    length = 5 if batch_first else 3
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    agrees(lambda x: m(x, x, x, attn_mask=causal, need_weights=need_weights)[0], draw(3, 5, 8))


def test_multi_head_attention_variants(agrees: Callable, draw: Callable):
    torch.manual_seed(0)
    cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True).double().eval()
    agrees(lambda x, k, v: cross(x, k, v)[0], draw(3, 5, 8), draw(3, 7, 6), draw(3, 7, 4))
    agrees(
        lambda x, k, v: cross(x, k, v, need_weights=False)[0], draw(3, 5, 8), draw(3, 7, 6), draw(3, 7, 4), moving=(0,)
    )
    m = nn.MultiheadAttention(8, 2, batch_first=True, bias=False).double().eval()
    agrees(lambda x: m(x, x, x, average_attn_weights=False), draw(5, 8))
    per_head = torch.zeros(6, 5, 5, dtype=torch.float64)
    agrees(lambda x: m(x, x, x, attn_mask=per_head, need_weights=False)[0], draw(3, 5, 8))
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    agrees(lambda x: m(x, x, x, key_padding_mask=padding)[0], draw(3, 5, 8), strict=False)


def test_transformer_layer(agrees: Callable, draw: Callable):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).double().eval()
    agrees(layer, draw(2, 5, 8))


@pytest.mark.parametrize(
    "shapes", [((2, 3, 4),) * 3, ((2, 3, 4), (3, 4), (3, 4)), ((3, 4), (2, 5, 4), (1, 5, 6))], ids=str
)
@pytest.mark.parametrize("mask", [None, (1, 1), (2, 1, 1)], ids=str)
def test_samples_without_heads_lie_in_memory_as_in_torch(shapes: Any, mask: Any, agrees: Callable, draw: Callable):
    m = None if mask is None else draw(*mask)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, m).view(2, -1)

    agrees(f, *(draw(*shape) for shape in shapes))
