"""Fused Jacobian, sketching and representation-statistics kernels for diffusion backbones."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from balanced_rep._version import __version__
from balanced_rep.ops import BackendError, backend
from balanced_rep.stats import Recording, RepresentationStats, cat, record, representation_stats

if TYPE_CHECKING:
    from balanced_rep import models

__all__ = [
    "BackendError",
    "Recording",
    "RepresentationStats",
    "__version__",
    "backend",
    "cat",
    "models",
    "record",
    "representation_stats",
]

_LAZY = ("models",)  # imported when first asked for, so that the import of the package stays light


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return import_module(f"balanced_rep.{name}")
    raise AttributeError(f"module 'balanced_rep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
