r"""Representation statistics: every moment and sparsity measure of an activation, from one mergeable state.

Letters: v the (pooled) values of one sample, n their number, :math:`m_k` their central moment sums,
:math:`s_2 = \sum v^2`, :math:`s_4 = \sum v^4`. Sources of the measures: docs/ops/moments.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from balanced_rep.ops._arrays import as_tensor
from balanced_rep.ops._layout import arrange
from balanced_rep.ops._library import run
from balanced_rep.ops.energy_entropy import ENERGY_ENTROPY
from balanced_rep.ops.log_histogram import LOG_HISTOGRAM, N_BINS
from balanced_rep.ops.moments import FIELDS, MOMENTS
from balanced_rep.stats._histogram import LogHistogram, window_top
from balanced_rep.stats._measures import STATISTICS, Measures
from balanced_rep.stats._merge import merge_moments

__all__ = ["STATISTICS", "RepresentationStats", "cat", "representation_stats"]


def representation_stats(
    h: Any,
    dim: int | Sequence[int] | None = -1,
    pool: str | None = None,
    correction: float = 0,
    *,
    pool_dim: int | Sequence[int] | None = None,
    threshold: float = 0.0,
    histogram: bool = False,
    entropy: bool = False,
) -> RepresentationStats:
    """Statistics of an activation over ``dim``, in one read of ``h`` and without a copy of it.

    Args:
        h: Activation as torch tensor, numpy or cupy array, any shape and strides; float32, float16, bfloat16, float64.
        dim: Dims to reduce, counted in the pooled tensor: ``-1`` gives one result per sample of ``(N, p)``, ``0`` one
            per unit, ``None`` reduces all.
        pool: ``"max"`` or ``"mean"`` over ``pool_dim`` in front of the statistics; ``None`` for none.
        correction: Degrees of freedom that ``var`` and ``std`` subtract from n, as in :func:`torch.std`; the paper and
            this function use 0 by default.
        pool_dim: Dims of ``h`` to pool; by default the spatial dims of ``(N, C, *spatial)`` and the token dim
            of ``(N, T, D)``.
        threshold: A value is active if it is greater than this, in the units of ``h``.
        histogram: Also keep a log-histogram (49 kB per result, one more read) for ``topk_share``, ``gini`` and
            ``quantile``.
        entropy: Also keep the sum for ``energy_entropy`` (one more read).

    Returns:
        Statistics of shape ``(*kept,)`` on the device of ``h``.

    Raises:
        TypeError: If ``h`` is not an array of an accepted dtype, or a dim is no integer.
        ValueError: If an argument is out of range or unclear.
        BackendError: If a backend is forced that cannot run this call.

    Example:
        >>> s = representation_stats(torch.tensor([[0.0, 0.0, 0.0, 4.0], [1.0, 1.0, 1.0, 1.0]]))
        >>> s.participation_ratio.tolist(), s.std.tolist()[1]
        ([1.0, 4.0], 0.0)
    """
    if not (isinstance(correction, (int, float)) and math.isfinite(correction) and correction >= 0):
        raise ValueError(f"correction must be a finite number >= 0, got {correction!r}")
    if math.isnan(threshold):
        raise ValueError("threshold must be a number, got NaN")
    x, library = as_tensor(h)
    layout = arrange(x, dim, pool, pool_dim)
    state = run(MOMENTS, *layout, float(threshold))
    table = energy_log = None
    if histogram:
        top = window_top(torch.maximum(state[FIELDS.index("min")].abs(), state[FIELDS.index("max")].abs()).detach())
        table = LogHistogram(run(LOG_HISTOGRAM, layout.x.detach(), top, *layout[1:]), top)
    if entropy:
        energy_log = run(ENERGY_ENTROPY, *layout)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return RepresentationStats(state, dtype, float(correction), float(threshold), table, energy_log, library)


@dataclass(frozen=True, eq=False)
class RepresentationStats(Measures):
    """Mergeable statistics; every measure is a property of shape :attr:`shape`.

    Results are float32 (float64 for float64 input) arrays of the library that the input came from; what leaves the
    range of float32, as the ``var`` of values near 1e20 does, is infinite there and right in :attr:`state`. A measure
    that is undefined (a constant or empty sample, too few values) is NaN, and so is every moment of a sample with a NaN
    or infinite value, which :attr:`n_nonfinite` counts.

    Attributes:
        state: float64 ``(10, *shape)``, fields as in :data:`balanced_rep.ops.moments.FIELDS`.
        dtype: dtype of the results.
        correction: Degrees of freedom subtracted by ``var`` and ``std``.
        threshold: A value is active if it is greater than this.
        histogram: The log-histogram, if asked for.
        energy_log: float64 ``(*shape,)``, the sum of v^2 ln v^2, if asked for.
        library: ``"torch"``, ``"numpy"`` or ``"cupy"``.
    """

    state: Tensor
    dtype: torch.dtype = torch.float32
    correction: float = 0.0
    threshold: float = 0.0
    histogram: LogHistogram | None = field(default=None, repr=False)
    energy_log: Tensor | None = field(default=None, repr=False)
    library: str = "torch"

    def __repr__(self) -> str:
        extras = "".join(f", {name}" for name in ("histogram", "energy_log") if getattr(self, name) is not None)
        return (
            f"RepresentationStats(shape={tuple(self.shape)}, correction={self.correction:g}, {self.dtype}, "
            f"{self.state.device}{extras})"
        )

    @property
    def shape(self) -> torch.Size:
        """Shape of every result."""
        return self.state.shape[1:]

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("statistics of one sample, shape (), have no len()")
        return self.shape[0]

    def __iter__(self) -> Iterator[RepresentationStats]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: Any) -> RepresentationStats:
        """Statistics of some of the samples; ``index`` as for a tensor of shape :attr:`shape`."""
        at = index if isinstance(index, tuple) else (index,)
        return self._map(lambda t, lead, tail: t[(slice(None),) * lead + at + (slice(None),) * tail])

    def to(self, device: torch.device | str) -> RepresentationStats:
        """The same statistics on another device; results are torch tensors where their library has no arrays there."""
        moved = self._map(lambda t, lead, tail: t.to(device))
        at_home = {"numpy": "cpu", "cupy": "cuda"}.get(self.library, moved.state.device.type) == moved.state.device.type
        return moved if at_home else replace(moved, library="torch")

    def merge(self, *others: RepresentationStats) -> RepresentationStats:
        """Statistics of the samples continued by others along the reduced axis: exact (float64), in any order to 1e-12.

        Args:
            *others: Statistics of the same shape, correction, threshold and extras, on the same device.

        Returns:
            The merged statistics; their results are arrays of the library of these.

        Raises:
            TypeError: If another is no :class:`RepresentationStats`.
            ValueError: If something differs; says what.
        """
        merged = self
        for other in others:
            merged._check_compatible(other)
            if merged.shape != other.shape:
                raise ValueError(f"cannot merge statistics of shapes {tuple(merged.shape)} and {tuple(other.shape)}")
            a, b = merged.histogram, other.histogram
            e, f = merged.energy_log, other.energy_log
            merged = replace(
                merged,
                state=merge_moments(merged.state, other.state),
                dtype=torch.promote_types(merged.dtype, other.dtype),
                histogram=None if a is None or b is None else a.merge(b),
                energy_log=None if e is None or f is None else e + f,
            )
        return merged

    def _check_compatible(self, other: RepresentationStats) -> None:
        if not isinstance(other, RepresentationStats):
            raise TypeError(f"expected RepresentationStats, got {type(other).__name__}")
        for name in ("correction", "threshold"):
            if (a := getattr(self, name)) != (b := getattr(other, name)):
                raise ValueError(f"statistics differ in {name}: {a!r} and {b!r}; compute both with the same")
        for name in ("histogram", "energy_log"):
            if (getattr(self, name) is None) != (getattr(other, name) is None):
                raise ValueError(f"only one of the statistics has {name}; compute both with it or both without")
        if self.state.device != other.state.device:
            raise ValueError(f"statistics are on {self.state.device} and {other.state.device}; move one with .to()")

    def _map(self, f: Callable[[Tensor, int, int], Tensor]) -> RepresentationStats:
        """Applies ``f(tensor, leading dims, trailing dims)``, counting the dims that surround those of the samples."""
        h = self.histogram
        return replace(
            self,
            state=f(self.state, 1, 0),
            histogram=None if h is None else LogHistogram(f(h.table, 1, 1), f(h.top, 0, 0)),
            energy_log=None if self.energy_log is None else f(self.energy_log, 0, 0),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, e.g. for ``safetensors.torch.save_file``."""
        out = {
            "state": self.state.contiguous(),
            "settings": torch.tensor([self.correction, self.threshold], dtype=torch.float64, device="cpu"),
            "dtype": torch.empty(0, dtype=self.dtype, device="cpu"),
        }
        if self.histogram is not None:
            out["histogram.table"] = self.histogram.table.contiguous()
            out["histogram.top"] = self.histogram.top.contiguous()
        if self.energy_log is not None:
            out["energy_log"] = self.energy_log.contiguous()
        return out

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor]) -> RepresentationStats:
        """Statistics from :meth:`state_dict`; their results are torch tensors.

        Args:
            tensors: What :meth:`state_dict` gave.

        Returns:
            The statistics.

        Raises:
            ValueError: If a tensor is missing, or has the wrong dtype or shape.
        """
        if missing := {"state", "settings", "dtype"} - set(tensors):
            raise ValueError(f"not a RepresentationStats state: {sorted(missing)} missing, found {sorted(tensors)}")
        shape = tuple(tensors["state"].shape[1:])
        for name, dtype, want in (
            ("state", torch.float64, (len(FIELDS), *shape)),
            ("settings", torch.float64, (2,)),
            ("histogram.table", torch.int64, (3, *shape, N_BINS)),
            ("histogram.top", torch.int64, shape),
            ("energy_log", torch.float64, shape),
        ):
            t = tensors.get(name)
            if t is not None and (t.dtype != dtype or tuple(t.shape) != want):
                raise ValueError(f"{name} must be {dtype} {want}, got {t.dtype} {tuple(t.shape)}")
        table, top = tensors.get("histogram.table"), tensors.get("histogram.top")
        if (table is None) != (top is None):
            raise ValueError(f"histogram.table and histogram.top go together, found {sorted(tensors)}")
        histogram = None if table is None or top is None else LogHistogram(table, top)
        correction, threshold = tensors["settings"].tolist()
        dtype = tensors["dtype"].dtype
        return cls(tensors["state"], dtype, correction, threshold, histogram, tensors.get("energy_log"))

    def to_dict(self) -> dict[str, Any]:
        """Every one-pass measure by name, see :data:`STATISTICS`, and the counts."""
        return {name: getattr(self, name) for name in ("n", "n_active", "n_nonfinite", *STATISTICS)}


