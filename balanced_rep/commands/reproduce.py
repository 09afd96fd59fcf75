"""`balanced-rep reproduce`: theory, detection, Jacobians and steering on models trained here, as one page."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["reproduce"]


def reproduce(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run; an unfinished run is continued.")] = Path(
        "balanced-rep-reproduce"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer seeds, no trained UNet or DiT: about two minutes.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Only these experiments; may be given several times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the claims as JSON.")] = False,
) -> None:
    """Redo the experiments of the paper on embedded data, and write tables, figures and one page, claim by claim."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    errors = Console(stderr=True)
    from balanced_rep.reproduce._run import FULL_ONLY, experiments

    networks = not set(only).isdisjoint(FULL_ONLY) if only else not quick
    needed = ["sklearn", "scipy", "matplotlib"] + (["diffusers"] if networks else [])
    if missing := [name for name in needed if find_spec(name) is None]:
        hint = "; or run with --quick" if missing == ["diffusers"] and not only else ""
        errors.print(f"[bold red]error:[/] missing: {', '.join(missing)}. pip install 'balanced-rep\\[models]'{hint}")
        sys.exit(1)
    from balanced_rep.models._output import check_output_folder
    from balanced_rep.reproduce import Settings
    from balanced_rep.reproduce import reproduce as run

    try:
        check_output_folder(out)
        settings = Settings(quick, seed)
        with _progress(len(only or experiments(settings))) as tell:
            parts = run(out, settings, only=only, tell=tell)
    except (ValueError, OSError, ImportError) as error:
        errors.print("[bold red]error:[/]", escape(str(error)), highlight=False)
        sys.exit(1)
    if as_json:
        typer.echo((out / "claims.json").read_text(encoding="utf-8"), nl=False)
        return
    console = Console()
    table = Table(box=None, padding=(0, 2, 1, 0))
    for heading in ("the paper states", "measured here", ""):
        table.add_column(heading)
    colours = {"agrees": "green", "partly": "yellow", "does not agree": "red", "measured": "dim"}
    for claim in (claim for part in parts for claim in part.claims):
        verdict = f"[{colours[claim.verdict]}]{claim.verdict}[/]"
        table.add_row(escape(claim.statement), escape(claim.measured), verdict)
    console.print(table)
    console.print(f"Written: {out / 'index.html'}", highlight=False)


def _progress(n: int):
    """A bar over the experiments, and a line on what is being done."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def running():
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=n)

            def tell(name: str, what: str) -> None:
                progress.update(task, description=f"{name}: {what}", advance=what in ("done", "kept"))

            yield tell

    return running()
