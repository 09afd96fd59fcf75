"""Where every torch function that meets a Dual is decided: rule, composite, primal, fallback or refusal."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from balanced_rep.autodiff import _properties as known
from balanced_rep.autodiff._dual import Dual, is_differentiable, primal
from balanced_rep.autodiff._errors import FallbackError, UnsupportedError
from balanced_rep.autodiff._fallback import fallback
from balanced_rep.autodiff._inplace import is_inplace, writable, write_back
from balanced_rep.autodiff._registry import PRODUCTS, Rule, function_name, lookup, returns_view
from balanced_rep.autodiff._session import Session, calling_module, current
from balanced_rep.autodiff._viewed import view_apart

__all__ = ["Interceptor", "intercept"]

_WITHOUT_DUALS = torch._C.DisableTorchFunctionSubclass
_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # pyright: ignore[reportAttributeAccessIssue]
_PLAINLY = torch._C.DisableTorchFunction  # rules are not intercepted at all


class Interceptor(TorchFunctionMode):
    """Sees the functions that meet no Dual too: random ones are refused, new buffers are noted."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Routes one call.

        Args:
            func: The function.
            types: Types of the tensor arguments that are not plain.
            args: Its arguments.
            kwargs: And keyword arguments.

        Returns:
            Its result.
        """
        kwargs = kwargs or {}
        if Dual in types:
            return intercept(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **kwargs)
        if self.session.n_slots > 1 and _is_reverse_mode(func, args, kwargs):
            _refuse_reverse_mode()
        if name in known.RANDOM or _is_active_dropout(name, args, kwargs):
            _refuse_random(name)
        if (self.session.pending or self.session.has_reshaped) and _writes(func, name, kwargs):
            self.session.settle()
            if args and isinstance(args[0], Tensor):
                self.session.check_layout(args[0])
        result = func(*args, **kwargs)
        if name in known.FACTORIES or name in known.LIKE_FACTORIES:
            self.session.remember_fresh(result)
        return result


def intercept(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs ``func`` on arguments of which some carry tangents.

    Args:
        func: What was called.
        args: Its arguments.
        kwargs: And keyword arguments.

    Returns:
        What the function returns, with tangents.

    Raises:
        UnsupportedError: If the tangents cannot follow.
    """
    session = current()
    name = function_name(func)
    if session is None:
        if name in known.METADATA or name in known.METADATA_FIELDS:
            with _WITHOUT_DUALS():
                return func(*args, **kwargs)
        raise UnsupportedError(
            f"br.jvp: {name} was called on a value with tangents after br.jvp had returned. The model keeps an "
            "activation on itself; return it, or use output='module.name'"
        )
    with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():  # f may have enabled it
        if session.timed:
            return _timed(session, func, name, args, kwargs)
        return _route(session, func, name, args, kwargs)[1]


