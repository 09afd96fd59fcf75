"""Training: it reaches the closed forms on real images (Corollaries 3.2 to 3.4), and its losses are what they say."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import balanced_rep as br
from balanced_rep.models import digits_data
from balanced_rep.theory import (
    closed_form,
    column_scale,
    gram_error,
    lam_from_weight_decay,
    mask_loss,
    match_columns,
    merge_parallel_columns,
    minimal_loss,
    principal_angles,
    sampled_loss,
    separability,
    separable_subset,
    train_dae,
)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return digits_data().images.flatten(1)


@pytest.fixture(scope="module")
def five(images: Tensor) -> Tensor:
    """Five digits that point away from each other, centred."""
    chosen = images[separable_subset(images, 5)]
    return chosen - chosen.mean(0)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MEMORIZE = {"sigma": 0.2, "lam": 0.01}


def test_five_of_the_digits_are_separable(five: Tensor) -> None:
    found = separability(five)
    assert found.beta < -0.1
    assert found.n_clusters == 5 <= found.max_clusters


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="adam"),
        pytest.param({"loss": "sampled", "n_draws": 16}, id="sampled"),
        pytest.param({"tied": False, "steps": 1500}, id="untied"),
        pytest.param({"optimizer": "adamw"}, id="adamw", marks=pytest.mark.slow),
        pytest.param({"optimizer": "rmsprop"}, id="rmsprop", marks=pytest.mark.slow),
        pytest.param({"optimizer": "sgd"}, id="sgd", marks=pytest.mark.slow),
        pytest.param({"span": False, "steps": 1500}, id="all dimensions", marks=pytest.mark.slow),
    ],
)
def test_corollary_3_2(five: Tensor, options: dict) -> None:
    trained = train_dae(five, 20, **MEMORIZE, **options)
    columns = merge_parallel_columns(trained.model.W1)
    match = match_columns(columns, five)
    assert match.cosine.min() >= 0.999
    want = column_scale(five, **MEMORIZE) * five.norm(dim=1)
    torch.testing.assert_close(match.norm, want.double(), rtol=0.01, atol=0)
    stored = closed_form(five, **MEMORIZE, p=20)
    assert gram_error(trained.model.W1, stored.W) <= 0.02
    assert gram_error(trained.model.W2, stored.W) <= 0.02
    if options.get("loss") != "sampled":
        assert trained.losses[-1] == pytest.approx(minimal_loss(five, **MEMORIZE), rel=2e-3)


def test_the_jacobian_of_a_memorized_sample_has_rank_one(five: Tensor) -> None:
    model = train_dae(five, 20, **MEMORIZE).model
    y = five + 0.05 * torch.randn(five.shape, generator=gen(1))
    J = model.jacobian(y)
    u, s, _ = torch.linalg.svd(J)
    entropy = torch.special.entr(s / s.sum(1, keepdim=True)).sum(1)
    assert entropy.exp().max() < 1.01
    square = five.square().sum(1)
    want = (square - len(five) * MEMORIZE["lam"]) / (square + MEMORIZE["sigma"] ** 2)
    torch.testing.assert_close(s[:, 0], want, rtol=0.01, atol=0)
    assert (u[:, :, 0] * torch.nn.functional.normalize(five, dim=1)).sum(1).abs().min() > 0.999
    operator = br.JacobianOperator(lambda z: model(z, 0.2), y, batch=True)
    torch.testing.assert_close(operator.dense(), J, rtol=1e-5, atol=1e-6)


def test_corollary_3_3(images: Tensor) -> None:
    p, sigma, lam = 16, 0.2, 0.01
    trained = train_dae(images, p, sigma=sigma, lam=lam, loss="sampled", batch_size=256, steps=1500, lr=0.01)
    labels = torch.zeros(len(images), dtype=torch.int64)
    found = closed_form(images, labels, sigma=sigma, lam=lam, p=p)
    assert gram_error(trained.model.W1, found.W) <= 0.06
    assert principal_angles(trained.model.W1, found.W).cos().square().mean() >= 0.99
    h = trained.model.represent(images)
    assert (h > 0).float().mean() > 0.9
    assert found.own_active > 0.9
    s = torch.linalg.svdvals(trained.model.jacobian(images[:50]))
    assert 8 < torch.special.entr(s / s.sum(1, keepdim=True)).sum(1).exp().mean() <= p  # balanced, unlike memorized
    # Units share the work: none has more than a few times its part.
    assert br.representation_stats(h).max.mul(p).div(h.sum(1)).median() < 4


def mixed(images: Tensor, repeated: bool, seed: int) -> dict[str, float]:
    """AUC of four scores, repeated against never-seen digits, of one model."""
    n_repeated, n_train, share, sigma = 20, 1400, 0.6, 0.3
    X = images - images.mean(0)
    X = 4 * torch.nn.functional.normalize(X, dim=1)[torch.randperm(len(X), generator=gen(100 + seed))]
    weights = torch.ones(n_train)
    if repeated:
        weights[:n_repeated] = share / (1 - share) * (n_train - n_repeated) / n_repeated
    model = train_dae(
        X[:n_train], 64, sigma=sigma, lam=1e-3, weights=weights, loss="sampled", batch_size=256, seed=seed
    ).model
    scores: dict[str, list[Tensor]] = {"std": [], "std_over_l2": [], "error": [], "rank": []}
    for X_part in (X[:n_repeated], X[n_train:]):
        parts: dict[str, list[Tensor]] = {name: [] for name in scores}
        for draw in range(2):
            y = X_part + sigma * torch.randn(X_part.shape, generator=gen(draw))
            stats = br.representation_stats(model.represent(y))
            s = torch.linalg.svdvals(model.jacobian(y))
            parts["std"].append(stats.std)
            parts["std_over_l2"].append(stats.std_over_l2)
            parts["error"].append(-(model(y) - X_part).square().sum(1))
            parts["rank"].append(-s.sum(1).square() / s.square().sum(1))
        for name, part in parts.items():
            scores[name].append(torch.stack(part).mean(0))
    labels = [1] * n_repeated + [0] * (len(X) - n_train)
    return {name: float(roc_auc_score(labels, torch.cat(both))) for name, both in scores.items()}


def test_corollary_3_4(images: Tensor) -> None:
    found = mixed(images, repeated=True, seed=0)
    assert found["std_over_l2"] >= 0.85
    assert found["error"] >= 0.95
    assert found["rank"] >= 0.95
    control = [mixed(images, repeated=False, seed=seed) for seed in range(5)]
    for name in found:
        values = [c[name] for c in control]
        print(f"control, {name}: mean {sum(values) / len(values):.3f}, {min(values):.3f} to {max(values):.3f}")
        assert 0.4 <= sum(values) / len(values) <= 0.6, name


def test_losses_agree_while_no_unit_flips(five: Tensor) -> None:
    W = closed_form(five, **MEMORIZE, p=5).W.double()
    X = five.double()
    noise = torch.randn(2000, *X.shape, dtype=torch.float64, generator=gen(0))
    small = {"sigma": 0.01, "lam": 0.01}
    drawn = torch.stack([sampled_loss(W, W, X, e, **small) for e in noise]).mean()
    assert drawn.item() == pytest.approx(mask_loss(W, W, X, **small).item(), rel=1e-3)
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    twice = torch.cat([X, X[:1]])[[0, 5, 2, 3, 4]]
    for loss in (
        lambda x, w: mask_loss(W, W, x, **MEMORIZE, weights=w),
        lambda x, w: sampled_loss(W, W, x, torch.zeros_like(x), **MEMORIZE, weights=w),
    ):
        assert loss(X, weights).item() == pytest.approx(loss(twice, None).item(), rel=1e-12)


def test_weight_decay_is_a_penalty() -> None:
    """One step of SGD on MSELoss with weight decay is the step on the objective, times 2 / d."""
    d, wd = 6, 0.3
    X, W = torch.randn(4, d, generator=gen(0)), torch.randn(d, 3, generator=gen(1))

    def gradient(loss: Tensor, W: Tensor) -> Tensor:
        return torch.autograd.grad(loss, W)[0]

    A = W.clone().requires_grad_()
    decayed = gradient(torch.nn.MSELoss()(torch.relu(X @ A) @ W.T, X), A) + wd * W
    B = W.clone().requires_grad_()
    ours = gradient(sampled_loss(B, W, X, X, sigma=0.0, lam=lam_from_weight_decay(wd, d)), B)
    torch.testing.assert_close(decayed, ours / d)
    A, B = W.clone().requires_grad_(), W.clone().requires_grad_()  # one parameter that is both
    decayed = gradient(torch.nn.MSELoss()(torch.relu(X @ A) @ A.T, X), A) + wd * A.detach()
    ours = gradient(sampled_loss(B, B, X, X, sigma=0.0, lam=lam_from_weight_decay(wd, d, tied=True)), B)
    torch.testing.assert_close(decayed, ours / d)
    for wrong in ((math.nan, 3), (-0.1, 3), (0.1, 0)):
        with pytest.raises(ValueError, match=r"weight_decay must be a finite number >= 0 and d at least 1, got"):
            lam_from_weight_decay(*wrong)


def test_same_seed_same_model_and_untouched_generator(five: Tensor) -> None:
    state = torch.get_rng_state()
    one, two = (train_dae(five, 8, **MEMORIZE, steps=5, seed=3, loss="sampled", batch_size=4) for _ in range(2))
    assert torch.equal(one.model.W1, two.model.W1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one.model.W1, train_dae(five, 8, **MEMORIZE, steps=5, seed=4).model.W1)


def test_span_weights_lie_in_the_span(five: Tensor) -> None:
    W = train_dae(five, 8, **MEMORIZE, steps=3).model.W1.double()
    basis = torch.linalg.svd(five.double(), full_matrices=False)[2][:4]
    torch.testing.assert_close(basis.T @ (basis @ W), W, rtol=1e-5, atol=1e-7)


def test_progress_and_history(five: Tensor) -> None:
    seen: list[tuple[int, float]] = []
    trained = train_dae(five, 4, **MEMORIZE, steps=4, on_step=lambda *at: seen.append(at))
    assert [s for s, _ in seen] == [1, 2, 3, 4]
    assert [loss for _, loss in seen] == trained.losses.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0}, "p=0"),
        ({"steps": 0}, "steps=0"),
        ({"loss": "mse"}, "'mask' or 'sampled', got 'mse'"),
        ({"optimizer": "lion"}, "one of adam, adamw, rmsprop, sgd, got 'lion'"),
        ({"sigma": -1.0}, "sigma must be a positive number"),
        ({"weights": torch.ones(3)}, "weights must be 5 finite numbers"),
    ],
)
def test_bad_input_is_refused_with_the_reason(five: Tensor, options: dict, message: str) -> None:
    arguments = {"p": 8, "steps": 2, **MEMORIZE, **options}
    with pytest.raises(ValueError, match=message):
        train_dae(five, **arguments)


def test_divergence_is_an_error(five: Tensor) -> None:
    with pytest.raises(FloatingPointError, match="lower lr"):
        train_dae(five, 8, **MEMORIZE, optimizer="sgd", lr=100.0, steps=50)
