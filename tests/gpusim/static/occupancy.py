"""How many blocks of a kernel fit on a multiprocessor.

With R registers per thread, S bytes of shared memory per block and W warps per block, a multiprocessor holds

    min( max_blocks,
         max_warps // W,
         4 * ((registers / 4) // round_up(32 R, 256)) // W,
         shared // round_up(S + reserved, granularity) )

blocks: registers are handed out per warp in units of 256 and lie in four partitions; from compute capability 8.0 on
every block reserves 1 KiB of shared memory. ``test_compile_gate.py`` compares this with NVIDIA's own
``cuda_occupancy.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LIMITS", "Limits", "Occupancy", "occupancy"]


@dataclass(frozen=True)
class Limits:
    """One architecture: per multiprocessor, except for the last."""

    warps: int
    blocks: int
    shared: int
    reserved: int
    granularity: int
    shared_per_block: int
    registers: int = 65536


LIMITS = {
    75: Limits(32, 16, 64 << 10, 0, 256, 64 << 10),
    80: Limits(64, 32, 164 << 10, 1024, 128, 163 << 10),
    86: Limits(48, 16, 100 << 10, 1024, 128, 99 << 10),
    90: Limits(64, 32, 228 << 10, 1024, 128, 227 << 10),
    100: Limits(64, 32, 228 << 10, 1024, 128, 227 << 10),
    120: Limits(48, 24, 100 << 10, 1024, 128, 99 << 10),
}


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks, the percentage of the warps that are occupied, and what limits them."""

    blocks: int
    percent: int
    limit: str


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: int, registers: int, shared_bytes: int, threads: int) -> Occupancy:
    """Return the occupancy of a kernel.

    Args:
        arch: 80 for sm_80 and so on.
        registers: Per thread.
        shared_bytes: Per block, static and dynamic.
        threads: Per block.

    Returns:
        The resident blocks; 0 for a block that does not fit.

    Raises:
        ValueError: If the architecture is unknown or a number is none that a kernel can have.
    """
    if arch not in LIMITS:
        raise ValueError(f"sm_{arch} is not one of {', '.join(f'sm_{known}' for known in LIMITS)}: add its limits")
    if registers < 0 or shared_bytes < 0 or not 1 <= threads <= 1024:
        raise ValueError(
            f"{registers} registers, {shared_bytes} bytes of shared memory, {threads} threads: no kernel has these"
        )
    limits = LIMITS[arch]
    warps = -(-threads // 32)
    per_warp = _round_up(max(registers, 1) * 32, 256)
    fits = {
        "blocks": limits.blocks,
        "warps": limits.warps // warps,
        "registers": 4 * (limits.registers // 4 // per_warp) // warps,
    }
    if shared_bytes > limits.shared_per_block:
        fits["shared"] = 0
    elif shared_bytes:
        fits["shared"] = limits.shared // _round_up(shared_bytes + limits.reserved, limits.granularity)
    blocks = min(fits.values())
    limit = next(name for name in ("shared", "registers", "warps", "blocks") if fits.get(name) == blocks)
    return Occupancy(blocks, 100 * blocks * warps // limits.warps, limit)
