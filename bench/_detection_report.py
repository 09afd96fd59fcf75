"""The bars and the table of detection, from results/detection.csv alone."""

from __future__ import annotations

if __package__:  # the tables of the documentation
    from . import report
else:
    import report

Bar, Row, pick = report.Bar, report.Row, report.pick

LEAST = {"a layer, an image at a time": 5.0, "one jvp per probe": 3.0}


def bars(rows: list[Row]) -> list[Bar]:
    """Both bars, in CPU time, for each number of threads."""
    found = []
    for candidate, least in LEAST.items():
        mine = pick(rows, candidate=candidate)
        figures: dict[str | None, str] = {row["threads"]: f"{float(row['ratio_cpu']):.3g}x" for row in mine}
        met = all(float(row["ratio_cpu"]) >= least for row in mine) if mine else None
        what = "FLIPD" if candidate == "one jvp per probe" else "all layers and noise levels"
        found.append(Bar(f"{what} against {candidate}", f">= {least:g}x", figures, met))
    return found


def table(rows: list[Row]) -> str:
    """Every candidate with the work that it did, and its time over ours for the same work."""
    lines = [
        "| candidate | threads | images | layers | noise levels | probes | CPU ms | times ours | 20 to 80 % |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        levels, layers = ("", "") if row["probes"] else (row["sigmas"], row["layers"])
        milliseconds = float(row["cpu_ms"]) * float(row["scale"])
        spread = f"{float(row['paired_p20']):.3g} to {float(row['paired_p80']):.3g}" if row["ratio_cpu"] else ""
        ratio = f"{float(row['ratio_cpu']):.3g}" if row["ratio_cpu"] else "1"
        lines.append(
            f"| {row['candidate']} | {row['threads']} | {row['images']} | {layers} | {levels} | {row['probes']} | "
            f"{milliseconds:.4g} | {ratio} | {spread} |"
        )
    return "\n".join(lines)


def markdown(name: str, rows: list[Row]) -> str:
    """One generated block.

    Args:
        name: "detection-bars" or "detection".
        rows: Of the CSV.

    Returns:
        Markdown.
    """
    if not rows:
        return report.NOTHING
    text = report.bars_table(bars(rows)) if name == "detection-bars" else table(rows)
    return f"{text}\n\n{report.machine_line(rows)}"
