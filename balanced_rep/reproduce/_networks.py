"""Small networks of the architectures that the paper is about, trained on digits of which some are repeated.

Needs diffusers. A prompt here is three vectors: the digit, a word that stands for the image, and an end. Repeated
images have a word of their own; the others share a vocabulary, so that the prompt of an ordinary image fits many.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from balanced_rep.models import Denoiser, DigitsData, from_diffusers

__all__ = ["Kind", "Training", "make", "prompts", "train"]

Kind = Literal["unet", "dit", "prompted unet"]
FEATURES = 16
WORDS = 32  # that ordinary images share


@dataclass(frozen=True)
class Training:
    """How a small network is trained.

    Attributes:
        repeats: How many times as often as an ordinary image a repeated one comes.
        steps: Optimizer steps.
        batch_size: Images per step.
        learning_rate: Of Adam; falls linearly over the last 40 % of the steps.
        null_share: Share of the images that are seen without condition.
        seed: Of weights, batches and noise.
    """

    repeats: int = 40
    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 2e-3
    null_share: float = 0.15
    seed: int = 0


def make(kind: Kind, seed: int = 0) -> Any:
    """An untrained denoiser of 8 x 8 images.

    Args:
        kind: "unet" (UNet2DModel), "dit" (DiTTransformer2DModel) or "prompted unet" (UNet2DConditionModel).
        seed: Of its weights.

    Returns:
        The denoiser, samples `(n, 1, 8, 8)` in [-1, 1].
    """
    diffusers: Any = import_module("diffusers")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "unet":
            net = diffusers.UNet2DModel(
                sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
                norm_num_groups=8, down_block_types=("DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
            )  # fmt: skip
        elif kind == "dit":
            net = diffusers.DiTTransformer2DModel(
                num_attention_heads=4, attention_head_dim=24, in_channels=1, out_channels=1, num_layers=4,
                sample_size=8, patch_size=2, num_embeds_ada_norm=10,
            )  # fmt: skip
        else:
            net = diffusers.UNet2DConditionModel(
                sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
                norm_num_groups=8, cross_attention_dim=FEATURES, attention_head_dim=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            )  # fmt: skip
    null = torch.zeros(1, 3, FEATURES) if kind == "prompted unet" else None
    return from_diffusers(net, diffusers.DDPMScheduler(), null_condition=null, data_range=(-1.0, 1.0))


def prompts(data: DigitsData, *, seed: int = 0) -> Tensor:
    """The prompt of every image.

    Args:
        data: Images and split.
        seed: Of the vectors and of which word an ordinary image has.

    Returns:
        `(1797, 3, 16)`.
    """
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(10 + WORDS + len(data.split.repeated) + 1, FEATURES, generator=g)
    word = 10 + torch.randint(WORDS, (len(data.images),), generator=g)
    word[data.split.repeated] = 10 + WORDS + torch.arange(len(data.split.repeated))
    end = torch.full_like(word, len(table) - 1)
    return table[torch.stack([data.labels, word, end], dim=1)]


def train(
    D: Any,
    data: DigitsData,
    training: Training,
    *,
    cond: Tensor | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Denoiser:
    """Trains a denoiser on the training images, repeated ones more often; noise levels and weights as in EDM.

    Args:
        D: The denoiser; its network is changed.
        data: Images and split.
        training: How.
        cond: Conditions of all 1797 images.
        on_step: Called with the number of steps done and the loss.

    Returns:
        The denoiser with averaged weights, in evaluation mode.
    """
    index = data.split.train
    weights = torch.ones(len(index))
    weights[: len(data.split.repeated)] = training.repeats
    g = torch.Generator().manual_seed(training.seed)
    net: nn.Module = D.net.train()
    averaged = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=training.learning_rate, betas=(0.9, 0.99))
    low, high = D.sigma_range
    for step in range(training.steps):
        done = step / training.steps
        optimizer.param_groups[0]["lr"] = training.learning_rate * min(
            1.0, (step + 1) / 50, max(0.02, (1 - done) / 0.4)
        )
        picked = index[torch.multinomial(weights, training.batch_size, replacement=True, generator=g)]
        x = data.images[picked]
        sigma = (1.2 * torch.randn(len(x), generator=g) - 1.2).exp().clamp(low, high)
        y = x + sigma.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=g)
        given = _conditions(D, cond, picked, training.null_share, g)
        weight = (1 / sigma.square() + 4.0).view(-1, 1, 1, 1)  # EDM's, for data of standard deviation 0.5
        loss = (weight * (D(y, sigma, given) - x).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, 1 - 10 / (10 + step + 1))
        with torch.no_grad():
            for slow, fast in zip(averaged.parameters(), net.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        if on_step is not None:
            on_step(step + 1, float(loss.detach()))
    net.load_state_dict(averaged.state_dict())
    return D.eval().requires_grad_(False)


def _conditions(D: Any, cond: Tensor | None, picked: Tensor, null_share: float, g: torch.Generator) -> Tensor | None:
    """Conditions of a batch, some of them replaced by the null condition."""
    if cond is None:
        return None
    given = cond[picked].clone()
    dropped = torch.rand(len(picked), generator=g) < null_share
    given[dropped] = D.null_condition[0].to(given.dtype)
    return given
