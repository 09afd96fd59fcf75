"""`record(..., stop=True)`: how far the forward runs, what it returns, and where it is refused."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from balanced_rep.stats import cat, representation_stats
from balanced_rep.stats._record_stop import frames_outside
from balanced_rep.stats.record import record


class Step(nn.Module):
    """Notes that it ran."""

    def __init__(self, name: str, trace: list[str]) -> None:
        super().__init__()
        self.name, self.trace, self.linear = name, trace, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.trace.append(self.name)
        return self.linear(x)


class Net(nn.Module):
    """Runs a, b, c in an order that is not that of registration, with an activation in between."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[str] = []
        self.c, self.a, self.b = (Step(name, self.trace) for name in "cab")
        self.act = nn.ReLU()

    def forward(self, x: Tensor, timestep: float = 0.0) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))))


def restored(model: nn.Module) -> bool:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return not hooks and "_call_impl" not in vars(model) and isinstance(model(torch.randn(2, 4)), Tensor)


@pytest.mark.parametrize(
    ("layers", "at", "ran"),
    [
        ("b", "output", "ab"),
        ("b", "input", "a"),
        ("a", "input", ""),
        (["a", "b"], "output", "ab"),
        (["b", "a"], "input", "a"),
        (re.compile("[ab]"), "output", "ab"),
        ("b.linear", "output", "ab"),
        ("c", "output", "abc"),
        ("", "output", "abc"),
    ],
    ids=str,
)
def test_runs_up_to_the_last_layer_and_no_further(layers: Any, at: Any, ran: str):
    model, x = Net(), torch.randn(3, 4)
    with record(model, layers, at) as full:
        model(x)
    model.trace.clear()
    with record(model, layers, at, stop=True) as recording:
        assert model(x) is None
        assert "".join(model.trace) == ran
    assert list(recording) == list(full)
    for name in full:
        assert torch.equal(recording[name].state, full[name].state)
    assert restored(model)


def test_a_loop_goes_on():
    model, batches = Net(), [torch.randn(n, 4) for n in (1, 2, 3)]
    with record(model, "b", "input", stop=True) as recording:
        results = [model(x) for x in batches]
        passed = True
    assert passed
    assert results == [None] * 3
    assert model.trace == ["a"] * 3
    want = cat([representation_stats(model.act(model.a.linear(x)).detach()) for x in batches])
    assert torch.equal(recording["b"].state, want.state)
    assert recording.forwards == 3
    assert restored(model)


@pytest.mark.parametrize(("call", "ran"), [(0, "a"), (1, "ab")])
def test_stops_after_the_call_that_is_wanted(call: int, ran: str):
    model, x = Net(), torch.randn(3, 4)
    with record(model, "act", call=call, stop=True) as recording:
        model(x)
        assert "".join(model.trace) == ran
    with record(model, "act", call=call) as full:
        model(x)
    assert torch.equal(recording["act"].state, full["act"].state)
    assert recording.calls["act"] == [call + 1]


def test_which_call_has_to_be_clear_before():
    model = Net()
    with pytest.raises(ValueError, match=r"'act' \(ReLU\) has no weights.*Give call="):
        record(model, "act", stop=True)
    for call in (-1, "all"):
        with pytest.raises(ValueError, match="known only at the end"):
            record(model, "b", call=call, stop=True)
    with (
        pytest.raises(ValueError, match=r"called 2 times in one forward.*no call=2"),
        record(model, "act", call=2, stop=True),
    ):
        model(torch.randn(3, 4))


def test_a_second_call_that_is_seen_before_the_stop_is_an_error():
    model = Net()
    model.forward = lambda x: model.c(model.b(model.a(model.a(x))))
    with pytest.raises(ValueError, match=r"layer 'a' .*was called 2 times"), record(model, ["a", "b"], stop=True):
        model(torch.randn(3, 4))
    del model.forward
    assert restored(model)


def test_a_layer_that_never_comes_is_an_error():
    model = Net()
    model.extra = Step("d", model.trace)
    with pytest.raises(RuntimeError, match=r"ended before these layers ran.*'extra'"):
        with record(model, ["a", "extra"], stop=True):
            model(torch.randn(3, 4))
    assert restored(model)


