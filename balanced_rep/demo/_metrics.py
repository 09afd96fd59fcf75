"""How well a score tells two groups apart, and how sure one can be of that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from balanced_rep.detection._intervals import auc_interval, auc_standard_error

__all__ = ["Detection", "detect"]


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
