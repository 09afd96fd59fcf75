"""Theory: the corollaries on real digits, sampling from autoencoders, and the ablation of noise level and optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanced_rep import theory
from balanced_rep.models import ReLUDAE, digits_data, sample
from balanced_rep.reproduce._figures import bars, histograms, image_grid
from balanced_rep.reproduce._part import Claim, Figure, Part, Settings, Table, Tell, judge
from balanced_rep.stats import representation_stats

__all__ = ["ablation", "corollaries", "sampling"]

SIGMA, LAM = 0.2, 0.01


def _gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _five(images: Tensor, seed: int) -> Tensor:
    """Five digits that point away from each other, centred."""
    chosen = images[theory.separable_subset(images, 5, seed=seed)]
    return chosen - chosen.mean(0)


def _generalize(images: Tensor, seed: int) -> ReLUDAE:
    return theory.train_dae(
        images, 16, sigma=SIGMA, lam=LAM, loss="sampled", batch_size=256, steps=4500, lr=0.01, seed=seed
    ).model


def corollaries(settings: Settings, tell: Tell) -> Part:
    """Corollaries 3.2 and 3.3, and the representations that go with them.

    Args:
        settings: Of the run.
        tell: Told what is being done.

    Returns:
        The part.
    """
    part = Part("corollaries", "Storing samples and learning their distribution")
    images = digits_data().images.flatten(1)
    seeds = range(settings.seed, settings.seed + (1 if settings.quick else 5))
    rows, stored, learned = [], [], []
    for seed in seeds:
        tell(f"memorizing five digits, seed {seed}")
        five = _five(images, seed)
        model = theory.train_dae(five, 20, sigma=SIGMA, lam=LAM, seed=seed).model
        columns = theory.merge_parallel_columns(model.W1)
        match = theory.match_columns(columns, five)
        scale = theory.column_scale(five, sigma=SIGMA, lam=LAM) * five.norm(dim=1)
        ratio = (match.norm / scale - 1).abs().max().item()
        beta = theory.separability(five).beta
        rows.append(["3.2", seed, f"{match.cosine.min():.6f}", f"{ratio:.2e}", columns.shape[1], f"{beta:.3f}"])
        stored.append((five, model, columns, match.cosine.min().item(), ratio))
    part.tables["corollary_3_2"] = Table(
        "Five digits, 20 units, tied weights, after joining parallel columns: least cosine of a sample to its "
        "column, largest relative error of a column's norm, columns, largest cosine between two samples",
        ["corollary", "seed", "least cosine", "norm error", "columns", "beta"], rows,
    )  # fmt: skip
    cosine, ratio = min(s[3] for s in stored), max(s[4] for s in stored)
    part.claims.append(
        Claim(
            "With more units than samples, the weights become the training samples: W = (r_1 x_1 ... r_n x_n 0 ... "
            "0), r_i^2 = (|x_i|^2 - n lambda) / (|x_i|^4 + sigma^2 |x_i|^2).", "Corollary 3.2",
            f"least cosine {cosine:.5f}, norms within {100 * ratio:.2g} %; training runs: {len(stored)}",
            "cosine >= 0.999 and norms within 1 %", judge(cosine >= 0.999 and ratio <= 0.01, cosine >= 0.99),
        )
    )  # fmt: skip
    errors = []
    labels = torch.zeros(len(images), dtype=torch.int64)
    optimum = theory.closed_form(images, labels, sigma=SIGMA, lam=LAM, p=16)
    for seed in seeds:
        tell(f"generalizing all digits, seed {seed}")
        model = _generalize(images, seed)
        overlap = theory.principal_angles(model.W1, optimum.W).cos().square().mean().item()
        errors.append((theory.gram_error(model.W1, optimum.W), overlap))
        learned.append(model)
    part.tables["corollary_3_3"] = Table(
        "All 1797 digits as one cluster, not centred, 16 units: relative error of W W^T and overlap of the two spaces",
        ["corollary", "seed", "error of W W^T", "overlap"],
        [["3.3", s, f"{e:.4f}", f"{o:.5f}"] for s, (e, o) in zip(seeds, errors, strict=True)],
    )
    worst, overlap = max(e for e, _ in errors), min(o for _, o in errors)
    part.claims.append(
        Claim(
            "With few units and many samples, W_k W_k^T is (S_k - lambda/rho_k I)(S_k + sigma^2 I)^-1, cut to its "
            "leading eigenvectors.", "Corollary 3.3",
            f"error of W W^T at most {worst:.3f}, overlap of the spaces at least {overlap:.4f}; training runs: "
            f"{len(errors)}",
            "error <= 0.06 and overlap >= 0.99", judge(worst <= 0.06 and overlap >= 0.99, worst <= 0.15),
        )
    )  # fmt: skip
    _rotation(part, images, optimum.W, learned[0])
    _representations(part, images, stored[0], learned[0])
    return part


def _rotation(part: Part, images: Tensor, W: Tensor, trained: ReLUDAE) -> None:
    """Loss of the closed form with its rotation, and of plain eigenvectors with the same W W^T."""
    u, s, _ = torch.linalg.svd(W, full_matrices=False)
    plain = u * s * torch.where(images.mean(0) @ u < 0, -1.0, 1.0)
    noise = torch.randn(images.shape, generator=_gen(9))
    losses = [
        float(theory.sampled_loss(M, M, images, noise, sigma=SIGMA, lam=LAM)) for M in (trained.W1, W, plain)
    ]  # fmt: skip
    spiky = [float(representation_stats(torch.relu(images @ M)).l4_over_l2.mean()) for M in (trained.W1, W, plain)]
    names = ("trained", "closed form, rotated", "closed form, plain eigenvectors")
    part.tables["rotation"] = Table(
        "The same W W^T, with and without the rotation that makes all units active: loss, and L4 / L2 of the "
        "representation",
        ["weights", "loss", "L4 / L2"],
        [[n, f"{a:.3f}", f"{b:.3f}"] for n, a, b in zip(names, losses, spiky, strict=True)],
    )
    part.claims.append(
        Claim(
            "Units of the generalizing solution are balanced. (The theorem leaves a rotation free; the ReLU does not.)",
            "Theorem 3.1, Section 3.3",
            f"loss {losses[0]:.2f} trained, {losses[1]:.2f} rotated closed form, {losses[2]:.2f} plain "
            f"eigenvectors; L4 / L2 {spiky[0]:.2f}, {spiky[1]:.2f}, {spiky[2]:.2f}",
            "rotated within 15 % of trained, plain eigenvectors more than 2 times as bad",
            judge(losses[1] <= 1.15 * losses[0] and losses[2] > 2 * losses[0], losses[1] < losses[2]),
        )
    )


def _representations(part: Part, images: Tensor, stored: tuple, learned: ReLUDAE) -> None:
    """The paper's Figures 3 and 4."""
    five, memory, columns, _, _ = stored
    merged = ReLUDAE(columns, sigma=SIGMA).requires_grad_(False)
    noisy = [x + SIGMA * torch.randn(x.shape, generator=_gen(3)) for x in (five.repeat(100, 1), images[:500])]
    h = [m.represent(y) for m, y in zip((merged, learned), noisy, strict=True)]
    stats = [representation_stats(r) for r in h]
    owner = torch.nn.functional.normalize(memory.W1, dim=0).T @ torch.nn.functional.normalize(five, dim=1).T
    order = (10 * owner.argmax(1) - memory.W1.norm(dim=0)).argsort()
    part.figures["columns"] = Figure(
        "Columns of W1 as images (the paper's Figure 3), each in its own scale. 20 units trained on the five "
        "digits of the first row are copies of them, several for each; joined, there are five. 16 units trained on "
        "1797 digits are copies of none.",
        image_grid(
            {
                "five digits": five.view(-1, 8, 8),
                "their columns, joined": columns.T[theory.match_columns(columns, five).column].reshape(-1, 8, 8),
                "the 20 columns": memory.W1.T[order].view(-1, 8, 8),
                "16 columns, all digits": learned.W1.T.reshape(-1, 8, 8),
            },
            signed=True,
        ),
    )
    part.figures["representations"] = Figure(
        "Representation of one noisy sample (the paper's Figure 4): memorizing, with parallel columns joined, and "
        "generalizing.",
        bars({"memorizing": h[0][0], "generalizing": h[1][0]}, ylabel="activation"),
    )
    part.figures["spread"] = Figure(
        "Spread of the representations of 500 noisy samples. Left: the standard deviation, as in the paper. Right: "
        "over the L2 norm, in units of what a one-hot vector of as many entries has.",
        histograms(
            {
                "std": {"memorizing": stats[0].std, "generalizing": stats[1].std},
                "std / L2 norm": {
                    "memorizing": stats[0].std_over_l2 * 5 / 4**0.5,
                    "generalizing": stats[1].std_over_l2 * 16 / 15**0.5,
                },
            },
            xlabel=("std", "share of a one-hot vector's"),
        ),
    )
    share = [float((r.amax(1) / r.sum(1)).median()) for r in h]
    part.claims.append(
        Claim(
            "Memorized samples have spiky, generalized ones balanced representations.", "Section 3.3, Figure 4",
            f"share of the largest unit in the sum: median {share[0]:.2f} memorizing (5 units), {share[1]:.2f} "
            "generalizing (16 units)", "above 0.9 and below 0.3",
            judge(share[0] > 0.9 and share[1] < 0.3, share[0] > 2 * share[1]),
        )
    )  # fmt: skip


