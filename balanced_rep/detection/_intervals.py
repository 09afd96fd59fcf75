"""How well a score tells two groups apart, and how sure one can be of that."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["area_under_curve", "auc_interval", "auc_standard_error", "binomial_interval", "group_numbers"]

Z95 = 1.959963984540054


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive scores higher than a negative, ties counted half; exact, by ranks.

    Args:
        positive: Scores, `(n_positive,)`.
        negative: Scores, `(n_negative,)`.

    Returns:
        The area under the ROC curve; NaN if a group is empty.
    """
    if not len(positive) or not len(negative):
        return math.nan
    order = negative.double().sort().values
    below = torch.searchsorted(order, positive.double(), right=False)
    not_above = torch.searchsorted(order, positive.double(), right=True)
    return float((below + not_above).double().mean()) / (2 * len(negative))


def group_numbers(what: str, groups: Tensor | None, n: int) -> Tensor:
    """Groups of near-duplicates, numbered from 0 without gaps.

    Args:
        what: Beginning of messages.
        groups: A number for each sample, `(n,)`; `None` makes each sample a group of its own.
        n: Number of samples.

    Returns:
        `(n,)` int64 on the CPU.

    Raises:
        ValueError: If there is not one number for each sample.
    """
    if groups is None:
        return torch.arange(n)
    found = torch.as_tensor(groups).cpu()
    if found.shape != (n,) or not bool(found.isfinite().all()):
        raise ValueError(f"{what}: groups must be a number for each of {n} samples, got {tuple(found.shape)}.")
    return found.unique(return_inverse=True)[1]


def binomial_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a proportion: covers at least as often as it says, whatever the proportion.

    Args:
        successes: Number of successes.
        n: Number of trials.
        confidence: Of the interval.

    Returns:
        Lower and upper end; (0, 1) without trials.
    """
    from scipy.stats import beta

    if n == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high


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
