"""The safety net itself: what conftest.py promises to the other tests."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_uninitialised_floats_are_nan(dtype):
    assert torch.empty(3, 5, dtype=dtype).isnan().all()
    assert torch.empty_like(torch.zeros(7, dtype=dtype)).isnan().all()
    assert torch.zeros(1, dtype=dtype).new_empty(4).isnan().all()
    assert torch.empty_strided((2, 3), (3, 1), dtype=dtype).isnan().all()


def test_uninitialised_integers_are_huge():
    assert (torch.empty(9, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


class TestStateEndsWithTheTest:
    """Each of the two spoils the state and expects to find it clean, in whatever order they run."""

    @pytest.mark.parametrize("again", [False, True])
    def test_clean_then_spoiled(self, again):
        assert torch.get_default_dtype() is torch.float32
        assert torch.is_grad_enabled()
        assert "BALANCED_REP_BACKEND" not in os.environ
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(7)
        os.environ["BALANCED_REP_BACKEND"] = "reference"

    def test_threads(self):
        assert torch.get_num_threads() <= 2
