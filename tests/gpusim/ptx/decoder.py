"""Turns operands into functions that read and write registers, once per kernel rather than once per step."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .numeric import round_to_half, widen_half
from .parser import Instruction, Kernel, Variable, split_operands
from .report import ExecutionError
from .types import TYPES, Type

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["OPCODES", "Decoder", "Lanes", "Run", "opcode", "require"]

Lanes = slice | np.ndarray  # slice(None) for all threads of the batch, or their sorted indices
Run = Callable[["Machine", Lanes], None]
Read = Callable[["Machine", Lanes], np.ndarray]
Write = Callable[["Machine", Lanes, np.ndarray], None]

OPCODES: dict[str, Callable[[Decoder, Instruction], Run]] = {}

SPECIAL_REGISTERS = frozenset(
    [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
    + [f"%lanemask_{order}" for order in ("eq", "lt", "le", "gt", "ge")]
    + ["%laneid", "%warpid", "%nwarpid", "%dynamic_smem_size", "%total_smem_size", "%clock", "%clock64", "%globaltimer"]
)

SHARED_GUARD = 128  # between two shared variables; all banks once, so that a guard moves none of them

_HEX_FLOAT = re.compile(r"(-?)0[fF]([0-9a-fA-F]{8})|(-?)0[dD]([0-9a-fA-F]{16})")
_ADDRESS = re.compile(r"([%\w$@.]+?)\s*(?:\+\s*(-?\w+))?$")


def opcode(*names: str) -> Callable:
    """Register a decoder: a function of (decoder, instruction) that returns what one step does."""

    def register(function: Callable[[Decoder, Instruction], Run]) -> Callable[[Decoder, Instruction], Run]:
        for name in names:
            OPCODES[name] = function
        return function

    return register


def require(instruction: Instruction, *known: str) -> None:
    """Refuse an instruction with a modifier that is neither a type nor among the known ones.

    Raises:
        KeyError: Naming the modifiers; :meth:`Decoder.decode` turns it into an error that names the instruction.
    """
    unknown = [name for name in instruction.modifiers if name not in TYPES and name not in known]
    if unknown:
        raise KeyError(f"modifier .{' .'.join(unknown)}")


class Decoder:
    """Knows where the registers, parameters and variables of a kernel are.

    Args:
        kernel: The kernel.
        global_addresses: Address of each module-scope variable in device memory.

    Attributes:
        shared_bytes: Where dynamic shared memory begins: the static variables and the guards between them.
        shared_holes: First byte, and the one after the last, of what lies between the variables.
    """

    def __init__(self, kernel: Kernel, global_addresses: dict[str, int]) -> None:
        self.kernel = kernel
        self.slots = {name: slot for slot, name in enumerate(kernel.registers)}
        self.types = list(kernel.registers.values())
        self.parameter_offsets: dict[str, int] = {}
        size = 0
        for parameter in kernel.parameters:
            size = -(-size // parameter.align) * parameter.align
            self.parameter_offsets[parameter.name] = size
            size += parameter.nbytes
        self.parameter_bytes = size
        shared, self.shared_bytes = _lay_out(list(kernel.shared.values()), SHARED_GUARD)
        spans = sorted((offset, offset + kernel.shared[name].nbytes) for name, offset in shared.items())
        following = [*(first for first, _ in spans[1:]), self.shared_bytes]
        self.shared_holes = [(end, start) for (_, end), start in zip(spans, following, strict=False) if end < start]
        local, self.local_bytes = _lay_out(list(kernel.local.values()))
        self.symbols = {**self.parameter_offsets, **shared, **local, **global_addresses}
        self.local_names = set(local)

    def decode(self, instruction: Instruction) -> Run:
        decode = OPCODES.get(instruction.opcode)
        if decode is None:
            raise ExecutionError(
                f"opcode '{instruction.opcode}' is not known to the executor, at {_where(instruction)}"
            )
        try:
            return decode(self, instruction)
        except (KeyError, IndexError, ValueError, StopIteration) as error:
            raise ExecutionError(
                f"this form of '{instruction.opcode}' is not known ({error!r}), at {_where(instruction)}"
            ) from error

    # ------------------------------------------------------------------------------------------------ operands

    def source(self, text: str, kind: Type) -> Read:
        """Return a reader of an operand as values of the given type, an array or a scalar for constants."""
        if text in self.slots:
            return self._register_source(text, kind)
        if text.startswith("!"):
            inner = self.source(text[1:], kind)
            return lambda m, lanes: ~inner(m, lanes)
        if text.startswith("%"):
            if text not in SPECIAL_REGISTERS:
                raise KeyError(f"register {text}")
            return lambda m, lanes: m.special[text][lanes].astype(kind.raw).view(kind.dtype)
        value = self.constant(text, kind)
        return lambda m, lanes: value

    def _register_source(self, text: str, kind: Type) -> Read:
        slot, declared, raw, dtype = self.slots[text], self.types[self.slots[text]], kind.raw, kind.dtype
        if kind.kind == "p" or declared.size == kind.size:
            return lambda m, lanes: m.registers[slot][lanes].view(dtype)
        return lambda m, lanes: m.registers[slot][lanes].astype(raw).view(dtype)

    def constant(self, text: str, kind: Type) -> np.generic:
        """Return the value of an immediate, a variable's address or WARP_SZ."""
        if kind.kind == "p":
            return np.bool_(int(text, 0))
        if text in self.symbols:
            return kind.raw.type(self.symbols[text])
        if text == "WARP_SZ":
            return kind.dtype.type(32)
        if match := _HEX_FLOAT.fullmatch(text):
            if match[2]:
                value = np.uint32(int(match[2], 16)).view(np.float32)
                value = -value if match[1] else value
            else:
                value = np.uint64(int(match[4], 16)).view(np.float64)
                value = -value if match[3] else value
            return value.view(kind.dtype) if value.itemsize == kind.size else kind.dtype.type(value)
        if "." in text:
            return kind.dtype.type(float(text))
        bits = int(text.rstrip("U"), 0) & ((1 << kind.bits) - 1)
        return kind.raw.type(bits).view(kind.dtype)

    def target(self, text: str) -> Write:
        """Return a writer of a register; narrower signed values are sign-extended, unsigned ones zero-extended."""
        if text == "_":
            return lambda m, lanes, values: None
        slot = self.slots[text]
        declared = self.types[slot]
        raw, size = declared.raw, declared.size

        def write(m: Machine, lanes: Lanes, values: np.ndarray) -> None:
            values = np.asarray(values)
            if values.dtype.itemsize != size:
                if values.dtype.kind == "i":
                    values = values.astype(f"i{size}")
                elif values.dtype.kind == "f":
                    values = values.view(f"u{values.dtype.itemsize}").astype(raw)
            m.registers[slot][lanes] = values.astype(raw, copy=False) if values.dtype.kind in "ub" else values.view(raw)

        return write

    def float_source(self, text: str, kind: Type) -> Read:
        """Return a reader in the type that arithmetic runs in: float32 for 16-bit formats, ``(n, 2)`` for pairs."""
        read = self.source(text, kind)
        return (lambda m, lanes: widen_half(read(m, lanes), kind)) if kind.kind == "h" else read

    def float_target(self, text: str, kind: Type) -> Write:
        """Return a writer that rounds to the type."""
        write = self.target(text)
        if kind.kind == "h":
            return lambda m, lanes, values: write(m, lanes, round_to_half(values, kind))
        dtype = kind.dtype
        return lambda m, lanes, values: write(m, lanes, np.asarray(values).astype(dtype, copy=False))

    def predicate(self, text: str) -> Read:
        return self.source(text, TYPES["pred"])

    def address(self, text: str, space: str) -> Read:
        """Return a reader of ``[register + offset]`` as int64 within the named space (or as a generic address)."""
        match = _ADDRESS.match(text.strip("[] "))
        if match is None:
            raise ValueError(text)
        base, offset = match[1], int(match[2] or "0", 0)
        if base in self.parameter_offsets:
            value = np.int64(self.parameter_offsets[base] + offset)
            return lambda m, lanes: np.full(m.count(lanes), value)
        if base not in self.slots:
            value = np.int64((self.symbols[base] if base in self.symbols else int(base, 0)) + offset)
            return lambda m, lanes: np.full(m.count(lanes), value)
        wide = self.types[self.slots[base]].size == 8
        read = self.source(base, TYPES["u64" if wide else "u32"])
        return lambda m, lanes: read(m, lanes).astype(np.int64) + offset

    @staticmethod
    def group(text: str) -> tuple[str, ...]:
        """Return the registers of ``{a, b}``, or of a single one."""
        return split_operands(text.strip("{} ")) if text.startswith("{") else (text,)


def _where(instruction: Instruction) -> str:
    return f"PTX line {instruction.line} ({instruction.source}): {instruction.text}"


def _lay_out(variables: list[Variable], guard: int = 0) -> tuple[dict[str, int], int]:
    """Return the offset of every variable, and the size; dynamic variables all begin where the others end.

    Args:
        variables: Of one state space.
        guard: Bytes between one variable and the next that belong to none.
    """
    offsets, size = {}, 0
    for variable in (v for v in variables if not v.dynamic):
        size = _round_up(size + (guard if size else 0), variable.align)
        offsets[variable.name] = size
        size += variable.nbytes
    dynamic = [v.name for v in variables if v.dynamic]
    if dynamic:
        size = _round_up(size + (guard if size else 0), 16)
    return {**offsets, **dict.fromkeys(dynamic, size)}, size


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
