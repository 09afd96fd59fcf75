"""svd_lowrank, pca_lowrank and randomized_svd_sklearn: the peers' arguments and shapes, and at least their accuracy."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.utils.extmath import randomized_svd as sklearn_svd
from torch import Tensor

from balanced_rep.linalg import pca_lowrank, randomized_svd_sklearn, svd_lowrank
from tests.linalg.matrices import normal, spectrum, with_spectrum


def error(A: Tensor, U: Tensor, S: Tensor, V: Tensor) -> float:
    return float(torch.linalg.matrix_norm(A - (U * S.unsqueeze(-2)) @ V.mT))


def arguments(f) -> list[str]:
    return [p.name for p in inspect.signature(f).parameters.values() if p.name != "seed"]


def test_the_peers_arguments_and_defaults():
    assert arguments(svd_lowrank) == ["A", "q", "niter", "M"] == list(inspect.signature(torch.svd_lowrank).parameters)
    assert (
        arguments(pca_lowrank) == ["A", "q", "center", "niter"] == list(inspect.signature(torch.pca_lowrank).parameters)
    )
    theirs = inspect.signature(sklearn_svd).parameters
    ours = inspect.signature(randomized_svd_sklearn).parameters
    assert set(theirs) <= set(ours)
    same = set(theirs) - {"random_state", "flip_sign"}
    assert all(theirs[name].default == ours[name].default and theirs[name].kind == ours[name].kind for name in same)


@pytest.mark.parametrize("niter", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["poly", "slow", "exp", "noise"])
def test_as_accurate_as_torch(kind, niter):
    """Against torch with the eight columns of oversampling that its users add."""
    A = with_spectrum(600, 400, spectrum(kind, 400, 32), dtype=torch.float32)
    torch.manual_seed(0)
    theirs = [X[..., :32] for X in torch.svd_lowrank(A, 40, niter)]
    assert error(A, *svd_lowrank(A, 32, niter)) <= error(A, *theirs) * (1 + 1e-6)


def test_svd_lowrank_shapes_mean_and_batch():
    A, M = normal(2, 30, 20), normal(20, seed=1).expand(30, 20)
    U, S, V = result = svd_lowrank(A, 4, M=M)
    assert (U.shape, S.shape, V.shape) == ((2, 30, 4), (2, 4), (2, 20, 4))
    torch.testing.assert_close(S, torch.linalg.svdvals(A - M)[:, :4])
    assert result.info.seed == 0
    assert svd_lowrank(A)[1].shape == (2, 6)
    with pytest.raises(ValueError, match="niter=-1"):
        svd_lowrank(A, niter=-1)


def test_pca_lowrank():
    A = normal(30, 20) + 9
    U, S, V = pca_lowrank(A, 4)
    torch.testing.assert_close(S, torch.linalg.svdvals(A - A.mean(0))[:4])
    torch.testing.assert_close((A - A.mean(0)) @ V, U * S)
    torch.testing.assert_close(pca_lowrank(A, 4, center=False)[1], torch.linalg.svdvals(A)[:4])
    assert pca_lowrank(A[:3])[1].shape == (3,)
    for arguments_, match in (({"q": 21}, "0 to min"), ({"niter": -1}, "niter=-1")):
        with pytest.raises(ValueError, match=match):
            pca_lowrank(A, **arguments_)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
def test_sklearn(shape):
    A = with_spectrum(*shape, spectrum("exp", 200, 10)).numpy()
    theirs, ours = sklearn_svd(A, 10, random_state=0), randomized_svd_sklearn(A, 10, random_state=0)
    for mine, want in zip(ours, theirs, strict=True):
        assert mine.shape == want.shape
        np.testing.assert_allclose(mine, want, atol=1e-6)  # the same signs, too
    sparse = randomized_svd_sklearn(scipy.sparse.csr_array(A), 10, random_state=np.random.default_rng(0))
    np.testing.assert_allclose(sparse[1], theirs[1], rtol=1e-6)
    C = A + 1j * A[::-1]  # theirs is wrong here
    np.testing.assert_allclose(
        randomized_svd_sklearn(C, 5, random_state=np.random.RandomState(0))[1],
        np.linalg.svd(C, compute_uv=False)[:5],
        rtol=1e-6,
    )
    free = [randomized_svd_sklearn(normal(300, 200).numpy(), 3, n_iter=1)[0] for _ in range(2)]
    assert not np.array_equal(*free)
    right = randomized_svd_sklearn(torch.from_numpy(A), 3, flip_sign=False, random_state=0)[2]
    assert bool((right.gather(-1, right.abs().argmax(-1, keepdim=True)) > 0).all())
    with pytest.raises(TypeError, match=r"n_iter='many'; an integer of at least 0 is needed, or 'auto'"):
        randomized_svd_sklearn(A, 3, n_iter="many")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda A: randomized_svd_sklearn(A, 2.7), "n_components"),
        (lambda A: randomized_svd_sklearn(A, 3, n_iter=2.7), "n_iter"),
        (lambda A: randomized_svd_sklearn(A, 3, n_oversamples=2.7), "n_oversamples"),
        (lambda A: svd_lowrank(A, 2.7), "q"),
        (lambda A: svd_lowrank(A, 3, niter=2.7), "niter"),
        (lambda A: pca_lowrank(A, 2.7), "q"),
        (lambda A: pca_lowrank(A, 3, niter=2.7), "niter"),
    ],
)
def test_no_number_that_counts_is_cut_to_an_integer(call, name):
    """Found once: 2.7 components became 2."""
    with pytest.raises(TypeError, match=rf"{name}=2\.7; an integer of at least 0 is needed"):
        call(normal(90, 70))


def test_scikit_learns_takes_one_matrix():
    """Found once: a cubic batch came back with its left vectors mixed up, without a word."""
    for M in (normal(3, 3, 3), np.ones((2, 5, 4)), np.ones(5), np.float64(3)):
        with pytest.raises(ValueError, match=r"M has shape \(.*\); one matrix \(m, n\) is needed"):
            randomized_svd_sklearn(M, 2)


@pytest.mark.parametrize(
    "bad", ["0", 1.5, np.random.SeedSequence(0), torch.Generator()], ids=lambda bad: type(bad).__name__
)
def test_a_source_of_randomness_is_needed(bad):
    with pytest.raises(TypeError, match=r"random_state=(?s:.*); an integer, a numpy\.random\.Generator or RandomState"):
        randomized_svd_sklearn(normal(90, 70).numpy(), 2, random_state=bad)


def test_what_is_no_tensor_is_named():
    """Found once: a list had no attribute 'shape', and a numpy array none of the name 'mH'."""
    X = normal(90, 70)
    for given in ([[1.0, 2.0]], X.numpy(), scipy.sparse.csr_matrix(X.numpy())):
        for call in (svd_lowrank, pca_lowrank):
            with pytest.raises(TypeError, match=r"A is [a-z._]*\.\w+; a torch tensor is needed: torch.as_tensor\(A\)"):
                call(given, 2)
    for call in (svd_lowrank, pca_lowrank):
        with pytest.raises(ValueError, match=r"A has shape \(90,\); at least two dims"):
            call(X[:, 0], 2)
    with pytest.raises(TypeError, match="M is list; an array or a sparse matrix"):
        randomized_svd_sklearn([[1.0, 2.0]], 1)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_what_is_subtracted(layout):
    """Found once: of sparse matrices torch said that the sum is not supported; M of more dims made a batch."""
    X, mean = normal(90, 70).relu(), normal(1, 70)
    sparse = X.to_sparse() if layout == "coo" else X.to_sparse_csr()
    with pytest.raises(TypeError, match="A is sparse and M dense"):
        svd_lowrank(sparse, 3, M=mean)
    full = normal(90, 70, seed=1)
    want = svd_lowrank(full - X, 3).S
    torch.testing.assert_close(svd_lowrank(full, 3, M=sparse).S, want)
    torch.testing.assert_close(svd_lowrank(full, 3, M=mean).S, svd_lowrank(full - mean, 3).S)
    for bad in (normal(2, 7), normal(4, 90, 70)):
        with pytest.raises(ValueError, match=r"M has shape .*; expected is \(90, 70\)"):
            svd_lowrank(full, 3, M=bad)
    with pytest.raises(TypeError, match=r"M is numpy\.ndarray; a torch tensor"):
        svd_lowrank(full, 3, M=mean.numpy())
