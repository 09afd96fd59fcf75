"""Compiles Triton kernels ahead of time, without a GPU.

A process that interprets Triton cannot also compile it: the switch is read when ``triton`` is imported. So the
compiling happens in a child process, which handles a list of requests and leaves its results in
``build/gpusim/triton``; an unchanged request costs nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .toolchain import BUILD

__all__ = ["TritonCompileError", "TritonModule", "TritonRequest", "compile_triton"]

ROOT = Path(__file__).parents[2]
LAYOUT = "2"  # of a result's folder, which appears whole since 2: one of before may lack its facts and block the name


class TritonCompileError(AssertionError):
    """Triton refused a kernel; the text is its error."""


@dataclass(frozen=True)
class TritonRequest:
    """One compilation.

    Attributes:
        module: Dotted name of the module that holds the kernel.
        function: The kernel's name.
        signature: Parameter to Triton type, ``{"x_ptr": "*fp16", "n": "i64"}``, without the constants.
        constants: ``tl.constexpr`` values.
        divisible: Parameters known to be divisible by 16 (Triton's JIT finds out per call).
        target: ``80`` and so on for sm_80, or ``"gfx942"``.
        num_warps: Warps per program.
        num_stages: Depth of software pipelines.
        fp_fusion: Whether a multiplication and an addition may be contracted to one rounding.
    """

    module: str
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, int | float | bool | str | None] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    target: int | str = 80
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True

    @property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True) + importlib.metadata.version("triton") + LAYOUT
        digest = hashlib.sha256(text.encode())
        for path in _module_files(self.module):
            digest.update(_contents(path, path.stat().st_mtime_ns)[0])
        return f"{self.function}-{self.target}-{digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class TritonModule:
    """A compiled kernel: ``asm("ptx")``, ``asm("cubin")``, ``asm("ttir")``, ``asm("amdgcn")`` and launch facts."""

    folder: Path
    symbol: str
    shared_bytes: int
    num_warps: int
    global_scratch: int

    def asm(self, kind: str) -> bytes:
        return (self.folder / kind).read_bytes()

    @property
    def ptx(self) -> str:
        return self.asm("ptx").decode()


@functools.lru_cache(maxsize=256)
def _contents(path: Path, changed: int) -> tuple[bytes, frozenset[str]]:
    """Return a file's bytes and the words in it; ``changed``, its time of change, tells one content from another."""
    text = path.read_bytes()
    return text, frozenset(re.findall(r"\w+", text.decode()))


def _module_files(module: str) -> list[Path]:
    """The file of a module, and those beside it that it or they name, from which it may take functions."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    found, named = {Path(spec.origin)}, [Path(spec.origin)]
    while named:
        path = named.pop()
        _, words = _contents(path, path.stat().st_mtime_ns)
        named += (new := {path for path in Path(spec.origin).parent.glob("*.py") if path.stem in words} - found)
        found |= new
    return sorted(found)


def compile_triton(requests: Sequence[TritonRequest]) -> list[TritonModule]:
    """Compile every request that is not cached, in one child process, and return them in order.

    Raises:
        TritonCompileError: If Triton refuses one of them.
    """
    folders = [BUILD / "triton" / request.key for request in requests]
    missing = [
        {**asdict(request), "folder": str(folder)}
        for request, folder in zip(requests, folders, strict=True)
        if not (folder / "facts.json").exists()
    ]
    if missing:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpusim.triton_aot"],
            input=json.dumps(missing),
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise TritonCompileError(done.stderr[-6000:])
    return [TritonModule(folder, **json.loads((folder / "facts.json").read_text())) for folder in folders]


def _compile_one(request: dict) -> None:
    """Compile in this (child) process and write what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(request["module"]), request["function"], None)
    if kernel is None:
        raise TritonCompileError(f"{request['module']} has no function {request['function']}")
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    unknown = set(request["signature"]) | set(request["constants"])
    if unknown != set(position):
        raise TritonCompileError(
            f"{request['function']} has the parameters {sorted(position)}, the request names {sorted(unknown)}"
        )
    source = ASTSource(
        fn=kernel,
        signature={name: request["signature"].get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(position[name],): value for name, value in request["constants"].items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in request["divisible"]},
    )
    hip = isinstance(request["target"], str)
    target = GPUTarget("hip", request["target"], 64) if hip else GPUTarget("cuda", request["target"], 32)
    options = {
        "num_warps": request["num_warps"],
        "num_stages": request["num_stages"],
        "enable_fp_fusion": request["fp_fusion"],
    }
    compiled = triton.compile(source, target=target, options=options)
    final = Path(request["folder"])
    folder = final.with_name(f"{final.name}.{os.getpid()}")  # whole or not there: other test workers look for it
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("ttir", "ttgir", "ptx", "cubin", "amdgcn"):
        if kind in compiled.asm:
            code = compiled.asm[kind]
            (folder / kind).write_bytes(code if isinstance(code, bytes) else str(code).encode())
    facts = {
        "symbol": compiled.metadata.name,
        "shared_bytes": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "global_scratch": getattr(compiled.metadata, "global_scratch_size", 0),
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    _publish(folder, final)


def _publish(folder: Path, final: Path) -> None:
    """Give a finished folder its name, unless another worker was first."""
    try:
        folder.rename(final)
    except OSError:
        if not (final / "facts.json").exists():  # it was not that
            raise
        shutil.rmtree(folder)


if __name__ == "__main__":
    items = json.load(sys.stdin)
    for name in {item["module"] for item in items}:
        importlib.import_module(name)  # once, before the workers are forked
    with multiprocessing.get_context("fork").Pool(min(len(items), os.cpu_count() or 1)) as pool:
        pool.map(_compile_one, items, chunksize=1)
