"""Loads, stores, atomics and fences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .access import VECTORS, Access, space_of
from .decoder import Decoder, Lanes, Run, opcode, require
from .memory import INITIALISED, VALID
from .numeric import round_to_half, widen_half
from .parser import Instruction
from .races import CTA, GPU, WEAK
from .types import Type, type_of

SPACES = ("global", "shared", "shared::cta", "local", "param", "const")
CACHE_HINTS = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"),
    *("L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate"),
    *("L2::evict_normal", "L2::evict_first", "L2::evict_last", "entry"),
)
SCOPES = ("cta", "gpu", "sys")


def strength_of(instruction: Instruction) -> int:
    """Return how wide a scope an access is atomic in."""
    modifiers = set(instruction.modifiers)
    if instruction.opcode in {"atom", "red"}:
        return CTA if "cta" in modifiers else GPU
    if modifiers & {"volatile", "relaxed", "acquire", "release", "mmio"}:
        return CTA if "cta" in modifiers else GPU
    return WEAK


def _count(m, kind: str, access: Access, size: int) -> None:
    if not m.options.count:
        return
    if access.arena.name == "global":
        m.counters.count_global(kind, access.offsets, size, m.warp[access.threads])
    elif access.arena.name == "shared":
        m.counters.count_shared(kind, access.offsets, size, m.warp[access.threads])


def _synchronise(m, access: Access, instruction: Instruction, strength: int, order: np.ndarray | None = None) -> None:
    """Let strong reads learn what was released at their location, and strong writes release, lane by lane in order."""
    if not (m.sync.cross_block and strength == GPU and access.arena.name == "global"):
        return
    reads, writes = instruction.opcode in {"ld", "atom", "red"}, instruction.opcode in {"st", "atom", "red"}
    acquire = bool({"acquire", "acq_rel"} & set(instruction.modifiers))
    if {"release", "acq_rel"} & set(instruction.modifiers):
        m.sync.fence(access.threads, m.time)
    some = slice(None) if order is None else order
    for thread, offset in zip(access.threads[some].tolist(), access.offsets[some].tolist(), strict=True):
        if reads:
            m.sync.read_location(thread, offset, acquire=acquire)
        if writes:
            m.sync.write_location(thread, offset, keep=reads)


# ---------------------------------------------------------------------------------------------- loads and stores


@opcode("ld", "ldu")
def _ld(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, *SPACES, *CACHE_HINTS, *SCOPES, *VECTORS, "volatile", "relaxed", "acquire", "weak")
    kind, space, strength = type_of(instruction.modifiers), space_of(instruction), strength_of(instruction)
    writes = [decoder.target(name) for name in decoder.group(instruction.operands[0])]
    address = decoder.address(instruction.operands[1], space)
    width = kind.size * len(writes)
    constant = "nc" in instruction.modifiers

    def run(m, lanes: Lanes) -> None:
        count = m.count(lanes)
        parts = m.checker.resolve(space, address(m, lanes), width, instruction, lanes)
        for access in parts:
            m.checker.check_read(access, width, instruction, strength)
            if constant:
                m.checker.check_unwritten(access, width, instruction)
            _count(m, "load", access, width)
            if strength:
                _synchronise(m, access, instruction, strength)
        for index, write in enumerate(writes):
            shift = index * kind.size
            if len(parts) == 1 and parts[0].kept is None:
                values = parts[0].arena.load(parts[0].offsets + shift, kind.size)
            else:
                values = np.zeros(count, kind.raw)
                for access in parts:
                    chosen = slice(None) if access.kept is None else access.kept
                    values[chosen] = access.arena.load(access.offsets + shift, kind.size)
            write(m, lanes, values.view(kind.dtype))

    return run


@opcode("st")
def _st(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, *SPACES, *CACHE_HINTS, *SCOPES, *VECTORS, "volatile", "relaxed", "release", "weak")
    kind, space, strength = type_of(instruction.modifiers), space_of(instruction), strength_of(instruction)
    if space == "param":
        raise KeyError("the call of a function that is not inlined")
    reads = [decoder.source(name, kind) for name in decoder.group(instruction.operands[1])]
    address = decoder.address(instruction.operands[0], space)
    width = kind.size * len(reads)

    def run(m, lanes: Lanes) -> None:
        count = m.count(lanes)
        for access in m.checker.resolve(space, address(m, lanes), width, instruction, lanes):
            m.checker.check_write(access, width, instruction, strength)
            _count(m, "store", access, width)
            chosen = slice(None) if access.kept is None else access.kept
            for index, read in enumerate(reads):
                values = np.broadcast_to(np.asarray(read(m, lanes)), (count,))[chosen].view(kind.raw)
                offsets = access.offsets + index * kind.size
                if not access.arena.store(offsets, values) and m.checker.enabled:
                    m.checker.report_same_instruction(access, values, offsets, instruction)
            access.arena.mark(access.offsets, width, VALID | INITIALISED)
            if strength:
                _synchronise(m, access, instruction, strength)

    return run


# ------------------------------------------------------------------------------------------------------- atomics


def _half_add(kind: Type) -> Callable[..., np.ndarray]:
    return lambda old, value, _: round_to_half(widen_half(old, kind) + widen_half(value, kind), kind)


_UPDATES: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda old, value, _: old + value,
    "min": lambda old, value, _: np.minimum(old, value),
    "max": lambda old, value, _: np.maximum(old, value),
    "and": lambda old, value, _: old & value,
    "or": lambda old, value, _: old | value,
    "xor": lambda old, value, _: old ^ value,
    "exch": lambda old, value, _: value,
    "cas": lambda old, compare, value: np.where(old == compare, value, old),
    "inc": lambda old, value, _: np.where(old >= value, 0, old + 1).astype(old.dtype),
    "dec": lambda old, value, _: np.where((old == 0) | (old > value), value, old - 1).astype(old.dtype),
}


@opcode("atom", "red")
def _atom(decoder: Decoder, instruction: Instruction) -> Run:
    """Read-modify-write, lanes in order; with fuzz in random order, as float sums on a device come."""
    require(
        instruction, *SPACES, *SCOPES, *_UPDATES, "relaxed", "acquire", "release", "acq_rel", "noftz", "L2::cache_hint"
    )
    kind, space, strength = type_of(instruction.modifiers), space_of(instruction), strength_of(instruction)
    name = next(word for word in instruction.modifiers if word in _UPDATES)
    if kind.kind == "h" and name != "add":
        raise KeyError(f"{name} of {kind.name}")
    update = _half_add(kind) if kind.kind == "h" else _UPDATES[name]
    returns = instruction.opcode == "atom"
    operands = instruction.operands if returns else ("_", *instruction.operands)
    write, address = decoder.target(operands[0]), decoder.address(operands[1], space)
    first = decoder.source(operands[2], kind)
    second = decoder.source(operands[3], kind) if name == "cas" else first

    def run(m, lanes: Lanes) -> None:
        count = m.count(lanes)
        values, others = (np.broadcast_to(np.asarray(read(m, lanes)), (count,)) for read in (first, second))
        results = np.zeros(count, kind.raw)
        for access in m.checker.resolve(space, address(m, lanes), kind.size, instruction, lanes):
            m.checker.check_ready(access, kind.size, instruction)
            m.checker.check_write(access, kind.size, instruction, strength)
            _count(m, "atomic", access, kind.size)
            chosen = np.arange(count) if access.kept is None else access.kept
            for turn in _turns(m, access.offsets):
                _synchronise(m, access, instruction, strength, turn)
                some = chosen[turn]
                old = access.arena.load(access.offsets[turn], kind.size)
                results[some] = old
                new = update(old.view(kind.dtype), values[some], others[some])
                access.arena.store(access.offsets[turn], np.ascontiguousarray(new).view(kind.raw))
            access.arena.mark(access.offsets, kind.size, VALID | INITIALISED)
        if returns:
            write(m, lanes, results.view(kind.dtype))

    return run


def _turns(m, offsets: np.ndarray) -> list[np.ndarray]:
    """Split lanes into turns without two of the same address; the n-th lane of an address goes in turn n."""
    order = m.rng.permutation(len(offsets)) if m.options.fuzz_ulp > 0 else np.arange(len(offsets))
    by_address = order[np.argsort(offsets[order], kind="stable")]
    fresh = np.diff(offsets[by_address], prepend=-1) != 0
    position = np.arange(len(offsets))
    rank = position - np.maximum.accumulate(np.where(fresh, position, 0))
    if not rank.any():
        return [by_address]
    by_turn = np.argsort(rank, kind="stable")
    return np.split(by_address[by_turn], np.cumsum(np.bincount(rank))[:-1])


# -------------------------------------------------------------------------------------------------------- fences


@opcode("fence", "membar")
def _fence(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, *SCOPES, "sc", "acq_rel", "acquire", "release", "gl", "proxy", "async")
    if "proxy" in instruction.modifiers:
        raise KeyError("proxy fences")
    if "cta" in instruction.modifiers:
        return lambda m, lanes: None
    return lambda m, lanes: m.sync.fence(m.threads(lanes), m.time)
