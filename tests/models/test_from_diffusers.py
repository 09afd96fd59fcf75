"""Diffusers networks as denoisers: parametrisations, time scales, Jacobians, taps, conditions, files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import balanced_rep as br
from balanced_rep import detection
from balanced_rep.models import Denoiser, UnsafeModelError, from_diffusers, load
from balanced_rep.models._architectures import ARCHITECTURES
from balanced_rep.models._precondition import FlowTime, VPTime, coefficients, time_scale

diffusers = pytest.importorskip("diffusers")

from tests.models import networks  # noqa: E402
from tests.models.networks import KINDS, SHAPES, condition, gen, network, scheduler  # noqa: E402


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: from_diffusers(network(kind), scheduler(kind), sample_shape=SHAPES[kind]) for kind in KINDS}


def samples(kind: str, n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPES[kind], generator=gen(seed))


# Parametrisations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_an_ideal_network_of_every_kind_denoises(kind: Any) -> None:
    """From the target that each kind is trained on, the clean sample comes back exactly."""
    g = gen(0)
    x, e = (torch.randn(5, 3, dtype=torch.float64, generator=g) for _ in range(2))
    sigma = torch.tensor([0.01, 0.3, 1.0, 5.0, 80.0], dtype=torch.float64)[:, None]
    if kind == "flow_prediction":
        s = sigma / (1 + sigma)
        noisy, target = (1 - s) * x + s * e, e - x
    else:
        alpha, noise = (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()
        noisy = alpha * x + noise * e
        target = {"epsilon": e, "v_prediction": alpha * e - noise * x, "sample": x}[kind]
    scale, skip, out = coefficients(kind, sigma)
    y = x + sigma * e
    torch.testing.assert_close(scale * y, noisy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(skip * y + out * target, x, rtol=1e-9, atol=1e-9)


def test_noise_levels_of_the_known_chains() -> None:
    """Oracle 10: sqrt(1 - alpha_bar) at time 50."""
    for schedule, want in (
        ({}, 0.1733),
        ({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, 0.2201),
    ):
        time, _ = time_scale(diffusers.DDPMScheduler(**schedule))
        assert isinstance(time, VPTime)
        sigma = time.sigma(torch.tensor([50.0])).item()
        assert sigma / math.sqrt(1 + sigma**2) == pytest.approx(want, abs=5e-5)
        assert time.timestep(torch.tensor([sigma], dtype=torch.float64)).item() == 50


@pytest.mark.parametrize("kind", ["unet2d", "sd3", "flux"])
def test_time_and_noise_level_are_inverse(kind: str, models) -> None:
    D = models[kind]
    low, high = D.sigma_range
    sigmas = torch.logspace(math.log10(low), math.log10(high), 50, dtype=torch.float64)
    times = D.time.timestep(sigmas)
    assert (times.diff() > 0).all()
    torch.testing.assert_close(D.time.sigma(times), sigmas, rtol=1e-6, atol=0)
    assert D.sigma(D.timestep(1.0)) == pytest.approx(1.0, rel=1e-6)
    if kind != "unet2d":
        assert D.timestep(1.0) == pytest.approx(500 if kind == "sd3" else 0.5)


@pytest.mark.parametrize(("kind", "known"), [("unet2d", "0 to 999"), ("sd3", "1 to 999"), ("flux", "0.001 to 0.999")])
def test_times_and_levels_that_are_none(kind: str, known: str, models) -> None:
    D = models[kind]
    first, last = (float(end) for end in known.split(" to "))
    assert (D.sigma(first), D.sigma(last)) == pytest.approx(D.sigma_range, rel=1e-5)
    for time in (-1.0, 1.01 * last, 5000.0, math.nan):
        with pytest.raises(ValueError, match=rf"time {time:g} is outside what this network knows, {known}"):
            D.sigma(time)
    for sigma in (0.0, 2 * D.sigma_range[1], math.nan):
        with pytest.raises(ValueError, match=f"timestep: sigma={sigma:g} is outside"):
            D.timestep(sigma)
        said = f"DiffusersDenoiser: sigma={sigma:g} is outside" if sigma else "sigma must be positive, got 0"
        for number in (sigma, np.float32(sigma)):
            with pytest.raises(ValueError, match=said):
                D(torch.zeros(1, *D.sample_shape), number)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_denoiser_and_jacobian_against_the_scheduler(prediction: str) -> None:
    """D is what a DDIM step to a clean sample gives, and its Jacobian has the factors of the parametrisation."""
    net, chain = network("unet2d").double(), scheduler("unet2d", prediction)
    chain.register_to_config(clip_sample=False)
    chain.set_timesteps(1000)
    D = from_diffusers(net, chain)
    t = 300
    alpha = chain.alphas_cumprod[t].double().sqrt()
    sigma = D.sigma(t)
    y = samples("unet2d").double()
    raw = net(alpha * y, torch.tensor(float(t))).sample
    want = chain.step(raw, t, alpha * y, eta=0.0).pred_original_sample.double()
    torch.testing.assert_close(D(y, sigma), want, rtol=1e-5, atol=1e-6)
    v = torch.randn(1, *y.shape, dtype=torch.float64, generator=gen(3))
    _, of_d = br.jvp(lambda z: D(z, sigma), y, v)
    _, of_f = br.jvp(lambda z: net(z, torch.tensor(float(t))).sample, alpha * y, v)
    noise = (1 - alpha**2).sqrt()
    factors = {"epsilon": (1.0, -noise / alpha), "v_prediction": (alpha**2, -noise), "sample": (0.0, 1.0)}
    skip, out = factors[prediction]
    torch.testing.assert_close(of_d, skip * v + out * alpha * of_f, rtol=1e-5, atol=1e-6)


def test_flow_jacobian(models) -> None:
    D = models["sd3"]
    y, v, cond = samples("sd3"), samples("sd3", seed=5)[None], condition("sd3", 2)
    s = 0.3
    net_call = D._architecture.call
    _, of_d = br.jvp(lambda z: D(z, s / (1 - s), cond), y, v)
    _, of_f = br.jvp(lambda z: net_call(D.net, z, torch.full((2,), 300.0), cond), (1 - s) * y, v)
    torch.testing.assert_close(of_d, (1 - s) * (v - s * of_f), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_networks_with_a_multistep_solver(kind: str) -> None:
    """Such a scheduler has betas as well, which a flow does not use; its own step is the oracle."""
    net, cond, y = network("sd3").double(), condition("sd3", 2), samples("sd3").double()
    cond = {name: c.double() for name, c in cond.items()}
    chain = getattr(diffusers, kind)(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    D = from_diffusers(net, chain)
    chain.set_timesteps(10)
    chain._init_step_index(chain.timesteps[4])
    s, t = float(chain.sigmas[4]), chain.timesteps[4]
    assert D.timestep(s / (1 - s)) == pytest.approx(float(t), abs=1)  # a solver rounds its times
    raw = ARCHITECTURES["SD3Transformer2DModel"].call(net, (1 - s) * y, torch.full((2,), 1000 * s), cond)
    want = chain.convert_model_output(raw, sample=(1 - s) * y)
    torch.testing.assert_close(D(y, s / (1 - s), cond), want, rtol=1e-5, atol=1e-5)
    assert time_scale(
        diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, num_train_timesteps=500, prediction_type="flow_prediction"
        )
    )[0] == FlowTime(500.0)


# Every family ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_family_is_a_denoiser(kind: str, models) -> None:
    D, y, cond = models[kind], samples(kind), condition(kind, 2)
    assert isinstance(D, Denoiser)
    assert not D.training
    out = D(y, 0.5, cond)
    assert out.shape == y.shape
    assert out.isfinite().all()
    per_sample = D(y, torch.tensor([0.5, 2.0]), cond)
    torch.testing.assert_close(per_sample[:1], out[:1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(per_sample[1:], out[1:])
    assert D(y.double(), 0.5, cond).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_tap_is_heard_and_is_what_it_says(kind: str, models) -> None:
    D, y, cond = models[kind], samples(kind), condition(kind, 2)
    kept: dict[str, Tensor] = {}
    handles = []
    for name, tap in D.layers.items():
        module = D.get_submodule(name)
        if tap.at == "input":
            handles.append(module.register_forward_pre_hook(lambda m, a, n=name: kept.__setitem__(n, a[0])))
        else:
            handles.append(module.register_forward_hook(lambda m, a, o, n=name: kept.__setitem__(n, o)))
    D(y, 0.5, cond)
    for handle in handles:
        handle.remove()
    assert list(kept) == list(D.layers)  # in the order in which they run
    for name, tap in D.layers.items():
        assert kept[name].ndim == {"map": 4, "tokens": 3}[tap.kind]
        assert kept[name].shape[1 if tap.kind == "map" else 2] == int(
            "".join(c for c in tap.text.split("(batch,")[1] if c.isdigit())
        )
        if not (kind == "sd" and tap.kind == "tokens"):  # a gated GELU has two signs
            assert kept[name].min() > -0.3  # SiLU and GELU have no lower values
    assert len({tap.at for tap in D.layers.values()}) == 1  # so that all are read in one pass that ends early
    stats = detection.get("representation_std", pool="mean")(D, y.tanh(), cond=cond, sigma=[0.5, 1.0])
    assert stats.values.shape == (len(D.layers), 2, 2)
    assert stats.ok.all()


def test_what_is_read_in_a_resnet_block_is_the_activation_behind_the_second_norm(models) -> None:
    D, y = models["unet2d"], samples("unet2d")
    name = "net.up_blocks.1.resnets.1"
    block = D.get_submodule(name)
    inner: list[Tensor] = []
    handle = block.norm2.register_forward_hook(lambda m, a, o: inner.append(o))
    with torch.no_grad(), br.record(D, f"{name}.conv2", "input", pool="max") as recording:
        D(y, 0.5)
    handle.remove()
    want = nn.functional.silu(inner[0]).flatten(2).amax(2).std(1, correction=0)
    torch.testing.assert_close(recording[f"{name}.conv2"].std, want)


@pytest.mark.parametrize("kind", KINDS)
def test_jvp_through_every_family(kind: str) -> None:
    D = from_diffusers(network(kind).double(), scheduler(kind), sample_shape=SHAPES[kind])
    y = samples(kind, 1).double()
    cond = torch.utils._pytree.tree_map(
        lambda c: c.double() if isinstance(c, Tensor) and c.is_floating_point() else c, condition(kind, 1)
    )
    v = torch.randn(2, *y.shape, dtype=torch.float64, generator=gen(4))
    _, jv = br.jvp(lambda z: D(z, 0.7, cond), y, v)
    h, tolerance = (1e-5, 1e-5) if kind != "flux" else (3e-3, 5e-3)  # flux rotates in float32: 6e-8 / h of noise
    for k in range(2):
        want = (D(y + h * v[k], 0.7, cond) - D(y - h * v[k], 0.7, cond)) / (2 * h)
        torch.testing.assert_close(jv[k], want, rtol=tolerance, atol=tolerance / 20)


# Conditions -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_null_conditions(models) -> None:
    dit = models["dit"]
    assert dit.null_condition.tolist() == [10]
    y = samples("dit")
    torch.testing.assert_close(dit(y, 0.5), dit(y, 0.5, torch.tensor([10, 10])))
    assert not torch.allclose(dit(y, 0.5), dit(y, 0.5, torch.tensor([1, 2])))
    with pytest.raises(ValueError, match=r"needs a condition, prompt embeddings .* null_condition= to from_diffusers"):
        models["sd"](samples("sd"), 0.5)
    with pytest.raises(ValueError, match="unconditional"):
        models["unet2d"](samples("unet2d"), 0.5, torch.zeros(2))
    null = condition("sd", 1, seed=9)
    D = from_diffusers(models["sd"].net, scheduler("sd"), null_condition=null)
    torch.testing.assert_close(D(samples("sd"), 0.5), D(samples("sd"), 0.5, null.expand(2, -1, -1)))
    assert list(D.cross_attention_values) == [
        "net.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
        "net.mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    ]


def test_prompt_scores_on_a_conditional_unet(models) -> None:
    D = from_diffusers(models["sd"].net, scheduler("sd"), null_condition=condition("sd", 1, seed=9))
    prompts = condition("sd", 3)
    for name, options in (
        ("noise_difference", {}),
        ("sharpness", {}),
        ("condition_jacobian", {}),
        ("nemo", {"reference": condition("sd", 20, seed=30)}),
    ):
        got = detection.get(name)(D, cond=prompts, **options)
        assert got.values.shape == (3,)
        assert got.ok.all()
        assert (got.values > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_networks_take_and_give_single_and_are_told_the_exact_time(kind: str) -> None:
    D = from_diffusers(network(kind).bfloat16(), scheduler(kind), sample_shape=SHAPES[kind])
    told = []
    D.net.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs.get("timestep", args[1] if len(args) > 1 else None)),
        with_kwargs=True,
    )
    sigma = D.sigma_range[1] if kind in ("sd3", "flux") else D.sigma(997)  # bfloat16 has 996 and 1000
    out = D(samples(kind), sigma, condition(kind, 2))
    assert out.dtype == torch.float32
    assert bool(out.isfinite().all())
    torch.testing.assert_close(
        told[0].double(), torch.full((2,), D.timestep(sigma), dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_learned_variances_are_left_out(models) -> None:
    assert models["dit"].net.config.out_channels == 8
    assert models["dit"](samples("dit"), 0.5).shape == (2, 4, 8, 8)
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, layers_per_block=1, block_out_channels=(32,), norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    assert from_diffusers(net, scheduler("sd"))(samples("sd"), 0.5, condition("sd", 2)).shape == (2, 4, 8, 8)


def test_classes_that_are_none(models) -> None:
    c = torch.tensor([1, 2])
    wrong = (c[:, None], r"\(2, 1\) torch.int64"), (c.float(), r"\(2,\) torch.float32"), ({"labels": c}, "dict")
    for cond, got in wrong:
        with pytest.raises(ValueError, match=rf"class numbers \(batch,\), integers for a batch of 2; got {got}"):
            models["dit"](samples("dit"), 0.5, cond)
    with pytest.raises(ValueError, match="unconditional, or none was given"):
        detection.get("noise_difference")(models["sd"], cond=condition("sd", 2))


def test_conditions_without_features_are_scored(models) -> None:
    """The guidance that Flux is told is one number for each sample, or one for all."""
    cond = condition("flux", 2)
    score = detection.get("denoising_error")
    plain = score(models["flux"], samples("flux"), cond=cond, sigma=0.5)  # told 3.5
    for guidance in (torch.full((2,), 3.5), torch.tensor(3.5)):
        told = score(models["flux"], samples("flux"), cond={**cond, "guidance": guidance}, sigma=0.5)
        torch.testing.assert_close(told.values, plain.values)
    broken = score(models["flux"], samples("flux"), cond={**cond, "guidance": torch.tensor([3.5, math.nan])}, sigma=0.5)
    assert broken.status == ("ok", "what is to be scored is not finite")


# Autoencoder and files ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encode_is_deterministic_unless_seeded() -> None:
    D = from_diffusers(network("sd"), scheduler("sd"), vae=networks.vae(), null_condition=condition("sd", 1))
    assert D.data_range == (-math.inf, math.inf)
    images = torch.rand(2, 3, 16, 16, generator=gen(0)) * 2 - 1
    z = D.encode(images)
    assert torch.equal(z, D.encode(images))
    want = D.vae.encode(images).latent_dist.mean * D.vae.config.scaling_factor
    torch.testing.assert_close(z, want)
    one, two, other = D.encode(images, seed=1), D.encode(images, seed=1), D.encode(images, seed=2)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    apart = torch.cat([D.encode(images[i : i + 1], seed=1, first=i) for i in range(2)])
    torch.testing.assert_close(apart, one)  # an image has noise of its own, whatever the batch
    latent = D.vae.encode(images.expand(2, -1, -1, -1)).latent_dist
    drawn = (one / D.vae.config.scaling_factor - latent.mean) / latent.std
    assert 0.7 < drawn.std() < 1.3
    torch.testing.assert_close(D.decode(z), D.vae.decode(z / D.vae.config.scaling_factor).sample)
    with pytest.raises(ValueError, match=r"images must lie in \[-1, 1\], got values from 0 to 255"):
        D.encode(torch.tensor([0.0, 255.0]).expand(1, 3, 2, 2))
    with pytest.raises(ValueError, match="has no autoencoder"):
        from_diffusers(network("dit"), scheduler("dit")).encode(images)
    with pytest.raises(ValueError, match="Encode images first"):
        detection.get("denoising_error")(D, images, sigma=0.5)
    pixels = from_diffusers(network("unet2d"), scheduler("unet2d"))  # there is nothing to encode
    with pytest.raises(ValueError, match=r"got \(2, 3, 16, 16\); they are not resized\.$"):
        detection.get("denoising_error")(pixels, images, sigma=0.5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_network_saved_and_loaded(kind: str, models, tmp_path: Path) -> None:
    models[kind].net.save_pretrained(tmp_path / "net", safe_serialization=True)
    scheduler(kind).save_pretrained(tmp_path / "scheduler")
    D = load(tmp_path / "net", scheduler=tmp_path / "scheduler", dtype=torch.float64)
    D.sample_shape = SHAPES[kind]
    y, cond = samples(kind), condition(kind, 2)
    torch.testing.assert_close(D(y, 0.5, cond), models[kind](y, 0.5, cond), rtol=1e-3, atol=1e-4)
    assert list(D.layers) == list(models[kind].layers)
    assert list(D.parameters())[-1].dtype == torch.float64


@torch.no_grad()
def test_a_whole_pipeline_saved_and_loaded(tmp_path: Path) -> None:
    networks.save_pipeline(tmp_path)
    folder = tmp_path / "model"
    D = load(folder)
    assert D.vae is not None
    assert D.null_condition.shape == (1, 7, 32)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True, low_cpu_mem_usage=False
    )
    torch.testing.assert_close(D.null_condition, pipeline.encode_prompt([""], "cpu", 1, False)[0])
    again = from_diffusers(pipeline, null_condition=D.null_condition)
    y = samples("sd")
    torch.testing.assert_close(again(y, 0.5), D(y, 0.5))
    prompts = br.models.encode_prompts(folder, ["low", "low low"])
    torch.testing.assert_close(prompts, pipeline.encode_prompt(["low", "low low"], "cpu", 1, False)[0])
    assert load(folder, with_vae=False).vae is None
    # Pickled weights, foreign classes and code are refused; the pipeline's other parts do not matter.
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04N.")
    weights.rename(folder / "kept")
    with pytest.raises(UnsafeModelError, match=r"weights are pickled \(diffusion_pytorch_model.bin\)"):
        load(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no weights in it"):
        load(folder)
    (folder / "kept").rename(weights)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "MyUNet"}))
    with pytest.raises(UnsafeModelError, match="its class is 'MyUNet'; loaded are only UNet2DModel"):
        load(folder)
    (folder / "unet" / "my_unet.py").write_text("raise SystemExit")
    with pytest.raises(UnsafeModelError, match=r"holds code \(unet/my_unet.py\)"):
        load(folder)


def test_weights_in_several_files(models, tmp_path: Path) -> None:
    chain = tmp_path / "scheduler"
    scheduler("dit").save_pretrained(chain)
    models["dit"].net.save_pretrained(tmp_path / "net", safe_serialization=True, max_shard_size="200KB")
    index = tmp_path / "net" / "diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text()
    name = sorted(json.loads(text)["weight_map"].values())[0]
    assert list(load(tmp_path / "net", scheduler=chain).layers) == list(models["dit"].layers)
    for wrong in ("../elsewhere.safetensors", "/etc/x.safetensors", "weights.bin", ""):
        index.write_text(text.replace(name, wrong))
        with pytest.raises(UnsafeModelError, match="which is no safetensors file of its folder"):
            load(tmp_path / "net", scheduler=chain)
    for wrong, error in (
        (text.replace(name, "gone.safetensors"), "gone.safetensors is not there"),
        ("{}", "names '[?]'"),
    ):
        index.write_text(wrong)
        with pytest.raises(ValueError, match=error):
            load(tmp_path / "net", scheduler=chain)
    index.write_text(text)
    (tmp_path / "net" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"adapter_config.json says that this is an adapter \(LoRA\).*merge_and_unload"
    ):
        load(tmp_path / "net", scheduler=chain)


def test_a_text_encoder_of_unknown_class(tmp_path: Path) -> None:
    for part in ("tokenizer", "text_encoder"):
        (tmp_path / part).mkdir()
    for kinds in (None, [], "CLIPTextModel", ["CLIPTextModel", 5], ["T5EncoderModel"]):
        (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({"architectures": kinds}))
        with pytest.raises(ValueError, match=r"the text encoder is .*; known is CLIPTextModel"):
            br.models.encode_prompts(tmp_path, ["a"])


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    network("unet2d").save_pretrained(tmp_path, safe_serialization=True)
    scheduler("unet2d").save_pretrained(tmp_path / "scheduler")
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(ValueError, match=rf"load: the device '{device}' cannot be used here: .*Give cpu"):
            load(tmp_path, device=device)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    command = r'hf download CompVis/stable-diffusion-v1-4 --include "\*.json" .* --local-dir stable-diffusion-v1-4'
    with pytest.raises(FileNotFoundError, match=command):
        load("CompVis/stable-diffusion-v1-4")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no config.json; this is not a folder saved by diffusers"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AudioPipeline", "vocoder": ["x", "Y"]}))
    with pytest.raises(ValueError, match="lists neither a unet nor a transformer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_diffusers(nn.Linear(2, 2), scheduler("sd")), TypeError, "Linear is not among the networks"),
        (lambda: from_diffusers("sd", scheduler("sd")), TypeError, "a network or a pipeline is needed, got str"),
        (lambda: from_diffusers(network("dit")), ValueError, "give scheduler="),
        (
            lambda: from_diffusers(network("dit"), scheduler("dit"), prediction="noise"),  # pyright: ignore
            ValueError,
            "prediction must be 'epsilon', .* got 'noise'",
        ),
        (lambda: time_scale(diffusers.ScoreSdeVeScheduler()), ValueError, "has no alphas_cumprod"),
        (
            lambda: time_scale(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True)),
            ValueError,
            "has the time of a flow, and the network is said to predict 'epsilon'",
        ),
        (
            lambda: time_scale(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction")),
            ValueError,
            "has a variance-preserving chain of betas, and the network is said to predict 'flow_prediction'",
        ),
        (
            lambda: from_diffusers(network("sd3"), scheduler("sd3"), prediction="v_prediction"),
            ValueError,
            "has the time of a flow, and the network is said to predict 'v_prediction'",
        ),
    ],
)
def test_bad_input_is_refused_with_the_reason(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_flow_time_has_finite_ends() -> None:
    assert FlowTime(1000.0).sigma_range == pytest.approx((0.001001, 999.0), rel=1e-3)
