"""The one list of GPU kernels that the tools read.

Kernels of the package come from the launches of its ops (``package.py``: a new op is one entry there); the samples of
``samples/entries.py`` are the tools' own tests and stay whatever the package does.
"""

from __future__ import annotations

from .cases import CudaKernel, TritonKernel
from .package import recorded_cuda, recorded_triton
from .samples.entries import CUDA_SAMPLES, TRITON_SAMPLES

__all__ = ["CUDA_KERNELS", "GATED_TRITON", "PACKAGE_CUDA", "PACKAGE_TRITON", "TRITON_KERNELS"]

PACKAGE_CUDA: list[CudaKernel] = recorded_cuda()
PACKAGE_TRITON: list[TritonKernel] = recorded_triton()

CUDA_KERNELS = [*CUDA_SAMPLES, *PACKAGE_CUDA]
TRITON_KERNELS = [*TRITON_SAMPLES, *PACKAGE_TRITON]

# Compiling for every architecture takes a second each: of the samples only those that the gate itself is tested on.
_GATE_SAMPLES = {"sample silu[fp32]", "sample matmul[fp16]"}
GATED_TRITON = [*(kernel for kernel in TRITON_SAMPLES if kernel.name in _GATE_SAMPLES), *PACKAGE_TRITON]
