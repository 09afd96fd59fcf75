"""The table of the front page: one line for each kind of work, others as multiples of ours, from the CSV files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

if __package__:  # the tables of the documentation
    from . import report
else:
    import report

Row, pick = report.Row, report.pick

STATISTICS = {
    "torch.std": "`torch.std` alone",
    "torch.compile": "nine measures by `torch.compile`",
    "eager": "eager",
    "numpy": "numpy",
}
PRODUCTS = {
    "vmap(jvp)": "`vmap(jvp)`",
    "loop of torch.func.jvp": "loop of `torch.func.jvp`",
    "jax.vmap(jax.jvp), jit": "JAX, jitted",
}
PARTS = {"statistics": "moments", "products": "jvp", "decompositions": "svd", "detection": "detection"}
NETWORKS = {"dit": "a DiT", "sd": "a reduced SD UNet", "edm": "an EDM-like UNet"}
DECOMPOSITIONS = {
    "torch.svd_lowrank, niter=2": "`svd_lowrank`",
    "sklearn randomized_svd": "scikit-learn",
    "torch.linalg.svd": "`linalg.svd`",
}
DETECTION = {
    "a layer, an image at a time": (
        "all layers and noise levels of {images} images",
        "a hook, a layer, an image at a time",
    ),
    "one jvp per probe": ("FLIPD with {probes} probes", "`torch.func.jvp` per probe"),
}


def table() -> str:
    """The table; lines whose results are not there are left out."""
    lines = ["| work | threads | ours | others take |", "|---|--:|--:|---|"]
    lines += _statistics(report.read(report.RESULTS / "moments.csv"))
    lines += _products(report.read(report.RESULTS / "jvp.csv"))
    lines += _decompositions(report.read(report.RESULTS / "svd.csv"))
    lines += _detection(report.read(report.RESULTS / "detection.csv"))
    return "\n".join(lines)


def _line(what: str, threads: str, milliseconds: float, others: Iterable[str]) -> str:
    return f"| {what} | {threads} | {_time(milliseconds)} | {', '.join(others)} |"


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


def _times(ratio: float) -> str:
    return f"{ratio:.{1 if ratio < 10 else 0}f}x"


def _named(rows: Iterable[Row], names: dict[str, str], column: str) -> list[str]:
    """Each peer with its multiple, in the order of the names."""
    ratios = {row["candidate"]: float(row[column]) for row in rows if row.get(column)}
    return [f"{name} {_times(ratios[peer])}" for peer, name in names.items() if peer in ratios]


def _statistics(rows: list[Row]) -> list[str]:
    lines = []
    for ours in pick(rows, section="statistics", candidate=report.OURS, threads="1", dtype="float32"):
        if ours["layout"] == "all" or ours["shape"] == "64x81920":
            continue
        same = pick(rows, **{key: ours[key] for key in ("section", "shape", "layout", "dtype", "threads")})
        what = f"all statistics of the {ours['layout']}, {ours['shape']} f32"
        lines.append(_line(what, "1", float(ours["ms"]), _named(same, STATISTICS, "ratio")))
    return lines


def _products(rows: list[Row]) -> list[str]:
    lines = []
    for model, name in NETWORKS.items():
        mine = pick(rows, section="time", model=model, n_tangents="16")
        ours = next(iter(pick(mine, candidate="jvp")), None)
        if ours is None:
            continue
        wide = 1 / float(ours["over_wide_forward"])
        others = [f"17 forwards as one batch {_times(wide)}", *_named(mine, PRODUCTS, "jvp_faster")]
        lines.append(_line(f"16 Jacobian-vector products of {name}", ours["threads"], float(ours["ms"]), others))
    return lines


def _decompositions(rows: list[Row]) -> list[str]:
    peers = [row for row in pick(rows, section=("dense", "batch"), threads="1") if row.get("against")]
    lines = []
    for case in dict.fromkeys(row["case"] for row in peers):
        same = pick(peers, case=case)
        named = _named(same, DECOMPOSITIONS, "ratio")
        first = next((row for row in same if row["candidate"] in DECOMPOSITIONS), None)
        if first is not None:
            ours = float(first["ms"]) / float(first["ratio"])
            lines.append(_line(f"SVD at equal error, {case}", first["threads"], ours, named))
    for row in pick(rows, section="networks", candidate="whole Jacobian and its SVD"):
        what = f"leading singular values of the Jacobian of a {row['case']}"
        ours = float(row["ms"]) / float(row["ratio"])
        lines.append(_line(what, row["threads"], ours, [f"whole Jacobian and SVD {_times(float(row['ratio']))}"]))
    return lines


def _detection(rows: list[Row]) -> list[str]:
    lines = []
    for row in pick(rows, candidate=tuple(DETECTION), threads="1"):
        what, peer = DETECTION[row["candidate"]]
        ratio = float(row["ratio_cpu"])
        ours = float(row["cpu_ms"]) * float(row["scale"]) / ratio
        lines.append(_line(what.format_map(row), row["threads"], ours, [f"{peer} {_times(ratio)}"]))
    return lines


def markdown(rows: Sequence[Row]) -> str:
    """The table, and the machine and the commit that each part was measured at.

    Args:
        rows: Any results, which name the version of torch.

    Returns:
        Markdown.
    """
    parts: dict[str, list[str]] = {}
    for part, name in PARTS.items():
        found = report.read(report.RESULTS / f"{name}.csv")
        for machine in sorted({f"{r['cpu']}, {r['cpus']} cores, {r['isa']}" for r in found}):
            commits = sorted({r["commit"] for r in found if machine == f"{r['cpu']}, {r['cpus']} cores, {r['isa']}"})
            parts.setdefault(machine, []).append(f"{part} (commit {' and '.join(commits)})")
    told = "; ".join(f"{', '.join(measured)} on {machine}" for machine, measured in parts.items())
    return f"{table()}\n\nMeasured: {told}. torch {rows[-1]['torch']}; detection in CPU time."
