"""Rewrite the generated blocks of README.md and docs/, or with --check only say which are out of date.

A block lies between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``; NAME is a function of this file. The
contents come from the op registry and from the benchmark results in the repository, never from this machine.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?P<open><!-- generated: (?P<name>[\w-]+) -->\n).*?(?P<close><!-- end: (?P=name) -->)", re.DOTALL)
BACKENDS = {"reference": "reference", "cpp": "C++", "triton": "Triton", "cuda": "CUDA C++"}


def summary(op: str, module: str) -> str:
    """First sentence of the docstring of the public function ``op``."""
    text = " ".join((getattr(importlib.import_module(module), op).__doc__ or "").split("\n\n")[0].split())
    return text.rstrip(".")


def ops() -> str:
    """Table of ops x backends, from the registry."""
    import balanced_rep.ops  # noqa: F401, PLC0415
    from balanced_rep.ops._registry import REGISTRY  # noqa: PLC0415

    lines = ["| op | " + " | ".join(BACKENDS.values()) + " | |", "|---|" + ":-:|" * len(BACKENDS) + "---|"]
    for name, spec in REGISTRY.items():
        has = ["✓" if b == "reference" or b in spec.impls else "" for b in BACKENDS]
        lines.append(f"| `{name}` | " + " | ".join(has) + f" | {summary(name, spec.reference.__module__)} |")
    return "\n".join(lines)


def results() -> str:
    """Benchmark table, drawn from the CSV files in bench/results/ by the benchmarks' own reporter."""
    if not (ROOT / "bench" / "report.py").exists():
        return "No results are committed yet; `make bench` runs the benchmarks on your machine."
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("bench.report").markdown()


GENERATORS: dict[str, Callable[[], str]] = {"ops": ops, "results": results}


def rewritten(text: str) -> str:
    """``text`` with every generated block made anew.

    Raises:
        KeyError: If a block names no generator.
    """
    return BLOCK.sub(lambda m: f"{m['open']}{GENERATORS[m['name']]()}\n{m['close']}", text)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 1 if ``--check`` found an old block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a block is out of date")
    check = parser.parse_args(argv).check
    old = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        if (new := rewritten(text)) != text:
            old.append(path.relative_to(ROOT))
            if not check:
                path.write_text(new)
    for path in old:
        print(f"{path}: {'out of date; run `make tables`' if check else 'rewritten'}")
    return int(check and bool(old))


if __name__ == "__main__":
    raise SystemExit(main())
