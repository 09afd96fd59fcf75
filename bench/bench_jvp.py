"""`jvp` on reduced diffusion backbones: K tangents against K + 1 forwards, and against what torch and JAX offer.

    python bench/bench_jvp.py                    # times, memory, accuracy: results/jvp.csv, about 10 minutes
    python bench/bench_jvp.py --true-size        # results/jvp_true_size.csv, about 8 minutes and 16 GB of memory
    pytest bench --benchmark-only                # the same calls one by one, with pytest-benchmark

Efficiency is E = (K + 1) T(forward) / T(jvp); beside it stands T(jvp) / T(one forward of batch (K + 1) B), in the
memory layout and with the library for its linear layers in which that is fastest, both taken from medians of
interleaved samples. The peers get the two things without which they fail on these models: attention without a fused
kernel, and GroupNorm on contiguous memory. Peak memory is that of a process of its own, above what it held with the
model loaded, at the largest K. Errors are those of the tangents, against float64. At true size each candidate runs
once, in a process of its own that gives time and memory. A run adds its rows to the file, in place of those of the
same model, K, candidate and number of threads: those of other runs stay, each with its commit. JAX takes part where
it is installed (`pip install jax`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _common as common  # before torch
import _jvp_report
import _models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from balanced_rep.autodiff import _products, jvp
from balanced_rep.autodiff._fallback import differentiable

MODELS = {
    "dit": (_models.dit, "hidden_states"),
    "sd": (_models.sd_unet, "sample"),
    "edm": (_models.edm_unet, "sample"),
    "sd14": (_models.sd_unet, "sample"),
    "dit_xl": (_models.dit, "hidden_states"),
}
FULL = {"sd14": _models.SD14, "dit_xl": _models.DIT_XL}
TRUE_SIZE = {"sd14": 4, "dit_xl": 16}  # with their K
CONVOLUTIONAL = ("sd", "edm", "sd14")
OURS, LOWER = "jvp", "jvp, tangent_dtype=bfloat16"
TOGETHER, LOOP, JAX = "vmap(jvp)", "loop of torch.func.jvp", "jax.vmap(jax.jvp), jit"
WIDE, WIDE_LAST, WIDE_SAME = "forward (K+1)B", "forward (K+1)B, channels_last", "forward (K+1)B, oneDNN linears"
CANDIDATES = ("forward", WIDE, WIDE_LAST, WIDE_SAME, OURS, LOWER, LOOP, TOGETHER, JAX)
SMALL = {"dit": {"size": 8, "layers": 2, "heads": 2}, "sd": {"size": 8, "channels": (32, 32, 64, 64)},
         "edm": {"size": 8, "channels": (32, 64, 64)}}  # fmt: skip
SMALL |= {"sd14": SMALL["sd"], "dit_xl": SMALL["dit"]}


class _SameLinears(TorchFunctionMode):
    """Linear layers by the library that `jvp` uses for its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and args[0].dim() > 1:
            y = _products.linear(args[0], args[1])
            return y if len(args) < 3 or args[2] is None else y.add_(args[2])
        return func(*args, **(kwargs or {}))


