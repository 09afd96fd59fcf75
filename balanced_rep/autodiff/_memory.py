"""How many tangents fit: a small pass measures what one slot needs, and the rest is cut to what is free."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["LiveBytes", "available_bytes", "chunk_that_fits", "surely_fits"]

SHARE = 0.6  # of the free memory
EXPANSION = 4096  # bytes of activations per byte of input that no backbone comes near
TEMPORARIES = 2.0  # a rule holds its result and temporaries of about its size beside what is live


def available_bytes(device: torch.device) -> int | None:
    """Free memory on ``device``: allocator reserves included on CUDA, ``MemAvailable`` on Linux.

    Args:
        device: Where the tangents are.

    Returns:
        Bytes, or ``None`` where it cannot be told.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    free = _meminfo()
    return free if (limit := _cgroup()) is None else limit if free is None else min(free, limit)


def _meminfo() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _cgroup() -> int | None:
    """What a container's limit leaves."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            return max(int(limit.read()) - int(used.read()), 0)
    except (OSError, ValueError):
        return None


def surely_fits(input_bytes: int, n_slots: int, free: int | None) -> bool:
    """Whether all slots fit by a bound so loose that no pass is needed to know."""
    return free is None or n_slots * input_bytes * EXPANSION < SHARE * free


def chunk_that_fits(peak: int, pilot_slots: int, n_tangents: int, free: int | None) -> int:
    """Tangents per pass.

    Args:
        peak: Bytes of stacks that were live at once in the small pass.
        pilot_slots: Its slots.
        n_tangents: Tangents that are left.
        free: Free bytes.

    Returns:
        1 or more.
    """
    if free is None or peak == 0:
        return max(n_tangents, 1)
    per_slot = TEMPORARIES * peak / pilot_slots
    return min(max(int(SHARE * free / per_slot) - 1, 1), max(n_tangents, 1))


class LiveBytes:
    """Peak of the bytes of all stacks that are alive at once; views count with what they are views of."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._owners: dict[int, int] = {}

    def __call__(self, x: Any, buffer: Tensor) -> None:
        """Counts the buffer of a new Dual."""
        storage = buffer.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._owners:
            self.live += size
            self.peak = max(self.peak, self.live)
        self._owners[key] = self._owners.get(key, 0) + 1
        weakref.finalize(x, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key]
            self.live -= size
