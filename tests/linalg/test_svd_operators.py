"""randomized_svd of operators that are known by their products: scipy's, torch's, ours, and bad ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

import balanced_rep as br
from balanced_rep.linalg import ConvergenceWarning
from tests.linalg.matrices import normal, spectrum, with_spectrum

K = 6


class Operator:
    """A matrix behind ``shape``, ``dtype`` and ``@``; counts the columns it is applied to."""

    def __init__(self, A: Tensor, name: str | None = "T") -> None:
        self.A, self.shape, self.dtype, self.device, self.columns = A, tuple(A.shape), A.dtype, A.device, 0
        if name == "adjoint":
            self.adjoint = lambda: _Part(self, A.mH)
        elif name is not None:
            setattr(self, name, _Part(self, A.mH if name in ("H", "mH") else A.mT))

    def __matmul__(self, V: Tensor) -> Tensor:
        self.columns += V.shape[-1]
        return self.A @ V


class _Part:
    def __init__(self, owner: Operator, A: Tensor) -> None:
        self.owner, self.A = owner, A

    def __matmul__(self, V: Tensor) -> Tensor:
        self.owner.columns += V.shape[-1]
        return self.A @ V


def matrix(m: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return with_spectrum(m, n, spectrum("exp", min(m, n), K), dtype=dtype)


def assert_leading(result: Any, A: Tensor, rtol: float = 1e-3) -> None:
    S = torch.as_tensor(np.asarray(result.S)).double()
    torch.testing.assert_close(S, torch.linalg.svdvals(A)[..., : S.shape[-1]].double(), rtol=rtol, atol=0)


def relative(result: Any, A: Tensor) -> float:
    U, S, Vh = (torch.as_tensor(np.asarray(X)) for X in result)
    return float(torch.linalg.matrix_norm(A - (U * S.to(U.dtype)) @ Vh) / torch.linalg.matrix_norm(A))


@pytest.mark.parametrize("name", ["T", "mT", "H", "mH", "adjoint"])
@pytest.mark.parametrize("shape", [(150, 90), (90, 150)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_any_name_of_the_transpose(dtype, shape, name):
    A = matrix(*shape, dtype=dtype)
    op = Operator(A, name)
    result = br.randomized_svd(op, K)
    assert result.U.dtype == dtype
    assert result.info.method == "krylov"
    assert int(result.info.passes) == op.columns == 9 * 16 + 10  # and ten probes
    assert_leading(result, A)
    torch.testing.assert_close(A @ result.Vh.mH if shape[0] > shape[1] else result.U.mH @ A,
                               result.U * result.S if shape[0] > shape[1] else result.S.unsqueeze(-1) * result.Vh,
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_the_bound_holds_and_is_not_far():
    """999 times in 1000 the error is below the bound; forty seeds, flat and steep."""
    for kind in ("slow", "exp"):
        A = with_spectrum(150, 90, spectrum(kind, 90, K))
        for seed in range(20):
            result = br.randomized_svd(Operator(A), K, seed=seed)
            error = relative(result, A)
            assert not bool(result.info.tight)
            assert error <= result.info.rel_error <= 8 * error


def test_seeds_of_operators():
    op = Operator(matrix(150, 90))
    assert torch.equal(br.randomized_svd(op, K, seed=3).U, br.randomized_svd(op, K, seed=3).U)
    assert not torch.equal(br.randomized_svd(op, K, seed=3).U, br.randomized_svd(op, K, seed=4).U)


def test_tol_and_no_convergence():
    A = with_spectrum(200, 150, spectrum("slow", 150, K))
    result = br.randomized_svd(Operator(A), K, tol=1e-3, block=8)
    best = float(torch.linalg.svdvals(A)[K:].square().sum().sqrt() / torch.linalg.matrix_norm(A))
    assert bool(result.info.converged)
    assert relative(result, A) <= best * (1 + 1e-3)
    with pytest.warns(ConvergenceWarning, match="1 of 1"):
        br.randomized_svd(Operator(A), K, tol=1e-6, rounds=3, block=8)


def test_small_operators_become_matrices():
    A = normal(30, 20)
    op = Operator(A, None)  # needs no transpose then
    result = br.randomized_svd(op, 4)
    assert result.info.method == "svd"
    assert op.columns == 20
    assert int(result.info.passes) == 20
    assert_leading(result, A, 1e-10)
    assert_leading(br.randomized_svd(Operator(A.mT), 4), A, 1e-10)
    assert br.randomized_svd(Operator(A[:0]), 4).S.shape == (0,)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_scipy_linear_operator(dtype):
    A = matrix(150, 90, torch.complex128).numpy() if dtype == np.complex128 else matrix(150, 90).numpy().astype(dtype)
    result = br.randomized_svd(scipy.sparse.linalg.aslinearoperator(A), K)
    assert all(isinstance(X, np.ndarray) for X in result)
    assert result.U.dtype == dtype
    assert isinstance(result.info.rel_error, np.floating)
    assert_leading(result, torch.from_numpy(A))


@pytest.mark.parametrize("form", ["scipy csr", "scipy coo", "torch coo", "torch csr"])
def test_sparse_matrices_have_an_exact_certificate(form):
    A = normal(300, 200) * (normal(300, 200, seed=1) > 1.5)
    A = A * torch.linspace(4, 0.1, 300).unsqueeze(1) ** 2
    sparse = {
        "scipy csr": lambda: scipy.sparse.csr_array(A.numpy()),
        "scipy coo": lambda: scipy.sparse.coo_matrix(A.numpy()),
        "torch coo": A.to_sparse_coo,
        "torch csr": A.to_sparse_csr,
    }[form]()
    result = br.randomized_svd(sparse, K, tol=1e-3)
    assert bool(result.info.tight)
    assert result.info.rel_error == pytest.approx(relative(result, A), rel=1e-6)
    assert_leading(result, A, 0.02)


@pytest.mark.parametrize("size", [30, 3, 0.02])
def test_center_without_forming_it(size):
    A = matrix(200, 120) + size * normal(120, seed=5)
    C = A - A.mean(0)
    for B in (Operator(A), scipy.sparse.csr_array(A.numpy()), A.to_sparse_csr()):
        got = br.randomized_svd(B, K, center=True)
        assert_leading(got, C)
    assert bool(got.info.tight)  # found once: in float64, too, means of three deviations left it to probes
    assert got.info.rel_error == pytest.approx(relative(got, C), rel=1e-4)
    small = br.randomized_svd(Operator(A[:, :20]), 4, center=True)
    assert_leading(small, C[:, :20], 1e-8)


@pytest.mark.parametrize("shape", [(3000, 200), (200, 400)], ids=str)
@pytest.mark.parametrize("mean", [100, 500])
def test_the_bound_holds_behind_large_means(mean, shape):
    """Found once: means were sums in float32, and what they missed was the first triple, outside of every bound."""
    A = (mean + with_spectrum(*shape, 10 * spectrum("poly", 200, K))).float()
    C = A.double() - A.double().mean(0)
    for B in (Operator(A), scipy.sparse.csr_array(A.numpy())):
        result = br.randomized_svd(B, K, center=True)
        true = relative(result, C)
        assert true <= result.info.rel_error <= 4 * true
        assert not bool(result.info.tight)
        assert_leading(result, C, 0.02)


def test_means_in_which_deviations_drown_are_said():
    A = (1e6 + normal(300, 200)).float()
    with pytest.warns(UserWarning, match=r"rounding to torch\.float32 takes 0\.\d of the deviations"):
        result = br.randomized_svd(Operator(A), K, center=True)
    assert "means are so large" in result.info.notes[-1]


def test_jacobian_operators():
    A = matrix(90, 120, torch.float32)

    def f(x: Tensor) -> Tensor:
        return x @ A.mT

    one = br.randomized_svd(br.JacobianOperator(f, torch.zeros(120)), K)
    assert_leading(one, A)
    many = br.randomized_svd(
        br.JacobianOperator(lambda x: f(x) * (1 + x[:, :1] ** 2), normal(3, 120).float(), batch=True), K
    )
    assert many.U.shape == (3, 90, K)
    assert many.info.rel_error.shape == (3,)


def test_stacked_operators_stop_by_themselves():
    A = torch.stack([with_spectrum(120, 100, spectrum(kind, 100, K)) for kind in ("noise", "slow", "poly")])
    op = Operator(A)
    result = br.randomized_svd(op, K, tol=1e-3, block=8)
    assert len(result.info.rounds.unique()) == 3
    for i in range(3):
        one = br.randomized_svd(Operator(A[i : i + 1]), K, tol=1e-3, block=8, seed=(0, i))
        assert int(one.info.rounds) == int(result.info.rounds[i])
        torch.testing.assert_close(one.S[0], result.S[i], rtol=1e-9, atol=0)


def test_products_run_outside_of_autocast_and_rounded_operands():
    """Found once: an operator was refused under autocast, and its products rounded by the caller's switch."""
    A = matrix(150, 90, torch.float32)
    seen = []

    class Watched(Operator):
        def __matmul__(self, V: Tensor) -> Tensor:
            seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
            return super().__matmul__(V)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = br.randomized_svd(Watched(A), K)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {("highest", False)}
    assert torch.equal(got.S, br.randomized_svd(Operator(A), K).S)


