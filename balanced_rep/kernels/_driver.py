"""Compiles a ``.cu`` file at run time and launches its kernels: the one place that touches cupy and the device.

Kernels are C++ templates, named by an expression, so that NVRTC compiles what is used. What is compiled is kept across
processes, see :mod:`balanced_rep.kernels._nvrtc`; here a loaded kernel is kept per device.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from balanced_rep.kernels._nvrtc import CompileError, cached, target_of
from balanced_rep.ops._registry import BackendError

__all__ = ["CupyDriver", "Kernel", "Launcher", "no_compiler", "pack", "read_source"]

_INCLUDE = re.compile(r'^#include "(?P<file>[^"]+)"\n', re.MULTILINE)
DEFAULT_SHARED = 48 * 1024  # bytes of dynamic shared memory that every device grants unasked


@dataclass(frozen=True)
class Kernel:
    """A kernel and how it is called.

    Attributes:
        file: Name of the ``.cu`` file in ``csrc/cuda``.
        expression: C++ expression that names the kernel, template arguments included.
        parameters: The type of each parameter in order; ``None`` stands for a pointer.
        shared_bytes: The most dynamic shared memory that a launch asks for. Beyond 48 KiB a device wants to be told.
    """

    file: str
    expression: str
    parameters: tuple[np.dtype | None, ...]
    shared_bytes: int = 0


@functools.cache
def no_compiler() -> str | None:
    """``None`` if cupy and NVRTC load, else the reason. Tried once per process."""
    try:
        import cupy  # noqa: F401
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # a missing library shows as one of several types
        return (
            f"cupy or NVRTC does not load ({type(error).__name__}: {error}); the extras [cuda12], [cuda13] install both"
        )
    return None


def read_source(file: str) -> str:
    """Reads a CUDA source from the installed package, or from the repository that the package is imported from.

    Args:
        file: Name of the ``.cu`` file.

    Returns:
        Its text, with the files that it includes in quotation marks in their places: nothing is left to be looked up.

    Raises:
        BackendError: If it is in neither place.
    """
    included: set[str] = set()

    def insert(match: re.Match[str]) -> str:
        if match["file"] in included:
            return ""
        included.add(match["file"])
        return _INCLUDE.sub(insert, _read(match["file"]).replace("#pragma once\n", ""))

    return _INCLUDE.sub(insert, _read(file))


def _read(file: str) -> str:
    beside = Path(__file__).resolve().parents[2] / "csrc"
    try:
        installed = importlib.resources.files("balanced_rep._csrc")
    except ModuleNotFoundError:  # not installed: the package is imported from its repository
        installed = beside
    for root in (installed, beside):
        path = root / "cuda" / file
        if path.is_file():
            return path.read_text()
    raise BackendError(f"the CUDA source {file} is neither in balanced_rep._csrc nor in {beside / 'cuda'}: reinstall")


def pack(kernel: Kernel, args: tuple[Tensor | np.generic, ...]) -> list[np.ndarray]:
    """Arguments as arrays of one element, which cupy hands over by value, in the exact type of the parameter.

    Args:
        kernel: The kernel to be called.
        args: Tensors for pointers, numpy scalars of the declared types for the rest.

    Returns:
        One array per parameter.

    Raises:
        TypeError: If the number or the type of an argument is not what the kernel declares.
    """
    if len(args) != len(kernel.parameters):
        raise TypeError(f"{kernel.expression} takes {len(kernel.parameters)} arguments, got {len(args)}")
    packed = []
    for position, (argument, declared) in enumerate(zip(args, kernel.parameters, strict=True)):
        if declared is None and isinstance(argument, Tensor):
            packed.append(np.array([argument.data_ptr()], np.uint64))
        elif declared is not None and isinstance(argument, np.generic) and argument.dtype == declared:
            packed.append(np.array([argument], declared))
        else:
            given = argument.dtype if isinstance(argument, np.generic) else type(argument).__name__
            wanted = "a tensor" if declared is None else f"a numpy scalar of type {declared}"
            raise TypeError(f"{kernel.expression}: argument {position} is {given}, the kernel takes {wanted}")
    return packed


class _Stream(NamedTuple):
    """A stream of torch as others see it: the CUDA stream protocol, which torch itself has from 2.10 on."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class CupyDriver:
    """cupy on torch's device, memory and current stream."""

    def load(self, kernel: Kernel, device: torch.device) -> Any:
        """Compiles the kernel for the device, or finds it compiled, and loads it there."""
        import cupy

        target = target_of(torch.cuda.get_device_capability(device))
        compiled = cached(read_source(kernel.file), kernel.file, kernel.expression, target)
        with torch.cuda.device(device):
            function = cupy.RawModule(path=str(compiled.path)).get_function(compiled.symbol)
            if kernel.shared_bytes > DEFAULT_SHARED:
                room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
                function.max_dynamic_shared_size_bytes = min(kernel.shared_bytes, room)
            return function.kernel

    def launch(
        self,
        function: Any,
        kernel: Kernel,
        blocks: int,
        threads: int,
        args: tuple[Any, ...],
        device: torch.device,
        shared_bytes: int = 0,
    ) -> None:
        """Enqueues the kernel on torch's current stream of the device."""
        import cupy

        with torch.cuda.device(device):
            stream = cupy.cuda.Stream.from_external(_Stream(torch.cuda.current_stream(device).cuda_stream))
            function((blocks,), (threads,), tuple(pack(kernel, args)), shared_bytes, stream)

    def stream_key(self, device: torch.device) -> Hashable | None:
        """Names the queue that the next launch joins; None while it is captured into a graph, which is replayed."""
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return None
            return device.index, torch.cuda.current_stream(device).cuda_stream


