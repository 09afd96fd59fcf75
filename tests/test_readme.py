"""The README says nothing that is not so: its examples run, its files exist, its tables are current."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="looks at the repository, and this is not one")


def test_example_runs_and_prints_what_it_says():
    failed, tried = doctest.testfile(str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried >= 8
    assert failed == 0


def test_files_it_names_exist():
    named = re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_commands_it_names_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README.read_text())) <= targets


def test_extras_it_names_exist():
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    named = set(re.findall(r"\[([a-z]\w+)\]'", README.read_text()))
    assert named
    assert named <= extras
