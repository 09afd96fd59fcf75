"""The Triton norms, softmax and activations with tangents against their definitions, interpreted."""

import pytest
import torch

import balanced_rep as br
from balanced_rep.kernels._jvp_plan import group_size
from balanced_rep.ops._registry import REGISTRY
from tests.gpusim.toolchain import triton_missing

pytestmark = pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
interpreted = pytest.mark.usefixtures("triton_interpreter")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = pytest.mark.parametrize(
    ("primal", "tangent"), [(F32, F32), (F16, F16), (BF16, BF16), (F32, BF16)], ids=lambda t: str(t)[6:]
)


def draw(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def check(name, *args, out=None):
    spec = REGISTRY[name]
    with br.backend("triton"):
        got = spec(*args, out=out)
    wide = (a.double() if isinstance(a, torch.Tensor) else a for a in args)
    for g, w in zip(got, spec.reference(*wide), strict=True):
        rtol, atol = spec.tolerance[g.dtype]
        torch.testing.assert_close(g.double(), w, rtol=rtol, atol=atol, equal_nan=True)
    return got


@interpreted
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@PAIRS
def test_activations(kind, primal, tangent):
    x, dx = draw(5, 70, dtype=primal) * 3, draw(2, 5, 70, dtype=tangent)
    check("activation_jvp", x, dx, kind)
    check("activation_jvp", x[:, :33], dx[:, :, :33], kind)
    h, g = x.chunk(2, -1)
    dh, dg = dx.chunk(2, -1)
    check("gated_activation_jvp", h, dh, g, dg, kind)


@interpreted
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activations_far_out(kind):
    """Against values where a sigmoid or an exponential is 0 or infinite."""
    x = torch.tensor([[-1e30, -200.0, -90.0, -10.0, -0.0, 0.0, 10.0, 90.0, 200.0, torch.nan]])
    check("activation_jvp", x, torch.ones(1, *x.shape), kind)


def cases(x, dx, w, b):
    yield x, dx, w, b
    yield x, dx, w[:1], None
    yield x, dx, None, b[:1]
    yield x.transpose(0, 1), dx.transpose(1, 2), None, None


@interpreted
@pytest.mark.parametrize("name", ["layer_norm_jvp", "rms_norm_jvp"])
@pytest.mark.parametrize("shape", [(2, 3, 75), (1, 70, 16), (2, 1, 1), (1, 1, 2049)], ids=str)
def test_row_norms(name, shape):
    x, dx = draw(*shape) + 0.5, draw(3, *shape)
    for args in cases(x, dx, draw(shape[0], shape[2], seed=1), draw(shape[0], shape[2], seed=2)):
        check(name, *args, 1e-5)


@interpreted
@PAIRS
def test_row_norms_of_half_types(primal, tangent):
    x, dx = draw(2, 5, 75, dtype=primal) + 0.5, draw(2, 2, 5, 75, dtype=tangent)
    for name in ("layer_norm_jvp", "rms_norm_jvp"):
        check(name, x, dx, draw(2, 75, dtype=primal, seed=1), draw(1, 75, dtype=primal), 1e-5)
    check("softmax_jvp", x[0] * 3, dx[:, 0])


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (40, 16)], ids=str)
def test_softmax(shape):
    x, dx = draw(*shape) * 10, draw(3, *shape)
    check("softmax_jvp", x, dx)
    x[0, 0] = -torch.inf
    check("softmax_jvp", x, dx)
    x[0, 0] = torch.nan
    check("softmax_jvp", x, dx)


@interpreted
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("shape", "groups"), [((2, 24, 35), 6), ((1, 4, 1), 4), ((1, 6, 701), 2), ((1, 1, 9), 1)])
def test_group_norm(shape, groups, last):
    x, dx, w, b = draw(*shape) + 0.5, draw(2, *shape), draw(shape[1], seed=1), draw(shape[1], seed=2)
    if last:
        x, dx = x.mT.contiguous().mT, dx.mT.contiguous().mT
    for silu in (False, True):
        check("group_norm_jvp", x, dx, groups, w, b, 1e-5, silu)
    check("group_norm_jvp", x, dx, groups, None, b, 1e-5, True)
    check("group_norm_jvp", x, dx.mT.contiguous().mT, groups, w, None, 1e-5, False)


@interpreted
@PAIRS
def test_group_norm_of_half_types_in_slices(primal, tangent):
    x, dx = draw(2, 6, 40, dtype=primal) + 0.5, draw(2, 2, 6, 40, dtype=tangent)
    w, b = draw(6, dtype=primal), draw(6, dtype=primal, seed=1)
    check("group_norm_jvp", x, dx, 2, w, b, 1e-5, True)
    check("group_norm_jvp", x[:, :, 3:20], dx[:, :, :, 3:20], 3, w, b, 1e-5, True)


@interpreted
@pytest.mark.parametrize("k", [0, 1])
def test_without_tangents_and_without_elements(k):
    y, _ = check("layer_norm_jvp", draw(1, 3, 8), draw(k, 1, 3, 8), None, None, 1e-5)
    assert not y.isnan().any()
    check("group_norm_jvp", draw(1, 4, 8), draw(k, 1, 4, 8), 2, None, None, 1e-5, False)
    check("activation_jvp", draw(3, 8), draw(k, 3, 8), "silu")
    check("softmax_jvp", draw(3, 8), draw(k, 3, 8))
    check("activation_jvp", draw(0, 8), draw(k, 0, 8), "silu")
    check("softmax_jvp", draw(0, 8), draw(k, 0, 8))
    check("layer_norm_jvp", draw(1, 0, 8), draw(k, 1, 0, 8), None, None, 1e-5)
    check("group_norm_jvp", draw(0, 4, 8), draw(k, 0, 4, 8), 2, None, None, 1e-5, False)


@interpreted
def test_outputs_in_one_buffer():
    """As in a forward pass: y is slot 0 of what dy is the rest of."""
    x, dx = draw(1, 4, 8), draw(2, 1, 4, 8)
    together = torch.empty(3, 1, 4, 8)
    check("group_norm_jvp", x, dx, 2, None, None, 1e-5, True, out=(together[0], together[1:]))
    check("layer_norm_jvp", x, dx, None, None, 1e-5, out=(together[0], together[1:]))


def test_few_programs_share_the_tangents_out():
    assert [group_size(programs, 16) for programs in (1, 64, 300, 1024, 10**6)] == [1, 1, 4, 16, 16]
    assert group_size(1, 0) == 1


def test_refusals_say_why(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, dx = draw(1, 2, 8), draw(2, 1, 2, 8)
    long = torch.empty(1, 1, 8193, device="meta"), torch.empty(1, 1, 1, 8193, device="meta")
    with br.backend("triton"):
        assert "8193" in REGISTRY["layer_norm_jvp"].why_not("triton", *long, None, None, 1e-5)
        assert "8193" in REGISTRY["softmax_jvp"].why_not("triton", long[0][0], long[1][0])
        assert "float64" in REGISTRY["rms_norm_jvp"].why_not("triton", x.double(), dx.double(), None, None, 1e-5)
        assert "float16" in REGISTRY["activation_jvp"].why_not("triton", x[0].half(), dx[0], "silu")
        far = torch.empty_strided((1, 2, 8), (0, 2**31, 1), device="meta")
        assert "2^31 elements" in REGISTRY["group_norm_jvp"].why_not("triton", far, dx, 1, None, None, 1e-5, False)
