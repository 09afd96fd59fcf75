"""The roofline model does the arithmetic that its page promises; the page of figures can be written."""

import pytest
import torch

from bench import gpu_networks, gpusim
from bench.roofline import DEVICES, table

from .package import OPS
from .ptx.counters import Counters
from .test_kernels import needs_nvrtc, needs_triton
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


class Block(torch.nn.Module):
    """Norms with what follows them, self-attention, attention to a constant, and a sum."""

    def __init__(self):
        super().__init__()
        self.group, self.row = torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(8)
        self.conv = torch.nn.Conv2d(8, 8, 1)

    def forward(self, x, text, scale):
        h = self.conv(torch.nn.functional.silu(self.group(x))).flatten(2).mT  # (1, 64, 8)
        h = self.row(h) * (1 + scale) + scale
        attend = torch.nn.functional.scaled_dot_product_attention
        q = h.unsqueeze(1)
        return h + attend(q, q, q).squeeze(1) + attend(q, text, text).squeeze(1)


@needs_triton
def test_functions_of_a_network_are_counted_by_hand():
    with torch.device("meta"):
        inputs = {"x": torch.empty(1, 8, 8, 8), "text": torch.empty(1, 1, 16, 8), "scale": torch.empty(8)}
        ratios = dict.fromkeys(("layer_norm_jvp", "attention_jvp", "activation_jvp"), 1.0) | {"group_norm_jvp": 1.5}
        counted = gpu_networks.count(Block(), inputs, 3, ratios)
    x, weights, scores = 2 * 512, 2 * 64, 2 * 64 * 64
    fused, eager = ({name: work.sums(way) for name, work in counted.items()} for way in ("fused", "eager"))
    assert fused["group_norm"] == (1.5 * 4 * 2 * x, 0)
    assert fused["silu"] == (0, 0)  # behind the group norm
    assert fused["conv2d"] == (4 * 2 * x + weights, 4 * 2 * 512 * 8)
    assert eager["layer_norm"] == ((7 + 3 * 11) * x, 0)
    assert fused["add, mul, div"] == (2 * 4 * 3 * x + 2 * 16, 0)  # two sums; 1 + scale; the modulation joins the norm
    assert fused["attention, self"] == (4 * 4 * x, (2 * 2 + 4 * 3) * 2 * 512 * 64)  # T = 2: the scores twice
    assert eager["attention, self"] == (6 * scores + 4 * x + 3 * (11 * scores + 8 * x), 14 * 2 * 512 * 64)
    assert fused["attention, cross"] == (4 * 2 * x + 2 * 2 * 128, (2 * 2 + 2 * 3) * 2 * 512 * 16)


def test_totals_are_sums_of_launches():
    work = gpu_networks.Counted()
    work.add(3, forward=(2039e5 * 0.85, 0), eager=(2039e6 * 0.85, 0), fused=(0, 0))
    a100, *_ = gpu_networks.totals({"f": work})
    assert a100 == ["A100 80GB SXM", "0.1", "0.4", "1.0", "0.0"]
