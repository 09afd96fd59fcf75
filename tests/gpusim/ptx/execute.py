"""Runs a launch on the executor and returns buffers, issues and counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..launch import Buffer, Launch
from .counters import Counters
from .machine import DEFAULTS, Machine, Options
from .memory import DeviceMemory
from .parser import Kernel
from .report import ExecutionError, GpuIssues, Issues

__all__ = ["Result", "pack_parameters", "run"]


@dataclass
class Result:
    """What a launch left behind.

    Attributes:
        buffers: Contents of every buffer, in argument order.
        issues: What the checks found.
        counters: What it did.
        seconds: Wall time of the simulation.
    """

    buffers: list[np.ndarray]
    issues: Issues
    counters: Counters
    seconds: float

    def check(self, *, allow: frozenset[str] = frozenset()) -> Result:
        """Return self if nothing was found, but for kinds of issues that are allowed.

        Raises:
            GpuIssues: With the report.
        """
        if self.issues.kinds() - allow:
            raise GpuIssues(self.issues)
        return self


def pack_parameters(kernel: Kernel, values: Sequence[np.generic]) -> bytes:
    """Lay out scalars and pointers as the kernel's parameter space wants them.

    Raises:
        ExecutionError: If their number, sizes or, where the parameters say so, types differ from the kernel's.
    """
    if len(values) != len(kernel.parameters):
        raise ExecutionError(f"{kernel.name} takes {len(kernel.parameters)} arguments, got {len(values)}")
    packed = b""
    for position, (parameter, value) in enumerate(zip(kernel.parameters, values, strict=True)):
        if value.nbytes != parameter.nbytes:
            raise ExecutionError(
                f"{kernel.name}: argument {position} has {value.nbytes} bytes ({value.dtype}), parameter "
                f"{parameter.name} takes {parameter.nbytes}"
            )
        kind = parameter.type  # NVRTC names it; Triton calls everything bits
        if kind.kind in "fus" and parameter.count == 1 and kind.is_float != (value.dtype.kind == "f"):
            raise ExecutionError(
                f"{kernel.name}: argument {position} is {value.dtype}, parameter {parameter.name} is {kind.name}"
            )
        packed += bytes(-len(packed) % parameter.align) + value.tobytes()
    return packed


def run(
    kernel: Kernel,
    launch: Launch,
    *,
    options: Options = DEFAULTS,
    extra_pointers: int = 0,
) -> Result:
    """Run a launch.

    Args:
        kernel: A kernel of :func:`~.parser.parse`.
        launch: Grid, block, arguments.
        options: Checks, counters, fuzz.
        extra_pointers: Null pointers appended to the arguments (Triton passes two for scratch memory).

    Returns:
        The buffers afterwards, the issues and the counters. Call :meth:`Result.check` to fail on issues.
    """
    memory = DeviceMemory()
    addresses = []
    for buffer in launch.buffers:
        array = np.ascontiguousarray(buffer.array)
        addresses.append(memory.allocate(array.nbytes, array if buffer.initialised else None))
    values = [
        np.uint64(addresses[launch.position(argument)] + argument.offset_bytes)
        if isinstance(argument, Buffer)
        else argument
        for argument in launch.args
    ]
    values += [np.uint64(0)] * extra_pointers
    machine = Machine(kernel, memory, options)
    started = time.perf_counter()
    machine.launch(launch.grid, launch.block, pack_parameters(kernel, values), launch.shared_bytes)
    seconds = time.perf_counter() - started
    buffers = [
        memory.read_back(address, buffer.array.shape, buffer.array.dtype)
        for address, buffer in zip(addresses, launch.buffers, strict=True)
    ]
    return Result(buffers, machine.issues, machine.counters, seconds)
