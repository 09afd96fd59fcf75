"""Pickled networks as safetensors, without running what is in the pickle."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["ConversionError", "Converted", "convert"]

TIMEOUT_S = 900


class ConversionError(ValueError):
    """A file that could not be converted; the message says why, and nothing was written."""


@dataclass(frozen=True)
class Converted:
    """What came out.

    Attributes:
        weights: The safetensors file.
        config: The configuration file.
        n_tensors: Tensors in it.
        n_parameters: Their entries.
        network_isolated: Whether the kernel kept the process that read the file from any network.
        files_isolated: Whether the kernel kept it from changing files and from starting programs. Where it could not,
            an audit hook forbade the same to Python code, and limits held.
    """

    weights: Path
    config: Path
    n_tensors: int
    n_parameters: int
    network_isolated: bool
    files_isolated: bool


def convert(path: str | Path, out: str | Path, *, key: str = "") -> Converted:
    """Takes tensors and plain configuration out of a pickled network, as NVlabs' EDM networks are published.

    The file is read in a child process with limits on memory and time, without network and unable to change files where
    the system allows (Linux), by an unpickler that knows a short list of names (:mod:`balanced_rep.models._unpickle`).
    Source code in the file is not run. Checkpoints of `torch.save` are read with `weights_only=True`, in the same
    process.

    Args:
        path: The file.
        out: Folder for `model.safetensors` and `config.json`; made if needed.
        key: Which network of the file; default: "ema" if there is one.

    Returns:
        The files.

    Raises:
        ConversionError: If the file is not what it should be, asks for a name that is not on the list, changes while it
            is read, or takes too much memory or time; or if this torch is older than 2.10.
        FileNotFoundError: If there is no such file.
        FileExistsError: If a file would be overwritten.
    """
    source, folder = Path(path), Path(out)
    _check_torch(torch.__version__)
    if not source.is_file():
        raise FileNotFoundError(f"There is no file {source}.")
    for name in ("model.safetensors", "config.json"):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists; give another folder.")
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())  # nothing is left of a failure
    with tempfile.TemporaryDirectory(dir=there, prefix=".convert-") as work:
        digest = _digest(source)
        answer = _run_child(source.resolve(), Path(work), key)
        config = _checked(Path(work), answer)
        if _digest(source) != digest:
            raise ConversionError(f"{source.name}: it was changed while it was read.")
        config["source"] = {"file": source.name, "sha256": digest}
        (Path(work) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            os.replace(Path(work) / name, folder / name)
    return Converted(
        folder / "model.safetensors", folder / "config.json", answer["n_tensors"], answer["n_parameters"],
        answer["network_isolated"], answer["files_isolated"],
    )  # fmt: skip


def _check_torch(version: str) -> None:
    """A crafted file breaks out of `weights_only=True` in older ones (CVE-2025-32434, CVE-2026-24747)."""
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise ConversionError(
            f"reading an untrusted file needs torch 2.10 or newer, this is {version}: a crafted file can break out of "
            "weights_only=True of older ones. Convert it in an environment of its own: pip install 'torch>=2.10'."
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run_child(source: Path, work: Path, key: str) -> dict[str, Any]:
    import balanced_rep

    child = Path(__file__).with_name("_convert_child.py")
    root = str(Path(balanced_rep.__file__).resolve().parent.parent)
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-s", str(child), str(source), str(work), key]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
            cwd=work,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise ConversionError(f"{source.name}: not read after {TIMEOUT_S} s.") from error
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ConversionError(
            f"{source.name}: the process that read it ended with status {done.returncode}, most likely at a limit "
            "of memory or time."
        ) from error
    if "error" in answer:
        raise ConversionError(f"{source.name}: {_printable(answer['error'])}")
    return answer


def _checked(work: Path, answer: dict[str, Any]) -> dict[str, Any]:
    """Opens what the child wrote; nothing of it is believed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(work / "model.safetensors"), framework="pt") as file:
            n_tensors = len(list(file.keys()))
        config = json.loads((work / "config.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConversionError(f"the result cannot be read: {error}.") from error
    if n_tensors != answer["n_tensors"] or not isinstance(config, dict):
        raise ConversionError("the result is not what was announced.")
    return config


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:500]
