"""``make test-gpu``: the tests on this machine's GPU, compute-sanitizer where it is installed, timings; one CSV.

The CSV (``gpu-<device>.csv``) has one row per op, backend and call, each with the device and the versions, so that a
run on any machine can be sent in as it is. Every call of ``package.py`` is checked against the reference; it and the
larger calls of :data:`LARGE`, which fill the device, are timed. Times are CUDA events, median, 20th and 80th percentile
of 30 launches after 5 warm-up ones, with the L2 cache overwritten before each launch; bandwidth counts inputs and
outputs once.
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
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..package import PackageOp

ROOT = Path(__file__).parents[3]
# Op to name and arguments of calls that are timed only: a reference in float64 would need ten times their memory.
EIGH_SIZES = ((1024, 32), (512, 80), (256, 128))


def _gram(batch: int, n: int) -> torch.Tensor:
    x = _normal(torch.float64, batch, n, 3 * n)
    return x @ x.mT


LARGE: dict[str, dict[str, Callable[[], tuple[Any, ...]]]] = {
    "moments": {
        "4096 x 65536, float32": lambda: (_normal(torch.float32, 4096, 65536), 1, 0, 0, 0.1),
        "4096 x 65536, bfloat16": lambda: (_normal(torch.bfloat16, 4096, 65536), 1, 0, 0, 0.1),
        "65536 x 4096 columns, float32": lambda: (_normal(torch.float32, 4096, 65536).T, 1, 0, 0, 0.1),
        "max of 32 x 1280 x 64 x 64, bfloat16": lambda: (_normal(torch.bfloat16, 32, 1280, 64, 64), 1, 2, 1, 0.1),
    },
    "philox_normal": {"4096 x 65536": lambda: (torch.arange(4096, device="cuda"), 0, 65536)},
    "gram_eigh": {f"{batch} of {n} x {n}": lambda n=n, batch=batch: (_gram(batch, n),) for batch, n in EIGH_SIZES},
    "attention_jvp": {
        "2 x 8 heads, 4096 x 64, 4 tangents, bfloat16": lambda: (
            *(_normal(torch.bfloat16, 2, 8, 4096, 64) for _ in range(3)),
            *(_normal(torch.bfloat16, 4, 2, 8, 4096, 64) for _ in range(3)),
            *(None, False, 0.125),
        )
    },
}
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


def _normal(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


def on_device(args: tuple[Any, ...], device: str = "cuda") -> tuple[Any, ...]:
    """Move tensors to a GPU, strides included; those that are on one stay."""

    def move(x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return x
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
        return torch.as_strided(storage, x.shape, x.stride(), x.storage_offset())

    return tuple(move(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)


def backends(op: PackageOp) -> list[str]:
    """Return the GPU backends that an op has."""
    return [name for name in BACKENDS if getattr(op, name, True)]


def figures(call: Callable[[], Any], args: tuple[Any, ...]) -> dict[str, str]:
    """Time a call and return its columns of the CSV."""
    from ..package import tensors_of

    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    tensors += tensors_of(call())
    moved = sum(x.numel() * x.element_size() for x in tensors)
    times = time_launches(call)
    p20, *_, p80 = statistics.quantiles(times, n=5)
    median = statistics.median(times)
    return {
        "median_us": f"{median:.2f}",
        "p20_us": f"{p20:.2f}",
        "p80_us": f"{p80:.2f}",
        "gbytes_per_s": f"{moved / median / 1e3:.1f}",
    }


def rows(*, timed: bool = True) -> list[dict[str, str]]:
    """Run every call of every op in every GPU backend that it has: check it against the reference, then time it.

    Args:
        timed: False to check only.

    Returns:
        Columns of the CSV. A status is ``ok``, ``refused:`` and what ``supports`` says of this device, or the error.
    """
    from ..package import OPS

    about, found = machine(), []
    for op in OPS:
        large = LARGE.get(op.name, {}) if timed else {}
        for call, build in {**op.calls, **large}.items():
            for backend in backends(op):
                row = {**about, "op": op.name, "backend": backend, "call": call}
                try:
                    row |= _result(op, backend, build, checked=call not in large, timed=timed)
                except Exception as error:  # a row that says what went wrong is a contribution too
                    row["status"] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
                print(f"{op.name:16s} {backend:7s} {call:36s} {row['status'][:60]:60s} {row.get('median_us', '')}")
                found.append(row)
    return found


def _result(
    op: PackageOp, backend: str, build: Callable[[], tuple[Any, ...]], *, checked: bool, timed: bool
) -> dict[str, str]:
    """Run one call in one backend and return status and times."""
    import balanced_rep
    from balanced_rep.ops._registry import REGISTRY

    from ..package import check, tensors_of

    spec, args = REGISTRY[op.name], on_device(build())
    with balanced_rep.backend(backend):
        if reason := spec.why_not(backend, *args):
            return {"status": f"refused: {reason}"[:200]}
        if checked:
            got = spec(*args)
            on_host = tuple(x.cpu() for x in tensors_of(got))
            check(op, on_host[0] if isinstance(got, torch.Tensor) else on_host, build())
        return {"status": "ok", **(figures(lambda: spec(*args), args) if timed else {})}


def failures(found: list[dict[str, str]]) -> list[str]:
    """Say what of some rows is a failure: errors, and a backend that was refused every time (it is not installed)."""
    failed = [row for row in found if row["status"] != "ok" and not row["status"].startswith("refused: ")]
    lines = [f"{row['op']}, {row['backend']}, {row['call']}: {row['status']}" for row in failed]
    for backend in {row["backend"]: None for row in found}:
        statuses = [row["status"] for row in found if row["backend"] == backend]
        if all(status.startswith("refused: ") for status in statuses):
            lines.append(f"backend {backend!r} ran nothing: {statuses[0].removeprefix('refused: ')}")
    return lines


def sanitize() -> int:
    """Run every call under every tool of compute-sanitizer; return how many found something."""
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed (CUDA toolkit): skipped")
        return 0
    failed = 0
    # one allocation per tensor: inside torch's cache of memory nothing is out of bounds
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
        command += ["tests.gpusim.device.run", "--numbers-only"]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        print(f"compute-sanitizer {tool}: {'clean' if code == 0 else f'exit status {code}'}")
        failed += code != 0
    return failed


def main() -> int:
    """Run tests, sanitizers and timings, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--numbers-only", action="store_true", help="check the ops; no timing, no pytest, no sanitizer, no CSV"
    )
    parser.add_argument("--output", type=Path, help="CSV to write; default gpu-<device>.csv")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "error: torch sees no CUDA device. `make env` installs the CPU build of torch; on a machine with a GPU, "
            "install the CUDA build into .venv first (see docs/gpu/index.md, 'On a GPU').",
            file=sys.stderr,
        )
        return 2
    found = rows(timed=not arguments.numbers_only)
    problems = failures(found)
    print("\n".join(problems) or "every call that this device takes is right")
    failed = len(problems)
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
