"""JacobianOperator against the matrix of torch.func.jacfwd, and its estimates against what they estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from balanced_rep.linalg import Estimate, JacobianOperator


def _net(n: int = 6, m: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, 12), nn.SiLU(), nn.LayerNorm(12), nn.Linear(12, m)).double().eval()


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _matrix(f, x: Tensor) -> Tensor:
    return torch.func.jacfwd(f)(x).reshape(f(x).numel(), x.numel()).detach()


def test_products_with_the_whole_batch():
    net, x = _net(6, 4), _x(3, 6)
    J, A = JacobianOperator(net, x), _matrix(net, x)
    assert J.shape == (12, 18)
    assert J.dtype == torch.float64
    torch.testing.assert_close(J @ _x(18), A @ _x(18))
    torch.testing.assert_close(J @ _x(18, 5), A @ _x(18, 5))
    torch.testing.assert_close(J.T @ _x(12), A.T @ _x(12))
    torch.testing.assert_close(J.T @ _x(12, 5), A.T @ _x(12, 5))
    torch.testing.assert_close(J.rmatmat(_x(12, 2)), A.T @ _x(12, 2))
    torch.testing.assert_close(J.dense(), A)
    assert (J.T @ _x(12, 0)).shape == (18, 0)
    assert (J @ _x(18, 0)).shape == (12, 0)
    assert J.T.T is J
    assert J.T.shape == (18, 12)


def test_one_jacobian_per_sample():
    net, x = _net(6, 4), _x(3, 6)
    J = JacobianOperator(net, x, batch=True)
    A = torch.stack([_matrix(net, row) for row in x])
    assert J.shape == (3, 4, 6)
    torch.testing.assert_close(J @ _x(3, 6, 2), A @ _x(3, 6, 2))
    torch.testing.assert_close(J @ _x(3, 6), torch.einsum("bmn,bn->bm", A, _x(3, 6)))
    torch.testing.assert_close(J.mT @ _x(3, 4, 2), A.mT @ _x(3, 4, 2))
    torch.testing.assert_close(J.dense(), A)


def test_the_point_is_a_copy():
    net, x = _net(), _x(6)
    J, A = JacobianOperator(net, x, reuse=False), _matrix(net, x)
    x.add_(5)
    torch.testing.assert_close(J.dense(), A)
    torch.testing.assert_close(J.T @ torch.eye(6, dtype=x.dtype), A.T)


def test_transpose_is_the_adjoint_of_a_convolutional_net_with_attention():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1).double()

    def f(x: Tensor) -> Tensor:
        h = F.group_norm(conv(x), 2).flatten(2).transpose(1, 2).unsqueeze(1)
        return F.scaled_dot_product_attention(h, h, h)

    J = JacobianOperator(f, _x(2, 3, 4, 4), strict=True)
    u, v = _x(J.shape[0], 3), _x(J.shape[1], 3)
    torch.testing.assert_close((u * (J @ v)).sum(0), ((J.T @ u) * v).sum(0))


def test_reverse_mode_leaves_the_parameters_alone():
    net = _net()
    JacobianOperator(net, _x(6)).T @ _x(6, 2)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_inner_output():
    net, x = _net(6, 4), _x(2, 6)
    J = JacobianOperator(net, x, output="1")
    A = _matrix(lambda x: net[1](net[0](x)), x)
    torch.testing.assert_close(J @ _x(12, 2), A @ _x(12, 2))
    torch.testing.assert_close(J.T @ _x(24, 2), A.T @ _x(24, 2))


def test_scipy():
    scipy_linalg = pytest.importorskip("scipy.sparse.linalg")
    net, x = _net(6, 4), _x(3, 6)
    op, A = JacobianOperator(net, x).to_scipy(), _matrix(net, x).numpy()
    np.testing.assert_allclose(op @ np.eye(18), A, atol=1e-12)
    np.testing.assert_allclose(op.rmatvec(np.ones(12)), A.T @ np.ones(12), atol=1e-12)
    v = np.arange(18) - 1j * np.ones(18)
    np.testing.assert_allclose(op @ v, A @ v, atol=1e-12)
    np.testing.assert_allclose(op @ np.stack([v, v * 1j], 1), A @ np.stack([v, v * 1j], 1), atol=1e-12)
    np.testing.assert_allclose(op.rmatvec(v[:12]), A.T @ v[:12], atol=1e-12)
    largest = scipy_linalg.svds(op, k=2, return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(largest)[::-1], np.linalg.svd(A, compute_uv=False)[:2], rtol=1e-8)
    with pytest.raises(ValueError, match="one Jacobian per sample"):
        JacobianOperator(net, x, batch=True).to_scipy()


@pytest.mark.parametrize("batch", [False, True])
def test_small_inputs_are_exact(batch: bool):
    net, x = _net(), _x(2, 6)
    J = JacobianOperator(net, x, batch=batch)
    A = torch.stack([_matrix(net, row) for row in x]) if batch else _matrix(net, x)
    for got, want in (
        (J.trace(), A.diagonal(0, -2, -1).sum(-1)),
        (J.diagonal(), A.diagonal(0, -2, -1)),
        (J.frobenius_norm(), A.square().sum((-2, -1)).sqrt()),
    ):
        assert got.exact
        torch.testing.assert_close(got.value, want)
        assert not got.standard_error.any()


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_estimates_are_within_their_errors(probe):
    W = _x(150, 150) / 12
    J = JacobianOperator(lambda x: torch.tanh(F.linear(x, W)), _x(150))
    A = J.dense()
    estimates = [
        (J.trace(100, probe=probe), A.trace()),
        (J.frobenius_norm(100, probe=probe), A.norm()),
        (J.diagonal(100, probe=probe), A.diagonal()),
    ]
    for got, want in estimates:
        assert not got.exact
        assert got.n_probes == 100
        z = (got.value - want) / got.standard_error
        assert z.abs().mean() < 2.5
    assert estimates[2][0].value.shape == (150,)
    spread = torch.stack([J.trace(20, probe=probe, seed=s).value for s in range(24)])
    claimed = torch.stack([J.trace(20, probe=probe, seed=s).standard_error for s in range(24)]).mean()
    assert 0.6 < spread.std() / claimed < 1.6


def test_estimates_do_not_depend_on_chunks_and_samples_get_the_same_probes():
    W = _x(80, 80) / 9
    f, x = (lambda x: torch.tanh(F.linear(x, W))), _x(2, 80)
    a = JacobianOperator(f, x, batch=True).trace(40, seed=3)
    b = JacobianOperator(f, x, batch=True, chunk_size=3).trace(40, seed=3)
    torch.testing.assert_close(a.value, b.value, rtol=1e-12, atol=0)
    for i in range(2):
        one = JacobianOperator(f, x[i]).trace(40, seed=3)
        torch.testing.assert_close(a.value[i], one.value, rtol=1e-12, atol=0)
    assert JacobianOperator(f, x[0]).trace(40, seed=4).value != JacobianOperator(f, x[0]).trace(40, seed=3).value


def test_a_single_probe_has_no_error_estimate():
    J = JacobianOperator(lambda x: x * x, _x(9))
    got = J.trace(1)
    assert isinstance(got, Estimate)
    assert got.standard_error.isnan()


def test_bad_input():
    net, x = _net(6, 4), _x(3, 6)
    with pytest.raises(TypeError, match="int64"):
        JacobianOperator(net, torch.arange(3))
    with pytest.raises(TypeError, match="tuple"):
        JacobianOperator(lambda x: (x, x), x)
    with pytest.raises(ValueError, match="first dim"):
        JacobianOperator(lambda x: x.sum(0), x, batch=True)
    J = JacobianOperator(net, x)
    with pytest.raises(ValueError, match=r"expected is \(18\) or \(18, k\)"):
        J @ _x(12)
    with pytest.raises(TypeError, match="float32"):
        J @ _x(18).float()
    with pytest.raises(TypeError, match="to_scipy"):
        J @ np.ones(18)
    with pytest.raises(ValueError, match="12 x 18"):
        J.trace()
    with pytest.raises(ValueError, match="n_probes"):
        J.frobenius_norm(0)
    with pytest.raises(ValueError, match="gaussian"):
        JacobianOperator(lambda x: x, _x(99)).trace(4, probe="normal")  # pyright: ignore
