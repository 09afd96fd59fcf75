"""Builds and runs the host program of a ``.cu`` file."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..launch import Buffer, Launch
from .transform import write_tree

INCLUDE = Path(__file__).parent / "include"
BUILD = Path(__file__).parents[3] / "build" / "gpusim" / "simt"
COMMON_FLAGS = ["-std=c++20", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]
MODES = {
    "sanitize": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "threads": ["-O1", "-fsanitize=thread", "-DSIMT_THREADS", "-pthread"],
}


class SimtError(AssertionError):
    """A host run failed: a sanitizer report, a divergent barrier, a deadlock, or a wrong call."""


@dataclass(frozen=True)
class Program:
    """A compiled host program and the kernels it can run."""

    path: Path
    mode: str

    def run(self, kernel: str, launch: Launch, *, seed: int = 0, timeout: float = 120) -> list[np.ndarray]:
        """Run one kernel.

        Args:
            kernel: Name given to :func:`compile_program`.
            launch: Grid, block and arguments.
            seed: 0 runs threads in order; any other number shuffles blocks, warps and threads.
            timeout: Seconds after which the run counts as a deadlock.

        Returns:
            The contents of every buffer after the launch, in argument order.

        Raises:
            SimtError: If a sanitizer or the runtime reports something; the text is its report.
        """
        with tempfile.TemporaryDirectory() as folder:
            call, result = Path(folder, "launch"), Path(folder, "result")
            call.write_bytes(_pack(launch))
            command = [*_fixed_addresses(), str(self.path), kernel, str(seed), str(call), str(result)]
            try:
                done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=timeout)
            except subprocess.TimeoutExpired as error:
                raise SimtError(f"{kernel}, seed {seed}: no end after {timeout} s (deadlock?)") from error
            if done.returncode:
                raise SimtError(f"{kernel}, seed {seed}, exit status {done.returncode}:\n{done.stderr.strip()[:4000]}")
            return _unpack(result.read_bytes(), launch)


@functools.cache
def _fixed_addresses() -> tuple[str, ...]:
    """What to put before a command so that its addresses are not random, which sanitizers of older compilers do not
    survive; nothing where a container forbids it.
    """
    command = ("setarch", platform.machine(), "-R")
    if shutil.which("setarch") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        return ()
    return command


@functools.cache
def host_missing(mode: str = "sanitize") -> str | None:
    """Answer None if the compiler's sanitizers of a mode work here, else the reason as text.

    The program tried is none of ours: what is wrong with these is an error, not a reason to skip.
    """
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
        compile_ = [compiler, *COMMON_FLAGS, *MODES[mode], "-pthread", str(source), "-o", str(program)]
        for command in (compile_, [*_fixed_addresses(), str(program)]):
            try:
                done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=60)
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"{compiler} with the sanitizers of mode {mode!r}: {error}"
            if done.returncode:
                return f"{compiler} with the sanitizers of mode {mode!r}: {done.stderr.strip()[:400]}"
    return None


def _environment() -> dict[str, str]:
    """The environment of host programs; a library loaded before AddressSanitizer's runtime makes it refuse to start."""
    return {
        **{name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=0",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
    }


def _pack(launch: Launch) -> bytes:
    def three(sizes: Sequence[int]) -> list[int]:
        return [*sizes, 1, 1][:3]

    header = [*three(launch.grid), *three(launch.block), launch.shared_bytes, len(launch.args)]
    parts = [struct.pack("<8I", *header)]
    packed: dict[int, int] = {}  # allocations already in the file: buffer position to argument position
    for index, argument in enumerate(launch.args):
        if isinstance(argument, Buffer) and launch.position(argument) in packed:
            first = packed[launch.position(argument)]
            parts.append(struct.pack("<IIQ", 2, argument.offset_bytes, first))
            continue
        if isinstance(argument, Buffer):
            packed[launch.position(argument)] = index
            data = np.ascontiguousarray(argument.array).tobytes()
            parts.append(struct.pack("<IIQ", 1, argument.offset_bytes, len(data)))
        else:
            data = argument.tobytes()
            parts.append(struct.pack("<IIQ", 0, 0, len(data)))
        parts.append(data)
    return b"".join(parts)


def _unpack(data: bytes, launch: Launch) -> list[np.ndarray]:
    arrays, start = [], 0
    for buffer in launch.buffers:
        size = buffer.array.nbytes
        arrays.append(np.frombuffer(data[start : start + size], buffer.array.dtype).reshape(buffer.array.shape).copy())
        start += size
    return arrays


def compile_program(
    source: Path,
    kernels: Sequence[str],
    *,
    mode: str = "sanitize",
    defines: Sequence[str] = (),
    include_dirs: Sequence[Path] = (),
) -> Program:
    """Compile a ``.cu`` file as host C++; an unchanged one is taken from ``build/gpusim/simt``.

    Args:
        source: The ``.cu`` file; quoted includes are followed.
        kernels: Kernels to make callable, as C++ expressions: ``"moments"`` or ``"moments<float, 4>"``.
        mode: ``"sanitize"`` (fibers, AddressSanitizer and UBSan) or ``"threads"`` (std::threads, ThreadSanitizer).
        defines: Preprocessor definitions, ``"NAME=1"``.
        include_dirs: More folders for quoted includes.

    Returns:
        The program.

    Raises:
        SimtError: If the compiler refuses the source; the text is its first errors.
    """
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        copy = write_tree(source.resolve(), [Path(path).resolve() for path in include_dirs], Path(folder))
        table = ",\n".join(f'    simt::entry("{name}", &{name})' for name in kernels)
        main = Path(folder, "simt_main.cpp")
        main.write_text(
            f'#include "simt/device.h"\n#include "simt/driver.h"\n#include "{copy.name}"\n'
            f"int main(int count, char** values) {{\n  return simt::drive(count, values, {{\n{table}}});\n}}\n"
        )
        flags = [*COMMON_FLAGS, *MODES[mode], *(f"-D{define}" for define in defines)]
        program = BUILD / f"{source.stem}-{mode}-{_digest(Path(folder), [compiler, *flags])}"
        if not program.exists():
            program.parent.mkdir(parents=True, exist_ok=True)
            unfinished = program.with_suffix(f".{os.getpid()}")
            command = [compiler, *flags, f"-I{INCLUDE}", f"-I{folder}", str(main), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SimtError(f"{compiler} cannot compile {source.name} as host C++:\n{done.stderr[:4000]}")
            unfinished.replace(program)
    return Program(program, mode)


def _digest(folder: Path, command: list[str]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sorted([*folder.rglob("*"), *INCLUDE.rglob("*")]):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
