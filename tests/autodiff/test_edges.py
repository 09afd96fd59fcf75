"""Corners of the rules: operands that broadcast either way, complex values, samples without spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep import representation_stats
from balanced_rep.autodiff import Dual, UnsupportedError, dual, jvp, register_rule
from balanced_rep.autodiff._registry import RULES

LARGE = torch.sin(torch.arange(24.0, dtype=torch.float64) ** 1.5).view(3, 4, 2)
# What moves may be smaller than what does not: more dims, larger dims, or both.
BROADCAST = {
    "c - x": lambda x: LARGE - x,
    "c - 2 x": lambda x: torch.sub(LARGE, x, alpha=2),
    "c + 2 x": lambda x: torch.add(LARGE, x, alpha=2),
    "rsub": lambda x: torch.rsub(x, LARGE, alpha=3),
    "c - sum": lambda x: LARGE - x.sum(),
    "integers - x": lambda x: torch.arange(24).view(3, 4, 2) - x,
    "x - c": lambda x: x - LARGE,
    "c + x": lambda x: LARGE + x,
    "c x": lambda x: LARGE * x,
    "c / x": lambda x: LARGE / (x * x + 1),
    "x / c": lambda x: x / LARGE,
    "where": lambda x: torch.where(x > 0, x, LARGE),
    "where other": lambda x: torch.where(x > 0, LARGE, x.sum()),
    "where condition": lambda x: torch.where(LARGE > 0, x, 1.0),
    "masked_fill": lambda x: x.masked_fill(LARGE > 0, 2.0),
    "clamp": lambda x: x.clamp(min=LARGE),
    "lerp": lambda x: torch.lerp(LARGE, x, 0.3),
    "lerp end": lambda x: torch.lerp(x, LARGE, 0.3),
    "addcmul": lambda x: torch.addcmul(LARGE, x, x, value=-2),
}


@pytest.mark.parametrize("shape", [(2,), (4, 1), (3, 1, 1), (), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("name", BROADCAST)
def test_what_moves_broadcasts_to_what_does_not(name: str, shape: tuple[int, ...], agrees: Callable, draw: Callable):
    agrees(BROADCAST[name], draw(*shape))


@pytest.mark.parametrize(
    "f",
    [
        lambda z: z.abs(), lambda z: z.var(), lambda z: z.std(-1, keepdim=True), lambda z: z.norm(), lambda z: z.exp(),
        lambda z: z * z, lambda z: z.sqrt(), lambda z: z.mean(), lambda z: z @ z.mT, lambda z: z.abs() ** 2j,
    ],
    ids=["abs", "var", "std", "norm", "exp", "square", "sqrt", "mean", "matmul", "power"],
)  # fmt: skip
def test_complex_values_inside_a_function(f: Callable, agrees: Callable, draw: Callable):
    def real(x: Tensor) -> Tensor:
        y = f(torch.complex(x, x.sin() + 2))
        return torch.view_as_real(y) if y.is_complex() else y

    agrees(real, draw(3, 4), strict=False)


@pytest.mark.parametrize("f", [lambda x: x.std(-1), lambda x: (x - x).std(), lambda x: x[:, :1].std(-1, correction=0)])
def test_std_of_a_constant_has_the_tangent_zero(f: Callable, agrees: Callable):
    agrees(f, torch.ones(2, 3, dtype=torch.float64))


def test_nothing_of_a_larger_constant_is_left_unwritten(draw: Callable):
    """``out=`` of a view would shrink it and leave the rest of the result as it was found in memory."""
    jv = jvp(lambda x: torch.zeros(50, 3, dtype=x.dtype) - x, draw(3), draw(2, 3), strict=True)[1]
    assert torch.equal(jv, -draw(2, 3)[:, None].expand(2, 50, 3))


ONES = torch.ones(2, 3, dtype=torch.float64)


def _guided(x: Tensor) -> Tensor:
    """Classifier guidance as it is usually written: without the refusal, its part would have no tangent."""
    with torch.enable_grad():
        z = x.detach().requires_grad_(True)
        return x - torch.autograd.grad(z.pow(3).sum(), z)[0]


def _guided_by_attribute(x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach()
        z.requires_grad = True
        z.pow(3).sum().backward()
    assert z.grad is not None
    return x - z.grad


TRANSFORMED = {
    "autograd.grad": _guided,
    "backward": _guided_by_attribute,
    "func.grad": torch.func.grad(lambda z: z.pow(3).sum()),
    "func.grad of a closure": lambda x: torch.func.grad(lambda z: (z.pow(3) * x).sum())(ONES),
    "func.jvp": lambda x: torch.func.jvp(torch.sin, (x,), (ONES,))[1],
    "func.jvp of a closure": lambda x: torch.func.jvp(lambda z: z * x, (ONES,), (ONES,))[1],
    "func.vjp": lambda x: torch.func.vjp(torch.sin, ONES)[1](x)[0],
    "vmap": lambda x: torch.vmap(lambda row: row * row.sum())(x),
    "vmap of a batch of batches": lambda x: torch.vmap(lambda row: row * row.sum())(torch.stack([x, x])),
    "vmap of a closure": lambda x: torch.vmap(lambda w: w * x)(ONES[:, :1]),
    "br.jvp": lambda x: jvp(torch.sin, x, ONES[None])[1],
    "br.jvp of a closure": lambda x: jvp(lambda z: z * x, ONES, torch.ones(2, 2, 3, dtype=torch.float64))[1],
    "cond": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_inside_a_function_are_refused(name: str, draw: Callable):
    """Some of them would otherwise give a wrong value, or tangents of zero, without an error."""
    with pytest.raises((UnsupportedError, TypeError), match=r"br\.jvp: "):
        jvp(TRANSFORMED[name], draw(2, 3), draw(2, 2, 3))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_constants_and_raw_strides_are_refused(draw: Callable):
    eye = torch.eye(3, dtype=torch.float64)
    for sparse in (eye.to_sparse(), eye.to_sparse_csr()):
        with pytest.raises(UnsupportedError, match=r"matmul of a value with tangents and a sparse tensor.*to_dense"):
            jvp(lambda x, s=sparse: s @ x.T, draw(2, 3), draw(1, 2, 3))
    x, t = draw(2, 3), draw(1, 2, 3)
    torch.testing.assert_close(jvp(lambda x: x @ (2 * eye).to_sparse(), x, t), (2 * x, 2 * t))
    for f in (torch.as_strided_copy, lambda x, *how: torch.as_strided_scatter(x, x[0], *how)):
        with pytest.raises(UnsupportedError, match="reinterprets memory"):
            jvp(lambda x, f=f: f(x.T, (3,), (1,)), x, t)
    with pytest.raises(UnsupportedError, match="it makes a sparse tensor, which cannot carry tangents"):
        jvp(lambda x: x.to_sparse(), draw(2, 3), draw(1, 2, 3))


def test_reverse_mode_that_meets_no_activation_is_left_alone(draw: Callable):
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    jvp(lambda x: x * weight.requires_grad_(True), draw(2, 3), draw(1, 2, 3))
    jvp(lambda x: x.detach().requires_grad_(False) * x, draw(2, 3), draw(1, 2, 3))


SCALARS = {
    "softmax": lambda x: x.softmax(-1),
    "sum": lambda x: x.sum(0) + x.mean(-1),
    "logsumexp": lambda x: x.logsumexp(0),
    "max": lambda x: x.max(0).values,
    "sort": lambda x: x.sort().values,
    "cumsum": lambda x: x.cumsum(0),
    "transpose": lambda x: x.transpose(0, -1).movedim(0, -1),
    "roll": lambda x: x.roll(1),
    "flip": lambda x: x.flip(-1),
    "index_select": lambda x: x.index_select(0, torch.tensor([0])),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_tensor_without_dims_has_the_dim_0(name: str, agrees: Callable, draw: Callable):
    agrees(SCALARS[name], draw(), strict=False)


def test_a_wrong_dim_is_still_an_error(draw: Callable):
    for f, x in ((lambda x: x.softmax(1), draw()), (lambda x: x.softmax(2), draw(2, 3))):
        with pytest.raises(IndexError, match="Dimension out of range"):
            jvp(f, x, x[None])


OVERLAPPING = {
    "expand": lambda x: torch.celu(x[:1].expand(4, 6)),
    "expand written": lambda x: x[:1].expand(4, 6).index_add(0, torch.tensor([0]), x[:1]),
    "unfold": lambda x: torch.celu(x.flatten().unfold(0, 2, 1)),
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_a_fallback_takes_memory_that_overlaps(name: str, draw: Callable):
    """By hand: torch's own forward mode refuses such tangents, or writes the same one twice."""
    x, t, step = draw(4, 6), draw(2, 4, 6), 1e-6
    f = OVERLAPPING[name]
    y, jv = jvp(f, x, t)
    want = torch.stack([(f(x + step * v) - f(x - step * v)) / (2 * step) for v in t])
    torch.testing.assert_close(y, f(x))
    torch.testing.assert_close(jv, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.sum(dtype=torch.long) * 1.0,
        lambda x: x.sum(0, True, dtype=torch.int) * 1.0,
        lambda x: x.cumsum(1, dtype=torch.long) * 1.0,
        lambda x: torch.cumsum(x, dim=0, dtype=torch.int32) * 1.0,
    ],
)
def test_reductions_to_integers_have_no_tangent(f: Callable, draw: Callable):
    x, t = 5 * draw(3, 4), 5 * draw(2, 3, 4)
    y, jv = jvp(lambda x: [f(x), x * 1.0], x, t)
    torch.testing.assert_close(y[0], f(x))
    assert not jv[0].any()


