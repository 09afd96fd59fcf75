"""Figures against their bars, and the tables of README.md and docs/benchmarks.md, from the CSV files alone."""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NOTHING = "No results are committed yet; `make bench` runs the benchmarks on your machine."
OURS, FINISHED = "moments", "representation_stats, 9 measures"
DRAM, LARGER = "256x294912", ("64x81920", "256x294912")
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}
MET = {True: "yes", False: "no", None: "not measured"}

Row = dict[str, str]


@dataclass(frozen=True)
class Bar:
    """One line of the table of bars.

    Attributes:
        what: What is measured.
        bar: What is asked for.
        figures: Measured figure by number of threads, as text; ``None`` stands for "does not depend on it".
        met: Whether every figure reaches the bar; ``None`` if there is none.
    """

    what: str
    bar: str
    figures: dict[str | None, str]
    met: bool | None


def read(path: Path) -> list[Row]:
    """Rows of a CSV; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pick(rows: Iterable[Row], **values: str | Sequence[str]) -> list[Row]:
    """Rows whose columns have these values, or one of these."""
    wanted = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in values.items()}
    return [row for row in rows if all(row.get(key) in among for key, among in wanted.items())]


def where(row: Row) -> str:
    """The comparison that a row belongs to, in short."""
    return f"{row['shape']} {row['layout']} {SHORT.get(row['dtype'], row['dtype'])}"


def _worst(
    rows: list[Row], column: str, least: float | None, most: float | None, show: Callable[[float], str]
) -> tuple[dict[str | None, str], bool | None]:
    """The figure farthest on the wrong side, for each number of threads, and whether all are on the right side."""
    figures: dict[str | None, str] = {}
    met = True if rows else None
    for n in sorted({row["threads"] for row in rows}):
        mine = [row for row in rows if row["threads"] == n]
        row = (min if least is not None else max)(mine, key=lambda r: float(r[column]))
        value = float(row[column])
        met = met and (value >= least if least is not None else value <= (most or 0.0))
        figures[n] = show(value) + (f" ({where(row)})" if len(mine) > 1 else "")
    return figures, met


def _ratio_bar(what: str, bar: str, rows: list[Row], least: float) -> Bar:
    return Bar(what, bar, *_worst(rows, "ratio", least, None, lambda v: f"{v:.3g}x"))


def moments_bars(rows: list[Row]) -> list[Bar]:
    """The bars that `moments.csv` answers, on the worst comparison for each number of threads."""
    cells = [row for row in pick(rows, section="statistics") if row["layout"] != "all"]
    dram = pick(cells, shape=DRAM, layout="rows", dtype="float32", candidate="read")
    read_share = _worst(dram, "ratio", 0.85, None, lambda v: f"{100 * v:.0f} %")
    compiled = pick(cells, candidate="torch.compile")
    loss_bar = _dispatch_loss(pick(rows, section="isa", candidate="march=native"), 0.03)
    eager = pick(cells, candidate="eager", dtype="float32")
    return [
        Bar("f32 rows of 256x294912 (DRAM): share of a plain read's speed", ">= 85 %", *read_share),
        _ratio_bar("`torch.std` alone against all statistics", ">= 20x", pick(cells, candidate="torch.std"), 20),
        _ratio_bar("eager composition against all statistics, f32", ">= 50x", eager, 50),
        _ratio_bar("`torch.compile` of it against all statistics", ">= 1.3x", compiled, 1.3),
        _ratio_bar("the same, the two larger shapes", ">= 2.3x", pick(compiled, shape=LARGER), 2.3),
        Bar("time lost by run-time dispatch against `-march=native`", "<= 3 %", *loss_bar),
    ]


def _dispatch_loss(rows: list[Row], most: float) -> tuple[dict[str | None, str], bool | None]:
    """Time lost against a native build: the mean over all comparisons, for single ones scatter more than the bar."""
    figures: dict[str | None, str] = {}
    met = True if rows else None
    for n in sorted({row["threads"] for row in rows}):
        losses = [1 - float(row["paired"]) for row in rows if row["threads"] == n]
        mean = sum(losses) / len(losses)
        figures[n] = f"{100 * mean:+.1f} % ({100 * min(losses):+.1f} to {100 * max(losses):+.1f})"
        met = met and mean <= most
    return figures, met


MEASURES = {  # bars of float32, float16 and bfloat16 values
    "mean": (1e-6, "1e-6 max(abs(mean), std)"),
    "std": (1e-6, "1e-6 std"),
    "skewness": (1e-5, "1e-5 (1 + abs(skewness))"),
    "kurtosis": (1e-5, "1e-5 kurtosis"),
}


def accuracy_bars(rows: list[Row]) -> list[Bar]:
    """The bars that `accuracy.csv` answers, on the worst of all cases, dtypes, backends and instruction sets."""
    found = []
    mine = [row for row in pick(rows, role="ours") if row["dtype"] != "float64"]
    for measure, (unit, bar) in MEASURES.items():
        if mine:
            worst = max(mine, key=lambda row: _error(row[f"{measure}_error"]))
            value = _error(worst[f"{measure}_error"])
            figure = {None: f"{value * unit:.2g} ({worst['candidate']}, {worst['case']}, {SHORT[worst['dtype']]})"}
            found.append(Bar(f"error of the {measure}", f"<= {bar}", figure, value <= 1))
    return found


def _error(text: str) -> float:
    value = float(text)
    return math.inf if math.isnan(value) else value


def record_bars(rows: list[Row]) -> list[Bar]:
    """The bars that `record.csv` answers."""
    found = []
    for candidate, share, bar in (
        ("record, pooled", 0.01, "<= 1 % of a forward"),
        ("record, full", 0.05, "<= 5 % of a forward"),
    ):
        mine = [{**row, "cost": str(_overhead(row))} for row in pick(rows, candidate=candidate)]
        if mine:
            figures, met = _worst_record(mine, "cost", share, lambda v: f"{100 * v:.2f} %")
            found.append(Bar(f"`record` of 8 layers of an SD-like UNet, {candidate.split(', ')[1]}", bar, figures, met))
    mine = [
        {**row, "speed": str(-1 / float(row["of_forward"]))} for row in pick(rows, candidate="stop after up_blocks.0")
    ]
    if mine:
        figures, met = _worst_record(mine, "speed", -2.2, lambda v: f"{-v:.2f}x")
        found.append(Bar("`stop=True` after `up_blocks.0`: full forward against it", ">= 2.2x", figures, met))
    return found


def _overhead(row: Row) -> float:
    """CPU time inside the hooks and in opening and closing, over that of the forward.

    Timed directly: the end-to-end difference of two forwards scatters by several times the bar.
    """
    forward = float(row["cpu_ms"]) / float(row["of_forward"])
    return (float(row["hooks_cpu_ms"]) + float(row["opening_cpu_ms"])) / forward


def _worst_record(
    rows: list[Row], column: str, most: float, show: Callable[[float], str]
) -> tuple[dict[str | None, str], bool]:
    figures: dict[str | None, str] = {}
    for n in sorted({row["threads"] for row in rows}):
        figures[n] = show(max(float(row[column]) for row in rows if row["threads"] == n))
    return figures, all(float(row[column]) <= most for row in rows)


def record_table(rows: list[Row]) -> str:
    """What listening costs and what stopping saves, a column for each batch size."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    lines = [f"| | {' | '.join(f'batch {batch}' for batch in batches)} |", "|---|" + "--:|" * len(batches)]

    def add(what: str, candidate: str, show: Callable[[Row, Row], str]) -> None:
        cells = []
        for batch in batches:
            forward, row = (pick(rows, batch=batch, candidate=name)[0] for name in ("forward", candidate))
            cells.append(show(row, forward))
        lines.append(f"| {what} | {' | '.join(cells)} |")

    def share(column: str) -> Callable[[Row, Row], str]:
        return lambda row, forward: f"{100 * float(row[column]) / float(forward['cpu_ms']):.2f} %"

    def end_to_end(row: Row, _: Row) -> str:
        middle, low, high = (100 * (float(row[f"of_forward{end}"]) - 1) for end in ("", "_p20", "_p80"))
        return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"

    stop = "stop after up_blocks.0"
    add("plain forward", "forward", lambda row, _: f"{float(row['cpu_ms']):.0f} ms")
    add('inside the hooks, 8 layers, `pool="max"`', "record, pooled", share("hooks_cpu_ms"))
    add("inside the hooks, 8 layers, every value", "record, full", share("hooks_cpu_ms"))
    add("opening and closing the record", "record, full", share("opening_cpu_ms"))
    add('end to end, `pool="max"`', "record, pooled", end_to_end)
    add("end to end, every value", "record, full", end_to_end)
    add("stopped after `up_blocks.0`", stop, lambda row, _: f"{1 / float(row['of_forward']):.2f} x faster")
    add("the same by counted operations", stop, lambda row, fwd: f"{float(fwd['gflop']) / float(row['gflop']):.2f} x")
    return "\n".join(lines)