def test_only_recorded_timesteps_are_stopped():
    model, x = Net(), torch.randn(3, 4)
    with record(model, "a", stop=True, timesteps=[10, 30]) as recording:
        results = {t: model(x, t) for t in (40, 30, 20, 10)}
    assert {t for t, y in results.items() if y is None} == {30, 10}
    assert torch.equal(results[40], model(x))
    assert recording.forwards == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_are_left_properly(mode: Any):
    model = Net()
    states = lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))  # noqa: E731
    inner = model.forward

    def forward(x: Tensor) -> Tensor:
        with mode():
            return inner(x)

    model.forward = forward
    before = states()
    with record(model, "b", stop=True):
        assert model(torch.randn(2, 4)) is None
        assert states() == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_stops_inside_checkpointed_code(reentrant: bool):
    from torch.utils.checkpoint import checkpoint

    model = Net()
    model.forward = lambda x: model.c(checkpoint(lambda x: model.b(model.a(x)), x, use_reentrant=reentrant))
    with record(model, "a", stop=True) as recording:
        assert model(torch.randn(2, 4, requires_grad=True)) is None
    assert len(recording["a"]) == 2


def test_code_of_the_model_cannot_swallow_the_stop():
    model = Net()

    def forward(x: Tensor) -> Tensor:
        try:
            return model.b(model.a(x))
        except Exception:  # such as a fallback to another kernel
            return model.c(x)

    model.forward = forward
    with record(model, "a", stop=True):
        assert model(torch.randn(2, 4)) is None
    assert model.trace == ["a"]

    def swallow(x: Tensor) -> Tensor:
        try:
            return model.b(model.a(x))
        except BaseException:
            return model.c(x)

    model.forward = swallow
    with pytest.raises(RuntimeError, match="the model caught the stop signal"), record(model, "a", stop=True):
        model(torch.randn(2, 4))


def test_finally_blocks_run_and_root_hooks_do_not():
    model, done = Net(), []
    inner = model.forward

    def forward(x: Tensor) -> Tensor:
        try:
            return inner(x)
        finally:
            done.append("finally")

    model.forward = forward
    handle = model.register_forward_hook(lambda m, args, output: done.append(output.shape))  # would fail on None
    with record(model, "a", stop=True):
        model(torch.randn(2, 4))
    assert done == ["finally"]
    handle.remove()


@pytest.mark.parametrize("where", ["body", "model", "hook"])
def test_restored_after_errors(where: str):
    model, x = Net(), torch.randn(3, 4)
    handle = model.a.register_forward_hook(lambda *_: {}["missing"] if where == "hook" else None)

    def body() -> None:
        with record(model, "b", stop=True):
            model(x[:, :2] if where == "model" else x)
            raise KeyError("mine")

    with pytest.raises(RuntimeError if where == "model" else KeyError):
        body()
    handle.remove()
    assert restored(model)


def test_a_wrapper_that_was_there_comes_back():
    model = Net()
    original, counted = model._call_impl, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return original(*args, **kwargs)

    model._call_impl = counting
    with record(model, "a", stop=True):
        assert model(torch.randn(2, 4)) is None
    assert model._call_impl is counting
    assert counted == [1]


# Two records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outer", "inner"), [(True, True), (True, False), (False, True)])
def test_two_records_on_one_model_do_not_stop_each_other(outer: bool, inner: bool):
    model = Net()
    with record(model, "a", stop=outer) as recording:
        model(torch.randn(2, 4))
        with pytest.raises(RuntimeError, match="another record is open on this model"), record(model, "b", stop=inner):
            pass
        model(torch.randn(2, 4))
    assert len(recording["a"]) == 4
    assert restored(model)
    with record(model, "b", stop=True):  # nothing is left of the refused one
        model(torch.randn(2, 4))


def test_stops_of_two_models_are_told_apart():
    first, second, x = Net(), Net(), torch.randn(2, 4)
    with record(first, "a", stop=True) as one, record(second, "b", stop=True) as two:
        assert first(x) is None
        assert second(x) is None
    assert first.trace == ["a"]
    assert second.trace == ["a", "b"]
    assert len(one["a"]) == len(two["b"]) == 2


def test_a_stop_passes_through_a_model_that_is_not_its_own():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = Net()

        def forward(self, x: Tensor) -> None:
            with record(self.unet, "b", stop=True):
                self.unet(x)
            raise AssertionError("the stop of the outer record ended here")

    model = Nested()
    with record(model, "unet.a", stop=True) as recording:
        assert model(torch.randn(2, 4)) is None
    assert model.unet.trace == ["a"]
    assert len(recording["unet.a"]) == 2
    assert restored(model.unet)


def test_frames_of_contextlib_are_not_taken_for_the_body():
    class Probe:
        def __enter__(self) -> frozenset[int]:
            return frames_outside()

        def __exit__(self, *_: object) -> None:
            pass

    with Probe() as direct, ExitStack() as stack:
        assert stack.enter_context(Probe()) == direct


# Where the output is used --------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor) -> Tensor:
        return x + self.unet(x)


class DiffusionPipeline:
    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet


