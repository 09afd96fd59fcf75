"""Fixtures of the GPU kernels."""

import numpy as np
import pytest

from tests.gpusim.triton_interpreter import honest_interpreter, require_interpreter


@pytest.fixture
def triton_interpreter():
    """Triton's interpreter with honest bfloat16 and masked loads; refuses half-precision arithmetic."""
    pytest.importorskip("triton", reason="the triton wheel is not installed")
    require_interpreter()
    with honest_interpreter(), np.errstate(invalid="ignore", over="ignore"):  # inf - inf is part of the tests
        yield