def sampling(settings: Settings, tell: Tell) -> Part:
    """Sampling from autoencoders for many noise levels (the paper's Figure 2), and the empirical denoiser.

    Args:
        settings: Of the run.
        tell: Told what is being done.

    Returns:
        The part.
    """
    part = Part("sampling", "Sampling from two-layer autoencoders")
    images = digits_data().images.flatten(1)
    five = _five(images, settings.seed)
    levels = theory.geometric_levels(0.05, 5.0, 5 if settings.quick else 10)[:-1]
    path = theory.geometric_levels(0.05, 5.0, 40)
    tell("autoencoders of several noise levels, memorizing")
    memory = theory.train_family(five, 20, levels, lam=1e-3, steps=600, seed=settings.seed)
    tell("autoencoders of several noise levels, generalizing")
    general = theory.train_family(
        images, 16, levels, lam=1e-3, loss="sampled", batch_size=256, steps=600, lr=0.01, seed=settings.seed
    )
    made = [sample(D, 200, sigmas=path, seed=settings.seed) for D in (memory, general)]
    cosine = torch.nn.functional.normalize(made[0], dim=1) @ torch.nn.functional.normalize(five, dim=1).T
    share = float((cosine.amax(1) > 0.98).double().mean())
    basis = torch.linalg.svd(images, full_matrices=False)[2][:16]
    inside = float(((made[1] @ basis.T).norm(dim=1) / made[1].norm(dim=1)).median())
    nearest = torch.cdist(made[1], images).amin(1).median().item()
    part.figures["samples"] = Figure(
        "Samples (the paper's Figure 2), each in its own scale. Autoencoders that memorized the five digits of the "
        "first row give them back, or end between two. Those of all digits make shapes that are in no training "
        "set, and no good digits: 16 units carry no more.",
        image_grid(
            {
                "five digits": five.view(-1, 8, 8),
                "memorizing": made[0][:20].view(-1, 8, 8),
                "generalizing": (made[1][:20] - images.mean(0)).view(-1, 8, 8),
            },
            signed=True,
        ),
    )
    part.claims.append(
        Claim(
            "Sampling with memorizing autoencoders gives back training samples, with generalizing ones it does not.",
            "Section 3.1, Figure 2",
            f"{100 * share:.0f} % of 200 samples have a cosine above 0.98 to one of the five, all five come up "
            f"{sorted(cosine.argmax(1).bincount(minlength=5).tolist())} times; the generalizing ones stay in the "
            f"span of the leading eigenvectors ({inside:.2f} of the norm), median distance to the nearest digit "
            f"{nearest:.2f}",
            "more than half of the samples, all five digits", judge(share > 0.5, share > 0.3),
        )
    )  # fmt: skip
    y = five.repeat(40, 1) + SIGMA * torch.randn(200, 64, generator=_gen(1))
    ideal = theory.EmpiricalDenoiser(five)(y, SIGMA)
    ours = theory.train_dae(five, 20, sigma=SIGMA, lam=1e-4, seed=settings.seed).model(y)
    difference = float(((ours - ideal).norm(dim=1) / ideal.norm(dim=1)).median())
    part.claims.append(
        Claim(
            "The memorizing network is the empirical denoiser.", "Section 3.1, Equation 3",
            f"relative difference of the two at noisy training samples: median {100 * difference:.1f} % (lambda 1e-4)",
            "at most 5 %", judge(difference <= 0.05, difference <= 0.2),
        )
    )  # fmt: skip
    return part


