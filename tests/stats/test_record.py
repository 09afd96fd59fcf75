"""`record` on small modules: what is recorded, that nothing else is kept, and that the model is left as it was."""

from __future__ import annotations

import copy
import gc
import re
import threading
import weakref
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import balanced_rep as br
from balanced_rep.stats import cat, representation_stats
from balanced_rep.stats.record import record


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def keep(module: nn.Module) -> list[Any]:
    """What the module returns, call by call, the way it is usually done."""
    kept: list[Any] = []
    module.register_forward_hook(lambda m, args, output: kept.append(output))
    return kept


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(first=nn.Conv2d(3, 6, 3, padding=1), act=nn.ReLU(), second=nn.Conv2d(6, 5, 3, stride=2))
    )


class Thrice(nn.Module):
    """Calls one activation on three shapes, one of them a 2-D embedding, as a diffusers ResnetBlock2D does."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.act(x))
        return self.act(x + self.act(x.mean((2, 3)))[..., None, None])


@dataclass
class Out:
    flag: str
    hidden: Tensor
    other: Tensor


class Structured(nn.Module):
    """Returns what it is told to make of its input."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


class Around(nn.Module):
    """A model around one inner module, which it calls as it is told to."""

    def __init__(self, inner: nn.Module, call: Any = None) -> None:
        super().__init__()
        self.inner = inner
        self.call = call or (lambda inner, x: inner(x))

    def forward(self, x: Tensor) -> Any:
        return self.call(self.inner, x)


# The numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [None, "max", "mean"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_equals_the_statistics_of_the_kept_activation(dtype: torch.dtype, channels_last: bool, pool: str | None):
    model, x = conv_net().to(dtype), torch.randn(4, 3, 9, 9, dtype=dtype)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    inputs: list[Tensor] = []
    model.second.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    outputs = keep(model.second)
    dim = 1 if pool else (1, 2, 3)
    for at, kept in (("input", inputs), ("output", outputs)):
        with record(model, "second", at, pool=pool, correction=1, threshold=0.1) as recording:
            model(x)
        want = representation_stats(kept[-1], dim=dim, pool=pool, correction=1, threshold=0.1)
        assert recording["second"].shape == (4,)
        assert torch.equal(recording["second"].state, want.state)
        torch.testing.assert_close(recording["second"].std, want.std, rtol=0, atol=0)


@pytest.mark.parametrize(("shape", "dim", "pooled_dim"), [((4, 7), 1, None), ((4, 5, 7), (1, 2), 1)])
def test_tokens_and_features(shape: tuple[int, ...], dim: Any, pooled_dim: int | None):
    model, x = nn.Sequential(nn.Linear(7, 6)), torch.randn(shape)
    with record(model, "0") as recording:
        y = model(x)
    assert torch.equal(recording["0"].state, representation_stats(y, dim=dim).state)
    if pooled_dim is not None:
        with record(model, "0", pool="max") as recording:
            model(x)
        assert torch.equal(recording["0"].state, representation_stats(y.amax(pooled_dim), dim=1).state)


