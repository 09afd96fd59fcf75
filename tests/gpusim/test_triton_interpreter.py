"""The mended interpreter rounds like the hardware, and refuses what the hardware would do differently."""

import numpy as np
import pytest
import torch

from .triton_interpreter import HalfArithmeticError, bf16_to_f32, f32_to_bf16, truncate_to_tf32

triton = pytest.importorskip("triton", reason="the triton wheel is not installed")

from .samples import triton_samples as samples  # noqa: E402


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def test_bf16_rounds_to_nearest_even_like_torch(generator):
    values = torch.randn(4096, generator=generator) * 10.0 ** torch.randint(-30, 30, (4096,), generator=generator)
    want = values.bfloat16()
    got = f32_to_bf16(values.numpy())
    assert np.array_equal(got, want.view(torch.uint16).numpy())
    assert np.array_equal(bf16_to_f32(got), want.float().numpy())
    assert np.isnan(bf16_to_f32(f32_to_bf16(np.float32([np.nan])))).all()


def test_tf32_keeps_ten_mantissa_bits():
    assert truncate_to_tf32(np.float32([1 + 2**-10]))[0] == np.float32(1 + 2**-10)
    assert truncate_to_tf32(np.float32([1 + 2**-10 + 2**-11]))[0] == np.float32(1 + 2**-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1009])
def test_elementwise(triton_interpreter, generator, dtype, n):
    x = torch.randn(n, generator=generator).to(dtype)
    y = torch.full((n,), torch.nan)
    samples.silu[(triton.cdiv(n, 256),)](x, y, n, BLOCK=256)
    torch.testing.assert_close(y.double(), torch.nn.functional.silu(x.double()), rtol=1e-6, atol=1e-6)


def test_store_to_bf16_rounds_like_torch(triton_interpreter, generator):
    x = torch.randn(2048, generator=generator)
    y = torch.empty(2048, dtype=torch.bfloat16)
    samples.silu[(1,)](x, y, 2048, BLOCK=2048)
    want = torch.nn.functional.silu(x.double()).bfloat16()
    assert (y != want).float().mean() < 2e-3  # differs only where float32 and float64 straddle a rounding boundary


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dot(triton_interpreter, generator, dtype):
    m, n, k = 33, 50, 40
    a, b = torch.randn(m, k, generator=generator).to(dtype), torch.randn(k, n, generator=generator).to(dtype)
    c = torch.full((m, n), torch.nan)
    samples.matmul[(2, 2)](a, b, c, m, n, k, k, n, n, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
    exact = a.double() @ b.double()
    error = ((c - exact).abs().max() / exact.abs().max()).item()
    if dtype == torch.float32:  # TF32: an honest answer is neither exact nor far off
        assert 1e-5 < error < 1e-3
    else:
        assert error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_arithmetic_is_refused(triton_interpreter, dtype):
    x, out = torch.ones(8, dtype=dtype), torch.empty(1)
    with pytest.raises(triton.runtime.errors.InterpreterError) as caught:
        samples.half_sum[(1,)](x, out, 8, BLOCK=8)
    assert isinstance(caught.value.__cause__, HalfArithmeticError)
    assert "right after the load" in str(caught.value.__cause__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_masked_lanes_are_poisoned(triton_interpreter, dtype):
    x, y = torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    samples.leaky_copy[(1,)](x, y, 2, BLOCK=4)
    assert y[:2].eq(0).all()
    assert y[2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_masked_integers_are_poisoned(triton_interpreter, dtype):
    x, y = torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    samples.leaky_copy[(1,)](x, y, 2, BLOCK=4)
    assert y[:2].eq(0).all()
    assert y[2:].eq(torch.iinfo(dtype).max // 3).all()


def test_ticket_sum_leaves_the_ticket_at_zero(triton_interpreter, generator):
    x = torch.randn(1000, generator=generator)
    partial, ticket, out = torch.empty(4), torch.zeros(1, dtype=torch.int32), torch.empty(1)
    samples.ticket_sum[(4,)](x, partial, ticket, out, 1000, BLOCK=256, MAX_PROGRAMS=4)
    torch.testing.assert_close(out[0].double(), x.double().sum(), rtol=1e-5, atol=1e-5)
    assert ticket.item() == 0


def test_patches_are_undone():
    from triton.runtime import interpreter

    from .triton_interpreter import honest_interpreter

    before = {name: getattr(interpreter.InterpreterBuilder, name) for name in ("create_dot", "binary_op")}
    with honest_interpreter():
        assert interpreter.InterpreterBuilder.create_dot is not before["create_dot"]
    assert all(getattr(interpreter.InterpreterBuilder, name) is value for name, value in before.items())


def test_the_language_is_patched_once_per_launch(triton_interpreter, monkeypatch, generator):
    """Again for every function that a kernel calls took half of a run; afterwards nothing of it stays."""
    import triton.language as tl
    from triton.runtime import interpreter

    counted, builtins = [], interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: (counted.append(args[0]), builtins(*args)))
    before = tl.load
    x = torch.randn(1000, generator=generator)
    for _ in range(2):
        partial, ticket, out = torch.empty(4), torch.zeros(1, dtype=torch.int32), torch.empty(1)
        samples.ticket_sum[(4,)](x, partial, ticket, out, 1000, BLOCK=256, MAX_PROGRAMS=4)
        torch.testing.assert_close(out[0].double(), x.double().sum(), rtol=1e-5, atol=1e-5)
    assert all(1 <= counted.count(module) <= 2 * 2 for module in (tl, tl.core))  # launches times sets of modules
    assert tl.load is before
