"""Everything between a launcher and the device: sources, arguments, loading, tickets."""

import contextlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from balanced_rep.kernels import _driver, _moments_plan, _nvrtc, _supports, cuda
from balanced_rep.kernels._driver import Kernel, Launcher, pack, read_source
from balanced_rep.ops._registry import BackendError
from tests.gpusim.cases import ARCHITECTURES
from tests.gpusim.simulated import SimulatedCuda
from tests.gpusim.toolchain import nvrtc_missing

CPU = torch.device("cpu")
TYPES = {
    "int64": np.int64,
    "double": np.float64,
    "unsigned": np.uint32,
    "Layout": _moments_plan.LAYOUT,
}
ROWS = cuda.plan(cuda.describe(torch.zeros(3, 5000), 1, 0), torch.float32, 0, 0)


def declared(source, kernel):
    """The parameter types of a kernel, read from its source."""
    name = re.match(r"balanced_rep::(\w+)", kernel.expression)[1]
    (parameters,) = re.findall(rf"__global__[^;{{]*?\b{name}\(([^)]*)\)", re.sub(r"//.*", "", source))
    kinds = [re.match(r"\s*(?:const )?(\w+)(\*?) \w+$", p.replace("\n", " ")) for p in parameters.split(",")]
    return tuple(None if kind[2] else np.dtype(TYPES[kind[1]]) for kind in kinds)


@pytest.mark.parametrize("kernel", [ROWS.kernel, cuda.PHILOX_BITS, cuda.PHILOX_NORMAL], ids=lambda k: k.expression)
def test_parameters_are_those_of_the_source(kernel):
    assert kernel.parameters == declared(read_source(kernel.file), kernel)


def test_all_kernels_of_moments_take_the_same():
    source = read_source("moments.cu")
    for name in ("moments_rows", "moments_warps", "moments_columns", "moments_pooled"):
        assert declared(source, Kernel("moments.cu", f"balanced_rep::{name}<>", ())) == ROWS.kernel.parameters


def test_layout_is_the_struct_of_the_source():
    (body,) = re.findall(r"struct Layout \{(.*?)\};", read_source("moments.cu"), re.DOTALL)
    fields = re.findall(r"^\s*(\w+) (\w+);", body, re.MULTILINE)
    assert [(name, np.dtype(TYPES[kind])) for kind, name in fields] == [
        (name, LAYOUT_FIELDS[name][0]) for name in _moments_plan.LAYOUT.names
    ]
    assert _moments_plan.LAYOUT.itemsize == sum(np.dtype(TYPES[kind]).itemsize for kind, _ in fields)  # no padding


LAYOUT_FIELDS = _moments_plan.LAYOUT.fields


def test_arguments_are_packed_by_value():
    x, out, items = torch.zeros(3), torch.zeros(3), (np.int64(3), np.int64(1), np.int64(-5), np.int64(2**40))
    packed = pack(cuda.PHILOX_BITS, (x, out, *items))
    assert [(a.dtype, a.shape) for a in packed] == [(np.dtype(np.uint64), (1,))] * 2 + [(np.dtype(np.int64), (1,))] * 4
    assert [int(a[0]) for a in packed] == [x.data_ptr(), out.data_ptr(), 3, 1, -5, 2**40]
    (layout,) = pack(ROWS.kernel, (x, x, x, x, np.float64(0.5), ROWS.layout))[5]
    assert layout == ROWS.layout
    assert layout.tobytes()[:8] == np.int64(3).tobytes()


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, np.int64(3), "argument 0 is int64, the kernel takes a tensor"),
        (2, 3, "argument 2 is int, the kernel takes a numpy scalar of type int64"),
        (3, np.int32(3), "argument 3 is int32, the kernel takes a numpy scalar of type int64"),
        (4, torch.zeros(1), "argument 4 is Tensor, the kernel takes a numpy scalar of type int64"),
    ],
)
def test_wrong_arguments_are_named(position, wrong, message):
    args = [torch.zeros(3), torch.zeros(3), np.int64(3), np.int64(1), np.int64(0), np.int64(1)]
    args[position] = wrong
    with pytest.raises(TypeError, match=message):
        pack(cuda.PHILOX_BITS, tuple(args))