@pytest.mark.parametrize(
    ("shape", "pool", "units", "dims"),
    [
        ((6, 3), None, 3, (0,)),
        ((6, 4, 3), None, 3, (0, 1)),
        ((6, 3, 4, 5), None, 3, (0, 2, 3)),
        ((6, 4, 3), "mean", 3, (0,)),
        ((6, 3, 4, 5), "max", 3, (0,)),
    ],
)
def test_per_unit_merges_batches_exactly(shape: tuple[int, ...], pool: str | None, units: int, dims: tuple[int, ...]):
    model, x = nn.Sequential(nn.Identity()), torch.randn(shape, dtype=torch.float64)
    with record(model, "0", per="unit", pool=pool) as recording:
        for seen, batch in zip((1, 4, 6), x.split([1, 3, 2]), strict=True):
            model(batch)
            so_far = representation_stats(x[:seen], dim=dims, pool=pool)
            assert torch.equal(recording["0"].n, so_far.n)  # readable in between
    got, want = recording["0"], representation_stats(x, dim=dims, pool=pool)
    assert got.shape == (units,)
    torch.testing.assert_close(got.state, want.state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("timesteps", [None, (0, 1)])
def test_a_long_stream_of_units_takes_no_memory(timesteps: Any):
    model = Around(nn.Identity(), lambda inner, x: inner(x))
    batches = torch.randn(100, 4, 3, dtype=torch.float64)
    time = iter(range(100))
    options = {"timesteps": timesteps, "timestep_arg": lambda args, kwargs: next(time) % 2}
    with record(model, "inner", per="unit", **options) as recording:
        for batch in batches:
            model(batch)
    assert recording.forwards == 100
    kept = [entry for entries in (recording._arrived, recording._entries) for e in entries.values() for entry in e]
    assert len(kept) < 35
    torch.testing.assert_close(
        recording["inner"].state, representation_stats(batches.flatten(0, 1), dim=0).state, rtol=1e-11, atol=1e-11
    )
    if timesteps:
        odd = representation_stats(batches[1::2].flatten(0, 1), dim=0)
        torch.testing.assert_close(recording.by_timestep("inner")[1].state, odd.state, rtol=1e-11, atol=1e-11)


def test_histogram_and_entropy_are_kept_on_request():
    model, x = nn.Sequential(nn.Linear(7, 50)), torch.randn(3, 7)
    with record(model, "0", histogram=True, entropy=True) as recording:
        y = model(x)
    want = representation_stats(y.detach(), histogram=True, entropy=True)
    torch.testing.assert_close(recording["0"].gini(), want.gini())
    torch.testing.assert_close(recording["0"].energy_entropy, want.energy_entropy)


def test_pool_dim_names_other_dims():
    model, x = nn.Sequential(nn.Identity()), torch.randn(4, 5, 6)  # (N, C, L)
    with record(model, "0", pool="max", pool_dim=2) as recording:
        model(x)
    assert torch.equal(recording["0"].state, representation_stats(x.amax(2), dim=1).state)
    with (
        pytest.raises(ValueError, match=r"layer '0', call 0.*pools dim 0.*the batch"),
        record(model, "0", pool="max", pool_dim=(0, 2)),
    ):
        model(x)


def test_zero_size_batch_and_nan():
    model = nn.Sequential(nn.Linear(3, 4))
    with record(model, "0") as recording:
        model(torch.zeros(0, 3))
        model(torch.tensor([[1.0, float("nan"), 2.0]]))
    assert recording["0"].shape == (1,)
    assert recording["0"].n_nonfinite.tolist() == [4]
    assert recording["0"].std.isnan().all()


# Several forwards ----------------------------------------------------------------------------------------------------


def test_batches_append_samples_and_stay_apart_by_forward():
    model = conv_net()
    batches = [torch.randn(n, 3, 9, 9) for n in (2, 1, 3)]
    outputs = keep(model.act)
    with record(model, ["act", "second"], pool="max") as recording:
        for i, batch in enumerate(batches):
            model(batch)
            assert recording["act"].shape == (sum(len(b) for b in batches[: i + 1]),)  # readable in between
    wants = [representation_stats(y, dim=1, pool="max") for y in outputs]
    assert torch.equal(recording["act"].state, cat(wants).state)
    assert [len(s) for s in recording.per_forward("act")] == [2, 1, 3]
    assert torch.equal(recording.per_forward("act")[2].state, wants[2].state)
    assert recording.forwards == 3
    assert recording.calls == {"act": [1, 1, 1], "second": [1, 1, 1]}


def test_mapping_order_is_that_of_the_model():
    model = conv_net()
    with record(model, ["second", "first"]) as recording:
        assert list(recording) == []
        model(torch.randn(1, 3, 9, 9))
    assert list(recording) == ["first", "second"]
    assert recording.layers == ("first", "second")
    assert len(recording) == 2
    assert "first" in recording
    assert "act" not in recording


def test_a_missing_key_says_why():
    model = conv_net()
    with record(model, "first") as recording:
        with pytest.raises(KeyError, match="no forward has been recorded yet"):
            recording["first"]
        model(torch.randn(1, 3, 9, 9))
    with pytest.raises(KeyError, match="'firts' is not recorded; recorded are 'first'"):
        recording["firts"]
    with pytest.raises(KeyError, match='call is not "all"'):
        recording["first", 0]


def test_a_forward_that_raises_leaves_nothing_behind():
    model = conv_net()
    with record(model, ["first", "second"], call=-1) as recording:
        model(torch.randn(2, 3, 9, 9))
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 3, 2, 2))  # too small for the second convolution, after the first has run
        model(torch.randn(1, 3, 9, 9))
    assert len(recording["first"]) == len(recording["second"]) == 3
    assert recording.calls["first"] == [1, 1]


# Calls ---------------------------------------------------------------------------------------------------------------


