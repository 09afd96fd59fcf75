"""Errors of the moments against float64 on the same rounded values, in units of what is promised.

    python bench/bench_accuracy.py               # results/accuracy.csv, the table

Values are a (g + m) for normal g and a few shapes that hurt, m from 0 to 1000 and a from 1e-20 to 1e15, rounded to the
dtype first. The promise: mean within 1e-6 max(|mean|, std), std 1e-6 relative, skewness 1e-5 (1 + |skewness|),
kurtosis 1e-5 relative; 1e-12 for float64 values. An error of 1 is the bar, less is better.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common as common  # before torch
import _peers as peers
import numpy as np
import report
import torch
from torch import Tensor

import balanced_rep as br
from balanced_rep.ops.moments import MOMENTS, moments_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = {"rows": (8, 81920), "short rows": (256, 509), "columns": (4096, 24)}
MEANS = (0.0, 1.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # over the standard deviation
SCALES = (1e-20, 1e-10, 1.0, 1e8, 1e15)
STEEPEST = 1010.0  # mean / std of the rounded values up to which errors are promised, with room for the sample
UNITS = {"mean": 1e-6, "std": 1e-6, "skewness": 1e-5, "kurtosis": 1e-5}
UNITS64 = dict.fromkeys(UNITS, 1e-12)
SLOW = ("triton",)  # Triton's interpreter: short rows only

Measured = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        family: Distribution, before scale and mean.
        mean: Mean over standard deviation.
        scale: Standard deviation, about.
        layout: A key of :data:`SHAPES`; "columns" reduces the first dim.
    """

    family: str
    mean: float
    scale: float
    layout: str

    @property
    def name(self) -> str:
        """As in the CSV."""
        return f"{self.family} mean/std={self.mean:g} scale={self.scale:g} {self.layout}"

    def values(self) -> Tensor:
        """float64 values."""
        g = torch.randn(SHAPES[self.layout], generator=common.generator(), dtype=torch.float64)
        if self.family == "relu":
            g = g.relu()
        elif self.family == "heavy":
            g = g.pow(5) / 30
        elif self.family == "step":
            n = g.shape[0] if self.layout == "columns" else g.shape[1]
            jump = (torch.arange(n) >= n // 2).double() * 50
            g = (g + (jump[:, None] if self.layout == "columns" else jump)) / 25
        return (g + self.mean) * self.scale


def cases() -> Iterator[Case]:
    """Normal values over means at one scale and over scales at three means, and other shapes at one scale."""
    for layout in SHAPES:
        for scale in SCALES:
            for mean in MEANS if scale == 1.0 else (0.0, 30.0, 1000.0):
                yield Case("normal", mean, scale, layout)
        for family in ("relu", "heavy", "step"):
            for mean in (0.0, 100.0):
                yield Case(family, mean, 1.0, layout)


def exact(x: Tensor) -> Measured:
    """The measures of the values: the float64 reference, or extended precision where the values are float64."""
    if x.dtype != torch.float64:
        n, mean, m2, m3, m4 = moments_reference(x.double(), 1, 0, 0, 0.0)[:5]
        return {
            "mean": mean,
            "std": (m2 / n).sqrt(),
            "skewness": n.sqrt() * m3 / m2 / m2.sqrt(),
            "kurtosis": n * m4 / m2 / m2,
        }
    v = x.numpy().astype(np.longdouble)
    mean = v.mean(1, keepdims=True)
    d = v - mean
    d2 = d * d
    m2, m3, m4 = d2.mean(1), (d2 * d).mean(1), (d2 * d2).mean(1)
    found = {"mean": mean[:, 0], "std": np.sqrt(m2), "skewness": m3 / m2 / np.sqrt(m2), "kurtosis": m4 / m2 / m2}
    return {name: torch.from_numpy(value.astype(np.float64)) for name, value in found.items()}


def errors(got: Measured, want: Measured, units: dict[str, float]) -> dict[str, float]:
    """Largest error of each measure, in units of the bar; NaN where a result is not finite."""
    allowed = {
        "mean": torch.maximum(want["mean"].abs(), want["std"]),
        "std": want["std"],
        "skewness": 1 + want["skewness"].abs(),
        "kurtosis": want["kurtosis"],
    }
    found = {}
    for name, value in got.items():
        error = (value.double() - want[name]).abs() / (units[name] * allowed[name])
        found[name] = float("nan") if error.isnan().any() else error.max().item()
    return found


def ours(x: Tensor, backend: str) -> Measured:
    """The public function with one backend: results are float32."""
    with br.backend(backend):
        stats = br.representation_stats(x)
    return {name: getattr(stats, name) for name in UNITS}


def raw_power_sums(x: Tensor, dtype: torch.dtype) -> Measured:
    """What must not be done: sums of x, x^2, x^3, x^4, and the central moments from them."""
    x, n = x.to(dtype), x.shape[1]
    x2 = x * x
    s1, s2, s3, s4 = (t.sum(1) / n for t in (x, x2, x2 * x, x2 * x2))
    m2 = s2 - s1 * s1
    m3 = s3 - 3 * s1 * s2 + 2 * s1.pow(3)
    m4 = s4 - 4 * s1 * s3 + 6 * s1 * s1 * s2 - 3 * s1.pow(4)
    return {"mean": s1, "std": m2.clamp_min(0).sqrt(), "skewness": m3 / m2.pow(1.5), "kurtosis": m4 / m2.pow(2)}


def torch_eager(x: Tensor) -> Measured:
    """The natural composition, in float32."""
    found = dict(zip(peers.MEASURES, peers.eager(x, 1), strict=True))
    found["std"] = x.float().std(1, correction=0)
    return {name: found[name] for name in UNITS}


def torch_alone(x: Tensor) -> Measured:
    """``x.mean`` and ``x.std`` in the dtype of the values: what is written first."""
    return {"mean": x.mean(1), "std": x.std(1, correction=0)}


def numpy_eager(x: Tensor) -> Measured:
    """The composition in numpy, in float32."""
    found = dict(zip(peers.MEASURES, peers.numpy_measures(x.float().numpy(), 1), strict=True))
    return {name: torch.from_numpy(np.asarray(found[name])) for name in UNITS}


def scipy_shape(x: Tensor) -> Measured:
    """``scipy.stats.skew`` and ``kurtosis`` in float32."""
    from scipy import stats

    array = x.float().numpy()
    skewness, kurtosis = stats.skew(array, axis=1), stats.kurtosis(array, axis=1, fisher=False)
    return {"skewness": torch.from_numpy(skewness), "kurtosis": torch.from_numpy(kurtosis)}


PEERS: dict[str, Callable[[Tensor], Measured]] = {
    "torch.mean, torch.std": torch_alone,
    "torch eager": torch_eager,
    "numpy": numpy_eager,
    "scipy.stats.skew, kurtosis": scipy_shape,
    "raw power sums, float32": lambda x: raw_power_sums(x, torch.float32),
    "raw power sums, float64": lambda x: raw_power_sums(x, torch.float64),
}
PEERS64 = ("torch.mean, torch.std", "raw power sums, float64")  # the others compute in float32


def candidates(x: Tensor, layout: str) -> dict[str, tuple[str, Callable[[], Measured]]]:
    """Role and call by name: each backend that can run it, the C++ one on each instruction set, and the peers."""
    args = (x, 1, 0, 0, 0.0)
    found: dict[str, tuple[str, Callable[[], Measured]]] = {}
    for backend in ("reference", *MOMENTS.impls):
        if MOMENTS.why_not(backend, *args) is None and not (backend in SLOW and layout != "short rows"):
            found |= {name: ("ours", call) for name, call in _backend_calls(x, backend).items()}
    peers_of = PEERS64 if x.dtype == torch.float64 else tuple(PEERS)
    return found | {name: ("peer", lambda fn=PEERS[name]: fn(x)) for name in peers_of}


def _backend_calls(x: Tensor, backend: str) -> dict[str, Callable[[], Measured]]:
    if backend != "cpp":
        return {backend: lambda: ours(x, backend)}
    ext = common.extension()
    chosen = ext.isa()

    def on(isa: str) -> Measured:
        ext.set_isa(isa)
        try:
            return ours(x, backend)
        finally:
            ext.set_isa(chosen)

    return {f"cpp, {isa}": lambda isa=isa: on(isa) for isa in ext.isas()}


def promised(x: Tensor, want: Measured) -> bool:
    """Whether the rounded values still are such a case: finite, above the subnormals, not nearly constant."""
    normal = 16 * torch.finfo(x.dtype).smallest_normal
    return bool(
        x.isfinite().all() and (want["std"] > normal).all() and (want["mean"].abs() < STEEPEST * want["std"]).all()
    )


def run(every: int = 1) -> list[dict[str, Any]]:
    """All cases in all dtypes, or every k-th."""
    rows = []
    for case in list(cases())[::every]:
        values = case.values()
        for dtype in DTYPES:
            x = values.to(dtype)
            view = x.T if case.layout == "columns" else x
            want, units = exact(view), UNITS64 if dtype == torch.float64 else UNITS
            if promised(view, want):
                for name, (role, call) in candidates(view, case.layout).items():
                    rows.append(_row(case, dtype, name, role, errors(call(), want, units)))
    return rows


def _row(case: Case, dtype: torch.dtype, name: str, role: str, found: dict[str, float]) -> dict[str, Any]:
    return {
        **{"bench": "accuracy", "op": "moments", "case": case.name, "family": case.family, "layout": case.layout},
        **{"mean_over_std": case.mean, "scale": case.scale, "shape": "x".join(map(str, SHAPES[case.layout]))},
        **{"dtype": common.dtype_name(dtype), "candidate": name, "role": role, "threads": torch.get_num_threads()},
        **{f"{measure}_error": common.significant(found[measure], 3) for measure in UNITS if measure in found},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the errors, writes the CSV, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take every k-th case only")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "accuracy.csv", help="the CSV to write")
    args = parser.parse_args(argv)
    with common.threads(1), np.errstate(all="ignore"):
        rows = run(args.every)
    common.write_csv(args.out, rows)
    written = report.read(args.out)
    print(f"{args.out}: {len(rows)} rows\n\nErrors in units of the bar\n\n{report.accuracy_table(written)}\n")
    print(report.bars_table(report.accuracy_bars(written)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
