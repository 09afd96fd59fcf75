"""What the measures refuse: derivatives of counts, and arguments that are easy to get wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import balanced_rep as br


@pytest.mark.parametrize(
    "measure",
    [lambda s: s.gini(), lambda s: s.topk_share(2), lambda s: s.quantile(0.5)],
    ids=["gini", "topk", "quantile"],
)
def test_measures_from_counts_refuse_a_derivative(measure: Callable):
    h = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    score = lambda x: measure(br.representation_stats(x, histogram=True))  # noqa: E731
    for ask in (
        lambda: score(h.clone().requires_grad_()),
        lambda: torch.func.grad(lambda x: score(x).sum())(h),
        lambda: torch.func.jvp(score, (h,), (h,)),
        lambda: torch.func.jacfwd(score)(h),
    ):
        with pytest.raises(RuntimeError, match=r"has no derivative.*h\.detach\(\)"):
            ask()
    with torch.no_grad():
        assert torch.equal(score(h.clone().requires_grad_()), score(h))
    assert torch.equal(torch.vmap(score)(h), score(h))


def test_cat_takes_any_iterable_and_names_what_it_does_not_take():
    h = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    whole = br.representation_stats(h)
    assert torch.equal(br.cat(br.representation_stats(row[None]) for row in h).std, whole.std)
    with pytest.raises(TypeError, match="single one: pass a list"):
        br.cat(whole)  # pyright: ignore[reportArgumentType]


def test_topk_share_takes_integers_of_numpy_and_no_booleans():
    s = br.representation_stats(torch.randn(3, 8), histogram=True)
    assert torch.equal(s.topk_share(np.int64(3)), s.topk_share(3))
    with pytest.raises(ValueError, match="k must be an int"):
        s.topk_share(True)


@pytest.mark.parametrize("layers", [None, 3, nn.ReLU()], ids=str)
def test_what_names_no_layer_is_named(layers: object):
    with pytest.raises(TypeError, match=f"takes module names.*got {type(layers).__name__}"):
        br.record(nn.Sequential(nn.ReLU()), layers)  # pyright: ignore[reportArgumentType]