def test_integers_are_no_duals():
    with pytest.raises(UnsupportedError, match=r"torch\.int64 has no tangents"):
        Dual(torch.zeros(3, 2, dtype=torch.long))


@pytest.mark.parametrize("dim", [[], ()])
def test_no_dims_are_all_dims(dim: Any, draw: Callable):
    x, t = draw(3, 4), draw(2, 3, 4)
    for f in (torch.var, torch.std, torch.linalg.vector_norm, torch.sum, torch.mean):
        y, jv = jvp(lambda x, f=f: f(x, dim=dim), x, t)
        want = torch.func.vmap(lambda v, f=f: torch.func.jvp(f, (x,), (v,))[1])(t)  # dim=[] gives nan in torch
        torch.testing.assert_close(y, f(x, dim=dim))
        torch.testing.assert_close(jv, want)


ALIASES = {
    "plus": lambda x: +x,
    "adjoint": lambda x: x.adjoint(),
    "mH": lambda x: x.mH,
    "conj_physical": lambda x: x.conj_physical(),
    "_VF.split": lambda x: torch._VF.split(x, 1)[0],  # pyright: ignore[reportAttributeAccessIssue]
    "linalg.diagonal": lambda x: torch.linalg.diagonal(x),
    "meshgrid": lambda x: torch.meshgrid(x[1, :1], x[2, :1], indexing="ij")[1],
    "meshgrid xy": lambda x: torch.meshgrid([x[1, :1], x[0, :1].detach() + 1, x[2, :1]], indexing="xy")[2],
    "aten view": lambda x: torch.ops.aten.view(x, [24]),
    "aten t": lambda x: torch.ops.aten.t.default(x),
    "aten slice": lambda x: torch.ops.aten.slice.Tensor(x, 0, 0, 2),
    "aten select": lambda x: torch.ops.aten.select.int(x, 0, 1),
    "aten alias": lambda x: torch.ops.aten.alias.default(x),
    "aten expand": lambda x: torch.ops.aten.expand(x, [4, 6]),
    "aten to": lambda x: torch.ops.aten.to.dtype(x, torch.float64),
}


