"""Backbones of diffusers with random weights, and plain ResNet and ViT, without one fallback."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from balanced_rep.autodiff import explain, jvp
from balanced_rep.autodiff._fallback import differentiable

F64 = torch.float64


def _randomised(model: nn.Module) -> nn.Module:
    """Layers that start at zero would hide what is behind them."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=g)
            if p.ndim >= 2:
                p.copy_(draw * p[0].numel() ** -0.5)
            else:
                p.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * draw)
    return model.to(F64).eval()


def _r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F64)


def unet2d() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    return model, _r(2, 3, 8, 8), {"timestep": torch.tensor([5, 9])}


def unet2d_resnet_sampling() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=8, resnet_time_scale_shift="scale_shift", time_embedding_type="fourier", act_fn="gelu",
    )  # fmt: skip
    return model, _r(2, 3, 8, 8), {"timestep": torch.tensor([0.5, 0.9], dtype=F64)}


def unet2d_condition() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, _r(2, 4, 8, 8), {"timestep": torch.tensor(10), "encoder_hidden_states": _r(2, 7, 32)}


def dit() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=100,
    )  # fmt: skip
    return model, _r(2, 4, 8, 8), {"timestep": torch.tensor([5, 5]), "class_labels": torch.tensor([1, 2])}


def _sd3(**kwargs: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=8, **kwargs,
    )  # fmt: skip
    rest = {
        "encoder_hidden_states": _r(2, 9, 32),
        "pooled_projections": _r(2, 64),
        "timestep": torch.tensor([5.0, 5.0]),
    }
    return model, _r(2, 4, 8, 8), rest


def sd3() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    return _sd3()


def sd35() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    return _sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def flux() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    ids = torch.arange(48, dtype=F64).view(16, 3) % 4
    rest = {
        "encoder_hidden_states": _r(2, 5, 32), "pooled_projections": _r(2, 32),
        "timestep": torch.tensor([0.5, 0.5], dtype=F64),
        "img_ids": ids, "txt_ids": torch.zeros(5, 3), "guidance": torch.tensor([3.5, 3.5], dtype=F64),
    }  # fmt: skip
    return model, _r(2, 16, 16), rest


def pixart() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip
    mask = torch.ones(2, 6)
    mask[1, 4:] = 0
    rest = {
        "encoder_hidden_states": _r(2, 6, 24), "timestep": torch.tensor([5, 5]), "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip
    return model, _r(2, 4, 8, 8), rest


DIFFUSERS = [unet2d, unet2d_resnet_sampling, unet2d_condition, dit, sd3, sd35, flux, pixart]


class ResNet(nn.Module):
    """The classifier of many papers: strided convolutions, batch norm, in-place ReLU, max pool, residual sums."""

    class Block(nn.Module):
        def __init__(self, i: int, o: int, stride: int) -> None:
            super().__init__()
            self.a, self.n = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
            self.b, self.m = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
            self.act = nn.ReLU(inplace=True)
            self.skip = (
                nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
                if stride > 1
                else nn.Identity()
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.m(self.b(self.act(self.n(self.a(x)))))
            h += self.skip(x)
            return self.act(h)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.layers = nn.Sequential(self.Block(8, 8, 1), self.Block(8, 16, 2))
        self.pool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.layers(self.stem(x))), 1))


