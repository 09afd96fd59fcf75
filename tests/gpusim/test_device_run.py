"""``make test-gpu`` as far as a machine without a GPU can follow it: rows, columns, errors."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from balanced_rep.ops._registry import REGISTRY

from . import package
from .device import run, test_device


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
    assert all(row["status"] == "refused: input is on cpu, this backend runs on cuda" for row in rows)
    assert run.failures(rows) == ["backend 'cuda' ran nothing: input is on cpu, this backend runs on cuda"]


def test_wrong_numbers_are_not_ok(simulated, monkeypatch):
    monkeypatch.setattr(run, "BACKENDS", ("reference",))

    def wrong(*_):
        raise AssertionError("mean: 1 is not 2")

    monkeypatch.setattr(package, "check", wrong)
    rows = run.rows(timed=False)
    assert {row["status"] for row in rows} == {"AssertionError: mean: 1 is not 2"}
    assert run.failures(rows)[0] == "moments, reference, one element: AssertionError: mean: 1 is not 2"


def test_a_call_that_one_device_refuses_is_no_failure():
    about = {"op": "o", "call": "c"}
    old = {**about, "backend": "triton", "status": "refused: the device is too old"}
    new = {**about, "backend": "triton", "status": "ok"}
    assert run.failures([old, new]) == []
    assert run.failures([old]) == ["backend 'triton' ran nothing: the device is too old"]


def test_an_op_runs_in_the_backends_that_it_has():
    for op in package.OPS:
        assert run.backends(op) == [name for name in ("cuda", "triton") if name in REGISTRY[op.name].impls]


def test_large_calls_are_calls_of_their_ops(monkeypatch):
    monkeypatch.setattr(run, "_normal", lambda dtype, *shape: torch.empty(shape, dtype=dtype, device="meta"))
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda n, **where: arange(n))
    for op in package.OPS:
        kinds = [[type(arg) for arg in build()] for build in op.calls.values()]
        for build in run.LARGE.get(op.name, {}).values():
            args = [type(arg) for arg in build()]
            assert all(kind in {few[i] for few in kinds} for i, kind in enumerate(args))
            assert len(args) == len(kinds[0])


@pytest.fixture
def no_device(monkeypatch):
    """Streams and graphs that do nothing: the tests marked ``gpu`` then run as far as Python goes."""
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    replayed = SimpleNamespace(replay=lambda: None)
    fake = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": lambda: replayed,
        "graph": contextlib.nullcontext,
        "synchronize": lambda: None,
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(test_device, "on_device", lambda args, device: args)


@pytest.mark.parametrize("op", package.OPS, ids=lambda op: op.name)
def test_the_tests_for_a_device_take_every_op(no_device, op):
    test_device.test_a_stream_of_its_own(op, "reference")
    with pytest.raises(AssertionError):  # the outputs were zeroed, and nothing replays
        test_device.test_a_graph_replayed(op, "reference")


def test_without_a_device_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["run"])
    assert run.main() == 2
    assert "install the CUDA build into .venv first" in capsys.readouterr().err
