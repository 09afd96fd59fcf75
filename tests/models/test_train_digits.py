"""The training script: it learns, draws what the recipe says, is reproducible, and leaves no trace in torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from balanced_rep.models import DigitsDenoiser, digits_data
from balanced_rep.models import train_digits as module
from balanced_rep.models.train_digits import Recipe, main, train_digits

SHORT = replace(Recipe(), steps=60, warmup_steps=10)


def test_a_few_steps_lower_the_loss() -> None:
    losses: list[float] = []
    model = train_digits(SHORT, on_step=lambda _, loss: losses.append(loss))
    assert len(losses) == SHORT.steps
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert model.recipe["final_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-3)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_the_averaged_weights_learn_too() -> None:
    trained, untrained = (train_digits(replace(SHORT, steps=steps)) for steps in (60, 1))
    x = digits_data(trained.split).images
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    error = [(model(x + 0.5 * noise, 0.5) - x).square().mean().item() for model in (trained, untrained)]
    assert error[0] < 0.7 * error[1]


def test_same_seed_same_bytes_other_seed_other_model(tmp_path: Path) -> None:
    recipe = replace(SHORT, steps=5)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_digits(replace(recipe, seed=seed)).save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_leaves_generator_and_threads_of_torch_alone() -> None:
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    seen: list[int] = []
    train_digits(replace(SHORT, steps=2), on_step=lambda *_: seen.append(torch.get_num_threads()))
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("variant", "share"), [("repeated", 20 * 40 / (20 * 40 + 1380)), ("control", 20 / 1400)])
def test_repeated_images_come_as_often_as_the_recipe_says(variant, share: float, monkeypatch) -> None:
    drawn: list[torch.Tensor] = []
    loss = module.edm_loss
    monkeypatch.setattr(module, "edm_loss", lambda model, x, *rest: (drawn.append(x), loss(model, x, *rest))[1])
    recipe = replace(Recipe.of(variant), steps=40)
    model = train_digits(recipe)
    data = digits_data(model.split)
    seen = torch.cat(drawn).flatten(1)
    hits = (torch.cdist(seen, data.repeated.flatten(1)).amin(dim=1) < 1e-3).double().mean().item()
    spread = (share * (1 - share) / len(seen)) ** 0.5
    assert abs(hits - share) < 5 * spread
    assert torch.cdist(seen, data.held_out.flatten(1)).min() > 0  # the digits are all different


def test_schedules() -> None:
    recipe = Recipe()
    rates = [recipe.learning_rate_at(step) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(2e-3 / 50)
    assert rates[49] == rates[1499] == 2e-3
    assert rates[2000] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(2e-3 * 0.02)
    assert recipe.ema_decay_at(0) == pytest.approx(1 / 11)
    assert recipe.ema_decay_at(2499) == pytest.approx(1 - 10 / 2510)
    assert recipe.ema_decay_at(10**6) == 0.998


@pytest.mark.parametrize("control", [False, True])
def test_script_writes_a_checkpoint_that_loads(control: bool, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "folder"
    assert main(["--out", str(out), "--steps", "3", "--seed", "5", *(["--control"] if control else [])]) == 0
    path = out / f"digits_{'control' if control else 'repeated'}.safetensors"
    model = DigitsDenoiser.load(path)
    assert (model.recipe["seed"], model.recipe["steps"]) == (5, 3)
    assert model.recipe["repeats"] == (1 if control else 40)
    assert str(path) in capsys.readouterr().out


def test_script_with_a_folder_that_cannot_be_made(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "folder"), "--steps", "1"]) == 1
    assert "Give another folder to --out" in capsys.readouterr().err


@pytest.mark.slow
def test_retraining_in_full_passes_the_gates(std_auc) -> None:
    assert std_auc(train_digits(), 0.1) >= 0.97
    assert 0.35 <= std_auc(train_digits(Recipe.of("control")), 0.1) <= 0.65
