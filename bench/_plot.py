"""Draws the figures of docs/images/ that come from the CSV files: `python bench/_plot.py`."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
INK, MUTED, FAINT = "#222222", "#767676", "#d8d8d8"
OURS, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito: told apart by everybody
DTYPE_COLOURS = {"float32": OURS, "float16": ORANGE, "bfloat16": GREEN}
STYLE = {
    **{
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.labelsize": 8.5,
    },
    **{"axes.edgecolor": MUTED, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False},
    **{"xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8, "ytick.labelsize": 8.5, "axes.titlesize": 9},
    **{"xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.titlelocation": "left", "axes.titlepad": 10},
    **{"svg.hashsalt": "balanced-rep", "svg.fonttype": "path", "figure.facecolor": "white"},
}


def _times(value: float, _: Any = None) -> str:
    return f"{value:g}×"


def _log_axis(axis: Any, ticks: Sequence[float], form: Any = _times) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(form))
    axis.set_minor_locator(NullLocator())


# ---- speed -----------------------------------------------------------------------------------------------------------

PEERS = {
    "torch.compile": "torch.compile\nof all of them",
    "torch.std": "torch.std\nalone",
    "numpy": "numpy",
    "eager": "eager torch",
}


def draw_moments(rows: list[report.Row]) -> Any:
    """Left: time of each peer over ours, a dot for each comparison. Right: bytes per second from main memory."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.3), width_ratios=(1.55, 1), layout="constrained")
        fig.get_layout_engine().set(wspace=0.09)
        _draw_ratios(
            left, [row for row in report.pick(rows, section="statistics", threads="1") if row["layout"] != "all"]
        )
        _draw_bandwidth(right, rows)
    return fig


