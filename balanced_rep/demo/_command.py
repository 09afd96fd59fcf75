"""`balanced-rep demo`: the command, its progress bar and its errors. `balanced_rep.cli` registers it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from balanced_rep.demo._run import DemoResult
    from balanced_rep.models import DigitsDenoiser
    from balanced_rep.models._digits import Variant

__all__ = ["demo"]


class DemoError(Exception):
    """Something that the person at the keyboard can put right; the message says how."""


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for figure, scores and results.")] = Path(
        "balanced-rep-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise; with --train, of the training too.")] = 0,
    train: Annotated[bool, typer.Option("--train", help="Train both models first instead of loading them.")] = False,
    no_figure: Annotated[bool, typer.Option("--no-figure", help="Draw nothing: no matplotlib needed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object to standard output, no table.")] = False,
) -> None:
    """Find the handwritten digits that a denoiser has memorized, by the spread of its last hidden activation.

    Takes seconds; with --train about a minute. Progress goes to standard error.
    """
    from rich.console import Console
    from rich.markup import escape

    from balanced_rep.models import CheckpointError
    from balanced_rep.ops import BackendError

    errors = Console(stderr=True)
    try:
        _check(out, figure=not no_figure)
        started = time.perf_counter()
        models, checkpoints = _train(seed, out) if train else (None, [])
        result = _run(seed, models)
        files = _write(result, out, figure=not no_figure) + checkpoints
    except (DemoError, CheckpointError, BackendError, ImportError, OSError) as error:
        errors.print("[bold red]error:[/]", escape(str(error)), highlight=False)
        sys.exit(1)
    seconds = time.perf_counter() - started
    if as_json:
        from balanced_rep.demo._report import to_dict

        summary = {**to_dict(result), "seconds": round(seconds, 2), "files": [str(file) for file in files]}
        typer.echo(json.dumps(summary, indent=2))
        return
    from balanced_rep.demo._report import print_report

    console = Console()
    print_report(result, console)
    console.print(f"\n{seconds:.1f} s. Written: {', '.join(str(file) for file in files)}", highlight=False)


def _check(out: Path, *, figure: bool) -> None:
    """Says at once, and not after the work, that a package is missing or the folder cannot be written."""
    for module, package, instead in (
        ("sklearn", "scikit-learn", ""),
        ("matplotlib", "matplotlib", ", or run with --no-figure"),
    ):
        if (figure or module != "matplotlib") and find_spec(module) is None:
            raise DemoError(f"The demo needs {package}. Install it with: pip install {package}{instead}")
    from balanced_rep.models._output import check_output_folder

    check_output_folder(out)


def _train(seed: int, out: Path) -> tuple[dict[Variant, DigitsDenoiser], list[Path]]:
    """Trains both models, and writes and names their checkpoints."""
    from dataclasses import replace

    from balanced_rep.models._digits import checkpoint_name
    from balanced_rep.models._progress import training_progress
    from balanced_rep.models.train_digits import Recipe, train_digits

    models: dict[Variant, DigitsDenoiser] = {}
    checkpoints: list[Path] = []
    for variant in ("repeated", "control"):
        recipe = replace(Recipe.of(variant), seed=seed)
        with training_progress(f"training ({variant})", recipe.steps) as on_step:
            models[variant] = train_digits(recipe, on_step=on_step)
        checkpoints.append(out / checkpoint_name(variant))
        models[variant].save(checkpoints[-1])
    return models, checkpoints


def _run(seed: int, models: dict[Variant, DigitsDenoiser] | None) -> DemoResult:
    """Scores the digits behind a progress bar."""
    from balanced_rep.demo._run import SIGMAS, count_steps, run_demo

    n_draws = 4
    with _progress("scoring 1,797 digits", count_steps(SIGMAS, n_draws)) as on_step:
        return run_demo(seed=seed, n_draws=n_draws, models=models, on_step=on_step)


@contextmanager
def _progress(title: str, steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error; gives the function to call at every step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=steps)
        yield lambda: progress.advance(task)


def _write(result: DemoResult, out: Path, *, figure: bool) -> list[Path]:
    """Writes numbers and figure."""
    from balanced_rep.demo._report import write_files

    files = write_files(result, out)
    if figure:
        from balanced_rep.demo._figure import write_figure

        files = write_figure(result, out) + files
    return files
