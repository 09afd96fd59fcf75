"""``br.jvp``: the primal and its K tangents through a model, together."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch._C._functorch import get_interpreter_stack

from balanced_rep.autodiff import _products
from balanced_rep.autodiff import _rules as _rules  # registers the rules
from balanced_rep.autodiff._errors import UnsupportedError
from balanced_rep.autodiff._inputs import Inputs, check_kwargs, read_inputs, unwritten
from balanced_rep.autodiff._memory import LiveBytes, available_bytes, chunk_that_fits, surely_fits
from balanced_rep.autodiff._outputs import Collected, split_output
from balanced_rep.autodiff._reference import jvp_reference
from balanced_rep.autodiff._run import capture, check_module, run
from balanced_rep.autodiff._session import LayoutError, Session, current
from balanced_rep.autodiff._state import State, check_same_output
from balanced_rep.autodiff._tape import Tape
from balanced_rep.ops._jvp import HALF

__all__ = ["choose_tangent_dtype", "jvp", "products", "run_chunks"]

logger = logging.getLogger("balanced_rep")


def jvp(
    f: Callable[..., Any],
    primals: Any,
    tangents: Any,
    *,
    chunk_size: int | Literal["auto"] | None = "auto",
    output: str | None = None,
    tangent_dtype: torch.dtype | None = None,
    strict: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """K Jacobian-vector products of an unmodified function, for about the price of K + 1 calls of it.

    The primal runs once, together with its tangents: linear layers see all of them as one batch, so that weights are
    read once, nonlinear ones follow a closed rule, tensors that do not depend on ``primals`` are not multiplied. A
    function without a rule is differentiated by ``torch.func.jvp``, it alone, and counted: see
    :func:`balanced_rep.autodiff.explain`. Nothing is dropped in silence: what can be neither is refused.

    The batch dimension has no special meaning: with a batch of B samples ``tangents`` is ``(K, B, ...)``, and a model
    that treats samples apart yields K products with the Jacobian of each. ``f`` runs without gradients, and the result
    carries no autograd graph. Derivatives stop where ``torch.func.jvp`` stops them: at ``detach``, ``.data``,
    ``.item()``; comparisons and control flow follow the primal. The input is copied: ``f`` may write into it.

    Inside ``torch.func`` transforms (``grad``, ``jvp``, ``vmap``) the call becomes ``vmap`` of ``torch.func.jvp``:
    right to any order, at their price.

    Args:
        f: Function or ``torch.nn.Module``, in evaluation mode, deterministic.
        primals: Its argument, or a tuple of its arguments; each a floating-point tensor of any dtype, a pytree of them,
            or anything else that has no tangent.
        tangents: ``(K, *shape)`` for each tensor of ``primals``, in its dtype and on its device, in the same structure;
            ``None`` for an argument that is held fixed.
        chunk_size: Tangents per pass. ``"auto"`` takes all of them, unless a bound on the memory says that they may not
            fit: then a first pass with one tangent measures what a slot needs, and the rest is cut to 60 % of the free
            memory, with a log message. ``None`` takes all. Each pass computes the primal again.
        output: Name of a module inside ``f``: its output is taken instead of that of ``f``, and the pass ends there.
        tangent_dtype: ``torch.bfloat16`` or ``torch.float16``: the primal keeps its float32, linear layers take their
            tangents in this, and statistics and derivatives are float32 on both. Only where such products are really
            faster here, which is measured once; else tangents stay float32, which the log and
            :func:`balanced_rep.autodiff.explain` say. Expect errors of 1e-2 relative. ``jv`` is float32 all the same.
        strict: Refuse functions without a rule.
        kwargs: Keyword arguments of ``f``, without tangents.

    Returns:
        ``y``, what ``f`` returns, and ``jv``, the same structure with tensors ``(K, *y.shape)``; ``None`` in place of
        what is no tensor.

    Raises:
        TypeError: If an input is of the wrong kind or dtype, or ``f`` returns no tensor.
        ValueError: If a shape, structure, device, ``chunk_size``, ``output`` or ``tangent_dtype`` is wrong.
        UnsupportedError: If a tangent cannot be carried; names the function.
        FallbackError: With ``strict=True``, if a function has no rule.

    Example:
        >>> import torch
        >>> from balanced_rep.autodiff import jvp
        >>> y, jv = jvp(torch.sin, torch.zeros(3), torch.eye(3))
        >>> jv.shape, bool((jv == torch.eye(3)).all())
        (torch.Size([3, 3]), True)
    """
    return products(
        f, primals, tangents, None, chunk_size=chunk_size, output=output, tangent_dtype=tangent_dtype, strict=strict,
        kwargs=kwargs,
    )  # fmt: skip


def products(
    f: Callable[..., Any],
    primals: Any,
    tangents: Any,
    tape: Tape | None,
    *,
    chunk_size: int | Literal["auto"] | None,
    output: str | None,
    tangent_dtype: torch.dtype | None,
    strict: bool,
    kwargs: dict[str, Any] | None,
) -> tuple[Any, Any]:
    """:func:`jvp`, with primal results that are kept from one call to the next.

    Args:
        f: As for :func:`jvp`, and so are the other arguments.
        primals: The same at each call with one tape.
        tangents: Those of this call.
        tape: Filled by the first pass and read by others.
        chunk_size: Tangents per pass.
        output: Name of a module inside ``f``.
        tangent_dtype: Lower precision for tangents.
        strict: Refuse functions without a rule.
        kwargs: Keyword arguments of ``f``.

    Returns:
        ``y`` and ``jv``.

    Raises:
        ValueError: If ``chunk_size`` is wrong.
        UnsupportedError: If it is called inside a function that is being differentiated.
    """
    inputs = read_inputs(primals, tangents)
    if current() is not None:
        raise UnsupportedError(
            "br.jvp: called inside a function that br.jvp is differentiating; the tangents of one would be taken for "
            "those of the other. Use torch.func.jvp, which nests"
        )
    check_module(f)
    if not (chunk_size in ("auto", None) or (isinstance(chunk_size, int) and chunk_size >= 1)):
        raise ValueError(f"br.jvp: chunk_size={chunk_size!r}; accepted are 'auto', None and integers from 1")
    call = f if output is None else capture(f, output)  # pyright: ignore[reportArgumentType]
    kwargs = check_kwargs(kwargs)
    if _inside_transform():
        return jvp_reference(call, inputs, kwargs)
    _refuse_graph(inputs)
    session = Session(strict=strict, module=f if isinstance(f, torch.nn.Module) else None)
    choose_tangent_dtype(session, inputs, tangent_dtype)
    return run_chunks(call, inputs, kwargs, chunk_size, session, tape)


for _f in (jvp, products):
    _f._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
    _f._torchdynamo_disable_msg = (  # pyright: ignore[reportFunctionMemberAccess]
        "br.jvp runs eagerly. To compile it, trace it first: torch.compile(br.autodiff.trace(f, x, K), fullgraph=True)"
    )


def choose_tangent_dtype(session: Session, inputs: Inputs, wanted: torch.dtype | None) -> None:
    """Decides in which dtype tangents are carried, and notes why.

    Args:
        session: Gets the decision.
        inputs: Checked inputs.
        wanted: What the caller asks for.

    Raises:
        ValueError: If the dtype is none of the accepted ones, or the primals are not float32.
    """
    if wanted is None:
        return
    if wanted not in HALF:
        raise ValueError(f"br.jvp: tangent_dtype={wanted}; accepted are torch.bfloat16, torch.float16 and None")
    moving = [x for x, t in zip(inputs.leaves, inputs.tangents, strict=True) if t is not None]
    if any(x.dtype != torch.float32 for x in moving):
        found = ", ".join(sorted({str(x.dtype) for x in moving}))
        raise ValueError(
            f"br.jvp: tangent_dtype={wanted} with {found} primals; it is for float32 ones. Leave it out: tangents have "
            "the dtype of their primal"
        )
    worth, why = _products.lower_precision(moving[0].device, wanted)
    session.tangent_dtype = wanted if worth else None
    session.remarks.append(why)
    if not worth:
        logger.info("br.jvp: %s", why)


def _inside_transform() -> bool:
    stack = get_interpreter_stack()
    return bool(stack) or torch.autograd.forward_ad._current_level >= 0


def _refuse_graph(inputs: Inputs) -> None:
    if not torch.is_grad_enabled():
        return
    for x, t in zip(inputs.leaves, inputs.tangents, strict=True):
        if t is not None and (t.requires_grad or (x.requires_grad and not isinstance(x, torch.nn.Parameter))):
            raise ValueError(
                "br.jvp: a primal or tangent requires grad, but the result carries no autograd graph: its gradient "
                "would be lost. Pass x.detach(), call under torch.no_grad(), or differentiate with torch.func.grad"
            )


def run_chunks(
    f: Callable[..., Any],
    inputs: Inputs,
    kwargs: dict[str, Any],
    chunk_size: int | str | None,
    session: Session,
    tape: Tape | None = None,
) -> tuple[Any, Any]:
    """All passes of one call.

    Args:
        f: Function.
        inputs: Checked inputs.
        kwargs: Keyword arguments of ``f``.
        chunk_size: Tangents per pass, ``"auto"`` or ``None``.
        session: Counts what happens.
        tape: Primal results that are kept from one pass to the next.

    Returns:
        Output and tangents.
    """
    k = inputs.n_tangents
    if k == 0:
        return _no_tangents(f, inputs, kwargs, session)
    collected = Collected(k)
    session.state = State(session.module)
    y, step = None, k if chunk_size is None else chunk_size
    if step == "auto":
        y, step = _pilot(f, inputs, kwargs, session, collected)
    while collected.at < k:
        part = slice(collected.at, min(collected.at + int(step), k))
        if collected.at:
            session.state.check()
        value, t = one_pass(f, inputs, kwargs, part, session, tape)
        if collected.at:
            check_same_output(y, value)
        else:
            y = value
        collected.add(t, part.stop - part.start)
    return y, collected.tree


def one_pass(
    f: Callable[..., Any],
    inputs: Inputs,
    kwargs: dict[str, Any],
    part: slice,
    session: Session,
    tape: Tape | None = None,
) -> tuple[Any, Any]:
    """One chunk of tangents.

    Args:
        f: Function.
        inputs: Checked inputs.
        kwargs: Keyword arguments of ``f``.
        part: Which tangents.
        session: Counts what happens.
        tape: Filled by this pass, or read.

    Returns:
        Output and its tangents.

    Raises:
        TypeError: If there is no tensor in the output.
    """
    n = part.stop - part.start
    session.n_slots = 1 + n
    result = _attempt(f, inputs, kwargs, part, session, tape)
    if session.tape is not None and not session.tape.finish():
        _check_state(session)
        result = _attempt(f, inputs, kwargs, part, session, tape)
        session.tape.finish()
    value, t, tensors, moving = split_output(result, n, contiguous=session.channels_last)
    if not tensors:
        raise TypeError(f"br.jvp: f returned {type(result).__name__} without a tensor in it")
    if not moving:
        stops = sorted({name for route, name in session.calls if route == "primal"})
        why = f" (tangents may have stopped at: {', '.join(stops)})" if stops else ""
        warnings.warn(
            f"br.jvp: the output does not depend on the primals that have tangents: the products are zero{why}",
            UserWarning,
            stacklevel=4,
        )
    return value, t


def _check_state(session: Session) -> None:
    if session.state is not None:
        session.state.check()


def _attempt(
    f: Callable[..., Any], inputs: Inputs, kwargs: dict[str, Any], part: slice, session: Session, tape: Tape | None
) -> Any:
    """``f`` once, or twice: if it writes where only torch's layouts tell what shares memory, then in those."""
    session.tape = None if tape is None else tape.run()
    with unwritten(inputs, kwargs):
        try:
            return run(f, inputs.stacked(part), kwargs, session)
        except LayoutError:
            session.restart()
    _check_state(session)
    session.keep_layout = True
    session.remarks.append(
        "convolutions keep torch's layout, which may be slower: a value is written into that shares memory with a "
        "reshaped one or not, as its layout has it; reshape(...).clone() decides it"
    )
    return _attempt(f, inputs, kwargs, part, session, tape)


