"""The compiled extension below the op: the read test, each instruction set, and a build with ``-march=native``."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import _common as common  # before torch
import torch
from torch import Tensor

from balanced_rep.ops import _cpp

DISPATCHED, NATIVE = "dispatched", "march=native"


def read_test(x: Tensor, threads: int) -> Callable[[], object]:
    """Reads the array once and sums it as float32 words, whatever they mean: the yardstick of a memory-bound op."""
    ext = _cpp.extension()
    return lambda: ext.read_test(x.data_ptr(), x.numel() * x.element_size(), threads)


def isa_candidates(x: Tensor, dim: int, threads: int, compiling: bool) -> dict[str, Callable[[], object]]:
    """One kernel call through run-time dispatch, through the native build, and for each other instruction set."""
    ext = _cpp.extension()
    chosen = ext.isa()
    view = x if dim == 1 else x.T
    out = torch.empty(10, view.shape[0], dtype=torch.float64)

    def call(module: ModuleType) -> None:
        module.moments(*_cpp._view(view, 1, 0, 0), 0.0, out.data_ptr(), threads)

    def forced(isa: str) -> None:
        ext.set_isa(isa)
        try:
            call(ext)
        finally:
            ext.set_isa(chosen)

    found: dict[str, Callable[[], object]] = {DISPATCHED: functools.partial(call, ext)}
    if compiling and (native := native_extension()) is not None:
        found[NATIVE] = functools.partial(call, native)
    return found | {isa: functools.partial(forced, isa) for isa in ext.isas() if isa != chosen}


@functools.cache
def native_extension() -> ModuleType | None:
    """The same sources by the same recipe with ``-march=native`` on every translation unit, built once per change.

    Returns:
        The module; ``None``, with a line on stderr, where this is no checkout or the build fails.
    """
    sources = sorted(path for path in (common.ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".inl"})
    recipe = common.ROOT / "setup.py"
    if not sources or not recipe.exists():
        return None
    digest = hashlib.sha256(common.cpu_model().encode())
    for path in (recipe, *sources):
        digest.update(path.read_bytes())
    folder = common.BUILD / f"native-{digest.hexdigest()[:12]}"
    try:
        library = next(folder.glob("balanced_rep/_C.*.so"), None) or _build(folder)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no -march=native build to compare with: {error}", file=sys.stderr)
        return None
    loader = importlib.machinery.ExtensionFileLoader("balanced_rep_native._C", str(library))
    spec = importlib.util.spec_from_file_location(loader.name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _build(folder: Path) -> Path:
    temporary = folder / "tmp"
    command = [
        *(sys.executable, "setup.py", "-q"),
        *("build_clib", "--build-clib", str(temporary), "--build-temp", str(temporary)),
        *("build_ext", "--build-lib", str(folder), "--build-temp", str(temporary)),
    ]
    flags = f"{os.environ.get('CFLAGS', '')} -march=native".strip()
    environment = os.environ | {"CFLAGS": flags, "CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} -march=native".strip()}
    done = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.SubprocessError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "build failed"
        )
    return next(folder.glob("balanced_rep/_C.*.so"))
