"""`balanced-rep table1`: the paper's Table 1 on a model of one's own."""

from __future__ import annotations

import csv
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from balanced_rep.detection import Table1

__all__ = ["table1"]

COLUMNS = {"sd14": "LAION-SD1.4", "dit": "ImageNet-DiT", "edm": "CIFAR10-EDM"}


class TableError(Exception):
    """Something that the person at the keyboard can put right; the message says how."""


def table1(
    model: Annotated[str, typer.Option(help="Folder of a diffusers pipeline or network, or 'digits'.")] = "digits",
    memorized: Annotated[Path | None, typer.Option(help="Folder with the memorized images.")] = None,
    other: Annotated[Path | None, typer.Option(help="Folder with other images.")] = None,
    memorized_prompts: Annotated[Path | None, typer.Option(help="Their prompts: a line each, or .jsonl.")] = None,
    other_prompts: Annotated[Path | None, typer.Option(help="Prompts of the other images.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder with training images, for nearest_reference.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise level in data units.")] = None,
    time: Annotated[float | None, typer.Option(help="Or the network's time; the paper's text has 50.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the row that is not calibrated.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this score; may be given several times.")] = None,
    paper: Annotated[str | None, typer.Option(help="The paper's numbers beside: sd14, dit or edm.")] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Resize images that have another size.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 16,
    device: Annotated[str, typer.Option(help="Where to run, such as cuda.")] = "cpu",
    half: Annotated[bool, typer.Option("--half", help="Weights in float16, as the paper's code.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the cut and of the noise.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for table and scores.")] = Path(
        "balanced-rep-table1"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of a table.")] = False,
) -> None:
    """Run every memorization score that the inputs allow, and judge all of them on the same samples.

    Without arguments: the embedded digits model, repeated against never-seen digits. With a model folder: its images,
    and with prompts the methods that need them. One half of the samples is for choices, the other judges.
    """
    from rich.console import Console
    from rich.markup import escape

    errors = Console(stderr=True)
    try:
        _check(out, paper, sigma, time)
        if model == "digits":
            _check_digits(
                memorized=memorized, other=other, memorized_prompts=memorized_prompts, other_prompts=other_prompts,
                reference=reference, time=time, half=half or None, resize=resize or None,
            )  # fmt: skip
            arguments = _digits(sigma, layer, device)
        else:
            prompts = memorized_prompts, other_prompts
            place = {"device": device, "half": half, "resize": resize}
            arguments = _folder(model, memorized, other, prompts, reference, sigma, time, layer, **place)
        from balanced_rep.detection import table1 as run

        with errors.status("") as status:
            found = run(
                **arguments, paper=None if paper is None else COLUMNS[paper], methods=method, seed=seed,
                batch_size=batch_size, on_method=lambda name: status.update(name),
            )  # fmt: skip
        files = _write(found, out)
    except (TableError, ImportError, OSError, ValueError) as error:
        errors.print("[bold red]error:[/]", escape(str(error)), highlight=False)
        sys.exit(1)
    if as_json:
        typer.echo(json.dumps({"rows": _records(found), "files": [str(f) for f in files]}, indent=2))
        return
    _print(found, Console(), paper)
    Console().print(escape(f"Written: {', '.join(str(f) for f in files)}"), highlight=False)


def _check(out: Path, paper: str | None, sigma: float | None, time: float | None) -> None:
    """What can be known before the work is done."""
    if paper is not None and paper not in COLUMNS:
        raise TableError(f"--paper is one of {', '.join(COLUMNS)}, got {paper!r}.")
    if sigma is not None and time is not None:
        raise TableError("Give --sigma or --time, not both.")
    if missing := [name for name in ("sklearn", "scipy") if find_spec(name) is None]:
        raise TableError(f"missing: {', '.join(missing)}. pip install scikit-learn scipy")
    from balanced_rep.models._output import check_output_folder

    check_output_folder(out)


def _check_digits(**options: Any) -> None:
    """The embedded model has images of its own; what would be passed over is refused."""
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
        raise TableError(
            f"{', '.join(given)}: not for the embedded digits model, which has its own images and takes --sigma. Give "
            "--model FOLDER."
        )


def _digits(sigma: float | None, layer: str | None, device: str) -> dict[str, Any]:
    from balanced_rep.models import digits, digits_data
    from balanced_rep.models._checks import check_device

    check_device("table1", device)
    D, data = digits().to(device), digits_data()
    samples = {"memorized": data.repeated, "other": data.held_out, "reference": data.images[D.train_indices]}
    return {
        "D": D, **{name: x.to(device) for name, x in samples.items()}, "sigma": 0.1 if sigma is None else sigma,
        "layer": layer or D.score_layer, "sigmas": (0.05, 0.1, 0.2, 0.4),
    }  # fmt: skip


def _levels(D: Any, sigma: float | None, time: float | None) -> tuple[float, tuple[float, ...]]:
    """The noise level, and those that the calibrated row chooses from; of the paper's times where none is given."""
    if sigma is not None or time is not None:
        level = D.sigma(time) if sigma is None else sigma
        return level, (level,)
    try:
        levels = tuple(D.sigma(t) for t in (10, 50, 100))
    except ValueError as error:
        raise TableError(f"{error} The default is the times 10, 50 and 100: give --time or --sigma.") from error
    return levels[1], levels


def _folder(
    model: str,
    memorized: Path | None,
    other: Path | None,
    prompts: tuple[Path | None, Path | None],
    reference: Path | None,
    sigma: float | None,
    time: float | None,
    layer: str | None,
    *,
    resize: bool,
    device: str,
    half: bool,
) -> dict[str, Any]:
    """Model, samples and conditions from disk."""
    import torch

    from balanced_rep.commands._images import image_batches, read_prompts
    from balanced_rep.models import encode_prompts, load

    D = load(model, dtype=torch.float16 if half else None, device=device)
    if (memorized is None) != (other is None) or (prompts[0] is None) != (prompts[1] is None):
        raise TableError("Give both sides: --memorized and --other, --memorized-prompts and --other-prompts.")
    if memorized is None and prompts[0] is None:
        raise TableError("Give --memorized and --other, folders with images, or prompts of both, or both.")
    if D.sample_shape is None:
        raise TableError("This network does not say how large its samples are.")
    level, levels = _levels(D, sigma, time)
    channels, height, width = D.sample_shape
    if D.vae is not None:
        config: Any = D.vae.config
        scale = 2 ** (len(config.block_out_channels) - 1)
        channels, height, width = config.in_channels, height * scale, width * scale

    def samples(folder: Path | None) -> torch.Tensor | None:
        if folder is None:
            return None
        parts = [
            part.to(device) if D.vae is None else D.encode(part.to(device)).float()
            for part in image_batches(folder, (channels, height, width), resize=resize, batch_size=8)
        ]
        return torch.cat(parts)

    cond = None
    if prompts[0] is not None and prompts[1] is not None:
        cond = tuple(encode_prompts(model, read_prompts(p)).float().to(device) for p in prompts if p is not None)
    known = "net.up_blocks.0.resnets.2.conv2"
    return {
        "D": D, "memorized": samples(memorized), "other": samples(other), "sigma": level, "cond": cond,
        "sigmas": levels,
        "layer": layer or (known if known in D.layers else None), "reference": samples(reference),
    }  # fmt: skip


def _records(found: Table1) -> list[dict[str, Any]]:
    records = []
    for row in found.rows:
        e, r, c = row.evaluation, row.evaluation.rates[0], row.comparison
        record = {
            "method": row.method, "setting": row.setting, "prompt_free": not row.needs_prompt,
            "auc": e.auc, "low": e.low, "high": e.high, "fpr": r.fpr,
            "tpr_at_most": r.at_most, "tpr_quantile": r.quantile, "tpr_nearest": r.nearest,
            "seconds_per_sample": row.seconds, "forwards": row.scores.forwards, "tangents": row.scores.tangents,
            "n_memorized": e.n_positive, "n_other": e.n_negative, "n_without_score": e.n_failed,
        }  # fmt: skip
        if c is not None:
            record |= {"difference": c.difference, "difference_low": c.low, "difference_high": c.high}
        if row.paper is not None:
            record |= dict(zip(("paper_auc", "paper_tpr", "paper_seconds"), row.paper, strict=True))
        records.append({k: None if v != v else v for k, v in record.items()})  # JSON has no NaN
    return records


def _write(found: Table1, out: Path) -> list[Path]:
    records = _records(found)
    table, scores = out / "table1.csv", out / "scores.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for record in records for k in record)))
        writer.writeheader()
        writer.writerows(records)
    with scores.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sample", "memorized", "judged", *(row.method for row in found.rows)])
        for i, (label, judged) in enumerate(zip(found.labels.tolist(), found.judged.tolist(), strict=True)):
            values = [
                f"{v:.8g}" if (v := float(row.scores.values[i])) == v else row.scores.status[i] for row in found.rows
            ]
            writer.writerow([i, int(label), int(judged), *values])
    return [table, scores]


def _print(found: Table1, console: Any, paper: str | None) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("method", no_wrap=True)
    headings = ["AUC", "95 %", "TPR at\n1 % FPR", "ms per\nsample", "forward\npasses", "J v", "AUC less\nfirst row"]
    for heading in headings + (["the paper's\nAUC, TPR, s"] if paper else []):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        e, c = row.evaluation, row.comparison
        against = "" if c is None else f"{c.difference:+.3f}{'*' if c.distinguishable else ' '}"
        cells = [
            row.method.replace("representation_std, ", "  "), f"{e.auc:.3f}", f"{e.low:.2f}-{e.high:.2f}",
            f"{100 * e.rates[0].quantile:.0f} %", f"{1e3 * row.seconds:.3g}", f"{row.scores.forwards:g}",
            f"{row.scores.tangents:g}", against,
        ]  # fmt: skip
        table.add_row(*cells, *([", ".join(f"{v:g}" for v in row.paper) if row.paper else ""] if paper else []))
    console.print(table)
    for row in found.rows:
        if row.setting:
            console.print(f"[dim]{escape(f'{row.method}: {row.setting}')}[/]", highlight=False)
    judged = found.rows[0].evaluation
    notes = [
        f"Judged on {judged.n_positive} memorized and {judged.n_negative} other samples that had no part in choices.",
        "TPR: threshold at the 99 % quantile of the others, as in the paper; the CSV has two other conventions.",
        "J v: Jacobian-vector products. *: the 95 % interval of the difference leaves 0 out.",
    ] + (["The paper's numbers are of its own models and data, on unstated hardware."] if paper else [])
    console.print(f"[dim]{' '.join(notes)}[/]", highlight=False)
