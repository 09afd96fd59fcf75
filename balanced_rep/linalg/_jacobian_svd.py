"""The leading singular triples of a network's Jacobian, from products alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from balanced_rep.linalg._certificate import lower_tail
from balanced_rep.linalg._dense import clamp_note, dense_svd
from balanced_rep.linalg._jacobian_products import Products
from balanced_rep.linalg._jacobian_search import JacobianProgress, Settings, Triples, search_jacobian
from balanced_rep.linalg._operator import JacobianOperator
from balanced_rep.linalg._plan import Options, as_integer, as_share
from balanced_rep.linalg._result import ConvergenceWarning, SVDInfo, SVDResult
from balanced_rep.linalg._small import positive_pivots

__all__ = ["jacobian_svd"]

MODES = ("auto", "jvp", "jvp+vjp")
BLOCK = 8
ROUNDS = 100
TRUSTED = 0.02  # asymmetry within the Krylov space beyond which that of the whole Jacobian can matter


def jacobian_svd(
    f: Callable[..., Any],
    x: Tensor,
    k: int,
    *,
    mode: str = "auto",
    tol: float = 1e-2,
    batch: bool = False,
    block: int = BLOCK,
    rounds: int = ROUNDS,
    precision: str = "full",
    start: SVDResult | None = None,
    seed: int | tuple[int, int] = 0,
    progress: Callable[[JacobianProgress], object] | None = None,
    output: str | None = None,
    chunk_size: int | Literal["auto"] | None = "auto",
    kwargs: dict[str, Any] | None = None,
    check_finite: bool = True,
) -> SVDResult:
    r"""The k leading singular values and vectors of J = df/dx at x, without forming J.

    The Jacobian of a denoiser is nearly symmetric, so that forward products suffice (docs/linalg/jacobian_svd.md). How
    nearly, is measured by a few products with J^T; where it is not enough, rounds with both kinds follow.

    Args:
        f: Function or module of one tensor, in evaluation mode, deterministic.
        x: The point.
        k: Triples.
        mode: "auto"; "jvp" never takes a product with J^T, and warns if J does not look symmetric; "jvp+vjp" takes both
            from the start. J that is not square is left to the last one.
        tol: Relative error of the singular values to stop at, estimated from how they change from round to round.
        batch: The first dim of x and of f(x) are samples that f treats apart: one Jacobian each, all in the same
            passes. Sample i gets the randomness of a call on it alone with ``seed=(seed, i)``, and may take part in
            more rounds.
        block: Tangents per round.
        rounds: Largest number of rounds.
        precision: "full", or "bfloat16" to begin under autocast and finish in full precision: where the hardware makes
            that faster.
        start: A previous result, at the same or a nearby point: its vectors are where the search begins.
        seed: Key of the random start, or (seed, number of the first sample).
        progress: Called with a :class:`JacobianProgress` after every round.
        output: Name of a module inside f whose output is taken.
        chunk_size: Tangents per pass, as in :func:`balanced_rep.jvp`: by default what fits into memory.
        kwargs: Keyword arguments of f.
        check_finite: Refuse products that hold NaN or infinities.

    Returns:
        ``(U, S, Vh)``: ``(m, k)``, ``(k,)``, ``(k, n)`` for n elements of x and m of f(x), flattened; in front of them
        the samples. In the dtype of f(x), float32 for half types. ``info`` holds residuals
        :math:`\|J^T u_i - s_i v_i\|` (those before the last refinement; estimated where J^T was not used), asymmetry,
        rounds and passes, and an upper bound of the relative error.

    Raises:
        ValueError: If an argument is out of range, or a product holds NaN or infinities.
        TypeError: If x is no floating-point tensor, or f returns none; if k, block or rounds is no integer.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 3, 400, dtype=torch.float64)
        >>> U, S, Vh = jacobian_svd(lambda x: x**3, x, 4, tol=1e-4)
        >>> torch.allclose(S, 3 * x[-4:].flip(0) ** 2, rtol=1e-4)
        True
    """
    _check(mode, tol, precision, progress)
    k, block, rounds = (
        as_integer(f"jacobian_svd: {name}", value, least)
        for name, value, least in (("k", k, 0), ("block", block, 1), ("rounds", rounds, 1))
    )
    options = Options.checked(k, None, 8, None, None, "full", False, seed, check_finite)
    call = {"batch": batch, "output": output, "chunk_size": chunk_size, "kwargs": kwargs}
    J = JacobianOperator(f, x, **call)
    m, n = J.shape[-2:]
    if k == 0 or m == 0 or is_formed(n, k):
        return _from_matrix(J, options)
    wanted = min(k, m, n)
    settings = Settings(wanted, mode, tol, block, rounds, options.seed, progress)
    items = torch.arange(J.shape[0] if batch else 1, device=J.device) + options.item
    begin, spent = _start(start, J, wanted), 0
    with torch.no_grad():
        if precision == "bfloat16":
            rough = JacobianOperator(_autocast(f, x.device.type), x, **call)
            found = search_jacobian(_products(rough, check_finite), settings, items, begin)
            begin, spent = (found.Vh, found.S), found.passes
        found = search_jacobian(_products(J, check_finite), settings, items, begin)
    found.passes = found.passes + spent
    result = _result(found, J, options)
    _warn(found, result, mode)
    return result


def is_formed(n: int, k: int) -> bool:
    """Whether the whole Jacobian is cheaper than a search for k triples: n products against about as many."""
    return n <= 4 * (k + 8)


def _check(mode: str, tol: float, precision: str, progress: Callable[..., object] | None) -> None:
    if mode not in MODES:
        raise ValueError(f"jacobian_svd: mode={mode!r}; known are {', '.join(map(repr, MODES))}")
    as_share("jacobian_svd: tol", tol)
    if precision not in ("full", "bfloat16"):
        raise ValueError(f"jacobian_svd: precision={precision!r}; known are 'full' and 'bfloat16'")
    if progress is not None and not callable(progress):
        raise ValueError("jacobian_svd: progress must be callable")


def _products(J: JacobianOperator, check_finite: bool) -> Products:
    """Products by rows, with a batch dimension in any case."""

    def through(operator: Any) -> Callable[[Tensor], Tensor]:
        def apply(rows: Tensor) -> Tensor:
            columns = rows.mT if J.batch else rows[0].mT
            product = (operator @ columns).mT
            return product if J.batch else product.unsqueeze(0)

        return apply

    shape = (J.shape[0] if J.batch else 1, J.shape[-2], J.shape[-1])
    return Products(through(J), through(J.T), shape, J.dtype, J.device, check_finite)


def _autocast(f: Callable[..., Any], device: str) -> Callable[..., Any]:
    def rounded(x: Tensor, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return f(x, **kwargs)

    return rounded


def _start(start: SVDResult | None, J: JacobianOperator, k: int) -> tuple[Tensor, Tensor] | None:
    """Right vectors and values of a previous result, with a batch dimension."""
    if start is None:
        return None
    if not isinstance(start, SVDResult):
        raise TypeError(f"jacobian_svd: start is {type(start).__name__}; a result of jacobian_svd is needed")
    Vh, S = start.Vh.detach().to(J.device), start.S.detach().to(J.device, torch.float64)
    lead = J.shape[:-2]
    if Vh.shape[:-2] != lead or Vh.shape[-1] != J.shape[-1]:
        raise ValueError(
            f"jacobian_svd: start has right vectors of shape {tuple(Vh.shape)}; for this x, expected is "
            f"({', '.join(map(str, (*lead, 'k', J.shape[-1])))})"
        )
    Vh, S = (Vh, S) if J.batch else (Vh.unsqueeze(0), S.unsqueeze(0))
    return Vh[:, :k].to(torch.float64), S[:, :k]


def _from_matrix(J: JacobianOperator, options: Options) -> SVDResult:
    """Small Jacobians, as matrices."""
    n = J.shape[-1]
    with torch.no_grad():
        result = dense_svd(J.dense(), replace(options, k=min(options.k, *J.shape[-2:])))
    info = replace(
        result.info,
        passes=torch.full_like(result.info.passes, n),
        residuals=torch.zeros_like(result.S, dtype=torch.float64),
        notes=(*clamp_note(options.k, *J.shape[-2:]), f"from the whole Jacobian: n = {n} is small"),
    )
    return SVDResult(*result, info=info)


def _result(found: Triples, J: JacobianOperator, options: Options) -> SVDResult:
    m, n = J.shape[-2:]
    out = torch.promote_types(J.dtype, torch.float32)
    Uh, Vh = positive_pivots(found.Uh.to(out), found.Vh.to(out))
    rank = (found.S > max(m, n) * torch.finfo(out).eps * found.S[:, :1]).sum(-1)
    _, images = found.probes
    energy = found.S.square().sum(-1)
    # The start block's images bound the norm from above, and so the error; see _certificate.
    norm_squared = torch.maximum(
        images.square().sum((-2, -1)) / (images.shape[1] * lower_tail(images.shape[1])), energy
    )
    share = 1 - energy / torch.where(norm_squared > 0, norm_squared, 1.0)
    info = SVDInfo(
        rank=rank,
        rel_error=torch.where(norm_squared > 0, share.clamp_min(0), 0.0).sqrt(),
        tight=torch.zeros_like(found.converged),
        converged=found.converged,
        rounds=found.rounds,
        passes=found.passes,
        method="jvp+vjp" if bool(found.two_sided.any()) else "jvp",
        seed=options.seed,
        residuals=found.residuals,
        asymmetry=None if math.isnan(float(found.asymmetry[0])) else found.asymmetry,
        notes=clamp_note(options.k, m, n),
    )
    triple = (Uh.mT, found.S.to(out), Vh)
    if not J.batch:
        triple, info = tuple(value.squeeze(0) for value in triple), info.map(lambda value: value.squeeze(0))
    return SVDResult(*triple, info=info)


def _warn(found: Triples, result: SVDResult, mode: str) -> None:
    if not bool(found.converged.all()):
        warnings.warn(
            f"jacobian_svd: {int((~found.converged).sum())} of {len(found.converged)} Jacobians did not reach tol in "
            "the rounds allowed; info.converged says which. Allow more rounds, or go on from this result with start=",
            ConvergenceWarning,
            stacklevel=3,
        )
    if mode == "jvp" and bool((found.asymmetry > TRUSTED).any()):
        warnings.warn(
            f"jacobian_svd: the Jacobian is not symmetric: {float(found.asymmetry.max()):.2g} in the Krylov space, "
            "more outside of it. Singular values are low by about half the square of the asymmetry; take mode='auto'",
            UserWarning,
            stacklevel=3,
        )
