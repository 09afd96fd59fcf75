"""Thresholds, evaluation, comparison, calibration: guarantees by simulation, conventions by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from balanced_rep import detection
from balanced_rep.detection import Detector, Scores, calibrate, compare, evaluate, least_calibration_size, threshold
from balanced_rep.detection._intervals import area_under_curve, binomial_interval
from balanced_rep.models import Tap, digits, digits_data

F64 = torch.float64


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("fpr", "n"), [(0.1, 29), (0.05, 59), (0.03, 99), (0.01, 299), (0.001, 2995)])
def test_least_calibration_size(fpr: float, n: int) -> None:
    assert least_calibration_size(fpr, 0.95) == n


@pytest.mark.parametrize(("n", "k"), [(299, 1), (500, 2), (2000, 13), (10000, 84)])
def test_rank_of_the_threshold(n: int, k: int) -> None:
    scores = torch.arange(n, dtype=F64)
    found = threshold(scores, direction="high")
    assert (found.rank, found.value, found.n) == (k, n - k, n)
    assert threshold(scores, direction="low").value == k - 1


@pytest.mark.parametrize(("fpr", "confidence"), [(0.2, 0.36), (0.7, 0.91), (0.1, 0.95)])
def test_the_least_number_gives_a_threshold_at_the_largest_score(fpr: float, confidence: float) -> None:
    n = least_calibration_size(fpr, confidence)  # (1 - fpr)^n equals 1 - confidence but for rounding in the first two
    found = threshold(torch.arange(n, dtype=F64), direction="high", fpr=fpr, confidence=confidence)
    assert (found.rank, found.value) == (1, n - 1)


@pytest.mark.parametrize(("n", "fpr", "delta"), [(500, 0.01, 0.05), (300, 0.05, 0.1), (59, 0.05, 0.05)])
def test_the_guarantee_holds(n: int, fpr: float, delta: float) -> None:
    """Over 2000 calibrations the true rate is above fpr no more often than delta, within its 99.9 % binomial band."""
    scores = torch.rand(2000, n, dtype=F64, generator=gen(n))
    limits = torch.tensor([threshold(row, direction="high", fpr=fpr, confidence=1 - delta).value for row in scores])
    rates = 1 - limits  # of a uniform score
    violations = int((rates > fpr).sum())
    assert violations <= binom.ppf(0.999, 2000, delta)
    k = threshold(scores[0], direction="high", fpr=fpr, confidence=1 - delta).rank
    assert rates.mean().item() == pytest.approx(k / (n + 1), rel=0.1)
    naive = (1 - torch.quantile(scores, 1 - fpr, dim=1) > fpr).double().mean()
    assert naive > 4 * delta  # what the plain quantile does with the same data


def test_ties_only_make_the_threshold_safer() -> None:
    scores = torch.randint(0, 5, (500, 300), generator=gen(1)).double()
    limits = torch.tensor([threshold(row, direction="high", fpr=0.25).value for row in scores])
    assert bool(((4 - limits) / 5 <= 0.25).double().mean() >= 0.95)


def test_groups_count_once() -> None:
    scores = torch.cat([torch.arange(299.0), torch.full((5,), 1000.0)])
    groups = torch.cat([torch.arange(299), torch.full((5,), 298)])
    found = threshold(scores, direction="high", groups=groups)
    assert (found.n, found.value) == (299, 1000.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: threshold(torch.rand(298), direction="high"), "needs at least 299 calibration samples .* got 298"),
        (
            lambda: threshold(torch.rand(600), direction="high", groups=torch.arange(600) // 3),
            "at least 299 calibration groups of samples .* got 200",
        ),
        (lambda: threshold(torch.ones(300), direction="high"), "all 300 calibration scores are 1"),
        (lambda: threshold(torch.full((300,), torch.nan), direction="high"), "300 of 300 calibration scores are not"),
        (lambda: threshold(torch.rand(300), direction="up"), "'high' or 'low', got 'up'"),
        (lambda: threshold(torch.rand(300), direction="high", fpr=0.0), "between 0 and 1, got 0.0"),
    ],
)
def test_a_threshold_that_cannot_be_had(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Evaluation -----------------------------------------------------------------------------------------------------------


def case(seed: int, n: int = 60, ties: bool = True) -> tuple[Tensor, Tensor]:
    labels = torch.rand(n, generator=gen(seed)) < 0.4
    scores = torch.randn(n, generator=gen(seed + 1)) + labels
    return (scores * 4).round() if ties else scores, labels


@pytest.mark.parametrize("seed", range(5))
def test_auc_and_rates_against_scikit_learn(seed: int) -> None:
    scores, labels = case(seed)
    got = evaluate(scores, labels, direction="high", fprs=(0.1,))
    assert got.auc == pytest.approx(roc_auc_score(labels, scores))
    assert evaluate(-scores, labels, direction="low").auc == got.auc
    fprs, tprs, _ = roc_curve(labels, scores, drop_intermediate=False)
    rate = got.rates[0]
    assert rate.at_most == pytest.approx(tprs[fprs <= 0.1][-1])
    assert rate.at_most_fpr == pytest.approx(fprs[fprs <= 0.1][-1])
    assert rate.nearest == pytest.approx(tprs[np.abs(fprs - 0.1).argmin()])
    negative = scores[~labels].numpy()
    assert rate.quantile == pytest.approx((scores[labels].numpy() >= np.quantile(negative, 0.9)).mean())
    assert rate.low <= rate.at_most <= rate.high
    assert got.low <= got.auc <= got.high


def test_conventions_differ_and_none_is_hidden() -> None:
    """50 negatives: no false-positive rate between 0 and 2 %, so that one percent cannot be had."""
    scores, labels = torch.cat([torch.arange(50.0), torch.tensor([60.0, 48.5])]), torch.tensor([0] * 50 + [1] * 2)
    rate = evaluate(scores, labels, direction="high", fprs=(0.01,)).rates[0]
    assert math.isnan(rate.at_most)
    assert (rate.nearest, rate.nearest_fpr) == (0.0, 0.0)  # a rate of 0 is as near as 2 %, and nothing is found
    assert rate.quantile == 0.5


def test_a_direction_is_never_turned() -> None:
    scores, labels = case(3, 200, ties=False)
    assert evaluate(-scores, labels, direction="high").auc == pytest.approx(
        1 - evaluate(scores, labels, direction="high").auc
    )
    result = Scores(scores.double(), ("ok",) * 200, "x", "low")
    assert evaluate(result, labels).auc < 0.5
    with pytest.raises(ValueError, match="declares 'low' as suspicious; it is not turned to 'high'"):
        evaluate(result, labels, direction="high")
    noise = [evaluate(torch.rand(50, generator=gen(s)), labels[:50], direction="high").auc for s in range(200)]
    assert np.mean(noise) == pytest.approx(0.5, abs=0.02)  # with turning it would be 0.55


def test_failed_samples_are_counted_and_left_out() -> None:
    scores, labels = case(1)
    broken = Scores(
        torch.where(torch.arange(60) == 5, torch.nan, scores.double()),
        ("ok",) * 5 + ("bad",) + ("ok",) * 54,
        "x",
        "high",
    )
    got = evaluate(broken, labels)
    keep = torch.arange(60) != 5
    assert got.n_failed == 1
    assert got.auc == evaluate(scores[keep], labels[keep], direction="high").auc


def test_intervals_with_near_duplicates_are_wider() -> None:
    scores, labels = case(0, 40, ties=False)
    many, groups = scores.repeat_interleave(10), torch.arange(40).repeat_interleave(10)
    naive = evaluate(many, labels.repeat_interleave(10), direction="high")
    honest = evaluate(many, labels.repeat_interleave(10), direction="high", groups=groups, n_boot=300)
    assert naive.auc == pytest.approx(honest.auc)
    assert honest.high - honest.low > 2 * (naive.high - naive.low)
    assert (honest.n_groups, honest.interval) == (40, "cluster bootstrap")
    perfect = evaluate(
        labels.double().repeat_interleave(10), labels.repeat_interleave(10), direction="high", groups=groups
    )
    assert (perfect.auc, perfect.interval) == (1.0, "inversion")
    assert perfect.low < 0.95
    rates = perfect.rates[0]
    assert (rates.low, rates.high) == binomial_interval(int(labels.sum()), int(labels.sum()))


def test_comparison_is_paired() -> None:
    scores, labels = case(2, 300, ties=False)
    shared = scores + 0.05 * torch.randn(300, generator=gen(9))
    same = compare(scores, shared, labels, directions=("high", "high"), n_boot=300)
    assert not same.distinguishable
    assert same.high - same.low < 0.05
    worse = compare(scores, torch.rand(300, generator=gen(8)), labels, directions=("high", "high"), n_boot=300)
    assert worse.distinguishable
    assert worse.low <= worse.difference <= worse.high


@pytest.mark.parametrize(
    ("scores", "labels", "direction", "message"),
    [
        (torch.rand(4), torch.ones(4), "high", "both classes are needed, got 4 memorized and 0 other"),
        (torch.ones(4), torch.tensor([0, 1, 0, 1]), "high", "all 4 scores are 1: nothing to judge"),
        (torch.rand(4), torch.tensor([0, 1, 0, 1]), None, "declare direction"),
        (torch.rand(4), torch.tensor([0, 1, 0]), "high", "labels must be 4 times 0 or 1"),
        (torch.rand(4), torch.tensor([0, 1, 2, 1]), "high", "0 or 1"),
        (torch.rand(2, 4), torch.tensor([0, 1, 0, 1]), "high", r"got shape \(2, 4\); choose layer and sigma"),
    ],
)
def test_what_cannot_be_judged(scores: Tensor, labels: Tensor, direction, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(scores, labels, direction=direction)


def test_small_functions() -> None:
    assert area_under_curve(torch.tensor([1.0, 2.0]), torch.tensor([1.0])) == 0.75
    assert math.isnan(area_under_curve(torch.empty(0), torch.ones(1)))
    low, high = binomial_interval(480, 500)
    assert (round(low, 3), round(high, 3)) == (0.939, 0.975)
    assert binomial_interval(0, 0) == (0.0, 1.0)


# Calibration ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled() -> tuple[Tensor, Tensor]:
    data = digits_data()
    x = torch.cat([data.repeated, data.held_out, data.ordinary[:300]])
    return x, torch.tensor([1] * 20 + [0] * 697)


def test_calibrated_detector_on_the_digits(labelled: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x, labels = labelled
    D = digits()
    found = calibrate("representation_std", D, x, labels, sigmas=(0.05, 0.1, 0.2, 0.4))
    assert found.held_out.auc >= 0.98
    assert found.selection.shape == (6, 4)
    assert (found.held_out.n_positive, found.held_out.n_negative) == (10, 349)
    assert found.detector.threshold.n == 349
    found.detector.save(tmp_path / "detector.json")
    loaded = Detector.load(tmp_path / "detector.json")
    assert loaded == found.detector
    flags = loaded(D, x)
    assert flags.flagged[:20].double().mean() >= 0.85
    assert flags.flagged[20:].double().mean() < 0.02
    again = loaded(D, x, batch_size=7)
    assert torch.equal(again.flagged, flags.flagged)


def test_a_score_with_one_sigma_per_call_and_its_own_direction(labelled: tuple[Tensor, Tensor]) -> None:
    x, labels = labelled
    found = calibrate("flipd", digits(), x, labels, sigmas=(0.1, 0.4), choose_direction=False, fpr=0.05, confidence=0.9)
    assert found.detector.direction == "low"
    assert (found.selection.shape, found.layers) == ((1, 2), (None,))
    assert found.held_out.auc > 0.9
    assert found.detector(digits(), x).flagged[:20].any()


def test_calibration_needs_enough_negatives_before_it_runs(labelled: tuple[Tensor, Tensor], toy) -> None:
    x, labels = labelled
    with pytest.raises(ValueError, match=r"needs 299 independent samples .* got 199; give about 598 in all"):
        calibrate("representation_std", toy, x[:418], labels[:418], sigmas=(0.1,))
    assert toy.calls == 0
    groups = torch.arange(len(x)) // 5
    with pytest.raises(ValueError, match=r"needs 299 independent samples .* got 70"):
        calibrate("representation_std", toy, x, labels, groups=groups)
    with pytest.raises(ValueError, match="selection_share must be between"):
        calibrate("representation_std", toy, x, labels, selection_share=1.0)


def test_the_direction_is_chosen_on_one_part_and_not_on_the_other(labelled: tuple[Tensor, Tensor]) -> None:
    """At the residual stream of the second block a low score is suspicious."""
    x, labels = labelled
    found = calibrate("representation_std", digits(), x, labels, sigmas=(0.1,), layers=("net.blocks.1",))
    assert found.detector.direction == "low"
    assert found.held_out.auc > 0.95
    kept = calibrate(
        "representation_std", digits(), x, labels, sigmas=(0.1,), layers=("net.blocks.1",), choose_direction=False
    )
    assert kept.detector.direction == "high"
    assert kept.held_out.auc < 0.1


class Overflowing(nn.Module):
    """Two representations: one never finite, one the sample itself."""

    data_range, sigma_range, sample_shape, null_condition = (-99.0, 99.0), (0.01, 1.0), (4,), None
    layers = {"good": Tap("the sample"), "bad": Tap("infinite")}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad = nn.Identity(), nn.Identity()

    def forward(self, y: Tensor, sigma: float | Tensor, cond: None = None) -> Tensor:
        h = self.good(y)
        self.bad(torch.full_like(h, torch.inf))
        return h


def test_a_layer_that_overflows_is_not_chosen_and_spoils_no_other() -> None:
    x, labels = torch.randn(150, 4, generator=gen(0)), torch.tensor([1] * 30 + [0] * 120)
    x[:30] *= 4
    table = detection.get("representation_std")(Overflowing(), x, sigma=[0.1, 0.2])
    assert table.values.isfinite().all(dim=2).tolist() == [[True, True], [False, False]]
    assert set(table.status) == {"activation of bad is not finite"}
    assert set(table.at(0, 1).status) == {"ok"}
    assert (table.at(0, 1).layers, table.at(0, 1).sigmas) == (("good",), (0.2,))
    found = calibrate("representation_std", Overflowing(), x, labels, sigmas=(0.1, 0.2), fpr=0.05, confidence=0.9)
    assert (found.detector.layer, found.held_out.n_failed) == ("good", 0)
    assert found.selection.isnan().tolist() == [[False, False], [True, True]]
    row = detection.table1(Overflowing(), x[:30], x[30:], sigma=0.1, methods=["representation_std"]).rows[0]
    assert (row.setting, row.evaluation.n_failed) == ("good, sigma 0.1, high", 0)
    with pytest.raises(ValueError, match=r"has scores of one class only.*activation of bad is not finite"):
        calibrate(
            "representation_std", Overflowing(), x, labels, layers=["bad"], sigmas=[0.1], fpr=0.05, confidence=0.9
        )
    with pytest.raises(ValueError, match="flipd: no noise level is given"):
        calibrate("flipd", Overflowing(), x, labels, sigmas=[], fpr=0.05, confidence=0.9)
    with pytest.raises(ValueError, match=r"150 samples and labels \(149,\); one each is needed"):
        calibrate("representation_std", Overflowing(), x, labels[1:], sigmas=[0.1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"threshold": {**vars(threshold(torch.arange(300.0), direction="high")), "value": math.nan}},
            "threshold is nan",
        ),
        ({"sigma": math.nan}, "its sigma is nan, which flags nothing"),
        ({"format": "other"}, "its format is not"),
        ({"score": "nothing"}, "no score 'nothing'"),
        ({"direction": "up"}, "direction is 'up'"),
        ({"extra": 1}, "extra"),
        ({"threshold": {"value": 1.0}}, "threshold|missing"),
    ],
)
def test_a_file_that_is_no_detector(tmp_path: Path, change: dict, message: str) -> None:
    limit = threshold(torch.rand(300, generator=gen(0)), direction="high")
    Detector("denoising_error", {}, None, 0.1, "low", limit).save(tmp_path / "d.json")
    about = json.loads((tmp_path / "d.json").read_text())
    (tmp_path / "d.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(ValueError, match=message):
        Detector.load(tmp_path / "d.json")
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(ValueError, match="not a detector"):
        Detector.load(tmp_path / "d.json")


def test_every_score_is_registered_once() -> None:
    assert len(set(detection.names())) == len(detection.names()) == 11
