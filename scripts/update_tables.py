"""Rewrite the generated blocks of README.md and docs/, or with --check only say which are out of date.

A block lies between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``; NAME is a function of this file,
with arguments after colons. The text comes from the op registry and from the benchmark results in the repository,
never from this machine.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path

import balanced_rep.ops as ops_package
from balanced_rep.ops._registry import REGISTRY, OpSpec

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?P<open><!-- generated: (?P<name>[\w:-]+) -->\n).*?(?P<close><!-- end: (?P=name) -->)", re.DOTALL)
BACKENDS = {"reference": "reference", "cpp": "C++", "triton": "Triton", "cuda": "CUDA C++"}
RUNS_ON = {
    "reference": "any device, float64",
    "cpp": "CPU; instruction set chosen at import",
    "triton": "CUDA device",
    "cuda": "CUDA device; compiled at first use by NVRTC",
}


def registry() -> dict[str, OpSpec]:
    """Every op of the package, those with the most backends first."""
    for module in pkgutil.iter_modules(ops_package.__path__, "balanced_rep.ops."):
        if not module.name.rpartition(".")[2].startswith("_cpp"):  # these need the extension, which not every place has
            importlib.import_module(module.name)
    return dict(sorted(REGISTRY.items(), key=lambda item: (-len(item[1].impls), item[0])))


def summary(name: str, spec: OpSpec) -> str:
    """What an op is: its module's first sentence, or its function's where a module holds several ops."""
    module = importlib.import_module(spec.reference.__module__)
    alone = sum(other.reference.__module__ == module.__name__ for other in registry().values()) == 1
    text = (module.__doc__ if alone else getattr(module, name).__doc__) or ""
    first = " ".join(text.split("\n\n")[0].split()).rstrip(".")
    first = re.sub(r"^[\w -]+: ", "", first) if alone else first
    first = re.sub(r"``(.+?)``", r"`\1`", re.sub(r":math:`(.+?)`", r"$\1$", first))
    return first[:1].upper() + first[1:]


def ops() -> str:
    """Table of ops x backends, from the registry."""
    lines = ["| op | " + " | ".join(BACKENDS.values()) + " | |", "|---|" + ":-:|" * len(BACKENDS) + "---|"]
    for name, spec in registry().items():
        has = ["✓" if b == "reference" or b in spec.impls else "" for b in BACKENDS]
        lines.append(f"| `{name}` | " + " | ".join(has) + f" | {summary(name, spec)} |")
    return "\n".join(lines)


def backends(name: str) -> str:
    """Table of the backends of one op."""
    spec = registry()[name]
    lines = ["| backend | runs on | where |", "|---|---|---|"]
    targets = {"reference": f"{spec.reference.__module__}:{spec.reference.__name__}"}
    targets |= {backend: impl.target for backend, impl in spec.impls.items()}
    lines += [f"| {BACKENDS[b]} | {RUNS_ON[b]} | `{targets[b]}` |" for b in BACKENDS if b in targets]
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in spec.tolerance)
    return "\n".join([*lines, "", f"Input: {dtypes}."])


def scores() -> str:
    """Table of the memorization scores, from their registry."""
    detection = importlib.import_module("balanced_rep.detection")
    lines = ["| score | formula | suspicious | requires, besides a model | cost per sample |", "|---|---|---|---|---|"]
    for name in detection.names():
        score = detection.get(name)
        needs = ", ".join(sorted(score.requires - {"model"}))
        needs = needs.replace("sigma", "sigma (one or several)") if score.many_sigmas else needs
        needs += "" if "model" in score.requires else "; no model"
        formula = score.formula.replace("|", "\\|")
        lines.append(f"| `{name}` | {formula} | {score.direction} | {needs} | {score.cost} |")
    return "\n".join(lines)


def results(*arguments: str) -> str:
    """Benchmark table, made from the CSV files in bench/results/ by the benchmarks' own reporter, which has several."""
    if not (ROOT / "bench" / "report.py").exists():
        return "No results are committed yet; `make bench` runs the benchmarks on your machine."
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("bench.report").markdown(*arguments)


def rules() -> str:
    """Table of the multi-tangent rules."""
    return importlib.import_module("balanced_rep.autodiff._table").rules_table()


GENERATORS: dict[str, Callable[..., str]] = {
    "ops": ops,
    "backends": backends,
    "results": results,
    "rules": rules,
    "scores": scores,
}


def rewritten(text: str) -> str:
    """``text`` with every generated block made anew.

    Raises:
        KeyError: If a block names no generator.
    """

    def block(match: re.Match[str]) -> str:
        name, *arguments = match["name"].split(":")
        return f"{match['open']}{GENERATORS[name](*arguments)}\n{match['close']}"

    return BLOCK.sub(block, text)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 1 if ``--check`` found an old block."""
    parser = argparse.ArgumentParser(description="Rewrite the generated blocks of README.md and docs/.")
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
