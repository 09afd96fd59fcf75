"""What ``br.jvp`` does with a model: which functions have rules, which fall back, where tangents stop, the cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from balanced_rep.autodiff._inputs import check_kwargs, read_inputs
from balanced_rep.autodiff._jvp import choose_tangent_dtype, run_chunks
from balanced_rep.autodiff._products import measured
from balanced_rep.autodiff._properties import TANGENT_STOPS
from balanced_rep.autodiff._run import capture, check_module
from balanced_rep.autodiff._session import Session
from balanced_rep.ops import philox_normal

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """Result of :func:`explain`.

    Attributes:
        n_tangents: K of the run.
        rules: Function to its number of calls that a rule served; composites are counted beside their parts.
        fallbacks: Function to its number of calls that ``torch.func`` differentiated.
        stops: Function to its number of calls at which tangents ended by nature: ``detach``, ``item``, ...
        primal: Function to its number of calls whose result has no derivative: comparisons, indices, ``zeros_like``.
        seconds: Function to seconds spent in it, on values with tangents; the first run, so caches are cold.
        reasons: Function to a remark on its fallback.
        remarks: What was decided about the run: the precision of tangents, the library that multiplies matrices.
    """

    n_tangents: int
    rules: dict[str, int]
    fallbacks: dict[str, int]
    stops: dict[str, int]
    primal: dict[str, int]
    seconds: dict[str, float]
    reasons: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        lines = [f"{'function':32} {'route':10} {'calls':>6} {'ms':>9} {'share':>6}"]
        routes = {"rule": self.rules, "fallback": self.fallbacks, "stops": self.stops, "primal": self.primal}
        rows = [(name, route, n) for route, calls in routes.items() for name, n in calls.items()]
        for name, route, n in sorted(rows, key=lambda row: -self.seconds.get(row[0], 0.0)):
            s = self.seconds.get(name, 0.0)
            lines.append(f"{name:32} {route:10} {n:6d} {1e3 * s:9.2f} {s / total:6.1%}")
        lines += [f"{name}: {why}" for name, why in self.reasons.items()]
        lines += self.remarks
        n, c = len(self.fallbacks), sum(self.fallbacks.values())
        lines.append(f"{self.n_tangents} tangents; {n} functions without a rule, {c} calls of them")
        return "\n".join(lines)


def _random(n_tangents: int, x: Any) -> Tensor | None:
    """Tangents for one leaf of the primals, if it can have some."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    items = torch.arange(n_tangents, device=x.device)
    return philox_normal(items, x.numel(), seed=0).view(n_tangents, *x.shape).to(x.dtype)


def explain(
    f: Callable[..., Any],
    primals: Any,
    tangents: Any = None,
    *,
    n_tangents: int = 4,
    output: str | None = None,
    tangent_dtype: torch.dtype | None = None,
    kwargs: dict[str, Any] | None = None,
) -> Explanation:
    """Runs :func:`jvp` once and says what happened to each function.

    Args:
        f: Function or module.
        primals: As for :func:`jvp`.
        tangents: As for :func:`jvp`; by default random ones for a single primal, or for the first of several: for
            every floating-point tensor in it.
        n_tangents: K of the random tangents.
        output: Name of an inner module to stop at.
        tangent_dtype: As for :func:`jvp`.
        kwargs: Keyword arguments of ``f``.

    Returns:
        Counts and times.
    """
    check_module(f)
    given = check_kwargs(kwargs)
    if tangents is None:
        several = isinstance(primals, tuple)
        random = pytree.tree_map(partial(_random, n_tangents), primals[0] if several else primals)
        tangents = (random, *[None] * (len(primals) - 1)) if several else random
    inputs = read_inputs(primals, tangents)
    call = f if output is None else capture(f, output)  # pyright: ignore[reportArgumentType]
    session = Session(module=f if isinstance(f, torch.nn.Module) else None, timed=True)
    choose_tangent_dtype(session, inputs, tangent_dtype)
    run_chunks(call, inputs, given, "auto", session)
    by_route: dict[str, dict[str, int]] = {route: {} for route in ("rule", "composite", "fallback", "primal")}
    for (route, name), n in session.calls.most_common():
        by_route[route][name] = n
    seconds: dict[str, float] = {}
    for (_, name), s in sorted(session.seconds.items(), key=lambda item: -item[1]):
        seconds[name] = seconds.get(name, 0.0) + s
    primal = by_route["primal"]
    return Explanation(
        inputs.n_tangents,
        by_route["rule"] | by_route["composite"],
        by_route["fallback"],
        {name: n for name, n in primal.items() if name in TANGENT_STOPS},
        {name: n for name, n in primal.items() if name not in TANGENT_STOPS},
        seconds,
        session.reasons,
        (*session.remarks, *measured()),
    )
