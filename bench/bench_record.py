"""`record` on a reduced Stable Diffusion UNet: what listening costs, and what stopping early saves.

    python bench/bench_record.py                 # interleaved ratios, results/record.csv, the bars
    pytest bench --benchmark-only                # the same calls one by one, with pytest-benchmark

Every turn runs each candidate once, and ratios are taken turn by turn, in CPU time of the process (wall times stand
beside them). A whole forward varies by several percent, so what listening costs is timed inside the hooks as well, and
so is opening and closing a record, which need not happen for every forward.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _common as common  # before torch
import _models
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from balanced_rep.stats._record_hooks import Recorder
from balanced_rep.stats.record import record

# The tensor that the paper reads, behind the second activation, once on every level down and up.
LAYERS = [f"{block}_blocks.{level}.resnets.0.conv2" for block in ("down", "up") for level in range(4)]
PAPER = "up_blocks.0.resnets.2.conv2"
BARS = {
    "record, pooled": "<= 1 % of a forward",
    "record, full": "<= 5 % of a forward",
    "stop after up_blocks.0": "full forward >= 2.2 x",
}

Candidates = dict[str, Callable[[], object]]


def recorded(model: nn.Module, inputs: dict[str, Any], layers: Any, **options: Any) -> Callable[[], object]:
    """A forward under `record`, opened and closed each time, with the scores read at the end."""

    def run() -> list[Tensor]:
        with record(model, layers, **options) as recording:
            model(**inputs)
        return [stats.std for stats in recording.values()]

    return run


def kept(model: nn.Module, inputs: dict[str, Any], pooled: bool) -> Callable[[], object]:
    """The usual way: hooks that keep the activations, and torch.std behind the forward."""

    def run() -> list[Tensor]:
        activations: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: activations.__setitem__(name, args[0].detach())
            )
            for name in LAYERS
        ]
        try:
            model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return [(h.flatten(2).amax(2) if pooled else h.flatten(1)).std(1, correction=0) for h in activations.values()]

    return run


def candidates(model: nn.Module, inputs: dict[str, Any]) -> Candidates:
    """The forward first, then everything that is compared with it."""
    return {
        "forward": lambda: model(**inputs),
        "record, pooled": recorded(model, inputs, LAYERS, at="input", pool="max"),
        "record, full": recorded(model, inputs, LAYERS, at="input"),
        "keep and torch.std, pooled": kept(model, inputs, pooled=True),
        "keep and torch.std, full": kept(model, inputs, pooled=False),
        "stop after up_blocks.0": recorded(model, inputs, "up_blocks.0", pool="max", stop=True),
        f"stop before {PAPER}": recorded(model, inputs, PAPER, at="input", pool="max", stop=True),
    }


@contextlib.contextmanager
def hook_clock() -> Iterator[list[float]]:
    """CPU seconds that the hooks on the layers and on the model take, one entry a call."""
    spent: list[float] = []
    originals = {name: getattr(Recorder, name) for name in ("_hear", "_begin", "_end")}

    def timed(original: Callable[..., None]) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            start = time.process_time()
            try:
                original(*args)
            finally:
                spent.append(time.process_time() - start)

        return hook

    for name, original in originals.items():
        setattr(Recorder, name, timed(original))
    try:
        yield spent
    finally:
        for name, original in originals.items():
            setattr(Recorder, name, original)


def hook_seconds(run: Callable[[], object], turns: int) -> float:
    """Median CPU seconds per forward inside the hooks."""
    totals = []
    for _ in range(turns):
        with hook_clock() as spent:
            run()
        totals.append(sum(spent))
    return statistics.median(totals)


def opening_seconds(model: nn.Module, turns: int = 20) -> float:
    """Median CPU seconds of finding the layers, attaching the hooks and removing them."""
    totals = []
    for _ in range(turns):
        start = time.process_time()
        with contextlib.suppress(InterruptedError), record(model, LAYERS, at="input"):
            raise InterruptedError
        totals.append(time.process_time() - start)
    return statistics.median(totals)


def counted_flops(run: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products and convolutions, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure(batch: int, turns: int, *, size: int = 32) -> list[dict[str, Any]]:
    """Rows for one batch size, each with its time over that of the plain forward."""
    model, inputs = _models.sd_unet(batch, size)
    rows = []
    with torch.no_grad():
        runs = candidates(model, inputs)
        timings = common.interleave(runs, budget=1e9, min_turns=turns, max_turns=turns)
        forward = timings["forward"]
        for name, timing in timings.items():
            of_cpu = [mine / plain for mine, plain in zip(timing.cpu, forward.cpu, strict=True)]
            of_wall = [mine / plain for mine, plain in zip(timing.wall, forward.wall, strict=True)]
            p20, p80 = np.percentile(of_cpu, (20, 80)).tolist()
            row = {
                **{"bench": "record", "batch": batch, "size": size, "threads": torch.get_num_threads()},
                **{"candidate": name, "layers": len(LAYERS) if "stop" not in name else 1},
                **timing.columns(),
                "of_forward": common.significant(statistics.median(of_cpu)),
                "of_forward_p20": common.significant(p20),
                "of_forward_p80": common.significant(p80),
                "of_forward_min": common.significant(min(timing.cpu) / min(forward.cpu)),
                "of_forward_wall": common.significant(statistics.median(of_wall)),
                "gflop": common.significant(counted_flops(runs[name]) / 1e9),
            }
            if name.startswith("record"):
                row["hooks_cpu_ms"] = common.significant(1e3 * hook_seconds(runs[name], min(turns, 15)))
                row["opening_cpu_ms"] = common.significant(1e3 * opening_seconds(model))
            rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line a candidate: its share of a forward, and the bar it is held to."""
    lines = []
    for row in rows:
        plain = next(r for r in rows if r["batch"] == row["batch"] and r["candidate"] == "forward")
        share = row["of_forward"]
        if row["candidate"].startswith("stop"):
            text = f"full forward takes {1 / share:.2f} x ({1 / row['of_forward_p80']:.2f} to "
            text += f"{1 / row['of_forward_p20']:.2f}), {plain['gflop'] / row['gflop']:.2f} x by counted FLOP"
        else:
            text = f"{100 * (share - 1):+.2f} % ({100 * (row['of_forward_p20'] - 1):+.2f} to "
            text += f"{100 * (row['of_forward_p80'] - 1):+.2f}), of minima {100 * (row['of_forward_min'] - 1):+.2f} %"
        if "hooks_cpu_ms" in row:
            text += f", inside hooks {100 * row['hooks_cpu_ms'] / plain['cpu_ms']:.2f} %"
            text += f", opening and closing {100 * row['opening_cpu_ms'] / plain['cpu_ms']:.2f} %"
        bar = f"   [{BARS[row['candidate']]}]" if row["candidate"] in BARS else ""
        lines.append(f"batch {row['batch']}: {row['candidate']:32} {row['cpu_ms']:8.1f} ms CPU  {text}{bar}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the CSV, prints the shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="batch sizes (default: 1 4)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument(
        "--turns", type=int, default=21, help="samples of each candidate at batch 1, fewer at larger ones (default: 21)"
    )
    parser.add_argument("--size", type=int, default=32, help="height and width of the latents (default: 32)")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "record.csv", help="the CSV to write")
    args = parser.parse_args(argv)
    with common.threads(args.threads):
        turns = {batch: max(min(15, args.turns), args.turns // batch) for batch in args.batches}
        rows = [row for batch in args.batches for row in measure(batch, turns[batch], size=args.size)]
    common.write_csv(args.out, rows)
    print(f"{args.out}: {len(rows)} rows\n\n{summary(rows)}")
    return 0


@pytest.mark.parametrize("call", ["forward", *BARS])
def test_record(benchmark: Any, call: str) -> None:
    model, inputs = _models.sd_unet()
    with torch.no_grad(), common.threads(1):
        benchmark(candidates(model, inputs)[call])


if __name__ == "__main__":
    raise SystemExit(main())