def cat(stats: Iterable[RepresentationStats], dim: int = 0) -> RepresentationStats:
    """Appends samples: statistics of different samples side by side along ``dim`` of their shape.

    Args:
        stats: At least one; the same correction, threshold and extras, and shapes that differ in ``dim`` only.
        dim: Dim of :attr:`RepresentationStats.shape` to append along.

    Returns:
        The joined statistics; their results are arrays of the library of the first.

    Raises:
        TypeError: If an entry is no :class:`RepresentationStats`.
        ValueError: If the list is empty or something differs.
    """
    if isinstance(stats, RepresentationStats):
        raise TypeError("cat takes several RepresentationStats, got a single one: pass a list")
    stats = list(stats)
    if not stats:
        raise ValueError("cat needs at least one RepresentationStats, got an empty list")
    first = stats[0]
    if not -len(first.shape) <= dim < len(first.shape):
        raise ValueError(f"dim={dim} is out of range for statistics of shape {tuple(first.shape)}")
    dim %= len(first.shape)
    for other in stats[1:]:
        first._check_compatible(other)
        if [n for d, n in enumerate(first.shape) if d != dim] != [n for d, n in enumerate(other.shape) if d != dim]:
            raise ValueError(f"shapes {tuple(first.shape)} and {tuple(other.shape)} differ in more than dim {dim}")
    histograms = [s.histogram for s in stats if s.histogram is not None]
    logs = [s.energy_log for s in stats if s.energy_log is not None]
    return replace(
        first,
        state=torch.cat([s.state for s in stats], dim + 1),
        dtype=functools.reduce(torch.promote_types, (s.dtype for s in stats)),
        histogram=LogHistogram(
            torch.cat([h.table for h in histograms], dim + 1), torch.cat([h.top for h in histograms], dim)
        )
        if histograms
        else None,
        energy_log=torch.cat(logs, dim) if logs else None,
    )
