r"""Principal components of a stream of rows, in one pass and bounded memory, mergeable over workers.

Two states. *Gram*: the mean and the scatter matrix :math:`\sum (x - \mu)(x - \mu)^T`, which are exact and additive; n^2
numbers. *Incremental*: a truncated singular value decomposition of what was seen, l rows, to which blocks of l new
rows are added and which is cut back to l again; l n numbers. Both follow the mean exactly: with counts a and b, the
union has the scatter of the parts plus :math:`\frac{a b}{a + b} \delta \delta^T` for the difference :math:`\delta` of
their means (Chan, Golub and LeVeque 1983; as a row of its own in the incremental state: Ross, Lim, Lin and Yang 2008).

The energy that cuts discard is added up. The scatter matrix exceeds that of the kept rows by a positive semidefinite
matrix whose trace is this sum, so that what k components miss is at most the whole energy less that of the kept rows
in them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from balanced_rep.linalg._plan import as_integer
from balanced_rep.linalg._result import SVDInfo
from balanced_rep.linalg._scatter import leading
from balanced_rep.linalg._small import eigh_descending, positive_pivots
from balanced_rep.linalg._streaming_state import VERSION, checked_settings
from balanced_rep.ops._arrays import as_tensor

__all__ = ["PCAResult", "StreamingPCA"]

GRAM_LIMIT = 8192
LARGEST = 1e150  # numbers whose squares are far within float64; the reciprocal too
MODES = ("auto", "gram", "incremental")
ROUNDING = 1e-12  # share of the energy that sums in float64 may miss; 100 times as much is known to 1 %
PANEL = 2**21  # numbers of X that are converted to float64 at a time


@dataclass(frozen=True)
class PCAResult:
    """Principal components.

    Attributes:
        components: ``(k, n)``, orthonormal rows; the entry of largest magnitude of each is positive. float64.
        singular_values: Of the centred data, ``(k,)``.
        explained_variance: Variance along each component, with n_samples - 1 degrees of freedom.
        explained_variance_ratio: The same as shares of the whole variance, which is known exactly.
        mean: ``(n,)``; zero if nothing was subtracted.
        n_samples: Rows seen.
        info: ``rel_error`` is that of the centred data against their projection: tight, or an upper bound once
            something was discarded.
    """

    components: Tensor
    singular_values: Tensor
    explained_variance: Tensor
    explained_variance_ratio: Tensor
    mean: Tensor
    n_samples: int
    info: SVDInfo

    def transform(self, X: Any) -> Tensor:
        """Coordinates of rows.

        Args:
            X: ``(..., n)``, torch, numpy or cupy, real floating point.

        Returns:
            A tensor ``(..., k)`` in the dtype of X, float32 for half types.

        Raises:
            ValueError: If its rows have another length.
            TypeError: If it is no dense array of real floating point.
        """
        rows = _rows("PCAResult.transform: X", X, self.mean.shape[0])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return (rows - self.mean.to(rows.dtype)) @ self.components.mT.to(rows.dtype)

    def inverse_transform(self, Y: Any) -> Tensor:
        """Rows from coordinates.

        Args:
            Y: ``(..., k)``, torch, numpy or cupy, real floating point.

        Returns:
            A tensor ``(..., n)`` in the dtype of Y, float32 for half types.

        Raises:
            ValueError: If its rows have another length.
            TypeError: If it is no dense array of real floating point.
        """
        rows = _rows("PCAResult.inverse_transform: Y", Y, self.components.shape[0])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return rows @ self.components.to(rows.dtype) + self.mean.to(rows.dtype)


class StreamingPCA:
    """Principal components of rows that come in batches.

    Args:
        n_features: Length n of a row.
        k: Components.
        mode: "gram": exact, 8 n^2 bytes; "incremental": 8 (2 keep + 1) n bytes; "auto": "gram" for n up to 8192.
        center: Whether the mean is subtracted.
        keep: Rows l of the incremental state, 4k by default. What is lost falls quickly with it. The order of rows and
            merges moves that by some tenths of itself with any; only "gram" does not depend on it.
        device: Where the state is; rows are moved there.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If n_features, k or keep is no integer.

    Example:
        >>> import torch
        >>> X = torch.randn(1000, 3) @ torch.randn(3, 50)
        >>> pca = StreamingPCA(50, k=3)
        >>> for batch in X.split(128):
        ...     _ = pca.update(batch)
        >>> found = pca.finalize()
        >>> torch.allclose(found.inverse_transform(found.transform(X)), X, atol=1e-4)
        True
    """

    def __init__(
        self,
        n_features: int,
        k: int,
        *,
        mode: str = "auto",
        center: bool = True,
        keep: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        n_features = as_integer("StreamingPCA: n_features", n_features, 1)
        k = as_integer("StreamingPCA: k", k, 1)
        keep = 4 * k if keep is None else as_integer("StreamingPCA: keep", keep, 1)
        if mode not in MODES:
            raise ValueError(f"StreamingPCA: mode={mode!r}; known are {', '.join(map(repr, MODES))}")
        self.mode = mode if mode != "auto" else "gram" if n_features <= GRAM_LIMIT else "incremental"
        self.n_features, self.k, self.center = n_features, k, center
        self.keep = min(keep, n_features)
        if self.keep < min(k, n_features):
            raise ValueError(f"StreamingPCA: keep={keep} rows cannot hold k={k} components")
        self.n_samples = 0
        size = n_features if self.mode == "gram" else 0
        self._mean = torch.zeros(n_features, dtype=torch.float64, device=device)
        self._rows = torch.zeros((size, n_features), dtype=torch.float64, device=device)  # scatter matrix, or kept rows
        self._energy = torch.zeros((), dtype=torch.float64, device=device)  # trace of the whole scatter matrix
        self._pending: list[Tensor] = []  # rows that do not fill a block yet
        self._n_pending = 0

    def __repr__(self) -> str:
        return f"StreamingPCA(n_features={self.n_features}, k={self.k}, mode={self.mode!r}, n_samples={self.n_samples})"

    def update(self, X: Any) -> StreamingPCA:
        """Adds rows.

        How the stream is cut into calls does not matter: incremental blocks are filled across calls. Beside the state,
        a few times 16 MB are needed, or as many rows as ``keep``, whatever the size of X: it is converted to float64,
        and moved to the device of the state, in panels.

        Args:
            X: ``(..., n_features)``, torch, numpy or cupy, real floating point.

        Returns:
            Itself.

        Raises:
            ValueError: If the last dim is another, or a row holds NaN, infinity or a number beyond 1e150; nothing is
                added then.
            TypeError: If X is no dense array of real floating point.
        """
        rows = _rows("StreamingPCA: X", X, self.n_features).detach().reshape(-1, self.n_features)
        for first, panel in self._panels(rows):
            if not bool((finite := panel.isfinite().all(-1)).all()):
                raise ValueError(f"StreamingPCA: row {first + int((~finite).nonzero()[0])} of X holds NaN or infinity")
            if (largest := float(panel.abs().amax())) > LARGEST:
                raise ValueError(f"StreamingPCA: X reaches {largest:.3g}, whose square is out of range; scale it down")
        if self.mode == "gram":
            for _, panel in self._panels(rows):
                self._add_gram(panel)
            return self
        self._fill(rows)
        return self

    def _panels(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Some rows at a time, with the number of the first, in float64 on the device of the state."""
        count = max(1, PANEL // self.n_features)
        for first in range(0, len(rows), count):
            yield first, rows[first : first + count].to(self._mean)

    def merge(self, other: StreamingPCA) -> StreamingPCA:
        """Adds everything that another one has seen, which stays as it is.

        Rows of the other one that do not fill a block yet are added as rows: parts of fewer than ``keep`` rows that are
        merged into one, in their order, give what a single stream gives, bit for bit.

        Args:
            other: Of the same size and settings.

        Returns:
            Itself.

        Raises:
            ValueError: If the settings differ, or it is the same object.
            TypeError: If it is something else.
        """
        if not isinstance(other, StreamingPCA):
            raise TypeError(f"StreamingPCA: merge takes another StreamingPCA, not {type(other).__name__}")
        mine, theirs = self._settings(), other._settings()
        if mine != theirs:
            raise ValueError(f"StreamingPCA: cannot merge {theirs} into {mine} (n_features, k, keep, center, gram)")
        if other is self:
            raise ValueError("StreamingPCA: cannot merge with itself; it would count every row twice")
        if n := other._seen():
            to = self._mean.device
            self._join(n, other._mean.to(to), other._rows.to(to), other._energy.to(to))
            self.n_samples += n
        for rows in other._pending:  # they stay rows: a cut for their sake would lose something
            self._fill(rows)
        return self

    def finalize(self, k: int | None = None) -> PCAResult:
        """The components of what was seen so far; more rows can follow.

        Args:
            k: Components, by default those of the constructor; at most ``keep`` in the incremental mode.

        Returns:
            The components, fewer than k if there are fewer features or rows.

        Raises:
            ValueError: If nothing was seen, the squares of what was seen are all zero, or k is out of range.
            TypeError: If k is no integer.
        """
        k = self.k if k is None else as_integer("StreamingPCA: k", k, 1)
        if self.n_samples == 0:
            raise ValueError("StreamingPCA: no rows yet; call update first")
        most = self.n_features if self.mode == "gram" else self.keep
        if min(k, self.n_features) > most:
            raise ValueError(f"StreamingPCA: k={k}; expected is 1 to {most}")
        _, mean, rows, energy = self._state()
        if float(energy) == 0 and 0 < (size := float(mean.abs().amax())) < 1 / LARGEST:
            raise ValueError(f"StreamingPCA: the mean is {size:.3g}; squares of such numbers vanish, scale X up")
        wanted = min(k, self.n_features, self.n_samples)
        theta, Vh = leading(rows, wanted, self.mode == "gram")
        _, Vh = positive_pivots(Vh.unsqueeze(0), Vh.unsqueeze(0))
        share = torch.where(energy > 0, 1 - theta.sum() / torch.where(energy > 0, energy, 1.0), 0.0).clamp(0, 1)
        discarded = 0.0 if self.mode == "gram" else self._discarded(rows, energy)
        tight = (energy == 0) | ((share >= 100 * ROUNDING) & (discarded <= share / 100))
        share = torch.where(tight, share, share + ROUNDING)
        rank = (theta > theta[:1] * self.n_features * torch.finfo(torch.float64).eps).sum()
        info = SVDInfo(
            rank=rank, rel_error=share.sqrt(), tight=tight, converged=torch.ones_like(tight), rounds=0 * rank,
            passes=0 * rank + 1, method=self.mode, seed=0,
            notes=() if wanted == k else (f"k={k} is more than there is to find: {wanted} were taken",),
        )  # fmt: skip
        return PCAResult(
            components=Vh[0],
            singular_values=theta.sqrt(),
            explained_variance=theta / max(self.n_samples - 1, 1),
            explained_variance_ratio=theta / torch.where(energy > 0, energy, 1.0),
            mean=mean.clone(),
            n_samples=self.n_samples,
            info=info,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, e.g. for ``safetensors.torch.save_file``."""
        return {
            "settings": torch.tensor([VERSION, *self._settings(), self.n_samples], dtype=torch.int64),
            "mean": self._mean.clone(),
            "rows": self._rows.clone(),
            "energy": self._energy.clone(),
            "pending": torch.cat([*self._pending, self._mean.new_zeros((0, self.n_features))]),
        }

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> StreamingPCA:
        """One that goes on where another was saved.

        Args:
            tensors: What :meth:`state_dict` gave.

        Returns:
            The restored one, on the device of the tensors.

        Raises:
            ValueError: If a tensor is missing, of another version, dtype or shape, not finite, or if the numbers cannot
                be those of a stream.
            TypeError: If it is no mapping.
        """
        state = checked_settings(tensors)
        mean, rows, energy, pending = (tensors[name].detach().clone() for name in ("mean", "rows", "energy", "pending"))
        self = cls(
            state.n_features, state.k, mode="gram" if state.gram else "incremental", center=state.center,
            keep=state.keep, device=mean.device,
        )  # fmt: skip
        self._mean, self._rows, self._energy = mean, rows, energy
        self._pending, self._n_pending = ([pending] if len(pending) else []), len(pending)
        self.n_samples = state.n_samples
        return self

    def _settings(self) -> tuple[int, int, int, int, int]:
        return self.n_features, self.k, self.keep, int(self.center), int(self.mode == "gram")

    def _state(self) -> tuple[int, Tensor, Tensor, Tensor]:
        """Count, mean, rows and energy of everything, the pending rows included, without a change."""
        if not self._pending:
            return self.n_samples, self._mean, self._rows, self._energy
        twin = copy.copy(self)  # none of its tensors is changed in place in this mode
        twin._flush()
        return twin.n_samples, twin._mean, twin._rows, twin._energy

    def _seen(self) -> int:
        """Rows that the state holds, without the pending ones."""
        return self.n_samples - self._n_pending

    def _add_gram(self, rows: Tensor) -> None:
        if not len(rows):
            return
        mean = rows.mean(0) if self.center else torch.zeros_like(self._mean)
        centred = rows - mean
        self._shift(self.n_samples, len(rows), mean)
        self.n_samples += len(rows)
        self._rows.addmm_(centred.mT, centred)
        self._energy = self._rows.diagonal().sum()

    def _shift(self, a: int, b: int, mean: Tensor) -> Tensor:
        """Moves the mean of a rows to that with b further ones; the row that stands for the difference."""
        delta = mean - self._mean
        row = delta * (a * b / max(a + b, 1)) ** 0.5
        self._mean = self._mean + delta * (b / max(a + b, 1))
        if self.mode == "gram":
            self._rows.addr_(row, row)
        return row

    def _fill(self, rows: Tensor) -> None:
        """Adds rows to the pending ones; every full block of ``keep`` goes into the state."""
        while len(rows):
            taken, rows = rows[: self.keep - self._n_pending], rows[self.keep - self._n_pending :]
            self._pending.append(taken.to(self._mean, copy=True))
            self._n_pending += len(taken)
            self.n_samples += len(taken)
            if self._n_pending == self.keep:
                self._flush()

    def _flush(self) -> None:
        """Takes the pending rows into the state."""
        if not self._pending:
            return
        rows = torch.cat(self._pending)
        before = self._seen()
        self._pending, self._n_pending = [], 0
        mean = rows.mean(0) if self.center else torch.zeros_like(self._mean)
        row = self._shift(before, len(rows), mean)
        self._cut(torch.cat([self._rows, rows - mean, row.unsqueeze(0)]))

    def _join(self, n: int, mean: Tensor, rows: Tensor, energy: Tensor) -> None:
        row = self._shift(self._seen(), n, mean)
        if self.mode == "gram":
            self._rows += rows
            self._energy = self._rows.diagonal().sum()
        else:
            self._energy = self._energy + energy - rows.square().sum()  # what the other one discarded is lost here too
            self._cut(torch.cat([self._rows, rows, row.unsqueeze(0)]))

    def _cut(self, rows: Tensor) -> None:
        """Keeps the leading rows of an orthogonal equivalent; the energy counts what comes in."""
        self._energy = self._energy + rows.square().sum() - self._rows.square().sum()
        _, Y = eigh_descending(rows @ rows.mT)
        self._rows = Y[:, : self.keep].mT @ rows

    def _discarded(self, rows: Tensor, energy: Tensor) -> float:
        """Share of the energy that was cut off."""
        return float(1 - rows.square().sum() / energy) if float(energy) > 0 else 0.0


def _rows(what: str, X: Any, n: int) -> Tensor:
    """``(..., n)`` as a tensor, and nothing that torch would broadcast to it."""
    rows, _ = as_tensor(X)
    if rows.layout != torch.strided:
        raise TypeError(f"{what} is sparse ({rows.layout}); dense rows are needed, a part at a time with X.to_dense()")
    if not rows.is_floating_point():
        raise TypeError(f"{what} is {rows.dtype}; real floating point is needed")
    if rows.ndim == 0 or rows.shape[-1] != n:
        raise ValueError(f"{what} has shape {tuple(rows.shape)}; expected is (..., {n})")
    return rows
