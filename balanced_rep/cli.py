"""Command line: ``balanced-rep doctor``, ``demo``, ``table1``, ``reproduce``, ``convert``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from balanced_rep.commands.convert import convert
from balanced_rep.commands.reproduce import reproduce
from balanced_rep.commands.table1 import table1
from balanced_rep.demo._command import demo

__all__ = ["app", "main"]

app = typer.Typer(
    help="Jacobians, spectra and representation statistics of diffusion models, and what they tell about memorization.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(table1)
app.command()(reproduce)
app.command()(convert)


def _version(wanted: bool) -> None:
    if wanted:
        from balanced_rep._version import __version__

        typer.echo(f"balanced-rep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
) -> None:
    """Check every op on every backend of this machine: ok, or the reason it cannot run.

    Raises:
        Exit: With status 1 if a backend that should run fails or disagrees with the reference.
    """
    from balanced_rep.doctor import diagnose

    report = diagnose()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_report(report)
    raise typer.Exit(0 if report["healthy"] else 1)


def _print_report(report: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_row("balanced-rep", report["version"])
    facts.add_row("Python", f"{report['python']}, {report['platform']}")
    facts.add_row("packages", ", ".join(f"{name} {version}" for name, version in report["packages"].items()))
    facts.add_row("device", report["device"])
    facts.add_row("instruction set", report["instruction_set"])
    facts.add_row("threads", str(report["threads"]))
    facts.add_row("OpenMP", ", ".join(report["openmp_runtimes"]) or "none loaded")
    for name, value in report["environment"].items():
        facts.add_row(name, value)

    ops = Table(title="\nops and backends", title_justify="left")
    ops.add_column("op", no_wrap=True)
    for name in next(iter(report["ops"].values())):
        ops.add_column(name)
    notes: dict[str, int] = {}  # reason to number: most ops share a few
    for op, row in report["ops"].items():
        ops.add_row(op, *(_cell(state, notes) for state in row.values()))

    console = Console()
    console.print(facts)
    console.print(ops)
    for note, number in notes.items():
        console.print(f"[dim]{number:>3}[/]  {escape(note)}", highlight=False)
    for problem in report["problems"]:
        console.print(f"[bold red]{escape(problem)}[/] Until it is put right, calls of ops raise.", highlight=False)
    if any(s.startswith(("wrong", "failed")) for row in report["ops"].values() for s in row.values()):
        console.print("[bold red]A backend fails here that should run: please report the output of --json.[/]")


def _cell(state: str, notes: dict[str, int]) -> str:
    kind, _, reason = state.partition(": ")
    if not reason:
        return f"[green]{kind}[/]"
    number = notes.setdefault(reason, len(notes) + 1)
    return f"[dim]no ({number})[/]" if kind == "no" else f"[bold red]{kind} ({number})[/]"


def main() -> None:
    """Entry point of the console script."""
    app()