def test_kernels_are_loaded_once_per_device():
    loads = []

    class Counting(SimulatedCuda):
        def load(self, kernel, device):
            loads.append((kernel.expression, device))

    launch = Launcher(Counting(run="record"))
    args = (torch.zeros(3, dtype=torch.int64), torch.zeros(3), *(np.int64(1),) * 4)
    other = torch.device("cpu", 1)
    for kernel, device in (
        (cuda.PHILOX_BITS, CPU),
        (cuda.PHILOX_BITS, CPU),
        (cuda.PHILOX_NORMAL, CPU),
        (cuda.PHILOX_BITS, other),
        (cuda.PHILOX_BITS, other),
    ):
        launch(kernel, 1, 32, args, device)
    names = cuda.PHILOX_BITS.expression, cuda.PHILOX_NORMAL.expression
    assert loads == [(names[0], CPU), (names[1], CPU), (names[0], other)]


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ModuleNotFoundError("No module named 'cupy'"), r"extras \[cuda12\] and \[cuda13\].*No module named 'cupy'"),
        (_nvrtc.CompileError("moments.cu(3): error: expected a ;"), r"NVRTC refuses.*expected a ;"),
        (RuntimeError("libnvrtc.so.13 not found"), r"NVRTC must be installed.*libnvrtc.so.13 not found"),
    ],
)
def test_what_does_not_load_is_tried_once_and_explained_every_time(error, hint):
    class Failing(SimulatedCuda):
        tries = 0

        def load(self, kernel, device):
            Failing.tries += 1
            raise error

    launch = Launcher(Failing())
    for _ in range(2):
        with pytest.raises(BackendError, match=hint) as caught:
            launch(cuda.PHILOX_BITS, 1, 32, (), CPU)
        assert caught.value.__cause__ is error
    assert Failing.tries == 1


def test_a_compiler_that_does_not_load_is_a_reason(monkeypatch):
    import sys

    _driver.no_compiler.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)  # any import of it raises
    try:
        reason = _driver.no_compiler()
        assert "does not load (ModuleNotFoundError" in reason
        assert "the extras [cuda12], [cuda13] install both" in reason
    finally:
        _driver.no_compiler.cache_clear()


def test_supports_looks_at_the_device_first():
    assert _supports.cuda_items(torch.zeros(1)) == "input is on cpu, this backend runs on cuda"
    assert _supports.cuda_moments(torch.zeros(1), 0, 0) == "input is on cpu, this backend runs on cuda"


def test_sources_are_read_whole():
    source = read_source("moments.cu")
    assert '#include "' not in source
    assert "#pragma once" not in source
    for once in ("struct Layout {", "struct State {", "struct Cursor {", "enum Raw {"):
        assert source.count(once) == 1
    with pytest.raises(BackendError, match=r"nothing\.cu is neither in"):
        read_source("nothing.cu")


def test_sources_of_an_uninstalled_package(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    want = read_source("philox.cu")
    monkeypatch.setattr(_driver.importlib.resources, "files", missing)
    assert read_source("philox.cu") == want


needs_nvrtc = pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
def test_what_a_device_gets_compiles(arch):
    for kernel in (ROWS.kernel, cuda.PHILOX_NORMAL):
        target = _nvrtc.target_of(divmod(arch, 10))
        assert target == f"sm_{arch}"
        code, symbol = _nvrtc.compile_source(read_source(kernel.file), kernel.file, kernel.expression, target)
        assert code.startswith(b"\x7fELF")
        assert symbol.encode() in code


@needs_nvrtc
def test_what_a_device_gets_is_what_the_executor_runs():
    """The same instructions; in particular none that flushes subnormal numbers to zero."""
    from tests.gpusim import ptx
    from tests.gpusim.simulated import CSRC
    from tests.gpusim.toolchain import compile_cuda

    for kernel in (ROWS.kernel, cuda.PHILOX_NORMAL):
        code, symbol = _nvrtc.compile_source(read_source(kernel.file), kernel.file, kernel.expression, "compute_80")
        given = ptx.parse(code.rstrip(b"\0").decode())[symbol]
        tested = ptx.parse(compile_cuda(CSRC / kernel.file, [kernel.expression], "compute_80").ptx)[symbol]
        assert [step.text for step in given.code] == [step.text for step in tested.code]
        assert not [step.text for step in given.code if "ftz" in step.modifiers]


@needs_nvrtc
def test_devices_that_the_compiler_does_not_know(monkeypatch):
    from cupy_backends.cuda.libs import nvrtc

    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: [75, 80, 90])
    targets = [_nvrtc.target_of(capability) for capability in ((8, 0), (8, 6), (12, 0), (7, 0))]
    assert targets == ["sm_80", "compute_80", "compute_90", "compute_75"]
    code, _ = _nvrtc.compile_source(read_source("philox.cu"), "philox.cu", cuda.PHILOX_BITS.expression, "compute_80")
    assert b".target sm_80" in code


@needs_nvrtc
def test_a_source_that_does_not_compile_is_quoted():
    with pytest.raises(_nvrtc.CompileError, match=r'wrong.cu.*identifier "undeclared" is undefined'):
        _nvrtc.compile_source("__global__ void k() { undeclared(); }", "wrong.cu", "k", "sm_80")


class Device:
    """What CupyDriver needs of cupy's device side and of torch.cuda, on a machine without a device."""

    def __init__(self, monkeypatch, folder):
        import cupy

        self.guards, self.loaded, self.launched, self.current = [], [], [], None
        monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
        monkeypatch.setattr(cupy, "RawModule", self.module)
        monkeypatch.setattr(torch.cuda, "device", self.guard)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1000 + device.index)
        )

    @contextlib.contextmanager
    def guard(self, device):
        self.current = device
        yield
        self.current = None

    def module(self, *, path):
        assert self.current is not None
        self.loaded.append(path)

        def launch(grid, block, args, shared, stream):
            self.launched.append((grid, block, args, shared, stream, self.current))

        def get_function(symbol):
            assert symbol.encode() in open(path, "rb").read()
            return SimpleNamespace(kernel=launch)

        return SimpleNamespace(get_function=get_function)


