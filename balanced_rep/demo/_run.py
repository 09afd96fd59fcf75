"""The demo as a function: score every digit with both models at every noise level, and measure what the scores tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from balanced_rep.demo._jacobian import JacobianRow, jacobian_row
from balanced_rep.demo._metrics import Detection, detect
from balanced_rep.models import DigitsData, DigitsDenoiser, DigitsSplit, digits, digits_data
from balanced_rep.models._digits import Variant
from balanced_rep.stats import representation_stats
from balanced_rep.stats.record import record

__all__ = ["SIGMAS", "DemoResult", "Row", "ScoreName", "count_steps", "run_demo"]

ScoreName = Literal["std", "error"]
Key = tuple[Variant, ScoreName]

SIGMAS = (0.05, 0.1, 0.2, 0.4)
MAIN_SIGMA = 0.1
ROWS: tuple[Key, ...] = (("repeated", "std"), ("control", "std"), ("repeated", "error"), ("control", "error"))


@dataclass(frozen=True)
class Row:
    """One line of the table: a score of a model at a noise level.

    Attributes:
        sigma: Noise level in data units.
        model: "repeated", or "control" for the model trained on the same images without repetition.
        score: "std", the standard deviation of the last hidden activation, or "error", the mean squared denoising
            error with the sign turned so that memorized images score high.
        repeated: The repeated training images against the never-seen images.
        ordinary: The other training images against the never-seen images.
    """

    sigma: float
    model: Variant
    score: ScoreName
    repeated: Detection
    ordinary: Detection


@dataclass(frozen=True)
class DemoResult:
    """Everything the table, the files and the figure are made of.

    Attributes:
        data: Images and split.
        sigmas: Noise levels, `n_sigmas` of them.
        n_draws: Noise draws that each score is the mean of.
        seed: Of the noise.
        layer: The layer whose activation is scored.
        scores: `(model, score) -> (n_sigmas, 1797)`; high is suspicious.
        activations: `(1797, width)`, the scored layer of the repeated model at `main_sigma`, first noise draw.
        rows: The table, noise level by noise level.
        jacobians: For each model, the Jacobians at `main_sigma`, first noise draw.
        other_measures: AUC, repeated against never-seen, of other statistics of `activations`; below 0.5 means that
            memorized digits have the *smaller* value.
        recipes: How the two models were trained.
    """

    data: DigitsData
    sigmas: tuple[float, ...]
    n_draws: int
    seed: int
    layer: str
    scores: Mapping[Key, Tensor]
    activations: Tensor
    rows: tuple[Row, ...]
    jacobians: tuple[JacobianRow, ...]
    other_measures: Mapping[str, float]
    recipes: Mapping[Variant, Mapping[str, object]]

    @property
    def main_sigma(self) -> float:
        """The noise level of the figure and the headline: 0.1, or of those computed the one nearest to it."""
        return _main_sigma(self.sigmas)

    def score(self, model: Variant, score: ScoreName, sigma: float | None = None) -> Tensor:
        """The score of every digit.

        Args:
            model: "repeated" or "control".
            score: "std" or "error".
            sigma: One of `sigmas`; default: `main_sigma`.

        Returns:
            The scores, `(1797,)`.
        """
        return self.scores[model, score][self.sigmas.index(self.main_sigma if sigma is None else sigma)]

    def row(self, model: Variant, score: ScoreName, sigma: float | None = None) -> Row:
        """A line of the table.

        Args:
            model: "repeated" or "control".
            score: "std" or "error".
            sigma: One of `sigmas`; default: `main_sigma`.

        Returns:
            The line.
        """
        wanted = (self.main_sigma if sigma is None else sigma, model, score)
        return next(row for row in self.rows if (row.sigma, row.model, row.score) == wanted)


def run_demo(
    *,
    sigmas: Sequence[float] = SIGMAS,
    n_draws: int = 4,
    seed: int = 0,
    models: Mapping[Variant, DigitsDenoiser] | None = None,
    on_step: Callable[[], None] | None = None,
) -> DemoResult:
    """Scores all 1797 digits with a model that memorized twenty of them and with its control. Needs scikit-learn.

    For each noise level and draw, noise is added to the clean digits and `record` takes the standard deviation of the
    last hidden activation; a score is the mean over the draws. Both models see the same noise. The Jacobian of each
    denoiser is taken at the repeated and the never-seen digits, at one noise level.

    Args:
        sigmas: Noise levels in data units, distinct.
        n_draws: Noise draws per digit and noise level.
        seed: Of the noise.
        models: "repeated" and "control" model; default: the shipped ones.
        on_step: Called `count_steps(sigmas, n_draws)` times while it runs.

    Returns:
        Scores and table.

    Raises:
        ValueError: `sigmas` is empty, repeats itself or is not positive, or `n_draws` is below 1.
    """
    sigmas = tuple(float(s) for s in sigmas)
    if not sigmas or len(set(sigmas)) < len(sigmas) or min(sigmas) <= 0 or n_draws < 1:
        raise ValueError(f"run_demo: need distinct positive sigmas and n_draws >= 1, got {sigmas} and {n_draws}.")
    models = models or {"repeated": digits("repeated"), "control": digits("control")}
    scored = models["repeated"]
    data, main = digits_data(scored.split), _main_sigma(sigmas)
    scores: dict[Key, Tensor] = {}
    with torch.inference_mode():
        for variant, model in models.items():
            std, error = _score(model, data.images, sigmas, n_draws, seed, on_step)
            scores[variant, "std"], scores[variant, "error"] = std, -error
        draws = _noisy(data.images, sigmas, n_draws, seed)
        noisy = next(y for sigma, y in draws if sigma == main)
        activations = _activation(scored, noisy, main)
    jacobians = []
    for variant, model in models.items():
        jacobians.append(jacobian_row(model, variant, noisy.clone(), data.split, main))
        if on_step is not None:
            on_step()
    return DemoResult(
        data=data,
        sigmas=sigmas,
        n_draws=n_draws,
        seed=seed,
        layer=scored.score_layer,
        scores=scores,
        activations=activations,
        rows=_table(scores, sigmas, data),
        jacobians=tuple(jacobians),
        other_measures=_other_measures(activations, data.split),
        recipes={variant: dict(model.recipe) for variant, model in models.items()},
    )


def count_steps(sigmas: Sequence[float], n_draws: int) -> int:
    """How often `run_demo` calls `on_step`.

    Args:
        sigmas: Noise levels.
        n_draws: Noise draws.

    Returns:
        The number.
    """
    return 2 * len(sigmas) * n_draws + 2


def _main_sigma(sigmas: Sequence[float]) -> float:
    return min(sigmas, key=lambda s: abs(s - MAIN_SIGMA))


def _noisy(images: Tensor, sigmas: Sequence[float], n_draws: int, seed: int) -> Iterator[tuple[float, Tensor]]:
    """Noise level and noisy images, draw by draw; the same for every model."""
    generator = torch.Generator().manual_seed(seed)
    for sigma in sigmas:
        for _ in range(n_draws):
            yield sigma, images + sigma * torch.randn(images.shape, generator=generator, device="cpu")


def _score(
    model: DigitsDenoiser,
    images: Tensor,
    sigmas: Sequence[float],
    n_draws: int,
    seed: int,
    on_step: Callable[[], None] | None,
) -> tuple[Tensor, Tensor]:
    """Std of the last hidden activation and denoising error, `(n_sigmas, n)` each, means over the draws."""
    std, error = [], []
    for sigma, noisy in _noisy(images, sigmas, n_draws, seed):
        with record(model, [model.score_layer], at="output", call=0, stop=True) as recorded:
            model(noisy, sigma)  # ends after the recorded layer
        std.append(recorded[model.score_layer].std)
        denoised = model(noisy, sigma)
        error.append((denoised - images).square().flatten(1).mean(dim=1))
        if on_step is not None:
            on_step()
    shape = (len(sigmas), n_draws)
    mean_std, mean_error = (torch.stack(s).double().unflatten(0, shape).mean(dim=1) for s in (std, error))
    return mean_std, mean_error


def _activation(model: DigitsDenoiser, noisy: Tensor, sigma: float) -> Tensor:
    """The scored activation itself, `(n, width)`: what the figure draws; `record` keeps statistics only."""
    kept: list[Tensor] = []

    def keep(_module: object, _args: object, output: Tensor) -> None:
        kept.append(output)

    handle = model.get_submodule(model.score_layer).register_forward_hook(keep)
    try:
        model(noisy, sigma)
    finally:
        handle.remove()
    return kept[0]


def _other_measures(activations: Tensor, split: DigitsSplit) -> dict[str, float]:
    """AUC of scale and of scale-free measures of the scored activation."""
    stats = representation_stats(activations, dim=-1)
    measures = {
        "l2": stats.l2,
        "absmax": stats.absmax,
        "active_fraction": stats.active_fraction,
        "l4_over_l2": stats.l4_over_l2,
        "std_over_mean": stats.std / stats.mean,
    }
    return {name: detect(value[split.repeated], value[split.held_out]).auc for name, value in measures.items()}


def _table(scores: Mapping[Key, Tensor], sigmas: Sequence[float], data: DigitsData) -> tuple[Row, ...]:
    """All rows, noise level by noise level."""
    split = data.split
    rows = []
    for i, sigma in enumerate(sigmas):
        for model, name in ROWS:
            score = scores[model, name][i]
            unseen = score[split.held_out]
            pair = (detect(score[part], unseen) for part in (split.repeated, split.ordinary))
            rows.append(Row(sigma, model, name, *pair))
    return tuple(rows)