def _draw_ratios(ax: Any, rows: list[report.Row]) -> None:
    from matplotlib.lines import Line2D

    for y, peer in enumerate(PEERS):
        mine = report.pick(rows, candidate=peer)
        for row in mine:
            colour = DTYPE_COLOURS[row["dtype"]]
            hollow = row["layout"] == "columns"
            shift = 0.13 * (list(DTYPE_COLOURS).index(row["dtype"]) - 1)
            face = "white" if hollow else colour
            ax.plot(float(row["ratio"]), y + shift, "o", ms=5, mfc=face, mec=colour, mew=1.1, zorder=3)
        values = sorted(float(row["ratio"]) for row in mine)
        if values:
            ax.plot([values[0], values[-1]], [y, y], color=FAINT, lw=1, zorder=1)
    ax.axvline(1, color=INK, lw=1)
    ax.set_xscale("log")
    ax.set_xlim(0.8, max(400.0, 1.15 * max(float(row["ratio"]) for row in rows)))
    _log_axis(ax.xaxis, (1, 3, 10, 30, 100, 300))
    ax.set_yticks(range(len(PEERS)), list(PEERS.values()))
    ax.set_ylim(len(PEERS) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("time over that of the ten sums in one read, 1 thread")
    ax.set_title("How much longer the alternatives take; a dot is a shape")
    handles = [Line2D([], [], marker="o", ls="", ms=5, color=c, label=dtype) for dtype, c in DTYPE_COLOURS.items()]
    handles += [
        Line2D([], [], marker="o", ls="", ms=5, mec=MUTED, mew=1.1, mfc=face, label=label)
        for label, face in (("over rows", MUTED), ("over columns", "white"))
    ]
    ax.legend(handles=handles, loc="upper right", frameon=False, fontsize=7.5, handletextpad=0.1, labelspacing=0.35)


def _draw_bandwidth(ax: Any, rows: list[report.Row]) -> None:
    names = {
        "read": "plain read",
        report.OURS: "ten sums, ours",
        "torch.sum": "torch.sum",
        "torch.compile": "torch.compile",
        "torch.std": "torch.std",
        "eager": "eager torch",
    }
    cell = report.pick(rows, section="statistics", shape=report.DRAM, layout="rows", dtype="float32", threads="1")
    found = {row["candidate"]: float(row["gb_s"]) for row in cell}
    shown = [name for name in names if name in found]
    for y, name in enumerate(shown):
        ours = name == report.OURS
        colour = OURS if ours else MUTED
        ax.barh(y, found[name], height=0.62, color=colour, lw=0)
        weight = "bold" if ours else "normal"
        ax.text(found[name] + 0.25, y, f" {found[name]:.2g}", va="center", color=colour, fontweight=weight)
    ax.set_yticks(range(len(shown)), [names[name] for name in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(0, 1.12 * max(found.values(), default=1.0))
    ax.set_xlabel("GB/s of the array, 1 thread")
    ax.set_title("302 MB of float32, over rows")


# ---- accuracy --------------------------------------------------------------------------------------------------------

LINES = {  # candidate: label, colour
    "raw power sums, float32": ("raw power sums in float32", ORANGE),
    "torch eager": ("eager torch, float32", PURPLE),
    "numpy": ("numpy, float32", GREEN),
    "cpp": ("ours, the worse instruction set", OURS),
}
FLOOR, TOP = 1e-9, 1e2


def draw_accuracy(rows: list[report.Row]) -> Any:
    """Errors of std and kurtosis over mean / std, and of the kurtosis over the scale; float32 values."""
    import matplotlib.pyplot as plt

    base = report.pick(rows, dtype="float32", layout="rows", family="normal")
    means = [row for row in base if row["scale"] == "1.0" and float(row["mean_over_std"]) > 0]
    scales = [row for row in base if row["mean_over_std"] == "0.0"]
    panels = (
        (means, "mean_over_std", "std", "Standard deviation", "mean / std"),
        (means, "mean_over_std", "kurtosis", "Kurtosis", "mean / std"),
        (scales, "scale", "kurtosis", "Kurtosis, other scales", "std, at mean 0"),
    )
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 3, figsize=(9.4, 3.1), sharey=True, layout="constrained")
        for ax, (part, over, measure, title, label) in zip(axes, panels, strict=True):
            _draw_errors(ax, part, over, measure)
            ax.set_title(title)
            ax.set_xlabel(label)
        axes[0].set_ylabel("relative error, worst row")
        axes[2].set_xticks([1e-20, 1e-10, 1.0, 1e8, 1e15])
        axes[0].set_ylim(FLOOR, TOP)
        powers = range(-9, 3)
        axes[0].set_yticks([10.0**k for k in powers], [f"$10^{{{k}}}$" if k % 3 == 0 else "" for k in powers])
        axes[0].minorticks_off()
        for i, (text, colour) in enumerate(LINES.values()):
            axes[0].text(0.03, 0.96 - 0.075 * i, text, color=colour, transform=axes[0].transAxes, va="top", fontsize=8)
        axes[2].text(
            0.5,
            0.94,
            "x⁴ of the others under- or overflows",
            color=MUTED,
            transform=axes[2].transAxes,
            ha="center",
            fontsize=7.5,
        )
    return fig


def _draw_errors(ax: Any, rows: list[report.Row], over: str, measure: str) -> None:
    unit, promise = report.MEASURES[measure]
    for candidate, (_, colour) in LINES.items():
        mine = [row for row in rows if row["candidate"].split(",")[0] == candidate or row["candidate"] == candidate]
        xs = sorted({float(row[over]) for row in mine})
        ys = [max(_error(row, measure) for row in mine if float(row[over]) == x) * unit for x in xs]
        style = {"color": colour, "zorder": 4 if candidate == "cpp" else 3}
        inside = [max(y, FLOOR) if y < TOP / 2 else math.nan for y in ys]
        ax.plot(xs, inside, lw=2.2 if candidate == "cpp" else 1.4, marker="o", ms=3.5, **style)
        beyond = [x for x, y in zip(xs, ys, strict=True) if not y < TOP / 2]
        ax.plot(beyond, [TOP / 2] * len(beyond), ls="", marker="^", ms=5, **style)
    ax.axhline(unit, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
    ax.text(
        0.99,
        unit * 1.3,
        f"promised: {promise.split()[0]}",
        color=MUTED,
        fontsize=7.5,
        ha="right",
        transform=ax.get_yaxis_transform(),
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.minorticks_off()


def _error(row: report.Row, measure: str) -> float:
    value = float(row[f"{measure}_error"])
    return math.inf if math.isnan(value) else value


# ---- singular values -------------------------------------------------------------------------------------------------


def draw_values(rows: list[report.Row], page: str) -> Any:
    """A panel for each matrix: the true values, those found, and the band in which the certificate puts the truth."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    mine = report.pick(rows, page=page)
    cases = list(dict.fromkeys(row["case"] for row in mine))
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            1, len(cases), figsize=(3.13 * max(len(cases), 2), 2.9), layout="constrained", squeeze=False
        )
        for ax, case in zip(axes[0], cases, strict=True):
            same = report.pick(mine, case=case)
            names = list(dict.fromkeys(row["candidate"] for row in same))
            for name, colour in zip(names, (ORANGE, OURS), strict=False):
                chosen = report.pick(same, candidate=name)
                index, true, found, upper = (
                    [float(row[key]) for row in chosen] for key in ("index", "true", "found", "upper")
                )
                ax.fill_between(index, found, upper, color=colour, alpha=0.18, lw=0)
                ax.plot(index, found, "o", ms=3, mfc="white", mec=colour, mew=1, zorder=3)
                ax.plot(index, true, color=INK, lw=0.9, zorder=2)
            ax.set_title(case)
            ax.set_xlabel("index")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            handles: list[Any] = [Line2D([], [], color=INK, lw=0.9, label="truth")]
            for name, colour in zip(names, (ORANGE, OURS), strict=False):
                handles.append(Line2D([], [], marker="o", ls="", ms=3, mfc="white", mec=colour, mew=1, label=name))
                handles.append(Patch(color=colour, alpha=0.18, lw=0, label="certified"))
            low, high = min(float(row["found"]) for row in same), max(float(row["true"]) for row in same)
            if high > 8 * low:
                ax.set_yscale("log")
            ax.legend(handles=handles, frameon=False, fontsize=7, labelspacing=0.3, handletextpad=0.4)
        axes[0][0].set_ylabel("singular value")
    return fig


FIGURES = {
    "bench_moments.svg": ("moments.csv", draw_moments),
    "bench_accuracy.svg": ("accuracy.csv", draw_accuracy),
    "randomized_svd.svg": ("svd_values.csv", functools.partial(draw_values, page="randomized_svd")),
    "jacobian_svd.svg": ("svd_values.csv", functools.partial(draw_values, page="jacobian_svd")),
    "streaming_pca.svg": ("svd_values.csv", functools.partial(draw_values, page="streaming_pca")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draws every figure whose CSV is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder to draw into")
    parser.add_argument("--png", action="store_true", help="draw .png files, to look at")
    args = parser.parse_args(argv)
    import matplotlib as mpl

    mpl.use("Agg")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (table, draw) in FIGURES.items():
        if rows := report.read(args.results / table):
            path = (args.out / name).with_suffix(".png" if args.png else ".svg")
            fig = draw(rows)
            with mpl.rc_context(STYLE):  # svg.hashsalt counts where the file is written: the same rows, the same bytes
                fig.savefig(path, dpi=170, **({} if args.png else {"metadata": {"Date": None}}))
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
