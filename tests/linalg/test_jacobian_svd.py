"""jacobian_svd and jacobian_spectrum against the whole Jacobian: denoisers with known ones, and networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import balanced_rep as br
from balanced_rep.linalg import ConvergenceWarning, JacobianProgress
from balanced_rep.linalg._small import orthonormalise
from tests.linalg.matrices import normal, with_spectrum

K, N = 8, 220


def linear(J: Tensor):
    """A function whose Jacobian is J, (m, n) or one per sample."""
    return (lambda x: x @ J.mT) if J.dim() == 2 else (lambda x: torch.einsum("bmn,bn->bm", J, x))


def shrinkage(n: int = N, power: float = 1.0, noise: float = 0.02) -> Tensor:
    """Jacobian C (C + s^2)^-1 of the best denoiser of Gaussian data: symmetric, flat at the top."""
    Q = torch.linalg.qr(normal(n, n, seed=1)).Q
    C = torch.arange(1, n + 1, dtype=torch.float64) ** -power
    return (Q * (C / (C + noise))) @ Q.mT


def asymmetric(a: float, n: int = N, seed: int = 2) -> Tensor:
    """The same with a random part; |J - J^T| / |J + J^T| is about a."""
    J = shrinkage(n)
    noise = normal(n, n, seed=seed)
    noise = noise - noise.mT
    return J + noise * (a * J.norm() / noise.norm())


def worst(S: Tensor, J: Tensor) -> float:
    true = torch.linalg.svdvals(J)[..., : S.shape[-1]]
    return float(((S - true).abs() / true).max())


def counted(f):
    """f, and the number of tangents and cotangents it was asked for."""
    seen: list[JacobianProgress] = []
    return f, seen, seen.append


@pytest.mark.parametrize("mode", ["auto", "jvp", "jvp+vjp"])
@pytest.mark.parametrize("seed", range(3))
def test_denoiser_of_gaussian_data(mode, seed):
    J = shrinkage()
    result = br.jacobian_svd(linear(J), torch.zeros(N, dtype=torch.float64), K, mode=mode, seed=seed)
    U, S, Vh = result
    assert worst(S, J) < 0.01
    assert bool(result.info.converged)
    assert result.info.method == ("jvp+vjp" if mode == "jvp+vjp" else "jvp")
    assert result.info.passes < 150
    one = torch.eye(K, dtype=torch.float64)
    torch.testing.assert_close(U.mT @ U, one, rtol=0, atol=1e-10)
    torch.testing.assert_close(Vh @ Vh.mT, one, rtol=0, atol=1e-10)
    error = torch.linalg.matrix_norm(J - (U * S) @ Vh) / torch.linalg.matrix_norm(J)
    assert error <= result.info.rel_error <= 1
    if mode == "auto":
        assert result.info.asymmetry < 1e-12


@pytest.mark.parametrize("tol", [5e-2, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("a", [0.0, 0.01, 0.05, 0.2, 0.9])
def test_tol_is_kept_whatever_the_asymmetry(a, tol):
    J = asymmetric(a)
    result = br.jacobian_svd(linear(J), torch.zeros(N, dtype=torch.float64), K, tol=tol)
    assert bool(result.info.converged)
    assert worst(result.S, J) < tol
    true = torch.linalg.matrix_norm(J - J.mT) / torch.linalg.matrix_norm(J + J.mT)
    assert result.info.asymmetry == pytest.approx(float(true), rel=0.5, abs=1e-12)
    assert result.info.method == ("jvp+vjp" if a > tol**0.5 else "jvp")


def test_residuals():
    J = asymmetric(0.2)
    U, S, Vh = result = br.jacobian_svd(linear(J), torch.zeros(N, dtype=torch.float64), K, tol=1e-3)
    true = torch.linalg.vector_norm(J.mT @ U - Vh.mT * S, dim=0)
    assert bool((true <= result.info.residuals).all())
    assert bool((result.info.residuals < 0.1 * S).all())
    symmetric = br.jacobian_svd(linear(shrinkage()), torch.zeros(N, dtype=torch.float64), K, tol=1e-4)
    left = torch.linalg.vector_norm(shrinkage().mT @ symmetric.U - symmetric.Vh.mT * symmetric.S, dim=0)
    assert bool((left <= 2 * symmetric.info.residuals + 1e-9).all())
    assert bool((symmetric.info.residuals < 0.05 * symmetric.S).all())


def test_a_wrong_trust_in_symmetry_is_said():
    J = asymmetric(0.9)
    with pytest.warns(UserWarning, match="not symmetric"), pytest.warns(ConvergenceWarning):
        result = br.jacobian_svd(linear(J), torch.zeros(N, dtype=torch.float64), K, mode="jvp", rounds=12)
    assert worst(result.S, J) > 0.01
    assert result.info.asymmetry > 0.02  # as far as it can be seen without J^T


@pytest.mark.parametrize("shape", [(150, N), (N, 150), (5, N), (N, 97)], ids=str)
def test_maps_between_different_spaces(shape):
    J = with_spectrum(*shape, torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -0.7)
    result = br.jacobian_svd(linear(J), torch.zeros(shape[1], dtype=torch.float64), K)
    k = min(K, *shape)
    assert [tuple(X.shape) for X in result] == [(shape[0], k), (k,), (k, shape[1])]
    assert worst(result.S, J) < 0.01
    assert result.info.method == "jvp+vjp"
    assert result.info.asymmetry is None
    assert len(result.info.notes) == (shape[0] < K)


def test_small_jacobians_are_formed():
    J = normal(30, 40)
    result = br.jacobian_svd(linear(J), torch.zeros(40, dtype=torch.float64), 4)
    torch.testing.assert_close(result.S, torch.linalg.svdvals(J)[:4])
    assert result.info.passes == 40
    assert "n = 40 is small" in result.info.notes[0]
    assert br.jacobian_svd(linear(J), torch.zeros(40, dtype=torch.float64), 0).S.shape == (0,)
    clamped = br.jacobian_svd(linear(J), torch.zeros(40, dtype=torch.float64), 60)
    assert clamped.S.shape == (30,)
    assert "k=60 is more than" in clamped.info.notes[0]


def test_many_samples_at_once_are_the_single_ones():
    J = torch.stack([shrinkage(), asymmetric(0.2), shrinkage(power=2.0), asymmetric(0.01)])
    x = torch.zeros(4, N, dtype=torch.float64)
    many = br.jacobian_svd(linear(J), x, K, batch=True, seed=3)
    assert many.U.shape == (4, N, K)
    assert len(many.info.passes.unique()) > 1
    for i in range(4):
        one = br.jacobian_svd(linear(J[i]), x[i], K, seed=(3, i))
        if i % 2 == 0:  # the others wait in the first phase for the slowest sample
            torch.testing.assert_close(many.S[i], one.S, rtol=1e-8, atol=0)
            torch.testing.assert_close(many.Vh[i], one.Vh, rtol=0, atol=1e-6)
        torch.testing.assert_close(many.S[i], one.S, rtol=0.01, atol=0)
        assert worst(many.S[i], J[i]) < 0.01


def test_a_flat_spectrum_ends_with_the_whole_space():
    x = torch.linspace(-1, 1, 133, dtype=torch.float64)  # not a multiple of the block
    for mode in ("jvp", "jvp+vjp"):
        result = br.jacobian_svd(torch.tanh, x, 4, tol=1e-8, mode=mode)
        assert bool(result.info.converged)
        torch.testing.assert_close(result.S, (1 - x.tanh() ** 2).sort(descending=True).values[:4], rtol=1e-9, atol=0)


def test_progress_and_counts():
    f, seen, progress = counted(linear(asymmetric(0.15)))  # 0.2 is where rounds of both kinds begin at once
    result = br.jacobian_svd(f, torch.zeros(N, dtype=torch.float64), K, progress=progress)
    assert [p.phase for p in seen][:2] == ["asymmetry", "jvp"]
    assert seen[-1].phase == "jvp+vjp"
    assert seen[-1].passes == result.info.passes
    assert seen[-1].rounds == result.info.rounds
    assert [p.passes for p in seen] == sorted(p.passes for p in seen)
    torch.testing.assert_close(seen[-1].S[0], result.S)
    assert float(seen[-1].remaining) < 0.005


def test_no_convergence_and_going_on():
    J = asymmetric(0.2)
    f, x = linear(J), torch.zeros(N, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="1 of 1 Jacobians"):
        first = br.jacobian_svd(f, x, K, tol=1e-4, rounds=12)
    assert not bool(first.info.converged)
    assert worst(first.S, J) > 1e-4
    second = br.jacobian_svd(f, x, K, tol=1e-4, start=first, seed=1)
    assert bool(second.info.converged)
    assert worst(second.S, J) < 1e-4
    again = br.jacobian_svd(f, x, K, tol=1e-4, start=second)
    fresh = br.jacobian_svd(f, x, K, tol=1e-4)
    assert again.info.passes < fresh.info.passes
    near = br.jacobian_svd(linear(J + 1e-3 * normal(N, N)), x, K, start=second, tol=1e-2)
    assert near.info.passes < br.jacobian_svd(f, x, K, tol=1e-2).info.passes


def test_rounding_where_the_values_fall_steeply():
    S = 10.0 ** -torch.arange(N, dtype=torch.float64)
    Q = torch.linalg.qr(normal(N, N)).Q
    J = (Q * S) @ Q.mT
    result = br.jacobian_svd(linear(J.float()), torch.zeros(N), 5)
    assert worst(result.S.double(), J) < 0.01
    zero = br.jacobian_svd(lambda x: 0 * x, torch.zeros(N), K)
    assert zero.S.tolist() == [0.0] * K
    assert zero.info.rank == 0


@pytest.mark.parametrize("mode", ["auto", "jvp+vjp"])
def test_a_block_wider_than_the_jacobian(mode):
    x = torch.linspace(0, 3, 100, dtype=torch.float64)
    f = lambda x: x**3  # noqa: E731
    first = br.jacobian_svd(f, x, 4, block=128, mode=mode)
    true = 3 * x[-4:].flip(0) ** 2
    torch.testing.assert_close(first.S, true)
    torch.testing.assert_close(br.jacobian_svd(f, x, 4, block=98, mode=mode, start=first).S, true)


def test_no_room_for_further_rows():
    basis = torch.eye(8, dtype=torch.float64)[:6].unsqueeze(0)
    with pytest.raises(ValueError, match="3 rows beside 6 do not fit into 8"):
        orthonormalise(normal(3, 8).unsqueeze(0), basis, lambda: normal(3, 8).unsqueeze(0))


@pytest.mark.parametrize("mode", ["jvp", "auto", "jvp+vjp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_values_than_asked_for(mode, dtype):
    """Null values are rounding: they must not keep the search from its end, and their vectors are orthonormal too."""
    A = normal(600, 4)
    J = (A @ A.mT).to(dtype)
    result = br.jacobian_svd(linear(J), torch.zeros(600, dtype=dtype), K, mode=mode)
    assert bool(result.info.converged)
    assert result.info.rounds < 10
    assert worst(result.S[:4].double(), J.double()) < 1e-5
    one = torch.eye(K, dtype=dtype)
    torch.testing.assert_close(result.U.mT @ result.U, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.Vh @ result.Vh.mT, one, rtol=0, atol=1e-5)


def test_orthonormal_beyond_the_rank_between_different_spaces():
    a, b = normal(150, 1, seed=3), normal(1, N, seed=4)
    U, S, Vh = br.jacobian_svd(linear(a @ b), torch.zeros(N, dtype=torch.float64), 4)
    torch.testing.assert_close(S, torch.tensor([float(a.norm() * b.norm()), 0, 0, 0], dtype=torch.float64))
    one = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(U.mT @ U, one, rtol=0, atol=1e-12)
    torch.testing.assert_close(Vh @ Vh.mT, one, rtol=0, atol=1e-12)
    torch.testing.assert_close((U * S) @ Vh, a @ b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_values_whose_squares_leave_the_dtype(scale):
    J = (normal(150, N) * scale).float()
    result = br.jacobian_svd(linear(J), torch.zeros(N), 4)
    assert bool(result.info.converged)
    assert worst(result.S.double(), J.double()) < 0.01


def test_asymmetry_is_that_of_the_whole_jacobian_after_a_start_too():
    J = asymmetric(0.1)
    f, x = linear(J), torch.zeros(N, dtype=torch.float64)
    first = br.jacobian_svd(f, x, K)
    second = br.jacobian_svd(f, x, K, start=first)
    assert float(first.info.asymmetry) == pytest.approx(0.1, rel=0.2)
    assert float(second.info.asymmetry) == pytest.approx(0.1, rel=0.2)


class Net(nn.Module):
    """A convolutional denoiser with random weights, nothing symmetric about it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.b(torch.nn.functional.silu(self.a(x)))


