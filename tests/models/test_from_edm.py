"""Networks with their own EDM preconditioning as denoisers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import balanced_rep as br
from balanced_rep.models import Denoiser, from_edm


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm0, self.norm1 = nn.GroupNorm(1, 4), nn.GroupNorm(1, 4)
        self.conv0, self.conv1 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv0(nn.functional.silu(self.norm0(x)))
        return x + self.conv1(nn.functional.silu(self.norm1(h)))


class Network(nn.Module):
    def __init__(self, label_dim: int = 0) -> None:
        super().__init__()
        self.img_channels, self.img_resolution, self.label_dim = 4, 8, label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = 0.0, float("inf"), 0.5
        self.enc = nn.ModuleDict({"8x8_block0": Block()})
        self.dec = nn.ModuleDict({"8x8_in0": Block()})
        self.seen: list[Any] = []

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.seen.append((sigma, class_labels))
        shift = 0 if class_labels is None else class_labels.sum(1).view(-1, 1, 1, 1)
        return self.dec["8x8_in0"](self.enc["8x8_block0"](x)) + shift


@torch.no_grad()
def test_taps_sizes_and_noise_levels() -> None:
    net = Network()
    D = from_edm(net)
    assert isinstance(D, Denoiser)
    assert (D.sample_shape, D.sigma_range, D.null_condition) == ((4, 8, 8), (0.002, 80.0), None)
    assert list(D.layers) == ["net.enc.8x8_block0.conv1", "net.dec.8x8_in0.conv1"]
    y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(D(y, 0.3), net(y, torch.tensor([0.3, 0.3])))
    assert torch.equal(net.seen[0][0], torch.tensor([0.3, 0.3]))
    with br.record(D, list(D.layers), "input", pool="max") as recording:
        D(y, 0.3)
    assert recording["net.dec.8x8_in0.conv1"].shape == (2,)
    with pytest.raises(ValueError, match="unconditional"):
        D(y, 0.3, torch.tensor([1, 2]))


@torch.no_grad()
def test_classes_become_labels() -> None:
    net = Network(label_dim=3)
    D = from_edm(net)
    y = torch.zeros(2, 4, 8, 8)
    D(y, 0.3, torch.tensor([2, 0]))
    D(y, 0.3)
    D(y, 0.3, D.null_condition.expand(2, -1))
    assert net.seen[0][1].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert net.seen[1][1].tolist() == net.seen[2][1].tolist() == [[0, 0, 0]] * 2


def test_classes_are_compared_with_none() -> None:
    D, numbers = from_edm(Network(label_dim=3)), torch.tensor([2, 0])
    for name, want in (("noise_difference", 16 / 0.5), ("sharpness", None)):  # labels that add 1 to 256 entries
        given = [br.detection.get(name)(D, cond=c, sigma=0.5).values for c in (numbers, torch.eye(3)[numbers])]
        torch.testing.assert_close(given[0], given[1], rtol=1e-5, atol=1e-4)
        if want is not None:
            torch.testing.assert_close(given[0], torch.full((2,), want, dtype=torch.float64), rtol=1e-5, atol=0)


def test_other_networks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Linear has no img_channels.*EDMDenoiser"):
        from_edm(nn.Linear(2, 2))
