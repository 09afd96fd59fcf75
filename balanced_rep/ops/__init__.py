"""Ground floor: one function per op, dispatched to the fastest backend that fits."""

from balanced_rep.ops._registry import BackendError, backend
from balanced_rep.ops.moments import moments

__all__ = ["BackendError", "backend", "moments"]
