"""How well a score finds memorized samples: AUC and true-positive rates with intervals, and comparison of two scores.

The direction of a score is declared before labels are seen and never turned afterwards: an AUC below one half is
reported as it is. Near-duplicates are not independent; with `groups` they are resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from balanced_rep.detection._intervals import area_under_curve, auc_interval, binomial_interval, group_numbers
from balanced_rep.detection._score import OK, Scores
from balanced_rep.models._checks import check_counts

__all__ = ["Comparison", "Evaluation", "RateAt", "compare", "evaluate"]


@dataclass(frozen=True)
class RateAt:
    """True-positive rates at a false-positive rate, by the three conventions of the literature.

    With few negatives they differ, and only the first keeps the rate on these data; none keeps it on others, for which
    there is :func:`threshold`.

    Attributes:
        fpr: The rate asked for.
        at_most: Largest true-positive rate at a threshold with a false-positive rate of at most ``fpr``; NaN with fewer
            than 1 / fpr negatives.
        at_most_fpr: The false-positive rate of that threshold.
        low: Lower end of the interval of ``at_most`` (Clopper and Pearson, threshold taken as given, as many trials as
            there are groups of memorized samples),
        high: and its upper end.
        quantile: Share of positives at or above the (1 - fpr) quantile of the negatives, linearly interpolated: the
            convention of the paper.
        nearest: True-positive rate where the false-positive rate is nearest to ``fpr``, be it above.
        nearest_fpr: That false-positive rate.
    """

    fpr: float
    at_most: float
    at_most_fpr: float
    low: float
    high: float
    quantile: float
    nearest: float
    nearest_fpr: float


@dataclass(frozen=True)
class Evaluation:
    """What a score achieves on labelled samples.

    Attributes:
        auc: Probability that a memorized sample is more suspicious than another one, ties counted half.
        low: Lower end of its interval,
        high: and its upper end.
        interval: How the interval was found: "inversion" (Hanley and McNeil's variance, inverted) or "cluster
            bootstrap".
        rates: True-positive rates.
        n_positive: Memorized samples with a score.
        n_negative: Others with a score.
        n_groups: Independent groups among them.
        n_failed: Samples without a score, left out.
        confidence: Of the intervals.
    """

    auc: float
    low: float
    high: float
    interval: str
    rates: tuple[RateAt, ...]
    n_positive: int
    n_negative: int
    n_groups: int
    n_failed: int
    confidence: float


@dataclass(frozen=True)
class Comparison:
    """Difference of two AUCs on the same samples.

    Attributes:
        difference: AUC of the first less AUC of the second.
        low: Lower end of its interval (bootstrap over groups, both scores on the same draws),
        high: and its upper end.
        distinguishable: Whether the interval leaves out 0.
        n_groups: Independent groups.
    """

    difference: float
    low: float
    high: float
    distinguishable: bool
    n_groups: int


def evaluate(
    scores: Scores | Tensor,
    labels: Tensor,
    *,
    direction: str | None = None,
    groups: Tensor | None = None,
    fprs: Sequence[float] = (0.01,),
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Judges one score.

    Args:
        scores: One score per sample, `(n,)`: a result of a score, or a tensor.
        labels: Whether each sample is memorized, `(n,)` bool or 0 and 1.
        direction: Of a tensor of scores, "high" or "low"; a result of a score brings its own.
        groups: Near-duplicates share a number, `(n,)`.
        fprs: False-positive rates.
        confidence: Of the intervals.
        n_boot: Bootstrap draws, with groups.
        seed: Of the bootstrap.

    Returns:
        AUC and rates.

    Raises:
        ValueError: If there is only one class, all scores are equal, no direction is declared, shapes differ, or a
            number is out of range.
        TypeError: If `fprs` is no sequence.

    Example:
        >>> import torch
        >>> found = evaluate(torch.tensor([0.1, 0.4, 0.3, 0.9]), torch.tensor([0, 0, 1, 1]), direction="high")
        >>> found.auc
        0.75
    """
    _check_options("evaluate", confidence, n_boot)
    if not isinstance(fprs, Iterable):
        raise TypeError(f"evaluate: fprs must be a sequence of false-positive rates, such as (0.01,), got {fprs!r}.")
    values, positive, kept, declared = _read("evaluate", scores, labels, direction)
    sign = 1.0 if declared == "high" else -1.0
    pos, neg = sign * values[positive & kept], sign * values[~positive & kept]
    auc = area_under_curve(pos, neg)
    index = group_numbers("evaluate", groups, len(values))[kept]
    n_groups = len(index.unique())
    if groups is None:
        low, high = auc_interval(auc, len(pos), len(neg), _normal_quantile(confidence))
        how = "inversion"
    else:
        draws = _bootstrap([sign * values[kept]], positive[kept], index, n_boot, seed)[0]
        low, high = _percentiles(draws, confidence)
        how = "cluster bootstrap"
        if low == high:  # a perfect score: the bootstrap says nothing, the formula on groups does
            classes = [len(index[side].unique()) for side in (positive[kept], ~positive[kept])]
            low, high = auc_interval(auc, classes[0], classes[1], _normal_quantile(confidence))
            how = "inversion"
    independent = len(index[positive[kept]].unique())
    rates = tuple(_rate_at(pos, neg, fpr, confidence, independent) for fpr in map(float, fprs))
    failed = int((~kept).sum())
    return Evaluation(auc, low, high, how, rates, len(pos), len(neg), n_groups, failed, confidence)


def compare(
    first: Scores | Tensor,
    second: Scores | Tensor,
    labels: Tensor,
    *,
    directions: tuple[str | None, str | None] = (None, None),
    groups: Tensor | None = None,
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compares two scores on the same samples.

    Args:
        first: Scores, `(n,)`.
        second: Scores of the same samples, `(n,)`.
        labels: Whether each sample is memorized, `(n,)`.
        directions: Of tensors of scores.
        groups: Near-duplicates share a number, `(n,)`.
        confidence: Of the interval.
        n_boot: Bootstrap draws.
        seed: Of the bootstrap.

    Returns:
        The difference of the AUCs, over samples that both could score.

    Raises:
        ValueError: As `evaluate` raises it, for the samples that both could score.
    """
    _check_options("compare", confidence, n_boot)
    read = [_read("compare", s, labels, d) for s, d in zip((first, second), directions, strict=True)]
    kept = read[0][2] & read[1][2]
    positive = read[0][1][kept]
    if not positive.any() or positive.all():
        raise ValueError(
            f"compare: both classes are needed, got {int(positive.sum())} memorized and {int((~positive).sum())} other "
            "samples that both could score."
        )
    values = [(1.0 if d == "high" else -1.0) * v[kept] for v, _, _, d in read]
    index = group_numbers("compare", groups, len(kept))[kept]
    draws = _bootstrap(values, positive, index, n_boot, seed)
    difference = area_under_curve(values[0][positive], values[0][~positive]) - area_under_curve(
        values[1][positive], values[1][~positive]
    )
    low, high = _percentiles(draws[0] - draws[1], confidence)
    return Comparison(difference, low, high, not low <= 0 <= high, len(index.unique()))


def _check_options(what: str, confidence: float, n_boot: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"{what}: confidence must be between 0 and 1, got {confidence}.")
    check_counts(what, n_boot=n_boot)


def _read(
    what: str, scores: Scores | Tensor, labels: Tensor, direction: str | None
) -> tuple[Tensor, Tensor, Tensor, str]:
    """Values, labels, which count, and the direction."""
    if isinstance(scores, Scores):
        if direction not in (None, scores.direction):
            raise ValueError(
                f"{what}: {scores.name} declares {scores.direction!r} as suspicious; it is not turned to {direction!r}."
            )
        values, kept, direction = scores.values, scores.ok, scores.direction
    else:
        values = torch.as_tensor(scores).detach().double().cpu()
        kept = values.isfinite()
    if direction not in ("high", "low"):
        raise ValueError(f"{what}: declare direction='high' or 'low': which scores are suspicious; got {direction!r}.")
    if values.ndim != 1:
        raise ValueError(
            f"{what}: one score per sample is needed, got shape {tuple(values.shape)}; choose layer and sigma."
        )
    labels = torch.as_tensor(labels).cpu()
    if labels.shape != values.shape or not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(
            f"{what}: labels must be {len(values)} times 0 or 1, got {tuple(labels.shape)} {labels.dtype}."
        )
    positive = labels.bool()
    n_positive, n_negative = int((positive & kept).sum()), int((~positive & kept).sum())
    if not n_positive or not n_negative:
        failed = [s for s in scores.status if s != OK] if isinstance(scores, Scores) else []
        why = f" The first status: {failed[0]}." if failed else ""
        raise ValueError(
            f"{what}: both classes are needed, got {n_positive} memorized and {n_negative} other samples with a score."
            f"{why}"
        )
    if bool((values[kept] == values[kept][0]).all()):
        raise ValueError(f"{what}: all {int(kept.sum())} scores are {values[kept][0].item():g}: nothing to judge.")
    return values, positive, kept, direction


def _rate_at(pos: Tensor, neg: Tensor, fpr: float, confidence: float, n_groups: int) -> RateAt:
    """Rates at thresholds "score >= t"; t runs over the scores, and one above them all. Groups are independent."""
    if not 0 < fpr < 1:
        raise ValueError(f"evaluate: a false-positive rate must be between 0 and 1, got {fpr}.")
    thresholds = torch.cat([pos, neg]).unique().flip(0)
    thresholds = torch.cat([torch.tensor([math.inf], dtype=thresholds.dtype), thresholds])
    fprs = 1 - torch.searchsorted(neg.sort().values, thresholds).double() / len(neg)
    tprs = 1 - torch.searchsorted(pos.sort().values, thresholds).double() / len(pos)
    allowed = fprs <= fpr + 1e-12
    at_most, at_most_fpr = float(tprs[allowed][-1]), float(fprs[allowed][-1])
    low, high = binomial_interval(round(at_most * n_groups), n_groups, confidence)
    if len(neg) * fpr < 1 - 1e-9:  # no threshold has a rate between 0 and the one asked for
        at_most = low = high = math.nan
    quantile = float((pos >= torch.quantile(neg, 1 - fpr)).double().mean())
    near = int((fprs - fpr).abs().argmin())
    return RateAt(fpr, at_most, at_most_fpr, low, high, quantile, float(tprs[near]), float(fprs[near]))


def _bootstrap(values: list[Tensor], positive: Tensor, index: Tensor, n_boot: int, seed: int) -> Tensor:
    """AUC of each score on resampled groups, (scores, draws); groups of one class are drawn among themselves."""
    _, index = index.unique(return_inverse=True)
    n_groups = int(index.max()) + 1
    has_positive = torch.zeros(n_groups, dtype=torch.bool).index_fill_(0, index[positive], True)
    strata = [s for s in (has_positive.nonzero().flatten(), (~has_positive).nonzero().flatten()) if len(s)]
    generator = torch.Generator().manual_seed(seed)
    found = torch.full((len(values), n_boot), torch.nan, dtype=torch.float64)
    for b in range(n_boot):
        picked = torch.cat([s[torch.randint(len(s), (len(s),), generator=generator)] for s in strata])
        weight = torch.bincount(picked, minlength=n_groups)[index]
        for i, v in enumerate(values):
            found[i, b] = area_under_curve(
                v[positive].repeat_interleave(weight[positive]), v[~positive].repeat_interleave(weight[~positive])
            )
    return found


def _percentiles(draws: Tensor, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = torch.nanquantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return low, high


def _normal_quantile(confidence: float) -> float:
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(confidence, dtype=torch.float64)))
