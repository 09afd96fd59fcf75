"""br.jvp as a whole: inputs, outputs, chunks, fallbacks, what stops a tangent, and every way to misuse it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from balanced_rep.autodiff import (
    FallbackError,
    UnsupportedError,
    _jvp,
    _memory,
    dual,
    explain,
    jvp,
    register_rule,
    trace,
)  # fmt: skip
from balanced_rep.autodiff._registry import RULES

F64 = torch.float64


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(8), nn.Linear(8, 4)).to(F64).eval()


@pytest.fixture
def x(draw: Callable) -> Tensor:
    return draw(3, 6)


@pytest.fixture
def t(draw: Callable) -> Tensor:
    return draw(5, 3, 6, seed=1)


# Inputs and outputs ----------------------------------------------------------------------------------------------


def test_several_primals(agrees: Callable, draw: Callable):
    a, b = draw(3, 6), draw(6, 2)
    agrees(lambda a, b, n: (a @ b) * n, a, b, 3)
    agrees(lambda a, b: a @ b, a, b, moving=(1,))
    agrees(lambda a, i: a[i], a, torch.tensor([0, 2]))


def test_pytrees_in_and_out(draw: Callable):
    a, b = draw(3), draw(3, seed=1)
    y, jv = jvp(
        lambda d: {"s": d["a"] * d["b"][0], "rest": [d["n"], None, d["a"] > 0]},
        {"a": a, "b": [b], "n": "name"},
        {"a": a[None], "b": [None], "n": None},
    )
    assert y["rest"][0] == "name"
    assert jv["rest"][:2] == [None, None]
    assert jv["rest"][2].dtype == torch.bool
    torch.testing.assert_close(jv["s"], (a * b)[None])
    y, jv = jvp(lambda p, q: p[0] * q, ((a, b), b), ((a[None], None), b[None]))
    torch.testing.assert_close(jv[0], 2 * a * b)


@dataclasses.dataclass(frozen=True)
class Output:
    value: Tensor
    extra: tuple[Tensor, str]


def test_dataclass_outputs(x: Tensor, t: Tensor):
    y, jv = jvp(lambda x: Output(x * 2, (x.sum(), "kept")), x, t, chunk_size=2)
    assert type(y) is type(jv) is Output
    assert y.extra[1] == "kept"
    assert jv.extra[1] is None
    torch.testing.assert_close(jv.value, 2 * t)
    torch.testing.assert_close(jv.extra[0], t.sum((1, 2)))


def test_tangents_of_parameters(draw: Callable):
    net, x = _net(), draw(3, 6)
    params = {n: p.detach() for n, p in net.named_parameters()}
    tangents = {n: draw(2, *p.shape) for n, p in params.items()}

    def f(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, p, (x,))

    want = torch.func.vmap(lambda v: torch.func.jvp(f, (params,), (v,))[1])(tangents)
    torch.testing.assert_close(jvp(f, params, tangents)[1], want)


def test_the_batch_is_an_ordinary_dim(t: Tensor, x: Tensor):
    net = _net()
    _, jv = jvp(net, x, t)
    for i in range(3):
        torch.testing.assert_close(jv[:, i], jvp(net, x[i], t[:, i])[1])


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 5, 99, None, "auto"])
def test_chunks(chunk_size: Any, x: Tensor, t: Tensor):
    y, jv = jvp(_net(), x, t, chunk_size=chunk_size)
    want = jvp(_net(), x, t)
    torch.testing.assert_close(y, want[0])
    torch.testing.assert_close(jv, want[1])


def test_memory_that_does_not_suffice(
    x: Tensor, t: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    passes: list[int] = []
    original = _jvp.one_pass

    def counted(f: Any, inputs: Any, kwargs: Any, part: slice, *rest: Any) -> Any:
        passes.append(part.stop - part.start)
        return original(f, inputs, kwargs, part, *rest)

    monkeypatch.setattr(_jvp, "one_pass", counted)
    monkeypatch.setattr(_jvp, "available_bytes", lambda _: 4000)
    with caplog.at_level(logging.INFO, "balanced_rep"):
        _, jv = jvp(_net(), x, t)
    assert passes[0] == 1
    assert len(passes) > 2
    assert sum(passes) == 5
    assert "5 tangents do not fit" in caplog.text
    monkeypatch.undo()
    torch.testing.assert_close(jv, jvp(_net(), x, t)[1])


def test_live_bytes_counts_storages_not_views():
    meter = _memory.LiveBytes()
    a = torch.zeros(3, 4)
    first = dual(a, torch.zeros(2, 3, 4))
    meter(first, first.stack)
    view = type(first)(first.stack[:, :2])
    meter(view, view.stack)
    assert meter.live == meter.peak == 3 * 12 * 4
    del first
    assert meter.live == 144
    del view
    gc.collect()
    assert meter.live == 0
    assert _memory.chunk_that_fits(peak=1000, pilot_slots=2, n_tangents=9, free=10_000) == 5
    assert _memory.chunk_that_fits(peak=1000, pilot_slots=2, n_tangents=9, free=10) == 1
    assert _memory.available_bytes(torch.device("cpu")) > 1e6


def test_no_tangents(x: Tensor, t: Tensor):
    y, jv = jvp(_net(), x, t[:0])
    torch.testing.assert_close(y, _net()(x))
    assert jv.shape == (0, 3, 4)


def test_the_input_is_not_changed(x: Tensor, t: Tensor):
    before = x.clone()
    jvp(lambda x: x.mul_(2), x, t)
    jvp(lambda x: x.mul_(2), x, t[:0])
    assert torch.equal(x, before)


def test_leaf_and_parameter(x: Tensor, t: Tensor):
    y, jv = jvp(lambda x: x.mul_(3), nn.Parameter(x), t)
    assert not y.requires_grad
    torch.testing.assert_close(jv, 3 * t)


# What stops a tangent, as torch.func.jvp has it --------------------------------------------------------------------


def test_control_flow_follows_the_primal(agrees: Callable, draw: Callable):
    def f(x: Tensor) -> Tensor:
        y = x if x.sum() > 1e9 else -x
        y = y * int((x > 0).sum()) if x[0, 0] < 1e9 and bool(x.isfinite().all()) else y
        return torch.where(x > 0, y, y * 2)[x.argmax(0)]

    agrees(f, draw(3, 6))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * x.detach(),
        lambda x: x * x.data,
        lambda x: x * x.sum().item(),
        lambda x: x * float(x.sum()),
        lambda x: x * x.tolist()[0][0],
        lambda x: x + torch.zeros_like(x) + x.new_ones(6),
        lambda x: x * x.round(),
        lambda x: x * x.long(),
        lambda x: x * (x > 0),
    ],
    ids=["detach", "data", "item", "float", "tolist", "zeros_like", "round", "long", "mask"],
)
def test_tangents_stop_where_torch_stops_them(f: Callable, agrees: Callable, draw: Callable):
    agrees(f, draw(3, 6), strict=False)


def test_no_grad_and_inference_mode_inside_do_not_stop_them(agrees: Callable, draw: Callable):
    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x * 2 + x

    agrees(f, draw(3, 6))
    x, t = draw(3, 6), draw(2, 3, 6)
    with torch.inference_mode():
        jv = jvp(lambda x: F.silu(x) @ x.T, x, t)[1]
        fallen = jvp(lambda x: torch.special.i1(x), x, t)[1]
    torch.testing.assert_close(jv, jvp(lambda x: F.silu(x) @ x.T, x, t)[1])
    torch.testing.assert_close(fallen, jvp(lambda x: torch.special.i1(x), x, t)[1])


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_writing_into_arguments_is_refused(chunk_size: int | None, x: Tensor, t: Tensor):
    def f(x: Tensor, c: list[Tensor] | None = None, state: dict[str, Tensor] | None = None) -> Tensor:
        for held in (*(c or ()), *(state or {}).values()):
            held += 1
        return x.mul_(2)

    fixed = x.clone()
    y, jv = jvp(f, x, t, chunk_size=chunk_size)  # the argument with tangents is a copy
    torch.testing.assert_close((x, y, jv), (fixed, 2 * fixed, 2 * t))
    with pytest.raises(UnsupportedError, match=r"f wrote into primals\[1\]\[0\], of shape \(2,\).*clone"):
        jvp(f, (x, [torch.zeros(2), torch.zeros(2)]), (t, None), chunk_size=chunk_size)
    with pytest.raises(UnsupportedError, match=r"f wrote into kwargs\['state'\]\['n'\]"):
        jvp(f, x, t, kwargs={"state": {"n": torch.zeros(())}}, chunk_size=chunk_size)
    with pytest.raises(UnsupportedError, match=r"f wrote into kwargs"):
        explain(f, x, kwargs={"state": {"n": torch.zeros(())}})


def test_explain_of_dictionaries(x: Tensor):
    told = explain(lambda d: {"twice": d["x"] * 2, "step": d["step"]}, {"x": x, "step": torch.tensor(3)})
    assert told.rules == {"mul": 1}
    told = explain(lambda a, b: {"sum": a[0] + a[1] + b}, ([x, x], x))
    assert told.rules == {"add": 2}


@pytest.mark.parametrize("name", ["prod", "nansum", "sum", "cumsum", "cumprod"])
def test_results_in_an_integer_dtype_have_no_tangent(name: str, x: Tensor, t: Tensor):
    args = (0,) if name.startswith("cum") else ()
    y, jv = jvp(lambda x: x * getattr(x, name)(*args, dtype=torch.int64), x, t)
    count = getattr(x, name)(*args, dtype=torch.int64)
    torch.testing.assert_close((y, jv), (x * count, t * count))


def test_explain_tells_where_they_stop(x: Tensor):
    told = explain(lambda x: torch.lgamma(x) + x.detach() * (x > 0), x, x[None])
    assert told.stops == {"detach": 1}
    assert told.fallbacks == {"lgamma": 1}
    assert told.primal == {"gt": 1}
    assert {"add", "lgamma"} <= set(told.seconds)
    assert "1 functions without a rule, 1 calls" in str(told)


def test_an_output_that_does_not_move_is_said(x: Tensor, t: Tensor):
    with pytest.warns(UserWarning, match=r"products are zero.*detach"):
        _, jv = jvp(lambda x: x.detach() * 2, x, t)
    assert not jv.any()
    assert jv.shape == (5, 3, 6)


# Fallback --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.lgamma(x * x + 1),
        lambda x: torch.maximum(x, x[0]),
        lambda x: x.amax(-1),
        lambda x: x.prod(-1),
        lambda x: torch.linalg.svdvals(x),
        lambda x: torch.hypot(x, x + 1),
        lambda x: F.conv1d(x[None], x.view(2, 3, 3)),
        lambda x: 2**x,
        lambda x: torch.cosine_similarity(x, x.flip(0)),
        lambda x: F.mse_loss(x, x * x),
        lambda x: F.instance_norm(x[None]),
        lambda x: torch.ops.aten.mul.Tensor(x, x),
        lambda x: torch.cummax(x, 1)[0],
        lambda x: F.group_norm(x.T, 3, x[0, :3]),
    ],
)
def test_fallback(f: Callable, agrees: Callable, draw: Callable):
    agrees(f, draw(3, 6), strict=False)


def test_strict_refuses_a_fallback_by_name(x: Tensor, t: Tensor):
    with pytest.raises(FallbackError, match=r"lgamma has no multi-tangent rule"):
        jvp(torch.lgamma, x, t, strict=True)
    with pytest.raises(FallbackError, match=r"conv1d"):  # a rule that does not cover this call
        jvp(lambda x: F.conv1d(x[None], x.view(2, 3, 3)), x, t, strict=True)


def test_a_function_without_derivative_is_named(x: Tensor, t: Tensor):
    with pytest.raises(UnsupportedError, match=r"cdist has no rule, and torch cannot differentiate it"):
        jvp(lambda x: torch.cdist(x, x + 1), x, t)
    with pytest.raises(UnsupportedError, match=r"gammainc"):
        jvp(lambda x: torch.special.gammainc(x.abs(), x.abs()), x, t)


# Refusals --------------------------------------------------------------------------------------------------------


def test_shapes_and_dtypes_that_do_not_match(x: Tensor, t: Tensor):
    net = _net()
    with pytest.raises(ValueError, match=r"tangents has shape \(3, 6\).*tangents\[None\]"):
        jvp(net, x, x)
    with pytest.raises(ValueError, match=r"tangents\[1\] has shape \(5, 6, 3\); expected is \(K, 3, 6\)"):
        jvp(torch.add, (x, x), (t, t.mT))
    with pytest.raises(TypeError, match=r"tangents is torch.float32 and primals is torch.float64"):
        jvp(net, x, t.float())
    with pytest.raises(ValueError, match=r"5 for primals\[0\], 4 for primals\[1\]"):
        jvp(torch.add, (x, x), (t, t[:4]))
    with pytest.raises(TypeError, match=r"int64.*only floating-point"):
        jvp(net, torch.arange(3), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"1 primals but 2 tangents"):
        jvp(net, (x,), (t, t))
    with pytest.raises(TypeError, match=r"is a tuple of 1"):
        jvp(net, (x,), t)
    with pytest.raises(TypeError, match=r"primals is a list"):
        jvp(net, [x], [t])
    with pytest.raises(ValueError, match=r"another structure"):
        jvp(lambda d: d["a"], {"a": x}, {"b": t})
    with pytest.raises(ValueError, match=r"no primal has a tangent"):
        jvp(net, x, None)
    with pytest.raises(TypeError, match=r"float, which has no tangent"):
        jvp(lambda x, s: x * s, (x, 2.0), (t, t))
    with pytest.raises(ValueError, match=r"on meta"):
        jvp(net, x, t.to("meta"))
    with pytest.raises(TypeError, match=r"sparse"):
        jvp(net, x.to_sparse(), t)
    with pytest.raises(ValueError, match=r"chunk_size=0"):
        jvp(net, x, t, chunk_size=0)
    with pytest.raises(TypeError, match=r"cannot be called"):
        jvp(3, x, t)
    with pytest.raises(TypeError, match=r"NoneType without a tensor"):
        jvp(lambda x: None, x, t)
    with pytest.raises(ValueError, match=r"requires grad"):
        jvp(net, x.clone().requires_grad_(), t)
    with pytest.raises(ValueError, match=r"requires grad"):
        jvp(net, x, t.clone().requires_grad_())


def test_output_names(x: Tensor, t: Tensor):
    with pytest.raises(TypeError, match=r"needs f to be a torch.nn.Module"):
        jvp(torch.sin, x, t, output="0")
    with pytest.raises(ValueError, match=r"no module '9'"):
        jvp(_net(), x, t, output="9")
    unused = nn.ModuleDict({"used": nn.Linear(6, 6, dtype=F64), "unused": nn.Linear(6, 6)})
    unused.forward = lambda x: unused["used"](x)
    with pytest.raises(ValueError, match=r"without calling its module 'unused'"):
        jvp(unused, x, t, output="unused")


def test_random_functions_and_training_mode(x: Tensor, t: Tensor):
    with pytest.raises(UnsupportedError, match=r"dropout is active \(in module '2', Dropout\)"):
        jvp(_net().train(), x, t)
    norm = nn.Sequential(nn.BatchNorm1d(6)).to(F64)
    with pytest.raises(UnsupportedError, match=r"training mode \(in module '0', BatchNorm1d\)"):
        jvp(norm, x, t)
    assert norm[0].num_batches_tracked == 1 or not norm[0].running_mean.any()
    for f in (
        lambda x: x + torch.randn(6),
        lambda x: x + torch.rand_like(x),
        lambda x: x + x.new_empty(6).normal_(),
        lambda x: x.bernoulli(0.5),
        lambda x: F.gumbel_softmax(x),
        lambda x: x * torch.empty(6).bernoulli_(0.5),
    ):
        with pytest.raises(UnsupportedError, match=r"draws random numbers: .* Draw them outside of the function"):
            jvp(f, x, t)
    attention, q = nn.MultiheadAttention(6, 2, dropout=0.3, dtype=F64), torch.ones(4, 6, dtype=F64)
    for f in (
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
        lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.3),
        lambda x: x[0] * F.scaled_dot_product_attention(q, q, q, dropout_p=0.3),
        lambda x: attention(x, x, x)[0],
        lambda x: x[0] * attention(q, q, q, need_weights=False)[0],
    ):
        with pytest.raises(UnsupportedError, match=r"dropout is active.* Call model.eval"):
            jvp(f, x, t)
    jvp(attention.eval(), (x, x, x), (t, t, t))
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(UnsupportedError, match=r"random"):
        jvp(lambda x: x + torch.randn(6, generator=generator), x, t)


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_raw_memory(x: Tensor, t: Tensor):
    for name in ("numpy", "data_ptr", "untyped_storage", "__dlpack__"):
        with pytest.raises(UnsupportedError, match=r"raw memory"):
            jvp(lambda x, name=name: getattr(x, name)(), x, t)
    with pytest.raises(UnsupportedError, match=r"torch.tensor\(x\)"):
        jvp(lambda x: torch.tensor(x), x, t)
    with pytest.raises(UnsupportedError, match=r"x.data = "):
        jvp(lambda x: setattr(x, "data", x * 2), x, t)
    with pytest.raises(UnsupportedError, match=r"reinterprets"):
        jvp(lambda x: x.as_strided((2,), (1,)), x, t)


def test_a_kept_activation_does_not_work_later(x: Tensor, t: Tensor):
    kept: list[Tensor] = []
    jvp(lambda x: (kept.append(x * 2), x)[1], x, t)
    assert kept[0].shape == (3, 6)
    with pytest.raises(UnsupportedError, match=r"after br.jvp had returned"):
        kept[0] + 1


def test_nesting_and_dual_inputs(x: Tensor, t: Tensor):
    with pytest.raises(TypeError, match=r"cannot be nested"):
        jvp(lambda x: jvp(torch.sin, x, t)[1], x, t)


@torch.library.custom_op("balanced_rep_test::double", mutates_args=())
def _double(x: Tensor) -> Tensor:
    return x * 2


def test_custom_ops_are_refused_until_they_have_a_rule(x: Tensor, t: Tensor):
    for op in (_double, torch.ops.balanced_rep_test.double, torch.ops.balanced_rep_test.double.default):
        with pytest.raises(UnsupportedError, match=r"balanced_rep_test.double.* is a custom op"):
            jvp(op, x, t)
    before = dict(RULES)
    try:
        register_rule(_double, lambda x: dual(x.primal * 2, x.tangents * 2), formula="t' = 2 t")
        for op in (_double, torch.ops.balanced_rep_test.double, torch.ops.balanced_rep_test.double.default):
            torch.testing.assert_close(jvp(op, x, t, strict=True)[1], 2 * t)
        assert explain(_double, x).rules == {"balanced_rep_test.double.default": 1}
    finally:
        RULES.clear()
        RULES.update(before)


class StraightThrough(torch.autograd.Function):
    """Rounds, with the derivative of the identity; what its forward does would give zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()


