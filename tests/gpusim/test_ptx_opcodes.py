"""Every opcode family against numpy or the formula of the PTX manual, on random and on awkward operands."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest

from . import ptx
from .ptx.types import TYPES
from .ptx_harness import evaluate
from .triton_interpreter import bf16_to_f32, f32_to_bf16

N = 400
AWKWARD_INTEGERS = [0, 1, 2, 3, 31, 32, 33, 63, 64, -1, -2, 0x7FFFFFFF, -0x80000000, 0x0F0F0F0F, 255, 256]
AWKWARD_FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1.5,
    2.5,
    np.inf,
    -np.inf,
    np.nan,
    1e-40,
    -1e-40,
    3e38,
    1e30,
    1e-30,
    65504.0,
]


def integers(kind: str, seed: int, n: int = N) -> np.ndarray:
    dtype = TYPES[kind].dtype
    rng = np.random.default_rng(seed)
    drawn = np.frombuffer(rng.bytes(n * dtype.itemsize), dtype).copy()
    few = np.array(AWKWARD_INTEGERS, np.int64).astype(dtype)
    drawn[: 2 * len(few)] = rng.permutation(np.concatenate([few, few]))
    return drawn


def small(seed: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, N, dtype=np.uint32)


def floats(kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal(N) * 10.0 ** rng.integers(-6, 6, N)
    few = np.array(AWKWARD_FLOATS)
    drawn[: 2 * len(few)] = rng.permutation(np.concatenate([few, few]))
    if kind == "bf16":
        return f32_to_bf16(drawn.astype(np.float32))
    with np.errstate(over="ignore"):
        return drawn.astype({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind])


def same_floats(got: np.ndarray, want: np.ndarray) -> None:
    """Compare bit by bit, but for the payload of NaN."""
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    size = want.dtype.itemsize
    np.testing.assert_array_equal(got[~nan].view(f"u{size}"), want[~nan].view(f"u{size}"))


# ------------------------------------------------------------------------------------------------------ integers

BINARY = {
    "add": lambda x, y, bits: x + y,
    "sub": lambda x, y, bits: x - y,
    "mul.lo": lambda x, y, bits: x * y,
    "mul.hi": lambda x, y, bits: (x * y) >> bits,
    "min": lambda x, y, bits: min(x, y),
    "max": lambda x, y, bits: max(x, y),
    "div": lambda x, y, bits: -1 if y == 0 else int(Fraction(x, y)),
    "rem": lambda x, y, bits: x if y == 0 else x - y * int(Fraction(x, y)),
}


def wrap(values: list[int], dtype: np.dtype) -> np.ndarray:
    bits = 8 * dtype.itemsize
    return np.array([value & ((1 << bits) - 1) for value in values], f"u{dtype.itemsize}").view(dtype)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", BINARY)
def test_integer_arithmetic(name, kind):
    x, y = integers(kind, 1), integers(kind, 2)
    got = evaluate(f"{name}.{kind} %out, %a, %b;", [(kind, x), (kind, y)], kind).view(x.dtype)
    want = [BINARY[name](int(a), int(b), TYPES[kind].bits) for a, b in zip(x, y, strict=True)]
    np.testing.assert_array_equal(got, wrap(want, x.dtype))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind):
    x, y = integers(kind, 1), integers(kind, 2)
    wide = TYPES[kind].wide
    z = integers(wide.name, 3)
    got = evaluate(f"mul.wide.{kind} %out, %a, %b;", [(kind, x), (kind, y)], wide.name).view(wide.dtype)
    np.testing.assert_array_equal(got, x.astype(wide.dtype) * y.astype(wide.dtype))
    got = evaluate(f"mad.wide.{kind} %out, %a, %b, %c;", [(kind, x), (kind, y), (wide.name, z)], wide.name)
    np.testing.assert_array_equal(got.view(wide.dtype), x.astype(wide.dtype) * y.astype(wide.dtype) + z)


@pytest.mark.parametrize("half", ["lo", "hi"])
@pytest.mark.parametrize("kind", ["u32", "s32", "u64"])
def test_mad(kind, half):
    x, y, z = (integers(kind, seed) for seed in (1, 2, 3))
    got = evaluate(f"mad.{half}.{kind} %out, %a, %b, %c;", [(kind, x), (kind, y), (kind, z)], kind).view(x.dtype)
    shift = TYPES[kind].bits if half == "hi" else 0
    want = [((int(a) * int(b)) >> shift) + int(c) for a, b, c in zip(x, y, z, strict=True)]
    np.testing.assert_array_equal(got, wrap(want, x.dtype))


def test_carry_chains():
    x, y = integers("u64", 1), integers("u64", 2)
    split = "mov.b64 {%r0, %r1}, %a; mov.b64 {%r2, %r3}, %b;"
    for add, sign in (("add", 1), ("sub", -1)):
        text = f"{split} {add}.cc.u32 %r4, %r0, %r2; {add}c.u32 %r5, %r1, %r3; mov.b64 %out, {{%r4, %r5}};"
        got = evaluate(text, [("u64", x), ("u64", y)], "u64")
        np.testing.assert_array_equal(got, x + y if sign == 1 else x - y)
    text = (
        f"{split} mul.lo.u32 %r4, %r0, %r2; mul.hi.u32 %r5, %r0, %r2;"
        " mad.lo.cc.u32 %r6, %r0, %r3, %r5; madc.hi.u32 %r7, %r0, %r3, 0; mov.b64 %out, {%r6, %r7};"
    )
    got = evaluate(text, [("u64", x), ("u64", y)], "u64")
    low = x & np.uint64(0xFFFFFFFF)
    want = [
        int(a) * (int(b) >> 32) + ((int(a) * (int(b) & 0xFFFFFFFF)) >> 32) & (1 << 64) - 1
        for a, b in zip(low, y, strict=True)
    ]
    np.testing.assert_array_equal(got, np.array(want, np.uint64))


def test_saturating_add():
    x, y = integers("s32", 1), integers("s32", 2)
    got = evaluate("add.sat.s32 %out, %a, %b;", [("s32", x), ("s32", y)], "s32").view(np.int32)
    np.testing.assert_array_equal(got, np.clip(x.astype(np.int64) + y, -(2**31), 2**31 - 1))


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic(kind):
    x, y = integers(kind, 1), integers(kind, 2)
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        got = evaluate(f"{name}.{kind} %out, %a, %b;", [(kind, x), (kind, y)], kind)
        np.testing.assert_array_equal(got, function(x, y))
    np.testing.assert_array_equal(evaluate(f"not.{kind} %out, %a;", [(kind, x)], kind), ~x)
    np.testing.assert_array_equal(evaluate(f"cnot.{kind} %out, %a;", [(kind, x)], kind), (x == 0).astype(x.dtype))


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0xCA, 0x1B, 0xFF])
def test_lop3(table):
    values = [integers("b32", seed) for seed in (1, 2, 3)]
    got = evaluate(f"lop3.b32 %out, %a, %b, %c, {table};", [("b32", value) for value in values], "b32")
    bits = [np.unpackbits(value.view(np.uint8)).astype(int) for value in values]
    want = np.packbits((table >> (4 * bits[0] + 2 * bits[1] + bits[2])) & 1).view(np.uint32)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u32", "s16", "s32", "s64"])
def test_shifts(kind):
    x, by, bits = integers(kind, 1), small(2, 80), TYPES[kind].bits
    if kind.startswith("b"):
        got = evaluate(f"shl.{kind} %out, %a, %b;", [(kind, x), ("u32", by)], kind).view(x.dtype)
        want = [int(a) << int(n) if n < bits else 0 for a, n in zip(x, by, strict=True)]
        np.testing.assert_array_equal(got, wrap(want, x.dtype))
    got = evaluate(f"shr.{kind} %out, %a, %b;", [(kind, x), ("u32", by)], kind).view(x.dtype)
    np.testing.assert_array_equal(got, wrap([int(a) >> int(n) for a, n in zip(x, by, strict=True)], x.dtype))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("side", ["l", "r"])
def test_funnel_shift(side, mode):
    low, high, by = integers("u32", 1), integers("u32", 2), small(3, 70)
    text = f"shf.{side}.{mode}.b32 %out, %a, %b, %c;"
    got = evaluate(text, [("u32", low), ("u32", high), ("u32", by)], "u32")
    want = []
    for a, b, n in zip(low.tolist(), high.tolist(), by.tolist(), strict=True):
        n = n & 31 if mode == "wrap" else min(n, 32)
        pair = b << 32 | a
        want.append((pair >> n if side == "r" else pair << n >> 32) & 0xFFFFFFFF)
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(kind):
    x, start, count = integers(kind, 1), small(2, 70), small(3, 70)
    bits = TYPES[kind].bits
    got = evaluate(f"bfe.{kind} %out, %a, %b, %c;", [(kind, x), ("u32", start), ("u32", count)], kind).view(x.dtype)
    want = []
    for value, p, n in zip(x.tolist(), start.tolist(), count.tolist(), strict=True):
        raw = value & ((1 << bits) - 1)
        sign = raw >> min(p + n - 1, bits - 1) & 1 if kind[0] == "s" and n > 0 else 0
        field = [raw >> p + i & 1 if p + i < bits and i < n else sign for i in range(bits)]
        want.append(sum(bit << i for i, bit in enumerate(field)))
    np.testing.assert_array_equal(got, wrap(want, x.dtype))


def test_bit_field_insert():
    x, y, start, count = integers("b32", 1), integers("b32", 2), small(3, 40), small(4, 40)
    got = evaluate("bfi.b32 %out, %a, %b, %c, %d;", [("b32", x), ("b32", y), ("u32", start), ("u32", count)], "b32")
    want = []
    for a, b, p, n in zip(x.tolist(), y.tolist(), start.tolist(), count.tolist(), strict=True):
        mask = (((1 << n) - 1) << p) & 0xFFFFFFFF
        want.append((a << p & mask) | (b & ~mask))
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


def test_permute_bytes():
    x, y, selector = integers("b32", 1), integers("b32", 2), integers("b32", 3)
    got = evaluate("prmt.b32 %out, %a, %b, %c;", [("b32", x), ("b32", y), ("b32", selector)], "b32")
    want = []
    for a, b, s in zip(x.tolist(), y.tolist(), selector.tolist(), strict=True):
        source = struct.pack("<II", a, b)
        picked = [source[s >> 4 * i & 7] for i in range(4)]
        signed = [(255 if byte & 128 else 0) if s >> 4 * i & 8 else byte for i, byte in enumerate(picked)]
        want.append(int.from_bytes(bytes(signed), "little"))
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_bit_counts(kind):
    x, bits = integers(kind, 1), TYPES[kind].bits
    words = [format(value, f"0{bits}b") for value in x.tolist()]
    got = evaluate(f"popc.{kind} %out, %a;", [(kind, x)], "u32")
    np.testing.assert_array_equal(got, [word.count("1") for word in words])
    got = evaluate(f"clz.{kind} %out, %a;", [(kind, x)], "u32")
    np.testing.assert_array_equal(got, [bits - len(word.lstrip("0")) for word in words])
    got = evaluate(f"brev.{kind} %out, %a;", [(kind, x)], kind)
    np.testing.assert_array_equal(got, np.array([int(word[::-1], 2) for word in words], x.dtype))
    got = evaluate(f"bfind.u{bits} %out, %a;", [(kind, x)], "u32")
    np.testing.assert_array_equal(got, [len(word.lstrip("0")) - 1 & 0xFFFFFFFF for word in words])


# -------------------------------------------------------------------------------------------------------- floats


@pytest.mark.parametrize("kind", ["f16", "f32", "f64"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_float_arithmetic(name, kind):
    if (name, kind) == ("div", "f16"):
        pytest.skip("PTX has no f16 division")
    x, y = floats(kind, 1), floats(kind, 2)
    rounding = ".rn" if name == "div" else ""
    got = evaluate(f"{name}{rounding}.{kind} %out, %a, %b;", [(kind, x), (kind, y)], kind).view(x.dtype)
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name]
    with np.errstate(all="ignore"):
        same_floats(got, function(x, y))


def exact_fma(x: float, y: float, z: float, bits: int) -> float:
    """Round the exact x y + z once, by rational arithmetic."""
    if not all(map(math.isfinite, (x, y, z))):
        return float(np.float64(x) * y + z)
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact == 0:
        return x * y + z
    if bits == 64:
        return float(exact)  # Fraction to float rounds once
    # float32: round to odd at 60 bits of mantissa is finer than float64, so go through integers
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    step = Fraction(2) ** max(exponent - 24, -149 - 1)
    candidates = [Fraction(math.floor(exact / step) + i) * step for i in (-2, -1, 0, 1, 2)]
    rounded = [np.float32(float(candidate)) for candidate in candidates]
    distance = [abs(Fraction(float(value)) - exact) if np.isfinite(value) else Fraction(10) ** 60 for value in rounded]
    best = min(distance)
    ties = {float(value) for value, away in zip(rounded, distance, strict=True) if away == best}
    even = [value for value in ties if not np.float32(value).view(np.uint32) & 1]
    return (even or list(ties))[0]


def test_fma_f32_rounds_once():
    rng = np.random.default_rng(5)
    x, y, z = (rng.standard_normal(N).astype(np.float32) for _ in range(3))
    z[:100] = -x[:100] * y[:100]  # cancellation leaves the rounding error of the product
    # sums half way between two float32 values but for a term beyond float64's precision
    x[100:104] = [1 + 2**-23, 1 + 2**-23, 1, 1]
    y[100:104] = [2**-24, -(2**-24), 2**-24, 2**-24]
    z[100:104] = [1, 1, 1, 1 + 2**-23]
    got = evaluate("fma.rn.f32 %out, %a, %b, %c;", [("f32", v) for v in (x, y, z)], "f32").view(np.float32)
    want = np.array([exact_fma(*map(float, row), 32) for row in zip(x, y, z, strict=True)], np.float32)
    np.testing.assert_array_equal(got, want)


def test_fma_f64_rounds_once():
    rng = np.random.default_rng(6)
    x, y, z = (rng.standard_normal(N) for _ in range(3))
    z[:100] = -x[:100] * y[:100]
    got = evaluate("fma.rn.f64 %out, %a, %b, %c;", [("f64", v) for v in (x, y, z)], "f64").view(np.float64)
    want = np.array([exact_fma(*map(float, row), 64) for row in zip(x, y, z, strict=True)])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_halves(kind):
    pairs = [np.stack([floats(kind, seed), floats(kind, seed + 10)], 1) for seed in (1, 2, 3)]
    raw = [np.ascontiguousarray(pair).view(np.uint32)[:, 0] for pair in pairs]
    widen = bf16_to_f32 if kind == "bf16" else (lambda v: v.astype(np.float32))
    x, y, z = (widen(pair).astype(np.float64) for pair in pairs)
    got = evaluate(f"fma.rn.{kind}x2 %out, %a, %b, %c;", [("b32", value) for value in raw], "b32")
    got = got.view(np.uint16).reshape(-1, 2)
    with np.errstate(all="ignore"):
        exact = x * y + z
        if kind == "f16":
            same_floats(got.view(np.float16), exact.astype(np.float16))
        else:  # one rounding: a float32 in between must not decide a tie
            value = bf16_to_f32(got).astype(np.float64)
            nearest = bf16_to_f32(f32_to_bf16(exact.astype(np.float32))).astype(np.float64)
            finite = np.isfinite(nearest) & np.isfinite(value)
            assert (np.abs(value - exact)[finite] <= np.abs(nearest - exact)[finite]).all()
    assert (np.isnan(widen(got.view(np.float16) if kind == "f16" else got)) == np.isnan(exact)).all()


@pytest.mark.parametrize(("z", "want"), [(2.0**-100, 388), (-(2.0**-100), 386), (0.0, 388)])
def test_fma_bf16_rounds_once(z, want):
    """The product 387 / 256 lies half way; a term beyond float64's precision decides, without it the even one wins."""
    x, y, z = (f32_to_bf16(np.float32([value])) for value in (1.5, 129 / 128, z))
    got = evaluate("fma.rn.bf16 %out, %a, %b, %c;", [("bf16", v) for v in (x, y, z)], "bf16")
    assert bf16_to_f32(got)[0] * 256 == want


