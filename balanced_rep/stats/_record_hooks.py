"""The listening half of `record`: hooks on the wanted layers and on the model that is called."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from balanced_rep.stats._record_checks import Overheard, check_calls, check_ran, refuse_transforms
from balanced_rep.stats._record_layers import Layer
from balanced_rep.stats._record_results import Key, Recording
from balanced_rep.stats._record_select import Arguments, Reduction, Select, describe, find_tensor
from balanced_rep.stats._record_stop import Stop, catch_at_root, frames_outside, refuse_stop, refuse_used_output
from balanced_rep.stats._record_time import Moment, TimestepSource
from balanced_rep.stats._representation import RepresentationStats

__all__ = ["Options", "Recorder"]

_active: weakref.WeakKeyDictionary[nn.Module, list[Recorder]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _eager(hook: Callable[..., None]) -> Callable[..., Any]:
    """Keeps a compiler that is around from tracing a hook; to import one for the purpose would take a second."""
    if "torch._dynamo" not in sys.modules:
        return hook
    disable: Callable[..., Any] = torch.compiler.disable
    return disable(hook)


@dataclass(frozen=True)
class Options:
    """What to record of each layer; see :func:`balanced_rep.stats.record.record`."""

    at: Literal["input", "output"]
    call: int | Literal["all"] | None
    select: Select
    reduction: Reduction
    wanted: tuple[float, ...] | None
    stop: bool


@dataclass
class _Forward:
    """The forward that is running.

    Attributes:
        moment: Its timestep.
        recorded: It is at a wanted timestep.
        stopped: All layers have been recorded and the stop signal was raised.
        stats: What was recorded.
        shapes: Of every layer and call, so that ``len(shapes[name])`` counts calls.
        failed: With ``call=-1``, layers whose latest call could not be reduced, and why.
    """

    moment: Moment
    recorded: bool
    stopped: bool = False
    stats: dict[Key, RepresentationStats] = field(default_factory=dict)
    shapes: defaultdict[str, list[object]] = field(default_factory=lambda: defaultdict(list))
    failed: dict[str, tuple[type[Exception], str]] = field(default_factory=dict)


class Recorder(AbstractContextManager[Recording]):
    """Fills a :class:`Recording` while it is open; made by :func:`record` and used once.

    It hears the thread that opened it and no other.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], source: TimestepSource, options: Options) -> None:
        self._model: nn.Module | None = model
        self._layers = layers
        self._source = source
        self._options = options
        every_call = options.call == "all"
        names = [layer.name for layer in layers]
        self._recording = Recording(names, per=options.reduction.per, every_call=every_call, wanted=options.wanted)
        self._overheard = Overheard()
        self._forward: _Forward | None = None
        self._catching = False
        self._cleanup = ExitStack()
        self._outside: frozenset[int] = frozenset()
        self._thread: int | None = None

    # Life ------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Recording:
        """Registers the hooks."""
        if (model := self._model) is None or self._thread is not None:
            raise RuntimeError("record: a record is opened once; make another one with record(...)")
        if self._options.stop:
            refuse_stop(model)
        self._thread = threading.get_ident()
        self._outside = frames_outside()
        with ExitStack() as undo:
            self._claim(model)
            undo.callback(self._release, model)
            if self._options.stop:
                undo.callback(catch_at_root(model, self._run_to_stop))
            undo.callback(model.register_forward_pre_hook(_eager(self._begin), with_kwargs=True).remove)
            for layer in self._layers:
                undo.callback(self._listen(layer))
            undo.callback(model.register_forward_hook(_eager(self._end)).remove)
            self._cleanup = undo.pop_all()
        return self._recording

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the hooks; complains about layers that never ran, unless the body raised."""
        self._cleanup.close()
        named = [layer.name for layer in self._layers if layer.named]
        found = [layer.name for layer in self._layers if not layer.named]
        self._model, self._layers, self._forward = None, [], None  # a recording does not keep its model alive
        if kind is None:
            totals = {name: sum(calls) for name, calls in self._recording.calls.items()}
            check_ran(self._recording.forwards, totals, named, found, self._overheard)

    def _listen(self, layer: Layer) -> Callable[[], None]:
        if self._options.at == "output":
            return layer.module.register_forward_hook(_eager(partial(self._after_layer, layer.name))).remove
        hook = _eager(partial(self._before_layer, layer.name))
        return layer.module.register_forward_pre_hook(hook, with_kwargs=True).remove

    def _claim(self, model: nn.Module) -> None:
        with _lock:
            others = _active.setdefault(model, [])
            if others and (self._options.stop or any(other._options.stop for other in others)):
                raise RuntimeError(
                    "record: another record is open on this model, and one of the two has stop=True, which would cut "
                    "forwards short for the other; put the layers of both into one record"
                )
            others.append(self)

    def _release(self, model: nn.Module) -> None:
        with _lock:
            _active[model].remove(self)

    def _heard(self) -> bool:
        return threading.get_ident() == self._thread

    # The model's calls -----------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the model: a new forward. One that is still there has raised half-way and is dropped."""
        if not self._heard():
            self._overheard.threads += 1
            return
        refuse_transforms()
        moment = Moment.of(self._source(args, kwargs))
        self._forward = _Forward(moment, recorded=self._is_wanted(moment))

    def _is_wanted(self, moment: Moment) -> bool:
        wanted = self._options.wanted
        if wanted is None or (moment.deferred and not self._options.stop):
            return True  # a timestep on an accelerator is sorted out when the results are read, without waiting here
        values = moment.known()
        if self._options.reduction.per == "unit" and len(set(values)) > 1:
            raise ValueError(
                'record: timesteps= with per="unit" needs one timestep per forward, as the statistics of a unit join '
                f"all samples; got {values[:6]}"
            )
        if any(moment.match(value, wanted) is not None for value in set(values)):
            return True
        self._overheard.timesteps.update(values)
        return False

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of the model: a forward has run to its end."""
        forward = self._forward
        if forward is None or not self._heard():
            return
        self._forward = None
        if not forward.recorded:
            return
        if forward.stopped:
            raise RuntimeError(
                "record: stop=True: the model caught the stop signal (a BaseException) and went on; use stop=False"
            )
        if self._options.stop:
            self._check(forward)
            silent = [layer.name for layer in self._layers if layer.name not in forward.stats]
            raise RuntimeError(
                "record: stop=True: the forward ended before these layers ran, so that it was not stopped: "
                f"{', '.join(map(repr, silent))}. Leave them out, or use stop=False"
            )
        self._commit(forward)

    def _check(self, forward: _Forward) -> None:
        for kind, text in forward.failed.values():
            raise kind(text)
        for layer in self._layers:
            check_calls(layer.name, type(layer.module).__name__, forward.shapes[layer.name], self._options.call)

    def _commit(self, forward: _Forward) -> None:
        self._check(forward)
        calls = {name: len(shapes) for name, shapes in forward.shapes.items()}
        self._recording.commit(forward.moment, forward.stats, calls)

    def _run_to_stop(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the model; a forward that is stopped returns ``None``."""
        if self._model is None or not self._heard():
            return original(*args, **kwargs)
        refuse_used_output(self._model, self._outside)
        self._catching, output = True, None
        try:
            output = original(*args, **kwargs)
        except Stop as signal:
            if signal.owner is not self:
                raise
        finally:
            self._catching = False
            forward, self._forward = self._forward, None
        if forward is not None and forward.stopped:
            self._commit(forward)
        return output

    # The layers' calls -----------------------------------------------------------------------------------------------

    def _before_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hear(name, Arguments(module, args, kwargs))

    def _after_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._hear(name, output)

    def _hear(self, name: str, value: Any) -> None:
        """A layer was called: count it, and reduce its tensor if this is the call that is wanted."""
        if not self._heard():
            return
        if (forward := self._forward) is None:
            self._overheard.outside.add(name)
            return
        if not forward.recorded or forward.stopped:
            return
        wanted, shapes = self._options.call, forward.shapes[name]
        call = len(shapes)
        x, trouble = self._tensor(value)
        shapes.append(describe(value) if x is None else x.shape)
        if wanted not in {call, -1, "all"} and not (wanted is None and call == 0):
            return
        try:
            stats = self._reduce(x, trouble)
        except (TypeError, ValueError, LookupError) as error:
            what = f"record: the {self._options.at} of layer {name!r}, call {call}"
            text = f"{what}: {error}. It is {describe(value)}; select= takes another tensor"
            if wanted != -1:
                raise type(error)(text) from error
            # A call that turns out not to be the last may be anything. The error itself would hold the activation.
            forward.failed[name] = type(error), text
            return
        forward.failed.pop(name, None)
        forward.stats[(name, call) if wanted == "all" else name] = stats
        if self._catching and len(forward.stats) == len(self._layers):
            forward.stopped = True
            raise Stop(self)

    def _tensor(self, value: Any) -> tuple[Tensor | None, Exception | None]:
        try:
            return find_tensor(value, self._options.select), None
        except (TypeError, LookupError) as error:
            return None, error

    def _reduce(self, x: Tensor | None, trouble: Exception | None) -> RepresentationStats:
        if x is None:
            raise trouble or TypeError("no tensor")
        # Tensors made in inference mode could not take part in a later computation that needs gradients.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            return self._options.reduction(x.detach())
