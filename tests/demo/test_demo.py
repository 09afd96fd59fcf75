"""The demo as a function: its gates, its bookkeeping, and what it prints, writes and draws."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from balanced_rep.demo import DemoResult, run_demo
from balanced_rep.demo._figure import write_figure
from balanced_rep.demo._report import print_report, to_dict, write_files
from balanced_rep.demo._run import SIGMAS, count_steps
from balanced_rep.models import digits, digits_data


@pytest.fixture(scope="module")
def result() -> DemoResult:
    return run_demo()


def test_gates(result: DemoResult) -> None:
    std, control = result.row("repeated", "std", 0.1), result.row("control", "std", 0.1)
    assert std.repeated.auc >= 0.97
    assert std.repeated.tpr_at_1_percent_fpr >= 0.9
    assert 0.35 <= control.repeated.auc <= 0.65
    assert 0.45 <= std.ordinary.auc <= 0.55
    assert result.row("repeated", "error", 0.1).repeated.auc >= 0.97
    assert result.main_sigma == 0.1


def test_scores_are_what_they_are_said_to_be() -> None:
    got = run_demo(sigmas=(0.3, 0.2), n_draws=2, seed=5)
    model, data = digits("control"), digits_data()
    generator = torch.Generator().manual_seed(5)
    kept: list[torch.Tensor] = []
    model.get_submodule("net.blocks.2.act").register_forward_hook(lambda _m, _a, out: kept.append(out))
    std, error = torch.zeros(2, 1797, dtype=torch.float64), torch.zeros(2, 1797, dtype=torch.float64)
    for i, sigma in enumerate((0.3, 0.2)):
        for _ in range(2):
            noisy = data.images + sigma * torch.randn(data.images.shape, generator=generator)
            denoised = model(noisy, sigma)
            std[i] += kept.pop().double().std(dim=1, correction=0) / 2
            error[i] += (denoised - data.images).double().square().mean(dim=(1, 2, 3)) / 2
    torch.testing.assert_close(got.scores["control", "std"], std, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.scores["control", "error"], -error, rtol=1e-4, atol=1e-6)
    assert got.main_sigma == 0.2
    assert torch.equal(got.score("control", "std"), got.scores["control", "std"][1])


def test_activations_are_those_of_the_first_draw_at_the_main_sigma() -> None:
    got = run_demo(sigmas=(0.4, 0.1), n_draws=1)
    std = got.activations.double().std(dim=1, correction=0)
    torch.testing.assert_close(std, got.score("repeated", "std", 0.1), rtol=1e-5, atol=1e-6)


def test_same_seed_same_scores_and_no_global_state() -> None:
    before = torch.get_rng_state()
    one, two, other = (run_demo(sigmas=(0.1,), n_draws=1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for key, score in one.scores.items():
        assert torch.equal(score, two.scores[key])
        assert not torch.equal(score, other.scores[key])
    assert one.rows == two.rows


def test_progress_is_reported_as_often_as_announced() -> None:
    steps: list[int] = []
    run_demo(sigmas=(0.1, 0.2), n_draws=3, on_step=lambda: steps.append(1))
    assert len(steps) == count_steps((0.1, 0.2), 3) == 14


@pytest.mark.parametrize("arguments", [{"sigmas": ()}, {"sigmas": (0.1, 0.1)}, {"sigmas": (0.0,)}, {"n_draws": 0}])
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match="distinct positive sigmas and n_draws >= 1"):
        run_demo(**arguments)


@pytest.mark.parametrize("width", [80, 140])
def test_report_shows_every_number_in_full(result: DemoResult, width: int) -> None:
    stream = io.StringIO()
    print_report(result, Console(file=stream, width=width))
    text = stream.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for row in result.rows:
        assert f"{row.repeated.auc:.3f} ({row.repeated.standard_error:.3f})" in text
        assert f"{row.ordinary.auc:.3f} ({row.ordinary.standard_error:.3f})" in text
    for row in result.jacobians:
        assert " ".join(f"{s:.2f}" for s in row.repeated.singular_values) in text
        assert f"{row.detection.auc:.3f} ({row.detection.standard_error:.3f})" in text
    words = " ".join(text.split())
    for part in ("20 positives are few", "strong baseline", "not what was merely trained on", "near-copies"):
        assert part in words


def test_jacobian_is_smaller_at_memorized_digits(result: DemoResult) -> None:
    repeated, control = result.jacobians
    assert (repeated.model, repeated.sigma, control.model) == ("repeated", 0.1, "control")
    assert repeated.repeated.squared_norm < 0.6 * repeated.never_seen.squared_norm
    assert repeated.detection.auc >= 0.97
    assert 0.35 <= control.detection.auc <= 0.65
    for group in (repeated.repeated, repeated.never_seen, control.repeated, control.never_seen):
        assert sorted(group.singular_values, reverse=True) == list(group.singular_values)
        assert len(group.singular_values) == 4
        assert min(group.singular_values) > 0.5


def test_jacobian_against_torch() -> None:
    got = run_demo(sigmas=(0.2,), n_draws=1, seed=5).jacobians[1]
    model, data = digits("control"), digits_data()
    noise = torch.randn(data.images.shape, generator=torch.Generator().manual_seed(5))
    points = (data.images + 0.2 * noise)[data.split.repeated]
    with torch.no_grad():
        jacobian = torch.func.vmap(torch.func.jacfwd(lambda y: model(y[None], 0.2)[0]))(points).reshape(20, 64, 64)
    assert got.repeated.squared_norm == pytest.approx(jacobian.square().sum((1, 2)).median().item(), rel=1e-4)
    want = torch.linalg.svdvals(jacobian)[:, :4].median(dim=0).values
    torch.testing.assert_close(torch.tensor(got.repeated.singular_values), want, rtol=1e-4, atol=1e-5)


def test_json_is_plain_and_complete(result: DemoResult) -> None:
    got = json.loads(json.dumps(to_dict(result)))
    assert len(got["rows"]) == 4 * len(SIGMAS)
    assert got["jacobians"][0]["repeated"]["squared_norm"] == result.jacobians[0].repeated.squared_norm
    assert got["n_repeated"] + got["n_ordinary"] + got["n_never_seen"] == 1797
    first = got["rows"][0]
    assert (first["sigma"], first["model"], first["score"]) == (SIGMAS[0], "repeated", "std")
    assert first["repeated"]["auc"] == result.rows[0].repeated.auc
    assert len(set(got["most_suspicious_indices"][:20]) & set(got["repeated_indices"])) >= 15


def test_scores_file_has_a_line_per_digit(result: DemoResult, tmp_path: Path) -> None:
    _, table = write_files(result, tmp_path)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1797
    assert [row["group"] for row in rows].count("repeated") == 20
    assert all(rows[int(i)]["group"] == "repeated" for i in result.data.split.repeated)
    assert all(rows[int(i)]["group"] == "never seen" for i in result.data.split.held_out)
    column = torch.tensor([float(row["std_repeated_sigma_0.1"]) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(column, result.score("repeated", "std", 0.1), rtol=1e-5, atol=0)


def test_figure(result: DemoResult, tmp_path: Path) -> None:
    from matplotlib.image import imread

    png, svg = write_figure(result, tmp_path)
    pixels = imread(png)
    assert pixels.shape[:2] == (1152, 1920)
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((edge[:, :3] == 1).all() for edge in edges), "something is cut off at the margin"
    for colour in ("#D55E00", "#56B4E9", "#0072B2", "#CC79A7"):
        rgb = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert ((torch.from_numpy(pixels[..., :3]) - rgb).abs().amax(dim=-1) < 0.02).sum() > 200, colour
    assert "<dc:date>" not in svg.read_text()


def test_package_imports_none_of_what_the_demo_needs() -> None:
    code = "import sys, balanced_rep, balanced_rep.models; print([m for m in {names!r} if m in sys.modules])"
    names = ["matplotlib", "sklearn", "typer", "rich", "safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", code.format(names=names)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
