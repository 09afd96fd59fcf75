"""Orthonormal rows beside a basis: by the kernel where rows are far from dependent, by eigenvectors elsewhere."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from balanced_rep.linalg import _small
from balanced_rep.linalg._small import PAD, has_extension, orthonormalise, padded
from tests.linalg.matrices import normal

BATCH, N = 3, 61  # padded to 64
needs_kernel = pytest.mark.skipif(not has_extension(), reason="the C++ extension is not built")


def basis_of(held: int, batch: int = BATCH) -> Tensor | None:
    """Rows of a buffer with room for more, as in a Krylov space."""
    if held == 0:
        return None
    room = torch.full((batch, held + 5, N + -N % PAD), torch.nan, dtype=torch.float64)
    Q = torch.linalg.qr(normal(batch, N, held, seed=9)).Q.mT
    room[:, :held] = padded(Q)
    return room[:, :held]


def spare(width: int, batch: int = BATCH) -> Tensor:
    return normal(batch, width, N, seed=77)


def check(rows: Tensor, basis: Tensor | None) -> None:
    gram = rows @ rows.mT
    torch.testing.assert_close(gram, torch.eye(rows.shape[1]).double().expand_as(gram), rtol=0, atol=1e-13)
    assert not rows[..., N:].any()
    if basis is not None:
        assert (rows @ basis.mT).abs().max() < 1e-13


def left_over(rows: Tensor, W: Tensor, basis: Tensor | None) -> float:
    """What of W is neither in the basis nor in the rows, of its length."""
    whole = rows if basis is None else torch.cat((basis, rows), 1)
    W = padded(W.double())
    return float(((W - W @ whole.mT @ whole).norm(dim=-1) / W.norm(dim=-1)).max())


@pytest.mark.parametrize("held", [0, 1, 24, 45])
@pytest.mark.parametrize("width", [1, 3, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_orthonormal_and_span_what_is_new(held, width, dtype):
    W, basis = (normal(BATCH, width, N) * 10.0 ** torch.arange(-20, -20 + width)[:, None]).to(dtype), basis_of(held)
    before = W.clone()
    rows = orthonormalise(W, basis, functools.partial(spare, width))
    check(rows, basis)
    assert left_over(rows, W, basis) < 1e-12
    assert torch.equal(W, before)


@pytest.mark.parametrize("share", [1e-3, 1e-5, 1e-6, 1e-9, 0])
@pytest.mark.parametrize("held", [0, 20])
def test_rows_that_are_nearly_in_the_basis_or_nearly_dependent(held, share):
    basis = basis_of(held)
    W = normal(BATCH, 8, N, seed=1) * share
    W += (normal(BATCH, 8, held, seed=2) @ basis[..., :N]) if basis is not None else W.new_ones(8, 1) @ normal(1, N)
    rows = orthonormalise(W, basis, functools.partial(spare, 8))
    check(rows, basis)


@needs_kernel
@pytest.mark.parametrize("bad", ["zero", "twice", "inside", "tiny"])
def test_a_matrix_with_dependent_rows_leaves_its_neighbours_alone(bad, monkeypatch):
    W, basis = normal(BATCH, 8, N), basis_of(16)
    others = orthonormalise(W, basis, functools.partial(spare, 8))
    W[1, 5] = {"zero": 0 * W[1, 5], "twice": W[1, 2], "inside": basis[1, 3, :N], "tiny": 1e-200 * W[1, 2]}[bad]
    asked = []

    def drawn() -> Tensor:
        asked.append(bad)
        return spare(8)

    rows = orthonormalise(W, basis, drawn)
    check(rows, basis)
    assert asked == [bad]
    assert torch.equal(rows[0], others[0])
    assert torch.equal(rows[2], others[2])
    alone = orthonormalise(W[1:2], basis[1:2], lambda: spare(8)[1:2])
    assert torch.equal(rows[1], alone[0])


@needs_kernel
def test_the_kernel_is_taken_and_agrees_with_eigenvectors(monkeypatch):
    W, basis = normal(BATCH, 8, N), basis_of(30)
    rows = orthonormalise(W, basis, functools.partial(spare, 8))
    with monkeypatch.context() as patch:
        patch.setattr(_small, "eigh_descending", lambda G: pytest.fail("eigenvectors of rows far from dependent"))
        assert torch.equal(orthonormalise(W, basis, functools.partial(spare, 8)), rows)
    monkeypatch.setattr(_small, "_has_cholesky", lambda *_: False)
    other = orthonormalise(W, basis, functools.partial(spare, 8))
    torch.testing.assert_close(rows.mT @ rows, other.mT @ other, rtol=0, atol=1e-12)  # the same span


@needs_kernel
def test_neither_batch_nor_threads_change_a_bit():
    before = torch.get_num_threads()
    W = normal(40, 16, 1024)
    try:
        torch.set_num_threads(1)
        one = orthonormalise(W, None, lambda: W)
        torch.set_num_threads(2)
        assert torch.equal(orthonormalise(W, None, lambda: W), one)
        more = normal(40, 8, 1024, seed=1)
        two = orthonormalise(more, one, lambda: more)
        torch.set_num_threads(1)
        for i in (0, 39):
            assert torch.equal(orthonormalise(more[i : i + 1], one[i : i + 1], lambda: more)[0], two[i])
    finally:
        torch.set_num_threads(before)


def test_not_a_number_is_not_replaced_in_silence():
    W = normal(1, 4, N)
    W[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity have no singular values"):
        orthonormalise(W, None, lambda: W)
