"""StreamingPCA against the whole matrix: exact, cut anywhere, merged in any order, saved and restored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import balanced_rep as br
from balanced_rep.linalg import _scatter, _streaming
from tests.linalg.matrices import normal, spectrum, with_spectrum

K = 6
MODES = ("gram", "incremental")


def activations(m: int, n: int, seed: int = 0) -> Tensor:
    """Rectified random features: a large mean and a slowly falling spectrum."""
    hidden = torch.relu(normal(m, 24, seed=seed) @ normal(24, n, seed=seed + 1))
    return hidden + 0.3 * torch.relu(normal(m, n, seed=seed + 2))


def parts(X: Tensor, *cuts: int) -> list[Tensor]:
    return list(X.tensor_split(sorted(min(c, len(X)) for c in cuts)))


def excess(X: Tensor, found: _streaming.PCAResult) -> float:
    """Frobenius error of the projection over that of the best one, less 1."""
    C = X - X.mean(0)
    rest = C - (C @ found.components.mT) @ found.components
    best = torch.linalg.svdvals(C)[len(found.components) :].square().sum().sqrt()
    return float(torch.linalg.matrix_norm(rest) / best) - 1


def stream(X: Tensor, cuts: tuple[int, ...] = (), **options) -> br.StreamingPCA:
    pca = br.StreamingPCA(X.shape[1], K, **options)
    for part in parts(X, *cuts):
        pca.update(part)
    return pca


@pytest.mark.parametrize("center", [True, False])
def test_gram_is_exact(center):
    X = activations(400, 50)
    found = stream(X, (1, 7, 100, 100, 333), center=center).finalize()
    C = X - X.mean(0) if center else X
    _, S, Vh = torch.linalg.svd(C, full_matrices=False)
    torch.testing.assert_close(found.singular_values, S[:K], rtol=1e-10, atol=0)
    torch.testing.assert_close((found.components * Vh[:K]).sum(-1).abs(), torch.ones(K, dtype=torch.float64))
    torch.testing.assert_close(found.explained_variance, S[:K].square() / 399)
    torch.testing.assert_close(found.explained_variance_ratio, S[:K].square() / S.square().sum())
    torch.testing.assert_close(found.mean, X.mean(0) if center else torch.zeros(50, dtype=torch.float64))
    assert found.info.rel_error == pytest.approx(float((S[K:].square().sum() / S.square().sum()).sqrt()))
    assert bool(found.info.tight)
    assert found.n_samples == 400
    pivot = found.components.gather(-1, found.components.abs().argmax(-1, keepdim=True))
    assert bool((pivot > 0).all())


def test_a_large_scatter_matrix_is_searched_and_not_decomposed(monkeypatch):
    X = activations(300, 90)
    want = stream(X).finalize()
    monkeypatch.setattr(_scatter, "WHOLE_SPECTRUM", 60)
    got = stream(X).finalize()
    torch.testing.assert_close(got.singular_values, want.singular_values, rtol=1e-6, atol=0)
    assert excess(X, got) < 1e-6
    assert got.info.rel_error == pytest.approx(float(want.info.rel_error), rel=1e-6)


@pytest.mark.parametrize("kind", ["poly", "exp", "steep", "equal"])
def test_a_search_is_as_good_as_the_whole_spectrum(kind, monkeypatch):
    """Found once: where values fall steeply the search stopped at 41 % of the last one, under a tight certificate."""
    X = with_spectrum(300, 400, spectrum(kind, 300, K))
    monkeypatch.setattr(_scatter, "WHOLE_SPECTRUM", 60)
    monkeypatch.setattr(_scatter, "eigh_descending", small_only(_scatter.eigh_descending, 100))
    found = stream(X, center=False).finalize()
    true = torch.linalg.svdvals(X)[:K]
    torch.testing.assert_close(found.singular_values, true, rtol=1e-7, atol=0)
    along = torch.linalg.vector_norm(X @ found.components.mT, dim=0)
    torch.testing.assert_close(along, found.singular_values, rtol=1e-7, atol=0)  # the variance of these components


def small_only(eigh, most: int):
    def checked(G: Tensor) -> tuple[Tensor, Tensor]:
        assert G.shape[-1] <= most, "the whole spectrum was computed"
        return eigh(G)

    return checked


@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-7, 1e-9, 0.0])
@pytest.mark.parametrize("mode", MODES)
def test_what_squares_cannot_resolve_is_an_upper_bound(mode, noise):
    """Found once: at 1e-8 the error was said to be 3e-8, or zero, and both to be right to 1 %."""
    X = normal(300, K) @ normal(K, 60, seed=1) + noise * normal(300, 60, seed=2)
    found = stream(X, mode=mode, keep=60, center=False).finalize()
    true = torch.linalg.matrix_norm(X - X @ found.components.mT @ found.components) / torch.linalg.matrix_norm(X)
    assert bool(found.info.tight) == (noise == 1e-3)
    low, high = (0.99, 1.01) if noise == 1e-3 else (1, 1.5)
    assert low * float(true) <= float(found.info.rel_error) <= max(high * float(true), 2e-6)


def test_incremental_loses_little_and_says_how_much():
    X = activations(1500, 160)
    found = stream(X, mode="incremental", keep=24).finalize()
    C = X - X.mean(0)
    rest = C - (C @ found.components.mT) @ found.components
    error = float(torch.linalg.matrix_norm(rest) / torch.linalg.matrix_norm(C))
    assert 0 < excess(X, found) < 1e-3
    assert error <= found.info.rel_error < error * 1.02
    assert not bool(found.info.tight)
    torch.testing.assert_close(found.mean, X.mean(0))
    short = stream(X[:20], mode="incremental", keep=24).finalize()  # nothing had to be cut
    assert bool(short.info.tight)
    torch.testing.assert_close(short.singular_values, torch.linalg.svdvals(X[:20] - X[:20].mean(0))[:K])


def test_cuts_of_the_stream_do_not_change_a_bit():
    X = activations(333, 40)
    want = stream(X, mode="incremental").finalize()
    for cuts in ((1,), (5, 5, 17, 300), tuple(range(0, 333, 10))):
        assert torch.equal(stream(X, cuts, mode="incremental").finalize().components, want.components)


def test_parts_that_fill_no_block_merge_as_rows():
    """Found once: each merge cut the state to take in the few rows of the other one, and lost something every time."""
    X = activations(333, 40)
    want = stream(X, mode="incremental").finalize()
    assert not bool(want.info.tight)
    first, *others = [stream(part, mode="incremental") for part in parts(X, 7, 30, 31, 31, *range(50, 333, 19))]
    for other in others:
        saved = other.state_dict()
        first.merge(other)
        assert all(torch.equal(value, saved[name]) for name, value in other.state_dict().items())
    found = first.finalize()
    assert found.n_samples == 333
    assert torch.equal(found.components, want.components)
    assert torch.equal(found.singular_values, want.singular_values)
    assert found.info.rel_error == want.info.rel_error


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 900), min_size=0, max_size=7), seed=st.integers(0, 10**6))
def test_random_cuts_merged_in_random_order(mode, cuts, seed):
    X = activations(900, 60, seed=3) + torch.linspace(0, 5, 900).unsqueeze(1)  # the mean drifts
    workers = [stream(part, mode=mode, keep=24) for part in parts(X, *cuts)]
    generator = np.random.default_rng(seed)
    while len(workers) > 1:  # a random tree of merges
        i, j = generator.choice(len(workers), 2, replace=False)
        workers[i].merge(workers[j])
        del workers[j]
    found = workers[0].finalize()
    assert found.n_samples == 900
    torch.testing.assert_close(found.mean, X.mean(0), rtol=1e-12, atol=0)
    if mode == "gram":
        torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(X - X.mean(0))[:K], rtol=1e-9, atol=0)
        return
    assert excess(X, found) < 1e-3
    kept = 1 - float(found.info.rel_error) ** 2  # energy is counted exactly, whatever was cut
    C = X - X.mean(0)
    assert kept * C.square().sum() == pytest.approx(float(found.singular_values.square().sum()), rel=1e-9)


def test_merging_changes_the_excess_by_less_than_a_tenth_of_the_allowed():
    X = activations(4000, 200, seed=5)
    one = excess(X, stream(X, mode="incremental", keep=20).finalize())
    for count in (2, 5, 16):
        for order in (1, -1):
            workers = [stream(part, mode="incremental", keep=20) for part in X.tensor_split(count)][::order]
            for worker in workers[1:]:
                workers[0].merge(worker)
            assert abs(excess(X, workers[0].finalize()) - one) < 1e-4
    assert 0 < one < 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_saved_in_the_middle(mode):
    X = activations(300, 40)
    pca = stream(X[:173], mode=mode)
    again = br.StreamingPCA.from_state_dict(load(save(pca.state_dict())))
    before = pca.finalize()
    assert torch.equal(again.finalize().components, before.components)
    assert torch.equal(pca.finalize().components, before.components)  # to look does not change
    for p in (pca, again):
        p.update(X[173:])
    assert torch.equal(pca.finalize().components, again.finalize().components)
    assert repr(again) == f"StreamingPCA(n_features=40, k={K}, mode={mode!r}, n_samples=300)"


def test_memory_is_bounded():
    pca = br.StreamingPCA(100, 4, mode="incremental")
    for i in range(40):
        pca.update(normal(3, 100, seed=i))
        state = pca.state_dict()
        assert len(state["rows"]) + len(state["pending"]) <= 2 * pca.keep
    assert br.StreamingPCA(8192, 4).mode == "gram"
    assert br.StreamingPCA(8193, 4).mode == "incremental"


class Largest(TorchDispatchMode):
    """Numbers in the largest float64 tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_converted_in_panels(mode, monkeypatch):
    X = activations(700, 40).float()
    want = stream(X, mode=mode, keep=12).finalize()
    monkeypatch.setattr(_streaming, "PANEL", 40 * 64)
    with Largest() as seen:
        pca = br.StreamingPCA(40, K, mode=mode, keep=12).update(X)
    assert seen.numel <= 40 * 64
    torch.testing.assert_close(pca.finalize().singular_values, want.singular_values, rtol=1e-12, atol=0)
    bad = X.clone()
    bad[611, 3] = torch.inf
    with pytest.raises(ValueError, match="row 611 of X holds NaN"):
        pca.update(bad)
    assert pca.n_samples == 700


