"""The bits of the reference, from Triton and from CUDA C++, in every executor."""

import pytest
import torch

from balanced_rep.kernels import _driver, cuda
from balanced_rep.ops.philox import philox_bits_reference, philox_normal_reference
from tests.gpusim.simulated import SimulatedCuda, simulated_triton
from tests.gpusim.toolchain import nvrtc_missing, triton_missing

ITEMS = torch.tensor([0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1, 7])
# name -> (items, seed, n): ends of the ranges, odd lengths, strided items, a tile and more of one item and of many
CALLS = {
    "one word": (ITEMS[3:4], 0, 1),
    "odd length": (ITEMS, -5, 263),
    "strided items": (ITEMS[::3], 2**63 - 1, 8),
    "smallest seed": (ITEMS, -(2**63), 4),
    "long": (ITEMS[:2], 0x1234_5678_9ABC_DEF0, 2051),
    "many items": (torch.arange(-300, 300), 42, 3),
}
REFERENCES = {"philox_bits": philox_bits_reference, "philox_normal": philox_normal_reference}
KERNELS = {"_bits_kernel": frozenset({"out_ptr"}), "_normal_kernel": frozenset({"out_ptr"})}

each_op = pytest.mark.parametrize("op", REFERENCES)
each_call = pytest.mark.parametrize("name", CALLS)
needs_triton = pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
needs_nvrtc = pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))


def check(got, op, call):
    want = REFERENCES[op](*call)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    same = got.view(torch.int32) == want.view(torch.int32)  # signs of zero too
    assert same.all(), f"{int((~same).sum())} words differ, first at {(~same).nonzero()[0].tolist()}"


@needs_nvrtc
@each_call
@each_op
def test_cuda_as_ptx(monkeypatch, op, name):
    monkeypatch.setattr(cuda, "launch", _driver.Launcher(SimulatedCuda(outputs=frozenset({1}))))
    check(getattr(cuda, op)(*CALLS[name]), op, CALLS[name])


@needs_triton
@pytest.mark.usefixtures("triton_interpreter")
@each_call
@each_op
def test_triton_interpreted(op, name):
    from balanced_rep.kernels.triton import philox

    check(getattr(philox, op)(*CALLS[name]), op, CALLS[name])


@needs_triton
@each_op
def test_triton_as_ptx(op):
    from balanced_rep.kernels.triton import philox

    with simulated_triton(philox, KERNELS) as launches:
        check(getattr(philox, op)(*CALLS["odd length"]), op, CALLS["odd length"])
    assert not launches[0].request.fp_fusion


def test_no_items_and_no_numbers():
    for function in (cuda.philox_bits, cuda.philox_normal):
        assert function(ITEMS[:0], 1, 5).shape == (0, 5)
        assert function(ITEMS, 1, 0).shape == (7, 0)
