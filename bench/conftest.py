"""Collects bench_*.py with plain `pytest bench`; `pytest` without a path never comes here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import _common  # before torch


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Benchmarks are modules of tests, though their names begin with bench_."""
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest):
    """Number of threads inside the benchmark."""
    with _common.threads(request.param):
        yield request.param
