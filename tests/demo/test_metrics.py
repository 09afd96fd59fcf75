"""AUC, its uncertainty, and the true positive rate, against hand-made cases and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from balanced_rep.demo._metrics import detect
from balanced_rep.detection._intervals import auc_interval, auc_standard_error


def test_detect_by_hand() -> None:
    # Of the five negatives 0.25 beats two, 3.0 beats four and ties with one, 9.0 beats all.
    got = detect(torch.tensor([0.25, 3.0, 9.0]), torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0]))
    assert got.auc == pytest.approx((2 + 4.5 + 5) / 15)
    assert (got.n_positive, got.n_negative) == (3, 5)
    assert got.tpr_at_1_percent_fpr == pytest.approx(2 / 3)  # the threshold is 0.96 of the way from 1 to 3: 2.92


def test_tpr_counts_positives_on_the_threshold() -> None:
    negative = torch.arange(101.0)  # its 99 % quantile is 99
    assert detect(torch.tensor([99.0, 98.9]), negative).tpr_at_1_percent_fpr == 0.5


def test_standard_error_agrees_with_simulation() -> None:
    rng = np.random.default_rng(0)
    n_positive, n_negative = 20, 397
    # Exponential scores, the model behind the formula: P(positive > negative) = m / (m + 1).
    for mean in (1.0, 3.0, 19.0):
        positive = mean * rng.exponential(size=(4000, n_positive, 1))
        negative = rng.exponential(size=(4000, 1, n_negative))
        found = np.array([(p > n).mean() for p, n in zip(positive, negative, strict=True)])
        auc = mean / (mean + 1)
        assert found.mean() == pytest.approx(auc, abs=0.005)
        assert auc_standard_error(auc, n_positive, n_negative) == pytest.approx(found.std(), rel=0.06)


@pytest.mark.parametrize("auc", [0.0, 1e-4, 0.3, 0.5, 0.9, 0.9997, 1.0])
def test_interval_contains_the_auc_and_its_ends_are_two_standard_errors_away(auc: float) -> None:
    low, high = auc_interval(auc, 20, 397)
    assert 0 <= low <= auc <= high <= 1
    assert high - low > 0.01
    for end in {low, high} - {0.0, 1.0}:
        assert abs(auc - end) == pytest.approx(1.96 * auc_standard_error(end, 20, 397), rel=1e-4)


@pytest.mark.parametrize("auc", [0.5, 0.8, 1.0])
def test_turning_the_sign_of_the_score_mirrors_the_interval(auc: float) -> None:
    low, high = auc_interval(auc, 20, 397)
    assert auc_interval(1 - auc, 20, 397) == pytest.approx((1 - high, 1 - low))


def test_interval_at_a_perfect_auc_depends_on_the_number_of_positives() -> None:
    lows = [auc_interval(1.0, n, 397)[0] for n in (5, 20, 500)]
    assert lows == sorted(lows)
    assert lows[1] == pytest.approx(0.908, abs=0.01)
    assert auc_standard_error(1.0, 20, 397) == 0
