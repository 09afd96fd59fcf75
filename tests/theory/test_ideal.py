"""Ideal denoisers: their formulas, their Jacobians as covariances, and that they are `Denoiser`s."""

from __future__ import annotations

import pytest
import torch

import balanced_rep as br
from balanced_rep.models import Denoiser, digits_data
from balanced_rep.theory import EmpiricalDenoiser, GaussianDenoiser

F64 = torch.float64


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_empirical_denoiser_is_equation_3() -> None:
    X = torch.randn(6, 2, 3, dtype=F64, generator=gen(0)) + 5
    y = torch.randn(4, 2, 3, dtype=F64, generator=gen(1)) + 5
    sigma = torch.tensor([0.1, 0.5, 1.0, 10.0], dtype=F64)
    density = torch.exp(-(y[:, None] - X).square().flatten(2).sum(2) / (2 * sigma[:, None] ** 2))
    want = torch.einsum("bn,nij->bij", density / density.sum(1, keepdim=True), X)
    D = EmpiricalDenoiser(X)
    assert isinstance(D, Denoiser)
    torch.testing.assert_close(D(y, sigma), want, rtol=1e-9, atol=1e-12)
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(
        EmpiricalDenoiser(X, weights=weights)(y, 0.7), EmpiricalDenoiser(X[[0, 1, 1, 2, 3, 4, 5]])(y, 0.7)
    )


def test_empirical_denoiser_at_small_noise_returns_the_image() -> None:
    X = digits_data().images[:200]
    D = EmpiricalDenoiser(X)  # float32, distances of 1e6 standard deviations
    y = X + 1e-3 * torch.randn(X.shape, generator=gen(0))
    torch.testing.assert_close(D(y, 1e-3), X, rtol=0, atol=1e-6)
    with br.record(D, "posterior") as recording:
        D(y, 1e-3)
    torch.testing.assert_close(recording["posterior"].max, torch.ones(200, dtype=F64))


@pytest.mark.parametrize(
    "D",
    [
        EmpiricalDenoiser(torch.randn(7, 5, dtype=F64, generator=gen(0))),
        GaussianDenoiser(torch.ones(5, dtype=F64), torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0], dtype=F64))),
    ],
    ids=["empirical", "gaussian"],
)
def test_the_jacobian_is_the_posterior_covariance(D) -> None:
    y, sigma = torch.randn(2, 5, dtype=F64, generator=gen(2)), 0.8
    J = br.JacobianOperator(lambda z: D(z, sigma), y, batch=True).dense()
    if isinstance(D, EmpiricalDenoiser):
        w = torch.softmax(-(y[:, None] - D.samples).square().sum(2) / (2 * sigma**2), dim=1)
        mean = w @ D.samples
        covariance = torch.einsum("bn,ni,nj->bij", w, D.samples, D.samples) - mean[:, :, None] * mean[:, None]
    else:
        prior = torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0], dtype=F64))
        covariance = (prior - prior @ torch.linalg.inv(prior + sigma**2 * torch.eye(5, dtype=F64)) @ prior).expand(
            2, 5, 5
        )
    torch.testing.assert_close(J, covariance / sigma**2, rtol=1e-9, atol=1e-12)


def test_gaussian_denoiser_is_the_conditional_mean() -> None:
    A = torch.randn(2, 3, 6, dtype=F64, generator=gen(0)).flatten(0, 1)
    covariance, mean = A @ A.T, torch.randn(2, 3, dtype=F64, generator=gen(1))
    D = GaussianDenoiser(mean, covariance)
    assert isinstance(D, Denoiser)
    y = torch.randn(4, 2, 3, dtype=F64, generator=gen(2))
    gain = covariance @ torch.linalg.inv(covariance + 0.3**2 * torch.eye(6, dtype=F64))
    want = mean + ((y - mean).flatten(1) @ gain.T).reshape(y.shape)
    torch.testing.assert_close(D(y, 0.3), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EmpiricalDenoiser(torch.ones(3, 2))(torch.ones(1, 3), 0.1), "Samples of this model have shape"),
        (lambda: EmpiricalDenoiser(torch.ones(3, 2))(torch.ones(1, 2), 0.0), "sigma must be positive"),
        (lambda: EmpiricalDenoiser(torch.ones(3, 2))(torch.ones(1, 2), 0.1, cond=1), "unconditional"),
        (lambda: EmpiricalDenoiser(torch.full((3, 2), torch.nan)), "NaN"),
        (lambda: GaussianDenoiser(torch.ones(3), torch.eye(2)), r"covariance must be \(3, 3\)"),
    ],
)
def test_bad_input_is_refused_with_the_reason(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
