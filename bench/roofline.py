"""Roofline model of the GPU kernels from bytes and flops counted by the PTX executor: ``python -m bench.roofline``.

No figure here was measured on a GPU: every one is a **model**. A launch of moderate size is run by the executor
(``tests/gpusim``), which counts floating-point operations, and DRAM bytes through a 40 MB LRU cache. Both are scaled up
to an input and output of a given size. Then

    time = max(bytes / (0.85 bandwidth), sum of flops / (0.7 peak) over the units that do them) + 3 us,

where 0.85, 0.7 and the launch overhead of 3 us are assumptions; integer operations are not in it, so for a kernel that
consists of them (philox) it is a lower bound and no more. *Fused minimum* is the same for a kernel that reads its
inputs once, writes its outputs once, and computes for free.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported; nothing is interpreted here

if TYPE_CHECKING:
    from tests.gpusim.traffic import Traffic

BANDWIDTH_SHARE, PEAK_SHARE, OVERHEAD_US = 0.85, 0.7, 3.0


@dataclass(frozen=True)
class Device:
    """Published peak rates: DRAM bandwidth in GB/s, and dense TFLOP/s by unit (see :class:`Traffic`)."""

    name: str
    bandwidth: float
    peaks: Mapping[str, float]

    def microseconds(self, n_bytes: float, flops: Mapping[str, float] | None = None) -> float:
        """Return the model's time of a kernel."""
        memory = n_bytes / (self.bandwidth * 1e3 * BANDWIDTH_SHARE)
        compute = sum(count / self.peaks[unit] for unit, count in (flops or {}).items()) / (1e6 * PEAK_SHARE)
        return max(memory, compute) + OVERHEAD_US


def _peaks(*rates: float) -> dict[str, float]:
    return dict(zip(UNITS, rates, strict=True))


UNITS = ("float32", "float64", "half matrix", "tf32 matrix")
DEVICES = (
    Device("A100 80GB SXM", 2039, _peaks(19.5, 9.7, 312, 156)),
    Device("H100 SXM", 3350, _peaks(67, 34, 989, 494)),
    Device("B200", 8000, _peaks(80, 40, 2250, 1125)),
)


def table(counted: Iterable[tuple[str, Traffic]], n_bytes: int) -> str:
    """Return a Markdown table of the model.

    Args:
        counted: Name of a launch and its counts.
        n_bytes: Bytes of inputs and outputs that the counts are scaled to.

    Returns:
        The table, with the time of the fused minimum behind each time.
    """
    heads = ["launch", "flops / byte (f32 + f64 + matrix)"]
    heads += [f"{device.name}, model us (minimum)" for device in DEVICES]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, traffic in counted:
        scale = n_bytes / traffic.minimum_bytes
        flops = {unit: count * scale for unit, count in traffic.flops.items()}
        vector, double, *matrix = (flops.get(unit, 0.0) / n_bytes for unit in UNITS)
        cells = [name, f"{vector:.1f} + {double:.1f} + {sum(matrix):.1f}"]
        for device in DEVICES:
            time = device.microseconds(traffic.dram_bytes * scale, flops)
            cells.append(f"{time:.0f} ({device.microseconds(n_bytes):.0f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Count and print the table."""
    from tests.gpusim.traffic import every_traffic

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1 << 30, help="bytes of inputs and outputs of the modelled call")
    arguments = parser.parse_args()
    print(f"Roofline MODEL at {arguments.bytes} bytes of inputs and outputs; nothing here was run on a GPU.\n")
    counted = ((f"{op.name}, {backend}, {call}", traffic) for op, backend, call, traffic in every_traffic())
    print(table(counted, arguments.bytes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
