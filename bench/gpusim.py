"""Figures of the GPU code on a machine without a GPU: writes ``docs/gpu/figures.md`` (``make gpu-figures``).

Each section is one of the promises of ``docs/gpu/index.md``: speed of the executor, its accuracy, memory traffic of the
package's kernels, planted mistakes that were caught, and the roofline model. The tests hold the same limits; this says
by how much they are kept.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench import _common, gpu_networks, roofline
from tests.gpusim import ptx
from tests.gpusim.mutants import MUTANTS, compile_triton_mutants, verdict
from tests.gpusim.package import OPS, run_cuda, run_triton
from tests.gpusim.runners import run_cuda_ptx, run_triton_ptx
from tests.gpusim.samples.entries import CUDA_SAMPLES, TRITON_SAMPLES
from tests.gpusim.traffic import DRAM_LIMIT, every_traffic

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu" / "figures.md"
ROOFLINE_BYTES = 1 << 30


def _moments(*shape: int) -> tuple:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)), 1, 0, 0, 0.0


# Op, backend and what it is called on, to its arguments.
TIMED: dict[tuple[str, str, str], Callable[[], tuple]] = {
    ("moments", "cuda", "32 x 8192 float32"): lambda: _moments(32, 8192),
    ("moments", "triton", "32 x 8192 float32"): lambda: _moments(32, 8192),
    ("philox_bits", "cuda", "256 x 4096"): lambda: (torch.arange(256), 1, 4096),
    ("philox_normal", "triton", "256 x 4096"): lambda: (torch.arange(256), 1, 4096),
}


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def speed(calls: dict[tuple[str, str, str], Callable[[], tuple]] = TIMED) -> str:
    """Thread-instructions per second of the executor, with every check and counter on, and with neither."""
    rows, ops = [], {op.name: op for op in OPS}
    for (name, backend, size), build in calls.items():
        run, timed = {"cuda": run_cuda, "triton": run_triton}[backend], replace(ops[name], calls={size: build})
        cells = [f"{name}, {backend}, {size}"]
        for options in (ptx.Options(), ptx.Options(check=False, count=False)):
            results = [run(timed, size, options=options)[1] for _ in range(2)]
            n = sum(launch.result.counters.thread_instructions for launch in results[0])
            seconds = min(sum(launch.result.seconds for launch in launches) for launches in results)
            cells += [f"{n / 1e6:.1f}"] * (len(cells) == 1) + [f"{n / seconds / 1e6:.1f}"]
        rows.append(cells)
    return markdown(["launch", "million thread-instructions", "million / s, checks on", "million / s, off"], rows)


def accuracy() -> str:
    """Largest error of the sample kernels against float64 numpy, relative to the largest expected value."""
    rows = []
    for kernels, run in ((CUDA_SAMPLES, run_cuda_ptx), (TRITON_SAMPLES, run_triton_ptx)):
        for kernel in kernels:
            error = 0.0
            for build in kernel.cases.values():
                case = build()
                result = run(kernel, case).check()
                for position, want in case.expected.items():
                    got = case.launch.buffers[position].values(result.buffers[position]).astype(np.float64)
                    error = max(error, float(np.abs(got - want).max() / max(1e-300, np.abs(want).max())))
            rows.append([kernel.name, "NVRTC" if run is run_cuda_ptx else "Triton", f"{error:.1e}"])
    return markdown(["kernel", "compiled by", "largest relative error"], rows)


def traffic_table(counted: list) -> str:
    """Sectors and DRAM bytes of every call whose traffic is limited."""
    rows = [
        [
            f"{op.name}, {backend}, {call}",
            f"{traffic.sector_ratio:.3f} (limit {traffic.sector_limit})",
            f"{traffic.dram_ratio:.3f} (limit {DRAM_LIMIT})",
        ]
        for op, backend, call, traffic in counted
    ]
    return markdown(["launch", "sectors / ideal", "DRAM bytes / fused minimum"], rows)


def mutation_score() -> str:
    """Planted mistakes in the package's kernels by file, and how many were caught by the check they are for."""
    caught, planted, by = Counter(), Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        compile_triton_mutants([mutant for mutant in MUTANTS if mutant.triton], Path(folder, "triton"))
        for number, mutant in enumerate(MUTANTS):
            planted[mutant.file] += 1
            caught[mutant.file] += mutant.caught_by in verdict(mutant, Path(folder, str(number))).split(", ")
            by.setdefault(mutant.file, Counter())[mutant.caught_by] += 1
    rows = [
        [
            f"`{file}`",
            f"{caught[file]} of {n}",
            ", ".join(f"{kind} {count}" for kind, count in sorted(by[file].items())),
        ]
        for file, n in planted.items()
    ]
    rows.append(["all", f"{caught.total()} of {planted.total()}", ""])
    return markdown(["file", "caught", "by"], rows)