def test_flush_to_zero():
    x = np.float32([1e-40, -1e-40, 1e-30, 2.0])
    y = np.float32([1.0, 1.0, 1e-10, 0.5])
    got = evaluate("mul.ftz.f32 %out, %a, %b;", [("f32", x), ("f32", y)], "f32").view(np.float32)
    np.testing.assert_array_equal(got.view(np.uint32), np.float32([0.0, -0.0, 0.0, 1.0]).view(np.uint32))
    assert evaluate("mul.f32 %out, %a, %b;", [("f32", x), ("f32", y)], "f32").view(np.float32)[0] == np.float32(1e-40)
    zero = np.zeros(4, np.float32)
    got = evaluate("setp.gt.ftz.f32 %out, %a, %b;", [("f32", x), ("f32", zero)], "pred")
    np.testing.assert_array_equal(got, [False, False, True, True])
    got = evaluate("setp.gt.f32 %out, %a, %b;", [("f32", x), ("f32", zero)], "pred")
    np.testing.assert_array_equal(got, [True, False, True, True])


def test_saturate():
    x = np.float32([-1, 0.25, 7, np.nan])
    got = evaluate("add.sat.f32 %out, %a, 0f00000000;", [("f32", x)], "f32").view(np.float32)
    np.testing.assert_array_equal(got, [0, 0.25, 1, 0])


