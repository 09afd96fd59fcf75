"""Randomized SVD of an operator that is known by its products alone."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from balanced_rep.linalg._certificate import PROBES, by_difference, by_probes
from balanced_rep.linalg._dense import clamp_note, dense_svd
from balanced_rep.linalg._external import Centred, External, Turned
from balanced_rep.linalg._krylov import search
from balanced_rep.linalg._matrix import scaled_by
from balanced_rep.linalg._plan import Options, Plan, full_precision, make_plan
from balanced_rep.linalg._result import SVDInfo, SVDResult
from balanced_rep.linalg._small import double, gaussian, positive_pivots, real

__all__ = ["operator_svd"]

DROWNED = 0.01  # share of the deviations from column means that may be rounding
PROBE_STREAM = 2**20  # apart from those of the search


def operator_svd(A: Any, options: Options) -> SVDResult:
    """Decomposes an operator; see :func:`balanced_rep.randomized_svd`.

    Args:
        A: The operator.
        options: Checked arguments; ``precision`` is the operator's own.

    Returns:
        Triples as torch tensors, as numpy arrays for a numpy operator; ``info.passes`` counts columns.
    """
    inner = External(A, options.check_finite)
    with torch.no_grad(), full_precision(inner.device):
        M = Centred(inner) if options.center and inner.long else inner
        m, n = inner.long, inner.short
        plan = make_plan(options, max(m, n), min(m, n), torch.float64, M.device)
        if plan.exact or 0 in (m, n):
            result = dense_svd(_dense(M), replace(options, center=False))
        else:
            result = _iterated(M, plan, options)
            if options.rounds is None and not bool(result.info.converged.all()):  # as many products as its columns are
                result = dense_svd(_dense(M), replace(options, center=False))
                note = f"from the whole matrix: the iteration came near its size before tol={options.tol}"
                result = SVDResult(*result, info=replace(result.info, notes=(*result.info.notes, note)))
    notes = result.info.notes
    if isinstance(M, Centred) and M.lost > DROWNED:
        notes = (
            *notes,
            f"means are so large that rounding to {M.dtype} takes {M.lost:.1g} of the deviations from them",
        )
        warnings.warn(f"randomized_svd: {notes[-1]}; take an operator in float64", UserWarning, stacklevel=3)
    info = replace(result.info, passes=torch.full_like(result.info.rounds, inner.columns), notes=notes)
    U, S, Vh = result
    triple = [U, torch.ldexp(S, inner.exponent.unsqueeze(-1)), Vh]
    if not inner.stacked:
        triple, info = [value.squeeze(0) for value in triple], info.map(lambda value: value.squeeze(0))
    if inner.is_numpy:
        triple, info = [np.asarray(value.resolve_conj()) for value in triple], info.map(lambda value: value.numpy()[()])
    return SVDResult(*triple, info=info)


def _dense(A: External | Centred) -> Tensor:
    """The matrix ``(B, m, n)`` from products with the identity; with its transpose if it is wide and has one."""
    wide = A.long < A.short
    size = A.long if wide else A.short
    unit = torch.eye(size, dtype=A.dtype, device=A.device).expand(A.batch, size, size)
    return A.adjoint(unit).to(A.dtype) if wide else A.forward(unit).mH


def _iterated(A: External | Centred, plan: Plan, options: Options) -> SVDResult:
    M = A if A.long >= A.short else Turned(A)
    items = torch.arange(M.batch, device=M.device) + options.item
    total, probed = M.norm_squared, None
    if total is None:
        G, image = _probed(M, items, options, PROBE_STREAM)
        image = scaled_by(image, -M.scale(image.abs().amax((-2, -1))))
        total, probed = image.abs().square().sum((-2, -1)) / PROBES, (G, image)
    found = search(
        M, plan.k, keep=plan.k, block=plan.block, rounds=plan.rounds, tol=options.tol, items=items,
        seed=options.seed, norm_squared=total,
    )  # fmt: skip
    if probed is None:
        error, tight = by_difference(total, found.S, M.dtype, M.amplified)
    else:
        error, tight = torch.ones_like(total), torch.zeros_like(found.converged)
    if probed is not None or (M.amplified is not None and not bool(tight.all())):
        if probed is None or options.tol is not None:  # those that had a say in when to stop would flatter
            probed = _probed(M, items, options, PROBE_STREAM + 1)
        G, image = probed
        bound = by_probes(image, (G @ found.Vh.mH * found.S.unsqueeze(-2)) @ found.Uh, found.S)
        error = torch.where(tight, error, torch.minimum(error, bound))
    left, right = (found.Uh, found.Vh) if A.long >= A.short else (found.Vh, found.Uh)
    out = torch.promote_types(A.dtype, torch.float32)
    left, right = positive_pivots(left.to(out), right.to(out))
    rank = (found.S > M.long * torch.finfo(M.dtype).eps * found.S[..., :1]).sum(-1)
    info = SVDInfo(
        rank, error, tight, found.converged, found.rounds, found.rounds, "krylov", options.seed,
        notes=clamp_note(options.k, A.long, A.short),
    )  # fmt: skip
    return SVDResult(left.mH, found.S.to(real(out)), right, info)


def _probed(M: External | Centred | Turned, items: Tensor, options: Options, stream: int) -> tuple[Tensor, Tensor]:
    """Gaussian rows ``(B, PROBES, short)`` and their images."""
    G = gaussian(items, PROBES, M.short, seed=options.seed, stream=stream, dtype=double(M.dtype))
    return G, M.forward(G).to(G.dtype)
