"""Writing: in-place functions, views that share memory, out=, item assignment, buffers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff import UnsupportedError, jvp, trace


def _then(*steps: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        y = x * 1.5
        for step in steps:
            step(y)
        return y * x

    return f


W = torch.linspace(-1, 1, 6, dtype=torch.float64)


def _modulo(y: Tensor) -> None:
    row = y[1]
    row %= 0.3


def _floor(y: Tensor) -> None:
    row = y[1]
    row //= 0.3


CONV = torch.sin(torch.arange(4.0 * 3 * 9)).view(4, 3, 3, 3)

# Convolutions run in channels last, where other reshapes are views than in torch.
RESHAPED = {
    "reshape": lambda y: y.reshape(2, -1).mul_(2),
    "flatten": lambda y: y.flatten(1).mul_(2),
    "ravel": lambda y: y.ravel().mul_(2),
    "contiguous": lambda y: y.contiguous().mul_(2),
    "view": lambda y: y.view(2, -1).mul_(2),
    "reshape_as": lambda y: y.reshape_as(torch.empty(2, 100)).mul_(2),
    "of a chunk": lambda y: y.chunk(2, 1)[0].flatten(1).mul_(2),
    "of an activation": lambda y: y.relu_().flatten(1).mul_(y.sum()),
    "source written": lambda y: (v := y.flatten(1), y.mul_(2), y.add_(v.view_as(y)))[1],
    "item": lambda y: y.flatten(1).__setitem__((slice(None), 0), y[:, 0, 0, 0] * 3),
    "copy in torch": lambda y: y.permute(0, 2, 3, 1).reshape(2, 25, 4).mul_(2),
    "ravel of a part": lambda y: y[..., ::2].ravel().mul_(2),
    "contiguous in channels last": lambda y: y.relu().contiguous(memory_format=torch.channels_last).mul_(y.sum()),
    "copied to channels last": lambda y: (v := y.contiguous(memory_format=torch.channels_last), y.mul_(2), y.add_(v)),
    "part to channels last": lambda y: (
        v := y[:, 1:].to(memory_format=torch.channels_last),
        y.mul_(2),
        y[:, 1:].add_(v),
    ),
    "channels last of what waits": lambda y: (
        v := (z := y + 1).contiguous(memory_format=torch.channels_last),
        z.mul_(2),
        y.add_(z + v),
    ),
    "contiguous of what waits": lambda y: (v := (z := y + 1).contiguous(), z.mul_(2), y.add_(v)),
    "pixel_shuffle": lambda y: (v := F.pixel_shuffle(y, 2).flatten(), v.mul_(2), y.add_(v.view_as(y))),
    "view of an upsampled part": lambda y: y.add_(
        F.interpolate(y, scale_factor=2).unflatten(1, (2, 2)).view(2, -1).sum()
    ),
    "tokens, a copy in torch": lambda y: y.flatten(2).transpose(1, 2).contiguous().mul_(2),
    "through detach": lambda y: y.flatten(1).detach().zero_(),
}


@pytest.mark.parametrize("name", RESHAPED)
def test_writes_through_reshapes_of_a_convolution(name: str, agrees: Callable, draw: Callable):
    def f(x: Tensor) -> Tensor:
        y = F.conv2d(x, CONV, padding=1)
        RESHAPED[name](y)
        return y * 1.5

    x = draw(2, 3, 5, 5, dtype=torch.float32)
    if name == "through detach":
        y = jvp(f, x, x[None])[0]
        assert not y.any()
        return
    agrees(f, x, rtol=1e-4, atol=1e-5)
    if not name.startswith("view"):  # which torch refuses
        agrees(f, x.contiguous(memory_format=torch.channels_last), rtol=1e-4, atol=1e-5)


def test_a_reshape_whose_source_is_gone_costs_no_second_run(draw: Callable):
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        x = F.conv2d(x, CONV, padding=1)
        x = F.relu(x, inplace=True)
        x = x.flatten(1)
        return F.relu(x, inplace=True)

    x = draw(2, 3, 5, 5, dtype=torch.float32)
    jvp(f, x, x[None])
    assert len(calls) == 1


def test_writing_where_elements_share_memory_is_refused(agrees: Callable, draw: Callable):
    """In torch the result depends on the order of writing."""
    for write in (lambda v: v.mul_(2), lambda v: v.add_(v * 1.0), lambda v: F.silu(v, inplace=True)):
        with pytest.raises(UnsupportedError, match=r"elements share memory .* Write into a clone"):
            jvp(lambda x, w=write: w((x * 1).unfold(1, 3, 1)), draw(3, 6), draw(1, 3, 6))
    agrees(_then(lambda y: y.unfold(1, 3, 1)[:, 1].fill_(2)), draw(3, 6))
    agrees(_then(lambda y: y[:, :1].expand(3, 4).fill_(2)), draw(3, 6))
    agrees(_then(lambda y: y[0].expand(5, 6)[:, 2:].zero_()), draw(3, 6))
    agrees(_then(lambda y: y.unfold(1, 3, 3).mul_(2)), draw(3, 6))


INPLACE_ACTIVATIONS = {
    "relu": (), "relu6": (), "silu": (), "selu": (), "celu": (0.5,), "elu": (0.7,), "leaky_relu": (0.2,), "mish": (),
    "hardtanh": (-0.5, 0.5), "hardswish": (), "hardsigmoid": (), "threshold": (0.1, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", INPLACE_ACTIVATIONS)
def test_activations_in_place(name: str, agrees: Callable, draw: Callable):
    f, args, x = getattr(F, name), INPLACE_ACTIVATIONS[name], draw(3, 6)
    agrees(_then(lambda y: f(y, *args, inplace=True)), x)
    agrees(_then(lambda y: f(y[1], *args, inplace=True)), x)
    agrees(_then(lambda y: f(y, *args, True)), x)
    for space in (F, torch, Tensor):
        if (written := getattr(space, f"{name}_", None)) is not None:
            agrees(_then(lambda y, g=written: g(y.T[2], *args)), x)


def test_rrelu_in_evaluation_is_leaky_relu(draw: Callable):
    """torch has no forward mode for it."""
    x, t = draw(3, 6), draw(2, 3, 6)
    for f in (torch.nn.RReLU(0.1, 0.3, inplace=True).eval(), torch.nn.RReLU(0.1, 0.3).eval()):
        got = jvp(_then(f) if f.inplace else lambda x, f=f: f(x * 1.5) * x, x, t, strict=True)
        torch.testing.assert_close(got, jvp(lambda x: F.leaky_relu(x * 1.5, 0.2) * x, x, t))
    with pytest.raises(UnsupportedError, match="rrelu is in training mode"):
        jvp(torch.nn.RReLU(), x, t)


HALF = torch.arange(6) % 2 == 0

CASES = {
    "add_": _then(lambda y: y.add_(y * 2)),
    "add_ plain": _then(lambda y: y.add_(W, alpha=2)),
    "iadd": _then(lambda y: y.__iadd__(1)),
    "imul": _then(lambda y: y.__imul__(W)),
    "imod": _then(_modulo),
    "sub_ div_": _then(lambda y: y.sub_(1), lambda y: y.div_(y * y + 1)),
    "pow_": _then(lambda y: y.pow_(2)),
    "relu_": _then(lambda y: y.relu_()),
    "F.relu": _then(lambda y: F.relu(y, inplace=True)),
    "F.silu": _then(lambda y: F.silu(y, inplace=True)),
    "torch.relu_": _then(torch.relu_),
    "clamp_ neg_": _then(lambda y: y.clamp_(-1, 1), lambda y: y.neg_()),
    "sigmoid_ exp_": _then(lambda y: y.sigmoid_(), lambda y: y.exp_()),
    "copy_": _then(lambda y: y.copy_(y.flip(0))),
    "copy_ plain": _then(lambda y: y[:2].copy_(W)),
    "copy_ broadcast": _then(lambda y: y.copy_(y[0] * 2)),
    "zero_": _then(lambda y: y[1:].zero_()),
    "fill_": _then(lambda y: y[:, 0].fill_(3)),
    "fill_ dual": _then(lambda y: y[:, 0].fill_(y[0, 1])),
    "masked_fill_": _then(lambda y: y.masked_fill_(HALF, 0.5)),
    "view then write": _then(lambda y: y[:, 1:3].mul_(2), lambda y: y.view(-1)[3:7].add_(1)),
    "transposed view": _then(lambda y: y.T.mul_(y[:, :3].sum())),
    "chunk view": _then(lambda y: y.chunk(2, -1)[0].mul_(3)),
    "unbind view": _then(lambda y: y.unbind(0)[1].exp_()),
    "narrow view": _then(lambda y: y.narrow(1, 0, 2).copy_(y[:, 2:4].clone())),
    "setitem": _then(lambda y: y.__setitem__((slice(None), 0), 2.0)),
    "setitem dual": _then(lambda y: y.__setitem__((slice(None), slice(0, 2)), y[:, 3:5] * 2)),
    "setitem broadcast": _then(lambda y: y.__setitem__(slice(1, 3), y[0] * 2)),
    "setitem mask": _then(lambda y: y.__setitem__(y > 0, 1.0)),
    "setitem mask dual": _then(lambda y: y.__setitem__((slice(None), HALF), y[:, ~HALF] * 2)),
    "setitem index": _then(lambda y: y.__setitem__(torch.tensor([2, 0]), y[:2] * 3)),
    "setitem plain tensor": _then(lambda y: y.__setitem__(1, W)),
    "setitem leading one": _then(lambda y: y.__setitem__(1, (y[2] * 2)[None])),
    "augmented item": _then(lambda y: y.__setitem__(0, y[0].__iadd__(y[1]))),
    "addcmul_": _then(lambda y: y.addcmul_(y, W, value=0.5)),
    "clone does not share": lambda x: (lambda y: (y.clone().mul_(3) + y, y)[0])(x * 2),
    "reshape that copies": lambda x: (lambda y: (y.T.reshape(-1).mul_(3), y)[1])(x * 2),
    "input itself": lambda x: x.mul_(2) * x,
    "no rule, in place": _then(lambda y: y.lgamma_()),
    "hypot_": _then(lambda y: y.hypot_(W)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_in_place(name: str, agrees: Callable, draw: Callable):
    agrees(CASES[name], draw(3, 6), strict=name not in ("no rule, in place", "hypot_", "imod"))


def test_floor_division_in_place(draw: Callable):
    """torch has no forward mode for it; the result is piecewise constant."""
    x, t = draw(3, 6), draw(2, 3, 6)
    y, jv = jvp(_then(_floor), x, t)
    torch.testing.assert_close(y, _then(_floor)(x))
    rest = torch.tensor([0, 2])
    torch.testing.assert_close(jv[:, rest], (3 * x * t)[:, rest])
    torch.testing.assert_close(jv[:, 1], (x[1] * 1.5 // 0.3) * t[:, 1])


DETACHED = {
    "detach of what waits": lambda x: (lambda h: (h.detach().mul_(2), h)[1])(x + 1),
    "data of what waits": lambda x: (lambda h: (h.data.mul_(2), h)[1])(x * W),
    "by keyword": lambda x: (lambda h: (torch.detach(input=h).mul_(2), h)[1])(x + 1),
    "of a view": lambda x: (lambda h: (h[1:].detach().mul_(2), h)[1])(x + 1),
    "not its source": lambda x: (lambda h: ((h / 1.0).detach().add_(1), h)[1])(x * 1),
    "not the input": lambda x: ((x + 1).detach().mul_(2), x * 1)[1],
}


@pytest.mark.parametrize("name", DETACHED)
def test_what_is_detached_shares_memory_with_its_source_alone(name: str, draw: Callable):
    x, t, f = draw(3, 6), draw(2, 3, 6), DETACHED[name]
    y, jv = jvp(f, x, t)
    torch.testing.assert_close(y, f(x))
    torch.testing.assert_close(jv, t * W if name == "data of what waits" else t)


@pytest.mark.parametrize("compare", ["gt_", "eq_", "logical_not_"])
def test_comparisons_in_place(compare: str, draw: Callable):
    def f(x: Tensor) -> list[Tensor]:
        h = x + 1
        getattr(h, compare)(*[0] if compare != "logical_not_" else [])
        return [h, x * 1]

    x, t = draw(3, 6), draw(2, 3, 6)
    (y, same), (jv, same_t) = jvp(f, x, t)
    torch.testing.assert_close([y, same], f(x))
    torch.testing.assert_close([jv, same_t], [torch.zeros_like(t), t])


def test_weights_that_are_exchanged_while_a_product_waits(draw: Callable):
    def f(x: Tensor) -> Tensor:
        weight = torch.nn.Parameter(W.clone(), requires_grad=False)
        y = x * weight
        weight.data = torch.zeros_like(W)
        return y

    x, t = draw(3, 6), draw(2, 3, 6)
    torch.testing.assert_close(jvp(f, x, t), (x * W, t * W))


def test_an_in_place_function_that_writes_nothing_leaves_what_waits(agrees: Callable, draw: Callable):
    def f(x: Tensor) -> Tensor:
        x = x * 1
        y = F.dropout(x + 1, 0.5, False, inplace=True)
        x.mul_(2)
        return x + y

    agrees(f, draw(3, 6))


def test_gradients_enabled_inside(draw: Callable):
    torch.manual_seed(0)
    lin, scale = torch.nn.Linear(6, 6).double(), torch.nn.Parameter(W.clone())

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            h = lin(x) * scale
            h[0] = h[1] * 2
            h = torch.cat([h, lin(h) + scale])
            return torch.mul(h, scale, out=torch.empty_like(h)), scale * 2  # the latter with a graph of torch's own

    x, t = draw(3, 6), draw(2, 3, 6)

    def plain(x: Tensor) -> Tensor:
        h = lin(x) * scale
        h = torch.cat([h[1:2] * 2, h[1:]])
        return torch.cat([h, lin(h) + scale]) * scale

    with torch.no_grad():
        want = plain(x), torch.func.vmap(lambda v: torch.func.jvp(plain, (x,), (v,))[1])(t)
    (y, constant), (jv, none) = jvp(f, x, t)
    assert not any(v.requires_grad for v in (y, constant, jv, none))
    torch.testing.assert_close((y, jv), want)


def _filled(x: Tensor) -> Tensor:
    y = torch.zeros(3, 8, dtype=x.dtype)
    y[:, :6] = x
    y[:, 6:] = 1
    return y * y


def _added(x: Tensor) -> Tensor:
    y = x.new_ones(3, 6)
    y.add_(x).mul_(x)
    return y


def _copied(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y.copy_(x)
    return y.sin_()


def _out(x: Tensor) -> Tensor:
    y = torch.empty(3, 6, dtype=x.dtype)
    torch.mul(x, x, out=y)
    return torch.add(y, 1, out=y)


@pytest.mark.parametrize("f", [_filled, _added, _copied], ids=lambda f: f.__name__)
def test_new_buffers_take_tangents(f: Callable, agrees: Callable, draw: Callable):
    agrees(f, draw(3, 6))


def test_out(draw: Callable):
    x, t = draw(3, 6), draw(2, 3, 6)
    y, jv = jvp(_out, x, t)
    torch.testing.assert_close(y, x * x + 1)
    torch.testing.assert_close(jv, 2 * x * t)


def test_buffers_of_others_are_refused(draw: Callable):
    x, mine = draw(3, 6), torch.zeros(3, 6, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"copy_ writes a value with tangents into a tensor of shape \(3, 6\)"):
        jvp(lambda x: mine.copy_(x), x, x[None])
    with pytest.raises(UnsupportedError, match="item assignment writes"):
        jvp(lambda x: mine.__setitem__(0, x[0]), x, x[None])

    def through_a_view(x: Tensor) -> Tensor:
        y = torch.zeros(3, 6, dtype=x.dtype)
        y[0].copy_(x[0])
        return y

    with pytest.raises(UnsupportedError, match="is a view"):
        jvp(through_a_view, x, x[None])

    def seen_by_a_view(x: Tensor) -> Tensor:
        y = torch.zeros(3, 6, dtype=x.dtype)
        row = y[0]
        y.copy_(x)
        return row

    with pytest.raises(UnsupportedError, match="copy_"):
        jvp(seen_by_a_view, x, x[None])
    with pytest.raises(UnsupportedError, match="int64"):
        jvp(lambda x: torch.zeros(3, 6, dtype=torch.long).copy_(x), x, x[None])
    assert type(mine) is Tensor
    assert not mine.any()


@pytest.mark.parametrize(
    "read",
    [lambda b: torch.as_tensor(b, dtype=torch.float32), lambda b: torch.full((3,), b[0, 0])],
    ids=["as_tensor", "full"],
)
def test_code_below_torch_function_never_sees_a_buffer_as_it_was(read: Callable, draw: Callable):
    def f(x: Tensor) -> Tensor:
        buffer = torch.zeros(3, 6, dtype=x.dtype)
        held = [buffer]
        buffer.add_(x)
        return read(held[0])

    x, t = draw(3, 6), draw(2, 3, 6)
    with pytest.raises(UnsupportedError, match=r"below the level .* x\.to\(dtype\)"):
        jvp(f, x, t)


def test_a_buffer_that_became_a_dual_is_traced(draw: Callable):
    x, t = draw(3, 6), draw(2, 3, 6)
    y, jv = trace(_added, x, 2)(x, t)
    torch.testing.assert_close((y, jv), ((1 + x) * x, t * (1 + 2 * x)))


@pytest.mark.parametrize("name", ["squeeze_", "t_", "unsqueeze_", "detach_", "resize_", "as_strided"])
def test_changes_of_shape_in_place_are_refused(name: str, draw: Callable):
    args = {"unsqueeze_": (0,), "resize_": (3,), "as_strided": ((3,), (1,))}.get(name, ())
    with pytest.raises(UnsupportedError, match=name):
        jvp(lambda x: getattr(x, name)(*args), draw(3, 6), draw(1, 3, 6))


def test_in_place_that_does_not_fit(draw: Callable):
    with pytest.raises(RuntimeError, match=r"\(3, 6\)"):
        jvp(lambda x: x[0].mul_(x), draw(3, 6), draw(1, 3, 6))
