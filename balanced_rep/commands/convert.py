"""`balanced-rep convert`: a pickled network as safetensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["convert"]


def convert(
    file: Annotated[Path, typer.Argument(help="A network pickle (EDM), or a checkpoint of torch.save.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for model.safetensors and config.json.")],
    key: Annotated[str, typer.Option(help="Which network of the file; default: 'ema' if there is one.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Turn a pickled network into safetensors and a plain configuration, without running what is in the pickle.

    The file is read in a child process with limits, by an unpickler that knows a short list of names.
    """
    from rich.console import Console
    from rich.markup import escape

    from balanced_rep.models import ConversionError
    from balanced_rep.models import convert as run

    errors = Console(stderr=True)
    try:
        done = run(file, out, key=key)
    except (ConversionError, OSError) as error:
        errors.print("[bold red]error:[/]", escape(str(error)), highlight=False)
        sys.exit(1)
    if as_json:
        about = {"weights": str(done.weights), "config": str(done.config), "n_tensors": done.n_tensors}
        about |= {"n_parameters": done.n_parameters, "network_isolated": done.network_isolated}
        about |= {"files_isolated": done.files_isolated}
        typer.echo(json.dumps(about, indent=2))
        return
    console = Console()
    numbers = f"{done.weights}: {done.n_tensors} tensors, {done.n_parameters:,} numbers"
    console.print(escape(numbers), highlight=False)
    name = json.loads(done.config.read_text()).get("class", "no class")  # of a file that is not trusted
    shown = "".join(c if c.isprintable() else "?" for c in name)
    console.print(escape(f"{done.config}: {shown}"), highlight=False)
    open_to = [name for name in ("network", "files") if not getattr(done, f"{name}_isolated")]
    if open_to:
        lacking = " and ".join({"network": "the network", "files": "changes of files"}[name] for name in open_to)
        errors.print(
            f"[dim]This system's kernel does not keep the reading process from {lacking}; limits and an audit hook for "
            "Python code held.[/]"
        )
