"""The demo's words and numbers: table, reading guide, JSON and CSV."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from balanced_rep._version import __version__
from balanced_rep.demo._run import ROWS, DemoResult

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_report", "to_dict", "write_files"]

LABELS = {
    ("repeated", "std"): "std",
    ("control", "std"): "std, control",
    ("repeated", "error"): "denoising error",
    ("control", "error"): "error, control",
}


def to_dict(result: DemoResult) -> dict[str, Any]:
    """The result as plain numbers, for JSON.

    Args:
        result: Of `run_demo`.

    Returns:
        Settings, group sizes, table and the image indices by falling score.
    """
    suspicious = result.score("repeated", "std").argsort(descending=True)[: 2 * len(result.data.split.repeated)]
    return {
        "balanced_rep": __version__,
        "layer": result.layer,
        "sigmas": list(result.sigmas),
        "main_sigma": result.main_sigma,
        "n_draws": result.n_draws,
        "seed": result.seed,
        "n_repeated": len(result.data.split.repeated),
        "n_ordinary": len(result.data.split.ordinary),
        "n_never_seen": len(result.data.split.held_out),
        "other_measures_auc": dict(result.other_measures),
        "rows": [asdict(row) for row in result.rows],
        "jacobians": [asdict(row) for row in result.jacobians],
        "repeated_indices": result.data.split.repeated.tolist(),
        "most_suspicious_indices": suspicious.tolist(),
        "recipes": {variant: dict(recipe) for variant, recipe in result.recipes.items()},
    }


def write_files(result: DemoResult, folder: Path) -> list[Path]:
    """Writes `results.json` and `scores.csv` (one line per digit).

    Args:
        result: Of `run_demo`.
        folder: An existing folder.

    Returns:
        The files.
    """
    summary, table = folder / "results.json", folder / "scores.csv"
    summary.write_text(json.dumps(to_dict(result), indent=2) + "\n", encoding="utf-8")
    split = result.data.split
    groups = {int(i): "repeated" for i in split.repeated}
    groups |= {int(i): "ordinary" for i in split.ordinary} | {int(i): "never seen" for i in split.held_out}
    columns = {
        f"{name}_{model}_sigma_{sigma:g}": result.score(model, name, sigma).tolist()
        for sigma in result.sigmas
        for model, name in ROWS
    }
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "digit", "group", *columns])
        for i, label in enumerate(result.data.labels.tolist()):
            writer.writerow([i, label, groups[i], *(f"{values[i]:.6g}" for values in columns.values())])
    return [summary, table]


def print_report(result: DemoResult, console: Console) -> None:
    """Prints the table and how to read it.

    Args:
        result: Of `run_demo`.
        console: Where to.
    """
    from rich import box
    from rich.table import Table

    split = result.data.split
    console.print(
        f"[bold]Which digits has the model memorized?[/bold] {len(split.repeated)} repeated, {len(split.ordinary)} "
        f"ordinary and {len(split.held_out)} never-seen digits; score: mean of {result.n_draws} noise draws.",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("\nsigma", justify="right", no_wrap=True)
    table.add_column("\nscore", no_wrap=True)
    for heading in ("repeated\nAUC (s.e.)", "95 %\ninterval", "TPR at\n1 % FPR", "ordinary\nAUC (s.e.)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, row in enumerate(result.rows):
        found, ordinary = row.repeated, row.ordinary
        ours = (row.model, row.score) == ROWS[0]
        table.add_row(
            f"{row.sigma:g}" if i % len(ROWS) == 0 else "",
            LABELS[row.model, row.score],
            f"{found.auc:.3f} ({found.standard_error:.3f})",
            f"{found.low:.2f}-{found.high:.2f}",
            f"{100 * found.tpr_at_1_percent_fpr:.0f} %",
            f"{ordinary.auc:.3f} ({ordinary.standard_error:.3f})",
            style=("bold" if ours else None) if row.model == "repeated" else "dim",
            end_section=(i + 1) % len(ROWS) == 0,
        )
    console.print(table)
    console.print(_jacobian_table(result))
    guide = Table.grid(padding=(0, 2, 0, 0))
    guide.add_column(style="bold", no_wrap=True)
    guide.add_column()
    for key, text in _guide(result):
        guide.add_row(key, text)
    console.print(guide, highlight=False)


def _jacobian_table(result: DemoResult) -> Any:
    """Squared norm and leading singular values of the denoiser's Jacobian, medians over both groups."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(f"Jacobian at\nsigma {result.main_sigma:g}", no_wrap=True)
    for heading in ("\ndigits", "\n|J|^2", "leading\nsingular values", "|J|^2, low\nAUC (s.e.)"):
        table.add_column(heading, justify="left" if "digits" in heading else "right", no_wrap=True)
    for row in result.jacobians:
        style, found = None if row.model == "repeated" else "dim", row.detection
        for name, group in (("repeated", row.repeated), ("never seen", row.never_seen)):
            first = group is row.repeated
            table.add_row(
                row.model if first else "",
                name,
                f"{group.squared_norm:.1f}",
                " ".join(f"{s:.2f}" for s in group.singular_values),
                f"{found.auc:.3f} ({found.standard_error:.3f})" if first else "",
                style=style,
                end_section=not first,
            )
    return table