def sections() -> Iterator[str]:
    """The page, piece by piece."""
    about = _common.machine()
    yield (
        "# Figures without a GPU\n\nWritten by `make gpu-figures`. Nothing here was run on a GPU: counts and times of "
        "kernels are those of a **model**; only the speed of the executor was measured, on a CPU."
    )
    yield (
        f"## Speed of the executor\n\nMeasured {about['date']} on one core, {about['cpu']}, the faster of two runs. "
        f"Required: 5 million thread-instructions per second with checks on.\n\n{speed()}"
    )
    yield (
        "## Accuracy of the executor\n\nAgainst float64 numpy; matrix kernels against the exact product of the rounded "
        "operands.\nRequired: 1e-5 for float32, 1e-6 for float16 and bfloat16 products, 1e-3 for TF32 (`matmul[fp32]`)."
        f"\n\n{accuracy()}"
    )
    counted = list(every_traffic())
    yield (
        "## Memory traffic (model)\n\nSectors of 32 bytes per warp and instruction; DRAM bytes through an LRU cache of "
        f"40 MB.\n\n{traffic_table(counted)}"
    )
    yield f"## Planted mistakes in the package's kernels\n\n{mutation_score()}"
    names = ((f"{op.name}, {backend}, {call}", traffic) for op, backend, call, traffic in counted)
    assumed = (
        f"Bytes over {roofline.BANDWIDTH_SHARE:.0%} of the bandwidth, or flops over {roofline.PEAK_SHARE:.0%} of the "
        f"peak where that takes longer, and {roofline.OVERHEAD_US:g} us for the launch: assumptions, not measurements. "
        "Integer operations are not in it: for philox, which consists of them, it is a lower bound and no more. "
        "Counts are scaled to 1 GiB of inputs and outputs; in brackets the time of a kernel that only moves these."
    )
    yield f"## Roofline (model)\n\n{assumed}\n\n{roofline.table(names, ROOFLINE_BYTES)}"
    yield (
        "## Whole networks (model)\n\nNetworks of true size in bfloat16, one sample, by the same model, function by "
        "function, one launch each. Of `br.jvp`, fused ops move their inputs and outputs once, times the ratio counted "
        "above; of eager `torch.func.vmap(jvp)`, bytes are passes over memory as `bench/gpu_networks.py` says, with "
        "the matrix of scores in memory, since no fused attention of torch has a forward derivative. None was run."
    )
    yield from network_tables(counted)


def network_tables(counted: list) -> Iterator[str]:
    """What networks do with 16 tangents, and how long that and 4 would take."""
    ratios: dict[str, float] = {}
    for op, backend, _, traffic in counted:
        if backend == "triton":
            ratios[op.name] = max(ratios.get(op.name, 1.0), traffic.dram_ratio)
    for name, (model, inputs) in gpu_networks.networks().items():
        by_k = {k: gpu_networks.count(model, inputs, k, ratios) for k in (4, 16)}
        heads = ["function, K = 16", "calls", "GFLOP, br.jvp", "MB, eager vmap(jvp)", "MB, br.jvp"]
        yield f"### {name}\n\n{markdown(heads, gpu_networks.per_function(by_k[16]))}"
        heads = ["model ms", "one forward", "batch of K + 1", "eager vmap(jvp)", "br.jvp"]
        rows = [[f"K = {k}, {row[0]}", *row[1:]] for k, work in by_k.items() for row in gpu_networks.totals(work)]
        yield markdown(heads, rows)


def main() -> int:
    """Measure and write the page."""
    PAGE.write_text("\n\n".join(sections()) + "\n")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
