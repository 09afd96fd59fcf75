"""Steering: do generalized samples follow a direction smoothly, and memorized ones not?"""

from __future__ import annotations

import torch

from balanced_rep.models import digits, digits_data, sample, start_noise
from balanced_rep.reproduce._figures import curves, image_grid
from balanced_rep.reproduce._part import Claim, Figure, Part, Settings, Table, Tell, judge
from balanced_rep.steering import direction, response, response_derivative, sdedit_samples, steered_samples

__all__ = ["steering"]

LAYER, SIGMA = "net.blocks.1", 0.2
PAIRS = ((8, 3), (1, 0), (9, 4), (5, 6), (7, 2))


def steering(settings: Settings, tell: Tell) -> Part:
    """Response curves of memorized and generalized samples of the digits model.

    Args:
        settings: Of the run.
        tell: Told what is being done.

    Returns:
        The part.
    """
    part = Part("steering", "Steering generalized and memorized samples")
    D, data = digits(), digits_data()
    n = 512 if settings.quick else 1024
    z = start_noise(n, (1, 8, 8), seed=settings.seed)
    tell(f"{n} samples")
    x = sample(D, n, seed=settings.seed)
    flat = data.images.flatten(1)
    others = torch.cat([data.split.ordinary, data.split.held_out])
    near, far = (torch.cdist(x.flatten(1), flat[p]).amin(1) for p in (data.split.repeated, others))
    groups = {
        "memorized": (near < 0.5 * far).nonzero().flatten()[:80],
        "generalized": (far < near).nonzero().flatten()[:80],
    }
    strengths = torch.linspace(0, 4, 17)
    weak = int((strengths <= 1).sum())
    rows, lines, shown, wins, late = [], {}, {}, 0, 0
    pairs = PAIRS[:2] if settings.quick else PAIRS
    labels = data.labels[data.split.ordinary]
    for positive, negative in pairs:
        tell(f"towards {positive}, away from {negative}")
        v = direction(
            D, data.ordinary[labels == positive], data.ordinary[labels == negative], sigma=SIGMA, layers=LAYER
        )
        medians, onsets = {}, {}
        for name, index in groups.items():
            edits = steered_samples(D, v, z[index], strengths.tolist(), steps=(0.25, 0.95))
            r = response(D, v, edits, strengths.tolist())
            start = response(D, v, edits[:weak], strengths[:weak].tolist())
            slope = response_derivative(D, v, x[index] + 0.4 * z[index], 0.4).median()
            sd = response(D, v, sdedit_samples(D, x[index], [0.0, 0.25, 0.5, 0.75]), [0.0, 0.25, 0.5, 0.75])
            medians[name], onsets[name] = float(start.values[-1].median()), float(r.onset().nanmedian())
            lines.setdefault(f"{negative} to {positive}", {})[name] = (
                strengths.tolist(),
                r.values.median(1).values.tolist(),
            )
            rows.append(
                [
                    f"{negative} to {positive}", name, len(index), f"{start.values[-1].median():.3f}",
                    f"{start.monotone.median():.2f}", f"{r.values[-1].median():.3f}", f"{r.roughness.median():.2f}",
                    f"{r.jump.median():.2f}", f"{onsets[name]:.2f}", f"{slope:.3f}", f"{sd.values[-1].median():.3f}",
                ]
            )  # fmt: skip
            if (positive, negative) == pairs[0]:
                shown[name] = edits[::2, :6].transpose(0, 1).reshape(-1, 8, 8)
        wins += medians["generalized"] > 2 * max(medians["memorized"], 0.0)
        late += onsets["memorized"] > 2 * onsets["generalized"]
    part.figures["edits"] = Figure(
        f"Steering from {pairs[0][1]} towards {pairs[0][0]}: a sample a row, strengths 0 to 4 from left to right. "
        "The generalized ones change from the first push on, the memorized ones later.",
        image_grid(shown, columns=len(strengths[::2])),
    )
    part.tables["responses"] = Table(
        f"Direction: difference of the means of two digits at {LAYER}; medians over samples. R: how far the "
        "representation of the edited sample has moved along the direction, 1 being the way from one mean to the "
        "other.",
        ["direction", "samples", "n", "R at strength 1", "share of the way up, to 1", "R at 4", "roughness",
         "largest step", "onset", "dR/da at 0, one step", "R of SDEdit at 0.75"], rows,
    )  # fmt: skip
    part.figures["responses"] = Figure(
        "Median response to the strength of steering, a panel a direction.",
        curves(lines, xlabel="strength", ylabel="response R"),
    )
    part.claims.append(
        Claim(
            "Generalized samples are steered smoothly and at once, memorized ones are brittle: they hold out up to "
            "a threshold.", "Section 4.2, Figure 7 (shown on eight images)",
            f"of {len(pairs)} directions, generalized samples answer more than twice as much to strength 1 in "
            f"{wins}, and the response of memorized ones sets in at more than twice the strength in {late}",
            "both in all directions", judge(wins == late == len(pairs), wins + late > len(pairs)),
        )
    )  # fmt: skip
    return part
