"""Disassembles cubins: what ``cuobjdump`` says about resources, and how often each function uses each instruction."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..toolchain import BUILD, triton_tool

__all__ = ["Sass", "disassemble"]

_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z][A-Z0-9_.]*)", re.MULTILINE
)
_CODE = ".text."
# nvdisasm knows an architecture's own instructions, as of warp groups, under these names.
_SUFFIX = {90: "a", 100: "a", 120: "a"}


@dataclass(frozen=True)
class Sass:
    """One cubin.

    Attributes:
        usage: The text of ``cuobjdump -res-usage``.
        mixes: Function to the number of its instructions by name, ``{"LDG.E.128": 4}``.
    """

    usage: str
    mixes: dict[str, Counter[str]]


def disassemble(cubins: Sequence[tuple[int, bytes]]) -> list[Sass]:
    """Disassemble objects, each given as architecture (80 for sm_80) and bytes.

    ``nvdisasm`` takes a third of a second to start, so the code of all objects of an architecture goes through it at
    once. What it says is kept in ``build/gpusim/sass``.

    Raises:
        RuntimeError: If a tool refuses an object, or does not say what every byte of it is.
    """
    kept = [BUILD / "sass" / f"{hashlib.sha256(cubin).hexdigest()[:24]}.json" for _, cubin in cubins]
    missing: dict[int, dict[Path, bytes]] = {}
    for path, (arch, cubin) in zip(kept, cubins, strict=True):
        if not path.exists():
            missing.setdefault(arch, {})[path] = cubin
    for arch, objects in missing.items():
        for (path, cubin), mixes in zip(objects.items(), _mixes(arch, list(objects.values())), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps([_run("cuobjdump", ["-res-usage"], cubin), mixes]))
            unfinished.replace(path)
    read = [json.loads(path.read_text()) for path in kept]
    return [Sass(usage, {name: Counter(mix) for name, mix in mixes.items()}) for usage, mixes in read]


def _mixes(arch: int, cubins: list[bytes]) -> list[dict[str, Counter[str]]]:
    """Count the instructions of every function of every object."""
    found: list[dict[str, Counter[str]]] = [{} for _ in cubins]
    code, starts, counts = b"", [], []
    for mixes, cubin in zip(found, cubins, strict=True):
        for name, section in _sections(cubin):
            if name.startswith(_CODE):
                starts.append(len(code))
                counts.append(mixes.setdefault(name.removeprefix(_CODE), Counter()))
                code += section
    text = _run("nvdisasm", ["-b", f"SM{arch}{_SUFFIX.get(arch, '')}"], code)
    n_read = 0
    for match in _INSTRUCTION.finditer(text):
        counts[bisect.bisect_right(starts, int(match["address"], 16)) - 1][match["op"]] += 1
        n_read += 16  # bytes of an instruction since sm_70
    if n_read != len(code):
        raise RuntimeError(f"nvdisasm: {n_read} of {len(code)} bytes of sm_{arch} code are instructions")
    return found


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of the sections of a 64-bit little-endian ELF file (System V ABI, chapter 4)."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_size, n_entries, names_index = struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + index * entry_size) for index in range(n_entries)]
    names = headers[names_index][4]
    for name, _, _, _, start, size in headers:
        yield elf[names + name : elf.index(b"\0", names + name)].decode(), elf[start : start + size]


def _run(tool: str, options: list[str], data: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        done = subprocess.run([triton_tool(tool), *options, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool}: {done.stderr.strip()}")
    return done.stdout
