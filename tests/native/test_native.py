"""The C++ sources on their own: wider vectors than this machine has, another processor, sanitizers, leaked symbols."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from balanced_rep.ops import _cpp

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CPU = ROOT / "csrc" / "cpu"
SOURCES = [
    HERE / "check_moments.cpp",
    *(CPU / f"{name}.cpp" for name in ("isa", "moments", "reduction", "kernels_base", "jvp_base")),
]
FLAGS = ["-std=c++17", "-DBR_BASE_ONLY", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Werror"]
X86 = os.uname().machine in {"x86_64", "AMD64"}
ISA_FLAGS = {
    "base": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-Wno-maybe-uninitialized"],
}


@pytest.fixture
def compiler():
    if not CPU.is_dir():
        pytest.skip("the sources are not beside the tests: an installed package")
    name = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(name) is None:
        pytest.skip(f"no C++ compiler {name!r}")
    return name


def build(compiler: str, target: Path, *flags: str) -> Path:
    include = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{CPU}"]
    subprocess.run([compiler, *FLAGS, *include, *flags, *map(str, SOURCES), "-o", str(target)], check=True)
    return target


def passes(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_vectors_of_64_bytes_without_avx512(compiler, tmp_path):
    """The logic of the AVX-512 kernels; the compiler lowers the vectors to what this machine has."""
    passes(str(build(compiler, tmp_path / "check", "-O1", "-DBR_VECTOR_BYTES=64")), "4")


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 64])
def test_under_address_and_undefined_behaviour_sanitizers(compiler, tmp_path, width):
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    passes(str(build(compiler, tmp_path / "check", *flags, f"-DBR_VECTOR_BYTES={width}")))


@pytest.mark.skipif("avx512" not in _cpp.extension().isas(), reason="what surrounds the tiles is AVX-512")
def test_tiles_in_software(compiler, tmp_path):
    """The kernel for AMX on processors without it, and what it reads and writes."""
    target = tmp_path / "check"
    flags = [*(f for f in FLAGS if f != "-DBR_BASE_ONLY"), "-Wno-unused-function", *ISA_FLAGS["avx512"], f"-I{HERE}"]
    sanitizers = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    include = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{CPU}"]
    source = str(HERE / "check_tiles.cpp")
    subprocess.run([compiler, *flags, *sanitizers, *include, source, "-o", str(target)], check=True)
    passes(str(target))


@pytest.mark.slow
def test_neon_under_emulation(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: g++-aarch64-linux-gnu qemu-user)")
    passes(emulator, str(build(compiler, tmp_path / "check", "-O2", "-static")), "8")


@pytest.mark.parametrize("isa", ISA_FLAGS if X86 else ["base"])
@pytest.mark.parametrize(("part", "table"), [("kernels", "kernels"), ("jvp", "jvp_kernels")])
def test_no_symbol_leaks_from_an_instruction_set(compiler, tmp_path, part, table, isa):
    """A weak symbol of the AVX-512 object could become the program's own copy, and crash it on an older processor."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    target = tmp_path / "kernels.o"
    # Without optimisation nothing is inlined away: every function that could leak does.
    flags = ["-O0", "-fno-exceptions", "-fvisibility=hidden", *ISA_FLAGS[isa], f"-I{ROOT / 'csrc' / 'include'}"]
    flags += [flag for flag in FLAGS if flag != "-DBR_BASE_ONLY"]  # which would leave the tiles out
    subprocess.run([compiler, *flags, "-c", str(CPU / f"{part}_{isa}.cpp"), "-o", str(target)], check=True)
    listed = subprocess.run(["nm", "-C", "--defined-only", str(target)], capture_output=True, text=True, check=True)
    leaked = [line for line in listed.stdout.splitlines() if line.split()[1] not in "trdb"]
    space = f"balanced_rep::{isa if X86 else 'neon'}::"
    names = {line.split(maxsplit=2)[2].removeprefix(space) for line in leaked}
    assert names - ({f"amx_{table}"} if isa == "avx512" else set()) == {table}