def test_inputs_of_any_kind():
    X = activations(60, 20)
    want = stream(X).finalize().components
    for rows in (X.numpy(), X.reshape(3, 4, 5, 20), X.mT.contiguous().mT, X.clone().requires_grad_()):
        got = br.StreamingPCA(20, K).update(rows).finalize().components
        torch.testing.assert_close(got.abs(), want.abs())
    half = br.StreamingPCA(20, K).update(X.half()).finalize()
    assert half.components.dtype == torch.float64
    assert torch.equal(half.mean, X.half().double().mean(0))
    assert br.StreamingPCA(20, K).update(X[:0]).update(X).finalize().n_samples == 60


def test_fewer_rows_than_components():
    X = normal(3, 20)
    for mode in MODES:
        found = br.StreamingPCA(20, K, mode=mode).update(X).finalize()
        assert found.components.shape == (3, 20)
        assert "3 were taken" in found.info.notes[0]
        assert found.info.rank == 2
        torch.testing.assert_close(found.components @ found.components.mT, torch.eye(3, dtype=torch.float64))
    one = br.StreamingPCA(20, K).update(X[:1]).finalize()
    assert one.explained_variance_ratio.tolist() == [0.0]
    wide = br.StreamingPCA(4, K, mode="incremental").update(normal(30, 4)).finalize()
    assert wide.components.shape == (4, 4)


