"""Warp primitives: shuffles, votes, reductions, warp barriers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .decoder import Decoder, Lanes, Run, opcode, require
from .parser import Instruction
from .report import ExecutionError
from .types import TYPES, type_of

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["full_warps", "reduce_at_barrier"]


def full_warps(m: Machine, lanes: Lanes, instruction: Instruction) -> np.ndarray:
    """Return the threads of an instruction as ``(warps, 32)``.

    Raises:
        ExecutionError: If a warp takes part with only some of its lanes.
    """
    threads = m.threads(lanes)
    if len(threads) % 32 == 0:
        warps = threads.reshape(-1, 32)
        if (m.lane[warps] == np.arange(32)).all() and (m.warp[warps] == m.warp[warps[:, :1]]).all():
            return warps
    raise ExecutionError(
        f"a whole warp must execute this together, some lanes are missing: {instruction.source}, PTX line "
        f"{instruction.line}: {instruction.text}"
    )


def _check_mask(m: Machine, threads: np.ndarray, mask: np.ndarray, instruction: Instruction) -> None:
    """Report lanes that are not in their own mask, and lanes of the mask that are not here."""
    if len(threads) == m.size and m.n_threads % 32 == 0 and (np.asarray(mask) == 0xFFFFFFFF).all():
        return  # whole warps that name all of their lanes
    lanes = m.lane[threads].astype(np.uint32)
    mask = np.broadcast_to(np.asarray(mask), threads.shape).astype(np.uint32)
    outside = (mask >> lanes & np.uint32(1)) == 0
    if outside.any():
        first = int(np.argmax(outside))
        detail = f"lane {lanes[first]} is not in its own member mask {mask[first]:#010x}"
        m.issues.add("shuffle", instruction, detail, topic="own lane", count=int(outside.sum()))
    present = np.zeros(int(m.warp[-1]) + 1, np.uint32)
    np.bitwise_or.at(present, m.warp[threads], np.uint32(1) << lanes)
    in_warp = np.minimum(m.n_threads - (m.rank[threads] // 32) * 32, 32)  # lanes that exist in a partial warp
    exist = np.where(in_warp == 32, np.uint32(0xFFFFFFFF), (np.uint32(1) << (in_warp % 32).astype(np.uint32)) - 1)
    missing = mask & exist.astype(np.uint32) & ~present[m.warp[threads]]
    if missing.any():
        first = int(np.argmax(missing != 0))
        detail = f"lanes {missing[first]:#010x} of the member mask {mask[first]:#010x} do not take part"
        m.issues.add("shuffle", instruction, detail, topic="absent", count=int((missing != 0).sum()))


@opcode("shfl")
def _shfl(decoder: Decoder, instruction: Instruction) -> Run:
    """Read another lane's value. ``c`` holds the clamp (bits 0-4) and the segment mask (bits 8-12)."""
    require(instruction, "sync", "up", "down", "bfly", "idx")
    mode = instruction.modifiers[1]
    names = instruction.operands[0].split("|")
    writes = [decoder.target(names[0])] + ([decoder.target(names[1])] if len(names) > 1 else [])
    value = decoder.source(instruction.operands[1], TYPES["b32"])
    by, clamp, mask = (decoder.source(operand, TYPES["u32"]) for operand in instruction.operands[2:5])

    def run(m, lanes: Lanes) -> None:
        threads = m.threads(lanes)
        count = len(threads)
        values = np.broadcast_to(np.asarray(value(m, lanes)), (count,))
        b, c = (np.asarray(read(m, lanes)).astype(np.int64) for read in (by, clamp))
        b = b & 31  # the hardware reads five bits
        lane = m.lane[threads]
        segment, limit = (c >> 8) & 31, c & 31
        low = lane & segment
        high = low | (limit & ~segment)
        if mode == "up":
            source = lane - b
            valid = source >= high  # for `up` the clamp is the lowest lane
        else:
            source = {"down": lane + b, "bfly": lane ^ b}.get(mode, low | (b & ~segment))
            valid = source <= high
        source = np.where(valid, source, lane)
        found = threads - lane + source
        if count < m.size or m.size % 32:
            position = np.full(m.size + 32, -1, np.int64)
            position[threads] = np.arange(count)
            found = position[found]
        _check_mask(m, threads, mask(m, lanes), instruction)
        absent = found < 0
        if absent.any():
            first = int(np.argmax(absent))
            detail = f"lane {lane[first]} reads lane {source[first]}, which is inactive"
            m.issues.add("shuffle", instruction, detail, topic="inactive", count=int(absent.sum()))
        writes[0](m, lanes, values[np.where(absent, np.arange(count), found)])
        if len(writes) > 1:
            writes[1](m, lanes, valid)

    return run


def _groups(m: Machine, threads: np.ndarray, mask: np.ndarray, instruction: Instruction) -> np.ndarray:
    """Number the groups of threads that run a warp primitive together: those of one warp with one member mask."""
    _check_mask(m, threads, mask, instruction)
    masks = np.broadcast_to(np.asarray(mask), threads.shape).astype(np.int64)
    _, groups = np.unique(m.warp[threads].astype(np.int64) << 32 | masks, return_inverse=True)
    return groups