@pytest.mark.parametrize("power", [-100, 100])
def test_operators_of_any_magnitude(power):
    A = matrix(150, 90, torch.float32) * 2.0**power
    assert_leading(br.randomized_svd(Operator(A), K), A.double())


def _wrong_shape(A: Tensor, V: Tensor) -> Tensor:
    return (A @ V)[:-1]


def _wrong_dtype(A: Tensor, V: Tensor) -> Tensor:
    return (A @ V).float()


def _not_finite(A: Tensor, V: Tensor) -> Tensor:
    return A @ V * torch.nan


def _no_tensor(A: Tensor, V: Tensor) -> Any:
    return "products"


@pytest.mark.parametrize(
    ("product", "error", "match"),
    [
        (_wrong_shape, ValueError, r"gave shape \(149, 10\) for \(90, 10\); expected is \(150, 10\)"),
        (_wrong_dtype, TypeError, "gave torch.float32 for torch.float64"),
        (_not_finite, ValueError, "gave NaN or infinity"),
        (_no_tensor, TypeError, "gave str"),
    ],
)
def test_operators_that_multiply_wrongly(product, error, match):
    class Wrong(Operator):
        def __matmul__(self, V: Tensor) -> Any:
            return product(self.A, V)

    with pytest.raises(error, match=match):
        br.randomized_svd(Wrong(matrix(150, 90)), K)


