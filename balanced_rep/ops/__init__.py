"""Ground floor: one function per op, dispatched to the fastest backend that fits."""

from balanced_rep.ops import energy_entropy as energy_entropy  # these two register ops of representation_stats
from balanced_rep.ops import log_histogram as log_histogram
from balanced_rep.ops._registry import BackendError, backend
from balanced_rep.ops.activation_jvp import activation_jvp, gated_activation_jvp
from balanced_rep.ops.attention_jvp import attention_jvp
from balanced_rep.ops.gram_eigh import gram_eigh
from balanced_rep.ops.krylov_product import krylov_product
from balanced_rep.ops.moments import moments
from balanced_rep.ops.norm_jvp import group_norm_jvp, layer_norm_jvp, rms_norm_jvp, softmax_jvp
from balanced_rep.ops.philox import philox_bits, philox_normal, philox_rademacher

__all__ = [
    "BackendError",
    "activation_jvp",
    "attention_jvp",
    "backend",
    "gated_activation_jvp",
    "gram_eigh",
    "group_norm_jvp",
    "krylov_product",
    "layer_norm_jvp",
    "moments",
    "philox_bits",
    "philox_normal",
    "philox_rademacher",
    "rms_norm_jvp",
    "softmax_jvp",
]
