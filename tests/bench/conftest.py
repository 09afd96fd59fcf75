"""Makes the modules of bench/ importable; they are no part of the package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench_path() -> Iterator[Path]:
    """bench/ at the head of sys.path; skips where the tests are not in a checkout."""
    if not BENCH.exists():
        pytest.skip("looks at bench/, and this is not a checkout")
    before = sys.path.copy()
    sys.path.insert(0, str(BENCH))
    yield BENCH
    sys.path[:] = before
