"""Every score against its formula; what they have in common; and what they say of bad input."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import balanced_rep as br
from balanced_rep import detection
from balanced_rep.models import Tap, digits, digits_data
from balanced_rep.models._noise import noise
from balanced_rep.theory import GaussianDenoiser

F64 = torch.float64


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(n: int, shape: tuple[int, ...], draw: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return noise(torch.arange(n), shape, seed=0, draw=draw, like=torch.empty(0, dtype=dtype))


@pytest.fixture(scope="module")
def digit_samples() -> Tensor:
    return digits_data().images[:30]


# Of samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["std", "std_over_l2", "active_fraction"])
def test_representation_std(digit_samples: Tensor, statistic: str) -> None:
    D, sigmas = digits(), [0.1, 0.4]
    score = detection.get("representation_std", statistic=statistic, n_draws=2)
    got = score(D, digit_samples, sigma=sigmas, seed=0, batch_size=7)
    assert got.values.shape == (6, 2, 30)
    assert got.layers == tuple(D.layers)
    assert got.forwards == 4
    for j, sigma in enumerate(sigmas):
        want = []
        for draw in range(2):
            y = digit_samples + sigma * draws(30, (1, 8, 8), draw, torch.float32)
            with torch.no_grad(), br.record(D, list(D.layers)) as recording:
                D(y, sigma)
            want.append(torch.stack([getattr(recording[name], statistic) for name in D.layers]))
        torch.testing.assert_close(got.values[:, j], torch.stack(want).double().mean(0), rtol=2e-5, atol=1e-6)
    one = score(D, digit_samples, sigma=0.4, layers=D.score_layer)
    assert one.values.shape == (30,)
    torch.testing.assert_close(one.values, got.values[4, 1], rtol=2e-5, atol=1e-6)


def test_representation_of_maps_pools_and_stops(toy, prompts: Tensor) -> None:
    x = torch.randn(7, 1, 2, 2, dtype=F64, generator=gen(1))
    got = detection.get("representation_std", pool="mean", statistic="l2")(toy, x, cond=prompts, sigma=0.5)
    y = x + 0.5 * draws(7, (1, 2, 2))
    want = toy(y, 0.5, prompts).flatten(1).mean(1).abs()
    torch.testing.assert_close(got.values, want[None, None])


def test_denoising_error(digit_samples: Tensor) -> None:
    D = digits()
    got = detection.get("denoising_error", n_draws=3)(D, digit_samples, sigma=[0.2], batch_size=11)
    errors = [D(digit_samples + 0.2 * draws(30, (1, 8, 8), i, torch.float32), 0.2) - digit_samples for i in range(3)]
    want = torch.stack(errors).square().flatten(2).mean(2).double().mean(0)
    torch.testing.assert_close(got.values[0, 0], want, rtol=1e-4, atol=1e-6)
    assert (got.forwards, got.direction) == (3, "low")


def test_jacobian_scores_are_exact_for_small_samples(digit_samples: Tensor) -> None:
    D, x = digits().double(), digit_samples[:5].double()
    y = x + 0.2 * draws(5, (1, 8, 8))
    J = torch.stack([torch.func.jacrev(lambda z: D(z[None], 0.2)[0].flatten())(s).reshape(64, 64) for s in y])
    s = torch.linalg.svdvals(J)
    norm = detection.get("jacobian_norm", n_probes=64)(D, x, sigma=0.2, batch_size=2)
    torch.testing.assert_close(norm.values, s.square().sum(1))
    assert (norm.forwards, norm.tangents) == (4, 64)
    rank = detection.get("jacobian_rank")(D, x, sigma=0.2)
    torch.testing.assert_close(rank.values, s.sum(1).square() / s.square().sum(1))


def test_stable_rank_of_samples_of_any_size(digit_samples: Tensor) -> None:
    D, x = digits().double(), digit_samples[:4].double()
    y = x + 0.2 * draws(4, (1, 8, 8))
    J = torch.stack([torch.func.jacrev(lambda z: D(z[None], 0.2)[0].flatten())(s).reshape(64, 64) for s in y])
    s = torch.linalg.svdvals(J)
    got = detection.get("jacobian_rank", kind="stable", n_probes=64)(D, x, sigma=0.2)
    torch.testing.assert_close(got.values, s.square().sum(1) / s[:, 0].square(), rtol=0.05, atol=0)
    assert got.tangents > 64


def test_jacobian_norm_is_unbiased(digit_samples: Tensor) -> None:
    D, x = digits(), digit_samples[:4]
    exact = detection.get("jacobian_norm", noisy=False)(D, x, sigma=0.2).values
    few = detection.get("jacobian_norm", n_probes=20, noisy=False)
    estimates = torch.stack([few(D, x, sigma=0.2, seed=s).values for s in range(30)])
    error = (estimates.mean(0) - exact) / (estimates.std(0) / 30**0.5)
    assert error.abs().max() < 4


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_flipd_identity_on_a_gaussian(sigma: float) -> None:
    """Oracle 5: d + sigma^2 tr grad s + sigma^2 |s|^2 of the exact score function."""
    A = torch.randn(6, 6, dtype=F64, generator=gen(0))
    covariance, mean = A @ A.T, torch.randn(6, dtype=F64, generator=gen(1))
    x = torch.randn(4, 6, dtype=F64, generator=gen(2))
    total = covariance + sigma**2 * torch.eye(6, dtype=F64)
    s = -(x - mean) @ torch.linalg.inv(total)
    want = 6 - sigma**2 * torch.linalg.inv(total).trace() + sigma**2 * s.square().sum(1)
    got = detection.get("flipd", n_probes=6)(GaussianDenoiser(mean, covariance), x, sigma=sigma)
    torch.testing.assert_close(got.values, want, rtol=0, atol=1e-10)


def test_flipd_is_the_rank_at_small_noise() -> None:
    A = torch.randn(6, 2, dtype=F64, generator=gen(0))
    x = torch.randn(3, 2, dtype=F64, generator=gen(1)) @ A.T
    D = GaussianDenoiser(torch.zeros(6, dtype=F64), A @ A.T)
    values = [detection.get("flipd")(D, x, sigma=s).values for s in (1e-1, 1e-2, 1e-3)]
    off = [(v - 2).abs().max().item() for v in values]
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-4
    D = GaussianDenoiser(torch.zeros(40, dtype=F64), torch.diag(torch.arange(40, dtype=F64)))
    x = torch.randn(3, 40, dtype=F64, generator=gen(3))
    exact = detection.get("flipd", n_probes=40)(D, x, sigma=0.5).values
    # Rademacher probes are exact on a diagonal Jacobian.
    torch.testing.assert_close(detection.get("flipd", n_probes=3)(D, x, sigma=0.5).values, exact)


# Of conditions --------------------------------------------------------------------------------------------------------


def test_noise_difference(toy, prompts: Tensor) -> None:
    got = detection.get("noise_difference", n_draws=2)(toy, cond=prompts, batch_size=3)
    want = torch.zeros(7, dtype=F64)
    for draw in range(2):
        y = 5.0 * draws(7, (1, 2, 2), draw)
        want += (toy(y, 5.0, prompts) - toy(y, 5.0)).flatten(1).norm(dim=1) / 5.0 / 2
    torch.testing.assert_close(got.values, want)
    assert (got.forwards, got.sigmas) == (4, (5.0,))


def test_noise_difference_along_a_path(toy, prompts: Tensor) -> None:
    got = detection.get("noise_difference", n_steps=3, n_total=4, guidance=2.0)(toy, cond=prompts).values
    levels = br.models.sigma_schedule(toy, 4)
    y, want = 5.0 * draws(7, (1, 2, 2)), 0
    for i in range(3):
        c, u = toy(y, levels[i], prompts), toy(y, levels[i])
        want = want + (c - u).flatten(1).norm(dim=1) / levels[i] / 3
        denoised = u + 2.0 * (c - u)
        y = denoised + levels[i + 1] / levels[i] * (y - denoised)
    torch.testing.assert_close(got, want)


def test_sharpness(toy, prompts: Tensor) -> None:
    sigma, y = 2.0, 2.0 * draws(7, (1, 2, 2))
    s_d = (toy(y, sigma, prompts) - toy(y, sigma)) / sigma**2
    gains = (toy.gain(prompts) - toy.gain(toy.null_condition)).flatten() / sigma**2
    got = detection.get("sharpness")(toy, cond=prompts, sigma=sigma, batch_size=4)
    torch.testing.assert_close(got.values, gains.abs() * s_d.flatten(1).norm(dim=1))
    assert (got.forwards, got.tangents) == (4, 2)


def test_condition_jacobian(toy, prompts: Tensor) -> None:
    y = 5.0 * draws(7, (1, 2, 2))
    h = 1e-6
    along = prompts - toy.null_condition
    want = (toy(y, 5.0, prompts + h * along) - toy(y, 5.0, prompts - h * along)) / (2 * h)
    got = detection.get("condition_jacobian")(toy, cond=prompts)
    torch.testing.assert_close(got.values, want.flatten(1).norm(dim=1) / 5.0, rtol=1e-7, atol=0)


def test_nemo(toy, prompts: Tensor) -> None:
    others = torch.randn(50, 2, 3, dtype=F64, generator=gen(5))
    unusual = torch.cat([prompts, 20 * prompts[:1]])
    got = detection.get("nemo")(toy, cond=unusual, reference=others, batch_size=3)
    a, b = (toy.value(c).abs().mean(1) for c in (unusual, others))
    z = ((a - b.mean(0)) / b.std(0)).abs()
    torch.testing.assert_close(got.values, z.amax(1).detach())
    assert got.values.argmax() == 7
    assert got.forwards == 0
    count = detection.get("nemo", reduce="count", theta=2.0)(toy, cond=unusual, reference=others)
    torch.testing.assert_close(count.values, (z > 2).sum(1).double())
    seen: list[int] = []
    toy.value.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    detection.get("nemo")(toy, cond=prompts, reference=others.repeat(3, 1, 1))
    assert seen == [64, 64, 22, 7]  # the reference is not put through at once


def test_a_reference_that_is_not_finite(toy, prompts: Tensor) -> None:
    """Without a word nemo would find nothing unusual, and nearest_reference would pass over a training sample."""
    others, images = prompts.repeat(10, 1, 1), draws(70, (1, 2, 2))
    for reference in (others, images):
        reference[[20, 66]] = torch.nan
    with pytest.raises(ValueError, match=r"nemo: the values of 2 of 70 reference prompts are not finite, .* number 20"):
        detection.get("nemo")(toy, cond=prompts, reference=others)
    with pytest.raises(ValueError, match=r"nearest_reference: 2 of 70 training samples are not finite, .* number 20"):
        detection.get("nearest_reference")(None, images[:3], reference=images)


def test_noise_levels_of_every_kind(digit_samples: Tensor) -> None:
    score, D = detection.get("denoising_error"), digits()
    want = score(D, digit_samples, sigma=[0.125, 0.25])
    for sigma in (np.array([0.125, 0.25]), torch.tensor([0.125, 0.25]), (torch.tensor(0.125), 0.25)):
        got = score(D, digit_samples, sigma=sigma)
        assert torch.equal(got.values, want.values)
        assert got.sigmas == (0.125, 0.25)
    for sigma in (0.25, np.float32(0.25), torch.tensor(0.25), np.array(0.25)):
        assert torch.equal(score(D, digit_samples, sigma=sigma).values, want.values[0, 1])
    for sigma in ("0.1", ["0.1"], [[0.1]], {}):
        with pytest.raises(TypeError, match="denoising_error: sigma= must be a number, or a sequence of them, got"):
            score(D, digit_samples, sigma=sigma)  # pyright: ignore[reportArgumentType]


def test_nemo_of_weights_in_half_precision(toy, prompts: Tensor) -> None:
    toy.value.half()
    cond = prompts.float()  # as prompts come from disk
    got = detection.get("nemo", reduce="count", theta=2.0)(toy, cond=cond, reference=cond)
    assert set(got.status) == {"ok"}


def test_a_table_shows_conditions_to_the_methods_that_need_them_alone(toy, prompts: Tensor) -> None:
    x, seen = draws(7, (1, 2, 2)), set()
    forward = toy.forward

    def watched(y: Tensor, sigma: Any, cond: Any = None) -> Tensor:
        seen.add(cond is None)
        return forward(y, sigma, cond)

    toy.forward = watched
    for name in ("denoising_error", "noise_difference"):
        seen.clear()
        found = detection.table1(toy, x[:4], x[4:], sigma=0.3, cond=(prompts[:4], prompts[4:]), methods=[name])
        assert (False in seen) == found.rows[0].needs_prompt == (name == "noise_difference"), name


def test_a_choice_among_samples_without_a_score_is_refused(toy) -> None:
    x = draws(8, (1, 2, 2))
    x[:4] = torch.nan
    with pytest.raises(ValueError, match="no score for any memorized or any other sample of the half for choices"):
        detection.table1(toy, x[:4], x[4:], sigma=0.3, methods=["representation_std"])


def test_generation_density(toy, prompts: Tensor) -> None:
    score = detection.get("generation_density", n_images=3, n_steps=4, tiles=2, guidance=1.0)
    got = score(toy, cond=prompts, batch_size=2)
    cond = prompts.repeat_interleave(3, 0)
    images = br.models.sample(toy, 21, n_steps=4, cond=cond, seed=0).reshape(7, 3, 4)
    pairs = [(images[:, a] - images[:, b]).abs().amax(1) for a, b in ((0, 1), (0, 2), (1, 2))]  # one pixel a tile
    torch.testing.assert_close(got.values, torch.stack(pairs).mean(0))
    lowest = detection.get("generation_density", n_images=3, n_steps=4, tiles=2, guidance=1.0, reduce="min")
    torch.testing.assert_close(lowest(toy, cond=prompts).values, torch.stack(pairs).amin(0))
    assert got.forwards == 12


def test_tiles_hide_a_common_background() -> None:
    a, b = torch.zeros(2, 1, 1, 8, 8)
    b[..., :2, :2] = 1.0
    assert detection.tiled_distance(a, b, 1).item() == pytest.approx(0.25)
    assert detection.tiled_distance(a, b, 4).item() == pytest.approx(1.0)
    assert detection.tiled_distance(a, b, 3).item() > 0.5  # sizes that do not divide


def test_nearest_reference(digit_samples: Tensor) -> None:
    reference = digits_data().images[100:400]
    copies = torch.cat([reference[:2], digit_samples[:5]])
    got = detection.get("nearest_reference", k=3)(None, copies, reference=reference).values
    d = torch.cdist(copies.flatten(1).double(), reference.flatten(1).double()).sort(dim=1).values[:, :3]
    torch.testing.assert_close(got, d[:, 0] / (0.5 * d.mean(1)))
    assert (got[:2] == 0).all()
    assert (got[2:] > 0.5).all()


# All of them ----------------------------------------------------------------------------------------------------------


def everything(toy, prompts: Tensor) -> dict[str, dict]:
    x = torch.randn(7, 1, 2, 2, dtype=F64, generator=gen(1))
    return {
        "representation_std": {"x": x, "sigma": 0.5, "layers": "inner"},
        "denoising_error": {"x": x, "sigma": 0.5},
        "jacobian_norm": {"x": x, "sigma": 0.5},
        "jacobian_rank": {"x": x, "sigma": 0.5},
        "flipd": {"x": x, "sigma": 0.5},
        "noise_difference": {"cond": prompts},
        "sharpness": {"cond": prompts},
        "condition_jacobian": {"cond": prompts},
        "nemo": {"cond": prompts, "reference": prompts[3:]},
        "generation_density": {"cond": prompts},
        "nearest_reference": {"x": x, "reference": x + 0.1},
    }


@pytest.mark.parametrize("name", detection.names())
def test_same_scores_for_every_batch_size_and_seed(name: str, toy, prompts: Tensor) -> None:
    inputs = everything(toy, prompts)[name]
    score = detection.get(name)
    seen: list[int] = []
    one, many = score(toy, **inputs, batch_size=2, on_batch=seen.append), score(toy, **inputs)
    assert seen == [2, 2, 2, 1]
    torch.testing.assert_close(one.values, many.values, rtol=1e-9, atol=1e-12)
    assert one.values.shape == (7,)
    assert one.ok.all()
    assert one.forwards == pytest.approx(many.forwards)
    assert (score.name, one.name, one.direction) == (name, name, score.direction)
    assert {"seed", "n"}.isdisjoint(score.options())
    assert detection.get(name, **score.options()).options() == score.options()
    for text in (score.formula, score.source, score.cost):
        assert text
    assert name in str(one)


@pytest.mark.parametrize("name", detection.names())
def test_samples_scored_one_at_a_time_have_noise_of_their_own(name: str, toy, prompts: Tensor) -> None:
    inputs = everything(toy, prompts)[name]
    score, many = detection.get(name), detection.get(name)(toy, **inputs, first=2)
    for i in range(3):
        own = {key: v[i : i + 1] if key in ("x", "cond") else v for key, v in inputs.items()}
        one = score(toy, **own, first=2 + i)
        torch.testing.assert_close(one.values, many.values[i : i + 1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in detection.names() if n not in {"nemo", "nearest_reference"}])
def test_nan_is_a_status_and_not_a_score(name: str, toy, prompts: Tensor) -> None:
    inputs = everything(toy, prompts)[name]
    key = "x" if "x" in inputs else "cond"
    broken = inputs[key].clone()
    broken[2].view(-1)[0] = torch.nan
    got = detection.get(name)(toy, **{**inputs, key: broken}, batch_size=3)
    assert got.values.isnan().tolist() == [i == 2 for i in range(7)]
    assert [s == "ok" for s in got.status] == [i != 2 for i in range(7)]
    assert "not finite" in got.status[2]


def test_an_activation_that_overflows_names_its_layer(toy) -> None:
    x = torch.zeros(3, 1, 2, 2, dtype=F64)
    toy.B.fill_(1e308)
    cond = torch.zeros(3, 2, 3, dtype=F64)
    cond[1] = 1.0
    got = detection.get("representation_std")(toy, x, cond=cond, sigma=0.5)
    assert got.status == ("ok", "activation of inner is not finite", "ok")
    assert got.values.isnan().flatten().tolist() == [False, True, False]


def test_what_is_missing_is_named(toy, prompts: Tensor) -> None:
    x = torch.zeros(2, 1, 2, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"cond= is needed; the score requires \['condition', 'model', 'sigma'\]"):
        detection.get("sharpness")(toy, x)
    with pytest.raises(ValueError, match="samples x is needed"):
        detection.get("flipd")(toy, cond=prompts, sigma=0.1)
    with pytest.raises(ValueError, match="reference= is needed"):
        detection.get("nearest_reference")(None, x)
    with pytest.raises(ValueError, match="a denoiser D is needed"):
        detection.get("flipd")(None, x, sigma=0.1)
    with pytest.raises(ValueError, match=r"sigma= is needed, a noise level from 0.01 to 5"):
        detection.get("flipd")(toy, x)
    with pytest.raises(ValueError, match="is unconditional"):
        detection.get("sharpness")(digits(), cond=prompts)
    with pytest.raises(ValueError, match="no cross-attention"):
        detection.get("nemo")(digits(), cond=prompts, reference=prompts)
    with pytest.raises(ValueError, match="2 samples and 7 conditions"):
        detection.get("flipd")(toy, x, cond=prompts, sigma=0.1)
    with pytest.raises(ValueError, match="classes have no derivative"):
        detection.get("condition_jacobian")(toy, cond=torch.ones(3, dtype=torch.int64))


class Foreign(nn.Module):
    """A network with a signature of its own."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


