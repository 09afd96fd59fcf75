"""Results that wait for the next function: joined or not, read once or often, with writes in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff import UnsupportedError, explain, jvp
from balanced_rep.ops._registry import REGISTRY


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Names and arguments of the fused ops that ran."""
    ran: list[tuple] = []
    spec_type = type(REGISTRY["attention_jvp"])
    original = spec_type.__call__

    def noted(self, *args, **kwargs):
        ran.append((self.name, *args))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(spec_type, "__call__", noted)
    return ran


def names(ops: list[tuple]) -> list[str]:
    found = [name for name, *_ in ops]
    ops.clear()
    return found


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [lambda t: t, last], ids=["contiguous", "channels_last"])
def test_group_norm_and_silu_are_one_op(layout: Callable, ops: list, agrees: Callable, draw: Callable):
    w, b = draw(6), draw(6, seed=1)
    x = layout(draw(2, 6, 3, 4))
    agrees(lambda x: F.silu(F.group_norm(x, 3, w, b)), x)
    assert [(name, args[-1]) for name, *args in ops] == [("group_norm_jvp", True)]
    names(ops)
    agrees(lambda x: F.group_norm(x, 3, w, b), x)
    assert [(name, args[-1]) for name, *args in ops] == [("group_norm_jvp", False)]


def test_norm_that_is_read_twice(ops: list, agrees: Callable, draw: Callable):
    def f(x):
        h = F.group_norm(x, 3)
        return F.silu(h) + h * torch.exp(h)

    agrees(f, draw(2, 6, 4))
    assert names(ops) == ["group_norm_jvp", "group_norm_jvp"]


MODULATIONS = {
    "adaptive": ((2, 1, 6), (2, 1, 6), True, True),
    "one for all": ((6,), (1, 1, 6), True, True),
    "scale per token": ((2, 5, 6), (2, 1, 6), False, False),
    "shift per token": ((1, 1, 6), (5, 6), True, False),
    "scalars": ((), (1,), False, False),
}


@pytest.mark.parametrize("name", MODULATIONS)
@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
def test_norm_with_scale_and_shift(norm: Callable, name: str, ops: list, agrees: Callable, draw: Callable):
    scale, shift, scaled, shifted = MODULATIONS[name]
    a, b, w = draw(*scale), draw(*shift, seed=1), draw(6, seed=2)
    agrees(lambda x: norm(x, (6,)) * (1 + a) + b, draw(2, 5, 6))
    agrees(lambda x: b + norm(x, (6,), w) * a, draw(2, 5, 6))
    assert [(op[3] is not None, op[4] is not None) for op in ops] == [(scaled, shifted), (True, shifted)]


def test_two_modulations_of_one_norm(ops: list, agrees: Callable, draw: Callable):
    a, b = draw(2, 1, 6), draw(2, 1, 6, seed=1)

    def f(x):
        h = F.layer_norm(x, (6,))
        return torch.cat([h * a + b, h * b, h - a], -1)

    agrees(f, draw(2, 5, 6))


@pytest.mark.parametrize("act", [F.gelu, F.silu, lambda g: F.gelu(g, approximate="tanh")])
@pytest.mark.parametrize("swap", [False, True])
def test_gated_activation_is_one_op(act: Callable, swap: bool, ops: list, agrees: Callable, draw: Callable):
    def f(x):
        h, g = x.chunk(2, -1)
        return act(g) * h if swap else h * act(g)

    agrees(f, draw(2, 5, 12))
    assert names(ops) == ["gated_activation_jvp"]
    agrees(lambda x: f(last(x)), draw(2, 6, 3, 4))
    agrees(lambda x: act(x) * x + x * act(x[:, :1]), draw(2, 5, 6))
    agrees(lambda x: act(x).transpose(0, 1) * 2.0, draw(2, 5, 6))


def test_activations_of_every_layout(agrees: Callable, draw: Callable):
    for view in (lambda x: x.mT, lambda x: x[..., ::2], lambda x: x[:, 1:3], lambda x: x.permute(2, 0, 1), last):
        agrees(
            lambda x, view=view: F.silu(view(x)) + F.gelu(view(x)),
            draw(2, 6, 4) if view is not last else draw(2, 3, 4, 5),
        )
    agrees(F.silu, draw())
    agrees(F.gelu, draw(0, 3))


def test_sum_with_a_scaled_value(agrees: Callable, draw: Callable):
    g = draw(2, 1, 6)
    agrees(lambda x: x.sin() + g * x.exp(), draw(2, 5, 6))
    agrees(lambda x: g * x.exp() + x.sin(), draw(2, 5, 6))
    agrees(lambda x: g * x + g * x.exp(), draw(2, 5, 6))
    agrees(lambda x: x[:, :1] + g * x, draw(2, 5, 6))
    agrees(lambda x: x - g * x.exp(), draw(2, 5, 6))
    wide = draw(3, 2, 5, 6)
    agrees(lambda x: wide + g * x, draw(2, 5, 6))
    agrees(lambda x: (x.float() + g.float() * x.float()).double() + x * g.float(), draw(2, 5, 6), rtol=1e-5, atol=1e-5)