class OneAtATime(StraightThrough):
    generate_vmap_rule = False


class WithoutJvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


stored_apply = WithoutJvp.apply


def test_autograd_functions(x: Tensor, t: Tensor):
    before = torch.autograd.Function.__dict__["apply"]
    for cls in (StraightThrough, OneAtATime):
        torch.testing.assert_close(jvp(lambda x, cls=cls: cls.apply(x), x, t)[1], t)
        with pytest.raises(FallbackError, match=cls.__name__):
            jvp(lambda x, cls=cls: cls.apply(x), x, t, strict=True)
    with pytest.raises(UnsupportedError, match=r"WithoutJvp.* has no jvp"):
        jvp(lambda x: WithoutJvp.apply(x), x, t)
    with pytest.raises(UnsupportedError, match=r"WithoutJvp.apply` was stored"):
        jvp(lambda x: stored_apply(x), x, t)
    try:
        register_rule(WithoutJvp, lambda x: dual(x.primal.round(), x.tangents))
        torch.testing.assert_close(jvp(lambda x: WithoutJvp.apply(x), x, t, strict=True)[1], t)
    finally:
        del RULES[WithoutJvp]
    assert torch.autograd.Function.__dict__["apply"] is before
    plain = jvp(lambda x: x * WithoutJvp.apply(torch.ones(6, dtype=F64)), x, t, strict=True)[1]
    torch.testing.assert_close(plain, t)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused(x: Tensor, t: Tensor):
    net = _net()
    scripted = torch.jit.trace(net, x)
    with pytest.raises(UnsupportedError, match=r"the model is scripted"):
        jvp(scripted, x, t)
    with pytest.raises(UnsupportedError, match=r"module '1' is scripted"):
        jvp(nn.Sequential(net, scripted), x, t)
    with pytest.raises(UnsupportedError, match=r"scripted"):
        jvp(lambda x: scripted(x), x, t)
    function = torch.jit.script(lambda_free)
    with pytest.raises((UnsupportedError, RuntimeError), match=r"scripted|TorchScript"):
        jvp(lambda x: function(x), x, t)


