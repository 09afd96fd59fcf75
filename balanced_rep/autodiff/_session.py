"""What one run of ``br.jvp`` knows about itself: counts for ``explain``, strictness, the buffers it may write into."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from balanced_rep.autodiff._tape import TapeRun

__all__ = ["LayoutError", "Session", "active", "calling_module", "current"]

ALONE = 2  # uses of a storage that one tensor and one storage object in Python make


class LayoutError(BaseException):
    """The run has to be done in torch's own layouts; not an Exception, so that no model swallows it."""


_local = threading.local()


@dataclass
class Session:
    """State of one pass.

    Attributes:
        n_slots: 1 + K.
        strict: Refuse fallbacks.
        module: The root module, if ``f`` is one: names modules in messages.
        calls: (route, function) to the number of calls; routes are "rule", "composite", "fallback", "primal".
        seconds: (route, function) to seconds, if ``timed``.
        reasons: Function to why it took the fallback.
        timed: Measure seconds.
        fresh: Buffers made by a factory function during this pass: a value with tangents may be written into them.
        autocast_dtypes: (function, dtypes, which tensors have no dims) to the dtype that autocast gives the result.
        on_dual: Called with every new Dual and its buffer: the memory estimate listens here.
        channels_last: Convolutions have changed the layout of activations.
        pending: Duals that wait to be read.
        tangent_dtype: Linear layers take tangents in this dtype, if not in that of the primal.
        tape: Primal results of linear layers are kept here, or known from an earlier run.
        casts: Weights in another dtype, by the identity of the weight.
        remarks: What was decided about this run.
        keep_layout: Convolutions leave the layout of activations to torch.
        reshaped: What was reshaped while layouts were not torch's, and the result: where torch has a view this may be a
            copy, and the other way round.
        state: What the model was before the first pass.
        copied: The same for values without a buffer.
    """

    n_slots: int = 1
    strict: bool = False
    module: nn.Module | None = None
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    reasons: dict[str, str] = field(default_factory=dict)
    timed: bool = False
    fresh: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    autocast_dtypes: dict[Any, torch.dtype] = field(default_factory=dict)
    on_dual: Callable[[Any, Tensor], None] | None = None
    channels_last: bool = False
    tangent_dtype: torch.dtype | None = None
    tape: TapeRun | None = None
    casts: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    pending: dict[int, weakref.ref[Any]] = field(default_factory=dict)
    keep_layout: bool = False
    reshaped: list[tuple[StorageWeakRef, StorageWeakRef]] = field(default_factory=list)
    state: Any = None
    copied: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = field(default_factory=list)

    def restart(self) -> None:
        """Forgets what belongs to a run that is done again."""
        for kept in (self.calls, self.seconds, self.reasons, self.fresh, self.pending, self.reshaped, self.copied):
            kept.clear()
        self.channels_last = False

    def remember_fresh(self, x: Any) -> None:
        """Notes a buffer that was made during this pass."""
        if type(x) is Tensor:
            self.fresh[id(x)] = weakref.ref(x)

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` in ``dtype``, converted once for a call."""
        if weight.dtype == dtype:
            return weight
        key = (id(weight), dtype)
        if key not in self.casts:  # the weight itself is kept too, so that its identity stays its own
            self.casts[key] = (weight, weight.detach().to(dtype))
        return self.casts[key][1]

    def remember_pending(self, x: Any) -> None:
        """Notes a Dual that waits to be read."""
        self.pending[id(x)] = weakref.ref(x)

    def settle(self, but: Any = None) -> None:
        """Computes everything that waits, before something is written in place; ``but`` is about to be overwritten."""
        waiting, self.pending = self.pending, {}
        for ref in waiting.values():
            x = ref()
            if x is None or x.pending is None:
                continue
            if x is but:  # it may go on waiting, if nothing is written into it after all
                self.pending[id(x)] = ref
            else:
                _ = x.stack

    def remember_reshape(self, x: Tensor, y: Tensor) -> None:
        """Notes that ``y`` is ``x`` in another shape or layout, perhaps in the same memory."""
        if self.channels_last:
            pair = StorageWeakRef(x.untyped_storage()), StorageWeakRef(y.untyped_storage())
            self.reshaped = [*((a, b) for a, b in self.reshaped if not (a.expired() or b.expired())), pair]

    def remember_copy(self, x: Any, y: Any) -> None:
        """Notes that ``y`` is a copy of ``x``, where torch may have none; neither has a buffer yet."""
        if self.channels_last:
            pair = weakref.ref(x), weakref.ref(y)
            self.copied = [*((a, b) for a, b in self.copied if a() is not None and b() is not None), pair]

    @property
    def has_reshaped(self) -> bool:
        """Whether :meth:`check_layout` has something to look at."""
        return bool(self.reshaped or self.copied)

    def check_layout(self, x: Tensor) -> None:
        """Gives this run up if a write into ``x`` may be seen where torch would not show it, or the other way round."""
        if any(a() is not None and b() is not None for a, b in self.copied):
            raise LayoutError
        storage = x.untyped_storage()
        alone = torch._C._storage_Use_Count(storage._cdata) <= ALONE
        for pair in self.reshaped:
            if storage._cdata not in [ref.cdata for ref in pair] or any(ref.expired() for ref in pair):
                continue
            if pair[0].cdata != pair[1].cdata or not alone:
                raise LayoutError

    def is_fresh(self, x: Tensor) -> bool:
        """Whether ``x`` itself came out of a factory function during this pass."""
        ref = self.fresh.get(id(x))
        return ref is not None and ref() is x


def current() -> Session | None:
    """The session of this thread."""
    return getattr(_local, "session", None)


@contextlib.contextmanager
def active(session: Session) -> Iterator[Session]:
    """Makes ``session`` the current one of this thread."""
    before = current()
    _local.session = session
    try:
        yield session
    finally:
        _local.session = before


def calling_module() -> str:
    """``" (in module 'a.b', Dropout)"`` for the innermost module that is running, for messages; else ``""``."""
    session = current()
    code = nn.Module._call_impl.__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            module = frame.f_locals["self"]
            named = session.module.named_modules() if session and session.module is not None else ()
            name = next((n for n, m in named if m is module), "")
            return f" (in module {name!r}, {type(module).__name__})" if name else f" (in {type(module).__name__})"
        frame = frame.f_back
    return ""
