"""Functions that are not the same from one call to the next, and keyword arguments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from balanced_rep.autodiff import UnsupportedError, explain, jvp, trace
from balanced_rep.linalg import JacobianOperator

X = torch.linspace(0.5, 2.0, 6).view(3, 2)
T = torch.linspace(-1.0, 1.0, 24).view(4, 3, 2)


class _Counts(nn.Module):
    """Keeps something from one call to the next, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))
        self.weight, self.calls, self.how = nn.Parameter(torch.ones(2)), 0, how

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.how == "in place":
            self.n += 1
        elif self.how == "assigned":
            self.n = self.n + 1
        elif self.how == "data":
            self.n.data.add_(1)
        elif self.how == "weight":
            with torch.no_grad():
                self.weight.mul_(2.0)
        elif self.how == "cache":  # written anew, with the same values
            self.n.copy_(torch.full((1,), 7.0))
        return x * (self.calls if self.how == "attribute" else self.n + 1) * self.weight


KEPT = {
    "in place": "buffer 'n'", "assigned": "buffer 'n'", "data": "buffer 'n'", "weight": "parameter 'weight'",
    "attribute": "returned another value for one chunk",
}  # fmt: skip


@pytest.mark.parametrize("how", KEPT)
def test_a_model_that_changes_from_chunk_to_chunk_is_refused(how: str):
    with pytest.raises(UnsupportedError, match=KEPT[how]):
        jvp(_Counts(how), X, T, chunk_size=1)
    net = _Counts(how)
    y, jv = jvp(net, X, T)  # one pass
    with torch.no_grad():
        torch.testing.assert_close((y, net.calls), (_Counts(how)(X), 1))
    torch.testing.assert_close(jv, T * (y / X))


def test_caches_and_rounding_are_no_changes():
    net = _Counts("cache")
    net(X)  # fills it
    torch.testing.assert_close(jvp(net, X, T, chunk_size=1)[1], 8 * T)
    layer = nn.Linear(64, 64, dtype=torch.bfloat16)
    many = torch.randn(7, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    jvp(nn.Sequential(layer, nn.SiLU(), layer, nn.SiLU(), layer), many[0], many, chunk_size=2)


def test_random_numbers_of_other_libraries_differ_between_chunks():
    generator = np.random.default_rng(0)
    with pytest.raises(UnsupportedError, match=r"draws random numbers.*function of its arguments"):
        jvp(lambda x: x * float(generator.random()), X, T, chunk_size=1)
    with pytest.raises(UnsupportedError, match=r"called torch\.manual_seed"):
        jvp(lambda x: (torch.manual_seed(1), x * 2)[1], X, T)


def test_instance_norm_that_updates_its_statistics_is_refused(draw: Callable):
    x, t = draw(2, 3, 5), draw(1, 2, 3, 5)
    net = nn.InstanceNorm1d(3, track_running_stats=True, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"instance normalisation is in training mode.*InstanceNorm1d"):
        jvp(net, x, t)
    assert not net.running_mean.any()  # pyright: ignore[reportOptionalMemberAccess]
    jvp(net.eval(), x, t)


@pytest.mark.parametrize("call", [jvp, explain, trace, JacobianOperator], ids=lambda f: f.__name__)
def test_kwargs_have_to_be_a_dict(call: Callable):
    args = {jvp: (X, T), trace: (X, 2)}.get(call, (X,))
    with pytest.raises(TypeError, match=r"^br\.jvp: kwargs must be a dict, got list"):
        call(nn.Linear(2, 2), *args, kwargs=[1])
    with pytest.raises(TypeError, match=r"^br\.jvp: kwargs must have names as keys, got 1, a int"):
        call(nn.Linear(2, 2), *args, kwargs={1: 2})
