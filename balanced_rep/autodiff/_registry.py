"""Which function has which rule.

A rule takes the arguments of its function, of which some are :class:`~balanced_rep.autodiff.Dual`, and returns what the
function returns, with Duals where tangents flow. One rule serves all forms that torch offers of a function: ``F.silu``,
``torch.relu`` / ``Tensor.relu``, keyword arguments; in-place forms and ``out=`` follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff._properties import REFUSED

__all__ = [
    "PRODUCTS",
    "RULES",
    "Kind",
    "Rule",
    "forms",
    "function_name",
    "lookup",
    "register_rule",
    "returns_view",
    "rule",
]

Kind = Literal["view", "structure", "linear", "pointwise", "norm", "attention", "composite", "library"]
PRODUCTS = ("linear", "attention")  # under autocast these take all operands in one lower dtype

_NATIVE: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]
_NAMESPACES = (torch, Tensor, F, _NATIVE, torch.special)
_ALIASES = {
    "__add__": "add", "__radd__": "add", "__iadd__": "add_", "__sub__": "sub", "__isub__": "sub_", "__mul__": "mul",
    "__rmul__": "mul", "__imul__": "mul_", "__truediv__": "div", "__div__": "div", "__itruediv__": "div_",
    "__idiv__": "div_", "__neg__": "neg", "__matmul__": "matmul", "__pow__": "pow", "__ipow__": "pow_",
    "__abs__": "abs", "__mod__": "remainder", "__imod__": "remainder_", "__ifloordiv__": "floor_divide_",
    "__pos__": "positive", "__rtruediv__": "__rdiv__", "subtract": "sub", "multiply": "mul", "divide": "div",
    "true_divide": "div", "negative": "neg", "absolute": "abs", "concat": "cat", "concatenate": "cat",
    "swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim", "clip": "clamp", "expit": "sigmoid",
    "arctan": "atan",
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One multi-tangent rule.

    Attributes:
        name: The function's name.
        kind: What it does to the stack.
        fn: The rule.
        formula: One line: the tangent ``t'`` in terms of the tangents ``t``.
    """

    name: str
    kind: Kind
    fn: Callable[..., Any]
    formula: str

    @property
    def composite(self) -> bool:
        """Whether ``fn`` calls torch functions on Duals, which find their own rules."""
        return self.kind == "composite"


RULES: dict[Any, Rule] = {}
_BY_NAME: dict[str, Rule] = {}
R = TypeVar("R", bound=Callable[..., Any])


def forms(name: str) -> list[Any]:
    """Every object under which torch offers the function ``name``: functional, method, operator."""
    names = [name, *(alias for alias, target in _ALIASES.items() if target == name)]
    found = [getattr(space, n) for space in _NAMESPACES for n in names if hasattr(space, n)]
    return list(dict.fromkeys(f for f in found if callable(f)))


def rule(*names: str, kind: Kind, formula: str) -> Callable[[R], R]:
    """Registers a rule of this package for every form of the torch functions ``names``."""

    def add(fn: R) -> R:
        for name in names:
            found = forms(name)
            if not found:
                continue  # not in this torch version
            entry = _BY_NAME[name] = Rule(name, kind, fn, formula)
            for form in found:
                RULES[form] = entry
        return fn

    return add


def lookup(func: Any) -> Rule | None:
    """The rule of a function, or of the function that an in-place method is the in-place form of."""
    if (found := RULES.get(func)) is not None:
        return found
    if (name := function_name(func)).endswith("_") and not name.startswith("__") and name not in REFUSED:
        return _BY_NAME.get(_ALIASES.get(name[:-1], name[:-1])) if func in _torch_inplace() else None
    packet = getattr(func, "overloadpacket", None)
    return RULES.get(packet) or _aten_view(func) or _native_view(func)


def returns_view(func: Any) -> bool:
    """Whether ``func`` is an operator such as ``torch.ops.aten.view``, whose result shares memory with its input."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        return any(returns_view(getattr(func, name)) for name in func.overloads())
    return isinstance(func, torch._ops.OpOverload) and any(
        r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
    )


def _aten_view(func: Any) -> Rule | None:
    """The rule of the function that an operator stands for, if its result is a view: these take the same arguments."""
    space, _, name = function_name(func).partition(".")
    name = name.split(".")[0]
    return _BY_NAME.get(_ALIASES.get(name, name)) if space == "aten" and returns_view(func) else None


def _native_view(func: Any) -> Rule | None:
    """The rule of a view such as ``torch._VF.split``, which ``torch.split`` is not."""
    found = _BY_NAME.get(name := function_name(func))
    native = getattr(torch._C._VariableFunctions, name, None)  # pyright: ignore[reportAttributeAccessIssue]
    return found if found is not None and found.kind == "view" and func == native else None


def function_name(func: Any) -> str:
    """Short name of a torch function, for messages and tables."""
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(func)
    name = getattr(func, "__name__", None) or type(func).__name__
    if name in ("__get__", "__set__", "__delete__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return _ALIASES.get(name, name)


def _torch_inplace() -> set[Any]:
    if not _INPLACE:
        for space in (Tensor, torch, F, _NATIVE):
            _INPLACE.update(f for n in dir(space) if n.endswith("_") and callable(f := getattr(space, n)))
    return _INPLACE


_INPLACE: set[Any] = set()


def register_rule(
    targets: Any | Iterable[Any], fn: Callable[..., Any], *, name: str | None = None, formula: str = ""
) -> Callable[..., Any]:
    """Teaches ``br.jvp`` a function of another library, or replaces a rule.

    The rule is called as ``fn(*args, **kwargs)`` with the arguments of the function, of which at least one is a
    :class:`~balanced_rep.autodiff.Dual`, and returns what the function returns, with
    :func:`~balanced_rep.autodiff.dual` wherever tangents flow. Inside it, torch
    functions see plain tensors only: use ``x.primal`` (shape of ``x``), ``x.tangents`` (K, shape of ``x``) and
    ``x.stack``. It must not write into its arguments.

    Args:
        targets: What is called: a function that honours ``__torch_function__``, a ``torch.library`` custom op or
            ``torch.ops.name.space`` packet or overload, or a ``torch.autograd.Function`` class; or several of them.
        fn: The rule.
        name: Name in tables; by default the target's.
        formula: One line for tables.

    Returns:
        ``fn``.

    Raises:
        TypeError: If a target cannot be seen by an interceptor.
    """
    several: list[Any] = [*targets] if isinstance(targets, list | tuple | set) else [targets]
    for target in several:
        target = getattr(target, "_opoverload", target)  # a CustomOpDef
        if not callable(target):
            raise TypeError(f"register_rule: {target!r} is not callable")
        entry = Rule(name or function_name(target), "library", fn, formula)
        RULES[target] = entry
        if (packet := getattr(target, "overloadpacket", None)) is not None:
            RULES[packet] = entry
        if isinstance(target, torch._ops.OpOverloadPacket):
            RULES.update({getattr(target, name): entry for name in target.overloads()})
    return fn
