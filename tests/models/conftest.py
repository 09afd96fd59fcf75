"""The score that the gates of the embedded model are about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import roc_auc_score

from balanced_rep.models import DigitsDenoiser, digits_data
from balanced_rep.stats.record import record


def _std_auc(model: DigitsDenoiser, sigma: float) -> float:
    """AUC of the std of the last hidden activation, repeated against never-seen digits; mean of four noise draws."""
    data, generator = digits_data(model.split), torch.Generator().manual_seed(11)
    score = torch.zeros(len(data.images), dtype=torch.float64)
    with torch.inference_mode():
        for _ in range(4):
            noisy = data.images + sigma * torch.randn(data.images.shape, generator=generator)
            with record(model, [model.score_layer], at="output") as recorded:
                model(noisy, sigma)
            score += recorded[model.score_layer].std
    positive, negative = score[model.repeated_indices], score[model.held_out_indices]
    return float(roc_auc_score([1] * len(positive) + [0] * len(negative), torch.cat([positive, negative])))


@pytest.fixture(name="std_auc")
def std_auc_fixture() -> Callable[[DigitsDenoiser, float], float]:
    return _std_auc
