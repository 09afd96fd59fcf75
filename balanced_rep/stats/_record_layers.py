"""Which modules a `record` listens to: exact names and patterns, near names on a miss, modules that cannot be heard."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Layer", "LayerSpec", "near_names", "resolve_layers"]

LayerSpec = str | re.Pattern[str] | Iterable[str | re.Pattern[str]]


@dataclass(frozen=True)
class Layer:
    """A module to listen to.

    Attributes:
        name: Its dotted name in the model; the key of its statistics.
        module: The module.
        named: It was asked for by name rather than found by a pattern, so it has to run.
    """

    name: str
    module: nn.Module
    named: bool


def resolve_layers(model: nn.Module, layers: LayerSpec, *, stacklevel: int = 3) -> list[Layer]:
    """Finds the modules that ``layers`` asks for, in the order in which the model lists them.

    Args:
        model: The model that will be called.
        layers: Exact dotted names (``str``), compiled patterns that must match a whole name, or several of them.
        stacklevel: Where the warning on shared modules points.

    Returns:
        The layers, each module once.

    Raises:
        ValueError: If a name or pattern finds nothing, or a module that is found can never be heard.
    """
    modules: dict[str, nn.Module] = {}
    _collect("", model, modules)
    wanted: dict[str, bool] = {}
    for spec in _specs(layers):
        if isinstance(spec, str):
            wanted[_exact(spec, modules)] = True
        else:
            for name in _matches(spec, modules):
                wanted.setdefault(name, False)
    found = [Layer(name, module, wanted[name]) for name, module in modules.items() if name in wanted]
    for layer in found:
        _check_audible(layer, modules)
    return _drop_aliases(found, modules, stacklevel + 1)


def _collect(name: str, module: nn.Module, into: dict[str, nn.Module]) -> None:
    """``named_modules(remove_duplicate=False)`` without its nested generators, which cost a millisecond on a UNet."""
    into[name] = module
    for child_name, child in module._modules.items():
        if child is not None:
            _collect(f"{name}.{child_name}" if name else child_name, child, into)


def near_names(name: str, names: Iterable[str], count: int = 5) -> list[str]:
    """The names that a misspelt one probably meant: those that end with it, then the most similar ones."""
    names = [n for n in names if n]
    endings = [n for n in names if n.endswith("." + name) or name.endswith("." + n)][:count]
    similar = difflib.get_close_matches(name, names, n=count, cutoff=0.6)
    return list(dict.fromkeys([*endings, *similar]))[:count]


def _specs(layers: LayerSpec) -> list[str | re.Pattern[str]]:
    specs = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if not specs:
        raise ValueError("record: no layer is asked for; pass a module name, a compiled pattern, or several of them")
    for spec in specs:
        if not isinstance(spec, str | re.Pattern):
            raise TypeError(
                f"record: layers takes module names (str) and compiled patterns (re.compile), got {type(spec).__name__}"
            )
    return specs


def _exact(name: str, modules: dict[str, nn.Module]) -> str:
    if name in modules:
        if _has_no_forward(modules[name]):
            inside = [n for n in modules if n.startswith(name + ".") and n.count(".") == name.count(".") + 1]
            raise ValueError(
                f"record: {name!r} is a {type(modules[name]).__name__}, a container that is never called itself; "
                f"name what is inside: {_listed(inside)}"
            )
        return name
    message = f"record: the model has no module {name!r} ({len(modules) - 1} modules)"
    if near := near_names(name, modules):
        message += f"; near names: {_listed(near)}"
    if (as_pattern := _try_pattern(name)) and (hits := [n for n in modules if as_pattern.fullmatch(n)]):
        message += f"; as a pattern it matches {len(hits)} modules: pass re.compile({name!r})"
    raise ValueError(message)


def _matches(pattern: re.Pattern[str], modules: dict[str, nn.Module]) -> list[str]:
    hits = [n for n in modules if n and pattern.fullmatch(n)]
    callable_hits = [n for n in hits if not _has_no_forward(modules[n])]
    if callable_hits:
        return callable_hits
    message = f"record: pattern {pattern.pattern!r} matches none of the {len(modules) - 1} module names as a whole"
    if hits:
        message = f"record: pattern {pattern.pattern!r} matches only containers, never called: {_listed(hits)}"
    elif parts := [n for n in modules if pattern.search(n)]:
        message += f"; it occurs inside {len(parts)} of them, such as {_listed(parts)}: add '.*' where it may go on"
    elif near := near_names(pattern.pattern.replace("\\", ""), modules):
        message += f"; near names: {_listed(near)}"
    raise ValueError(message)


def _try_pattern(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    except re.error:
        return None


def _has_no_forward(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is nn.Module.forward and "forward" not in vars(module)


def _ancestors(name: str) -> Iterator[str]:
    """Names of the modules around ``name``, the model (``""``) first."""
    if not name:
        return
    yield ""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        yield ".".join(parts[:depth])


def _check_audible(layer: Layer, modules: dict[str, nn.Module]) -> None:
    """Refuses a layer whose hooks torch would skip: inside compiled or scripted code, or on a data-parallel replica."""
    what = f"record: layer {layer.name!r} cannot be recorded: "
    for name in _ancestors(layer.name):
        if (module := modules.get(name)) is None:
            continue
        around = f"module {name!r}" if name else "the model"
        if _is_compiled_wrapper(module):
            raise ValueError(
                f"{what}{around} is compiled (torch.compile), and compiled code skips hooks that are added later. "
                "Record and call the module it wraps, `model._orig_mod`: it shares the weights and runs eagerly"
            )
        if _compiled_in_place(module):
            raise ValueError(
                f"{what}{around} was compiled in place (module.compile()), and compiled code skips hooks that are "
                "added later. Compile with `fast = torch.compile(module)` instead, which leaves `module` eager, and "
                "record `module`"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{what}{around} is a ScriptModule, which runs no Python hooks; use the eager module")
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                f"{what}{around} is a DataParallel over {len(module.device_ids)} devices, whose replicas run in other "
                "threads; record `model.module` and call it, or use one process per device"
            )
    if _compiled_in_place(layer.module):
        raise ValueError(
            f"{what}it was compiled in place (module.compile()), and compiled code skips hooks that are added later; "
            "record before compiling, or compile with torch.compile(module)"
        )
    if isinstance(layer.module, torch.jit.ScriptModule):
        raise ValueError(f"{what}it is a ScriptModule, which takes no Python hooks; use the eager module")


def _is_compiled_wrapper(module: nn.Module) -> bool:
    # By name: importing torch._dynamo to ask isinstance would cost a second.
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def _compiled_in_place(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _drop_aliases(found: list[Layer], modules: dict[str, nn.Module], stacklevel: int) -> list[Layer]:
    names: dict[int, list[str]] = {id(layer.module): [] for layer in found}
    for name, module in modules.items():
        if id(module) in names:
            names[id(module)].append(name)
    kept: dict[int, Layer] = {}
    for layer in found:
        first = kept.setdefault(id(layer.module), layer)
        if first is not layer and first.named and layer.named:
            raise ValueError(f"record: {first.name!r} and {layer.name!r} are one shared module; ask for one of them")
        if layer.named and not first.named:
            kept[id(layer.module)] = layer
    shared = {layer.name: aliases for layer in kept.values() if len(aliases := names[id(layer.module)]) > 1}
    if shared:
        listed = "; ".join(f"{name!r} is also {_listed(set(also) - {name})}" for name, also in shared.items())
        warnings.warn(
            f"record: shared modules: {listed}. A call under any of these names counts as a call of the layer",
            UserWarning,
            stacklevel=stacklevel,
        )
    return [layer for layer in found if kept[id(layer.module)] is layer]


def _listed(names: Iterable[str], limit: int = 6) -> str:
    names = sorted(names) if isinstance(names, set) else list(names)
    text = ", ".join(repr(n) for n in names[:limit])
    return text + (f", ... ({len(names)} in all)" if len(names) > limit else "")
