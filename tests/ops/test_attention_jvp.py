"""Attention with tangents: the definition against torch.func, every backend against the definition, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import balanced_rep as br
from balanced_rep.ops import attention_jvp
from balanced_rep.ops.attention_jvp import ATTENTION_JVP, attention_jvp_reference

MOVING = [m for n in (1, 2, 3) for m in itertools.combinations("qkv", n)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def case(n=5, m=7, d=8, c=6, batch=2, heads=4, groups=2, tangents=3, moving="qkv", dtype=torch.float64):
    q, k, v = draw(batch, heads, n, d), draw(batch, groups, m, d, seed=1), draw(batch, groups, m, c, seed=2)
    ts = (
        draw(tangents, *x.shape, seed=3) if name in moving else None for name, x in zip("qkv", (q, k, v), strict=True)
    )
    return tuple(None if x is None else x.to(dtype) for x in (q, k, v, *ts))


def eager(q, k, v, mask=None, is_causal=False, scale=None):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=q.dim() > 2)


def by_func(q, k, v, dq, dk, dv, **options):
    """One tangent at a time, by torch's own transforms."""
    moving = [i for i, t in enumerate((dq, dk, dv)) if t is not None]

    def f(*values):
        args = [q, k, v]
        for i, value in zip(moving, values, strict=True):
            args[i] = value
        return eager(*args, **options)

    ts = [(dq, dk, dv)[i] for i in moving]
    primals = tuple((q, k, v)[i] for i in moving)
    each = [torch.func.jvp(f, primals, tuple(t[i] for t in ts)) for i in range(ts[0].shape[0])]
    return each[0][0], torch.stack([t for _, t in each])


def masks():
    keep = torch.arange(5 * 7).view(5, 7) % 3 != 0
    yield "bool", keep
    yield "additive", draw(2, 1, 5, 7)
    yield "one row", draw(2, 4, 1, 7)
    yield "-inf", torch.zeros(5, 7, dtype=torch.float64).masked_fill(~keep, -math.inf)


@pytest.mark.parametrize("moving", MOVING, ids="".join)
def test_definition_is_the_derivative(moving):
    args = case(moving=moving)
    for options in ({}, {"is_causal": True}, {"scale": 0.3}, *({"mask": m} for _, m in masks())):
        got = attention_jvp(*args, **options)
        for g, w in zip(got, by_func(*args, **options), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)


def check(args, mask=None, is_causal=False, scale=0.4, rtol=1e-12, atol=1e-12):
    """The C++ kernel on these arguments against the definition in float64."""
    with br.backend("cpp"):
        got = ATTENTION_JVP(*args, mask, is_causal, scale)
    wide = (None if a is None else a.double() for a in args)
    wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    want = attention_jvp_reference(*wide, wide_mask, is_causal, scale)
    assert got[0].dtype == args[0].dtype
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=rtol, atol=atol, equal_nan=True)
    return got


@pytest.mark.parametrize("moving", MOVING, ids="".join)
def test_operands(isa, moving):
    check(case(n=70, m=101, moving=moving))
    check(case(n=70, m=101, moving=moving, dtype=torch.float32), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 63, 64, 65, 130])
def test_query_blocks(isa, n):
    check(case(n=n, m=11, batch=1, heads=2))


@pytest.mark.parametrize("m", [0, 1, 2, 6, 7, 95, 96, 97, 200])
def test_key_blocks(isa, m):
    check(case(n=5, m=m, batch=1, heads=2))


@pytest.mark.parametrize(("d", "c"), [(1, 1), (8, 8), (13, 40), (40, 13), (72, 72), (160, 80), (64, 257)])
def test_channels(isa, d, c):
    check(case(n=19, m=33, d=d, c=c, batch=1, heads=2))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 1), (6, 2), (6, 6)])
def test_grouped_heads(isa, heads, groups):
    check(case(heads=heads, groups=groups))


