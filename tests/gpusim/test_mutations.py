"""Planted mistakes: every checker catches what it is there for. A checker that stays silent here is broken.

The correct versions of the same kernels run silently in ``test_kernels.py``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from . import ptx
from .cases import Case, CudaKernel, TritonKernel
from .launch import Buffer, Launch, empty
from .runners import run_host, run_triton_ptx
from .samples.entries import CUDA_SAMPLES, MODULE, TRITON_SAMPLES
from .simt import Program, SimtError, compile_program
from .toolchain import compile_cuda, nvrtc_missing, triton_missing

needs_nvrtc = pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))
needs_triton = pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))

CUDA = {kernel.expression: kernel for kernel in CUDA_SAMPLES}
TRITON = {kernel.function: kernel for kernel in TRITON_SAMPLES}


def mutant(expression: str, case_name: str, *defines: str) -> tuple[CudaKernel, Case]:
    """Return a sample kernel compiled with a planted mistake, and one of its cases."""
    kernel = replace(CUDA[expression], defines=defines)
    return kernel, kernel.cases[case_name]()


def run_mutant(expression: str, case_name: str, *defines: str) -> ptx.Result:
    kernel, case = mutant(expression, case_name, *defines)
    module = compile_cuda(kernel.source, [expression], "compute_80", defines=defines)
    return ptx.run(ptx.parse(module.ptx)[expression], case.launch)


IN_THE_EXECUTOR = [
    # kernel, case, switch, kind of issue, source line that the report must name
    ("row_norm", "8x777 pitch 800", "BUG_BARRIER", "race", "scratch[warp] = value"),
    ("histogram", "2000 in 50 bins", "BUG_BARRIER", "race", "if (bins[b])"),
    ("ticket_sum", "6216, 50 blocks", "BUG_FENCE", "race", "__ldcg(&partial[block])"),
    ("silu", "777", "BUG_BOUND", "out-of-bounds", "y[i] = x[i] /"),
    ("scale_half", "4096", "BUG_BOUND", "out-of-bounds", "const uint4*>(x + i)"),
    ("scale_half", "4096", "BUG_VECTOR_POINTER", "misaligned", "const uint4*>(x + i + 1)"),
    ("row_norm", "8x777 pitch 800", "BUG_SHUFFLE_MASK", "shuffle", "__shfl_xor_sync(SUM_MASK"),
    ("reverse_async", "4x128", "BUG_ASYNC_WAIT", "async", "= tile[127 -"),
]


@needs_nvrtc
@pytest.mark.parametrize(("expression", "case_name", "switch", "kind", "source"), IN_THE_EXECUTOR)
def test_executor_catches(expression, case_name, switch, kind, source):
    result = run_mutant(expression, case_name, switch)
    lines = CUDA[expression].source.read_text().splitlines()
    named = [issue.instruction.source for issue in result.issues if issue.kind == kind]
    assert any(source in lines[place.line - 1] for place in named), str(result.issues)


@needs_nvrtc
def test_executor_sees_a_missing_barrier_that_leaves_the_numbers_right():
    _, case = mutant("row_norm", "8x777 pitch 800", "BUG_BARRIER")
    result = run_mutant("row_norm", "8x777 pitch 800", "BUG_BARRIER")
    case.check(result.buffers)  # lucky numbers are why a race checker is needed
    assert result.issues.kinds() == {"race"}


@needs_nvrtc
def test_executor_catches_an_output_that_was_not_zeroed():
    kernel, case = mutant("histogram", "2000 in 50 bins")
    index, _, *sizes = case.launch.args
    launch = replace(case.launch, args=[index, empty(50, np.int32), *sizes])
    result = ptx.run(ptx.parse(kernel.compile("compute_80").ptx)["histogram"], launch)
    assert result.issues.kinds() == {"uninitialised"}


# Two builds hold all host mutants: no two switches of one build touch the same kernel.
BARRIER_AND_BOUND, SHUFFLE_AND_POINTER = ("BUG_BARRIER", "BUG_BOUND"), ("BUG_SHUFFLE_MASK", "BUG_VECTOR_POINTER")
ON_THE_HOST = [
    ("silu", "777", BARRIER_AND_BOUND, "heap-buffer-overflow"),
    ("scale_half", "4096", BARRIER_AND_BOUND, "heap-buffer-overflow"),
    ("scale_half", "4096", SHUFFLE_AND_POINTER, "misaligned address"),
    ("row_norm", "8x777 pitch 800", SHUFFLE_AND_POINTER, "not in its own mask"),
]


def host_mutant(switches: tuple[str, ...], mode: str = "sanitize") -> Program:
    kernels = [kernel for kernel in CUDA_SAMPLES if kernel.host]
    return compile_program(
        kernels[0].source, sorted(kernel.expression for kernel in kernels), mode=mode, defines=switches
    )


@pytest.mark.usefixtures("host_sanitizers")
@pytest.mark.parametrize(("expression", "case_name", "switches", "text"), ON_THE_HOST)
def test_sanitizers_catch(expression, case_name, switches, text):
    _, case = mutant(expression, case_name)
    with pytest.raises(SimtError, match=text):
        host_mutant(switches).run(expression, case.launch, seed=1)


@pytest.mark.usefixtures("host_sanitizers")
@pytest.mark.parametrize(
    ("expression", "case_name"), [("row_norm", "8x777 pitch 800"), ("histogram", "2000 in 50 bins")]
)
def test_schedules_show_a_missing_barrier_in_the_numbers(expression, case_name):
    _, case = mutant(expression, case_name)
    program, wrong = host_mutant(BARRIER_AND_BOUND), 0
    for seed in range(1, 6):
        try:
            case.check(program.run(expression, case.launch, seed=seed))
        except AssertionError:
            wrong += 1
    assert wrong >= 3, f"{wrong} of 5 schedules gave wrong numbers"


@pytest.mark.usefixtures("host_threads")
@pytest.mark.parametrize(
    ("expression", "case_name"), [("row_norm", "2x130 two warps"), ("histogram", "2000 in 50 bins")]
)
def test_thread_sanitizer_catches_a_missing_barrier(expression, case_name):
    """ThreadSanitizer remembers few accesses per word, so one run may miss what the next one shows."""
    _, case = mutant(expression, case_name)
    program, reports = host_mutant(BARRIER_AND_BOUND, "threads"), []
    for _ in range(5):
        try:
            program.run(expression, case.launch, seed=1)
        except SimtError as error:
            reports.append(str(error))
    assert any("data race" in report for report in reports)


@pytest.mark.usefixtures("host_sanitizers")
def test_host_run_reports_a_barrier_that_some_threads_skip(tmp_path):
    source = tmp_path / "early.cu"
    source.write_text(
        'extern "C" __global__ void early(int* out, int n) {\n'
        "  if (threadIdx.x >= n) return;\n"
        "  __syncthreads();\n"
        "  out[threadIdx.x] = 1;\n"
        "}\n"
    )
    program = compile_program(source, ["early"])
    program.run("early", Launch((1,), (64,), [empty(64, np.int32), np.int32(64)]))
    with pytest.raises(SimtError, match=r"20 wait at a barrier, 44 have returned \(.*early.cu:3\)"):
        program.run("early", Launch((1,), (64,), [empty(64, np.int32), np.int32(20)]))


@pytest.mark.usefixtures("host_sanitizers")
def test_host_run_checks_the_call():
    case = CUDA["silu"].cases["1"]()
    x, y, n = case.launch.args
    for args, text in (
        ([x, y], "2 arguments given"),
        ([x, y, np.int32(1)], "argument 2 has 4 bytes"),
        ([x, n, n], "a scalar"),
    ):
        with pytest.raises(SimtError, match=text):
            run_host(CUDA["silu"], replace(case, launch=replace(case.launch, args=args)))


def triton_mutant(function: str, like: str, **changes) -> tuple[TritonKernel, Case]:
    kernel = replace(TRITON[like], function=function, module=MODULE, **changes)
    return kernel, next(iter(kernel.cases.values()))()


@needs_triton
@pytest.mark.parametrize(
    ("function", "kind", "n_out"), [("beyond_the_end", "out-of-bounds", 1000), ("colliding_store", "race", 100)]
)
def test_executor_catches_in_triton(function, kind, n_out):
    kernel, _ = triton_mutant(function, "silu", signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"})
    x = Buffer(np.arange(1000, dtype=np.float32))
    launch = Launch((1,), (1,), [x, empty(n_out, np.float32), np.int32(1000)])
    result = run_triton_ptx(kernel, Case(launch, {}, divisible=False))
    assert kind in result.issues.kinds()
    assert all(issue.instruction.source.file == "triton_samples.py" for issue in result.issues)


@needs_triton
def test_executor_catches_a_relaxed_ticket_in_triton():
    kernel, case = triton_mutant("relaxed_ticket", "ticket_sum")
    assert run_triton_ptx(kernel, case).issues.kinds() == {"race"}
