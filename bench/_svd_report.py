"""The bars and tables of the randomized SVD, from results/svd.csv alone."""

from __future__ import annotations

from collections.abc import Sequence

if __package__:  # the tables of the documentation
    from . import report
else:
    import report

Bar, Row, pick = report.Bar, report.Row, report.pick

TWICE = "torch.svd_lowrank, niter=2"
SLOW_PEERS = ("sklearn randomized_svd", "fbpca", "scipy svds, arpack", "scipy svds, propack")
TRAINED = ("trained U-Net", "trained DiT")
SYMMETRIC = ("Gaussian denoiser", "memorizing denoiser")


def bars(rows: list[Row]) -> list[Bar]:
    """Every figure that was asked for, the worst case of each."""
    dense, batch = pick(rows, section="dense"), pick(rows, section="batch")
    lowrank = [row for row in dense if row["candidate"].startswith("torch.svd_lowrank")]
    found = [
        _least("4096 x 1024, k=32, time of `torch.svd_lowrank` (niter 2, 3, 4) at equal error", lowrank, 1.6),
        _least("the same, bar for a processor with bfloat16 products", lowrank, 2.5),
        _least("the same, scikit-learn, fbpca, `svds` (those installed)", pick(dense, candidate=SLOW_PEERS), 10),
        _least("64 of 1024 x 768, k=16, `torch.svd_lowrank`", pick(batch, candidate=TWICE), 1.5),
        _least("64 of 1024 x 768, k=16, `torch.linalg.svd`", pick(batch, candidate="torch.linalg.svd"), 40),
    ]
    auto = pick(rows, section="jacobian", candidate="jacobian_svd, auto")
    near, far = pick(auto, case=SYMMETRIC), pick(auto, case="trained U-Net")
    found += [
        _most("passes until 16 values are within 1 %, nearly symmetric denoisers", near, "passes_to_1pc", 90),
        _most("rounds until then", near, "rounds_to_1pc", 12),
        _most("passes until then, asymmetric U-Net", far, "passes_to_1pc", 190),
        _most("passes spent by `tol=1e-2`, nearly symmetric denoisers", near, "passes", 1.3 * 90),
        _most("passes spent by `tol=1e-2`, asymmetric U-Net", far, "passes", 1.3 * 190),
        _most("error of the values then", auto, "value_error", 0.01),
        _least(
            "networks with n >= 3072, whole Jacobian and its SVD",
            pick(rows, section="networks", case=TRAINED, candidate="whole Jacobian and its SVD"),
            10,
        ),
    ]
    merged = [row for row in pick(rows, section="streaming") if "merged" in row["candidate"]]
    one = [
        row
        for row in pick(rows, section="streaming")
        if row["candidate"].startswith("incremental") and row not in merged and "shuffled" not in row["candidate"]
    ]
    if merged and one:
        base = float(one[-1]["excess"])
        change = [{**row, "change": str(abs(float(row["excess"]) / base - 1))} for row in merged]
        found += [
            _most("excess of the incremental stream, activations, k=32", [one[-1], *merged], "excess", 1e-3),
            _most("change of it by number and order of merges", change, "change", 0.1),
        ]
    certificates = [row for row in pick(rows, section="certificate") if row["tight"] == "True"]
    found.append(_most("certified error off the true one", certificates, "off", 0.01))
    return [bar for bar in found if bar.figures]


def _least(what: str, rows: list[Row], least: float) -> Bar:
    rows = [row for row in rows if row.get("ratio")]
    figures = {}
    for threads in sorted({row["threads"] for row in rows}):
        worst = min((row for row in rows if row["threads"] == threads), key=lambda row: float(row["ratio"]))
        figures[threads] = f"{float(worst['ratio']):.3g}x ({worst['case']}, {worst['candidate'].split(', ')[-1]})"
    met = all(float(row["ratio"]) >= least for row in rows) if rows else None
    return Bar(what, f">= {least:g}x", figures, met)