@pytest.mark.parametrize("empty", ["batch", "heads", "n", "tangents"])
def test_nothing_to_do(isa, empty):
    sizes = {empty: 0} | ({"groups": 1} if empty == "heads" else {})
    y, dy = check(case(**sizes))
    assert y.numel() == 0 or empty == "tangents"
    assert dy.numel() == 0


@pytest.mark.parametrize("name", [name for name, _ in masks()])
def test_masks(isa, name):
    mask = dict(masks())[name]
    mask = mask.view(*[1] * (4 - mask.dim()), *mask.shape)
    check(case(), mask)
    check(case(dtype=torch.float32), mask, rtol=2e-5, atol=2e-5)
    check(case(), mask, is_causal=True)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (7, 5), (200, 150), (150, 200), (1, 9)])
def test_causal(isa, n, m):
    check(case(n=n, m=m), is_causal=True)


def test_a_row_that_sees_nothing_is_zero(isa):
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    mask[..., 2, :] = False
    y, dy = check(case(), mask)
    assert not y[:, :, 2].any()
    assert not dy[:, :, :, 2].any()
    late = torch.ones(1, 1, 5, 200, dtype=torch.bool)
    late[..., :150] = False  # the first block of keys shows nothing
    check(case(m=200), late)


def test_large_scores_and_a_growing_maximum(isa):
    q, k, *rest = case(n=20, m=300)
    ramp = torch.linspace(-40, 40, 300, dtype=torch.float64)[:, None]
    check((q * 30, k + ramp * k.sign(), *rest), rtol=1e-9, atol=1e-9)
    check((q * 30, (k + ramp * k.sign()).flip(-2), *rest), rtol=1e-9, atol=1e-9)


def test_nan_and_inf_stay_where_they_belong(isa):
    args = case(n=40, m=120)
    args[0][0, 1, 33, 2] = math.nan
    y, dy = check(args)
    assert y.isnan().any(-1).sum() == 1
    assert dy.isnan().any(-1).sum() == dy.shape[0]
    tangent = case(n=40, m=120)
    tangent[3][1, 0, 1, 33, 2] = math.nan
    y, dy = check(tangent)
    assert not y.isnan().any()
    assert dy.isnan().any(-1).nonzero().tolist() == [[1, 0, 1, 33]]


def test_strides_of_every_operand(isa):
    q, k, v, dq, dk, dv = case(n=70, m=50)
    args = (
        q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v[:1].expand(2, -1, -1, -1),
        dq.movedim(0, 3).contiguous().movedim(3, 0), dk[:, :, :, ::2].repeat_interleave(2, 3),
        torch.cat([dv, dv], -1)[..., : dv.shape[-1]],
    )  # fmt: skip
    check(args)


@pytest.mark.parametrize(("primal", "tangent"), [
    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16),
])  # fmt: skip
def test_half_types(isa, primal, tangent):
    args = case(n=70, m=101)
    args = tuple(a.to(primal if i < 3 else tangent) for i, a in enumerate(args))
    eps = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[tangent]
    got = check(args, rtol=eps, atol=eps)
    assert got[1].dtype == tangent


def test_threads_do_not_change_a_bit(isa):
    args, before = case(n=300, m=200, dtype=torch.float32), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(check(args, rtol=1e-4, atol=1e-4))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_a_tangent_does_not_depend_on_the_others(isa):
    args = case(n=70, m=101, dtype=torch.float32)
    alone = check((*args[:3], *(t[1:2] for t in args[3:])), rtol=1e-4, atol=1e-4)
    assert torch.equal(alone[1][0], check(args, rtol=1e-4, atol=1e-4)[1][1])


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_dims_in_front(dims):
    q, k = draw(2, 3, 4, 5, 8)[(0,) * (5 - dims)], draw(2, 3, 4, 7, 8)[(0,) * (5 - dims)]
    dq = draw(2, *q.shape, seed=4)
    for mask in (draw(5, 7), draw(*q.shape[:-1], 7, seed=5)):
        for g, w in zip(
            attention_jvp(q, k, k, dq, mask=mask), by_func(q, k, k, dq, None, None, mask=mask), strict=True
        ):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)


