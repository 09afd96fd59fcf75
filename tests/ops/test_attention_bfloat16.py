"""Attention with bfloat16 tangents on every instruction set: the one with tiles (AMX) has products of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import balanced_rep as br
from balanced_rep.ops.attention_jvp import ATTENTION_JVP, attention_jvp_reference

ERROR = 5 * 2**-9  # a tangent passes through five roundings at most: of q and dk, of h and v, and its own


pytestmark = pytest.mark.usefixtures("isa")


def case(n, m, d, c, *, batch=1, heads=2, groups=1, tangents=2, moving="qkv", primal=torch.float32):
    g = torch.Generator().manual_seed(n + m + d + c)
    shapes = {"q": (batch, heads, n, d), "k": (batch, groups, m, d), "v": (batch, groups, m, c)}
    values = [torch.randn(s, generator=g).to(primal) for s in shapes.values()]
    ts = [torch.randn(tangents, *s, generator=g).bfloat16() if x in moving else None for x, s in shapes.items()]
    return (*values, *ts)


def run(args, mask=None, is_causal=False) -> tuple[Tensor, Tensor, Tensor]:
    """Output, tangents and what these should be."""
    scale = 1 / math.sqrt(args[0].shape[-1])
    with br.backend("cpp"):
        y, dy = ATTENTION_JVP(*args, mask, is_causal, scale)
    want = attention_jvp_reference(*(None if a is None else a.double() for a in args), mask, is_causal, scale)
    precise = args[0].dtype == torch.float32
    torch.testing.assert_close(y.double(), want[0], rtol=2e-5 if precise else 8e-3, atol=2e-5 if precise else 8e-3)
    return y, dy, want[1]


def check(args, **options):
    _, dy, want = run(args, **options)
    assert dy.dtype == torch.bfloat16
    for got, true in zip(dy.double(), want, strict=True):
        assert float((got - true).norm()) <= ERROR * float(true.norm())


@pytest.mark.parametrize("moving", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("primal", [torch.float32, torch.bfloat16], ids=str)
def test_operands(moving, primal):
    check(case(70, 101, 40, 24, moving=moving, primal=primal, heads=4, groups=2, batch=2))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130])
def test_queries(n):
    check(case(n, 40, 16, 16))


@pytest.mark.parametrize("m", [1, 2, 15, 31, 32, 33, 95, 96, 97, 129, 200])
def test_keys(m):
    check(case(20, m, 16, 16))


CHANNELS = [(1, 8), (8, 8), (16, 1), (15, 17), (16, 15), (31, 33), (32, 16), (33, 31), (40, 40), (64, 48), (72, 80)]


@pytest.mark.parametrize(("d", "c"), [*CHANNELS, (160, 160), (64, 257)])
def test_channels(d, c):
    check(case(35, 50, d, c))


@pytest.mark.parametrize("is_causal", [False, True])
def test_masks(is_causal):
    args = case(70, 130, 24, 24, heads=2)
    g = torch.Generator().manual_seed(0)
    hidden = torch.rand(1, 2, 70, 130, generator=g) < 0.3
    check(args, mask=~hidden, is_causal=is_causal)
    check(args, mask=torch.randn(1, 1, 70, 130, generator=g), is_causal=is_causal)
    hidden[..., :100] = True  # the first block of keys shows nothing
    hidden[..., 5, :] = True
    _, dy, want = run(args, mask=~hidden, is_causal=is_causal)
    assert float((dy.double() - want).norm()) <= ERROR * float(want.norm())
    assert not dy[:, :, :, 5].any()


def test_a_growing_maximum():
    q, k, *rest = case(40, 300, 16, 16)
    check((q * 4, k + torch.linspace(-2, 2, 300)[:, None] * k.sign(), *rest))


def test_nan_stays_in_its_row_and_tangent():
    args = case(40, 120, 16, 16, heads=2)
    args[3][1, 0, 1, 33, 2] = math.nan
    _, dy, _ = run(args)
    assert dy.isnan().any(-1).nonzero().tolist() == [[1, 0, 1, 33]]


def test_strides():
    q, k, v, dq, dk, dv = case(70, 50, 24, 24, batch=2, heads=2, groups=2)
    check((
        q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v[:1].expand(2, -1, -1, -1),
        dq.movedim(0, 3).contiguous().movedim(3, 0), dk[:, :, :, ::2].repeat_interleave(2, 3),
        torch.cat([dv, dv], -1)[..., :24],
    ))  # fmt: skip


def test_threads_and_other_tangents_do_not_change_a_bit():
    args, before = case(300, 200, 24, 24, tangents=3), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(args)[:2])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
    alone = run((*args[:3], *(t[1:2] for t in args[3:])))[1]
    assert torch.equal(alone[0], results[0][1][1])


def test_products_of_torch_before_and_after():
    """The registers for tiles belong to the thread: torch's own products by them go on as if nothing had happened."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=g).bfloat16() for _ in range(2))
    want = a @ b
    for _ in range(3):
        check(case(20, 40, 16, 16))
        assert torch.equal(a @ b, want)