def _most(what: str, rows: list[Row], column: str, most: float) -> Bar:
    """Counts and errors, which do not depend on the number of threads."""
    rows = [row for row in rows if row.get(column, "") != ""]
    worst = max(rows, key=lambda row: float(row[column]), default=None)
    figures = {} if worst is None else {None: f"{float(worst[column]):.3g} ({worst['case']})"}
    return Bar(what, f"<= {most:g}", figures, None if worst is None else float(worst[column]) <= most)


def dense_table(rows: list[Row]) -> str:
    """Peers, their errors, and their times over that of our call with no larger error."""
    mine = [row for row in pick(rows, section=("dense", "batch")) if row.get("against")]
    lines = [
        "| matrix | threads | peer | excess | ours | its excess | ms | times ours |",
        "|---|--:|---|--:|---|--:|--:|--:|",
    ]
    for row in mine:
        excess = f"{float(row['excess']):.1e}" if row["excess"] else ""
        ours = f"{float(row['ours_excess']):.1e}" if row.get("ours_excess") else ""
        peer = f"{row['case']} | {row['threads']} | {row['candidate']} | {excess}"
        lines.append(f"| {peer} | {row['against']} | {ours} | {row['ms']} | {float(row['ratio']):.3g} |")
    return "\n".join(lines)


def jacobian_table(rows: list[Row]) -> str:
    """Passes and rounds on the three denoisers, the largest of the seeds."""
    lines = [
        "| Jacobian | n | asymmetry | method | to 1 %: passes (rounds) | spent | error |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    mine = pick(rows, section="jacobian")
    for case, candidate in dict.fromkeys((row["case"], row["candidate"]) for row in mine):
        same = pick(mine, case=case, candidate=candidate)
        worst = max(same, key=lambda row: float(row["passes_to_1pc"] or "inf"))
        first = f"{worst['passes_to_1pc']} ({worst['rounds_to_1pc']})" if worst["passes_to_1pc"] else "not all"
        spent = max(int(row["passes"]) for row in same)
        errors = [float(row["value_error"]) for row in same if row.get("value_error")]
        lines.append(
            f"| {case} | {worst['n']} | {worst['asymmetry'] or ''} | {candidate.removeprefix('jacobian_svd, ')} | "
            f"{first} | {spent} | {f'{max(errors):.1e}' if errors else ''} |"
        )
    return "\n".join(lines)


def networks_table(rows: list[Row]) -> str:
    """Seconds on networks."""
    lines = ["| network | n | | passes | seconds | times ours |", "|---|--:|---|--:|--:|--:|"]
    for row in pick(rows, section="networks"):
        seconds = f"{float(row['ms']) / 1e3:.3g}"
        note = f" (scaled up from {row['scaled_from']} columns)" if row.get("scaled_from") else ""
        what = f"{row['candidate']}{note} | {row['passes']} | {seconds} | {float(row['ratio']):.3g}"
        lines.append(f"| {row['case']} | {row['n']} | {what} |")
    return "\n".join(lines)


def streaming_table(rows: list[Row]) -> str:
    """Excess over the best components."""
    lines = ["| stream | excess | ms |", "|---|--:|--:|"]
    for row in pick(rows, section="streaming"):
        lines.append(f"| {row['candidate']} | {float(row['excess']):.1e} | {row['ms']} |")
    return "\n".join(lines)


TABLES = {
    "svd-bars": lambda rows: report.bars_table(bars(rows)),
    "svd-dense": dense_table,
    "svd-jacobian": jacobian_table,
    "svd-networks": networks_table,
    "svd-streaming": streaming_table,
}


def markdown(table: str, rows: Sequence[Row]) -> str:
    """One generated block: "svd-bars", "svd-dense", "svd-jacobian", "svd-networks" or "svd-streaming"."""
    rows = list(rows)
    return f"{TABLES[table](rows)}\n\n{report.machine_line(rows)}" if rows else report.NOTHING
