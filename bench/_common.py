"""What the benchmarks share: interleaved timing, the machine on every row, the CSV.

Import it before numpy and torch: OpenMP, OpenBLAS and Inductor read their settings once.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BUILD = ROOT / "build" / "bench"

# Threads that spin after their work (30 ms in the OpenBLAS of numpy and scipy) would slow down what is timed next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(BUILD / "inductor"))
for _name in [name for name in os.environ if name.startswith("BALANCED_REP_")]:
    del os.environ[_name]  # a forced backend or instruction set is not what the figures are about

import contextlib  # noqa: E402
import csv  # noqa: E402
import datetime  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import math  # noqa: E402
import platform  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

import balanced_rep  # noqa: E402

SAMPLE_S = 1e-3  # a sample takes at least this long, so that reading two clocks costs nothing
SLOW_S = 0.05  # a call this long streams its own data: it gets no untimed call in front of a sample


@dataclass
class Timing:
    """Seconds per call of one candidate, one sample for each turn it took part in.

    Attributes:
        turns: The turns.
        wall: Wall clock.
        cpu: CPU time of the process, all threads; not disturbed by other processes that take the processor away.
    """

    turns: list[int] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median wall seconds."""
        return statistics.median(self.wall)

    def columns(self) -> dict[str, Any]:
        """Figures in milliseconds, as columns of the CSV."""
        p20, p80 = np.percentile(self.wall, (20, 80)).tolist()
        seconds = {"ms": self.median, "ms_p20": p20, "ms_p80": p80, "ms_min": min(self.wall)}
        seconds["cpu_ms"] = statistics.median(self.cpu)
        return {"samples": len(self.wall), **{key: significant(1e3 * s) for key, s in seconds.items()}}

    def ratios(self, ours: Timing) -> dict[str, float]:
        """This candidate's time over ours: of medians; of CPU medians; and the spread of the ratio within a turn."""
        at = dict(zip(ours.turns, ours.wall, strict=True))
        paired = [wall / at[turn] for turn, wall in zip(self.turns, self.wall, strict=True) if turn in at]
        p20, p50, p80 = np.percentile(paired, (20, 50, 80)).tolist()
        cpu = statistics.median(self.cpu) / statistics.median(ours.cpu)
        found = {
            "ratio": self.median / ours.median,
            "ratio_cpu": cpu,
            "paired": p50,
            "paired_p20": p20,
            "paired_p80": p80,
        }
        return {key: significant(value) for key, value in found.items()}


def significant(x: float, digits: int = 4) -> float:
    """``x`` rounded to significant digits."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else x


def _sample(fn: Callable[[], object], calls: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    min_turns: int = 3,
    max_turns: int = 40,
) -> dict[str, Timing]:
    """Times callables by turns, so that a noisy moment of the machine hits all of them alike.

    Each turn goes round the candidates, from a different one each time. A fast candidate is called once untimed in
    front of its sample: it then finds the caches as it leaves them itself, not as the one before it left them. A slow
    one takes part only in every k-th turn, so that each gets about the same share of the budget.

    Args:
        candidates: Name to callable.
        budget: Seconds for all candidates together, warm-up aside; more where ``min_turns`` of a slow one takes more.
        min_turns: Samples that each candidate gets at least.
        max_turns: And at most.

    Returns:
        Samples by name.
    """
    calls, fast, cost = {}, {}, {}
    for name, fn in candidates.items():
        once = _sample(fn, 1)[0]  # allocates, touches pages
        if once < 1.0:
            once = _sample(fn, 1)[0]
        if once < SAMPLE_S:
            once = _sample(fn, 20)[0]
        calls[name] = max(1, math.ceil(SAMPLE_S / once))
        fast[name] = once < SLOW_S
        cost[name] = once * (calls[name] + fast[name])
    share = budget / len(candidates)
    turns = {name: min(max_turns, max(min_turns, int(share / c))) for name, c in cost.items()}
    total = max(turns.values())
    names, timings = list(candidates), {name: Timing() for name in candidates}
    with _no_garbage_collection():
        for turn in range(total):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if (turn + 1) * turns[name] // total == turn * turns[name] // total:
                    continue
                if fast[name]:
                    candidates[name]()
                wall, cpu = _sample(candidates[name], calls[name])
                timings[name].turns.append(turn)
                timings[name].wall.append(wall)
                timings[name].cpu.append(cpu)
    return timings


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Sets the number of threads of torch, which ours follow, and of the BLAS of numpy and scipy inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ImportError):
                importlib.import_module("scipy.linalg")  # its BLAS can be told only once it is loaded
                import threadpoolctl

                stack.enter_context(threadpoolctl.threadpool_limits(n, user_api="blas"))
            yield
    finally:
        torch.set_num_threads(before)


def generator(seed: int = 0) -> torch.Generator:
    """A generator of its own: the global one is not touched."""
    return torch.Generator().manual_seed(seed)


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def extension() -> Any:
    """The compiled extension, or ``None`` where it is not built."""
    try:
        from balanced_rep import _C
    except ImportError:
        return None
    return _C


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def cpu_model() -> str:
    """The processor's own name for itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def machine() -> dict[str, Any]:
    """Machine, versions and commit: the same on every row. ``+`` after the commit: the sources differ from it."""
    dirty = _git("status", "--porcelain", "--", "balanced_rep", "csrc", "kernels", "setup.py")
    ext = extension()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": (_git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if dirty else ""),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": ext.isa() if ext else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "balanced_rep": balanced_rep.__version__,
    }


def others(path: Path, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a file that were not measured again.

    Args:
        path: The file; there may be none yet.
        rows: What was measured.
        key: Columns that name a row.

    Returns:
        Those whose name is not among what was measured.
    """
    if not path.exists():
        return []

    def name(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(column, "")) for column in key)

    again = {name(row) for row in rows}
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if name(row) not in again]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], *, kept: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes rows with :func:`machine` behind each; columns in the order in which they first appear.

    Args:
        path: The file, written anew.
        rows: What was measured.
        kept: Rows of earlier runs, which have their machine and commit already; they come first.
    """
    here = machine()
    full: list[dict[str, Any]] = [*map(dict, kept), *({**row, **here} for row in rows)]
    columns = list(dict.fromkeys(column for row in full for column in row if column not in here)) + list(here)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(full)
    temporary.replace(path)
