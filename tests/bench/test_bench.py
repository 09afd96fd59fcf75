"""The benchmarks run on tiny arrays and their figures are what they say; nothing is timed here."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch

from balanced_rep.ops._registry import missing

needs_extension = pytest.mark.skipif(missing("balanced_rep._C") is not None, reason="balanced_rep._C is not built")


@pytest.fixture
def common(bench_path):
    return importlib.import_module("_common")


@pytest.fixture
def report(bench_path):
    return importlib.import_module("report")


class Clock:
    """Stands in for both clocks: time passes only when a candidate says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    process_time = perf_counter

    def candidate(self, seconds, calls, name):
        def call():
            self.now += seconds
            calls.append(name)

        return call


def test_interleave_goes_round_and_shares_the_budget(common, monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(common, "time", clock)
    candidates = {name: clock.candidate(s, calls, name) for name, s in {"fast": 0.001, "slow": 0.1}.items()}
    timings = common.interleave(candidates, budget=1.0, min_turns=3, max_turns=40)
    assert timings["fast"].median == pytest.approx(0.001)
    assert timings["slow"].median == pytest.approx(0.1)
    assert len(timings["fast"].wall) == 40
    assert len(timings["slow"].wall) == 5  # half of the budget
    at = [i for i, name in enumerate(calls) if name == "slow"][2:]
    assert max(b - a for a, b in itertools.pairwise(at)) < 25, "the slow one comes in one lump"
    assert timings["slow"].ratios(timings["fast"])["paired"] == pytest.approx(100)


def test_interleave_repeats_calls_that_are_short(common, monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(common, "time", clock)
    timings = common.interleave({"call": clock.candidate(1e-6, calls, "call")}, budget=1.0, max_turns=3)
    assert timings["call"].median == pytest.approx(1e-6)
    assert len(calls) > 3 * common.SAMPLE_S / 1e-6


def test_threads_are_restored(common):
    before = torch.get_num_threads()
    with common.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_csv_names_the_machine_on_every_row(common, report, tmp_path):
    common.write_csv(tmp_path / "x.csv", [{"a": 1}, {"b": 2}])
    rows = report.read(tmp_path / "x.csv")
    assert [(row["a"], row["b"]) for row in rows] == [("1", ""), ("", "2")]
    assert all(row["torch"] == torch.__version__ and row["cpu"] and row["commit"] for row in rows)


@pytest.mark.parametrize("dim", [0, 1])
def test_peers_compute_the_same(bench_path, dim):
    peers, bench = importlib.import_module("_peers"), importlib.import_module("bench_moments")
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) + 0.5
    want = bench.nine(x, dim)
    for fn in (peers.eager, peers.tuned):
        for name, a, b in zip(peers.MEASURES, fn(x, dim), want, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=f"{fn.__name__}, {name}": f"{n}: {m}"
            )
    for name, a, b in zip(peers.MEASURES, peers.numpy_measures(x.numpy(), dim), want, strict=True):
        if name != "std":  # numpy's has correction 0
            torch.testing.assert_close(torch.as_tensor(a).float(), b, rtol=1e-4, atol=1e-5)
    described = peers.scipy_describe(x.numpy(), dim)
    torch.testing.assert_close(torch.from_numpy(described.kurtosis + 3).float(), want[5], rtol=1e-4, atol=1e-5)


@needs_extension
def test_moments_bench_runs(bench_path, report, tmp_path, capsys):
    bench = importlib.import_module("bench_moments")
    out = tmp_path / "moments.csv"
    assert bench.main(["--tiny", "--no-compile", "--budget", "0.01", "--threads", "1", "--out", str(out)]) == 0
    rows = report.read(out)
    assert {row["section"] for row in rows} == {"statistics", "pooled", "call", "isa"}
    assert {row["role"] for row in rows} == {"ours", "yardstick", "peer"}
    assert "not measured" in capsys.readouterr().out  # torch.compile was left out, and the table says so
    assert len(report.statistics_table(rows, "1").splitlines()) == 2 + 2 * 3 * 2


@needs_extension
def test_accuracy_bench_meets_its_bars(bench_path, report, tmp_path):
    bench = importlib.import_module("bench_accuracy")
    out = tmp_path / "accuracy.csv"
    assert bench.main(["--every", "12", "--out", str(out)]) == 0
    bars = report.accuracy_bars(report.read(out))
    assert [bar.what for bar in bars] == [f"error of the {m}" for m in ("mean", "std", "skewness", "kurtosis")]
    assert all(bar.met for bar in bars), report.bars_table(bars)


def test_bars_say_no(report):
    cell = {"section": "statistics", "layout": "rows", "dtype": "float32", "shape": "64x81920", "threads": "1"}
    rows = [{**cell, "candidate": "torch.std", "ratio": ratio} for ratio in ("25", "19.9")]
    bar = next(bar for bar in report.moments_bars(rows) if "torch.std" in bar.what)
    assert bar.met is False
    assert bar.figures["1"].startswith("19.9x")
    assert next(b for b in report.moments_bars(rows[:1]) if "torch.std" in b.what).met is True


def test_figures_have_the_same_bytes_again(bench_path, tmp_path):
    plot = importlib.import_module("_plot")
    for folder in ("first", "second"):
        assert plot.main(["--out", str(tmp_path / folder)]) == 0
    assert {path.name for path in (tmp_path / "first").iterdir()} == set(plot.FIGURES)
    for name in plot.FIGURES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_pytest_collects_the_benchmarks(bench_path):
    command = [sys.executable, "-m", "pytest", str(bench_path), "--collect-only", "-q", "--benchmark-only"]
    # A worker of a run in parallel would be taken for one of its own, in which nothing is timed.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=bench_path.parent, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "bench_moments.py::test_statistics" in run.stdout
    assert "bench_ops.py::test_op[moments-cpp-float32]" in run.stdout


def test_detection_bench_runs(bench_path, report, tmp_path):
    pytest.importorskip("diffusers")
    bench, text = importlib.import_module("bench_detection"), importlib.import_module("_detection_report")
    out = tmp_path / "detection.csv"
    small = ["--turns", "1", "--images", "2", "--loop-images", "1", "--flipd-images", "1", "--probes", "2"]
    assert bench.main([*small, "--out", str(out)]) == 0
    rows = report.read(out)
    assert [row["scale"] for row in rows] == ["1.0", "2.0", "2.0", "1.0", "1.0"]
    assert all(list(bar.figures) == ["1"] for bar in text.bars(rows))
    assert text.table(rows).count("\n") == 6
    assert "| times ours |" in text.markdown("detection", rows)


def test_the_loops_of_detection_compute_the_same(bench_path):
    pytest.importorskip("diffusers")
    bench = importlib.import_module("bench_detection")
    (D, x), (T, z) = bench.denoiser(n_images=1), bench.transformer(1)
    with torch.no_grad():
        layers, together = bench.hook_loop(D, x, 1), bench.hook_loop(D, x, 1, layers_at_once=len(D.layers))
        found = []
        for run in (layers, together):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                found.append(run())
        assert len(found[0]) == len(found[1]) == 4 * len(D.layers)
        torch.testing.assert_close(
            bench.batched_flipd(T, z, 8)().values, bench.jvp_per_probe(T, z, 8)().double(), rtol=0.2, atol=0
        )


def test_svd_bench_runs(bench_path, report, tmp_path, capsys):
    bench = importlib.import_module("bench_svd")
    out = tmp_path / "svd.csv"
    sections = ["batch", "jacobian", "streaming", "certificate", "values"]
    assert bench.main(["--small", "--budget", "0.01", "--out", str(out), "--sections", *sections]) == 0
    rows = report.read(out)
    assert {row["section"] for row in rows} == set(sections) - {"values"}
    found = {bar.what: bar for bar in importlib.import_module("_svd_report").bars(rows)}
    assert found["certified error off the true one"].met
    assert found["error of the values then"].met
    assert found["excess of the incremental stream, activations, k=32"].met
    tables = importlib.import_module("_svd_report").TABLES
    assert all(table(rows).startswith("|") for table in tables.values())
    shown = report.read(tmp_path / "svd_values.csv")
    assert {row["page"] for row in shown} == {"randomized_svd", "jacobian_svd", "streaming_pca"}
    assert all(float(row["found"]) * 0.999 <= float(row["true"]) <= 1.001 * float(row["upper"]) for row in shown)


def test_svd_sections_can_run_apart(bench_path, report, tmp_path, capsys):
    """Found once: a run of one section threw the rows of the others away."""
    bench, out = importlib.import_module("bench_svd"), tmp_path / "svd.csv"

    def run(section, *threads):
        assert bench.main(
            ["--small", "--budget", "0.01", "--out", str(out), "--sections", section, "--threads", *threads]
        ) == 0  # fmt: skip
        return [(row["section"], row["threads"], row["date"], row["commit"] != "") for row in report.read(out)]

    first = run("streaming", "1")
    old = [{**row, "date": "2000-01-01"} for row in report.read(out)]
    bench.common.write_csv(out, [], kept=old)
    both = run("batch", "1")
    assert both[: len(first)] == [("streaming", "1", "2000-01-01", True)] * len(first)
    assert {row[0] for row in both} == {"streaming", "batch"}
    more = run("batch", "2")
    assert [row[1] for row in more if row[0] == "batch"] == ["1"] * 4 + ["2"] * 4
    assert len(run("batch", "1")) == len(more)
    assert len(run("streaming", "1")) == len(more)
    with pytest.raises(SystemExit):
        bench.main(["--small"])
    assert "--small needs --out FILE" in capsys.readouterr().err


def test_peers_get_as_many_threads(bench_path):
    """Found once: at one thread of torch's, the BLAS of numpy and scipy still took all processors."""
    threadpoolctl, common = pytest.importorskip("threadpoolctl"), importlib.import_module("_common")
    for n in (1, 2):
        with common.threads(n):
            pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
            assert torch.get_num_threads() == n
            assert len(pools) >= 2
            assert {pool["num_threads"] for pool in pools} == {n}


def test_svd_peers_are_what_they_say(bench_path):
    bench, data = importlib.import_module("bench_svd"), importlib.import_module("_svd_data")
    A = data.matrix("1 / i", 120, 80, 6)
    best = data.best_error(A, 6)
    for name, call in bench.peers(A, 6).items():
        assert -1e-6 < bench.excess(A, best, call()) < 0.05, name


@needs_extension
def test_jvp_bench_runs(bench_path, report, tmp_path, capsys):
    pytest.importorskip("diffusers")
    bench, jvp_report = importlib.import_module("bench_jvp"), importlib.import_module("_jvp_report")
    out = tmp_path / "jvp.csv"
    arguments = ["--small", "--models", "dit", "--tangents", "4", "--budget", "0.01", "--threads", "1"]
    assert bench.main([*arguments, "--no-memory", "--out", str(out)]) == 0
    rows = report.read(out)
    assert {row["n_tangents"] for row in report.pick(rows, section="time")} == {"4"}
    assert {"jvp", "vmap(jvp)", "loop of torch.func.jvp"} < {row["candidate"] for row in rows}
    bars = {bar.what: bar for bar in jvp_report.bars(rows)}
    assert bars["error of the tangents over that of `torch.func.jvp`"].met
    assert bars["error of float32 primals with bfloat16 tangents"].met
    assert "| DiT-like | 4 | jvp |" in capsys.readouterr().out
    other = ["--tangents", "2", *[a for a in arguments if a not in ("--tangents", "4")]]
    assert bench.main([*other, "--no-memory", "--out", str(out)]) == 0
    both = report.read(out)
    kept, new = ([r for r in report.pick(both, section="time", n_tangents=k)] for k in ("4", "2"))
    assert kept == report.pick(rows, section="time")
    assert [r["candidate"] for r in new] == [r["candidate"] for r in kept]
    assert len(both) == len(kept) + len(new) + len(report.pick(rows, section="accuracy"))


def test_rows_of_several_runs_stand_in_one_file(common, report, tmp_path, monkeypatch):
    path, key = tmp_path / "x.csv", ("model", "n_tangents")

    def run(*rows):
        common.write_csv(path, rows, kept=common.others(path, rows, key))

    run(*({"model": "dit", "n_tangents": k, "ms": k} for k in (4, 1)))
    monkeypatch.setattr(common, "machine", lambda: {"commit": "later"})
    run(*({"model": "dit", "n_tangents": k, "ms": 10 * k, "peak_mb": 3} for k in (8, 4)))
    rows = report.read(path)
    assert [(r["n_tangents"], r["ms"], r["peak_mb"]) for r in rows] == [
        ("1", "1", ""),
        ("8", "80", "3"),
        ("4", "40", "3"),
    ]
    assert [r["commit"] == "later" for r in rows] == [False, True, True]
    assert rows[0]["cpu"]


def test_jvp_bars_say_no(bench_path):
    jvp_report = importlib.import_module("_jvp_report")
    cell = {"section": "time", "model": "sd", "batch": "1", "n_tangents": "16", "threads": "2", "dtype": "float32"}
    figures = {"jvp": ("1.26", "1", "100", "112"), "vmap(jvp)": ("5", "3.9", "390", "900"),
               "forward (K+1)B": ("1", "0.8", "79", "100")}  # fmt: skip
    rows = [
        {**cell, "candidate": name, "over_wide_forward": over, "jvp_faster": faster, "ms": ms, "peak_mb": mb}
        for name, (over, faster, ms, mb) in figures.items()
    ]
    rows.append({**rows[0], "candidate": "jvp, tangent_dtype=bfloat16", "efficiency": "1.79"})
    rows = [{"efficiency": "1.04", **row} for row in rows]
    bars = {bar.what: bar for bar in jvp_report.bars(rows)}
    assert [bar.met for bar in bars.values()] == [False] * 5
    assert bars["SD-like, K = 16: E"].figures["2"] == "1.04"
    assert bars["SD-like, K = 16, bfloat16 tangents: E"].figures["2"] == "1.79"
    assert bars["SD-like, K >= 4: times as fast as the best peer"].figures["2"] == "3.9"
    rows[0] |= {"over_wide_forward": "1.24", "peak_mb": "109", "efficiency": "1.06"}
    rows[1] |= {"jvp_faster": "4.1"}
    rows[3] |= {"efficiency": "1.9"}
    assert all(bar.met for bar in jvp_report.bars(rows))


def test_the_dit_in_jax_is_the_dit(bench_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("jax")
    bench = importlib.import_module("bench_jvp")
    with torch.no_grad():
        calls = bench.Case("dit", 3, small=True).candidates()
        torch.testing.assert_close(calls[bench.JAX](), calls[bench.TOGETHER](), rtol=1e-3, atol=1e-4)
