"""The package's GPU ops: which launchers they have and on what they are tried.

The launchers run for real, against :mod:`.simulated`; what they launch is recorded, and the compile gate takes its list
of kernels from there. A new op is one entry of :data:`OPS`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from balanced_rep.ops._registry import REGISTRY
from balanced_rep.testing import assert_moments_close

from . import jvp_calls
from .cases import HIP_TARGET, CudaKernel, TritonKernel
from .simulated import CSRC, CudaLaunch, SimulatedCuda, TritonLaunch, simulated_triton
from .toolchain import triton_missing

__all__ = ["OPS", "PackageOp", "check", "recorded_cuda", "recorded_triton", "run_cuda", "run_triton", "tensors_of"]


@dataclass(frozen=True)
class PackageOp:
    """One op.

    Attributes:
        name: Its name in the registry.
        calls: Call name to a builder of the op's arguments, on the CPU.
        large: More calls, run once in the executor for what they tell about memory traffic.
        cuda: ``"module:function"`` of the CUDA launcher, or None.
        cuda_outputs: Positions of kernel arguments that the kernel must write before it reads them.
        cuda_zeroed: Positions of those that are zero before a launch and must be zero after it: tickets.
        triton: ``"module:function"`` of the Triton launcher, or None.
        triton_outputs: Kernel name to the pointer parameters that it must write before it reads them.
        gated: Calls whose Triton kernels go through the compile gate: each compiles 14 times, a second or two each.
        refused: Target of the gate to the reason why ``supports`` refuses the op there.
        long: Calls that are left out on the host, where every thread runs five times, and slowly.
        racecheck: Calls for ThreadSanitizer, which takes few threads.
        streaming: Calls whose traffic is held to the limits of a memory-bound kernel, on aligned rows.
        unaligned: The same, on rows that begin anywhere.
        caches: Bytes of the L2 model for calls that stand for a part of one that fills a device.
    """

    name: str
    calls: Mapping[str, Callable[[], tuple[Any, ...]]]
    large: Mapping[str, Callable[[], tuple[Any, ...]]] = field(default_factory=dict)
    cuda: str | None = None
    cuda_outputs: frozenset[int] = frozenset()
    cuda_zeroed: frozenset[int] = frozenset()
    triton: str | None = None
    triton_outputs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    gated: tuple[str, ...] = ()
    refused: Mapping[int | str, str] = field(default_factory=dict)
    long: tuple[str, ...] = ()
    racecheck: tuple[str, ...] = ()
    streaming: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    caches: Mapping[str, int] = field(default_factory=dict)

    def arguments(self, call: str) -> tuple[Any, ...]:
        return (self.calls.get(call) or self.large[call])()


def _normal(dtype: torch.dtype, *shape: int, skip: int = 0) -> Tensor:
    """Return normal values around 0.5; ``skip`` elements before them make every row unaligned."""
    generator = torch.Generator().manual_seed(11)
    n = skip + int(torch.Size(shape).numel())
    return (torch.randn(n, generator=generator) + 0.5).to(dtype)[skip:].reshape(shape)


def _non_finite() -> Tensor:
    x = _normal(torch.float32, 4, 700)
    x[0, 3], x[1, 5], x[2, 699], x[3] = torch.nan, torch.inf, -torch.inf, 2.0
    return x


def _moments_calls() -> dict[str, Callable[[], tuple[Any, ...]]]:
    f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
    calls: dict[str, Callable[[], tuple[Any, ...]]] = {
        "non-finite": lambda: (_non_finite(), 1, 0, 0, 0.0),
        "one element": lambda: (_normal(f32, 1, 1), 1, 0, 0, 0.0),
        "kept last, f32": lambda: (_normal(f32, 60, 300).T, 1, 0, 0, 0.1),
        "max pool, f32": lambda: (_normal(f32, 2, 5, 4, 6), 1, 2, 1, 0.1),
        "segments, f32": lambda: (_normal(f32, 2, 40000), 1, 0, 0, 0.1),
        "unaligned, f32": lambda: (_normal(f32, 3, 4099, skip=1), 1, 0, 0, 0.1),
        "unaligned, bf16": lambda: (_normal(bf16, 3, 4099, skip=1), 1, 0, 0, 0.1),
        "mean pool, bf16": lambda: (_normal(bf16, 2, 5, 4, 4), 1, 2, 2, 0.1),
        "kept last, bf16": lambda: (_normal(bf16, 60, 300).T, 1, 0, 0, 0.1),
        "columns, f64": lambda: (_normal(f64, 40, 100).T, 1, 0, 0, 0.1),
        "columns in segments, f32": lambda: (_normal(f32, 300, 70).T, 1, 0, 0, 0.1),
        "two tiles of a warp, f32": lambda: (_normal(f32, 3, 520), 1, 0, 0, 0.1),
        "two rounds, f32": lambda: (_normal(f32, 1, 256 * 1024 + 1), 1, 0, 0, 0.1),  # Triton merges 256 tiles a round
        "one row, odd end, f32": lambda: (_normal(f32, 1, 4098), 1, 0, 0, 0.1),
        "a tile less one, f32": lambda: (_normal(f32, 3, 1023), 1, 0, 0, 0.1),
        "small windows, f32": lambda: (_normal(f32, 2, 40, 2, 2), 1, 2, 1, 0.1),
        "mean of small windows, bf16": lambda: (_normal(bf16, 2, 40, 2, 2), 1, 2, 2, 0.1),
    }
    for dtype in (f32, f16, bf16, f64):
        name = str(dtype).removeprefix("torch.")
        calls[f"rows, {name}"] = lambda dtype=dtype: (_normal(dtype, 3, 4096), 1, 0, 0, 0.1)
        calls[f"short rows, {name}"] = lambda dtype=dtype: (_normal(dtype, 5, 131), 1, 0, 0, 0.1)
    return calls


def _large_moments() -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Calls that are bound by memory in layouts other than rows: a few million elements."""

    def columns(dtype: torch.dtype, n_kept: int, n_reduced: int) -> tuple[Any, ...]:
        return _normal(dtype, n_reduced, n_kept).T, 1, 0, 0, 0.1

    return {
        "2048 x 1024 columns, float32": lambda: columns(torch.float32, 2048, 1024),
        "3072 x 2048 columns, bfloat16": lambda: columns(torch.bfloat16, 3072, 2048),
        "1024 x 1024 columns, float64": lambda: columns(torch.float64, 1024, 1024),
        "2055 x 1024 odd columns, float32": lambda: columns(torch.float32, 2055, 1024),
        "2055 x 2048 odd columns, bfloat16": lambda: columns(torch.bfloat16, 2055, 2048),
        "1024 windows of 32 x 32, bfloat16": lambda: (_normal(torch.bfloat16, 2, 512, 32, 32), 1, 2, 1, 0.1),
        "pitched odd rows, float32": lambda: (_normal(torch.float32, 64, 16400)[:, :16390], 1, 0, 0, 0.1),
    }


