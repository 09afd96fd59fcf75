"""Comparison of weights: what the objective leaves free is not seen, everything else is."""

from __future__ import annotations

import math

import pytest
import torch

from balanced_rep.theory import gram_error, match_columns, merge_parallel_columns, principal_angles

F64 = torch.float64


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_split_columns_become_one_again() -> None:
    W = torch.randn(12, 5, dtype=F64, generator=gen(0))
    angles = torch.tensor([0.3, 1.2, 0.7], dtype=F64)
    parts = [W[:, 0] * angles[0].cos(), W[:, 0] * angles[0].sin(), W[:, 1:], torch.zeros(12, 3, dtype=F64)]
    split = torch.cat([p.reshape(12, -1) for p in parts], dim=1)[:, torch.randperm(9, generator=gen(1))]
    merged = merge_parallel_columns(split)
    assert merged.shape == (12, 5)
    torch.testing.assert_close(merged @ merged.T, W @ W.T)
    assert (merged.norm(dim=0).diff() <= 0).all()
    torch.testing.assert_close(merge_parallel_columns(merged), merged)


def test_opposite_columns_stay_apart_and_chains_are_joined() -> None:
    def at(*degrees: float) -> torch.Tensor:
        t = torch.tensor(degrees, dtype=F64).deg2rad()
        return torch.stack([t.cos(), t.sin()])

    assert merge_parallel_columns(at(0, 180)).shape == (2, 2)
    assert merge_parallel_columns(at(0, 10, 20)).shape == (2, 1)  # cos 10 = 0.985, cos 20 = 0.940
    assert merge_parallel_columns(at(0, 20)).shape == (2, 2)
    assert merge_parallel_columns(at(0, 20), cosine=0.9).shape == (2, 1)
    assert merge_parallel_columns(torch.zeros(3, 2)).shape == (3, 0)
    assert merge_parallel_columns(torch.tensor([[1.0, 1e-4]]), dead=1e-3).shape == (1, 1)


def test_gram_error_is_blind_to_rotation_and_sees_the_rest() -> None:
    W = torch.randn(9, 4, dtype=F64, generator=gen(0))
    Q = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=gen(1)))[0]
    assert gram_error(W @ Q, W) < 1e-14
    V = torch.randn(9, 6, dtype=F64, generator=gen(2))
    want = ((W @ W.T - V @ V.T).norm() / (V @ V.T).norm()).item()
    assert gram_error(W, V) == pytest.approx(want, rel=1e-12)
    assert gram_error(1.01 * W, W) == pytest.approx(1.01**2 - 1, rel=1e-10)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, math.pi / 2])
def test_principal_angles(angle: float) -> None:
    e = torch.eye(5, dtype=F64)
    V = torch.stack([e[0], math.cos(angle) * e[1] + math.sin(angle) * e[2]], dim=1)
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=F64, generator=gen(0)))[0]
    got = principal_angles(e[:, :2] @ turn, V * torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(got, torch.tensor([0.0, angle], dtype=F64), rtol=1e-6, atol=1e-15)
    assert principal_angles(torch.cat([V, V], 1), V).shape == (2,)  # rank, not columns


def test_match_gives_each_sample_its_own_column() -> None:
    X = torch.randn(4, 7, dtype=F64, generator=gen(0))
    order = torch.tensor([2, 0, 3, 1])
    W = torch.cat([torch.randn(7, 2, dtype=F64, generator=gen(1)), (2.0 * X[order]).T], dim=1)
    match = match_columns(W, X)
    assert match.column.tolist() == (order.argsort() + 2).tolist()
    torch.testing.assert_close(match.cosine, torch.ones(4, dtype=F64))
    torch.testing.assert_close(match.norm, 2 * X.norm(dim=1))
    few = match_columns(W[:, 2:4], X)
    assert few.column.tolist() == [1, -1, 0, -1]
    assert few.cosine.isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W: merge_parallel_columns(W, cosine=1.0), "cosine must be between 0 and 1, got 1.0"),
        (lambda W: merge_parallel_columns(W / 0), "NaN or infinity"),
        (lambda W: gram_error(W, W.T), "W has 4 rows and V 3"),
        (lambda W: principal_angles(W, W.T), "W has 4 rows and V 3"),
        (lambda W: principal_angles(W, W, k=4), r"from 1 to the ranks \[3, 3\], got 4"),
        (lambda W: match_columns(W, W), "columns have 4 entries and samples 3"),
    ],
)
def test_bad_input_is_refused_with_the_reason(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 3, generator=gen(0)))