def bars_table(bars: Sequence[Bar]) -> str:
    """Markdown table of bars, one column of figures for each number of threads."""
    counts = sorted({n for bar in bars for n in bar.figures if n is not None}) or ["1"]
    head = [f"{n} thread{'s' * (n != '1')}" for n in counts]
    lines = [f"| what | bar | {' | '.join(head)} | met |", "|---|---|" + "---|" * len(counts) + ":-:|"]
    for bar in bars:
        figures = [bar.figures.get(n, bar.figures.get(None, "")) for n in counts]
        lines.append(f"| {bar.what} | {bar.bar} | {' | '.join(figures)} | {MET[bar.met]} |")
    return "\n".join(lines)


def line(rows: Sequence[Row] | Sequence[dict]) -> str:
    """One comparison in a line of text: ours in ms and GB/s, the others as multiples of it."""
    ours, *others = rows
    place = f"{ours['section']} {where(ours)} T{ours['threads']}"
    ratios = ", ".join(f"{row['candidate']} {float(row['ratio']):.3g}x" for row in others)
    return f"{place}: {ours['candidate']} {ours['ms']} ms, {ours['gb_s']} GB/s | {ratios}"


def machine_line(rows: Sequence[Row]) -> str:
    """The machine and versions of a CSV in a sentence."""
    r = rows[-1]
    return (
        f"{r['cpu']}, {r['cpus']} cores, instruction set {r['isa']}; torch {r['torch']}, numpy {r['numpy']}, "
        f"Python {r['python']}; commit {r['commit']}, {r['date']}."
    )


