"""The DiT of _models.py in JAX, with the same weights: `jax.jvp` under `vmap`, compiled, as a peer of `br.jvp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def _array(t: Tensor) -> np.ndarray:
    return t.detach().numpy()


def _affine(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return _array(layer.weight).T.copy(), _array(layer.bias)


def weights(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Weights as arrays; what depends on time and class alone is evaluated once, in torch.

    Args:
        model: A ``DiTTransformer2DModel``.
        inputs: Its arguments beside ``hidden_states``.

    Returns:
        Arrays, a dict for each block.
    """
    time, label = inputs["timestep"], inputs["class_labels"]
    blocks = []
    with torch.no_grad():
        for block in model.transformer_blocks:
            condition = block.norm1.emb(time, label, hidden_dtype=torch.float32)
            six = block.norm1.linear(nn.functional.silu(condition)).chunk(6, dim=1)
            names = ("shift_attn", "scale_attn", "gate_attn", "shift_mlp", "scale_mlp", "gate_mlp")
            blocks.append({
                **{name: _array(t[:, None]) for name, t in zip(names, six, strict=True)},
                "q": _affine(block.attn1.to_q), "k": _affine(block.attn1.to_k), "v": _affine(block.attn1.to_v),
                "out": _affine(block.attn1.to_out[0]), "up": _affine(block.ff.net[0].proj),
                "down": _affine(block.ff.net[2]),
            })  # fmt: skip
        condition = model.transformer_blocks[0].norm1.emb(time, label, hidden_dtype=torch.float32)
        shift, scale = model.proj_out_1(nn.functional.silu(condition)).chunk(2, dim=1)
    embed = model.pos_embed
    return {
        "patch": (_array(embed.proj.weight).reshape(embed.proj.weight.shape[0], -1).T.copy(), _array(embed.proj.bias)),
        "position": _array(embed.pos_embed),
        "blocks": blocks,
        "shift": _array(shift[:, None]),
        "scale": _array(scale[:, None]),
        "last": _affine(model.proj_out_2),
    }


def network(model: Any, w: dict[str, Any]) -> Callable[[Any], Any]:
    """The forward pass as a JAX function of ``hidden_states``.

    Args:
        model: The torch model, for its sizes.
        w: Of :func:`weights`.

    Returns:
        ``f(x)``, ``(B, C, H, W)`` to ``(B, C', H, W)``.
    """
    import jax
    import jax.numpy as jnp

    p, heads = model.patch_size, model.transformer_blocks[0].attn1.heads
    eps = model.transformer_blocks[0].norm1.norm.eps, model.transformer_blocks[0].norm3.eps, model.norm_out.eps

    def layer(x: Any, affine: Any) -> Any:
        return x @ affine[0] + affine[1]

    def norm(x: Any, eps: float) -> Any:
        c = x - x.mean(-1, keepdims=True)
        return c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + eps)

    def attention(x: Any, b: Any) -> Any:
        n, length, width = x.shape
        q, k, v = (layer(x, b[name]).reshape(n, length, heads, -1).transpose(0, 2, 1, 3) for name in "qkv")
        weight = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(width // heads), axis=-1)
        return layer((weight @ v).transpose(0, 2, 1, 3).reshape(n, length, width), b["out"])

    def f(x: Any) -> Any:
        n, c, height, width = x.shape
        rows, columns = height // p, width // p
        h = x.reshape(n, c, rows, p, columns, p).transpose(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, c * p * p)
        h = layer(h, w["patch"]) + w["position"]
        for b in w["blocks"]:
            h = h + b["gate_attn"] * attention(norm(h, eps[0]) * (1 + b["scale_attn"]) + b["shift_attn"], b)
            inner = layer(norm(h, eps[1]) * (1 + b["scale_mlp"]) + b["shift_mlp"], b["up"])
            h = h + b["gate_mlp"] * layer(jax.nn.gelu(inner, approximate=True), b["down"])
        h = layer(norm(h, eps[2]) * (1 + w["scale"]) + w["shift"], w["last"])
        h = h.reshape(n, rows, columns, p, p, -1)
        return jnp.einsum("nhwpqc->nchpwq", h).reshape(n, -1, height, width)

    return f


def products(model: Any, inputs: dict[str, Any], x: Tensor, tangents: Tensor) -> Callable[[], Tensor]:
    """K Jacobian-vector products, compiled.

    Args:
        model: A ``DiTTransformer2DModel``.
        inputs: Its arguments beside ``hidden_states``.
        x: ``hidden_states``.
        tangents: ``(K, *x.shape)``.

    Returns:
        A call that gives ``(K, ...)``; the first one compiles.
    """
    import jax

    f = network(model, weights(model, inputs))
    run = jax.jit(lambda x, ts: jax.vmap(lambda t: jax.jvp(f, (x,), (t,))[1])(ts))
    at, along = jax.device_put(_array(x)), jax.device_put(_array(tangents))
    return lambda: torch.from_numpy(np.array(run(at, along).block_until_ready()))
