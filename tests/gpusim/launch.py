"""A kernel launch written once and run by every executor: grid, block, buffers, typed scalars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Buffer", "Launch", "bf16_to_f32", "empty", "f32_to_bf16", "rows_with_pitch"]

from .triton_interpreter import bf16_to_f32, f32_to_bf16

MOST_BLOCKS = (2**31 - 1, 65535, 65535)  # of a launch, along x, y and z
MOST_THREADS = (1024, 1024, 64)  # of a block


@dataclass
class Buffer:
    """One device allocation.

    Attributes:
        array: Contents before the launch. bfloat16 is carried as ``uint16`` bit patterns.
        initialised: False for memory that the kernel must write before anything reads it.
        offset: Elements by which the pointer handed to the kernel lies beyond the start of the allocation; an odd
            offset is how a test makes rows unaligned.
        bf16: Whether the ``uint16`` elements are bfloat16 bit patterns.
    """

    array: np.ndarray
    initialised: bool = True
    offset: int = 0
    bf16: bool = False

    @property
    def offset_bytes(self) -> int:
        return self.offset * self.array.itemsize

    def values(self, array: np.ndarray) -> np.ndarray:
        """Return the numbers behind the offset of an array read back from this buffer."""
        behind = array if self.offset == 0 else array.reshape(-1)[self.offset :]
        return bf16_to_f32(behind) if self.bf16 else behind


def empty(shape: int | Sequence[int], dtype: np.typing.DTypeLike, *, offset: int = 0, bf16: bool = False) -> Buffer:
    """Return an uninitialised buffer, filled with a pattern that is no sensible value of any type."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).reshape(-1)[:] = 0xA5
    return Buffer(array, initialised=False, offset=offset, bf16=bf16)


def rows_with_pitch(rows: np.ndarray, pitch: int) -> np.ndarray:
    """Spread ``(n, p)`` rows over ``(n, pitch)`` with NaN (or the largest integer) between them.

    Raises:
        ValueError: If the pitch is shorter than a row.
    """
    if pitch < rows.shape[1]:
        raise ValueError(f"pitch {pitch} is shorter than the {rows.shape[1]} columns")
    filler = np.nan if rows.dtype.kind == "f" else np.iinfo(rows.dtype).max
    spread = np.full((rows.shape[0], pitch), filler, rows.dtype)
    spread[:, : rows.shape[1]] = rows
    return spread


@dataclass
class Launch:
    """Everything a launch needs besides the kernel.

    Attributes:
        grid: Blocks, up to three dimensions.
        block: Threads per block; ignored for Triton kernels, which bring their own.
        args: :class:`Buffer` for pointers, numpy scalars (``np.int64(3)``) for the rest: the type is part of the call.
            A struct is a scalar of a structured dtype with ``align=True``.
        shared_bytes: Dynamic shared memory.

    Raises:
        ValueError: If no device would take the grid or the block.
        TypeError: If an argument is neither a buffer nor a numpy scalar.
    """

    grid: Sequence[int]
    block: Sequence[int]
    args: list[Buffer | np.generic]
    shared_bytes: int = 0

    def __post_init__(self) -> None:
        for what, sizes, most in (("grid", self.grid, MOST_BLOCKS), ("block", self.block, MOST_THREADS)):
            given = tuple(sizes) if isinstance(sizes, Sequence) else sizes
            fits = isinstance(given, tuple) and 1 <= len(given) <= 3
            if not fits or not all(1 <= size <= limit for size, limit in zip(given, most, strict=False)):
                raise ValueError(f"the {what} is {given}: one to three sizes from 1 to {most}, as on a device")
        if self.shared_bytes < 0:
            raise ValueError(f"{self.shared_bytes} bytes of dynamic shared memory")
        for position, argument in enumerate(self.args):
            if not isinstance(argument, Buffer | np.generic):
                raise TypeError(
                    f"argument {position} is {type(argument).__name__}: pass a Buffer, or a numpy scalar whose type "
                    "is the kernel's parameter type"
                )

    @property
    def buffers(self) -> list[Buffer]:
        """The distinct allocations in argument order; arguments that share an array are views of one allocation."""
        found: dict[int, Buffer] = {}
        for argument in self.args:
            if isinstance(argument, Buffer):
                found.setdefault(id(argument.array), argument)
        return list(found.values())

    def position(self, buffer: Buffer) -> int:
        """Return which of :attr:`buffers` an argument lies in."""
        return [id(other.array) for other in self.buffers].index(id(buffer.array))
