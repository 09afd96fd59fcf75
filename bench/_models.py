"""Reduced diffusion backbones with random weights: the shapes of the real ones, small enough for a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
