"""No silent zero tangent: the public ops under every nesting of torch.func, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jvp, vmap

import balanced_rep as br
from balanced_rep.ops import moments
from balanced_rep.ops._guard import needs_reference

X = torch.linspace(-1.0, 2.0, 15, dtype=torch.float64).sin().reshape(3, 5)
T = torch.linspace(3.0, -1.0, 15, dtype=torch.float64).cos().reshape(3, 5)


def score(x):
    """A scalar per row that uses every differentiable field."""
    m = moments(x)
    return m[1] + m[2].sqrt() + m[3] + m[4] / m[2] ** 2 + m[5].log() + m[6] * m[7]


def plain(x):
    """The same in plain torch."""
    d = x - x.mean(-1, keepdim=True)
    m2, m3, m4 = (d.pow(k).sum(-1) for k in (2, 3, 4))
    return x.mean(-1) + m2.sqrt() + m3 + m4 / m2**2 + x.abs().sum(-1).log() + x.amin(-1) * x.amax(-1)


NESTINGS = {
    "jvp": lambda f: lambda x, t: jvp(f, (x,), (t,))[1],
    "jacfwd": lambda f: lambda x, t: jacfwd(f)(x),
    "vmap_of_jvp": lambda f: lambda x, t: vmap(lambda a, b: jvp(f, (a,), (b,))[1])(x, t),
    "jvp_of_vmap": lambda f: lambda x, t: jvp(vmap(f), (x,), (t,))[1],
    "jvp_of_grad": lambda f: lambda x, t: jvp(grad(lambda a: f(a).sum()), (x,), (t,))[1],
    "grad_of_jvp": lambda f: lambda x, t: grad(lambda a: jvp(f, (a,), (t,))[1].sum())(x),
    "hessian": lambda f: lambda x, t: hessian(lambda a: f(a).sum())(x),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_derivatives_are_right_in_every_nesting(nesting, compiled):
    transform = NESTINGS[nesting]
    run = transform(score)
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(X, T), transform(plain)(X, T), rtol=1e-10, atol=1e-10)


def test_dual_level():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, T)
        tangent = torch.autograd.forward_ad.unpack_dual(score(dual)).tangent
    torch.testing.assert_close(tangent, jvp(plain, (X,), (T,))[1])


def test_pure_vmap_reaches_the_library_op():
    seen = []

    def f(x):
        seen.append(needs_reference())
        return score(x)

    torch.testing.assert_close(vmap(vmap(f))(X.reshape(3, 1, 5)), plain(X).unsqueeze(1))
    assert seen == [False]


def test_what_the_guard_prevents():
    """The library op itself has no forward-mode rule: the reason for the guard, and a test that it is still needed."""
    try:
        tangent = jvp(lambda x: torch.ops.balanced_rep.moments(x, 1, 0, 0, 0.0), (X,), (T,))[1]
    except RuntimeError:
        return
    assert not tangent[1].allclose(T.mean(-1))


def test_a_forced_backend_refuses_forward_mode():
    with br.backend("cpp"), pytest.raises(br.BackendError, match=r"torch\.func transform.*can: reference"):
        jvp(score, (X,), (T,))
    with br.backend("reference"):
        torch.testing.assert_close(jvp(score, (X,), (T,))[1], jvp(plain, (X,), (T,))[1])


def test_reverse_mode_goes_through_the_library_op():
    x = X.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(score(x).sum(), x), torch.autograd.grad(plain(x).sum(), x))
    assert torch.autograd.gradcheck(moments, (x,))
    assert torch.autograd.gradgradcheck(score, (x,))


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_reverse_mode_through_pooling(pool):
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: moments(x, pool=pool), (x,))
    assert torch.autograd.gradgradcheck(lambda x: moments(x, pool=pool)[1:6], (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_has_the_dtype_of_the_input(dtype):
    x = X.to(dtype).requires_grad_()
    (g,) = torch.autograd.grad(br.representation_stats(x).std.sum(), x)
    assert g.dtype == dtype
    (want,) = torch.autograd.grad(x.double().std(-1, correction=0).sum(), x)
    torch.testing.assert_close(g, want)
