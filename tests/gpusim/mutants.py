"""Mistakes planted in the package's own kernels: ``mutants.toml`` says which, on which call, and what must notice.

A mutant is a change of text, so the kernels carry no switches. Text that is no longer in its file, or is there twice,
is an error: a mutant changes along with the kernel it is about.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import ptx
from .package import OPS, PackageOp, check, run_cuda, run_triton
from .triton_aot import compile_triton

__all__ = ["MUTANTS", "Mutant", "compile_triton_mutants", "planted", "verdict"]

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "mutants.toml"


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: What was done to the kernel.
        file: Path in the repository; what follows it tells CUDA from Triton.
        old: Text that is in the file exactly once.
        new: What replaces it.
        call: ``"op: call"``, of :data:`~.package.OPS`.
        caught_by: The kind of issue that the executor must report; ``"tickets"`` if only a ticket is left behind, and
            ``"numbers"`` if only the result is wrong.
    """

    name: str
    file: str
    old: str
    new: str
    call: str
    caught_by: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}: {self.name}"

    @property
    def triton(self) -> bool:
        return self.file.endswith(".py")

    @property
    def op(self) -> PackageOp:
        return next(op for op in OPS if op.name == self.call.split(": ")[0])

    @property
    def call_name(self) -> str:
        return self.call.split(": ", 1)[1]


MUTANTS = [Mutant(**row) for row in tomllib.loads(TABLE.read_text())["mutant"]]


@contextlib.contextmanager
def planted(mutant: Mutant, folder: Path) -> Iterator[tuple[PackageOp, dict]]:
    """Put a mutant in the place of its kernel.

    Args:
        mutant: The mistake.
        folder: Where the changed sources go.

    Yields:
        The op with the mutant, and options for :func:`~.package.run_cuda` or :func:`~.package.run_triton`.

    Raises:
        ValueError: If the text to be replaced is not in the file exactly once.
    """
    source = ROOT / mutant.file
    text = source.read_text()
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant}: {mutant.file} holds {mutant.old!r} {count} times, not once; see {TABLE.name}")
    changed = text.replace(mutant.old, mutant.new)
    if not mutant.triton:
        shutil.copytree(source.parent, folder, dirs_exist_ok=True)
        (folder / source.name).write_text(changed)
        yield mutant.op, {"sources": folder}
        return
    module = f"mutant_{MUTANTS.index(mutant)}_{source.stem}"
    folder = folder / module  # alone: what a Triton kernel is compiled from is all of its folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(changed)
    assert mutant.op.triton is not None
    before = os.environ.get("PYTHONPATH")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])  # of the compiling process
    try:
        yield replace(mutant.op, triton=f"{module}:{mutant.op.triton.split(':')[1]}"), {}
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(module, None)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def compile_triton_mutants(mutants: Sequence[Mutant], folder: Path) -> None:
    """Compile what the Triton mutants will launch, in one child process."""
    with contextlib.ExitStack() as stack:
        requests = {}
        for mutant in mutants:
            op, _ = stack.enter_context(planted(mutant, folder))
            for launch in run_triton(op, mutant.call_name, run=False)[1]:
                requests[launch.request.key] = launch.request
        compile_triton(list(requests.values()))


def verdict(mutant: Mutant, folder: Path) -> str:
    """Run a mutant in the executor.

    Args:
        mutant: The mistake.
        folder: Where the changed sources go.

    Returns:
        What noticed it first: kinds of issues joined by commas, ``"tickets"``, ``"numbers"``, or ``"nothing"``.
    """
    with planted(mutant, folder) as (op, options):
        try:
            got, _ = (run_triton if mutant.triton else run_cuda)(op, mutant.call_name, **options)
            check(op, got, op.calls[mutant.call_name]())
        except ptx.GpuIssues as error:
            return ", ".join(sorted(error.issues.kinds()))
        except AssertionError as error:
            return "tickets" if "must be zero after the launch" in str(error) else "numbers"
    return "nothing"
