"""The package's ops, from the launcher down: right numbers and no findings, in every executor."""

import numpy as np
import pytest
import torch

from balanced_rep.ops._registry import REGISTRY
from balanced_rep.testing import assert_moments_close

from .package import OPS, run_cuda, run_triton
from .test_kernels import ALIGNED_LIMIT, DRAM_LIMIT, SEEDS, UNALIGNED_LIMITS, needs_nvrtc, needs_triton
from .triton_aot import compile_triton


def every_call(backend, only=lambda op: op.calls):
    ops = [op for op in OPS if getattr(op, backend)]
    return [pytest.param(op, call, id=f"{op.name}-{call}") for op in ops for call in only(op)]


def check(op, got, args):
    """Compare with the float64 reference by the rules of the op."""
    x, *rest = args
    if op.name.startswith("philox"):  # all backends give the same bits
        assert torch.equal(got, REGISTRY[op.name].reference(*args))
        return
    averaged = rest[2] == 2  # the values themselves are then rounded
    assert_moments_close(got, REGISTRY[op.name].reference(x.double(), *rest), value_rel=1e-6 if averaged else 0.0)


def check_traffic(op, call, args, launches):
    if call not in op.streaming + op.unaligned:
        return
    counters = [launch.result.counters for launch in launches]
    ratio = sum(c.sectors for c in counters) / sum(c.ideal_sectors for c in counters)
    x = args[0]
    assert ratio <= (ALIGNED_LIMIT if call in op.streaming else UNALIGNED_LIMITS[x.element_size()])
    minimum = x.numel() * x.element_size() + 10 * 8 * x.shape[0]
    assert sum(c.dram_bytes for c in counters) <= DRAM_LIMIT * minimum, "DRAM bytes in the LRU model"


@needs_nvrtc
@pytest.mark.parametrize(("op", "call"), every_call("cuda"))
def test_cuda_in_the_executor(op, call):
    got, launches = run_cuda(op, call)
    args = op.calls[call]()
    check(op, got, args)
    check_traffic(op, call, args, launches)


@pytest.fixture(scope="module")
def compiled_triton():
    """Compile in one child process whatever the calls will launch."""
    ops = [op for op in OPS if op.triton]
    launches = [launch for op in ops for call in op.calls for launch in run_triton(op, call, run=False)[1]]
    compile_triton(list({launch.request.key: launch.request for launch in launches}.values()))


@needs_triton
@pytest.mark.parametrize(("op", "call"), every_call("triton"))
def test_triton_in_the_executor(compiled_triton, op, call):
    got, launches = run_triton(op, call)
    args = op.calls[call]()
    check(op, got, args)
    check_traffic(op, call, args, launches)


def siblings(only=lambda op: op.calls):
    """Return the kernels of each file that the chosen calls launch: one host program holds them all."""
    found = {}
    for op in OPS:
        for call in only(op) if op.cuda else ():
            for launch in run_cuda(op, call, run="record")[1]:
                found.setdefault(launch.file, set()).add(launch.expression)
    return found


@pytest.mark.parametrize(("op", "call"), every_call("cuda"))
def test_cuda_on_the_host(op, call):
    """The same bits whatever the order of blocks, warps and threads, and nothing for the sanitizers."""
    runs = [run_cuda(op, call, run="host", seed=seed, siblings=siblings())[0] for seed in SEEDS]
    check(op, runs[0], op.calls[call]())
    for run in runs[1:]:
        np.testing.assert_array_equal(run.numpy(), runs[0].numpy())


@pytest.mark.parametrize(("op", "call"), every_call("cuda", lambda op: op.racecheck))
def test_cuda_under_thread_sanitizer(op, call):
    together = siblings(lambda op: op.racecheck)
    got, _ = run_cuda(op, call, run="host", mode="threads", seed=1, siblings=together)
    check(op, got, op.calls[call]())


@needs_nvrtc
def test_wrong_arguments_do_not_reach_the_kernel():
    from balanced_rep.kernels import cuda
    from balanced_rep.kernels._driver import pack

    _, (launch, *_) = run_cuda(OPS[0], "short rows, float32", run="record")
    assert len(launch.launch.args) == 6
    kernel = cuda.plan(cuda.describe(torch.zeros(5, 131), 1, 0), torch.float32, 0, 0).kernel
    with pytest.raises(TypeError, match="takes 6 arguments, got 1"):
        pack(kernel, (torch.zeros(1),))
