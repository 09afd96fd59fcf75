"""Detection: the paper's Table 1 on models trained here, dose and response, controls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from balanced_rep.detection import Evaluation, calibrate, evaluate, get
from balanced_rep.detection._table1 import PAPER_TABLE_1, Table1, table1
from balanced_rep.models import DigitsData, DigitsDenoiser, digits, digits_data
from balanced_rep.models.train_digits import Recipe, train_digits
from balanced_rep.reproduce._figures import curves, histograms
from balanced_rep.reproduce._networks import Kind, Training, make, prompts, train
from balanced_rep.reproduce._part import Claim, Figure, Part, Settings, Table, Tell, judge

__all__ = ["digits_table", "dose", "network", "rows_of"]

SIGMAS = (0.05, 0.1, 0.2, 0.4)
SIGMA = 0.1


def digits_table(settings: Settings, tell: Tell) -> Part:
    """Table 1 on the digits model, several training runs, and its controls.

    Args:
        settings: Of the run.
        tell: Told what is being done.

    Returns:
        The part.
    """
    part = Part("digits_table", "Which digits has a model memorized? The paper's Table 1 on a model trained here")
    tell("all methods on the shipped digits model")
    D, data = digits(), digits_data()
    found = table1(
        D, data.repeated, data.held_out, sigma=SIGMA, layer=D.score_layer, sigmas=SIGMAS,
        reference=data.images[D.train_indices], options={"flipd": {"n_probes": 64}, "jacobian_norm": {"n_probes": 64}},
        seed=settings.seed, on_method=tell,
    )  # fmt: skip
    part.tables["table1_digits"] = Table(
        "Shipped digits model (137,152 parameters): 20 repeated against 397 never-seen digits, judged on the half "
        "that had no part in choices. Seconds on this machine, all samples in one batch.", *rows_of(found),
    )  # fmt: skip
    part.tables["table1_paper"] = _printed()
    _seeds(part, settings, tell)
    _controls(part, D, data)
    return part


def _seeds(part: Part, settings: Settings, tell: Tell) -> None:
    """The calibrated score on models of several training runs."""
    aucs, rows = [], []
    for seed in range(settings.seed, settings.seed + (1 if settings.quick else 5)):
        if seed == 0:
            D: DigitsDenoiser = digits()
        else:
            D = train_digits(
                replace(Recipe(), seed=seed, split_seed=100 + seed), on_step=_steps(tell, f"digits, seed {seed}")
            )
        data = digits_data(D.split)
        x = torch.cat([data.repeated, data.held_out, data.ordinary])
        labels = torch.tensor([1] * 20 + [0] * (len(x) - 20))
        result = calibrate("representation_std", D, x, labels, sigmas=SIGMAS, seed=seed)
        e = result.held_out
        aucs.append(e.auc)
        d = result.detector
        rows.append([seed, d.layer, d.sigma, d.direction, f"{e.auc:.4f}", f"{e.low:.3f}", f"{e.high:.3f}"])
    part.tables["calibrated_seeds"] = Table(
        "representation_std with layer, noise level and sign chosen on one half, judged on the other: repeated "
        "against all other digits", ["training run", "layer", "sigma", "suspicious", "AUC", "low", "high"], rows,
    )  # fmt: skip
    mean = sum(aucs) / len(aucs)
    best = max(v["representation_std"][0] for v in PAPER_TABLE_1.values())
    part.claims.append(
        Claim(
            "The standard deviation of a representation finds memorized samples without a prompt, from one network "
            f"evaluation (the paper prints AUCs up to {best}).", "Section 4.1, Table 1",
            f"AUC {mean:.4f} on the held-out half, mean; training runs: {len(aucs)} ({min(aucs):.4f} to "
            f"{max(aucs):.4f})",
            "mean AUC >= 0.98", judge(mean >= 0.98, mean >= 0.9),
        )
    )  # fmt: skip


def _controls(part: Part, D: DigitsDenoiser, data: DigitsData) -> None:
    """Ordinary members, and a model without repetition."""
    score = get("representation_std", n_draws=4)
    values = {
        name: score(model, data.images, sigma=SIGMA, layers=model.score_layer).values
        for name, model in (("repeated", D), ("control", digits("control")))
    }
    unseen = data.split.held_out

    def against_unseen(name: str, index: Tensor) -> Evaluation:
        labels = torch.tensor([1] * len(index) + [0] * len(unseen))
        return evaluate(values[name][torch.cat([index, unseen])], labels, direction="high")

    ordinary = against_unseen("repeated", data.split.ordinary)
    control = against_unseen("control", data.split.repeated)
    part.figures["score_histograms"] = Figure(
        "Standard deviation of the last hidden activation, mean of four noise draws, sigma 0.1.",
        histograms(
            {
                title: {"repeated": v[data.split.repeated], "ordinary": v[data.split.ordinary], "never seen": v[unseen]}
                for title, v in (("model with repetition", values["repeated"]), ("control", values["control"]))
            },
            xlabel="std",
        ),
    )
    flat = 0.45 <= ordinary.auc <= 0.55 and control.low <= 0.5 <= control.high
    part.claims.append(
        Claim(
            "It detects memorization, not membership.", "implied by Section 4.1; not tested in the paper",
            f"AUC of ordinary training digits against never-seen ones {ordinary.auc:.3f} ({ordinary.low:.3f} to "
            f"{ordinary.high:.3f}); of the same twenty digits in a model without repetition {control.auc:.3f} "
            f"({control.low:.3f} to {control.high:.3f})",
            "0.45 to 0.55, and an interval around 0.5", judge(flat),
        )
    )  # fmt: skip


def dose(settings: Settings, tell: Tell) -> Part:
    """How often an image has to be repeated.

    Args:
        settings: Of the run.
        tell: Told what is being done.

    Returns:
        The part.
    """
    part = Part("dose", "Dose and response")
    repeats = (10, 40) if settings.quick else (5, 10, 20, 40)
    rows: list[list[Any]] = []
    lines: dict[str, list[float]] = {"representation_std": [], "denoising_error": [], "jacobian_norm": []}
    for n in repeats:
        recipe = replace(Recipe(), repeats=n, seed=settings.seed)
        D = (
            digits()
            if (n, settings.seed) == (40, 0)
            else train_digits(recipe, on_step=_steps(tell, f"digits, {n} repeats"))
        )
        data = digits_data(D.split)
        x, labels = torch.cat([data.repeated, data.held_out]), torch.tensor([1] * 20 + [0] * 397)
        for name, aucs in lines.items():
            layers: dict[str, Any] = {"layers": D.score_layer} if name == "representation_std" else {}
            draws = {} if name == "jacobian_norm" else {"n_draws": 4}
            e = evaluate(get(name, **draws)(D, x, sigma=SIGMA, **layers), labels)
            aucs.append(e.auc)
            rows.append([n, name, f"{e.auc:.3f}", f"{e.low:.3f}", f"{e.high:.3f}"])
    part.tables["dose"] = Table(
        "One model for each number of repetitions of twenty digits, sigma 0.1: repeated against never-seen digits",
        ["repetitions", "score", "AUC", "low", "high"], rows,
    )  # fmt: skip
    part.figures["dose"] = Figure(
        "AUC against the number of repetitions in training.",
        curves(
            {"": {name: (list(repeats), aucs) for name, aucs in lines.items()}}, xlabel="repetitions", ylabel="AUC",
            logx=True, level=0.5,
        ),
    )  # fmt: skip
    ours = lines["representation_std"]
    rising = all(b >= a for a, b in itertools.pairwise(ours))
    part.claims.append(
        Claim(
            "The score rises with the degree of memorization.", "implied by Section 3; not tested in the paper",
            ", ".join(f"{n} repetitions: {auc:.3f}" for n, auc in zip(repeats, ours, strict=True)),
            "AUC does not fall from one dose to the next", judge(rising, ours[-1] > ours[0]),
        )
    )  # fmt: skip
    return part


def network(settings: Settings, tell: Tell, *, kind: Kind) -> Part:
    """A small network of one of the paper's architectures; with prompts, the methods that need them.

    Args:
        settings: Of the run.
        tell: Told what is being done.
        kind: Which.

    Returns:
        The part.
    """
    name = kind.replace(" ", "_")
    part = Part(name, f"A small {kind}, trained here")
    data = digits_data()
    cond = {"unet": None, "dit": data.labels, "prompted unet": prompts(data)}[kind]
    D: Any = make(kind, settings.seed)
    steps = 1000 if kind == "prompted unet" else 2000  # its steps take twice as long
    train(D, data, Training(steps=steps, seed=settings.seed), cond=cond, on_step=_steps(tell, f"training a {kind}"))
    tell(f"all methods on the {kind}")
    found = table1(  # under the null condition, as the paper has it
        D, data.repeated, data.held_out, sigma=SIGMA, sigmas=SIGMAS, reference=data.images[data.split.train],
        options={"representation_std": {"pool": "max", "n_draws": 4}}, seed=settings.seed, on_method=tell,
    )  # fmt: skip
    parameters = sum(p.numel() for p in D.net.parameters())
    part.tables[f"table1_{name}"] = Table(
        f"{kind} ({parameters:,} parameters), noise prediction: 20 repeated against 397 never-seen digits",
        *rows_of(found),
    )
    if cond is not None and kind == "prompted unet":
        part.tables["table1_prompts"] = _prompt_table(D, data, cond, settings, tell)
    e = found["representation_std, calibrated"].evaluation
    part.claims.append(
        Claim(
            f"The score works for other architectures: {kind}.", "Table 1 (UNet of Stable Diffusion, DiT, EDM)",
            f"AUC {e.auc:.3f} ({e.low:.2f} to {e.high:.2f}), calibrated, held-out half, one training run",
            "AUC >= 0.95", judge(e.auc >= 0.95, e.auc >= 0.8),
        )
    )  # fmt: skip
    return part


def _prompt_table(D: Any, data: DigitsData, cond: Tensor, settings: Settings, tell: Tell) -> Table:
    """Methods of a prompt: prompts of repeated images against prompts of ordinary ones."""
    others = data.split.ordinary[:397]
    found = table1(
        D, None, None, sigma=SIGMA, cond=(cond[data.split.repeated], cond[others]), seed=settings.seed, on_method=tell,
        options={"generation_density": {"n_images": 4, "n_steps": 20, "tiles": 2, "guidance": 3.0}},
    )  # fmt: skip
    return Table(
        "Methods of a prompt: prompts of the 20 repeated digits against those of 397 ordinary training digits",
        *rows_of(found),
    )


def rows_of(found: Table1) -> tuple[list[str], list[list[Any]]]:
    """A table of methods as text.

    Args:
        found: Of `table1`.

    Returns:
        Header and rows.
    """
    header = [
        "method", "setting", "AUC (95 %)", "TPR at 1 % FPR: at most, quantile (the paper's), nearest", "ms per sample",
        "forward passes", "Jacobian-vector products", "without score", "AUC less the first row's (95 %)",
    ]  # fmt: skip
    rows = []
    for row in found.rows:
        e, r, c = row.evaluation, row.evaluation.rates[0], row.comparison
        difference = "" if c is None else f"{c.difference:+.3f} ({c.low:+.3f} to {c.high:+.3f})"
        rows.append(
            [
                row.method + (", needs the prompt" if row.needs_prompt else ""), row.setting,
                f"{e.auc:.3f} ({e.low:.2f}-{e.high:.2f})", f"{r.at_most:.2f}, {r.quantile:.2f}, {r.nearest:.2f}",
                f"{1e3 * row.seconds:.3g}", f"{row.scores.forwards:g}", f"{row.scores.tangents:g}", e.n_failed,
                difference,
            ]
        )  # fmt: skip
    return header, rows


def _printed() -> Table:
    rows = [
        [column, name, *(f"{v:g}" for v in values)]
        for column, methods in PAPER_TABLE_1.items()
        for name, values in methods.items()
    ]
    return Table(
        "The paper's own numbers, not measured here: 500 (CIFAR10: 100) memorized and as many other samples, "
        "hardware not stated",
        ["data and model", "method", "AUC", "TPR at 1 % FPR", "seconds per image"], rows,
    )  # fmt: skip


def _steps(tell: Tell, what: str) -> Callable[[int, float], None]:
    def on_step(done: int, loss: float) -> None:
        if done % 50 == 0:
            tell(f"{what}: step {done}, loss {loss:.3f}")

    return on_step
