"""A conditional denoiser in which everything can be worked out on paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from balanced_rep.models import Tap

F64 = torch.float64


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Toy(nn.Module):
    """`D(y, sigma, c) = tanh(c m) y + c B` for conditions (b, tokens, 3) that are summed over tokens."""

    data_range = (-10.0, 10.0)
    sigma_range = (0.01, 5.0)
    sample_shape = (1, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.randn(3, dtype=F64, generator=gen(0)), requires_grad=False)
        self.B = nn.Parameter(torch.randn(3, 4, dtype=F64, generator=gen(1)), requires_grad=False)
        self.value = nn.Linear(3, 5, dtype=F64)
        self.inner = nn.Identity()
        self.calls = 0

    @property
    def layers(self) -> Mapping[str, Tap]:
        return {"inner": Tap("what comes out", kind="map")}

    @property
    def null_condition(self) -> Tensor:
        return torch.full((1, 2, 3), 0.1, dtype=F64)

    @property
    def cross_attention_values(self) -> Mapping[str, nn.Module]:
        return {"value": self.value}

    def gain(self, c: Tensor) -> Tensor:
        return torch.tanh(c.sum(1) @ self.m).view(-1, 1, 1, 1)

    def forward(self, y: Tensor, sigma: float | Tensor, cond: Any = None) -> Tensor:
        self.calls += 1
        c = self.null_condition if cond is None else cond
        return self.inner(self.gain(c) * y + (c.sum(1) @ self.B).reshape(-1, 1, 2, 2))


@pytest.fixture
def toy() -> Toy:
    return Toy().eval()


@pytest.fixture
def prompts() -> Tensor:
    return torch.randn(7, 2, 3, dtype=F64, generator=gen(2)) * 0.5
