"""What a kernel entry says: source, compilation, launches with their reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .launch import Launch
from .toolchain import CudaModule, compile_cuda
from .triton_aot import TritonRequest

__all__ = ["ARCHITECTURES", "Case", "CudaKernel", "TritonKernel"]

ARCHITECTURES = (75, 80, 86, 90, 100, 120)
HIP_TARGET = "gfx942"


@dataclass
class Case:
    """One launch and what it must leave behind.

    Attributes:
        launch: Grid, block, arguments.
        expected: Buffer position (among the buffers, in argument order) to the float64 or integer reference. NaN in
            the reference means that the result must be NaN there.
        rtol: Relative tolerance.
        atol: Absolute tolerance, as a fraction of the largest finite expected magnitude.
        divisible: Whether every integer argument that Triton may specialise on is divisible by 16; picks the
            specialisation that the JIT would.
        constants: ``tl.constexpr`` values of this launch, over those of the kernel.
        memory_bound: Whether the sector and DRAM limits apply.
        aligned: Whether every row starts on a 128-byte boundary.
        minimum_bytes: Bytes that any fused kernel moves: inputs once, outputs once.
        racecheck: Whether this launch is one for ThreadSanitizer, which takes few threads.
    """

    launch: Launch
    expected: Mapping[int, np.ndarray]
    rtol: float = 1e-5
    atol: float = 0.0
    divisible: bool = True
    constants: Mapping[str, int | float | bool] = field(default_factory=dict)
    memory_bound: bool = False
    aligned: bool = False
    minimum_bytes: int | None = None
    racecheck: bool = False

    def check(self, buffers: list[np.ndarray]) -> None:
        """Compare buffers after the launch with the reference."""
        for position, want in self.expected.items():
            got = self.launch.buffers[position].values(buffers[position])
            want = np.asarray(want)
            if want.dtype.kind in "iub":
                np.testing.assert_array_equal(got, want, err_msg=f"buffer {position}")
                continue
            finite = np.abs(want[np.isfinite(want)])
            scale = float(finite.max()) if finite.size else 0.0
            np.testing.assert_allclose(
                got.astype(np.float64), want, rtol=self.rtol, atol=self.atol * scale, err_msg=f"buffer {position}"
            )


@dataclass(frozen=True)
class CudaKernel:
    """A kernel of a ``.cu`` file.

    Attributes:
        name: Unique, readable: ``moments[float32]``.
        source: The file.
        expression: The kernel as C++: ``balanced_rep::moments<float, 1>``.
        threads: Threads per block, for occupancy.
        cases: Case name to builder.
        shared_bytes: Dynamic shared memory per block that occupancy is computed with.
        defines: Preprocessor definitions.
        include_dirs: Folders for quoted includes.
        refused: Architecture to the reason why ``supports`` refuses it there; it may then spill or not compile.
        host: Whether the source compiles as host C++ (false for kernels with inline PTX).
    """

    name: str
    source: Path
    expression: str
    threads: int
    cases: Mapping[str, Callable[[], Case]]
    shared_bytes: int = 0
    defines: tuple[str, ...] = ()
    include_dirs: tuple[Path, ...] = ()
    refused: Mapping[int, str] = field(default_factory=dict)
    host: bool = True

    def compile(self, arch: str) -> CudaModule:
        """Compile this kernel together with the others of its file that are in the list and not refused there."""
        from .kernels import CUDA_KERNELS

        number = int(arch.split("_")[1])
        siblings = sorted(
            {
                kernel.expression
                for kernel in CUDA_KERNELS
                if (kernel.source, kernel.defines) == (self.source, self.defines) and number not in kernel.refused
            }
        )
        return compile_cuda(self.source, siblings, arch, defines=self.defines, include_dirs=self.include_dirs)


@dataclass(frozen=True)
class TritonKernel:
    """A ``@triton.jit`` function with one set of types.

    Attributes:
        name: Unique, readable: ``moments_tiles[bfloat16]``.
        module: Dotted name of its module.
        function: Its name there.
        signature: Parameter to Triton type, without the constants.
        constants: ``tl.constexpr`` values.
        cases: Case name to builder.
        aligned_pointers: Pointers that torch allocations make divisible by 16.
        sizes: Integer parameters that Triton's JIT specialises on, when a value is divisible by 16.
        num_warps: Warps per program.
        num_stages: Depth of software pipelines.
        fp_fusion: Whether a multiplication and an addition may be contracted to one rounding.
        refused: Target to the reason why ``supports`` refuses it there.
    """

    name: str
    module: str
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, int | float | bool]
    cases: Mapping[str, Callable[[], Case]]
    aligned_pointers: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True
    refused: Mapping[int | str, str] = field(default_factory=dict)

    def request(self, target: int | str = 80, *, divisible: bool, constants: Mapping | None = None) -> TritonRequest:
        return TritonRequest(
            module=self.module,
            function=self.function,
            signature=dict(self.signature),
            constants={**self.constants, **(constants or {})},
            divisible=(*self.aligned_pointers, *(self.sizes if divisible else ())),
            target=target,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            fp_fusion=self.fp_fusion,
        )
