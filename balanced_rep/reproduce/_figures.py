"""Figures of a reproduction, as SVG text. Needs matplotlib."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import numpy as np
from torch import Tensor

__all__ = ["bars", "curves", "histograms", "image_grid"]

P = ParamSpec("P")

# Okabe and Ito's colours: told apart with any colour vision.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
GREY = "#4D4D4D"
TILE = 0.5  # inches
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "legend.frameon": False, "legend.fontsize": 9, "svg.hashsalt": "balanced-rep", "figure.facecolor": "white",
}  # fmt: skip


def _drawn(draw: Callable[P, Any]) -> Callable[P, str]:
    """Runs a function that draws a figure in our style, and returns the SVG."""

    @functools.wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> str:
        from matplotlib import rc_context

        style: Any = STYLE
        with rc_context(style):
            buffer = io.StringIO()
            draw(*args, **kwargs).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]

    return run


@_drawn
def image_grid(groups: Mapping[str, Tensor], *, columns: int = 10, signed: bool = False) -> Any:
    """Rows of small images, with the name of a group on its left.

    Args:
        groups: Name to images, `(n, h, w)` or `(n, 1, h, w)`.
        columns: Images in a row.
        signed: Red and blue about zero, each image in its own scale, instead of greys in [-1, 1].

    Returns:
        SVG.
    """
    from matplotlib.figure import Figure

    rows = [math.ceil(len(images) / columns) for images in groups.values()]
    label = 0.076 * max(len(name) for name in groups)
    gap = 0.12
    width, height = label + TILE * columns, TILE * sum(rows) + gap * (len(rows) - 1)
    figure = Figure(figsize=(width, height))
    top = height
    for (name, images), n in zip(groups.items(), rows, strict=True):
        sheet = _sheet(images, columns, signed)
        share = (sheet.shape[1] + 1) / (columns * (images.shape[-1] + 1))
        axis = figure.add_axes(
            (label / width, (top - TILE * n) / height, TILE * columns * share / width, TILE * n / height)
        )
        limit = dict(cmap="RdBu_r" if signed else "gray", vmin=-1, vmax=1)
        axis.imshow(sheet, interpolation="nearest", aspect="auto", **limit)  # pyright: ignore[reportArgumentType]
        axis.axis("off")
        figure.text(0, (top - TILE / 2) / height, name, va="center", ha="left", linespacing=1.1)
        top -= TILE * n + gap
    return figure


def _sheet(images: Tensor, columns: int, signed: bool) -> np.ndarray:
    """Images side by side, a pixel apart; NaN between them."""
    tiles = _array(images.reshape(len(images), *images.shape[-2:]))
    if signed:
        tiles = tiles / np.maximum(np.abs(tiles).max(axis=(1, 2), keepdims=True), 1e-12)
    h, w = tiles.shape[1:]
    rows, columns = math.ceil(len(tiles) / columns), min(columns, len(tiles))
    sheet = np.full((rows * (h + 1) - 1, columns * (w + 1) - 1), np.nan)
    for i, tile in enumerate(tiles):
        r, c = divmod(i, columns)
        sheet[r * (h + 1) : r * (h + 1) + h, c * (w + 1) : c * (w + 1) + w] = tile
    return sheet


@_drawn
def bars(groups: Mapping[str, Tensor], *, ylabel: str) -> Any:
    """One bar chart a group, on one scale.

    Args:
        groups: Title to heights, `(p,)`.
        ylabel: Of the first panel.

    Returns:
        SVG.
    """
    figure, axes = _panels(len(groups), legend=False)
    for axis, colour, (title, heights) in zip(axes, COLOURS, groups.items(), strict=False):
        axis.bar(range(len(heights)), _array(heights), color=colour, width=0.8)
        axis.set_title(title)
        axis.set_xlabel("unit")
        axis.set_xticks(range(0, len(heights), 1 if len(heights) < 8 else 5 if len(heights) < 32 else 20))
        axis.set_ylim(0, 1.05 * max(_array(h).max() for h in groups.values()))
    axes[0].set_ylabel(ylabel)
    return figure


@_drawn
def histograms(charts: Mapping[str, Mapping[str, Tensor]], *, xlabel: str | Sequence[str]) -> Any:
    """Histograms of several groups, a panel each.

    Args:
        charts: Title of a panel to groups to values.
        xlabel: What the values are; of all panels or of each.

    Returns:
        SVG.
    """
    figure, axes = _panels(len(charts), legend=True)
    labels = [xlabel] * len(charts) if isinstance(xlabel, str) else list(xlabel)
    for axis, label, (title, groups) in zip(axes, labels, charts.items(), strict=True):
        values = {name: _array(v) for name, v in groups.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=30)
        for colour, (name, v) in zip(COLOURS, values.items(), strict=False):
            weights = np.full(len(v), 100 / max(1, len(v)))
            axis.hist(
                v, edges, weights=weights, histtype="stepfilled", color=(colour, 0.25), edgecolor=colour, label=name
            )
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(title)
        axis.set_xlabel(label)
    axes[0].set_ylabel("% of the group")
    _legend(figure, axes[0])
    return figure


@_drawn
def curves(
    charts: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    xlabel: str,
    ylabel: str,
    logx: bool = False,
    level: float | None = None,
) -> Any:
    """Lines, a panel each, on one scale.

    Args:
        charts: Title of a panel to name of a line to x and y.
        xlabel: Of all panels.
        ylabel: Of the first panel.
        logx: Logarithmic x axis, with a tick at each x.
        level: A dashed horizontal line.

    Returns:
        SVG.
    """
    figure, axes = _panels(len(charts), legend=True)
    for axis, (title, lines) in zip(axes, charts.items(), strict=True):
        for colour, (name, (x, y)) in zip(COLOURS, lines.items(), strict=False):
            axis.plot(x, y, marker="o", markersize=3, linewidth=1.4, color=colour, label=name)
            if logx:
                axis.set_xscale("log")
                axis.set_xticks(list(x), [f"{v:g}" for v in x])
                axis.set_xticks([], minor=True)
        if level is not None:
            axis.axhline(level, color=GREY, linestyle="--", linewidth=0.8)
        axis.set_title(title)
        axis.set_xlabel(xlabel)
    low, high = min(a.get_ylim()[0] for a in axes), max(a.get_ylim()[1] for a in axes)
    for axis in axes:
        axis.set_ylim(low, high)
    axes[0].set_ylabel(ylabel)
    _legend(figure, axes[0])
    return figure


def _panels(n: int, *, legend: bool) -> tuple[Any, list[Any]]:
    """An empty figure with n panels, at most three in a row, and room for a legend on the right."""
    from matplotlib.figure import Figure

    columns = min(3, n)
    rows = math.ceil(n / columns)
    size = (4.2, 2.6) if n == 1 else (2.9, 2.4)
    figure = Figure(figsize=(size[0] * columns + 1.9 * legend, size[1] * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)]


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")


def _array(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
