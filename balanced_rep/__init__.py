"""Fused Jacobian, sketching and representation-statistics kernels for diffusion backbones."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from balanced_rep._version import __version__
from balanced_rep.ops import BackendError, backend
from balanced_rep.stats import Recording, RepresentationStats, cat, record, representation_stats

if TYPE_CHECKING:
    from balanced_rep import autodiff, detection, linalg, models, steering, theory
    from balanced_rep.autodiff import jvp
    from balanced_rep.linalg import JacobianOperator, StreamingPCA, jacobian_spectrum, jacobian_svd, randomized_svd

__all__ = [
    "BackendError",
    "JacobianOperator",
    "Recording",
    "RepresentationStats",
    "StreamingPCA",
    "__version__",
    "autodiff",
    "backend",
    "cat",
    "detection",
    "jacobian_spectrum",
    "jacobian_svd",
    "jvp",
    "linalg",
    "models",
    "randomized_svd",
    "record",
    "representation_stats",
    "steering",
    "theory",
]

# Imported when first asked for, so that the import of the package stays light: name to where it lives.
_LAZY = {
    "JacobianOperator": "balanced_rep.linalg:JacobianOperator",
    "StreamingPCA": "balanced_rep.linalg:StreamingPCA",
    "autodiff": "balanced_rep.autodiff",
    "detection": "balanced_rep.detection",
    "jacobian_spectrum": "balanced_rep.linalg:jacobian_spectrum",
    "jacobian_svd": "balanced_rep.linalg:jacobian_svd",
    "jvp": "balanced_rep.autodiff:jvp",
    "linalg": "balanced_rep.linalg",
    "models": "balanced_rep.models",
    "randomized_svd": "balanced_rep.linalg:randomized_svd",
    "steering": "balanced_rep.steering",
    "theory": "balanced_rep.theory",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'balanced_rep' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    value = import_module(module)
    return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
    return sorted(__all__)
