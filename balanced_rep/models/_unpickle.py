"""Reading network pickles without running them: tensors and plain values come out, everything else stays a name.

A pickle is a program: it names functions and calls them. Here a name is looked up in a short list of functions that
build tensors and containers; classes of networks become :class:`Plain`, which stores what it is given; any other name
is an error. Source code that some pickles carry along is dropped unread.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

__all__ = ["ForbiddenNameError", "Plain", "read_pickle"]

NETWORK_PREFIXES = ("torch.nn.modules.",)
EASY_DICTS = {("dnnlib.util", "EasyDict"), ("dnnlib", "EasyDict"), ("torch_utils.persistence", "EasyDict")}


class RefusedPickleError(pickle.UnpicklingError):
    """A file that is no pickle of a network; the message says why."""


class ForbiddenNameError(RefusedPickleError):
    """A pickle asks for a function or class that is not on the list."""


class Plain:
    """Stands for an object of a class that is not imported: its name and what it would have been given.

    Attributes:
        class_name: Name of the class.
        state: Its attributes.
    """

    class_name = "?"

    def __new__(cls, *args: Any, **kwargs: Any) -> Plain:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state = state


def read_pickle(file: BinaryIO) -> Any:
    """Reads one pickle.

    Args:
        file: Open in binary mode.

    Returns:
        Tensors, containers, numbers, text and `Plain` objects.

    Raises:
        ForbiddenNameError: If it names anything else; nothing has been called then that is not on the list.
        RefusedPickleError: If it is no pickle, or not a whole one.
    """
    try:
        return _Unpickler(file).load()
    except RefusedPickleError:
        raise
    except (EOFError, IndexError, pickle.UnpicklingError) as error:  # "could not find MARK"
        raise RefusedPickleError(f"it is no pickle, or not a whole one ({error}).") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        found = ALLOWED.get((module_name, global_name))
        if found is not None:
            return found
        if (module_name, global_name) in EASY_DICTS:
            return dict
        if module_name.startswith(NETWORK_PREFIXES):
            return type("Plain", (Plain,), {"class_name": global_name})
        raise ForbiddenNameError(
            f"it names {module_name}.{global_name}, which is not on the list of what may be built; nothing of it was "
            f"run."
        )

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickleError("it refers to objects outside the file.")


def _reconstruct(meta: Any) -> Plain:
    """What `torch_utils.persistence` makes: a class from source code, which is left where it is."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise RefusedPickleError("a persistent object without a class name.")
    plain = Plain()
    plain.class_name = meta["class_name"]
    state = meta.get("state")
    plain.state = state if isinstance(state, dict) else {}
    return plain


def _storage(data: Any) -> Any:
    """The memory of a tensor, which torch stores as a file in the pickle."""
    if not isinstance(data, bytes):
        raise RefusedPickleError("the memory of a tensor is not bytes.")
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.TypedStorage):
        raise RefusedPickleError(f"the memory of a tensor holds a {type(storage).__name__}.")
    return storage


class _View(torch.Tensor):
    """A tensor that no later instruction can move: `Tensor.__setstate__` would enlarge its memory, unwritten."""

    def __setstate__(self, state: Any) -> None:
        raise RefusedPickleError("a tensor is given a state after it was built.")


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """A view of a storage. That it lies inside is checked here: torch would enlarge the memory, unwritten."""
    if not isinstance(storage, torch.TypedStorage):
        raise RefusedPickleError(f"a tensor over {type(storage).__name__} instead of memory.")
    offset, size, stride = int(offset), tuple(map(int, size)), tuple(map(int, stride))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((0, offset, *size, *stride)) < 0 or (0 not in size and last >= storage._size()):
        raise RefusedPickleError(f"a tensor of size {size} reaches beyond its memory of {storage._size()}.")
    tensor = torch.empty((0,), dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)
    return tensor.as_subclass(_View)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _array(kind: Any, *_: Any) -> Plain:
    """An array of numpy, kept as what it is made of."""
    plain = Plain()
    plain.class_name = "ndarray"
    return plain


def _named(name: str) -> type[Plain]:
    return type("Plain", (Plain,), {"class_name": name})


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _reconstruct,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy", "ndarray"): _named("ndarray"),
    ("numpy", "dtype"): _named("dtype"),
}
