"""Closed forms against numerical minima of the objective (oracles 1 to 4, 6, 8 and 9 of the theory)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import balanced_rep as br
from balanced_rep.models import ReLUDAE
from balanced_rep.theory import (
    closed_form,
    closed_form_weights,
    column_scale,
    gram_error,
    memorization_threshold,
    minimal_loss,
    optimal_allocation,
    population_loss,
    separability,
)

F64 = torch.float64


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block_loss(W1: Tensor, W2: Tensor, X: Tensor, sigma: float, lam: float, n: int) -> Tensor:
    """The exact objective of samples (m, d) out of n while every unit is active on all of them."""
    A = W2 @ W1.T
    error = (X @ A.T - X).square().sum() + len(X) * sigma**2 * A.square().sum()
    return error / n + lam * (W1.square().sum() + W2.square().sum())


def minimise(f: Callable[[], Tensor], parameters: list[Tensor]) -> float:
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = f()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return f().item()


def numerical(X: Tensor, p: int, sigma: float, lam: float, n: int, starts: int = 2) -> tuple[float, Tensor, Tensor]:
    """Loss and weights of the best of several starts."""
    best: tuple[float, Tensor, Tensor] | None = None
    for seed in range(starts):
        W1, W2 = (
            (0.3 * torch.randn(X.shape[1], p, dtype=F64, generator=gen(10 * seed + i))).requires_grad_() for i in (0, 1)
        )
        loss = minimise(lambda W1=W1, W2=W2: block_loss(W1, W2, X, sigma, lam, n), [W1, W2])
        if best is None or loss < best[0]:
            best = loss, W1.detach(), W2.detach()
    assert best is not None
    return best


@pytest.mark.parametrize(("d", "n", "sigma", "lam"), [(20, 5, 0.2, 0.01), (50, 5, 1.0, 0.05), (8, 3, 0.5, 0.3)])
def test_a_sample_alone(d: int, n: int, sigma: float, lam: float) -> None:
    x = torch.randn(1, d, dtype=F64, generator=gen(d)) * math.sqrt(8 / d)
    copies = torch.tensor([1.0, n - 1.0], dtype=F64)
    r = column_scale(torch.cat([x, x.flip(1)]), sigma=sigma, lam=lam, copies=copies)[0]
    _, W1, W2 = numerical(x, 1, sigma, lam, n)
    for W in (W1, W2):
        torch.testing.assert_close((x @ W).abs().item() / x.square().sum().item(), r.item(), rtol=0, atol=1e-7)
        assert (W @ W.T - r**2 * x.T @ x).norm() < 1e-6  # nothing off the direction of x
    fourth = x.pow(4).sum()
    assert abs(((x.square().sum() - n * lam) / (fourth + sigma**2 * x.square().sum())).sqrt() - r) > 0.02


def test_copies_of_a_sample_and_the_threshold() -> None:
    n, m, sigma, lam = 20, 7, 0.4, 0.05
    x = torch.randn(1, 15, dtype=F64, generator=gen(3))
    others = torch.randn(n - m, 15, dtype=F64, generator=gen(4))
    _, W1, _ = numerical(x.expand(m, -1), 1, sigma, lam, n)
    X = torch.cat([x.expand(m, -1), others])
    W = closed_form_weights(X, sigma=sigma, lam=lam, regime="memorization")
    r = W[:, 0].norm() / x.norm()
    assert abs((x @ W1).abs().item() / x.square().sum().item() - r.item()) < 1e-7
    weights = torch.ones(n - m + 1, dtype=F64)
    weights[0] = m
    weighted = closed_form(torch.cat([x, others]), sigma=sigma, lam=lam, weights=weights)
    torch.testing.assert_close(weighted.W, W)
    threshold = memorization_threshold(x, lam=lam, n=n).item()
    for copies, stored in ((math.floor(threshold), False), (math.floor(threshold) + 1, True)):
        share = torch.tensor([copies, n - copies], dtype=F64)
        if copies:
            r = column_scale(torch.cat([x, others[:1]]), sigma=sigma, lam=lam, copies=share)[0]
            assert bool(r > 0) is stored


BLOCKS = [
    (12, 40, 100, 3, 0.5, 0.05),
    (12, 40, 100, 12, 0.5, 0.05),
    (6, 200, 200, 4, 0.2, 0.1),
    (9, 25, 60, 3, 0.4, 0.06),
]


@pytest.mark.parametrize(("d", "m", "n", "p", "sigma", "lam"), BLOCKS)
def test_a_cluster_and_its_minimal_loss(d: int, m: int, n: int, p: int, sigma: float, lam: float) -> None:
    g = gen(d * m)
    X = 1.5 * torch.randn(1, d, dtype=F64, generator=g) + torch.randn(m, d, dtype=F64, generator=g) @ (
        torch.randn(d, d, dtype=F64, generator=g) / math.sqrt(d)
    )
    loss, W1, W2 = numerical(X, p, sigma, lam, n)
    # A second cluster of weight n - m makes rho = m / n; it is far too small to be worth a unit.
    both = torch.cat([X, torch.full((1, d), 1e-8, dtype=F64)])
    labels = torch.tensor([0] * m + [1])
    weights = torch.tensor([1.0] * m + [max(n - m, 1e-12)], dtype=F64)
    found = closed_form(both, labels, sigma=sigma, lam=lam, p=p, weights=weights)
    M = found.W @ found.W.T
    assert found.W.shape == (d, p)
    assert (W1 @ W1.T - M).norm() < 1e-6 * M.norm()
    assert (W2 @ W1.T - M).norm() < 1e-6 * M.norm()
    assert (W1 - W2).norm() < 1e-6 * W1.norm()
    assert found.loss == pytest.approx(loss, abs=1e-11)
    assert minimal_loss(both, labels, sigma=sigma, lam=lam, p=p, weights=weights) == found.loss
    half = closed_form(both, labels, sigma=sigma, lam=lam / 2, p=p, weights=weights).W
    assert gram_error(half, found.W) > 1e-3  # lambda, not lambda / 2


def test_the_noise_enters_as_its_square() -> None:
    s, lam, sigma = 2.0, 0.05, 0.3
    x = torch.tensor([[math.sqrt(s), 0.0]], dtype=F64)
    g = closed_form(x, sigma=sigma, lam=lam).gains[0].item()
    assert g == pytest.approx((s - lam) / (s + sigma**2), rel=1e-12)


def one_mode(n: int = 512, d: int = 32) -> Tensor:
    """A cluster whose mean dominates: norm 8 and standard deviations from 0.6 to 2."""
    g = gen(1)
    mean = torch.nn.functional.normalize(torch.randn(d, dtype=F64, generator=g), dim=0) * 8
    U = torch.linalg.qr(torch.randn(d, 5, dtype=F64, generator=g))[0]
    spread = torch.randn(n, 5, dtype=F64, generator=g) * torch.tensor([2.0, 1.6, 1.2, 0.9, 0.6], dtype=F64)
    return mean + spread @ U.T + 0.05 * torch.randn(n, d, dtype=F64, generator=g)


def relu_loss(W: Tensor, X: Tensor, sigma: float, lam: float) -> float:
    X = X.repeat(16, 1)
    noisy = X + sigma * torch.randn(X.shape, dtype=F64, generator=gen(9))
    return ((torch.relu(noisy @ W) @ W.T - X).square().sum(dim=1).mean() + 2 * lam * W.square().sum()).item()


def test_the_rotation_makes_every_unit_active() -> None:
    X, sigma, lam = one_mode(), 0.2, 0.01
    labels = torch.zeros(len(X), dtype=torch.int64)
    found = closed_form(X, labels, sigma=sigma, lam=lam, p=6)
    u, s, _ = torch.linalg.svd(found.W, full_matrices=False)
    plain = u * s * torch.where(X.mean(0) @ u < 0, -1.0, 1.0)  # the same W W^T: eigenvectors that point along the mean
    assert gram_error(plain, found.W) < 1e-12
    assert found.own_active > 0.98
    assert (X @ plain > 0).double().mean() < 0.7
    # The minimum over all networks is at most a little below this: training reaches 0.41 (test_train.py).
    assert relu_loss(found.W, X, sigma, lam) <= 1.15 * found.loss
    assert relu_loss(plain, X, sigma, lam) > 5 * found.loss
    seen = found.W.T @ X.mean(0)
    torch.testing.assert_close(seen, seen[:1].expand(6), rtol=1e-10, atol=0)


def test_a_centred_cluster_has_no_rotation_and_says_so() -> None:
    X = one_mode()
    X = X - X.mean(0)
    found = closed_form(X, torch.zeros(len(X), dtype=torch.int64), sigma=0.2, lam=0.01, p=4)
    assert found.own_active == pytest.approx(0.5, abs=0.1)


def hybrid(sigma: float = 0.2, lam: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    """Ten repeated samples and two modes in general position: closed-form weights, and noise-free test samples."""
    d, n_modes, rank, n_stored, n_copies, n_each = 64, 2, 8, 10, 40, 500
    g = gen(0)
    centre = torch.randn(n_stored + n_modes, d, dtype=F64, generator=g)
    centre = 8 * torch.nn.functional.normalize(centre - centre.mean(0), dim=1)
    scales = torch.linspace(1.5, 0.5, rank, dtype=F64)
    frames = [torch.linalg.qr(torch.randn(d, rank, dtype=F64, generator=g))[0] for _ in range(n_modes)]

    def draw(k: int, n: int) -> Tensor:
        return centre[n_stored + k] + torch.randn(n, rank, dtype=F64, generator=g) * scales @ frames[k].T

    X = torch.cat([centre[:n_stored].repeat_interleave(n_copies, 0), *(draw(k, n_each) for k in range(n_modes))])
    labels = torch.repeat_interleave(
        torch.arange(n_stored + n_modes), torch.tensor([n_copies] * n_stored + [n_each] * n_modes)
    )
    W = closed_form_weights(X, sigma=sigma, lam=lam, regime="mixed", labels=labels, p=[1] * n_stored + [rank] * n_modes)
    return W, centre[:n_stored], torch.cat([draw(k, 100) for k in range(n_modes)])


def auc(high: Tensor, low: Tensor) -> float:
    return ((high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()).mean().item()


def test_stored_and_generalized_samples_of_one_model() -> None:
    W, stored, others = hybrid()
    sigma, g = 0.2, gen(5)
    model = ReLUDAE(W, sigma=sigma)
    noisy = [
        x + sigma * torch.randn(x.shape, dtype=F64, generator=g) for x in (stored.repeat_interleave(20, 0), others)
    ]
    high, low = (br.representation_stats(model.represent(y)) for y in noisy)
    for measure in ("std_over_l2", "l4_over_l2"):
        assert auc(getattr(high, measure), getattr(low, measure)) == 1.0
    assert 0.9 <= auc(high.std, low.std) < 1  # less, since the norms differ


def test_std_is_scale_times_spikiness() -> None:
    h = torch.relu(torch.randn(7, 33, dtype=F64, generator=gen(0)))
    ratio = h.sum(1).square() / (33 * h.square().sum(1))
    want = (h.square().sum(1) / 33 * (1 - ratio)).sqrt()
    assert (br.representation_stats(h).std - want).abs().max() < 1e-15
    one_hot = torch.zeros(1, 1280, dtype=F64)
    one_hot[0, 3] = 2.0
    assert br.representation_stats(one_hot).std_over_l2.item() == pytest.approx(math.sqrt(1279) / 1280, rel=1e-12)


def test_allocation_is_the_best_one() -> None:
    g = gen(2)
    clusters = [
        scale * torch.randn(1, 4, dtype=F64, generator=g) + torch.randn(n, 4, dtype=F64, generator=g)
        for n, scale in ((30, 3.0), (60, 1.0))
    ]
    X, labels = torch.cat(clusters), torch.tensor([0] * 30 + [1] * 60)
    options = {"sigma": 0.3, "lam": 0.05}
    for p in (1, 2, 3, 5, 8):
        counts = optimal_allocation(X, labels, p=p, **options).tolist()
        losses = {
            (a, p - a): minimal_loss(X, labels, p=[a, p - a], **options) for a in range(min(p, 4) + 1) if p - a <= 4
        }
        assert min(losses.values()) == pytest.approx(minimal_loss(X, labels, p=counts, **options), abs=1e-14)
        assert sum(counts) == p
    poor = optimal_allocation(X, labels, p=8, sigma=0.3, lam=1.0)  # a penalty that makes some units worth nothing
    assert poor.sum() < 8
    assert closed_form(X, labels, sigma=0.3, lam=1.0, p=8).W.shape == (4, 8)
    assert closed_form(X, labels, sigma=0.3, lam=1.0, p=8).block.tolist()[-1] == -1


def test_population_loss_is_the_full_one() -> None:
    s, sigma = torch.tensor([9.0, 4.0, 1.0, 0.3], dtype=F64), 0.5
    W = torch.diag((s / (s + sigma**2)).sqrt())
    want = (s * sigma**2 / (s + sigma**2)).sum().item()
    assert population_loss(W, torch.diag(s), sigma=sigma) == pytest.approx(want, rel=1e-12)
    assert want > (s * sigma**4 / (s + sigma**2).square()).sum() * 3  # the bias alone, as printed in the corollary
    assert population_loss(W[:, :2], torch.diag(s), sigma=sigma) > want


def test_dtype_units_and_order() -> None:
    X = torch.randn(6, 4, generator=gen(1))
    found = closed_form(X, sigma=0.2, lam=0.01, p=9)
    assert found.W.dtype == torch.float32
    assert found.block.tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]
    assert (found.W[:, 6:] == 0).all()
    cosine = torch.nn.functional.cosine_similarity(found.W[:, :6].T, X)
    torch.testing.assert_close(cosine, torch.ones(6))  # column i stores sample i
    r = column_scale(X, sigma=0.2, lam=0.01)
    torch.testing.assert_close(found.W[:, :6].norm(dim=0), r * X.norm(dim=1))


def test_column_scale_of_extreme_samples() -> None:
    X = torch.tensor([[0.0], [1e-150], [1.0], [1e90]], dtype=F64)
    r = column_scale(X, sigma=0.5, lam=0.0, copies=torch.tensor([1, 1, 0, 1]))
    torch.testing.assert_close(r, torch.tensor([0.0, 2.0, 0.0, 1e-90], dtype=F64), rtol=1e-12, atol=0)


def test_separability_and_its_bound() -> None:
    simplex = torch.eye(4, dtype=F64) - 0.25
    s = separability(simplex)
    assert (s.n_clusters, s.max_clusters) == (4, 4)
    assert s.beta == pytest.approx(-1 / 3)
    assert s.alpha == 0
    for beta, most in ((-0.05, 21), (-0.1, 11), (-0.2, 6)):
        two = torch.tensor([[1.0] + [0.0] * 39, [beta, math.sqrt(1 - beta**2)] + [0.0] * 38], dtype=F64)
        assert separability(two).max_clusters == most
    spread = torch.cat([simplex + 0.01, simplex - 0.01])
    s = separability(spread, torch.arange(4).repeat(2))
    assert s.alpha == pytest.approx(0.02 / simplex[0].norm().item(), rel=1e-6)
    gains = [torch.tensor([0.9], dtype=F64)] * 4
    assert 0 < s.margin(gains) < s.min_norm
    assert separability(torch.ones(2, 3)).margin(gains) == -math.inf
    assert separability(torch.ones(1, 3)).separable


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X: closed_form(X[0], sigma=0.1, lam=0.1), r"X must be floating point .* got \(3,\)"),
        (lambda X: closed_form(X.int(), sigma=0.1, lam=0.1), "floating point"),
        (lambda X: closed_form(X / 0, sigma=0.1, lam=0.1), "NaN or infinity, first in sample 0"),
        (lambda X: closed_form(X, sigma=0.0, lam=0.1), "sigma must be a positive number, got 0.0"),
        (lambda X: closed_form(X, sigma=0.1, lam=-1.0), "lam must be a finite number >= 0, got -1.0"),
        (lambda X: closed_form(X, torch.zeros(3), sigma=0.1, lam=0.1), "labels must be integers"),
        (lambda X: closed_form(X, torch.zeros(2, dtype=torch.int64), sigma=0.1, lam=0.1), r"shape \(4,\)"),
        (lambda X: closed_form(X, sigma=0.1, lam=0.1, p=0), "p must be at least 1, got 0"),
        (lambda X: closed_form(X, sigma=0.1, lam=0.1, p=[1, 2]), "one for each of the 4 clusters"),
        (lambda X: closed_form(X, sigma=0.1, lam=0.1, weights=torch.zeros(4)), "not all 0"),
        (lambda X: closed_form(X, sigma=0.1, lam=0.1, weights=torch.tensor([1.0, 0, 1, 1])), "cluster 1 have weight 0"),
        (lambda X: closed_form_weights(X, sigma=0.1, lam=0.1, regime="memorization", p=3), "each of the 4 distinct"),
        (lambda X: closed_form_weights(X, sigma=0.1, lam=0.1, regime="mixed"), "needs labels"),
        (lambda X: closed_form_weights(X, sigma=0.1, lam=0.1, regime="other"), "got 'other'"),
        (lambda X: separability(torch.cat([X, -X]), torch.zeros(8, dtype=torch.int64)), "mean of cluster 0 is zero"),
    ],
)
def test_bad_input_is_refused_with_the_reason(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 3, generator=gen(0)))