def matrix_of(f, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.jacfwd(f)(x).reshape(f(x).numel(), x.numel()).double()


@pytest.mark.parametrize("precision", ["full", "bfloat16"])
def test_network(precision):
    net, x = Net().eval(), normal(1, 1, 12, 12).float()
    result = br.jacobian_svd(net, x, K, kwargs={"scale": 2.0}, precision=precision)
    J = matrix_of(lambda x: net(x, scale=2.0), x)
    assert worst(result.S.double(), J) < 0.01
    assert all(p.requires_grad for p in net.parameters())
    samples = br.jacobian_svd(net, torch.cat([x, -x]), K, batch=True)
    assert worst(samples.S[1].double(), matrix_of(net, -x)) < 0.01
    inner = br.jacobian_svd(net, x, K, output="a")
    assert inner.U.shape == (8 * 144, K)
    assert worst(inner.S.double(), matrix_of(net.a, x)) < 0.01


def test_spectrum_of_a_known_jacobian():
    J = shrinkage(power=2.0)
    x = normal(N)
    S = torch.linalg.svdvals(J)
    share = S.square() / S.square().sum()
    found = br.jacobian_spectrum(linear(J), x, 24, tol=1e-4, n_probes=64)
    assert abs(found.squared_norm.value - S.square().sum()) < 4 * found.squared_norm.standard_error
    assert found.squared_norm.standard_error < 0.01 * S.square().sum()
    assert found.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=0.01)
    entropy = torch.special.entr(share).sum().exp()
    low, high = found.effective_rank
    assert low <= entropy * 1.02
    assert entropy <= high * 1.02
    assert high / low < 2
    for count, part in ((found.n90, 0.9), (found.n95, 0.95), (found.energy_rank(0.5), 0.5)):
        assert bool(count.exact)
        assert abs(int(count.value) - int((share.cumsum(0) < part).sum() + 1)) <= 1
    assert found.count_above(0.5) == (int((S > 0.5).sum()), True)
    assert found.count_above(np.float32(0.5)) == found.count_above(0.5)  # numbers of numpy are numbers, too
    low_threshold = found.count_above(1e-3)
    assert low_threshold.value == 24
    assert not bool(low_threshold.exact)
    v = torch.linalg.svd(J)[2][0]
    assert found.alignment == pytest.approx(float((v @ x).abs() / x.norm()), abs=0.02)
    assert br.jacobian_spectrum(linear(J), x, 4, reference=v).alignment > 0.99