def test_operators_that_cannot_be_used():
    A = matrix(150, 90)
    with pytest.raises(TypeError, match="Operator has no transpose"):
        br.randomized_svd(Operator(A, None), K)
    forward_only = scipy.sparse.linalg.LinearOperator((150, 90), matvec=lambda v: A.numpy() @ v, dtype=np.float64)
    with pytest.raises(TypeError, match=r"A.T @ U of .* cannot be computed"):
        br.randomized_svd(forward_only, K)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 150, 90\)"):
        br.randomized_svd(Operator(A.expand(2, 2, -1, -1)), K)
    for stack in (A.expand(2, -1, -1).to_sparse(), A.expand(2, -1, -1).to_sparse_csr(), A.to_sparse(1)):
        with pytest.raises(ValueError, match="sparse"):
            br.randomized_svd(stack, K)
    with pytest.raises(TypeError, match="no gradient of a sparse tensor"):
        br.randomized_svd(A.to_sparse().requires_grad_(), K)
    with pytest.raises(TypeError, match="floating-point or complex"):
        br.randomized_svd(scipy.sparse.csr_array(A.numpy().astype(int)), K)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-30, 1e30, 1e200, 1e300])
@pytest.mark.parametrize("kind", ["operator", "wide", "centred", "sparse", "small"])
def test_numbers_whose_squares_leave_the_range(kind, scale):
    """Found once: singular values of 1e-200 came back as zeros, those of 1e200 as LAPACK's failure."""
    A = with_spectrum(120, 90, spectrum("exp", 90, 4)).numpy()
    A = A[:, :12] if kind == "small" else A
    wrap = scipy.sparse.csr_matrix if kind == "sparse" else scipy.sparse.linalg.aslinearoperator
    given = scale * (A.T if kind == "wide" else A + 3 if kind == "centred" else A)
    block = None if kind == "small" else 4
    found = br.randomized_svd(wrap(given), 4, tol=1e-6, block=block, center=kind == "centred")
    true = np.linalg.svd(A - A.mean(0) if kind == "centred" else A, compute_uv=False)[:4]
    np.testing.assert_allclose(found.S / scale, true, rtol=1e-5)
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(4), atol=1e-12)


def test_no_convergence_of_a_numpy_operator_is_a_warning():
    A = normal(300, 200, dtype=torch.float32).numpy()
    operator = scipy.sparse.linalg.aslinearoperator(A)
    with pytest.warns(ConvergenceWarning, match="1 of 1 decompositions did not reach tol"):
        assert not br.randomized_svd(operator, 4, tol=1e-9, rounds=3, block=4).info.converged
    found = br.randomized_svd(operator, 4, tol=1e-9, block=8)  # without a limit it ends as a matrix
    assert found.info.converged
    assert "from the whole matrix" in found.info.notes[-1]
    np.testing.assert_allclose(found.S, np.linalg.svd(A, compute_uv=False)[:4], rtol=1e-6)
