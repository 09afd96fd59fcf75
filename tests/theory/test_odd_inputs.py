"""Inputs that were once passed over, or ended in an error of torch: each is refused, and says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from balanced_rep import theory

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
W, EYE = torch.ones(4, 2), torch.eye(4)
SCALES: dict[str, Any] = {"sigma": 0.2, "lam": 0.01}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: theory.separability(X.numpy()), TypeError, "X must be a tensor .*, got ndarray"),
        (lambda: theory.separable_subset(X, 3, trials=0), ValueError, "trials must be at least 1"),
        (lambda: theory.closed_form(X, p=[1, 1, 1, 1, 1.5], **SCALES), ValueError, "p must be a whole number, or one"),
        (lambda: theory.closed_form(X, p=2.5, **SCALES), ValueError, "p must be a whole number, or one for each of"),
        (lambda: theory.memorization_threshold(X, lam=-1.0, n=5), ValueError, "lam must be a finite number >= 0"),
        (lambda: theory.memorization_threshold(X, lam=0.1, n=0), ValueError, "n must be at least 1"),
        (lambda: theory.population_loss(W, torch.ones(4, 1), sigma=0.1), ValueError, r"S must be \(4, 4\), as W is"),
        (lambda: theory.population_loss(W, EYE, sigma=-1.0), ValueError, "sigma must be a positive number"),
        (lambda: theory.train_dae(X, 4, lr=0.0, **SCALES), ValueError, "lr must be positive and finite, got 0.0"),
        (lambda: theory.train_dae(X, 4, n_draws=2, **SCALES), ValueError, "loss='mask' draws no noise"),
        (lambda: theory.merge_parallel_columns(W, dead=2.0), ValueError, "dead must be from 0 to below 1"),
        (lambda: theory.geometric_levels(-0.1, 1.0, 3), ValueError, "need 0 < low <= high"),
        (lambda: theory.geometric_levels(0.1, 1.0, 0), ValueError, "need 0 < low <= high, both finite, and n >= 1"),
        (lambda: theory.GaussianDenoiser(torch.zeros(4), -EYE), ValueError, "symmetric and positive semidefinite"),
        (
            lambda: theory.GaussianDenoiser(torch.zeros(2), torch.tensor([[1.0, 5.0], [0.0, 1.0]])),
            ValueError,
            "symmetric and positive semidefinite",
        ),
        (lambda: theory.GaussianDenoiser(torch.zeros(4), math.nan * EYE), ValueError, "must be finite"),
        (lambda: theory.GaussianDenoiser(torch.zeros(4), EYE)(torch.ones(2, 1), 0.1), ValueError, r"got \(2, 1\)"),
        (
            lambda: theory.GaussianDenoiser(torch.zeros(4), EYE)(torch.ones(2, 4).double(), 0.1),
            ValueError,
            "Samples are torch.float64",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_the_reason(call: Callable[[], Any], error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_labels_as_a_list_and_numbers_of_units_as_a_tensor() -> None:
    labels = [0, 0, 1, 1, 1]
    found = theory.closed_form(X, labels, p=torch.tensor([1, 2]), **SCALES)  # pyright: ignore[reportArgumentType]
    assert torch.equal(found.W, theory.closed_form(X, torch.tensor(labels), p=[1, 2], **SCALES).W)


def test_no_sample_is_stored_in_a_dead_network() -> None:
    columns = theory.merge_parallel_columns(torch.zeros(6, 4))
    match = theory.match_columns(columns, X)
    assert match.column.tolist() == [-1] * 5
    assert match.cosine.isnan().all()


def test_numbers_of_numpy_are_taken() -> None:
    """Found once: only int was a number of units, all else was taken for one number for each cluster."""
    want = theory.optimal_allocation(X, None, **SCALES, p=3)
    assert torch.equal(theory.optimal_allocation(X, None, **SCALES, p=np.int64(3)), want)
