"""Which backend can run which call: answers ``None`` or the reason.

Nothing here imports Triton or ``_C``, and cupy only for an input that is on a CUDA device and would go to it.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from balanced_rep.kernels._strided import describe
from balanced_rep.ops._registry import forced_backend, missing

__all__ = [
    "JVP_PAIRS",
    "MAX_HEAD_DIM",
    "MAX_ORDER",
    "MAX_ROW",
    "MAX_WIDTH",
    "cpp_attention_jvp",
    "cpp_items",
    "cpp_jvp",
    "cpp_krylov_product",
    "cpp_tensor",
    "cuda_gram_eigh",
    "cuda_items",
    "cuda_moments",
    "eigh_shared_bytes",
    "triton_attention_jvp",
    "triton_group_norm_jvp",
    "triton_items",
    "triton_jvp",
    "triton_moments",
    "triton_row_jvp",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
JVP_PAIRS = (  # dtypes of primal and tangents that the kernels take; C++ by number, Triton all but float64
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
)
MAX_HEAD_DIM = 256  # of the Triton attention kernel
MAX_WIDTH = 64  # of a block that the C++ products of a tall matrix take
MAX_ORDER = 128  # of a matrix whose eigenvectors the CUDA kernel computes
MAX_ROW = 8192  # of the Triton norms over rows and softmax


def cpp_tensor(x: Tensor, *_: Any) -> str | None:
    """The C++ kernels take any strided CPU tensor of the four dtypes."""
    if x.device.type != "cpu":
        return f"input is on {x.device}, this backend runs on cpu"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} is not one of float32, float16, bfloat16, float64"
    return missing("balanced_rep._C")


def cpp_jvp(x: Tensor, dx: Tensor, *_: Any) -> str | None:
    """A primal and its tangents on the CPU."""
    if x.device.type != "cpu":
        return f"input is on {x.device}, this backend runs on cpu"
    if (x.dtype, dx.dtype) not in JVP_PAIRS:
        return f"a {x.dtype} primal with {dx.dtype} tangents is none of the pairs that it was compiled for"
    return missing("balanced_rep._C")


def cpp_attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: Any
) -> str | None:
    """Queries, keys, values and those tangents that there are, on the CPU."""
    return cpp_jvp(q, next(t for t in (dq, dk, dv) if t is not None))


def cpp_krylov_product(m: Tensor, v: Tensor, *_: Any) -> str | None:
    """A stack of float32 matrices whose rows or columns lie in one piece, with a block on which BLAS is not faster."""
    if m.device.type != "cpu":
        return f"input is on {m.device}, this backend runs on cpu"
    if m.dtype != torch.float32:
        return f"dtype {m.dtype} is not float32"
    if (width := v.shape[1]) > MAX_WIDTH:
        return f"{width} vectors: from {MAX_WIDTH} on, general products of matrices reach their speed"
    if 1 not in m.stride()[1:] and m.numel():
        return "neither rows nor columns lie in one piece of memory"
    return missing("balanced_rep._C")


def cuda_moments(x: Tensor, n_kept: int, n_pooled: int, *_: Any) -> str | None:
    """CUDA C++ takes any strided activation that lies in memory as a few blocks."""
    return cuda_items(x) or _walkable(x, n_kept, n_pooled, smallest_tile=256)


def eigh_shared_bytes(n: int) -> int:
    """Shared memory of a block of the eigenvalue kernel: the matrix, and a number for each column."""
    return 8 * (n * n + n)


def cuda_gram_eigh(g: Tensor, *_: Any) -> str | None:
    """float64 matrices that fit the shared memory of a block: order 128 on A100, H100, B200; at least 90 elsewhere."""
    if (reason := cuda_items(g)) is not None:
        return reason
    if g.dtype != torch.float64:
        return f"dtype {g.dtype} is not float64"
    if (n := g.shape[-1]) > MAX_ORDER:
        return f"order {n}: at most {MAX_ORDER} columns fit into registers"
    room = torch.cuda.get_device_properties(g.device).shared_memory_per_block_optin
    if (needed := eigh_shared_bytes(n)) > room:
        return f"order {n}: {needed} bytes of shared memory are needed, a block of this device has {room}"
    return None


def triton_moments(x: Tensor, n_kept: int, n_pooled: int, *_: Any) -> str | None:
    """Triton takes the same."""
    return triton_items(x) or _walkable(x, n_kept, n_pooled, smallest_tile=8)


def _walkable(x: Tensor, n_kept: int, n_pooled: int, smallest_tile: int) -> str | None:
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} is not one of float32, float16, bfloat16, float64"
    view = describe(x, n_kept, n_pooled)
    return view.too_many_blocks() or view.too_many_tiles(smallest_tile)


def cpp_items(items: Tensor, *_: Any) -> str | None:
    """Counter-based randomness on the CPU."""
    if items.device.type != "cpu":
        return f"items are on {items.device}, this backend runs on cpu"
    return missing("balanced_rep._C")


def cuda_items(x: Tensor, *_: Any) -> str | None:
    """CUDA C++ through cupy: decided by the device and by what is installed."""
    if x.device.type != "cuda":
        return f"input is on {x.device}, this backend runs on cuda"
    if torch.version.hip is not None:
        return "torch is built for ROCm, this backend needs an NVIDIA device"
    return missing("cupy") or _no_compiler()


def _no_compiler() -> str | None:
    from balanced_rep.kernels._driver import no_compiler

    return no_compiler()


def triton_items(x: Tensor, *_: Any) -> str | None:
    """Triton on the device; its interpreter, thousands of times slower, only where this backend is forced."""
    if x.device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"input is on {x.device}, this backend runs on cuda (or set TRITON_INTERPRET=1)"
        if forced_backend() != "triton":
            return f"input is on {x.device}, and Triton's interpreter runs only where this backend is forced"
    return missing("triton")


def triton_jvp(x: Tensor, dx: Tensor, *_: Any) -> str | None:
    """A primal and its tangents: float32, or one half type for both, or tangents in a half type of a float32 primal."""
    if (reason := triton_items(x)) is not None:
        return reason
    if (x.dtype, dx.dtype) not in JVP_PAIRS or x.dtype == torch.float64:
        return f"a {x.dtype} primal with {dx.dtype} tangents is none of the pairs that it takes"
    return None


def triton_row_jvp(x: Tensor, dx: Tensor, *_: Any) -> str | None:
    """The same, with rows that fit into registers."""
    if (reason := triton_jvp(x, dx)) is not None:
        return reason
    return None if x.shape[-1] <= MAX_ROW else f"rows of {x.shape[-1]}: at most {MAX_ROW} elements fit into registers"


def triton_group_norm_jvp(x: Tensor, dx: Tensor, *_: Any) -> str | None:
    """The same, in any layout whose groups lie within 2^31 elements."""
    if (reason := triton_jvp(x, dx)) is not None:
        return reason
    far = any(_reach(t) >= 2**31 for t in (x, dx)) or math.prod(x.shape[-2:]) >= 2**31
    return "a sample lies in 2^31 elements of memory or more (x.contiguous() brings it together)" if far else None


def triton_attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, mask: Tensor | None,
    *_: Any,
) -> str | None:  # fmt: skip
    """Head dims up to 256, with tensor cores, in any layout whose tiles lie within 2^31 elements."""
    tangents = [t for t in (dq, dk, dv) if t is not None]
    if (reason := triton_jvp(q, tangents[0])) is not None:
        return reason
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"head dims {q.shape[-1]} and {v.shape[-1]}: at most {MAX_HEAD_DIM} channels fit into registers"
    if q.device.type == "cuda" and torch.version.hip is not None:
        return "torch is built for ROCm, this kernel needs an NVIDIA device"
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the device is older than compute capability 8.0, whose tensor cores it needs"
    if any(_reach(t) >= 2**31 for t in (q, k, v, mask, *tangents) if t is not None):
        return "one head lies in 2^31 elements of memory or more (x.contiguous() brings it together)"
    return None


def _reach(x: Tensor) -> int:
    """Elements of memory that the last two dims span."""
    return sum((n - 1) * s for n, s in zip(x.shape[-2:], x.stride()[-2:], strict=True) if n)
