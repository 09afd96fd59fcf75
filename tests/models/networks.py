"""Tiny diffusers networks of every family, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

KINDS = ("unet2d", "sd", "dit", "sd3", "flux")
SHAPES = {"unet2d": (1, 16, 16), "sd": (4, 8, 8), "dit": (4, 8, 8), "sd3": (4, 8, 8), "flux": (4, 8, 8)}


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = _make(kind).eval().requires_grad_(False)
        for name, parameter in net.named_parameters():  # some layers start at zero, and hide what is in front of them
            if not parameter.any():
                parameter.normal_(std=0.05)
            del name
    return net


def _make(kind: str) -> nn.Module:
    if kind == "unet2d":
        return diffusers.UNet2DModel(
            sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
            norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
        )  # fmt: skip
    if kind == "sd":
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
            norm_num_groups=8, cross_attention_dim=32, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    if kind == "dit":
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10,
        )  # fmt: skip
    if kind == "sd3":
        return diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
            pos_embed_max_size=8,
        )  # fmt: skip
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


def scheduler(kind: str, prediction: str = "epsilon") -> Any:
    if kind in ("sd3", "flux"):
        return diffusers.FlowMatchEulerDiscreteScheduler()
    schedule: dict[str, Any] = {}
    if kind == "sd":
        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        schedule |= {"steps_offset": 1, "clip_sample": False}  # or pipelines warn
    return diffusers.DDIMScheduler(**schedule, prediction_type=prediction)


def condition(kind: str, n: int, seed: int = 1) -> Any:
    if kind == "unet2d":
        return None
    if kind == "dit":
        return torch.arange(n) % 10
    prompt = torch.randn(n, 7, 32, generator=gen(seed))
    return prompt if kind == "sd" else {"prompt": prompt, "pooled": torch.randn(n, 16, generator=gen(seed + 1))}


def vae() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 16), in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=16,
        ).eval()  # fmt: skip


def save_pipeline(folder: Path) -> None:
    """A Stable Diffusion folder with a text encoder and a tokenizer of a few words."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "l": 2, "o": 3, "w": 4, "lo": 5, "low</w>": 6, "w</w>": 7}
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.json").write_text(json.dumps(words))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\nl o\nlo w</w>\n")
    tokenizer = CLIPTokenizer(str(folder / "words" / "vocab.json"), str(folder / "words" / "merges.txt"))
    tokenizer.model_max_length = 7
    with torch.random.fork_rng():
        torch.manual_seed(2)
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                max_position_embeddings=7, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )
        )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=encoder, tokenizer=tokenizer, unet=network("sd"), scheduler=scheduler("sd"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
