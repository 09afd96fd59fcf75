"""What the statistics are compared with: torch, numpy, scipy and torchmetrics, each as its users would write it.

Every full peer returns mean, std, min, max, L1, kurtosis, skewness, L4 and the active fraction over ``dim``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEASURES = ("mean", "std", "min", "max", "l1", "kurtosis", "skewness", "l4", "active_fraction")


def eager(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """The natural composition: one torch call per measure, in float32 at least."""
    x = x.float()
    mean = x.mean(dim, keepdim=True)
    c = x - mean
    var = c.pow(2).mean(dim)
    return (
        mean.squeeze(dim),
        x.std(dim),
        x.amin(dim),
        x.amax(dim),
        x.abs().sum(dim),
        c.pow(4).mean(dim) / var.pow(2),
        c.pow(3).mean(dim) / var.pow(1.5),
        x.pow(4).sum(dim).pow(0.25),
        (x > 0).float().mean(dim),
    )


def tuned(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """The same measures by somebody who knows torch's slow spots: no ``std``, no ``pow`` of the whole array."""
    x, n = x.float(), x.shape[dim]
    mean = x.mean(dim, keepdim=True)
    c = x - mean
    c2 = c * c
    m2, m3, m4 = c2.sum(dim), (c2 * c).sum(dim), (c2 * c2).sum(dim)
    mean, var = mean.squeeze(dim), m2 / n
    return (
        mean,
        (m2 / (n - 1)).sqrt(),
        x.amin(dim),
        x.amax(dim),
        x.abs().sum(dim),
        m4 / n / (var * var),
        m3 / n / (var * var.sqrt()),
        (m4 + 4 * mean * m3 + 6 * mean * mean * m2 + n * (mean * mean) * (mean * mean)).pow(0.25),
        (x > 0).sum(dim) / n,
    )


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a composition, from a clean state: one shape, one dtype, the present number of threads."""
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, dynamic=False)


def numpy_measures(x: np.ndarray, axis: int) -> tuple[Any, ...]:
    """The composition in numpy, without ``**`` of the whole array."""
    mean = x.mean(axis, keepdims=True)
    c = x - mean
    c2 = c * c
    var = c2.mean(axis)
    x2 = x * x
    return (
        mean.squeeze(axis),
        x.std(axis),
        x.min(axis),
        x.max(axis),
        np.abs(x).sum(axis),
        (c2 * c2).mean(axis) / var**2,
        (c2 * c).mean(axis) / var**1.5,
        (x2 * x2).sum(axis) ** 0.25,
        (x > 0).mean(axis),
    )


def scipy_describe(x: np.ndarray, axis: int) -> Any:
    """``scipy.stats.describe``: count, min, max, mean, variance, skewness and kurtosis."""
    from scipy import stats

    return stats.describe(x, axis=axis)


def scipy_kurtosis(x: np.ndarray, axis: int) -> Any:
    """``scipy.stats.kurtosis`` alone."""
    from scipy import stats

    return stats.kurtosis(x, axis=axis)


def torchmetrics_aggregates(x: Tensor) -> Callable[[], dict[str, Tensor]]:
    """torchmetrics has no std, skewness or kurtosis of an array: its four running aggregates over all of ``x``."""
    from torchmetrics import MaxMetric, MeanMetric, MetricCollection, MinMetric, SumMetric

    metrics = MetricCollection({"mean": MeanMetric(), "sum": SumMetric(), "min": MinMetric(), "max": MaxMetric()})

    def run() -> dict[str, Tensor]:
        metrics.reset()
        metrics.update(x)
        return metrics.compute()

    return run
