"""Where the compilers come from: NVRTC and its headers from NVIDIA's wheels, the assembler's tools from Triton's.

None of them needs a driver or a GPU. Each ``*_missing`` function answers None, or the reason as text for a skip.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CudaCompileError",
    "CudaModule",
    "compile_cuda",
    "nvrtc_missing",
    "triton_missing",
    "triton_tool",
    "versions",
]

BUILD = Path(__file__).parents[2] / "build" / "gpusim"


class CudaCompileError(AssertionError):
    """NVRTC refused the source; the text is its log."""


@dataclass(frozen=True)
class CudaModule:
    """What NVRTC made of a ``.cu`` file.

    Attributes:
        code: PTX text (for ``compute_XX``) or a cubin (for ``sm_XX``), as bytes.
        names: Kernel expression to symbol: ``{"moments<float>": "_Z7moments..."}``.
    """

    code: bytes
    names: dict[str, str]

    @property
    def ptx(self) -> str:
        return self.code.rstrip(b"\0").decode()


def nvrtc_missing() -> str | None:
    if importlib.util.find_spec("cupy_backends") is None:
        return "the cupy-cuda13x wheel (NVRTC binding) is not installed"
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # a missing library shows as one of several types
        return f"NVRTC does not load: {error}"
    return None


def triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "the triton wheel is not installed"


def versions() -> dict[str, str]:
    """Return the versions of the compilers: another one may use other registers."""
    from cupy_backends.cuda.libs import nvrtc

    return {"nvrtc": ".".join(map(str, nvrtc.getVersion())), "triton": importlib.metadata.version("triton")}


def triton_tool(name: str) -> Path:
    """Return the path of ``cuobjdump`` or ``nvdisasm`` inside the Triton wheel."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{name}: {triton_missing()}")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


@functools.cache
def cuda_include_dirs() -> tuple[str, ...]:
    """Return the header folders of the nvidia-cuda-runtime and nvidia-cuda-cccl wheels that are installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    found = []
    for root in roots:
        for folder in ("cu13/include", "cu13/include/cccl", "cuda_runtime/include"):
            if Path(root, folder).is_dir():
                found.append(str(Path(root, folder)))
    return tuple(found)


def compile_cuda(
    source: Path,
    kernels: Sequence[str],
    arch: str,
    *,
    defines: Sequence[str] = (),
    include_dirs: Sequence[Path] = (),
    options: Sequence[str] = ("-lineinfo",),
) -> CudaModule:
    """Compile a ``.cu`` file with NVRTC; an unchanged one is taken from ``build/gpusim/cuda``.

    Args:
        source: The ``.cu`` file.
        kernels: Kernel expressions; templates are instantiated by being named.
        arch: ``"compute_80"`` for PTX, ``"sm_80"`` for a cubin.
        defines: Preprocessor definitions, ``"NAME=1"``.
        include_dirs: Folders for quoted includes, after the folder of the source.
        options: More compiler options.

    Returns:
        The code and the symbol of each kernel.

    Raises:
        CudaCompileError: If NVRTC refuses the source.
    """
    from cupy_backends.cuda.libs import nvrtc

    folders = [source.parent, *include_dirs]
    flags = [f"-arch={arch}", "-std=c++17", "--device-as-default-execution-space", *options]
    flags += [f"-D{define}" for define in defines]
    digest = _digest([str(nvrtc.getVersion()), *flags, *kernels], folders, source)
    cached = BUILD / "cuda" / f"{source.stem}-{arch}-{digest}"
    if not cached.exists():
        flags += [f"-I{folder}" for folder in (*folders, *cuda_include_dirs())]
        code, names = _run_nvrtc(nvrtc, source, kernels, arch, flags)
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(f".{os.getpid()}")
        lines = "".join(f"{kernel}\t{symbol}\n" for kernel, symbol in names.items())
        unfinished.write_bytes(lines.encode() + b"\n" + code)
        unfinished.replace(cached)
    header, _, code = cached.read_bytes().partition(b"\n\n")
    names = dict(line.split("\t") for line in header.decode().splitlines())
    return CudaModule(code, names)


def _run_nvrtc(nvrtc, source: Path, kernels: Sequence[str], arch: str, flags: list[str]) -> tuple[bytes, dict]:
    program = nvrtc.createProgram(source.read_text(), str(source), (), ())
    try:
        for kernel in kernels:
            nvrtc.addNameExpression(program, kernel)
        try:
            nvrtc.compileProgram(program, flags)
        except Exception as error:
            log = nvrtc.getProgramLog(program)
            raise CudaCompileError(f"NVRTC refuses {source.name} for {arch}:\n{log[:4000]}") from error
        if arch.startswith("sm_"):
            code = nvrtc.getCUBIN(program) + b"\0"  # cupy's binding cuts the last byte, as if it ended a string
        else:
            code = nvrtc.getPTX(program)
        names = {kernel: nvrtc.getLoweredName(program, kernel) for kernel in kernels}
        return (code if isinstance(code, bytes) else code.encode()), names
    finally:
        nvrtc.destroyProgram(program)


def _digest(words: Sequence[str], folders: Sequence[Path], source: Path) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    headers = [path for folder in folders for pattern in ("*.cuh", "*.h") for path in sorted(folder.glob(pattern))]
    for path in (source, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