WRITES = {
    "input": lambda x, h: x.mul_(2),
    "item": lambda x, h: x.__setitem__(0, 1.0),
    "copy": lambda x, h: x.copy_(x.sin()),
    "view": lambda x, h: x[:, :2].add_(1),
    "keyword": lambda x, h: F.relu(x, inplace=True),
    "itself": lambda x, h: h.mul_(2),
    "itself from itself": lambda x, h: h.copy_(x),
    "a view of itself": lambda x, h: h[:, 0].fill_(3.0),
}
WAITING = {
    "group_norm": lambda x: F.group_norm(x, 2),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "modulated": lambda x: F.layer_norm(x, (6,)) * torch.arange(6.0, dtype=x.dtype),
    "gelu": F.gelu,
    "scaled": lambda x: x * torch.arange(6.0, dtype=x.dtype),
    "shifted": lambda x: x + torch.arange(6.0, dtype=x.dtype),
    "divided by one": lambda x: x / 1.0,
    "view": lambda x: (x + torch.ones(6, dtype=x.dtype)).transpose(0, 1).transpose(0, 1),
    "piece": lambda x: (x + torch.ones(6, dtype=x.dtype)).chunk(2, 1)[0].repeat(1, 2, 1),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("waiting", WAITING)
def test_writes_in_between(waiting: str, write: str, agrees: Callable, draw: Callable):
    def f(x):
        x = x.clone()
        h = WAITING[waiting](x)
        WRITES[write](x, h)
        return h * 1.5 + x.sin()

    agrees(f, draw(3, 4, 6))


@pytest.mark.parametrize("waiting", WAITING)
def test_results_written_over_the_source(waiting: str, draw: Callable):
    """torch's own forward mode takes no out=."""

    def f(x, over):
        x = x.clone()
        h = WAITING[waiting](x)
        y = torch.exp(x, out=x) if over else x.exp()
        return h * 1.5 + y.sin()

    x, t = draw(3, 4, 6), draw(2, 3, 4, 6)
    for got, want in zip(jvp(f, (x, True), (t, None)), jvp(f, (x, False), (t, None)), strict=True):
        torch.testing.assert_close(got, want)


def test_a_constant_that_is_written_in_between(agrees: Callable, draw: Callable):
    def f(x):
        a, w = torch.ones(6, dtype=x.dtype), torch.ones(6, dtype=x.dtype)
        h, g = x * a, F.layer_norm(x, (6,), w)
        a += 1
        w[2] = 5.0
        return h.exp() + g

    agrees(f, draw(3, 4, 6))


@pytest.mark.parametrize("write", ["base", "view", "piece of view"])
def test_views_of_a_shifted_value_are_views(write: str, agrees: Callable, draw: Callable):
    def f(x):
        h = x + torch.arange(6.0, dtype=x.dtype)
        v = h.flatten(0, 1)
        p = v.split(6)[1]
        {"base": h, "view": v, "piece of view": p}[write].add_(1.5)
        return h.sin(), v.cos(), p.exp(), x

    agrees(f, draw(3, 4, 6))


def test_a_constant_moves_no_tangent(ops: list, agrees: Callable, draw: Callable):
    c = draw(2, 6, 1, 1)
    seen = []

    def f(x):
        h = x + c
        seen.append(h.pending.tangents.data_ptr() == x.stack[1:].data_ptr() if hasattr(h, "pending") else None)
        return F.group_norm(h, 3) - 1.5 + h

    agrees(f, draw(2, 6, 3, 4))
    assert [s for s in seen if s is not None] == [True]
    agrees(lambda x: (x + c) + (x.sin() + c) + x.cos(), draw(2, 6, 3, 4))
    agrees(lambda x: (x + c).chunk(2, 1)[1] * (x - c)[:, :3], draw(2, 6, 3, 4))
    w = draw(4, 6, 3, 3)
    agrees(lambda x: F.conv2d(x + c, w), draw(2, 6, 3, 4))


def test_silu_in_place_behind_a_norm(agrees: Callable, draw: Callable):
    def f(x):
        h = F.group_norm(x, 2)
        y = F.silu(h, inplace=True)
        return h + 2 * y

    agrees(f, draw(3, 4, 6))


def test_a_write_that_nobody_could_see_is_refused(draw: Callable):
    x = draw(3, 4, 6)

    def f(x):
        a = torch.ones(6, dtype=x.dtype)
        h = x * a
        with torch._C.DisableTorchFunction():
            a.add_(1)
        return h.exp()

    with pytest.raises(UnsupportedError, match="changed in place"):
        jvp(f, x, x[None])


def test_metadata_of_what_waits(draw: Callable):
    def f(x):
        h = F.group_norm(last(x), 3)
        assert h.shape == x.shape
        assert h.dtype == x.dtype
        assert h.is_contiguous(memory_format=torch.channels_last)
        g = F.gelu(x[:, :, ::2])
        assert g.is_contiguous()
        assert g.stride() == g.clone().stride()
        return h[:, :, ::2] + g

    x = draw(2, 6, 4, 5)
    jvp(f, x, x[None])


def test_explain_counts_both_functions(draw: Callable):
    told = explain(lambda x: F.silu(F.group_norm(x, 3)), draw(2, 6, 4))
    assert told.rules == {"group_norm": 1, "silu": 1}


def test_bad_norms_are_refused_where_they_are_called(draw: Callable):
    x = draw(2, 6, 4)
    with pytest.raises(RuntimeError, match="divisible by num_groups"):
        jvp(lambda x: F.group_norm(x, 4), x, x[None])
    with pytest.raises(RuntimeError, match="normalized_shape"):
        jvp(lambda x: F.layer_norm(x, (5,)), x, x[None])
    with pytest.raises(RuntimeError, match="normalized_shape"):
        jvp(lambda x: F.layer_norm(x, (4,), torch.ones(3).double()), x, x[None])
