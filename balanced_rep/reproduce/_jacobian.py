"""Jacobians: what they look like around memorized and other samples (the paper's Appendix B.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from balanced_rep import theory
from balanced_rep.detection import evaluate
from balanced_rep.detection._products import jacobian
from balanced_rep.models import digits, digits_data
from balanced_rep.reproduce._figures import curves
from balanced_rep.reproduce._part import Claim, Figure, Part, Settings, Table, Tell, judge
from balanced_rep.steering import local_linearity

__all__ = ["jacobians"]

SIGMA = 0.2


def _measures(J: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Summaries of each Jacobian (n, d, d) at samples (n, d)."""
    u, s, vh = torch.linalg.svd(J.double())
    square = s.square()
    share = square / square.sum(1, keepdim=True)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    return {
        "squared norm": square.sum(1),
        "values above 0.5": (s > 0.5).sum(1).double(),
        "stable rank": square.sum(1) / square[:, 0],
        "effective rank": torch.special.entr(share).sum(1).exp(),
        "n90": (share.cumsum(1) < 0.9).sum(1).double() + 1,
        "cosine of the leading vector and the sample": (u[:, :, 0] * unit).sum(1).abs(),
        "asymmetry": (J - J.mT).double().flatten(1).norm(dim=1) / J.double().flatten(1).norm(dim=1),
        "s": s,
        "vh": vh,
    }


def jacobians(settings: Settings, tell: Tell) -> Part:
    """Spectra of the autoencoders and of the digits model.

    Args:
        settings: Of the run.
        tell: Told what is being done.

    Returns:
        The part.
    """
    part = Part("jacobians", "Jacobians around memorized and other samples")
    tell("Jacobians of the autoencoders")
    data = digits_data()
    images = data.images.flatten(1)
    five = images[theory.separable_subset(images, 5, seed=settings.seed)]
    five = five - five.mean(0)
    memory = theory.train_dae(five, 20, sigma=SIGMA, lam=0.01, seed=settings.seed).model
    general = theory.train_dae(
        images, 16, sigma=SIGMA, lam=0.01, loss="sampled", batch_size=256, steps=4500, lr=0.01, seed=settings.seed
    ).model
    g = torch.Generator().manual_seed(settings.seed)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, model, x in (("autoencoder, stored", memory, five), ("autoencoder, generalized", general, images[:200])):
        y = x + SIGMA * torch.randn(x.shape, generator=g)
        groups[name] = _measures(model.jacobian(y), x)
    tell("Jacobians of the digits model")
    D = digits()
    x = torch.cat([data.repeated, data.held_out])
    y = x + SIGMA * torch.randn(x.shape, generator=g)
    with torch.no_grad():
        J = torch.cat([jacobian(lambda z: D(z, SIGMA), part_y) for part_y in y.split(64)])
    flat = x.flatten(1)
    groups["digits, repeated"] = _measures(J[:20], flat[:20])
    groups["digits, never seen"] = _measures(J[20:], flat[20:])
    names = [n for n in groups["digits, repeated"] if n not in ("s", "vh")]
    part.tables["jacobians"] = Table(
        f"Medians over samples, at noisy samples, sigma {SIGMA}", ["measure", *groups],
        [[n, *(f"{m[n].median():.3g}" for m in groups.values())] for n in names],
    )  # fmt: skip
    part.figures["spectra"] = Figure(
        "Singular values of the Jacobian, medians over samples.",
        curves(
            {"": {n: (range(1, 33), m["s"].median(0).values[:32].tolist()) for n, m in groups.items()}},
            xlabel="index", ylabel="singular value",
        ),
    )  # fmt: skip
    stored = groups["autoencoder, stored"]
    part.claims.append(
        Claim(
            "Around a memorized sample the Jacobian has low rank and is dominated by the sample itself.",
            "Appendix B.3, Corollary 3.2",
            f"autoencoder: effective rank {stored['effective rank'].max():.4f}, cosine of the leading singular "
            f"vector to the sample {stored['cosine of the leading vector and the sample'].min():.4f}; generalizing "
            f"one: effective rank {groups['autoencoder, generalized']['effective rank'].median():.1f} of 16 units",
            "effective rank below 1.01 and cosine above 0.99",
            judge(
                bool(stored["effective rank"].max() < 1.01)
                and bool(stored["cosine of the leading vector and the sample"].min() > 0.99)
            ),
        )
    )
    labels = torch.tensor([1] * 20 + [0] * 397)
    auc = {
        n: evaluate(
            torch.cat([groups[g][n] for g in ("digits, repeated", "digits, never seen")]), labels, direction="low"
        ).auc
        for n in ("squared norm", "values above 0.5", "stable rank", "effective rank")
    }
    smaller = float(
        groups["digits, never seen"]["squared norm"].median() / groups["digits, repeated"]["squared norm"].median()
    )
    lead = groups["digits, repeated"]["cosine of the leading vector and the sample"].median()
    part.claims.append(
        Claim(
            "The same in a trained deep network (the paper: EDM and Stable Diffusion).", "Appendix B.3",
            f"digits model: squared norm {smaller:.1f} times as small around repeated digits; as a score, low is "
            "suspicious: AUC "
            + ", ".join(f"{n} {v:.3f}" for n, v in auc.items()) +
            f"; cosine of the leading vector to the sample {lead:.2f}: not dominated by it",
            "AUC of the squared norm >= 0.95; the leading vector along the sample (cosine above 0.9)",
            judge(auc["squared norm"] >= 0.95 and bool(lead > 0.9), auc["squared norm"] >= 0.95),
        )
    )  # fmt: skip
    _linearity(part, memory, D, data.repeated, data.held_out[:100], five, g)
    return part


def _linearity(part: Part, memory, D, repeated: Tensor, unseen: Tensor, five: Tensor, g: torch.Generator) -> None:
    """How far J y explains D(y)."""
    found = {}
    for name, model, x in (
        ("autoencoder", memory, five),
        ("digits, repeated", D, repeated),
        ("digits, never seen", D, unseen),
    ):
        found[name] = local_linearity(model, x + SIGMA * torch.randn(x.shape, generator=g), SIGMA)
    part.tables["linearity"] = Table(
        "How far J y explains D(y), medians", ["model and samples", "relative error", "cosine"],
        [[n, f"{v.error.median():.3g}", f"{v.cosine.median():.4f}"] for n, v in found.items()],
    )  # fmt: skip
