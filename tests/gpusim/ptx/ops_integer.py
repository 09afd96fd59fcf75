"""Integer arithmetic, logic, shifts and bit fields."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decoder import Decoder, Lanes, Run, opcode, require
from .parser import Instruction
from .types import TYPES, UNSIGNED, Type, type_of

__all__ = ["add_sub_mul", "div", "mad", "min_max", "unary"]


def _binary(decoder: Decoder, instruction: Instruction, function: Callable) -> Run:
    kind = type_of(instruction.modifiers)
    write = decoder.target(instruction.operands[0])
    x, y = (decoder.source(operand, kind) for operand in instruction.operands[1:3])
    return lambda m, lanes: write(m, lanes, function(x(m, lanes), y(m, lanes)))


def unary(decoder: Decoder, instruction: Instruction, function: Callable) -> Run:
    kind = type_of(instruction.modifiers)
    write, x = decoder.target(instruction.operands[0]), decoder.source(instruction.operands[1], kind)
    return lambda m, lanes: write(m, lanes, function(x(m, lanes)))


def min_max(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction)
    return _binary(decoder, instruction, np.minimum if instruction.opcode == "min" else np.maximum)


def high_product(x: np.ndarray, y: np.ndarray, kind: Type) -> np.ndarray:
    """Return the upper half of the double-width product."""
    if kind.size < 8:
        wide = kind.wide.dtype
        product = np.asarray(x).astype(wide) * np.asarray(y).astype(wide)
        return (product >> wide.type(kind.bits)).astype(kind.dtype)
    ux, uy = (np.asarray(value).astype(np.uint64) for value in (x, y))
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = ux & mask, ux >> half, uy & mask, uy >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    other = x0 * y1 + (middle & mask)
    high = x1 * y1 + (middle >> half) + (other >> half)
    if kind.kind == "s":  # undo reading the operands as unsigned
        high = high - np.where(np.asarray(x) < 0, uy, 0).astype(np.uint64)
        high = high - np.where(np.asarray(y) < 0, ux, 0).astype(np.uint64)
    return high.view(kind.dtype)


def add_sub_mul(decoder: Decoder, instruction: Instruction) -> Run:
    kind, modifiers, opcode_name = type_of(instruction.modifiers), instruction.modifiers, instruction.opcode
    if "cc" in modifiers:
        return _with_carry(decoder, instruction)
    if opcode_name == "mul":
        require(instruction, "lo", "hi", "wide")
        if "wide" in modifiers:
            wide = kind.wide.dtype
            return _binary(decoder, instruction, lambda x, y: x.astype(wide) * y.astype(wide))
        if "hi" in modifiers:
            return _binary(decoder, instruction, lambda x, y: high_product(x, y, kind))
        return _binary(decoder, instruction, np.multiply)
    require(instruction, "sat")
    function = np.add if opcode_name == "add" else np.subtract
    if "sat" in modifiers:
        limits = np.iinfo(kind.dtype)
        return _binary(
            decoder,
            instruction,
            lambda x, y: np.clip(function(x.astype(np.int64), y.astype(np.int64)), limits.min, limits.max).astype(
                kind.dtype
            ),
        )
    return _binary(decoder, instruction, function)


def _with_carry(decoder: Decoder, instruction: Instruction) -> Run:
    """Decode ``add.cc``, ``addc``, ``sub.cc``, ``subc``: sums that write and read the carry (or borrow) flag."""
    kind, name = type_of(instruction.modifiers), instruction.opcode
    require(instruction, "cc")
    raw = TYPES[f"u{kind.bits}"]
    write = decoder.target(instruction.operands[0])
    x, y = (decoder.source(operand, raw) for operand in instruction.operands[1:3])
    sets, uses, subtracts = "cc" in instruction.modifiers, name.endswith("c"), name.startswith("sub")

    def run(m, lanes: Lanes) -> None:
        a, b = x(m, lanes), y(m, lanes)
        carry = m.carry[lanes].astype(raw.dtype) if uses else raw.dtype.type(0)
        if subtracts:
            total = a - b - carry
            out = (a < b) | ((a == b) & (carry > 0))
        else:
            total = a + b + carry
            out = (total < a) | ((total == a) & (carry > 0) & (b != 0))
        if sets:
            m.carry[lanes] = out
        write(m, lanes, total)

    return run


opcode("addc", "subc")(_with_carry)


def mad(decoder: Decoder, instruction: Instruction) -> Run:
    kind = type_of(instruction.modifiers)
    require(instruction, "lo", "hi", "wide", "cc")
    wide = "wide" in instruction.modifiers
    write = decoder.target(instruction.operands[0])
    x, y = (decoder.source(operand, kind) for operand in instruction.operands[1:3])
    z = decoder.source(instruction.operands[3], kind.wide if wide else kind)
    high, sets, uses = "hi" in instruction.modifiers, "cc" in instruction.modifiers, instruction.opcode == "madc"
    raw = UNSIGNED[kind.size]

    def run(m, lanes: Lanes) -> None:
        a, b, c = x(m, lanes), y(m, lanes), z(m, lanes)
        if wide:
            write(m, lanes, a.astype(kind.wide.dtype) * b.astype(kind.wide.dtype) + c)
            return
        product = np.asarray(high_product(a, b, kind) if high else a * b).view(raw)
        carry = m.carry[lanes].astype(raw) if uses else raw.type(0)
        addend = np.asarray(c).view(raw)
        total = product + addend + carry
        if sets:
            m.carry[lanes] = (total < product) | ((total == product) & (carry > 0) & (addend != 0))
        write(m, lanes, total)

    return run


opcode("madc")(mad)


def div(decoder: Decoder, instruction: Instruction) -> Run:
    """Truncating division; by zero gives all ones, as the hardware does."""
    require(instruction)

    def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = np.broadcast_arrays(x, y)
        safe = np.where(y == 0, y.dtype.type(1), y)
        quotient = x // safe
        if x.dtype.kind == "i":  # numpy rounds down
            quotient = quotient + ((quotient < 0) & (quotient * safe != x)).astype(x.dtype)
        return np.where(y == 0, ~np.zeros(1, x.dtype), quotient)

    return _binary(decoder, instruction, divide)


@opcode("rem")
def _rem(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction)

    def remainder(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        y = np.asarray(y)
        return np.where(y == 0, x, np.fmod(x, np.where(y == 0, y.dtype.type(1), y)))

    return _binary(decoder, instruction, remainder)


# ------------------------------------------------------------------------------------------------------- logic


@opcode("and", "or", "xor")
def _logic(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction)
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return _binary(decoder, instruction, functions[instruction.opcode])


@opcode("not")
def _not(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction)
    return unary(decoder, instruction, np.invert)


@opcode("cnot")
def _cnot(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction)
    return unary(decoder, instruction, lambda x: (x == 0).astype(x.dtype))


@opcode("lop3")
def _lop3(decoder: Decoder, instruction: Instruction) -> Run:
    """Any function of three bits: bit ``4 a + 2 b + c`` of the table is its value."""
    require(instruction)
    kind = TYPES["b32"]
    write = decoder.target(instruction.operands[0])
    reads = [decoder.source(operand, kind) for operand in instruction.operands[1:4]]
    table = int(instruction.operands[4], 0)

    def run(m, lanes: Lanes) -> None:
        a, b, c = (np.asarray(read(m, lanes)) for read in reads)
        result = np.zeros(m.count(lanes), np.uint32)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        write(m, lanes, result)

    return run


@opcode("shl", "shr")
def _shift(decoder: Decoder, instruction: Instruction) -> Run:
    """Shifts by at least the width give zero, or the sign."""
    require(instruction)
    kind = type_of(instruction.modifiers)
    write = decoder.target(instruction.operands[0])
    x, by = decoder.source(instruction.operands[1], kind), decoder.source(instruction.operands[2], TYPES["u32"])
    left, last = instruction.opcode == "shl", kind.bits - 1
    signed = kind.kind == "s"

    def run(m, lanes: Lanes) -> None:
        value, amount = x(m, lanes), by(m, lanes)
        capped = np.minimum(amount, last).astype(kind.dtype)
        result = value << capped if left else value >> capped
        if left or not signed:
            result = np.where(amount > last, kind.dtype.type(0), result)
        write(m, lanes, result)

    return run


@opcode("shf")
def _funnel_shift(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, "l", "r", "wrap", "clamp")
    write = decoder.target(instruction.operands[0])
    low, high, by = (decoder.source(operand, TYPES["u32"]) for operand in instruction.operands[1:4])
    right, wrap = "r" in instruction.modifiers, "wrap" in instruction.modifiers

    def run(m, lanes: Lanes) -> None:
        pair = (np.asarray(high(m, lanes)).astype(np.uint64) << np.uint64(32)) | low(m, lanes)
        amount = np.asarray(by(m, lanes)).astype(np.uint64)
        amount = amount & np.uint64(31) if wrap else np.minimum(amount, np.uint64(32))
        shifted = pair >> amount if right else (pair << amount) >> np.uint64(32)
        write(m, lanes, shifted.astype(np.uint32))

    return run


# -------------------------------------------------------------------------------------------------- bit fields


@opcode("bfe")
def _bit_field_extract(decoder: Decoder, instruction: Instruction) -> Run:
    """Take ``length`` bits from ``position``; signed types extend the last bit of the field (or of the value)."""
    require(instruction)
    kind = type_of(instruction.modifiers)
    write = decoder.target(instruction.operands[0])
    x = decoder.source(instruction.operands[1], kind)
    position, length = (decoder.source(operand, TYPES["u32"]) for operand in instruction.operands[2:4])
    raw, width = UNSIGNED[kind.size], kind.bits

    def run(m, lanes: Lanes) -> None:
        value = np.asarray(x(m, lanes)).view(raw)
        start = (np.asarray(position(m, lanes)) & 255).astype(np.int64)
        count = (np.asarray(length(m, lanes)) & 255).astype(np.int64)
        shifted = np.where(start < width, value >> np.minimum(start, width - 1).astype(raw), raw.type(0))
        taken = np.clip(width - start, 0, count)  # bits of the field that lie inside the value
        mask = np.where(taken >= width, ~raw.type(0), (raw.type(1) << np.minimum(taken, width - 1).astype(raw)) - 1)
        field = shifted & mask.astype(raw)
        if kind.kind == "s":
            last = np.minimum(start + count - 1, width - 1).astype(raw)
            sign = (value >> last) & raw.type(1)
            field = np.where((count > 0) & (sign > 0), field | ~mask.astype(raw), field)
        write(m, lanes, field.astype(raw))

    return run


@opcode("bfi")
def _bit_field_insert(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction)
    kind = type_of(instruction.modifiers)
    write = decoder.target(instruction.operands[0])
    x, y = (decoder.source(operand, kind) for operand in instruction.operands[1:3])
    position, length = (decoder.source(operand, TYPES["u32"]) for operand in instruction.operands[3:5])
    raw, width = UNSIGNED[kind.size], kind.bits

    def run(m, lanes: Lanes) -> None:
        start = (np.asarray(position(m, lanes)) & 255).astype(np.int64)
        count = (np.asarray(length(m, lanes)) & 255).astype(np.int64)
        ones = np.where(count >= width, ~raw.type(0), (raw.type(1) << np.minimum(count, width - 1).astype(raw)) - 1)
        shift = np.minimum(start, width - 1).astype(raw)
        mask = np.where(start < width, ones.astype(raw) << shift, raw.type(0))
        write(m, lanes, ((x(m, lanes) << shift) & mask) | (y(m, lanes) & ~mask))

    return run


@opcode("prmt")
def _permute_bytes(decoder: Decoder, instruction: Instruction) -> Run:
    """Pick four bytes of the pair {b, a}; bit 3 of a selector replicates the byte's sign instead."""
    require(instruction)
    write = decoder.target(instruction.operands[0])
    reads = [decoder.source(operand, TYPES["b32"]) for operand in instruction.operands[1:4]]

    def run(m, lanes: Lanes) -> None:
        count = m.count(lanes)
        a, b, selector = (np.broadcast_to(np.asarray(read(m, lanes)), (count,)) for read in reads)
        pair = np.ascontiguousarray(np.stack([a, b], 1)).view(np.uint8)  # (count, 8)
        result = np.empty((count, 4), np.uint8)
        for byte in range(4):
            choice = (selector >> np.uint32(4 * byte)) & np.uint32(15)
            value = pair[np.arange(count), choice & 7]
            result[:, byte] = np.where(choice & 8, np.where(value & 0x80, 255, 0), value)
        write(m, lanes, result.view(np.uint32)[:, 0])

    return run


