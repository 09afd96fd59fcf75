"""The package's ops, from the launcher down: right numbers and no findings, in every executor."""

import functools

import numpy as np
import pytest
import torch

from . import ptx
from .package import OPS, check, run_cuda, run_triton, tensors_of
from .test_kernels import SEEDS, needs_nvrtc, needs_triton
from .traffic import counting, traffic
from .triton_aot import compile_triton


def every_call(backend, only=lambda op: op.calls):
    ops = [op for op in OPS if getattr(op, backend)]
    return [pytest.param(op, call, id=f"{op.name}-{call}") for op in ops for call in only(op)]


def check_traffic(op, call, got, launches):
    if call in op.streaming + op.unaligned:
        counters = [launch.result.counters for launch in launches]
        traffic(op.arguments(call), tensors_of(got), counters, aligned=call in op.streaming).check()


QUICK = {"pitched odd rows, float32", "1024 windows of 32 x 32, bfloat16"}  # of the large calls of moments


def is_quick(op, call):
    return op.name not in ("moments", "gram_eigh") or call in QUICK


@needs_nvrtc
@pytest.mark.parametrize(("op", "call"), every_call("cuda"))
def test_cuda_in_the_executor(op, call):
    got, launches = run_cuda(op, call)
    check(op, got, op.arguments(call))
    check_traffic(op, call, got, launches)


@pytest.fixture(scope="module")
def compiled_triton():
    """Compile in one child process whatever the calls will launch."""
    ops = [op for op in OPS if op.triton]
    calls = [(op, call) for op in ops for call in (*op.calls, *filter(functools.partial(is_quick, op), op.large))]
    launches = [launch for op, call in calls for launch in run_triton(op, call, run=False)[1]]
    compile_triton(list({launch.request.key: launch.request for launch in launches}.values()))


@needs_triton
@pytest.mark.parametrize(("op", "call"), every_call("triton"))
def test_triton_in_the_executor(compiled_triton, op, call):
    got, launches = run_triton(op, call)
    check(op, got, op.arguments(call))
    check_traffic(op, call, got, launches)


def every_large_call(backend):
    return [
        pytest.param(*param.values, id=param.id, marks=() if is_quick(*param.values) else pytest.mark.slow)
        for param in every_call(backend, lambda op: op.large)
    ]


@needs_nvrtc
@pytest.mark.parametrize(("op", "call"), every_large_call("cuda"))
def test_cuda_traffic_of_large_calls(op, call):
    got, launches = run_cuda(op, call, options=counting(op, call))
    check(op, got, op.arguments(call))
    check_traffic(op, call, got, launches)


@needs_triton
@pytest.mark.parametrize(("op", "call"), every_large_call("triton"))
def test_triton_traffic_of_large_calls(compiled_triton, op, call):
    got, launches = run_triton(op, call, options=counting(op, call))
    check(op, got, op.arguments(call))
    check_traffic(op, call, got, launches)


# Every approximate instruction errs by up to 2 ulp, and atomics run in any order: the tolerance must cover that.
FUZZ = ptx.Options(fuzz_ulp=2.0, check=False, count=False)


@needs_nvrtc
@pytest.mark.parametrize(("op", "call"), every_call("cuda"))
def test_cuda_tolerance_covers_approximate_instructions(op, call):
    got, _ = run_cuda(op, call, options=FUZZ)
    check(op, got, op.arguments(call))


@needs_triton
@pytest.mark.parametrize(("op", "call"), every_call("triton"))
def test_triton_tolerance_covers_approximate_instructions(compiled_triton, op, call):
    got, _ = run_triton(op, call, options=FUZZ)
    check(op, got, op.arguments(call))


def siblings(only=lambda op: op.calls):
    """Return the kernels of each file that the chosen calls launch: one host program holds them all."""
    found = {}
    for op in OPS:
        for call in only(op) if op.cuda else ():
            for launch in run_cuda(op, call, run="record")[1]:
                found.setdefault(launch.file, set()).add(launch.expression)
    return found


@pytest.mark.usefixtures("host_sanitizers")
@pytest.mark.parametrize(("op", "call"), every_call("cuda", lambda op: [c for c in op.calls if c not in op.long]))
def test_cuda_on_the_host(op, call):
    """The same bits whatever the order of blocks, warps and threads, and nothing for the sanitizers."""
    runs = [run_cuda(op, call, run="host", seed=seed, siblings=siblings())[0] for seed in SEEDS]
    check(op, runs[0], op.arguments(call))
    for run in runs[1:]:
        for value, first in zip(tensors_of(run), tensors_of(runs[0]), strict=True):
            np.testing.assert_array_equal(value.numpy(), first.numpy())


@pytest.mark.usefixtures("host_threads")
@pytest.mark.parametrize(("op", "call"), every_call("cuda", lambda op: op.racecheck))
def test_cuda_under_thread_sanitizer(op, call):
    together = siblings(lambda op: op.racecheck)
    got, _ = run_cuda(op, call, run="host", mode="threads", seed=1, siblings=together)
    check(op, got, op.arguments(call))


@needs_nvrtc
def test_wrong_arguments_do_not_reach_the_kernel():
    from balanced_rep.kernels import cuda
    from balanced_rep.kernels._driver import pack

    _, (launch, *_) = run_cuda(OPS[0], "short rows, float32", run="record")
    assert len(launch.launch.args) == 6
    kernel = cuda.plan(cuda.describe(torch.zeros(5, 131), 1, 0), torch.float32, 0, 0).kernel
    with pytest.raises(TypeError, match="takes 6 arguments, got 1"):
        pack(kernel, (torch.zeros(1),))
