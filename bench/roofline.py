"""Roofline model of the GPU kernels from bytes and flops counted by the PTX executor: ``python -m bench.roofline``.

No figure here was measured on a GPU: every one is a **model**. A launch of moderate size is run by the executor
(``tests/gpusim``), which counts floating-point operations, and DRAM bytes through a 40 MB LRU cache. Both are scaled to
a large input by the number of elements. Then

    time = max(bytes / (0.85 bandwidth), flops32 / (0.7 peak32) + flops64 / (0.7 peak64)) + 3 us,

where 0.85, 0.7 and the launch overhead of 3 us are assumptions. *Fused minimum* is the same for a kernel that reads its
inputs once, writes its outputs once, and computes for free.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported; nothing is interpreted here

BANDWIDTH_SHARE, PEAK_SHARE, OVERHEAD_US = 0.85, 0.7, 3.0


@dataclass(frozen=True)
class Device:
    """Published peak rates: DRAM bandwidth in GB/s, float32 and float64 in TFLOP/s without tensor cores."""

    name: str
    bandwidth: float
    peak32: float
    peak64: float

    def microseconds(self, n_bytes: float, flops32: float = 0.0, flops64: float = 0.0) -> float:
        """Return the model's time of a kernel."""
        memory = n_bytes / (self.bandwidth * 1e3 * BANDWIDTH_SHARE)
        compute = (flops32 / self.peak32 + flops64 / self.peak64) / (1e6 * PEAK_SHARE)
        return max(memory, compute) + OVERHEAD_US


DEVICES = (
    Device("A100 80GB SXM", 2039, 19.5, 9.7),
    Device("H100 SXM", 3350, 67, 34),
    Device("B200", 8000, 80, 40),
)


@dataclass(frozen=True)
class Count:
    """What the executor counted, per element of the input."""

    kernel: str
    dtype: str
    itemsize: int
    bytes_per_element: float
    flops32_per_element: float
    flops64_per_element: float
    sector_ratio: float


def count_streaming() -> list[Count]:
    """Run the streaming calls of every op in the executor and count."""
    from tests.gpusim.package import OPS, run_cuda, run_triton

    counts = []
    for op in OPS:
        for call in op.streaming:
            x = op.calls[call]()[0]
            for backend, run in (("cuda", run_cuda), ("triton", run_triton)):
                if getattr(op, backend) is None:
                    continue
                counters = [launch.result.counters for launch in run(op, call)[1]]
                flops64 = sum(c.flops["f64"] for c in counters)
                flops32 = sum(sum(c.flops.values()) for c in counters) - flops64
                sectors = sum(c.sectors for c in counters) / max(1, sum(c.ideal_sectors for c in counters))
                counts.append(
                    Count(
                        f"{op.name} ({backend})",
                        str(x.dtype).removeprefix("torch."),
                        x.element_size(),
                        sum(c.dram_bytes for c in counters) / x.numel(),
                        flops32 / x.numel(),
                        flops64 / x.numel(),
                        sectors,
                    )
                )
    return counts


def table(counts: Sequence[Count], n: int) -> str:
    """Return a Markdown table of the model at ``n`` elements."""
    heads = ["kernel", "dtype", "bytes / elem", "minimum", "sectors / ideal", "flops / elem (f32 + f64)"]
    heads += [f"{device.name}, model us (minimum)" for device in DEVICES]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for count in counts:
        cells = [
            count.kernel,
            count.dtype,
            f"{count.bytes_per_element:.2f}",
            f"{count.itemsize}",
            f"{count.sector_ratio:.2f}",
            f"{count.flops32_per_element:.0f} + {count.flops64_per_element:.1f}",
        ]
        for device in DEVICES:
            time = device.microseconds(
                n * count.bytes_per_element, n * count.flops32_per_element, n * count.flops64_per_element
            )
            cells.append(f"{time:.0f} ({device.microseconds(n * count.itemsize):.0f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Count and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 28, help="elements of the modelled input")
    arguments = parser.parse_args()
    print(f"Roofline MODEL at {arguments.elements} elements; nothing here was run on a GPU.\n")
    print(table(count_streaming(), arguments.elements))
    return 0


if __name__ == "__main__":
    sys.exit(main())
