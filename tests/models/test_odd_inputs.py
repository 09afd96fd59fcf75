"""Inputs that were once passed over, or ended in an error of torch: each is refused, and says what is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import balanced_rep as br
from balanced_rep.models import EDMDenoiser, ReLUDAE, from_diffusers, load
from balanced_rep.models._checks import check_images

diffusers = pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.models import networks  # noqa: E402
from tests.models.networks import SHAPES, condition, gen, network, scheduler  # noqa: E402


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    kinds = ("unet2d", "sd", "dit", "sd3")
    return {kind: from_diffusers(network(kind), scheduler(kind), sample_shape=SHAPES[kind]) for kind in kinds}


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    """Diffusers and transformers only log it, and leave such weights as they were drawn, or not even drawn."""
    networks.save_pipeline(tmp_path)
    folder = tmp_path / "model"
    assert load(folder).sample_shape == SHAPES["sd"]
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"), ("text_encoder", "CLIPTextModel")):
        weights = next((folder / part).glob("*.safetensors"))
        whole = weights.read_bytes()
        tensors = load_file(weights)
        lost = sorted(tensors)[0]
        del tensors[lost]
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"1 weights of a {kind} .* or have another shape, such as {lost}"):
            load(folder)
        weights.write_bytes(whole)
    unet = next((folder / "unet").glob("*.safetensors"))
    whole = unet.read_bytes()
    tensors = load_file(unet)
    save_file({**tensors, "more": torch.zeros(1)}, unet, metadata={"format": "pt"})  # old files hold buffers, too
    assert load(folder).sample_shape == SHAPES["sd"]
    save_file({**tensors, "conv_in.bias": torch.zeros(3)}, unet, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights cannot be read as a UNet2DConditionModel.*size mismatch"):
        load(folder)
    unet.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="its weights cannot be read as a UNet2DConditionModel"):
        load(folder)
    for prompts in ([], "low", [1]):
        with pytest.raises(ValueError, match="prompts must be a list of texts, at least one"):
            br.models.encode_prompts(folder, prompts)  # pyright: ignore[reportArgumentType]


PROMPT = torch.zeros(2, 7, 32)


@pytest.mark.parametrize(
    ("kind", "cond", "message"),
    [
        ("sd", PROMPT[:1], "a condition for each of 2 samples, got 1: prompt embeddings"),
        ("sd", torch.zeros(2), r"needs a condition, prompt embeddings .*; got \(2,\)"),
        ("sd", "a prompt", "needs a condition, prompt embeddings .*; got str"),
        ("sd", {"promt": PROMPT}, r"got \{'promt': \(2, 7, 32\)\}"),
        ("sd3", PROMPT, r"a mapping with 'prompt' .* and 'pooled' .*; got \(2, 7, 32\)"),
        ("sd3", {"prompt": PROMPT[:1], "pooled": torch.zeros(1, 16)}, "for each of 2 samples, got 1"),
        ("dit", torch.tensor([0, 11]), "knows the classes 0 to 9, and 10 for none; got 0 to 11"),
        ("dit", torch.tensor([-1, 0]), "knows the classes 0 to 9, and 10 for none; got -1 to 0"),
        ("dit", torch.tensor([True, False]), r"integers for a batch of 2; got \(2,\) torch.bool"),
    ],
)
def test_conditions_that_do_not_fit(models, kind: str, cond: Any, message: str) -> None:
    y = torch.randn(2, *SHAPES[kind], generator=gen(0))
    with pytest.raises(ValueError, match=message):
        models[kind](y, 0.5, cond)


def test_samples_that_do_not_fit(models) -> None:
    for kind, y in (("dit", torch.zeros(4, 8, 8)), ("sd", torch.zeros(2, 5, 8, 8))):
        with pytest.raises(ValueError, match=r"takes samples \(batch, 4, 8, 8\), got"):
            models[kind](y, 0.5, condition(kind, len(y)))
    assert models["unet2d"](torch.zeros(1, 1, 12, 12), 0.5).shape == (1, 1, 12, 12)  # sides may differ
    D = from_diffusers(network("sd"), scheduler("sd"), vae=networks.vae(), null_condition=PROMPT[:1])
    images = torch.zeros(2, 3, 16, 16)
    for wrong in (images[0], images[:, :1], images.to(torch.uint8)):
        with pytest.raises(ValueError, match=r"images must be floating point \(batch, 3, height, width\)"):
            D.encode(wrong)
    with pytest.raises(ValueError, match="null_condition= must be one condition, with a leading dim 1, got 2 rows"):
        from_diffusers(network("sd"), scheduler("sd"), null_condition=PROMPT)
    with pytest.raises(TypeError, match="must be a scheduler of diffusers"):
        from_diffusers(network("sd"), "ddim")


def test_noise_levels_that_are_none(models) -> None:
    y = torch.zeros(1, *SHAPES["unet2d"])
    with pytest.raises(ValueError, match=r"sigma=1e\+09 is outside"):
        models["unet2d"](y, np.float32(1e9))  # no float of Python
    D = EDMDenoiser(torch.nn.Identity())
    with pytest.raises(ValueError, match="sigma must be finite, got inf"):
        D(y, math.inf)
    for ranges in ({"data_range": (1.0, -1.0)}, {"sigma_range": (80.0, 0.002)}, {"data_range": (math.nan, 1.0)}):
        with pytest.raises(ValueError, match="ranges go from the smallest to the largest"):
            EDMDenoiser(torch.nn.Identity(), **ranges)  # pyright: ignore[reportArgumentType]
    for rho in (0.0, -7.0, math.nan):
        with pytest.raises(ValueError, match="rho must be positive and finite"):
            br.models.sigma_schedule(D, 5, rho=rho)
    for sigma in ("0.5", None, [0.5]):
        for model in (D, models["unet2d"]):
            with pytest.raises(TypeError, match=r"sigma must be a number or a tensor|a noise level is one number for"):
                model(y, sigma)


def test_samples_of_another_dtype(tmp_path: Path) -> None:
    W = torch.randn(4, 3, generator=gen(0))
    for model, y in ((ReLUDAE(W, sigma=0.1), torch.zeros(2, 4)), (br.models.digits(), torch.zeros(2, 1, 8, 8))):
        with pytest.raises(ValueError, match=r"Samples are torch.float64 on cpu.*\.to\('cpu', torch.float32\)"):
            model(y.double(), 0.1)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(y, 0.1).shape == y.shape
    with pytest.raises(FileNotFoundError, match="There is no file"):
        ReLUDAE.load(tmp_path)


def test_a_model_that_accelerate_moves_takes_samples_from_where_they_are(models: dict[str, Any]) -> None:
    """Found once: with offloading, weights are on another device, or none, until the model is called."""
    D = models["unet2d"]
    away = from_diffusers(network("unet2d").to("meta"), scheduler("unet2d"), sample_shape=SHAPES["unet2d"])
    x = torch.zeros(1, *D.sample_shape)
    with pytest.raises(ValueError, match="samples are on cpu and the model on meta"):
        check_images("here", away, x)
    away.net._hf_hook = object()
    check_images("here", away, x)
