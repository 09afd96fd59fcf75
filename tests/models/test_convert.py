"""Pickled networks: what comes out of a good one, and that nothing of a bad one runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from balanced_rep.cli import app
from balanced_rep.models import ConversionError, _convert, convert
from balanced_rep.models._convert_read import read
from balanced_rep.models._unpickle import ForbiddenNameError, Plain, read_pickle


class EasyDict(dict):
    pass


class _Persistent:
    """Pickles itself as the networks of EDM do: class name, source code, state."""

    code = "raise SystemExit('the source code in the pickle was run')"

    def __reduce__(self) -> Any:
        meta = EasyDict(
            type="class", version=6, module_src=self.code, class_name=type(self).__name__, state=self.state()
        )
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)

    def state(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_backward")}


class UNet(_Persistent, nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.enc = nn.ModuleDict({"8x8_conv": nn.Conv2d(3, 4, 3)})
        self.map_layer0 = nn.Linear(4, 4)
        self.register_buffer("freqs", torch.arange(4.0))
        self._init_kwargs = EasyDict(img_resolution=8, channel_mult=[1, 2], note=object)


class EDMPrecond(_Persistent, nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.img_resolution, self.img_channels, self.label_dim = 8, 3, 0
        self.sigma_min, self.sigma_max, self.sigma_data, self.use_fp16 = 0, float("inf"), 0.5, False
        self._init_args, self._init_kwargs = (), EasyDict(img_resolution=8, model_type="SongUNet")
        self.model = UNet()


@pytest.fixture
def foreign_modules() -> Iterator[None]:
    """The modules that a pickle of EDM names, while it is written; when it is read they are gone."""

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("the real function was called")

    util, persistence = types.ModuleType("dnnlib.util"), types.ModuleType("torch_utils.persistence")
    util.EasyDict = EasyDict
    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    made = {"dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util, "torch_utils": types.ModuleType("torch_utils")}
    made["torch_utils.persistence"] = persistence
    sys.modules.update(made)
    yield
    for name in made:
        del sys.modules[name]


@pytest.fixture
def network() -> EDMPrecond:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = EDMPrecond()
    network.model._init_kwargs = EasyDict(img_resolution=8, channel_mult=[1, 2], dropout=0.1)
    return network


def test_a_network_of_edm(foreign_modules: None, network: EDMPrecond, tmp_path: Path) -> None:
    network.model.half_precision = torch.ones(3, dtype=torch.float16)  # an attribute, no parameter
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": network, "loss_fn": EasyDict(P_mean=-1.2)}))
    done = convert(tmp_path / "edm.pkl", tmp_path / "out")
    tensors = load_file(done.weights)
    want = nn.Module.state_dict(network)
    assert set(tensors) == set(want) == {
        "model.enc.8x8_conv.weight", "model.enc.8x8_conv.bias", "model.map_layer0.weight", "model.map_layer0.bias",
        "model.freqs",
    }  # fmt: skip
    assert all(torch.equal(tensors[name], want[name]) for name in want)
    assert (done.n_tensors, done.n_parameters) == (5, sum(t.numel() for t in want.values()))
    config = json.loads(done.config.read_text())
    assert config["entry"] == "ema"
    assert config["class"] == "EDMPrecond"
    assert config["arguments"] == {"img_resolution": 8, "model_type": "SongUNet"}
    assert config["attributes"]["sigma_max"] == "inf"
    assert config["inner"]["arguments"]["channel_mult"] == [1, 2]
    assert "module_src" not in done.config.read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(FileExistsError, match="give another folder"):
        convert(tmp_path / "edm.pkl", tmp_path / "out")


def test_which_network(foreign_modules: None, network: EDMPrecond, tmp_path: Path) -> None:
    (tmp_path / "two.pkl").write_bytes(pickle.dumps({"a": network, "b": network.model}))
    with pytest.raises(ConversionError, match=r"Those with tensors are a, b; choose one with --key"):
        convert(tmp_path / "two.pkl", tmp_path / "out")
    done = convert(tmp_path / "two.pkl", tmp_path / "out", key="b")
    assert json.loads(done.config.read_text())["class"] == "UNet"
    with pytest.raises(ConversionError, match="no entry 'c'; those with tensors are a, b"):
        convert(tmp_path / "two.pkl", tmp_path / "out2", key="c")


def test_a_checkpoint_of_torch(tmp_path: Path) -> None:
    torch.save({"model": {"a.weight": torch.arange(6.0).view(2, 3).T}, "step": 3}, tmp_path / "x.pt")
    ran = CliRunner().invoke(app, ["convert", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--json"])
    done = json.loads(ran.stdout)
    assert (ran.exit_code, done["n_tensors"], done["n_parameters"]) == (0, 1, 6)
    assert torch.equal(load_file(done["weights"])["a.weight"], torch.arange(6.0).view(2, 3).T)


class Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def nested(depth: int, width: int) -> dict[str, Any]:
    """A small file; walked, it has width ** depth entries."""
    found: dict[str, Any] = {"tensor": 0}
    for _ in range(depth):
        found = {str(i): found for i in range(width)}
    return found


def evil_pickles(mark: Path) -> dict[str, tuple[bytes, str]]:
    command = f"echo x > {mark}"
    legacy = io.BytesIO()
    torch.save(Evil(os.system, command), legacy, _use_new_zipfile_serialization=False)
    return {
        "os.system": (pickle.dumps(Evil(os.system, command)), "names posix.system"),
        "eval": (pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')")), "names builtins.eval"),
        "exec": (pickle.dumps({"ema": Evil(exec, f"open({str(mark)!r}, 'w')")}), "names builtins.exec"),
        "getattr": (pickle.dumps(Evil(getattr, "x", "upper")), "names builtins.getattr"),
        "import": (pickle.dumps(Evil(__import__, "os")), "names builtins.__import__"),
        "torch.load": (pickle.dumps(Evil(torch.load, io.BytesIO)), "names torch"),
        "torch.hub": (b"\x80\x04\x8c\x09torch.hub\x94\x8c\x04load\x94\x93.", "names torch.hub.load"),
        "inner torch file": (pickle.dumps(Evil(torch.storage._load_from_bytes, legacy.getvalue())), ""),
        "protocol 0": (b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.", "names posix.system"),
        "inst": (b"(S'" + command.encode() + b"'\niposix\nsystem\n.", "names posix.system"),
        "persistent id": (b"\x80\x04\x8c\x01x\x51.", "outside the file"),
        "memory that is none": (
            b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00)))t\x52.", "a tensor over int"
        ),
        "truncated": (pickle.dumps({"ema": [1] * 100})[:50], "it is no pickle, or not a whole one"),
        "no pickle": (b"torch is no stack", "it is no pickle, or not a whole one"),
        "empty": (b"", "it is no pickle, or not a whole one"),
        "a number": (pickle.dumps(5), "no tensors"),
        "memo": (b"\x80\x04]r\xff\xff\xff\xf0.", "more memory"),
        "length": (b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b".", ""),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(evil_pickles(Path("x"))))
def test_nothing_of_a_bad_file_runs(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    content, message = evil_pickles(mark)[kind]
    if kind not in ("a number", "memo"):  # a good file; a matter of limits
        with pytest.raises(
            (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, TypeError, RuntimeError, MemoryError)
        ):
            read_pickle(io.BytesIO(content))
    assert not mark.exists()
    if kind in ("exec", "inner torch file", "truncated", "no pickle", "memo"):  # a process each
        (tmp_path / "bad.pkl").write_bytes(content)
        with pytest.raises(ConversionError, match=f"bad.pkl: .*{message}"):
            convert(tmp_path / "bad.pkl", tmp_path / "out")
        assert not mark.exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pkl"]  # not even an empty folder


CONFINED = """
import ctypes, errno, json, os, runpy, socket, subprocess, sys
child = runpy.run_path(sys.argv[1])
os.chdir(sys.argv[2])
kept = open("kept", "wb")
network, files = child["limit"](1)
libc = ctypes.CDLL(None, use_errno=True)
native = {
    "open": lambda: libc.open(b"made", os.O_CREAT | os.O_WRONLY, 0o600), "mkdir": lambda: libc.mkdir(b"made", 0o700),
    "unlink": lambda: libc.unlink(b"old"), "rename": lambda: libc.rename(b"old", b"made"),
    "symlink": lambda: libc.symlink(b"old", b"made"), "truncate": lambda: libc.truncate(b"old", 0),
    "execv": lambda: libc.execv(b"/bin/true", None),
}
refused = {name: call() == -1 for name, call in native.items()}
child["forbid"]()
python = {
    "open": lambda: open("made", "w"), "append": lambda: open("old", "a"), "update": lambda: open("old", "r+"),
    "os.open": lambda: os.open("made", os.O_CREAT | os.O_WRONLY), "truncate": lambda: os.truncate("old", 0),
    "mkdir": lambda: os.mkdir("made"), "utime": lambda: os.utime("old"), "chmod": lambda: os.chmod("old", 0o600),
    "link": lambda: os.link("old", "made"), "kill": lambda: os.kill(0, 0), "system": lambda: os.system("true"),
    "Popen": lambda: subprocess.Popen(["true"]), "fork": lambda: os.fork(),
    "sendto": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)),
    "native": lambda: ctypes.CDLL(None), "putenv": lambda: os.putenv("a", "b"),
}
for name, call in python.items():
    try:
        call()
        refused["python " + name] = False
    except PermissionError as error:
        refused["python " + name] = "forbidden while" in str(error)