def _gram(n: int, batch: int = 1, rank: int | None = None) -> Tensor:
    """Return Gram matrices, of a rank if one is given, of entries far from 1."""
    x = _normal(torch.float64, batch, n, n if rank is None else rank)
    return 1e-9 * x @ x.mT


def _eigh_calls() -> dict[str, Callable[[], tuple[Any, ...]]]:
    graded = torch.logspace(0, -16, 12, dtype=torch.float64)
    at_the_shift = torch.diag(torch.tensor([1, -1 / 64, 0.5, 0.5, 0, 0], dtype=torch.float64))
    return {
        "one number": lambda: (_gram(1, 2),),
        "two columns": lambda: (_gram(2, 3),),
        "odd order": lambda: (_gram(7, 2),),
        "zero, one, repeated": lambda: (torch.stack([torch.zeros(6, 6), torch.eye(6), torch.ones(6, 6)]).double(),),
        "lower triangle": lambda: (_gram(10).tril(),),
        "indefinite": lambda: (torch.stack([_gram(6)[0], -_gram(6)[0], at_the_shift]),),
        "rank 3": lambda: (_gram(14, 1, rank=3),),
        "graded": lambda: (graded.outer(graded).sqrt().unsqueeze(0) * _gram(12),),
        "non-finite": lambda: (torch.stack([_gram(4)[0], _gram(4)[0].index_fill(0, torch.tensor(1), torch.nan)]),),
    }