def test_several_calls_need_a_choice():
    model = Thrice()
    with pytest.raises(
        ValueError, match=r"'act' \(SiLU\) was called 3 times.*\(2, 4, 5, 5\), \(2, 8\), \(2, 8, 5, 5\)"
    ):
        with record(model, "act"):
            model(torch.randn(2, 4, 5, 5))
    assert n_hooks(model) == 0


@pytest.mark.parametrize("call", [0, 2, -1])
def test_one_call_is_chosen(call: int):
    model, x = Thrice(), torch.randn(2, 4, 5, 5)
    outputs = keep(model.act)
    with record(model, "act", pool="max", call=call) as recording:
        model(x)
        model(x + 1)
    want = cat([representation_stats(outputs[3 * i + call % 3], dim=1, pool="max") for i in range(2)])
    assert torch.equal(recording["act"].state, want.state)
    assert recording.calls["act"] == [3, 3]


def test_the_last_call_has_to_be_one_that_can_be_reduced():
    model = Thrice()
    model.forward = lambda x: model.act(model.act(x).mean((2, 3)))
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match=r"layer 'act', call 1: pool='max' finds no spatial"):
        with record(model, "act", pool="max", call=-1):
            model(x)
    model = Around(Structured(lambda x: None if len(x) == 1 else x), lambda inner, x: (inner(x[:1]), inner(x)))
    with record(model, "inner", call=-1) as recording:
        model(x)
    assert recording.calls["inner"] == [2]
    assert len(recording["inner"]) == 2


def test_every_call_has_its_own_key():
    model, x = Thrice(), torch.randn(2, 4, 5, 5)
    outputs = keep(model.act)
    with record(model, "act", call="all") as recording:
        model(x)
        model(x)
    assert list(recording) == [("act", 0), ("act", 1), ("act", 2)]
    for k in range(3):
        want = representation_stats(outputs[k], dim=tuple(range(1, outputs[k].ndim)))
        assert torch.equal(recording["act", k].state, cat([want, want]).state)
    with pytest.raises(KeyError, match=r"keys are \(name, call\).*0 to 2"):
        recording["act"]
    with pytest.raises(KeyError, match="3 times at most"):
        recording["act", 3]


def test_a_call_that_is_not_made_is_an_error():
    model = Thrice()
    with pytest.raises(ValueError, match=r"called 3 times.*there is no call=3"), record(model, "act", call=3):
        model(torch.randn(2, 4, 5, 5))


def test_pooling_an_embedding_is_an_error_not_a_flatten():
    with pytest.raises(
        ValueError, match=r"layer 'act', call 1: pool='max' finds no spatial or token dim in shape \(2, 8\)"
    ):
        with record(model := Thrice(), "act", pool="max", call=1):
            model(torch.randn(2, 4, 5, 5))


def test_calls_by_a_loop_that_differs_between_forwards():
    model = Around(nn.Linear(3, 3), lambda inner, x: [inner(x) for _ in range(len(x))][-1])
    with record(model, "inner", call="all") as recording:
        model(torch.randn(1, 3))
        model(torch.randn(3, 3))
    assert recording.calls["inner"] == [1, 3]
    assert len(recording["inner", 0]) == 4
    assert len(recording["inner", 2]) == 3


# Structured inputs and outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "select", "factor"),
    [
        (lambda x: (2 * x, 3 * x), None, 2),
        (lambda x: (2 * x, 3 * x), 1, 3),
        (lambda x: [None, (2 * x,)], None, 2),
        (lambda x: {"note": "a", "hidden": 2 * x, "other": 3 * x}, None, 2),
        (lambda x: {"hidden": 2 * x, "other": 3 * x}, "other", 3),
        (lambda x: OrderedDict(hidden=2 * x, other=3 * x), -1, 3),
        (lambda x: Out("a", 2 * x, 3 * x), None, 2),
        (lambda x: Out("a", 2 * x, 3 * x), "other", 3),
        (lambda x: {"states": (x, 3 * x)}, ("states", -1), 3),
        (lambda x: torch.return_types.max((3 * x, x.long())), "values", 3),
    ],
)
def test_structured_outputs(make: Any, select: Any, factor: int):
    model, x = Around(Structured(make)), torch.randn(3, 5)
    with record(model, "inner", select=select) as recording:
        model(x)
    assert torch.equal(recording["inner"].state, representation_stats(factor * x).state)


