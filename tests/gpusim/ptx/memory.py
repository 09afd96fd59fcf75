"""Address spaces: bytes, one state byte per byte, and device allocations with guard gaps."""

from __future__ import annotations

import numpy as np

from .types import UNSIGNED

__all__ = ["GLOBAL_BASE", "INITIALISED", "LOCAL_BASE", "PENDING", "SHARED_BASE", "VALID", "Arena", "DeviceMemory"]

GLOBAL_BASE = 0x7F00_0000_0000  # generic addresses: where each space's window begins
SHARED_BASE = 0x1_0000_0000_0000
LOCAL_BASE = 0x2_0000_0000_0000

VALID, INITIALISED, PENDING = 1, 2, 4  # bits of a state byte; PENDING: an asynchronous copy will land here
READABLE = VALID | INITIALISED
PATTERN = 0xA5  # what uninitialised memory holds


class Arena:
    """The bytes of one address space.

    All accesses given to :meth:`load` and the like are aligned to their size, which the caller has checked.

    Args:
        name: ``global``, ``shared``, ``local`` or ``param``.
        nbytes: Initial size.
        state: Initial state of every byte.
    """

    def __init__(self, name: str, nbytes: int, state: int = 0) -> None:
        self.name = name
        size = (nbytes + 31) // 16 * 16  # whole 128-bit words, so that every typed view exists
        self.data = np.full(size, PATTERN, np.uint8)
        self.state = np.full(size, state, np.uint8)

    def __len__(self) -> int:
        return len(self.data)

    def grow(self, nbytes: int) -> None:
        size = max(2 * len(self), (nbytes + 15) // 16 * 16)
        for name, filler in (("data", PATTERN), ("state", 0)):
            old = getattr(self, name)
            new = np.full(size, filler, np.uint8)
            new[: len(old)] = old
            setattr(self, name, new)

    def load(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Return the unsigned integers of ``size`` bytes at the given byte offsets."""
        return self.data.view(UNSIGNED[size])[offsets // size]

    def store(self, offsets: np.ndarray, values: np.ndarray) -> bool:
        """Write raw values; return whether every one of them is there afterwards.

        One that is not was overwritten by another lane of the same instruction with another value.
        """
        size = values.dtype.itemsize
        view = self.data.view(UNSIGNED[size])
        cells = offsets // size
        view[cells] = values
        return bool((view[cells] == values).all())

    def in_state(self, offsets: np.ndarray, size: int, wanted: int) -> np.ndarray:
        """Return which accesses of ``size`` bytes find all their bytes in exactly the state ``wanted``."""
        word = min(size, 8)
        pattern = UNSIGNED[word].type(int.from_bytes(bytes([wanted]) * word, "little"))
        view = self.state.view(UNSIGNED[word])
        cells = offsets // word
        good = view[cells] == pattern
        for extra in range(1, size // word):
            good &= view[cells + extra] == pattern
        return good

    def all_valid(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Return which accesses lie in allocated bytes, whatever these hold."""
        first, last = self.state[offsets], self.state[offsets + (size - 1)]
        return (first & last & VALID).astype(bool)

    def mark(self, offsets: np.ndarray, size: int, state: int) -> None:
        """Set the state of every byte of the given accesses."""
        word = min(size, 8)
        view = self.state.view(UNSIGNED[word])
        value = UNSIGNED[word].type(int.from_bytes(bytes([state]) * word, "little"))
        for extra in range(size // word):
            view[offsets // word + extra] = value


class DeviceMemory:
    """Global memory: allocations on 256-byte boundaries with guard gaps between them."""

    GUARD = 1024

    def __init__(self) -> None:
        self.arena = Arena("global", 1 << 16)
        self.top = self.GUARD
        self.allocations: list[tuple[int, int]] = []

    def allocate(self, nbytes: int, data: np.ndarray | None = None) -> int:
        """Reserve bytes, copy ``data`` into them if given, and return the address."""
        start = self.top
        self.top = (start + nbytes + self.GUARD + 255) // 256 * 256
        if self.top > len(self.arena):
            self.arena.grow(self.top)
        self.arena.state[start : start + nbytes] = VALID
        if data is not None:
            self.arena.data[start : start + nbytes] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            self.arena.state[start : start + nbytes] = READABLE
        self.allocations.append((start, nbytes))
        return GLOBAL_BASE + start

    def read_back(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return a copy of device memory as an array."""
        start = address - GLOBAL_BASE
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self.arena.data[start : start + nbytes].copy().view(dtype).reshape(shape)

    def describe(self, offset: int) -> str:
        """Say where a byte offset lies relative to the nearest allocation."""
        for start, nbytes in self.allocations:
            if start <= offset < start + nbytes:
                return f"byte {offset - start} of an allocation of {nbytes} bytes"
        if not self.allocations:
            return "no allocation"
        start, nbytes = min(self.allocations, key=lambda item: min(abs(offset - item[0]), abs(offset - sum(item))))
        side = f"{offset - start - nbytes + 1} bytes beyond" if offset >= start + nbytes else f"{start - offset} before"
        return f"{side} an allocation of {nbytes} bytes"