def test_transform():
    X = with_spectrum(100, 30, spectrum("poly", 30, 6))
    found = stream(X).finalize(3)
    Y = found.transform(X)
    assert Y.shape == (100, 3)
    C = X - X.mean(0)
    torch.testing.assert_close(Y.square().sum(0).sqrt(), torch.linalg.svdvals(C)[:3])
    rest = torch.linalg.matrix_norm(found.inverse_transform(Y) - X) / torch.linalg.matrix_norm(C)
    assert rest == pytest.approx(float(found.info.rel_error))
    assert found.transform(X.float()).dtype == torch.float32


def test_transform_takes_what_update_takes():
    X = with_spectrum(100, 30, spectrum("poly", 30, 6))
    found = stream(X).finalize(3)
    Y = found.transform(X)
    torch.testing.assert_close(found.transform(X.numpy()), Y)
    torch.testing.assert_close(found.inverse_transform(Y.numpy()), found.inverse_transform(Y))
    half = X.to(torch.bfloat16)
    assert found.transform(half).dtype == torch.float32
    torch.testing.assert_close(found.transform(half), found.transform(half.float()))
    torch.testing.assert_close(found.inverse_transform(Y.half()), found.inverse_transform(Y.half().float()))
    for bad in (X.long(), X.to(torch.complex128)):
        with pytest.raises(TypeError, match=r"transform: X is torch\..* real floating point"):
            found.transform(bad)
    with pytest.raises(TypeError, match=r"inverse_transform: Y is torch\.int64"):
        found.inverse_transform(Y.long())
    with pytest.raises(TypeError, match="numpy dtype int64"):
        found.transform(X.long().numpy())


