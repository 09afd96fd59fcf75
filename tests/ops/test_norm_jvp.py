"""Normalisations and activations with tangents: the definitions against torch.func, the kernels against them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import balanced_rep as br
from balanced_rep.ops._registry import REGISTRY, OpSpec
from balanced_rep.ops.activation_jvp import KINDS

NORMS = ("group_norm_jvp", "layer_norm_jvp", "rms_norm_jvp", "softmax_jvp")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def by_func(f, x, dx):
    each = [torch.func.jvp(f, (x,), (t,)) for t in dx]
    return each[0][0], torch.stack([t for _, t in each])


def agree(got, want, rtol=1e-10, atol=1e-10):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        torch.testing.assert_close(g.double(), w, rtol=rtol, atol=atol, equal_nan=True)


def check(spec: OpSpec, *args, rtol=1e-11, atol=1e-11):
    """The C++ kernel against the definition in float64."""
    with br.backend("cpp"):
        got = spec(*args)
    want = spec.reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
    tensors = [a for a in args if isinstance(a, Tensor)]
    assert got[0].dtype == tensors[0].dtype
    assert got[1].dtype == tensors[1].dtype
    agree(got, want, rtol, atol)
    return got


# The definitions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_is_the_derivative(affine, silu):
    x, dx = draw(2, 6, 3, 4), draw(3, 2, 6, 3, 4)
    w, b = (draw(6, seed=1), draw(6, seed=2)) if affine else (None, None)

    def f(v):
        y = F.group_norm(v.contiguous(), 3, w, b, 1e-3)
        return F.silu(y) if silu else y

    want = by_func(f, x, dx)
    agree(br.ops.group_norm_jvp(x, dx, 3, w, b, 1e-3, silu=silu), want)
    last = (x.contiguous(memory_format=torch.channels_last), dx.movedim(2, -1).contiguous().movedim(-1, 2))
    y, dy = br.ops.group_norm_jvp(*last, 3, w, b, 1e-3, silu=silu)
    agree((y, dy), want)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dy.movedim(2, -1).is_contiguous()


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 3, 4, 7), (7,)], ids=str)
def test_row_norms_are_the_derivative(shape):
    x, dx, w, b = draw(*shape), draw(3, *shape), draw(7, seed=1), draw(7, seed=2)
    agree(br.ops.layer_norm_jvp(x, dx, w, b), by_func(lambda v: F.layer_norm(v, (7,), w, b), x, dx))
    agree(br.ops.layer_norm_jvp(x, dx), by_func(lambda v: F.layer_norm(v, (7,)), x, dx))
    agree(br.ops.rms_norm_jvp(x, dx, w), by_func(lambda v: F.rms_norm(v, (7,), w), x, dx))
    agree(br.ops.rms_norm_jvp(x, dx, w, b, 0.1), by_func(lambda v: F.rms_norm(v, (7,), w, 0.1) + b, x, dx))


def test_modulation_per_sample():
    x, dx, scale, shift = draw(2, 5, 7), draw(3, 2, 5, 7), draw(2, 7, seed=1), draw(2, 7, seed=2)

    def f(v):
        return F.layer_norm(v, (7,)) * (1 + scale[:, None]) + shift[:, None]

    agree(br.ops.layer_norm_jvp(x, dx, 1 + scale, shift), by_func(f, x, dx))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_is_the_derivative(dim):
    x, dx = draw(4, 5, 6), draw(3, 4, 5, 6)
    agree(br.ops.softmax_jvp(x, dx, dim), by_func(lambda v: F.softmax(v, dim), x, dx))


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_the_derivative(kind):
    f = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}[kind]
    x, dx = draw(4, 10) * 3, draw(3, 4, 10)
    agree(br.ops.activation_jvp(x, dx, kind), by_func(f, x, dx))

    def gated(v):
        h, g = v.chunk(2, -1)
        return h * f(g)

    (h, g), (dh, dg) = x.chunk(2, -1), dx.chunk(2, -1)
    agree(br.ops.gated_activation_jvp(h, dh, g, dg, kind), by_func(gated, x, dx))


# The kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("c", "groups", "s"),
    [
        (1, 1, 1),
        (6, 3, 1),
        (1, 1, 37),
        (24, 6, 35),
        (64, 32, 64),
        (40, 1, 9),
        (80, 2, 50),
        (96, 32, 1100),
        (33, 33, 17),
    ],
)
def test_group_norm(isa, c, groups, s, last, dtype):
    x, dx = draw(2, c, s, dtype=dtype) + 0.5, draw(5, 2, c, s, dtype=dtype)
    if last:
        x, dx = x.mT.contiguous().mT, dx.mT.contiguous().mT
    w, b = draw(c, seed=1, dtype=dtype), draw(c, seed=2, dtype=dtype)
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for silu in (False, True):
        check(REGISTRY["group_norm_jvp"], x, dx, groups, w, b, 1e-5, silu, **tolerance)
        check(REGISTRY["group_norm_jvp"], x, dx, groups, None, None, 1e-5, silu, **tolerance)
    check(REGISTRY["group_norm_jvp"], x, dx, groups, w, None, 1e-5, False, **tolerance)


def test_group_norm_of_slices(isa):
    wide, dwide = draw(2, 12, 30), draw(3, 2, 12, 30)
    args = (3, None, None, 1e-5, True)
    check(REGISTRY["group_norm_jvp"], wide[:, ::2], dwide[:, :, ::2], *args)
    check(REGISTRY["group_norm_jvp"], wide[:, :6, :10], dwide[:, :, 3:9, 5:15], *args)
    check(REGISTRY["group_norm_jvp"], wide[:, :, ::3].contiguous()[:, :6], dwide[:, :, :6, ::3], *args)
    check(REGISTRY["group_norm_jvp"], wide.mT.contiguous().mT[:, :6], dwide.mT.contiguous().mT[:, :, :6], *args)
    check(REGISTRY["group_norm_jvp"], wide, dwide.mT.contiguous().mT, *args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [1, 2, 7, 8, 9, 31, 33, 64, 130, 5000])
def test_rows(isa, d, dtype):
    x, dx = draw(2, 3, d, dtype=dtype) + 0.5, draw(4, 2, 3, d, dtype=dtype)
    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    eps = 1e-3  # two values apart by little have a derivative as large as 1 / eps
    for name in ("layer_norm_jvp", "rms_norm_jvp"):
        for w, b in ((None, None), (draw(1, d, dtype=dtype), draw(2, d, dtype=dtype)), (draw(2, d, dtype=dtype), None)):
            check(REGISTRY[name], x, dx, w, b, eps, **tolerance)
    check(REGISTRY["softmax_jvp"], x[0] * 5, dx[:, 0], **tolerance)


def test_rows_of_slices(isa):
    x, dx = draw(2, 6, 40), draw(3, 2, 6, 40)
    for a, b in ((x[:, ::2], dx[:, :, ::2]), (x[..., 3:20], dx[..., 3:20]), (x[:, :3], dx.flip(0)[:, :, 1:4])):
        check(REGISTRY["layer_norm_jvp"], a, b, None, None, 1e-5)
        check(REGISTRY["softmax_jvp"], a[0], b[:, 1])
    check(REGISTRY["layer_norm_jvp"], x.mT, dx.mT, None, None, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 7), (2, 8), (5, 33), (2, 1023), (1, 1025), (3, 3000)])
def test_activations(isa, rows, n, kind, dtype):
    x, dx = draw(rows, 2 * n, dtype=dtype) * 3, draw(4, rows, 2 * n, dtype=dtype)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    check(REGISTRY["activation_jvp"], x, dx, kind, **tolerance)
    (h, g), (dh, dg) = x.chunk(2, -1), dx.chunk(2, -1)
    check(REGISTRY["gated_activation_jvp"], h, dh, g, dg, kind, **tolerance)
    check(REGISTRY["activation_jvp"], h, dg, kind, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_over_the_whole_range(isa, kind):
    """Relative accuracy of value and derivative also in the tails, and what happens at the ends."""
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 60.0, -60.0, 1e-30, 89.0, 300.0, 1e10])])
    y, dy = REGISTRY["activation_jvp"](x[None], torch.ones(1, 1, len(x)), kind)
    want, want_t = REGISTRY["activation_jvp"].reference(x[None].double(), torch.ones(1, 1, len(x)).double(), kind)
    torch.testing.assert_close(y.double(), want, rtol=2e-6, atol=1e-6 if kind == "gelu" else 1e-7)
    torch.testing.assert_close(dy.double(), want_t, rtol=2e-6, atol=1e-6)
    nan, _ = REGISTRY["activation_jvp"](torch.full((1, 11), math.nan), torch.ones(1, 1, 11), kind)
    assert nan.isnan().all()


@pytest.mark.parametrize("name", NORMS)
def test_means_far_from_zero(isa, name):
    """mean / std of 1000: the digits that float32 holds of x are all used."""
    x, dx = (draw(2, 24, 70) + 1000).float(), draw(3, 2, 24, 70).float()
    if name == "group_norm_jvp":
        check(REGISTRY[name], x, dx, 4, None, None, 1e-5, False, rtol=1e-4, atol=1e-5)
    elif name != "softmax_jvp":
        check(REGISTRY[name], x, dx, None, None, 1e-5, rtol=1e-4, atol=1e-5)
    else:
        check(REGISTRY[name], x[0], dx[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", [
    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", [*NORMS, "activation_jvp", "gated_activation_jvp"])
def test_half_types(isa, name, pair):
    spec, (primal, tangent) = REGISTRY[name], pair
    args = spec.inputs(torch.Generator().manual_seed(1), torch.float64)
    n_primals = {"gated_activation_jvp": (0, 2)}.get(name, (0,))
    n_tangents = {"gated_activation_jvp": (1, 3)}.get(name, (1,))
    args = tuple(
        a if not isinstance(a, Tensor) else a.to(primal) if i in n_primals else a.to(tangent) if i in n_tangents else a
        for i, a in enumerate(args)
    )
    eps = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[tangent]
    check(spec, *args, rtol=eps, atol=eps / 4)


def test_rounding_to_half_types(isa):
    """float32 tangent values to float16 and bfloat16 as torch rounds them: ties, subnormal, overflow, NaN."""
    bits = torch.arange(0, 1 << 32, 65537 * 13, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0, 1 << 16, dtype=torch.int32) << 12
    values = torch.cat([bits, ties, -ties]).view(torch.float32)
    x = torch.full((1, len(values)), 40.0)  # SiLU of 40 is 40, its derivative 1: h f(g) = 40 h
    for dtype in (torch.float16, torch.bfloat16):
        dx = values.to(dtype)[None, None]  # exact in float32
        _, dy = REGISTRY["activation_jvp"](x, dx, "silu")
        assert torch.equal(dy.nan_to_num(7.0), dx.nan_to_num(7.0))
        y, _ = REGISTRY["activation_jvp"](values.to(dtype)[None], torch.zeros(0, 1, len(values), dtype=dtype), "silu")
        want = F.silu(values.to(dtype).double()).to(dtype)
        far = (y[0].double() - want.double()).abs() > 0.0079 * want.double().abs() + 6e-8
        assert not (far & ~want.isnan() & want.isfinite()).any()


@pytest.mark.parametrize("name", [*NORMS, "activation_jvp", "gated_activation_jvp"])
def test_nothing_to_do(isa, name):
    spec = REGISTRY[name]
    args = spec.inputs(torch.Generator().manual_seed(1), torch.float32)
    tangent_at = (1, 3) if name == "gated_activation_jvp" else (1,)
    none = tuple(a[:0] if i in tangent_at else a for i, a in enumerate(args))
    y, dy = check(spec, *none, rtol=1e-4, atol=1e-5)
    assert dy.shape == (0, *y.shape)


@pytest.mark.parametrize("name", [*NORMS, "activation_jvp", "gated_activation_jvp"])
def test_threads_do_not_change_a_bit(isa, name):
    before, spec, results = torch.get_num_threads(), REGISTRY[name], []
    args = spec.inputs(torch.Generator().manual_seed(1), torch.float32)
    big = [a.repeat(*[1] * (a.dim() - 1), 60) if isinstance(a, Tensor) and a.dim() > 1 else a for a in args]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(check(spec, *big, rtol=1e-3, atol=1e-4))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
@pytest.mark.parametrize("name", [*NORMS, "activation_jvp", "gated_activation_jvp"])
def test_no_silent_zero_under_transforms(name, transform):
    spec = REGISTRY[name]
    args = spec.inputs(torch.Generator().manual_seed(1), torch.float64)
    public = getattr(br.ops, name)

    def call(f):
        def total(x):
            rest = list(args[1:])
            if name == "group_norm_jvp":
                y, dy = f(x, *rest[:-1], silu=rest[-1]) if f is public else f(x, *rest)
            elif name in ("layer_norm_jvp", "rms_norm_jvp") and f is public:
                y, dy = f(x, rest[0], rest[1], rest[2][0], rest[3])
            else:
                y, dy = f(x, *rest)
            return y.sum() + dy.square().sum()

        return total

    x, t = args[0], draw(*args[0].shape, seed=9)
    run = {
        "jvp": lambda f: torch.func.jvp(f, (x,), (t,))[1],
        "grad": lambda f: torch.func.grad(f)(x),
        "vmap": lambda f: torch.func.vmap(f)(torch.stack([x, t])),
    }[transform]
    torch.testing.assert_close(run(call(public)), run(call(spec.reference)), rtol=1e-9, atol=1e-9)


X, DX = torch.zeros(2, 6, 5), torch.zeros(3, 2, 6, 5)
BAD = {
    "a single tangent": (lambda: br.ops.layer_norm_jvp(X, X), ValueError, r"a single tangent is dx\[None\]"),
    "shape": (lambda: br.ops.softmax_jvp(X, DX[..., :2]), ValueError, r"dx has shape \(3, 2, 6, 2\)"),
    "integers": (lambda: br.ops.softmax_jvp(X.long(), DX), TypeError, "x is torch.int64"),
    "integer tangents": (lambda: br.ops.activation_jvp(X, DX.int(), "silu"), TypeError, "dx is torch.int32"),
    "no tensor": (lambda: br.ops.activation_jvp(X, None, "silu"), TypeError, "dx is NoneType"),
    "kind": (lambda: br.ops.activation_jvp(X, DX, "relu"), ValueError, "accepted are 'silu', 'gelu', 'gelu_tanh'"),
    "gate shape": (
        lambda: br.ops.gated_activation_jvp(X, DX, X[:1], DX[:, :1], "silu"), ValueError, "must have one shape"
    ),
    "gate dtype": (
        lambda: br.ops.gated_activation_jvp(X, DX, X.double(), DX, "silu"), TypeError, "one dtype each is needed"
    ),
    "groups": (lambda: br.ops.group_norm_jvp(X, DX, 4), ValueError, "a multiple of 4 groups"),
    "weight": (lambda: br.ops.group_norm_jvp(X, DX, 3, torch.ones(5)), ValueError, r"weight is \(5,\); \(6,\)"),
    "row weight": (lambda: br.ops.layer_norm_jvp(X, DX, torch.ones(6)), ValueError, r"accepted are \(5,\)"),
    "row bias": (lambda: br.ops.rms_norm_jvp(X, DX, None, torch.ones(3, 5)), ValueError, r"bias is \(3, 5\)"),
    "no dim": (lambda: br.ops.softmax_jvp(torch.zeros(()), torch.zeros(3)), ValueError, "x has no dim"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
