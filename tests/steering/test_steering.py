"""Directions, their application and exact removal, edits, response curves, linearity."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import balanced_rep as br
from balanced_rep import steering
from balanced_rep.models import Tap, digits, digits_data, start_noise
from balanced_rep.models._noise import noise
from balanced_rep.steering import Direction, direction, steer, steered_samples, window
from balanced_rep.theory import GaussianDenoiser, separable_subset, train_dae

F64 = torch.float64
LAYER = "net.blocks.1"


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(n: int, first: int = 0) -> Tensor:
    return start_noise(n, (1, 8, 8), first=first)


@pytest.fixture(scope="module")
def D() -> Any:
    return digits()


@pytest.fixture(scope="module")
def eights_and_threes() -> tuple[Tensor, Tensor]:
    data = digits_data()
    labels = data.labels[data.split.ordinary]
    return data.ordinary[labels == 8], data.ordinary[labels == 3]


@pytest.fixture(scope="module")
def towards(D: Any, eights_and_threes) -> Direction:
    return direction(D, *eights_and_threes, sigma=0.2, layers=LAYER)


class Conv(nn.Module):
    """A denoiser with a map, tokens and features, heard at inputs and outputs."""

    data_range = (-10.0, 10.0)
    sigma_range = (0.01, 10.0)
    sample_shape = (2, 4, 4)
    null_condition = None

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)
            self.tokens, self.features = nn.Linear(3, 3), nn.Linear(3, 3)

    @property
    def layers(self) -> dict[str, Tap]:
        return {
            "second": Tap("map", "input", "map"),
            "tokens": Tap("tokens", "output", "tokens"),
            "features": Tap("features", "output", "features"),
        }

    def forward(self, y: Tensor, sigma: float | Tensor, cond: Any = None) -> Tensor:
        h = self.first(y).tanh()
        t = self.tokens(h.flatten(2).transpose(1, 2))
        f = self.features(t.mean(1))
        return self.second(h) + t.mean((1, 2)).view(-1, 1, 1, 1) + f.sum(1).view(-1, 1, 1, 1)


# Directions -----------------------------------------------------------------------------------------------------------


def test_a_direction_is_a_mean_or_a_difference_of_means(D: Any, eights_and_threes) -> None:
    positive, negative = (x[:30] for x in eights_and_threes)
    kept: list[Tensor] = []
    handle = D.get_submodule(LAYER).register_forward_hook(lambda m, a, o: kept.append(o))
    with torch.no_grad():
        for x in (positive, negative):
            D(x + 0.2 * noise(torch.arange(30), (1, 8, 8), seed=0, draw=0, like=x), 0.2)
    handle.remove()
    plain = direction(D, positive, sigma=0.2, layers=LAYER, batch_size=7)
    torch.testing.assert_close(plain.vectors[LAYER], kept[0].mean(0), rtol=1e-4, atol=1e-5)
    both = direction(D, positive, negative, sigma=0.2, layers=LAYER)
    torch.testing.assert_close(both.vectors[LAYER], kept[0].mean(0) - kept[1].mean(0), rtol=1e-3, atol=1e-4)
    assert both.square == pytest.approx(both.vectors[LAYER].square().sum().item(), rel=1e-5)


def test_maps_and_tokens_are_averaged(tmp_path: Path) -> None:
    model = Conv()
    x = torch.randn(5, 2, 4, 4, generator=gen(0))
    found = direction(model, x, sigma=1e-2)
    assert {n: len(v) for n, v in found.vectors.items()} == {"second": 3, "tokens": 3, "features": 3}
    assert found.at == {"second": "input", "tokens": "output", "features": "output"}
    with torch.no_grad():
        h = model.first(x).tanh()
        torch.testing.assert_close(found.vectors["second"], h.mean((0, 2, 3)), rtol=0.05, atol=0.02)
    found.save(tmp_path / "v.safetensors")
    again = Direction.load(tmp_path / "v.safetensors")
    assert (again.at, again.kind, again.sigma) == (found.at, found.kind, found.sigma)
    assert found.kind == {"second": "map", "tokens": "tokens", "features": "features"}
    assert all(torch.equal(again.vectors[n], found.vectors[n]) for n in found.vectors)
    assert list(found.only(["tokens"]).vectors) == ["tokens"]
    with pytest.raises(ValueError, match="has no vector for \\['other'\\]"):
        found.only(["other"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(0, 1, 8, 8)}, "no samples are given"),
        ({"x": torch.full((2, 1, 8, 8), 9.0)}, "samples run from 9 to 9"),
        ({"x": torch.full((2, 1, 8, 8), torch.nan)}, "is not finite for some sample"),
        ({"sigma": 100.0}, "sigma=100 is outside"),
        ({"layers": "net.linear_in"}, "a module without a label"),
    ],
)
def test_a_direction_that_cannot_be_had(D: Any, change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 1, 8, 8), "sigma": 0.2, "layers": LAYER, **change}
    with pytest.raises(ValueError, match=message):
        direction(D, arguments.pop("x"), **arguments)


def test_a_file_that_is_no_direction(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a direction"):
        Direction.load(tmp_path / "x")


# Application ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_added_is_strength_times_vector() -> None:
    model, x = Conv(), torch.randn(3, 2, 4, 4, generator=gen(0))
    v = torch.tensor([1.0, -2.0, 0.5])
    h = model.first(x).tanh()
    t = model.tokens(h.flatten(2).transpose(1, 2))
    strengths = torch.tensor([0.0, 0.5, 2.0])
    with steer(model, Direction({"second": v}, {"second": "input"}, {"second": "map"}, 1.0), strengths):
        got = model(x, 1.0)
    moved = h + strengths.view(-1, 1, 1, 1) * v.view(1, 3, 1, 1)
    plain = model(x, 1.0)
    torch.testing.assert_close(got, plain - model.second(h) + model.second(moved))
    with steer(model, Direction({"tokens": v}, {"tokens": "output"}, {"tokens": "tokens"}, 1.0), 0.7):
        got = model(x, 1.0)
    moved_t = t + 0.7 * v
    want = (
        model.second(h)
        + moved_t.mean((1, 2)).view(-1, 1, 1, 1)
        + model.features(moved_t.mean(1)).sum(1).view(-1, 1, 1, 1)
    )
    torch.testing.assert_close(got, want)
    with steer(model, Direction({"features": v}, {"features": "output"}, {"features": "features"}, 1.0), 2.0):
        torch.testing.assert_close(model(x, 1.0), plain + 2 * v.sum())
    signal = torch.zeros(2, 3, 3)  # (n, channels, length) looks like tokens and is a map
    for kind, want in (("map", v.view(1, 3, 1)), ("tokens", v)):
        with steer(layer := nn.Identity(), Direction({"": v}, {"": "output"}, {"": kind}, 1.0), 1.0):
            torch.testing.assert_close(layer(signal), want.expand(2, 3, 3))


@torch.no_grad()
def test_the_model_is_exactly_restored_also_after_an_error(D: Any, towards: Direction) -> None:
    y = start(4)
    before = D(y, 0.5)
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in D.named_modules()}
    with steer(D, towards, 1.0):
        assert not torch.equal(D(y, 0.5), before)
    with pytest.raises(RuntimeError, match="stop"), steer(D, towards, lambda s: 1.0):
        raise RuntimeError("stop")
    with steer(D, towards, 0.0):
        assert torch.equal(D(y, 0.5), before)  # bit for bit
    assert torch.equal(D(y, 0.5), before)
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in D.named_modules()} == hooks


@torch.no_grad()
def test_a_strength_that_depends_on_the_noise_level(D: Any, towards: Direction) -> None:
    y = start(2)
    with steer(D, towards, window(1.0, 0.2, 1.0)):
        assert torch.equal(D(y, 0.1), digits()(y, 0.1))
        inside = D(y, 0.5)
        with pytest.raises(ValueError, match="needs one level per pass"):
            D(y, torch.tensor([0.1, 0.5]))
    with steer(D, towards, 1.0):
        assert torch.equal(D(y, 0.5), inside)
    with steer(D, towards, lambda level: level * 2):
        torch.testing.assert_close(D(y, 0.5), inside)


def test_what_does_not_fit(D: Any, towards: Direction) -> None:
    wrong = Direction({LAYER: torch.ones(5)}, {LAYER: "output"}, {LAYER: "features"}, 0.2)
    for model in (D, nn.Sequential(nn.Linear(3, 128))):  # of a label, or of the layer itself
        name = LAYER if model is D else "0"
        other = Direction({name: torch.ones(5)}, {name: "output"}, {name: "features"}, 0.2)
        entered = False
        with pytest.raises(ValueError, match=f"layer '{name}' of this model has 128 units and its vector 5"):
            with steer(model, other, 1.0):
                entered = True
        assert not entered
    with pytest.raises(ValueError, match=r"project: layer 'net.blocks.1' of this model has 128 units"):
        steering.project(D, wrong, start(1))
    hidden = nn.Sequential(nn.Identity())  # that has units, but does not say how many
    with pytest.raises(ValueError, match="layer '0' of this model has 3 units"), steer(hidden, other, 1.0):
        hidden(torch.zeros(2, 3))
    with (
        pytest.raises(ValueError, match=r"no layer 'nowhere'.* It has such as \w"),
        steer(D, Direction({"nowhere": torch.ones(1)}, {"nowhere": "output"}, {"nowhere": "map"}, 1), 1.0),
    ):
        pass
    with pytest.raises(ValueError, match="3 strengths for a batch of 2"), steer(D, towards, torch.ones(3)):
        D(start(2), 0.5)
    with pytest.raises(TypeError, match="a module or a pipeline"), steer(lambda y: y, towards, 1.0):
        pass
    with pytest.raises(TypeError, match=r"a Direction is needed, see steering.direction, got dict"):
        steer(D, towards.vectors, 1.0).__enter__()  # pyright: ignore[reportArgumentType]
    strengths: tuple[Any, ...] = ("1", None, [1.0], math.nan, math.inf, torch.tensor([1.0, math.nan]), torch.ones(1, 1))
    for strength in strengths:
        with pytest.raises((TypeError, ValueError), match=r"steer: (a strength is|strengths must be|a tensor of str)"):
            steer(D, towards, strength).__enter__()
        if not isinstance(strength, Tensor):
            with pytest.raises((TypeError, ValueError), match=r"steer: (a strength is|strengths must be)"):
                with steer(D, towards, lambda level, s=strength: s):
                    D(start(1), 0.5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in D.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": {LAYER: "maps"}}, f"kind one of features, map, tokens, got 'output' and 'maps' for '{LAYER}'"),
        ({"at": {LAYER: "outputs"}}, "at is one of input, output"),
        ({"at": {}}, "must be of the same layers"),
        ({"vectors": {}, "at": {}, "kind": {}}, "one or more, got"),
        ({"vectors": {LAYER: torch.ones(1, 128)}}, r"must be finite floating point \(units,\), got \(1, 128\)"),
        ({"vectors": {LAYER: torch.full((128,), torch.nan)}}, "must be finite floating point"),
    ],
)
def test_a_direction_that_does_not_fit_together(towards: Direction, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(towards, **change)


@torch.no_grad()
def test_a_stable_diffusion_pipeline_is_steered() -> None:
    diffusers = pytest.importorskip("diffusers")
    from tests.models import networks

    pipeline = diffusers.StableDiffusionPipeline(
        vae=networks.vae(), text_encoder=None, tokenizer=None, unet=networks.network("sd"),
        scheduler=networks.scheduler("sd"), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    D = br.models.from_diffusers(pipeline, null_condition=networks.condition("sd", 1))
    layers = [name for name in D.layers if name.startswith("net.up_blocks.0")]
    latents = torch.randn(3, 4, 8, 8, generator=gen(0))
    v = direction(D, latents, sigma=0.5, layers=layers, cond=networks.condition("sd", 3))

    def run() -> Tensor:
        return pipeline(
            prompt_embeds=networks.condition("sd", 1), negative_prompt_embeds=networks.condition("sd", 1, 5),
            num_inference_steps=3, height=16, width=16, output_type="latent", latents=latents[:1],
        ).images  # fmt: skip

    plain = run()
    with steer(pipeline, v, 3.0):
        steered = run()
    with steer(pipeline, v, window(3.0, 5000, 6000)):  # of timesteps: none
        outside = run()
    assert not torch.allclose(steered, plain)
    assert torch.equal(outside, plain)
    assert torch.equal(run(), plain)


# Edits ----------------------------------------------------------------------------------------------------------------


def test_all_strengths_in_one_batch_and_none_at_zero(D: Any, towards: Direction) -> None:
    z = start(3)
    edits = steered_samples(D, towards, z, (0.0, 0.5, 1.0), n_steps=8)
    assert edits.shape == (3, 3, 1, 8, 8)
    torch.testing.assert_close(edits[0], br.models.sample(D, 3, n_steps=8), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(edits[2:], steered_samples(D, towards, z, (1.0,), n_steps=8), rtol=1e-3, atol=1e-3)
    late = steered_samples(D, towards, z, (1.0,), n_steps=8, steps=(0.5, 0.75))
    levels = br.models.sigma_schedule(D, 8)
    with steer(D, towards, window(1.0, levels[5], levels[4])):  # the fifth and the sixth step
        torch.testing.assert_close(late[0], br.models.sample(D, 3, n_steps=8), rtol=1e-4, atol=1e-4)
    assert ((edits[2] - edits[0]).flatten(1).norm(dim=1) > 0.05).all()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((0.9, 0.1), r"0 <= start < end <= 1, got \(0.9, 0.1\); a window that is .* reversed edits nothing"),
        ((0.5, 0.5), "0 <= start < end <= 1"),
        ((-0.1, 0.5), "0 <= start < end <= 1"),
        ((0.5, 1.1), "0 <= start < end <= 1"),
        ((math.nan, 0.5), "0 <= start < end <= 1"),
        ((0.5,), r"two fractions .*got \(0.5,\)"),
        ((0.5, 0.51), r"steps=\(0.5, 0.51\) holds none of the 8 steps; take a wider window, or more steps"),
    ],
)
def test_a_window_in_which_nothing_is_edited(D: Any, towards: Direction, steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steered_samples(D, towards, start(1), (0.0, 1.0), n_steps=8, steps=steps)
    with pytest.raises(ValueError, match=r"low must be at most high, got 1.0 and 0.5: it would act nowhere"):
        window(1.0, 1.0, 0.5)
    with pytest.raises(ValueError, match="window: strengths must be finite, got nan"):
        window(math.nan, 0.5, 1.0)


@pytest.mark.parametrize("strengths", [(), (math.nan,), (0.0, math.inf), ("1",), "1", 1.0, (None,), torch.ones(1, 1)])
def test_strengths_that_are_none(D: Any, towards: Direction, strengths: Any) -> None:
    z = start(1)
    calls = {
        "steered_samples": lambda: steered_samples(D, towards, z, strengths),
        "interpolated_samples": lambda: steering.interpolated_samples(D, z, strengths, cond=None, target=None),
        "sdedit_samples": lambda: steering.sdedit_samples(D, z, strengths),
        "response": lambda: steering.response(D, towards, z[None], strengths),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: strengths must be finite numbers, at least one, such as"):
            call()


def test_strengths_of_every_kind_of_sequence(D: Any, towards: Direction) -> None:
    want = steered_samples(D, towards, start(1), (0.0, 1.0), n_steps=4)
    for strengths in ([0, 1], torch.arange(2), np.arange(2, dtype=np.float32), list(torch.arange(2.0))):
        assert torch.equal(steered_samples(D, towards, start(1), strengths, n_steps=4), want)


def test_a_sample_without_a_batch(D: Any, towards: Direction) -> None:
    z = start(1)[0]
    calls = {
        "steered_samples: start": lambda z: steered_samples(D, towards, z, (1.0,)),
        "interpolated_samples: start": lambda z: steering.interpolated_samples(D, z, (1.0,), cond=None, target=None),
        "sdedit_samples: x": lambda z: steering.sdedit_samples(D, z, (1.0,)),
    }
    for name, call in calls.items():
        message = rf"{name} must be a floating-point tensor \(n, 1, 8, 8\), got \(1, 8, 8\) .* For one sample give"
        with pytest.raises(ValueError, match=message):
            call(z)
        with pytest.raises(ValueError, match=r"got \(2, 1, 4, 4\) torch.float32\.$"):
            call(torch.zeros(2, 1, 4, 4))


def test_sdedit_starts_from_the_image_or_from_noise(D: Any) -> None:
    x = digits_data().images[:3]
    edits = steering.sdedit_samples(D, x, (0.0, 0.3, 1.0), n_steps=10)
    assert torch.equal(edits[0], x)
    near, far = ((e - x).flatten(1).norm(dim=1) for e in edits[1:])
    assert (near < far).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        steering.sdedit_samples(D, x, (2.0,))


def test_interpolated_conditions(toy) -> None:
    z = torch.randn(2, 1, 2, 2, dtype=F64, generator=gen(0))
    a, b = (torch.randn(2, 2, 3, dtype=F64, generator=gen(i)) for i in (1, 2))
    edits = steering.interpolated_samples(toy, z, (0.0, 0.5, 1.0), cond=a, target=b, n_steps=4)
    levels = br.models.sigma_schedule(toy, 4)
    for edit, cond in zip(edits, (a, (a + b) / 2, b), strict=True):
        *_, last = br.models.denoising_path(toy, levels[0] * z, levels, cond=cond)
        torch.testing.assert_close(edit, last.y)
    with pytest.raises(ValueError, match="classes cannot be interpolated"):
        steering.interpolated_samples(toy, z, (0.0,), cond=torch.ones(2, dtype=torch.int64), target=torch.ones(2))


# Responses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ((math.nan, 0.1), "sigma=nan is outside"),
        ((-1.0, 0.0), "sigma=-1 is outside"),
        ((1e6, 1.0, 0.0), r"sigma=1e\+06 is outside what this model was made for, 0.01 to 10"),
        ((0.1, 0.5, 0.0), "noise levels must decrease, and only the last one may be 0; got 0.1, 0.5, 0"),
        ((1.0, 0.0, 0.0), "noise levels must decrease"),
        ((), "no noise level is given"),
    ],
)
def test_noise_levels_that_are_none(D: Any, towards: Direction, sigmas: tuple[float, ...], message: str) -> None:
    z = torch.zeros(1, 1, 8, 8)
    calls = [
        lambda: br.models.sample(D, 1, sigmas=sigmas),
        lambda: br.models.denoising_path(D, z, sigmas),
        lambda: steering.steered_samples(D, towards, z, [0.0, 1.0], sigmas=sigmas),
        lambda: steering.interpolated_samples(D, z, [0.0], cond=None, target=None, sigmas=sigmas),
    ]
    if len(sigmas) == 2:
        calls += [
            lambda: steering.local_linearity(D, z, sigmas[0]),
            lambda: steering.response_derivative(D, towards, z, sigmas[0]),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_measures_of_a_curve() -> None:
    straight = torch.linspace(0, 2, 5, dtype=F64)
    threshold = torch.tensor([0, 0, 0, 2, 2], dtype=F64)
    falling = -straight
    found = steering.Response(torch.linspace(0, 1, 5), torch.stack([straight, threshold, falling], 1))
    assert found.range.tolist() == [2, 2, 2]
    torch.testing.assert_close(found.jump, torch.tensor([0.25, 1.0, 0.25], dtype=F64))
    torch.testing.assert_close(found.roughness, torch.tensor([0.0, 1.0, 0.0], dtype=F64))
    assert found.monotone.tolist() == [1.0, 1.0, 0.0]
    torch.testing.assert_close(found.onset()[:2], torch.tensor([0.1, 0.525], dtype=F64))
    torch.testing.assert_close(found.onset(0.5)[:2], torch.tensor([0.5, 0.625], dtype=F64))
    assert found.onset().isnan().tolist() == [False, False, True]
    two = steering.Response(torch.tensor([0.0, 1.0]), torch.tensor([[0.0], [1.0]]))
    assert two.jump == 1
    with pytest.raises(ValueError, match="needs three strengths or more, got 2"):
        _ = two.roughness
    uneven = steering.Response(torch.tensor([0.0, 0.5, 2.0]), torch.tensor([[0.0], [1.0], [4.0]]))
    with pytest.raises(ValueError, match=r"equally spaced, got \[0.0, 0.5, 2.0\]"):
        _ = uneven.roughness


def test_response_is_the_coordinate_along_the_direction(D: Any, towards: Direction, eights_and_threes) -> None:
    eights, threes = (x[:40] for x in eights_and_threes)
    found = steering.response(D, towards, torch.stack([threes, eights]), (0.0, 1.0))
    assert found.values[0].abs().max() == 0
    assert found.values[1].mean().item() == pytest.approx(1.0, abs=0.25)  # from one mean to the other
    with pytest.raises(ValueError, match="at least two of each"):
        steering.response(D, towards, threes[None], (0.0,))


def test_projecting_on_a_layer_that_is_not_there_leaves_no_hook(D: Any, towards: Direction) -> None:
    missing = replace(
        towards,
        vectors={**towards.vectors, "net.gone": towards.vectors[LAYER]},
        at={**towards.at, "net.gone": "output"},
        kind={**towards.kind, "net.gone": "features"},
    )
    with pytest.raises(ValueError, match=r"the model has no layer 'net\.gone'"):
        steering.project(D, missing, start(1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in D.modules())


def test_derivative_of_the_response(towards: Direction) -> None:
    D = digits().double()
    y = 0.5 * start(4).double()
    got = steering.response_derivative(D, towards, y, 0.5)

    def at(a: float) -> Tensor:
        with torch.no_grad():
            with steer(D, towards, a):
                x = D(y, 0.5)
            return steering.project(D, towards, x)

    h = 1e-5
    torch.testing.assert_close(got, (at(h) - at(-h)) / (2 * h), rtol=1e-5, atol=1e-7)
    assert got.abs().min() > 0


def test_a_sample_does_not_meet_the_noise_that_it_came_from(D: Any) -> None:
    x = br.models.sample(D, 64)
    begun, scored = start(64), noise(torch.arange(64), (1, 8, 8), seed=0, draw=0, like=x)
    assert abs(torch.corrcoef(torch.stack([begun.flatten(), scored.flatten()]))[0, 1]) < 0.06  # 4 / sqrt(64 * 64)
    again = steering.sdedit_samples(D, x, [1.0])[0]
    assert ((again - x).flatten(1).norm(dim=1) > 0.1).double().mean() > 0.9


def test_memorized_samples_answer_less_to_a_weak_push(D: Any, towards: Direction) -> None:
    """The paper's Section 4.2 in numbers: generalized samples follow at once, memorized ones hold out."""
    data, z = digits_data(), start(512)
    x = br.models.sample(D, 512)
    flat = data.images.flatten(1)
    others = torch.cat([data.split.ordinary, data.split.held_out])
    near, far = (torch.cdist(x.flatten(1), flat[part]).amin(1) for part in (data.split.repeated, others))
    memorized, general = (rows.nonzero().flatten()[:40] for rows in (near < 0.5 * far, far < near))
    assert len(memorized) >= 30
    strengths = torch.linspace(0, 1, 6).tolist()
    curves = [
        steering.response(D, towards, steered_samples(D, towards, z[rows], strengths, steps=(0.25, 0.95)), strengths)
        for rows in (memorized, general)
    ]
    assert curves[1].values[-1].median() > 2 * curves[0].values[-1].median()
    assert curves[1].monotone.median() > 0.95 > curves[0].monotone.median()


# Linearity -----------------------------------------------------------------------------------------------------------


def test_local_linearity(D: Any) -> None:
    images = digits_data().images.flatten(1)
    five = images[separable_subset(images, 5)]
    model = train_dae(five - five.mean(0), 20, sigma=0.2, lam=0.01, steps=100).model
    y = torch.randn(6, 64, generator=gen(0))
    assert steering.local_linearity(model, y, 0.2).error.max() < 1e-5  # ReLU without biases
    centred = GaussianDenoiser(torch.zeros(4, dtype=F64), torch.diag(torch.arange(4, dtype=F64)))
    z = torch.randn(3, 4, dtype=F64, generator=gen(1))
    exact = steering.local_linearity(centred, z, 0.5)
    torch.testing.assert_close(exact.gain, torch.ones(3, dtype=F64))
    shifted = GaussianDenoiser(torch.ones(4, dtype=F64), torch.diag(torch.arange(4, dtype=F64)))
    assert (steering.local_linearity(shifted, z, 0.5).error > 0.01).all()
    found = steering.local_linearity(D, digits_data().images[:8] + 0.1 * start(8), 0.1)
    assert ((found.cosine > 0.5) & (found.error < 1)).all()
