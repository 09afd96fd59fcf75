"""Reads registers, spills, shared memory and the instruction mix out of compiled kernels."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from ..cases import ARCHITECTURES, HIP_TARGET, CudaKernel, TritonKernel
from ..toolchain import CudaModule
from ..triton_aot import compile_triton
from .occupancy import LIMITS, occupancy
from .sass import disassemble

__all__ = ["Facts", "measure_cuda", "measure_triton"]

Facts = dict[str, int]
Table = dict[str, dict[str, Facts]]  # kernel to target to facts

_USAGE = re.compile(r"Function (?P<name>\S+):\s+REG:(?P<reg>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)")
_MATRIX = ("HMMA", "DMMA", "IMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "WARPGROUP.MMA")


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
    (sass,) = disassemble([(arch, cubin)])
    facts = {}
    for match in _USAGE.finditer(sass.usage):
        if match["name"] not in launches:
            continue
        threads, dynamic = launches[match["name"]]
        mix = sass.mixes[match["name"]]

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

    def compiled(job: tuple[list[CudaKernel], int]) -> CudaModule:
        return job[0][0].compile(f"sm_{job[1]}")

    jobs = [([k for k in group if arch not in k.refused], arch) for group in files.values() for arch in archs]
    with ThreadPoolExecutor(2) as pool:  # NVRTC runs outside the interpreter lock
        modules = list(pool.map(compiled, jobs))
    disassemble([(arch, module.code) for (_, arch), module in zip(jobs, modules, strict=True)])
    for (group, arch), module in zip(jobs, modules, strict=True):
        symbols = {kernel.name: module.names[kernel.expression] for kernel in group}
        launches = {symbols[kernel.name]: (kernel.threads, kernel.shared_bytes) for kernel in group}
        facts = cubin_facts(module.code, arch, launches)
        for kernel in group:
            table[kernel.name][f"sm_{arch}"] = facts[symbols[kernel.name]]
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

    modules = compile_triton([request for _, request, _ in jobs])
    nvidia = [(target, module) for (*_, target), module in zip(jobs, modules, strict=True) if isinstance(target, int)]
    disassemble([(arch, module.asm("cubin")) for arch, module in nvidia])
    for (name, _, target), module in zip(jobs, modules, strict=True):
        if isinstance(target, str):
            table[name][target] = _amd_facts(module.asm("amdgcn").decode(), module.shared_bytes)
            continue
        launches = {module.symbol: (32 * module.num_warps, module.shared_bytes)}
        table[name][f"sm_{target}"] = cubin_facts(module.asm("cubin"), target, launches)[module.symbol]
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
