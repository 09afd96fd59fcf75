"""Models of transformers with random weights, in float64 without one fallback; backbones in lower precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from balanced_rep.autodiff import jvp
from balanced_rep.autodiff._fallback import differentiable
from tests.autodiff import test_models as models

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {"image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 50}
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}

# Class and configuration; text models take embeddings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT", {**SIZES, **IMAGE}),
    "CLIP vision": ("CLIPVision", {**SIZES, **IMAGE}),
    "DINOv2": ("Dinov2", {**IMAGE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "Swin": ("Swin", {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4],
                      "window_size": 4}),
    "SegFormer": ("Segformer", {**STAGES, "num_attention_heads": [1, 2, 2, 2]}),
    "ConvNeXt": ("ConvNext", STAGES),
    "ResNet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
    "BERT": ("Bert", {**SIZES, **TEXT}),
    "T5 encoder": ("T5Encoder", {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    "GPT-2": ("GPT2", {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "Llama": ("Llama", {**SIZES, **TEXT, "num_key_value_heads": 2}),
    "Gemma": ("Gemma", {**SIZES, **TEXT, "num_key_value_heads": 2, "head_dim": 8}),
}  # fmt: skip
BY_HAND = ("ViT", "Llama")  # also with attention written out


@pytest.mark.parametrize(("name", "attention"), [*((n, "sdpa") for n in MODELS), *((n, "eager") for n in BY_HAND)])
def test_model_of_transformers(name: str, attention: str, agrees: Callable, draw: Callable):
    transformers = pytest.importorskip("transformers")
    kind, sizes = MODELS[name]
    config = "T5Config" if kind == "T5Encoder" else f"{kind}Config"
    sizes = {**sizes, "attn_implementation": attention} if attention == "eager" else sizes
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Model")(getattr(transformers, config)(**sizes))
    model: Any = made.eval().to(torch.float64)
    text = "vocab_size" in sizes
    x = draw(2, 7, 32) if text else draw(1, 3, 32, 32)
    # Some take softmax or rotary tables in float32, where sums are rounded in another order.
    agrees(lambda x: (model(inputs_embeds=x) if text else model(x)).last_hidden_state, x, k=2, rtol=1e-5, atol=1e-6)


def _errors(
    f: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], x: Tensor, *, with_peer: bool = True
) -> tuple[float, float]:
    """Relative errors of our tangents and of torch's, against float64 of the same rounded weights and input."""
    t = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)
    y, got = jvp(f, x, t, strict=True)
    with differentiable(), torch.no_grad():
        peer = torch.stack([torch.func.jvp(f, (x,), (v,))[1] for v in t]) if with_peer else got
        want = torch.stack([torch.func.jvp(exact, (x.double(),), (v.double(),))[1] for v in t])
    assert got.dtype == peer.dtype == y.dtype
    return tuple(((jv.double() - want).norm() / want.norm()).item() for jv in (got, peer))  # pyright: ignore


def _cast(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in kwargs.items()
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [models.dit, models.unet2d, models.unet2d_condition, models.sd35, models.vit])
def test_weights_of_half_types(make: Callable, dtype: torch.dtype):
    if make is not models.vit:
        pytest.importorskip("diffusers")
    model, x, kwargs = make()
    model = models._randomised(model).to(dtype)
    exact = models._randomised(make()[0])
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.copy_(q)

    def of(network: nn.Module, wanted: torch.dtype) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            y = network(x, **_cast(kwargs, wanted))
            return y if isinstance(y, Tensor) else y.sample

        return f

    ours, peer = _errors(of(model, dtype), of(exact, torch.float64), x.to(dtype))
    assert ours <= 1.5 * peer
    assert ours < 0.2


@pytest.mark.parametrize("make", [models.dit, models.unet2d_condition, models.vit])
def test_backbones_under_autocast(make: Callable):
    if make is not models.vit:
        pytest.importorskip("diffusers")
    model, x, kwargs = make()
    exact = models._randomised(model)
    low = models._randomised(make()[0]).float()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), low.parameters(), strict=True):
            p.copy_(q)

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = low(x, **_cast(kwargs, torch.float32))
        return y if isinstance(y, Tensor) else y.sample

    def of_exact(x: Tensor) -> Tensor:
        y = exact(x, **kwargs)
        return y if isinstance(y, Tensor) else y.sample

    # torch's own forward mode stops at convolutions: autocast gives it tangents of another dtype than the weight.
    ours, peer = _errors(f, of_exact, x.float(), with_peer=make is not models.unet2d_condition)
    assert ours <= 1.5 * peer
    assert ours < 0.1