def _timed(session: Session, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    start = time.perf_counter()
    route, result = _route(session, func, name, args, kwargs)
    if route not in ("metadata", "composite"):  # a composite's parts are timed
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        session.seconds[route, name] += time.perf_counter() - start
    return result


def _route(session: Session, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
    if name in known.METADATA or (name in known.METADATA_FIELDS and getattr(func, "__name__", "") == "__get__"):
        with _WITHOUT_DUALS():
            return "metadata", func(*args, **kwargs)
    if peek_interpreter_stack() is not None:
        raise UnsupportedError(
            f"br.jvp: {name} met a value with tangents inside torch.func.vmap, grad or jvp{calling_module()}, which "
            "cannot carry them. Write the inner transform out, or call torch.func.jvp, which nests"
        )
    if func is torch.autograd.grad:
        _refuse_reverse_mode()
    if getattr(func, "__name__", "") in ("__set__", "__delete__"):
        raise UnsupportedError(f"br.jvp: x.{name} = ... on a value with tangents is not supported; make a new tensor")
    out = kwargs.get("out")
    if out is not None:
        session.settle()
        route, result = _route(session, func, name, args, {k: v for k, v in kwargs.items() if k != "out"})
        return route, pytree.tree_map(lambda r, o: write_back(o, r, name, session), result, out)
    if session.pending and _writes(func, name, kwargs):
        session.settle(but=args[0] if args else None)
    found, route, result = lookup(func), "", None
    label = name
    if found is not None:
        route, label = "composite" if found.composite else "rule", found.name
        try:
            result = _apply(session, found, func, args, kwargs)
        except IndexError:
            if not _has_scalar(args):
                raise
            result = NotImplemented  # torch lets dim=0 and -1 pass for a tensor without dims; so does the fallback
        except RuntimeError as error:
            if isinstance(error, UnsupportedError) or not _has_sparse((args, kwargs)):
                raise
            raise UnsupportedError(
                f"br.jvp: {name} of a value with tangents and a sparse tensor{calling_module()} is not supported; use "
                "its .to_dense()"
            ) from error
    if found is None or result is NotImplemented:
        label = name
        route, result = _without_rule(session, func, name, args, kwargs)
    if route != "metadata":
        session.calls[route, label] += 1
    if is_inplace(func, name) or kwargs.get("inplace"):
        result = write_back(args[0], result, name, session)
    return route, result


def _without_rule(
    session: Session, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any]:
    short = name.split(".")[1] if name.startswith("aten.") else name
    base = short.removesuffix("_") if is_inplace(func, name) else short
    if base in known.PRIMAL_DECIDES or short in known.TANGENT_STOPS or _makes_integers(kwargs):
        if short in ("detach", "data"):  # shares memory with its argument, which needs a buffer of its own for that
            _ = next(iter((*args, *kwargs.values()))).stack
        elif base != short and args and isinstance(args[0], Dual):  # in place: the caller writes the result back
            args = (args[0].primal.clone(), *args[1:])
        with _WITHOUT_DUALS():
            return "primal", _on_primals(func, args, kwargs)
    if name in known.LIKE_FACTORIES:
        with _WITHOUT_DUALS():
            result = _on_primals(func, args, kwargs)
        session.remember_fresh(result)
        return "primal", result
    if name in known.RANDOM or _is_active_dropout(name, args, kwargs):
        _refuse_random(name)
    if name == "instance_norm" and _updates_statistics(args, kwargs):
        raise UnsupportedError(
            f"br.jvp: instance normalisation is in training mode{calling_module()}: it would change the running "
            "statistics. Call model.eval()."
        )
    if (why := known.REFUSED.get(short)) is not None:
        raise UnsupportedError(f"br.jvp: {name} on a value with tangents{calling_module()}: it {why}.")
    if base in known.VIEWS_WITHOUT_RULE or returns_view(func):
        raise UnsupportedError(f"br.jvp: {name} may return a view, and has no rule; use reshape or indexing.")
    if (why := _opaque(func)) is not None:
        raise UnsupportedError(f"br.jvp: {name}{calling_module()} {why}")
    if session.strict:
        raise FallbackError(
            f"br.jvp: strict=True, and {name} has no multi-tangent rule{calling_module()}. Register one with "
            "br.autodiff.register_rule, or use strict=False: torch.func then differentiates that one function."
        )
    if is_inplace(func, name):
        writable(args[0], name, session)
    kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}  # the caller writes the result back
    with _WITHOUT_DUALS():
        return "fallback", fallback(func, name, args, kwargs, inplace=is_inplace(func, name))


def _updates_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    running = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
    return running is not None and bool(kwargs.get("use_input_stats", args[5] if len(args) > 5 else True))


def _makes_integers(kwargs: dict[str, Any]) -> bool:
    """Whether a result in a dtype without derivatives is asked for: ``x.nansum(dtype=torch.int64)``."""
    return isinstance(dtype := kwargs.get("dtype"), torch.dtype) and not is_differentiable(dtype)


def _writes(func: Any, name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function may write into memory that something else looks at."""
    written = is_inplace(func, name) or name in ("__setitem__", "__setstate__", "__set__") or name.startswith("__i")
    return written or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def _has_sparse(tree: Any) -> bool:
    return any(isinstance(x, Tensor) and x.layout != torch.strided for x in pytree.tree_leaves(tree))


def _has_scalar(args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Dual) and x.stack.dim() == 1 for x in args)


def _opaque(func: Any) -> str | None:
    """Why a function cannot be differentiated by torch.func without the danger of a silent zero."""
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        space = str(func).split(".")[0]
        if space in ("aten", "prims", "prim"):
            return None
        return (
            "is a custom op: torch has no forward-mode rule for those, and would return a zero tangent without an "
            f"error. Register one: br.autodiff.register_rule(torch.ops.{space}...., rule)."
        )
    if isinstance(func, torch._ops.HigherOrderOperator):
        return "is a higher-order operator, which torch cannot differentiate in forward mode; use plain Python"
    if isinstance(func, torch.ScriptMethod | torch.ScriptFunction):
        return "is scripted code, which tangents cannot follow; use the eager module."
    return None


def _on_primals(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = pytree.tree_map_only(Dual, primal, (args, kwargs))
    return func(*args, **kwargs)


def _apply(session: Session, entry: Rule, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if entry.composite:
        return entry.fn(*args, **kwargs)
    with _PLAINLY():
        if entry.kind == "view" and args and isinstance(args[0], Dual) and args[0].is_apart:
            return view_apart(entry.fn, args[0], args[1:], kwargs)
        if entry.kind == "library":
            return _apply_of_library(session, entry, args, kwargs)
        if entry.kind in ("view", "structure"):
            return entry.fn(*args, **kwargs)
        if not torch._C._is_any_autocast_enabled():
            return entry.fn(*args, **kwargs)
        device = next(x.device.type for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Dual))
        if not torch.is_autocast_enabled(device):
            return entry.fn(*args, **kwargs)
        return _apply_under_autocast(session, entry, func, args, kwargs, device)


def _apply_of_library(session: Session, entry: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A rule of somebody else: what would make a wrong tangent without an error is looked for."""
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Dual)]
    stacks = [x.stack for x in given]
    before = [_version(s) for s in stacks]
    result = entry.fn(*args, **kwargs)
    leaves = pytree.tree_leaves(result)
    found = [x for x in leaves if isinstance(x, Dual)]
    problem = ""
    if any(x.slots != session.n_slots for x in found):
        problem = f"returned {found[0].slots - 1} tangents, where {session.n_slots - 1} were given"
    elif not found and any(isinstance(x, Tensor) and x.is_floating_point() for x in leaves):
        problem = "returned values without tangents; if they are zero, return dual(y, zeros)"
    elif [_version(s) for s in stacks] != before:
        problem = "wrote into its arguments"
    if problem:
        raise UnsupportedError(f"br.jvp: the rule that was registered for {entry.name}{calling_module()} {problem}")
    return result


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _apply_under_autocast(
    session: Session, entry: Rule, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: str
) -> Any:
    """Asks autocast once per function and kinds of operands what it makes of the primal, then casts the whole stack."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    promoted = [(x.dtype, x.dim() == 0) if isinstance(x, Tensor) else x for x in leaves]
    promoted = [x for x in promoted if isinstance(x, tuple | torch.dtype)]
    key = (func, torch.get_autocast_dtype(device), *promoted)
    wanted = session.autocast_dtypes.get(key)
    if wanted is None:
        copies = [primal(x).clone() if isinstance(x, Dual) else x for x in leaves]
        a, k = pytree.tree_unflatten(copies, tree)
        result = pytree.tree_leaves(func(*a, **k))[0]
        wanted = session.autocast_dtypes[key] = result.dtype
    if not wanted.is_floating_point:
        return entry.fn(*args, **kwargs)
    every = entry.kind in PRODUCTS

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if isinstance(x, Dual):
            return x if x.dtype == wanted else Dual(x.stack.to(wanted))
        return x.to(wanted) if every else x

    a, k = pytree.tree_unflatten([cast(x) for x in leaves], tree)
    with torch.autocast(device, enabled=False):
        result = entry.fn(*a, **k)
        return pytree.tree_map_only(Dual, cast, result)


def _is_reverse_mode(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Taking a gradient, or ``x.requires_grad_()`` and ``x.requires_grad = True`` on an activation."""
    if func is torch.autograd.grad or func is Tensor.backward:
        return True
    if func is not Tensor.requires_grad_ and func != _SET_REQUIRES_GRAD:  # a slot wrapper is made anew each time
        return False
    target = args[0]
    wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    return bool(wanted) and not isinstance(target, torch.nn.Parameter)


def _refuse_reverse_mode() -> None:
    raise UnsupportedError(
        f"br.jvp: reverse mode inside the function{calling_module()}: what torch.autograd.grad gives depends on the "
        "input, but its tangent would be lost. Use torch.func.jvp of a function that calls torch.func.grad"
    )


def _is_active_dropout(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "rrelu":
        return bool(kwargs.get("training", args[3] if len(args) > 3 else False))
    if name == "scaled_dot_product_attention":
        return kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0
    if name == "multi_head_attention_forward":
        p = kwargs.get("dropout_p", args[10] if len(args) > 10 else 0.0)
        return bool(kwargs.get("training", args[13] if len(args) > 13 else True)) and p > 0
    if "dropout" not in name or name == "native_dropout":
        return name == "native_dropout"
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p > 0


def _refuse_random(name: str) -> None:
    if "dropout" in name or "attention" in name or name == "rrelu":
        what, instead = "rrelu is in training mode" if name == "rrelu" else "dropout is active", "Call model.eval()"
    else:
        what, instead = f"{name} draws random numbers", "Draw them outside of the function and pass them in"
    raise UnsupportedError(
        f"br.jvp: {what}{calling_module()}: every chunk of tangents would belong to a different function. {instead}"
    )
