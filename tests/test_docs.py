"""The documentation: examples run, generated blocks are current, nothing is left out, every page is in the menu."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import balanced_rep

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
IN_CHECKOUT = DOCS.exists()
PAGES = sorted(DOCS.rglob("*.md"))
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

checkout_only = pytest.mark.skipif(not IN_CHECKOUT, reason="looks at the repository, and this is not one")


def _modules_with_examples() -> list[str]:
    found = []
    for module in pkgutil.walk_packages(balanced_rep.__path__, "balanced_rep."):
        spec = importlib.util.find_spec(module.name)
        is_source = spec is not None and spec.origin is not None and spec.origin.endswith(".py")
        if is_source and re.search(r"^\s*>>> ", Path(spec.origin).read_text(), re.MULTILINE):
            found.append(module.name)
    return found


@pytest.mark.parametrize("name", _modules_with_examples())
def test_examples_of_docstrings_run(name):
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert tried
    assert not failed


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in p.read_text()], ids=lambda p: p.stem)
def test_examples_of_pages_run(page):
    failed, _ = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS)
    assert not failed


@checkout_only
def test_generated_blocks_are_current():
    command = [sys.executable, str(ROOT / "scripts" / "update_tables.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@checkout_only
def test_every_environment_variable_is_in_the_table():
    files = [p for folder in ("balanced_rep", "csrc", "kernels") for p in (ROOT / folder).rglob("*")]
    text = "".join(p.read_text() for p in files if p.suffix in (".py", ".cpp", ".h", ".inl", ".cu"))
    used = set(re.findall(r"(?:\"|getenv\(\")(BALANCED_REP_[A-Z_]+)\"", text))
    listed = set(re.findall(r"^\| `(BALANCED_REP_[A-Z_]+)`", (DOCS / "environment.md").read_text(), re.MULTILINE))
    assert used == listed
    assert 0 < len(listed) < 10


@checkout_only
def test_every_public_name_is_in_the_api_page():
    shown = set(re.findall(r"^::: balanced_rep\.([\w.]+)", (DOCS / "api.md").read_text(), re.MULTILINE))
    public = {n for n in balanced_rep.__all__ if not n.startswith("__")}
    modules = {name for name in public if inspect.ismodule(getattr(balanced_rep, name))}
    inner = {(module, name) for module in modules for name in getattr(balanced_rep, module).__all__}
    public |= {f"{module}.{name}" for module, name in inner if name not in public}
    assert shown == public - modules


@checkout_only
def test_every_op_has_a_page():
    import balanced_rep.ops  # noqa: F401  # registers them
    from balanced_rep.ops._registry import REGISTRY

    pages = {path.stem for path in (DOCS / "ops").glob("*.md")}
    assert {spec.reference.__module__.rpartition(".")[2] for spec in REGISTRY.values()} == pages


@checkout_only
def test_every_page_is_in_the_menu():
    menu = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {str(path.relative_to(DOCS)) for path in PAGES} == menu


@checkout_only
def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / "scripts" / "mkdocs_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = "Costs $5 and $6.\n\n$x^2$ and `$HOME`\n\n$$\n\\sum_j v_j\n$$\n\n```\n$y$\n```\n"
    html = hooks.on_page_markdown(page)
    assert html.count("<math") == 2
    assert html.count('display="block"') == 1
    assert all(kept in html for kept in ("Costs $5 and $6.", "`$HOME`", "```\n$y$\n```"))
    docstring = hooks.on_page_content("<p>:math:<code>a &lt; b</code> and :func:<code>torch.std</code></p>")
    assert docstring.count("<math") == 1
    assert "<code>torch.std</code>" in docstring
    assert ":func:" not in docstring
