"""Reverse mode of randomized_svd against finite differences and torch.linalg.svd, and where it is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import balanced_rep as br
from balanced_rep.linalg import ConvergenceWarning
from tests.linalg.matrices import normal, spectrum, with_spectrum

K = 3


def invariants(U: Tensor, S: Tensor, Vh: Tensor, seed: int = 0) -> Tensor:
    """A number that depends on every entry of the triples, but not on their signs."""
    k = S.shape[-1]
    left, right = normal(U.shape[-2], U.shape[-2], seed=seed), normal(Vh.shape[-1], Vh.shape[-1], seed=seed + 1)
    weight = torch.arange(1, k + 1, dtype=torch.float64)
    u = ((U.mT @ left) * U.mT).sum((-1, -2)) + ((U * weight).mT @ left @ U).diagonal(dim1=-2, dim2=-1).sum(-1)
    v = (((Vh @ right) * Vh).sum(-1) * weight).sum(-1)
    cross = torch.einsum(
        "...mk,...kn,mn->...", U * S.unsqueeze(-2) ** 2, Vh, normal(U.shape[-2], Vh.shape[-1], seed=seed + 2)
    )
    return (u + v + cross + (S * weight).sum(-1)).sum()


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (8, 8), (2, 9, 7)], ids=str)
def test_against_finite_differences(shape):
    A = normal(*shape, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: invariants(*br.randomized_svd(A, K)), A, atol=1e-7)


@pytest.mark.parametrize("shape", [(120, 80), (80, 120)], ids=str)
@pytest.mark.parametrize("k", [K, 8])
def test_of_the_iteration_against_the_whole_svd(shape, k):
    A = with_spectrum(*shape, spectrum("poly", min(shape), 8)).requires_grad_()
    result = br.randomized_svd(A, k, block=12, rounds=6)
    assert result.info.method == "krylov"
    (got,) = torch.autograd.grad(invariants(*result), A)
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    (want,) = torch.autograd.grad(invariants(U[:, :k], S[:k], Vh[:k]), A)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


def test_what_the_formula_for_rank_k_would_miss():
    """The part outside of the span is most of this gradient: dropping it is the error of autodiff through a sketch."""
    A = with_spectrum(60, 50, spectrum("slow", 50, K)).requires_grad_()
    U, _, Vh = br.randomized_svd(A, K, tol=1e-8)
    (got,) = torch.autograd.grad((U[:, 0] ** 4).sum(), A)
    inside = U @ (U.mT @ got @ Vh.mT) @ Vh
    assert inside.norm() < 0.5 * got.norm()


def test_float32_half_and_center():
    A = normal(40, 30).float().requires_grad_()
    result = br.randomized_svd(A, K)
    (got,) = torch.autograd.grad(invariants(*(X.double() for X in result)), A)
    B = A.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(invariants(*br.randomized_svd(B, K)), B)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    half = A.detach().half().requires_grad_()
    br.randomized_svd(half, K).S.sum().backward()
    assert half.grad.dtype == torch.float16
    C = (A.detach().double() + 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda A: invariants(*br.randomized_svd(A, K, center=True)), C[:9, :7].detach().requires_grad_()
    )


@pytest.mark.parametrize("shape", [(120, 90), (90, 120)], ids=str)
def test_gradients_of_inaccurate_triples_are_said_to_be(shape):
    """Found once: after three rounds the gradient of the last value was wrong by half of itself, in silence."""
    A = with_spectrum(*shape, spectrum("slow", 90, 12)).requires_grad_()
    U, _, Vh = torch.linalg.svd(A.detach(), full_matrices=False)

    def error(result, i: int) -> float:
        (got,) = torch.autograd.grad(result.S[i], A)
        return float((got - torch.outer(U[:, i], Vh[i])).norm())

    rough = br.randomized_svd(A, 12, block=6, rounds=3)
    with pytest.warns(ConvergenceWarning, match="relative residuals of up to") as caught:
        wrong = error(rough, 11)
    said = float(str(caught[0].message).partition("up to ")[2].partition(",")[0])
    assert wrong > 0.1
    assert 0.3 * said < wrong < 5 * said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(br.randomized_svd(A, 12, block=12, tol=1e-6), 11) < 2e-2
        assert error(br.randomized_svd(A, 12, block=12, rounds=3), 0) < 1e-2  # the last triple has no part in it


def test_only_singular_values():
    A = torch.eye(9, 7, dtype=torch.float64).requires_grad_()  # all vectors are arbitrary, the sum of the values is not
    br.randomized_svd(A, 7).S.sum().backward()
    torch.testing.assert_close(A.grad, torch.eye(9, 7, dtype=torch.float64))


def test_no_graph_unless_asked_for():
    A = normal(9, 7).requires_grad_()
    with torch.no_grad():
        assert not br.randomized_svd(A, K).S.requires_grad
    assert not br.randomized_svd(A.detach(), K).S.requires_grad
    result = br.randomized_svd(A, K)
    assert result.S.requires_grad
    assert not result.info.rel_error.requires_grad


def test_refused():
    A = normal(9, 7).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(br.randomized_svd(A, K).S.sum(), A, create_graph=True)
    with pytest.raises(TypeError, match="no gradient of a complex matrix"):
        br.randomized_svd(torch.complex(A, A), K)
    eye = torch.eye(9, 7, dtype=torch.float64).requires_grad_()
    with pytest.raises(RuntimeError, match="singular values 0 and 1 coincide"):
        br.randomized_svd(eye, K).U.pow(4).sum().backward()
    low = (normal(9, 2) @ normal(2, 7)).requires_grad_()
    with pytest.raises(RuntimeError, match="lower rank than k"):
        br.randomized_svd(low, K).U.pow(4).sum().backward()
    S = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.4, 0.3])
    tied = with_spectrum(9, 7, S).requires_grad_()
    with pytest.raises(RuntimeError, match="values k and k \\+ 1 are too close"):
        br.randomized_svd(tied, K).U.pow(4).sum().backward()
