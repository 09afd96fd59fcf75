r"""Scores of a prompt or class: how strongly, and how sharply, the condition pulls.

In the units of the data the predicted noise is :math:`(y - D(y)) / \sigma`; differences of predictions at the same y
are differences of D over :math:`\sigma`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from balanced_rep.autodiff import jvp
from balanced_rep.detection._score import Batch, Score, register
from balanced_rep.models import Denoiser, sigma_schedule
from balanced_rep.models._checks import check_counts
from balanced_rep.models._conditions import expand_rows, n_rows, take_rows
from balanced_rep.models._noise import noise

__all__ = ["ConditionJacobian", "NeMo", "NoiseDifference", "Sharpness", "null_batch"]

PROMPTS = 64  # at once, of the reference of nemo


def null_batch(D: Denoiser, n: int) -> Any:
    """The null condition, n times.

    Args:
        D: The denoiser.
        n: How often.

    Returns:
        Condition with a leading dim n.

    Raises:
        ValueError: If the denoiser has none.
    """
    if D.null_condition is None:
        raise ValueError(
            f"{type(D).__name__} has no null condition to compare a condition with: it is unconditional, or none was "
            "given (null_condition= of from_diffusers and load). Scores without 'condition' in their `requires` need "
            "none."
        )
    return expand_rows(D.null_condition, n)


def _start(D: Denoiser, batch: Batch, what: str, draw: int = 0) -> Tensor:
    """Noisy samples: the given ones at the noise level, or pure noise."""
    sigma, shape = batch.sigmas[0], getattr(D, "sample_shape", None)
    if batch.x is not None:
        e = noise(batch.items, batch.x.shape[1:], seed=batch.seed, draw=draw, like=batch.x)
        return batch.x + sigma * e
    if shape is None:
        raise ValueError(f"{what}: this denoiser does not say what a sample looks like; give samples x.")
    like = next(iter(D.parameters()), torch.empty(0)) if isinstance(D, nn.Module) else torch.empty(0)
    return sigma * noise(batch.items, shape, seed=batch.seed, draw=draw, like=like)


def _pair(D: Denoiser, batch: Batch) -> Callable[[Tensor, float], Tensor]:
    """What denoises two halves, of one batch each: with its condition, and with the null condition.

    In one call where the two can be joined; classes are numbers and their null condition may be a vector.

    Args:
        D: The denoiser.
        batch: Conditions.

    Returns:
        Function of `(2 b, *sample_shape)` and a noise level.
    """
    n, cond, null = len(batch), batch.cond, null_batch(D, len(batch))
    ours, theirs = tree_flatten(cond), tree_flatten(null)
    forms = [[(t.shape[1:], t.dtype) if isinstance(t, Tensor) else t for t in leaves] for leaves, _ in (ours, theirs)]
    if ours[1] == theirs[1] and forms[0] == forms[1]:
        both = tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) and a.ndim else a, cond, null)
        return lambda z, sigma: D(z, sigma, both)
    return lambda z, sigma: torch.cat([D(z[:n], sigma, cond), D(z[n:], sigma, null)])


class _Conditional(Score):
    """Starts from pure noise at the largest noise level unless told otherwise."""

    direction = "high"
    requires = frozenset({"model", "condition", "sigma"})

    def default_sigma(self, D: Denoiser) -> float | None:
        """The largest noise level.

        Args:
            D: The denoiser.

        Returns:
            The level.
        """
        return D.sigma_range[1]


@register
class NoiseDifference(_Conditional):
    """Norm of the difference between the noise predicted with and without the condition, from pure noise."""

    name = "noise_difference"
    formula = "mean over steps of |eps(y, c) - eps(y, null)|"
    source = "Wen et al., ICLR 2024"
    cost = "two forward passes per step and draw"

    def __init__(self, n_steps: int = 1, guidance: float = 7.5, n_total: int = 50, n_draws: int = 1):
        """Chooses the effort.

        Args:
            n_steps: Sampling steps that are looked at, from the first.
            guidance: Guidance of the sampling, if there is more than one step.
            n_total: Steps that a whole sampling would have.
            n_draws: Starts, averaged.

        Raises:
            ValueError: If a number is out of range.
        """
        if not 1 <= n_steps <= n_total or n_draws < 1:
            raise ValueError(
                f"noise_difference: 1 <= n_steps <= n_total and n_draws >= 1, got {n_steps}, {n_total}, {n_draws}."
            )
        check_counts(self.name, n_steps=n_steps, n_total=n_total, n_draws=n_draws)
        self.n_steps, self.guidance, self.n_total, self.n_draws = n_steps, guidance, n_total, n_draws

    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Samples a little and compares.

        Args:
            D: The denoiser.
            batch: Conditions.

        Returns:
            `(b,)`.
        """
        run = _pair(D, batch)
        levels = sigma_schedule(D, self.n_total, sigma_max=batch.sigmas[0])
        total = torch.zeros(len(batch), dtype=torch.float64)
        for draw in range(self.n_draws):
            y = _start(D, batch, self.name, draw)
            for sigma, following in itertools.pairwise(levels[: self.n_steps + 1]):
                with_c, without = run(y.repeat(2, *[1] * (y.ndim - 1)), sigma).chunk(2)
                total += ((with_c - without).flatten(1).double().norm(dim=1) / sigma).cpu()
                guided = without + self.guidance * (with_c - without)
                y = guided + following / sigma * (y - guided)
                batch.forwards += 2 * len(batch)
        return total / (self.n_steps * self.n_draws)


