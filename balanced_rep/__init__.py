"""Fused Jacobian, sketching and representation-statistics kernels for diffusion backbones."""

from balanced_rep._version import __version__
from balanced_rep.ops import BackendError, backend
from balanced_rep.stats import RepresentationStats, cat, representation_stats

__all__ = ["BackendError", "RepresentationStats", "__version__", "backend", "cat", "representation_stats"]
