"""``make test-gpu``: the tests on this machine's GPU, compute-sanitizer where it is installed, timings; one CSV.

The CSV (``gpu-<device>.csv``) has one row per op, backend and call, each with the device and the versions, so that a
run on any machine can be sent in as it is. Times are CUDA events, median, 20th and 80th percentile of 30 launches after
5 warm-up ones, with the L2 cache overwritten before each launch.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[3]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("cuda", "triton")
COLUMNS = [
    *("device", "capability", "driver", "torch", "triton", "cupy", "commit"),
    *("op", "backend", "call", "status", "median_us", "p20_us", "p80_us", "gbytes_per_s"),
]


def machine() -> dict[str, str]:
    """Return what every row says about where it was measured."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    major, minor = torch.cuda.get_device_capability()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = (
        subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] if shutil.which(query[0]) else ""
    )
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "driver": driver.strip(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cupy": version("cupy-cuda13x") or version("cupy-cuda12x"),
        "commit": commit.stdout.strip(),
    }


def time_launches(call: Callable[[], Any], *, warm_up: int = 5, runs: int = 30) -> list[float]:
    """Return the microseconds of each run, with a cold L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(runs):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return times


def on_device(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Move tensors to the GPU, strides included."""

    def move(x: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
        return torch.as_strided(storage, x.shape, x.stride(), x.storage_offset())

    return tuple(move(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)


def rows() -> list[dict[str, str]]:
    """Run every call of every op in every GPU backend: check it against the reference, then time it."""
    import balanced_rep
    from balanced_rep.ops._registry import REGISTRY

    from ..package import OPS
    from ..test_package import check

    about, found = machine(), []
    for op in OPS:
        spec = REGISTRY[op.name]
        for call, build in op.calls.items():
            args = on_device(build())
            for backend in BACKENDS:
                row = {**about, "op": op.name, "backend": backend, "call": call}
                try:
                    with balanced_rep.backend(backend):
                        check(op, spec(*args).cpu(), build())
                        times = time_launches(lambda spec=spec, args=args: spec(*args))
                    quantiles = statistics.quantiles(times, n=5)
                    median = statistics.median(times)
                    moved = args[0].numel() * args[0].element_size()
                    row |= {
                        "status": "ok",
                        "median_us": f"{median:.2f}",
                        "p20_us": f"{quantiles[0]:.2f}",
                        "p80_us": f"{quantiles[3]:.2f}",
                        "gbytes_per_s": f"{moved / median / 1e3:.1f}",
                    }
                except Exception as error:  # a row that says what went wrong is a contribution too
                    row["status"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                print(f"{op.name:16s} {backend:7s} {call:22s} {row['status'][:60]:60s} {row.get('median_us', '')}")
                found.append(row)
    return found


def sanitize() -> int:
    """Run the GPU tests under every tool of compute-sanitizer; return how many found something."""
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed (CUDA toolkit): skipped")
        return 0
    failed = 0
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
        command += ["tests.gpusim.device.run", "--numbers-only"]
        code = subprocess.run(command, cwd=ROOT).returncode
        print(f"compute-sanitizer {tool}: {'clean' if code == 0 else f'exit status {code}'}")
        failed += code != 0
    return failed


def main() -> int:
    """Run tests, sanitizers and timings, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers-only", action="store_true", help="check and time the ops; no pytest, no sanitizer")
    parser.add_argument("--output", type=Path, help="CSV to write; default gpu-<device>.csv")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "error: torch sees no CUDA device. `make env` installs the CPU build of torch; on a machine with a GPU, "
            "install the CUDA build into .venv first (see docs/gpu/index.md, 'On a GPU').",
            file=sys.stderr,
        )
        return 2
    found = rows()
    failed = sum(row["status"] != "ok" for row in found)
    if not arguments.numbers_only:
        name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
        path = arguments.output or ROOT / f"gpu-{name}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(found)
        print(f"wrote {path}")
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
        compiled = {**os.environ, "TRITON_INTERPRET": "0"}  # the suite interprets Triton unless told otherwise
        failed += subprocess.run(tests, cwd=ROOT, env=compiled).returncode not in {0, 5}  # 5: no test is marked gpu
        failed += sanitize()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