@opcode("vote")
def _vote(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, "sync", "all", "any", "uni", "ballot")
    write, vote = decoder.target(instruction.operands[0]), decoder.predicate(instruction.operands[1])
    mask = decoder.source(instruction.operands[2], TYPES["u32"])

    def run(m, lanes: Lanes) -> None:
        threads = m.threads(lanes)
        votes = np.broadcast_to(np.asarray(vote(m, lanes)), (len(threads),))
        groups = _groups(m, threads, mask(m, lanes), instruction)
        if "ballot" in instruction.modifiers:
            write(m, lanes, _ballot(m.lane[threads], groups, votes))
            return
        yes, total = np.bincount(groups, votes), np.bincount(groups)
        if "any" in instruction.modifiers:
            result = yes > 0
        elif "all" in instruction.modifiers:
            result = yes == total
        else:
            result = (yes == total) | (yes == 0)
        write(m, lanes, result[groups])

    return run


def _ballot(lane: np.ndarray, groups: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """Return for each thread the mask of the lanes of its group that vote true."""
    result = np.zeros(int(groups.max()) + 1, np.uint32)
    np.bitwise_or.at(result, groups, np.where(votes, np.uint32(1) << lane.astype(np.uint32), np.uint32(0)))
    return result[groups]


@opcode("activemask")
def _activemask(decoder: Decoder, instruction: Instruction) -> Run:
    write = decoder.target(instruction.operands[0])

    def run(m, lanes: Lanes) -> None:
        threads = m.threads(lanes)
        write(m, lanes, _ballot(m.lane[threads], m.warp[threads], np.ones(len(threads), bool)))

    return run


_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux")
def _redux(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, "sync", *_REDUCTIONS)
    kind = type_of(instruction.modifiers)
    if kind.is_float:
        raise KeyError(kind.name)
    function = _REDUCTIONS[instruction.modifiers[1]]
    write, value = decoder.target(instruction.operands[0]), decoder.source(instruction.operands[1], kind)
    mask = decoder.source(instruction.operands[2], TYPES["u32"])

    def run(m, lanes: Lanes) -> None:
        threads = m.threads(lanes)
        values = np.broadcast_to(np.asarray(value(m, lanes)), (len(threads),))
        groups = _groups(m, threads, mask(m, lanes), instruction)
        by_group = np.argsort(groups, kind="stable")
        starts = np.nonzero(np.diff(groups[by_group], prepend=-1))[0]
        write(m, lanes, function.reduceat(values[by_group], starts).astype(kind.dtype)[groups])

    return run


@opcode("match")
def _match(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, "sync", "any")
    kind = type_of(instruction.modifiers)
    write, value = decoder.target(instruction.operands[0]), decoder.source(instruction.operands[1], kind)
    mask = decoder.source(instruction.operands[2], TYPES["u32"])

    def run(m, lanes: Lanes) -> None:
        threads = m.threads(lanes)
        _, names = np.unique(np.broadcast_to(np.asarray(value(m, lanes)), (len(threads),)), return_inverse=True)
        groups = _groups(m, threads, mask(m, lanes), instruction)
        _, equal = np.unique(groups * (int(names.max()) + 1) + names, return_inverse=True)
        write(m, lanes, _ballot(m.lane[threads], equal, np.ones(len(threads), bool)))

    return run


@opcode("elect")
def _elect(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, "sync")
    chosen, flag = (decoder.target(name) for name in instruction.operands[0].split("|"))
    mask = decoder.source(instruction.operands[1], TYPES["u32"])

    def run(m, lanes: Lanes) -> None:
        threads = m.threads(lanes)
        groups = _groups(m, threads, mask(m, lanes), instruction)
        _, leaders = np.unique(groups, return_index=True)
        chosen(m, lanes, m.lane[threads][leaders][groups].astype(np.uint32))
        flag(m, lanes, leaders[groups] == np.arange(len(threads)))

    return run


@opcode("bar", "barrier")
def _warp_barrier(decoder: Decoder, instruction: Instruction) -> Run:
    """``bar.warp.sync``; barriers of the block are control flow and handled by the machine."""
    require(instruction, "warp", "sync")
    mask = decoder.source(instruction.operands[0], TYPES["u32"])

    def run(m, lanes: Lanes) -> None:
        threads = m.threads(lanes)
        masks = np.broadcast_to(np.asarray(mask(m, lanes)), threads.shape)
        _check_mask(m, threads, masks, instruction)
        for one in np.unique(masks).tolist():
            m.sync.warp_barrier(one, threads[masks == one], m.time)

    return run


def reduce_at_barrier(m: Machine, instruction: Instruction, threads: np.ndarray) -> None:
    """Give the result of ``bar.red`` to threads of whole blocks that have met there.

    Raises:
        ExecutionError: If the barrier counts only some of a block's threads.
    """
    operands = [operand for operand in instruction.operands if not operand.isdigit()]
    if len(operands) != 2:
        raise ExecutionError(f"this form of 'bar.red' is not known: {instruction.text}")
    votes = m.decoder.predicate(operands[1])(m, threads)
    blocks = m.block_of[threads]
    yes, total = np.bincount(blocks, votes), np.bincount(blocks)
    if "popc" in instruction.modifiers:
        result = yes.astype(np.uint32)
    else:
        result = yes > 0 if "or" in instruction.modifiers else yes == total
    m.decoder.target(operands[0])(m, threads, result[blocks])