@register
class Sharpness(_Conditional):
    r"""How sharp the conditional density is along the direction that the condition adds.

    :math:`|H_c s_d - H_u s_d|` with the score difference :math:`s_d = s_c - s_u` and the Hessians H of the two
    log-densities, in data units; another parametrisation differs by a factor that is the same for all.
    """

    name = "sharpness"
    formula = "|H_c s_d - H_u s_d|, s_d = s_c - s_u"
    source = "Jeon et al., ICML 2025"
    cost = "four forward passes and two Jacobian-vector products"

    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Takes both Hessian products in one pass.

        Args:
            D: The denoiser.
            batch: Conditions.

        Returns:
            `(b,)`.
        """
        sigma, y = batch.sigmas[0], _start(D, batch, self.name)
        run, twice = _pair(D, batch), torch.cat([y, y])
        with_c, without = run(twice, sigma).chunk(2)
        s_d = (with_c - without) / sigma**2
        _, j = jvp(lambda z: run(z, sigma), twice, torch.cat([s_d, s_d])[None])
        of_c, of_u = j[0].chunk(2)
        batch.forwards += 4 * len(batch)
        batch.tangents += 2 * len(batch)
        return (of_c - of_u).flatten(1).double().norm(dim=1) / sigma**2  # the identities in H cancel


@register
class ConditionJacobian(_Conditional):
    """How fast the predicted noise changes along the way from the null condition to the condition."""

    name = "condition_jacobian"
    formula = "|(d eps / d c)(c - c_null)| at c"
    source = "one Jacobian-vector product in the condition; cf. Wen et al., ICLR 2024, whose difference it linearises"
    cost = "one forward pass and one Jacobian-vector product"

    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Takes one product.

        Args:
            D: The denoiser.
            batch: Conditions.

        Returns:
            `(b,)`.

        Raises:
            ValueError: If conditions are not continuous.
        """
        leaves = [c for c in tree_leaves(batch.cond) if isinstance(c, Tensor)]
        if not all(c.is_floating_point() for c in leaves):
            raise ValueError(
                "condition_jacobian: needs continuous conditions such as prompt embeddings; classes have no derivative."
            )
        sigma, y, null = batch.sigmas[0], _start(D, batch, self.name), null_batch(D, len(batch))
        along = tree_map(lambda a, b: (a - b)[None] if isinstance(a, Tensor) else None, batch.cond, null)
        _, j = jvp(lambda c: D(y, sigma, c), (batch.cond,), (along,))
        batch.forwards += len(batch)
        batch.tangents += len(batch)
        return j[0].flatten(1).double().norm(dim=1) / sigma


@register
class NeMo(Score):
    """How far the cross-attention values of a prompt lie outside what other prompts give, in standard deviations."""

    name = "nemo"
    formula = "max (or number above theta) of |a - mean| / std, a = mean over tokens of |V e|"
    source = "Hintersdorf et al., NeurIPS 2024"
    requires = frozenset({"model", "condition", "reference"})
    direction = "high"
    cost = "no forward pass: the value projections of the prompt embedding"

    def __init__(self, reduce: Literal["max", "count"] = "max", theta: float = 5.0):
        """Chooses the summary over units.

        Args:
            reduce: "max", or "count" of units above `theta`.
            theta: In standard deviations.

        Raises:
            ValueError: If `reduce` is neither, or `theta` is not at least 0.
        """
        if reduce not in ("max", "count") or not theta >= 0:
            raise ValueError(f"nemo: reduce must be 'max' or 'count' and theta >= 0, got {reduce!r} and {theta}.")
        self.reduce, self.theta = reduce, theta

    def prepare(self, D: Denoiser | None, reference: Any) -> tuple[Tensor, Tensor]:
        """Statistics over the reference prompts.

        Args:
            D: The denoiser.
            reference: Conditions of at least two prompts.

        Returns:
            Mean and standard deviation of each unit, `(units,)`.

        Raises:
            ValueError: If there are fewer than two prompts, or the values of one are not finite.
        """
        n = n_rows(reference)
        if n < 2:
            raise ValueError(f"nemo: needs at least two reference prompts for a standard deviation, got {n}.")
        with torch.no_grad():  # the reference of the paper has fifty thousand prompts, too many for one batch
            parts = [self._values(D, take_rows(reference, rows)) for rows in torch.arange(n).split(PROMPTS)]
        a = torch.cat(parts)
        if not a.isfinite().all():
            bad = (~a.isfinite()).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(
                f"nemo: the values of {len(bad)} of {n} reference prompts are not finite, the first of them number "
                f"{bad[0]}; leave these out."
            )
        return a.mean(dim=0), a.std(dim=0)

    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Compares prompts with the reference.

        Args:
            D: The denoiser.
            batch: Conditions.

        Returns:
            `(b,)`.
        """
        mean, std = batch.reference
        z = ((self._values(D, batch.cond) - mean) / std).abs()
        z = z.where(std > 0, 0.0)  # a unit that never moves says nothing
        return z.amax(dim=1) if self.reduce == "max" else (z > self.theta).sum(dim=1).double()

    def _values(self, D: Any, cond: Any) -> Tensor:
        """Mean absolute value over tokens of each unit of the value projections, (b, units)."""
        layers = getattr(D, "cross_attention_values", None)
        if not layers:
            raise ValueError(
                f"nemo: {type(D).__name__} has no cross-attention that it labels (`cross_attention_values`)."
            )
        embedding = cond["prompt"] if isinstance(cond, dict) else cond
        found = [layer(embedding.to(layer.weight)) for layer in layers.values()]  # weights may be in half precision
        return torch.cat([value.abs().double().mean(dim=1) for value in found], dim=1)
