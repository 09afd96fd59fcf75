"""The demo's one figure: representations, scores, ROC, and the images that look memorized."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from balanced_rep.demo._run import DemoResult, ScoreName
from balanced_rep.models._digits import Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["draw_figure", "write_figure"]

# Okabe and Ito's colours: told apart with any colour vision.
REPEATED, ORDINARY, UNSEEN = "#D55E00", "#56B4E9", "#4D4D4D"
FADED, BASELINE, CONTROL = "#E69F00", "#0072B2", "#CC79A7"
GROUPS = {
    "memorized: repeated in training": REPEATED,
    "ordinary: in training, not repeated": ORDINARY,
    "never seen": UNSEEN,
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#4D4D4D",
    "axes.labelcolor": "#262626",
    "xtick.color": "#4D4D4D",
    "ytick.color": "#4D4D4D",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "balanced-rep",
}
N_THUMBNAILS = 24


def write_figure(result: DemoResult, folder: Path, name: str = "demo") -> list[Path]:
    """Draws the figure and writes it as PNG and SVG. Needs matplotlib; no display.

    Args:
        result: Of `run_demo`.
        folder: An existing folder.
        name: File name without ending.

    Returns:
        The files.
    """
    import matplotlib as mpl

    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with mpl.rc_context(STYLE):
        figure = draw_figure(result)
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def draw_figure(result: DemoResult) -> Figure:
    """Draws the figure without pyplot, so that no window system and no global state is involved.

    Args:
        result: Of `run_demo`.

    Returns:
        The figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, hspace=0.02)  # type: ignore[union-attr]
    n_repeated = len(result.data.split.repeated)
    figure.suptitle(
        f"Which {n_repeated} of {len(result.data.images):,} digits has this denoiser memorized? "
        "Its last hidden layer gives them away",
        fontsize=15,
        weight="bold",
        x=0.012,
        ha="left",
    )
    panels: Any = figure.subfigures(2, 2, height_ratios=[1, 1.05], width_ratios=[1, 1.02])
    (bars, faces), (hist, roc) = panels
    _draw_activations(bars, result)
    _draw_thumbnails(faces, result)
    _draw_histograms(hist.subplots(), result)
    _draw_roc(roc.subplots(), result)
    return figure


