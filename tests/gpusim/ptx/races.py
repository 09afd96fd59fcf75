"""Shadow memory: who accessed each cell last, and whether the next access is ordered after that."""

from __future__ import annotations

import numpy as np

from .order import Order

__all__ = ["CTA", "GPU", "WEAK", "Shadow"]

WEAK, CTA, GPU = 0, 1, 2  # strength of an access: ordinary, atomic within a block, atomic across the device

# A record packs time (31 bits), thread + 1 (31 bits) and strength (2 bits) into 64 bits; 0 means never.
_THREAD_SHIFT, _TIME_SHIFT = 2, 33
_THREAD_MASK = (1 << 31) - 1


def _pack(threads: np.ndarray, time: int, strength: int) -> np.ndarray:
    return (threads.astype(np.int64) + 1 << _THREAD_SHIFT) | np.int64((time << _TIME_SHIFT) | strength)


def _thread(records: np.ndarray) -> np.ndarray:
    return ((records >> _THREAD_SHIFT) & _THREAD_MASK) - 1


class Shadow:
    """Last writer and two last readers, of different warps, of every cell of one address space.

    A cell is as wide as the narrowest access of the kernel, so neighbouring accesses of different threads never share
    one. With one writer and two readers some races stay unseen: a pair that a third access overwrote in the shadow.
    What is reported is a pair of accesses that nothing orders.

    Args:
        n_cells: Cells of the space.
        order: The synchronisation state that decides.
        n_threads: Threads per block.
    """

    def __init__(self, n_cells: int, order: Order, n_threads: int) -> None:
        self.order, self.n_threads = order, n_threads
        self.writer = np.zeros(n_cells, np.int64)
        self.reader = np.zeros(n_cells, np.int64)
        self.other_reader = np.zeros(n_cells, np.int64)

    def read(self, cells: np.ndarray, threads: np.ndarray, time: int, strength: int) -> tuple[str, int, int] | None:
        """Note a read by threads of the batch; return a race as (kind, other thread, own thread) or None."""
        mine = threads + self.order.base
        race = self._conflict(self.writer, cells, threads, mine, strength, "read after a write")
        records = _pack(mine, time, strength)
        warps = self._warp(mine)
        previous = self.reader[cells]
        moved = (previous != 0) & (self._warp(_thread(previous)) != warps)
        if moved.any():
            self.other_reader[cells[moved]] = previous[moved]
        self.reader[cells] = records
        beaten = self._warp(_thread(self.reader[cells])) != warps  # another warp reads the same cell right now
        if beaten.any():
            self.other_reader[cells[beaten]] = records[beaten]
        return race

    def write(self, cells: np.ndarray, threads: np.ndarray, time: int, strength: int) -> tuple[str, int, int] | None:
        """Note a write, as :meth:`read` does a read."""
        mine = threads + self.order.base
        race = self._conflict(self.writer, cells, threads, mine, strength, "write after a write")
        for readers in (self.reader, self.other_reader):
            race = race or self._conflict(readers, cells, threads, mine, strength, "write after a read")
        self.writer[cells] = _pack(mine, time, strength)
        return race

    def written_by(self, cells: np.ndarray) -> int | None:
        """Return a thread that has written one of the cells, or None."""
        records = self.writer[cells]
        return int(_thread(records[records != 0])[0]) if records.any() else None

    def _warp(self, threads: np.ndarray) -> np.ndarray:
        if self.n_threads % 32 == 0:
            return threads >> 5
        block = threads // self.n_threads
        return (block << 6) | ((threads - block * self.n_threads) >> 5)

    def _conflict(
        self, shadow: np.ndarray, cells: np.ndarray, threads: np.ndarray, mine: np.ndarray, strength: int, kind: str
    ) -> tuple[str, int, int] | None:
        records = shadow[cells]
        others = _thread(records)
        suspect = (records != 0) & (others != mine)
        if strength:  # two atomics do not race if each one's scope includes the other's thread
            same_block = others // self.n_threads == mine // self.n_threads
            both = np.minimum(records & 3, strength)
            suspect &= ~((both == GPU) | ((both == CTA) & same_block))
        where = np.nonzero(suspect)[0]
        if len(where) == 0:
            return None
        ordered = self.order.ordered(others[where], records[where] >> _TIME_SHIFT, threads[where])
        where = where[~ordered]
        return (kind, int(others[where[0]]), int(mine[where[0]])) if len(where) else None
