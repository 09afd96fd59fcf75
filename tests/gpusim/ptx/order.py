"""What happens before what: barriers, warp barriers, fences, acquire and release.

Time is the number of instructions executed so far. Within a block, an access at time t is ordered before what a thread
does now if both threads have since met at a barrier. Across blocks, order travels through memory: a thread that fences
and then writes a location atomically *releases* what it knows, and a thread that reads this location and then fences
*acquires* it. What a thread knows is kept sparse, as times up to which the accesses of a block, or of a single thread,
are visible.

This models the scopes and fences that a "last block merges" ticket needs. It is not the whole PTX memory model: a
release is taken to cover what its thread had learned by the time of the atomic, not only by the time of the fence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Knowledge", "Order"]


@dataclass
class Knowledge:
    """Times before which other threads' accesses are visible.

    Attributes:
        blocks: Block to time: all accesses of the block before it.
        fenced: Block to time: those accesses before it that their own thread followed by a fence.
        threads: Thread to time: the accesses of one thread before it.
    """

    blocks: dict[int, int] = field(default_factory=dict)
    fenced: dict[int, int] = field(default_factory=dict)
    threads: dict[int, int] = field(default_factory=dict)

    def learn(self, other: Knowledge) -> None:
        for mine, theirs in (
            (self.blocks, other.blocks),
            (self.fenced, other.fenced),
            (self.threads, other.threads),
        ):
            for key, time in theirs.items():
                if mine.get(key, -1) < time:
                    mine[key] = time


class Order:
    """Synchronisation state of a launch.

    Args:
        n_blocks: Blocks of the grid.
        n_threads: Threads per block.
        barrier_ids: Named barriers that the kernel uses.
        cross_block: Whether the kernel has any fence or acquire/release: without one, blocks never synchronise and
            nothing is tracked.
    """

    def __init__(self, n_blocks: int, n_threads: int, barrier_ids: set[int], cross_block: bool) -> None:
        self.n_threads = n_threads
        self.cross_block = cross_block
        self.barrier_ids = barrier_ids
        self.fence_time = np.full(n_blocks * n_threads if cross_block else 0, -1, np.int32)
        self.at_location: dict[int, Knowledge] = {}
        self.begin_batch(0, 0)

    def begin_batch(self, first_block: int, n_blocks: int) -> None:
        """Start a batch of blocks; accesses of earlier batches keep their threads' global numbers."""
        self.base = first_block * self.n_threads
        self.size = n_blocks * self.n_threads
        self.barrier_time = {number: np.full(self.size, -1, np.int32) for number in self.barrier_ids}
        self.warp_time: dict[int, np.ndarray] = {}  # by member mask: lanes that meet under one meet no others
        self.of_thread: dict[int, Knowledge] = {}  # effective, by global thread
        self.of_block: dict[int, Knowledge] = {}  # effective for every thread of the block
        self.pending: dict[int, Knowledge] = {}  # read by a relaxed operation of a thread, waiting for its fence
        self.block_pending: dict[int, Knowledge] = {}  # the same, made known to the block by a barrier

    # ------------------------------------------------------------------------------------------------- events

    def barrier(self, number: int, threads: np.ndarray, time: int) -> None:
        """The given threads (of the batch, in whole or in part) have met."""
        self.barrier_time[number][threads] = time
        if not (self.of_thread or self.pending):
            return
        for thread in threads[np.isin(threads + self.base, [*self.of_thread, *self.pending])]:
            thread = int(thread) + self.base
            block = thread // self.n_threads
            if thread in self.of_thread:
                self.of_block.setdefault(block, Knowledge()).learn(self.of_thread[thread])
            if thread in self.pending:
                self.block_pending.setdefault(block, Knowledge()).learn(self.pending[thread])

    def warp_barrier(self, mask: int, threads: np.ndarray, time: int) -> None:
        """The given threads have met those of their warp that name the same lanes."""
        if mask not in self.warp_time:
            self.warp_time[mask] = np.full(self.size, -1, np.int32)
        self.warp_time[mask][threads] = time

    def fence(self, threads: np.ndarray, time: int) -> None:
        """A fence of device scope or wider."""
        if not self.cross_block:
            return
        self.fence_time[threads + self.base] = time
        if not (self.pending or self.block_pending):
            return
        for thread in threads.tolist():
            thread += self.base
            known = (self.pending.get(thread), self.block_pending.get(thread // self.n_threads))
            for knowledge in known:
                if knowledge is not None:
                    self.of_thread.setdefault(thread, Knowledge()).learn(knowledge)

    def write_location(self, thread: int, location: int, *, keep: bool) -> None:
        """An atomic or otherwise strong write; ``keep`` for read-modify-writes, which continue a release sequence."""
        thread += self.base
        fenced_at = int(self.fence_time[thread])
        knowledge = self.at_location.setdefault(location, Knowledge()) if keep else Knowledge()
        if not keep:
            self.at_location[location] = knowledge
        if fenced_at < 0:
            return
        block = thread // self.n_threads
        for known in (self.of_thread.get(thread), self.of_block.get(block)):
            if known is not None:
                knowledge.learn(known)
        met = max(int(times[thread - self.base]) for times in self.barrier_time.values()) if self.barrier_time else -1
        released = Knowledge(threads={thread: fenced_at})
        if met >= 0:
            (released.blocks if fenced_at >= met else released.fenced)[block] = met
        knowledge.learn(released)

    def read_location(self, thread: int, location: int, *, acquire: bool) -> None:
        """An atomic or otherwise strong read."""
        knowledge = self.at_location.get(location)
        if knowledge is None:
            return
        where = self.of_thread if acquire else self.pending
        where.setdefault(thread + self.base, Knowledge()).learn(knowledge)

    # ---------------------------------------------------------------------------------------------- questions

    def ordered(self, other: np.ndarray, time: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Say which accesses by ``other`` (global numbers) at ``time`` come before ``mine`` (numbers in the batch)."""
        result = np.zeros(len(other), bool)
        mine_global = mine + self.base
        local = np.nonzero(other // self.n_threads == mine_global // self.n_threads)[0]
        if len(local):
            theirs, ours, when = other[local] - self.base, mine[local], time[local]
            met = np.zeros(len(local), bool)
            for times in self.barrier_time.values():
                met |= (times[theirs] > when) & (times[ours] > when)
            same_warp = (theirs % self.n_threads) // 32 == (ours % self.n_threads) // 32
            for times in self.warp_time.values():
                met |= same_warp & (times[theirs] > when) & (times[ours] > when)
            result[local] = met
        if self.cross_block:
            for index in np.nonzero(~result)[0].tolist():
                result[index] = self._known(int(other[index]), int(time[index]), int(mine_global[index]))
        return result

    def _known(self, other: int, time: int, mine: int) -> bool:
        block = other // self.n_threads
        for knowledge in (self.of_thread.get(mine), self.of_block.get(mine // self.n_threads)):
            if knowledge is None:
                continue
            if time < knowledge.blocks.get(block, -1) or time < knowledge.threads.get(other, -1):
                return True
            if time < knowledge.fenced.get(block, -1) and self.fence_time[other] > time:
                return True
        return False
