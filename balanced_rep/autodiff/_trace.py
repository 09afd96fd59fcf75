"""``br.jvp`` of one model and shape as a plain graph, which compilers and exporters take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from balanced_rep.autodiff._inputs import check_kwargs, read_inputs
from balanced_rep.autodiff._jvp import choose_tangent_dtype, run_chunks
from balanced_rep.autodiff._run import capture, check_module
from balanced_rep.autodiff._session import Session

__all__ = ["trace"]


def trace(
    f: Callable[..., Any],
    x: Tensor,
    n_tangents: int,
    *,
    output: str | None = None,
    tangent_dtype: torch.dtype | None = None,
    strict: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> GraphModule:
    """Writes ``(x, tangents) -> (y, jv)`` down as a graph of torch operators.

    The graph holds no Python of ``f``, makes no decision that depends on data and no synchronisation with the host, so
    ``torch.compile(graph, fullgraph=True)``, ``torch.export`` and CUDA graphs take it. It is right for other values of
    ``x`` and ``tangents`` of these shapes and dtypes; control flow of ``f`` is that of this ``x``; weights and
    ``kwargs`` are part of it.

    Args:
        f: Function or module with one tensor argument.
        x: An input.
        n_tangents: K.
        output: Name of an inner module whose output is taken.
        tangent_dtype: Lower precision for tangents, as for :func:`jvp`; where it is faster is measured here and now.
        strict: Refuse functions without a rule.
        kwargs: Keyword arguments of ``f``.

    Returns:
        A module called as ``graph(x, tangents)``, tangents ``(K, *x.shape)``.

    Raises:
        TypeError: If ``kwargs`` is no dict.
        ValueError: If ``n_tangents`` is not positive, or ``tangent_dtype`` does not fit.
    """
    if n_tangents < 1:
        raise ValueError(f"trace: n_tangents={n_tangents}; at least 1 is needed")
    check_module(f)
    given = check_kwargs(kwargs)
    call = f if output is None else capture(f, output)  # pyright: ignore[reportArgumentType]

    def both(primal: Tensor, tangents: Tensor) -> tuple[Any, Any]:
        session = Session(strict=strict, module=f if isinstance(f, torch.nn.Module) else None)
        session.tangent_dtype = lower.tangent_dtype
        return run_chunks(call, read_inputs(primal, tangents), given, None, session)

    lower = Session()  # speeds are measured before anything is written down
    choose_tangent_dtype(lower, read_inputs(x.detach(), x.detach()[None]), tangent_dtype)

    with torch.no_grad():
        graph = make_fx(both)(x.detach(), x.detach().new_zeros((n_tangents, *x.shape)))
    return _without_out(_without_gradients(graph))


def _without_gradients(graph: GraphModule) -> GraphModule:
    """Weights as buffers that share their memory: the operators that write into given memory take no others."""
    for name in {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}:
        value = getattr(graph, name, None)
        if isinstance(value, Tensor) and value.requires_grad:
            delattr(graph, name)
            graph.register_buffer(name, value.detach())
    return graph


def _without_out(graph: GraphModule) -> GraphModule:
    """``f(..., out=view)`` as ``view.copy_(f(...))``: Dynamo takes no ``out=`` that is not contiguous."""
    for node in list(graph.graph.nodes):
        functional = _functional(node.target) if "out" in node.kwargs else None
        if functional is None:
            continue
        with graph.graph.inserting_before(node):
            rest = {k: v for k, v in node.kwargs.items() if k != "out"}
            value = graph.graph.call_function(functional, node.args, rest)
            written = graph.graph.call_function(torch.ops.aten.copy_.default, (node.kwargs["out"], value))
        node.replace_all_uses_with(written)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _functional(target: Any) -> Any:
    """The overload with the same arguments but ``out``."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments if not a.is_out]
    for name in target.overloadpacket.overloads():
        overload = getattr(target.overloadpacket, name)
        if [(a.name, str(a.type)) for a in overload._schema.arguments] == wanted:
            return overload
    return None
