r"""One-sided block Krylov iteration: the engine of the randomized methods.

Only the short side gets a basis: V_1 random, V_{j+1} what M^H M V_j adds to it, and Z_j = M V_j kept. The singular
value decomposition of Z = M V, by its Gram matrix in double precision, then gives that of the best approximation of M
with
rows in the span of V: neither a QR factorisation on the long side nor one more product. With V orthonormal,
:math:`\|M - M V_k V_k^H\|_F^2 = \|M\|_F^2 - \sum_{i \le k} s_i^2` is the certificate.

Letters: M (B, long, short); R = V^H (B, l, short) and Z^H (B, l, long), vectors as rows; b block size; theta Ritz
values, S their roots. Sources: Musco and Musco 2015 (block Krylov); Halko, Martinsson and Tropp 2011; Yamazaki, Tomov
and Dongarra 2015 (Gram matrices in higher precision).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from balanced_rep.linalg._matrix import Dense, Products
from balanced_rep.linalg._small import (
    PAD,
    double,
    eigh_descending,
    gaussian,
    orthonormal_rows,
    orthonormalise,
    padded,
    product,
    thin_svd,
)

__all__ = ["Found", "Space", "left_vectors", "search"]

# Ratio of the smallest to the largest wanted singular value below which left vectors lose their orthogonality to the
# rounding of a float64 Gram matrix: its square must stay above 1e-16 by what float32 asks for.
STEEP = 1e-4
GRAM_ROWS = 32  # of a Gram matrix that are computed at a time
CAPACITY = 12  # rounds that buffers are made for at first; more are seldom needed


@dataclass
class Found:
    """Leading triples of the matrices ``index``.

    Attributes:
        index: Their numbers.
        Uh: ``(B, k, long)``, double precision.
        S: ``(B, k)``.
        Vh: ``(B, k, short)``.
        tail: Squared singular values of M that were found and not returned, summed, ``(B,)``: a lower bound of the
            squared error.
        rounds: Blocks, int64 ``(B,)``.
        converged: ``(B,)``.
        gain: What the last block added to the squares of S, or somewhat more, ``(B,)``.
    """

    index: Tensor
    Uh: Tensor
    S: Tensor
    Vh: Tensor
    tail: Tensor
    rounds: Tensor
    converged: Tensor
    gain: Tensor

    def replace(self, index: Tensor, other: Found) -> None:
        """Puts other triples in the place of some."""
        for name in ("Uh", "S", "Vh", "tail", "rounds", "converged", "gain"):
            setattr(self, name, getattr(self, name).index_copy(0, index, getattr(other, name)))


class Space:
    """A basis R = V^H, its images Z^H = R M^H, and the Gram matrix of these, all in double precision.

    The rows, padded, live in buffers with room for more: to copy the whole space for every block would cost as much as
    a product with a narrow M.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self.size = -(-capacity // PAD) * PAD, 0
        self._R: Tensor | None = None
        self._Z: Tensor | None = None
        self._gram: Tensor | None = None
        self._known = 0  # rows of the Gram matrix that are computed

    @property
    def basis(self) -> Tensor:
        """``(B, l, short)``."""
        assert self._R is not None
        return self._R[:, : self.size]

    @property
    def images(self) -> Tensor:
        """``(B, l, long)``."""
        assert self._Z is not None
        return self._Z[:, : self.size]

    @property
    def gram(self) -> Tensor:
        """Products of the images, ``(B, l, l)``; those that are new since the last time are computed."""
        assert self._gram is not None
        while self._known < self.size:  # a part at a time, which spares the other half of the products between them
            old, self._known = self._known, min(self._known + GRAM_ROWS, self.size)
            edge = product(self.images[:, : self._known], self.images[:, old : self._known].mH)
            self._gram[:, : self._known, old : self._known] = edge
            self._gram[:, old : self._known, :old] = edge[:, :old].mH
        return self._gram[:, : self.size, : self.size]

    def append(self, R: Tensor, Z: Tensor) -> None:
        """Adds rows ``R (B, b, short)``, orthonormal to those present, and their images ``Z (B, b, long)``."""
        R = padded(R)
        self._reserve(R, Z.shape[-1])
        assert self._R is not None
        assert self._Z is not None
        new = slice(self.size, self.size + R.shape[1])
        self._R[:, new] = R
        if Z.data_ptr() != self._Z[:, new].data_ptr():
            self._Z[:, new] = padded(Z)
        self._known = min(self._known, self.size)  # a restart has cut rows whose products were known
        self.size = new.stop

    def fill(self, M: Dense, R: Tensor, rounds: int) -> Tensor:
        """Makes this the space of ``rounds`` blocks from R on, in one call of C++.

        Returns:
            Which of the matrices it is done for, ``(B,)``.
        """
        self._reserve(R, M.long)
        assert self._R is not None
        assert self._Z is not None
        self.size, self._known = rounds * R.shape[1], 0
        self.basis[:, : R.shape[1]] = R
        self.images[..., M.long :] = 0
        return M.krylov_space(self.basis, self.images, R.shape[1])

    def room(self, R: Tensor, long: int) -> Tensor:
        """Memory ``(B, b, long)`` for images of the rows that come next; what lies there is not copied to append it."""
        self._reserve(padded(R), long)
        assert self._Z is not None
        room = self._Z[:, self.size : self.size + R.shape[1]]
        room[..., long:] = 0
        return room[..., :long]

    def _reserve(self, R: Tensor, long: int) -> None:
        """Room for these further rows."""
        wide, b = double(R.dtype), R.shape[1]
        if self._R is None or self._Z is None or self._gram is None:
            size = max(self._capacity, -(-b // PAD) * PAD)
            lengths = (R.shape[-1], long + -long % PAD)
            self._R, self._Z = (R.new_empty((len(R), size, length), dtype=wide) for length in lengths)
            self._gram = self._R.new_empty((len(R), size, size))
        elif self.size + b > self._R.shape[1]:
            extra = max(self._R.shape[1], -(-b // PAD) * PAD)
            self._R, self._Z = (torch.nn.functional.pad(X, (0, 0, 0, extra)) for X in (self._R, self._Z))
            self._gram = torch.nn.functional.pad(self._gram, (0, extra, 0, extra))

    def select(self, index: Tensor) -> Space:
        """Only the matrices of these numbers."""
        part = Space(self._capacity)
        assert self._R is not None
        assert self._Z is not None
        assert self._gram is not None
        part._R, part._Z, part._gram = self._R[index], self._Z[index], self._gram[index]
        part.size, part._known = self.size, self._known
        return part

    def triples(self, k: int, dtype: torch.dtype, block: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The k leading triples of ``M V V^H``, the squares of the other singular values, summed, and the last gain.

        Args:
            k: How many.
            dtype: Of M; decides what is rounding.
            block: Rows of the last block.

        Returns:
            Uh, S, Vh, ``(B,)`` and ``(B,)`` in double precision, with rows orthonormal to the precision of ``dtype``
            also where S is zero. The gain is what the last block adds to the squares of S, or somewhat more: a vector
            without its part there gives a value that is lower by the share of that part, at most.
        """
        if dtype in (torch.float64, torch.complex128):  # the Gram matrix is no more precise than M
            Uh, S, Yh = thin_svd(self.images)
            Uh, tail = Uh[:, :k], S[:, k:].square().sum(-1)
        else:
            theta, Y = eigh_descending(self.gram)
            S, tail, Yh = theta.clamp_min(0).sqrt(), theta[..., k:].clamp_min(0).sum(-1), Y.mH
            Uh = left_vectors(product(Yh[:, :k], self.images), S[:, :k])
        S, Yh = S[:, :k], Yh[:, :k]
        share = Yh[..., self.size - block :].abs().square().sum(-1)
        return Uh, S, product(Yh, self.basis), tail, (S.square() * share).sum(-1)


def left_vectors(images: Tensor, S: Tensor) -> Tensor:
    """Orthonormal rows from images of right vectors: divided by the singular values where that is safe.

    Args:
        images: ``(B, k, long)``, double precision, of right vectors that a float64 Gram matrix gave.
        S: ``(B, k)``.

    Returns:
        ``(B, k, long)``, orthonormal to float32 precision.
    """
    if S.shape[-1] == 0:
        return images
    alive = S > torch.finfo(torch.float32).eps * S[..., :1]
    inverse = torch.where(alive, 1 / torch.where(alive, S, 1.0), 0.0)
    Uh = images * inverse.unsqueeze(-1)
    steep = S[..., -1] <= STEEP * S[..., 0]
    if not bool(steep.any()):
        return Uh
    index = steep.nonzero().squeeze(-1)
    return Uh.index_copy(0, index, orthonormal_rows(Uh[index]))


def search(
    M: Products,
    k: int,
    *,
    keep: int,
    block: int,
    rounds: int,
    tol: float | None,
    items: Tensor,
    seed: int,
    norm_squared: Tensor | None = None,
) -> Found:
    """Leading triples of each matrix; with ``tol`` each stops by itself, so that it does not depend on its neighbours.

    Args:
        M: The matrices.
        k: Triples that the stop rule looks at.
        keep: Triples to return, at least k.
        block: Columns per round, ``block * rounds`` at most ``M.short``.
        rounds: Blocks, or with ``tol`` the largest number of them.
        tol: A matrix is done when a round lowered its squared error by less than ``2 tol`` of itself, that is, its
            error by ``tol``.
        items: Keys of the matrices, ``(B,)``.
        seed: Key of the randomness.
        norm_squared: Squared norms of the matrices, or estimates of them, for the stop rule alone.

    Returns:
        The triples of the whole batch.
    """
    space, parts, wide = Space(block * min(rounds, CAPACITY)), [], double(M.dtype)
    remaining = torch.arange(M.batch, device=M.device)  # numbers of the matrices that are still worked on
    open_ = torch.ones_like(remaining, dtype=torch.bool)  # those of them whose triples are not taken yet
    total, energy = norm_squared, None

    def draw(stream: int) -> Tensor:
        return gaussian(items, block, M.short, seed=seed, stream=stream, dtype=wide)

    R = orthonormalise(draw(0), None, lambda: draw(1))
    if tol is None and isinstance(M, Dense) and M.has_kernel(R[..., : M.short]):
        parts, remaining = _in_one_call(M, R, keep, rounds)
        if not len(remaining):
            return _merged(parts)
        R, M, items, open_ = R[remaining], M.select(remaining), items[remaining], open_[remaining]
    for r in range(1, rounds + 1):
        rows, W = R[..., : M.short], None
        if not isinstance(M, Dense):
            Z = M.forward(rows)
        else:
            room = space.room(R, M.long) if M.has_kernel(rows) else None
            if tol is None and r < rounds:
                Z, W = M.both(rows, room)
            else:  # with tol the second product waits for the stop rule
                Z = M.forward(rows, room)
        space.append(R, Z)
        done = torch.ones_like(open_) if tol is None and r == rounds else torch.zeros_like(open_)
        if tol is not None and r * block >= keep:
            energy, done = _settled(space, k, energy, total, tol)
        leave = (done | (r == rounds)) & open_
        if bool(leave.any()) if tol is not None else r == rounds:
            index = leave.nonzero().squeeze(-1)
            part = space if len(index) == len(leave) else space.select(index)
            Uh, S, Vh, tail, gain = part.triples(keep, M.dtype, R.shape[1])
            Uh, Vh = Uh[..., : M.long], Vh[..., : M.short]
            parts.append(Found(remaining[index], Uh, S, Vh, tail, torch.full_like(index, r), done[index], gain))
            open_ = open_ & ~leave
            if len(index) == len(leave) or not bool(open_.any()):
                break
            if M.separable:
                stay = open_.nonzero().squeeze(-1)
                remaining, items, M, space = remaining[stay], items[stay], M.select(stay), space.select(stay)
                open_, energy, Z = open_[stay], energy[stay] if energy is not None else None, Z[stay]
                total = total[stay] if total is not None else None
        R = orthonormalise(M.adjoint(Z) if W is None else W, space.basis, functools.partial(draw, r + 1))
    return _merged(parts)


def _in_one_call(M: Dense, R: Tensor, keep: int, rounds: int) -> tuple[list[Found], Tensor]:
    """Triples from all rounds, and the numbers of matrices of which rows came out too near to dependent for that."""
    space = Space(R.shape[1] * rounds)
    done = space.fill(M, R, rounds)
    index, rest = done.nonzero().squeeze(-1), (~done).nonzero().squeeze(-1)
    if not len(index):
        return [], rest
    Uh, S, Vh, tail, gain = (space.select(index) if len(rest) else space).triples(keep, M.dtype, R.shape[1])
    last = torch.full_like(index, rounds)
    return [Found(index, Uh[..., : M.long], S, Vh[..., : M.short], tail, last, last > 0, gain)], rest


def _settled(space: Space, k: int, before: Tensor | None, total: Tensor | None, tol: float) -> tuple[Tensor, Tensor]:
    """Energy of the k leading Ritz values ``(B,)``, and whether the last round changed the error by less than tol."""
    theta = eigh_descending(space.gram)[0].clamp_min(0)
    energy, tail = theta[..., :k].sum(-1), theta[..., k:].sum(-1)
    if before is None:
        return energy, torch.zeros_like(energy, dtype=torch.bool)
    # The difference loses its digits where the error is small; the Ritz values beyond k then bound it from below.
    error = tail if total is None else torch.maximum(total - energy, tail)
    rounding = 8 * torch.finfo(torch.float64).eps * energy
    return energy, energy - before <= 2 * tol * error + rounding


def _merged(parts: list[Found]) -> Found:
    """All parts, in the order of the batch."""
    if len(parts) == 1:
        return parts[0]
    order = torch.cat([part.index for part in parts]).argsort()
    values = {f.name: torch.cat([getattr(part, f.name) for part in parts])[order] for f in fields(Found)}
    return Found(**values)
