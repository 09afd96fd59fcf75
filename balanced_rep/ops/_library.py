"""Registers ops with ``torch.library`` and routes public calls to them.

``Library.impl`` in Python rather than the ``custom_op`` decorator: the same opcheck, vmap and compile support for
about 4 us a call instead of 9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from balanced_rep.ops._guard import needs_reference, traced_as_constant
from balanced_rep.ops._registry import BackendError, OpSpec, forced_backend, register

__all__ = ["define", "run"]

NAMESPACE = "balanced_rep"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_forced_at_trace = traced_as_constant(forced_backend)


def define(
    spec: OpSpec,
    schema: str,
    *,
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> OpSpec:
    """Registers the op in the package's registry and as ``torch.ops.balanced_rep.<name>``.

    Args:
        spec: The op.
        schema: Its signature in torch's schema language, without the name, e.g. ``"(Tensor x) -> Tensor"``.
        fake: Output metadata from input metadata.
        vmap: Batching rule ``vmap(info, in_dims, *args) -> (output, out_dims)``.
        backward: Reverse-mode rule ``backward(ctx, *grads)``; without one the op is not differentiable.
        setup_context: Saves what ``backward`` needs.

    Returns:
        ``spec``.
    """
    register(spec)
    name = f"{NAMESPACE}::{spec.name}"
    _LIBRARY.define(spec.name + schema)
    _LIBRARY.impl(spec.name, spec, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_vmap(name, vmap, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)
    return spec


def run(spec: OpSpec, *args: Any) -> Any:
    """Calls the op as a user does: the library op, or the reference where a ``torch.func`` level takes derivatives.

    Args:
        spec: The op.
        *args: Its arguments.

    Returns:
        The op's result.

    Raises:
        BackendError: If a backend other than the reference is forced where only the reference has a derivative.
    """
    if not needs_reference():
        return getattr(torch.ops.balanced_rep, spec.name)(*args)
    if (forced := _forced_at_trace()) not in (None, "reference"):
        raise BackendError(
            f"{spec.name}: backend {forced!r} cannot run this call: it is under a torch.func transform that takes "
            "derivatives, and only the reference has every one of them. Backends that can: reference."
        )
    return spec.reference(*args)
