"""Stand-ins for a GPU below the launchers: CPU tensors in, the real kernel run by an executor, results in place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from balanced_rep.kernels import _driver, cuda

from ..gpusim import ptx
from ..gpusim.launch import Buffer, Launch
from ..gpusim.simt import compile_program
from ..gpusim.toolchain import compile_cuda, nvrtc_missing
from ..gpusim.triton_aot import TritonRequest, compile_triton

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
SCRATCH_POINTERS = 2  # Triton appends pointers to global scratch and profile scratch, null here

needs_nvrtc = pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))


class Memory:
    """Device buffers over the storages of CPU tensors; what a launch changes goes back into the tensors."""

    def __init__(self) -> None:
        self.storages: list[Tensor] = []

    def buffer(self, tensor: Tensor, *, initialised: bool = True) -> Buffer:
        raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self.storages.append(raw)
        return Buffer(raw.numpy().copy(), initialised, offset=tensor.data_ptr() - raw.data_ptr())

    def write_back(self, launch: Launch, after: list[np.ndarray]) -> None:
        for storage, before, now in zip(self.storages, launch.buffers, after, strict=True):
            if not np.array_equal(before.array, now):  # a buffer passed twice is changed through one of the pointers
                storage.copy_(torch.from_numpy(np.ascontiguousarray(now)))


class CudaDevice:
    """Takes the place of :class:`balanced_rep.kernels._driver.CupyDriver`.

    Args:
        outputs: Positions of arguments that the kernel must write before anything reads them.
    """

    def __init__(self, outputs: tuple[int, ...] = (1, 2)) -> None:
        self.outputs = outputs
        self.launches: list[tuple[_driver.Kernel, Launch]] = []

    def launch(self, program: Any, kernel: _driver.Kernel, blocks: int, threads: int, args: tuple, device: Any) -> None:
        _driver.pack(kernel, args)  # as the real driver does, for its checks
        memory = Memory()
        launch = Launch(
            (blocks,),
            (threads,),
            [
                memory.buffer(a, initialised=i not in self.outputs) if isinstance(a, Tensor) else a
                for i, a in enumerate(args)
            ],
        )
        self.launches.append((kernel, launch))
        memory.write_back(launch, self.run(program, kernel, launch))

    def stream_key(self, device: torch.device) -> str:
        return "the only stream"


class Recorder(CudaDevice):
    """Runs nothing."""

    def load(self, kernel: _driver.Kernel, device: torch.device) -> None:
        return None

    def run(self, program: None, kernel: _driver.Kernel, launch: Launch) -> list[np.ndarray]:
        return [buffer.array for buffer in launch.buffers]


class Host(CudaDevice):
    """The source as host C++ under AddressSanitizer and an adversarial schedule.

    Args:
        family: Expressions compiled into one program, which saves compiling time.
        seed: 0 runs threads in order; any other number shuffles blocks, warps and threads.
    """

    def __init__(self, family: tuple[str, ...] = (), seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.family, self.seed = family, seed

    def load(self, kernel: _driver.Kernel, device: torch.device) -> Any:
        return compile_program(CSRC / kernel.file, sorted({*self.family, kernel.expression}))

    def run(self, program: Any, kernel: _driver.Kernel, launch: Launch) -> list[np.ndarray]:
        return program.run(kernel.expression, launch, seed=self.seed)


class Executor(CudaDevice):
    """What NVRTC makes of the source for sm_80, in the PTX executor with all of its checks."""

    def load(self, kernel: _driver.Kernel, device: torch.device) -> ptx.Kernel:
        module = compile_cuda(CSRC / kernel.file, [kernel.expression], "compute_80")
        return ptx.parse(module.ptx)[module.names[kernel.expression]]

    def run(self, program: ptx.Kernel, kernel: _driver.Kernel, launch: Launch) -> list[np.ndarray]:
        self.result = ptx.run(program, launch).check()
        return self.result.buffers


@contextlib.contextmanager
def cuda_runs_on(device: CudaDevice) -> Iterator[CudaDevice]:
    """Puts a stand-in under the launchers of ``balanced_rep.kernels.cuda``."""
    before, cuda.launch = cuda.launch, _driver.Launcher(device)
    tickets = dict(cuda._tickets)
    cuda._tickets.clear()
    try:
        yield device
    finally:
        cuda.launch = before
        cuda._tickets.clear()
        cuda._tickets.update(tickets)


TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class ExecutedTriton:
    """A ``@triton.jit`` function that compiles for sm_80 as the JIT would and runs in the PTX executor.

    Attributes:
        results: What the executor says about every launch.
    """

    def __init__(self, function: Any, outputs: tuple[str, ...]) -> None:
        self.function, self.outputs = function, outputs
        self.results: list[ptx.Result] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
        named = dict(zip(self.function.arg_names, args, strict=False))
        request = specialised(self.function, named, constants, num_warps=num_warps, fp_fusion=enable_fp_fusion)
        module = compile_triton([request])[0]
        memory = Memory()
        values = [
            memory.buffer(value, initialised=name not in self.outputs)
            if isinstance(value, Tensor)
            else (np.int32 if request.signature[name] == "i32" else np.int64)(value)
            for name, value in named.items()
            if isinstance(value, Tensor) or name in request.signature
        ]
        launch = Launch(grid, (32 * module.num_warps,), values, module.shared_bytes)
        kernel = ptx.parse(module.ptx)[module.symbol]
        self.results.append(ptx.run(kernel, launch, extra_pointers=SCRATCH_POINTERS).check())
        memory.write_back(launch, self.results[-1].buffers)


def specialised(
    function: Any, named: dict[str, Any], constants: dict[str, Any], *, num_warps: int, fp_fusion: bool, target: int = 80
) -> TritonRequest:
    """The compilation that Triton's JIT would do for these arguments: 1 is a constant, multiples of 16 are known."""
    module = function.fn.__module__
    signature, known, divisible = {}, dict(constants), []
    for name, value in named.items():
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(name)
        elif value == 1:
            known[name] = 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
    return TritonRequest(
        module=module,
        function=function.fn.__name__,
        signature=signature,
        constants=known,
        divisible=tuple(divisible),
        target=target,
        num_warps=num_warps,
        fp_fusion=fp_fusion,
    )
