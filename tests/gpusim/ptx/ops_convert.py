"""Moves, conversions, and instructions without an effect here."""

from __future__ import annotations

import numpy as np

from .access import space_of
from .decoder import Decoder, Lanes, Run, opcode, require
from .memory import LOCAL_BASE, SHARED_BASE
from .numeric import flush_subnormals, round_to_half
from .parser import Instruction
from .types import TYPES, UNSIGNED, Type, type_of


@opcode("mov")
def _mov(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction)
    kind = type_of(instruction.modifiers)
    target, source = instruction.operands
    if source.startswith("{"):
        return _pack(decoder, target, source, kind)
    if target.startswith("{"):
        return _unpack(decoder, target, source, kind)
    write, read = decoder.target(target), decoder.source(source, kind)
    return lambda m, lanes: write(m, lanes, read(m, lanes))


def _pack(decoder: Decoder, target: str, source: str, kind: Type) -> Run:
    names = decoder.group(source)
    part = TYPES[f"b{kind.bits // len(names)}"]
    write, reads = decoder.target(target), [decoder.source(name, part) for name in names]

    def run(m, lanes: Lanes) -> None:
        parts = [np.broadcast_to(np.asarray(read(m, lanes)), (m.count(lanes),)) for read in reads]
        write(m, lanes, np.ascontiguousarray(np.stack(parts, 1)).view(kind.raw)[:, 0])

    return run