def _typical(score: Tensor, members: Tensor) -> int:
    """Index of the member whose score is the median of its group (the upper one of two)."""
    return int(members[score[members].argsort()[len(members) // 2]])


def _draw_activations(panel: SubFigure, result: DemoResult) -> None:
    """Bars of the scored activation of a typical memorized and a typical never-seen digit, on one scale."""
    score, split = result.score("repeated", "std"), result.data.split
    shown = [
        ("A memorized digit: tall spikes", REPEATED, _typical(score, split.repeated)),
        ("A never-seen digit: a quiet layer", UNSEEN, _typical(score, split.held_out)),
    ]
    axes: Sequence[Axes] = panel.subplots(2, 1, sharex=True, sharey=True)
    for ax, (title, colour, index) in zip(axes, shown, strict=True):
        height = result.activations[index].numpy()
        ax.bar(np.arange(len(height)), height, width=0.85, color=colour, linewidth=0)
        ax.set_title(f"{title} (std {height.std():.2f})", color=colour)
        ax.set_xlim(-0.5, len(height) - 0.5)
        ax.set_ylabel("activation")
        _draw_digit(ax.inset_axes((1.02, 0.1, 0.2, 0.8)), result.data.images[index], colour)
    axes[-1].set_xlabel(f"unit of the last hidden layer, input noise σ = {result.main_sigma:g}")


def _draw_digit(ax: Axes, image: Tensor, colour: str) -> None:
    """One digit, dark on light, in a coloured frame."""
    ax.imshow(image[0].numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(visible=True, color=colour, linewidth=2.4)


def _draw_thumbnails(panel: SubFigure, result: DemoResult) -> None:
    """The images with the highest scores, framed by the group they really belong to."""
    from matplotlib.patches import Patch

    score, split = result.score("repeated", "std"), result.data.split
    order = score.argsort(descending=True)[:N_THUMBNAILS].tolist()
    repeated, ordinary = set(split.repeated.tolist()), set(split.ordinary.tolist())
    hits = len(repeated.intersection(order[: len(repeated)]))
    panel.suptitle(
        f"Ranked by std: {hits} of the first {len(repeated)} are memorized digits",
        x=0.015,
        ha="left",
        fontsize=11,
        weight="bold",
    )
    axes: Any = panel.subplots(3, N_THUMBNAILS // 3, gridspec_kw={"hspace": 0, "wspace": 0})
    for ax, index in zip(axes.flat, order, strict=True):
        colour = REPEATED if index in repeated else ORDINARY if index in ordinary else UNSEEN
        _draw_digit(ax, result.data.images[index], colour)
        ax.set_xlabel(f"{score[index]:.2f}", fontsize=9, labelpad=2, color="#262626")
    key = [
        Patch(facecolor="none", edgecolor=colour, linewidth=2.4, label=label.split(":")[0])
        for label, colour in GROUPS.items()
    ]
    panel.legend(handles=key, loc="outside lower left", ncols=3, handlelength=0.9, handleheight=0.9, borderpad=0)


def _draw_histograms(ax: Axes, result: DemoResult) -> None:
    """How the score is spread in the three groups."""
    score, split = result.score("repeated", "std"), result.data.split
    edges = np.linspace(float(score.min()), float(score.max()), 36)
    peak = 0.0
    for (label, colour), members in zip(GROUPS.items(), (split.repeated, split.ordinary, split.held_out), strict=True):
        share = np.histogram(score[members].numpy(), edges)[0] * (100 / len(members))
        peak = max(peak, share.max())
        outline = members is split.held_out  # drawn over the ordinary ones, which it nearly coincides with
        text = f"{label} ({len(members):,})"
        ax.stairs(share, edges, fill=not outline, color=colour, linewidth=1.8, zorder=3 + outline, label=text)
    ax.set_ylim(0, 1.3 * peak)
    threshold = float(np.quantile(score[split.held_out].numpy(), 0.99))
    ax.axvline(threshold, color="#262626", linewidth=1, linestyle=(0, (4, 3)), zorder=5)
    ax.text(threshold, 1.275 * peak, "  1 % of never seen →", ha="left", va="top", fontsize=9, color="#262626")
    ax.legend(loc="upper left", borderaxespad=0, handlelength=0.9, handleheight=0.9)
    found = result.row("repeated", "std")
    expected = found.repeated.auc > 0.9 and abs(found.ordinary.auc - 0.5) < 0.1
    ax.set_title("The score finds repetition, not mere membership" if expected else "The score in the three groups")
    ax.set_xlabel(f"std of the last hidden layer (σ = {result.main_sigma:g}, mean of {result.n_draws} noise draws)")
    ax.set_ylabel("share of the group, %")


def _draw_roc(ax: Axes, result: DemoResult) -> None:
    """ROC curves, repeated against never seen."""
    from sklearn.metrics import roc_curve

    split = result.data.split
    labels = np.repeat([1, 0], [len(split.repeated), len(split.held_out)])
    members = torch.cat([split.repeated, split.held_out])
    main, last = result.main_sigma, max(result.sigmas)
    curves: list[tuple[str, Variant, ScoreName, float, dict[str, Any]]] = [
        ("std of last hidden layer", "repeated", "std", main, {"color": REPEATED, "linewidth": 2.6}),
        ("denoising error (baseline)", "repeated", "error", main, {"color": BASELINE, "linestyle": "--"}),
        ("std, more noise", "repeated", "std", last, {"color": FADED}),
        ("std, control model", "control", "std", main, {"color": CONTROL}),
    ]
    for label, model, name, sigma, style in curves:
        fpr, tpr, _ = roc_curve(labels, result.score(model, name, sigma)[members].numpy(), drop_intermediate=False)
        auc = result.row(model, name, sigma).repeated
        text = f"{label}, σ = {sigma:g}\nAUC {auc.auc:.3f} (95 %: {auc.low:.2f} to {auc.high:.2f})"
        ax.plot(fpr, tpr, label=text, clip_on=False, **{"linewidth": 2, **style})
    ax.plot([0, 1], [0, 1], ":", color="#BFBFBF", linewidth=1)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="false positive rate", ylabel="true positive rate", box_aspect=1)
    found, control = (result.row(model, "std").repeated.auc for model in ("repeated", "control"))
    ax.set_title(f"Repeated against never seen: AUC {found:.3f}, on the control {control:.2f}")
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), labelspacing=1.1, borderaxespad=0)