def test_first_tensor_of_a_keyword_call_and_selected_arguments():
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            return a if b is None else a + b

    x = torch.randn(3, 5)

    def recorded(call: Any, select: Any) -> Tensor:
        with record(model := Around(Two(), call), "inner", "input", select=select) as recording:
            model(x)
        return recording["inner"].mean

    by_keyword = lambda inner, x: inner(b=2 * x, a=x)  # noqa: E731
    by_position = lambda inner, x: inner(x, 2 * x)  # noqa: E731
    once, twice = x.mean(1), 2 * x.mean(1)
    for call, select, want in [
        (by_keyword, None, twice),
        (by_keyword, "a", once),
        (by_position, None, once),
        (lambda inner, x: inner(x, b=2 * x), None, once),
        (by_position, 1, twice),
        (by_position, "b", twice),
    ]:
        torch.testing.assert_close(recorded(call, select), want)


def test_what_is_no_activation_is_named():
    x = torch.randn(2, 5)
    for make, select, error, text in [
        (lambda x: None, None, TypeError, "no tensor in NoneType"),
        (lambda x: (1, "a"), None, TypeError, "no tensor in tuple"),
        (lambda x: (x, x), 2, LookupError, r"select=2 finds no 2 in tuple\(0=float32 \(2, 5\), 1=float32 \(2, 5\)\)"),
        (lambda x: {"a": x}, "b", LookupError, "finds no 'b' in dict"),
        (lambda x: x.long(), None, TypeError, "torch.int64"),
        (lambda x: x > 0, None, TypeError, "torch.bool"),
        (lambda x: x + 0j, None, TypeError, "torch.complex64"),
        (lambda x: x[0], None, ValueError, r"shape \(5,\); expected is \(batch, ...\)"),
    ]:
        model = Around(Structured(make))
        with (
            pytest.raises(error, match=rf"output of layer 'inner', call 0: .*{text}"),
            record(model, "inner", select=select),
        ):
            model(x)
        assert n_hooks(model) == 0


# Nothing is kept, nothing waits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [0, -1, "all"])
def test_activations_are_freed_at_once(call: Any):
    seen: list[weakref.ref[Tensor]] = []

    def use(inner: nn.Module, x: Tensor) -> int:
        for k in range(3):
            y = inner(x + k)
            seen.append(weakref.ref(y))
            del y
            gc.collect()
            assert seen[-1]() is None  # while the forward is still running
        return 0

    model = Around(nn.Linear(4, 4), use)
    with record(model, "inner", call=call) as recording:
        model(torch.randn(2, 4))
    assert len(seen) == 3
    kept = [s.state for key in recording for s in recording.per_forward(key)]
    assert sum(t.untyped_storage().nbytes() for t in kept) == len(kept) * 10 * 2 * 8


def test_a_recording_does_not_keep_its_model():
    model = conv_net()
    recorder = record(model, "act")
    with recorder as recording:
        model(torch.randn(1, 3, 9, 9))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert len(recording["act"]) == 1


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("pool", [None, "max"])
def test_results_carry_no_graph(backend: str | None, pool: Any):
    model = conv_net()
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    with br.backend(backend), record(model, ["act", "second"], "input", pool=pool) as recording:
        y = model(x)
    assert y.requires_grad
    assert all(not s.state.requires_grad for s in recording.values())
    y.sum().backward()
    assert x.grad is not None


