"""EDM preconditioning and the network inside: formulas, shapes, derivatives, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from balanced_rep.models import Denoiser, EDMDenoiser, ResidualMLP
from balanced_rep.models._edm import edm_loss


class Spy(nn.Module):
    """Returns `scale * x` and remembers what it was called with."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        self.x, self.c_noise = x, c_noise
        return self.scale * x


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_preconditioning_is_table_1_of_karras(scale: float, sigma_data: float) -> None:
    spy = Spy(scale)
    denoiser = EDMDenoiser(spy, sigma_data=sigma_data)
    y = torch.randn(5, 2, 3, dtype=torch.float64, generator=_generator())
    sigma = torch.tensor([0.01, 0.1, 0.5, 2.0, 80.0], dtype=torch.float64)
    got = denoiser(y, sigma)
    s, d = sigma[:, None, None], sigma_data
    c_skip, c_out, c_in = d**2 / (s**2 + d**2), s * d / (s**2 + d**2) ** 0.5, 1 / (s**2 + d**2) ** 0.5
    torch.testing.assert_close(got, c_skip * y + c_out * scale * c_in * y, rtol=1e-12, atol=0)
    torch.testing.assert_close(spy.x, c_in * y, rtol=1e-12, atol=0)
    torch.testing.assert_close(spy.c_noise, torch.log(sigma) / 4, rtol=1e-12, atol=0)


def test_one_sigma_for_all_equals_a_sigma_for_each() -> None:
    denoiser = EDMDenoiser(ResidualMLP((3, 2), width=8, generator=_generator()))
    nn.init.normal_(denoiser.net.linear_out.weight, generator=_generator(1))
    y = torch.randn(4, 3, 2, generator=_generator(2))
    each = denoiser(y, torch.full((4,), 0.3))
    for sigma in (0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, dtype=torch.float64)):
        torch.testing.assert_close(denoiser(y, sigma), each, rtol=0, atol=0)
    mixed = denoiser(y, torch.tensor([0.3, 1.0, 0.3, 1.0]))
    torch.testing.assert_close(mixed[::2], each[::2])
    assert not torch.allclose(mixed[1::2], each[1::2])


def test_loss_of_a_zero_network_on_gaussian_data_is_one() -> None:
    # Then D = c_skip y is the ideal denoiser, whose error sigma^2 s^2 / (sigma^2 + s^2) the weight turns into 1.
    denoiser = EDMDenoiser(Spy(0.0), sigma_data=0.5)
    generator = _generator(3)
    x = 0.5 * torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
    sigma = (1.2 * torch.randn(20_000, generator=generator, dtype=torch.float64) - 1.2).exp()
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    assert edm_loss(denoiser, x, sigma, noise).item() == pytest.approx(1.0, abs=0.03)


def test_jvp_agrees_with_finite_differences() -> None:
    net = ResidualMLP((6,), width=16, generator=_generator())
    nn.init.normal_(net.linear_out.weight, generator=_generator(1))
    denoiser = EDMDenoiser(net).double()
    y, v = torch.randn(2, 3, 6, dtype=torch.float64, generator=_generator(4))
    _, got = torch.func.jvp(lambda z: denoiser(z, 0.4), (y,), (v,))
    h = 1e-6
    want = (denoiser(y + h * v, 0.4) - denoiser(y - h * v, 0.4)) / (2 * h)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_network_draws_from_its_generator_only() -> None:
    before = torch.get_rng_state()
    one, two = (ResidualMLP((4,), width=8, generator=_generator(7)).state_dict() for _ in range(2))
    other = ResidualMLP((4,), width=8, generator=_generator(8)).state_dict()
    ResidualMLP((4,), width=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["linear_in.weight"], other["linear_in.weight"])


def test_initial_weights_are_uniform_with_the_default_bound() -> None:
    weight = ResidualMLP((64,), width=256, generator=_generator()).blocks[0].linear_in.weight  # bound 1/16
    assert weight.abs().max() <= 1 / 16
    assert weight.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)


def test_every_activation_is_a_module() -> None:
    net = ResidualMLP((4,), width=8, depth=2, generator=_generator())
    seen: list[torch.Tensor] = []
    for block in net.blocks:
        block.act.register_forward_hook(lambda _m, _a, out: seen.append(out))
    net(torch.randn(3, 4, generator=_generator()), torch.zeros(3))
    assert [tuple(h.shape) for h in seen] == [(3, 8), (3, 8)]
    assert all((h >= 0).all() and (h == 0).any() for h in seen)


def test_denoiser_protocol() -> None:
    assert isinstance(EDMDenoiser(Spy(0.0)), Denoiser)
    assert not isinstance(nn.ReLU(), Denoiser)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d(torch.ones(2, 3), 0.0), "sigma must be positive"),
        (lambda d: d(torch.ones(2, 3), float("nan")), "sigma must be positive"),
        (lambda d: d(torch.ones(2, 3), torch.ones(3)), r"shape \(2,\), got \(3,\)"),
        (lambda d: d(torch.ones(2, 3), torch.ones(2, 1)), r"got \(2, 1\)"),
        (lambda d: d(torch.ones(2, 3), 0.1, cond=torch.ones(2)), "unconditional"),
        (lambda d: d(torch.ones(3), 0.1), "batch"),
        (lambda d: d(torch.ones(2, 3, dtype=torch.int64), 0.1), "floating-point"),
        (lambda d: d(torch.ones(2, 5), 0.1), r"shape \(batch, 3\), got \(2, 5\)"),
        (lambda d: EDMDenoiser(d.net, sigma_data=0.0), "sigma_data must be positive"),
        (lambda d: EDMDenoiser(d.net, layers={"net.nowhere": "?"}), "net.nowhere"),
    ],
)
def test_bad_input_is_refused_with_the_reason(call, message: str) -> None:
    denoiser = EDMDenoiser(ResidualMLP((3,), width=4, generator=_generator()))
    with pytest.raises(ValueError, match=message):
        call(denoiser)


def test_empty_batch() -> None:
    denoiser = EDMDenoiser(ResidualMLP((3,), width=4, generator=_generator()))
    assert denoiser(torch.ones(0, 3), 0.1).shape == (0, 3)
