"""``cp.async``: copies from global to shared memory that complete when their group is waited for.

A copy may write its destination at any moment between its issue and its wait. So the destination is checked against
earlier accesses at the issue, its bytes are *pending* until the wait (reading them is an error), and the wait counts as
a write by the issuing thread: others need a barrier after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .access import Access
from .decoder import Decoder, Lanes, Run, opcode, require
from .memory import GLOBAL_BASE, INITIALISED, PENDING, VALID
from .parser import Instruction
from .races import WEAK
from .types import TYPES

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["PendingCopies"]


@dataclass
class _Copy:
    """The copies of one executed instruction that are still under way; one entry per lane."""

    instruction: Instruction
    threads: np.ndarray
    group: np.ndarray  # number of the thread's group
    source: np.ndarray  # byte offsets in global memory
    target: np.ndarray  # byte offsets in shared memory
    size: int
    source_size: np.ndarray  # bytes to read; the rest is filled with zero

    def select(self, chosen: np.ndarray) -> _Copy:
        arrays = (self.threads, self.group, self.source, self.target)
        parts = [array[chosen] for array in arrays]
        return _Copy(self.instruction, *parts, self.size, self.source_size[chosen])


class PendingCopies:
    """The copies in flight of a batch of blocks."""

    def __init__(self, machine: Machine) -> None:
        self.m = machine
        self.flying: list[_Copy] = []
        self.group = np.zeros(machine.size, np.int64)  # groups each thread has committed

    def issue(self, copy: _Copy) -> None:
        self.flying.append(copy)
        self.m.shared.mark(copy.target, copy.size, VALID | PENDING)

    def commit(self, lanes: Lanes) -> None:
        self.group[lanes] += 1

    def wait(self, lanes: Lanes, allowed: int | None) -> None:
        """Complete a thread's groups but for the ``allowed`` newest ones; None completes everything."""
        waiting = np.zeros(self.m.size, bool)
        waiting[lanes] = True
        remaining = []
        for copy in self.flying:
            done = waiting[copy.threads]
            if allowed is not None:
                done = done & (copy.group < self.group[copy.threads] - allowed)
            if done.any():
                self._complete(copy.select(done))
            if not done.all():
                remaining.append(copy.select(~done))
        self.flying = remaining

    def _complete(self, copy: _Copy) -> None:
        m, span = self.m, np.arange(copy.size)
        data = m.memory.arena.data[copy.source[:, None] + span]
        data = np.where(span < copy.source_size[:, None], data, np.uint8(0))
        m.shared.data[copy.target[:, None] + span] = data
        m.shared.mark(copy.target, copy.size, VALID | INITIALISED)
        access = Access(m.shared, copy.target, copy.threads, None)
        m.checker.check_write(access, copy.size, copy.instruction, WEAK)

    def report_unfinished(self) -> None:
        for copy in self.flying:
            who = self.m.checker.who(int(copy.threads[0]))
            detail = f"{who} ends with an asynchronous copy that was never waited for"
            self.m.issues.add("async", copy.instruction, detail, topic="unfinished", count=len(copy.threads))


@opcode("cp")
def _cp(decoder: Decoder, instruction: Instruction) -> Run:
    require(
        instruction,
        *("async", "ca", "cg", "shared", "shared::cta", "global", "commit_group", "wait_group", "wait_all"),
        *("L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"),
    )
    if "commit_group" in instruction.modifiers:
        return lambda m, lanes: m.copies.commit(lanes)
    if "wait_all" in instruction.modifiers:
        return lambda m, lanes: m.copies.wait(lanes, None)
    if "wait_group" in instruction.modifiers:
        allowed = int(instruction.operands[0], 0)
        return lambda m, lanes: m.copies.wait(lanes, allowed)
    return _copy(decoder, instruction)


def _bytes_to_read(decoder: Decoder, instruction: Instruction, size: int) -> Callable[[Machine, Lanes], np.ndarray]:
    """Return a reader of the bytes that each lane reads: all, ``src-size``, or none where ``ignore-src`` holds."""
    last = -1 if "L2::cache_hint" in instruction.modifiers else None
    optional = instruction.operands[3:last]
    if not optional:
        return lambda m, lanes: np.full(m.count(lanes), size, np.int64)
    slot = decoder.slots.get(optional[0].removeprefix("!"))
    if slot is not None and decoder.types[slot].kind == "p":
        ignored = decoder.predicate(optional[0])
        return lambda m, lanes: np.where(ignored(m, lanes), 0, size)
    given = decoder.source(optional[0], TYPES["u32"])
    return lambda m, lanes: np.full(m.count(lanes), np.minimum(given(m, lanes), size), np.int64)


def _copy(decoder: Decoder, instruction: Instruction) -> Run:
    """Decode ``cp.async.ca.shared.global [target], [source], size {, source_size or ignore_source} {, policy}``."""
    target = decoder.address(instruction.operands[0], "shared")
    source = decoder.address(instruction.operands[1], "global")
    size = int(instruction.operands[2], 0)
    bytes_to_read = _bytes_to_read(decoder, instruction, size)

    def run(m, lanes: Lanes) -> None:
        threads, reads = m.threads(lanes), bytes_to_read(m, lanes)
        targets, sources = target(m, lanes), source(m, lanes)
        arrives = np.ones(len(threads), bool)  # lanes whose source may be read, or that read nothing
        whole = (reads == size) | ((reads > 0) & (sources % size != 0))  # the latter is reported as misaligned
        _read_source(m, instruction, sources, size, threads, np.nonzero(whole)[0], arrives)
        for byte in range(int(reads[~whole].max(initial=0))):  # the end of an array
            some = np.nonzero(~whole & (reads > byte))[0]
            _read_source(m, instruction, sources + byte, 1, threads, some, arrives)
        lanes_left = np.nonzero(arrives)[0]
        for access in m.checker.resolve("shared", targets[lanes_left], size, instruction, threads[lanes_left]):
            m.checker.check_write(access, size, instruction, WEAK)
            if m.options.count:
                m.counters.count_shared("store", access.offsets, size, m.warp[access.threads])
            kept = lanes_left if access.kept is None else lanes_left[access.kept]
            offsets = np.where(reads[kept] > 0, sources[kept] - GLOBAL_BASE, 0)
            group = m.copies.group[access.threads]
            m.copies.issue(_Copy(instruction, access.threads, group, offsets, access.offsets, size, reads[kept]))

    return run


def _read_source(
    m: Machine,
    instruction: Instruction,
    sources: np.ndarray,
    size: int,
    threads: np.ndarray,
    lanes: np.ndarray,
    arrives: np.ndarray,
) -> None:
    """Check and count the reads of some lanes; clear ``arrives`` for those that may not go ahead."""
    if len(lanes) == 0:
        return
    arrived = np.zeros(len(arrives), bool)
    for access in m.checker.resolve("global", sources[lanes], size, instruction, threads[lanes]):
        m.checker.check_read(access, size, instruction, WEAK)
        if m.options.count:
            m.counters.count_global("load", access.offsets, size, m.warp[access.threads])
        arrived[lanes if access.kept is None else lanes[access.kept]] = True
    arrives[lanes] &= arrived[lanes]