class NoReadBack(TorchDispatchMode):
    """Raises where Python asks a tensor for a value, which would wait for an accelerator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}:
            raise AssertionError(f"{func} reads a value back")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"pool": "max"}, {"per": "unit"}, {"stop": True}], ids=str)
def test_no_value_is_read_back_in_a_hook(options: dict[str, Any]):
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    with br.backend("reference"), NoReadBack(), record(model, ["first", "second"], **options) as recording:
        model(x)
    assert recording["second"].n.tolist()


def test_runs_on_meta_tensors():
    model = conv_net().to("meta")
    with record(model, ["first", "second"], pool="max") as recording:
        model(torch.randn(2, 3, 9, 9, device="meta"))
        model(torch.randn(1, 3, 9, 9, device="meta"))
    assert recording["second"].state.device.type == "meta"
    assert recording["second"].std.shape == (3,)


def test_under_another_default_device():
    model, x = conv_net(), torch.randn(2, 3, 8, 8)
    with torch.device("meta"), record(model, "act", timesteps=0.3, timestep_arg=lambda args, kwargs: 0.3) as recording:
        model(x)
    torch.testing.assert_close(recording["act"].std, model[:2](x).flatten(1).std(1, correction=0))


def test_one_transfer_moves_everything():
    model = conv_net()
    with record(model, ["first", "second"], per="sample") as recording:
        model(torch.randn(2, 3, 9, 9))
        model(torch.randn(1, 3, 9, 9))
    before = {key: stats.state.clone() for key, stats in recording.items()}
    copies: list[Any] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in {"aten::_to_copy", "aten::copy_"}:
                copies.append(func)
            return func(*args, **(kwargs or {}))

    with Copies():
        recording.to("meta")
    assert len(copies) == 1
    assert [s.state.device.type for s in recording.values()] == ["meta"] * 2
    with record(model, ["first", "second"]) as recording:
        model(torch.randn(2, 3, 9, 9))
    states = {key: stats.state for key, stats in recording.items()}
    assert all(torch.equal(stats.state, states[key]) for key, stats in recording.cpu().items())
    assert before["first"].shape == (10, 3)


# Modes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode(mode: Any):
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    with mode(), record(model, "act", pool="max") as recording:
        model(x)
    assert not recording.per_forward("act")[0].state.is_inference()
    scale = torch.ones((), requires_grad=True)
    (recording["act"].std * scale).sum().backward()  # an inference tensor could not be saved for this
    assert scale.grad is not None
    want = representation_stats(model.act(model.first(x)).detach(), dim=1, pool="max")
    assert torch.equal(recording["act"].state, want.state)


def test_under_autocast():
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    outputs = keep(model.act)
    with torch.autocast("cpu", dtype=torch.bfloat16), record(model, "act", pool="mean") as recording:
        model(x)
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(recording["act"].state, representation_stats(outputs[0], dim=1, pool="mean").state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_counted_once(reentrant: bool):
    from torch.utils.checkpoint import checkpoint

    model = Around(nn.Linear(3, 3), lambda inner, x: checkpoint(inner, x, use_reentrant=reentrant))
    with record(model, "inner") as recording:
        y = model(torch.randn(2, 3, requires_grad=True))
        y.sum().backward()  # runs the layer again
    assert recording.calls["inner"] == [1]


def test_functional_call():
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    weights = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with record(model, "second") as recording:
        torch.func.functional_call(model, weights, (x,))
    assert recording["second"].absmax.tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_transforms_are_refused():
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    runs = {
        "vmap": lambda: torch.func.vmap(model)(x[:, None]),
        "jvp": lambda: torch.func.jvp(model, (x,), (x,)),
        "grad": lambda: torch.func.grad(lambda x: model(x).sum())(x),
        "vjp": lambda: torch.func.vjp(model, x),
    }
    for run in runs.values():
        with pytest.raises(RuntimeError, match=r"torch\.func transform"), record(model, "second"):
            run()
    with (
        pytest.raises(RuntimeError, match="dual_level"),
        record(model, "second"),
        torch.autograd.forward_ad.dual_level(),
    ):
        model(torch.autograd.forward_ad.make_dual(x, x))
    assert n_hooks(model) == 0


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_tracing_is_refused():
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    for trace in (
        torch.jit.trace,
        lambda model, x: make_fx(model)(x),
        lambda model, x: torch.export.export(model, (x,)),
    ):
        with pytest.raises(RuntimeError, match="compiled, exported or traced"), record(model, "second"):
            trace(model, x)
    assert n_hooks(model) == 0


# The model is left as it was -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("where", ["nowhere", "body", "model"])
def test_hooks_are_gone_afterwards(where: str, stop: bool):
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    model.first.register_forward_hook(lambda *_: None)
    before, attributes = n_hooks(model), set(vars(model))
    error = {"nowhere": None, "body": KeyError, "model": RuntimeError}[where]

    def body() -> None:
        with record(model, ["first", "second"], stop=stop):
            assert n_hooks(model) == before + 4
            model(x[:, :2] if where == "model" else x)
            if where == "body":
                raise KeyError("mine")

    if error is None:
        body()
    else:
        with pytest.raises(error):
            body()
    assert n_hooks(model) == before
    assert set(vars(model)) == attributes
    assert isinstance(model(x), Tensor)


def test_the_errors_of_the_body_win():
    with pytest.raises(ZeroDivisionError), record(conv_net(), "first"):
        raise ZeroDivisionError  # and not the complaint that nothing ran


def test_results_survive_the_error():
    model = conv_net()
    with suppress(ZeroDivisionError), record(model, "act") as recording:
        model(torch.randn(2, 3, 9, 9))
        raise ZeroDivisionError
    assert recording["act"].shape == (2,)


def test_the_output_is_untouched():
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    want = model(x)
    with record(model, re.compile(".*")):
        got = model(x)
    assert torch.equal(got, want)


def test_a_record_is_opened_once():
    model = conv_net()
    recorder = record(model, "act")
    assert n_hooks(model) == 0  # nothing is attached before the with
    with recorder:
        with pytest.raises(RuntimeError, match="opened once"), recorder:
            pass
        model(torch.randn(1, 3, 9, 9))
    with pytest.raises(RuntimeError, match="opened once"), recorder:
        pass


def test_nested_records_are_independent():
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    with record(model, "first") as outer:
        model(x)
        with record(model, ["first", "act"], pool="max") as inner:
            model(x)
        model(x)
    assert len(outer["first"]) == 6
    assert len(inner["first"]) == 2
    assert n_hooks(model) == 0


def test_a_part_may_be_recorded_beside_the_whole():
    model, x = Around(conv_net()), torch.randn(2, 3, 9, 9)
    with record(model, "inner.act") as whole, record(model.inner, "act") as part:
        model(x)
    assert torch.equal(whole["inner.act"].state, part["act"].state)


def test_copies_made_inside_are_not_heard():
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    twin = copy.deepcopy(model)
    with record(model, "act") as recording:
        twin(x)
        model(x)
    assert len(recording["act"]) == 2


# Threads -------------------------------------------------------------------------------------------------------------


def run_in_thread(work: Any) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_only_the_own_thread_is_heard():
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    with record(model, "act") as recording:
        model(x)
        run_in_thread(lambda: model(torch.randn(5, 3, 9, 9)))
        model(x)
    assert len(recording["act"]) == 4
    with pytest.raises(RuntimeError, match=r"other threads called the model 1 times"), record(model, "act"):
        run_in_thread(lambda: model(x))


def test_two_threads_record_one_model():
    model, lengths = conv_net(), {}
    together = threading.Barrier(2)

    def work(n: int) -> None:
        with record(model, "act") as recording:
            together.wait()
            for _ in range(5):
                model(torch.randn(n, 3, 9, 9))
            together.wait()
        lengths[n] = len(recording["act"])

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == {1: 5, 2: 10}
    assert n_hooks(model) == 0


# Layers that do not run ----------------------------------------------------------------------------------------------


def test_a_named_layer_that_never_runs():
    model = Around(conv_net(), lambda inner, x: inner.first(x))
    text = r"ran zero times in 2 forward\(s\): 'inner.act', 'inner.second'"
    with pytest.raises(RuntimeError, match=text), record(model, ["inner.first", "inner.act", "inner.second"]):
        [model(torch.randn(2, 3, 9, 9)) for _ in range(2)]
    assert n_hooks(model) == 0


def test_a_layer_may_rest_in_some_forwards():
    model = Around(conv_net(), lambda inner, x: inner.first(x) if len(x) == 1 else inner.act(x))
    with record(model, ["inner.first", "inner.act"]) as recording:
        model(torch.randn(2, 3, 9, 9))
        model(torch.randn(1, 3, 9, 9))
    assert recording.calls == {"inner.first": [0, 1], "inner.act": [1, 0]}
    assert len(recording["inner.first"]) == 1
    assert len(recording["inner.act"]) == 2


def test_of_a_pattern_one_layer_has_to_run():
    model = Around(conv_net(), lambda inner, x: inner.first(x))
    with record(model, re.compile(r"inner\..*")) as recording:
        model(torch.randn(2, 3, 9, 9))
    assert list(recording) == ["inner.first"]
    with pytest.raises(KeyError, match=r"'inner\.act' ran zero times in 1 recorded forwards"):
        recording["inner.act"]
    with pytest.raises(RuntimeError, match="ran zero times"), record(model, re.compile(r"inner\.(act|second)")):
        model(torch.randn(2, 3, 9, 9))


def test_a_model_that_is_not_called():
    model, x = conv_net(), torch.randn(1, 3, 9, 9)
    with pytest.raises(RuntimeError, match="the model was not called inside the `with`"), record(model, "first"):
        pass
    with (
        pytest.raises(RuntimeError, match="'first' ran, but not through a call of the model itself"),
        record(model, "first"),
    ):
        model.forward(x)
