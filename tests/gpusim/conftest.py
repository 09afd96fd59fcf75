"""Fixtures of the GPU tools."""

import pytest

from .simt import host_missing
from .triton_interpreter import honest_interpreter, require_interpreter


@pytest.fixture
def triton_interpreter():
    """Triton's interpreter with honest bfloat16, TF32 and masked loads; refuses half-precision arithmetic."""
    pytest.importorskip("triton", reason="the triton wheel is not installed")
    require_interpreter()
    with honest_interpreter():
        yield


@pytest.fixture(scope="session")
def host_sanitizers():
    """Skips where g++ has no AddressSanitizer that runs here."""
    if reason := host_missing("sanitize"):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def host_threads():
    """Skips where g++ has no ThreadSanitizer that runs here."""
    if reason := host_missing("threads"):
        pytest.skip(reason)
