"""Every rule against torch.func.jvp, in float64, with strict=True: no case may take the fallback."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff import jvp
from balanced_rep.autodiff._registry import RULES, forms, function_name

# One tensor (2, 3, 4, 6): every entry is a function of it.
IMAGE = (2, 3, 4, 6)
INDEX = torch.tensor([2, 0, 1])
MASK = torch.arange(4 * 6).view(4, 6) % 3 == 0

VIEWS = {
    "view": lambda x: x.view(2, -1, 6),
    "view tuple": lambda x: x.view((6, 24)),
    "view size=": lambda x: x.view(size=(6, 24)),
    "reshape": lambda x: x.reshape(-1),
    "reshape kw": lambda x: torch.reshape(x, shape=(4, -1)),
    "view_as": lambda x: x.view_as(torch.empty(6, 24)),
    "permute": lambda x: x.permute(0, -1, 1, 2),
    "permute dims=": lambda x: torch.permute(x, dims=(3, 2, 1, 0)),
    "transpose": lambda x: x.transpose(-1, 1),
    "transpose kw": lambda x: torch.transpose(x, dim0=0, dim1=-2),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "movedim": lambda x: x.movedim((0, 1), (-1, 0)),
    "mT": lambda x: x.mT,
    "T": lambda x: x[0, 0].T,
    "t": lambda x: x[0, 0].t(),
    "mH": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous()).mH.resolve_conj()),
    "H": lambda x: x[0, 0].H,
    "adjoint": lambda x: torch.adjoint(x),
    "conj": lambda x: torch.view_as_real(((x * (1 + 2j)).conj() * 1j).resolve_conj()),
    "conj_physical": lambda x: x.conj_physical(),
    "imag": lambda x: (x * 1j).imag + torch.imag(x * 2j),
    "real": lambda x: (x * 1j).real + x.real,
    "plus": lambda x: +x,
    "resolve_neg": lambda x: x.resolve_neg(),
    "aten view": lambda x: torch.ops.aten.view.default(x, [6, 24]),
    "aten slice": lambda x: torch.ops.aten.slice(x, -1, 1, 5, 2),
    "aten alias": lambda x: torch.ops.aten.alias(x),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "unsqueeze 0": lambda x: torch.unsqueeze(x, dim=0),
    "squeeze": lambda x: x[:1, :, :1].squeeze(),
    "squeeze dim": lambda x: x[:1].squeeze(0),
    "squeeze no-op": lambda x: x.squeeze(1),
    "squeeze dims": lambda x: x[:1, :, :1].squeeze((0, 2)),
    "flatten": lambda x: x.flatten(),
    "flatten part": lambda x: torch.flatten(x, 1, -2),
    "flatten scalar": lambda x: x[0, 0, 0, 0].flatten(),
    "ravel": lambda x: x.ravel(),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)),
    "expand": lambda x: x[:1].expand(5, -1, -1, -1),
    "expand front": lambda x: x[0].expand(5, 3, 4, 6),
    "expand_as": lambda x: x[:1].expand_as(torch.empty(5, 3, 4, 6)),
    "broadcast_to": lambda x: torch.broadcast_to(x[0], (5, 3, 4, 6)),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, torch.zeros(1, 1)),
    "chunk": lambda x: x.chunk(2, dim=-1),
    "chunk fn": lambda x: torch.chunk(x, chunks=3, dim=1),
    "split": lambda x: x.split(4, -1),
    "split sizes": lambda x: torch.split(x, [1, 5], dim=3),
    "split_with_sizes": lambda x: x.split_with_sizes((1, 2), 1),
    "tensor_split": lambda x: torch.tensor_split(x, 4, dim=-1),
    "unbind": lambda x: x.unbind(1),
    "iterate": lambda x: [row * 2 for row in x],
    "select": lambda x: x.select(-1, 3),
    "narrow": lambda x: x.narrow(-1, 1, 3),
    "diagonal": lambda x: x.diagonal(0, -2, -1),
    "unfold view": lambda x: x.unfold(-1, 3, 2),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous()) * (1 + 2j)),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().view(2, 4, 18),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "clone": lambda x: x.transpose(0, 1).clone(),
    "item index": lambda x: x[1],
    "slices": lambda x: x[:, None, ..., 1:5:2],
    "negative": lambda x: x[-1, ..., -2:],
    "index tensor": lambda x: x[:, INDEX],
    "index list": lambda x: x[:, [2, 0]],
    "index empty list": lambda x: x[:, []],
    "tensor_split sections=": lambda x: torch.tensor_split(x, sections=2, dim=2)[1],
    "tensor_split indices=": lambda x: x.tensor_split(indices=(1, 3), dim=-1)[1],
    "index tensors": lambda x: x[:, INDEX, INDEX],
    "index apart": lambda x: x[:, INDEX, :, INDEX],
    "index and int": lambda x: x[0, :, :, INDEX],
    "index none apart": lambda x: x[:, INDEX, None, INDEX],
    "index 0-dim": lambda x: x[torch.tensor(1), INDEX],
    "mask": lambda x: x[:, :, MASK],
    "mask whole": lambda x: x[torch.ones(IMAGE, dtype=torch.bool)],
    "True": lambda x: x[True],
}  # fmt: skip

COPIES = {
    "cat": lambda x: torch.cat([x, x * 2], -1),
    "cat plain": lambda x: torch.cat([torch.ones(2, 5, 4, 6, dtype=x.dtype), x], dim=1),
    "cat dtype": lambda x: torch.cat([torch.ones(2, 5, 4, 6), x.double()], dim=-3),
    "concat": lambda x: torch.concat((x, x), 0),
    "cat empty": lambda x: torch.cat([torch.zeros(0, dtype=x.dtype), x]),
    "stack": lambda x: torch.stack([x, x * 2], -1),
    "stack plain": lambda x: torch.stack([torch.ones_like(x), x], dim=1),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x[0, 0, 0], x[0, 0, 0]]),
    "index_select": lambda x: x.index_select(1, INDEX),
    "index_select kw": lambda x: torch.index_select(x, dim=-3, index=INDEX),
    "flip": lambda x: x.flip(-1),
    "flip dims": lambda x: torch.flip(x, (1, -1)),
    "flip dims=": lambda x: x.flip(dims=[0]),
    "roll": lambda x: x.roll(2, -1),
    "roll flat": lambda x: torch.roll(x, 5),
    "roll several": lambda x: torch.roll(x, shifts=(1, -2), dims=(2, 3)),
    "gather": lambda x: x.gather(-1, torch.zeros(2, 3, 4, 2, dtype=torch.long) + 3),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat more": lambda x: x[0].repeat(2, 1, 1, 1),
    "tile": lambda x: torch.tile(x, (2, 1)),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "repeat_interleave flat": lambda x: torch.repeat_interleave(x, 2),
    "repeat_interleave tensor": lambda x: x.repeat_interleave(torch.tensor([1, 0, 2]), 1),
    "tril": lambda x: x.tril(1),
    "triu": lambda x: torch.triu(x),
    "cumsum": lambda x: x.cumsum(-1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, downscale_factor=2),
    "pixel_shuffle of a sample": lambda x: F.pixel_shuffle(x[0].repeat(4, 1, 1), 2),
    "pixel_unshuffle of a sample": lambda x: F.pixel_unshuffle(x[0], 2),
    "pixel_shuffle of samples of samples": lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1).unsqueeze(1), 2),
    "pad": lambda x: F.pad(x, (1, 2)),
    "pad value": lambda x: F.pad(x, (1, 2, 0, 3), "constant", 1.5),
    "pad negative": lambda x: F.pad(x, (-1, 2)),
    "pad reflect": lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect"),
    "pad circular": lambda x: F.pad(x, (1, 1, 2, 1), mode="circular"),
    "pad replicate 3d": lambda x: F.pad(x[0], (1, 1), mode="replicate"),
    "unfold": lambda x: F.unfold(x, 2, stride=2),
    "fold": lambda x: F.fold(F.unfold(x, 2), (4, 6), 2),
    "masked_fill": lambda x: x.masked_fill(MASK, 7.0),
    "where": lambda x: torch.where(MASK, x, 2.0),
    "where method": lambda x: x.where(x > 0, torch.zeros((), dtype=x.dtype)),
    "where both": lambda x: torch.where(x > 0, x * 2, x[:1] * 3),
    "where broadcast": lambda x: torch.where(torch.ones(5, 1, 1, 1, 1, dtype=torch.bool), x, 1.0),
    "float": lambda x: x.float().double(),
    "to": lambda x: x.to(torch.float32).to(x),
    "to, of a constant": lambda x: x * torch.ones(x.shape[-1], dtype=torch.int64).to(x),
    "to device": lambda x: x.to("cpu", torch.float64),
    "to same": lambda x: x.to(x.dtype),
    "type_as": lambda x: x.float().type_as(x),
    "type": lambda x: x.type(torch.float32),
    "type name": lambda x: x.type("torch.FloatTensor"),
}

LINEAR = {
    "sum": lambda x: x.sum(),
    "sum dim": lambda x: x.sum(-1),
    "sum dims": lambda x: torch.sum(x, dim=(0, -1), keepdim=True),
    "sum dtype": lambda x: x.sum(1, dtype=torch.float32),
    "sum empty dims": lambda x: x.sum(()),
    "mean": lambda x: x.mean(),
    "mean dims": lambda x: x.mean((-1, -2)),
    "mean axis": lambda x: torch.mean(x, axis=1),
    "interpolate nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "interpolate bilinear": lambda x: F.interpolate(x, size=(5, 7), mode="bilinear", align_corners=True),
    "interpolate area": lambda x: F.interpolate(x, size=(2, 3), mode="area"),
    "interpolate bicubic": lambda x: F.interpolate(x, size=(3, 5), mode="bicubic", antialias=True),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2, stride=1, padding=1, count_include_pad=False),
    "avg_pool2d single": lambda x: F.avg_pool2d(x[0], 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x[0], 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "max_pool2d single": lambda x: F.max_pool2d(x[0], 2),
    "max_pool1d": lambda x: F.max_pool1d(x[0], kernel_size=2),
    "max_pool2d ceil": lambda x: F.max_pool2d(x, 3, ceil_mode=True),
    "max_pool indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "max dim": lambda x: x.max(-1)[0],
    "max dim keepdim": lambda x: torch.max(x, dim=1, keepdim=True).values,
    "min dim": lambda x: x.min(dim=2)[0],
    "sort": lambda x: x.sort(-1, descending=True).values,
    "topk": lambda x: x.topk(2, dim=1)[0],
    "neg": lambda x: -x,
    "conv2d single": lambda x: F.conv2d(x[0], _w(5, 3, 2, 2), _w(5)),
    "conv1d": lambda x: F.conv1d(x[0], _w(5, 4, 3), padding=1),
    "conv2d": lambda x: F.conv2d(x, _w(6, 3, 3, 3), _w(6), 2, 1),
    "conv2d grouped": lambda x: F.conv2d(x, _w(6, 1, 3, 3), _w(6), padding="same", groups=3, dilation=2),
    "conv2d no bias": lambda x: torch.conv2d(x, _w(6, 3, 1, 1)),
    "conv3d": lambda x: F.conv3d(x.unsqueeze(2), _w(2, 3, 1, 2, 2), _w(2), stride=(1, 2, 1)),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x[0], _w(4, 2, 3), _w(2), stride=2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, _w(3, 2, 3, 3), _w(2), stride=2, padding=1, output_padding=1),
    "conv_transpose3d": lambda x: F.conv_transpose3d(x.unsqueeze(2), _w(3, 2, 1, 2, 2)),
    "linear": lambda x: F.linear(x, _w(5, 6), _w(5)),
    "linear kw": lambda x: F.linear(input=x, weight=_w(5, 6), bias=None),
    "linear vector": lambda x: F.linear(x[0, 0, 0], _w(5, 6), _w(5)),
    "linear weight moves": lambda x: F.linear(_w(2, 5, 6), x[0, 0], x[0, 0, :, 0]),
    "linear both move": lambda x: F.linear(x, x[0, 0], _w(4)),
    "linear bias moves": lambda x: F.linear(_w(2, 5), _w(6, 5), x[0, 0, 0]),
    "matmul plain": lambda x: x @ _w(6, 5),
    "matmul plain batched": lambda x: torch.matmul(x, _w(3, 6, 5)),
    "matmul plain left": lambda x: torch.matmul(_w(7, 4), x),
    "matmul left batched": lambda x: _w(5, 2, 3, 7, 4) @ x,
    "matmul both": lambda x: x @ x.mT,
    "matmul broadcast": lambda x: x @ x[0, 0].T,
    "matmul broadcast left": lambda x: x[0, 0] @ x.mT,
    "matmul vector": lambda x: x @ x[0, 0, 0],
    "matmul vector left": lambda x: x[0, 0, :, 0] @ x,
    "matmul vectors": lambda x: x[0, 0, 0] @ x[1, 1, 1],
    "matmul vector plain": lambda x: x[0, 0, 0] @ _w(6, 5),
    "matmul plain vector": lambda x: x @ _w(6),
    "matmul vector batched": lambda x: x[0, 0, 0] @ _w(3, 6, 5),
    "rmatmul": lambda x: x[0, 0].__rmatmul__(_w(5, 4)),
    "mm": lambda x: torch.mm(x[0, 0], mat2=_w(6, 2)),
    "bmm": lambda x: torch.bmm(x[0], x[1].mT),
    "mv": lambda x: torch.mv(x[0, 0], x[0, 1, 0]),
    "dot": lambda x: torch.dot(x[0, 0, 0], x[0, 1, 0]),
    "addmm": lambda x: torch.addmm(x[0, 0, 0, :4], x[0, 0], x[0, 1].T, beta=0.5, alpha=2),
    "addmm beta 0": lambda x: torch.addmm(torch.zeros(4, 4, dtype=x.dtype), x[0, 0], x[0, 1].T, beta=0),
    "baddbmm": lambda x: torch.baddbmm(_w(3, 4, 4), x[0], x[1].mT, beta=0, alpha=0.3),
    "addbmm": lambda x: torch.addbmm(_w(4, 4), x[0], batch2=x[1].mT),
    "addmv": lambda x: torch.addmv(x[0, 0, :, 0], x[0, 0], x[0, 0, 0]),
    "einsum permute": lambda x: torch.einsum("nchw->nhwc", x),
    "einsum plain": lambda x: torch.einsum("nchw,cd->ndhw", x, _w(3, 5)),
    "einsum both": lambda x: torch.einsum("nchw, nchv -> nchwv", x, x),
    "einsum dots": lambda x: torch.einsum("...w,...w->...", x, x * 2),
    "einsum implicit": lambda x: torch.einsum("ij,jk", x[0, 0], x[0, 1].T),
    "einsum three": lambda x: torch.einsum("i,j,k->ijk", x[0, 0, 0], _w(2), x[0, 0, 1]),
    "einsum list": lambda x: torch.einsum("bij,bjk->bik", [x[0], x[1].mT]),
    "einsum diagonal": lambda x: torch.einsum("ii->i", x[0, 0, :, :4]),
}  # fmt: skip

ONE = torch.tensor(1.5, dtype=torch.float64)
POINTWISE = {
    **{name: getattr(F, name) for name in ("silu", "gelu", "softplus", "logsigmoid", "mish", "elu", "celu",
        "selu", "relu", "relu6",
        "hardtanh", "leaky_relu", "hardswish", "hardsigmoid")},
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh", "exp", "exp2", "expm1", "square", "reciprocal", "sin",
        "cos", "atan", "erf", "abs", "neg", "relu")},
    **{f"{name} of a square": lambda x, name=name: getattr(torch, name)(x * x + 0.1)
       for name in ("log", "log1p", "log2", "sqrt", "rsqrt")},
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus beta": lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    "elu alpha": lambda x: F.elu(x, 0.7),
    "leaky_relu slope": lambda x: F.leaky_relu(x, negative_slope=0.3),
    "hardtanh bounds": lambda x: F.hardtanh(x, -0.3, 0.4),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp min": lambda x: torch.clamp(x, min=0.1),
    "clamp tensor": lambda x: x.clamp(max=_w(6)),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clip": lambda x: x.clip(max=0.2),
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "method": lambda x: x.sigmoid() + x.tanh() * x.exp(),
    "add": lambda x: x + x[:1],
    "add plain": lambda x: x + _w(6),
    "add plain larger": lambda x: _w(5, 1, 1, 1, 1) + x,
    "add number": lambda x: 2 + x + 1.5,
    "add alpha": lambda x: torch.add(x, x[0], alpha=3),
    "add alpha plain": lambda x: torch.add(_w(6), x, alpha=-2),
    "add 0-dim": lambda x: x + ONE,
    "sub": lambda x: x - x[0, 0, 0],
    "sub plain": lambda x: x - _w(6),
    "rsub": lambda x: 3 - x,
    "rsub fn": lambda x: torch.rsub(x, 2.0, alpha=2),
    "plain sub": lambda x: _w(3, 1, 1) - x,
    "mul": lambda x: x * x[:, :1],
    "mul plain": lambda x: x * _w(3, 1, 1),
    "mul larger": lambda x: x[0] * _w(5, 1, 1, 1),
    "mul rank": lambda x: x * x[0, 0, 0],
    "mul number": lambda x: 2 * x * 3.0,
    "div": lambda x: x / (x[:1] ** 2 + 1),
    "div plain": lambda x: x / _w(6),
    "div number": lambda x: x / 3,
    "rdiv": lambda x: 2.0 / (x * x + 1),
    "plain div": lambda x: _w(6) / (x * x + 1),
    "true_divide": lambda x: torch.true_divide(x, 2),
    "pow 2": lambda x: x.pow(2),
    "pow 3": lambda x: x**3,
    "pow 0": lambda x: torch.pow(x, 0),
    "pow -1": lambda x: (x * x + 1) ** -0.5,
    "addcmul": lambda x: torch.addcmul(x, x, _w(6), value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x * x + 1, value=2),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "glu": lambda x: F.glu(x, 3),
    "dropout eval": lambda x: F.dropout(x, 0.5, training=False),
    "dropout p=0": lambda x: F.dropout(x, 0.0),
    "positive": lambda x: x * +1,
}  # fmt: skip

NORMS = {
    "group_norm": lambda x: F.group_norm(x.repeat(1, 2, 1, 1), 3, _w(6), _w(6), 1e-5),
    "group_norm plain": lambda x: F.group_norm(x, 1),
    "group_norm fn": lambda x: torch.group_norm(x, 3, _w(3), None),
    "group_norm transposed": lambda x: F.group_norm(x.flatten(2).transpose(1, 2), 2, _w(24), _w(24)),
    "group_norm 2d": lambda x: F.group_norm(x[0, 0], 3, _w(6)),
    "layer_norm": lambda x: F.layer_norm(x, (6,), _w(6), _w(6)),
    "layer_norm plain": lambda x: F.layer_norm(x, [6], eps=1e-3),
    "layer_norm dims": lambda x: F.layer_norm(x, (4, 6), _w(4, 6)),
    "layer_norm fn": lambda x: torch.layer_norm(x, (6,)),
    "layer_norm transposed": lambda x: F.layer_norm(x.transpose(1, 2), (6,)),
    "rms_norm": lambda x: F.rms_norm(x, (6,), _w(6), 1e-5),
    "rms_norm eps": lambda x: F.rms_norm(x * 1e-6, (6,)),
    "batch_norm": lambda x: F.batch_norm(x, _w(3), _w(3) ** 2 + 0.1, _w(3), _w(3)),
    "batch_norm 2d": lambda x: F.batch_norm(x[0, 0], _w(6), _w(6) ** 2 + 0.1),
    "softmax": lambda x: x.softmax(-1),
    "softmax dim": lambda x: F.softmax(x, dim=1),
    "softmax dtype": lambda x: torch.softmax(x.float(), 2, dtype=torch.float64),
    "softmax huge": lambda x: (x * 1e3).softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -2),
    "logsumexp": lambda x: x.logsumexp((1, -1)),
    "logsumexp keepdim": lambda x: torch.logsumexp(x, 1, keepdim=True),
    "var": lambda x: x.var(-1),
    "var all": lambda x: x.var(),
    "var biased": lambda x: torch.var(x, (1, -1), unbiased=False, keepdim=True),
    "var correction": lambda x: torch.var(x, dim=2, correction=0),
    "std": lambda x: x.std((0, 1)),
    "std bool": lambda x: x.std(False),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "norm": lambda x: x.norm(dim=1),
    "norm all": lambda x: torch.norm(x),
    "normalize": lambda x: F.normalize(x, dim=1),
}

ALL = {**VIEWS, **COPIES, **LINEAR, **POINTWISE, **NORMS}


def _w(*shape: int) -> Tensor:
    """A weight; made without random numbers, which are refused inside a function."""
    n = math.prod(shape)
    return torch.sin(torch.arange(n, dtype=torch.float64) ** 1.5 + n).view(shape)


@pytest.mark.parametrize("name", ALL)
def test_rule(name: str, agrees: Callable, draw: Callable):
    agrees(ALL[name], draw(*IMAGE))


@pytest.mark.parametrize("name", [*COPIES, *LINEAR, *POINTWISE, *NORMS])
def test_rule_on_memory_that_is_not_contiguous(name: str, agrees: Callable, draw: Callable):
    agrees(lambda x: ALL[name](x.permute(2, 0, 3, 1)), draw(3, 6, 2, 4))


@pytest.mark.parametrize("name", ALL)
def test_rule_in_float32_gives_the_dtypes_of_torch(name: str, draw: Callable, monkeypatch: pytest.MonkeyPatch):
    weights = _w
    monkeypatch.setitem(globals(), "_w", lambda *shape: weights(*shape).float())
    x, f = draw(*IMAGE).float(), ALL[name]
    want = f(x)
    got, tangents = jvp(f, x, torch.zeros(2, *IMAGE))
    for g, w in zip(*(t if isinstance(t, list | tuple) else (t,) for t in (got, want)), strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w)
    for t in tangents if isinstance(tangents, list | tuple) else (tangents,):
        assert not t.double().nan_to_num(9.0).any(), "the tangent of zero is zero"


def test_every_rule_has_a_case():
    """Runs all cases once more and asks which rules were never used."""
    from balanced_rep.autodiff._inputs import read_inputs
    from balanced_rep.autodiff._jvp import run_chunks
    from balanced_rep.autodiff._session import Session

    session, x = Session(strict=True), _w(*IMAGE)
    for f in ALL.values():
        run_chunks(f, read_inputs(x, x[None]), {}, None, session)
    used = {name for route, name in session.calls if route in ("rule", "composite")}
    own = {r.name for r in RULES.values() if r.kind != "library"}
    elsewhere = {
        "scaled_dot_product_attention", "multi_head_attention_forward",  # test_attention
        "__setitem__", "__iter__", "copy_", "fill_", "zero_", "__deepcopy__",  # test_inplace
        "moments", "energy_entropy", "meshgrid", "linalg_diagonal", "hsplit", "vsplit", "dsplit", "sum_to_size",
        "atleast_1d", "atleast_2d", "atleast_3d",  # test_edges
        "rrelu",  # test_inplace
        "cpu", "cuda", "double", "half", "bfloat16", "cfloat", "cdouble",  # casts, as float is
        "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool3d", "max_pool3d", "max_pool1d_with_indices",
        "max_pool3d_with_indices", "upsample", "upsample_nearest", "upsample_bilinear", "channel_shuffle",
        "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "row_stack",
        "clamp_max", "reshape_as", "__rdiv__", "rsub",
    }  # fmt: skip
    assert own - used <= elsewhere, f"no case for {sorted(own - used - elsewhere)}"


def test_rules_are_registered_for_every_form():
    assert {function_name(f) for f in forms("add")} == {"add"}
    assert all(f in RULES for name in ("add", "silu", "softmax", "matmul") for f in forms(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu tanh", "softmax", "mul", "div", "add", "relu"])
def test_half_types_are_as_good_as_torch(name: str, dtype: torch.dtype, draw: Callable):
    x, t = draw(*IMAGE).to(dtype), draw(4, *IMAGE).to(dtype)
    f = ALL[name]
    want = torch.func.vmap(lambda v: torch.func.jvp(f, (x.double(),), (v,))[1])(t.double())
    peer = torch.func.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1])(t).double()
    got = jvp(f, x, t)[1].double()
    assert (got - want).norm() <= 1.5 * (peer - want).norm() + 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "f",
    [
        lambda x: F.group_norm(x, 3, _w(3).to(x.dtype), _w(3).to(x.dtype)),
        lambda x: F.layer_norm(x, (6,), _w(6).to(x.dtype)),
        lambda x: F.rms_norm(x, (6,), _w(6).to(x.dtype)),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.linear(x, _w(8, 6).to(x.dtype), _w(8).to(x.dtype)),
        lambda x: F.conv2d(x, _w(2, 3, 3, 3).to(x.dtype)),
    ],
    ids=["group_norm", "layer_norm", "rms_norm", "attention", "linear", "conv2d"],
)
def test_half_types_with_statistics_are_as_good_as_torch(f: Callable, dtype: torch.dtype, draw: Callable):
    x, t = draw(*IMAGE).to(dtype), draw(4, *IMAGE).to(dtype)
    got, tangents = jvp(f, x, t)
    assert got.dtype == tangents.dtype == dtype
    want = jvp(f, x.double(), t.double(), strict=True)[1]
    from balanced_rep.autodiff._fallback import differentiable

    with differentiable():
        peer = torch.func.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1])(t).double()
    assert (tangents.double() - want).norm() <= 1.5 * (peer - want).norm() + 1e-12


def test_infinite_and_nan_tangents_stay_what_they_are(draw: Callable):
    x, t = draw(2, 3), torch.zeros(2, 2, 3, dtype=torch.float64)
    t[0, 0, 0], t[1, 1, 1] = math.nan, math.inf
    _, jv = jvp(lambda x: x * 2 + 1, x, t, strict=True)
    assert jv[0, 0, 0].isnan()
    assert jv[1, 1, 1].isinf()
    assert jv.isfinite().sum() == jv.numel() - 2
    assert jvp(lambda x: F.layer_norm(F.silu(x), (3,)), x, t)[1][0, 0].isnan().all()