class Launcher:
    """Keeps loaded kernels, and the first error of those that do not load.

    Attributes:
        driver: What is below; tests put another one here.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._loaded: dict[tuple[Kernel, torch.device], Any] = {}
        self._errors: dict[tuple[Kernel, torch.device], Exception] = {}
        self._lock = threading.Lock()

    def __call__(
        self,
        kernel: Kernel,
        blocks: int,
        threads: int,
        args: tuple[Tensor | np.generic, ...],
        device: torch.device,
        shared_bytes: int = 0,
    ) -> None:
        """Launches ``blocks`` times ``threads`` threads of the kernel.

        Args:
            kernel: The kernel.
            blocks: Blocks of the grid, along x.
            threads: Threads of a block, along x.
            args: Tensors for pointers, numpy scalars of the declared types for the rest.
            device: Where to run.
            shared_bytes: Dynamic shared memory of a block, at most what the kernel declares.

        Raises:
            BackendError: If the kernel cannot be compiled or loaded.
        """
        self.driver.launch(self._function(kernel, device), kernel, blocks, threads, args, device, shared_bytes)

    def _function(self, kernel: Kernel, device: torch.device) -> Any:
        key = kernel, device
        with self._lock:
            if key in self._errors:
                raise _explained(kernel, self._errors[key]) from self._errors[key]
            if key not in self._loaded:
                try:
                    self._loaded[key] = self.driver.load(kernel, device)
                except Exception as error:
                    self._errors[key] = error
                    raise _explained(kernel, error) from error
            return self._loaded[key]


def _explained(kernel: Kernel, error: Exception) -> BackendError:
    """The same answer every time, with the cause that was met first."""
    if isinstance(error, ImportError):
        hint = "the extras [cuda12] and [cuda13] install cupy and NVRTC"
    elif isinstance(error, CompileError):
        hint = "NVRTC refuses the source"
    else:
        hint = "NVRTC must be installed (extras [cuda12], [cuda13]) and fit the driver (`balanced-rep doctor`)"
    return BackendError(
        f"backend 'cuda' cannot load {kernel.expression} of {kernel.file}: {hint}. {type(error).__name__}: {error}"
    )
