"""What a saved state of StreamingPCA has to be before anything is built from it: files may be cut or hostile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NAMES", "VERSION", "Settings", "checked_settings"]

VERSION = 1
NAMES = ("settings", "mean", "rows", "energy", "pending")
AGREES = 1e-9  # relative difference of two sums of the same numbers that is rounding


@dataclass(frozen=True)
class Settings:
    """The integers of a state.

    Attributes:
        n_features: Length n of a row.
        k: Components.
        keep: Rows of the incremental state.
        center: Whether the mean is subtracted.
        gram: Whether it is a scatter matrix.
        n_samples: Rows seen, the pending ones included.
    """

    n_features: int
    k: int
    keep: int
    center: bool
    gram: bool
    n_samples: int


def checked_settings(tensors: Mapping[str, Tensor]) -> Settings:
    """Looks at every tensor of a state, before memory is taken for a size that a file merely claims.

    Args:
        tensors: As they were loaded.

    Returns:
        The settings, which the tensors agree with.

    Raises:
        ValueError: If a tensor is missing, of another version, dtype, shape or device, not finite, or if the numbers
            cannot be those of any stream.
        TypeError: If it is no mapping.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"not a StreamingPCA state: {type(tensors).__name__}; what state_dict() gave is needed")
    if missing := sorted(set(NAMES) - set(tensors)):
        raise ValueError(f"not a StreamingPCA state: {missing} missing, found {sorted(tensors)}")
    header = tensors["settings"]
    if not isinstance(header, Tensor) or header.dtype != torch.int64 or header.ndim != 1 or len(header) == 0:
        raise ValueError("not a StreamingPCA state: 'settings' has to be a row of int64 numbers")
    version, *numbers = header.tolist()
    if version != VERSION:
        raise ValueError(f"StreamingPCA state of version {version}; this is version {VERSION}")
    if len(numbers) != 6:
        raise ValueError(f"not a StreamingPCA state: 'settings' has {len(header)} numbers, not 7")
    n, k, keep, center, gram, n_samples = numbers
    if n < 1 or k < 1 or not min(k, n) <= keep <= n or center not in (0, 1) or gram not in (0, 1) or n_samples < 0:
        raise ValueError(f"not a StreamingPCA state: settings {numbers} are out of range")
    _check_tensors(tensors, n, keep, bool(gram), n_samples)
    return Settings(n, k, keep, bool(center), bool(gram), n_samples)


def _check_tensors(tensors: Mapping[str, Tensor], n: int, keep: int, gram: bool, n_samples: int) -> None:
    mean, rows, energy, pending = (tensors[name] for name in NAMES[1:])
    most = 0 if gram else min(keep - 1, n_samples)  # of pending rows
    fits = {
        "mean": mean.shape == (n,),
        "rows": rows.shape == (n, n) if gram else rows.ndim == 2 and rows.shape[1] == n and len(rows) <= keep,
        "energy": energy.shape == (),
        "pending": pending.ndim == 2 and pending.shape[1] == n and len(pending) <= most,
    }
    for name, good in fits.items():
        value = tensors[name]
        if not good:
            raise ValueError(f"not a StreamingPCA state of {n} features: {name} has shape {tuple(value.shape)}")
        if value.dtype != torch.float64 or value.layout != torch.strided or value.device != mean.device:
            raise ValueError(
                f"not a StreamingPCA state: {name} is {value.dtype}, {value.layout} on {value.device}; float64 tensors "
                "on one device are needed"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"not a StreamingPCA state: {name} holds NaN or infinity")
    held = rows.diagonal() if gram else rows.square().sum(-1)
    kept, whole = float(held.sum()), float(energy)
    wrong = kept > whole * (1 + AGREES) or (gram and kept < whole * (1 - AGREES))
    if wrong or (held.numel() and float(held.amin()) < 0) or (n_samples == 0 and whole > 0):
        raise ValueError(f"not a StreamingPCA state: its rows hold {kept:.3g} of an energy of {whole:.3g}")
