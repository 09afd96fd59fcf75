"""What diffusers' backbones look like from outside: how they are called, and where their representations are.

Layers are found by the class of the block they belong to. In a `ResnetBlock2D` the representation is what `conv2` is
called with: the activation behind the second norm, whose module diffusers shares with two other places. In a
transformer it is what comes out of the activation of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from balanced_rep.models._protocol import Tap

__all__ = ["ARCHITECTURES", "CLASSES", "Architecture", "architecture", "cross_attention_values", "find_taps"]

PREFIX = "net."
CLASSES = "class numbers (batch,)"
PROMPT_AND_POOLED = "a mapping with 'prompt' (batch, tokens, features) and 'pooled' (batch, features)"
STAGES = ("down_blocks", "mid_block", "up_blocks")


@dataclass(frozen=True)
class Architecture:
    """One class of networks.

    Attributes:
        call: `(net, x, timestep, cond) -> prediction`.
        sample_shape: `net -> shape` of one sample, or `None` if it does not say.
        cond: What a condition is, in words; `None` for unconditional networks.
        at: Where its representations are heard.
        flow_scale: What a flow network is given at the end of its time.
        null: `net -> null condition`, if the network has one of its own.
        parts: Tensors that a condition that is no class holds, and how many dims they have; a condition that is no
            mapping is its "prompt".
    """

    call: Callable[[Any, Tensor, Tensor, Any], Tensor]
    sample_shape: Callable[[Any], tuple[int, ...] | None]
    cond: Callable[[Any], str | None]
    at: str = "output"
    flow_scale: float = 1000.0
    null: Callable[[Any], Tensor | None] = lambda net: None
    parts: Mapping[str, int] = field(default_factory=dict)


def _square(net: Any) -> tuple[int, ...] | None:
    size = net.config.sample_size
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return net.config.in_channels, height, width


def _class_condition(net: Any) -> str | None:
    if net.class_embedding is None:
        return None
    return CLASSES if isinstance(net.class_embedding, nn.Embedding) else "what its class embedding takes (batch, ...)"


def _call_unet(net: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    return net(x, t, class_labels=cond).sample[:, : x.shape[1]]  # the rest is a learned variance


def _call_unet_condition(net: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    cond = cond if isinstance(cond, Mapping) else {"prompt": cond}
    added = {key: value for key, value in cond.items() if key not in ("prompt", "mask", "labels")}
    return net(
        x, t, encoder_hidden_states=cond["prompt"], encoder_attention_mask=cond.get("mask"),
        class_labels=cond.get("labels"), added_cond_kwargs=added or None,
    ).sample[:, : x.shape[1]]  # fmt: skip


def _call_dit(net: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    return net(x, timestep=t, class_labels=cond).sample[:, : x.shape[1]]


def _call_sd3(net: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    return net(x, encoder_hidden_states=cond["prompt"], pooled_projections=cond["pooled"], timestep=t).sample


def _call_flux(net: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    """Latents are cut into 2 x 2 patches, whose places are given to the rotary embedding."""
    b, c, h, w = x.shape
    tokens = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x.device, x.dtype)
    options = {}
    if net.config.guidance_embeds:
        guidance = torch.as_tensor(cond.get("guidance", 3.5), dtype=x.dtype, device=x.device)
        options["guidance"] = guidance.expand(b)
    out = net(
        tokens, encoder_hidden_states=cond["prompt"], pooled_projections=cond["pooled"], timestep=t, img_ids=places,
        txt_ids=places.new_zeros(cond["prompt"].shape[1], 3), **options,
    ).sample  # fmt: skip
    return out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


ARCHITECTURES: dict[str, Architecture] = {
    "UNet2DModel": Architecture(
        _call_unet, _square, _class_condition, "input"
    ),
    "UNet2DConditionModel": Architecture(
        _call_unet_condition, _square,
        lambda net: "prompt embeddings (batch, tokens, features), or a mapping with 'prompt' and what else it takes",
        "input", parts={"prompt": 3},
    ),
    "DiTTransformer2DModel": Architecture(
        _call_dit, _square, lambda net: CLASSES,
        null=lambda net: torch.tensor([net.config.num_embeds_ada_norm]),
    ),
    "SD3Transformer2DModel": Architecture(
        _call_sd3, _square, lambda net: PROMPT_AND_POOLED, parts={"prompt": 3, "pooled": 2}
    ),
    "FluxTransformer2DModel": Architecture(
        _call_flux, lambda net: None,
        lambda net: PROMPT_AND_POOLED, flow_scale=1.0, parts={"prompt": 3, "pooled": 2},
    ),
}  # fmt: skip


def architecture(net: nn.Module) -> Architecture:
    """What is known of a network.

    Args:
        net: The network.

    Returns:
        Its architecture.

    Raises:
        TypeError: If its class is not one of those that are known.
    """
    found = ARCHITECTURES.get(type(net).__name__)
    if found is None:
        raise TypeError(
            f"from_diffusers: {type(net).__name__} is not among the networks it can call: {', '.join(ARCHITECTURES)}. "
            "Wrap another one in a class of your own that satisfies balanced_rep.models.Denoiser."
        )
    return found


def find_taps(net: nn.Module) -> dict[str, Tap]:
    """The representations of a network.

    Args:
        net: A diffusers backbone.

    Returns:
        Module name, as seen from the denoiser, to tap; from the input to the output of the network.
    """
    at = architecture(net).at
    found: dict[str, Tap] = {}
    module: Any
    for name, module in net.named_modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            text = f"activation behind the second norm of {name}, (batch, {module.out_channels}, h, w)"
            found[f"{name}.conv2"] = Tap(text, "input", "map", module.out_channels)
        elif kind == "FeedForward" and "ff_context" not in name:
            inner = module.net[2]
            text = f"hidden activation of the MLP {name}, (batch, tokens, {inner.in_features})"
            found[f"{name}.net.2" if at == "input" else f"{name}.net.0"] = Tap(text, at, "tokens", inner.in_features)  # pyright: ignore[reportArgumentType]
        elif kind == "FluxSingleTransformerBlock":
            text = (
                f"hidden activation of the MLP of {name}, text tokens first, (batch, tokens, {module.mlp_hidden_dim})"
            )
            found[f"{name}.act_mlp"] = Tap(text, "output", "tokens", module.mlp_hidden_dim)
    return {PREFIX + name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> tuple[int, ...]:
    """Where a layer of a UNet runs; modules are listed in the order in which they were made."""
    steps = name.split(".")
    if steps[0] not in STAGES:
        return ()
    numbers = [int(step) for step in steps if step.isdigit()]
    block, layer = (0, numbers[0]) if steps[0] == "mid_block" else (numbers[0], numbers[1])
    return STAGES.index(steps[0]), block, layer, int("attentions" in steps), *numbers


def cross_attention_values(net: nn.Module) -> dict[str, nn.Module]:
    """Value projections of the cross-attention in the encoder and the middle of a UNet.

    Args:
        net: A diffusers backbone.

    Returns:
        Module name, as seen from the denoiser, to module; empty for networks without.
    """
    return {
        f"{PREFIX}{name}": module
        for name, module in net.named_modules()
        if name.endswith("attn2.to_v") and name.split(".")[0] in STAGES[:2]
    }
