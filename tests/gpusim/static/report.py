"""Writes the baseline and the kernel-report page: ``make kernel-report``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..kernels import CUDA_KERNELS, GATED_TRITON, PACKAGE_CUDA, PACKAGE_TRITON
from ..toolchain import versions
from .measure import Table, measure_cuda, measure_triton

__all__ = ["BASELINE", "compare", "current", "read_baseline"]

BASELINE = Path(__file__).parents[1] / "baseline.json"
PAGE = Path(__file__).parents[3] / "docs" / "gpu" / "kernel-report.md"
COLUMNS = ("registers", "spills", "shared", "occupancy", "loads_128", "stores_128", "matrix")
TITLES = ("registers", "spills", "shared bytes", "occupancy %", "128-bit loads", "128-bit stores", "matrix")


def current() -> Table:
    """Compile and measure every kernel of the list."""
    return measure_cuda(CUDA_KERNELS) | measure_triton(GATED_TRITON)


def read_baseline() -> tuple[dict[str, str], Table]:
    """Return the versions of the compilers that the baseline was made with, and its figures."""
    if not BASELINE.exists():
        return {}, {}
    read = json.loads(BASELINE.read_text())
    return read["versions"], read["kernels"]


def compare(old: Table, new: Table) -> list[str]:
    """Return one readable line per difference."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new or name not in old:
            lines.append(f"{name}: {'gone' if name not in new else 'new'}")
            continue
        for target in sorted(old[name].keys() | new[name].keys()):
            before, after = old[name].get(target), new[name].get(target)
            if before is None or after is None:
                lines.append(f"{name} {target}: {'new' if before is None else 'gone'}")
                continue
            lines += [
                f"{name} {target}: {key} {before.get(key)} -> {after.get(key)}"
                for key in sorted(before.keys() | after.keys())
                if before.get(key) != after.get(key)
            ]
    return lines


def page(table: Table) -> str:
    """Return the documentation page of the package's kernels."""
    package = {kernel.name for kernel in (*PACKAGE_CUDA, *PACKAGE_TRITON)}
    rows = []
    for name, targets in table.items():
        if name.removesuffix(" n%16") in package:
            for target, facts in targets.items():
                cells = [str(facts.get(column, "")) for column in COLUMNS]
                rows.append(f"| {name} | {target} | {' | '.join(cells)} |")
    return "\n".join(
        [
            "# Kernel report",
            "",
            "Written by `make kernel-report` from what the compilers emit; nothing here was run on a GPU. CUDA kernels",
            "are compiled by NVRTC, Triton kernels ahead of time; `n%16` marks the variant that the JIT picks when",
            "every size is divisible by 16. *Spills* are instructions on local memory, *matrix* are tensor-core ones.",
            "",
            f"| kernel | target | {' | '.join(TITLES)} |",
            "|---|---|" + "---|" * len(COLUMNS),
            *rows,
            "",
        ]
    ).replace("\\\n", "\n")


def main() -> int:
    """Measure, print the difference to the baseline, and write both files unless asked only to check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the baseline differs")
    arguments = parser.parse_args()
    table = current()
    made_with, before = read_baseline()
    differences = compare(before, table)
    if made_with != versions():
        print(f"the baseline is of {made_with}, this is {versions()}")
    print("\n".join(differences) or "no difference to the baseline")
    if arguments.check:
        return bool(differences)
    BASELINE.write_text(_dump(table))
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(table))
    return 0


def _dump(table: Table) -> str:
    """One line per kernel and target, so that a change is a one-line diff."""
    kernels = []
    for name, targets in sorted(table.items()):
        lines = ",\n".join(f"  {json.dumps(target)}: {json.dumps(facts)}" for target, facts in sorted(targets.items()))
        kernels.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    head = f'"versions": {json.dumps(versions())},\n"kernels": '
    return "{\n" + head + "{\n" + ",\n".join(kernels) + "\n}\n}\n"


if __name__ == "__main__":
    sys.exit(main())
