"""Spread of a representation: the paper's score, on all layers and noise levels of one forward pass."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from balanced_rep.detection._score import Batch, Score, register
from balanced_rep.models import Denoiser
from balanced_rep.models._checks import check_counts
from balanced_rep.models._conditions import repeat_rows
from balanced_rep.models._noise import noise
from balanced_rep.stats import RepresentationStats, record

__all__ = ["RepresentationStd", "record_layers"]

Statistic = Literal["std", "std_over_l2", "l4_over_l2", "hoyer", "kurtosis", "peak_to_average", "active_fraction", "l2"]


@register
class RepresentationStd(Score):
    """Standard deviation over the units of a layer at a noisy sample: high where few units carry much.

    All layers and noise levels asked for are read in one forward pass of the batch, which ends after the last of them.
    """

    name = "representation_std"
    formula = "std over channels of pool(h(x + sigma e)), mean over draws"
    source = "Zhang et al., ICLR 2026, Algorithm 1"
    requires = frozenset({"model", "samples", "sigma", "layers"})
    direction = "high"
    cost = "one part of a forward pass for each noise level and draw"
    many_sigmas = True

    def __init__(self, pool: Literal["max", "mean"] | None = "max", statistic: Statistic = "std", n_draws: int = 1):
        """Chooses what is read.

        Args:
            pool: Over space or tokens, in front of the statistics; `None` takes the statistics over everything.
            statistic: "std" as in the paper, a scale-free one ("std_over_l2", "l4_over_l2", "hoyer", "kurtosis",
                "peak_to_average"), or "active_fraction" and "l2" for comparison.
            n_draws: Noise draws per sample, averaged.

        Raises:
            ValueError: If an argument is none of these.
        """
        if pool not in ("max", "mean", None) or statistic not in get_args(Statistic) or n_draws < 1:
            raise ValueError(
                f"representation_std: pool must be 'max', 'mean' or None, n_draws at least 1 and statistic one of "
                f"{', '.join(get_args(Statistic))}; got {pool!r}, {n_draws} and {statistic!r}."
            )
        check_counts(self.name, n_draws=n_draws)
        self.pool: Literal["max", "mean"] | None = pool
        self.statistic, self.n_draws = statistic, n_draws

    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Reads the layers.

        Args:
            D: The denoiser.
            batch: Samples.

        Returns:
            `(layers, sigmas, b)`.
        """
        assert batch.x is not None
        x, b, n_sigmas = batch.x, len(batch), len(batch.sigmas)
        drawn = [noise(batch.items, x.shape[1:], seed=batch.seed, draw=i, like=x) for i in range(self.n_draws)]
        sigma = torch.tensor(batch.sigmas, dtype=x.dtype, device=x.device)
        wide = sigma.view(-1, 1, *[1] * x.ndim)
        y = (x + wide * torch.stack(drawn)).flatten(0, 2)  # (sigmas draws b, ...)
        rows = sigma.repeat_interleave(self.n_draws * b)
        cond = repeat_rows(batch.cond, n_sigmas * self.n_draws)
        batch.forwards += len(y)
        found = record_layers(D, batch.layers, lambda: D(y, rows, cond), pool=self.pool)
        values = []
        for name, stats in found.items():
            bad = (stats.n_nonfinite > 0).unflatten(0, (n_sigmas, self.n_draws, b)).any(dim=1)
            batch.fail(bad.any(dim=0).cpu(), f"activation of {name} is not finite")
            value = getattr(stats, self.statistic).unflatten(0, (n_sigmas, self.n_draws, b)).double().mean(dim=1)
            values.append(value.masked_fill(bad, torch.nan))  # of this layer and level; the others keep theirs
        return torch.stack(values)


def record_layers(
    D: Denoiser, layers: tuple[str, ...], run: Any, *, pool: Literal["max", "mean"] | None
) -> dict[str, RepresentationStats]:
    """Statistics of labelled layers during one call of a denoiser.

    Layers that are heard alike share a record; if all are, the call ends after the last of them.

    Args:
        D: The denoiser, a module.
        layers: Names from `D.layers`.
        run: Calls it.
        pool: Over space or tokens.

    Returns:
        Statistics by layer, in the order of `layers`.
    """
    assert isinstance(D, nn.Module)
    groups: dict[tuple[str, str | None], list[str]] = {}
    for name in layers:
        tap = D.layers[name]
        groups.setdefault((tap.at, None if tap.kind == "features" else pool), []).append(name)
    with ExitStack() as stack:
        recordings = [
            stack.enter_context(record(D, names, at, call=0, pool=own, stop=len(groups) == 1))  # pyright: ignore[reportArgumentType]
            for (at, own), names in groups.items()
        ]
        run()
    return {name: next(r[name] for r in recordings if name in r) for name in layers}
