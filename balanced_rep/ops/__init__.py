"""Ground floor: one function per op, dispatched to the fastest backend that fits."""

from balanced_rep.ops import energy_entropy as energy_entropy  # these two register ops of representation_stats
from balanced_rep.ops import log_histogram as log_histogram
from balanced_rep.ops._registry import BackendError, backend
from balanced_rep.ops.moments import moments
from balanced_rep.ops.philox import philox_bits, philox_normal, philox_rademacher

__all__ = ["BackendError", "backend", "moments", "philox_bits", "philox_normal", "philox_rademacher"]