def test_spectrum_bounds_where_few_triples_do_not_decide():
    J = shrinkage(power=0.3)
    S = torch.linalg.svdvals(J)
    share = S.square() / S.square().sum()
    found = br.jacobian_spectrum(linear(J), torch.ones(N, dtype=torch.float64), 8)
    n90 = int((share.cumsum(0) < 0.9).sum() + 1)
    assert not bool(found.n90.exact)
    assert 8 < found.n90.value <= n90
    low, high = found.effective_rank
    assert low * 0.98 <= torch.special.entr(share).sum().exp() <= high * 1.02


def test_spectrum_of_samples_and_both_kinds_of_results():
    J = torch.stack([shrinkage(), asymmetric(0.2)])
    found = br.jacobian_spectrum(linear(J), normal(2, N), K, batch=True, n_probes=48)
    assert found.svd.info.method == "jvp+vjp"
    true = J.square().sum((-2, -1))
    z = (found.squared_norm.value - true) / found.squared_norm.standard_error
    assert bool((z.abs() < 4).all())
    assert found.n90.value.shape == found.alignment.shape == (2,)
    one = br.jacobian_spectrum(linear(J[1]), normal(2, N)[1], K, n_probes=48, seed=(0, 1))
    torch.testing.assert_close(one.squared_norm.value, found.squared_norm.value[1], rtol=1e-6, atol=0)
    small = br.jacobian_spectrum(linear(J[0, :30, :30]), torch.ones(30, dtype=torch.float64), 4)
    assert small.squared_norm.exact
    torch.testing.assert_close(small.squared_norm.value, J[0, :30, :30].square().sum())


