"""Corollary 3.4: repeated and ordinary samples in one network."""

from __future__ import annotations

import torch
from torch import Tensor

from balanced_rep import theory
from balanced_rep.detection import evaluate
from balanced_rep.models import ReLUDAE, digits_data
from balanced_rep.reproduce._figures import bars, histograms, image_grid
from balanced_rep.reproduce._part import Claim, Figure, Part, Settings, Table, Tell, judge
from balanced_rep.stats import representation_stats

__all__ = ["hybrid"]


def _gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _trained(images: Tensor, *, repeated: bool, seed: int) -> tuple[dict[str, Tensor], Tensor, ReLUDAE, Tensor]:
    """Scores of one network trained with or without repetition.

    Args:
        images: `(n, d)`.
        repeated: Let 20 of 1400 training images make up 60 % of the draws.
        seed: Of the split and the training.

    Returns:
        Score to values, high is suspicious, of the 20 and of the never-seen images; which are the 20; the network; and
        those images.
    """
    n_repeated, n_train, share, sigma = 20, 1400, 0.6, 0.3
    X = images - images.mean(0)
    X = 4 * torch.nn.functional.normalize(X, dim=1)[torch.randperm(len(X), generator=_gen(100 + seed))]
    weights = torch.ones(n_train)
    if repeated:
        weights[:n_repeated] = share / (1 - share) * (n_train - n_repeated) / n_repeated
    model = theory.train_dae(
        X[:n_train], 64, sigma=sigma, lam=1e-3, weights=weights, loss="sampled", batch_size=256, seed=seed
    ).model
    x = torch.cat([X[:n_repeated], X[n_train:]])
    found: dict[str, list[Tensor]] = {"std": [], "std / L2 norm": [], "denoising error": [], "Jacobian rank": []}
    for draw in range(4):
        y = x + sigma * torch.randn(x.shape, generator=_gen(draw))
        stats = representation_stats(model.represent(y))
        s = torch.linalg.svdvals(model.jacobian(y))
        for values, v in zip(
            found.values(),
            (stats.std, stats.std_over_l2, -(model(y) - x).square().sum(1), -s.sum(1).square() / s.square().sum(1)),
            strict=True,
        ):
            values.append(v)
    labels = torch.arange(len(x)) < n_repeated
    return {name: torch.stack(values).mean(0) for name, values in found.items()}, labels, model, x


def hybrid(settings: Settings, tell: Tell) -> Part:
    """Corollary 3.4.

    Args:
        settings: Of the run.
        tell: Told what is being done.

    Returns:
        The part.
    """
    part = Part("hybrid", "Repeated and ordinary samples in one network")
    images = digits_data().images.flatten(1)
    n_seeds = 2 if settings.quick else 5
    rows, found, control, shown = [], {}, {}, {}
    for seed in range(settings.seed, settings.seed + n_seeds):
        for repeated, into in ((True, found), (False, control)):
            tell(f"hybrid network, {'with' if repeated else 'without'} repetition, seed {seed}")
            scores, labels, model, x = _trained(images, repeated=repeated, seed=seed)
            if seed == settings.seed:
                shown["with repetition" if repeated else "control"] = scores, labels, model, x
            for name, values in scores.items():
                e = evaluate(values, labels, direction="high")
                into.setdefault(name, []).append(e.auc)
                rows.append(
                    [name, "repeated" if repeated else "control", seed, f"{e.auc:.3f}", f"{e.low:.3f}", f"{e.high:.3f}"]
                )
    part.tables["hybrid"] = Table(
        "20 of 1400 digits make up 60 % of the draws; 64 units, sigma 0.3: repeated against never-seen digits, AUC "
        "with 95 % interval; control: the same without repetition",
        ["score", "network", "seed", "AUC", "low", "high"], rows,
    )  # fmt: skip
    _hybrid_figures(part, shown)
    mean = {name: sum(v) / len(v) for name, v in found.items()}
    plain = {name: sum(v) / len(v) for name, v in control.items()}
    reached = mean["std / L2 norm"] >= 0.85 and mean["denoising error"] >= 0.95 and mean["Jacobian rank"] >= 0.95
    flat = all(0.4 <= v <= 0.6 for v in plain.values())
    part.claims.append(
        Claim(
            "The representations of repeated samples tell them apart.", "Section 3.3, Figure 6",
            "AUC " + ", ".join(f"{n} {v:.3f} (control {plain[n]:.3f})" for n, v in mean.items()) +
            f"; mean; training runs: {n_seeds}",
            "std / L2 norm >= 0.85, error and rank >= 0.95, controls within 0.4 to 0.6",
            judge(reached and flat, reached or mean["std / L2 norm"] >= 0.85),
        )
    )  # fmt: skip
    return part


def _hybrid_figures(part: Part, shown: dict[str, tuple[dict[str, Tensor], Tensor, ReLUDAE, Tensor]]) -> None:
    """Nearest columns of repeated and of other digits, a representation of each, and the spread of all."""
    _, labels, model, x = shown["with repetition"]
    cosine = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(model.W1, dim=0)
    best = cosine.argmax(1)
    near, far = (float(cosine.amax(1)[rows].median()) for rows in (labels, ~labels))
    part.claims.append(
        Claim(
            "Repeated samples are stored in single columns, beside blocks that generalize.", "Corollary 3.4",
            f"cosine of the nearest column, median: {near:.2f} for repeated digits, {far:.2f} for never-seen ones. "
            "Twenty digits do not point away from each other, as the corollary has it: they share columns",
            "above 0.95 for repeated digits", judge(near > 0.95, near > far + 0.2),
        )
    )  # fmt: skip
    part.figures["hybrid_columns"] = Figure(
        "Digits and, below each, the column of W1 that is nearest to it; each in its own scale.",
        image_grid(
            {
                "repeated": x[:10].view(-1, 8, 8),
                "nearest columns": model.W1.T[best[:10]].reshape(-1, 8, 8),
                "never seen": x[20:30].view(-1, 8, 8),
                "nearest columns ": model.W1.T[best[20:30]].reshape(-1, 8, 8),
            },
            signed=True,
        ),
    )
    part.figures["hybrid_representations"] = Figure(
        "Representation of one repeated and one never-seen digit by the same network.",
        bars({"repeated": model.represent(x[:1])[0], "never seen": model.represent(x[20:21])[0]}, ylabel="activation"),
    )
    part.figures["hybrid_spread"] = Figure(
        "Spread of the representations, mean of four noise draws.",
        histograms(
            {
                name: {"repeated": scores["std / L2 norm"][rows], "never seen": scores["std / L2 norm"][~rows]}
                for name, (scores, rows, _, _) in shown.items()
            },
            xlabel="std / L2 norm",
        ),
    )
