"""The Triton attention with tangents against the definition: interpreted, through the registry; and its tilings."""

import itertools
import math

import pytest
import torch

import balanced_rep as br
from balanced_rep.ops.attention_jvp import ATTENTION_JVP, attention_jvp_reference
from tests.gpusim.toolchain import triton_missing

pytestmark = pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
interpreted = pytest.mark.usefixtures("triton_interpreter")

MOVING = [m for n in (1, 2, 3) for m in itertools.combinations("qkv", n)]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HALF = {F32: 2e-5, F16: 3e-3, BF16: 1.6e-2}  # by dtype of the tangents: their products are rounded to it


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def case(n=5, m=7, d=8, c=6, batch=1, heads=2, groups=1, tangents=2, moving="qkv", dtype=F32, tangent=None):
    q, k, v = draw(batch, heads, n, d), draw(batch, groups, m, d, seed=1), draw(batch, groups, m, c, seed=2)
    ts = (
        draw(tangents, *x.shape, seed=3).to(tangent or dtype) if name in moving else None
        for name, x in zip("qkv", (q, k, v), strict=True)
    )
    return *(x.to(dtype) for x in (q, k, v)), *ts


def check(args, mask=None, is_causal=False, scale=0.4, tolerance=None):
    with br.backend("triton"):
        got = ATTENTION_JVP(*args, mask, is_causal, scale)
    wide = (None if a is None else a.double() for a in args)
    want = attention_jvp_reference(*wide, mask, is_causal, scale)
    assert got[0].dtype == args[0].dtype
    for g, w in zip(got, want, strict=True):
        rtol = HALF[g.dtype] if tolerance is None else tolerance
        torch.testing.assert_close(g.double(), w, rtol=rtol, atol=rtol, equal_nan=True)
    return got


@interpreted
@pytest.mark.parametrize("moving", MOVING, ids="".join)
def test_operands(moving):
    check(case(n=35, m=20, moving=moving))


@interpreted
@pytest.mark.parametrize("n", [1, 32, 33])
def test_query_blocks(n):
    check(case(n=n, m=11, heads=1))


@interpreted
@pytest.mark.parametrize("m", [0, 1, 16, 17, 33])
def test_key_blocks(m):
    check(case(m=m, heads=1))


@interpreted
@pytest.mark.parametrize(("d", "c"), [(1, 1), (40, 40), (72, 72), (160, 160), (256, 80)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_channels(d, c, dtype):
    check(case(n=5, m=18, d=d, c=c, heads=1, dtype=dtype), scale=d**-0.5)


@interpreted
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (4, 2)])
def test_grouped_heads(heads, groups):
    check(case(batch=2, heads=heads, groups=groups))


@interpreted
@pytest.mark.parametrize("tangents", [0, 1, 3])
def test_groups_of_tangents(tangents):
    check(case(tangents=tangents))


@interpreted
@pytest.mark.parametrize("empty", ["batch", "heads", "n"])
def test_nothing_to_do(empty):
    y, dy = check(case(**{empty: 0} | ({"groups": 1} if empty == "heads" else {})))
    assert y.numel() == 0
    assert dy.numel() == 0


def masks():
    keep = torch.arange(5 * 7).view(1, 1, 5, 7) % 3 != 0
    yield "bool", keep
    yield "padding", keep[:, :, :1].expand(2, 1, 1, 7)
    yield "additive", draw(2, 1, 5, 7)
    yield "additive float64", draw(1, 4, 1, 7).double()
    yield "additive bfloat16", draw(2, 1, 5, 7).bfloat16()
    yield "-inf", torch.zeros(1, 1, 5, 7).masked_fill(~keep, -math.inf)


@interpreted
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", [name for name, _ in masks()])
def test_masks(name, is_causal):
    check(case(batch=2, heads=4, groups=2), dict(masks())[name], is_causal)


@interpreted
@pytest.mark.parametrize(("n", "m"), [(70, 20), (20, 40), (1, 9)])
def test_causal(n, m):
    check(case(n=n, m=m, heads=1), is_causal=True)