def _leading_zeros(x: np.ndarray) -> np.ndarray:
    """Count leading zeros by smearing the highest one bit downwards."""
    bits = 8 * x.dtype.itemsize
    shift = 1
    while shift < bits:
        x = x | (x >> x.dtype.type(shift))
        shift *= 2
    return (bits - np.bitwise_count(x)).astype(np.uint32)


def _reverse_bits(x: np.ndarray) -> np.ndarray:
    size = x.dtype.itemsize
    flipped = np.ascontiguousarray(x).view(np.uint8).reshape(-1, size)[:, ::-1]
    bits = np.unpackbits(flipped, axis=1).reshape(-1, size, 8)[:, :, ::-1]
    return np.packbits(bits.reshape(-1, 8 * size), axis=1).view(x.dtype)[:, 0]


@opcode("popc", "clz", "brev", "bfind")
def _bit_counts(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, "shiftamt") if instruction.opcode == "bfind" else require(instruction)
    kind = type_of(instruction.modifiers)
    if instruction.opcode == "bfind" and (kind.kind == "s" or "shiftamt" in instruction.modifiers):
        raise KeyError("signed or shiftamt")
    last = np.uint32(kind.bits - 1)
    functions: dict[str, Callable] = {
        "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
        "clz": _leading_zeros,
        "brev": _reverse_bits,
        "bfind": lambda x: np.where(x == 0, np.uint32(0xFFFFFFFF), last - _leading_zeros(x)),
    }
    function = functions[instruction.opcode]
    return unary(decoder, instruction, lambda x: function(np.atleast_1d(x)))
