"""Randomized SVD of a batch of matrices in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from balanced_rep.linalg._certificate import by_difference, certified, concentration
from balanced_rep.linalg._exact import exact_triples
from balanced_rep.linalg._krylov import Found, Space, search
from balanced_rep.linalg._matrix import Dense, exponent_outside, is_turned, scaled_by, survey
from balanced_rep.linalg._plan import Options, Plan, make_plan, wide_plan
from balanced_rep.linalg._result import SVDInfo, SVDResult
from balanced_rep.linalg._small import double, positive_pivots, real

__all__ = ["clamp_note", "dense_svd"]

CHUNK = 2**27  # entries of A that are worked on at a time
LOW_STEEP = 3e-3  # what is below this share of the largest singular value, or of all, drowns in bfloat16 rounding
GAIN = 0.1  # share of the squared error that the last round removes: more than on any smoothly falling spectrum
NEAR = 0.02  # relative distance over which as many values as a block has columns hide others from it ...
BELOW = 0.9  # ... which is a loss where the last value is below this share of them
EXACT_FLOOR = 1e-12  # squared relative error that a float64 spectrum can still tell from rounding ...
EXACT_NOISE = 8  # ... and for each column of M that many eps: eigenvalues beside a large one err by 1/30 of one


@dataclass
class _Part:
    """Results for some matrices; (b,) stands for one number per matrix.

    Until they are finished, U and Vh are rows of M, which is A or its transpose: (b, k, long) and (b, k, short).
    """

    U: Tensor  # (b, m, k)
    S: Tensor  # (b, k)
    Vh: Tensor  # (b, k, n)
    rank: Tensor  # (b,)
    rel_error: Tensor  # (b,)
    tight: Tensor  # (b,)
    converged: Tensor  # (b,)
    rounds: Tensor  # (b,)
    passes: Tensor  # (b,)
    method: str
    notes: tuple[str, ...] = ()


def dense_svd(A: Tensor, options: Options) -> SVDResult:
    """Decomposes ``(..., m, n)``; see :func:`balanced_rep.randomized_svd`.

    Args:
        A: Any float or complex dtype, any strides, no gradient.
        options: Checked arguments.

    Returns:
        Triples in the dtype of A, float32 for half types.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    lead, (m, n) = A.shape[:-2], A.shape[-2:]
    flat = A.to(dtype).reshape(-1, m, n) if A.numel() else A.new_empty((lead.numel(), m, n), dtype=dtype)
    columns = is_turned(flat if m >= n else flat.mT)
    plan = make_plan(options, max(m, n), min(m, n), dtype, A.device, columns=columns)
    count = max(1, CHUNK // max(m * n, 1))
    parts = [_decompose(flat[i : i + count], i, plan, options, lead) for i in range(0, max(flat.shape[0], 1), count)]

    def joined(name: str) -> Tensor:
        values = [getattr(part, name) for part in parts]
        value = values[0] if len(values) == 1 else torch.cat(values)
        return value.reshape((*lead, *value.shape[1:]))

    info = SVDInfo(
        **{name: joined(name) for name in ("rank", "rel_error", "tight", "converged", "rounds", "passes")},
        method=parts[0].method,
        seed=options.seed,
        notes=(*clamp_note(options.k, m, n), *dict.fromkeys(note for part in parts for note in part.notes)),
    )
    return SVDResult(joined("U"), joined("S"), joined("Vh"), info)


def clamp_note(k: int, m: int, n: int) -> tuple[str, ...]:
    """What ``info.notes`` says of a k that is larger than the matrix."""
    return (f"k={k} is more than min(m, n) = {min(m, n)}, which was taken",) if k > min(m, n) else ()


def _decompose(A: Tensor, first: int, plan: Plan, options: Options, lead: torch.Size) -> _Part:
    """Matrices ``first, first + 1, ...`` of the batch."""
    m, n = A.shape[-2:]
    dtype = A.dtype
    if options.center and m:
        A = A - A.to(double(dtype)).mean(-2, keepdim=True).to(dtype)
    seen = survey(A)
    broken = (~seen.finite).nonzero().squeeze(-1)
    if len(broken) and not options.check_finite:  # LAPACK would refuse the whole batch
        A = A.index_fill(0, broken, 0)
        seen = survey(A)
    elif len(broken):
        bad = int(broken[0]) + first
        place = "" if not lead else f"[{', '.join(str(int(i)) for i in torch.unravel_index(torch.tensor(bad), lead))}]"
        raise ValueError(f"randomized_svd: A{place} holds NaN or infinity (check_finite=False to go on)")
    exponent = exponent_outside(seen.absmax, dtype)
    scaled = bool(exponent.any())
    if scaled:
        A = scaled_by(A, -exponent)
        seen = survey(A)
    M = Dense(A, seen.norm_squared)
    part = _exact(M, plan) if plan.exact or A.numel() == 0 else _krylov(M, plan, options, first)
    left, right = (part.U, part.Vh) if m >= n else (part.Vh, part.U)
    left, right = positive_pivots(left.to(dtype), right.to(dtype))
    part.U, part.Vh = (left, right) if m >= n else (right, left)
    rounded = part.S.to(real(dtype))
    part.rel_error, part.tight, extra = certified(M, part.U, rounded, part.Vh, part.rel_error, part.tight)
    part.passes = part.passes + extra
    part.rank = (part.S > max(m, n) * torch.finfo(dtype).eps * part.S[..., :1]).sum(-1)
    S = torch.ldexp(part.S, exponent[:, None]).to(real(dtype))
    if scaled and options.check_finite and not bool(S.isfinite().all()):
        raise ValueError(f"randomized_svd: the largest singular value is out of the range of {dtype}; scale A down")
    part.U, part.S, part.Vh = left.mH, S, right
    if len(broken):
        _give_up(part, broken)
    return part


def _give_up(part: _Part, broken: Tensor) -> None:
    """NaN for the matrices that hold some."""
    for name in ("U", "S", "Vh", "rel_error"):
        setattr(part, name, getattr(part, name).index_fill(0, broken, torch.nan))
    for name in ("rank", "tight", "converged"):
        setattr(part, name, getattr(part, name).index_fill(0, broken, 0))
    part.notes = (*part.notes, f"{len(broken)} of {len(part.S)} hold NaN or infinity: so do their triples")


def _exact(M: Dense, plan: Plan) -> _Part:
    Uh, S, Vh, tail, method = exact_triples(M, plan.k)
    total = S.square().sum(-1) + tail
    share = torch.where(total > 0, tail / torch.where(total > 0, total, 1.0), 0.0)
    floor = max(EXACT_FLOOR, EXACT_NOISE * M.short * torch.finfo(torch.float64).eps)
    # Triples without a left vector of their own (left_vectors): each is off by up to twice its singular value.
    lost = torch.where(S <= torch.finfo(torch.float32).eps * S[..., :1], S, 0.0).square().sum(-1)
    lost = torch.where(total > 0, lost / torch.where(total > 0, total, 1.0), 0.0) if method == "gram" else 0 * share
    tight = ((share >= floor) & (4 * lost <= 0.02 * share)) | (total == 0)
    rel_error = torch.where(tight, share, share + 4 * lost + floor).sqrt()
    whole = torch.ones(M.batch, dtype=torch.int64, device=M.device)
    return _Part(Uh, S, Vh, whole, rel_error, tight, whole > 0, 0 * whole, (1 + (method == "gram")) * whole, method)


def _krylov(M: Dense, plan: Plan, options: Options, first: int) -> _Part:
    items = torch.arange(first, first + M.batch, device=M.device) + options.item
    notes, extra = (), 0
    if plan.low is None:
        if options.precision == "bfloat16":
            notes = (f"all rounds in {M.dtype}: precision='bfloat16' is for float32 matrices",)
        found = _search(M, plan, options, items, plan.k)
    else:
        width = min(plan.k + options.oversampling, plan.block * plan.rounds)
        found = _last_pass(M, _search(M.cast(plan.low), plan, options, items, width), plan.k)
        notes, extra = (f"rounds in {plan.low}, last pass in {M.dtype}",), 1
    passes = 2 * found.rounds - 1 + extra
    assert M.norm_squared is not None
    rest = M.norm_squared - found.S.square().sum(-1)
    steep = (found.S[..., -1] < LOW_STEEP * found.S[..., 0]) | (rest < LOW_STEEP**2 * M.norm_squared)
    if extra and bool(steep.any()):
        index = steep.nonzero().squeeze(-1)
        again = _search(M.select(index), plan, options, items[index], plan.k)
        found.replace(index, again)
        passes = passes.index_add(0, index, 2 * again.rounds - 1)
        notes = (*notes, f"{len(index)} of {M.batch} again in {M.dtype}: their singular values fall too steeply")
    if options.rounds is None and not bool(found.converged.all()):
        index = (~found.converged).nonzero().squeeze(-1)
        Uh, S, Vh, tail, _ = exact_triples(M.select(index), plan.k)
        found.replace(index, Found(index, Uh, S, Vh, tail, found.rounds[index], index >= 0, found.gain[index]))
        passes = passes.index_add(0, index, torch.full_like(index, 2))
        notes = (
            *notes,
            f"{len(index)} of {M.batch} exactly in the end: their spectra are too flat for tol={options.tol}",
        )
    if plan.may_widen:
        index = _too_narrow(found, M.norm_squared, plan.block, M.dtype).nonzero().squeeze(-1)
        if len(index):
            again = _search(M.select(index), wide_plan(plan, options, M.short), options, items[index], plan.k)
            found.replace(index, again)
            passes = passes.index_add(0, index, 2 * again.rounds - 1)
            notes = (*notes, f"{len(index)} of {M.batch} again in wider blocks: leading singular values are near equal")
    factors = concentration(M.norm_squared, found.S, found.Uh, M.dtype)
    error, tight = by_difference(M.norm_squared, found.S, M.dtype, factors)
    whole = torch.ones_like(passes)
    return _Part(
        found.Uh, found.S, found.Vh, whole, error, tight, found.converged, found.rounds, passes, "krylov", notes
    )


def _too_narrow(found: Found, norm_squared: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Whether leading singular values are so near each other that blocks of this width do not find them.

    A block of b columns finds b of the triples of a repeated value, and those of values that are near each other only
    in the rounds that tell them apart. Either the last round still finds some, or the rounds rest, with b near values
    in front of a far lower one that was taken in the place of others.

    Args:
        found: What was found with them.
        norm_squared: Of the matrices, ``(B,)``.
        block: Their width.
        dtype: Of the matrices.

    Returns:
        ``(B,)``.
    """
    error = (norm_squared - found.S.square().sum(-1)).clamp_min(0)
    going_on = found.gain > GAIN * error + torch.finfo(dtype).eps * norm_squared
    last = found.S[:, block - 1 :]
    near = last >= (1 - NEAR) * found.S[:, : last.shape[1]]
    return going_on | (near & (found.S[:, -1:] < BELOW * last)).any(-1)


def _search(M: Dense, plan: Plan, options: Options, items: Tensor, keep: int) -> Found:
    return search(
        M,
        plan.k,
        keep=keep,
        block=plan.block,
        rounds=plan.rounds,
        tol=options.tol,
        items=items,
        seed=options.seed,
        norm_squared=M.norm_squared,
    )


def _last_pass(M: Dense, found: Found, k: int) -> Found:
    """The k best triples in the span of those that low precision found, from a product in full precision."""
    space = Space(found.Vh.shape[1])
    space.append(found.Vh, M.forward(found.Vh))
    Uh, S, Vh, tail, _ = space.triples(k, M.dtype)
    return replace(found, Uh=Uh[..., : M.long], S=S, Vh=Vh[..., : M.short], tail=tail)
