"""Reads registers, spills, shared memory and the instruction mix out of compiled kernels."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from ..cases import ARCHITECTURES, HIP_TARGET, CudaKernel, TritonKernel
from ..toolchain import BUILD, triton_tool
from ..triton_aot import TritonModule, compile_triton
from .occupancy import LIMITS, occupancy

__all__ = ["Facts", "measure_cuda", "measure_triton"]

Facts = dict[str, int]
Table = dict[str, dict[str, Facts]]  # kernel to target to facts

_USAGE = re.compile(r"Function (?P<name>\S+):\s+REG:(?P<reg>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)")
_FUNCTION = re.compile(r"^\.text\.(?P<name>\S+):", re.MULTILINE)
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z][A-Z0-9_.]*)", re.MULTILINE)
_MATRIX = ("HMMA", "DMMA", "IMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "WARPGROUP.MMA")


def _disassemble(cubin: bytes) -> tuple[str, dict[str, Counter]]:
    """Return what ``cuobjdump`` says about resources, and the instructions of each function by name.

    The tools take a second for a large object, so what they say is kept in ``build/gpusim/sass``.
    """
    kept = BUILD / "sass" / f"{hashlib.sha256(cubin).hexdigest()[:24]}.json"
    if not kept.exists():
        outputs = []
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")):
                done = subprocess.run([triton_tool(tool), option, file.name], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{tool}: {done.stderr.strip()}")
                outputs.append(done.stdout)
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        unfinished.write_text(json.dumps([outputs[0], _instructions(outputs[1])]))
        unfinished.replace(kept)
    usage, mixes = json.loads(kept.read_text())
    return usage, {name: Counter(mix) for name, mix in mixes.items()}


def _instructions(sass: str) -> dict[str, Counter]:
    pieces = _FUNCTION.split(sass)
    return {name: Counter(_SASS.findall(code)) for name, code in zip(pieces[1::2], pieces[2::2], strict=True)}


def _static_shared(arch: int, counted: int) -> int:
    """Return the kernel's own part of what ``cuobjdump`` calls SHARED.

    From sm_90 on that includes what the system reserves in every block, which occupancy adds itself; but only in
    kernels that use shared memory at all.
    """
    reserved = LIMITS[arch].reserved if arch >= 90 and counted else 0
    if counted < reserved:
        raise RuntimeError(f"sm_{arch}: {counted} bytes of shared memory counted, of which {reserved} are reserved")
    return counted - reserved


def cubin_facts(cubin: bytes, arch: int, launches: dict[str, tuple[int, int]]) -> dict[str, Facts]:
    """Return the facts of some kernels of a cubin.

    Args:
        cubin: The object.
        arch: 80 for sm_80 and so on.
        launches: Symbol to threads per block and dynamic shared memory.

    Returns:
        Facts by symbol. ``spills`` counts instructions on local memory: spilled registers and arrays that the compiler
        could not keep in registers.
    """
    usage, mixes = _disassemble(cubin)
    facts = {}
    for match in _USAGE.finditer(usage):
        if match["name"] not in launches:
            continue
        threads, dynamic = launches[match["name"]]
        mix = mixes[match["name"]]

        def count(*prefixes: str, contains: str = "", mix: Counter = mix) -> int:
            return sum(n for op, n in mix.items() if op.startswith(prefixes) and contains in op)

        shared = _static_shared(arch, int(match["shared"])) + dynamic
        facts[match["name"]] = {
            "registers": int(match["reg"]),
            "stack": int(match["stack"]),
            "spills": count("LDL", "STL"),
            "shared": shared,
            "occupancy": occupancy(arch, int(match["reg"]), shared, threads).percent,
            "loads": count("LDG", "LDGSTS"),
            "loads_128": count("LDG", "LDGSTS", contains=".128"),
            "stores": count("STG"),
            "stores_128": count("STG", contains=".128"),
            "matrix": count(*_MATRIX),
        }
    return facts


def measure_cuda(kernels: list[CudaKernel], archs: tuple[int, ...] = ARCHITECTURES) -> Table:
    """Compile and measure CUDA kernels, one compilation per file and architecture."""
    table: Table = {kernel.name: {} for kernel in kernels}
    files: dict[tuple, list[CudaKernel]] = {}
    for kernel in kernels:
        files.setdefault((kernel.source, kernel.defines), []).append(kernel)

    def one(job: tuple[list[CudaKernel], int]) -> Iterator[tuple[str, str, Facts]]:
        group, arch = [kernel for kernel in job[0] if job[1] not in kernel.refused], job[1]
        module = group[0].compile(f"sm_{arch}")
        symbols = {kernel.name: module.names[kernel.expression] for kernel in group}
        launches = {symbols[kernel.name]: (kernel.threads, kernel.shared_bytes) for kernel in group}
        facts = cubin_facts(module.code, arch, launches)
        return iter([(kernel.name, f"sm_{arch}", facts[symbols[kernel.name]]) for kernel in group])

    with ThreadPoolExecutor(2) as pool:  # NVRTC and the tools run outside the interpreter lock
        for rows in pool.map(one, [(group, arch) for group in files.values() for arch in archs]):
            for name, target, facts in rows:
                table[name][target] = facts
    return table


def measure_triton(kernels: list[TritonKernel], targets: tuple[int | str, ...] = (*ARCHITECTURES, HIP_TARGET)) -> Table:
    """Compile and measure Triton kernels, each with and without sizes divisible by 16."""
    jobs = [
        (f"{kernel.name}{' n%16' if divisible else ''}", kernel.request(target, divisible=divisible), target)
        for kernel in kernels
        for divisible in ((False, True) if kernel.sizes else (False,))
        for target in targets
        if target not in kernel.refused
    ]
    table: Table = {name: {} for name, _, _ in jobs}

    def one(job: tuple[int | str, TritonModule]) -> tuple[str, Facts]:
        target, module = job
        if isinstance(target, str):
            return target, _amd_facts(module.asm("amdgcn").decode(), module.shared_bytes)
        launches = {module.symbol: (32 * module.num_warps, module.shared_bytes)}
        return f"sm_{target}", cubin_facts(module.asm("cubin"), target, launches)[module.symbol]

    modules = compile_triton([request for _, request, _ in jobs])
    with ThreadPoolExecutor(2) as pool:
        measured = pool.map(one, zip((target for _, _, target in jobs), modules, strict=True))
        for (name, _, _), (target, facts) in zip(jobs, measured, strict=True):
            table[name][target] = facts
    return table


def _amd_facts(assembly: str, shared_bytes: int) -> Facts:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "shared": shared_bytes,
        "loads": len(re.findall(r"\b(?:global|buffer)_load", assembly)),
        "loads_128": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly)),
        "stores": len(re.findall(r"\b(?:global|buffer)_store", assembly)),
        "stores_128": len(re.findall(r"\b(?:global|buffer)_store_dwordx4", assembly)),
        "matrix": len(re.findall(r"\bv_mfma", assembly)),
    }
