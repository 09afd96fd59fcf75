"""``make test-gpu`` as far as a machine without a GPU can follow it: rows, columns, errors."""

from dataclasses import replace

import pytest
import torch

from . import package
from .device import run


@pytest.fixture
def simulated(monkeypatch):
    """The loop over ops with one small op on the CPU, and a clock that stands still."""
    op = replace(package.OPS[0], calls={name: package.OPS[0].calls[name] for name in ("one element", "max pool, f32")})
    monkeypatch.setattr(package, "OPS", [op])
    monkeypatch.setattr(run, "machine", lambda: {"device": "none"})
    monkeypatch.setattr(run, "on_device", lambda args: args)
    monkeypatch.setattr(run, "time_launches", lambda call: [2.0] * 30)
    monkeypatch.setattr(run, "LARGE", {"moments": {"large": lambda: (torch.ones(2, 5000), 1, 0, 0, 0.0)}})


def test_rows_hold_every_column(simulated, monkeypatch):
    monkeypatch.setattr(run, "BACKENDS", ("reference",))
    rows = run.rows()
    assert [row["call"] for row in rows] == ["one element", "max pool, f32", "large"]
    assert all(row["status"] == "ok" and row["median_us"] == "2.00" for row in rows)
    assert set(rows[0]) <= set(run.COLUMNS)
    assert rows[2]["gbytes_per_s"] == f"{(2 * 5000 * 4 + 10 * 2 * 8) / 2.0 / 1e3:.1f}"


def test_a_backend_that_cannot_run_is_a_row_that_says_why(simulated, monkeypatch):
    monkeypatch.setattr(run, "BACKENDS", ("cuda",))
    rows = run.rows(timed=False)
    assert len(rows) == 2
    assert all("BackendError: moments: backend 'cuda' cannot run this call" in row["status"] for row in rows)


def test_wrong_numbers_are_not_ok(simulated, monkeypatch):
    monkeypatch.setattr(run, "BACKENDS", ("reference",))

    def wrong(*_):
        raise AssertionError("mean: 1 is not 2")

    monkeypatch.setattr(package, "check", wrong)
    assert {row["status"] for row in run.rows(timed=False)} == {"AssertionError: mean: 1 is not 2"}


def test_without_a_device_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["run"])
    assert run.main() == 2
    assert "install the CUDA build into .venv first" in capsys.readouterr().err
