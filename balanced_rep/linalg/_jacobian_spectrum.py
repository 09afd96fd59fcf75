r"""What the spectrum of a Jacobian says, from its leading triples and an estimate of the rest.

The squared Frobenius norm is that of the triples, exactly, and an average over random tangents of what is outside of
them (Hutchinson's estimator, deflated as in Hutch++: Meyer, Musco, Musco and Woodruff 2021). Shares of it,
:math:`p_i = s_i^2 / \|J\|_F^2`, give the ranks; where the k triples do not decide them, bounds are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from balanced_rep.linalg._jacobian_svd import is_formed, jacobian_svd
from balanced_rep.linalg._operator import JacobianOperator
from balanced_rep.linalg._plan import as_integer
from balanced_rep.linalg._probes import Estimate, RunningMean
from balanced_rep.linalg._result import SVDResult
from balanced_rep.linalg._small import STREAM_BITS
from balanced_rep.ops import philox_rademacher

__all__ = ["Count", "JacobianSpectrum", "jacobian_spectrum"]

CHUNK = 8  # probes per pass
STREAM = 2**22  # of random numbers, apart from those of the search
PROBE_BITS = 20  # of an item, for the number of the probe


class Count(NamedTuple):
    """A number of singular values.

    Attributes:
        value: The number, or where it is not ``exact`` the least that it can be.
        exact: Whether the triples at hand decide it.
    """

    value: Tensor
    exact: Tensor


@dataclass(frozen=True)
class JacobianSpectrum:
    r"""Summaries of a Jacobian's spectrum; tensors have one number per sample.

    Attributes:
        svd: The leading triples; all of them where the Jacobian is small enough to be formed.
        squared_norm: :math:`\|J\|_F^2` with its standard error.
        stable_rank: :math:`\|J\|_F^2 / s_1^2`.
        effective_rank: Least and greatest value that the exponential of the entropy of the shares can have.
        n90: Values that hold 90 % of the squared norm.
        n95: Values that hold 95 % of it.
        alignment: Magnitude of the cosine between the leading right vector and the reference.
        size: The smaller side of J.
    """

    svd: SVDResult
    squared_norm: Estimate
    stable_rank: Tensor
    effective_rank: tuple[Tensor, Tensor]
    n90: Count
    n95: Count
    alignment: Tensor
    size: int

    def count_above(self, threshold: float) -> Count:
        """Singular values above a threshold.

        Args:
            threshold: Any number.

        Returns:
            Their number.

        Raises:
            ValueError: If it is none.
        """
        if not isinstance(threshold, Real) or math.isnan(threshold):
            raise ValueError(f"threshold={threshold!r}; expected is a number")
        S = self.svd.S
        known = S[..., -1] <= threshold if S.shape[-1] < self.size else torch.ones_like(S[..., 0], dtype=torch.bool)
        return Count((threshold < S).sum(-1), known)

    def energy_rank(self, share: float) -> Count:
        """Leading values that hold this share of the squared norm.

        Args:
            share: Between 0 and 1.

        Returns:
            Their number.

        Raises:
            ValueError: If the share is out of range.
        """
        if not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"share={share!r}; expected is a number above 0 and at most 1")
        return _energy_rank(self.svd.S, self.squared_norm.value, share)


def jacobian_spectrum(
    f: Callable[..., Any],
    x: Tensor,
    k: int = 16,
    *,
    n_probes: int = 32,
    reference: Tensor | None = None,
    **options: Any,
) -> JacobianSpectrum:
    """Leading singular triples of df/dx and summaries of the whole spectrum.

    Args:
        f: Function or module, as in :func:`balanced_rep.jacobian_svd`.
        x: The point.
        k: Triples. Where the Jacobian is formed anyway (n at most 4 (k + 8)), all are taken and everything is exact.
        n_probes: Random tangents for the norm outside of the triples; with n of them or more the norm is exact.
        reference: What the leading right vector is compared with, in the shape of x; by default x itself.
        **options: Those of :func:`balanced_rep.jacobian_svd`.

    Returns:
        The summaries.

    Raises:
        ValueError: If ``n_probes`` is below 2, or k below 1.
        TypeError: If one is no integer.
    """
    n_probes = as_integer("jacobian_spectrum: n_probes", n_probes, 2, " for a standard error")
    k = as_integer("jacobian_spectrum: k", k, 1)
    call = {name: options[name] for name in ("batch", "output", "chunk_size", "kwargs") if name in options}
    J = JacobianOperator(f, x, **call)
    m, n = J.shape[-2:]
    result = jacobian_svd(f, x, max(k, min(m, n)) if is_formed(n, k) else k, **options)
    seed = options.get("seed", 0)
    number, item = seed if isinstance(seed, tuple) else (seed, 0)
    norm = _squared_norm(J, result, n_probes, number, item)
    S, total = result.S.double(), norm.value
    first = S[..., 0].square()
    direction = (x if reference is None else reference).detach().reshape(*J.shape[:-2], -1).to(result.Vh.dtype)
    cosine = torch.nn.functional.cosine_similarity(direction, result.Vh[..., 0, :], dim=-1).abs()
    return JacobianSpectrum(
        svd=result,
        squared_norm=norm,
        stable_rank=torch.where(first > 0, total / torch.where(first > 0, first, 1.0), 0.0),
        effective_rank=_effective_rank(S, total, min(m, n)),
        n90=_energy_rank(S, total, 0.9),
        n95=_energy_rank(S, total, 0.95),
        alignment=cosine,
        size=min(m, n),
    )


def _squared_norm(J: JacobianOperator, result: SVDResult, n_probes: int, seed: int, item: int) -> Estimate:
    """Of the triples exactly, and of what is outside of them from probes."""
    m, n = J.shape[-2:]
    if result.S.shape[-1] == min(m, n):
        squares = result.S.double().square().sum(-1)
        return Estimate(squares, torch.zeros_like(squares), 0, exact=True)
    if n <= n_probes:
        norm = J.frobenius_norm(n)
        return Estimate(norm.value.double().square(), torch.zeros_like(norm.value, dtype=torch.float64), n, exact=True)
    U, S, Vh = (value.double() for value in result)
    running = RunningMean()
    for start in range(0, n_probes, CHUNK):
        w = _draw(J, start, min(CHUNK, n_probes - start), seed, item)  # ([B,] count, n)
        if result.info.method == "jvp":  # J V = U S: what is outside is J on the complement of V
            w = w - w @ Vh.mT @ Vh
        y = (J @ w.to(J.dtype).mT).double().mT
        known = (w @ Vh.mT * S.unsqueeze(-2)) @ U.mT
        running.add((y.square().sum(-1) - known.square().sum(-1)).movedim(-1, 0))
    rest = running.estimate(torch.float64)
    return Estimate(rest.value + S.square().sum(-1), rest.standard_error, n_probes, exact=False)


def _draw(J: JacobianOperator, start: int, count: int, seed: int, item: int) -> Tensor:
    """Rademacher rows, different for each sample, and from those of the search."""
    lead, n = J.shape[:-2], J.shape[-1]
    samples = torch.arange(item, item + (lead[0] if lead else 1), device=J.device)
    numbers = torch.arange(start, start + count, device=J.device)
    items = (STREAM << STREAM_BITS) + (samples.unsqueeze(1) << PROBE_BITS) + numbers
    return philox_rademacher(items.flatten(), n, seed=seed).double().view(*lead, count, n)


def _energy_rank(S: Tensor, total: Tensor, share: float) -> Count:
    shares = S.double().square() / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    reached = shares.cumsum(-1) >= share * (1 - 1e-12)
    exact = reached.any(-1)
    within = (~reached).sum(-1) + 1
    missing, last = share - shares.sum(-1), shares[..., -1]
    beyond = S.shape[-1] + torch.where(last > 0, missing / torch.where(last > 0, last, 1.0), 1.0).ceil().clamp_min(1)
    return Count(torch.where(exact, within, beyond.long()), exact)


def _effective_rank(S: Tensor, total: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Bounds of exp(entropy): the rest is in as few values as can be, each as large as the last, or evenly in all."""
    shares = S.square() / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    rest, last = (1 - shares.sum(-1)).clamp_min(0), shares[..., -1].clamp_min(1e-300)
    entropy = torch.special.entr(shares).sum(-1)
    few = -rest * last.log()
    left = max(size - S.shape[-1], 1)
    even = -rest * torch.where(rest > 0, rest / left, 1.0).log()
    return (entropy + torch.minimum(few, even)).exp(), (entropy + even).exp()
