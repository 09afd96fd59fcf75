"""Print the requirements of pyproject.toml, one a line, for `pip install -r`: the base ones, and those of extras named.

`pip install .[dev]` would do, but it also builds the package; the Makefile keeps the two steps apart.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def requirements(extras: list[str]) -> list[str]:
    """The base requirements and those of ``extras``, references of the project to its own extras resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = re.compile(rf"{re.escape(project['name'])}\[(?P<extras>[^]]+)\]")
    found: dict[str, None] = dict.fromkeys(project["dependencies"])

    def add(extra: str) -> None:
        for requirement in project["optional-dependencies"][extra]:
            if reference := own.fullmatch(requirement):
                for name in reference["extras"].split(","):
                    add(name.strip())
            else:
                found[requirement] = None

    for extra in extras:
        add(extra)
    return list(found)


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
