"""Sampling from autoencoders of many noise levels."""

from __future__ import annotations

import pytest
import torch

from balanced_rep.detection import get
from balanced_rep.models import Denoiser, digits_data, sample
from balanced_rep.theory import DAEFamily, geometric_levels, separable_subset, train_family


def test_autoencoders_of_many_noise_levels_give_back_what_they_stored() -> None:
    images = digits_data().images.flatten(1)
    X = images[separable_subset(images, 5)]
    X = X - X.mean(0)
    levels = geometric_levels(0.05, 5.0, 5)
    done: list[int] = []
    family = train_family(X, 20, levels[:-1], lam=1e-3, steps=400, on_model=done.append)
    assert done == [1, 2, 3, 4, 5]
    assert isinstance(family, Denoiser)
    made = sample(family, 100, sigmas=geometric_levels(0.05, 5.0, 30))
    cosine = torch.nn.functional.normalize(made, dim=1) @ torch.nn.functional.normalize(X, dim=1).T
    assert (cosine.amax(1) > 0.98).double().mean() > 0.65  # the others end between two
    assert cosine.argmax(1).bincount(minlength=5).min() >= 10
    assert torch.equal(family(X, 0.06), family.members[0](X))
    mixed = torch.tensor([1.0, 0.06, 6.0, 0.06, 1.2])
    want = torch.cat([family(x[None], float(s)) for x, s in zip(X, mixed, strict=True)])
    torch.testing.assert_close(family(X, mixed), want)
    scores = get("representation_std")(
        family, X.clamp(-1, 1), sigma=[0.05, 0.5]
    )  # all layers, several noise levels in a call
    assert scores.values.shape == (1, 2, 5)
    assert scores.ok.all()
    with pytest.raises(ValueError, match="at least one"):
        DAEFamily([])
