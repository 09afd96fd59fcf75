"""Tangents in a lower precision than their primal, and the library that multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from balanced_rep.autodiff import _products, _rules_linear, explain, jvp, trace
from balanced_rep.autodiff._products import Speeds

LOW = [torch.bfloat16, torch.float16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with fast products of half types."""
    monkeypatch.setattr(_products, "lower_precision", lambda device, dtype: (True, "tangents are low"))


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Dtypes of what linear layers multiply."""
    seen: list[torch.dtype] = []

    def noted(x: Tensor, w: Tensor) -> Tensor:
        seen.append(x.dtype)
        return _products.linear(x, w)

    monkeypatch.setattr(_rules_linear, "linear", noted)
    return seen


class Block(nn.Module):
    """A transformer block and a convolution, with views, a gate, a skip connection and adaptive modulation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(64, 8, 1)
        self.norm, self.rows = nn.GroupNorm(4, 32), nn.LayerNorm(32, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(64, 32)
        self.scale, self.shift = draw(1, 1, 32, seed=1), draw(1, 1, 32, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.conv(x))) / 1.0
        b, c, height, width = h.shape
        tokens = h.view(b, c, -1).transpose(1, 2)
        scale, shift = self.scale.to(x), self.shift.to(x)
        q, k, v = self.qkv(self.rows(tokens) * (1 + scale) + shift).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + scale * self.proj(y.to(x.dtype))
        a, g = self.up(F.rms_norm(tokens, (32,))).chunk(2, -1)
        tokens = tokens + self.down(a * F.gelu(g))
        back = F.interpolate(tokens.transpose(1, 2).reshape(b, c, height, width), scale_factor=2.0)
        skip = F.interpolate(F.pad(h, (0, 1, 0, 1))[..., :-1, :-1], scale_factor=2.0)
        return self.out(torch.cat([back, skip], 1).contiguous())


def relative(got: Tensor, want: Tensor) -> float:
    """Largest error of a tangent over its norm."""
    return ((got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)).max().item()


@pytest.mark.parametrize("low", LOW)
def test_tangents_in_a_lower_precision(low: torch.dtype, worth: None, dtypes: list):
    model, x, t = Block().eval(), draw(2, 8, 6, 6), draw(5, 2, 8, 6, 6)
    y, jv = jvp(model, x, t)
    dtypes.clear()
    y_low, jv_low = jvp(model, x, t, tangent_dtype=low, strict=True)
    assert y_low.dtype == jv_low.dtype == torch.float32
    torch.testing.assert_close(y_low, y, rtol=1e-5, atol=1e-5)
    error = relative(jv_low, jv)
    assert 1e-5 < error < 1e-2
    assert dtypes.count(low) == 4  # tangents; primals have their bias with them
    assert torch.equal(jvp(model, x, t, tangent_dtype=low, chunk_size=2)[1], jvp(model, x, t, tangent_dtype=low)[1])


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "no rule for it": lambda h, w: torch.fft.fft(h.sin().cumsum(-1) * torch.where(h > 0, h, 2 * h)).real,
    "written in place": lambda h, w: h.mul_(2).add_(1).relu_(),
    "written through a view": lambda h, w: (h.t()[1:].fill_(0.5), h)[1],
    "item": lambda h, w: (h.__setitem__((0, slice(2)), h[1, :2]), h)[1],
    "sum of both precisions": lambda h, w: h + F.linear(h, w).sin() + F.linear(h, w),
    "difference": lambda h, w: h - F.linear(h, w),
    "product": lambda h, w: h * F.linear(h, w) * 3.0 / F.linear(h, w).exp(),
    "joined with a constant": lambda h, w: torch.cat([h, torch.ones_like(h), F.linear(h, w)], 0),
    "split and stacked": lambda h, w: torch.stack([p.sin() for p in h.chunk(2, -1)]),
    "softmax": lambda h, w: h.softmax(-1) @ h.softmax(0).t(),
    "cast": lambda h, w: h.double().sin().float() + h.to(torch.float32),
    "reduced": lambda h, w: (h.mean(-1), h.std(), h.norm(), h.max(0).values),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_works_on_such_a_value(name: str, worth: None):
    w = draw(6, 6, seed=3)

    def f(x: Tensor) -> Any:
        return FUNCTIONS[name](F.linear(x, w), w)

    x, t = draw(4, 6), draw(3, 4, 6)
    (y, want), (y_low, got) = jvp(f, x, t), jvp(f, x, t, tangent_dtype=torch.bfloat16)
    outputs = [(y, y_low, want, got)] if isinstance(y, Tensor) else list(zip(y, y_low, want, got, strict=True))
    for a, b, c, d in outputs:
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        assert c.dtype == d.dtype
        assert (d - c).norm() <= 2e-2 * c.norm()


