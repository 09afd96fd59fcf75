"""Runs a case of a kernel entry in each of the executors."""

from __future__ import annotations

import functools
import importlib

import numpy as np

from . import ptx
from .cases import Case, CudaKernel, TritonKernel
from .launch import Buffer, Launch
from .simt import Program, compile_program
from .triton_aot import TritonModule, compile_triton

__all__ = [
    "SCRATCH_POINTERS",
    "compile_all_triton",
    "parsed",
    "run_cuda_ptx",
    "run_host",
    "run_interpreter",
    "run_triton_ptx",
]

SCRATCH_POINTERS = 2  # Triton appends pointers to global scratch and profile scratch, null where a kernel needs none


@functools.cache
def parsed(text: str) -> dict[str, ptx.Kernel]:
    return ptx.parse(text)


def run_cuda_ptx(kernel: CudaKernel, case: Case, options: ptx.Options = ptx.Options()) -> ptx.Result:  # noqa: B008
    """Run the PTX that NVRTC makes of a kernel."""
    module = kernel.compile("compute_80")
    return ptx.run(parsed(module.ptx)[module.names[kernel.expression]], case.launch, options=options)


def host_program(kernel: CudaKernel, mode: str) -> Program:
    """Compile the host program of a kernel's file, with every kernel of the list that it holds."""
    from .kernels import CUDA_KERNELS

    siblings = sorted(
        {
            other.expression
            for other in CUDA_KERNELS
            if (other.source, other.defines, other.host) == (kernel.source, kernel.defines, True)
        }
    )
    return compile_program(kernel.source, siblings, mode=mode, defines=kernel.defines, include_dirs=kernel.include_dirs)


def run_host(kernel: CudaKernel, case: Case, *, mode: str = "sanitize", seed: int = 0) -> list[np.ndarray]:
    """Run a kernel as host C++."""
    return host_program(kernel, mode).run(kernel.expression, case.launch, seed=seed)


def compile_all_triton(kernels: list[TritonKernel]) -> None:
    """Compile for sm_80 whatever the cases of the kernels need, in one child process."""
    requests = {}
    for kernel in kernels:
        for build in kernel.cases.values():
            case = build()
            request = kernel.request(divisible=case.divisible, constants=case.constants)
            requests[request.key] = request
    compile_triton(list(requests.values()))


def triton_module(kernel: TritonKernel, case: Case) -> TritonModule:
    return compile_triton([kernel.request(divisible=case.divisible, constants=case.constants)])[0]


def run_triton_ptx(kernel: TritonKernel, case: Case, options: ptx.Options = ptx.Options()) -> ptx.Result:  # noqa: B008
    """Run the PTX that Triton makes of a kernel, in the specialisation that its JIT would pick for this case."""
    module = triton_module(kernel, case)
    launch = Launch(case.launch.grid, (32 * module.num_warps,), case.launch.args, module.shared_bytes)
    return ptx.run(parsed(module.ptx)[module.symbol], launch, options=options, extra_pointers=SCRATCH_POINTERS)


def run_interpreter(kernel: TritonKernel, case: Case) -> list[np.ndarray]:
    """Run a Triton kernel in the interpreter; use the ``triton_interpreter`` fixture around it."""
    import torch

    function = getattr(importlib.import_module(kernel.module), kernel.function)
    tensors, arguments = [], []
    for argument in case.launch.args:
        if isinstance(argument, Buffer):
            tensor = torch.from_numpy(argument.array.copy())
            tensors.append(tensor)
            tensor = tensor.view(torch.bfloat16) if argument.bf16 else tensor
            arguments.append(tensor.reshape(-1)[argument.offset :])
        else:
            arguments.append(argument.item())
    function[tuple(case.launch.grid)](*arguments, **{**kernel.constants, **case.constants})
    return [tensor.numpy() for tensor in tensors]
