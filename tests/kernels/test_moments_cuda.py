"""moments.cu through its launcher: the PTX that NVRTC makes of it, in the executor with all of its checks."""

import re
from collections import Counter

import pytest
import torch

from balanced_rep.kernels import _driver, cuda
from balanced_rep.kernels._moments_plan import plan
from balanced_rep.kernels._strided import describe
from tests.gpusim.cases import ARCHITECTURES, CudaKernel
from tests.gpusim.simulated import CSRC, SimulatedCuda
from tests.gpusim.static.measure import cubin_facts
from tests.gpusim.toolchain import compile_cuda, nvrtc_missing
from tests.kernels.moments_cases import (
    DTYPES,
    EVERY_KERNEL,
    FEW,
    LAYOUTS,
    NAMES,
    Call,
    cases,
    check,
    check_difficult,
    normal,
    spoiled_windows,
)

needs_nvrtc = pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))
OUTPUTS = frozenset({1, 2})
POOL = pytest.mark.parametrize("pool", [1, 2], ids=["max", "mean"])
ORDER = pytest.mark.parametrize("channels_last", [False, True], ids=["windows", "channels last"])
THOROUGH = {
    torch.float32: tuple(LAYOUTS),
    torch.bfloat16: EVERY_KERNEL,
    torch.float16: FEW,
    torch.float64: FEW,
}


@pytest.fixture
def device(monkeypatch):
    driver = SimulatedCuda(outputs=OUTPUTS)
    monkeypatch.setattr(cuda, "launch", _driver.Launcher(driver))
    return driver


@needs_nvrtc
@pytest.mark.parametrize(("dtype", "layout"), cases(THOROUGH))
def test_layouts(device, dtype, layout):
    call = LAYOUTS[layout](dtype)
    check(cuda.moments(*call), call)


@needs_nvrtc
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_difficult_numbers(device, dtype, columns):
    check_difficult(cuda.moments, dtype, columns=columns)


@needs_nvrtc
@POOL
@ORDER
def test_windows_with_nan_and_inf(device, pool, channels_last):
    call = spoiled_windows(torch.float32, pool, channels_last=channels_last)
    check(cuda.moments(*call), call)


@needs_nvrtc
def test_tickets_end_at_zero(device, monkeypatch):
    """A second launch with the same counters gives the same bits; only zeros make it merge at all."""
    monkeypatch.setattr(device, "stream_key", lambda device: "a stream", raising=False)
    monkeypatch.setattr(cuda, "_tickets", {})
    call = Call(normal(3, 9001, dtype=torch.float32), 1)
    first = cuda.moments(*call)
    (tickets,) = cuda._tickets.values()
    assert tickets.eq(0).all()
    assert torch.equal(cuda.moments(*call), first)


def test_every_expression_is_planned():
    """The table of the compile gate, the layouts of these tests and the planner know the same kernels."""
    seen = {_expression(dtype, layout) for dtype in DTYPES for layout in LAYOUTS}
    assert seen == set(EXPRESSIONS)


def _expression(dtype, layout):
    x, n_kept, n_pooled, pool, _ = LAYOUTS[layout](dtype)
    return plan(describe(x, n_kept, n_pooled), dtype, x.data_ptr(), pool).kernel.expression


def _expressions():
    for dtype in DTYPES:
        name = f"balanced_rep::{NAMES[dtype]}"
        for kernel in ("rows", "warps"):
            yield from (f"balanced_rep::moments_{kernel}<{name}, {wide}>" for wide in ("false", "true"))
        yield from (
            f"balanced_rep::moments_columns<{name}, {wide}>"
            for wide in (("false", "true") if dtype.itemsize == 2 else ("false",))
        )
        for pool in ("Maximum", "Mean"):
            yield from (
                f"balanced_rep::moments_pooled<{name}, balanced_rep::{pool}, {windows}>"
                for windows in ("false", "true")
            )


EXPRESSIONS = tuple(_expressions())


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_full_tiles_come_in_by_wide_loads(dtype):
    """Rows by loads of 128 bits; columns of 16-bit numbers two at a time, the others one by one."""
    items = 32 if dtype.itemsize == 2 else 16
    assert _loads(f"moments_rows<balanced_rep::{NAMES[dtype]}, true>")[128] == items * dtype.itemsize // 16
    if dtype.itemsize == 2:
        assert _loads(f"moments_columns<balanced_rep::{NAMES[dtype]}, true>")[32] == 16


def _loads(expression):
    """Loads from global memory in a kernel's PTX, by width in bits."""
    module = compile_cuda(CSRC / "moments.cu", [f"balanced_rep::{expression}"], "compute_80")
    (symbol,) = module.names.values()
    body = module.ptx.split(f".entry {symbol}(")[1]
    found = re.findall(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)\b", body)
    return Counter(int(count or 1) * int(bits) for count, bits in found)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
def test_nothing_spills_anywhere(arch):
    kernels = [CudaKernel(e, CSRC / "moments.cu", e, 256, cases={}) for e in EXPRESSIONS]
    code = compile_cuda(CSRC / "moments.cu", EXPRESSIONS, f"sm_{arch}")
    facts = cubin_facts(code.code, arch, {code.names[k.expression]: (k.threads, 0) for k in kernels})
    assert len(facts) == len(EXPRESSIONS)
    spilling = {name: f["spills"] + f["stack"] for name, f in facts.items() if f["spills"] or f["stack"]}
    assert not spilling
    assert max(f["registers"] for f in facts.values()) <= 128  # two blocks of 256 threads