refused["reading"] = open("old").read() != "old"
kept.write(b"kept")
kept.close()
print(json.dumps([files, refused]))
"""


def test_what_the_reading_process_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    child = Path(_convert.__file__).with_name("_convert_child.py")
    command = [sys.executable, "-c", CONFINED, str(child), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files, refused = json.loads(done.stdout)
    if files:  # the kernel knows Landlock
        assert {name for name, no in refused.items() if not no} == {"reading"}
        assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "old"]
    assert all(no for name, no in refused.items() if name.startswith("python"))
    assert (tmp_path / "old").read_text() == "old"
    assert (tmp_path / "kept").read_text() == "kept"


def test_files_that_cannot_be_taken_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match=r"in the form of torch before 1.6, which is not read. Save it again"):
        convert(tmp_path / "old.pt", tmp_path / "deep" / "out")
    torch.save({"model": {"a": {"b": torch.ones(2)}, "a.b": torch.zeros(2)}}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"two of its tensors would be called 'a.b'"):
        read(str(tmp_path / "two.pt"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.pt", "two.pt"]
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "x.pt")
    run = _convert._run_child

    def meanwhile(source: Path, work: Path, key: str) -> dict[str, Any]:
        answer = run(source, work, key)
        source.write_bytes(b"another")
        return answer

    monkeypatch.setattr(_convert, "_run_child", meanwhile)
    with pytest.raises(ConversionError, match="changed while it was read"):
        convert(tmp_path / "x.pt", tmp_path / "out")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ConversionError, match=r"needs torch 2.10 or newer, this is 2.9.1\+cpu"):
        convert(tmp_path / "x.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [(0, (1000,), (1,)), (4, (1,), (1,)), (0, (2, 2), (1, 3)), (3, (2,), (-1,))])
def test_a_view_beyond_its_memory_is_refused(place: tuple) -> None:
    good = pickle.dumps(torch.arange(4.0))
    assert torch.equal(read_pickle(io.BytesIO(good)), torch.arange(4.0))
    rebuild, (storage, *_) = torch.arange(4.0).__reduce_ex__(2)
    with pytest.raises(pickle.UnpicklingError, match=r"reaches beyond its memory of 4"):
        read_pickle(io.BytesIO(pickle.dumps(Evil(rebuild, storage, *place, False, {}))))


def test_a_state_cannot_move_a_tensor_beyond_its_memory(tmp_path: Path) -> None:
    rebuild, (storage, *_) = torch.arange(4.0).__reduce_ex__(2)

    class Moved:
        def __reduce__(self) -> tuple:
            built = storage, 0, (4,), (1,), False, OrderedDict()
            return rebuild, built, (storage, 0, (1000,), (1,))

    with pytest.raises(pickle.UnpicklingError, match="given a state after it was built"):
        read_pickle(io.BytesIO(pickle.dumps({"ema": {"w": Moved()}})))


def test_the_memory_of_a_tensor_is_nothing_else() -> None:
    inner = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, inner)
    with pytest.raises(pickle.UnpicklingError, match="the memory of a tensor holds a dict"):
        read_pickle(io.BytesIO(pickle.dumps(Evil(torch.storage._load_from_bytes, inner.getvalue()))))


def test_classes_of_networks_are_stored_and_not_made() -> None:
    found = read_pickle(io.BytesIO(pickle.dumps(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))))
    assert isinstance(found, Plain)
    assert found.class_name == "Sequential"
    assert list(found.state["_modules"]) == ["0", "1"]
    with pytest.raises(ForbiddenNameError, match=r"names torch.optim"):
        read_pickle(io.BytesIO(pickle.dumps(torch.optim.Adam)))


@pytest.mark.parametrize(("depth", "width"), [(200, 1), (60, 2)])
def test_references_that_never_end_to_walk(depth: int, width: int, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(nested(depth, width)))
    with pytest.raises(ValueError, match="nested too deeply, or has too many entries"):
        read(str(tmp_path / "x.pkl"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        convert(tmp_path / "x.pkl", tmp_path)
    ran = CliRunner().invoke(app, ["convert", str(tmp_path / "x.pkl"), str(tmp_path)])
    assert ran.exit_code == 1
    assert "There is no file" in ran.output


def test_the_name_of_a_class_is_printed_and_not_obeyed(
    foreign_modules: None, network: EDMPrecond, tmp_path: Path
) -> None:
    network.__class__ = type("[bold]Net[/nope]\x1b[31m", (EDMPrecond,), {})
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": network}))
    ran = CliRunner().invoke(app, ["convert", str(tmp_path / "x.pkl"), str(tmp_path / "out")], env={"COLUMNS": "999"})
    assert ran.exit_code == 0, ran.output
    assert "[bold]Net[/nope]?[31m" in ran.output
    assert "\x1b" not in ran.output
