"""Which layers `record` takes and which it refuses: misspelt, shared, compiled, scripted, replicated."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from balanced_rep.stats.record import record


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.up_blocks:
            x = block(x)
        return self.head(x)


def layers_of(model: nn.Module, layers: Any, **options: Any) -> list[str]:
    with record(model, layers, **options) as recording:
        model(torch.randn(3, 4))
    return list(recording)


def test_names_and_patterns_match_whole_names():
    model = Net()
    assert layers_of(model, "head") == ["head"]
    assert layers_of(model, re.compile(r"up_blocks\.\d")) == ["up_blocks.0", "up_blocks.1"]
    both = ["head", re.compile(r"up_blocks\.1\.conv\d"), "up_blocks.1.conv2"]
    assert layers_of(model, both) == ["up_blocks.1.conv1", "up_blocks.1.conv2", "head"]
    assert layers_of(model, {"head": "the end"}) == ["head"]  # such as the layers of a Denoiser
    assert layers_of(model, re.compile(r"up_blocks\.0\..*|up_blocks")) == [
        f"up_blocks.0.{n}" for n in ("conv1", "conv2", "act")
    ]
    assert layers_of(model, "") == [""]  # the model itself
    assert "" not in layers_of(model, re.compile(".*"))


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("up_blocks.0.convl1", r"no module 'up_blocks.0.convl1' \(10 modules\); near names: 'up_blocks.0.conv1'"),
        ("unet.up_blocks.1.conv2", r"near names: 'up_blocks.1.conv2'"),
        ("conv2", r"near names: 'up_blocks.0.conv2', 'up_blocks.1.conv2'"),
        (r"up_blocks\.[01]\.conv1", r"as a pattern it matches 2 modules: pass re.compile\('up_blocks"),
        ("up_blocks.[", r"no module 'up_blocks.\['"),
        ("up_blocks", r"'up_blocks' is a ModuleList, a container.*'up_blocks.0', 'up_blocks.1'$"),
        (re.compile("conv1"), r"matches none of the 10 module names as a whole; it occurs inside 2 of them"),
        (re.compile(r"up_blokcs\.0\.conv1"), r"matches none.*near names: 'up_blocks.0.conv1'"),
        (re.compile("up_blocks"), "matches only containers, never called: 'up_blocks'"),
        ([], "no layer is asked for"),
        (["head", "haed"], "no module 'haed'"),
    ],
    ids=str,
)
def test_a_miss_says_what_was_meant(layers: Any, text: str):
    with pytest.raises(ValueError, match=text):
        record(Net(), layers)


@pytest.mark.parametrize("layers", [3, [3], [["head"]], None, [b"head"]], ids=str)
def test_what_is_no_name(layers: Any):
    with pytest.raises(TypeError):
        record(Net(), layers)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"at": "middle"}, "at must be one of 'input', 'output', got 'middle'"),
        ({"per": "channel"}, "per must be one of 'sample', 'unit'"),
        ({"pool": "sum"}, "pool must be one of None, 'max', 'mean'"),
        ({"call": -2}, 'call must be None, "all", -1 or an index from 0, got -2'),
        ({"call": "last"}, "got 'last'"),
        ({"call": True}, "got True"),
        ({"call": 1.0}, r"got 1\.0"),
        ({"pool_dim": 1}, "pool_dim=1 is given without pool"),
        ({"correction": -1}, "correction must be a finite number >= 0"),
        ({"correction": float("nan")}, "correction must be a finite number >= 0"),
        ({"threshold": float("nan")}, "threshold a number"),
        ({"timesteps": []}, "timesteps is empty"),
        ({"timestep_arg": "when"}, "'when' is no parameter of Net.forward, which takes x"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        record(Net(), "head", **options)


def test_a_pipeline_is_not_a_model():
    class Pipeline:
        def __init__(self) -> None:
            self.components = {"unet": Net(), "tokenizer": None, "vae": Net()}

    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got Pipeline; .*one of \.unet, \.vae"):
        record(Pipeline(), "head")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="got function"):
        record(layers_of, "head")  # pyright: ignore[reportArgumentType]


# Shared modules ------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.a = nn.Sequential(nn.Linear(4, 4), act)
        self.b = nn.Sequential(nn.Linear(4, 4), act)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_shared_modules_are_named():
    model = Shared()
    with pytest.warns(UserWarning, match=r"shared modules: 'b.1' is also 'a.1'") as caught:
        recorder = record(model, "b.1", call="all")
    assert caught[0].filename == __file__
    with recorder as recording:
        model(torch.randn(2, 4))
    assert recording.calls == {"b.1": [2]}  # both uses, though only one was named
    with pytest.warns(UserWarning, match="shared"):
        recorder = record(model, "a.1")
    with pytest.raises(ValueError, match="was called 2 times"), recorder:
        model(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"'a\.1' and 'b\.1' are one shared module"):
        record(model, ["a.1", "b.1"])
    with pytest.warns(UserWarning, match="shared"):
        assert layers_of(model, re.compile(r".\.1"), call=0) == ["a.1"]
    with pytest.warns(UserWarning, match="shared"):
        assert layers_of(model, [re.compile(r".\.1"), "b.1"], call=0) == ["b.1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layers_of(model, "a.0") == ["a.0"]


# Compiled and scripted -----------------------------------------------------------------------------------------------


def test_a_compiled_model_is_refused_and_its_original_works():
    model = Net()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"the model is compiled.*skips hooks.*_orig_mod"):
        record(compiled, "_orig_mod.head")
    with pytest.raises(ValueError, match=r"near names: '_orig_mod\.head'"):
        record(compiled, "head")
    with record(compiled._orig_mod, "head") as recording:
        compiled._orig_mod(torch.randn(3, 4))
    assert len(recording["head"]) == 3
    with pytest.raises(RuntimeError, match=r"'head'.*run compiled code, which ignores hooks"), record(model, "head"):
        compiled(torch.randn(3, 4))  # was compiled before the hooks came: they are not heard, and that is said


def test_parts_that_are_compiled():
    model, x = Net(), torch.randn(3, 4)
    model.up_blocks[0] = torch.compile(model.up_blocks[0], backend="eager")
    with pytest.raises(ValueError, match=r"module 'up_blocks.0' is compiled"):
        record(model, "up_blocks.0._orig_mod.conv1")
    with record(model, ["up_blocks.0", "head"]) as recording:  # around the compiled part hooks run
        model(x)
    assert list(recording) == ["up_blocks.0", "head"]
    model.up_blocks[1].compile(backend="eager")
    for name in ("up_blocks.1.conv1", "up_blocks.1"):
        with pytest.raises(ValueError, match="compiled in place"):
            record(model, name)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="the model was compiled in place"):
        record(model, "head")


def test_compiling_inside_breaks_the_graph_at_the_hooks():
    torch._dynamo.reset()  # code compiled in an earlier test would be taken, and it knows no hooks
    model, x = Net(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager")
    with record(model, "up_blocks.1.act") as recording:
        got = compiled(x)
    want = model.up_blocks[1].act(model.up_blocks[1].conv1(model.up_blocks[0](x)))
    torch.testing.assert_close(recording["up_blocks.1.act"].mean, want.mean(1))
    torch.testing.assert_close(got, model(x))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_scripted_models_are_refused():
    scripted = torch.jit.script(Net())
    with pytest.raises(ValueError, match="the model is a ScriptModule"):
        record(scripted, "head")
    with pytest.raises(ValueError, match="it is a ScriptModule"):
        record(nn.Sequential(torch.jit.script(Block())), "0")


def test_data_parallel():
    model = nn.DataParallel(Net())
    with record(model, "module.head") as recording:  # on one device it calls the module in this thread
        model(torch.randn(3, 4))
    assert len(recording["module.head"]) == 3
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match="DataParallel over 2 devices"):
        record(model, "module.head")
