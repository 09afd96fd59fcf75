"""`record` on diffusers backbones and pipelines with random weights."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from balanced_rep.stats import representation_stats
from balanced_rep.stats.record import record

diffusers = pytest.importorskip("diffusers")

RESNET = "up_blocks.0.resnets.1"


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


@pytest.fixture(scope="module")
def pixel_unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()


@pytest.fixture(scope="module")
def dit() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()


def sd_inputs(n: int = 2) -> tuple[Tensor, int, Tensor]:
    return torch.randn(n, 4, 8, 8), 10, torch.randn(n, 77, 32)


def hooked(model: nn.Module, name: str) -> list[Any]:
    kept: list[Any] = []
    model.get_submodule(name).register_forward_hook(lambda m, args, output: kept.append((args, output)))
    return kept


@torch.no_grad()
def test_the_nonlinearity_that_is_called_three_times(pixel_unet: nn.Module):
    name = "up_blocks.0.resnets.0.nonlinearity"
    x = torch.randn(2, 1, 16, 16)
    text = rf"{re.escape(name)}' \(SiLU\) was called 3 times.*\(2, 64, 8, 8\), \(2, 64\), \(2, 32, 8, 8\)"
    with pytest.raises(ValueError, match=text), record(pixel_unet, name):
        pixel_unet(x, 10)
    kept = hooked(pixel_unet, name)
    with record(pixel_unet, name, pool="max", call=-1) as recording:  # what the paper's code reads
        pixel_unet(x, 10)
    assert recording.calls[name] == [3]
    want = kept[-1][1].flatten(2).amax(2).std(1, correction=0)
    torch.testing.assert_close(recording[name].std, want, rtol=1e-6, atol=0)
    with record(pixel_unet, "up_blocks.0.resnets.0.conv2", "input", pool="max", stop=True) as same:
        assert pixel_unet(x, 10) is None
    assert torch.equal(recording[name].state, same["up_blocks.0.resnets.0.conv2"].state)
    pixel_unet.get_submodule(name)._forward_hooks.clear()


@torch.no_grad()
def test_stop_in_a_loop_over_timesteps(unet: nn.Module):
    x, _, cond = sd_inputs()
    names = ["mid_block.resnets.0", f"{RESNET}.conv2"]
    kept = hooked(unet, names[1])
    times = [981, 481, 21]
    for t in times:
        unet(x, t, cond)
    unet.get_submodule(names[1])._forward_hooks.clear()
    with record(unet, names, "input", pool="max", stop=True) as recording:
        assert [unet(x, torch.tensor(t), encoder_hidden_states=cond) for t in times] == [None] * 3
    by_timestep = recording.by_timestep(names[1])
    assert list(by_timestep) == times
    for t, ((h,), _) in zip(times, kept, strict=True):
        torch.testing.assert_close(by_timestep[t].state, representation_stats(h, dim=1, pool="max").state)
    assert isinstance(unet(x, 10, cond).sample, Tensor)


@torch.no_grad()
def test_dataclass_tuple_and_keyword_arguments(unet: nn.Module):
    x, t, cond = sd_inputs()
    with record(unet, ["", "down_blocks.0", "mid_block.attentions.0"]) as recording:
        y = unet(x, t, cond)
    assert torch.equal(recording[""].state, representation_stats(y.sample, dim=(1, 2, 3)).state)
    assert recording["mid_block.attentions.0"].shape == (2,)
    with record(unet, "down_blocks.0", select=(1, 0)) as recording:
        unet(x, t, cond)
    assert recording["down_blocks.0"].n.tolist() == [32 * 8 * 8] * 2
    with record(unet, "mid_block.attentions.0", "input", select="encoder_hidden_states") as recording:
        unet(x, t, cond)
    want = representation_stats(cond, dim=(1, 2))
    assert torch.equal(recording["mid_block.attentions.0"].state, want.state)


@torch.no_grad()
def test_channels_last_and_half(unet: nn.Module):
    x, t, cond = sd_inputs()
    model = unet.to(memory_format=torch.channels_last)
    kept = hooked(model, RESNET)
    for pool in (None, "max", "mean"):
        with record(model, RESNET, pool=pool) as recording:
            model(x.contiguous(memory_format=torch.channels_last), t, cond)
        h = kept[-1][1]
        want = representation_stats(h.contiguous(), dim=1 if pool else (1, 2, 3), pool=pool)
        torch.testing.assert_close(recording[RESNET].std, want.std, rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16), record(model, f"{RESNET}.conv2", pool="max") as recording:
        model(x, t, cond)
    assert recording[f"{RESNET}.conv2"].std.isfinite().all()
    model.get_submodule(RESNET)._forward_hooks.clear()


@torch.no_grad()
def test_transformer(dit: nn.Module):
    x, name = torch.randn(2, 4, 8, 8), "transformer_blocks.1.ff.net.0"
    arguments = {"timestep": torch.tensor([5, 7]), "class_labels": torch.tensor([1, 2])}
    kept = hooked(dit, name)
    with record(dit, name, pool="max", timesteps=7) as recording:
        dit(x, **arguments)
    h = kept[0][1]
    assert h.shape == (2, 16, 128)
    assert torch.equal(recording[name].state, representation_stats(h.amax(1)[1:]).state)
    with record(dit, name, stop=True) as recording:
        assert dit(x, **arguments) is None
    assert torch.equal(recording[name].state, representation_stats(h, dim=(1, 2)).state)
    with record(dit, re.compile(r"transformer_blocks\.\d+")) as recording:
        dit(x, **arguments)
    assert list(recording) == ["transformer_blocks.0", "transformer_blocks.1"]
    dit.get_submodule(name)._forward_hooks.clear()


def test_no_module_is_shared(unet: nn.Module, pixel_unet: nn.Module, dit: nn.Module, recwarn: pytest.WarningsRecorder):
    for model in (unet, pixel_unet, dit):
        record(model, re.compile(r".*(nonlinearity|act|dropout).*"))
    assert not recwarn.list


@pytest.fixture(scope="module")
def pipeline(dit: nn.Module) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    pipe = diffusers.DiTPipeline(transformer=dit, vae=vae, scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipelines(pipeline: Any):
    model, name = pipeline.transformer, "transformer_blocks.0"

    def generate() -> None:
        pipeline(class_labels=[1], num_inference_steps=3, output_type="np")

    with record(model, name) as recording:
        generate()
    steps = pipeline.scheduler.timesteps.tolist()
    assert list(recording.by_timestep(name)) == steps
    assert recording[name].shape == (3 * 2,)  # guidance doubles the batch
    with record(model, name, timesteps=steps[1]) as recording:
        generate()
    assert recording.forwards == 1
    with pytest.raises(RuntimeError, match="called by the pipeline DiTPipeline"), record(model, name, stop=True):
        generate()
    with pytest.raises(TypeError, match=r"got DiTPipeline; .*\.vae"):
        record(pipeline, name)
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_a_part_that_is_called_by_a_method(pipeline: Any):
    image = torch.randn(1, 3, 16, 16)
    with pytest.raises(RuntimeError, match=r"not through a call of the model itself.*vae\.encode"):
        with record(pipeline.vae, "encoder.mid_block"):
            pipeline.vae.encode(image)
    with record(pipeline.vae.encoder, "mid_block") as recording:
        pipeline.vae.encode(image)
    assert recording["mid_block"].shape == (1,)


@torch.no_grad()
def test_layerwise_casting_is_not_cut_short():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8, patch_size=2
    ).eval()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    inputs = {"timestep": torch.tensor([5]), "class_labels": torch.tensor([1])}
    with pytest.raises(RuntimeError, match=r"has diffusers hooks \(layerwise_casting"):
        with record(model, "transformer_blocks.0", stop=True):
            model(torch.randn(1, 4, 8, 8), **inputs)
    with record(model, "transformer_blocks.0") as recording:
        model(torch.randn(1, 4, 8, 8), **inputs)
    assert recording["transformer_blocks.0"].std.isfinite().all()
