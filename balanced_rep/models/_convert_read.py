"""Tensors and plain configuration of a network pickle or checkpoint; the part of `convert` that looks at the file."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from balanced_rep.models._unpickle import Plain, read_pickle

__all__ = ["read"]

PREFERRED = ("ema", "G_ema", "net", "model", "state_dict")
ATTRIBUTES = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")
LEGACY = 0x1950A86A20F9469CFC6C  # what the first pickle in such a file holds
MAX_TENSORS, MAX_NAME, MAX_DEPTH = 100_000, 512, 64
MAX_ENTRIES = 1_000_000  # looked at; a small file can nest references into more than can ever be walked


def read(path: str, key: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads one network of a file.

    Args:
        path: A pickle, or a checkpoint of torch.save.
        key: Which entry of the file; empty for the usual one.

    Returns:
        Tensors by name, and the configuration.

    Raises:
        ValueError: If there is no such network in it.
    """
    if zipfile.is_zipfile(path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    else:
        with open(path, "rb") as file:
            content = read_pickle(file)
        if isinstance(content, int) and content == LEGACY:
            raise ValueError(
                "it is a checkpoint in the form of torch before 1.6, which is not read. Save it again where it is "
                "trusted: torch.save(torch.load(file), file)."
            )
    name, found = _choose(content, key)
    tensors: dict[str, Tensor] = {}
    for tensor_name, tensor in _tensors(found):
        if len(tensors) >= MAX_TENSORS or len(tensor_name) > MAX_NAME:
            raise ValueError("it holds too many tensors, or one with an absurd name.")
        if tensor_name in tensors:
            raise ValueError(f"two of its tensors would be called {tensor_name!r}.")
        own = tensor.detach().as_subclass(Tensor).contiguous().clone()  # safetensors refuses shared memory
        tensors[tensor_name] = own
    if not tensors:
        raise ValueError(f"there are no tensors in {name!r}.")
    return tensors, {"format": "balanced-rep converted 1", "entry": name, **_config(found)}


def _choose(content: Any, key: str) -> tuple[str, Any]:
    """The entry that is wanted."""
    if not isinstance(content, Mapping):
        if key:
            raise ValueError(f"it is a {type(content).__name__}, without entries.")
        return "", content
    entries = [str(k) for k, v in content.items() if isinstance(v, Plain | Mapping) and next(_tensors(v), None)]
    if key:
        if key not in content:
            raise ValueError(f"there is no entry {key!r}; those with tensors are {', '.join(entries) or 'none'}.")
        return key, content[key]
    for name in PREFERRED:
        if name in entries:
            return name, content[name]
    if len(entries) == 1:
        return entries[0], content[entries[0]]
    if any(isinstance(v, Tensor) for v in content.values()):
        return "", content
    raise ValueError(f"which entry? Those with tensors are {', '.join(entries) or 'none'}; choose one with --key.")


def _tensors(
    found: Any, prefix: str = "", depth: int = 0, count: Iterator[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with the names that they have in the network."""
    count = itertools.count() if count is None else count
    if depth > MAX_DEPTH or next(count) > MAX_ENTRIES:
        raise ValueError("it is nested too deeply, or has too many entries.")
    if isinstance(found, Plain):
        for part in ("_parameters", "_buffers"):
            for name, value in _items(found.state.get(part)):
                if isinstance(value, Tensor):
                    yield f"{prefix}{name}", value
        for name, value in _items(found.state.get("_modules")):
            if isinstance(value, Plain):
                yield from _tensors(value, f"{prefix}{name}.", depth + 1, count)
    elif isinstance(found, Mapping):
        for name, value in found.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Mapping):
                yield from _tensors(value, f"{prefix}{name}.", depth + 1, count)


def _items(value: Any) -> list[tuple[str, Any]]:
    return [(str(k), v) for k, v in value.items()] if isinstance(value, Mapping) else []


def _config(found: Any) -> dict[str, Any]:
    """Class, arguments and sizes of the network and of the one inside it."""
    if not isinstance(found, Plain):
        return {}
    config: dict[str, Any] = {"class": found.class_name}
    arguments = _plain(found.state.get("_init_kwargs"))
    if arguments:
        config["arguments"] = arguments
    sizes = {name: found.state[name] for name in ATTRIBUTES if isinstance(found.state.get(name), int | float | bool)}
    if sizes:
        config["attributes"] = {
            name: value if abs(value) != float("inf") else str(value) for name, value in sizes.items()
        }
    inner = dict(_items(found.state.get("_modules"))).get("model")
    if isinstance(inner, Plain):
        config["inner"] = _config(inner)
    return config


def _plain(value: Any, depth: int = 0, count: Iterator[int] | None = None) -> Any:
    """What JSON can hold; `None` for the rest."""
    count = itertools.count() if count is None else count
    if next(count) > MAX_ENTRIES:
        raise ValueError("its arguments have too many entries.")
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if depth < 8 and isinstance(value, list | tuple):
        return [_plain(v, depth + 1, count) for v in value]
    if depth < 8 and isinstance(value, Mapping):
        return {str(k): _plain(v, depth + 1, count) for k, v in value.items()}
    return None
