"""No kernel of the package is left out: whatever can be launched is launched by a call of ``package.py``."""

import ast
import os
import re
from pathlib import Path

import pytest

from balanced_rep.ops._registry import REGISTRY

from .kernels import PACKAGE_CUDA, PACKAGE_TRITON
from .package import CSRC, OPS, run_cuda, run_triton
from .simt import host_missing
from .static.report import read_baseline
from .test_kernels import needs_triton
from .toolchain import nvrtc_missing, triton_missing, versions

TRITON_SOURCES = Path(__file__).parents[2] / "kernels" / "triton"
HOW = "add an entry or a call to OPS in tests/gpusim/package.py"


def test_every_op_with_a_gpu_backend_has_an_entry():
    registered = {
        (spec.name, backend, spec.impls[backend].target)
        for spec in REGISTRY.values()
        for backend in ("cuda", "triton")
        if backend in spec.impls and spec.impls[backend].target.startswith("balanced_rep.")  # not one of a test
    }
    entries = {
        (op.name, backend, getattr(op, backend)) for op in OPS for backend in ("cuda", "triton") if getattr(op, backend)
    }
    assert registered == entries, HOW


def cuda_kernels():
    for path in sorted(CSRC.glob("*.cu*")):
        text = re.sub(r"//.*", "", path.read_text())
        yield from re.findall(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(", text)


def test_every_cuda_kernel_is_launched():
    launched = {
        re.sub(r"<.*|.*::(?=\w+$)|balanced_rep::", "", launch.expression)
        for op in OPS
        for call in (op.calls if op.cuda else ())
        for launch in run_cuda(op, call, run="record")[1]
    }
    assert launched == set(cuda_kernels()), HOW


def triton_kernels():
    """Names of the ``@triton.jit`` functions that no other one calls."""
    for path in sorted(TRITON_SOURCES.glob("*.py")):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        jitted = [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]
        used = {name.id for f in jitted for name in ast.walk(f) if isinstance(name, ast.Name)}
        yield from ((path.stem, f.name) for f in jitted if f.name not in used)


@needs_triton
def test_every_triton_kernel_is_launched():
    launched = {
        (launch.request.module.rsplit(".", 1)[1], launch.request.function)
        for op in OPS
        for call in (op.calls if op.triton else ())
        for launch in run_triton(op, call, run=False)[1]
    }
    assert launched == set(triton_kernels()), HOW


@needs_triton
def test_every_triton_kernel_goes_through_the_compile_gate():
    gated = {(kernel.module.rsplit(".", 1)[1], kernel.function) for kernel in PACKAGE_TRITON}
    assert gated == set(triton_kernels()), "name calls that launch it in `gated`, in tests/gpusim/package.py"


@needs_triton
def test_the_folders_hold_kernels():
    """The searches above find what is there."""
    assert ("moments", "_tile_kernel") in set(triton_kernels())
    assert {"moments_rows", "philox_normal"} <= set(cuda_kernels())
    assert {kernel.source.name for kernel in PACKAGE_CUDA} == {path.name for path in CSRC.glob("*.cu")}


@pytest.mark.skipif("CI" not in os.environ, reason="on a developer's machine a missing tool is a reason to skip")
def test_nothing_is_missing_in_continuous_integration():
    missing = [nvrtc_missing(), triton_missing(), host_missing("sanitize"), host_missing("threads")]
    assert not [reason for reason in missing if reason]
    assert read_baseline()[0] == versions(), "renew the baseline: make kernel-report"
