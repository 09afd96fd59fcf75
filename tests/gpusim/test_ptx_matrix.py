"""Matrix instructions against the fragment layouts of the PTX manual, written out element by element."""

import numpy as np
import pytest

from .launch import Buffer, empty
from .ptx_harness import run_body
from .triton_interpreter import bf16_to_f32, f32_to_bf16, truncate_to_tf32

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def fragments_16(matrix: np.ndarray, places: list[list[tuple]]) -> np.ndarray:
    """Return ``(32, registers)`` words: each register holds two elements at (row, column) places."""
    raw = matrix.view(np.uint16)
    words = [[raw[place].astype(np.uint32) for place in pair] for pair in places]
    return np.stack([low | high << np.uint32(16) for low, high in words], 1)


def run_mma(shape: str, types: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Run one mma on one warp; operands are ``(32, registers)`` words."""

    def registers(prefix: str, count: int) -> str:
        return "{" + ", ".join(f"%{prefix}{i}" for i in range(count)) + "}"

    wide = a.dtype == np.uint64
    size, kind = (8, "b64") if wide else (4, "b32")
    names = {"a": (a, 0), "b": (b, 1), "c": (c, 2)}
    body = "".join(f"    .reg .{kind} %{name}<{words.shape[1]}>;\n" for name, (words, _) in names.items())
    body += f"    .reg .{kind} %d<{c.shape[1]}>;\n"
    for name, (words, position) in names.items():
        body += f"    mad.wide.u32 %rd0, %i, {size * words.shape[1]}, %q{position};\n"
        for i in range(words.shape[1]):
            body += f"    ld.global.{kind} %{name}{i}, [%rd0+{size * i}];\n"
    body += f"    mma.sync.aligned.{shape}.row.col.{types} {registers('d', c.shape[1])}, "
    body += ", ".join(registers(name, words.shape[1]) for name, (words, _) in names.items()) + ";\n"
    body += f"    mad.wide.u32 %rd0, %i, {size * c.shape[1]}, %q3;\n"
    body += "".join(f"    st.global.{kind} [%rd0+{size * i}], %d{i};\n" for i in range(c.shape[1]))
    result = run_body(body, [*map(Buffer, (a, b, c)), empty(c.shape, c.dtype)]).check()
    assert result.counters.flops[f"mma.{types.split('.')[1]}"] == 2 * np.prod(
        [int(n) for n in shape[1:].replace("n", " ").replace("k", " ").split()]
    )
    return result.buffers[3]


def normal(*shape):
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_of_halves(kind, depth):
    encode = f32_to_bf16 if kind == "bf16" else (lambda v: v.astype(np.float16))
    widen = bf16_to_f32 if kind == "bf16" else (lambda v: v.astype(np.float32))
    a, b, c = encode(normal(16, depth)), encode(normal(depth, 8) + 1), normal(16, 8)
    a_places = [[(G, 2 * T), (G, 2 * T + 1)], [(G + 8, 2 * T), (G + 8, 2 * T + 1)]]
    b_places = [[(2 * T, G), (2 * T + 1, G)]]
    if depth == 16:
        a_places += [[(G, 2 * T + 8), (G, 2 * T + 9)], [(G + 8, 2 * T + 8), (G + 8, 2 * T + 9)]]
        b_places += [[(2 * T + 8, G), (2 * T + 9, G)]]
    c_places = [(G, 2 * T), (G, 2 * T + 1), (G + 8, 2 * T), (G + 8, 2 * T + 1)]
    c_words = np.stack([c[place] for place in c_places], 1).view(np.uint32)
    d = run_mma(
        f"m16n8k{depth}", f"f32.{kind}.{kind}.f32", fragments_16(a, a_places), fragments_16(b, b_places), c_words
    )
    want = widen(a).astype(np.float64) @ widen(b).astype(np.float64) + c
    for value, place in zip(d.view(np.float32).T, c_places, strict=True):
        np.testing.assert_allclose(value, want[place], rtol=1e-6, atol=1e-6)


def test_mma_with_half_accumulators():
    a, b, c = (normal(*shape).astype(np.float16) for shape in ((16, 16), (16, 8), (16, 8)))
    a_places = [[(G + r, 2 * T + k), (G + r, 2 * T + k + 1)] for k in (0, 8) for r in (0, 8)]
    b_places = [[(2 * T + k, G), (2 * T + k + 1, G)] for k in (0, 8)]
    c_places = [[(G + r, 2 * T), (G + r, 2 * T + 1)] for r in (0, 8)]
    words = [fragments_16(*pair) for pair in ((a, a_places), (b, b_places), (c, c_places))]
    d = run_mma("m16n8k16", "f16.f16.f16.f16", *words).view(np.float16).reshape(32, 2, 2)
    want = a.astype(np.float64) @ b.astype(np.float64) + c
    for row in (0, 1):
        for column in (0, 1):
            np.testing.assert_allclose(d[:, row, column], want[G + 8 * row, 2 * T + column], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("depth", [4, 8])
def test_mma_of_tf32_drops_thirteen_bits(depth):
    a, b, c = normal(16, depth), normal(depth, 8), np.zeros((16, 8), np.float32)
    a_places = [(G + r, T + k) for k in range(0, depth, 4) for r in (0, 8)]
    b_places = [(T + k, G) for k in range(0, depth, 4)]
    c_places = [(G, 2 * T), (G, 2 * T + 1), (G + 8, 2 * T), (G + 8, 2 * T + 1)]
    words = [
        np.stack([matrix[place] for place in places], 1).view(np.uint32)
        for matrix, places in ((a, a_places), (b, b_places), (c, c_places))
    ]
    d = run_mma(f"m16n8k{depth}", "f32.tf32.tf32.f32", *words).view(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    want = truncate_to_tf32(a).astype(np.float64) @ truncate_to_tf32(b).astype(np.float64)
    got = np.zeros_like(c)
    for value, place in zip(d.T, c_places, strict=True):
        got[place] = value
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert 1e-5 < np.abs(got - exact).max() / np.abs(exact).max() < 1e-3


def test_mma_of_doubles():
    a, b, c = (normal(*shape).astype(np.float64) for shape in ((8, 4), (4, 8), (8, 8)))
    words = [a[G, T][:, None], b[T, G][:, None], np.stack([c[G, 2 * T], c[G, 2 * T + 1]], 1)]
    d = run_mma("m8n8k4", "f64.f64.f64.f64", *(np.ascontiguousarray(word).view(np.uint64) for word in words))
    want = a @ b + c
    np.testing.assert_allclose(d.view(np.float64)[:, 0], want[G, 2 * T], rtol=1e-14)
    np.testing.assert_allclose(d.view(np.float64)[:, 1], want[G, 2 * T + 1], rtol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count, transposed):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    names = "{" + ", ".join(f"%r{10 + j}" for j in range(count)) + "}"
    trans = ".trans" if transposed else ""
    stores = "".join(f"    st.global.u32 [%rd1+{4 * j}], %r{10 + j};\n" for j in range(count))
    body = f"""
    mad.wide.u32 %rd0, %i, 16, %q0;
    ld.global.v4.u32 {{%r0, %r1, %r2, %r3}}, [%rd0];
    mov.u32 %r4, tile;
    mad.lo.u32 %r4, %i, 16, %r4;
    st.shared.v4.u32 [%r4], {{%r0, %r1, %r2, %r3}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names}, [%r4];
    mad.wide.u32 %rd1, %i, {4 * count}, %q1;
{stores}"""
    tile = "    .shared .align 16 .b8 tile[512];\n"
    result = run_body(body, [Buffer(matrices), empty((32, count), np.uint32)], locals_=tile).check()
    got = result.buffers[1].view(np.uint16).reshape(32, count, 2)
    for j in range(count):
        matrix = matrices[j].T if transposed else matrices[j]
        np.testing.assert_array_equal(got[:, j, 0], matrix[G, 2 * T])
        np.testing.assert_array_equal(got[:, j, 1], matrix[G, 2 * T + 1])
