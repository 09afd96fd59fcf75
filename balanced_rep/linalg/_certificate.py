r"""What is known of the error of a decomposition, from what was computed anyway or from a little more.

Three ways, by what a matrix allows. *Difference*: with V orthonormal and S from A V in full precision,
:math:`\|A - U S V^H\|^2 = \|A\|^2 - \sum s_i^2`, free of cost, until it drowns in the rounding of both terms.
*Measured*: the difference itself, entry by entry, for matrices that the first way says are reproduced to three digits
and more. *Probes*: for operators of unknown norm; p Gaussian vectors g that no step which chooses anything has seen.
Their mean q of
:math:`\|(A - U S V^H) g\|^2` estimates the squared error E without bias, and :math:`P(q \le \tau E) \le \exp(\tfrac p2
(1 - \tau + \ln \tau))` (Chernoff's bound for a weighted sum of chi-squares, largest for a single weight). :math:`\tau`
is chosen so that this is 1e-3; as :math:`\|A\|^2 = \sum s_i^2 + E`, a bound on E bounds the relative error.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from balanced_rep.linalg._matrix import Dense
from balanced_rep.linalg._small import double, product, real, squares

__all__ = ["PROBES", "by_difference", "by_probes", "certified", "concentration", "lower_tail"]

PROBES = 10
TIGHT = 64  # eps of float32 in the share of the error, from which on norms alone tell it
CONCENTRATED = 10  # times that, where one entry of every image holds the energy: nothing averages its rounding
RISK = 1e-3  # that a bound from probes does not hold


def by_difference(
    norm_squared: Tensor, S: Tensor, dtype: torch.dtype, amplified: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Relative error in the Frobenius norm from norms alone, and whether it is tight.

    Both terms are float64 sums over products that were rounded to ``dtype``. Their errors mostly cancel in large
    matrices; in small ones one eps of the sum can be left, which is 0.8 % of the error where the share is 64 eps.
    Below that the result is an upper bound.

    Args:
        norm_squared: Squared norms ``(B,)``.
        S: Singular values ``(B, k)``.
        dtype: Precision of the last pass.
        amplified: Factors ``(B,)`` by which the norms are less accurate than that.

    Returns:
        Errors, float64 ``(B,)``, and flags ``(B,)``.
    """
    share = 1 - S.square().sum(-1) / torch.where(norm_squared > 0, norm_squared, 1.0)
    share = torch.where(norm_squared > 0, share.clamp_min(0), 0.0)
    eps = torch.finfo(dtype).eps * (torch.ones_like(share) if amplified is None else amplified)
    tight = (share >= TIGHT * eps) | (norm_squared == 0)
    return torch.where(tight, share, share + 8 * eps).sqrt(), tight


def concentration(norm_squared: Tensor, S: Tensor, Uh: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Factors by which norms are less accurate, for matrices most of whose energy is in one row of the long side.

    Args:
        norm_squared: Squared norms ``(B,)``.
        S: Singular values ``(B, k)``.
        Uh: Left vectors ``(B, k, long)``.
        dtype: Precision of the last pass.

    Returns:
        Factors ``(B,)``, or None where they would not matter.
    """
    energy = S.square()
    if bool((norm_squared - energy.sum(-1) > (1 + CONCENTRATED) * TIGHT * torch.finfo(dtype).eps * norm_squared).all()):
        return None
    held = (squares(Uh) * energy.unsqueeze(-1)).sum(-2).amax(-1) if S.shape[-1] else torch.zeros_like(norm_squared)
    return 1 + CONCENTRATED * held / torch.where(norm_squared > 0, norm_squared, 1.0)


@functools.cache
def lower_tail(p: int) -> float:
    """Tau for p probes: with probability RISK their mean is below it, in units of what it estimates."""
    low, high = 0.0, 1.0
    for _ in range(60):
        tau = (low + high) / 2
        below = tau <= 0 or p / 2 * (1 - tau + math.log(tau)) < math.log(RISK)
        low, high = (tau, high) if below else (low, tau)
    return low


def by_probes(images: Tensor, approximations: Tensor, S: Tensor) -> Tensor:
    """Upper bound of the relative error, with probability 0.999.

    Args:
        images: Images of p Gaussian vectors, rows ``(B, p, m)``.
        approximations: What the decomposition makes of the same vectors.
        S: Singular values ``(B, k)``.

    Returns:
        Bounds, float64 ``(B,)``.
    """
    bound = (images - approximations).abs().square().sum((-2, -1)) / (images.shape[1] * lower_tail(images.shape[1]))
    whole = S.square().sum(-1) + bound
    return torch.where(whole > 0, bound / torch.where(whole > 0, whole, 1.0), 0.0).sqrt()


def certified(
    M: Dense, Uh: Tensor, S: Tensor, Vh: Tensor, error: Tensor, tight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Measures the error where the other certificate is not tight, in double precision.

    Args:
        M: The matrices.
        Uh: Left vectors as they are returned, rows ``(B, k, long)``.
        S: Singular values ``(B, k)``.
        Vh: Right vectors ``(B, k, short)``.
        error: Relative errors so far, ``(B,)``.
        tight: Which of them are tight.

    Returns:
        Errors, which of them are tight, and reads of M that were added ``(B,)``.
    """
    extra = torch.zeros_like(error, dtype=torch.int64)
    if bool(tight.all()):
        return error, tight, extra
    index = (~tight).nonzero().squeeze(-1)
    wide = double(M.dtype)
    U, SVh = Uh[index].to(wide).mH, S[index].to(real(wide)).unsqueeze(-1) * Vh[index].to(wide)
    part, at = M.select(index), 0
    rest, whole = (torch.zeros(len(index), dtype=torch.float64, device=M.device) for _ in range(2))
    for panel in part.panels():
        panel = panel[..., : M.short]
        approximation = product(U[:, at : at + panel.shape[1]], SVh)
        # Both at once, a dim at a time: a sum that is alone torch splits over threads, and rounds differently.
        parts = torch.stack([squares(panel - approximation), squares(panel)]).sum(-1).sum(-1)
        rest, whole = rest + parts[0], whole + parts[1]
        at += panel.shape[1]
    measured = (rest / torch.where(whole > 0, whole, 1.0)).sqrt()
    rounding = 4 * torch.finfo(torch.float64).eps * (M.short + S.shape[-1]) ** 0.5
    sure = measured >= 100 * rounding
    measured = torch.where(sure | (whole == 0), measured, measured + rounding)
    flags = tight.index_copy(0, index, sure | (whole == 0))
    return error.index_copy(0, index, measured), flags, extra.index_fill(0, index, 1)
