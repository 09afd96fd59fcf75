"""How much memory traffic a launch may cause: the limits, and what was counted beside them.

Sectors are counted per warp and instruction, so their ratio to the ideal says how well a kernel's accesses are laid
out. DRAM bytes come from a model of the L2 cache (least recently used, 40 MB, empty before every launch and written
back after it), so scratch memory between two launches is paid for twice. Both are exact counts of a **model**: nothing
here was run on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import ptx
from .package import OPS, PackageOp, run_cuda, run_triton, tensors_of
from .ptx.counters import L2_BYTES, Counters

__all__ = ["ALIGNED_LIMIT", "DRAM_LIMIT", "UNALIGNED_LIMITS", "Traffic", "counting", "every_traffic", "traffic"]

DRAM_LIMIT = 1.15  # of the bytes of inputs and outputs, each moved once
ALIGNED_LIMIT, UNALIGNED_LIMITS = 1.1, {2: 1.6, 4: 1.35, 8: 1.2}  # of the ideal sectors; by bytes of an element
_UNITS = {
    **{"f64": "float64", "mma.f64": "float64", "mma.tf32": "tf32 matrix"},
    **{"mma.f16": "half matrix", "mma.bf16": "half matrix"},
}


@dataclass(frozen=True)
class Traffic:
    """What the launches of a call did, summed.

    Attributes:
        sectors: 32-byte sectors touched, per warp and instruction.
        ideal_sectors: The fewest that could do.
        sector_limit: Limit of their ratio.
        dram_bytes: Bytes between cache and DRAM in the model.
        minimum_bytes: Bytes of inputs and outputs: what a fused kernel moves at least.
        flops: Floating-point operations by the unit that does them: "float32", "float64", "half matrix", "tf32 matrix".
    """

    sectors: int
    ideal_sectors: int
    sector_limit: float
    dram_bytes: int
    minimum_bytes: int
    flops: Mapping[str, int]

    @property
    def sector_ratio(self) -> float:
        return self.sectors / max(1, self.ideal_sectors)

    @property
    def dram_ratio(self) -> float:
        return self.dram_bytes / max(1, self.minimum_bytes)

    def check(self) -> None:
        """Hold both ratios to their limits.

        Raises:
            AssertionError: Naming the one that is too large.
        """
        assert self.sector_ratio <= self.sector_limit, f"{self.sectors} sectors, ideal {self.ideal_sectors}"
        assert self.dram_ratio <= DRAM_LIMIT, f"{self.dram_bytes} DRAM bytes in the model, minimum {self.minimum_bytes}"


def traffic(args: Sequence[Any], outputs: Iterable[Tensor], counters: Iterable[Counters], *, aligned: bool) -> Traffic:
    """Add up what the launches of one call counted.

    Args:
        args: Arguments of the call; its tensors are read once.
        outputs: Results, written once.
        counters: One per launch.
        aligned: Whether every row begins on a 128-byte boundary.

    Returns:
        The sums beside their limits.
    """
    tensors = [value for value in args if isinstance(value, Tensor)] + list(outputs)
    counted = list(counters)
    flops = Counter()
    for c in counted:
        for kind, count in c.flops.items():
            flops[_UNITS.get(kind, "float32")] += count
    return Traffic(
        sectors=sum(c.sectors for c in counted),
        ideal_sectors=sum(c.ideal_sectors for c in counted),
        sector_limit=ALIGNED_LIMIT if aligned else UNALIGNED_LIMITS[min(t.element_size() for t in tensors)],
        dram_bytes=sum(c.dram_bytes for c in counted),
        minimum_bytes=sum(t.numel() * t.element_size() for t in tensors),
        flops=flops,
    )


def counting(op: PackageOp, call: str) -> ptx.Options:
    """Return options for a run that counts traffic; large calls are checked for nothing else."""
    return ptx.Options(check=call not in op.large, cache_bytes=op.caches.get(call, L2_BYTES))


def every_traffic() -> Iterator[tuple[PackageOp, str, str, Traffic]]:
    """Run every call whose traffic is limited in the executor.

    Yields:
        Op, backend, call, and what its launches did.
    """
    for op in OPS:
        for call in op.streaming + op.unaligned:
            for backend, run in (("cuda", run_cuda), ("triton", run_triton)):
                if getattr(op, backend) is not None:
                    got, launches = run(op, call, options=counting(op, call))
                    counters = [launch.result.counters for launch in launches]
                    yield (
                        op,
                        backend,
                        call,
                        traffic(op.arguments(call), tensors_of(got), counters, aligned=call in op.streaming),
                    )
