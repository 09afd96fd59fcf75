"""On a GPU (``make test-gpu``): what an executor cannot show: streams, graphs, several devices."""

import os

import pytest
import torch

import balanced_rep
from balanced_rep.ops._registry import REGISTRY

from ..package import OPS, check, tensors_of
from .run import backends, on_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is interpreted: run `make test-gpu`"),
]
EVERY = pytest.mark.parametrize(
    ("op", "backend"), [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS for name in backends(op)]
)
CALLS = {"moments": "segments, f32", "philox_bits": "odd length", "philox_normal": "odd length"}  # others: the first


def call_of(op):
    return CALLS.get(op.name, next(iter(op.calls)))


def prepared(op, backend, device="cuda"):
    """Return a function that runs the op's call on the device, and gives its results as a tuple."""
    args, spec = on_device(op.arguments(call_of(op)), device), REGISTRY[op.name]
    with balanced_rep.backend(backend):
        if reason := spec.why_not(backend, *args):
            pytest.skip(reason)

    def run():
        with balanced_rep.backend(backend):
            return tensors_of(spec(*args))

    return run


def checked(op, got):
    on_host = tuple(x.cpu() for x in got)
    check(op, on_host if len(got) > 1 else on_host[0], op.arguments(call_of(op)))


def equal(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@EVERY
def test_a_stream_of_its_own(op, backend):
    run, stream = prepared(op, backend), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = [run() for _ in range(3)]
    stream.synchronize()
    checked(op, got[0])
    assert all(equal(other, got[0]) for other in got)


@EVERY
def test_a_graph_replayed(op, backend):
    run = prepared(op, backend)
    want = run()  # compiles, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for _ in range(2):
        for x in got:
            x.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@EVERY
def test_another_device_than_the_current_one(op, backend):
    got = prepared(op, backend, "cuda:1")()
    assert all(x.device == torch.device("cuda:1") for x in got)
    checked(op, got)
