"""gram_eigh.cu through its launcher: as host C++ at the orders that matter, in the executor with few teams."""

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from balanced_rep.kernels import _driver, _supports, cuda
from tests.gpusim import ptx
from tests.gpusim.package import OPS, check
from tests.gpusim.simt import host_missing
from tests.gpusim.simulated import SimulatedCuda
from tests.gpusim.toolchain import nvrtc_missing

OP = next(op for op in OPS if op.name == "gram_eigh")
CPU = torch.device("cpu")


def gram(n, name):
    if name == "diagonal":
        return torch.eye(n, dtype=torch.float64).unsqueeze(0) * torch.arange(n).flip(0)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)).Q
    return ((Q * SPECTRA[name](n)) @ Q.mT).unsqueeze(0)


SPECTRA = {
    "random": lambda n: torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64),
    "14 digits": lambda n: torch.logspace(0, -14, n, dtype=torch.float64),
    "half zero": lambda n: (torch.arange(n) < n / 2).double() * torch.linspace(1, 2, n, dtype=torch.float64),
    "cluster": lambda n: 1 + 1e-13 * torch.arange(n, dtype=torch.float64),
    "one large": lambda n: 1e300 * torch.logspace(0, -9, n, dtype=torch.float64).round(decimals=4),
    "tiny": lambda n: torch.linspace(1e-300, 1e-290, n, dtype=torch.float64),
}


@pytest.mark.skipif(host_missing("sanitize") is not None, reason=str(host_missing("sanitize")))
@pytest.mark.parametrize("n", [1, 2, 16, 17])
def test_spectra(n, monkeypatch):
    driver = SimulatedCuda(run="host", outputs=OP.cuda_outputs, seed=n)
    monkeypatch.setattr(cuda, "launch", _driver.Launcher(driver))
    g = torch.cat([gram(n, name) for name in SPECTRA])
    got = cuda.gram_eigh(g)
    for i in range(len(SPECTRA)):
        check(OP, tuple(value[i : i + 1] for value in got), (g[i : i + 1],))
    alone = cuda.gram_eigh(g[-1:])
    assert all(torch.equal(one[0], value[-1]) for one, value in zip(alone, got, strict=True)), (
        "depends on its neighbours"
    )
    (launch, _) = driver.launches
    assert launch.launch.block == (min(512, -(-8 * n // 32) * 32),)
    assert launch.launch.shared_bytes == 8 * (n * n + n)


@pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))
def test_a_matrix_without_eigenvalues_leaves_no_slot_unwritten(monkeypatch):
    """Found once: an eigenvalue at minus the shift, whose column is zero and quotient NaN, took the place of another.

    The slot that was left over kept what had been in memory.
    """
    launcher = _driver.Launcher(SimulatedCuda(outputs=OP.cuda_outputs))

    def over_old_numbers(kernel, blocks, threads, args, *rest, **options):
        for position in OP.cuda_outputs:
            args[position].fill_(7.0)
        return launcher(kernel, blocks, threads, args, *rest, **options)

    monkeypatch.setattr(cuda, "launch", over_old_numbers)
    good = gram(3, "random")
    bad = torch.diag(torch.tensor([1.0, -1 / 64, 0.5], dtype=torch.float64)).unsqueeze(0)
    values, vectors = cuda.gram_eigh(torch.cat([good, bad]))
    check(OP, (values[:1], vectors[:1]), (good,))
    assert bool(values[1].isnan().all())
    assert bool(vectors[1].isnan().all())


@pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))
@pytest.mark.parametrize("n", [9, 12])
def test_a_team_with_several_pairs(n, monkeypatch):
    monkeypatch.setattr(cuda, "launch", _driver.Launcher(SimulatedCuda(outputs=OP.cuda_outputs)))
    monkeypatch.setattr(cuda, "EIGH_THREADS", 32)
    g = gram(n, "random")
    check(OP, cuda.gram_eigh(g), (g,))


@pytest.mark.slow
@pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))
@pytest.mark.parametrize(("n", "name"), [(128, "diagonal")])  # which takes few sweeps
def test_large_orders(n, name, monkeypatch):
    driver = SimulatedCuda(outputs=OP.cuda_outputs, options=ptx.Options(check=False))
    monkeypatch.setattr(cuda, "launch", _driver.Launcher(driver))
    g = gram(n, name)
    check(OP, cuda.gram_eigh(g), (g,))


def test_an_empty_batch_reaches_no_device():
    for shape in ((0, 5, 5), (3, 0, 0)):
        values, vectors = cuda.gram_eigh(torch.zeros(shape, dtype=torch.float64))
        assert values.shape == shape[:2]
        assert vectors.shape == shape


@pytest.mark.parametrize(
    ("n", "dtype", "room", "reason"),
    [
        (128, torch.float64, 166912, None),
        (112, torch.float64, 101376, None),
        (113, torch.float64, 101376, "order 113: 103056 bytes of shared memory"),
        (90, torch.float64, 65536, None),
        (91, torch.float64, 65536, "a block of this device has 65536"),
        (129, torch.float64, 232448, "at most 128 columns"),
        (8, torch.float32, 232448, "float32 is not float64"),
    ],
)
def test_supports_counts_shared_memory(n, dtype, room, reason, monkeypatch):
    monkeypatch.setattr(_supports, "cuda_items", lambda g: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=room)
    )
    why = _supports.cuda_gram_eigh(torch.zeros(1, n, n, dtype=dtype))
    assert why is None if reason is None else reason in why


@pytest.mark.parametrize(("room", "told"), [(232448, 8 * (128 * 128 + 128)), (65536, 65536)])
def test_the_device_is_told_how_much_shared_memory(room, told, monkeypatch):
    """Beyond 48 KiB a launch fails unless the kernel's attribute says so; it cannot say more than the device has."""
    function = SimpleNamespace(kernel="loaded", max_dynamic_shared_size_bytes=None)
    cupy = ModuleType("cupy")
    cupy.RawModule = lambda path: SimpleNamespace(get_function=lambda symbol: function)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(_driver, "cached", lambda *args: SimpleNamespace(path="kernel.cubin", symbol="gram_eigh"))
    monkeypatch.setattr(_driver, "target_of", lambda capability: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=room)
    )
    assert _driver.CupyDriver().load(cuda.GRAM_EIGH, CPU) == "loaded"
    assert function.max_dynamic_shared_size_bytes == told


def test_cupy_has_that_attribute():
    cupy = pytest.importorskip("cupy")
    assert hasattr(cupy.RawKernel, "max_dynamic_shared_size_bytes")
