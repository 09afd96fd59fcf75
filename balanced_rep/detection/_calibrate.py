"""A detector: a score with everything decided, and a file to keep it in.

Layer, noise level and direction are chosen on one part of labelled samples; the threshold comes from the other.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from balanced_rep.detection._evaluate import Evaluation, evaluate
from balanced_rep.detection._intervals import area_under_curve, group_numbers
from balanced_rep.detection._score import Direction, Score, Scores, get
from balanced_rep.detection._threshold import Threshold, least_calibration_size, threshold
from balanced_rep.models import Denoiser
from balanced_rep.models._conditions import n_rows

__all__ = ["Calibration", "Detector", "Flags", "calibrate"]

FORMAT = "balanced-rep detector 1"


@dataclass(frozen=True, eq=False)
class Flags:
    """What a detector says of samples.

    Attributes:
        scores: The scores.
        flagged: Which are beyond the threshold, `(n,)` bool; a sample without a score is not, see its status.
    """

    scores: Scores
    flagged: Tensor


@dataclass(frozen=True)
class Detector:
    """A score with everything decided.

    Attributes:
        score: Name of the score.
        options: Its arguments.
        layer: The layer, if the score looks at one.
        sigma: The noise level, if it takes one.
        direction: Which scores are suspicious.
        threshold: Beyond which they are flagged.
        seed: Of the noise.
    """

    score: str
    options: dict[str, Any]
    layer: str | None
    sigma: float | None
    direction: Direction
    threshold: Threshold
    seed: int = 0

    def __call__(self, D: Denoiser | None, x: Tensor | None = None, **inputs: Any) -> Flags:
        """Scores and flags samples.

        Args:
            D: The denoiser.
            x: Samples.
            **inputs: `cond`, `reference`, `first`, `batch_size`, `on_batch`, as the score takes them.

        Returns:
            Scores and flags.

        Raises:
            TypeError: If noise level, layers or seed are given: the threshold holds for its own alone.
        """
        if decided := [name for name in ("sigma", "layers", "seed") if name in inputs]:
            raise TypeError(f"a detector has its own {', '.join(decided)}; calibrate another one for others.")
        score = get(self.score, **self.options)
        scores = score(D, x, sigma=self.sigma, layers=self.layer, seed=self.seed, **inputs)
        scores = Scores(**{**vars(scores), "direction": self.direction})
        beyond = scores.values > self.threshold.value
        if self.direction == "low":
            beyond = scores.values < self.threshold.value
        return Flags(scores, beyond & scores.ok)

    def save(self, path: str | Path) -> None:
        """Writes the detector to a JSON file.

        Args:
            path: The file.
        """
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Detector:
        """Reads what `save` wrote.

        Args:
            path: The file.

        Returns:
            The detector.

        Raises:
            ValueError: If the file is no detector of this version; says what is wrong.
        """
        try:
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(about, dict):
                raise ValueError("it holds no JSON object")
            if about.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            about["threshold"] = Threshold(**about["threshold"])
            if about["direction"] not in ("high", "low"):
                raise ValueError(f"direction is {about['direction']!r}")
            found = cls(**about)
            get(found.score, **found.options)
            if not isinstance(found.layer, str | None) or not isinstance(found.seed, int) or found.seed < 0:
                raise ValueError(f"its layer is {found.layer!r} and its seed {found.seed!r}")
            numbers = {"threshold": found.threshold.value} | ({} if found.sigma is None else {"sigma": found.sigma})
            if wrong := [name for name, v in numbers.items() if not isinstance(v, int | float) or not math.isfinite(v)]:
                raise ValueError(f"its {wrong[0]} is {numbers[wrong[0]]!r}, which flags nothing")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not a detector that this version reads: {error}.") from error
        return found


@dataclass(frozen=True, eq=False)
class Calibration:
    """A detector and how it came about.

    Attributes:
        detector: The detector.
        held_out: How the chosen score does on the half that had no part in the choice.
        selection: AUC of every choice on the other half, `(layers, sigmas)`, in the direction chosen for each: above
            one half by construction, and too good for the best one. NaN where fewer samples have a score than
            elsewhere: such a layer is not chosen.
        layers: Its rows; one without a name if the score has no layers.
        sigmas: Its columns.
    """

    detector: Detector
    held_out: Evaluation
    selection: Tensor
    layers: tuple[str | None, ...]
    sigmas: tuple[float, ...]


def calibrate(
    score: Score | str,
    D: Denoiser | None,
    x: Tensor | None,
    labels: Tensor,
    *,
    cond: Any = None,
    reference: Any = None,
    sigmas: Sequence[float] | None = None,
    layers: Sequence[str] | None = None,
    choose_direction: bool = True,
    fpr: float = 0.01,
    confidence: float = 0.95,
    groups: Tensor | None = None,
    selection_share: float = 0.5,
    seed: int = 0,
    batch_size: int = 64,
) -> Calibration:
    """Makes a detector from labelled samples.

    The samples are cut in two, groups as a whole and both classes in proportion. On the first part layer, noise level
    and direction are chosen by the AUC; the second part judges the choice, and its samples that are not memorized give
    the threshold, so that its guarantee does not suffer from the choice.

    Args:
        score: The score, or its name.
        D: The denoiser.
        x: Samples, `(n, *sample_shape)`, or `None` for a score of conditions.
        labels: Whether each is memorized, `(n,)`.
        cond: Conditions.
        reference: What the score compares with.
        sigmas: Noise levels to choose from.
        layers: Layers to choose from; default: all that the model labels.
        choose_direction: Choose it as well; else the score's own is kept.
        fpr: False-positive rate that the threshold keeps.
        confidence: With which probability.
        groups: Near-duplicates share a number, `(n,)`.
        selection_share: Share of the samples for the choice.
        seed: Of the cut and of the noise.
        batch_size: Samples at once.

    Returns:
        The detector, and how good it is.

    Raises:
        ValueError: If there are too few samples for the guarantee, only one class, or samples, labels and groups differ
            in number; before any network is run.
        TypeError: If the score is none, or the noise levels are no sequence.
    """
    score, seed = score if isinstance(score, Score) else get(score), operator.index(seed)
    labels = torch.as_tensor(labels).cpu()
    if x is None and cond is None:
        raise ValueError("calibrate: nothing to score: give samples x or cond=.")
    if not isinstance(sigmas, Iterable | None):
        raise TypeError(f"calibrate: sigmas must be a sequence of noise levels to choose from, got {sigmas!r}.")
    sigmas = None if sigmas is None else list(sigmas)
    n = len(x) if x is not None else n_rows(cond)
    if labels.shape != (n,):
        raise ValueError(f"calibrate: {n} samples and labels {tuple(labels.shape)}; one each is needed.")
    groups = None if groups is None else group_numbers("calibrate", groups, n)
    first = cut(labels, groups, selection_share, seed)
    n_negative = _count(~labels.bool() & ~first, groups)
    least = least_calibration_size(fpr, confidence)
    if n_negative < least:
        total = -(-least // max(1e-9, 1 - selection_share))
        raise ValueError(
            f"calibrate: a false-positive rate of {fpr:g} with confidence {confidence:g} needs {least} independent "
            f"samples that are not memorized besides those for the choice, got {n_negative}; give about {total:.0f} "
            "in all, or ask for a larger fpr or a smaller selection_share."
        )
    options = {"cond": cond, "reference": reference, "seed": seed, "batch_size": batch_size}
    tables = _score_all(score, D, x, sigmas, layers, options)
    shape = max(1, len(tables.layers)), max(1, len(tables.sigmas)), n
    tables = replace(tables, values=tables.values.reshape(shape))
    auc = selection_auc(tables, labels, first)
    natural = 1 if score.direction == "high" else -1
    strength = torch.where(auc > 0.5, auc, 1 - auc) if choose_direction else (auc if natural == 1 else 1 - auc)
    if strength.isnan().all():
        raise ValueError(
            "calibrate: the part for the choice has scores of one class only; give more samples of the other. The "
            f"first status: {next((s for s in tables.status if s != 'ok'), 'none')}."
        )
    as_declared = (auc > 0.5) == (natural == 1)
    highest = strength == strength.nan_to_num(-1.0).max()
    best = highest & (as_declared | ~(as_declared & highest).any())
    at = divmod(int(best.flatten().nonzero()[-1]), auc.shape[1])  # of equals: as declared, then nearest to the output
    direction: Direction = ("high" if auc[at] > 0.5 else "low") if choose_direction else score.direction
    decided = tables.at(*at)
    second = ~first & decided.ok
    held_out = evaluate(
        decided.values[second], labels[second], direction=direction, fprs=(fpr,), confidence=confidence, seed=seed,
        groups=None if groups is None else groups[second],
    )  # fmt: skip
    negative = second & ~labels.bool()
    limit = threshold(
        decided.values[negative], direction=direction, fpr=fpr, confidence=confidence,
        groups=None if groups is None else groups[negative],
    )  # fmt: skip
    names: tuple[str | None, ...] = tables.layers or (None,)
    sigma = tables.sigmas[at[1]] if tables.sigmas else None
    detector = Detector(score.name, score.options(), names[at[0]], sigma, direction, limit, seed)
    return Calibration(detector, held_out, strength, names, tables.sigmas)


def selection_auc(tables: Scores, labels: Tensor, first: Tensor) -> Tensor:
    """AUC of every layer and noise level on the samples for the choice, high being suspicious.

    Args:
        tables: Scores, values `(layers, sigmas, n)`.
        labels: Whether each sample is memorized, `(n,)`.
        first: Which samples are for the choice, `(n,)` bool.

    Returns:
        `(layers, sigmas)` float64; NaN where fewer samples have a score than elsewhere, which would be an advantage, or
        only one class has.
    """
    scored = tables.values.isfinite() & first
    counts, memorized = scored.sum(dim=-1), labels.bool()
    auc = torch.full(counts.shape, torch.nan, dtype=torch.float64)
    for i, j in (counts == counts.max()).nonzero().tolist():
        own, values = scored[i, j], tables.values[i, j]
        auc[i, j] = area_under_curve(values[own & memorized], values[own & ~memorized])
    return auc


def _score_all(
    score: Score, D: Any, x: Any, sigmas: Sequence[float] | None, layers: Sequence[str] | None, options: dict[str, Any]
) -> Scores:
    """One call for all noise levels where the score takes several, else one for each."""
    chosen = {} if layers is None else {"layers": layers}
    if sigmas is None or score.many_sigmas or not len(sigmas):  # which says that there is none
        return score(D, x, sigma=None if sigmas is None else list(sigmas), **chosen, **options)
    parts = [score(D, x, sigma=float(s), **chosen, **options) for s in sigmas]
    status = tuple(next((s for s in each if s != "ok"), "ok") for each in zip(*(p.status for p in parts), strict=True))
    joined = torch.stack([p.values for p in parts])[None]
    return Scores(**{**vars(parts[0]), "values": joined, "status": status, "sigmas": tuple(float(s) for s in sigmas)})


def cut(labels: Tensor, groups: Tensor | None, share: float, seed: int) -> Tensor:
    """Which samples are for the choice, `(n,)` bool: whole groups, each class in proportion."""
    if labels.ndim != 1 or not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"calibrate: labels must be 0 or 1, one per sample, got {tuple(labels.shape)} {labels.dtype}.")
    if not 0 < share < 1:
        raise ValueError(f"calibrate: selection_share must be between 0 and 1, got {share}.")
    index = group_numbers("calibrate", groups, len(labels))
    positive = torch.zeros(int(index.max()) + 1, dtype=torch.bool).index_fill_(0, index[labels.bool()], True)
    generator = torch.Generator().manual_seed(seed)
    first = torch.zeros(len(positive), dtype=torch.bool)
    for stratum in (positive.nonzero().flatten(), (~positive).nonzero().flatten()):
        order = stratum[torch.randperm(len(stratum), generator=generator)]
        first[order[: round(share * len(order))]] = True
    return first[index]


def _count(rows: Tensor, groups: Tensor | None) -> int:
    return int(rows.sum()) if groups is None else len(groups[rows].unique())
