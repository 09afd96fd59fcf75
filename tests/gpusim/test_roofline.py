"""The roofline model does the arithmetic that its page promises; the page of figures can be written."""

import pytest

from bench import gpusim
from bench.roofline import DEVICES, table

from .package import OPS
from .ptx.counters import Counters
from .test_kernels import needs_nvrtc
from .traffic import Traffic, traffic


def test_memory_bound_time_is_bytes_over_bandwidth():
    a100 = DEVICES[0]
    assert a100.microseconds(2039e9 * 0.85) == pytest.approx(1e6 + 3)
    assert a100.microseconds(0, {"float32": 19.5e12 * 0.7}) == pytest.approx(1e6 + 3)
    assert a100.microseconds(0, {"half matrix": 312e12 * 0.7, "float32": 19.5e12 * 0.7}) == pytest.approx(2e6 + 3)
    assert a100.microseconds(0, {"float64": 9.7e12 * 0.7}) == pytest.approx(1e6 + 3)


def test_table_prints_the_minimum_beside_the_model():
    twice = Traffic(10, 10, 1.1, dram_bytes=8192, minimum_bytes=4096, flops={"float32": 40960})
    text = table([("k", twice)], 1 << 30)
    assert "model us (minimum)" in text
    assert "| k | 10.0 + 0.0 + 0.0 |" in text
    assert f"{DEVICES[0].microseconds(2 << 30):.0f} ({DEVICES[0].microseconds(1 << 30):.0f})" in text


def test_traffic_over_a_limit_is_named():
    with pytest.raises(AssertionError, match="12 sectors, ideal 10"):
        Traffic(12, 10, 1.1, dram_bytes=4096, minimum_bytes=4096, flops={}).check()
    with pytest.raises(AssertionError, match="8192 DRAM bytes in the model, minimum 4096"):
        Traffic(10, 10, 1.1, dram_bytes=8192, minimum_bytes=4096, flops={}).check()


def test_matrix_instructions_are_not_taken_for_float32():
    counters = Counters()
    counters.flops.update({"mma.bf16": 4096, "mma.tf32": 512, "f32": 7, "f16": 1})
    assert traffic([], [], [counters], aligned=True).flops == {"half matrix": 4096, "tf32 matrix": 512, "float32": 8}


@needs_nvrtc
def test_the_speed_of_the_executor_is_a_table_of_its_launches():
    ops = {op.name: op for op in OPS}
    assert all(getattr(ops[name], backend) for name, backend, _ in gpusim.TIMED)
    small = {("moments", "cuda", "2 x 600"): lambda: gpusim._moments(2, 600)}
    *_, row = gpusim.speed(small).splitlines()
    assert row.startswith("| moments, cuda, 2 x 600 | 0.")
    assert row.count("|") == 5
