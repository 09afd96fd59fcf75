"""Runs the package's own launchers on the CPU: the lowest call, which would reach the GPU, goes to an executor.

Everything above it is the real thing: planning, argument packing, scratch memory, tickets. The kernels are the real
ones too, in the form that NVRTC or Triton compiles them to.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ptx
from .launch import Buffer, Launch
from .runners import SCRATCH_POINTERS, parsed
from .simt import compile_program
from .toolchain import compile_cuda
from .triton_aot import TritonRequest, compile_triton

__all__ = ["CudaLaunch", "SimulatedCuda", "TritonLaunch", "simulated_triton"]

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
TRITON_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Allocations:
    """Turns tensors into buffers: one per storage, so that arguments that share memory share it in the executor."""

    def __init__(self) -> None:
        self.arrays: dict[int, np.ndarray] = {}

    def buffer(self, tensor: Tensor, *, initialised: bool) -> Buffer:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.arrays:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.arrays[storage.data_ptr()] = raw.numpy()
        offset = tensor.data_ptr() - storage.data_ptr() if tensor.numel() else 0
        return Buffer(self.arrays[storage.data_ptr()], initialised, offset)


def _write_back(launch: Launch, buffers: list[np.ndarray]) -> None:
    for buffer, result in zip(launch.buffers, buffers, strict=True):
        buffer.array[...] = result


@dataclass
class CudaLaunch:
    """One launch of a ``.cu`` kernel, as the driver would have got it."""

    file: str
    expression: str
    launch: Launch
    result: ptx.Result | None = None


@dataclass
class SimulatedCuda:
    """Stands where ``CupyDriver`` stands: loads a kernel by compiling it, launches it in an executor.

    Attributes:
        run: ``"ptx"`` for the executor, ``"host"`` for host C++ with sanitizers, ``"record"`` to run nothing.
        outputs: Positions of arguments that the kernel must write before it reads them.
        zeroed: Positions of arguments that are zero before a launch and must be zero after it: tickets.
        sources: Folder of the ``.cu`` files; the mutation tests put a changed copy here.
        seed: Schedule of host runs.
        mode: Of host runs, ``"sanitize"`` or ``"threads"``.
        options: Of executor runs.
        launches: What was launched.
    """

    run: str = "ptx"
    outputs: frozenset[int] = frozenset()
    zeroed: frozenset[int] = frozenset()
    sources: Path = CSRC
    seed: int = 0
    mode: str = "sanitize"
    options: ptx.Options = field(default_factory=ptx.Options)
    launches: list[CudaLaunch] = field(default_factory=list)
    siblings: dict[str, set[str]] = field(default_factory=dict)  # file to kernels that share a host program

    def load(self, kernel: Any, device: torch.device) -> Any:
        if self.run == "ptx":
            module = compile_cuda(self.sources / kernel.file, [kernel.expression], "compute_80")
            return parsed(module.ptx)[module.names[kernel.expression]]
        if self.run == "host":
            expressions = sorted(self.siblings.get(kernel.file, set()) | {kernel.expression})
            return compile_program(self.sources / kernel.file, expressions, mode=self.mode)
        return None

    def launch(
        self,
        function: Any,
        kernel: Any,
        blocks: int,
        threads: int,
        args: tuple,
        device: torch.device,
        shared_bytes: int = 0,
    ) -> None:
        from balanced_rep.kernels._driver import pack

        assert shared_bytes <= kernel.shared_bytes, f"{kernel.expression}: more shared memory than the device is told"
        pack(kernel, args)  # the real check of the arguments against the declared parameters
        allocations = Allocations()
        arguments = [
            allocations.buffer(argument, initialised=position not in self.outputs)
            if isinstance(argument, Tensor)
            else argument
            for position, argument in enumerate(args)
        ]
        record = CudaLaunch(kernel.file, kernel.expression, Launch((blocks,), (threads,), arguments, shared_bytes))
        self.launches.append(record)
        if self.run == "ptx":
            record.result = ptx.run(function, record.launch, options=self.options).check()
            _write_back(record.launch, record.result.buffers)
        elif self.run == "host":
            _write_back(record.launch, function.run(kernel.expression, record.launch, seed=self.seed))
        outputs = [id(arguments[position].array) for position in self.outputs]
        for position in self.zeroed:
            array = arguments[position].array
            if id(array) not in outputs and array.any():  # a launch without tickets passes its output in their place
                raise AssertionError(f"{kernel.expression}: argument {position} must be zero after the launch")

    def stream_key(self, device: torch.device) -> Hashable | None:
        return None  # as while a graph is captured: fresh tickets per launch


@dataclass
class TritonLaunch:
    """One launch of a Triton kernel: what its JIT would compile, and the call."""

    request: TritonRequest
    launch: Launch
    sizes: tuple[str, ...]  # integer parameters that the JIT specialises on
    result: ptx.Result | None = None


class _SimulatedJit:
    """Stands in a module for a ``@triton.jit`` function; ``kernel[grid](...)`` runs its PTX."""

    def __init__(
        self, function: Any, outputs: frozenset[str], launches: list[TritonLaunch], options: ptx.Options | None
    ) -> None:
        self.python = getattr(function, "fn", function)
        self.outputs, self.launches, self.options = outputs, launches, options

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(
            *args: Any, num_warps: int = 4, num_stages: int = 3, enable_fp_fusion: bool = True, **keywords: Any
        ) -> None:
            bound = inspect.signature(self.python).bind(*args, **keywords)
            bound.apply_defaults()
            self._launch(grid, bound.arguments, num_warps, num_stages, enable_fp_fusion)

        return launch

    def _launch(
        self, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int, num_stages: int, fp_fusion: bool
    ) -> None:
        signature, constants, divisible, sizes, values = {}, {}, [], [], []
        allocations = Allocations()
        annotations = inspect.get_annotations(self.python)
        for name, value in arguments.items():
            if "constexpr" in str(annotations.get(name, "")):
                constants[name] = value
            elif isinstance(value, Tensor):
                signature[name] = TRITON_TYPES[value.dtype]
                values.append(allocations.buffer(value, initialised=name not in self.outputs))
                # a CPU allocation is aligned to 64 bytes, a GPU one to 256: what counts is the offset in it
                divisible += [name] if values[-1].offset_bytes % 16 == 0 else []
            elif isinstance(value, float):
                signature[name] = "fp32"
                values.append(np.float32(value))
            elif value == 1:  # the JIT makes a constant of it
                constants[name] = 1
            else:
                wide = not -(2**31) <= value < 2**31
                signature[name] = "i64" if wide else "i32"
                values.append(np.int64(value) if wide else np.int32(value))
                sizes.append(name)
                divisible += [name] if value % 16 == 0 else []
        request = TritonRequest(
            self.python.__module__,
            self.python.__name__,
            signature,
            constants,
            tuple(divisible),
            num_warps=num_warps,
            num_stages=num_stages,
            fp_fusion=fp_fusion,
        )
        record = TritonLaunch(request, Launch(grid, (1,), values), tuple(sizes))
        self.launches.append(record)
        if self.options is not None:
            module = compile_triton([request])[0]
            record.launch = Launch(grid, (32 * module.num_warps,), values, module.shared_bytes)
            kernel = parsed(module.ptx)[module.symbol]
            result = ptx.run(kernel, record.launch, options=self.options, extra_pointers=SCRATCH_POINTERS)
            record.result = result.check()
            _write_back(record.launch, record.result.buffers)


@contextlib.contextmanager
def simulated_triton(
    module: Any,
    functions: dict[str, frozenset[str]],
    *,
    run: bool = True,
    options: ptx.Options = ptx.Options(),  # noqa: B008
) -> Iterator[list[TritonLaunch]]:
    """Replace kernels of a module by ones that run in the executor.

    Args:
        module: The module that launches them.
        functions: Kernel name to the pointers that it must write before it reads them.
        run: False to record the launches only.
        options: Of the runs.

    Yields:
        The launches, as they come.
    """
    launches: list[TritonLaunch] = []
    originals = {name: getattr(module, name) for name in functions}
    for name, outputs in functions.items():
        setattr(module, name, _SimulatedJit(originals[name], outputs, launches, options if run else None))
    try:
        yield launches
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
