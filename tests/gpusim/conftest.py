"""Fixtures of the GPU tools.

Triton reads TRITON_INTERPRET when it is imported and when a kernel is decorated, so it is set before anything else.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from .triton_interpreter import honest_interpreter, require_interpreter


@pytest.fixture
def triton_interpreter():
    """Triton's interpreter with honest bfloat16, TF32 and masked loads; refuses half-precision arithmetic."""
    pytest.importorskip("triton", reason="the triton wheel is not installed")
    require_interpreter()
    with honest_interpreter():
        yield