def _philox_calls() -> dict[str, Callable[[], tuple[Any, ...]]]:
    items = torch.tensor([0, -1, 2**40 + 3, 7])
    return {
        "one item": lambda: (items[2:3], -5, 1),
        "odd length": lambda: (items, 1234, 1003),
        "three items": lambda: (items[:3].clone(), 9, 8),
        "aligned rows": lambda: (items, 3, 1024),
        "strided items": lambda: (items[::2], 2**62, 256),
    }


def _by_alignment(large: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Say which of the large calls have rows that begin anywhere."""
    return {
        "streaming": tuple(call for call in large if "odd" not in call),
        "unaligned": tuple(call for call in large if "odd" in call),
    }


def _jvp_ops() -> Iterator[tuple[Any, ...]]:
    """Yield file, kernel, op, calls, large calls and gated calls of what streams a primal and its tangents."""
    file, kernel = "activation_jvp", "_activation_jvp_kernel"
    yield file, kernel, file, jvp_calls.activation_calls(), jvp_calls.LARGE_ACTIVATION, ("gelu, float32",)
    yield file, kernel, f"gated_{file}", jvp_calls.gated_calls(), jvp_calls.LARGE_GATED, ("gelu, float16",)
    file, kernel = "norm_jvp", "_row_jvp_kernel"
    rows, large = jvp_calls.row_calls(), jvp_calls.LARGE_ROWS
    yield file, kernel, "layer_norm_jvp", rows, large, ("modulated, bfloat16", "longest, float32")
    yield file, kernel, "rms_norm_jvp", rows, large, ()
    yield file, kernel, "softmax_jvp", jvp_calls.softmax_calls(), jvp_calls.LARGE_SOFTMAX, ("float32",)
    file, kernel = "group_norm_jvp", "_group_norm_jvp_kernel"
    gated = ("SiLU, float16", "long, channels last, float32")
    yield file, kernel, file, jvp_calls.group_calls(), jvp_calls.LARGE_GROUP, gated


OPS = [
    PackageOp(
        name="moments",
        calls=_moments_calls(),
        large=_large_moments(),
        cuda="balanced_rep.kernels.cuda:moments",
        cuda_outputs=frozenset({1, 2}),
        cuda_zeroed=frozenset({3}),
        triton="balanced_rep.kernels.triton.moments:moments",
        triton_outputs={"_tile_kernel": frozenset({"out_ptr"}), "_merge_kernel": frozenset({"out_ptr"})},
        gated=(
            "rows, float32",
            "rows, bfloat16",
            "rows, float64",
            "kept last, f32",
            "max pool, f32",
            "mean pool, bf16",
            "two rounds, f32",
        ),
        long=("two rounds, f32",),
        racecheck=("short rows, float32", "one element"),
        streaming=(
            *("rows, float32", "rows, float16", "rows, bfloat16", "rows, float64"),
            *(call for call in _large_moments() if "odd" not in call),
        ),
        unaligned=("unaligned, f32", "unaligned, bf16", *(call for call in _large_moments() if "odd" in call)),
    ),
    *(
        PackageOp(
            name=name,
            calls=_philox_calls(),
            cuda=f"balanced_rep.kernels.cuda:{name}",
            cuda_outputs=frozenset({1}),
            triton=f"balanced_rep.kernels.triton.philox:{name}",
            triton_outputs={"_bits_kernel": frozenset({"out_ptr"}), "_normal_kernel": frozenset({"out_ptr"})},
            gated=("odd length",),
            racecheck=("one item",),
            streaming=("aligned rows",),
            unaligned=("odd length",),
        )
        for name in ("philox_bits", "philox_normal")
    ),
    PackageOp(
        name="gram_eigh",
        calls=_eigh_calls(),
        large={"more pairs than teams": lambda: (_gram(67),)},
        cuda="balanced_rep.kernels.cuda:gram_eigh",
        cuda_outputs=frozenset({1, 2}),
        racecheck=("odd order",),
    ),
    PackageOp(
        name="attention_jvp",
        calls=jvp_calls.attention_calls(),
        large=jvp_calls.LARGE_ATTENTION,
        triton="balanced_rep.kernels.triton.attention_jvp:attention_jvp",
        triton_outputs={"_attention_jvp_kernel": frozenset({"y_ptr", "dy_ptr"})},
        gated=("self, float16", "self, float32", "cross, bfloat16"),
        refused={75: "tensor cores of compute capability 8.0", HIP_TARGET: "an NVIDIA device"},
        **_by_alignment(jvp_calls.LARGE_ATTENTION),
    ),
    *(
        PackageOp(
            name=name,
            calls=calls,
            large=large,
            triton=f"balanced_rep.kernels.triton.{file}:{name}",
            triton_outputs={kernel: frozenset({"y_ptr", "dy_ptr"})},
            gated=gated,
            caches=jvp_calls.GROUP_SHARE,
            **_by_alignment(large),
        )
        for file, kernel, name, calls, large, gated in _jvp_ops()
    ),
]


def _resolve(target: str) -> tuple[Any, Callable]:
    module, _, function = target.partition(":")
    loaded = importlib.import_module(module)
    return loaded, getattr(loaded, function)


def run_cuda(op: PackageOp, call: str, **options: Any) -> tuple[Any, list[CudaLaunch]]:
    """Run the CUDA launcher of an op on a simulated driver; options are those of :class:`.SimulatedCuda`."""
    from balanced_rep.kernels._driver import Launcher

    assert op.cuda is not None
    module, function = _resolve(op.cuda)
    driver = SimulatedCuda(outputs=op.cuda_outputs, zeroed=op.cuda_zeroed, **options)
    before = module.launch
    module.launch = Launcher(driver)
    try:
        return function(*op.arguments(call)), driver.launches
    finally:
        module.launch = before


def run_triton(op: PackageOp, call: str, **options: Any) -> tuple[Any, list[TritonLaunch]]:
    """Run the Triton launcher of an op with its kernels in the executor; options are those of `simulated_triton`."""
    assert op.triton is not None
    module, function = _resolve(op.triton)
    args, make = op.arguments(call), REGISTRY[op.name].outputs
    with simulated_triton(module, dict(op.triton_outputs), **options) as launches:
        if make is None:
            return function(*args), launches
        out = make(*args)  # this one writes into given memory
        function(*args, out=out)
        return out, launches


def tensors_of(got: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (got,) if isinstance(got, Tensor) else got


def check(op: PackageOp, got: Tensor | tuple[Tensor, ...], args: tuple[Any, ...]) -> None:
    """Compare a result with the float64 reference by the rules of the op.

    Raises:
        AssertionError: If it is not within them.
    """
    x, *rest = args
    if op.name == "gram_eigh":
        return _check_eigh(*got, x)
    if isinstance(got, tuple):  # y and dy, each with the tolerance of its dtype
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        for value, want in zip(got, REGISTRY[op.name].reference(*wide), strict=True):
            rtol, atol = REGISTRY[op.name].tolerance[value.dtype]
            torch.testing.assert_close(value.double(), want, rtol=rtol, atol=atol)
        return
    reference = REGISTRY[op.name].reference
    if op.name.startswith("philox"):  # all backends give the same bits
        assert torch.equal(got, reference(*args)), f"{op.name}: other bits than the reference"
        return
    averaged = rest[2] == 2  # the values themselves are then rounded
    assert_moments_close(got, reference(x.double(), *rest), value_rel=1e-6 if averaged else 0.0)


def _check_eigh(values: Tensor, vectors: Tensor, g: Tensor) -> None:
    """Eigenvectors of equal eigenvalues are not unique: what they must satisfy is what counts."""
    n, lower = g.shape[-1], g.tril() + g.tril(-1).mT
    size = lower.abs().amax((-2, -1), keepdim=True).nan_to_num(1.0).clamp_min(1e-300)  # squares stay in range
    values, lower = values / size.squeeze(-1), lower / size
    usable = torch.linalg.eigvalsh(lower.nan_to_num(-1.0))[:, 0] >= -1e-9 * torch.linalg.matrix_norm(lower)
    assert bool(values[~usable].isnan().all()), "a matrix with NaN, or an indefinite one, has eigenvalues"
    assert bool(vectors[~usable].isnan().all()), "such a matrix has eigenvectors"
    values, vectors, lower = values[usable], vectors[usable], lower[usable]
    assert bool((values.diff() <= 0).all()), "eigenvalues are not sorted"
    assert bool((vectors.sum(-1) > -1e-12).all()), "the sign of eigenvectors"
    unit = torch.finfo(torch.float64).eps * (1 + n**0.5)
    norm = torch.linalg.matrix_norm(lower)
    residual = torch.linalg.matrix_norm(lower @ vectors.mT - vectors.mT * values.unsqueeze(-2))
    away = torch.linalg.matrix_norm(vectors @ vectors.mT - torch.eye(n, dtype=torch.float64))
    off = (values - torch.linalg.eigvalsh(lower).flip(-1)).abs().amax(-1)
    for name, error, scale in (
        ("residual", residual, norm),
        ("orthogonality", away, n**0.5),
        ("eigenvalue", off, norm),
    ):
        assert bool((error <= 8 * unit * scale).all()), f"{name}: {float((error / unit).max()):.3g} units of rounding"


def _short(expression: str) -> str:
    return expression.replace("balanced_rep::", "")


@functools.cache
def recorded_cuda() -> list[CudaKernel]:
    """Return the CUDA kernels that the calls of all ops launch, for the compile gate."""
    found: dict[str, CudaKernel] = {}
    for op in OPS:
        for call in (*op.calls, *op.large) if op.cuda else ():
            for launch in run_cuda(op, call, run="record")[1]:
                kernel = CudaKernel(
                    _short(launch.expression),
                    CSRC / launch.file,
                    launch.expression,
                    launch.launch.block[0],
                    cases={},
                    shared_bytes=launch.launch.shared_bytes,
                )
                known = found.setdefault(launch.expression, kernel)
                if (kernel.threads, kernel.shared_bytes) > (
                    known.threads,
                    known.shared_bytes,
                ):  # occupancy of the largest
                    found[launch.expression] = kernel
    return [found[name] for name in sorted(found)]


@functools.cache
def recorded_triton() -> list[TritonKernel]:
    """Return the Triton kernels that the gated calls launch, one per set of types, constants and warps."""
    found: dict[str, TritonKernel] = {}
    for op in OPS if triton_missing() is None else ():
        for call in op.gated if op.triton else ():
            for launch in run_triton(op, call, run=False)[1]:
                request = launch.request
                pointers = tuple(name for name, kind in request.signature.items() if kind.startswith("*"))
                types = ", ".join(request.signature[name][1:] for name in pointers)
                # names are for people: the flags that tell variants apart, not every size that happened to be 1
                flags = ", ".join(f"{name}={value}" for name, value in request.constants.items() if name.isupper())
                name = f"{op.name}.{request.function}[{types}; {flags}; {request.num_warps} warps]"
                sizes = tuple(launch.sizes)
                found.setdefault(
                    name,
                    TritonKernel(
                        name,
                        request.module,
                        request.function,
                        request.signature,
                        request.constants,
                        cases={},
                        aligned_pointers=pointers,
                        sizes=sizes,
                        num_warps=request.num_warps,
                        num_stages=request.num_stages,
                        fp_fusion=request.fp_fusion,
                        refused=op.refused,
                    ),
                )
    return [found[name] for name in sorted(found)]