@interpreted
def test_a_row_that_sees_nothing_is_zero():
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    mask[..., 2, :] = False
    y, dy = check(case(), mask)
    assert not y[:, :, 2].any()
    assert not dy[:, :, :, 2].any()
    late = torch.ones(1, 1, 5, 70, dtype=torch.bool)
    late[..., :40] = False  # the first block of keys shows nothing
    check(case(m=70), late)


@interpreted
def test_large_scores_and_a_growing_maximum():
    q, k, *rest = case(n=5, m=100, heads=1)
    ramp = torch.linspace(-10, 10, 100)[:, None]
    for keys in (k + ramp * k.sign(), (k + ramp * k.sign()).flip(-2)):
        check((q * 3, keys, *rest), tolerance=2e-4)  # scores of a few hundred, in float32


@interpreted
def test_nan_and_inf_stay_where_they_belong():
    args = case(n=40, m=20)
    args[0][0, 1, 33, 2] = math.nan
    y, dy = check(args)
    assert y.isnan().any(-1).sum() == 1
    assert dy.isnan().any(-1).sum() == dy.shape[0]
    tangent = case(n=40, m=20)
    tangent[3][1, 0, 1, 33, 2] = math.nan
    y, dy = check(tangent)
    assert not y.isnan().any()
    assert dy.isnan().any(-1).nonzero().tolist() == [[1, 0, 1, 33]]
    key = case(n=9, m=9, heads=1)
    key[1][0, 0, 3] = math.inf
    check(key)


@interpreted
def test_strides_of_every_operand():
    q, k, v, dq, dk, dv = case(n=7, m=35, batch=2)
    args = (
        q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v[:1].expand(2, -1, -1, -1),
        dq.movedim(0, 3).contiguous().movedim(3, 0), dk[:, :, :, ::2].repeat_interleave(2, 3)[:, :, :, :35],
        torch.cat([dv, dv], -1)[..., : dv.shape[-1]],
    )  # fmt: skip
    check(args)


@interpreted
@pytest.mark.parametrize(("primal", "tangent"), [(F16, F16), (BF16, BF16), (F32, BF16)], ids=lambda t: str(t)[6:])
def test_half_types(primal, tangent):
    got = check(case(n=35, m=40, dtype=primal, tangent=tangent))
    assert got[1].dtype == tangent


@interpreted
def test_outputs_in_one_buffer():
    """As in a forward pass: y is slot 0 of what dy is the rest of."""
    args = case(heads=4, tangents=3)
    together = torch.empty(4, 1, 5, 4, 6).transpose(2, 3)
    with br.backend("triton"):
        ATTENTION_JVP(*args, None, False, 0.4, out=(together[0], together[1:]))
    want = attention_jvp_reference(*args, None, False, 0.4)
    torch.testing.assert_close(together, torch.cat([want[0][None], want[1]]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_pieces_hold_every_width(dtype):
    from balanced_rep.kernels.triton.attention_jvp import pieces

    for width in range(257):
        first, second = pieces(width, dtype)
        assert first + second >= width
        assert first in (16, 32, 64, 128, 256)
        assert second == 0 or 16 <= second < first
    assert [pieces(w, BF16) for w in (16, 40, 64, 72, 80, 96, 112, 160)] == [
        (16, 0), (32, 16), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (256, 0)
    ]  # fmt: skip


def why_not(monkeypatch, args):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with br.backend("triton"):
        return ATTENTION_JVP.why_not("triton", *args, None, False, 0.4)


def test_refusals_say_why(monkeypatch):
    assert why_not(monkeypatch, case()) is None
    assert "257" in why_not(monkeypatch, case(d=257))
    assert "at most 256" in why_not(monkeypatch, case(c=300))
    assert "float64 primal" in why_not(monkeypatch, case(dtype=torch.float64))
    assert "float16 primal with torch.float32" in why_not(monkeypatch, case(dtype=F16, tangent=F32))
    q, _, *rest = case(heads=1, moving="q")
    far = torch.empty_strided((1, 1, 7, 8), (0, 0, 2**29, 1), device="meta")
    assert "2^31 elements" in why_not(monkeypatch, (q, far, *rest))
