"""Comparison with torch.func.jvp, one tangent at a time, in torch's own transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from balanced_rep.autodiff import jvp
from balanced_rep.autodiff._fallback import differentiable


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def reference(f: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], **kwargs: Any) -> Any:
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def call(*values: Tensor) -> Any:
        args = [p.clone() if isinstance(p, Tensor) else p for p in primals]
        for i, value in zip(moving, values, strict=True):
            args[i] = value
        return f(*args, **kwargs)

    n = tangents[moving[0]].shape[0]
    with differentiable(), torch.no_grad():
        each = [
            torch.func.jvp(call, tuple(primals[i].clone() for i in moving), tuple(tangents[i][k] for i in moving))
            for k in range(n)
        ]
    return each[0][0], pytree.tree_map(lambda *ts: torch.stack(ts), *(t for _, t in each))


def assert_agrees(
    f: Callable[..., Any], *primals: Any, moving: tuple[int, ...] | None = None, k: int = 3, strict: bool = True,
    rtol: float = 1e-9, atol: float = 1e-10, **kwargs: Any,
) -> None:  # fmt: skip
    """``br.jvp`` against ``torch.func.jvp``; by default every floating-point argument moves."""
    if moving is None:
        moving = tuple(i for i, p in enumerate(primals) if isinstance(p, Tensor) and p.is_floating_point())
    tangents = tuple(
        rand(k, *p.shape, dtype=p.dtype, seed=10 + i) if i in moving else None for i, p in enumerate(primals)
    )
    want, want_t = reference(f, primals, tangents)
    before = [p.clone() if isinstance(p, Tensor) else p for p in primals]
    got, got_t = jvp(f, primals, tangents, strict=strict, **kwargs)
    for name, g, w in (("primal", got, want), ("tangents", got_t, want_t)):
        for i, (a, b) in enumerate(zip(pytree.tree_leaves(g), pytree.tree_leaves(w), strict=True)):
            assert type(a) is Tensor
            assert a.dtype == b.dtype, f"{name} {i}: {a.dtype} is not {b.dtype}"
            torch.testing.assert_close(
                a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name, j=i: f"{n} {j}: {m}"
            )
    for p, q in zip(primals, before, strict=True):
        assert not isinstance(p, Tensor) or torch.equal(p, q), "br.jvp changed its input"


@pytest.fixture
def agrees() -> Callable[..., None]:
    return assert_agrees


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    return rand
