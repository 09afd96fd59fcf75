"""Every op of the registry on every backend that runs here, on the op's own inputs: `pytest bench/bench_ops.py`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import _common as common  # before torch
import pytest
import torch

import balanced_rep as br
import balanced_rep.ops as ops
from balanced_rep.ops._registry import ORDER, REGISTRY

for _module in pkgutil.iter_modules(ops.__path__, "balanced_rep.ops."):
    if not _module.name.rpartition(".")[2].startswith("_"):
        importlib.import_module(_module.name)


def _cases() -> list[Any]:
    return [
        pytest.param(name, backend, dtype, id=f"{name}-{backend}-{common.dtype_name(dtype)}")
        for name, spec in REGISTRY.items()
        for dtype in spec.tolerance
        for backend in ORDER
        if spec.inputs is not None and (backend == "reference" or backend in spec.impls)
    ]


@pytest.mark.parametrize(("name", "backend", "dtype"), _cases())
def test_op(benchmark: Any, name: str, backend: str, dtype: torch.dtype) -> None:
    spec = REGISTRY[name]
    assert spec.inputs is not None
    args = spec.inputs(common.generator(), dtype)
    if reason := spec.why_not(backend, *args):
        pytest.skip(reason)
    benchmark.group = f"{name} {common.dtype_name(dtype)}"
    with br.backend(backend), common.threads(1):
        benchmark(spec, *args)
