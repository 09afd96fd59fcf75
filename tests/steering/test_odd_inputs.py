"""Inputs that were once passed over, or ended in an error of torch: each is refused, and says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import balanced_rep as br
from balanced_rep import steering
from balanced_rep.models import digits, digits_data

D: Any = digits()
LAYER = "net.blocks.1"
X, Z = digits_data().ordinary[:6], torch.zeros(3, 1, 8, 8)
V = steering.direction(D, X[:3], X[3:], sigma=0.2, layers=LAYER)
EDITS = torch.stack([X[:3], X[3:], X[:3]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: steering.direction(D, X, X, sigma=0.2), ValueError, "every vector is zero, and points nowhere"),
        (lambda: steering.direction(D, X, sigma=[0.1]), TypeError, "a noise level is one number for all samples"),
        (lambda: steering.direction(D, X, sigma=0.2, batch_size=-1), ValueError, "batch_size must be at least 1"),
        (lambda: steering.direction(D.net, X, sigma=0.2), TypeError, "direction: ResidualMLP is no denoiser"),
        (lambda: steering.direction(D, X, sigma=0.2, cond=Z), ValueError, "6 samples and 3 conditions; one each"),
        (lambda: steering.direction(D, X, sigma=0.2, negative_cond=Z), ValueError, "and no negative samples"),
        (lambda: steering.direction(D, X.double(), sigma=0.2), ValueError, "Samples are torch.float64"),
        (lambda: replace(V, sigma=math.nan), ValueError, "sigma must be a finite number, not negative, got nan"),
        (lambda: replace(V, vectors={LAYER: [1.0]}), ValueError, r"must be finite floating point \(units,\), got list"),
        (lambda: steering.Direction.load("nowhere"), FileNotFoundError, "There is no file nowhere"),
        (lambda: steering.steered_samples(D, V, Z, [1.0], steps=0.5), ValueError, "two fractions of the schedule"),
        (lambda: steering.steered_samples(D, V, Z, [1.0], cond=X), ValueError, "3 samples and 6 conditions; one each"),
        (lambda: steering.steered_samples(D, V, Z, [1.0], sigmas=1.0), TypeError, "must be a sequence of numbers"),
        (
            lambda: steering.interpolated_samples(D, Z, [0.5], cond=None, target=X),
            ValueError,
            "both cond= and target= are needed",
        ),
        (
            lambda: steering.interpolated_samples(D, Z, [0.5], cond=X[:3], target=X[:1]),
            ValueError,
            "3 samples and 1 conditions; one each",
        ),
        (lambda: steering.sdedit_samples(D, 255 * X, [1.0]), ValueError, "samples run from -255 to 255"),
        (lambda: steering.response(D, V, EDITS, [0.0, 0.0, 1.0]), ValueError, "strengths must go one way, each once"),
        (lambda: steering.response(D, V, EDITS, [0.0, 1.0, 0.5]), ValueError, "strengths must go one way, each once"),
        (lambda: steering.response(D, V, EDITS, [0.0, 0.5, 1.0]).onset(2.0), ValueError, "share must be above 0"),
        (
            lambda: steering.response_derivative(D, V, Z, torch.full((3,), 0.5)),
            TypeError,
            "response_derivative: a noise level is one number for all samples",
        ),
        (lambda: steering.local_linearity(D, Z, "0.5"), TypeError, "a noise level is one number for all samples"),
        (lambda: steering.project(None, V, Z), TypeError, "project: NoneType is no denoiser"),
        (lambda: steering.steer(nn.Linear(3, 3), V, 1.0).__enter__(), ValueError, r"has no layer .*\. It has none\.$"),
        (lambda: br.models.sample(D, 2, cond=X), ValueError, "sample: 2 samples and 6 conditions; one each"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_the_reason(call: Callable[[], Any], error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_strengths_may_fall_and_one_layer_may_be_named_alone() -> None:
    down = steering.response(D, V, EDITS, [0.0, -0.5, -1.0])
    assert torch.equal(down.values[0], torch.zeros(3, dtype=torch.float64))
    assert V.only(LAYER).vectors.keys() == {LAYER}
    assert steering.sdedit_samples(D, 1.3 * X, [0.0]).shape == (1, *X.shape)  # samples that a model made overshoot


def test_contexts_in_each_other_left_in_any_order_and_twice() -> None:
    y = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = D(y, 0.5)

    def steered(strength: float) -> Tensor:
        with steering.steer(D, V, strength):
            return D(y, 0.5)

    outer, inner = steering.steer(D, V, 1.0), steering.steer(D, V, 2.0)
    outer.__enter__()
    inner.__enter__()
    both = D(y, 0.5)
    outer.__exit__(None, None, None)
    alone = D(y, 0.5)
    inner.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert torch.equal(D(y, 0.5), plain)
    torch.testing.assert_close(both, steered(3.0))
    assert torch.equal(alone, steered(2.0))


def test_arrays_and_generators_are_taken() -> None:
    """Found once: steps in an array were refused, and a generator of names was used up before it was read."""
    assert V.only(name for name in (LAYER,)).vectors.keys() == {LAYER}
    want = steering.steered_samples(D, V, Z, [1.0], n_steps=4, steps=(0.0, 0.5))
    for steps in (np.array([0.0, 0.5]), torch.tensor([0.0, 0.5]), [0, 0.5]):
        assert torch.equal(steering.steered_samples(D, V, Z, [1.0], n_steps=4, steps=steps), want)
    with pytest.raises(ValueError, match="sigma=1e\\+06 is outside what this model was made for"):
        steering.direction(D, X, sigma=torch.tensor([1e6]))
