"""``balanced-rep doctor`` and the command line around it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from balanced_rep import __version__
from balanced_rep.cli import app
from balanced_rep.doctor import _state, diagnose
from balanced_rep.ops._registry import ORDER, REGISTRY, Impl

run = CliRunner().invoke


def test_every_op_on_every_backend_has_an_answer():
    report = diagnose()
    assert report["healthy"]
    assert {op: tuple(row) for op, row in report["ops"].items()} == dict.fromkeys(REGISTRY, ORDER)
    states = {s for row in report["ops"].values() for s in row.values()}
    assert all(s == "ok" or s.startswith("no: ") for s in states)
    assert all(row["reference"] == "ok" for row in report["ops"].values())
    assert report["packages"]["torch"] == torch.__version__


def test_json_is_json_alone():
    result = run(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["version"] == __version__


def test_table_numbers_the_reasons():
    result = run(app, ["doctor"], env={"COLUMNS": "140"})
    assert result.exit_code == 0
    for op in REGISTRY:
        assert op in result.stdout
    assert "input is on cpu, this backend runs on cuda" in result.stdout or torch.cuda.is_available()


@pytest.mark.parametrize(("fn", "state"), [(lambda x, *_: x.new_zeros(10, 37), "wrong: "), (None, "failed: TypeError")])
def test_a_broken_backend_is_reported_and_fails_the_command(fn, state, monkeypatch):
    broken = Impl("nowhere:nothing", lambda *_: None)
    broken.__dict__["fn"] = fn  # where functools.cached_property keeps the import
    monkeypatch.setitem(REGISTRY["moments"].impls, "cuda", broken)
    report = diagnose()
    assert report["ops"]["moments"]["cuda"].startswith(state)
    assert not report["healthy"]
    result = run(app, ["doctor"])
    assert result.exit_code == 1
    assert "please report" in result.stdout


def test_a_backend_that_does_not_exist_is_a_problem(monkeypatch):
    monkeypatch.setenv("BALANCED_REP_BACKEND", "fpga")
    report = diagnose()
    assert not report["healthy"]
    assert "fpga" in report["problems"][0]
    assert report["ops"]["moments"]["reference"] == "ok"
    result = run(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert (
        "BALANCED_REP_BACKEND asks for backend 'fpga'; known backends: cuda, triton, cpp, reference." in result.stdout
    )
    assert "please report" not in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the backend runs")
def test_a_backend_that_runs_nothing_here_is_a_problem(monkeypatch):
    monkeypatch.setenv("BALANCED_REP_BACKEND", "cuda")
    (problem,) = diagnose()["problems"]
    assert problem.startswith("Backend 'cuda' is asked for, and no op runs on it here (")
    assert run(app, ["doctor"]).exit_code == 1


def test_a_device_that_cannot_be_used_is_reported(monkeypatch):
    """As where the driver is older than torch wants: the copy to the device raises, and the doctor goes on."""

    class Stubborn(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise RuntimeError("no kernel image")

    spec = replace(REGISTRY["moments"], inputs=lambda *_: (torch.ones(2).as_subclass(Stubborn),))
    assert _state(spec, "cpp") == "failed: RuntimeError: no kernel image"


def test_version():
    assert run(app, ["--version"]).stdout.strip() == f"balanced-rep {__version__}"
