"""torch, numpy and cupy in and out by DLPack or the array interface: no copy, and results come back as they came."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_array", "as_tensor"]


def as_tensor(x: Any) -> tuple[Tensor, str]:
    """A tensor on the memory of ``x``, and the library it came from.

    Args:
        x: torch tensor, numpy array (read-only ones too), cupy array, or anything with ``__dlpack__``. A numpy array
            with negative or unaligned strides, which torch cannot express, is copied.

    Returns:
        The tensor and ``"torch"``, ``"numpy"`` or ``"cupy"`` (results for other DLPack producers are torch tensors).

    Raises:
        TypeError: If ``x`` is none of these, a masked array, or a numpy array of a dtype other than float16, float32,
            float64.
    """
    if isinstance(x, Tensor):
        return x, "torch"
    if isinstance(x, (np.ndarray, np.floating)):
        return _from_numpy(x), "numpy"
    if hasattr(x, "__dlpack__"):
        return torch.from_dlpack(x), "cupy" if type(x).__module__.partition(".")[0] == "cupy" else "torch"
    raise TypeError(
        f"expected a torch tensor, numpy array or cupy array, got {type(x).__name__}: "
        "convert it with torch.as_tensor(x)"
    )


def as_array(t: Tensor, library: str) -> Any:
    """The tensor as an array of ``library``, on the same memory."""
    if library == "torch":
        return t
    if library == "numpy":
        return t.detach().numpy()[()]  # a 0-d array becomes a numpy scalar, as numpy's own reductions return
    import cupy

    return cupy.from_dlpack(t.detach())


class _Memory:
    """Borrows an array's memory without its read-only flag, which torch would warn about; kernels only read."""

    def __init__(self, x: np.ndarray) -> None:
        self.owner = x
        pointer, _ = x.__array_interface__["data"]
        self.__array_interface__ = {**x.__array_interface__, "data": (pointer, False)}


def _from_numpy(array: np.ndarray | np.floating) -> Tensor:
    if hasattr(array, "mask"):
        raise TypeError("x is a masked array, whose mask would be ignored: pass x.compressed() or x.filled(value)")
    x = np.asarray(array)
    if x.dtype.kind != "f" or x.dtype.itemsize not in (2, 4, 8):
        raise TypeError(
            f"x has numpy dtype {x.dtype}; accepted are float16, float32, float64: convert it with "
            "x.astype(numpy.float32)"
        )
    if not x.dtype.isnative:
        raise TypeError(
            f"x has byte order {x.dtype.str!r}: convert it with x.astype({x.dtype.newbyteorder('=').str!r})"
        )
    if x.size and any(s < 0 or s % x.itemsize for s in x.strides):
        x = np.ascontiguousarray(x)
    return torch.from_numpy(x if x.flags.writeable else np.asarray(_Memory(x)))