def _no_tangents(f: Callable[..., Any], inputs: Inputs, kwargs: dict[str, Any], session: Session) -> tuple[Any, Any]:
    """K = 0: the output, and empty tangents."""
    session.n_slots = 1
    with unwritten(inputs, kwargs):
        result = run(f, inputs.plain(), kwargs, session)
    value, t, tensors, _ = split_output(result, 0)
    if not tensors:
        raise TypeError(f"br.jvp: f returned {type(result).__name__} without a tensor in it")
    return value, t


def _pilot(
    f: Callable[..., Any], inputs: Inputs, kwargs: dict[str, Any], session: Session, collected: Collected
) -> tuple[Any, int]:
    """Tangents per pass; if that is in doubt, after a pass with the first tangent whose result counts."""
    moving = [t for t in inputs.tangents if t is not None]
    k, device = inputs.n_tangents, moving[0].device
    free = available_bytes(device)
    if k == 1 or surely_fits(sum(t[0].nbytes for t in moving), 1 + k, free):
        return None, k
    meter = session.on_dual = LiveBytes()
    y, t = one_pass(f, inputs, kwargs, slice(0, 1), session)
    session.on_dual = None
    collected.add(t, 1)
    step = chunk_that_fits(meter.peak, 2, k - 1, free)
    if step < k - 1:
        logger.info(
            "br.jvp: %d tangents do not fit %.1f GB of free memory on %s; %d per pass",
            k,
            (free or 0) / 1e9,
            device,
            step,
        )
    return y, step
