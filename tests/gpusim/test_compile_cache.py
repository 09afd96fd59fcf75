"""Two test workers that compile the same thing at the same time both get it, whole, and leave nothing else behind."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from . import toolchain, triton_aot
from .samples.entries import SOURCE
from .test_kernels import needs_nvrtc, needs_triton
from .toolchain import compile_cuda
from .triton_aot import TritonRequest, compile_triton

SIGNATURE = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}
REQUEST = TritonRequest("tests.gpusim.samples.triton_samples", "silu", SIGNATURE, {"BLOCK": 128})


@pytest.fixture
def build(tmp_path, monkeypatch):
    """An empty cache."""
    for module in (toolchain, triton_aot):
        monkeypatch.setattr(module, "BUILD", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "of triton"))
    return tmp_path


def at_once(work):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda _: work(), range(2)))


@needs_triton
def test_triton(build):
    (one,), (other,) = at_once(lambda: compile_triton([REQUEST]))
    assert one == other
    assert ".entry silu" in one.ptx.replace("visible ", "")
    assert [path.name for path in (build / "triton").iterdir()] == [REQUEST.key]
    written = (one.folder / "facts.json").stat().st_mtime_ns
    compile_triton([REQUEST])
    assert (one.folder / "facts.json").stat().st_mtime_ns == written


@needs_triton
def test_the_first_triton_result_stays(build):
    """A second worker that comes later throws its own away."""
    (module,) = compile_triton([REQUEST])
    facts = module.folder / "facts.json"
    before = facts.stat().st_ino
    triton_aot._publish(_finished(build / "triton" / f"{REQUEST.key}.1"), module.folder)
    assert facts.stat().st_ino == before
    assert [path.name for path in (build / "triton").iterdir()] == [REQUEST.key]


def _finished(folder):
    folder.mkdir()
    (folder / "facts.json").write_text("{}")
    return folder


@needs_nvrtc
def test_cuda(build):
    one, other = (compile_cuda(SOURCE, ["silu"], "compute_80") for _ in range(2))
    assert one == other
    (cached,) = (build / "cuda").iterdir()
    assert cached.read_bytes().endswith(one.code)
