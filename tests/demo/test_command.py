"""`balanced-rep demo`: what goes to which stream, what is written, and what it says when something is missing."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from balanced_rep.demo import _run
from balanced_rep.demo._command import demo
from balanced_rep.models import CheckpointError, train_digits

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(demo)


@pytest.fixture(autouse=True)
def _one_noise_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run, "SIGMAS", (0.1,))


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_table_on_stdout_progress_on_stderr(tmp_path: Path) -> None:
    done = _invoke("--out", tmp_path / "new" / "folder", "--no-figure")
    assert done.exit_code == 0
    assert "denoising error" in done.stdout
    assert "scoring" not in done.stdout
    assert "scoring 1,797 digits" in done.stderr
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["results.json", "scores.csv"]


def test_json_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    done = _invoke("--out", tmp_path, "--no-figure", "--json", "--seed", "7")
    assert done.exit_code == 0
    got = json.loads(done.stdout)
    assert got["seed"] == 7
    assert got["rows"][0]["repeated"]["auc"] >= 0.97
    assert got["seconds"] > 0
    assert all(Path(file).is_file() for file in got["files"])


def test_figure_is_written_by_default(tmp_path: Path) -> None:
    assert _invoke("--out", tmp_path, "--json").exit_code == 0
    assert {"demo.png", "demo.svg", "results.json", "scores.csv"} == {p.name for p in tmp_path.iterdir()}


def test_train_uses_and_keeps_what_it_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(train_digits.Recipe(), steps=3)
    monkeypatch.setattr(
        train_digits.Recipe, "of", lambda variant: replace(short, repeats=40 if variant == "repeated" else 1)
    )
    done = _invoke("--train", "--out", tmp_path, "--json", "--no-figure", "--seed", "2")
    assert done.exit_code == 0, done.stderr
    got = json.loads(done.stdout)
    for variant in ("repeated", "control"):
        assert (got["recipes"][variant]["steps"], got["recipes"][variant]["seed"]) == (3, 2)
        assert f"training ({variant})" in done.stderr
        assert (tmp_path / f"digits_{variant}.safetensors").is_file()
    assert got["rows"][0]["repeated"]["auc"] < 0.97  # three steps memorize nothing: not the shipped model


def test_backend_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALANCED_REP_BACKEND", "foo")
    done = _invoke("--out", tmp_path, "--no-figure")
    assert done.exit_code == 1
    assert "error: BALANCED_REP_BACKEND asks for backend 'foo'" in " ".join(done.stderr.split())


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = _invoke("--out", tmp_path / "file" / "folder")
    assert done.exit_code == 1
    assert done.stdout == ""
    words = " ".join(done.stderr.split())
    assert "Cannot write to the folder" in words
    assert "--out DIR" in words


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("sklearn", ["--no-figure"], "pip install scikit-learn"),
        ("matplotlib", [], "pip install matplotlib, or run with --no-figure"),
    ],
)
def test_missing_package_says_what_to_do(module, arguments, message, tmp_path: Path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("balanced_rep.demo._command.find_spec", lambda name: None if name == module else find(name))
    done = _invoke("--out", tmp_path / "x", *arguments)
    assert done.exit_code == 1
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "x").exists()


def test_without_a_figure_matplotlib_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "balanced_rep.demo._command.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert _invoke("--out", tmp_path, "--no-figure", "--json").exit_code == 0


def test_broken_checkpoint_is_an_error_message_not_a_traceback(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise CheckpointError("digits_repeated.safetensors: [broken]")

    monkeypatch.setattr(_run, "digits", refuse)
    done = _invoke("--out", tmp_path)
    assert done.exit_code == 1
    assert "[broken]" in done.stderr
