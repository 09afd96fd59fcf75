r"""Reverse mode through a truncated SVD, by the formula for the triples themselves and not through the iteration.

With :math:`P = U^T dA\, V`: :math:`d\sigma_i = P_{ii}`; within the span of the triples, for :math:`i \ne j`,

.. math:: (U^T dU)_{ij} = \frac{P_{ij} \sigma_j + \sigma_i P_{ji}}{\sigma_j^2 - \sigma_i^2}, \qquad
          (V^T dV)_{ij} = \frac{\sigma_i P_{ij} + P_{ji} \sigma_j}{\sigma_j^2 - \sigma_i^2},

and outside it :math:`\sigma_i\, du_i - A\, dv_i = dA\, v_i` and :math:`\sigma_i\, dv_i - A^T du_i = dA^T u_i`, both
projected. Dropping the part outside, or differentiating the iteration, is wrong unless A has rank k. That part takes,
for each triple, a linear system with :math:`\sigma_i^2 - A^T A` on the complement of V, which is positive definite
there and is solved by conjugate gradients: two products with A per step, all triples at once.

All of this holds for singular triples. Those of an iteration that was stopped early are mixtures with their neighbours,
and the gradient is wrong by about the angle between the two, which :math:`r_i / \sigma_i` tells to a small factor, with
the residual :math:`r_i` of the side that the iteration did not work on. It is measured, and above 1 % there is a
warning.

Letters: B matrices (m, n); k triples.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from balanced_rep.linalg._dense import dense_svd
from balanced_rep.linalg._plan import Options
from balanced_rep.linalg._result import ConvergenceWarning, SVDResult

__all__ = ["differentiable_svd"]

STEPS = 1000
ACCURATE = 1e-2  # relative residual of a triple up to which its gradient goes without a warning
LARGEST = 1e8  # amplification beyond which a solution is rounding
NO_GAP = (
    "singular values k and k + 1 are too close. Choose another k, or use the gradient of S alone, which needs no gap"
)


def differentiable_svd(A: Tensor, options: Options) -> SVDResult:
    """:func:`dense_svd` of a matrix that requires a gradient.

    Args:
        A: ``(..., m, n)``, real.
        options: Checked arguments.

    Returns:
        Triples that can be differentiated once, and ``info`` that cannot.

    Raises:
        TypeError: If A is complex.
    """
    if A.is_complex():
        raise TypeError("randomized_svd: no gradient of a complex matrix; pass A.detach()")
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    if options.center and A.shape[-2]:
        A, options = A - A.mean(-2, keepdim=True), replace(options, center=False)
    kept: list[SVDResult] = []
    triple = _TruncatedSVD.apply(A, options, kept)
    return SVDResult(*triple, info=kept[0].info)


class _TruncatedSVD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, options: Options, kept: list[SVDResult]) -> tuple[Tensor, ...]:
        result = dense_svd(A.detach(), options)
        kept.append(result)
        ctx.save_for_backward(A, *result)
        ctx.set_materialize_grads(False)
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would let constants through in silence
            raise RuntimeError("randomized_svd: no second derivative; use torch.linalg.svd, or create_graph=False")
        A, U, S, Vh = ctx.saved_tensors
        if all(g is None for g in grads):
            return None, None, None
        gU, gS, gVh = (None if g is None else g.double() for g in grads)
        rounding = 100 * torch.finfo(A.dtype).eps
        A, U, S, V = A.double(), U.double(), S.double(), Vh.mT.double()
        _warn_of_residuals(A, U, S, V, _used(gU, gS, gVh) & (S > rounding * S[..., :1]))
        inner = torch.zeros((*S.shape, S.shape[-1]), dtype=torch.float64, device=S.device)
        if gS is not None:
            inner = inner + torch.diag_embed(gS)
        outer = torch.zeros((), dtype=torch.float64, device=S.device)
        if (gU is not None or gVh is not None) and S.shape[-1]:
            gU = torch.zeros_like(U) if gU is None else gU
            gV = torch.zeros_like(V) if gVh is None else gVh.mT
            inner = inner + _within(U, S, V, gU, gV)
            x, y = _outside(A, U, S, V, gU, gV)
            outer = x @ V.mT + U @ y.mT
        return (U @ inner @ V.mT + outer).to(Vh.dtype), None, None


def _used(gU: Tensor | None, gS: Tensor | None, gVh: Tensor | None) -> Tensor:
    """Triples on which the differentiated number depends, ``(..., k)``."""
    parts = [None if gU is None else gU.abs().sum(-2), gS, None if gVh is None else gVh.abs().sum(-1)]
    return torch.stack([part != 0 for part in parts if part is not None]).any(0)


def _warn_of_residuals(A: Tensor, U: Tensor, S: Tensor, V: Tensor, used: Tensor) -> None:
    rest = A.mT @ U - V * S.unsqueeze(-2) if A.shape[-2] >= A.shape[-1] else A @ V - U * S.unsqueeze(-2)
    relative = torch.linalg.vector_norm(rest, dim=-2) / torch.where(used, S, 1.0) * used
    if bool((relative > ACCURATE).any()):
        warnings.warn(
            f"randomized_svd: a gradient through triples with relative residuals of up to {float(relative.max()):.1g}, "
            "which is about its relative error. Take a smaller tol, more rounds, or fewer of the triples",
            ConvergenceWarning,
            stacklevel=2,
        )


def _within(U: Tensor, S: Tensor, V: Tensor, gU: Tensor, gV: Tensor) -> Tensor:
    """Cotangent of P ``(..., k, k)`` from the rotations within the span."""
    s = S.unsqueeze(-1)
    gap = S.unsqueeze(-2).square() - s.square()  # sigma_j^2 - sigma_i^2
    off = ~torch.eye(S.shape[-1], dtype=torch.bool, device=S.device)
    same = (gap.abs() <= 1e-9 * S[..., :1, None].square()) & off
    if bool(same.any()):
        i, j = (int(v) for v in same.nonzero()[0][-2:])
        raise RuntimeError(
            f"randomized_svd: singular values {i} and {j} coincide, so that their vectors have no derivative; use the "
            "gradient of S, or perturb A"
        )
    F = torch.where(off, 1 / torch.where(off, gap, 1.0), 0.0)
    X, Y = F * (U.mT @ gU), F * (V.mT @ gV)
    return (X + X.mT) * S.unsqueeze(-2) + s * (Y + Y.mT)


def _outside(A: Tensor, U: Tensor, S: Tensor, V: Tensor, gU: Tensor, gV: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of ``dA v_i (..., m, k)`` and ``dA^T u_i (..., n, k)`` from the rotations out of the span."""

    def clear(X: Tensor, Q: Tensor) -> Tensor:
        return X - Q @ (Q.mT @ X)

    gU, gV = clear(clear(gU, U), U), clear(clear(gV, V), V)
    s = S.unsqueeze(-2)
    if bool((s <= 1e-7 * s[..., :1]).any()):
        raise RuntimeError(
            "randomized_svd: A has a lower rank than k; vectors of zero singular values have no derivative"
        )
    right = s * gV + clear(A.mT @ gU, V)
    y = torch.zeros_like(right)
    rest, direction = right, right
    size = rest.square().sum(-2, keepdim=True)
    goal = 1e-20 * size
    for _ in range(STEPS):
        if bool((size <= goal).all()):
            break
        image = s.square() * direction - clear(A.mT @ (A @ direction), V)
        curvature = (direction * image).sum(-2, keepdim=True)
        if bool(((curvature <= 0) & (size > goal)).any()):
            raise RuntimeError(
                f"randomized_svd: the triples are not accurate enough for a gradient of U and V (try a smaller tol), "
                f"or {NO_GAP}"
            )
        active = size > goal
        step = torch.where(active, size / torch.where(active, curvature, 1.0), 0.0)
        y, rest = y + step * direction, rest - step * image
        before, size = size, rest.square().sum(-2, keepdim=True)
        direction = rest + direction * torch.where(active, size / torch.where(active, before, 1.0), 0.0)
    else:
        raise RuntimeError(f"randomized_svd: no gradient of U and V within {STEPS} steps: {NO_GAP}")
    largest = (y.norm(dim=-2) * S[..., :1].square() > torch.linalg.vector_norm(right, dim=-2) * LARGEST).any()
    if bool(largest):
        raise RuntimeError(f"randomized_svd: the gradient of U and V is lost in rounding: {NO_GAP}")
    return (gU + clear(A @ y, U)) / s, y
