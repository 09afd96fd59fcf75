"""Products with a network's Jacobian and its transpose, as the search for singular triples takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from balanced_rep.linalg._small import double, padded

__all__ = ["Products"]


class Products:
    """J of B samples by its products, rows in and out, every one counted, checked and in double precision.

    Args:
        forward: ``(B, b, n)`` to ``(B, b, m)``.
        reverse: ``(B, b, m)`` to ``(B, b, n)``.
        shape: ``(B, m, n)``.
        dtype: What they take and give.
        device: Where.
        check_finite: Whether NaN and infinities are refused.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        reverse: Callable[[Tensor], Tensor],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        check_finite: bool,
    ) -> None:
        self._calls = {"forward": forward, "reverse": reverse}
        self.batch, self.m, self.n = shape
        self.dtype, self.device, self._check = dtype, device, check_finite
        self.rounds = self.passes = 0

    def forward(self, rows: Tensor) -> Tensor:
        """``rows J^T``."""
        return self._apply("forward", rows[..., : self.n])

    def reverse(self, rows: Tensor) -> Tensor:
        """``rows J``, by way of unit vectors: rows may be of any size, as images under J are, and leave the dtype."""
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return self._apply("reverse", (rows / torch.where(length > 0, length, 1.0))[..., : self.m]) * length

    def _apply(self, which: str, rows: Tensor) -> Tensor:
        self.rounds += 1
        self.passes += rows.shape[1]
        got = self._calls[which](rows.to(self.dtype))
        if self._check and not bool(got.isfinite().all()):
            bad = int((~got.isfinite().flatten(1).all(-1)).nonzero()[0])
            where = f" of sample {bad}" if self.batch > 1 else ""
            raise ValueError(
                f"jacobian_svd: a {which} product{where} holds NaN or infinity (check_finite=False to go on)"
            )
        return padded(got.to(double(got.dtype)))