def statistics_table(rows: list[Row], threads: str) -> str:
    """All statistics over rows and columns of a matrix, times as multiples of ours."""
    peers = {
        "read": "plain read",
        "torch.sum": "`sum` alone",
        "torch.std": "`std` alone",
        "torch.compile": "`compile`",
        "torch.compile, tuned": "`compile`, tuned",
        "eager": "eager",
        "eager, tuned": "eager, tuned",
        "numpy": "numpy",
        "scipy.stats.describe": "scipy",
        FINISHED: "ours, finished",
    }
    lines = [f"| shape | dtype | over | ours, ms | GB/s | {' | '.join(peers.values())} |"]
    lines.append("|---|---|---|" + "--:|" * (2 + len(peers)))
    for ours in pick(rows, section="statistics", candidate=OURS, threads=threads):
        if ours["layout"] == "all":
            continue
        same = pick(rows, **{key: ours[key] for key in ("section", "shape", "layout", "dtype", "threads")})
        ratio = {row["candidate"]: f"{float(row['ratio']):.3g}" for row in same}
        cells = [ours["shape"], SHORT[ours["dtype"]], ours["layout"], ours["ms"], ours["gb_s"]]
        lines.append("| " + " | ".join([*cells, *(ratio.get(peer, "") for peer in peers)]) + " |")
    return "\n".join(lines)