@pytest.mark.parametrize("kind", ["f16", "f32", "f64"])
def test_min_max(kind):
    x, y = floats(kind, 1), floats(kind, 2)
    for name, drops, keeps in (("min", np.fmin, np.minimum), ("max", np.fmax, np.maximum)):
        got = evaluate(f"{name}.{kind} %out, %a, %b;", [(kind, x), (kind, y)], kind).view(x.dtype)
        np.testing.assert_array_equal(got, drops(x, y))
        if kind != "f64":
            got = evaluate(f"{name}.NaN.{kind} %out, %a, %b;", [(kind, x), (kind, y)], kind).view(x.dtype)
            np.testing.assert_array_equal(got, keeps(x, y))


def test_negative_zero_is_the_smaller_one():
    x, y = np.float32([0.0, -0.0, -0.0]), np.float32([-0.0, 0.0, -0.0])
    for name, want in (("min", [-0.0, -0.0, -0.0]), ("max", [0.0, 0.0, -0.0])):
        got = evaluate(f"{name}.f32 %out, %a, %b;", [("f32", x), ("f32", y)], "f32").view(np.float32)
        same_floats(got, np.float32(want))


@pytest.mark.parametrize("kind", ["f16", "f32", "f64"])
def test_neg_abs_copysign(kind):
    x, y = floats(kind, 1), floats(kind, 2)
    same_floats(evaluate(f"neg.{kind} %out, %a;", [(kind, x)], kind).view(x.dtype), -x)
    same_floats(evaluate(f"abs.{kind} %out, %a;", [(kind, x)], kind).view(x.dtype), np.abs(x))
    if kind != "f16":
        got = evaluate(f"copysign.{kind} %out, %a, %b;", [(kind, x), (kind, y)], kind).view(x.dtype)
        same_floats(got, np.copysign(y, x))


