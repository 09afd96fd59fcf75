"""No head dim of attention_jvp spills: the compile gate holds a few of them, this all that networks have."""

from dataclasses import replace

import pytest
import torch

from .jvp_calls import _attention, _draw
from .package import OPS, run_triton
from .static.measure import cubin_facts
from .test_kernels import needs_triton
from .triton_aot import compile_triton

HEAD_DIMS = (32, 40, 48, 64, 80, 96, 128, 160, 256)
PAIRS = ((torch.float32, None), (torch.float16, None), (torch.float32, torch.bfloat16))  # bfloat16 is as float16
ATTENTION = next(op for op in OPS if op.name == "attention_jvp")


def requests(target):
    """Everything that takes registers: all operands moving, a mask of floats, causal, several tangents."""
    for dtype, tangent in PAIRS:
        for d in HEAD_DIMS:
            mask = _draw(torch.float32, 1, 2, 66, 33)
            args = _attention(dtype, "qkv", 66, 33, d, 2, 1, 3, tangent=tangent, mask=mask, causal=True)
            (launch,) = run_triton(replace(ATTENTION, calls={"this": lambda args=args: args}), "this", run=False)[1]
            yield f"{dtype}, tangents {tangent or dtype}, head dim {d}", replace(launch.request, target=target)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100], ids="sm_{}".format)
def test_no_head_dim_spills(target):
    names, wanted = zip(*requests(target), strict=True)
    spilling = []
    for name, module in zip(names, compile_triton(wanted), strict=True):
        launches = {module.symbol: (32 * module.num_warps, module.shared_bytes)}
        facts = cubin_facts(module.asm("cubin"), target, launches)[module.symbol]
        assert facts["occupancy"] > 0, name
        if facts["spills"] or facts["stack"]:
            spilling.append(f"{name}: {facts['spills']} spills, stack {facts['stack']}")
    assert not spilling, "\n".join(spilling)
