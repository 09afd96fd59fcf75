"""Products of a JacobianOperator after the first: what is kept of the primal, and that a change is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from balanced_rep.autodiff import _products
from balanced_rep.autodiff._dual import is_dual
from balanced_rep.autodiff._tape import Tape, TapeRun, _mark
from balanced_rep.linalg import JacobianOperator, _operator

KEPT = 8 * (8 * 36 + 4 * 16 + 16 * 5)  # bytes of what the three linear layers of the model return
LAYERS = ["conv2d", "conv2d", "linear"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


class Model(nn.Module):
    """Two convolutions, a norm between them, and a linear layer on 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)
        self.last, self.register = nn.Linear(4, 5), nn.Buffer(torch.ones(5))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.silu(self.norm(self.first(x))))
        return F.gelu(self.last(h.flatten(2).transpose(1, 2)) * self.register)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Linear layers whose primal result is computed, and not taken from a tape."""
    ran: list[str] = []
    original = TapeRun.kept

    def noted(run: TapeRun, name: str, *args: object) -> Tensor:
        compute: Callable[[], Tensor] = args[-1]  # pyright: ignore[reportAssignmentType]
        return original(run, name, *args[:-1], lambda: (ran.append(name), compute())[1])  # pyright: ignore

    monkeypatch.setattr(TapeRun, "kept", noted)
    return ran


X, V = draw(1, 3, 6, 6), draw(108, 4)


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def afresh(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    return JacobianOperator(f, x, reuse=False) @ v


def test_products_agree_and_the_operator_says_what_it_keeps():
    model = Model()
    J, plain = JacobianOperator(model, X), JacobianOperator(model, X, reuse=False)
    assert "keeps" not in repr(J)
    for _ in range(3):
        same(J @ V, plain @ V)
    assert f"keeps {KEPT / 1e6:.3g} MB of the primal" in repr(J)
    assert "keeps" not in repr(plain)
    same(J @ V[:, :1], plain @ V[:, :1])
    same(J @ V[:, 0], plain @ V[:, 0])
    same(J.dense() @ V, plain @ V)
    same(JacobianOperator(model, X, chunk_size=1) @ V, plain @ V)
    assert (J @ V[:, :0]).shape == (80, 0)


def test_what_is_kept_is_not_written_through_what_is_detached():
    lin, x = nn.Linear(3, 3).double(), draw(16, 3)

    def f(x: Tensor) -> Tensor:
        h = lin(x)
        h.detach().mul_(2)
        return h * h

    J, v = JacobianOperator(f, x), draw(48, 2)
    want = J @ v
    same(J @ v, want)
    same(JacobianOperator(f, x, reuse=False) @ v, want)
    with torch.no_grad():
        same(want, (4 * lin(x)[..., None] * torch.einsum("oi,nik->nok", lin.weight, v.view(16, 3, 2))).flatten(0, 1))


def test_the_primal_of_linear_layers_runs_once(computed: list):
    J = JacobianOperator(Model(), X)
    J @ V
    assert computed == LAYERS
    assert J._tape is not None
    before = [kept.value.clone() for kept in J._tape.values]
    J @ V[:, :1]
    J.frobenius_norm(4)
    JacobianOperator(Model(), X, chunk_size=3)  # the first call is without tangents
    assert computed == LAYERS
    assert all(torch.equal(a, kept.value) for a, kept in zip(before, J._tape.values, strict=True))


CHANGES: dict[str, Callable[[Model], object]] = {
    "norm weight": lambda m: m.norm.weight.mul_(2),
    "conv weight": lambda m: m.first.weight.add_(1e-6),
    "one weight, behind the back of autograd": lambda m: m.last.weight.data[0, 1].add_(1e-3),
    "last bias": lambda m: m.last.bias.data.mul_(2),
    "buffer": lambda m: m.register.mul_(3),
    "exchanged rows": lambda m: m.last.weight.data.copy_(m.last.weight.data.flip(0)),
    "exchanged columns": lambda m: m.last.weight.data.copy_(m.last.weight.data.flip(1)),
    "another layer": lambda m: setattr(m, "last", nn.Linear(4, 5).double()),
    "no bias": lambda m: setattr(m.last, "bias", None),
    "padding": lambda m: setattr(m.second, "padding_mode", "circular"),
    "one layer less": lambda m: setattr(m, "last", nn.Identity()) or m.register.resize_(4),
    "one layer more": lambda m: setattr(m, "norm", nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)).double()),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_of_the_model_is_noticed(name: str):
    model = Model()
    J = JacobianOperator(lambda x: model(x), X)
    first = J @ V
    CHANGES[name](model)
    want = JacobianOperator(model, X, reuse=False)
    if want.shape == J.shape:
        same(J @ V, want @ V)
        same(J @ V, want @ V)  # from what is kept now
        assert name == "padding" or not torch.equal(J @ V, first)
    else:
        J._y_shape, J.shape = want._y_shape, want.shape
        same(J @ V, want @ V)


def test_arguments_and_paths_that_change_are_noticed(computed: list):
    w, c, state = draw(5, 5), draw(5), {"linear": True}

    def f(x: Tensor, c: Tensor) -> Tensor:
        y = (x * c).view(20, 5)
        return torch.sin(F.linear(y, w) if state["linear"] else F.conv1d(y[None], w.new_ones(20, 1, 1), groups=20)[0])

    x, v = draw(100), draw(100, 2)
    J = JacobianOperator(f, x, kwargs={"c": c.repeat(20)})
    for change in (lambda: J._kwargs["c"].mul_(3), lambda: state.update(linear=False)):
        J @ v
        change()
        same(J @ v, JacobianOperator(lambda x: f(x, J._kwargs["c"]), x, reuse=False) @ v)
    assert computed[:2] == ["linear", "linear"]


def test_a_function_that_is_never_the_same_keeps_nothing(computed: list):
    calls = [0]

    def f(x: Tensor) -> Tensor:
        calls[0] += 1
        return F.linear((x + calls[0]).view(20, 5), draw_weight).sin()

    draw_weight, x = draw(5, 5), draw(100)
    J = JacobianOperator(f, x)
    for _ in range(5):
        assert (J @ draw(100, 2)).isfinite().all()
    assert J._tape is not None
    assert J._tape.given_up
    assert "keeps" not in repr(J)
    assert calls[0] == 1 + 5 + 2  # two of the five products were repeated


def test_few_rows_are_not_worth_it(computed: list):
    w = draw(5, 5)
    J = JacobianOperator(lambda x: F.linear(x, w).sin(), draw(15, 5))
    for _ in range(2):
        J @ draw(75)
    assert computed == ["linear", "linear"]


def test_memory_that_does_not_suffice(monkeypatch: pytest.MonkeyPatch, computed: list):
    monkeypatch.setattr(_operator, "available_bytes", lambda device: 8 * (KEPT - 1))
    model = Model()
    J = JacobianOperator(model, X)
    for _ in range(2):
        same(J @ V, afresh(model, X, V))
    assert "keeps" not in repr(J)
    assert computed == LAYERS * 2


def test_writes_into_a_kept_value_do_not_reach_it():
    w, v = draw(5, 5), draw(100, 3)
    J = JacobianOperator(lambda x: F.linear(x, w).mul_(2).sin().add_(F.linear(x, w).relu_()), draw(20, 5))
    first = J @ v
    assert J._tape is not None
    assert J._tape.complete
    same(J @ v, first)


def test_lower_precision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_products, "lower_precision", lambda device, dtype: (True, ""))
    model, x, v = Model().float(), X.float(), V.float()
    J, want = JacobianOperator(model, x, tangent_dtype=torch.bfloat16), JacobianOperator(model, x) @ v
    for _ in range(2):
        error = ((J @ v - want).norm() / want.norm()).item()
        assert 1e-5 < error < 1e-2


def test_a_tape_that_becomes_too_large_keeps_nothing():
    tape, x, w = Tape(limit=1000), torch.ones(20, 4), torch.ones(4, 4)
    run = tape.run()
    for _ in range(3):
        assert run.kept("linear", x, w, None, (), lambda: torch.ones(10, 10)).sum() == 100
    assert run.finish()
    assert tape.given_up
    assert not tape.values
    assert tape.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_mark_shows_every_element_and_place(dtype: torch.dtype):
    x = draw(3, 4, 5, 6).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    for layout in (x, last, x.transpose(1, 2)):
        mark = _mark(layout)
        assert mark == _mark(layout.clone())
        for i in range(0, x.numel(), 7):
            other = layout.clone()
            at = tuple(int(n) for n in torch.unravel_index(torch.tensor(i), other.shape))
            other[at] += 1e-12 if dtype == torch.float64 else 0.1
            assert mark != _mark(other)
        assert mark != _mark(layout.flip(-1).contiguous())


def test_the_primal_has_the_same_bits_for_any_number_of_columns():
    """Layouts too: a batch of one tangent has strides that say nothing about channels last."""
    torch.manual_seed(0)
    first, second, last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 2, 3)
    layouts: list[bool] = []

    def f(x: Tensor) -> Tensor:
        h = F.silu(F.group_norm(first(x), 2))
        y = F.silu(F.group_norm(second(h) + 1, 2))
        q = y.flatten(2).mT.unsqueeze(1)
        y = F.scaled_dot_product_attention(q, q, q).squeeze(1).mT.reshape(h.shape) + h
        cat = torch.cat([h, y], 1)
        layouts.extend(t.tangents.stride(2) == 1 for t in (h, cat) if is_dual(t))  # pyright: ignore
        return last(F.silu(F.group_norm(cat, 4)))

    J = JacobianOperator(f, draw(1, 3, 6, 6).float())
    for k in (3, 1, 5, 1):
        J @ draw(108, k).float()
    assert J._tape is not None
    assert J._tape.complete
    assert J._tape.misses == 0
    assert len(layouts) == 8
    assert all(layouts)
