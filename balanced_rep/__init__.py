"""Fused Jacobian, sketching and representation-statistics kernels for diffusion backbones."""

from balanced_rep._version import __version__
from balanced_rep.ops import BackendError, backend

__all__ = ["BackendError", "__version__", "backend"]
