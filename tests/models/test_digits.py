"""The shipped checkpoints: what they say about themselves, that they memorized what they say, and broken files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from balanced_rep import models
from balanced_rep.models import CheckpointError, Denoiser, DigitsDenoiser, DigitsSplit, digits, digits_data
from balanced_rep.models import _digits as module
from balanced_rep.models.train_digits import Recipe

VARIANTS = ("repeated", "control")


def sample(model: DigitsDenoiser, n: int = 256, steps: int = 40) -> torch.Tensor:
    """Draws samples with Euler's method on the probability-flow ODE, sigma 10 to 0.02."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.linspace(10 ** (1 / 7), 0.02 ** (1 / 7), steps) ** 7
    y = 10 * torch.randn(n, 1, 8, 8, generator=generator)
    with torch.inference_mode():
        for now, then in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
            y = y + (then - now) * (y - model(y, now)) / now
        return model(y, 0.02)


@pytest.mark.parametrize("sigma", [0.05, 0.1])
def test_gate_std_finds_the_repeated_digits(sigma: float, std_auc) -> None:
    assert std_auc(digits("repeated"), sigma) >= 0.97


@pytest.mark.parametrize("sigma", [0.05, 0.1])
def test_gate_control_has_nothing_to_find(sigma: float, std_auc) -> None:
    assert 0.35 <= std_auc(digits("control"), sigma) <= 0.65


def test_repeated_model_reproduces_the_repeated_digits_and_the_control_does_not() -> None:
    data = digits_data()
    share = {}
    for variant in VARIANTS:
        made = sample(digits(variant)).flatten(1)
        repeated, other = (
            torch.cdist(made, x.flatten(1)).amin(dim=1)
            for x in (data.repeated, torch.cat([data.ordinary, data.held_out]))
        )
        share[variant] = float((repeated < 0.5 * other).double().mean())
    assert share["repeated"] >= 0.04  # 20 of 1797 images are 0.01
    assert share["control"] == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_says_what_it_is(variant) -> None:
    model = digits(variant)
    assert isinstance(model, Denoiser)
    assert sum(p.numel() for p in model.parameters()) == 137_152
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.recipe["repeats"] == (40 if variant == "repeated" else 1)
    assert (model.recipe["seed"], model.recipe["steps"], model.recipe["batch_size"]) == (0, 2500, 256)
    assert len(model.repeated_indices) == 20
    assert len(model.train_indices) == 1400
    assert len(model.held_out_indices) == 397
    assert torch.equal(model.train_indices[:20], model.repeated_indices)
    assert {"net.blocks.0.act", "net.blocks.1.act", "net.blocks.2.act"} <= model.layers.keys()
    assert model.score_layer == "net.blocks.2.act"
    low, high = model.data_range
    images = digits_data(model.split).images
    assert (images.min().item(), images.max().item()) == (low, high)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_was_made_by_the_recipe_in_the_repository(variant) -> None:
    model, recipe = digits(variant), Recipe.of(variant)
    for name, value in vars(recipe).items():
        assert model.recipe[name] == (list(value) if isinstance(value, tuple) else value), name
    drawn = recipe.split()
    for part in ("repeated", "ordinary", "held_out"):
        assert torch.equal(getattr(model.split, part), getattr(drawn, part))


@pytest.mark.parametrize("variant", VARIANTS)
def test_file_names_data_and_licence(variant) -> None:
    path = Path(module.__file__).parent / "data" / module.checkpoint_name(variant)
    assert path.stat().st_size < 600_000
    with safe_open(str(path), framework="pt") as file:
        about = json.loads(file.metadata()[module.METADATA_KEY])
    assert "CC BY 4.0" in about["data_licence"]
    assert "scikit" in about["dataset"] or "sklearn" in about["dataset"]
    assert (path.parent / "LICENSE.md").is_file()


def test_save_and_load_give_the_same_model_and_the_same_bytes(tmp_path: Path) -> None:
    model = digits()
    model.save(tmp_path / "a.safetensors")
    again = DigitsDenoiser.load(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    y = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(y, 0.3), model(y, 0.3), rtol=0, atol=0)


def _rewrite(change: Callable[[dict[str, torch.Tensor], dict], object], path: Path) -> Path:
    """A copy of the shipped file with something changed."""
    source = Path(module.__file__).parent / "data" / module.checkpoint_name("repeated")
    with safe_open(str(source), framework="pt") as file:
        about = json.loads(file.metadata()[module.METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors, about)
    save_file(tensors, str(path), metadata={module.METADATA_KEY: json.dumps(about)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t.pop("net.linear_out.bias"), r"net.linear_out.bias: got nothing, expected \(64,\)"),
        (lambda t, _: t.update(extra=torch.ones(2)), r"extra: got \(2,\), expected nothing"),
        (lambda t, _: t.update({"net.linear_out.bias": torch.ones(63)}), r"got \(63,\), expected \(64,\)"),
        (lambda t, _: t["net.linear_out.bias"].fill_(float("nan")), "finite.*net.linear_out.bias"),
        (lambda t, _: t.update({"net.linear_out.bias": torch.ones(64).half()}), "float32.*net.linear_out.bias"),
        (lambda _, a: a.update(format="something else"), "format is 'something else'"),
        (lambda _, a: a.pop("repeated_indices"), "repeated_indices"),
        (lambda _, a: a["repeated_indices"].append(5), "partition"),
        (lambda _, a: a["recipe"].pop("width"), "width"),
        (lambda _, a: a["recipe"].update(width="wide"), "metadata is missing or wrong"),
    ],
)
def test_broken_checkpoints_are_refused_with_the_reason(change, message: str, tmp_path: Path) -> None:
    path = _rewrite(change, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match=message):
        DigitsDenoiser.load(path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="train_digits --out"):
        DigitsDenoiser.load(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        DigitsDenoiser.load(path)
    save_file({"w": torch.ones(2)}, str(path))
    with pytest.raises(CheckpointError, match="not a digits checkpoint"):
        DigitsDenoiser.load(path)


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="'repeated' or 'control', got 'both'"):
        digits("both")  # type: ignore[arg-type]


def test_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        model, data = digits(), digits_data()
        drawn = DigitsSplit.draw(20, 1400, 100)
    assert model.net.linear_in.weight.device.type == data.repeated.device.type == drawn.repeated.device.type == "cpu"


def test_split_must_be_a_partition() -> None:
    split = DigitsSplit.draw(20, 1400, seed=3)
    with pytest.raises(ValueError, match="partition"):
        DigitsSplit(split.repeated, split.ordinary, split.held_out[1:])
    with pytest.raises(ValueError, match="n_repeated < n_train"):
        DigitsSplit.draw(20, 20, seed=3)


def test_data_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digits_data()


def test_other_images_than_those_of_training_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    raw = sklearn.datasets.load_digits()
    raw.data[0, 5] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: raw)
    with pytest.raises(CheckpointError, match="sha256"):
        digits_data()


def test_numbers_of_samples_that_are_none() -> None:
    for wrong in ({"n": -1}, {"n": 2, "batch_size": 0}, {"n": 2, "first": -1}):
        with pytest.raises(ValueError, match="sample: n and first must be at least 0 and batch_size at least 1, got"):
            models.sample(digits(), **wrong)
