"""Lists the compiled parts: everything declarative lives in pyproject.toml.

The CPU kernels are one source, compiled once for each instruction set into its own static library; the extension links
them all and picks one when it is imported. Nothing here needs torch, a GPU or the network.
"""

import platform
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib

X86 = platform.machine() in {"x86_64", "AMD64"}
ISAS = {"base": []}  # x86-64 baseline, or NEON on aarch64
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
        "-Wno-maybe-uninitialized",  # false alarms in avx512fintrin.h of GCC 12
    ]

# -g0: Python's own flags ask for debug information, which would be three quarters of the file.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]  # psabi: no vector crosses a translation unit
HEADERS = sorted([*glob("csrc/include/balanced_rep/*.h"), *glob("csrc/cpu/*.inl"), *glob("csrc/cpu/*.h")])


def kernel_library(part: str, isa: str) -> tuple[str, dict]:
    source = f"csrc/cpu/{part}_{isa}.cpp"
    return f"balanced_rep_{part}_{isa}", {
        "sources": [source],
        "obj_deps": {source: HEADERS},  # a changed .inl rebuilds
        "include_dirs": ["csrc/include"],
        # No exceptions: their tables would be the only weak symbols of these objects.
        "cflags": [*FLAGS, *WARNINGS, "-fno-exceptions", *ISAS[isa]],
    }


# Every backend gives the same bits only where no multiply and add are fused.
UNFUSED = [*(f for f in FLAGS if not f.startswith("-ffp-contract")), "-ffp-contract=off"]
PHILOX = (
    "balanced_rep_philox",
    {
        "sources": ["csrc/cpu/philox.cpp"],
        "obj_deps": {"csrc/cpu/philox.cpp": HEADERS},
        "include_dirs": ["csrc/include"],
        "cflags": [*UNFUSED, *WARNINGS, "-fopenmp"],
    },
)


class BuildClib(build_clib):
    """Compiles the libraries side by side: each is one source that takes a quarter of a minute."""

    def build_libraries(self, libraries):
        """Runs one compiler for each library at a time."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda library: super(BuildClib, self).build_libraries([library]), libraries))


PARTS = ("kernels", "jvp")  # statistics, and functions with tangents
NAMES = ("isa", "jvp", "krylov_product", "krylov_space", "moments", "orthonormalise", "reduction", "sketches")
SOURCES = [
    "csrc/bindings.cpp",
    "csrc/bindings_jvp.cpp",
    *(f"csrc/cpu/{name}.cpp" for name in NAMES),
]

setup(
    cmdclass={"build_clib": BuildClib},
    libraries=[*(kernel_library(part, isa) for part in PARTS for isa in ISAS), PHILOX],
    ext_modules=[
        Extension(
            "balanced_rep._C",
            SOURCES,
            # Relinks when a library is rebuilt.
            depends=[*HEADERS, *(f"csrc/cpu/{p}_{isa}.cpp" for p in PARTS for isa in ISAS), "csrc/cpu/philox.cpp"],
            include_dirs=["csrc/include", pybind11.get_include()],
            extra_compile_args=[*FLAGS, *WARNINGS, "-fopenmp"],
            extra_link_args=["-fopenmp"],
            language="c++",
        )
    ],
)
