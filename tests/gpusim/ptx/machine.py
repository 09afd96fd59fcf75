"""Runs a kernel: registers of many blocks as numpy vectors, divergence, barriers, checks.

All threads of a batch of blocks step together. The lowest program counter among the runnable threads goes first, one
basic block at a time, so threads that parted at a branch meet again at its end. Execution order is therefore fixed;
races are found by what the program orders (``order.py``), not by trying schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import ops_arithmetic, ops_async, ops_convert, ops_integer, ops_matrix, ops_memory, ops_warp  # noqa: F401
from .access import Checker, narrowest_accesses
from .counters import L2_BYTES, Counters, LruCache
from .decoder import Decoder, Lanes, Run
from .memory import VALID, Arena, DeviceMemory
from .order import Order
from .parser import Instruction, Kernel
from .report import ExecutionError, Issues
from .types import TYPES

__all__ = ["DEFAULTS", "Machine", "Options"]

EVERYONE = slice(None)
CONTROL = {"bra", "brx", "ret", "exit", "bar", "barrier"}
BATCH_THREADS = 1 << 15
MOST_THREADS = (1 << 31) - 1  # of a launch: the shadow memory numbers them with 31 bits


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        check: Look for out-of-bounds, misaligned and uninitialised accesses and for races.
        count: Count bytes, sectors, wavefronts and cache traffic.
        fuzz_ulp: Perturb the result of every approximate instruction by up to this many ulp (by what the PTX manual
            allows where that is more: sin, cos, lg2, tanh), and run atomics in random order: the spread of the results
            justifies a tolerance.
        seed: Of the perturbation.
        max_steps: Basic blocks executed before the run counts as endless.
        cache_bytes: Of the L2 model.
    """

    check: bool = True
    count: bool = True
    fuzz_ulp: float = 0.0
    seed: int = 0
    max_steps: int = 2_000_000
    cache_bytes: int = L2_BYTES


DEFAULTS = Options()


@dataclass
class _Step:
    """One decoded instruction."""

    instruction: Instruction
    run: Run | None  # None for control flow
    predicate: int | None
    negated: bool


class _Program:
    """The decoded code of a kernel; holds nothing of a launch, so that every launch shares it."""

    def __init__(self, kernel: Kernel, addresses: dict[str, int]) -> None:
        self.decoder = Decoder(kernel, addresses)
        self.steps = [self._decode(instruction) for instruction in kernel.code]
        leaders = {0, len(self.steps), *kernel.labels.values()}
        leaders |= {i + 1 for i, step in enumerate(self.steps) if step.run is None}
        ordered = sorted(leaders)
        self.block_end = dict(zip(ordered, [*ordered[1:], len(self.steps)], strict=True))
        self.barrier_ids = {_barrier_id(step.instruction) for step in self.steps if _is_block_barrier(step)}
        self.crosses_blocks = any(_crosses_blocks(step.instruction) for step in self.steps)
        self.cells = narrowest_accesses(kernel)

    def _decode(self, instruction: Instruction) -> _Step:
        control = instruction.opcode in CONTROL and "warp" not in instruction.modifiers
        predicate = self.decoder.slots[instruction.predicate] if instruction.predicate else None
        run = None if control else self.decoder.decode(instruction)
        return _Step(instruction, run, predicate, instruction.negated)


