"""Every kernel of the list: right numbers and no findings in every executor that can run it."""

import numpy as np
import pytest

from . import ptx
from .kernels import CUDA_KERNELS, TRITON_KERNELS
from .runners import compile_all_triton, run_cuda_ptx, run_host, run_interpreter, run_triton_ptx
from .toolchain import nvrtc_missing, triton_missing
from .traffic import ALIGNED_LIMIT, DRAM_LIMIT, UNALIGNED_LIMITS

SEEDS = range(5)

needs_nvrtc = pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))
needs_triton = pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))


def every_case(kernels):
    return [pytest.param(kernel, name, id=f"{kernel.name}-{name}") for kernel in kernels for name in kernel.cases]


@pytest.fixture(scope="module")
def compiled_triton():
    compile_all_triton(TRITON_KERNELS)


def check_traffic(case, counters):
    """Hold a memory-bound launch to its sector and DRAM limits."""
    if not case.memory_bound:
        return
    narrow = min(buffer.array.itemsize for buffer in case.launch.buffers if buffer.array.size > 1)
    limit = ALIGNED_LIMIT if case.aligned else UNALIGNED_LIMITS[narrow]
    assert counters.sector_ratio <= limit, f"{counters.sectors} sectors, ideal {counters.ideal_sectors}"
    if case.minimum_bytes is not None:
        assert counters.dram_bytes <= DRAM_LIMIT * case.minimum_bytes, "DRAM bytes in the LRU model"


@needs_nvrtc
@pytest.mark.parametrize(("kernel", "case_name"), every_case(CUDA_KERNELS))
def test_cuda_in_the_executor(kernel, case_name):
    case = kernel.cases[case_name]()
    result = run_cuda_ptx(kernel, case).check()
    case.check(result.buffers)
    check_traffic(case, result.counters)


@needs_triton
@pytest.mark.parametrize(("kernel", "case_name"), every_case(TRITON_KERNELS))
def test_triton_in_the_executor(compiled_triton, kernel, case_name):
    case = kernel.cases[case_name]()
    result = run_triton_ptx(kernel, case).check()
    case.check(result.buffers)
    check_traffic(case, result.counters)


@needs_triton
@pytest.mark.parametrize(("kernel", "case_name"), every_case(TRITON_KERNELS))
def test_triton_in_the_interpreter(triton_interpreter, kernel, case_name):
    case = kernel.cases[case_name]()
    case.check(run_interpreter(kernel, case))


@pytest.mark.usefixtures("host_sanitizers")
@pytest.mark.parametrize(("kernel", "case_name"), every_case([kernel for kernel in CUDA_KERNELS if kernel.host]))
def test_cuda_on_the_host(kernel, case_name):
    """The same bits whatever the order of blocks, warps and threads, and nothing for the sanitizers."""
    case = kernel.cases[case_name]()
    runs = [run_host(kernel, case, seed=seed) for seed in SEEDS]
    case.check(runs[0])
    for seed, run in zip(SEEDS, runs, strict=True):
        for position in case.expected:
            np.testing.assert_array_equal(run[position], runs[0][position], err_msg=f"seed {seed}")


@pytest.mark.usefixtures("host_threads")
@pytest.mark.parametrize(
    ("kernel", "case_name"),
    [
        case
        for case in every_case([k for k in CUDA_KERNELS if k.host])
        if case.values[0].cases[case.values[1]]().racecheck
    ],
)
def test_cuda_under_thread_sanitizer(kernel, case_name):
    case = kernel.cases[case_name]()
    case.check(run_host(kernel, case, mode="threads", seed=1))


@needs_nvrtc
@pytest.mark.parametrize("kernel", [k for k in CUDA_KERNELS if k.cases], ids=lambda kernel: kernel.name)
def test_cuda_tolerance_covers_approximate_instructions(kernel):
    """Results stay within tolerance when every approximate instruction errs by 2 ulp and atomics run in any order."""
    case = next(iter(kernel.cases.values()))()
    case.check(run_cuda_ptx(kernel, case, ptx.Options(fuzz_ulp=2.0, check=False, count=False)).buffers)


@needs_triton
@pytest.mark.parametrize("kernel", [k for k in TRITON_KERNELS if k.cases], ids=lambda kernel: kernel.name)
def test_triton_tolerance_covers_approximate_instructions(compiled_triton, kernel):
    case = next(iter(kernel.cases.values()))()
    case.check(run_triton_ptx(kernel, case, ptx.Options(fuzz_ulp=2.0, check=False, count=False)).buffers)
