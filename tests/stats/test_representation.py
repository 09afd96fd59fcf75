"""Representation statistics: every measure against its formula, merging, containers, and what they refuse."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy import stats as scipy_stats
from torch.fx.experimental.proxy_tensor import make_fx

import balanced_rep as br
from balanced_rep.stats import RepresentationStats
from balanced_rep.stats._measures import STATISTICS
from balanced_rep.testing import activations

ALL = {"histogram": True, "entropy": True}


def formulas(v: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every measure of the rows of a float64 matrix, written as in a paper."""
    n = v.shape[1]
    l1, l2, l4, peak = v.abs().sum(1), v.norm(dim=1), v.pow(4).sum(1) ** 0.25, v.abs().amax(1)
    a = v.abs().mean(1) ** 2 / v.square().mean(1)
    std = v.std(1, correction=0)
    return {
        "mean": v.mean(1),
        "var": std.square(),
        "std": std,
        "skewness": torch.from_numpy(scipy_stats.skew(v.numpy(), axis=1)),
        "kurtosis": torch.from_numpy(scipy_stats.kurtosis(v.numpy(), axis=1, fisher=False)),
        "l1": l1,
        "l2": l2,
        "l4": l4,
        "l4_over_l2": l4 / l2,
        "std_over_l2": std / l2,
        "participation_ratio": l2**4 / l4**4,
        "inverse_participation_ratio": l4**4 / l2**4,
        "hoyer": (math.sqrt(n) - l1 / l2) / (math.sqrt(n) - 1),
        "treves_rolls": a,
        "vinje_gallant": (1 - a) / (1 - 1 / n),
        "min": v.amin(1),
        "max": v.amax(1),
        "absmax": peak,
        "peak_to_average": peak / v.abs().mean(1),
        "crest": peak / v.square().mean(1).sqrt(),
        "active_fraction": (v > 0).double().mean(1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distribution", ["normal", "relu", "heavy", "step"])
def test_every_measure_is_its_formula(distribution, dtype):
    x = activations(distribution, (7, 1031), dtype)
    s = br.representation_stats(x)
    want = formulas(x.double())
    assert set(want) == set(STATISTICS) <= set(s.to_dict())
    for name, value in want.items():
        got = getattr(s, name)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_one_hot_and_flat():
    one_hot, flat = torch.zeros(64), torch.ones(64)
    one_hot[5] = 3.0
    s = br.representation_stats(torch.stack([one_hot, flat]), **ALL)
    assert s.participation_ratio.tolist() == pytest.approx([1, 64], rel=1e-6)
    assert s.hoyer.tolist() == pytest.approx([1, 0], abs=1e-6)
    assert s.l4_over_l2.tolist() == pytest.approx([1, 64**-0.25])
    assert s.treves_rolls.tolist() == [1 / 64, 1]
    assert s.vinje_gallant.tolist() == [1, 0]
    assert s.crest.tolist() == [8, 1]
    assert s.std.tolist() == pytest.approx([3 * math.sqrt(63) / 64, 0])
    assert s.gini().tolist() == pytest.approx([63 / 64, 0], abs=0.01)
    assert s.effective_number.tolist() == pytest.approx([1, 64], rel=1e-6)
    assert s.topk_share(1).tolist() == pytest.approx([1, 1 / 64], rel=0.04)


def test_std_identity():
    """std^2 = ||h||^2 / p (1 - (sum h)^2 / (p sum h^2)), exactly (science notes, 1.9)."""
    h = activations("relu", (5, 333), torch.float64)
    s = br.representation_stats(h)
    ratio = h.sum(1) ** 2 / (333 * h.square().sum(1))
    torch.testing.assert_close(s.std**2, s.l2**2 / 333 * (1 - ratio), rtol=1e-13, atol=0)


def test_undefined_measures_are_nan():
    undefined = {"skewness", "kurtosis"}
    s = br.representation_stats(torch.full((2, 9), 0.3))
    assert {k for k in STATISTICS if getattr(s, k).isnan().all()} == undefined
    assert s.std.tolist() == [0, 0]
    zero = br.representation_stats(torch.zeros(1, 9))
    scale_free = {"l4_over_l2", "std_over_l2", "participation_ratio", "inverse_participation_ratio", "hoyer",
                  "treves_rolls", "vinje_gallant", "peak_to_average", "crest"}  # fmt: skip
    assert {k for k in STATISTICS if getattr(zero, k).isnan().all()} == undefined | scale_free
    empty = br.representation_stats(torch.zeros(3, 0), **ALL)
    assert {k for k in STATISTICS if not getattr(empty, k).isnan().all()} == {"l1", "l2", "l4"}
    for value in (empty.gini(), empty.topk_share(1), empty.quantile(0.5), empty.energy_entropy):
        assert value.isnan().all()


def test_correction():
    x = activations("normal", (4, 10))
    for c in (0, 1, 2.5):
        torch.testing.assert_close(br.representation_stats(x, correction=c).std, x.std(1, correction=c))
    assert br.representation_stats(x[:, :1], correction=1).std.isnan().all()
    assert br.representation_stats(x[:, :1]).std.tolist() == [0] * 4
    for bad in (-1, math.nan, "1"):
        with pytest.raises(ValueError, match="correction must be"):
            br.representation_stats(x, correction=bad)


def test_nonfinite_values_propagate():
    x = activations("nan", (2, 50))
    s = br.representation_stats(x, **ALL)
    assert s.n_nonfinite.tolist() == [0, 1]
    for name in STATISTICS:
        assert getattr(s, name).isnan().tolist() == [False, name != "active_fraction"], name
    for value in (s.gini(), s.topk_share(3), s.quantile(0.5), s.energy_entropy):
        assert value.isnan().tolist() == [False, True]


def cut(x: torch.Tensor, at: list[int]) -> list[torch.Tensor]:
    edges = [0, *sorted(at), x.shape[1]]
    return [x[:, a:b] for a, b in itertools.pairwise(edges)]


@given(
    at=st.lists(st.integers(0, 400), max_size=6),
    order=st.randoms(use_true_random=False),
    distribution=st.sampled_from(["normal", "offset", "heavy", "step", "constant", "tiny", "large", "relu"]),
)
@settings(max_examples=60, deadline=None)
def test_results_do_not_depend_on_how_a_stream_is_cut(at, order, distribution):
    x = activations(distribution, (3, 400), torch.float64)
    whole = br.representation_stats(x, **ALL)
    parts = [br.representation_stats(p, **ALL) for p in cut(x, at)]
    order.shuffle(parts)
    merged = parts[0].merge(*parts[1:])
    for i, name in enumerate(("n", "mean", "m2", "m3", "m4", "l1", "min", "max", "n_active", "n_nonfinite")):
        scale = (whole.state[2] * whole.state[4]).sqrt() if name == "m3" else whole.state[i].abs()
        scale = torch.maximum(scale, whole.std) if name == "mean" else scale
        assert ((merged.state[i] - whole.state[i]).abs() <= 1e-12 * scale).all(), name
    assert torch.equal(merged.histogram.top, whole.histogram.top)
    assert torch.equal(merged.histogram.table, whole.histogram.table)
    torch.testing.assert_close(merged.energy_log, whole.energy_log, rtol=1e-12, atol=0)


def test_merge_with_nonfinite_parts_equals_one_read():
    x = torch.tensor([[1.0, math.inf, 2.0, 3.0], [math.inf, 1.0, math.inf, 2.0], [math.inf, 0.0, -math.inf, 1.0]])
    whole = br.representation_stats(x).state
    for k in range(5):
        merged = br.representation_stats(x[:, :k]).merge(br.representation_stats(x[:, k:])).state
        torch.testing.assert_close(merged, whole, equal_nan=True)


def test_statistics_of_two_libraries_merge_into_the_first():
    x = activations("normal", (3, 8))
    s, t = br.representation_stats(x), br.representation_stats(x.numpy())
    loaded = RepresentationStats.from_state_dict(t.state_dict())
    for first, second, kind in ((s, t, torch.Tensor), (t, s, np.ndarray), (t, loaded, np.ndarray)):
        assert isinstance(first.merge(second).std, kind)
        assert isinstance(br.cat([first, second]).std, kind)


def test_statistics_that_leave_the_memory_of_their_library_are_torch_tensors():
    s = br.representation_stats(np.ones((2, 3)))
    assert s.to("meta").std.is_meta
    assert isinstance(s.to("cpu").std, np.ndarray)
    assert isinstance(dataclasses.replace(s, library="cupy").to("cpu").std, torch.Tensor)


def test_merge_and_cat_refuse_what_does_not_fit():
    x = activations("normal", (3, 8))
    s = br.representation_stats(x)
    for other, message in (
        (br.representation_stats(x, correction=1), "differ in correction"),
        (br.representation_stats(x, threshold=0.5), "differ in threshold"),
        (br.representation_stats(x, histogram=True), "only one of the statistics has histogram"),
        (s[:2], r"shapes \(3,\) and \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            s.merge(other)
    with pytest.raises(TypeError, match="got Tensor"):
        s.merge(x)
    with pytest.raises(ValueError, match="empty list"):
        br.cat([])
    with pytest.raises(ValueError, match="dim=1 is out of range"):
        br.cat([s, s], dim=1)
    assert br.cat([s, s[:1]]).shape == (4,)


def test_indexing_cat_and_state_dict_keep_everything():
    x = activations("relu", (4, 5, 30))
    s = br.representation_stats(x, correction=1, threshold=0.2, **ALL)
    again = br.cat([s[:2], s[2:]])
    loaded = RepresentationStats.from_state_dict(load(save(s.state_dict())))
    for t in (again, loaded, br.cat([s[:, :3], s[:, 3:]], dim=1), s[...], s.to("cpu")):
        assert torch.equal(t.state, s.state)
        assert torch.equal(t.gini(), s.gini())
        assert torch.equal(t.energy_entropy, s.energy_entropy)
        assert (t.correction, t.threshold, t.dtype) == (1, 0.2, torch.float32)
    assert torch.equal(s[1, 2].std, s.std[1, 2])
    assert torch.equal(s[..., 0].gini(), s.gini()[..., 0])
    assert len(s) == 4
    assert repr(s[0]) == "RepresentationStats(shape=(5,), correction=1, torch.float32, cpu, histogram, energy_log)"
    with pytest.raises(ValueError, match="missing"):
        RepresentationStats.from_state_dict({"state": s.state})
    with pytest.raises(ValueError, match=r"histogram.table and histogram.top go together, found \['dtype'"):
        RepresentationStats.from_state_dict({k: v for k, v in s.state_dict().items() if k != "histogram.top"})
    for name, wrong in {
        "state": s.state.float(),
        "settings": torch.zeros(3, dtype=torch.float64),
        "histogram.table": s.histogram.table[..., 1:],
        "histogram.top": s.histogram.top[:2],
        "energy_log": s.energy_log.flatten(),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} must be torch\.\w+ \(.*got {wrong.dtype}"):
            RepresentationStats.from_state_dict(s.state_dict() | {name: wrong})


def test_statistics_are_a_sequence_of_samples():
    s = br.representation_stats(activations("normal", (3, 8)))
    assert [one.std for one in s] == list(s.std)
    for use in (len, list):
        with pytest.raises(TypeError, match=r"shape \(\), have no len"):
            use(s[0])


@pytest.mark.parametrize("scale", [1e-160, 1e-90, 1e80, 1e100])
@pytest.mark.parametrize("constant", [False, True])
def test_fourth_powers_that_leave_float64_are_nan(scale, constant):
    x = torch.ones(1, 9, dtype=torch.float64) if constant else activations("normal", (1, 9), torch.float64)
    for backend in ("cpp", "reference"):
        with br.backend(backend):
            s = br.representation_stats(x * scale)
        fourth = (s.kurtosis, s.l4, s.l4_over_l2, s.participation_ratio, s.inverse_participation_ratio)
        assert all(value.isnan() for value in fourth)


@pytest.mark.parametrize("distribution", ["normal", "relu", "heavy", "large", "tiny", "step", "huge", "subnormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_histogram_measures_stay_within_their_bounds(distribution, dtype):
    x = activations(distribution, (4, 3001), dtype)
    s = br.representation_stats(x, histogram=True)
    v = x.double()
    size, n = v.abs().sort(1).values, 3001
    rank = 2 * torch.arange(1, n + 1) - n - 1
    value, bound = (t.double() for t in s.gini(return_bound=True))
    assert ((value - (rank * size).sum(1) / (n * size.sum(1))).abs() <= bound).all()
    assert (bound < 1e-3).all()
    unit = size / size[:, -1:]  # energies of huge values leave float64 only when squared twice; shares need no scale
    for k in (1, 2, 30, 0.01, 0.5, n, n + 5):
        count = math.ceil(k * n) if isinstance(k, float) else min(k, n)
        want = unit.square()[:, n - count :].sum(1) / unit.square().sum(1)
        value, bound = (t.double() for t in s.topk_share(k, return_bound=True))
        assert ((value - want).abs() <= bound).all(), k
        assert (bound < 0.07).all()
    q = [0.0, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0]
    want = torch.quantile(v, torch.tensor(q, dtype=torch.float64), dim=1)
    value, bound = (t.double() for t in s.quantile(q, return_bound=True))
    rounding = want.abs() * 1e-7 + (0 if dtype == torch.float64 else 1.5e-45)  # of a result given in float32
    assert ((value - want).abs() <= bound * (1 + 1e-6) + rounding).all()
    torch.testing.assert_close(s.quantile(0.25), s.quantile(q)[2])


@pytest.mark.parametrize("rest", [2**18 - 1, 2**17, 1])
def test_a_bin_of_more_values_than_its_sum_of_squares_holds(rest):
    """2^30 values in each of two bins, and zeros, by stride 0: the sum of squared rests leaves int64."""
    value = 1 + 31 / 32 + rest / 2**23
    s = br.representation_stats(torch.tensor([[value], [1.0], [0.0]]).expand(3, 2**30), None, histogram=True)
    share, bound = s.topk_share(2**30, return_bound=True)
    assert abs(share - value**2 / (1 + value**2)) <= bound <= 2.0**-11
    assert s.quantile([0.5, 0.75]).tolist() == pytest.approx([1.0, value], rel=1 / 64)


def test_a_fraction_of_the_values_is_not_rounded_up_twice():
    s = br.representation_stats(activations("normal", (2, 100)), histogram=True)
    for percent in range(1, 100):
        assert torch.equal(s.topk_share(percent / 100), s.topk_share(percent)), percent
    assert torch.equal(s.topk_share(0.071), s.topk_share(8))


def test_tracing_leaves_nothing_behind():
    x = activations("normal", (2, 50))
    gini = lambda h: br.representation_stats(h, histogram=True).gini()  # noqa: E731
    graph = make_fx(gini, tracing_mode="fake")(x)
    torch.testing.assert_close(graph(x), gini(x))


def test_on_request_measures_say_how_to_get_them():
    s = br.representation_stats(torch.ones(2, 3))
    for f in (s.gini, lambda: s.topk_share(1), lambda: s.quantile(0.5)):
        with pytest.raises(ValueError, match="histogram=True"):
            f()
    with pytest.raises(ValueError, match="entropy=True"):
        _ = s.energy_entropy
    s = br.representation_stats(torch.ones(2, 3), histogram=True)
    for k in (0, -1, 1.5, 0.0, "1"):
        with pytest.raises(ValueError, match="k must be"):
            s.topk_share(k)
    with pytest.raises(ValueError, match="q must be"):
        s.quantile(1.5)


def test_per_unit_over_a_stream_of_batches():
    batches = [activations("relu", (b, 6, 4, 4), seed=b) for b in (3, 1, 5)]
    parts = [br.representation_stats(h, dim=0, pool="max") for h in batches]
    merged = parts[0].merge(*parts[1:])
    pooled = torch.cat(batches).amax((2, 3))
    torch.testing.assert_close(merged.std, pooled.std(0, correction=0))
    assert merged.n.tolist() == [9] * 6


def test_numpy_in_numpy_out_without_a_copy():
    x = np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
    x.flags.writeable = False
    s = br.representation_stats(x, **ALL)
    assert isinstance(s.std, np.ndarray)
    np.testing.assert_allclose(s.std, x.std(1), rtol=1e-6)
    assert isinstance(s.quantile(0.5), np.ndarray)
    assert s.n.dtype == np.int64
    assert isinstance(br.representation_stats(x, dim=None).std, np.float32)
    for view in (x[::2, ::3], x.T, x[::-1, ::-1], np.asfortranarray(x), x.astype(np.float64), x.astype(np.float16)):
        np.testing.assert_allclose(br.representation_stats(view).mean, view.mean(1, dtype=np.float64), atol=1e-6)


def test_numpy_memory_is_borrowed():
    from balanced_rep.ops._arrays import as_tensor

    for writeable in (True, False):
        x = np.zeros((4, 6))[:, ::2]
        x.flags.writeable = writeable
        t, library = as_tensor(x)
        assert (t.data_ptr(), library) == (x.ctypes.data, "numpy")
        owner, at = x, x.ctypes.data
        del x, owner
        assert t.sum() == 0  # the tensor keeps the memory alive
        assert t.data_ptr() == at


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(3, dtype=np.int32), "numpy dtype int32; accepted are float16"),
        (np.zeros(3, dtype=bool), "numpy dtype bool"),
        (np.zeros(3, dtype=complex), "numpy dtype complex128"),
        (np.zeros(3, dtype=np.longdouble), "numpy dtype"),
        (np.zeros(3, dtype=">f4"), "byte order '>f4'.*astype\\('<f4'\\)"),
        (np.array(["a"]), "numpy dtype"),
        (np.ma.masked_array([1.0, 2.0], mask=[0, 1]), "masked array.*compressed"),
        ("text", "got str"),
        (None, "got NoneType"),
    ],
)
def test_arrays_that_are_refused(x, message):
    with pytest.raises(TypeError, match=message):
        br.representation_stats(x)


def test_any_dlpack_producer_and_cupy(monkeypatch):
    """A device array library is recognised by its module and gets its own arrays back, through DLPack alone."""

    class Array:
        def __init__(self, t):
            self.t = t

        def __dlpack__(self, **kwargs):
            return self.t.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.t.__dlpack_device__()

    x = torch.randn(3, 5)
    assert isinstance(br.representation_stats(Array(x)).std, torch.Tensor)
    cupy = types.ModuleType("cupy")
    cupy.from_dlpack = Array
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(Array, "__module__", "cupy._core.core")
    std = br.representation_stats(Array(x)).std
    assert isinstance(std, Array)
    torch.testing.assert_close(std.t, x.std(1, correction=0))


def test_requires_grad_gives_a_differentiable_result():
    x = activations("relu", (3, 20), torch.float64).requires_grad_()
    s = br.representation_stats(x, entropy=True, histogram=True)
    (got,) = torch.autograd.grad((s.kurtosis + s.hoyer + s.energy_entropy).sum(), x)
    y = x.detach().clone().requires_grad_()
    share = y.square() / y.square().sum(1, keepdim=True)
    entropy = -torch.where(share > 0, share * torch.where(share > 0, share, 1.0).log(), 0.0).sum(1)
    d = y - y.mean(1, keepdim=True)
    kurtosis = d.pow(4).mean(1) / d.pow(2).mean(1) ** 2
    hoyer = (20**0.5 - y.abs().sum(1) / y.norm(dim=1)) / (20**0.5 - 1)
    torch.testing.assert_close(got, torch.autograd.grad((kurtosis + hoyer + entropy).sum(), y)[0])


def test_transforms_and_compile():
    x, t = activations("normal", (3, 20)), activations("heavy", (3, 20))
    score = lambda h: br.representation_stats(h).std  # noqa: E731
    torch.testing.assert_close(torch.vmap(score)(x), score(x))
    tangent = torch.func.jvp(score, (x,), (t,))[1]
    want = torch.func.jvp(lambda h: h.std(-1, correction=0), (x,), (t,))[1]
    torch.testing.assert_close(tangent, want)
    everything = torch.compile(
        lambda h: (lambda s: (s.hoyer, s.gini(), s.energy_entropy))(br.representation_stats(h, **ALL)),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    s = br.representation_stats(x, **ALL)
    torch.testing.assert_close(everything(x), (s.hoyer, s.gini(), s.energy_entropy))


def test_inference_mode_autocast_and_parameters():
    p = torch.nn.Parameter(activations("normal", (3, 20)))
    with torch.inference_mode():
        assert not br.representation_stats(p).std.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert br.representation_stats(p).std.dtype == torch.float32