@pytest.mark.parametrize("name", ALIASES)
def test_writes_through_an_alias_are_seen(name: str, agrees: Callable, draw: Callable):
    def both(x: Tensor) -> list[Tensor]:
        x = x * 1.0
        y = ALIASES[name](x)
        y.mul_(2.0)
        x.add_(x)
        return [x, y * 1.0]

    agrees(both, draw(4, 6))


def test_a_view_without_a_rule_is_refused(draw: Callable):
    with pytest.raises(UnsupportedError, match="unsafe_chunk returns a view of its input"):
        jvp(lambda x: torch.unsafe_chunk(x, 3)[0], draw(2, 3), draw(1, 2, 3))


PIECES = {
    "hsplit": 3, "vsplit": 2, "dsplit": (1, 3), "hsplit of indices": (1, 2), "vsplit of indices": [1],
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_splits_along_their_own_dim_are_views(name: str, agrees: Callable, draw: Callable):
    how, name = PIECES[name], name.split()[0]
    for f in (getattr(torch, name), getattr(Tensor, name)):

        def both(x: Tensor, f: Callable = f) -> list[Tensor]:
            x = x * 1.0
            pieces = f(x, how)
            pieces[0].mul_(2.0)
            return [x * 1.0, *(p * 1.0 for p in pieces)]

        agrees(both, draw(4, 6, 6))


def test_splits_and_sums_that_do_not_fit(draw: Callable, agrees: Callable):
    agrees(lambda x: torch.hsplit(x, 3), draw(6))
    for f, message in {
        (lambda x: torch.hsplit(x, 4)): "not divisible by 4",
        (lambda x: torch.dsplit(x, 2)): "at least 3 dims",
        (lambda x: torch.vsplit(x[0], 2)): "at least 2 dims",
        (lambda x: torch.hsplit(x[0, 0], 2)): "at least 1 dims",
        (lambda x: x.sum_to_size(4, 6)): "not expandable",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            jvp(f, draw(2, 6), draw(1, 2, 6))


@pytest.mark.parametrize("keyword", ["sections", "indices", "tensor_indices_or_sections"])
def test_tensor_split_by_keyword(keyword: str, agrees: Callable, draw: Callable):
    how = {"sections": 4, "indices": (1, 3), "tensor_indices_or_sections": torch.tensor(3)}[keyword]
    agrees(lambda x: torch.tensor_split(x, dim=1, **{keyword: how}), draw(2, 6))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_at_least_so_many_dims(n: int, shape: tuple[int, ...], agrees: Callable, draw: Callable):
    f = getattr(torch, f"atleast_{n}d")

    def both(x: Tensor) -> list[Tensor]:
        x = x * 1.0
        y = f(x)
        y.mul_(2.0)
        return [x * 1.0, y * 1.0, *f(x, x.sum())]

    agrees(both, draw(*shape))


def test_sum_to_size(agrees: Callable, draw: Callable):
    for size in ((3, 6), (1, 6), (6,), (1,), (3, 1), ()):
        agrees(lambda x, s=size: x.sum_to_size(s), draw(3, 6))

    def same(x: Tensor) -> Tensor:
        x = x * 1.0
        x.sum_to_size(3, 6).mul_(2)
        return x * 1.0

    agrees(same, draw(3, 6))


@pytest.mark.parametrize(
    "index", [[], [True, False, True], [2, 0], [[0, 1], [1, 2]], [slice(0, 2), 1], [None, 1], [torch.tensor([0, 2]), 1],
              ([], [1]), (slice(None), []), ([[0, 1], [2, 0]],)], ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_lists_as_indices(index: Any, agrees: Callable, draw: Callable):
    agrees(lambda x: x[index] * 2, draw(3, 6))

    def written(x: Tensor) -> Tensor:
        y = x * 1.0
        y[index] = x[index].sin()
        return y

    if not isinstance(index, tuple) or [] not in index or index[0] != []:
        agrees(written, draw(3, 6))


AS = {
    "expand_as": lambda a, b: a[:1].expand_as(b), "view_as": lambda a, b: a.view_as(b),
    "reshape_as": lambda a, b: a.t().reshape_as(b),
}  # fmt: skip


@pytest.mark.parametrize("name", AS)
@pytest.mark.parametrize("moving", ["a", "b", "both"])
def test_the_shape_of_another_value(name: str, moving: str, agrees: Callable, draw: Callable):
    c = draw(2, 3)

    def f(x: Tensor) -> Tensor:
        a, b = (x, c) if moving == "a" else (c, x) if moving == "b" else (x, x * 2)
        return AS[name](a, b) + b

    agrees(f, draw(2, 3))


@pytest.mark.filterwarnings("ignore:var")
def test_reductions_over_no_dims(agrees: Callable, draw: Callable):
    for dim in ((), 0, -1, (0,)):
        agrees(lambda x, d=dim: x.logsumexp(d), draw(), strict=dim == ())
        agrees(lambda x, d=dim: torch.special.logsumexp(x * 2, d, keepdim=True), draw(), strict=dim == ())
    agrees(lambda x: x.logsumexp((0, -1)), draw(2, 3))
    agrees(lambda x: x.var(0), draw(0, 3))
    agrees(lambda x: x.var(), draw(0))


def test_index_fill_by_a_value_that_moves(agrees: Callable, draw: Callable):
    """torch's batching rule for it takes the first value for all."""
    at, c = torch.tensor([0, 2]), draw(4)
    agrees(lambda v: c.index_fill(0, at, v), draw(), strict=False)
    agrees(lambda x: (x * 1).index_fill_(0, at, x.sum()), draw(4), strict=False)
    agrees(lambda x: x.index_fill(0, at, 2.0), draw(4), strict=False)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "rsub", "masked_fill"])
@pytest.mark.parametrize("moving", ["x", "y", "both"])
def test_a_value_without_dims_does_not_decide_the_dtype(op: str, moving: str):
    """With the slots in front of it, torch would take it for a tensor with dims."""
    double, single = torch.rand(3, dtype=torch.float64) + 1, torch.rand(3) + 1
    for a, b in ((single[0], double[0]), (double[0], single[0]), (single, double[0]), (double[0], single)):
        if op == "masked_fill" and b.dim():
            continue

        def f(*v: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            x, y = (v[0] if moving != "y" else a), (v[-1] if moving != "x" else b)
            return x.masked_fill(a > 0, y) if op == "masked_fill" else getattr(torch, op)(x, y)

        given = {"x": (a,), "y": (b,), "both": (a, b)}[moving]
        y, jv = jvp(f, given, tuple(torch.ones(2, *v.shape, dtype=v.dtype) for v in given))
        assert y.dtype == jv.dtype == f(*given).dtype
        torch.testing.assert_close(y, f(*given))


@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_meshgrid(indexing: str, agrees: Callable, draw: Callable):
    constant = draw(2)
    agrees(lambda x, y: torch.meshgrid(x, constant, y + 1, indexing=indexing), draw(3), draw(4))
    agrees(lambda x: torch.meshgrid([x], indexing=indexing), draw(3))
    agrees(lambda x: torch.meshgrid(x, x[0], indexing=indexing), draw(3))
    with pytest.raises(RuntimeError, match="0D or 1D"):
        jvp(lambda x: torch.meshgrid(x, indexing=indexing), draw(2, 3), draw(1, 2, 3))


EMPTY = {
    "layer_norm": lambda x: F.layer_norm(x, (6,), torch.ones(6).double(), torch.ones(6).double()),
    "layer_norm over two dims": lambda x: F.layer_norm(x, (4, 6)),
    "modulated": lambda x: F.layer_norm(x, (6,)) * x.new_ones(x.shape[0], 1, 6) + x.new_ones(x.shape[0], 1, 6),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "group_norm and silu": lambda x: F.silu(F.group_norm(x, 2)),
    "softmax": lambda x: x.softmax(-1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention in heads": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True),
    "geglu": lambda x: x * F.gelu(x),
    "linear": lambda x: F.linear(x, x.new_ones(5, 6), x.new_ones(5)),
    "convolution": lambda x: F.conv1d(x, x.new_ones(5, 4, 3), x.new_ones(5)),
    "cat": lambda x: torch.cat([x, x + 1], 1),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_empty_batch(name: str, dtype: torch.dtype, draw: Callable):
    f, x = EMPTY[name], draw(0, 4, 6, dtype=dtype)
    f = f if dtype == torch.float64 or name != "layer_norm" else (lambda x: F.layer_norm(x, (6,)))
    y, jv = jvp(f, x, draw(3, 0, 4, 6, dtype=dtype))
    assert y.shape == f(x).shape
    assert jv.shape == (3, *y.shape)
    assert jv.dtype == y.dtype == dtype


def test_no_queries_and_no_keys(draw: Callable):
    x, other = draw(2, 0, 6), draw(2, 3, 6)
    y, jv = jvp(lambda x: F.scaled_dot_product_attention(x, other, other), x, x.new_zeros(3, 2, 0, 6))
    assert (y.shape, jv.shape) == ((2, 0, 6), (3, 2, 0, 6))
    y, jv = jvp(lambda x: F.scaled_dot_product_attention(other, x, x), x, x.new_zeros(3, 2, 0, 6))
    assert torch.equal(y, F.scaled_dot_product_attention(other, x, x).nan_to_num())
    assert not jv.any()


def test_a_mask_that_is_larger_than_the_scores(draw: Callable):
    for shape, mask in (((1, 2, 4, 6), (3, 1, 4, 4)), ((2, 1, 4, 6), (1, 3, 4, 4)), ((2, 4, 6), (5, 2, 4, 4))):
        m = draw(*mask)
        with pytest.raises(RuntimeError, match=r"attn_mask has shape .* does not broadcast to the scores"):
            jvp(lambda x, m=m: F.scaled_dot_product_attention(x, x, x, m), draw(*shape), draw(2, *shape))


def test_complex_view_at_odd_places(agrees: Callable, draw: Callable):
    """Slots of five elements: only the first is at an even place."""
    with pytest.raises(UnsupportedError, match="view_as_complex"):
        jvp(lambda x: torch.view_as_complex((x * 1)[:2]) * 2j, draw(5), draw(2, 5))
    agrees(lambda x: torch.view_as_real(torch.view_as_complex((x * 1)[:2].clone()) * 2j), draw(5))
    agrees(lambda x: torch.view_as_real(torch.view_as_complex((x * 1)[:2]) * 2j), draw(6))
    with pytest.raises(RuntimeError, match="last dimension"):
        jvp(lambda x: torch.view_as_complex(x), draw(3, 3), draw(1, 3, 3))


@pytest.mark.parametrize("measure", ["std", "kurtosis", "l4_over_l2", "hoyer", "crest", "effective_number"])
@pytest.mark.parametrize("how", [{}, {"dim": 0}, {"dim": None}, {"pool": "max"}], ids=str)
def test_statistics_of_an_activation(measure: str, how: dict, agrees: Callable, draw: Callable):
    x = draw(2, 3, 4, 4) if "pool" in how else draw(5, 7)
    agrees(lambda x: getattr(representation_stats(x, entropy=True, **how), measure), x, strict=False)


def test_measures_from_counts_have_no_tangent(draw: Callable):
    for f in (lambda s: s.gini(), lambda s: s.quantile(0.5), lambda s: s.topk_share(3)):
        with pytest.raises(RuntimeError, match="has no derivative"):
            jvp(lambda x, f=f: f(representation_stats(x, histogram=True)), draw(2, 9), draw(1, 2, 9))


@torch.library.custom_op("tests_edges::cube", mutates_args=())
def _cube(x: Tensor, scale: float) -> Tensor:
    return scale * x**3


def _written(x: Dual, scale: float) -> Dual:
    x.stack.mul_(2)
    return x


BAD_RULES: dict[str, tuple[Callable, type[Exception], str]] = {
    "no tangents": (lambda x, s: s * x.primal**3, UnsupportedError, "returned values without tangents"),
    "too few": (lambda x, s: dual(x.primal, x.tangents[:1]), UnsupportedError, "returned 1 tangents, where 3"),
    "would broadcast": (lambda x, s: dual(x.primal, x.tangents[:, :1]), ValueError, r"got \(3, 1, 4\)"),
    "one alone": (lambda x, s: dual(x.primal, x.tangents[0]), ValueError, r"\(K, 2, 4\); got \(2, 4\)"),
    "writes": (_written, UnsupportedError, "wrote into its arguments"),
    "other arguments": (lambda x: x, TypeError, "takes 1 positional argument but 2 were given"),
}


@pytest.mark.parametrize("name", BAD_RULES)
def test_a_registered_rule_that_is_wrong(name: str, draw: Callable):
    rule, error, message = BAD_RULES[name]
    register_rule(_cube, rule)
    try:
        with pytest.raises(error, match=message):
            jvp(lambda x: _cube(x * 1, 2.0), draw(2, 4), draw(3, 2, 4))
    finally:
        _forget(_cube)


def _forget(op: Any) -> None:
    packet = op._opoverload.overloadpacket
    for key in (op._opoverload, packet, *(getattr(packet, name) for name in packet.overloads())):
        RULES.pop(key, None)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.mT, lambda x: x[..., ::2], lambda x: x.expand(3, 2, 4)])
@pytest.mark.parametrize("how", ["op", "keyword", "overload", "packet"])
def test_a_registered_rule_serves_every_form(how: str, layout: Callable, k: int, draw: Callable):
    calls = {
        "op": lambda x: _cube(x, 2.0),
        "keyword": lambda x: _cube(x=x, scale=2.0),
        "overload": lambda x: torch.ops.tests_edges.cube.default(x, 2.0),
        "packet": lambda x: torch.ops.tests_edges.cube(x, scale=2.0),
    }
    register_rule(_cube, lambda x, scale: dual(scale * x.primal**3, 3 * scale * x.primal**2 * x.tangents))
    try:
        x, t = draw(2, 4), draw(k, 2, 4)
        y, jv = jvp(lambda x: calls[how](layout(x + 1)) * 1, x, t, strict=True)
    finally:
        _forget(_cube)
    want = [torch.func.jvp(lambda x: 2 * layout(x + 1) ** 3, (x,), (v,)) for v in t]
    torch.testing.assert_close(y, want[0][0])
    torch.testing.assert_close(jv, torch.stack([w for _, w in want]))
