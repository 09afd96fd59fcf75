"""Mistakes planted in the package's kernels: every one is noticed, and by the check that it is for."""

from dataclasses import replace

import pytest

from .mutants import MUTANTS, compile_triton_mutants, planted, verdict
from .test_kernels import needs_nvrtc, needs_triton

CUDA = [mutant for mutant in MUTANTS if not mutant.triton]
TRITON = [mutant for mutant in MUTANTS if mutant.triton]


@needs_nvrtc
@pytest.mark.parametrize("mutant", CUDA, ids=str)
def test_cuda(mutant, tmp_path):
    assert mutant.caught_by in verdict(mutant, tmp_path).split(", ")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    compile_triton_mutants(TRITON, tmp_path_factory.mktemp("mutants"))


@needs_triton
@pytest.mark.parametrize("mutant", TRITON, ids=str)
def test_triton(compiled, mutant, tmp_path):
    assert mutant.caught_by in verdict(mutant, tmp_path).split(", ")


def test_text_that_is_gone_is_an_error(tmp_path):
    with (
        pytest.raises(ValueError, match="holds 'no such text' 0 times, not once"),
        planted(replace(MUTANTS[0], old="no such text"), tmp_path),
    ):
        pass


@needs_nvrtc
def test_a_change_that_is_no_mistake_is_not_noticed(tmp_path):
    harmless = replace(MUTANTS[0], old="// the block has written", new="// as it was")
    assert verdict(harmless, tmp_path) == "nothing"