def lambda_free(x: Tensor) -> Tensor:
    return x * 2 + 1


def test_compiled_modules_run_eagerly(x: Tensor, t: Tensor):
    net = _net()
    want = jvp(net, x, t)[1]
    compiled = torch.compile(net, backend="eager")
    torch.testing.assert_close(jvp(compiled, x, t)[1], want)
    torch.testing.assert_close(jvp(compiled, x, t, output="1")[1], jvp(net, x, t, output="1")[1])
    part = nn.Sequential(torch.compile(net[0], backend="eager"), *net[1:])
    torch.testing.assert_close(jvp(part, x, t)[1], want)
    inplace = copy.deepcopy(net)
    inplace.compile(backend="eager")
    torch.testing.assert_close(jvp(inplace, x, t)[1], want)


def test_compiling_a_function_that_calls_it(x: Tensor, t: Tensor):
    net = _net()

    def f(x: Tensor, t: Tensor) -> Tensor:
        return jvp(net, x * 2, t)[1] + 1

    torch.testing.assert_close(torch.compile(f, backend="eager")(x, t), f(x, t))

    def g(x: Tensor, t: Tensor) -> Tensor:
        return jvp(net, x, t)[1]

    with pytest.raises(Exception, match=r"br.autodiff.trace"):
        torch.compile(g, backend="eager", fullgraph=True)(x, t)


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_refused_by_name(draw: Callable):
    net = nn.Sequential(nn.Linear(6, 6)).eval()
    try:
        quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
        quantised(torch.zeros(1, 6))
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"no quantised engine: {error}")
    with pytest.raises(UnsupportedError, match=r"quantized.*custom op"):
        jvp(quantised, draw(3, 6).float(), draw(2, 3, 6).float())


