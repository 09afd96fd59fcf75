r"""Block Krylov iteration on a Jacobian: forward products as long as they suffice, then rounds with both kinds.

*One-sided*: Krylov space of J itself, from J-products alone, valid where J is nearly symmetric, as that of a denoiser.
Singular values are those of J Q, whose error from an asymmetry :math:`a = \|J - J^T\| / \|J + J^T\|` is about
:math:`a^2 / 2`. *Two-sided*: with W = J^T Z known for Z = J V, the values of :math:`U^T J` (U an orthonormal basis of
Z) are larger than those of J V, and as both are below the truth, better; the residuals :math:`J^T u_i - s_i v_i` are
the directions in which V grows.

Letters: B samples; rows of length n (tangents) and m (outputs); R a basis, Z its images under J, W theirs under J^T;
k triples, b rows of a block. Sources: Musco and Musco 2015; the thick restart between the phases is Wu and Simon 2000.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from balanced_rep.linalg._jacobian_products import Products
from balanced_rep.linalg._krylov import STEEP, Space, left_vectors
from balanced_rep.linalg._small import (
    eigh_descending,
    gaussian,
    orthonormal_rows,
    orthonormalise,
    padded,
    product,
)

__all__ = ["JacobianProgress", "Settings", "Triples", "search_jacobian"]

NEARLY_SYMMETRIC = 1.0  # times sqrt(tol): asymmetry whose effect on the values stays below half of tol
HARDLY_SYMMETRIC = 2.0  # times sqrt(tol): beyond it, rounds with both products from the start take fewer passes
PROBES = 4  # columns of the start block whose asymmetry is measured
GUARD = 4  # triples beyond k that the restart keeps
BLOCK_SEEN = 8  # last images that tell how J acts outside of the basis
FAR = 3  # times tol: a change from where nothing is extrapolated
NULL = 1e-12  # squared singular values below this share of the largest are rounding


@dataclass(frozen=True)
class JacobianProgress:
    """Where a search stands, given to ``progress`` after every round.

    Attributes:
        rounds: Sequential steps so far.
        passes: Tangents and cotangents pushed through the network so far, per sample.
        phase: "jvp", "asymmetry" or "jvp+vjp".
        S: Present values, ``(batch, k)`` or fewer columns at first.
        remaining: Estimated largest relative error of them, ``(batch,)``; inf where not known yet.
    """

    rounds: int
    passes: int
    phase: str
    S: Tensor
    remaining: Tensor


@dataclass(frozen=True)
class Settings:
    """What the search is to do.

    Attributes:
        k: Triples.
        mode: "auto", "jvp" or "jvp+vjp".
        tol: Relative error of the singular values.
        block: Rows per round.
        rounds: Largest number of rounds.
        seed: Key of the randomness.
        progress: Called after every round.
    """

    k: int
    mode: str
    tol: float
    block: int
    rounds: int
    seed: int
    progress: Callable[[JacobianProgress], object] | None


@dataclass
class Triples:
    """Results; rows of U and V.

    Attributes:
        Uh: ``(B, k, m)``.
        S: ``(B, k)``.
        Vh: ``(B, k, n)``.
        residuals: ``(B, k)``.
        converged: ``(B,)``.
        rounds: ``(B,)``.
        passes: ``(B,)``.
        two_sided: ``(B,)``, whether products with J^T took part.
        asymmetry: ``(B,)``; from the Krylov space alone where it was not measured, then too low.
        measured: Whether it was.
        probes: A Gaussian block ``(B, b, n)`` and its image ``(B, b, m)``, for an estimate of the norm.
    """

    Uh: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    converged: Tensor
    rounds: Tensor
    passes: Tensor
    two_sided: Tensor
    asymmetry: Tensor
    measured: bool
    probes: tuple[Tensor, Tensor]


@dataclass
class _State:
    """What the phases share."""

    J: Products
    settings: Settings
    items: Tensor
    open: Tensor  # (B,): samples without a result yet
    asymmetry: Tensor
    probes: tuple[Tensor, Tensor]
    measured: bool = False
    result: Triples | None = None
    history: list[Tensor] = field(default_factory=list)

    def draw(self, stream: int, rows: int) -> Tensor:
        return gaussian(self.items, rows, self.J.n, seed=self.settings.seed, stream=stream, dtype=torch.float64)

    @property
    def rounding(self) -> float:
        """Share of the largest value below which values are rounding, whose changes from round to round never end."""
        return max(NULL**0.5, torch.finfo(self.J.dtype).eps)

    def remaining(self, S: Tensor, tol: Tensor | float) -> Tensor:
        """Largest relative error of the values: the rest of a geometric series of changes; inf if it has not begun.

        Its ratio is the larger of the last two: a single small change may be a plateau. Values that are rounding are
        left out.

        Args:
            S: Present values ``(B, k)``, added to the history.
            tol: From changes larger than a few of these, nothing is extrapolated.

        Returns:
            ``(B,)``.
        """
        self.history.append(S)
        recent = [X[:, : self.settings.k] for X in self.history[-4:] if X.shape[1] >= self.settings.k]
        scale = recent[-1].clamp_min(torch.finfo(S.dtype).tiny) if recent else S
        alive = scale > self.rounding * scale[:, :1]
        changes = [((after - before).abs() / scale * alive).amax(-1) for before, after in itertools.pairwise(recent)]
        if len(changes) < 2:
            return torch.full((len(S),), torch.inf, dtype=S.dtype, device=S.device)
        ratios = [after / before.clamp_min(1e-300) for before, after in itertools.pairwise(changes)]
        ratio = functools.reduce(torch.maximum, ratios).clamp_max(0.95)
        return torch.where(changes[-1] < FAR * tol, changes[-1] * ratio / (1 - ratio), torch.inf)

    def report(self, phase: str, S: Tensor, remaining: Tensor) -> None:
        if self.settings.progress is not None:
            S = S[:, : self.settings.k]
            self.settings.progress(JacobianProgress(self.J.rounds, self.J.passes, phase, S, remaining))

    def take(self, which: Tensor, found: tuple[Tensor, ...], converged: Tensor, two_sided: bool) -> None:
        """Keeps the triples of the samples ``which``; later ones do not change them."""
        Uh, S, Vh, residuals = found
        fresh = Triples(
            Uh[..., : self.J.m], S, Vh[..., : self.J.n], residuals, converged,
            torch.full_like(self.items, self.J.rounds), torch.full_like(self.items, self.J.passes),
            torch.full_like(converged, two_sided), self.asymmetry, self.measured, self.probes,
        )  # fmt: skip
        if self.result is None:
            self.result = fresh
        else:
            for name in ("Uh", "S", "Vh", "residuals", "converged", "rounds", "passes", "two_sided"):
                old, new = getattr(self.result, name), getattr(fresh, name)
                setattr(self.result, name, torch.where(which.view(-1, *[1] * (new.dim() - 1)), new, old))
            self.result.asymmetry, self.result.measured = self.asymmetry, self.measured
        self.open = self.open & ~which


def search_jacobian(J: Products, settings: Settings, items: Tensor, start: tuple[Tensor, Tensor] | None) -> Triples:
    """Leading triples of each sample's Jacobian.

    Args:
        J: Its products.
        settings: What to do.
        items: Keys of the samples, ``(B,)``.
        start: Right vectors ``(B, k, n)`` and values ``(B, k)`` of a previous result.

    Returns:
        Triples, taken sample by sample when each was done.
    """
    nothing = torch.full((J.batch,), torch.nan, dtype=torch.float64, device=J.device)
    state = _State(J, settings, items, torch.ones_like(items, dtype=torch.bool), nothing, (nothing, nothing))
    omega = state.draw(0, min(settings.block, J.n - (0 if start is None else start[0].shape[1])))
    first = omega if start is None else torch.cat([start[0].to(omega.dtype), omega], 1)
    R = orthonormalise(first, None, lambda: state.draw(1, first.shape[1]))
    Z = J.forward(R)
    coordinates = product(padded(omega), R.mH)  # omega is in the span of R
    state.probes = (omega, product(coordinates, Z)[..., : J.m])
    space = Space(settings.block * 16)
    space.append(R, Z)
    if start is not None:
        state.history += [start[1], start[1]]
    one_sided = settings.mode != "jvp+vjp" and J.m == J.n
    if settings.mode == "auto" and one_sided:
        _measure_asymmetry(state)
        # Vectors to start from are near the goal, which forward products alone do not reach.
        limit = HARDLY_SYMMETRIC if start is None else NEARLY_SYMMETRIC
        one_sided = bool((state.asymmetry <= limit * settings.tol**0.5).all())
    if not one_sided:
        _two_sided(state, space, J.reverse(Z))
    elif (W := _one_sided(state, space, Z)) is not None:
        _two_sided(state, space, W)
    assert state.result is not None
    return state.result


def _measure_asymmetry(state: _State) -> None:
    """``|J w - J^T w| / |J w + J^T w|`` over a few random rows w.

    Not over rows of the basis: after a start from earlier vectors these would be mixtures of leading ones, where J is
    more symmetric than elsewhere.
    """
    omega, images = state.probes
    forward = padded(images[:, -PROBES:])
    reverse = state.J.reverse(omega[:, -PROBES:])
    below = torch.linalg.vector_norm(forward + reverse, dim=(-2, -1))
    above = torch.linalg.vector_norm(forward - reverse, dim=(-2, -1))
    state.asymmetry, state.measured = torch.where(below > 0, above / torch.where(below > 0, below, 1.0), above), True
    state.report("asymmetry", forward.new_zeros((len(forward), 0)), torch.full_like(above, torch.inf))


def _one_sided(state: _State, space: Space, Z: Tensor) -> Tensor | None:
    """J-products until every sample has settled; takes those whose asymmetry does no harm.

    Returns:
        Nothing, or where samples are left: the images under J^T of the space, which was cut to their leading triples.
    """
    J, settings = state.J, state.settings
    settled = torch.zeros_like(state.open)
    symmetric = state.asymmetry <= NEARLY_SYMMETRIC * settings.tol**0.5
    if settings.mode == "jvp":
        symmetric = torch.ones_like(settled)
    # Where products with J^T have to follow, less than the asymmetry spoils need not be settled here.
    tol = torch.where(symmetric, settings.tol, (state.asymmetry.square() / 4).clamp_min(settings.tol))
    while True:
        S = eigh_descending(space.gram)[0].clamp_min(0).sqrt()
        remaining = state.remaining(S, tol)
        state.report("jvp", S, remaining)
        small = remaining <= tol / 2
        if bool((small & symmetric & state.open).any()):  # of the others, nothing is final yet
            outside = _outside(space, settings.k, state.rounding)
            small = small & (~symmetric | (outside.square().amax(-1) / 2 <= settings.tol / 4))
        full = space.size >= J.n  # the values are then exact, whatever the symmetry
        settled = settled | small | full
        if settings.mode == "jvp":
            state.asymmetry = _seen_asymmetry(space)
        last = J.rounds >= settings.rounds or full
        finished = state.open & (symmetric | full) & (settled | last)
        if bool(finished.any()):
            Uh, S, Vh, *_ = space.triples(min(settings.k, space.size), J.dtype)
            residuals = torch.zeros_like(S) if full else _symmetric_residuals(space, Uh, S, Vh, state.asymmetry)
            state.take(finished, (Uh, S, Vh, residuals), settled, two_sided=False)
        if not bool(state.open.any()):
            return None
        if last or bool((settled | ~state.open).all()):
            break
        fresh = min(settings.block, J.n - space.size)
        R = _grown(space, Z, fresh, functools.partial(state.draw, J.rounds + 2, fresh))
        Z = J.forward(R)
        space.append(R, Z)
    _restart(space, min(settings.k + GUARD, space.size), J.dtype)
    del state.history[:-1]
    return J.reverse(space.images)


def _outside(space: Space, k: int, rounding: float) -> Tensor:
    """Relative residuals of J^T J = J^2 in the basis: what of ``u_i`` it does not hold, ``(B, k)``; 0 for null ones."""
    theta, Y = eigh_descending(space.gram)
    s = theta[:, :k].clamp_min(0).sqrt().unsqueeze(-1)
    inside = product(product(Y[..., :k].mH, space.images), space.basis.mH) / torch.where(s > 0, s, 1.0)
    return (1 - inside.square().sum(-1)).clamp_min(0).sqrt() * (s > rounding * s[:, :1]).squeeze(-1)


def _seen_asymmetry(space: Space) -> Tensor:
    """The same from ``V^T J V``, which sees the Krylov space alone: too low."""
    H = product(space.basis, space.images.mH)
    return torch.linalg.matrix_norm(H - H.mH) / torch.linalg.matrix_norm(H + H.mH).clamp_min(1e-300)


def _symmetric_residuals(space: Space, Uh: Tensor, S: Tensor, Vh: Tensor, asymmetry: Tensor) -> Tensor:
    """Estimates of ``|J^T u - s v|`` without J^T: as if it were J, and 2 a s for what it is not.

    What the basis does not hold of u is taken to grow by as much as the last block did.

    Args:
        space: Basis and images.
        Uh: Left vectors, rows.
        S: Values.
        Vh: Right vectors, rows.
        asymmetry: ``a``, ``(B,)``.

    Returns:
        ``(B, k)``.
    """
    block = space.gram[:, -BLOCK_SEEN:, -BLOCK_SEEN:]
    growth = eigh_descending(block)[0][:, :1].clamp_min(0).sqrt()
    inside = product(Uh, space.basis.mH)
    outside = (1 - inside.square().sum(-1)).clamp_min(0).sqrt()
    rest = torch.linalg.vector_norm(product(inside, space.images) - S.unsqueeze(-1) * Vh, dim=-1)
    return rest + outside * growth + 2 * asymmetry.nan_to_num().unsqueeze(-1) * S


def _grown(space: Space, W: Tensor, rows: int, spare: Callable[[], Tensor]) -> Tensor:
    """New rows for the basis: the ``rows`` strongest directions of W outside of it."""
    if W.shape[1] > rows:
        W = W - product(product(W, space.basis.mH), space.basis)
        W = product(eigh_descending(product(W, W.mH))[1][..., :rows].mH, W)
    return orthonormalise(W, space.basis, spare)


def _restart(space: Space, rows: int, dtype: torch.dtype) -> None:
    """Cuts a space to its leading triples."""
    Y = eigh_descending(space.gram)[1][..., :rows].mH
    kept = product(Y, space.basis), product(Y, space.images)
    space.size = 0
    space.append(*kept)


def _two_sided(state: _State, space: Space, W: Tensor) -> None:
    """Rounds with both products until every sample has converged."""
    J, settings = state.J, state.settings
    while True:
        Uh, S, Vh, R, residuals = _left(space, W, settings.k)
        remaining = state.remaining(S, settings.tol)
        relative = residuals / S.clamp_min(torch.finfo(S.dtype).tiny)
        # A residual r moves a value by about r^2 / 2, relatively, where the next value is not too near.
        done = (remaining <= settings.tol / 2) & (relative[:, : settings.k].square().amax(-1) / 2 <= settings.tol)
        if S.shape[1] >= settings.k:
            state.report("jvp+vjp", S, remaining)
        full = space.size >= J.n
        last = J.rounds >= settings.rounds or full
        leave = state.open & (done | last)
        if bool(leave.any()):
            state.take(leave, (Uh, S, Vh, residuals), done | full, two_sided=True)
        if not bool(state.open.any()):
            return
        fresh = min(settings.block, R.shape[1], J.n - space.size)
        D = _grown(space, R, fresh, functools.partial(state.draw, J.rounds + 2, fresh))
        Z = J.forward(D)
        space.append(D, Z)
        W = torch.cat([W, J.reverse(Z)], 1)


def _left(space: Space, W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Triples of ``U U^T J`` for an orthonormal basis U of the images, from W = J^T Z.

    Args:
        space: Basis and images.
        W: ``(B, l, n)``.
        k: Triples.

    Returns:
        Uh, S, Vh, with orthonormal rows also where S is zero; residuals ``J^T u - s v`` of all Ritz triples as rows,
        and the norms of those of the first k.
    """
    theta, Y = eigh_descending(space.gram)
    alive = theta > NULL * theta[:, :1]
    s = theta.clamp_min(0).sqrt()
    T = (Y * torch.where(alive, 1 / torch.where(alive, s, 1.0), 0.0).unsqueeze(-2)).mH
    Uh, images = product(T, space.images), product(T, W)
    R = images - s.unsqueeze(-1) * product(Y.mH, space.basis)
    R = R * alive.unsqueeze(-1)
    squares, P = eigh_descending(product(images, images.mH))
    S = squares.clamp_min(0).sqrt()[:, :k]
    Ph = P[..., :k].mH
    Vh, Uh = left_vectors(product(Ph, images), S), product(Ph, Uh)
    steep = S[:, -1:] <= STEEP * S[:, :1]
    if bool(steep.any()):
        Uh = torch.where(steep.unsqueeze(-1), orthonormal_rows(Uh), Uh)
    return Uh, S, Vh, R[:, : k + GUARD], torch.linalg.vector_norm(R[:, :k], dim=-1)