def test_spectrum_of_a_small_jacobian_is_exact():
    J = normal(2, 60, 64)
    found = br.jacobian_spectrum(linear(J), normal(2, 64), 8, batch=True)
    S = torch.linalg.svdvals(J)
    share = S.square() / S.square().sum(-1, keepdim=True)
    assert found.svd.S.shape == (2, 60)
    assert found.svd.info.notes == ("from the whole Jacobian: n = 64 is small",)
    assert found.squared_norm.exact
    torch.testing.assert_close(found.squared_norm.value, S.square().sum(-1))
    for count, part in ((found.n90, 0.9), (found.n95, 0.95)):
        assert bool(count.exact.all())
        assert count.value.equal((share.cumsum(-1) < part).sum(-1) + 1)
    for bound in found.effective_rank:
        torch.testing.assert_close(bound, torch.special.entr(share).sum(-1).exp())
    above = found.count_above(3.0)
    assert above.value.equal((S > 3).sum(-1))
    assert bool(above.exact.all())


def test_bad_input():
    f, x = linear(shrinkage()), torch.zeros(N, dtype=torch.float64)
    for options, match in (
        ({"k": -1}, "k=-1"),
        ({"mode": "vjp"}, "'auto', 'jvp', 'jvp\\+vjp'"),
        ({"tol": 0.0}, "between 0 and 1"),
        ({"block": 0}, "block=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"precision": "half"}, "'full' and 'bfloat16'"),
        ({"progress": 1}, "callable"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ValueError, match=match):
            br.jacobian_svd(f, x, **{"k": K, **options})
    with pytest.raises(TypeError, match=r"x is numpy\.ndarray; a torch tensor is needed, .*torch\.as_tensor\(x\)"):
        br.jacobian_svd(torch.tanh, normal(90).numpy(), 3)  # found once: "x is float64; floating point is needed"
    with pytest.raises(TypeError, match="int64"):
        br.jacobian_svd(f, torch.zeros(N, dtype=torch.int64), K)
    with pytest.raises(ValueError, match=r"start has right vectors .* expected is \(k, 220\)"):
        br.jacobian_svd(f, x, K, start=br.randomized_svd(normal(50, 40), K))
    bad = shrinkage().expand(2, -1, -1).clone()
    bad[1, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="forward product of sample 1 holds NaN"):
        br.jacobian_svd(linear(bad), torch.zeros(2, N, dtype=torch.float64), K, batch=True)
    for check in ({"mode": "jvp"}, {"mode": "jvp+vjp"}):  # found once: LAPACK "failed to converge"
        with pytest.raises(ValueError, match="NaN or infinity have no singular values; check_finite=True"):
            br.jacobian_svd(linear(bad[1]), x, K, check_finite=False, **check)
    for start in (5, tuple(br.jacobian_svd(f, x, K))):
        with pytest.raises(TypeError, match=r"start is (int|tuple); a result of jacobian_svd"):
            br.jacobian_svd(f, x, K, start=start)
    with pytest.raises(TypeError, match="tol='0'"):
        br.jacobian_svd(f, x, K, tol="0")
    for options, match in (({"n_probes": 1}, "at least 2"), ({"k": 0}, "at least 1")):
        with pytest.raises(ValueError, match=match):
            br.jacobian_spectrum(f, x, **options)
        with pytest.raises(TypeError, match="integer"):
            br.jacobian_spectrum(f, x, **dict.fromkeys(options, 2.5))
    found = br.jacobian_spectrum(f, x, K)
    for share in (0, 2, float("nan"), "half"):
        with pytest.raises(ValueError, match="share="):
            found.energy_rank(share)
    for threshold in (float("nan"), "one"):
        with pytest.raises(ValueError, match="threshold="):
            found.count_above(threshold)
