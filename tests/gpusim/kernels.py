"""The one list of GPU kernels: a new kernel is one entry here, and every tool runs it.

An entry says where the kernel is, how it is compiled, and a few launches with their reference; ``samples/entries.py``
has examples. Entries of the package's kernels live in one module per op, beside this one, named ``entries_<op>``, each
with the lists ``CUDA`` and ``TRITON``.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from .cases import CudaKernel, TritonKernel
from .samples.entries import CUDA_SAMPLES, TRITON_SAMPLES

__all__ = ["CUDA_KERNELS", "GATED_TRITON", "PACKAGE_CUDA", "PACKAGE_TRITON", "TRITON_KERNELS"]

PACKAGE_CUDA: list[CudaKernel] = []
PACKAGE_TRITON: list[TritonKernel] = []
for _path in sorted(Path(__file__).parent.glob("entries_*.py")):
    _entries = importlib.import_module(f"{__package__}.{_path.stem}")
    PACKAGE_CUDA += _entries.CUDA
    PACKAGE_TRITON += _entries.TRITON

CUDA_KERNELS = [*CUDA_SAMPLES, *PACKAGE_CUDA]
TRITON_KERNELS = [*TRITON_SAMPLES, *PACKAGE_TRITON]

# Compiling for every architecture takes a second each: of the samples only those that the gate itself is tested on.
_GATE_SAMPLES = {"sample silu[fp32]", "sample matmul[fp16]"}
GATED_TRITON = [*(kernel for kernel in TRITON_SAMPLES if kernel.name in _GATE_SAMPLES), *PACKAGE_TRITON]
