"""Randomized SVD against its peers at equal error, the Jacobian's in network passes and seconds, streams.

    python bench/bench_svd.py                    # results/svd.csv, svd_values.csv, the bars; 4 minutes with --budget 2
    python bench/bench_svd.py --sections dense   # replaces the rows of this section, keeps the others
    pytest bench --benchmark-only                # single calls, with pytest-benchmark

Equal error: of our calls with 4, 5, 6, ... rounds, the fastest one counts whose Frobenius error exceeds that of the
best approximation by no more than the peer's does, or by no more than 1e-6, which is rounding. Errors are computed in
float64 from what was returned. Peers get eight columns of oversampling, as their users give them.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _common as common  # before torch
import _svd_data as data
import _svd_streaming
import numpy as np
import pytest
import torch
from torch import Tensor

import balanced_rep as br

K, OVERSAMPLING = 32, 8
ROUNDS = (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)
ROUNDING = 1e-6
TIMED = ("dense", "batch")
SECTIONS = ("dense", "batch", "jacobian", "networks", "streaming", "certificate", "values")
Row = dict[str, Any]
Triple = tuple[Any, Any, Any]


def peers(A: Tensor, k: int) -> dict[str, Callable[[], Triple]]:
    """Name to a call that returns U, S, Vh; those that are not installed are left out."""
    import scipy.sparse.linalg
    from sklearn.utils.extmath import randomized_svd

    X = A.numpy()

    def lowrank(niter: int) -> Triple:
        U, S, V = torch.svd_lowrank(A, k + OVERSAMPLING, niter)
        return U[:, :k], S[:k], V[:, :k].mT

    def svds(solver: str, tol: float) -> Triple:
        U, S, Vh = scipy.sparse.linalg.svds(X, k, solver=solver, tol=tol, rng=np.random.default_rng(0))
        return U[:, ::-1], S[::-1], Vh[::-1]

    calls: dict[str, Callable[[], Triple]] = {
        **{f"torch.svd_lowrank, niter={q}": (lambda q=q: lowrank(q)) for q in (2, 3, 4)},
        "sklearn randomized_svd": lambda: randomized_svd(X, k, n_oversamples=OVERSAMPLING, random_state=0),
        "scipy svds, arpack": lambda: svds("arpack", 1e-3),
        "scipy svds, propack": lambda: svds("propack", 1e-3),
    }
    if importlib.util.find_spec("fbpca"):
        import fbpca

        calls["fbpca"] = lambda: fbpca.pca(X, k, raw=True, l=k + OVERSAMPLING)
    return calls


def excess(A: Tensor, best: Tensor, triple: Triple) -> float:
    """Frobenius error over that of the best approximation, less 1; the largest of a batch."""
    U, S, Vh = (torch.as_tensor(np.ascontiguousarray(X)).double() for X in triple)
    error = torch.linalg.matrix_norm(A.double() - (U * S.unsqueeze(-2)) @ Vh)
    return float((error / best - 1).max())


def equal_error(
    A: Tensor, k: int, others: dict[str, Callable[[], Triple]], budget: float, section: str, case: str
) -> list[Row]:
    """A row for each peer: its time over that of our fastest call with no larger error."""
    best = data.best_error(A, k)
    ours = {f"rounds={r}": (lambda r=r: tuple(br.randomized_svd(A, k, rounds=r))) for r in ROUNDS}
    calls = {**ours, **others}
    torch.manual_seed(0)
    errors = {name: excess(A, best, call()) for name, call in calls.items()}
    enough = {}
    for name in others:
        good = [r for r in ours if errors[r] <= max(errors[name], ROUNDING)]
        enough[name] = good[0] if good else ""
    used = [name for name in ours if name in enough.values()]
    timings = common.interleave({name: calls[name] for name in [*used, *others]}, budget=budget, max_turns=25)
    rows = []
    for name in [*used, *others]:
        row = {
            "section": section, "case": case, "candidate": f"randomized_svd, {name}" if name in ours else name,
            "threads": torch.get_num_threads(), "excess": common.significant(errors[name]), **timings[name].columns(),
        }  # fmt: skip
        if name in others and enough[name]:
            row |= {"against": enough[name], "ours_excess": common.significant(errors[enough[name]])}
            row |= timings[name].ratios(timings[enough[name]])
        rows.append(row)
    return rows


def dense(budget: float, small: bool) -> list[Row]:
    """4096 x 1024, k = 32, on every spectrum."""
    m, n = (512, 256) if small else (4096, 1024)
    rows = []
    for kind in (*data.SPECTRA, *data.MEASURED):
        A = data.matrix(kind, m, n, K)
        found = equal_error(A, K, peers(A, K), budget, "dense", kind)
        rows += found
        print(*(line(row) for row in found), sep="\n", flush=True)
    return rows


def batch(budget: float, small: bool) -> list[Row]:
    """64 matrices of 1024 x 768, k = 16; the whole SVD is timed on 4 of them."""
    count, m, n, k = (4, 96, 80, 4) if small else (64, 1024, 768, 16)
    single = data.matrix("1 / i^0.7", m, n, k)
    A = torch.stack([single[:, torch.randperm(n, generator=common.generator(i))] for i in range(count)])
    few = A[: max(1, count // 16)]

    def lowrank() -> Triple:
        U, S, V = torch.svd_lowrank(A, k + OVERSAMPLING, 2)
        return U[..., :k], S[..., :k], V[..., :k].mT

    def loop() -> Triple:
        parts = [torch.svd_lowrank(a, k + OVERSAMPLING, niter=2) for a in A]
        return tuple(torch.stack(x)[..., :k] for x in zip(*parts, strict=True))

    rows = equal_error(A, k, {"torch.svd_lowrank, niter=2": lowrank}, budget, "batch", f"{count} x {m} x {n}")
    ours = next(row for row in rows if row["candidate"].startswith("randomized_svd"))
    rounds = int(ours["candidate"].rpartition("=")[2])
    timings = common.interleave(
        {
            "randomized_svd": lambda: br.randomized_svd(A, k, rounds=rounds),
            "a loop of torch.svd_lowrank, niter=2": loop,
            "torch.linalg.svd": lambda: torch.linalg.svd(few, full_matrices=False),
        },
        budget=budget,
        max_turns=10,
    )
    for name, scale in (("a loop of torch.svd_lowrank, niter=2", 1), ("torch.linalg.svd", count / len(few))):
        ratios = {
            key: common.significant(v * scale) for key, v in timings[name].ratios(timings["randomized_svd"]).items()
        }
        rows.append({
            "section": "batch", "case": ours["case"], "candidate": name, "threads": torch.get_num_threads(),
            "against": f"rounds={rounds}", "scaled_from": len(few) if scale > 1 else "",
            **timings[name].columns(), **ratios,
        })  # fmt: skip
    print(*(line(row) for row in rows), sep="\n", flush=True)
    return rows


def jacobian(budget: float, small: bool) -> list[Row]:
    """Network passes until the top 16 values are within 1 %, and what `tol=1e-2` spends; power iteration beside it."""
    k, rows = 4 if small else 16, []
    for kind in ("Gaussian denoiser", "memorizing denoiser", "trained U-Net"):
        shown = len(rows)
        p = data.problem(kind, small)
        asymmetry = float((p.J - p.J.mT).norm() / (p.J + p.J.mT).norm())
        for mode in ("auto", "jvp+vjp"):
            for seed in range(1 if small else 3):
                seen: list[tuple[int, int, float]] = []

                def watch(step: Any, seen: list = seen, p: data.Problem = p) -> None:
                    if step.S.shape[1] >= k:
                        seen.append((step.passes, step.rounds, _worst(step.S[0], p.S)))

                start = time.perf_counter()
                found = br.jacobian_svd(p.f, p.x, k, mode=mode, seed=seed, progress=watch)
                seconds = time.perf_counter() - start
                first = next(((passes, rounds) for passes, rounds, error in seen if error <= 0.01), ("", ""))
                rows.append({
                    "section": "jacobian", "case": kind, "candidate": f"jacobian_svd, {mode}", "seed": seed,
                    "threads": torch.get_num_threads(), "n": p.x.numel(), "asymmetry": common.significant(asymmetry),
                    "passes_to_1pc": first[0], "rounds_to_1pc": first[1], "passes": int(found.info.passes),
                    "rounds": int(found.info.rounds), "value_error": common.significant(_worst(found.S, p.S)),
                    "converged": bool(found.info.converged), "ms": common.significant(1e3 * seconds),
                })  # fmt: skip
        rows.append(_power_iteration(kind, p, k))
        print(*(line(row) for row in rows[shown:]), sep="\n", flush=True)
    return rows


def _worst(S: Tensor, true: Tensor) -> float:
    k = min(len(S), len(true))
    return float(((S[:k].double() - true[:k]).abs() / true[:k]).max())


def _power_iteration(kind: str, p: data.Problem, k: int, limit: int = 120) -> Row:
    """One vector at a time with deflation, J and J^T in turn, told when each value is within 1 %."""
    passes, missed, J = 0, 0, p.J.double()
    V = torch.zeros(J.shape[1], 0, dtype=torch.float64)
    for i in range(k):
        v = torch.randn(J.shape[1], generator=common.generator(i), dtype=torch.float64)
        for _ in range(limit):
            v = v - V @ (V.mT @ v)
            v = v / v.norm()
            u = J @ v
            passes += 1
            if abs(u.norm() - p.S[i]) <= 0.01 * p.S[i]:
                break
            v = J.mT @ u
            passes += 1
        else:
            missed += 1
        V = torch.cat([V, (v / v.norm()).unsqueeze(1)], 1)
    return {
        "section": "jacobian", "case": kind, "candidate": "power iteration with deflation, oracle stop",
        "threads": torch.get_num_threads(), "n": p.x.numel(), "passes_to_1pc": "" if missed else passes,
        "rounds_to_1pc": "" if missed else passes, "passes": passes, "rounds": passes, "missed": missed,
    }  # fmt: skip


def networks(budget: float, small: bool) -> list[Row]:
    """Seconds on networks with n >= 3072 against the whole Jacobian (64 columns, scaled up) and its SVD."""
    k, rows = 4 if small else 16, []
    for name in ("trained U-Net", "trained DiT"):
        f, x = data.trained(name.removeprefix("trained "), 16 if small else 32, 20 if small else 350)
        n, columns = x.numel(), 16 if small else 64
        seen: list[Any] = []
        start = time.perf_counter()
        found = br.jacobian_svd(f, x, k, progress=seen.append)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        data.jacobian(f, x, columns, chunk=16)
        forming = (time.perf_counter() - start) * n / columns
        start = time.perf_counter()
        torch.linalg.svd(torch.randn(n, n, generator=common.generator(0)), full_matrices=False)
        full = forming + time.perf_counter() - start
        for candidate, seconds in (("jacobian_svd", ours), ("whole Jacobian and its SVD", full)):
            rows.append({
                "section": "networks", "case": name, "candidate": candidate, "threads": torch.get_num_threads(), "n": n,
                "passes": int(found.info.passes) if seconds == ours else n, "rounds": int(found.info.rounds),
                "method": found.info.method, "converged": bool(found.info.converged),
                "ms": common.significant(1e3 * seconds), "ratio": common.significant(seconds / ours),
                "scaled_from": "" if seconds == ours else columns,
            })  # fmt: skip
        print(*(line(row) for row in rows[-2:]), sep="\n", flush=True)
    return rows


def streaming(budget: float, small: bool) -> list[Row]:
    """StreamingPCA; see _svd_streaming.py."""
    rows = _svd_streaming.streaming(small)
    print(*(line(row) for row in rows), sep="\n", flush=True)
    return rows


def certificate(budget: float, small: bool) -> list[Row]:
    """Certified over true error for every spectrum and number of rounds; the worst of each."""
    m, n = (512, 256) if small else (4096, 1024)
    rows = []
    for kind in (*data.SPECTRA, *data.MEASURED):
        A = data.matrix(kind, m, n, K)
        for rounds in (4, 6, 9):
            for precision in ("full", "bfloat16"):
                result = br.randomized_svd(A, K, rounds=rounds, precision=precision)
                U, S, Vh = (X.double() for X in result)
                true = float((A.double() - (U * S) @ Vh).norm() / A.double().norm())
                rows.append({
                    "section": "certificate", "case": kind, "candidate": f"rounds={rounds}, {precision}",
                    "threads": torch.get_num_threads(), "rel_error": common.significant(true),
                    "certified": common.significant(float(result.info.rel_error)), "tight": bool(result.info.tight),
                    "off": common.significant(abs(float(result.info.rel_error) / true - 1)),
                })  # fmt: skip
    worst = max(rows, key=lambda row: row["off"])
    print(f"certificate: {len(rows)} decompositions, worst {worst['off']:.2g} ({worst['case']}, {worst['candidate']})")
    return rows


def values(budget: float, small: bool) -> list[Row]:
    """Singular values with their certified band, against the truth: what the figures show; nothing is timed."""
    m, n = (512, 256) if small else (4096, 1024)
    rows: list[Row] = []

    def add(page: str, case: str, name: str, true: Tensor, found: Tensor, upper: Tensor) -> None:
        for i, row in enumerate(zip(true[: len(found)].tolist(), found.tolist(), upper.tolist(), strict=True)):
            numbers = {key: common.significant(v, 7) for key, v in zip(("true", "found", "upper"), row, strict=True)}
            rows.append({"section": "values", "page": page, "case": case, "candidate": name, "index": i + 1, **numbers})

    for kind in ("1 / i", "exponential", "activations"):
        A = data.matrix(kind, m, n, K)
        true, energy = torch.linalg.svdvals(A.double()), A.double().square().sum()
        for rounds in (5, 9):
            result = br.randomized_svd(A, K, rounds=rounds)
            S = result.S.double()
            upper = (S.square() + result.info.rel_error.square() * energy).sqrt()
            add("randomized_svd", kind, f"{rounds} rounds", true, S, upper)
    for kind in ("Gaussian denoiser", "trained U-Net"):
        p = data.problem(kind, small)
        for tol in (0.1, 0.01):
            result = br.jacobian_svd(p.f, p.x, 4 if small else 16, tol=tol)
            add("jacobian_svd", kind, f"tol={tol:g}", p.S, result.S.double(), result.S.double() + result.info.residuals)
    X = data.matrix("activations", m // 2, n // 2, K).double()
    true, energy = torch.linalg.svdvals(X - X.mean(0)), (X - X.mean(0)).square().sum()
    for keep in (K, 4 * K):
        found = br.StreamingPCA(n // 2, K, mode="incremental", keep=keep).update(X).finalize()
        upper = (found.singular_values.square() + found.info.rel_error.square() * energy).sqrt()
        add("streaming_pca", "activations, one pass", f"{keep} rows kept", true, found.singular_values, upper)
    return rows


def line(row: Row) -> str:
    """A row in a line of text."""
    keys = "excess against ratio ratio_cpu passes_to_1pc rounds_to_1pc passes rounds value_error ms".split()
    told = ", ".join(f"{key} {row[key]}" for key in keys if row.get(key, "") != "")
    return f"{row['section']} | {row['case']} | {row['candidate']}: {told}"


def untouched(earlier: list[Row], rows: list[Row]) -> list[Row]:
    """Rows of an earlier run that these do not replace: of other sections, or timed with another number of threads."""

    def part(row: Row) -> tuple[str, str]:
        return row["section"], str(row["threads"]) if row["section"] in TIMED else ""

    replaced = {part(row) for row in rows}
    return [row for row in earlier if part(row) not in replaced]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the CSV, prints the bars."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[1, 2], help="numbers of torch threads (default: 1 2)"
    )
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of timing for each comparison (default: 5)")
    parser.add_argument("--small", action="store_true", help="tiny problems: does it run at all")
    parser.add_argument(
        "--out", type=Path, default=common.RESULTS / "svd.csv", help="the CSV; sections that do not run stay in it"
    )
    args = parser.parse_args(argv)
    if args.small and args.out == parser.get_default("out"):
        parser.error("--small needs --out FILE: tiny problems do not belong into the results")
    rows: list[Row] = []
    # Counts and errors do not depend on threads: taken once, with the last number of them.
    for section in args.sections:
        start = time.perf_counter()
        for n in args.threads if section in TIMED else args.threads[-1:]:
            with common.threads(n):
                rows += globals()[section](args.budget, args.small)
        print(f"{section}: {time.perf_counter() - start:.0f} s", flush=True)
    shown = [row for row in rows if row["section"] == "values"]
    if shown:  # a file of its own: it does not depend on the machine
        common.write_csv(args.out.with_name(f"{args.out.stem}_values.csv"), shown)
    import _svd_report
    import report

    rows = [row for row in rows if row["section"] != "values"]
    if rows:
        earlier = report.read(args.out) if args.out.exists() else []
        common.write_csv(args.out, rows, kept=untouched(earlier, rows))
    print(report.bars_table(_svd_report.bars(report.read(args.out))))
    return 0


@pytest.mark.parametrize("candidate", ["randomized_svd", "torch.svd_lowrank"])
def test_svd(benchmark: Any, threads: int, candidate: str) -> None:
    A = data.matrix("1 / i^0.7", 4096, 1024, K)
    calls = {
        "randomized_svd": lambda: br.randomized_svd(A, K),
        "torch.svd_lowrank": lambda: torch.svd_lowrank(A, K + OVERSAMPLING, niter=2),
    }
    benchmark(calls[candidate])


if __name__ == "__main__":
    raise SystemExit(main())
