"""On a GPU (``make test-gpu``): what an executor cannot show: streams, graphs, several devices."""

import os

import pytest
import torch

import balanced_rep
from balanced_rep.ops._registry import REGISTRY

from ..package import OPS, check
from .run import BACKENDS, on_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is interpreted: run `make test-gpu`"),
]
EVERY = pytest.mark.parametrize(
    ("op", "backend"), [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS for name in BACKENDS]
)
CALLS = {"moments": "segments, f32", "philox_bits": "odd length", "philox_normal": "odd length"}


def run(op, backend, args):
    with balanced_rep.backend(backend):
        return REGISTRY[op.name](*args)


@EVERY
def test_a_stream_of_its_own(op, backend):
    args, stream = on_device(op.arguments(CALLS[op.name])), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = [run(op, backend, args) for _ in range(3)]
    stream.synchronize()
    check(op, got[0].cpu(), op.arguments(CALLS[op.name]))
    assert all(torch.equal(other, got[0]) for other in got)


@EVERY
def test_a_graph_replayed(op, backend):
    args = on_device(op.arguments(CALLS[op.name]))
    want = run(op, backend, args)  # compiles, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(op, backend, args)
    for _ in range(2):
        got.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@EVERY
def test_another_device_than_the_current_one(op, backend):
    args = tuple(arg.to("cuda:1") if isinstance(arg, torch.Tensor) else arg for arg in op.arguments(CALLS[op.name]))
    got = run(op, backend, args)
    assert got.device == torch.device("cuda:1")
    check(op, got.cpu(), op.arguments(CALLS[op.name]))
