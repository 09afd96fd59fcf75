"""The paper's Table 1 on any model: every method that can be run on it, judged on the same samples.

One half of the samples is for choices (layer and noise level of the calibrated score); all methods are judged on the
other half, so that their numbers can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from balanced_rep.detection._calibrate import cut, selection_auc
from balanced_rep.detection._evaluate import Comparison, Evaluation, compare, evaluate
from balanced_rep.detection._intervals import group_numbers
from balanced_rep.detection._score import Direction, Scores, get
from balanced_rep.models import Denoiser
from balanced_rep.models._conditions import n_rows, take_rows

__all__ = ["PAPER_TABLE_1", "Row", "Table1", "table1"]

# AUC, TPR at 1 % FPR, seconds per image, as the paper prints them; the hardware is not stated.
PAPER_TABLE_1: dict[str, dict[str, tuple[float, float, float]]] = {
    "LAION-SD1.4": {
        "generation_density": (0.498, 0.020, 3.724),
        "noise_difference": (0.986, 0.961, 0.134),
        "nemo": (0.957, 0.500, 0.009),
        "flipd": (0.956, 0.915, 0.545),
        "representation_std": (0.987, 0.961, 0.067),
    },
    "ImageNet-DiT": {"flipd": (0.971, 0.528, 0.031), "representation_std": (0.995, 0.912, 0.015)},
    "CIFAR10-EDM": {"flipd": (0.713, 0.013, 0.071), "representation_std": (0.998, 0.984, 0.020)},
}


@dataclass(frozen=True, eq=False)
class Row:
    """A method.

    Attributes:
        method: Name of the score; with a suffix where one score has several rows.
        setting: Layer and noise level, in words.
        needs_prompt: Whether it needs the prompt or class of a sample.
        scores: Of all samples, those for choices as well.
        evaluation: On the half that judges.
        comparison: Its AUC less that of the first row, on the same samples; `None` for the first row.
        seconds: Wall time per sample.
        paper: AUC, TPR at 1 % FPR and seconds that the paper prints for the same method on its own data; `None` if it
            does not.
    """

    method: str
    setting: str
    needs_prompt: bool
    scores: Scores
    evaluation: Evaluation
    comparison: Comparison | None
    seconds: float
    paper: tuple[float, float, float] | None


@dataclass(frozen=True, eq=False)
class Table1:
    """The table.

    Attributes:
        rows: Its rows.
        labels: Whether each sample is memorized, `(n,)` bool.
        judged: Which samples judge, `(n,)` bool.
    """

    rows: tuple[Row, ...]
    labels: Tensor
    judged: Tensor

    def __getitem__(self, method: str) -> Row:
        return next(row for row in self.rows if row.method == method)


def table1(
    D: Denoiser,
    memorized: Tensor | None,
    other: Tensor | None,
    *,
    sigma: float,
    layer: str | None = None,
    sigmas: Sequence[float] = (),
    cond: tuple[Any, Any] | None = None,
    reference: Tensor | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    methods: Sequence[str] | None = None,
    groups: Tensor | None = None,
    paper: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    on_method: Callable[[str], None] | None = None,
) -> Table1:
    """Runs every method that the inputs allow.

    Args:
        D: The denoiser.
        memorized: Memorized samples; `None` if only conditions are known.
        other: Other samples.
        sigma: Noise level of the methods that take one; those of a prompt start from pure noise.
        layer: Layer of the uncalibrated row of representation_std; without one there is only the calibrated row.
        sigmas: Noise levels that the calibrated row chooses from; default: `sigma` alone.
        cond: Conditions of the memorized and of the other samples, for the methods that need them; the others see the
            null condition.
        reference: Training samples, for nearest_reference.
        options: Arguments of scores, by name.
        methods: Only these scores.
        groups: Near-duplicates share a number, memorized samples first.
        paper: Column of the paper's table to put beside, a key of `PAPER_TABLE_1`.
        seed: Of the cut and of the noise.
        batch_size: Samples at once.
        on_method: Called with the name of each method before it runs.

    Returns:
        The table, representation_std first.

    Raises:
        ValueError: If there is nothing to judge, too few samples to cut in two, samples and conditions differ in
            number, a method that is asked for lacks something, or `paper`, a method or an option is unknown.
        TypeError: If `methods` is no sequence of names.
    """
    x, conditions, labels = _joined(memorized, other, cond)
    if paper is not None and paper not in PAPER_TABLE_1:
        raise ValueError(f"table1: the paper has columns {', '.join(PAPER_TABLE_1)}; got {paper!r}.")
    made = {name: get(name, **given) for name, given in (options or {}).items()}
    runnable = _runnable(D, x, conditions, reference, methods)
    groups = None if groups is None else group_numbers("table1", groups, len(labels))
    first = cut(labels, groups, 0.5, seed)
    _check_halves(labels, first, chooses="representation_std" in runnable)
    printed = PAPER_TABLE_1.get(paper or "", {})
    rows: list[Row] = []

    def add(method: str, setting: str, scores: Scores) -> None:
        known = printed.get(method.split(",")[0])
        judged = _subset(scores, ~first)
        part = None if groups is None else groups[~first]
        evaluation = evaluate(judged, labels[~first], groups=part, seed=seed)
        against = (
            compare(judged, _subset(rows[0].scores, ~first), labels[~first], groups=part, seed=seed) if rows else None
        )
        needs = "condition" in get(method.split(",")[0]).requires
        rows.append(
            Row(method, setting, needs, scores, evaluation, against, scores.seconds / max(1, len(labels)), known)
        )

    inputs: dict[str, Any] = {
        "seed": seed,
        "batch_size": batch_size,
    }  # no condition: what needs none has no prompt, as in the paper
    for name in runnable:
        if on_method is not None:
            on_method(name)
        score = made.get(name) or get(name)
        if name == "representation_std":
            if layer is not None:
                plain = score(D, x, sigma=sigma, layers=layer, **inputs)
                add(name, f"{layer}, sigma {sigma:g}", plain)
            setting, chosen = _calibrated(score(D, x, sigma=list(sigmas) or [sigma], **inputs), labels, first)
            add(f"{name}, calibrated", setting, chosen)
        elif "samples" in score.requires:
            given = {"reference": reference} if "reference" in score.requires else {}
            at = {"sigma": sigma} if "sigma" in score.requires else {}
            add(name, f"sigma {sigma:g}" if at else "", score(D, x, **at, **given, **inputs))
        else:
            given = {}
            if name == "nemo":  # other prompts, of the half for choices
                at_other = (first & ~labels).nonzero().flatten()
                given = {"reference": take_rows(conditions, at_other)}
            add(name, "", score(D, cond=conditions, **inputs, **given))
    if not rows:
        raise ValueError(
            "table1: no method can be run on these inputs; give samples, or conditions of a conditional model."
        )
    return Table1(tuple(rows), labels, ~first)


def _joined(memorized: Any, other: Any, cond: tuple[Any, Any] | None) -> tuple[Tensor | None, Any, Tensor]:
    if (memorized is None) != (other is None) or (memorized is None and cond is None):
        raise ValueError("table1: give both memorized and other samples, or cond=(memorized, other), or all of them.")
    x = None if memorized is None else torch.cat([memorized, other])
    conditions = None if cond is None else tree_map(lambda a, b: torch.cat([a, b]), *cond)
    counts = [] if memorized is None else [(len(memorized), len(other))]
    counts += [] if cond is None else [(n_rows(cond[0]), n_rows(cond[1]))]
    sizes = counts[0]
    if counts[-1] != sizes:
        raise ValueError(f"table1: samples are {sizes} in number, memorized and other, and conditions {counts[-1]}.")
    return x, conditions, torch.tensor([True] * sizes[0] + [False] * sizes[1])


def _check_halves(labels: Tensor, first: Tensor, *, chooses: bool) -> None:
    """Both classes are needed in the half that judges, and in the other one if something is chosen on it."""
    halves = [~first, first] if chooses else [~first]
    if any(not bool((half & side).any()) for half in halves for side in (labels, ~labels)):
        least = "2 that are no near-duplicates, as one half chooses and the other judges" if chooses else "1"
        raise ValueError(
            f"table1: {int(labels.sum())} memorized and {int((~labels).sum())} other samples are too few: of each at "
            f"least {least}."
        )


def _leaves(tree: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _runnable(
    D: Denoiser, x: Tensor | None, cond: Any, reference: Tensor | None, methods: Sequence[str] | None
) -> list[str]:
    """Names of the methods for which everything is there, the paper's first, those of a prompt last."""
    order = (
        "representation_std", "denoising_error", "jacobian_norm", "flipd", "nearest_reference", "noise_difference",
        "sharpness", "condition_jacobian", "nemo", "generation_density",
    )  # fmt: skip
    if isinstance(methods, str):
        raise TypeError(f"table1: methods must be a sequence of names, got {methods!r}.")
    methods = None if methods is None else list(methods)
    for name in methods or ():
        get(name)
        if name not in order:
            raise ValueError(f"table1: {name} is not among the methods of the table: {', '.join(order)}.")
    found = []
    for name in order:
        needs = get(name).requires
        continuous = all(leaf.is_floating_point() for leaf in _leaves(cond))
        if (
            (methods is None or name in methods)
            and not ("samples" in needs and x is None)
            and not ("condition" in needs and (cond is None or D.null_condition is None))
            and not (name == "nearest_reference" and reference is None)
            and not (name == "nemo" and not getattr(D, "cross_attention_values", None))
            and not (name == "condition_jacobian" and not continuous)
        ):
            found.append(name)
    if methods and (lacking := [name for name in methods if name not in found]):
        raise ValueError(
            f"table1: {', '.join(f'{n} requires {sorted(get(n).requires)}' for n in lacking)}: not all of it is there. "
            "Give what is missing (samples, conditions that are continuous for condition_jacobian, reference, a model "
            "with a null condition or cross-attention), or leave the method out."
        )
    return found


def _calibrated(table: Scores, labels: Tensor, first: Tensor) -> tuple[str, Scores]:
    """The layer, noise level and direction with the best AUC on the half for choices."""
    auc = selection_auc(table, labels, first)
    if auc.isnan().all():
        raise ValueError(
            f"table1: {table.name} has no score for any memorized or any other sample of the half for choices; the "
            f"first status: {next((s for s in table.status if s != 'ok'), 'none')}."
        )
    strength = torch.maximum(auc, 1 - auc).nan_to_num(-1.0)
    i, j = divmod(int((strength == strength.max()).flatten().nonzero()[-1]), auc.shape[1])  # of equals the last layer
    direction: Direction = "high" if auc[i, j] >= 0.5 else "low"
    return f"{table.layers[i]}, sigma {table.sigmas[j]:g}, {direction}", replace(table.at(i, j), direction=direction)


def _subset(scores: Scores, rows: Tensor) -> Scores:
    status = tuple(s for s, keep in zip(scores.status, rows.tolist(), strict=True) if keep)
    return Scores(**{**vars(scores), "values": scores.values[..., rows], "status": status})
