"""The Triton kernels through their launcher: interpreted, and as the PTX that Triton emits for sm_80 and sm_90."""

import re
from dataclasses import replace

import pytest
import torch

from balanced_rep.ops.moments import moments_reference
from tests.gpusim.simulated import simulated_triton
from tests.gpusim.toolchain import triton_missing
from tests.gpusim.triton_aot import compile_triton
from tests.kernels.moments_cases import (
    DTYPES,
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

pytestmark = pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
KERNELS = {"_tile_kernel": frozenset({"out_ptr"}), "_merge_kernel": frozenset({"out_ptr"})}
POOL = pytest.mark.parametrize("pool", [1, 2], ids=["max", "mean"])
ORDER = pytest.mark.parametrize("channels_last", [False, True], ids=["windows", "channels last"])
THOROUGH = {torch.float32: tuple(LAYOUTS), torch.bfloat16: FEW, torch.float16: FEW, torch.float64: FEW}

# name -> (call, the loads of its tile kernel on sm_80 and sm_90): bits of a load, in which every element comes
WIDE = {
    "rows": (lambda t: Call(normal(2, 8192, dtype=t), 1), 128),
    "short rows": (lambda t: Call(normal(16, 512, dtype=t), 1), 128),
    "columns": (lambda t: Call(normal(512, 256, dtype=t).t(), 1), 128),
    "windows": (lambda t: Call(normal(2, 64, 16, 16, dtype=t), 1, 2, 1), 128),
}


def run(*call):
    from balanced_rep.kernels.triton.moments import moments

    return moments(*call)


def launches_of(call):
    from balanced_rep.kernels.triton import moments as module

    with simulated_triton(module, KERNELS, run=False) as launches:
        module.moments(*call)
    return launches


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(("dtype", "layout"), cases(THOROUGH))
def test_layouts(dtype, layout):
    call = LAYOUTS[layout](dtype)
    check(run(*call), call)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_difficult_numbers(dtype, columns):
    check_difficult(run, dtype, columns=columns)


@pytest.mark.usefixtures("triton_interpreter")
@POOL
@ORDER
def test_windows_with_nan_and_inf(pool, channels_last):
    call = spoiled_windows(torch.float32, pool, channels_last=channels_last)
    check(run(*call), call)


@pytest.mark.usefixtures("triton_interpreter")
def test_empty_inputs():
    assert run(torch.zeros(0, 3), 1, 0, 0, 0.0).shape == (10, 0)
    got = run(torch.zeros(3, 0), 1, 0, 0, 0.0)
    assert got[:, 0].tolist() == [0, 0, 0, 0, 0, 0, torch.inf, -torch.inf, 0, 0]


@pytest.mark.usefixtures("triton_interpreter")
def test_rows_of_many_parts_are_merged_in_rounds():
    from balanced_rep.kernels.triton import moments as module

    x = normal(2, 600, 9)
    x[1, 300, 4] = torch.inf
    parts = moments_reference(x, 2, 0, 0, 0.1)
    for groups in (3, 1):
        parts = module._merged(parts, raw=False)
        assert parts.shape == (10, 2, groups)
    check(parts.squeeze(-1), Call(x.flatten(1), 1))


def test_arithmetic_that_must_not_be_fused_is_not():
    """A merge is then the same in both lanes of an exchange, either of which may store."""
    merges = launches_of(Call(normal(2, 9001, dtype=torch.float32), 1))[1:]
    assert [launch.request.function for launch in merges] == ["_merge_kernel"]
    assert not merges[0].request.fp_fusion


@pytest.fixture(scope="module")
def compiled():
    """Every kernel that the calls of WIDE launch, for both architectures, in one child process."""
    requests = {
        (name, dtype, target): replace(launches_of(build(dtype))[0].request, target=target)
        for name, (build, _) in WIDE.items()
        for dtype in (torch.float32, torch.bfloat16)
        for target in (80, 90)
    }
    return dict(zip(requests, compile_triton(list(requests.values())), strict=True))


@pytest.mark.parametrize("target", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("name", WIDE)
def test_loads_are_wide(compiled, name, dtype, target):
    ptx = compiled[name, dtype, target].ptx
    found = re.findall(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    assert {int(count or 1) * int(bits) for count, bits in found} == {WIDE[name][1]}
