"""Matrix instructions: ``ldmatrix`` and ``mma.sync``, with the fragment layouts of the PTX manual.

Lane ``l`` belongs to group ``g = l / 4`` and has place ``t = l % 4`` in it. A fragment register of a 16-bit type holds
two neighbours. With ``p`` elements per register (2 for 16 bits, 1 for tf32, and for f64 with its 8-row tiles):

* A (16 x K): register i holds row ``g + 8 (i mod 2)``, columns ``p t + {0..p-1} + 4 p (i / 2)``;
* B (K x 8): register i holds rows ``p t + {0..p-1} + 4 p i``, column ``g``;
* C, D (16 x 8): value i lies at row ``g + 8 (i / 2)``, column ``2 t + i mod 2``.

Products of rounded operands are summed in float64 and rounded once to the accumulator's type. Hardware sums in its own
order with fewer bits; ``fuzz`` perturbs the result by an ulp or so to stand for that.
"""

from __future__ import annotations

import re

import numpy as np

from .access import Access
from .decoder import Decoder, Lanes, Run, opcode, require
from .numeric import widen_half
from .ops_warp import full_warps
from .parser import Instruction
from .races import WEAK
from .types import TYPES

LANE = np.arange(32)
GROUP, PLACE = LANE // 4, LANE % 4
TF32_BITS = np.uint32(0xFFFFE000)
OPERANDS = {"f16": 2, "bf16": 2, "tf32": 1, "f64": 1}  # type to elements per register


@opcode("ldmatrix")
def _ldmatrix(decoder: Decoder, instruction: Instruction) -> Run:
    """Load 8 x 8 matrices of 16-bit elements: lane 8 j + r gives the address of row r of matrix j."""
    require(instruction, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")
    writes = [decoder.target(name) for name in decoder.group(instruction.operands[0])]
    address = decoder.address(instruction.operands[1], "shared")
    n_matrices, transposed = len(writes), "trans" in instruction.modifiers

    def run(m, lanes: Lanes) -> None:
        warps = full_warps(m, lanes, instruction)
        rows = warps[:, : 8 * n_matrices].reshape(-1)
        addresses = address(m, lanes).reshape(-1, 32)[:, : 8 * n_matrices].reshape(-1)
        values = np.zeros((len(rows), 8), np.uint16)
        for access in m.checker.resolve("shared", addresses, 16, instruction, rows):
            _read_rows(m, access, instruction)
            chosen = slice(None) if access.kept is None else access.kept
            values[chosen] = m.shared.data[access.offsets[:, None] + np.arange(16)].view(np.uint16)
        matrices = values.reshape(-1, n_matrices, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        fragments = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, n_matrices, 32)
        for index, write in enumerate(writes):
            write(m, warps.reshape(-1), fragments[:, index].reshape(-1))

    return run


def _read_rows(m, access: Access, instruction: Instruction) -> None:
    m.checker.check_read(access, 16, instruction, WEAK)
    if m.options.count:
        m.counters.count_shared("load", access.offsets, 16, m.warp[access.threads])


def _operand_values(raw: np.ndarray, name: str) -> np.ndarray:
    """Return the numbers of one fragment register as ``(warps, 32, elements)``."""
    if name == "tf32":
        return (raw & TF32_BITS).view(np.float32)[..., None]
    if name == "f64":
        return raw.view(np.float64)[..., None]
    pairs = widen_half(raw.reshape(-1), TYPES[f"{name}x2"])
    return pairs.reshape(*raw.shape, 2)


@opcode("mma")
def _mma(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, "sync", "aligned", "row", "col", *_SHAPES)
    shape = next(word for word in instruction.modifiers if word in _SHAPES)
    rows, _, depth = _SHAPES[shape]
    made, left, right, given = [word for word in instruction.modifiers if word in TYPES]
    if left != right or left not in OPERANDS or made != given or made not in {"f32", "f16", "f64"}:
        raise KeyError(f"{made}.{left}.{right}.{given}")
    if (left == "f64") != (shape == "m8n8k4"):
        raise KeyError(f"{shape} of {left}")
    per = OPERANDS[left]
    raw_type = TYPES["b64" if left == "f64" else "b32"]
    a_reads, b_reads = (
        [decoder.source(name, raw_type) for name in decoder.group(operand)] for operand in instruction.operands[1:3]
    )
    c_kind = TYPES[made if made != "f16" else "f16x2"]
    c_reads = [decoder.float_source(name, c_kind) for name in decoder.group(instruction.operands[3])]
    d_writes = [decoder.float_target(name, c_kind) for name in decoder.group(instruction.operands[0])]

    def run(m, lanes: Lanes) -> None:
        warps = full_warps(m, lanes, instruction)
        flat, n_warps = warps.reshape(-1), len(warps)
        a, b = np.zeros((n_warps, rows, depth)), np.zeros((n_warps, depth, 8))
        for index, read in enumerate(a_reads):
            values = _operand_values(np.asarray(read(m, flat)).reshape(n_warps, 32), left)
            for element in range(per):
                a[:, GROUP + 8 * (index % 2), PLACE * per + element + 4 * per * (index // 2)] = values[..., element]
        for index, read in enumerate(b_reads):
            values = _operand_values(np.asarray(read(m, flat)).reshape(n_warps, 32), left)
            for element in range(per):
                b[:, PLACE * per + element + 4 * per * index, GROUP] = values[..., element]
        product = a @ b
        pair = 2 if made == "f16" else 1
        for index, (read, write) in enumerate(zip(c_reads, d_writes, strict=True)):
            c = np.broadcast_to(np.asarray(read(m, flat), np.float64).reshape(-1, pair), (32 * n_warps, pair))
            first = index * pair
            places = [product[:, GROUP + 8 * ((first + e) // 2), 2 * PLACE + (first + e) % 2] for e in range(pair)]
            total = c + np.stack(places, -1).reshape(-1, pair)
            result = m.fuzz(total if made == "f64" else total.astype(np.float32))
            write(m, flat, result if pair == 2 else result[:, 0])
        m.counters.flops[f"mma.{left}"] += 2 * rows * 8 * depth * n_warps

    return run


_SHAPES = {
    name: tuple(int(size) for size in re.findall(r"\d+", name)) for name in ("m16n8k4", "m16n8k8", "m16n8k16", "m8n8k4")
}