def test_traced(worth: None):
    model, x, t = Block().eval(), draw(2, 8, 6, 6), draw(2, 2, 8, 6, 6)
    graph = trace(model, x, 2, tangent_dtype=torch.bfloat16)
    want = jvp(model, x, t, tangent_dtype=torch.bfloat16)
    torch.testing.assert_close(graph(x, t), want, rtol=1e-2, atol=1e-3)
    assert relative(graph(x, t)[1], jvp(model, x, t)[1]) > 1e-5
    assert any("bfloat16" in str(n.args) + str(n.kwargs) for n in graph.graph.nodes)
    with pytest.raises(ValueError, match=r"tangent_dtype=torch\.int8; accepted are"):
        trace(model, x, 2, tangent_dtype=torch.int8)


def test_where_it_is_not_faster_tangents_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setattr(_products, "speeds", lambda device, lower=None: Speeds(1.0, 2.0, {torch.bfloat16: 1.5}))
    x, t = draw(2, 8, 6, 6), draw(5, 2, 8, 6, 6)
    model = Block().eval()
    with caplog.at_level("INFO", "balanced_rep"):
        low = jvp(model, x, t, tangent_dtype=torch.bfloat16)
    assert torch.equal(low[1], jvp(model, x, t)[1])
    message = "tangents stay float32: a linear layer in bfloat16 has 0.67 times the speed of one in float32 on cpu"
    assert message in caplog.text
    assert message in str(explain(model, x, tangent_dtype=torch.bfloat16))
    monkeypatch.setattr(_products, "speeds", lambda device, lower=None: Speeds(2.0, 1.0, {torch.bfloat16: 0.5}))
    told = explain(model, x, tangent_dtype=torch.bfloat16)
    assert told.remarks[0].startswith("tangents are bfloat16: a linear layer in bfloat16 has 2 times")


def test_what_is_measured_is_measured_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_products, "_MEASURED", {})
    monkeypatch.setattr(_products, "SAMPLE", (8, 8, 8))
    first = _products.speeds(torch.device("cpu"), torch.bfloat16)
    assert 0 < first.float32 < 1
    assert set(first.lower) == {torch.bfloat16}
    assert _products.speeds(torch.device("cpu"), torch.bfloat16) is first
    _products.speeds(torch.device("cpu"))
    (sentence,) = _products.measured()
    assert "float32 linear layers go to" in sentence


def test_the_measurement_does_not_run_under_the_autocast_of_the_caller(monkeypatch: pytest.MonkeyPatch):
    dtypes: set[torch.dtype] = set()
    original = _products._seconds
    monkeypatch.setattr(_products, "_MEASURED", {})
    monkeypatch.setattr(_products, "SAMPLE", (8, 8, 8))
    monkeypatch.setattr(
        _products, "_seconds", lambda call, device: (dtypes.add(call().dtype), original(call, device))[1]
    )
    with torch.autocast("cpu", dtype=torch.float16):
        _products.speeds(torch.device("cpu"), torch.bfloat16)
    assert dtypes == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("onednn", [False, True])
def test_float32_layers_by_either_library(onednn: bool, monkeypatch: pytest.MonkeyPatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    calls: list[tuple[int, ...]] = []
    original = _products._onednn
    monkeypatch.setattr(_products, "_onednn", lambda x, w: (calls.append(tuple(x.shape)), original(x, w))[1])
    monkeypatch.setattr(_products, "LARGE", 1)
    monkeypatch.setattr(_products, "speeds", lambda device: Speeds(1.0, 0.5 if onednn else 1.0, {}))
    w, b, x, t = draw(7, 6), draw(7), draw(2, 5, 6), draw(3, 2, 5, 6)
    y, jv = jvp(lambda x: F.linear(x.transpose(0, 1), w, b), x, t)
    assert bool(calls) == onednn
    torch.testing.assert_close(y, F.linear(x.transpose(0, 1), w, b))
    torch.testing.assert_close(jv, F.linear(t.transpose(1, 2), w))
    assert jvp(lambda x: F.linear(x, w.double()), x.double(), t.double())[1].dtype == torch.float64


def test_onednn_that_is_wrong_or_gone_is_not_used(monkeypatch: pytest.MonkeyPatch):
    x, w = draw(4, 5), draw(3, 5)
    monkeypatch.setattr(_products, "_onednn", lambda x, w: F.linear(x, w) + 1)
    assert not _products._onednn_is_right(x, w)

    def gone(x: Tensor, w: Tensor) -> Tensor:
        raise AttributeError

    monkeypatch.setattr(_products, "_onednn", gone)
    assert not _products._onednn_is_right(x, w)


@pytest.mark.parametrize(
    ("dtype", "x", "message"),
    [
        (torch.float64, draw(3), "accepted are torch.bfloat16, torch.float16 and None"),
        (torch.int8, draw(3), "accepted are"),
        (torch.bfloat16, draw(3).double(), "torch.float64 primals; it is for float32 ones"),
        (torch.bfloat16, draw(3).bfloat16(), "Leave it out"),
    ],
)
def test_bad_precision(dtype: torch.dtype, x: Tensor, message: str):
    with pytest.raises(ValueError, match=f"tangent_dtype=.*{message}"):
        jvp(torch.sin, x, x[None], tangent_dtype=dtype)
