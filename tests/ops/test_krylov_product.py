"""krylov_product on every instruction set: shapes, layouts, one product at a time, batches and threads bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import balanced_rep as br
from balanced_rep.kernels import _supports
from balanced_rep.ops import _cpp, krylov_product
from balanced_rep.ops.krylov_product import krylov_product_reference

# Rows around a tile (4 to 24), a panel (12 to 96) and a chunk (480); columns around a tile and a block of them (512).
SHAPES = [(1, 1), (5, 3), (97, 13), (480, 6), (481, 25), (1301, 70), (200, 520), (12, 1100)]
WIDTHS = [1, 3, 8, 16, 17, 33, 64]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layouts(rows: int, columns: int) -> dict[str, Tensor]:
    m = draw(2, rows, columns).float()
    return {
        "rows": m,
        "columns": m.mT.contiguous().mT,
        "gaps": torch.nn.functional.pad(m, (1, 3))[..., 1:-3],
        "one, repeated": m[:1].expand(2, -1, -1),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_width_and_layout(isa, shape):
    rows, columns = shape
    for layout, m in layouts(rows, columns).items():
        for b in WIDTHS:
            v = draw(2, b, columns, seed=b)
            with br.backend("cpp"):
                got = krylov_product(m, v)
            for name, value, want in zip("ZW", got, krylov_product_reference(m, v), strict=True):
                error = (value - want).abs().max() / want.abs().max()
                assert error < 3e-6, f"{name}, {layout}, {b} vectors"


def test_one_product_at_a_time_is_bit_for_bit_the_same(isa):
    m, v = draw(2, 700, 90).float(), draw(2, 20, 90)
    Z, W = krylov_product(m, v)
    alone = torch.full_like(Z, torch.nan)
    _cpp.thin_products(m, v, alone, None)
    assert torch.equal(alone, Z)
    second = torch.full_like(W, torch.nan)
    _cpp.thin_products(m, None, Z, second)
    assert torch.equal(second, W)
    room = torch.full((2, 32, 708), torch.nan, dtype=torch.float64)
    _cpp.thin_products(m, v, room[:, 5:25, :700], None)
    assert torch.equal(room[:, 5:25, :700], Z)
    assert int((~room.isnan()).sum()) == Z.numel()


def test_neither_batch_nor_threads_change_a_bit(isa):
    m, v = draw(5, 1500, 70).float(), draw(5, 16, 70)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        Z, W = krylov_product(m, v)
        torch.set_num_threads(3)
        again = krylov_product(m, v)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again[0], Z)
    assert torch.equal(again[1], W)
    for i in range(5):
        one = krylov_product(m[i : i + 1].clone(), v[i : i + 1].clone())
        assert torch.equal(one[0][0], Z[i])
        assert torch.equal(one[1][0], W[i])


def test_a_nan_stays_in_its_matrix(isa):
    m, v = draw(3, 50, 20).float(), draw(3, 4, 20)
    m[1, 7, 3] = torch.nan
    Z, W = krylov_product(m, v)
    assert Z[1, :, 7].isnan().all()
    assert int(Z.isnan().sum()) == 4
    assert torch.equal(W.isnan().any(-1).any(-1), torch.tensor([False, True, False]))


@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 0, 2), (2, 5, 3, 0)], ids=str)
def test_nothing_to_multiply(shape):
    batch, rows, columns, b = shape
    for name in ("cpp", "reference"):
        with br.backend(name):
            Z, W = krylov_product(torch.zeros(batch, rows, columns), draw(batch, b, columns))
        assert Z.shape == (batch, b, rows)
        assert W.shape == (batch, b, columns)
        assert not Z.any()
        assert not W.any()


def test_what_the_kernel_does_not_take():
    m, v = draw(2, 30, 20).float(), draw(2, 4, 20)
    assert "float32" in str(_supports.cpp_krylov_product(m.double(), v))
    assert "65 vectors" in str(_supports.cpp_krylov_product(m, draw(2, 65, 20)))
    strided = draw(2, 60, 40).float()[:, ::2, ::2]
    assert "in one piece" in str(_supports.cpp_krylov_product(strided, v))
    Z, W = krylov_product(strided, v)  # by the reference
    torch.testing.assert_close(Z, v @ strided.double().mT)
    torch.testing.assert_close(W, Z @ strided.double())
    with pytest.raises(TypeError, match="float32 and float64 are needed"):
        krylov_product(m, v.float())
    with pytest.raises(ValueError, match=r"expected are \(B, rows, columns\)"):
        krylov_product(m, v[:1])


def test_negated_views(isa):
    """In memory they are not negated, and the kernel reads memory."""
    x, v = draw(2, 20, 30).float(), draw(2, 4, 20)
    m = torch.complex(torch.zeros_like(x), x).mH.imag
    assert m.is_neg()
    with br.backend("cpp" if 1 in m.stride()[1:] else None):
        Z, _ = krylov_product(m, v)
    torch.testing.assert_close(Z, -v @ x.double(), rtol=1e-5, atol=1e-5)


def test_vmap_is_a_batch():
    m, v = draw(3, 2, 40, 30).float(), draw(2, 4, 30)
    Z, W = torch.vmap(krylov_product, in_dims=(0, None))(m, v)
    want = krylov_product(m.flatten(0, 1), v.repeat(3, 1, 1))
    assert torch.equal(Z.flatten(0, 1), want[0])
    assert torch.equal(W.flatten(0, 1), want[1])


# Rows around a tile (3 and 6) and a piece of them (24), inner sizes around a piece (512), columns around 4, 48 and 192.
DOUBLES = [(1, 1, 1), (5, 0, 3), (6, 13, 4), (7, 512, 9), (25, 1030, 16), (16, 40, 200), (3, 7, 197), (64, 100, 50)]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", DOUBLES, ids=str)
def test_products_of_doubles(isa, shape, transposed):
    rows, inner, columns = shape
    x, y = draw(3, rows, inner), draw(3, inner, columns, seed=1)
    given = y.mT.contiguous() if transposed else y
    room = torch.full((3, rows + 2, columns + 5), torch.nan, dtype=torch.float64)
    out = room[:, 1:-1, 2:-3]
    _cpp.double_products(x, given, out, transposed=transposed)
    torch.testing.assert_close(out, x @ y, rtol=0, atol=1e-13 * max(inner, 1))
    assert int((~room.isnan()).sum()) == out.numel()
    alone = torch.empty(1, rows, columns, dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        _cpp.double_products(x[2:], given[2:], alone, transposed=transposed)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], out[2])
    if not transposed:
        _cpp.double_products(x, given, out, transposed=False, add=True)
        torch.testing.assert_close(out, 2 * (x @ y), rtol=0, atol=2e-13 * max(inner, 1))


def test_products_of_doubles_take_strides(isa):
    x, y = draw(2, 20, 90)[:, 3:17, 5:60], draw(2, 70, 80)[:, 4:59, 1:-2]
    out = torch.empty(2, 14, 77, dtype=torch.float64)
    _cpp.double_products(x, y, out, transposed=False)
    torch.testing.assert_close(out, x @ y)
    _cpp.double_products(x, y[:1].mT.contiguous().expand(2, -1, -1), out, transposed=True)
    torch.testing.assert_close(out, x @ y[:1])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 16), (300, 700), (2, 200_000)], ids=str)
def test_survey(isa, shape):
    m = torch.nn.functional.pad(draw(3, *shape).float(), (1, 2), value=torch.nan)[..., 1:-2]
    m[1, 0, 0] = -3e38
    m[2] *= 1e-40  # subnormal: their squares are no floats
    found = _cpp.survey(m)
    torch.testing.assert_close(found[:, 0], m.double().square().sum((-2, -1)), rtol=1e-13, atol=0)
    assert torch.equal(found[:, 1], m.double().abs().amax((-2, -1)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(_cpp.survey(m[1:2])[0], found[1])
    finally:
        torch.set_num_threads(before)
    for bad in (torch.nan, torch.inf, -torch.inf):
        m[0, -1, -1] = bad
        assert torch.equal(_cpp.survey(m)[:, 0].isfinite(), torch.tensor([False, True, True]))
