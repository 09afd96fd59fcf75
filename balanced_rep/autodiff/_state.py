"""A function that is called several times has to be the same each time: what it keeps, and what it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from balanced_rep.autodiff._errors import UnsupportedError
from balanced_rep.autodiff._fused import is_tracing
from balanced_rep.autodiff._outputs import tree_map

__all__ = ["State", "check_same_output"]

SMALL = 1 << 20  # bytes of a buffer that is copied
LOOSE = 4.0  # times the root of the precision: far beyond rounding, which differs between passes of different sizes


class State:
    """Buffers and parameters of a model before its first pass.

    Args:
        f: The function; only modules have a state that can be looked at.
    """

    def __init__(self, f: Any) -> None:
        self._f = f if isinstance(f, nn.Module) and not is_tracing() else None
        self._buffers = {name: (b, _version(b), _small_copy(b)) for name, b in self._now("buffers")}
        self._versions = {name: (p, _version(p)) for name, p in self._now("parameters")}

    def _now(self, kind: str) -> list[tuple[str, Tensor]]:
        return [] if self._f is None else list(getattr(self._f, f"named_{kind}")())

    def check(self) -> None:
        """Refuses another pass, with an UnsupportedError, if the model is no longer what it was."""
        for name, now in self._now("buffers"):
            before, version, copy = self._buffers.get(name, (now, _version(now), None))
            same = now is before and _version(now) == version
            if copy is not None:  # of which a cache that is written anew each time is the same
                same = _equal(now, copy)
            elif now is not before:
                same = _equal(now, before)
            if not same:
                _refuse("buffer", name, before)
        for name, now in self._now("parameters"):
            p, version = self._versions.get(name, (now, _version(now)))
            if p is now and _version(p) != version:
                _refuse("parameter", name, p)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _small_copy(x: Tensor) -> Tensor | None:
    return x.detach().clone() if type(x) is Tensor and x.layout == torch.strided and x.nbytes <= SMALL else None


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether they hold the same values; what has another shape, as a cache that grew, is not compared."""
    if type(a) is not Tensor or type(b) is not Tensor or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _refuse(kind: str, name: str, x: Tensor) -> None:
    raise UnsupportedError(
        f"br.jvp: f wrote into its {kind} {name!r}, of shape {tuple(x.shape)}, and is to run again, for other tangents "
        "or in another layout: it would be another function. Keep the model from changing (model.eval()), or use "
        "chunk_size=None"
    )


def check_same_output(first: Any, now: Any) -> None:
    """Refuses results of passes whose primals differ.

    Args:
        first: Output of the first pass, without tangents.
        now: That of a later one.

    Raises:
        UnsupportedError: If they differ by more than rounding explains.
    """
    wanted: list[Tensor] = []
    tree_map(lambda x: wanted.append(x) if isinstance(x, Tensor) else None, first)
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, now)
    for a, b in zip(wanted, found, strict=False):
        if a.shape != b.shape or not a.is_floating_point() or not a.numel():
            continue
        far, size = (torch.linalg.vector_norm(v.double().nan_to_num(0, 0, 0)) for v in (a.double() - b.double(), a))
        if far > LOOSE * torch.finfo(a.dtype).eps ** 0.5 * size:
            raise UnsupportedError(
                f"br.jvp: f returned another value for one chunk of tangents than for another (they differ by "
                f"{float(far / size):.2g} of their norm): it keeps something from one call to the next, or draws "
                "random numbers. Make it a function of its arguments, or use chunk_size=None"
            )
