"""Random compositions of torch functions, writes through views among them, against torch.func.jvp."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from balanced_rep.autodiff import Dual, jvp
from balanced_rep.autodiff._fallback import differentiable
from balanced_rep.autodiff._registry import RULES

LARGE = torch.sin(torch.arange(24.0, dtype=torch.float64) ** 1.5).view(4, 2, 3)


def _write_first(a: Tensor, b: Tensor) -> Tensor:
    a[..., 0] = b[..., -1].cos()
    return a


def _fill(a: Tensor, b: Tensor) -> Tensor:
    if 0 in a.stride():
        raise RuntimeError("torch warns here, and will refuse it one day")
    return a.masked_fill_(b > 0, 0.25)


# Functions of two values (the second is often left alone); shapes may change, and what does not fit is skipped.
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (b * b + 1),
    "constant - x": lambda a, b: LARGE - a,
    "x constant": lambda a, b: a * LARGE[0],
    "where": lambda a, b: torch.where(a > 0, a, b),
    "where constant": lambda a, b: torch.where(a > 0, a, LARGE),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 0.5),
    "clamp": lambda a, b: a.clamp(max=b),
    "maximum": torch.maximum,
    "silu": lambda a, b: F.silu(a),
    "gelu": lambda a, b: F.gelu(a),
    "tanh": lambda a, b: a.tanh(),
    "celu": lambda a, b: F.celu(a),
    "relu": lambda a, b: F.relu(a),
    "abs": lambda a, b: a.abs(),
    "sqrt": lambda a, b: (a * a + 1).sqrt(),
    "plus": lambda a, b: +a,
    "softmax": lambda a, b: a.softmax(-1),
    "layer_norm": lambda a, b: F.layer_norm(a, a.shape[-1:]),
    "rms_norm": lambda a, b: F.rms_norm(a, a.shape[-1:]),
    "group_norm": lambda a, b: F.group_norm(a, 1),
    "std": lambda a, b: a.std(-1, keepdim=True),
    "norm": lambda a, b: a.norm(dim=-1),
    "normalize": lambda a, b: F.normalize(a, dim=-1),
    "logsumexp": lambda a, b: a.logsumexp(0),
    "mean": lambda a, b: a.mean(0, keepdim=True),
    "sum": lambda a, b: a.sum(),
    "max": lambda a, b: a.max(-1).values,
    "amax": lambda a, b: a.amax(0),
    "cumsum": lambda a, b: a.cumsum(-1),
    "matmul": lambda a, b: a @ b.transpose(-2, -1),
    "linear": lambda a, b: F.linear(a, b),
    "einsum": lambda a, b: torch.einsum("...i,...j->...ij", a, b),
    "attention": lambda a, b: F.scaled_dot_product_attention(a, b, b),
    "fft": lambda a, b: torch.fft.rfft(a).abs(),
    "cat": lambda a, b: torch.cat([a, b], -1),
    "stack": lambda a, b: torch.stack([a, b.expand_as(a)]),
    "flip": lambda a, b: a.flip(-1),
    "pad": lambda a, b: F.pad(a, (1, 0), value=2.0),
    "gather": lambda a, b: a.gather(-1, a.argsort(-1)),
    "mask": lambda a, b: a[a > 0],
    "index": lambda a, b: a[..., [0, -1]],
    "view": lambda a, b: a.view(-1),
    "reshape": lambda a, b: a.reshape(-1, 2),
    "transpose": lambda a, b: a.transpose(-2, -1),
    "unsqueeze": lambda a, b: a.unsqueeze(0),
    "squeeze": lambda a, b: a.squeeze(),
    "select": lambda a, b: a.select(-1, -1),
    "item": lambda a, b: a[0],
    "narrow": lambda a, b: a.narrow(-1, 1, 1),
    "diagonal": lambda a, b: a.diagonal(dim1=-2, dim2=-1),
    "hsplit": lambda a, b: a.hsplit(2)[1],
    "ravel": lambda a, b: a.ravel(),
    "contiguous": lambda a, b: a.contiguous(),
    "slice": lambda a, b: a[..., ::2],
    "chunk": lambda a, b: a.chunk(2, -1)[0],
    "expand": lambda a, b: a.expand(2, *a.shape),
    "unfold": lambda a, b: a.unfold(-1, 2, 1),
    "clone": lambda a, b: a.clone(),
    # A copy of b: where it shares memory with a, torch's own forward mode takes the value already overwritten.
    "add_": lambda a, b: a.add_(b * 1.0),
    "mul_": lambda a, b: a.mul_(b * 1.0),
    "tanh_": lambda a, b: a.tanh_(),
    "selu_": lambda a, b: F.selu(a, inplace=True),
    "relu_": lambda a, b: F.relu(a, inplace=True),
    "copy_": lambda a, b: a.copy_(b * 1.0),
    "write": _write_first,
    "fill": _fill,
    "zero_": lambda a, b: a[..., :1].zero_(),
}


def _run(steps: list[tuple[str, int, int]], *primals: Tensor) -> list[Tensor]:
    values = [*primals]
    for name, i, j in steps:
        values.append(STEPS[name](values[i], values[j]))
    return [v * 1.0 for v in values]


def _fits(steps: list[tuple[str, int, int]], *primals: Tensor) -> bool:
    try:
        values = _run(steps, *(p.clone() for p in primals))
    except (RuntimeError, IndexError, ValueError):
        return False
    return all(v.numel() <= 500 and bool((v.abs() < 1e3).all()) and not v.is_complex() for v in values)


SHAPES = [(2, 3), (4,), (1, 4), (2, 3, 4), (4, 4), (1, 1), ()]
WRITES = [name for name in STEPS if name.endswith("_")]
Program = tuple[tuple[int, ...], int, list[tuple[str, int, int]]]


def _inputs(shape: tuple[int, ...], k: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(k + sum(shape))
    sizes = (shape, shape, (k, *shape), (k, *shape))
    return [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]


def _program(rng: random.Random, name: str) -> Program | None:
    """Some functions, ``name`` on one of their results, often a write into what that returns, some more."""
    shape, k = rng.choice(SHAPES), rng.randint(1, 3)
    x, y, *_ = _inputs(shape, k)
    steps: list[tuple[str, int, int]] = []

    def add(name: str, on: int | None = None) -> bool:
        n = 2 + len(steps)
        step = (name, n - 1 - rng.randrange(min(n, 3)) if on is None else on, rng.randrange(n))
        if fits := _fits([*steps, step], x, y):
            steps.append(step)
        return fits

    for _ in range(rng.randint(0, 3)):
        add(rng.choice([*STEPS]))
    if not add(name):
        return None
    if rng.random() < 0.6:
        add(rng.choice(WRITES), on=1 + len(steps))
    for _ in range(rng.randint(0, 2)):
        add(rng.choice([*STEPS]))
    return shape, k, steps


def _programs(name: str, count: int) -> list[Program]:
    rng = random.Random(name)
    drawn = (_program(rng, name) for _ in range(100 * count))
    return [program for _, program in zip(range(count), (p for p in drawn if p is not None), strict=False)]


def _check(shape: tuple[int, ...], k: int, steps: list[tuple[str, int, int]]) -> None:
    """Every value is read at the end: writes through views have to be seen wherever torch shows them."""
    x, y, tx, ty = _inputs(shape, k)

    def f(a: Tensor, b: Tensor) -> list[Tensor]:
        return _run(steps, a, b)

    got, got_t = jvp(f, (x, y), (tx, ty))
    with differentiable(), torch.no_grad():
        each = [torch.func.jvp(f, (x.clone(), y.clone()), (a.clone(), b.clone())) for a, b in zip(tx, ty, strict=True)]
    for n, (value, tangent) in enumerate(zip(got, got_t, strict=True)):
        where = f"value {n} of {steps} on {shape}"
        torch.testing.assert_close(value, each[0][0][n], rtol=1e-8, atol=1e-9, msg=lambda m, w=where: f"{w}: {m}")
        want = torch.stack([t[n] for _, t in each])
        torch.testing.assert_close(
            tangent, want, rtol=1e-6, atol=1e-7, equal_nan=True, msg=lambda m, w=where: f"tangent of {w}: {m}"
        )


def _check_all(programs: list[Program]) -> None:
    for program in programs:
        _check(*program)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.filterwarnings("ignore:std")
def test_random_programs(name: str):
    programs = _programs(name, 5)
    assert len(programs) == 5
    _check_all(programs)


# A step, and the rule that serves it.
BROKEN = {
    "add": "add", "mul": "mul", "div": "div", "where": "where", "silu": "silu", "softmax": "softmax", "norm": "norm",
    "layer_norm": "layer_norm", "std": "std", "max": "max", "cumsum": "cumsum", "matmul": "matmul", "einsum": "einsum",
    "attention": "scaled_dot_product_attention", "cat": "cat", "gather": "gather", "selu_": "selu", "pad": "pad",
    "view": "view", "transpose": "transpose", "select": "select", "item": "__getitem__", "slice": "__getitem__",
    "chunk": "chunk", "narrow": "narrow", "diagonal": "diagonal", "hsplit": "hsplit", "unsqueeze": "unsqueeze",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore:std")
def test_they_fail_where_a_rule_is_broken(name: str, monkeypatch: pytest.MonkeyPatch):
    """Tangents that are a little off, or a copy in place of a view."""

    def broken(rule: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def spoiled(x: Dual) -> Dual:
            stack = x.stack.clone()
            if kind != "view":
                stack[1:] *= 1.001
            return Dual(stack)

        return lambda *args, **kwargs: pytree.tree_map_only(Dual, spoiled, rule(*args, **kwargs))

    for key, rule in [*RULES.items()]:
        if rule.name == BROKEN[name]:
            monkeypatch.setitem(RULES, key, dataclasses.replace(rule, fn=broken(rule.fn, rule.kind)))
    with pytest.raises(AssertionError, match="value"):
        _check_all(_programs(name, 40))