FUNCTIONS = {
    "ex2.approx.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "rcp.approx.f32": lambda x: 1 / x,
    "rcp.rn.f32": lambda x: 1 / x,
    "rcp.rn.f64": lambda x: 1 / x,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
    "sqrt.approx.f32": np.sqrt,
    "sqrt.rn.f32": np.sqrt,
    "sqrt.rn.f64": np.sqrt,
    "sin.approx.f32": np.sin,
    "cos.approx.f32": np.cos,
    "tanh.approx.f32": np.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    kind = name[-3:]
    x = floats(kind, 1)
    x = x[np.abs(x) < 1e4] if name[:3] in {"sin", "cos", "ex2"} else x
    got = evaluate(f"{name} %out, %a;", [(kind, x)], kind).view(x.dtype)
    with np.errstate(all="ignore"):
        same_floats(got, FUNCTIONS[name](x.astype(np.float64)).astype(x.dtype))


def test_fuzz_perturbs_approximate_results_by_a_few_ulp_only():
    x = np.abs(floats("f32", 1))
    x = x[np.isfinite(x) & (x > 1e-5) & (x < 100)]
    exact = np.exp2(x.astype(np.float64))
    got = evaluate("ex2.approx.f32 %out, %a;", [("f32", x)], "f32", options=ptx.Options(fuzz_ulp=2)).view(np.float32)
    error = np.abs(got / exact - 1) / 2.0**-23
    assert 0.5 < error.max() < 2.6
    exact = evaluate("sqrt.rn.f32 %out, %a;", [("f32", x)], "f32", options=ptx.Options(fuzz_ulp=2)).view(np.float32)
    np.testing.assert_array_equal(exact, np.sqrt(x))


@pytest.mark.parametrize(
    ("name", "exact", "low", "high", "relative", "absolute"),
    [
        ("tanh.approx.f32", np.tanh, 0.1, 3, 2.0**-11, 0),
        ("lg2.approx.f32", np.log2, 0.9999, 1.0001, 0, 2.0**-22),
        ("sin.approx.f32", np.sin, 3.14, 3.143, 0, 2.0**-20.5),
        ("cos.approx.f32", np.cos, 40, 50, 0, 2.0**-14.7),
    ],
)
def test_fuzz_reaches_what_the_manual_allows(name, exact, low, high, relative, absolute):
    """These err by more than an ulp or two: tanh everywhere, the others where they are small."""
    x = np.linspace(low, high, N, dtype=np.float32)
    want = exact(x.astype(np.float64))
    got = evaluate(f"{name} %out, %a;", [("f32", x)], "f32", options=ptx.Options(fuzz_ulp=2)).view(np.float32)
    error, allowed = np.abs(got - want), relative * np.abs(want) + absolute
    assert 0.9 * allowed.max() < error.max()
    assert (error <= allowed + 3 * 2.0**-23 * np.abs(want)).all()


# -------------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize("kind", ["u16", "s32", "u32", "s64", "f16", "f32", "f64"])
@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons(name, kind):
    make = floats if kind[0] == "f" else integers
    x, y = make(kind, 1), make(kind, 2)
    y[::3] = x[::3]
    function = getattr(
        np,
        {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal"}.get(
            name, {"gt": "greater", "ge": "greater_equal"}.get(name, "")
        ),
    )
    got = evaluate(f"setp.{name}.{kind} %out, %a, %b;", [(kind, x), (kind, y)], "pred")
    want = function(x, y)
    if kind[0] == "f":
        either = np.isnan(x) | np.isnan(y)
        np.testing.assert_array_equal(got, want & ~either)
        got = evaluate(f"setp.{name}u.{kind} %out, %a, %b;", [(kind, x), (kind, y)], "pred")
        want = want | either
    np.testing.assert_array_equal(got, want)


def test_comparison_with_a_predicate():
    x, y = integers("s32", 1), integers("s32", 2)
    pairs = [("s32", x), ("s32", y)]
    first = x > 0
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        text = f"setp.gt.s32 %p0, %a, 0; setp.lt.{name}.s32 %out|%p1, %a, %b, %p0;"
        np.testing.assert_array_equal(evaluate(text, pairs, "pred"), function(x < y, first))
        text = f"setp.gt.s32 %p0, %a, 0; setp.lt.{name}.s32 %p1|%out, %a, %b, !%p0;"
        np.testing.assert_array_equal(evaluate(text, pairs, "pred"), function(x >= y, ~first))


def test_selections():
    x, y = integers("b32", 1), integers("b32", 2)
    pairs = [("b32", x), ("b32", y)]
    got = evaluate("setp.lt.u32 %p0, %a, %b; selp.b32 %out, %a, %b, %p0;", pairs, "b32")
    np.testing.assert_array_equal(got, np.minimum(x, y))
    got = evaluate("slct.b32.s32 %out, %a, %b, %a;", pairs, "b32")
    np.testing.assert_array_equal(got, np.where(x.view(np.int32) >= 0, x, y))
    got = evaluate("set.lt.u32.u32 %out, %a, %b;", pairs, "b32")
    np.testing.assert_array_equal(got, np.where(x < y, 0xFFFFFFFF, 0))
    got = evaluate("and.pred %out, 1, 0;", pairs, "pred")
    assert not got.any()


@pytest.mark.parametrize("name", ["finite", "infinite", "number", "notanumber", "normal", "subnormal"])
def test_testp(name):
    x = floats("f32", 1)
    got = evaluate(f"testp.{name}.f32 %out, %a;", [("f32", x)], "pred")
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    want = {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "number": ~np.isnan(x),
        "notanumber": np.isnan(x),
        "normal": np.isfinite(x) & ~tiny,
        "subnormal": tiny & (x != 0),
    }[name]
    np.testing.assert_array_equal(got, want)


# -------------------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u16"])
def test_float_to_integer(kind, mode):
    x = floats("f32", 1)
    got = evaluate(f"cvt.{mode}.{kind}.f32 %out, %a;", [("f32", x)], kind).view(TYPES[kind].dtype)
    function = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    limits = np.iinfo(TYPES[kind].dtype)
    want = [0 if np.isnan(v) else int(np.clip(v, -1e30, 1e30)) for v in function(x.astype(np.float64))]
    np.testing.assert_array_equal(got, np.array([min(max(v, limits.min), limits.max) for v in want], got.dtype))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("made", ["f16", "f32", "f64"])
def test_integer_to_float(made, kind):
    x = integers(kind, 1)
    dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[made]
    got = evaluate(f"cvt.rn.{made}.{kind} %out, %a;", [(kind, x)], made).view(dtype)
    with np.errstate(over="ignore"):
        same_floats(got, x.astype(dtype))


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding_to_f32(mode):
    x = floats("f64", 1)
    got = evaluate(f"cvt.{mode}.f32.f64 %out, %a;", [("f64", x)], "f32").view(np.float32)
    finite = np.isfinite(x)
    value, given = got[finite].astype(np.float64), x[finite]
    if mode == "rm":
        assert (value <= given).all()
    elif mode == "rp":
        assert (value >= given).all()
    else:
        assert (np.abs(value) <= np.abs(given)).all()
    assert (np.abs(value - given) <= np.spacing(np.abs(given).astype(np.float32)).astype(np.float64)).all()


@pytest.mark.parametrize(
    ("made", "given"),
    [("f16", "f32"), ("bf16", "f32"), ("f32", "f16"), ("f32", "bf16"), ("f32", "f64"), ("f64", "f32")],
)
def test_float_to_float(made, given):
    x = floats(given, 1)
    rounding = ".rn" if TYPES[made].size < TYPES[given].size else ""
    got = evaluate(f"cvt{rounding}.{made}.{given} %out, %a;", [(given, x)], made)
    wide = bf16_to_f32(x) if given == "bf16" else x
    with np.errstate(over="ignore"):
        if made == "bf16":
            np.testing.assert_array_equal(got[~np.isnan(wide)], f32_to_bf16(wide)[~np.isnan(wide)])
        else:
            dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[made]
            same_floats(got.view(dtype), wide.astype(dtype))


def test_pack_two_halves():
    high, low = floats("f32", 1), floats("f32", 2)
    got = (
        evaluate("cvt.rn.f16x2.f32 %out, %a, %b;", [("f32", high), ("f32", low)], "b32").view(np.float16).reshape(-1, 2)
    )
    with np.errstate(over="ignore"):
        same_floats(got[:, 0], low.astype(np.float16))
        same_floats(got[:, 1], high.astype(np.float16))


def test_tf32_rounds_to_nearest():
    x = np.float32([1 + 2**-11, 1 + 2**-12, -1 - 2**-11, 3.0])
    got = evaluate("cvt.rna.tf32.f32 %out, %a;", [("f32", x)], "b32").view(np.float32)
    np.testing.assert_array_equal(got, np.float32([1 + 2**-10, 1, -1 - 2**-10, 3]))


@pytest.mark.parametrize(
    ("made", "given"), [("s32", "s16"), ("u32", "u16"), ("s64", "s32"), ("u64", "u32"), ("u16", "u32"), ("s16", "s64")]
)
def test_integer_widths(made, given):
    x = integers(given, 1)
    got = evaluate(f"cvt.{made}.{given} %out, %a;", [(given, x)], made).view(TYPES[made].dtype)
    np.testing.assert_array_equal(got, x.astype(TYPES[made].dtype))


def test_integer_saturation():
    x = integers("s32", 1)
    got = evaluate("cvt.sat.s16.s32 %out, %a;", [("s32", x)], "s16").view(np.int16)
    np.testing.assert_array_equal(got, np.clip(x, -(2**15), 2**15 - 1))


def test_moves():
    x, y = integers("b32", 1), integers("b32", 2)
    got = evaluate("mov.b64 %out, {%a, %b};", [("b32", x), ("b32", y)], "b64")
    np.testing.assert_array_equal(got, x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32))
    got = evaluate("mov.b32 {%h0, %h1}, %a; mov.b32 %out, {%h1, %h0};", [("b32", x)], "b32")
    np.testing.assert_array_equal(got, x >> np.uint32(16) | x << np.uint32(16))
    got = evaluate("mov.b32 %out, 0fC0490FDB;", [("b32", x)], "b32").view(np.float32)
    assert (got == np.float32(-np.pi)).all()


