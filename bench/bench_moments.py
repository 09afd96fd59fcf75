"""Statistics of an activation in one read, against a plain read of it and against what its users would write instead.

    python bench/bench_moments.py                # interleaved ratios: results/moments.csv, the table of bars
    pytest bench --benchmark-only                # the same calls one by one, with pytest-benchmark

Threads: 1 and 2. Ratios are of medians of interleaved samples; `moments` is the public op on the C++ backend.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _common as common  # before torch
import _native
import _peers as peers
import pytest
import report
import torch
from torch import Tensor

import balanced_rep as br
from balanced_rep.ops.moments import MOMENTS, moments

SHAPES = ((4096, 512), (64, 81920), (256, 294912))
POOLED = ((64, 1280, 8, 8), (16, 1280, 16, 16))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = {"rows": 1, "columns": 0}  # name to reduced dim
LARGE = 2**24  # elements: what runs once per second here is left to the smaller shapes
TINY_SHAPES, TINY_POOLED = ((64, 32), (8, 640)), ((2, 12, 4, 4),)

Candidates = dict[str, Callable[[], object]]
OURS, FINISHED = report.OURS, report.FINISHED
YARDSTICKS = {"read", "torch.sum"}
PEERS = ("torch.std", "torch.compile", "torch.amax", "eager", "numpy", "scipy", "torchmetrics")  # their names begin so


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values of a fixed seed."""
    return torch.randn(shape, generator=common.generator()).to(dtype)


