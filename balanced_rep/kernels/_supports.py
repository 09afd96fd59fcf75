"""Which backend can run which call: answers ``None`` or the reason, and imports neither Triton nor cupy nor ``_C``."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from balanced_rep.ops._registry import forced_backend, missing

__all__ = ["cpp_items", "cpp_tensor", "cuda_items", "cuda_moments", "triton_items", "triton_moments"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def cpp_tensor(x: Tensor, *_: Any) -> str | None:
    """The C++ kernels take any strided CPU tensor of the four dtypes."""
    if x.device.type != "cpu":
        return f"input is on {x.device}, this backend runs on cpu"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} is not one of float32, float16, bfloat16, float64"
    return missing("balanced_rep._C")


def cuda_moments(x: Tensor, *_: Any) -> str | None:
    """CUDA C++ through cupy."""
    if x.device.type != "cuda":
        return f"input is on {x.device}, this backend runs on cuda"
    return missing("cupy")


def triton_moments(x: Tensor, *_: Any) -> str | None:
    """Triton on the device; its interpreter, thousands of times slower, only where this backend is forced."""
    if x.device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"input is on {x.device}, this backend runs on cuda (or set TRITON_INTERPRET=1)"
        if forced_backend() != "triton":
            return f"input is on {x.device}, and Triton's interpreter runs only where this backend is forced"
    return missing("triton")


def cpp_items(items: Tensor, *_: Any) -> str | None:
    """Counter-based randomness on the CPU."""
    if items.device.type != "cpu":
        return f"items are on {items.device}, this backend runs on cpu"
    return missing("balanced_rep._C")


cuda_items, triton_items = cuda_moments, triton_moments  # the device decides, for items as for activations
