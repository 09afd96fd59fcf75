"""The bars and tables of the forward mode, from results/jvp.csv alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

if __package__:  # the tables of the documentation
    from . import report
else:
    import report

Bar, Row, pick = report.Bar, report.Row, report.pick

# What names a row: rows of several runs stand in one file.
KEY = ("section", "model", "batch", "n_tangents", "threads", "dtype", "candidate")
OURS, LOWER = "jvp", "jvp, tangent_dtype=bfloat16"
LOOP, TOGETHER = "loop of torch.func.jvp", "vmap(jvp)"
PEERS = (LOOP, TOGETHER, "jax.vmap(jax.jvp), jit")
MODELS = {"dit": "DiT-like", "sd": "SD-like", "edm": "EDM-like"}
NAMES = {**MODELS, "sd14": "SD 1.4, 64 x 64 latents", "dit_xl": "DiT-XL/2, 32 x 32 latents"}
RATIO = {"dit": 1.12, "sd": 1.25, "edm": 1.11}  # time over one forward of batch (K + 1) B, K = 16
EFFICIENCY = {"dit": 1.5, "sd": 1.05, "edm": 1.9}  # K = 16
EFFICIENCY_LOWER = {"dit": 3.2, "sd": 1.8, "edm": 3.0}  # with bfloat16 tangents where the processor multiplies them
GAIN = {"dit": 1.3, "sd": 4.0, "edm": 1.3}  # times the best peer, K >= 4


def bars(rows: list[Row]) -> list[Bar]:
    """Every figure that was asked for and can be measured on any processor."""
    times, found = pick(rows, section="time"), []
    for model, name in MODELS.items():
        ours = pick(times, model=model, candidate=OURS)
        at16 = pick(ours, n_tangents="16")
        found.append(
            _bar(f"{name}, K = 16: time over one forward of batch 17", at16, "over_wide_forward", most=RATIO[model])
        )
    for candidate, bar, tangents in ((OURS, EFFICIENCY, ""), (LOWER, EFFICIENCY_LOWER, ", bfloat16 tangents")):
        for model, name in MODELS.items():
            at16 = pick(times, model=model, candidate=candidate, n_tangents="16")
            found.append(_bar(f"{name}, K = 16{tangents}: E", at16, "efficiency", least=bar[model]))
    for model, name in MODELS.items():
        best = [r for r in _best_peers(times, model) if int(r["n_tangents"]) >= 4]
        found.append(_bar(f"{name}, K >= 4: times as fast as the best peer", best, "jvp_faster", least=GAIN[model]))
    one = [r for model in MODELS for r in _best_peers(times, model) if int(r["n_tangents"]) < 4]
    found.append(_bar("K = 1: times as fast as the best peer", one, "jvp_faster", least=1.0))
    memory = [{**r, "share": str(share)} for r in pick(times, candidate=OURS) if (share := _memory_share(times, r))]
    found.append(_bar("peak memory over that of the forward of batch K + 1", memory, "share", most=1.1))
    accuracy = [{**r, "share": str(share)} for r in pick(rows, section="accuracy") if (share := _error_share(rows, r))]
    found.append(_bar("error of the tangents over that of `torch.func.jvp`", accuracy, "share", most=1.5))
    low = pick(rows, section="accuracy", candidate=LOWER)
    found.append(_bar("error of float32 primals with bfloat16 tangents", low, "error", most=1e-2))
    return [bar for bar in found if bar.figures]


def _best_peers(times: list[Row], model: str) -> list[Row]:
    """For each K and number of threads, the fastest peer."""
    found: dict[tuple[str, str], Row] = {}
    for row in pick(times, model=model, candidate=PEERS):
        key = (row["n_tangents"], row["threads"])
        if key not in found or float(row["jvp_faster"]) < float(found[key]["jvp_faster"]):
            found[key] = row
    return list(found.values())


def _same(rows: list[Row], row: Row, candidates: Sequence[str]) -> list[Row]:
    keys = ("model", "batch", "n_tangents", "threads", "dtype", "section")
    return pick(rows, candidate=candidates, **{key: row[key] for key in keys})


def _memory_share(times: list[Row], ours: Row) -> float | None:
    wide = [r for r in _same(times, ours, ("forward (K+1)B", "forward (K+1)B, channels_last")) if r.get("peak_mb")]
    if not wide or not ours.get("peak_mb"):
        return None
    return float(ours["peak_mb"]) / max(float(min(wide, key=lambda r: float(r["ms"]))["peak_mb"]), 1e-9)


def _error_share(rows: list[Row], row: Row) -> float | None:
    peers = _same(rows, row, (TOGETHER,)) if row["candidate"] == OURS else []
    return float(row["error"]) / float(peers[0]["error"]) if peers else None


def _bar(what: str, rows: list[Row], column: str, *, least: float | None = None, most: float | None = None) -> Bar:
    """The figure farthest on the wrong side, for each number of threads."""
    figures: dict[str | None, str] = {}
    worst = (min if least is not None else max) if rows else None
    met: bool | None = True if rows else None
    for n in sorted({row["threads"] for row in rows}):
        assert worst is not None
        row = worst((r for r in rows if r["threads"] == n), key=lambda r: float(r[column]))
        value = float(row[column])
        met = bool(met) and (value >= least if least is not None else value <= (most or 0.0))
        dtype = f", {report.SHORT[row['dtype']]}" if row["dtype"] != "float32" else ""
        place = f" ({MODELS[row['model']]}, K = {row['n_tangents']}{dtype})" if len(rows) > 1 else ""
        figures[n or None] = f"{value:.3g}{place}"
    return Bar(what, f">= {least:g}" if least is not None else f"<= {most:g}", figures, met)


def times_table(rows: list[Row]) -> str:
    """Every candidate: time and spread, efficiency, multiples."""
    lines = [
        "| model | K | candidate | ms | 20 % to 80 % | E | over the forward of batch (K+1)B | peak MB |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for r in _sorted(pick(rows, section="time")):
        times = int(r["times"])
        ms, low, high = (times * float(r[key]) for key in ("ms", "ms_p20", "ms_p80"))
        lines.append(
            f"| {NAMES[r['model']]} | {r['n_tangents']} | {r['candidate']} | {ms:.4g} | {low:.4g} to {high:.4g} | "
            f"{float(r['efficiency']):.2f} | {float(r['over_wide_forward']):.2f} | {r.get('peak_mb', '')} |"
        )
    return "\n".join(lines)


def _sorted(rows: list[Row]) -> list[Row]:
    """By model, K and threads: a later run has put its rows behind the others."""
    place = list(NAMES)
    return sorted(rows, key=lambda r: (place.index(r["model"]), int(r["n_tangents"]), int(r["threads"])))


def _measured(rows: list[Row]) -> str:
    """Machines, versions and commits of the rows, those with the most rows first."""
    lines = Counter(report.machine_line([row]).rstrip(".") for row in rows)
    if len(lines) == 1:
        return f"{next(iter(lines))}."
    return " ".join(f"{n} of {len(rows)} rows: {line}." for line, n in lines.most_common())


def accuracy_table(rows: list[Row]) -> str:
    """Largest relative error of a tangent, against float64."""
    found = pick(rows, section="accuracy")
    if not found:
        return report.NOTHING
    candidates = list(dict.fromkeys((r["dtype"], r["candidate"]) for r in found))
    lines = [f"| dtype | candidate | {' | '.join(MODELS.values())} |", "|---|---|" + "--:|" * len(MODELS)]
    for dtype, candidate in candidates:
        cells = []
        for model in MODELS:
            cell = pick(found, dtype=dtype, candidate=candidate, model=model)
            cells.append(f"{float(cell[0]['error']):.2g}" if cell else "")
        lines.append(f"| {report.SHORT[dtype]} | {candidate} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(table: str, rows: list[Row]) -> str:
    """One generated block: "jvp-bars", "jvp-times", "jvp-true-size" or "jvp-accuracy"."""
    if not rows:
        return report.NOTHING
    if table == "jvp-bars":
        return f"{report.bars_table(bars(rows))}\n\n{_measured(rows)}"
    if table == "jvp-true-size":
        return f"{times_table(rows)}\n\n{_measured(rows)}"
    return times_table(rows) if table == "jvp-times" else accuracy_table(rows)
