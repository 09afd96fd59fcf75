"""What is done with a matrix: how wide and how many blocks, in which precision, and what is done again."""

from __future__ import annotations

import pytest
import torch

import balanced_rep as br
from balanced_rep.linalg import _plan
from balanced_rep.linalg._small import has_extension
from tests.linalg.matrices import errors, normal, spectrum, with_spectrum

K = 10


def test_low_precision_rounds():
    A = with_spectrum(600, 300, spectrum("slow", 300, K), dtype=torch.float32)
    low, full = br.randomized_svd(A, K, precision="bfloat16"), br.randomized_svd(A, K, precision="full")
    error, best, _ = errors(A, low)
    assert error <= best * (1 + 2e-3)
    assert low.info.rel_error == pytest.approx(float(error), rel=1e-4)
    assert error <= errors(A, full)[0] * (1 + 1e-3)
    assert int(low.info.passes) == 2 * int(low.info.rounds) - 1 + 1
    assert int(full.info.passes) == 2 * int(full.info.rounds) - 1
    assert "bfloat16" in low.info.notes[0]
    assert full.info.notes == ()


def test_low_precision_is_not_chosen_where_it_cannot_reach_tol(monkeypatch):
    monkeypatch.setattr(_plan, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(_plan, "_has_kernel", lambda *_: False)
    A = with_spectrum(600, 500, spectrum("slow", 500, K), dtype=torch.float32)
    for tol, low in ((None, True), (1e-2, True), (1e-5, False)):
        result = br.randomized_svd(A, K, tol=tol)
        assert any("bfloat16" in note for note in result.info.notes) == low
        assert bool(result.info.converged)
    asked = br.randomized_svd(A, K, tol=1e-2, precision="bfloat16")
    assert any("bfloat16" in note for note in asked.info.notes)
    with pytest.raises(ValueError, match=r"precision='bfloat16' cannot tell tol=1e-05 from rounding"):
        br.randomized_svd(A, K, tol=1e-5, precision="bfloat16")
    assert "all rounds in torch.float64" in br.randomized_svd(A.double(), K, precision="bfloat16").info.notes[0]


def test_low_precision_is_not_chosen_where_float32_has_a_kernel(monkeypatch):
    """Found once: on processors with bfloat16 products the rounds went through them, in more time."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name in probes:
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    A = with_spectrum(600, 500, spectrum("slow", 500, K), dtype=torch.float32)
    for matrix, low in ((A, False), (A.mT, False), (A.mT.contiguous(), True), (A.mT.contiguous().mT, True)):
        assert any("bfloat16" in note for note in br.randomized_svd(matrix, K).info.notes) == low
    wide = br.randomized_svd(normal(1200, 1000, dtype=torch.float32), 150)  # wider blocks than the kernel takes
    assert any("bfloat16" in note for note in wide.info.notes)
    wide = br.randomized_svd(A, K, block=80)
    assert any("bfloat16" in note for note in wide.info.notes)
    monkeypatch.setattr(_plan, "missing", lambda module: "not built")
    assert any("bfloat16" in note for note in br.randomized_svd(A, K).info.notes)


def test_blocks_are_narrow_where_products_with_few_vectors_are_as_fast():
    """As many products with vectors in more, narrower blocks: a smaller error. BLAS libraries would take longer."""
    A = with_spectrum(600, 400, spectrum("slow", 400, K), dtype=torch.float32)
    narrow, wide = br.randomized_svd(A, K), br.randomized_svd(A, K, block=16, rounds=5)
    assert int(narrow.info.rounds) == (9 if has_extension() else 5)
    assert errors(A, narrow)[0] <= errors(A, wide)[0]
    for other in (A.double(), A.mT.contiguous().mT):
        assert int(br.randomized_svd(other, K, precision="full").info.rounds) == 5
    assert torch.equal(br.randomized_svd(A, K, tol=1e-2).U, br.randomized_svd(A, K, tol=1e-2, block=16).U)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounds", [5, 30])
def test_more_blocks_than_a_matrix_has_room_for_are_all_of_it(rounds, dtype):
    """Found once: of 30 blocks of 16 columns, one fitted into a matrix of 20, and values were 8 % off."""
    A = normal(40, 20, dtype=dtype)
    result = br.randomized_svd(A, 3, rounds=rounds)
    assert result.info.method in ("gram", "svd")
    torch.testing.assert_close(result.S, torch.linalg.svdvals(A)[:3], rtol=1e-5, atol=0)


@pytest.mark.parametrize("given", [{}, {"block": 16}, {"block": 16, "rounds": 5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_so_do_the_blocks_that_are_taken_by_default(given, dtype):
    """Found once: two blocks of 16 columns stood for five of them in a matrix of 40, and values were 2 % off."""
    A = normal(90, 40, dtype=dtype)
    result = br.randomized_svd(A, 1, oversampling=0, **given)
    torch.testing.assert_close(result.S, torch.linalg.svdvals(A)[:1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("spread", [3e-2, 1e-2, 1e-3, 1e-4, 0])
def test_leading_values_that_are_near_each_other_get_wider_blocks(spread):
    """Found once: nine blocks of 8 columns missed so many of 32 values within 0.1 % that the error doubled."""
    k = 32
    tail = 0.3 * 0.97 ** torch.arange(268).double()
    near = with_spectrum(600, 300, torch.cat([torch.linspace(1 + spread, 1, k).double(), tail]), dtype=torch.float32)
    far = with_spectrum(600, 300, spectrum("slow", 300, k), dtype=torch.float32)
    A = torch.stack([far, near])
    result = br.randomized_svd(A, k)
    best = torch.linalg.svdvals(A.double())[:, k:].norm(dim=-1)
    error = torch.linalg.matrix_norm(A.double() - (result.U.double() * result.S.unsqueeze(-2)) @ result.Vh.double())
    assert (error / best - 1)[1] < 1e-2
    assert result.info.method == "krylov"
    if spread < 3e-2:
        assert any("1 of 2 again in wider blocks" in note for note in result.info.notes)
        assert result.info.passes[1] > result.info.passes[0]
    for i in (0, 1):
        alone = br.randomized_svd(A[i].clone(), k, seed=(0, i))
        assert torch.equal(alone.U, result.U[i])
        assert alone.info.passes == result.info.passes[i]
    asked = br.randomized_svd(near, k, rounds=9, block=8)  # nothing but what was asked for
    assert asked.info.passes == 17
    U, S, V = br.linalg.svd_lowrank(near, k)
    assert torch.linalg.matrix_norm(near.double() - (U.double() * S) @ V.mT.double()) < best[1] * (1 + 1e-2)


def test_low_precision_is_left_where_values_fall_steeply():
    A = torch.stack([
        with_spectrum(300, 200, spectrum("steep", 200, 6), dtype=torch.float32),
        with_spectrum(300, 200, spectrum("poly", 200, 6), dtype=torch.float32),
    ])  # fmt: skip
    low, full = (br.randomized_svd(A, 6, precision=p, block=16) for p in ("bfloat16", "full"))
    assert torch.equal(low.S[0], full.S[0])
    assert not torch.equal(low.S[1], full.S[1])
    assert low.info.passes.tolist() == [9 + 10 + 1, 10]  # a read more, to measure an error below 3e-3
    assert any("1 of 2 again in torch.float32" in note for note in low.info.notes)


def test_low_precision_is_left_where_what_remains_is_small():
    """Found once: beside one large entry bfloat16 lost the rest, and nine times the best error passed for converged."""
    A = normal(399, 144, dtype=torch.float32)
    A[7, 11] = 1e6
    result = br.randomized_svd(A, 1, tol=0.1, precision="bfloat16")
    error, best, _ = errors(A, result)
    assert error <= best * 1.1
    assert any("again in torch.float32" in note for note in result.info.notes)