def test_outputs_are_laid_out_as_torch_does():
    y, dy = attention_jvp(*case())
    assert y.transpose(1, 2).is_contiguous()
    assert dy.transpose(2, 3).is_contiguous()


NESTINGS = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "grad": lambda f, x, t: torch.func.grad(lambda a: f(a).sum())(x),
    "vmap": lambda f, x, t: torch.func.vmap(f)(torch.stack([x, t])),
    "jvp of grad": lambda f, x, t: torch.func.jvp(torch.func.grad(lambda a: f(a).sum()), (x,), (t,))[1],
    "vmap of jvp": lambda f, x, t: torch.func.vmap(lambda s: torch.func.jvp(f, (x,), (s,))[1])(torch.stack([x, t])),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_no_silent_zero_in_any_nesting(nesting, compiled):
    x, s, dx = draw(1, 2, 5, 8), draw(1, 2, 5, 8, seed=1), draw(2, 1, 2, 5, 8)

    def ours(a):
        y, dy = attention_jvp(a, a, a, dx, dx, dx)
        return y + dy.sum(0)

    def plain(a):
        return eager(a, a, a) + torch.func.jvp(lambda b: eager(b, b, b), (a,), (dx.sum(0),))[1]

    run = lambda a, b: NESTINGS[nesting](ours, a, b)  # noqa: E731
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, s), NESTINGS[nesting](plain, x, s), rtol=1e-9, atol=1e-10)


def test_reverse_mode_of_the_library_op():
    q, k, v, dq, dk, dv = (x.requires_grad_() for x in case(n=3, m=4, d=2, c=2, batch=1, tangents=2))
    assert torch.autograd.gradcheck(lambda *a: attention_jvp(*a), (q, k, v, dq, dk, dv))


def test_traced_and_compiled():
    args = case(dtype=torch.float32)
    want = attention_jvp(*args)
    for g, w in zip(torch.compile(attention_jvp, fullgraph=True, backend="aot_eager")(*args), want, strict=True):
        torch.testing.assert_close(g, w)


BAD = {
    "no tangent": (lambda q, k, v, t: attention_jvp(q, k, v), ValueError, "dq, dk and dv are all None"),
    "single tangent": (lambda q, k, v, t: attention_jvp(q, k, v, t[0][0]), ValueError, r"single tangent is dq\[None\]"),
    "shape": (lambda q, k, v, t: attention_jvp(q, k, v, t[1]), ValueError, r"dq has shape .*q is \(2, 4, 5, 8\)"),
    "counts": (lambda q, k, v, t: attention_jvp(q, k, v, t[0], t[1][:1]), ValueError, "numbers of tangents differ"),
    "dtypes": (lambda q, k, v, t: attention_jvp(q, k.float(), v, t[0]), TypeError, "one dtype is needed"),
    "tangent dtypes": (lambda q, k, v, t: attention_jvp(q, k, v, t[0], t[1].half()), TypeError, "the tangents are"),
    "integers": (lambda q, k, v, t: attention_jvp(q.long(), k, v, t[0]), TypeError, "q is torch.int64"),
    "heads": (lambda q, k, v, t: attention_jvp(q[:, :3], k, v, t[0][:, :, :3]), ValueError, "multiple of those"),
    "channels": (lambda q, k, v, t: attention_jvp(q, v, v, t[0]), ValueError, "accepted are"),
    "batch": (lambda q, k, v, t: attention_jvp(q[:1], k, v, t[0][:, :1]), ValueError, "use expand"),
    "mask shape": (lambda q, k, v, t: attention_jvp(q, k, v, t[0], mask=q), ValueError, "has to broadcast"),
    "mask dtype": (lambda q, k, v, t: attention_jvp(q, k, v, t[0], mask=q.long()), TypeError, "mask is torch.int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    q, k, v, *tangents = case()
    with pytest.raises(error, match=f"attention_jvp: .*{message}"):
        call(q, k, v, tangents)
