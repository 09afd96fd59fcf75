"""Timesteps of a `record`: where they are found, which forwards and samples are kept, and how results are split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from balanced_rep.stats import cat, representation_stats
from balanced_rep.stats._record_time import Moment, TimestepSource
from balanced_rep.stats.record import record


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x: Tensor, timestep: Any, cond: Any = None) -> Tensor:
        return self.layer(x)


def make(forward: Any) -> nn.Module:
    """A model whose forward has the signature of ``forward`` and returns its first argument through a layer."""

    class Model(Net):
        pass

    Model.forward = lambda self, *args, **kwargs: self.layer(args[0])
    Model.forward.__signature__ = __import__("inspect").signature(forward)  # pyright: ignore[reportFunctionMemberAccess]
    return Model()


X = torch.randn(3, 5)


@pytest.mark.parametrize(
    "t", [50, 50.0, np.int64(50), np.float32(50), *map(torch.tensor, (50, [50], [50, 50, 50], 50.0))], ids=str
)
@pytest.mark.parametrize("keyword", [False, True])
def test_any_form_of_timestep_is_matched(t: Any, keyword: bool):
    model = Net()
    with record(model, "layer", timesteps=[10, 50]) as recording:
        for other in (49, 51, 500):
            model(X, other)
        y = model(X, timestep=t) if keyword else model(X, t)
    assert recording.forwards == 1
    assert list(recording.by_timestep("layer")) == [50]
    assert torch.equal(recording["layer"].state, representation_stats(y).state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("t", [0.3, 0.981, 981.0, 1e-3, 80.0])
def test_noise_levels_are_matched_as_rounded(t: float, dtype: torch.dtype):
    model = Net()
    with record(model, "layer", timesteps=t) as recording:
        model(X, torch.tensor(t * 1.02, dtype=dtype))
        model(X, torch.tensor(t, dtype=dtype))
    assert recording.forwards == 1
    assert list(recording.by_timestep("layer")) == [t]
    with record(model, "layer", timesteps=torch.tensor([t], dtype=dtype)) as recording:
        model(X, torch.tensor(t, dtype=dtype))
    assert len(recording["layer"]) == 3


def test_keys_without_a_selection_are_the_shortest_decimals():
    model = Net()
    with record(model, "layer") as recording:
        for t in (torch.tensor(0.3), torch.tensor(0.1).half(), torch.tensor([999]), 7, torch.tensor(1e-9)):
            model(X, t)
    assert list(recording.by_timestep("layer")) == [0.3, 0.1, 999, 7, 1e-9]
    assert recording.timesteps == [(0.3,), (0.1,), (999,), (7,), (1e-9,)]


def test_samples_of_one_batch_at_different_timesteps():
    model, t = Net(), torch.tensor([10, 50, 10])
    with record(model, "layer") as recording:
        model(X, t)
        model(2 * X, 50)
    groups = recording.by_timestep("layer")
    assert list(groups) == [10, 50]
    assert torch.equal(groups[10].state, representation_stats(X[[0, 2]]).state)
    assert torch.equal(groups[50].state, cat([representation_stats(X[1:2]), representation_stats(2 * X)]).state)
    with record(model, "layer", timesteps=10) as recording:
        model(X, t)
        model(X, torch.tensor([1, 2, 3]))
    assert torch.equal(recording["layer"].state, representation_stats(X[[0, 2]]).state)
    assert list(recording.by_timestep("layer")) == [10]
    assert recording.forwards == 1


def test_a_timestep_for_several_samples_holds_for_all():
    model = Net()
    with record(model, "layer", timesteps=5) as recording:  # guidance doubles the batch, frames multiply it
        model(X, torch.tensor([5, 5]))
    assert len(recording["layer"]) == 3
    with record(model, "layer") as recording:
        model(X, torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="2 different timesteps do not fit an activation of 3 samples"):
        recording.by_timestep("layer")
    assert len(recording["layer"]) == 3


def test_per_unit():
    model = Net()
    with record(model, "layer", per="unit", timesteps=[10, 50]) as recording:
        model(X, 10)
        model(X[:2], torch.full((2,), 50))
        model(X + 1, 10)
        model(X, 11)
    groups = recording.by_timestep("layer")
    want = representation_stats(torch.cat([X, X + 1]), dim=0)
    torch.testing.assert_close(groups[10].state, want.state, rtol=1e-12, atol=1e-12)
    assert recording["layer"].n.tolist() == [8] * 5
    with pytest.raises(ValueError, match="one timestep per forward"), record(model, "layer", per="unit", timesteps=10):
        model(X, torch.tensor([10, 20, 10]))
    with record(model, "layer", per="unit") as recording:
        model(X, torch.tensor([10, 20, 10]))
    with pytest.raises(ValueError, match=r"merges forwards; say timesteps="):
        recording.by_timestep("layer")
    with pytest.raises(ValueError, match="merges forwards"):
        recording.per_forward("layer")


def test_an_empty_batch_has_no_timestep():
    model = Net()
    for timesteps in (None, 5):
        with record(model, "layer", timesteps=timesteps) as recording:
            model(X[:0], 5)
            model(X, 5)
        assert [len(s) for s in recording.by_timestep("layer").values()] == [3]
        assert len(recording["layer"]) == 3


# Where it is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "args", "kwargs", "where", "want"),
    [
        (lambda self, x, t: 0, (X, 3), {}, None, 3),
        (lambda self, y, sigma, cond=None: 0, (X, 0.2), {}, None, 0.2),
        (lambda self, y, sigma, cond=None: 0, (X,), {"sigma": 0.2}, None, 0.2),
        (lambda self, x, noise_labels, class_labels: 0, (X, 4, 5), {}, None, 4),
        (lambda self, x, a, t, timestep: 0, (X, 1, 2, 3), {}, None, 3),  # the more telling name first
        (lambda self, *args, **kwargs: 0, (X,), {"timestep": 6}, None, 6),
        (lambda self, *args, **kwargs: 0, (X, 6), {}, 1, 6),
        (lambda self, *args, **kwargs: 0, (X, 6), {}, -1, 6),
        (lambda self, *args, **kwargs: 0, (X,), {"when": 7}, "when", 7),
        (lambda self, x, when: 0, (X, 7), {}, "when", 7),
        (lambda self, x, info: 0, (X, {"t": 8}), {}, lambda args, kwargs: args[1]["t"], 8),
        (lambda self, x, y: 0, (X, 3), {}, None, None),
        (lambda self, x, t=1: 0, (X,), {}, None, None),
        (lambda self, x: 0, (X,), {}, 4, None),
    ],
)
def test_sources(forward: Any, args: Any, kwargs: Any, where: Any, want: Any):
    assert TimestepSource(make(forward), where)(args, kwargs) == want


def test_without_a_timestep():
    model = make(lambda self, x, y: 0)
    with record(model, "layer") as recording:
        model(X, 3)
    assert recording.timesteps == [()]
    with pytest.raises(ValueError, match=r"no timestep was found.*timestep_arg="):
        recording.by_timestep("layer")
    with pytest.raises(ValueError, match=r"no timestep was found"), record(model, "layer", timesteps=3):
        model(X, 3)
    with record(model, "layer", timesteps=3, timestep_arg="y") as recording:
        model(X, 3)
    assert len(recording["layer"]) == 3


def test_no_forward_at_a_wanted_timestep():
    model = Net()
    with pytest.raises(RuntimeError, match=r"no forward was at one of timesteps=; seen: 10, 20"):
        with record(model, "layer", timesteps=[30]):
            [model(X, t) for t in (20, 10)]


def test_an_unwanted_forward_is_left_alone():
    model = Net()
    model.layer = nn.ReLU()
    with record(model, "layer", timesteps=[1], call=0) as recording:
        model(X, 1)
        model.layer(X)  # outside
        model(X, 2)
    assert recording.calls["layer"] == [1]


# On an accelerator ---------------------------------------------------------------------------------------------------


def test_timesteps_on_an_accelerator_wait_for_the_results(monkeypatch: pytest.MonkeyPatch):
    """Played on the CPU: a moment that says it is deferred has to be sorted out when the results are read."""
    reads: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Moment, "deferred", property(lambda self: isinstance(self.source, Tensor)))
    monkeypatch.setattr(Tensor, "tolist", lambda self: (reads.append(1), tolist(self))[1])
    model, times = Net(), [torch.tensor([10, 50, 10]), torch.tensor(20), torch.tensor(10)]
    with record(model, "layer", timesteps=10) as recording:
        for t in times:
            model(X, t)
            t.zero_()  # the caller may reuse the memory
    assert reads == []
    assert recording.forwards == 3
    assert len(recording["layer"]) == 5
    assert reads == [1]  # one transfer for all forwards
    assert [len(s) for s in recording.per_forward("layer")] == [2, 3]
    assert list(recording.by_timestep("layer")) == [10]
    with record(model, "layer", timesteps=10) as recording:
        model(X, torch.tensor(20))
    with pytest.raises(KeyError, match=r"no sample at timesteps \(10.0,\); seen: \[20.0\]"):
        recording["layer"]
    assert list(recording) == []


def test_meta_timesteps_cannot_be_selected():
    model = Net()
    with record(model, "layer"):
        model(X, torch.tensor(3, device="meta"))
    with pytest.raises(ValueError, match="no timestep was found"), record(model, "layer", timesteps=3):
        model(X, torch.tensor(3, device="meta"))
