"""Entries of the sample kernels: the tools' own tests, and examples of how to write one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..cases import Case, CudaKernel, TritonKernel
from ..launch import Buffer, Launch, bf16_to_f32, empty, f32_to_bf16, rows_with_pitch

__all__ = ["CUDA_SAMPLES", "TRITON_SAMPLES"]

SOURCE = Path(__file__).parent / "samples.cu"
MODULE = "tests.gpusim.samples.triton_samples"


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape, dtype=np.float32)


def _silu(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / (1 + np.exp(-x))


def _silu_case(n: int, n_blocks: int, threads: int, size: type) -> Case:
    x = _normal(n)
    launch = Launch((n_blocks,), (threads,), [Buffer(x), empty(n, np.float32), size(n)])
    return Case(
        launch,
        {1: _silu(x)},
        rtol=1e-6,
        atol=1e-7,
        divisible=n % 16 == 0,
        memory_bound=n % 16 == 0,
        aligned=True,
        minimum_bytes=8 * n,
        racecheck=n < 1000,
    )


def _row_norm_case(n_rows: int, n_cols: int, pitch: int, threads: int) -> Case:
    x = _normal(n_rows, n_cols) + 1
    wide = x.astype(np.float64)
    want = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    args = [
        Buffer(rows_with_pitch(x, pitch)),
        empty(x.shape, np.float32),
        np.int32(n_cols),
        np.int64(pitch),
        np.float32(1e-5),
    ]
    return Case(
        Launch((n_rows,), (threads,), args),
        {1: want},
        rtol=1e-5,
        atol=1e-6,
        divisible=pitch % 16 == 0 and n_cols % 16 == 0,
        racecheck=n_rows * threads <= 128,
    )


def _ticket_case(n: int, n_blocks: int, threads: int, size: type, ticket: type) -> Case:
    x = _normal(n)
    args = [Buffer(x), empty(n_blocks, np.float32), Buffer(np.zeros(1, ticket)), empty(1, np.float32), size(n)]
    want = {2: np.zeros(1, ticket), 3: x.sum(dtype=np.float64, keepdims=True)}
    return Case(Launch((n_blocks,), (threads,), args), want, rtol=1e-5, divisible=False, racecheck=n_blocks <= 3)


def _histogram_case() -> Case:
    index = np.random.default_rng(7).integers(0, 50, 2000, dtype=np.int32)
    args = [Buffer(index), Buffer(np.zeros(50, np.int32)), np.int32(2000), np.int32(50)]
    return Case(Launch((3,), (64,), args, shared_bytes=200), {1: np.bincount(index, minlength=50)}, racecheck=True)


def _scale_half_case() -> Case:
    x = _normal(4096).astype(np.float16)
    args = [Buffer(x), empty(4096, np.float16), np.float32(3), np.int64(4096)]
    want = (3 * x.astype(np.float32)).astype(np.float16).astype(np.float64)
    return Case(Launch((9,), (64,), args), {1: want}, rtol=0, memory_bound=True, aligned=True, minimum_bytes=4 * 4096)


def _reverse_case() -> Case:
    x = _normal(4, 128)
    return Case(
        Launch((4,), (32,), [Buffer(x), empty(x.shape, np.float32)]), {1: x[:, ::-1].astype(np.float64)}, rtol=0
    )


CUDA_SAMPLES = [
    CudaKernel(
        name="sample silu",
        source=SOURCE,
        expression="silu",
        threads=256,
        cases={
            "1": lambda: _silu_case(1, 1, 32, np.int64),
            "777": lambda: _silu_case(777, 2, 64, np.int64),
            "2^15": lambda: _silu_case(1 << 15, 32, 256, np.int64),
        },
    ),
    CudaKernel(
        name="sample row_norm",
        source=SOURCE,
        expression="row_norm",
        threads=256,
        cases={
            "8x777 pitch 800": lambda: _row_norm_case(8, 777, 800, 256),
            "3x31 idle warp": lambda: _row_norm_case(3, 31, 31, 64),
            "2x130 two warps": lambda: _row_norm_case(2, 130, 131, 64),
        },
    ),
    CudaKernel(
        name="sample ticket_sum",
        source=SOURCE,
        expression="ticket_sum",
        threads=128,
        cases={
            "6216, 50 blocks": lambda: _ticket_case(6216, 50, 128, np.int64, np.uint32),
            "100, 3 blocks": lambda: _ticket_case(100, 3, 32, np.int64, np.uint32),
        },
    ),
    CudaKernel("sample histogram", SOURCE, "histogram", 64, {"2000 in 50 bins": _histogram_case}, shared_bytes=200),
    CudaKernel("sample scale_half", SOURCE, "scale_half", 64, {"4096": _scale_half_case}),
    CudaKernel(
        name="sample reverse_async",
        source=SOURCE,
        expression="reverse_async",
        threads=32,
        cases={"4x128": _reverse_case},
        refused={75: "cp.async needs sm_80"},
        host=False,
    ),
]

_ENCODE = {
    "fp32": lambda x: (x, x.astype(np.float64)),
    "fp16": lambda x: (x.astype(np.float16), x.astype(np.float16).astype(np.float64)),
    "bf16": lambda x: (f32_to_bf16(x), bf16_to_f32(f32_to_bf16(x)).astype(np.float64)),
}


def _triton_silu_case(n: int, kind: str) -> Case:
    x, wide = _ENCODE[kind](_normal(n))
    args = [Buffer(x, bf16=kind == "bf16"), empty(n, np.float32), np.int32(n)]
    return Case(
        Launch((-(-n // 1024),), (1,), args),
        {1: _silu(wide)},
        rtol=1e-6,
        atol=1e-7,
        divisible=n % 16 == 0,
        memory_bound=n % 16 == 0,
        aligned=True,
        minimum_bytes=n * (x.itemsize + 4),
    )


def _matmul_case(m: int, n: int, k: int, kind: str) -> Case:
    a, wide_a = _ENCODE[kind](_normal(m, k))
    b, wide_b = _ENCODE[kind](_normal(k, n)[::-1].copy())
    bf16 = kind == "bf16"
    args = [Buffer(a, bf16=bf16), Buffer(b, bf16=bf16), empty((m, n), np.float32)]
    args += [np.int32(size) for size in (m, n, k, k, n, n)]
    return Case(
        Launch((-(-m // 32), -(-n // 32)), (1,), args),
        {2: wide_a @ wide_b},
        rtol=0,
        atol=1e-3 if kind == "fp32" else 1e-6,  # float32 operands are multiplied as TF32
        divisible=all(size % 16 == 0 for size in (m, n, k)),
    )


def _matmul(kind: str) -> TritonKernel:
    return TritonKernel(
        name=f"sample matmul[{kind}]",
        module=MODULE,
        function="matmul",
        signature={
            **{"a_ptr": f"*{kind}", "b_ptr": f"*{kind}", "c_ptr": "*fp32"},
            **dict.fromkeys(("m", "n", "k", "stride_a", "stride_b", "stride_c"), "i32"),
        },
        constants={"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32},
        cases={
            "50x40x70": lambda: _matmul_case(50, 40, 70, kind),
            "64x48x96": lambda: _matmul_case(64, 48, 96, kind),
        },
        aligned_pointers=("a_ptr", "b_ptr", "c_ptr"),
        sizes=("m", "n", "k", "stride_a", "stride_b", "stride_c"),
    )


def _triton_silu(kind: str) -> TritonKernel:
    return TritonKernel(
        name=f"sample silu[{kind}]",
        module=MODULE,
        function="silu",
        signature={"x_ptr": f"*{kind}", "y_ptr": "*fp32", "n": "i32"},
        constants={"BLOCK": 1024},
        cases={name: lambda n=n: _triton_silu_case(n, kind) for name, n in (("1", 1), ("4096", 4096), ("5001", 5001))},
        aligned_pointers=("x_ptr", "y_ptr"),
        sizes=("n",),
    )


TRITON_SAMPLES = [
    *(_triton_silu(kind) for kind in _ENCODE),
    TritonKernel(
        name="sample row_norm[fp32]",
        module=MODULE,
        function="row_norm",
        signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "n_cols": "i32", "stride_row": "i64", "eps": "fp32"},
        constants={"BLOCK": 1024},
        cases={
            "8x777 pitch 800": lambda: _row_norm_case(8, 777, 800, 1),
            "3x1000": lambda: _row_norm_case(3, 1000, 1000, 1),
        },
        aligned_pointers=("x_ptr", "y_ptr"),
        sizes=("n_cols", "stride_row"),
    ),
    TritonKernel(
        name="sample ticket_sum[fp32]",
        module=MODULE,
        function="ticket_sum",
        signature={
            **{"x_ptr": "*fp32", "partial_ptr": "*fp32", "ticket_ptr": "*i32", "out_ptr": "*fp32", "n": "i32"},
        },
        constants={"BLOCK": 128, "MAX_PROGRAMS": 64},
        cases={"6216, 49 programs": lambda: _ticket_case(6216, 49, 1, np.int32, np.int32)},
        aligned_pointers=("x_ptr", "partial_ptr", "ticket_ptr", "out_ptr"),
        sizes=("n",),
    ),
    *(_matmul(kind) for kind in _ENCODE),
]