@pytest.fixture
def device(monkeypatch, tmp_path):
    pytest.importorskip("cupy")
    return Device(monkeypatch, tmp_path / "cache")


@needs_nvrtc
def test_a_launch_reaches_its_device_and_stream(device):
    launch = Launcher(_driver.CupyDriver())
    items, out = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 8)
    sizes = (np.int64(3), np.int64(1), np.int64(7), np.int64(8))
    for index in (0, 1, 0):
        launch(cuda.PHILOX_NORMAL, 5, 256, (items, out, *sizes), torch.device("cuda", index))
    assert len(device.loaded) == 2  # once per device, of one file
    assert len(set(device.loaded)) == 1
    for (grid, block, args, shared, stream, guarded), index in zip(device.launched, (0, 1, 0), strict=True):
        assert (grid, block, shared) == ((5,), (256,), 0)
        assert [int(arg[0]) for arg in args] == [items.data_ptr(), out.data_ptr(), 3, 1, 7, 8]
        assert stream.ptr == 1000 + index
        assert guarded == torch.device("cuda", index)


@needs_nvrtc
def test_what_is_compiled_is_found_by_the_next_process(device, monkeypatch, tmp_path):
    first = _driver.CupyDriver().load(cuda.PHILOX_BITS, torch.device("cuda", 0))
    monkeypatch.setattr(_nvrtc, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert first is not None
    _driver.CupyDriver().load(cuda.PHILOX_BITS, torch.device("cuda", 1))
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".cubin", ".symbol"]
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        _driver.CupyDriver().load(cuda.PHILOX_NORMAL, torch.device("cuda", 0))


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_done_without(device, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    _driver.CupyDriver().load(cuda.PHILOX_BITS, torch.device("cuda", 0))
    assert len(device.loaded) == 1


class Streams(SimulatedCuda):
    current = 1

    def stream_key(self, device):
        return self.current


def test_tickets_are_kept_per_stream_and_fresh_in_a_graph(monkeypatch):
    driver = Streams()
    monkeypatch.setattr(cuda, "launch", Launcher(driver))
    monkeypatch.setattr(cuda, "_tickets", {})
    first = cuda.zeroed_tickets(5, CPU)
    assert first.eq(0).all()
    assert cuda.zeroed_tickets(1000, CPU) is first
    driver.current = 2
    assert cuda.zeroed_tickets(5, CPU) is not first
    driver.current = 1
    larger = cuda.zeroed_tickets(5000, CPU)
    assert larger.numel() >= 5000
    assert cuda.zeroed_tickets(5, CPU) is larger
    driver.current = None  # captured into a graph
    captured = cuda.zeroed_tickets(5, CPU)
    assert captured is not larger
    assert cuda.zeroed_tickets(5, CPU) is not captured
    assert captured.eq(0).all()


def test_launches_see_only_what_they_may():
    """Empty inputs reach no device; a row of its own needs neither parts nor tickets."""
    driver = SimulatedCuda(run="record")
    before, cuda.launch = cuda.launch, Launcher(driver)
    try:
        empty = cuda.moments(torch.zeros(3, 0), 1, 0, 0, 0.0)
        assert cuda.moments(torch.zeros(0, 3), 1, 0, 0, 0.0).shape == (10, 0)
        assert cuda.philox_bits(torch.zeros(0, dtype=torch.int64), 0, 4).shape == (0, 4)
        assert cuda.philox_normal(torch.zeros(2, dtype=torch.int64), 0, 0).shape == (2, 0)
        assert not driver.launches
        cuda.moments(torch.zeros(3, 100), 1, 0, 0, 0.0)
    finally:
        cuda.launch = before
    assert empty[:, 0].tolist() == [0, 0, 0, 0, 0, 0, torch.inf, -torch.inf, 0, 0]
    x, parts, out, tickets, *_ = driver.launches[0].launch.args
    assert parts.array is out.array is tickets.array
    assert x.array is not out.array


@pytest.mark.parametrize(
    "threshold", [0.0, 0.1, -0.1, 1e-50, -1e-50, 1e300, -1e300, torch.inf, -torch.inf, 16777217.0, 3.4028235e38]
)
def test_float32_threshold_asks_the_same_question(threshold):
    from balanced_rep.kernels._moments_common import exact_threshold

    rounded = exact_threshold(threshold, torch.float32)
    assert rounded == float(np.float32(rounded)) or abs(rounded) == torch.inf
    near = np.float32(min(max(threshold, -3.4e38), 3.4e38))
    values = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    values += [np.float32(v) for v in (0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan)]
    for v in values:
        assert (v > np.float32(rounded)) == (float(v) > threshold), v