def test_immediates():
    x = integers("b64", 1)
    got = evaluate("and.b64 %out, %a, -4294967296;", [("b64", x)], "b64")
    np.testing.assert_array_equal(got, x & np.uint64(0xFFFFFFFF00000000))
    got = evaluate("mov.f64 %out, 0d3FF8000000000000;", [("b64", x)], "f64").view(np.float64)
    assert (got == 1.5).all()


# ------------------------------------------------------------------------------------------- what is not known


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tcgen05.mma %out, %a;", "tcgen05"),
        ("add.rz.f32 %out, %a, %a;", "rz"),
        ("cvt.rz.f16.f32 %h0, %a;", "cvt.rz.f16.f32"),
        ("vadd.u32.u32.u32 %out, %a, %a;", "vadd"),
        ("mov.u32 %out, %smid;", "register %smid"),
        ("max.f32 %out, %a, %a, %a;", "three inputs"),
        ("rcp.approx.ftz.f64 %fd0, %fd1;", "20 bits"),
        (".param .b32 param0; st.param.b32 [param0], %a;", "a function that is not inlined"),
    ],
)
def test_unknown_instructions_are_errors_that_name_them(text, named):
    with pytest.raises(ptx.ExecutionError, match=named.replace(".", r"\.")):
        evaluate(text, [("b32", integers("b32", 1))], "b32")
