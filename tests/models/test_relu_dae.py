"""The two-layer autoencoder: function, Jacobian, taps, files, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import balanced_rep as br
from balanced_rep.models import CheckpointError, Denoiser, ReLUDAE

F64 = torch.float64


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> ReLUDAE:
    W1, W2 = (torch.randn(6, 9, dtype=F64, generator=gen(i)) for i in (0, 1))
    return ReLUDAE(W1, None if request.param else W2, sigma=0.2, sample_shape=(1, 2, 3))


def test_function_layers_and_protocol(model: ReLUDAE) -> None:
    y = torch.randn(5, 1, 2, 3, dtype=F64, generator=gen(2))
    want = torch.relu(y.flatten(1) @ model.W1) @ model.W2.T
    torch.testing.assert_close(model(y, 0.2), want.reshape(y.shape))
    assert isinstance(model, Denoiser)
    assert (model.tied, len(list(model.parameters()))) in ((True, 1), (False, 2))
    with br.record(model, list(model.layers)) as recording:
        model(y)
    torch.testing.assert_close(recording["act"].state, br.representation_stats(model.represent(y)).state)
    assert model(y[:0], 0.1).shape == (0, 1, 2, 3)


def test_jacobian_is_exact(model: ReLUDAE) -> None:
    y = torch.randn(4, 1, 2, 3, dtype=F64, generator=gen(3))
    want = torch.stack([torch.func.jacrev(lambda z: model(z[None], 0.2)[0].flatten())(s).reshape(6, 6) for s in y])
    torch.testing.assert_close(model.jacobian(y), want)


def test_save_and_load(model: ReLUDAE, tmp_path: Path) -> None:
    model.save(tmp_path / "dae.safetensors")
    again = ReLUDAE.load(tmp_path / "dae.safetensors")
    y = torch.randn(2, 1, 2, 3, dtype=F64, generator=gen(4))
    assert torch.equal(again(y), model(y))
    assert (again.tied, again.sigma, again.sample_shape) == (model.tied, 0.2, (1, 2, 3))


def test_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match="not a ReLUDAE checkpoint"):
        ReLUDAE.load(path)
    br.models.digits().save(path)
    with pytest.raises(CheckpointError, match="not a ReLUDAE checkpoint"):
        ReLUDAE.load(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W: ReLUDAE(W[0], sigma=0.1), r"W1 must be floating point \(d, p\)"),
        (lambda W: ReLUDAE(W.long(), sigma=0.1), "int64"),
        (lambda W: ReLUDAE(W, W.T, sigma=0.1), r"W2 must be like W1, \(6, 9\) torch.float64, got \(9, 6\)"),
        (lambda W: ReLUDAE(W, sigma=0.0), "sigma must be a positive number, got 0.0"),
        (lambda W: ReLUDAE(W, sigma=0.1, sample_shape=(2, 2)), "does not have d = 6 entries"),
        (lambda W: ReLUDAE(W, sigma=0.1)(torch.ones(2, 5, dtype=F64)), r"shape \(batch, 6\), got \(2, 5\)"),
        (lambda W: ReLUDAE(W, sigma=0.1)(torch.ones(2, 6, dtype=F64), 0.1, cond=1), "unconditional"),
    ],
)
def test_bad_input_is_refused_with_the_reason(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(6, 9, dtype=F64))