def ablation(settings: Settings, tell: Tell) -> Part:
    """Noise level and optimizer (the paper's Appendix B.1).

    Args:
        settings: Of the run.
        tell: Told what is being done.

    Returns:
        The part.
    """
    part = Part("ablation", "Noise level and optimizer")
    five = _five(digits_data().images.flatten(1), settings.seed)
    rows: list[list[Any]] = []
    least: dict[tuple[float, str], float] = {}  # over optimizers
    off: dict[tuple[float, str], float] = {}
    for sigma in (0.2, 1.0, 5.0):
        for optimizer in ("adam", "rmsprop") if settings.quick else ("adam", "adamw", "rmsprop"):
            for loss in ("mask", "sampled"):
                if settings.quick and loss == "sampled" and optimizer != "adam":
                    continue
                tell(f"sigma {sigma:g}, {optimizer}, {loss} loss")
                options: dict[str, Any] = {"n_draws": 16} if loss == "sampled" else {}
                model = theory.train_dae(
                    five, 20, sigma=sigma, lam=LAM, optimizer=optimizer, loss=loss, seed=settings.seed, **options
                ).model
                match = theory.match_columns(theory.merge_parallel_columns(model.W1), five)
                ratio = match.norm / (theory.column_scale(five, sigma=sigma, lam=LAM) * five.norm(dim=1))
                cosine, worst = (
                    float(match.cosine.nan_to_num(0.0).min()),
                    float((ratio - 1).abs().nan_to_num(1.0).max()),
                )
                rows.append([sigma, optimizer, loss, f"{cosine:.4f}", f"{ratio.min():.3f}", f"{ratio.max():.3f}"])
                at = sigma, loss
                least[at], off[at] = min(least.get(at, 1.0), cosine), max(off.get(at, 0.0), worst)
    part.tables["ablation"] = Table(
        "Five digits of norm about 4: least cosine of a sample to its column, and least and largest norm of a "
        "column over the closed form. The sampled loss is the true objective, the mask loss its value while noise "
        "flips no unit.",
        ["sigma", "optimizer", "loss", "least cosine", "norm, least", "norm, largest"], rows,
    )  # fmt: skip
    holds = {at: least[at] >= 0.99 and off[at] < 0.05 for at in least}
    measured = "; ".join(
        f"sigma {sigma:g}, {'true' if loss == 'sampled' else 'fixed-activation'} loss: cosine >= "
        f"{least[sigma, loss]:.3f}, norms within {100 * off[sigma, loss]:.2g} %"
        for sigma, loss in least
    )
    part.claims.append(
        Claim(
            "The result does not depend on the noise level (0.2, 1, 5) or the optimizer (Adam, AdamW, RMSProp).",
            "Appendix B.1", measured, "cosine >= 0.99 and norms within 5 % everywhere",
            judge(all(holds.values()), any(holds.values())),
        )
    )  # fmt: skip
    return part
