"""What works on this machine: every op on every backend, run and compared with the reference, or why it cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

import torch

from balanced_rep._version import __version__
from balanced_rep.ops._registry import ORDER, REGISTRY, BackendError, OpSpec, backend, forced_backend
from balanced_rep.testing import agreement

__all__ = ["diagnose"]

_PACKAGES = ("torch", "numpy", "triton", "cupy-cuda12x", "cupy-cuda13x", "diffusers", "safetensors", "scikit-learn")
_ON_DEVICE = ("cuda", "triton")


def diagnose() -> dict[str, Any]:
    """Versions, device, instruction set, OpenMP runtimes and the state of every op on every backend.

    Returns:
        A dict that json can write. ``ops[op][backend]`` is ``"ok"``, or ``"no: <reason>"`` if the backend cannot run
        here, or ``"wrong: <error>"`` / ``"failed: <error>"`` if it should and does not: those two make
        ``healthy`` false, and so does an entry of ``problems``: a setting with which no op runs.
    """
    with backend(None):  # each op is tried on each backend, whatever the environment forces
        ops = {name: {b: _state(spec, b) for b in ORDER} for name, spec in REGISTRY.items()}
    problems = _problems(ops)
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: v for name in _PACKAGES if (v := _version(name)) is not None},
        "device": _device(),
        "instruction_set": _instruction_set(),
        "threads": torch.get_num_threads(),
        "openmp_runtimes": _openmp_runtimes(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("BALANCED_REP_")},
        "problems": problems,
        "ops": ops,
        "healthy": not problems
        and not any(s.startswith(("wrong", "failed")) for row in ops.values() for s in row.values()),
    }


def _problems(ops: dict[str, dict[str, str]]) -> list[str]:
    """Settings with which no op runs: a backend that does not exist, or that runs nothing on this machine."""
    try:
        forced = forced_backend()
    except BackendError as error:
        return [str(error)]
    if forced is None or any(row[forced] == "ok" for row in ops.values()):
        return []
    reasons = dict.fromkeys(row[forced].partition(": ")[2] for row in ops.values())
    return [f"Backend {forced!r} is asked for, and no op runs on it here ({'; '.join(reasons)})."]


def _state(spec: OpSpec, name: str) -> str:
    assert spec.inputs is not None
    device = "cuda" if name in _ON_DEVICE and torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if torch.float32 in spec.tolerance else next(iter(spec.tolerance))
    args = spec.inputs(torch.Generator().manual_seed(0), dtype)
    try:
        args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
        if (reason := spec.why_not(name, *args)) is not None:
            return f"no: {reason}"
        with backend(name):
            got = spec(*args)
    except Exception as error:  # a broken backend is what the doctor is asked about, whatever it raises
        return f"failed: {type(error).__name__}: {error}".replace("\n", " ")
    wrong = agreement(spec, got, args)
    return "ok" if wrong is None else f"wrong: {wrong}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return "cpu only" + ("" if torch.version.cuda else " (this torch is a CPU build)")


def _instruction_set() -> str:
    if importlib.util.find_spec("balanced_rep._C") is None:
        return "none: the extension balanced_rep._C is not built"
    try:
        from balanced_rep import _C
    except ImportError as error:
        return f"none: {error}"
    return f"{_C.isa()} (usable here: {', '.join(_C.isas())})"


def _openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes mapped into this process; two of them fight over the cores."""
    if not sys.platform.startswith("linux"):
        return []
    with open("/proc/self/maps") as maps:
        files = {line.rsplit("/", 1)[-1].strip() for line in maps if "/" in line}
    return sorted(f for f in files if f.startswith(("libgomp", "libomp", "libiomp")))