def _unpack(decoder: Decoder, target: str, source: str, kind: Type) -> Run:
    names = decoder.group(target)
    part = UNSIGNED[kind.size // len(names)]
    read, writes = decoder.source(source, kind), [decoder.target(name) for name in names]

    def run(m, lanes: Lanes) -> None:
        whole = np.broadcast_to(np.asarray(read(m, lanes)), (m.count(lanes),))
        parts = np.ascontiguousarray(whole).view(part).reshape(-1, len(names)).copy()
        for index, write in enumerate(writes):
            write(m, lanes, parts[:, index])

    return run


@opcode("cvta")
def _cvta(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, "to", "global", "shared", "local", "const", "param", "shared::cta")
    kind = type_of(instruction.modifiers)
    base = np.uint64({"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space_of(instruction), 0))
    write, read = decoder.target(instruction.operands[0]), decoder.source(instruction.operands[1], kind)
    if "to" in instruction.modifiers:
        return lambda m, lanes: write(m, lanes, read(m, lanes) - base)
    return lambda m, lanes: write(m, lanes, read(m, lanes) + base)


_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_DIRECTED = {"rz", "rm", "rp"}


@opcode("cvt")
def _cvt(decoder: Decoder, instruction: Instruction) -> Run:
    """Convert between any two types; ``cvt.rn.f16x2.f32 d, high, low`` packs a pair."""
    require(instruction, *_TO_INTEGER, *_DIRECTED, "rn", "rna", "ftz", "sat", "relu", "satfinite")
    made, given = [TYPES[word] for word in instruction.modifiers if word in TYPES][:2]
    modifiers = set(instruction.modifiers)
    if len(instruction.operands) == 3:
        return _convert_pair(decoder, instruction, made)
    if made.kind == "h" and modifiers & _DIRECTED:
        raise KeyError(f"directed rounding to {made.name}")
    read = decoder.float_source(instruction.operands[1], given)
    write = decoder.target(instruction.operands[0])

    def run(m, lanes: Lanes) -> None:
        values = np.asarray(read(m, lanes))
        if "ftz" in modifiers and values.dtype == np.float32:
            values = flush_subnormals(values)
        for name in _TO_INTEGER.keys() & modifiers:
            values = _TO_INTEGER[name](values)
        write(m, lanes, _converted(values, made, modifiers))

    return run


def _convert_pair(decoder: Decoder, instruction: Instruction, made: Type) -> Run:
    if made.name not in {"f16x2", "bf16x2"} or _DIRECTED & set(instruction.modifiers):
        raise KeyError(f"a pair of {made.name}")
    write = decoder.target(instruction.operands[0])
    high, low = (decoder.source(operand, TYPES["f32"]) for operand in instruction.operands[1:3])
    relu = "relu" in instruction.modifiers

    def run(m, lanes: Lanes) -> None:
        shape = (m.count(lanes),)
        pair = np.stack([np.broadcast_to(np.asarray(read(m, lanes)), shape) for read in (low, high)], 1)
        write(m, lanes, round_to_half(np.maximum(pair, 0) if relu else pair, made))

    return run


def _converted(values: np.ndarray, made: Type, modifiers: set[str]) -> np.ndarray:
    if made.name == "tf32":  # rna: to nearest, ties away from zero
        bits = values.astype(np.float32).view(np.uint32)
        return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    if not made.is_float:
        return _to_integer(values, made, "sat" in modifiers)
    if "sat" in modifiers:
        values = np.clip(np.where(np.isnan(values), 0, values), 0, 1)
    if "relu" in modifiers:
        values = np.maximum(values, 0)
    if made.kind == "h":
        return round_to_half(values if values.dtype.kind == "f" else values.astype(np.float64), made)
    directed = next(iter(modifiers & _DIRECTED), None)
    return _directed(values, made, directed) if directed else values.astype(made.dtype)


def _directed(values: np.ndarray, made: Type, direction: str) -> np.ndarray:
    """Round toward zero, minus infinity or plus infinity by stepping back from the nearest value."""
    nearest = values.astype(made.dtype)
    if values.dtype.kind == "f":
        back = nearest.astype(np.float64)
        below, above = back < values, back > values
    else:  # integers beyond 2^53 need exact comparison
        back = np.array([int(value) for value in nearest.reshape(-1).tolist()], object).reshape(nearest.shape)
        exact = values.astype(object)
        below, above = (back < exact).astype(bool), (back > exact).astype(bool)
    down = above & ((direction == "rm") | ((direction == "rz") & (values > 0)))
    up = below & ((direction == "rp") | ((direction == "rz") & (values < 0)))
    stepped = np.where(down, np.nextafter(nearest, made.dtype.type(-np.inf)), nearest)
    return np.where(up, np.nextafter(nearest, made.dtype.type(np.inf)), stepped)


def _to_integer(values: np.ndarray, made: Type, saturate: bool) -> np.ndarray:
    limits = np.iinfo(made.dtype)
    if values.dtype.kind == "f":  # floats always saturate, NaN gives zero
        wide = np.where(np.isnan(values), 0, values).astype(np.float64)
        inside = (wide > float(limits.min)) & (wide < float(limits.max))
        result = np.where(wide <= float(limits.min), limits.min, limits.max).astype(made.dtype)
        return np.where(inside, np.where(inside, wide, 0).astype(made.dtype), result)
    if saturate:
        low = max(limits.min, np.iinfo(values.dtype).min)
        high = min(limits.max, np.iinfo(values.dtype).max)
        values = np.clip(values, low, high)
    return values.astype(made.dtype)


@opcode("nanosleep", "prefetch", "prefetchu", "griddepcontrol", "discard", "applypriority", "pmevent")
def _nothing(decoder: Decoder, instruction: Instruction) -> Run:
    return lambda m, lanes: None


@opcode("createpolicy")
def _createpolicy(decoder: Decoder, instruction: Instruction) -> Run:
    write = decoder.target(instruction.operands[0])
    return lambda m, lanes: write(m, lanes, np.uint64(0))


@opcode("trap", "brkpt")
def _trap(decoder: Decoder, instruction: Instruction) -> Run:
    def run(m, lanes: Lanes) -> None:
        detail = f"reached by {m.checker.who(int(m.threads(lanes)[0]))}"
        m.issues.add("trap", instruction, detail, count=m.count(lanes))

    return run