class Machine:
    """Executes one kernel on one device memory.

    Args:
        kernel: A parsed kernel.
        memory: Global memory; keeps its contents between launches.
        options: See :class:`Options`.
    """

    def __init__(self, kernel: Kernel, memory: DeviceMemory, options: Options = DEFAULTS) -> None:
        self.kernel, self.memory, self.options = kernel, memory, options
        self.rng = np.random.default_rng(options.seed)
        self.counters = Counters(cache=LruCache(options.cache_bytes))
        self.issues = Issues()
        self.time = 0
        addresses = {name: self._place(name) for name in kernel.global_}
        place = tuple(addresses.values())
        if place not in kernel.decoded:  # which takes as long as a small launch
            kernel.decoded[place] = _Program(kernel, addresses)
        self.code: _Program = kernel.decoded[place]
        self.decoder, self.program, self.block_end = self.code.decoder, self.code.steps, self.code.block_end
        self.control: dict[str, Callable] = {
            "bra": self._branch,
            "brx": self._indexed_branch,
            "ret": self._return,
            "exit": self._return,
            "bar": self._barrier,
            "barrier": self._barrier,
        }

    def _place(self, name: str) -> int:
        variable = self.kernel.global_[name]
        data = np.zeros(variable.count, variable.type.raw)
        for index, value in enumerate(variable.initial):
            data[index] = value & ((1 << variable.type.bits) - 1)
        return self.memory.allocate(data.nbytes, data)

    # --------------------------------------------------------------------------------------------------- launch

    def launch(self, grid: Sequence[int], block: Sequence[int], parameters: bytes, shared_bytes: int = 0) -> None:
        """Run every block of the grid, in batches.

        Args:
            grid: Blocks in x, y, z.
            block: Threads in x, y, z.
            parameters: The kernel's parameters as laid out in parameter space.
            shared_bytes: Dynamic shared memory.

        Raises:
            ExecutionError: On a deadlock, an endless loop, or sizes the kernel does not take.
        """
        self.grid, self.block = ((*sizes, 1, 1)[:3] for sizes in (grid, block))
        self.n_threads, n_blocks = int(np.prod(self.block)), int(np.prod(self.grid))
        if self.kernel.required_threads not in {None, self.n_threads}:
            raise ExecutionError(f"the kernel requires {self.kernel.required_threads} threads, got {self.n_threads}")
        if not 1 <= self.n_threads <= 1024:
            raise ExecutionError(f"a block has 1 to 1024 threads, got {self.n_threads}")
        if n_blocks * self.n_threads >= MOST_THREADS:
            raise ExecutionError(f"{n_blocks} blocks of {self.n_threads} threads: fewer than {MOST_THREADS} threads")
        if len(parameters) < self.decoder.parameter_bytes:
            raise ExecutionError(
                f"{len(parameters)} bytes of parameters, the kernel takes {self.decoder.parameter_bytes}"
            )
        self.parameters = Arena("param", len(parameters), VALID)
        self.parameters.data[: len(parameters)] = np.frombuffer(parameters, np.uint8)
        self.shared_size = self.decoder.shared_bytes + shared_bytes
        self.shared_stride = -(-max(self.shared_size, 1) // 16) * 16
        self.local_stride = -(-max(self.decoder.local_bytes, 1) // 16) * 16
        self.sync = Order(n_blocks, self.n_threads, self.code.barrier_ids, self.code.crosses_blocks)
        self.checker = Checker(self)
        per_batch = max(1, BATCH_THREADS // self.n_threads)
        with np.errstate(all="ignore"):
            for first in range(0, n_blocks, per_batch):
                self._run_batch(first, min(per_batch, n_blocks - first))
        self.counters.cache.flush()

    def _run_batch(self, first: int, n_blocks: int) -> None:
        self.first_block = first
        self.size = size = n_blocks * self.n_threads
        self.everyone = np.arange(size)
        self.block_of = self.everyone // self.n_threads
        self.rank = self.everyone % self.n_threads
        self.lane = self.rank & 31
        self.warp = self.block_of * (-(-self.n_threads // 32)) + self.rank // 32
        self.registers = [np.zeros(size, kind.raw) for kind in self.decoder.types]
        self.special = self._special_registers()
        self.carry = np.zeros(size, bool)
        self.shared = Arena("shared", n_blocks * self.shared_stride, VALID)
        for start, end in self.decoder.shared_holes:
            self.shared.state[: n_blocks * self.shared_stride].reshape(n_blocks, -1)[:, start:end] = 0
        self.local = Arena("local", size * self.local_stride, VALID)
        self.sync.begin_batch(first, n_blocks)
        self.checker.begin_batch()
        self.copies = ops_async.PendingCopies(self)
        self.pc = np.zeros(size, np.int64)
        self.waiting = np.full(size, -1, np.int64)  # barrier at which a thread waits
        self.arrivals: dict[int, Instruction] = {}  # last barrier instruction by program counter after it
        self._schedule()
        self.copies.report_unfinished()

    def _special_registers(self) -> dict[str, np.ndarray]:
        grid, block = self.grid, self.block
        index = self.first_block + self.block_of
        values = {
            "%tid.x": self.rank % block[0],
            "%tid.y": self.rank // block[0] % block[1],
            "%tid.z": self.rank // (block[0] * block[1]),
            "%ctaid.x": index % grid[0],
            "%ctaid.y": index // grid[0] % grid[1],
            "%ctaid.z": index // (grid[0] * grid[1]),
            "%laneid": self.lane,
            "%warpid": self.rank // 32,
            "%lanemask_eq": 1 << self.lane,
            "%lanemask_lt": (1 << self.lane) - 1,
            "%lanemask_le": (2 << self.lane) - 1,
            "%lanemask_gt": 0xFFFFFFFF - (2 << self.lane) + 1,
            "%lanemask_ge": 0xFFFFFFFF - (1 << self.lane) + 1,
        }
        constants = {
            **{f"%ntid.{axis}": block[i] for i, axis in enumerate("xyz")},
            **{f"%nctaid.{axis}": grid[i] for i, axis in enumerate("xyz")},
            "%nwarpid": -(-self.n_threads // 32),
            "%dynamic_smem_size": self.shared_size - self.decoder.shared_bytes,
            "%total_smem_size": self.shared_size,
            "%clock": 0,
            "%clock64": 0,
            "%globaltimer": 0,
        }
        values.update({name: np.full(self.size, value) for name, value in constants.items()})
        return {name: value.astype(np.uint64) for name, value in values.items()}

    # ----------------------------------------------------------------------------------------------------- lanes

    def count(self, lanes: Lanes) -> int:
        return self.size if isinstance(lanes, slice) else len(lanes)

    def threads(self, lanes: Lanes) -> np.ndarray:
        return self.everyone if isinstance(lanes, slice) else lanes

    def fuzz(self, values: np.ndarray, relative: float = 0.0, absolute: np.ndarray | float = 0.0) -> np.ndarray:
        """Perturb results of approximate instructions when the options ask for it.

        Args:
            values: The exact results, rounded.
            relative: Error that the instruction is allowed, if it is more than the ulp of the options.
            absolute: Error that it is allowed on top of that.

        Returns:
            The results, each wrong by a random part of its error.
        """
        if self.options.fuzz_ulp <= 0:
            return values
        values = np.asarray(values)
        relative = max(relative, self.options.fuzz_ulp * float(np.finfo(values.dtype).eps))
        part = self.rng.uniform(-1, 1, values.shape)
        return (values * (1 + relative * part) + absolute * part).astype(values.dtype)

    # -------------------------------------------------------------------------------------------------- schedule

    def _schedule(self) -> None:
        end = len(self.program)
        together: int | None = 0  # program counter of all threads, if they agree
        for _ in range(self.options.max_steps):
            if together is not None:
                current, lanes = together, EVERYONE
            else:
                runnable = (self.waiting < 0) & (self.pc < end)
                if not runnable.any():
                    if (self.waiting >= 0).any():
                        self._deadlock()
                    return
                current = int(self.pc[runnable].min())
                lanes = np.nonzero(runnable & (self.pc == current))[0]
            if current >= end:
                return
            together = self._run_block(current, lanes)
        raise ExecutionError(
            f"no end after {self.options.max_steps} basic blocks: a loop that waits for another block?"
        )

    def _run_block(self, start: int, lanes: Lanes) -> int | None:
        """Run one basic block for threads that are all at its start; return the common next counter, if any."""
        end = self.block_end[start]
        everyone = isinstance(lanes, slice)
        for index in range(start, end):
            step = self.program[index]
            self.time += 1
            active = lanes if step.predicate is None else self._select(step, lanes)
            if step.run is None:
                self.counters.instructions[step.instruction.opcode] += self.count(lanes)
                return self.control[step.instruction.opcode](step, index, lanes, active)
            count = self.count(active)
            if count:
                self.counters.instructions[step.instruction.opcode] += count
                step.run(self, active)
        self.pc[lanes] = end
        return end if everyone else self._common()

    def _select(self, step: _Step, lanes: Lanes) -> Lanes:
        flags = self.registers[step.predicate][lanes]
        if step.negated:
            flags = ~flags
        if flags.all():
            return lanes
        return np.nonzero(flags)[0] if isinstance(lanes, slice) else lanes[flags]

    def _common(self) -> int | None:
        first = self.pc[0]
        return int(first) if (self.pc == first).all() and (self.waiting < 0).all() else None

    def _move(self, lanes: Lanes, index: int, taken: Lanes, target: int) -> int | None:
        """Send ``taken`` to ``target`` and the rest of ``lanes`` to the next instruction."""
        n_taken = self.count(taken)
        if n_taken in {0, self.count(lanes)}:
            following = target if n_taken else index + 1
            self.pc[lanes] = following
            return following if isinstance(lanes, slice) else self._common()
        self.pc[lanes] = index + 1
        self.pc[taken] = target
        return None

    def _branch(self, step: _Step, index: int, lanes: Lanes, taken: Lanes) -> int | None:
        return self._move(lanes, index, taken, self.kernel.labels[step.instruction.operands[0]])

    def _indexed_branch(self, step: _Step, index: int, lanes: Lanes, taken: Lanes) -> int | None:
        selector, table = step.instruction.operands[:2]
        targets = np.array([self.kernel.labels[label] for label in self.kernel.branch_tables[table]])
        chosen = self.decoder.source(selector, TYPES["u32"])(self, taken)
        self.pc[lanes] = index + 1
        self.pc[taken] = targets[chosen]
        return self._common()

    def _return(self, step: _Step, index: int, lanes: Lanes, taken: Lanes) -> int | None:
        return self._move(lanes, index, taken, len(self.program))

    # -------------------------------------------------------------------------------------------------- barriers

    def _barrier(self, step: _Step, index: int, lanes: Lanes, active: Lanes) -> int | None:
        instruction = step.instruction
        known = {"sync", "red", "aligned", "cta", "popc", "and", "or", "pred", "u32"}
        if not set(instruction.modifiers) <= known:
            raise ExecutionError(f"this form of '{instruction.opcode}' is not known: {instruction.text}")
        self.pc[lanes] = index + 1
        number = _barrier_id(instruction)
        self.waiting[active] = number
        self.arrivals[index + 1] = instruction
        if isinstance(active, slice):
            self._release(number, self.everyone)
            return index + 1
        operands = instruction.operands
        counted = len(operands) > 1 and "red" not in instruction.modifiers
        expected = int(operands[1], 0) if counted else self.n_threads
        for block in np.unique(self.block_of[active]).tolist():
            members = np.arange(block * self.n_threads, (block + 1) * self.n_threads)
            arrived = members[self.waiting[members] == number]
            gone = int((self.pc[members] >= len(self.program)).sum()) if not counted else 0
            if len(arrived) + gone >= expected:
                self._check_arrivals(arrived, gone, instruction)
                self._release(number, arrived)
        return self._common()

    def _check_arrivals(self, arrived: np.ndarray, gone: int, instruction: Instruction) -> None:
        places = np.unique(self.pc[arrived])
        if len(places) > 1:
            others = ", ".join(str(self.arrivals[int(place)].source) for place in places)
            detail = f"the threads of one block wait at different barriers: {others}"
            self.issues.add("barrier", instruction, detail, topic="different")
        if gone:
            detail = f"{len(arrived)} of {self.n_threads} threads reach it, {gone} have returned"
            self.issues.add("barrier", instruction, detail, topic="returned")

    def _release(self, number: int, threads: np.ndarray) -> None:
        for place in np.unique(self.pc[threads]).tolist():
            instruction = self.arrivals[place]
            if "red" in instruction.modifiers:
                ops_warp.reduce_at_barrier(self, instruction, threads[self.pc[threads] == place])
        self.waiting[threads] = -1
        self.sync.barrier(number, threads, self.time)

    def _deadlock(self) -> None:
        stuck = np.nonzero(self.waiting >= 0)[0]
        places = {str(self.arrivals[int(place)].source) for place in np.unique(self.pc[stuck])}
        finished = int((self.pc >= len(self.program)).sum())
        message = f"{len(stuck)} threads wait at barriers ({', '.join(sorted(places))}), {finished} have returned"
        self.issues.add("barrier", self.arrivals[int(self.pc[stuck[0]])], f"deadlock: {message}", topic="deadlock")
        self.pc[stuck] = len(self.program)
        self.waiting[stuck] = -1


def _barrier_id(instruction: Instruction) -> int:
    operands = [text for text in instruction.operands if not text.startswith(("%p", "!"))]
    if "red" in instruction.modifiers:
        operands = operands[1:]
    return int(operands[0], 0) if operands else 0


def _is_block_barrier(step: _Step) -> bool:
    return step.run is None and step.instruction.opcode in {"bar", "barrier"}


def _crosses_blocks(instruction: Instruction) -> bool:
    """Whether an instruction can order accesses of different blocks."""
    words = {instruction.opcode, *instruction.modifiers}
    if instruction.opcode in {"fence", "membar"}:
        return "cta" not in words
    return bool(words & {"acquire", "release", "acq_rel"}) and "cta" not in words
