"""How well a score tells two groups apart, and how sure one can be of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["Detection", "auc_interval", "auc_standard_error", "detect"]

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Detection:
    """What a score achieves.

    Attributes:
        auc: Probability that a positive scores higher than a negative, ties counted half.
        standard_error: Of the AUC (Hanley & McNeil 1982). It is 0 at an AUC of 0 or 1, where it means nothing: see
            `low` and `high`.
        low: Lower end of the 95 % interval of the AUC, see `auc_interval`.
        high: Its upper end.
        tpr_at_1_percent_fpr: Share of the positives at or above the 99 % quantile of the negatives (linear
            interpolation between order statistics).
        n_positive: Number of positives.
        n_negative: Number of negatives.
    """

    auc: float
    standard_error: float
    low: float
    high: float
    tpr_at_1_percent_fpr: float
    n_positive: int
    n_negative: int


def detect(positive: Tensor, negative: Tensor) -> Detection:
    """Measures how well a score separates two groups. Needs scikit-learn.

    Args:
        positive: Scores of those that should score high, `(n_positive,)`.
        negative: Scores of the others, `(n_negative,)`.

    Returns:
        AUC with its uncertainty, and the true positive rate at 1 % false positives.
    """
    from sklearn.metrics import roc_auc_score

    pos, neg = positive.double().cpu().numpy(), negative.double().cpu().numpy()
    labels = np.repeat([1, 0], [len(pos), len(neg)])
    auc = float(roc_auc_score(labels, np.concatenate([pos, neg])))
    low, high = auc_interval(auc, len(pos), len(neg))
    threshold = np.quantile(neg, 0.99)
    return Detection(
        auc=auc,
        standard_error=auc_standard_error(auc, len(pos), len(neg)),
        low=low,
        high=high,
        tpr_at_1_percent_fpr=float((pos >= threshold).mean()),
        n_positive=len(pos),
        n_negative=len(neg),
    )


def auc_standard_error(auc: float, n_positive: int, n_negative: int) -> float:
    """Standard error of an AUC after Hanley & McNeil (1982).

    `var = [A (1 - A) + (n_positive - 1) (Q1 - A^2) + (n_negative - 1) (Q2 - A^2)] / (n_positive n_negative)` with
    `Q1 = A / (2 - A)` and `Q2 = 2 A^2 / (1 + A)`. For A below 1/2 it is computed for `1 - A`, the AUC of the score with
    its sign turned, so that turning the sign never changes how sure one is.

    Args:
        auc: A, in [0, 1].
        n_positive: Number of positives.
        n_negative: Number of negatives.

    Returns:
        The standard error.
    """
    auc = max(auc, 1 - auc)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    total = auc * (1 - auc) + (n_positive - 1) * (q1 - auc**2) + (n_negative - 1) * (q2 - auc**2)
    return math.sqrt(max(0.0, total) / (n_positive * n_negative))


def auc_interval(auc: float, n_positive: int, n_negative: int, z: float = Z95) -> tuple[float, float]:
    """Interval of an AUC by inversion: every A that `auc` is at most `z` standard errors *of A* away from.

    Unlike `auc +- z se` it stays inside [0, 1] and does not shrink to a point at an AUC of 1.

    Args:
        auc: The AUC found.
        n_positive: Number of positives.
        n_negative: Number of negatives.
        z: Normal quantile; default for 95 %.

    Returns:
        Lower and upper end.
    """

    def too_far(a: float) -> bool:
        return abs(auc - a) > z * auc_standard_error(a, n_positive, n_negative)

    return _edge(too_far, 0.0, auc), _edge(too_far, 1.0, auc)


def _edge(outside: Callable[[float], bool], far: float, near: float) -> float:
    """Bisects between `far`, outside unless it equals `near`, and `near`, inside."""
    if far == near or not outside(far):
        return far
    for _ in range(60):
        middle = (far + near) / 2
        far, near = (middle, near) if outside(middle) else (far, middle)
    return near
