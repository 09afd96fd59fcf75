"""The roofline model does the arithmetic that its page promises."""

import pytest

from bench.roofline import DEVICES, Count, table


def test_memory_bound_time_is_bytes_over_bandwidth():
    a100 = DEVICES[0]
    assert a100.microseconds(2039e9 * 0.85) == pytest.approx(1e6 + 3)
    assert a100.microseconds(0, flops32=19.5e12 * 0.7) == pytest.approx(1e6 + 3)
    assert a100.microseconds(0, flops64=9.7e12 * 0.7) == pytest.approx(1e6 + 3)


def test_table_prints_the_minimum_beside_the_model():
    text = table([Count("k", "float32", 4, 8.0, 10.0, 0.0, 1.0)], 1 << 30)
    assert "model us (minimum)" in text
    assert f"{DEVICES[0].microseconds(8 * 2**30):.0f} ({DEVICES[0].microseconds(4 * 2**30):.0f})" in text