class ViT(nn.Module):
    """Two ways to write attention: nn.MultiheadAttention as torchvision does, fused qkv as timm does."""

    class Block(nn.Module):
        def __init__(self, d: int, heads: int) -> None:
            super().__init__()
            self.n1, self.n2, self.n3 = nn.LayerNorm(d), nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d)
            self.mha = nn.MultiheadAttention(d, heads, dropout=0.1, batch_first=True)
            self.qkv, self.out, self.heads = nn.Linear(d, 3 * d), nn.Linear(d, d), heads
            self.gamma = nn.Parameter(torch.ones(d))
            self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * d, d))

        def forward(self, x: Tensor) -> Tensor:
            h = self.n1(x)
            x = x + self.mha(h, h, h, need_weights=False)[0]
            b, n, d = x.shape
            q, k, v = (
                self.qkv(self.n2(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            )
            q = F.normalize(q, dim=-1) * 2
            x = x + self.gamma * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
            return x + self.mlp(self.n3(x))

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 17, 16))
        self.blocks, self.norm, self.head = (
            nn.Sequential(self.Block(16, 2), self.Block(16, 2)),
            nn.LayerNorm(16),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


def resnet() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    return ResNet(), _r(2, 3, 32, 32), {}


def vit() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    return ViT(), _r(2, 3, 16, 16), {}


@pytest.mark.parametrize("make", [*DIFFUSERS, resnet, vit], ids=lambda f: f.__name__)
def test_model(make: Callable, agrees: Callable):
    if make in DIFFUSERS:
        pytest.importorskip("diffusers")
    model, x, kwargs = make()
    model = _randomised(model)

    def f(x: Tensor) -> Tensor:
        y = model(x, **kwargs)
        return y if isinstance(y, Tensor) else y.sample

    # Flux turns queries and keys in float32, where x cos + y sin is rounded once less here.
    rtol, atol = (1e-5, 1e-6) if make is flux else (1e-8, 1e-9)
    agrees(f, x, k=2, strict=True, rtol=rtol, atol=atol)


@pytest.mark.parametrize("make", [flux, dit, sd35], ids=lambda f: f.__name__)
def test_bfloat16_is_as_exact_as_in_torch(make: Callable):
    """Against float64, of the same rounded weights: attention in torch's unfused form, which rounds every step."""
    pytest.importorskip("diffusers")
    model, x, kwargs = make()
    low = _randomised(model).bfloat16()
    x, t = x.bfloat16(), _r(3, *x.shape).bfloat16()

    def call(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        net = copy.deepcopy(low).to(dtype)
        given = pytree.tree_map_only(Tensor, lambda v: v.bfloat16().to(dtype) if v.is_floating_point() else v, kwargs)

        def f(v: Tensor) -> Tensor:
            y = net(v, **given)
            return y if isinstance(y, Tensor) else y.sample

        return f

    def of_torch(dtype: torch.dtype) -> Tensor:
        f, v = call(dtype), x.to(dtype)
        with differentiable(), torch.no_grad():
            return torch.stack([torch.func.jvp(f, (v,), (one,))[1] for one in t.to(dtype)]).double()

    exact, theirs, ours = of_torch(F64), of_torch(torch.bfloat16), jvp(call(torch.bfloat16), x, t)[1].double()
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_output_classes_of_diffusers_and_kwargs():
    pytest.importorskip("diffusers")
    model, x, kwargs = dit()
    model = _randomised(model)
    y, jv = jvp(model, x, x[None], kwargs=kwargs)
    assert type(y) is type(jv)
    assert jv.sample.shape == (1, *y.sample.shape)
    torch.testing.assert_close(jv.sample, jvp(model, x, x[None], kwargs={**kwargs, "return_dict": False})[1][0])


def test_inner_output_stops_there():
    pytest.importorskip("diffusers")
    model, x, kwargs = unet2d()
    model = _randomised(model)
    ran: list[str] = []
    handle = model.up_blocks[0].register_forward_hook(lambda *_: ran.append("up"))
    y, jv = jvp(model, x, x[None], output="mid_block", kwargs=kwargs)
    assert y.shape == (2, 32, 4, 4)
    assert not ran
    caught: list[Tensor] = []
    model.mid_block.register_forward_hook(lambda _m, _i, out: caught.append(out))
    whole = jvp(lambda x: (model(x, **kwargs), caught.pop())[1], x, x[None])
    assert ran == ["up"]
    handle.remove()
    torch.testing.assert_close(jv, whole[1])
    torch.testing.assert_close(y, whole[0])


def test_time_and_text_are_not_lifted():
    pytest.importorskip("diffusers")
    model, x, kwargs = unet2d_condition()
    told = explain(_randomised(model), x, kwargs=kwargs)
    assert not told.fallbacks
    n_linear = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert told.rules["linear"] < n_linear  # those of time and text met no tangent
    assert not {"sin", "cos", "exp", "embedding"} & set(told.rules)
    assert "0 functions without a rule" in str(told)
