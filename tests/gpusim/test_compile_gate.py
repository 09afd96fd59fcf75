"""Every kernel on every architecture: compiles, does not spill, and uses what the committed baseline says it uses."""

import ctypes
import os
import subprocess

import pytest

from .cases import ARCHITECTURES
from .static.measure import _static_shared
from .static.occupancy import LIMITS, occupancy
from .static.report import compare, current, read_baseline
from .toolchain import cuda_include_dirs, nvrtc_missing, triton_missing, versions

needs_both = pytest.mark.skipif(
    (nvrtc_missing() or triton_missing()) is not None, reason=str(nvrtc_missing() or triton_missing())
)


@pytest.fixture(scope="module")
def measured():
    return current()


@needs_both
def test_nothing_spills(measured):
    spilling = [
        f"{name} {target}: {facts['spills']} spills, stack {facts['stack']}"
        for name, targets in measured.items()
        for target, facts in targets.items()
        if facts["spills"]
    ]
    assert not spilling, "\n".join(spilling)


@needs_both
def test_baseline(measured):
    made_with, before = read_baseline()
    if made_with != versions():  # as where a build of torch for CUDA brings its own Triton
        pytest.skip(f"the baseline is of {made_with}, installed are {versions()}")
    differences = compare(before, measured)
    assert not differences, "run `make kernel-report` if this is meant:\n" + "\n".join(differences)


@needs_both
def test_matrix_instructions_and_wide_accesses_are_counted(measured):
    assert measured["sample matmul[fp16] n%16"]["sm_80"]["matrix"] > 0
    assert measured["sample matmul[fp16] n%16"]["sm_90"]["matrix"] > 0
    assert measured["sample matmul[fp16] n%16"]["sm_100"]["matrix"] > 0
    assert measured["sample matmul[fp16] n%16"]["gfx942"]["matrix"] > 0
    assert measured["sample scale_half"]["sm_80"]["loads_128"] == 1
    assert measured["sample scale_half"]["sm_80"]["stores_128"] == 1
    assert measured["sample silu[fp32]"]["sm_80"]["loads_128"] == 0  # n not known to be divisible: the mask forbids it
    assert measured["sample silu[fp32] n%16"]["sm_80"]["loads_128"] > 0


def test_a_change_is_a_readable_line():
    old = {"k": {"sm_80": {"registers": 32, "spills": 0}}, "gone": {}}
    new = {"k": {"sm_80": {"registers": 40, "spills": 0}, "sm_90": {}}}
    assert compare(old, new) == ["gone: gone", "k sm_80: registers 32 -> 40", "k sm_90: new"]


PROBE = r"""
#define __CUDA_OCC_INCLUDED_STANDALONE
#include <cstddef>
#include <algorithm>
#include <cuda_occupancy.h>
extern "C" int blocks(int arch, int registers, int shared, int threads, int warps, int shared_sm, int optin,
                      int reserved) {
  cudaOccDeviceProp device{};
  device.computeMajor = arch / 10, device.computeMinor = arch % 10, device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 32 * warps, device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32, device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = shared_sm;
  device.numSms = 100, device.sharedMemPerBlockOptin = optin, device.reservedSharedMemPerBlock = reserved;
  cudaOccFuncAttributes kernel{};
  kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = optin;
  cudaOccDeviceState state{};
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult result{};
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared)) return -1;
  return result.activeBlocksPerMultiprocessor;
}
"""


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "message"),
    [
        (70, 32, 0, 128, "sm_70 is not one of sm_75"),
        (90, 32, -1024, 128, "-1024 bytes of shared memory"),
        (80, 32, 0, 0, "0 threads"),
        (80, 32, 0, 1025, "1025 threads"),
    ],
)
def test_occupancy_of_what_cannot_be_is_an_error(arch, registers, shared, threads, message):
    with pytest.raises(ValueError, match=message):
        occupancy(arch, registers, shared, threads)


def test_what_the_system_reserves_is_not_the_kernels():
    """A kernel without shared memory reserves nothing: its share is 0, not minus 1024."""
    assert [_static_shared(90, counted) for counted in (0, 1024, 1064)] == [0, 0, 40]
    assert [_static_shared(80, counted) for counted in (0, 40)] == [0, 40]
    with pytest.raises(RuntimeError, match="sm_90: 40 bytes of shared memory counted, of which 1024 are reserved"):
        _static_shared(90, 40)


@needs_both
def test_occupancy_is_what_nvidia_computes(tmp_path):
    source, library = tmp_path / "probe.cpp", tmp_path / "probe.so"
    source.write_text(PROBE)
    include = [f"-I{folder}" for folder in cuda_include_dirs()]
    subprocess.run(
        [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-w", *include, str(source), "-o", str(library)], check=True
    )
    blocks = ctypes.CDLL(str(library)).blocks
    for arch in ARCHITECTURES:
        limits = LIMITS[arch]
        for registers in (16, 32, 40, 64, 100, 128, 168, 255):
            for threads in (32, 96, 128, 256, 512, 1024):
                for shared in (0, 1, 1000, 8192, 40000, 60000, limits.shared_per_block):
                    sizes = (limits.warps, limits.shared, limits.shared_per_block, limits.reserved)
                    want = blocks(arch, registers, shared, threads, *sizes)
                    got = occupancy(arch, registers, shared, threads).blocks
                    assert got == want, (arch, registers, shared, threads)