class Lora(nn.Module):
    """What PEFT puts in the place of a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, {"default": 0.5}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False, dtype=F64)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False, dtype=F64)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        down = self.lora_A["default"](self.lora_dropout["default"](x.to(self.lora_A["default"].weight.dtype)))
        return y + self.lora_B["default"](down) * self.scaling["default"]


def test_adapters_and_hooks_that_move_weights(agrees: Callable, draw: Callable):
    torch.manual_seed(0)
    net = _net()
    net[0] = Lora(net[0])
    agrees(net, draw(3, 6))
    state: list[str] = []

    class OffloadHook:  # accelerate's AlignDevicesHook: weights in before the forward, out after it
        offload = True

    for module in (net[0], net[4]):
        module._hf_hook = OffloadHook()
        forward = module.forward

        def wrapped(*args: Any, forward: Callable = forward) -> Any:
            state.append("in")
            args = pytree.tree_map(lambda v: v.to("cpu", non_blocking=True), args)
            result = forward(*args)
            state.append("out")
            return result

        module.forward = wrapped
    agrees(net, draw(3, 6))
    state.clear()
    jvp(net, draw(3, 6), draw(1, 3, 6), output="1")
    assert state == ["in", "out"] * 2  # no early stop: the hooks behind it ran


def test_nan_in_and_out(x: Tensor, t: Tensor):
    t[2, 1] = math.nan
    jv = jvp(_net(), x, t)[1]
    assert jv[2, 1].isnan().all()
    assert jv.isnan().sum() == 4


# Composition -----------------------------------------------------------------------------------------------------


def _cube(x: Tensor) -> Tensor:
    return (x**3).sum(-1)


def test_inside_torch_func(draw: Callable):
    x, v = draw(4), draw(2, 4)
    gradient = torch.func.grad(lambda x: jvp(_cube, x, v)[1].sum())(x)
    torch.testing.assert_close(gradient, (6 * x * v).sum(0))
    tangent = torch.func.jvp(lambda x: jvp(_cube, x, v)[1], (x,), (v[0],))[1]
    torch.testing.assert_close(tangent, (6 * x * v * v[0]).sum(-1))
    batch = draw(5, 4)
    got = torch.func.vmap(lambda x: jvp(_cube, x, v)[1])(batch)
    torch.testing.assert_close(got, torch.stack([jvp(_cube, b, v)[1] for b in batch]))
    hessian = torch.func.hessian(lambda x: jvp(_cube, x, v)[1].sum())(x)
    torch.testing.assert_close(hessian, torch.diag(6 * v.sum(0)))
    assert jvp(lambda x: torch.func.grad(_cube)(x), x, v[:0])[1].shape == (0, 4)


def test_torch_func_inside_is_refused_or_right(draw: Callable):
    x, v = draw(4), draw(2, 4)
    for f in (torch.func.grad(_cube), torch.func.vmap(lambda r: r * 2)):
        try:
            got = jvp(f, x, v)[1]
        except UnsupportedError:
            continue
        torch.testing.assert_close(got, torch.func.vmap(lambda t, f=f: torch.func.jvp(f, (x,), (t,))[1])(v))


def test_inside_a_dual_level_is_not_silent(draw: Callable):
    x, v = draw(4), draw(2, 4)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
        jvp(_cube, torch.autograd.forward_ad.make_dual(x, v[0]), v)


def test_autocast(draw: Callable):
    net, x, t = _net().float(), draw(3, 6).float(), draw(2, 3, 6).float()
    want = jvp(net, x, t)[1]

    def both() -> tuple[Tensor, Tensor]:
        y, jv = jvp(net, x, t)
        peer = torch.func.vmap(lambda v: torch.func.jvp(net, (x,), (v,))[1])(t)
        return y, (jv, peer)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (jv, peer) = both()
        assert y.dtype == jv.dtype == net(x).dtype == torch.bfloat16
    assert (jv - want).norm() <= 1.5 * (peer - want).norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = draw(1, 2, 4, 8).float()
        y, jv = jvp(lambda x: F.scaled_dot_product_attention(x, x, x).softmax(-1) + x, q, q[None], strict=True)
        assert y.dtype == jv.dtype == (F.scaled_dot_product_attention(q, q, q).softmax(-1) + q).dtype


@pytest.mark.parametrize("name", ["addmm", "addmv", "addbmm", "baddbmm", "matmul"])
@pytest.mark.parametrize("moving", [0, 1, 2])
def test_products_under_autocast(name: str, moving: int, draw: Callable):
    shapes = {"addmv": [(4,), (4, 3), (3,)], "addbmm": [(4, 5), (2, 4, 3), (2, 3, 5)],
              "baddbmm": [(4, 5), (2, 4, 3), (2, 3, 5)]}.get(name, [(4, 5), (4, 3), (3, 5)])  # fmt: skip
    xs = [draw(*shape, dtype=torch.float32) for shape in shapes]
    f = (lambda c, a, b: a @ b + c.sum()) if name == "matmul" else (lambda c, a, b: getattr(c * 1, name)(a, b, alpha=2))
    f = f if name != "addmm" else torch.addmm
    t = draw(3, *shapes[moving], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = f(*xs)
        y, jv = jvp(f, tuple(xs), tuple(t if i == moving else None for i in range(3)))
    assert y.dtype == jv.dtype == want.dtype
    torch.testing.assert_close(y, want, rtol=2e-2, atol=4e-2)
    wide = torch.func.vmap(lambda v: torch.func.jvp(lambda z: f(*(z if i == moving else x for i, x in enumerate(xs))),
                                                    (xs[moving],), (v,))[1])(t)  # fmt: skip
    torch.testing.assert_close(jv.float(), wide, rtol=2e-2, atol=8e-2)


def test_autocast_tells_tensors_without_dims_and_dtypes_apart(draw: Callable):
    lin, x, t = nn.Linear(6, 6), draw(3, 6).float(), draw(2, 3, 6).float()
    scalar, gain = torch.tensor(2.0), torch.ones(6)

    def f(x: Tensor) -> list[Tensor]:
        h = lin(x)
        return [h * scalar, h * gain, h.sum(), h.sum(dtype=torch.float64), h.sum(dtype=torch.float32)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, jv = jvp(f, x, t)
        want = [v.dtype for v in f(x)]
    assert [v.dtype for v in y] == [v.dtype for v in jv] == want


def _attention_net() -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    conv, lin = nn.Conv2d(3, 8, 3, padding=1).to(F64), nn.Linear(8, 8).to(F64)

    def f(x: Tensor) -> Tensor:
        h = F.silu(F.group_norm(conv(x), 2)).flatten(2).transpose(1, 2)
        h = h + F.scaled_dot_product_attention(*(lin(h).unsqueeze(1) for _ in range(3))).squeeze(1)
        buffer = torch.zeros_like(h)
        buffer[:, ::2] = h[:, ::2]
        return F.gelu(F.layer_norm(h, (8,))) + buffer.mul_(2)

    return f


def test_trace(draw: Callable):
    f, x = _attention_net(), draw(2, 3, 4, 4)
    graph = trace(f, x, 3, strict=True)
    other, t = draw(2, 3, 4, 4, seed=5), draw(3, 2, 3, 4, 4)
    y, jv = jvp(f, other, t)
    for g, w in zip(graph(other, t), (y, jv), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    assert all(n.op in ("placeholder", "get_attr", "call_function", "output") for n in graph.graph.nodes)
    compiled = torch.compile(graph, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(other, t)[1], jv)
    with pytest.raises(ValueError, match=r"n_tangents=0"):
        trace(f, x, 0)
    inner = trace(_net(), draw(3, 6), 2, output="1")
    v = draw(2, 3, 6)
    torch.testing.assert_close(inner(draw(3, 6), v)[1], jvp(_net(), draw(3, 6), v, output="1")[1])


def test_trace_exports(draw: Callable):
    f, x, t = _attention_net(), draw(2, 3, 4, 4), draw(3, 2, 3, 4, 4)
    exported = torch.export.export(trace(f, x, 3), (x, t))
    torch.testing.assert_close(exported.module()(x, t)[1], jvp(f, x, t)[1])


def test_two_threads_do_not_meet(draw: Callable):
    from concurrent.futures import ThreadPoolExecutor

    net, xs = _net(), [draw(3, 6, seed=i) for i in range(6)]
    want = [jvp(net, x, x[None])[1] for x in xs]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda x: jvp(net, x, x[None])[1], xs))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_threads_that_overlap_leave_compiling_as_it_was(x: Tensor, t: Tensor):
    import threading

    torch._dynamo.reset()
    traced = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        traced.append(graph)
        return graph.forward

    second_inside, first_out = threading.Event(), threading.Event()

    def first(x: Tensor) -> Tensor:
        assert second_inside.wait(30)
        return x.sin()

    def second(x: Tensor) -> Tensor:
        second_inside.set()
        assert first_out.wait(30)
        return x.sin()

    thread = threading.Thread(target=lambda: jvp(second, x, t))

    def starts_second(x: Tensor) -> Tensor:
        thread.start()
        return first(x)

    jvp(starts_second, x, t)
    first_out.set()
    thread.join()
    torch.compile(torch.sin, backend=backend)(x)
    assert traced, "compiled functions still run eagerly"