class OtherSignature(Foreign):
    layers: dict[str, Tap] = {}  # noqa: RUF012
    null_condition = None
    data_range = (-1.0, 1.0)
    sigma_range = (0.1, 1.0)


@pytest.mark.parametrize(
    ("D", "inputs", "error", "message"),
    [
        (Foreign(), {}, TypeError, "Foreign is no denoiser: it has no layers, null_condition, data_range, sigma_range"),
        (OtherSignature(), {}, TypeError, r"OtherSignature is called as \(sample: .*a denoiser as \(y, sigma, cond\)"),
        (None, {"sigma": 50.0}, ValueError, "sigma=50 is outside what this model was made for, 0.01 to 10"),
        (None, {"sigma": []}, ValueError, "no noise level is given"),
        (None, {"layers": "net.blocks.2.linear_out"}, ValueError, "a module without a label, .* net.blocks.2"),
        (None, {"layers": "net.blocks.2.akt"}, ValueError, "'net.blocks.2.akt' is not among .* net.blocks.2.act"),
        (None, {"x": torch.zeros(2, 1, 16, 16)}, ValueError, r"samples of shape \(n, 1, 8, 8\), got \(2, 1, 16, 16\)"),
        (None, {"x": 255 * torch.ones(2, 1, 8, 8)}, ValueError, "samples run from 255 to 255, those of this model"),
        (None, {"x": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, ValueError, "floating-point tensor"),
        (None, {"layers": []}, ValueError, "no layer is given; layers=None takes all"),
        (None, {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_bad_input_is_refused_with_the_reason(D, inputs: dict, error, message: str) -> None:
    arguments = {"x": torch.zeros(2, 1, 8, 8), "sigma": 0.1, **inputs}
    with pytest.raises(error, match=message):
        detection.get("representation_std")(D or digits(), **arguments)


def test_images_between_zero_and_one_are_pointed_out(digit_samples: Tensor) -> None:
    with pytest.warns(UserWarning, match="lie between 0 and 1, those of this model between -1 and 1"):
        detection.get("denoising_error")(digits(), digit_samples / 2 + 0.5, sigma=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detection.get("denoising_error")(digits(), digit_samples, sigma=0.1)


def test_unknown_names_and_options() -> None:
    with pytest.raises(ValueError, match=r"no score 'flipt'. Did you mean flipd"):
        detection.get("flipt")
    for name, options in (
        ("representation_std", {"pool": "sum"}),
        ("representation_std", {"statistic": "variance"}),
        ("denoising_error", {"n_draws": 0}),
        ("flipd", {"n_probes": 0}),
        ("jacobian_norm", {"n_probes": 0}),
        ("jacobian_rank", {"kind": "numerical"}),
        ("noise_difference", {"n_steps": 0}),
        ("nemo", {"reduce": "sum"}),
        ("generation_density", {"n_images": 1}),
        ("nearest_reference", {"k": 0}),
    ):
        with pytest.raises(ValueError, match=name):
            detection.get(name, **options)
    with pytest.raises(TypeError, match=r"no option 'foo'; its options are: pool='max', statistic='std', n_draws=1\."):
        detection.get("representation_std", foo=1)
    with pytest.raises(TypeError, match=r"sharpness: has no option 'n_draws'; its options are: none\."):
        detection.get("sharpness", n_draws=1)
    with pytest.raises(ValueError, match="registered already"):

        @detection.register
        class Other(detection.FLIPD):
            name = "denoising_error"
