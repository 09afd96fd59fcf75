"""Compiles CUDA C++ for a device with NVRTC, and keeps what came out on disk.

cupy compiles too, but appends ``-ftz=true`` to whatever options it is given: float32 numbers below 1e-38 become zero,
which is neither what the kernels promise nor what their tests have seen. So cupy only loads what is compiled here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

__all__ = ["CompileError", "Compiled", "cached", "compile_source", "target_of"]

OPTIONS = ("-std=c++17", "--device-as-default-execution-space")


class CompileError(RuntimeError):
    """NVRTC refused a source; the text is its log."""


class Compiled(NamedTuple):
    """A compiled kernel.

    Attributes:
        path: File with the code, a cubin or PTX.
        symbol: Name of the kernel in it.
    """

    path: Path
    symbol: str


def target_of(capability: tuple[int, int]) -> str:
    """What to compile for a device.

    Args:
        capability: Compute capability of the device.

    Returns:
        ``sm_90`` or the like, machine code; for a device that this NVRTC does not know, ``compute_90``, PTX of the
        latest architecture before it that NVRTC knows, which the driver translates.
    """
    from cupy_backends.cuda.libs import nvrtc

    wanted, known = 10 * capability[0] + capability[1], [int(arch) for arch in nvrtc.getSupportedArchs()]
    if wanted in known:
        return f"sm_{wanted}"
    return f"compute_{max((arch for arch in known if arch < wanted), default=min(known))}"


def compile_source(source: str, name: str, expression: str, target: str) -> tuple[bytes, str]:
    """Compile one kernel.

    Args:
        source: CUDA C++ that includes nothing.
        name: What messages call it.
        expression: C++ expression that names the kernel, template arguments included.
        target: As :func:`target_of` gives it.

    Returns:
        The code and the kernel's symbol.

    Raises:
        CompileError: If NVRTC refuses the source.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source, name, (), ())
    try:
        nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(program, (f"-arch={target}", *OPTIONS))
        except nvrtc.NVRTCError as error:
            raise CompileError(f"{error}\n{nvrtc.getProgramLog(program)[:4000]}") from error
        code = nvrtc.getCUBIN(program) if target.startswith("sm_") else nvrtc.getPTX(program)
        code = code.encode() if isinstance(code, str) else code
        return code + b"\0", nvrtc.getLoweredName(program, expression)  # the binding cuts the last byte off
    finally:
        nvrtc.destroyProgram(program)


def cached(source: str, name: str, expression: str, target: str) -> Compiled:
    """Compile one kernel, or find it compiled in cupy's folder of kernels, or where that cannot be written a new one.

    Args:
        source: CUDA C++ that includes nothing.
        name: What messages call it.
        expression: C++ expression that names the kernel, template arguments included.
        target: As :func:`target_of` gives it.

    Returns:
        The file and the symbol.
    """
    from cupy_backends.cuda.libs import nvrtc

    key = "\0".join((source, expression, target, *OPTIONS, str(nvrtc.getVersion())))
    stem = f"balanced_rep-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    folder = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
    code, symbol = folder / f"{stem}.{'cubin' if target.startswith('sm_') else 'ptx'}", folder / f"{stem}.symbol"
    with contextlib.suppress(OSError):
        if code.is_file():  # written last
            return Compiled(code, symbol.read_text())
    compiled, mangled = compile_source(source, name, expression, target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(symbol, mangled.encode())
        _write(code, compiled)
    except OSError:
        code = Path(tempfile.mkdtemp(prefix="balanced_rep-"), code.name)
        code.write_bytes(compiled)
    return Compiled(code, mangled)


def _write(path: Path, content: bytes) -> None:
    """Put a file in its place at once: other processes see nothing or all of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