def _guide(result: DemoResult) -> list[tuple[str, str]]:
    """How to read the table, in the words that these numbers allow."""
    n = len(result.data.split.repeated)
    std, error = result.row("repeated", "std"), result.row("repeated", "error")
    control, control_error = result.row("control", "std"), result.row("control", "error")
    last = max(result.sigmas)
    std_last, error_last = result.row("repeated", "std", last), result.row("repeated", "error", last)
    other = result.other_measures
    return [
        (
            "repeated",
            f"chance that one of the {n} digits repeated {result.recipes['repeated'].get('repeats', 'many')} times in "
            "training scores higher than a digit never seen: 0.5 is guessing, 1 is perfect",
        ),
        ("ordinary", "the same for training digits that were not repeated"),
        ("control", f"a model trained on the same digits, the {n} as often as all others"),
        (
            "std",
            f"of the last hidden activation, high = suspicious: {std.repeated.auc:.3f} at sigma {std.sigma:g}, "
            f"{control.repeated.auc:.3f} on the control, {std.ordinary.auc:.3f} for ordinary digits. Near 0.5 in the "
            "last two means: it finds what was memorized, not what was merely trained on.",
        ),
        (
            "denoising error",
            f"low = suspicious, a strong baseline: {error.repeated.auc:.3f} (at sigma {last:g} "
            f"{error_last.repeated.auc:.3f}, std {std_last.repeated.auc:.3f}). It answers to mere training, too: "
            f"{error.ordinary.auc:.3f} for ordinary digits, {control_error.repeated.auc:.3f} on the control.",
        ),
        ("Jacobian", _about_jacobian(result)),
        (
            "how sure",
            f"{n} positives are few. s.e. after Hanley and McNeil (1982); at an AUC of 1 it is 0 and only the "
            "interval, the same formula inverted, says something. Each model is one training run.",
        ),
        ("false alarms", _false_alarms(result)),
        (
            "limits",
            "layer, sign and noise level matter: raw std, last hidden ReLU, high = memorized. Here memorized digits "
            f"have the stronger activation (L2 norm: AUC {other['l2']:.2f}), not the sparser one (share of active "
            f"units: {other['active_fraction']:.2f}, scale-free L4/L2: {other['l4_over_l2']:.2f}).",
        ),
    ]


def _about_jacobian(result: DemoResult) -> str:
    """What the norm of the Jacobian does at memorized digits, as far as it does."""
    row = result.jacobians[0]
    smaller = row.repeated.squared_norm < row.never_seen.squared_norm
    return (
        "of the whole denoiser, 64 x 64, exact: a change of the input times it is the change of the output. The sum of "
        "its squared singular values counts the directions that pass: "
        f"{'fewer' if smaller else 'more'} at repeated digits, whose surroundings are "
        f"{'drawn to one image' if smaller else 'left as they are'}."
    )


def _false_alarms(result: DemoResult) -> str:
    """How near the highest-scoring digits that were not repeated are to a repeated one."""
    split, flat = result.data.split, result.data.images.flatten(1)
    others = torch.cat([split.ordinary, split.held_out])
    distance = torch.cdist(flat[others], flat[split.repeated]).amin(dim=1)
    rank = distance.argsort().argsort() + 1
    first = result.score("repeated", "std")[others].argsort(descending=True)[:3]
    return (
        f"of the {len(others):,} digits that were not repeated, the three that score highest are the nearest no. "
        f"{', '.join(str(int(rank[i])) for i in first)} to a repeated one: low numbers are near-copies."
    )
