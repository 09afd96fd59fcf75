"""`jvp` on reduced diffusion backbones: K tangents against K + 1 forwards, and against what torch offers.

    python bench/bench_jvp.py                    # times, memory, results/jvp.csv
    pytest bench --benchmark-only                # the same calls one by one, with pytest-benchmark

Efficiency is E = (K + 1) T(forward) / T(jvp); beside it stands T(jvp) / T(one forward of batch (K + 1) B), both taken
from medians of interleaved samples. The peers get the two things without which they fail on these models: attention
without a fused kernel, and GroupNorm on contiguous memory. Peak memory is that of a process of its own, above what it
held with the model loaded.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _common as common  # before torch
import _models
import pytest
import torch
from torch import Tensor

from balanced_rep.autodiff import jvp
from balanced_rep.autodiff._fallback import differentiable

MODELS = {"dit": (_models.dit, "hidden_states"), "sd": (_models.sd_unet, "sample"), "edm": (_models.edm_unet, "sample")}
CANDIDATES = ("forward", "forward (K+1)B", "jvp", "vmap(jvp)", "torch.func.jvp")
SMALL = {"dit": {"size": 8, "layers": 2, "heads": 2}, "sd": {"size": 8, "channels": (32, 32, 64, 64)},
         "edm": {"size": 8, "channels": (32, 64, 64)}}  # fmt: skip


def candidates(name: str, n_tangents: int, batch: int = 1, small: bool = False) -> dict[str, Callable[[], Any]]:
    """The calls to compare; each returns tangents or an output."""
    make, argument = MODELS[name]
    sizes: dict[str, Any] = SMALL[name] if small else {}
    model, inputs = make(batch=batch, **sizes)
    x: Tensor = inputs.pop(argument)
    wide = make(batch=(1 + n_tangents) * batch, **sizes)[1]
    tangents = torch.randn(n_tangents, *x.shape, generator=common.generator(2))

    def f(v: Tensor) -> Tensor:
        return model(v, **inputs)[0]

    def one() -> Tensor:
        with differentiable():
            return torch.func.jvp(f, (x,), (tangents[0],))[1]

    def together() -> Tensor:
        with differentiable():
            return torch.func.vmap(lambda t: torch.func.jvp(f, (x,), (t,))[1])(tangents)

    calls = {
        "forward": lambda: f(x),
        "forward (K+1)B": lambda: model(**wide)[0],
        "jvp": lambda: jvp(f, x, tangents, chunk_size=None, strict=True)[1],
        "vmap(jvp)": together,
        "torch.func.jvp": one,
    }
    return {name: calls[name] for name in CANDIDATES}


def measure(name: str, n_tangents: int, batch: int, budget: float, small: bool) -> list[dict[str, Any]]:
    """Rows of one model and K."""
    calls = candidates(name, n_tangents, batch, small)
    want = calls["vmap(jvp)"]()
    error = ((calls["jvp"]() - want).norm() / want.norm()).item()
    timings = common.interleave(calls, budget=budget)
    forward, wide, ours = (timings[c].median for c in ("forward", "forward (K+1)B", "jvp"))
    rows = []
    for candidate, timing in timings.items():
        each = n_tangents if candidate == "torch.func.jvp" else 1  # the loop over tangents
        seconds = timing.median * (1 if candidate == "forward" else each)
        rows.append({
            "model": name, "batch": batch, "n_tangents": n_tangents, "threads": torch.get_num_threads(),
            "dtype": "float32",
            "candidate": "loop of torch.func.jvp" if each > 1 or candidate == "torch.func.jvp" else candidate,
            "efficiency": common.significant((n_tangents + 1) * forward / seconds),
            "over_wide_forward": common.significant(seconds / wide),
            "jvp_faster": common.significant(seconds / ours),
            "difference": common.significant(error) if candidate == "jvp" else "",
            **timing.columns(),
        })  # fmt: skip
    return rows


def peak_of(name: str, n_tangents: int, batch: int, candidate: str, small: bool) -> float:
    """MB that a call needs on top of a process that holds the model and inputs."""
    command = [sys.executable, __file__, "--peak-of", candidate, "--models", name, "--tangents", str(n_tangents)]
    command += ["--batch", str(batch), "--threads", str(torch.get_num_threads()), *(["--small"] if small else [])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed buffers go back to the system
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def _peak_here(name: str, n_tangents: int, batch: int, candidate: str, small: bool) -> float:
    def status(key: str) -> float:
        found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
        return float(found[1]) / 1024 if found else 0.0

    call = candidates(name, n_tangents, batch, small)[candidate]
    before = status("VmRSS")
    call()
    return max(status("VmHWM") - before, 0.0)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A table of efficiencies."""
    lines = ["| model | K | candidate | ms | E | T / T(forward (K+1)B) | peak MB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['n_tangents']} | {row['candidate']} | {row['ms']} | {row['efficiency']} | "
            f"{row['over_wide_forward']} | {row.get('peak_mb', '')} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the CSV, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tangents", type=int, nargs="+", default=[1, 4, 16], help="values of K (default: 1 4 16)")
    parser.add_argument("--batch", type=int, default=1, help="samples (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds per model and K (default: 60)")
    parser.add_argument("--small", action="store_true", help="tiny models: does it run at all")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--peak-of", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "jvp.csv", help="the CSV to write")
    args = parser.parse_args(argv)
    with torch.no_grad(), common.threads(args.threads):
        if args.peak_of:
            print(_peak_here(args.models[0], args.tangents[0], args.batch, args.peak_of, args.small))
            return 0
        rows = []
        for name in args.models:
            for k in args.tangents:
                new = measure(name, k, args.batch, args.budget, args.small)
                if not args.no_memory:
                    for row, candidate in zip(new, CANDIDATES, strict=True):
                        row["peak_mb"] = common.significant(peak_of(name, k, args.batch, candidate, args.small), 3)
                rows += new
    common.write_csv(args.out, rows)
    print(f"{args.out}: {len(rows)} rows\n\n{summary(rows)}")
    return 0


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("name", MODELS)
def test_jvp(benchmark: Any, name: str, candidate: str) -> None:
    with torch.no_grad(), common.threads(1):
        benchmark(candidates(name, 2, small=True)[candidate])


if __name__ == "__main__":
    raise SystemExit(main())
