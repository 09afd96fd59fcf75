"""The ratios of LAPACK's own SVD tests: residual and orthogonality in units of rounding, over 2280 matrices."""

from __future__ import annotations

import pytest
import torch

import balanced_rep as br
from tests.linalg.matrices import KINDS, lapack_like

# The pairs of LAPACK's svd.in.
SIZES = tuple(zip(
    (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 10, 10, 16, 16, 30, 30, 40, 40),
    (0, 1, 3, 0, 1, 2, 0, 1, 0, 1, 3, 10, 16, 10, 16, 30, 40, 30, 40),
    strict=True,
))  # fmt: skip
THRESHOLD = 30
DTYPES = (torch.float32, torch.float64, torch.complex64)
# name: (share of the singular values, keyword arguments)
METHODS = {
    "all": (1.0, {}),
    "half": (0.5, {}),
    "krylov": (0.5, {"block": 3, "rounds": 3}),
    "krylov to tol": (0.3, {"block": 2, "tol": 0.5}),
    "krylov, everything": (1.0, {"block": 4, "rounds": 10}),
}


def ratios(A: torch.Tensor, result: br.linalg.SVDResult) -> dict[str, float]:
    """``|A V - U S|``, ``|A - U S Vh|`` where complete, and deviations from orthonormality, over what rounding
    explains.

    A V = U S holds whether or not the iteration has converged; of wide matrices, A^H U = V S.
    """
    wide = torch.complex128 if A.is_complex() else torch.float64
    U, S, Vh = (X.to(wide) for X in result)
    unit = torch.finfo(A.dtype).eps * max(*A.shape, 1)
    scale = A.to(wide).abs().max().clamp_min(1e-300) if A.numel() else 1.0  # squares of 1e200 leave the range
    A, S = A.to(wide) / scale, S / scale
    size = torch.linalg.matrix_norm(A, 2).clamp_min(1e-300) if A.numel() else torch.tensor(1.0)
    tall = A.shape[0] >= A.shape[1]
    one = torch.eye(S.shape[-1], dtype=wide)
    found = {
        "residual": torch.linalg.matrix_norm(A @ Vh.mH - U * S if tall else A.mH @ U - Vh.mH * S) / size,
        "left": torch.linalg.matrix_norm(U.mH @ U - one),
        "right": torch.linalg.matrix_norm(Vh @ Vh.mH - one),
    }
    if S.shape[-1] == min(A.shape):
        found["whole"] = torch.linalg.matrix_norm(A - (U * S) @ Vh) / size
    return {name: float(value) / unit for name, value in found.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("method", METHODS)
def test_ratios(method, dtype):
    share, options = METHODS[method]
    checked = 0
    for i, (m, n) in enumerate(SIZES):
        for kind in KINDS:
            A = lapack_like(kind, m, n, seed=i, dtype=dtype)
            k = -(-int(10 * share) * min(m, n) // 10)
            result = br.randomized_svd(A, k, **options)
            checked += 1
            assert [tuple(X.shape) for X in result] == [(m, k), (k,), (k, n)]
            assert bool((result.S[1:] <= result.S[:-1]).all())
            assert bool((result.S >= 0).all())
            for name, ratio in ratios(A, result).items():
                assert ratio < THRESHOLD, f"{method}, {kind}, {m} x {n}: {name} ratio {ratio:.3g}"
    assert checked == len(SIZES) * len(KINDS)  # 152, times 3 dtypes and 5 methods: 2280


@pytest.mark.parametrize("kind", ["zero", "identity", "clustered", "deficient", "duplicates"])
@pytest.mark.parametrize("n", [16, 40])
def test_random_rows_in_the_room_that_is_left(n, kind):
    """Found once: where the last directions are random ones, the orthogonality of Vh depended on the seed."""
    A = lapack_like(kind, n, n, seed=0, dtype=torch.float64)
    for seed in range(8):
        found = ratios(A, br.randomized_svd(A, n, block=4, rounds=10, seed=seed))
        assert max(found.values()) < THRESHOLD, f"seed {seed}: {found}"
