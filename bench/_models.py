"""Reduced diffusion backbones with random weights: the shapes of the real ones, small enough for a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Sizes of the real networks.
SD14: dict[str, Any] = {
    "size": 64,
    "channels": (320, 640, 1280, 1280),
    "cross_attention": 768,
}  # 860 million parameters
DIT_XL: dict[str, Any] = {"size": 32, "layers": 28, "heads": 16, "head_dim": 72}  # 750 million, images of 256 pixels


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter values of a trained network's size, also those that are initialised to zero.

    Matrices and filters get variance 1 / fan-in, gains of norms are near one, biases near zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval().requires_grad_(False)


def sd_unet(
    batch: int = 1, size: int = 32, channels: tuple[int, ...] = (64, 128, 256, 256), cross_attention: int = 128
) -> tuple[nn.Module, dict[str, Any]]:
    """A UNet2DConditionModel with the blocks of Stable Diffusion 1 and a fifth of its width, and inputs for it.

    Args:
        batch: Samples.
        size: Height and width of the latents (64 in Stable Diffusion).
        channels: Channels per level (320, 640, 1280, 1280 there).
        cross_attention: Width of the text embedding (768 there).

    Returns:
        The model and keyword arguments to call it with.
    """
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=channels,
        cross_attention_dim=cross_attention,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.full((batch,), 50),
        "encoder_hidden_states": torch.randn(batch, 77, cross_attention, generator=generator),
        "return_dict": False,
    }
    return randomise(model), inputs


def dit(
    batch: int = 1, size: int = 32, layers: int = 6, heads: int = 6, head_dim: int = 64
) -> tuple[nn.Module, dict[str, Any]]:
    """A DiTTransformer2DModel of the width of DiT-S with half its depth, and inputs for it.

    Args:
        batch: Samples.
        size: Height and width of the latents (32 for images of 256 pixels).
        layers: Blocks (28 in DiT-XL).
        heads: Attention heads (16 there).
        head_dim: Channels of a head (72 there).

    Returns:
        The model and keyword arguments to call it with.
    """
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1000,
    )
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.full((batch,), 7),
        "return_dict": False,
    }
    return randomise(model), inputs


def edm_unet(
    batch: int = 1, size: int = 32, channels: tuple[int, ...] = (64, 128, 128)
) -> tuple[nn.Module, dict[str, Any]]:
    """A UNet2DModel in pixel space with attention on its middle level, and inputs for it.

    Args:
        batch: Samples.
        size: Height and width of the images.
        channels: Channels per level.

    Returns:
        The model and keyword arguments to call it with.
    """
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    )
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(batch, 3, size, size, generator=generator),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }
    return randomise(model), inputs
