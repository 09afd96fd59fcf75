"""Rewrites the two CUDA constructs that no macro can turn into C++, keeping every line where it was.

``extern __shared__ T name[];``  becomes a pointer to the dynamic shared memory of the running block, and
``__shared__ T name[...];``      becomes a static variable that announces itself, so that it can be poisoned before
                                 every block (shared memory is uninitialised on the device).
"""

from __future__ import annotations

import re
from pathlib import Path

_DYNAMIC = re.compile(
    r"\bextern\s+__shared__\s+(?:__align__\(\d+\)\s+)?(?P<type>[^;\[]*?)\s*\b(?P<name>\w+)\s*\[\s*\]\s*;"
)
_STATIC = re.compile(r"\b__shared__\s+(?P<declaration>[^;=]*);")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"(?P<file>[^"]+)"', re.MULTILINE)
_DECLARATOR = re.compile(r"(\w+)\s*(?:\[[^\]]*\]\s*)*$")


def _split_declarators(declaration: str) -> list[str]:
    """Split ``float a[N], b[f<int, 2>()]`` at the commas that separate variables."""
    parts, depth, start = [], 0, 0
    for position, char in enumerate(declaration):
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth == 0:
            parts.append(declaration[start:position])
            start = position + 1
    return [*parts, declaration[start:]]


def _rewrite_static(match: re.Match[str]) -> str:
    declaration = match["declaration"]
    names = []
    for part in _split_declarators(declaration):
        found = _DECLARATOR.search(part.strip())
        if found is None:
            raise ValueError(f"cannot read the shared declaration {match[0]!r}")
        names.append(found[1])
    announcements = " ".join(
        f"static simt::SharedVariable simt_{name}_((void*)&{name}, sizeof({name}));" for name in names
    )
    return f"static {declaration}; {announcements}"


def rewrite(source: str) -> str:
    """Return the host C++ text of CUDA source; line numbers do not change."""
    source = _DYNAMIC.sub(r"\g<type>* \g<name> = reinterpret_cast<\g<type>*>(simt::dynamic_shared);", source)
    return _STATIC.sub(_rewrite_static, source)


def write_tree(source: Path, include_dirs: list[Path], target: Path) -> Path:
    """Write the rewritten file and the quoted headers it includes, each with a ``#line`` naming the original.

    Args:
        source: The ``.cu`` file.
        include_dirs: Where quoted headers are looked up, after the folder of the including file.
        target: Folder to write to; headers keep the path by which they are included.

    Returns:
        The rewritten copy of ``source``.
    """
    text = source.read_text()
    copy = target / source.name
    pending = [(source, text, copy)]
    done: set[Path] = set()
    while pending:
        origin, text, copy = pending.pop()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(f'#line 1 "{origin}"\n{rewrite(text)}')
        done.add(copy)
        for match in _INCLUDE.finditer(text):
            for folder in (origin.parent, *include_dirs):
                header = folder / match["file"]
                if header.exists() and target / match["file"] not in done:
                    pending.append((header, header.read_text(), target / match["file"]))
                    break
    return copy if copy.name == source.name else target / source.name