def short_table(rows: list[Row], section: str, threads: str) -> str:
    """A section in full: every candidate with its time and spread, and its multiple of the first one."""
    lines = ["| case | candidate | ms | 20 % to 80 % | x |", "|---|---|--:|--:|--:|"]
    for row in pick(rows, section=section, threads=threads):
        spread = f"{row['ms_p20']} to {row['ms_p80']}"
        lines.append(f"| {where(row)} | {row['candidate']} | {row['ms']} | {spread} | {float(row['ratio']):.3g} |")
    return "\n".join(lines)


def accuracy_table(rows: list[Row]) -> str:
    """Largest error of each candidate over all cases, in units of the bar."""
    lines = [f"| candidate | dtype | {' | '.join(MEASURES)} |", "|---|---|" + "--:|" * len(MEASURES)]
    for candidate, dtype in sorted(
        {(row["candidate"], row["dtype"]) for row in rows}, key=lambda key: _order(rows, key)
    ):
        mine = pick(rows, candidate=candidate, dtype=dtype)
        worst = []
        for measure in MEASURES:
            errors = [_error(text) for row in mine if (text := row[f"{measure}_error"])]
            worst.append(f"{max(errors):.2g}" if errors else "")
        lines.append(f"| {candidate} | {SHORT[dtype]} | " + " | ".join(worst) + " |")
    return "\n".join(lines)


def _order(rows: list[Row], key: tuple[str, str]) -> tuple[int, int]:
    """By dtype, and as the candidates first appear."""
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    return list(SHORT).index(key[1]), names.index(key[0])


def markdown(table: str = "bars", threads: str = "1") -> str:
    """One generated block.

    Args:
        table: "bars", "summary", "statistics", "pooled", "call", "isa", "accuracy", "record", "machine", or one of
            _svd_report.py, _jvp_report.py or _detection_report.py.
        threads: Number of threads of the rows to show.

    Returns:
        Markdown.
    """
    if table.startswith("svd"):
        module = importlib.import_module(f"{__package__}._svd_report" if __package__ else "_svd_report")
        return module.markdown(table, read(RESULTS / "svd.csv"))
    if table.startswith("jvp"):
        module = importlib.import_module(f"{__package__}._jvp_report" if __package__ else "_jvp_report")
        name = "jvp_true_size.csv" if table.endswith("true-size") else "jvp.csv"
        return module.markdown(table, read(RESULTS / name))
    if table.startswith("detection"):
        module = importlib.import_module(f"{__package__}._detection_report" if __package__ else "_detection_report")
        return module.markdown(table, read(RESULTS / "detection.csv"))
    moments, accuracy = read(RESULTS / "moments.csv"), read(RESULTS / "accuracy.csv")
    if table == "summary":
        module = importlib.import_module(f"{__package__}._summary" if __package__ else "_summary")
        return module.markdown(moments) if moments else NOTHING
    if table == "record":
        record = read(RESULTS / "record.csv")
        return f"{record_table(record)}\n\n{machine_line(record)}" if record else NOTHING
    if table == "accuracy":
        return accuracy_table(accuracy) if accuracy else NOTHING
    if not moments:
        return NOTHING
    if table == "bars":
        bars = [*moments_bars(moments), *accuracy_bars(accuracy), *record_bars(read(RESULTS / "record.csv"))]
        return f"{bars_table(bars)}\n\n{machine_line(moments)}"
    if table == "machine":
        return machine_line(moments)
    if table == "statistics":
        return statistics_table(moments, threads)
    return short_table(moments, table, threads)
