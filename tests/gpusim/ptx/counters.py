"""Counts what a launch did: instructions, flops, bytes by level, sectors, bank conflicts, DRAM traffic of a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

__all__ = ["L2_BYTES", "Counters", "LruCache", "count_sectors", "count_wavefronts"]

SECTOR = 32
L2_BYTES = 40 * 10**6


def count_sectors(addresses: np.ndarray, size: int, warps: np.ndarray) -> tuple[int, int]:
    """Return the 32-byte sectors that one instruction touches, summed over warps, and the fewest that could do.

    Args:
        addresses: First byte of each lane's access, aligned to ``size``.
        size: Bytes per lane, at most 32.
        warps: Warp number of each lane, not decreasing.

    Returns:
        Sectors touched, and per warp the bytes asked for divided by 32, rounded up, summed. Lanes that read the same
        bytes never make the second number larger than the first.
    """
    sectors = addresses // SECTOR
    new_warp = np.empty(len(warps), bool)
    new_warp[0] = True
    np.not_equal(warps[1:], warps[:-1], out=new_warp[1:])
    steps = np.diff(sectors)
    if not (new_warp[1:] | (steps >= 0)).all():
        order = np.lexsort((sectors, warps))
        sectors = sectors[order]
        steps = np.diff(sectors)
    fresh = new_warp.copy()
    fresh[1:] |= steps != 0
    starts = np.nonzero(new_warp)[0]
    touched = np.add.reduceat(fresh, starts, dtype=np.int64)
    lanes = np.diff(np.append(starts, len(warps)))
    ideal = np.minimum(-(-lanes * size // SECTOR), touched)
    return int(touched.sum()), int(ideal.sum())


def count_wavefronts(offsets: np.ndarray, size: int, warps: np.ndarray) -> tuple[int, int]:
    """Return the shared-memory passes one instruction needs, and the fewest that could do.

    Shared memory serves 32 banks of 4 bytes per pass; lanes that read the same word share it. 64-bit accesses go by
    half warps, 128-bit ones by quarter warps.
    """
    lanes_per_pass = {8: 16, 16: 8}.get(size, 32)
    position = np.arange(len(warps))
    begins = np.diff(warps, prepend=-1) != 0
    lane_in_warp = position - np.maximum.accumulate(np.where(begins, position, 0))
    group = warps.astype(np.int64) * (32 // lanes_per_pass) + lane_in_warp // lanes_per_pass
    words_per_lane = max(1, size // 4)
    words = (offsets[:, None] // 4 + np.arange(words_per_lane)).reshape(-1)
    groups = np.repeat(group, words_per_lane)
    distinct = _distinct(groups << 32 | words)
    fresh = np.empty(len(distinct), bool)
    fresh[0] = True
    np.not_equal(distinct[1:] >> 32, distinct[:-1] >> 32, out=fresh[1:])
    number = np.cumsum(fresh) - 1  # of the group, among those that are there
    n_groups = int(number[-1]) + 1
    per_bank = np.bincount(number * 32 + (distinct & 31), minlength=32 * n_groups)
    return int(per_bank.reshape(-1, 32).max(1).sum()), n_groups


def _distinct(values: np.ndarray) -> np.ndarray:
    """Return the sorted distinct values, which for a few thousand takes ``np.unique`` several times as long."""
    values = np.sort(values)
    fresh = np.empty(len(values), bool)
    fresh[:1] = True
    np.not_equal(values[1:], values[:-1], out=fresh[1:])
    return values[fresh]


class LruCache:
    """A model of the L2 cache: least recently used, 32-byte sectors, write-back, no fill on a write.

    Every block of a launch sees it in the order the executor runs them, which is not a GPU's order: what it says about
    DRAM traffic is a model.

    Args:
        capacity: Bytes.
    """

    def __init__(self, capacity: int = L2_BYTES) -> None:
        self.capacity = capacity // SECTOR
        self.used = np.zeros(0, np.int64)  # time of the last use by sector, 0 for absent
        self.dirty = np.zeros(0, bool)
        self.resident = 0
        self.time = 0
        self.bytes_read = 0
        self.bytes_written = 0

    def access(self, offsets: np.ndarray, size: int, *, write: bool) -> None:
        sectors = offsets // SECTOR
        sectors = _distinct(sectors[np.diff(sectors, prepend=-1) != 0])  # neighbours first: most repeats are there
        if size > SECTOR:
            sectors = _distinct(np.concatenate([sectors, (offsets + size - 1) // SECTOR]))
        if sectors[-1] >= len(self.used):
            grown = max(2 * len(self.used), int(sectors[-1]) + 1)
            self.used = np.concatenate([self.used, np.zeros(grown - len(self.used), np.int64)])
            self.dirty = np.concatenate([self.dirty, np.zeros(grown - len(self.dirty), bool)])
        self.time += 1
        missing = int((self.used[sectors] == 0).sum())
        self.resident += missing
        if not write:
            self.bytes_read += SECTOR * missing
        self.used[sectors] = self.time
        if write:
            self.dirty[sectors] = True
        if self.resident > self.capacity:
            self._evict(self.resident - self.capacity)

    def _evict(self, count: int) -> None:
        present = np.nonzero(self.used)[0]
        oldest = present[np.argpartition(self.used[present], count - 1)[:count]]
        self.bytes_written += SECTOR * int(self.dirty[oldest].sum())
        self.used[oldest] = 0
        self.dirty[oldest] = False
        self.resident -= count

    def flush(self) -> None:
        """Write back what is dirty, at the end of a launch."""
        self.bytes_written += SECTOR * int(self.dirty.sum())
        self.dirty[:] = False


@dataclass
class Counters:
    """Sums over all threads of a launch.

    Attributes:
        instructions: Thread-instructions by opcode.
        flops: Floating-point operations by type (an fma counts 2); ``mma.f16`` and the like for matrix instructions.
        bytes: Bytes moved by ``load.global`` and the like, as the threads asked for them.
        sectors: 32-byte sectors of global accesses, per warp and instruction.
        ideal_sectors: The fewest sectors that those accesses could have touched.
        wavefronts: Passes of shared-memory accesses.
        ideal_wavefronts: One per warp (or part of a warp) and access.
        cache: The L2 model.
    """

    instructions: Counter = field(default_factory=Counter)
    flops: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    sectors: int = 0
    ideal_sectors: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    cache: LruCache = field(default_factory=LruCache)

    @property
    def thread_instructions(self) -> int:
        return sum(self.instructions.values())

    @property
    def dram_bytes(self) -> int:
        return self.cache.bytes_read + self.cache.bytes_written

    @property
    def sector_ratio(self) -> float:
        return self.sectors / max(1, self.ideal_sectors)

    def count_global(self, kind: str, offsets: np.ndarray, size: int, warps: np.ndarray) -> None:
        self.bytes[f"{kind}.global"] += size * len(offsets)
        touched, ideal = count_sectors(offsets, size, warps)
        self.sectors += touched
        self.ideal_sectors += ideal
        if kind != "store":
            self.cache.access(offsets, size, write=False)
        if kind != "load":
            self.cache.access(offsets, size, write=True)

    def count_shared(self, kind: str, offsets: np.ndarray, size: int, warps: np.ndarray) -> None:
        self.bytes[f"{kind}.shared"] += size * len(offsets)
        passes, ideal = count_wavefronts(offsets, size, warps)
        self.wavefronts += passes
        self.ideal_wavefronts += ideal
