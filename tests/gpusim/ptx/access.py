"""Resolves addresses to bytes of an arena and checks every access on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .memory import GLOBAL_BASE, INITIALISED, LOCAL_BASE, PENDING, SHARED_BASE, VALID, Arena
from .parser import Instruction, Kernel
from .races import Shadow
from .types import TYPES

if TYPE_CHECKING:
    from .decoder import Lanes
    from .machine import Machine

__all__ = ["VECTORS", "Access", "Checker", "narrowest_accesses", "space_of"]

READABLE = VALID | INITIALISED
SPACES = ("global", "shared", "local", "param", "const")
ACCESSES = {"ld", "ldu", "st", "atom", "red"}
_ARENAS = {"global": ("global",), "const": ("global",), "shared": ("shared",), "generic": ("global", "shared")}
VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def space_of(instruction: Instruction) -> str:
    """Return the state space an instruction names, or ``generic``."""
    for modifier in instruction.modifiers:
        name = modifier.split("::")[0]
        if name in SPACES:
            return name
    return "generic"


@dataclass
class Access:
    """The part of an instruction's access that may go ahead.

    Attributes:
        arena: Where it goes.
        offsets: First byte of each lane's access in the arena, aligned to the access.
        threads: Batch numbers of the threads.
        kept: Which of the instruction's lanes these are, or None for all.
    """

    arena: Arena
    offsets: np.ndarray
    threads: np.ndarray
    kept: np.ndarray | None


class Checker:
    """Bounds, alignment, initialisation and races, for one launch."""

    def __init__(self, machine: Machine) -> None:
        self.m = machine
        self.enabled = machine.options.check
        self.cells = machine.code.cells
        self.global_shadow = self._shadow("global", len(machine.memory.arena)) if self.enabled else None
        self.shared_shadow: Shadow | None = None

    def _shadow(self, space: str, nbytes: int) -> Shadow:
        return Shadow(-(-nbytes // self.cells[space]), self.m.sync, self.m.n_threads)

    def begin_batch(self) -> None:
        self.shared_shadow = self._shadow("shared", len(self.m.shared)) if self.enabled else None

    def shadow(self, arena: Arena) -> Shadow | None:
        return {"global": self.global_shadow, "shared": self.shared_shadow}.get(arena.name)

    # ------------------------------------------------------------------------------------------------- resolve

    def resolve(
        self, space: str, addresses: np.ndarray, size: int, instruction: Instruction, lanes: Lanes
    ) -> list[Access]:
        """Split an access by address space, drop and report what lies outside or is misaligned."""
        threads = self.m.threads(lanes)
        if space != "generic":
            return self._resolve_in(space, addresses, size, instruction, threads, None)
        in_local, in_shared = addresses >= LOCAL_BASE, (addresses >= SHARED_BASE) & (addresses < LOCAL_BASE)
        parts = []
        for name, base, chosen in (
            ("global", 0, ~(in_local | in_shared)),
            ("shared", SHARED_BASE, in_shared),
            ("local", LOCAL_BASE, in_local),
        ):
            if chosen.any():
                kept = None if chosen.all() else np.nonzero(chosen)[0]
                some = slice(None) if kept is None else kept
                parts += self._resolve_in(name, addresses[some] - base, size, instruction, threads[some], kept)
        return parts

    def _resolve_in(
        self,
        space: str,
        addresses: np.ndarray,
        size: int,
        instruction: Instruction,
        threads: np.ndarray,
        kept: np.ndarray | None,
    ) -> list[Access]:
        m = self.m
        if space in {"global", "const"}:
            arena, offsets, limit = m.memory.arena, addresses - GLOBAL_BASE, None
        elif space == "shared":
            arena, offsets, limit = m.shared, m.block_of[threads] * m.shared_stride + addresses, m.shared_size
        elif space == "local":
            arena, offsets, limit = m.local, threads * m.local_stride + addresses, m.decoder.local_bytes
        else:
            return [Access(m.parameters, addresses, threads, kept)]
        aligned = addresses % size == 0
        if limit is None:
            inside = (offsets >= 0) & (offsets + size <= len(arena))
            safe = np.where(inside, offsets, 0)
            inside &= arena.all_valid(safe, size)
        else:
            inside = (addresses >= 0) & (addresses + size <= limit)
            if space == "shared" and m.decoder.shared_holes:
                inside &= arena.all_valid(np.where(inside, offsets, 0), size)
        good = aligned & inside
        if good.all():
            return [Access(arena, offsets, threads, kept)]
        self._report(space, addresses, offsets, size, aligned, inside, instruction, threads)
        chosen = np.nonzero(good)[0]
        kept = chosen if kept is None else kept[chosen]
        return [Access(arena, offsets[chosen], threads[chosen], kept)] if len(chosen) else []

    def _report(
        self,
        space: str,
        addresses: np.ndarray,
        offsets: np.ndarray,
        size: int,
        aligned: np.ndarray,
        inside: np.ndarray,
        instruction: Instruction,
        threads: np.ndarray,
    ) -> None:
        if not inside.all():
            first = int(np.argmin(inside))
            if space in {"global", "const"}:
                where = self.m.memory.describe(int(offsets[first]))
            else:
                where = self._describe(space, int(addresses[first]))
            detail = f"{size} bytes of {space} memory at {where}, by {self.who(int(threads[first]))}"
            self.m.issues.add("out-of-bounds", instruction, detail, count=int((~inside).sum()))
        if not aligned.all():
            first = int(np.argmin(aligned))
            detail = (
                f"{size} bytes of {space} memory at an address that is {addresses[first] % size} modulo {size}, "
                f"by {self.who(int(threads[first]))}"
            )
            self.m.issues.add("misaligned", instruction, detail, count=int((~aligned).sum()))

    def _describe(self, space: str, address: int) -> str:
        """Say where an address that is in no variable of shared or local memory lies."""
        if space == "local":
            return f"byte {address} of {self.m.decoder.local_bytes}"
        variables, offsets = self.m.kernel.shared.values(), self.m.decoder.symbols
        ends = {offsets[v.name] + v.nbytes: v for v in variables if v.nbytes and offsets[v.name] + v.nbytes <= address}
        if ends and address < self.m.decoder.shared_bytes:
            variable = ends[max(ends)]
            return f"{address - max(ends) + 1} bytes beyond the {variable.nbytes} bytes of {variable.name}"
        return f"byte {address} of {self.m.shared_size}"

    def who(self, thread: int) -> str:
        """Name a thread of the batch."""
        return self.who_global(thread + self.m.sync.base)

    def who_global(self, thread: int) -> str:
        return f"block {thread // self.m.n_threads} thread {thread % self.m.n_threads}"

    # -------------------------------------------------------------------------------------------------- checks

    def check_read(self, access: Access, size: int, instruction: Instruction, strength: int) -> None:
        """Check an access that reads: initialised, not pending, ordered after the last write."""
        self.check_ready(access, size, instruction)
        shadow = self.shadow(access.arena) if self.enabled else None
        if shadow is not None:
            for cells in self._cells(access, size):
                race = shadow.read(cells, access.threads, self.m.time, strength)
                self._report_race(race, access, instruction)

    def check_ready(self, access: Access, size: int, instruction: Instruction) -> None:
        """Check that the bytes have been written and that no asynchronous copy is still on its way to them."""
        if self.enabled and access.arena.name != "param":
            ready = access.arena.in_state(access.offsets, size, READABLE)
            if not ready.all():
                self._report_unready(access, size, ready, instruction)

    def check_write(self, access: Access, size: int, instruction: Instruction, strength: int) -> None:
        """Check an access that writes: ordered after the last write and the last reads, and after any async copy."""
        if self.enabled and access.arena.name == "shared" and self.m.copies.flying:
            self._check_not_pending(access, size, instruction)
        shadow = self.shadow(access.arena) if self.enabled else None
        if shadow is not None:
            for cells in self._cells(access, size):
                race = shadow.write(cells, access.threads, self.m.time, strength)
                self._report_race(race, access, instruction)

    def check_unwritten(self, access: Access, size: int, instruction: Instruction) -> None:
        """Check a load that takes memory for constant (``ld.global.nc``): the launch has not written it so far."""
        shadow = self.shadow(access.arena) if self.enabled else None
        for cells in self._cells(access, size) if shadow else ():
            if (who := shadow.written_by(cells)) is not None:
                detail = f"a read-only load of {access.arena.name} memory that {self.who_global(who)} has written"
                self.m.issues.add("race", instruction, detail, topic="read-only")

    def _check_not_pending(self, access: Access, size: int, instruction: Instruction) -> None:
        bytes_ = access.arena.state[access.offsets[:, None] + np.arange(0, size, min(size, 4))]
        pending = (bytes_ & PENDING).any(1)
        if pending.any():
            who = self.who(int(access.threads[int(np.argmax(pending))]))
            detail = f"{who} writes where an asynchronous copy is still under way to"
            self.m.issues.add("async", instruction, detail, topic="overwritten", count=int(pending.sum()))

    def _cells(self, access: Access, size: int) -> list[np.ndarray]:
        cell = self.cells[access.arena.name]
        first = access.offsets // cell
        return [first + extra for extra in range(max(1, size // cell))]

    def _report_unready(self, access: Access, size: int, ready: np.ndarray, instruction: Instruction) -> None:
        index = int(np.argmin(ready))
        state = access.arena.state[access.offsets[index] : access.offsets[index] + size]
        who = self.who(int(access.threads[index]))
        count = int((~ready).sum())
        if (state & PENDING).any():
            detail = f"{who} reads shared memory that an asynchronous copy has not been waited for"
            self.m.issues.add("async", instruction, detail, count=count)
        else:
            detail = f"{who} reads {size} bytes of {access.arena.name} memory that nothing has written"
            self.m.issues.add("uninitialised", instruction, detail, count=count)

    def _report_race(self, race: tuple[str, int, int] | None, access: Access, instruction: Instruction) -> None:
        if race is not None:
            kind, other, mine = race
            detail = f"{kind} in {access.arena.name} memory: {self.who_global(mine)} against {self.who_global(other)}"
            self.m.issues.add("race", instruction, detail, topic=kind)

    def report_same_instruction(
        self, access: Access, values: np.ndarray, offsets: np.ndarray, instruction: Instruction
    ) -> None:
        """Report lanes of one store that write different values to one address.

        Values that are the same float up to rounding are ``ambiguous``, not a race: replicated lanes of a reduction
        whose combine function is not symmetric to the last bit. Which of them memory keeps is unspecified.
        """
        size = values.dtype.itemsize
        kept = access.arena.load(offsets, size)
        lost = kept != values
        kind = "race"
        if size in {4, 8}:
            a, b = (array[lost].view(f"f{size}") for array in (kept, values))
            rounding = 64 * np.finfo(a.dtype).eps * np.maximum(np.abs(a), np.abs(b))
            numbers = (np.maximum(np.abs(a), np.abs(b)) > 1e-30) | (a == b)  # indices look like tiny floats
            kind = "ambiguous" if (numbers & (np.abs(a - b) <= rounding)).all() else "race"
        detail = f"lanes of one instruction write different values to one address of {access.arena.name} memory"
        self.m.issues.add(kind, instruction, detail, topic="same instruction", count=int(lost.sum()))


def narrowest_accesses(kernel: Kernel) -> dict[str, int]:
    """Return the bytes of the narrowest access to global and to shared memory: the cells of their shadow memory.

    Accesses are aligned to their size, so no cell is ever touched in part. A ``cp.async`` of fewer bytes than it copies
    reads single ones, all of its own.
    """
    narrowest = {"global": 16, "shared": 16}
    for instruction in kernel.code:
        space, size = space_of(instruction), 16
        if instruction.opcode == "cp":
            space, size = "generic", 4
        elif instruction.opcode in ACCESSES:
            sizes = [TYPES[modifier].size for modifier in instruction.modifiers if modifier in TYPES]
            lanes = next((count for name, count in VECTORS.items() if name in instruction.modifiers), 1)
            size = min(sizes) * lanes if sizes else 4
        for name in _ARENAS.get(space, ()):
            narrowest[name] = min(narrowest[name], size)
    return narrowest
