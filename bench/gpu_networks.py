"""Predicted time of K tangents through whole networks on a GPU: part of ``make gpu-figures``, every figure a **model**.

A network of true size runs on the meta device, in bfloat16 as to its bytes, and every function that it calls is
counted: as it is, on a batch of K + 1, as ``torch.func.vmap(jvp)`` runs it eagerly, and as :func:`balanced_rep.jvp`
does. Time is that of :mod:`bench.roofline`, function by function.

Bytes of eager ``vmap(jvp)`` are passes over memory: of attention, whose fused kernels have no forward derivative, 6
over the matrix of scores for the primal and 11 for each tangent (8 where keys and values have none); of a norm, 7 over
its input and 11 over each tangent; of a SiLU or GELU, 10 and 2. Each function counts as one launch, though it is
several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bench._models import DIT_XL, SD14
from bench.roofline import DEVICES, Device

__all__ = ["Counted", "count", "networks", "per_function", "totals"]

ITEM = 2  # bytes of an element
WAYS = ("forward", "batch", "eager", "fused")


@dataclass
class Counted:
    """What functions of one kind do: ``(bytes, flops)`` of each call, by way."""

    calls: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def add(self, k: int, **work: tuple[float, float]) -> None:
        """Note a call; on a batch of 1 + k it does so many times its work, unless that is given."""
        n_bytes, flops = work["forward"]
        for way, done in {"batch": ((1 + k) * n_bytes, (1 + k) * flops), **work}.items():
            self.calls[way].append(done)

    def milliseconds(self, way: str, device: Device) -> float:
        """Return the model's time of all calls; those without bytes are part of another's launch."""
        return sum(device.microseconds(b, {"half matrix": f}) for b, f in self.calls[way] if b) / 1e3

    def sums(self, way: str) -> tuple[float, float]:
        """Return bytes and flops of all calls."""
        return sum(b for b, _ in self.calls[way]), sum(f for _, f in self.calls[way])


class _Counting(TorchFunctionMode):
    """Counts what functions do with tensors that have tangents, and with those that have none."""

    def __init__(self, moving: Tensor, n_tangents: int, ratios: Mapping[str, float]) -> None:
        super().__init__()
        self.k, self.ratios = n_tangents, ratios
        self.alive = [moving]  # keeps ids from being given again
        self.moving = {id(moving)}
        self.made: dict[int, str] = {}
        self.counted: dict[str, Counted] = defaultdict(Counted)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        moves = any(id(x) in self.moving for x in inputs)
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and moves:
                self.alive.append(value)
                self.moving.add(id(value))
        if isinstance(out, Tensor) and out.is_floating_point():
            name = getattr(func, "__name__", "").strip("_").removesuffix("_")
            getattr(self, f"_{_FUNCTIONS.get(name, 'other')}")(name, inputs, out, self.k if moves else 0)
        return out

    def _other(self, *_: Any) -> None:
        """Views, and what is too small to count."""

    def _product(self, name: str, inputs: list[Tensor], out: Tensor, k: int) -> None:
        x, w = inputs[0].numel() * ITEM, inputs[1].numel() * ITEM
        y, flops = out.numel() * ITEM, 2.0 * out.numel() * inputs[1][0].numel()
        once = x + w + y
        self.counted[name if k else f"{name}, no tangent"].add(
            k,
            forward=(once, flops),
            eager=(once + (k * (x + y) + w if k else 0), (1 + k) * flops),
            batch=((1 + k) * (x + y) + w, (1 + k) * flops),
            fused=((1 + k) * (x + y) + w, (1 + k) * flops),
        )

    def _norm(self, name: str, inputs: list[Tensor], out: Tensor, k: int) -> None:
        x = out.numel() * ITEM
        self.made[id(out)] = "norm"
        fused = (1 + k) * 2 * x * self.ratios[f"{name}_jvp"]
        self.counted[name].add(k, forward=(2 * x, 0), eager=((7 + 11 * k) * x if k else 2 * x, 0), fused=(fused, 0))

    def _activation(self, name: str, inputs: list[Tensor], out: Tensor, k: int) -> None:
        x = out.numel() * ITEM
        joins = name == "silu" and self.made.get(id(inputs[0])) == "norm"
        self.made[id(out)] = "waits"
        fused = 0 if joins else (1 + k) * 2 * x * self.ratios["activation_jvp"]
        self.counted[name].add(k, forward=(2 * x, 0), eager=((10 + 2 * k) * x if k else 2 * x, 0), fused=(fused, 0))

    def _pointwise(self, name: str, inputs: list[Tensor], out: Tensor, k: int) -> None:
        x = out.numel() * ITEM
        full = [t for t in inputs if t.numel() == out.numel()]
        forward = (1 + max(1, len(full))) * x
        tangents = 2 if name in ("mul", "div") else 0  # a constant that is added moves none of them
        if len(full) > 1 and all(id(t) in self.moving for t in full[:2]):
            tangents = 3 if name == "add" else 4
        fused = forward + k * min(tangents, 3) * x
        sources = {self.made.get(id(t)) for t in full}
        if len(full) == 1 and "norm" in sources:  # scale and shift behind a norm
            fused, self.made[id(out)] = 0, "norm"
        elif "waits" in sources:  # a gate, or a product with a constant: it was written and read, now it is not
            fused = max(fused - (1 + k) * 2 * x, 0)
        elif name == "mul" and len(full) == 1:
            self.made[id(out)] = "waits"
        self.counted["add, mul, div"].add(
            k, forward=(forward, 0), eager=(forward + k * tangents * x, 0), fused=(fused, 0)
        )

    def _copy(self, name: str, inputs: list[Tensor], out: Tensor, k: int) -> None:
        work = 2 * out.numel() * ITEM
        self.counted["cat, interpolate"].add(k, forward=(work, 0), eager=((1 + k) * work, 0), fused=((1 + k) * work, 0))

    def _attention(self, name: str, inputs: list[Tensor], out: Tensor, k: int) -> None:
        from balanced_rep.kernels.triton.attention_jvp import choose_tiling

        (query, key), width = inputs[:2], inputs[0].shape[-1]
        crossing = id(key) not in self.moving
        q, kv, scores = query.numel() * ITEM, 2 * key.numel() * ITEM, query.numel() // width * key.shape[-2] * ITEM
        product = 2.0 * query.numel() * key.shape[-2]
        tiling = choose_tiling(width, width, k, torch.bfloat16, crossing=crossing)
        again = 2 * -(-k // tiling.tangents)
        of_tangent = (8 * scores + 2 * q) if crossing else (11 * scores + 2 * (2 * q + kv))
        fused = (1 + k) * 2 * q + (kv if crossing else (1 + k) * kv)
        self.counted["attention, cross" if crossing else "attention, self"].add(
            k,
            forward=(2 * q + kv, 2 * product),
            eager=(6 * scores + 2 * q + kv + k * of_tangent, (2 + (2 if crossing else 4) * k) * product),
            fused=(fused * self.ratios["attention_jvp"], (again + (2 if crossing else 4) * k) * product),
        )


_FUNCTIONS = {
    **dict.fromkeys(("linear", "conv2d"), "product"),
    **dict.fromkeys(("group_norm", "layer_norm", "rms_norm"), "norm"),
    **dict.fromkeys(("silu", "gelu"), "activation"),
    **dict.fromkeys(("add", "radd", "iadd", "mul", "rmul", "imul", "div", "truediv"), "pointwise"),
    **dict.fromkeys(("cat", "interpolate", "contiguous", "clone"), "copy"),
    "scaled_dot_product_attention": "attention",
}


def networks() -> dict[str, tuple[torch.nn.Module, dict[str, Any]]]:
    """The networks and their inputs on the meta device; the first input is the one with tangents."""
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=SD14["size"], cross_attention_dim=SD14["cross_attention"])
        latents, text = torch.empty(1, 4, SD14["size"], SD14["size"]), torch.empty(1, 77, SD14["cross_attention"])
        heads, head_dim = DIT_XL["heads"], DIT_XL["head_dim"]
        dit = DiTTransformer2DModel(
            heads, head_dim, 4, 8, DIT_XL["layers"], sample_size=DIT_XL["size"], patch_size=2,
            norm_type="ada_norm_zero", num_embeds_ada_norm=1000,
        )  # fmt: skip
        when = torch.zeros(1, dtype=torch.long)
        small = torch.empty(1, 4, DIT_XL["size"], DIT_XL["size"])
    return {
        "SD1.4 UNet, 64 x 64": (unet, {"sample": latents, "timestep": when, "encoder_hidden_states": text}),
        "DiT-XL/2, 32 x 32": (dit, {"hidden_states": small, "timestep": when, "class_labels": when}),
    }


def count(
    model: torch.nn.Module, inputs: Mapping[str, Any], n_tangents: int, ratios: Mapping[str, float]
) -> dict[str, Counted]:
    """Run a network on the meta device.

    Args:
        model: The network.
        inputs: Its arguments; the first has tangents.
        n_tangents: K.
        ratios: Of an op, DRAM bytes over the fused minimum, as the executor counted them.

    Returns:
        Kind of function to what its calls do.
    """
    counting = _Counting(next(iter(inputs.values())), n_tangents, ratios)
    with torch.no_grad(), counting:
        model.eval()(**inputs)
    return dict(counting.counted)


def per_function(counted: Mapping[str, Counted]) -> list[list[str]]:
    """Return rows of a table: function, calls, GFLOP and MB eager and fused; those that matter, largest first."""
    rows = []
    for name, work in sorted(counted.items(), key=lambda item: -item[1].sums("eager")[0]):
        (eager, _), (fused, flops) = work.sums("eager"), work.sums("fused")
        cells = [len(work.calls["fused"]), *(round(n) for n in (flops / 1e9, eager / 1e6, fused / 1e6))]
        rows.append([name, *map(str, cells)])
    return rows


def totals(counted: Mapping[str, Counted]) -> list[list[str]]:
    """Return rows of a table: device, and milliseconds of a forward, of a batch of K + 1, eager and fused."""
    return [
        [device.name, *(f"{sum(work.milliseconds(way, device) for work in counted.values()):.1f}" for way in WAYS)]
        for device in DEVICES
    ]