class Case:
    """A model, inputs of batch B and (K + 1) B, and K tangents."""

    def __init__(
        self, name: str, n_tangents: int, batch: int = 1, *, small: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        self.name, self.k = name, n_tangents
        make, self.argument = MODELS[name]
        sizes: dict[str, Any] = SMALL[name] if small else FULL.get(name, {})
        self.model, self.inputs = make(batch=batch, **sizes)
        self.make_last = lambda: make(batch=1, **sizes)[0].to(memory_format=torch.channels_last)
        self.wide = {
            key: torch.cat([v] * (1 + n_tangents)) if isinstance(v, Tensor) else v for key, v in self.inputs.items()
        }
        x: Tensor = self.inputs.pop(self.argument)
        tangents = torch.randn(n_tangents, *x.shape, generator=common.generator(2))
        self.cast(dtype, x, tangents)

    def cast(self, dtype: torch.dtype, x: Tensor, tangents: Tensor) -> None:
        """Model and inputs in a dtype."""
        self.model.to(dtype)
        self.x, self.tangents = x.to(dtype), tangents.to(dtype)
        self.inputs = {
            key: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in self.inputs.items()
        }

    def f(self, v: Tensor) -> Tensor:
        """The network as a function of the sample alone."""
        return self.model(v, **self.inputs)[0]

    def forward_last(self) -> Callable[[], Tensor]:
        """The wide forward with model and input in channels last."""
        model: nn.Module = self.make_last()
        wide = {**self.wide, self.argument: self.wide[self.argument].contiguous(memory_format=torch.channels_last)}
        return lambda: model(**wide)[0]

    def forward_same(self) -> Tensor:
        """The wide forward with our linear layers."""
        with _SameLinears():
            return self.model(**self.wide)[0]

    def one(self) -> Tensor:
        """A single product by torch."""
        with differentiable():
            return torch.func.jvp(self.f, (self.x,), (self.tangents[0],))[1]

    def together(self) -> Tensor:
        """All products by torch."""
        with differentiable():
            return torch.func.vmap(lambda t: torch.func.jvp(self.f, (self.x,), (t,))[1])(self.tangents)

    def ours(self, **options: Any) -> Tensor:
        """All products by `jvp`."""
        return jvp(self.f, self.x, self.tangents, chunk_size=None, strict=True, **options)[1]

    def candidates(self, only: str | None = None) -> dict[str, Callable[[], Any]]:
        """The calls to compare, those that make sense here; each returns tangents or an output.

        Args:
            only: Prepare no other candidate that needs memory.

        Returns:
            Name to call.
        """
        calls = {"forward": lambda: self.f(self.x), WIDE: lambda: self.model(**self.wide)[0]}
        if self.name in CONVOLUTIONAL and only in (None, WIDE_LAST):
            calls[WIDE_LAST] = self.forward_last()
        if _products.speeds(self.x.device).use_onednn or only == WIDE_SAME:
            calls[WIDE_SAME] = self.forward_same
        calls |= {OURS: self.ours, LOOP: self.one, TOGETHER: self.together}
        if _products.lower_precision(self.x.device, torch.bfloat16)[0]:  # elsewhere it is the same as without
            calls[LOWER] = lambda: self.ours(tangent_dtype=torch.bfloat16)
        if self.name == "dit" and only in (None, JAX) and importlib.util.find_spec("jax"):
            import _jax_dit

            calls[JAX] = _jax_dit.products(self.model, self.inputs, self.x, self.tangents)
        return calls


def measure(name: str, n_tangents: int, batch: int, budget: float, small: bool) -> list[dict[str, Any]]:
    """Rows of one model and K."""
    case = Case(name, n_tangents, batch, small=small)
    calls = case.candidates()
    timings = common.interleave(calls, budget=budget)
    wide = min(timing.median for c, timing in timings.items() if c.startswith(WIDE))
    forward, ours = timings["forward"].median, timings[OURS].median
    rows = []
    for candidate, timing in timings.items():
        each = n_tangents if candidate == LOOP else 1
        seconds = each * timing.median
        rows.append({
            "section": "time", "model": name, "batch": batch, "n_tangents": n_tangents,
            "threads": torch.get_num_threads(), "dtype": "float32", "candidate": candidate,
            "efficiency": common.significant((n_tangents + 1) * forward / seconds),
            "over_wide_forward": common.significant(seconds / wide),
            "jvp_faster": common.significant(seconds / ours), "times": each,
            **timing.columns(),
        })  # fmt: skip
    return rows


def measure_true_size(name: str, n_tangents: int, batch: int, small: bool) -> list[dict[str, Any]]:
    """Rows of a model of true size and K: one call of each candidate."""
    found = {}
    lower = _products.lower_precision(torch.device("cpu"), torch.bfloat16)[0]
    for candidate in (
        "forward", WIDE, *([WIDE_LAST] if name in CONVOLUTIONAL else []), OURS, *([LOWER] if lower else []),
    ):  # fmt: skip
        found[candidate] = alone(name, n_tangents, batch, candidate, small)
        print(f"{name}, K = {n_tangents}, {candidate}: {found[candidate]['seconds']:.3g} s", file=sys.stderr)
    forward, ours = (found[candidate]["seconds"] for candidate in ("forward", OURS))
    wide = min(one["seconds"] for candidate, one in found.items() if candidate.startswith(WIDE))
    rows = []
    for candidate, one in found.items():
        ms = common.significant(1e3 * one["seconds"])
        rows.append({
            "section": "time", "model": name, "batch": batch, "n_tangents": n_tangents,
            "threads": torch.get_num_threads(), "dtype": "float32", "candidate": candidate,
            "efficiency": common.significant((n_tangents + 1) * forward / one["seconds"]),
            "over_wide_forward": common.significant(one["seconds"] / wide),
            "jvp_faster": common.significant(one["seconds"] / ours), "times": 1,
            "samples": 1, "ms": ms, "ms_p20": ms, "ms_p80": ms, "ms_min": ms,
            "cpu_ms": common.significant(1e3 * one["cpu_seconds"]),
            "peak_mb": common.significant(one["peak_mb"], 3),
        })  # fmt: skip
    return rows


def relative(got: Tensor, want: Tensor) -> float:
    """Largest error of a tangent over its norm."""
    error = (got.double() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    return error.max().item()


def accuracy(name: str, n_tangents: int, small: bool) -> list[dict[str, Any]]:
    """Errors of tangents against float64, of the same rounded weights and inputs."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(name, n_tangents, small=small, dtype=dtype)
        found = {OURS: case.ours(), TOGETHER: case.together()}
        if dtype == torch.float32:
            found[LOWER] = _lower(case)
        case.cast(torch.float64, case.x, case.tangents)
        want = case.together()
        rows += [{
            "section": "accuracy", "model": name, "batch": 1, "n_tangents": n_tangents,
            "dtype": common.dtype_name(dtype),
            "candidate": candidate, "error": common.significant(relative(got, want), 3),
        } for candidate, got in found.items()]  # fmt: skip
    return rows


def _lower(case: Case) -> Tensor:
    """With tangents in bfloat16, whether that is faster here or not."""
    chosen, _products.lower_precision = _products.lower_precision, lambda device, dtype: (True, "for its accuracy")
    try:
        return case.ours(tangent_dtype=torch.bfloat16)
    finally:
        _products.lower_precision = chosen


def alone(name: str, n_tangents: int, batch: int, candidate: str, small: bool) -> dict[str, float]:
    """Seconds of a call, and MB that it needs on top of a process that holds the model and inputs."""
    command = [sys.executable, __file__, "--alone", candidate, "--models", name, "--tangents", str(n_tangents)]
    command += ["--batch", str(batch), "--threads", str(torch.get_num_threads()), *(["--small"] if small else [])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed buffers go back to the system
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def _alone_here(name: str, n_tangents: int, batch: int, candidate: str, small: bool) -> dict[str, float]:
    def status(key: str) -> float:
        found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
        return float(found[1]) / 1024 if found else 0.0

    Case(name, 1, small=True).candidates(only=candidate)[candidate]()  # what is imported or set up at a first call
    call = Case(name, n_tangents, batch, small=small).candidates(only=candidate)[candidate]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "peak_mb": max(status("VmHWM") - before, 0.0)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the CSV, prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reduced = [name for name in MODELS if name not in TRUE_SIZE]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: the reduced ones")
    parser.add_argument("--true-size", action="store_true", help="SD 1.4 with K = 4 and DiT-XL/2 with K = 16 instead")
    parser.add_argument("--tangents", type=int, nargs="+", help="values of K (default: 1 4 8 16; at true size one)")
    parser.add_argument("--batch", type=int, default=1, help="samples (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per model and K (default: 20)")
    parser.add_argument("--small", action="store_true", help="tiny models: does it run at all")
    parser.add_argument("--no-memory", action="store_true", help="no peak memory")
    parser.add_argument("--alone", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="the CSV to add to (default: in bench/results/)")
    args = parser.parse_args(argv)
    models = args.models or (list(TRUE_SIZE) if args.true_size else reduced)
    folder = Path(tempfile.gettempdir()) if args.small else common.RESULTS  # tiny models are no results
    args.out = args.out or folder / ("jvp_true_size.csv" if args.true_size else "jvp.csv")
    with torch.no_grad(), common.threads(args.threads):
        if args.alone:
            print(json.dumps(_alone_here(models[0], args.tangents[0], args.batch, args.alone, args.small)))
            return 0
        rows = []
        for name in models:
            if name in TRUE_SIZE:
                for k in args.tangents or [TRUE_SIZE[name]]:
                    rows += measure_true_size(name, k, args.batch, args.small)
                continue
            several = sorted(args.tangents or [1, 4, 8, 16])
            for k in several:
                new = measure(name, k, args.batch, args.budget, args.small)
                for row in new if k == several[-1] and not args.no_memory else ():
                    peak = alone(name, k, args.batch, row["candidate"], args.small)["peak_mb"]
                    row["peak_mb"] = common.significant(peak, 3)
                rows += new
                print(f"{name}, K = {k}: done", file=sys.stderr)
            rows += accuracy(name, 2, args.small)
    common.write_csv(args.out, rows, kept=common.others(args.out, rows, _jvp_report.KEY))
    read = _jvp_report.report.read(args.out)
    print(f"{args.out}: {len(rows)} rows\n\n{_jvp_report.times_table(read)}")
    if not args.true_size:
        print(f"\n{_jvp_report.accuracy_table(read)}\n\n{_jvp_report.report.bars_table(_jvp_report.bars(read))}")
    return 0


@pytest.mark.parametrize("candidate", ["forward", WIDE, OURS, LOOP, TOGETHER])
@pytest.mark.parametrize("name", SMALL)
def test_jvp(benchmark: Any, name: str, candidate: str) -> None:
    with torch.no_grad(), common.threads(1):
        benchmark(Case(name, 2, small=True).candidates()[candidate])


if __name__ == "__main__":
    raise SystemExit(main())