@pytest.mark.parametrize("mode", MODES)
def test_bad_rows_change_nothing(mode):
    X = activations(50, 20)
    pca = stream(X, mode=mode)
    want = pca.finalize()
    bad = X.clone()
    bad[7, 3] = torch.nan
    with pytest.raises(ValueError, match="row 7 of X holds NaN"):
        pca.update(bad)
    with pytest.raises(ValueError, match=r"expected is \(..., 20\)"):
        pca.update(X[:, :19])
    with pytest.raises(TypeError, match="int64"):
        pca.update(X.long())
    assert torch.equal(pca.finalize().components, want.components)


def test_bad_arguments():
    for arguments, match in (
        ((0, 3), "at least 1"),
        ((3, 0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            br.StreamingPCA(*arguments)
    with pytest.raises(ValueError, match="'auto', 'gram', 'incremental'"):
        br.StreamingPCA(3, 1, mode="sketch")
    with pytest.raises(ValueError, match="cannot hold k=6"):
        br.StreamingPCA(30, 6, keep=5)
    for mode in ("gram", "incremental"):
        with pytest.raises(ValueError, match=r"X reaches .*e\+200, whose square is out of range"):
            br.StreamingPCA(30, 3, mode=mode).update(1e200 * normal(50, 30))
        with pytest.raises(ValueError, match="squares of such numbers vanish"):
            br.StreamingPCA(30, 3, mode=mode).update(1e-200 * normal(50, 30)).finalize()
    with pytest.raises(ValueError, match="no rows yet"):
        br.StreamingPCA(3, 1).finalize()
    pca = br.StreamingPCA(30, 3, mode="incremental").update(normal(9, 30))
    with pytest.raises(ValueError, match="1 to 12"):
        pca.finalize(13)
    with pytest.raises(ValueError, match="itself"):
        pca.merge(pca)
    with pytest.raises(ValueError, match="cannot merge"):
        pca.merge(br.StreamingPCA(30, 4, mode="incremental"))
    state = pca.state_dict()
    with pytest.raises(ValueError, match=r"'energy'.* missing"):
        br.StreamingPCA.from_state_dict({k: v for k, v in state.items() if k != "energy"})


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_another_length_are_refused(mode):
    """Found once: rows of length 1 were broadcast, and became coordinates."""
    found = stream(activations(60, 20), mode=mode).finalize()
    for shape in ((1,), (5, 1), (5, 19), (5, 21), ()):
        with pytest.raises(ValueError, match=r"PCAResult.transform: X has shape .*; expected is \(\.\.\., 20\)"):
            found.transform(torch.ones(shape))
    for shape in ((1,), (5, 1), (5, K + 1), ()):
        with pytest.raises(ValueError, match=rf"inverse_transform: Y has shape .*; expected is \(\.\.\., {K}\)"):
            found.inverse_transform(np.ones(shape))
    assert found.transform(torch.ones(2, 3, 20)).shape == (2, 3, K)
    assert found.inverse_transform(torch.ones(0, K)).shape == (0, 20)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_rows_are_refused(layout):
    """Found once: torch said that reshape is not implemented."""
    X = activations(60, 20)
    X = X.to_sparse() if layout == "coo" else X.to_sparse_csr()
    pca = br.StreamingPCA(20, 3)
    with pytest.raises(TypeError, match=r"StreamingPCA: X is sparse \(torch.sparse_.*X.to_dense\(\)"):
        pca.update(X)
    assert pca.n_samples == 0
    found = pca.update(X.to_dense()).finalize()
    with pytest.raises(TypeError, match=r"transform: X is sparse"):
        found.transform(X)


@pytest.mark.parametrize("bad", [2.5, 3.0, True, "3", torch.tensor(2.5)])
def test_numbers_that_count_are_integers(bad):
    """Found once: k=2.5 was taken, and finalize failed."""
    for arguments in (
        {"n_features": bad, "k": 3},
        {"n_features": 20, "k": bad},
        {"n_features": 20, "k": 1, "keep": bad},
    ):
        with pytest.raises(
            TypeError, match=r"StreamingPCA: (n_features|k|keep)=.*; an integer of at least 1 is needed"
        ):
            br.StreamingPCA(**arguments)
    pca = br.StreamingPCA(np.int64(20), torch.tensor(3), keep=np.int32(7)).update(normal(30, 20))
    assert repr(pca) == "StreamingPCA(n_features=20, k=3, mode='gram', n_samples=30)"
    with pytest.raises(TypeError, match=r"k=.*; an integer of at least 1"):
        pca.finalize(bad)
    with pytest.raises(TypeError, match="another StreamingPCA, not int"):
        pca.merge(3)


def with_setting(state: dict[str, Tensor], place: int, value: int) -> Tensor:
    return state["settings"].index_fill(0, torch.tensor([place]), value)


@pytest.mark.parametrize("mode", MODES)
def test_hostile_states_are_refused(mode):
    """Found once: NaN, negative counts and wrong shapes were loaded; sizes that a file claims took the memory first."""
    state = br.StreamingPCA(30, 3, mode=mode).update(normal(45, 30)).state_dict()
    assert br.StreamingPCA.from_state_dict(state).n_samples == 45
    for name in ("mean", "rows", "energy", "pending"):
        value = state[name]
        nan = torch.full_like(value if value.numel() else normal(1, 30), torch.nan)
        for bad in (value.float(), nan, value.to_sparse(), torch.zeros(2, 7, dtype=torch.float64)):
            with pytest.raises(ValueError, match="not a StreamingPCA state"):
                br.StreamingPCA.from_state_dict({**state, name: bad})
    for place, value in ((1, 10**9), (1, 0), (1, -1), (2, 0), (3, 2), (3, 31), (4, 2), (5, 7), (6, -1), (6, 0)):
        with pytest.raises(ValueError, match="not a StreamingPCA state"):
            br.StreamingPCA.from_state_dict({**state, "settings": with_setting(state, place, value)})
    for settings_ in (state["settings"][:4], state["settings"].double(), state["settings"].reshape(7, 1)):
        with pytest.raises(ValueError, match="not a StreamingPCA state: 'settings'"):
            br.StreamingPCA.from_state_dict({**state, "settings": settings_})
    for energy in (-1.0, 0.5 * float(state["energy"])):
        with pytest.raises(ValueError, match="of an energy of"):
            br.StreamingPCA.from_state_dict({**state, "energy": torch.tensor(energy, dtype=torch.float64)})
    for bad in (None, "state", [1]):
        with pytest.raises(TypeError, match=r"not a StreamingPCA state: .*; what state_dict"):
            br.StreamingPCA.from_state_dict(bad)
    with pytest.raises(ValueError, match="version 9"):
        br.StreamingPCA.from_state_dict({**state, "settings": with_setting(state, 0, 9)})