def nine(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """The nine measures of the peers, as finished numbers."""
    stats = br.representation_stats(x, dim=dim, correction=1)
    return tuple(getattr(stats, name) for name in peers.MEASURES)


def statistics_candidates(x: Tensor, dim: int, threads: int, compiling: bool) -> Candidates:
    """All statistics over one dim of a matrix: ours, yardsticks, and every peer that makes sense at this size."""
    small, single = x.numel() < LARGE, x.dtype == torch.float32
    c: Candidates = {
        OURS: lambda: moments(x, dim),
        FINISHED: lambda: nine(x, dim),
        "read": _native.read_test(x, threads),
        "torch.sum": lambda: x.sum(dim),
        "torch.std": lambda: x.std(dim),
    }
    if compiling:
        c |= compiled_peers(x, dim, threads)
    if small or single:
        c["eager"] = lambda: peers.eager(x, dim)
        c["eager, tuned"] = lambda: peers.tuned(x, dim)
    if single and (small or threads == 1):
        array = x.numpy()
        c["numpy"] = lambda: peers.numpy_measures(array, dim)
    if single and small:
        array = x.numpy()
        c["scipy.stats.describe"] = lambda: peers.scipy_describe(array, dim)
        c["scipy.stats.kurtosis"] = lambda: peers.scipy_kurtosis(array, dim)
        c["reference, float64"] = lambda: MOMENTS.reference(x if dim == 1 else x.T, 1, 0, 0, 0.0)
    return c


def compiled_peers(x: Tensor, dim: int, threads: int) -> Candidates:
    """The honest peer, for one shape, one dtype and this number of threads; the better written one at one thread."""
    torch._dynamo.reset()
    natural, tuned = (torch.compile(fn, fullgraph=True, dynamic=False) for fn in (peers.eager, peers.tuned))
    c: Candidates = {"torch.compile": lambda: natural(x, dim)}
    if threads == 1:
        c["torch.compile, tuned"] = lambda: tuned(x, dim)
    for call in c.values():
        call()  # compiles
    return c


def whole_candidates(x: Tensor, threads: int) -> Candidates:
    """One result for the whole array: the case that torchmetrics' aggregates cover in part."""
    metrics = peers.torchmetrics_aggregates(x)
    return {
        OURS: lambda: moments(x, None),
        "read": _native.read_test(x, threads),
        "torch.std": lambda: x.std(),
        "torchmetrics, 4 aggregates": metrics,
    }


def pooled_candidates(x: Tensor, threads: int, compiling: bool) -> Candidates:
    """The paper's score of a feature map: spatial maximum, then the standard deviation over channels."""
    c: Candidates = {
        OURS: lambda: moments(x, 1, pool="max"),
        "read": _native.read_test(x, threads),
        "torch.amax": lambda: x.amax((2, 3)),
        "torch.amax + torch.std": lambda: x.amax((2, 3)).std(1),
    }
    if compiling and threads == 1:
        torch._dynamo.reset()
        score = torch.compile(lambda h: h.amax((2, 3)).float().std(1), fullgraph=True, dynamic=False)
        score(x)  # compiles
        c["torch.compile of amax + std"] = lambda: score(x)
    return c


def call_candidates(x: Tensor) -> Candidates:
    """What a call costs beside the arithmetic."""
    return {
        OURS: lambda: moments(x, 1),
        "spec": lambda: MOMENTS(x, 1, 0, 0, 0.0),
        "library op": lambda: torch.ops.balanced_rep.moments(x, 1, 0, 0, 0.0),
        "representation_stats": lambda: br.representation_stats(x),
        "representation_stats, std": lambda: br.representation_stats(x).std,
        "torch.std": lambda: x.std(1),
        "eager": lambda: peers.eager(x, 1),
    }


def cells(threads: int, tiny: bool, compiling: bool) -> Iterator[dict[str, Any]]:
    """Every comparison for one number of threads: the columns that identify it, and its candidates."""
    shapes, pooled = (TINY_SHAPES, TINY_POOLED) if tiny else (SHAPES, POOLED)
    matrices = [(shape, dtype) for shape in shapes for dtype in DTYPES]
    for shape, dtype in matrices:
        x = values(shape, dtype)
        for layout, dim in LAYOUTS.items():
            yield _cell("statistics", x, layout, statistics_candidates(x, dim, threads, compiling))
    x = values(shapes[1], torch.float32)
    yield _cell("statistics", x, "all", whole_candidates(x, threads))
    for shape, dtype in itertools.product(pooled, DTYPES):
        x = values(shape, dtype)
        for layout in ("nchw", "channels_last"):
            h = x if layout == "nchw" else x.contiguous(memory_format=torch.channels_last)
            yield _cell("pooled", h, layout, pooled_candidates(h, threads, compiling))
    x = values((4, 64), torch.float32)
    yield _cell("call", x, "rows", call_candidates(x))
    for shape, dtype in matrices:
        if math.prod(shape) < LARGE:
            x = values(shape, dtype)
            for layout, dim in LAYOUTS.items():
                yield _cell("isa", x, layout, _native.isa_candidates(x, dim, threads, compiling))


def _cell(section: str, x: Tensor, layout: str, candidates: Candidates) -> dict[str, Any]:
    return {
        "section": section,
        "shape": "x".join(map(str, x.shape)),
        "layout": layout,
        "dtype": common.dtype_name(x.dtype),
        "bytes": x.numel() * x.element_size(),
        "candidates": candidates,
    }


def measure(cell: dict[str, Any], threads: int, budget: float) -> list[dict[str, Any]]:
    """Rows of one comparison; ``ratio`` is the candidate's time over that of the first one."""
    slow = cell["bytes"] > 2**26
    candidates = cell.pop("candidates")
    timings = common.interleave(candidates, budget=budget * (3 if slow else 1))
    ours = timings[next(iter(candidates))]
    rows = []
    for name, timing in timings.items():
        role = "yardstick" if name in YARDSTICKS else "peer" if name.startswith(PEERS) else "ours"
        rows.append(
            {
                **{"bench": "moments", "op": "moments"},
                **cell,
                **{"threads": threads, "candidate": name, "role": role},
                **timing.columns(),
                "gb_s": common.significant(cell["bytes"] / timing.median / 1e9),
                **timing.ratios(ours),
            }
        )
    return rows


def run(threads: Sequence[int], budget: float, *, tiny: bool = False, compiling: bool = True) -> list[dict[str, Any]]:
    """Measures everything and prints a line for each comparison."""
    rows = []
    for n in threads:
        with common.threads(n):
            for cell in cells(n, tiny, compiling):
                start = time.perf_counter()
                got = measure(cell, n, budget)
                rows += got
                print(f"{report.line(got)}   [{time.perf_counter() - start:.1f} s]", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the interleaved comparison, writes the CSV, prints the bars."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a comparison, slow peers aside (default: 2)")
    parser.add_argument("--tiny", action="store_true", help="tiny arrays: does everything run?")
    parser.add_argument("--no-compile", action="store_true", help="neither torch.compile nor a -march=native build")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "moments.csv", help="the CSV to write")
    args = parser.parse_args(argv)
    if common.extension() is None:
        print("balanced_rep._C is not built (pip install -e .): nothing to measure", file=sys.stderr)
        return 1
    if not args.no_compile:
        print("building with -march=native, once per change of the sources", flush=True)
        _native.native_extension()
    rows = run(args.threads, args.budget, tiny=args.tiny, compiling=not args.no_compile)
    common.write_csv(args.out, rows)
    print(f"\n{args.out}: {len(rows)} rows\n\n{report.bars_table(report.moments_bars(report.read(args.out)))}")
    return 0


@pytest.mark.parametrize("call", [OURS, "torch.std"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=common.dtype_name)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda shape: "x".join(map(str, shape)))
def test_statistics(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str, call: str) -> None:
    x, dim = values(shape, dtype), LAYOUTS[layout]
    benchmark.group = f"statistics {shape} {common.dtype_name(dtype)} {layout}"
    benchmark.extra_info["bytes"] = x.numel() * x.element_size()
    with common.threads(1):
        benchmark(moments if call == OURS else torch.std, x, dim)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=common.dtype_name)
def test_pooled(benchmark: Any, dtype: torch.dtype, layout: str) -> None:
    x = values(POOLED[0], dtype)
    x = x if layout == "nchw" else x.contiguous(memory_format=torch.channels_last)
    with common.threads(1):
        benchmark(moments, x, 1, pool="max")


if __name__ == "__main__":
    raise SystemExit(main())
