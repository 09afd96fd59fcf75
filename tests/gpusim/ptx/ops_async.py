"""``cp.async``: copies from global to shared memory that complete when their group is waited for.

A copy may write its destination at any moment between its issue and its wait. So the destination is checked against
earlier accesses at the issue, its bytes are *pending* until the wait (reading them is an error), and the wait counts as
a write by the issuing thread: others need a barrier after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .access import Access
from .decoder import Decoder, Lanes, Run, opcode, require
from .memory import INITIALISED, PENDING, VALID
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


def _copy(decoder: Decoder, instruction: Instruction) -> Run:
    """Decode ``cp.async.ca.shared.global [target], [source], size {, source_size}``."""
    target = decoder.address(instruction.operands[0], "shared")
    source = decoder.address(instruction.operands[1], "global")
    size = int(instruction.operands[2], 0)
    given = decoder.source(instruction.operands[3], TYPES["u32"]) if len(instruction.operands) > 3 else None

    def run(m, lanes: Lanes) -> None:
        count, threads = m.count(lanes), m.threads(lanes)
        reads = np.full(count, size, np.int64)
        if given is not None:
            reads = np.minimum(np.broadcast_to(np.asarray(given(m, lanes)), (count,)), size).astype(np.int64)
        targets, sources = target(m, lanes), source(m, lanes)
        offsets = np.zeros(count, np.int64)
        arrives = reads == 0  # nothing is read: the address may be anything
        some = np.nonzero(reads > 0)[0]
        if len(some):
            for access in m.checker.resolve("global", sources[some], size, instruction, threads[some]):
                m.checker.check_read(access, size, instruction, WEAK)
                if m.options.count:
                    m.counters.count_global("load", access.offsets, size, m.warp[access.threads])
                kept = some if access.kept is None else some[access.kept]
                offsets[kept] = access.offsets
                arrives[kept] = True
        lanes_left = np.nonzero(arrives)[0]
        for access in m.checker.resolve("shared", targets[lanes_left], size, instruction, threads[lanes_left]):
            m.checker.check_write(access, size, instruction, WEAK)
            if m.options.count:
                m.counters.count_shared("store", access.offsets, size, m.warp[access.threads])
            kept = lanes_left if access.kept is None else lanes_left[access.kept]
            group = m.copies.group[access.threads]
            copy = _Copy(instruction, access.threads, group, offsets[kept], access.offsets, size, reads[kept])
            m.copies.issue(copy)

    return run