class MyPipeline(DiffusionPipeline):
    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.denoise(x)

    def denoise(self, x: Tensor) -> Tensor:
        return x - self.unet(x)


@pytest.mark.parametrize(
    ("user", "text"),
    [(Wrapper, "called by Wrapper, another module"), (MyPipeline, "called by the pipeline MyPipeline")],
)
def test_refused_where_the_output_is_used(user: Any, text: str):
    model, x = Net(), torch.randn(2, 4)
    wrapped = user(model)
    with pytest.raises(RuntimeError, match=rf"{text}.*Call the model directly"), record(model, "a", stop=True):
        wrapped(x)
    assert model.trace == []  # before anything is computed
    assert restored(model)
    with record(model, "a") as recording:
        assert isinstance(wrapped(x), Tensor)
    assert len(recording["a"]) == 2
    if isinstance(wrapped, nn.Module):
        with record(wrapped, "unet.a", stop=True):
            assert wrapped(x) is None


@contextmanager
def helper(model: nn.Module) -> Any:
    with record(model, "a", stop=True) as recording:
        yield recording


@pytest.mark.parametrize("style", ["with", "stack", "generator", "function"])
def test_a_record_inside_a_module_or_pipeline_may_stop(style: str):
    model, x = Net(), torch.randn(2, 4)

    def score(x: Tensor) -> None:
        assert model(x) is None

    def body(x: Tensor) -> int:
        if style == "stack":
            with ExitStack() as stack:
                recording = stack.enter_context(record(model, "a", stop=True))
                score(x)
        elif style == "generator":
            with helper(model) as recording:
                score(x)
        elif style == "function":
            recorder = record(model, "a", stop=True)
            recording = recorder.__enter__()
            score(x)
            recorder.__exit__(None, None, None)
        else:
            with record(model, "a", stop=True) as recording:
                score(x)
        return len(recording["a"])

    class Detector(nn.Module):
        def forward(self, x: Tensor) -> int:
            return body(x)

    class Scoring(DiffusionPipeline):
        def __call__(self, x: Tensor) -> int:
            return body(x)

    assert Detector()(x) == 2
    assert Scoring(model)(x) == 2
    with ExitStack() as stack:
        stack.enter_context(record(model, "a", stop=True))
        assert model(x) is None
        with pytest.raises(RuntimeError, match="MyPipeline"):
            MyPipeline(model)(x)


def test_the_check_keeps_no_variable_of_the_caller_alive():
    import gc
    import weakref

    model = Net()

    def caller() -> weakref.ref[Tensor]:
        x = torch.randn(2, 4)
        with record(model, "a", stop=True):
            model(x)
            alive = weakref.ref(x)
            del x
            gc.collect()
            assert alive() is None
        return alive

    caller()


# Hooks that put state back -------------------------------------------------------------------------------------------


def hook_class(name: str, **attributes: Any) -> Any:
    return type(name, (), attributes)()


@pytest.mark.parametrize(
    ("hook", "refused"),
    [
        (hook_class("AlignDevicesHook", offload=True), True),
        (hook_class("AlignDevicesHook", offload=False), False),
        (hook_class("CpuOffload"), True),
        (hook_class("ModelHook"), False),
        (hook_class("SequentialHook", hooks=[hook_class("ModelHook"), hook_class("CpuOffload")]), True),
        (hook_class("SequentialHook", hooks=[hook_class("ModelHook")]), False),
    ],
)
def test_accelerate_hooks(hook: Any, refused: bool):
    model = Net()
    model.b._hf_hook = hook
    if refused:
        with pytest.raises(RuntimeError, match=r"module 'b' has an accelerate hook .*Use stop=False"):
            with record(model, "a", stop=True):
                pass
    else:
        with record(model, "a", stop=True):
            model(torch.randn(2, 4))
    with record(model, "a"):
        model(torch.randn(2, 4))
    del model.b._hf_hook
    assert restored(model)


def test_diffusers_hooks():
    model = Net()
    model._diffusers_hook = SimpleNamespace(hooks={})
    with record(model, "a", stop=True):
        model(torch.randn(2, 4))
    model._diffusers_hook.hooks["group_offloading"] = object()
    with pytest.raises(RuntimeError, match=r"the model has diffusers hooks .group_offloading"):
        with record(model, "a", stop=True):
            pass


def test_sharded_models():
    class FSDPModule:
        pass

    class Sharded(FSDPModule, Net):
        pass

    for model in (Sharded(), nn.DataParallel(Net())):
        name = "a" if isinstance(model, Sharded) else "module.a"
        with pytest.raises(RuntimeError, match=r"the model is wrapped in (FSDPModule|DataParallel)"):
            with record(model, name, stop=True):
                pass
