"""Matrices and Jacobians for bench_svd.py: known spectra, activations, image patches, denoisers of three kinds.

The photographs are the two that scikit-learn ships; nothing is downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import _common as common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanced_rep as br

SPECTRA: dict[str, Callable[[Tensor, int], Tensor]] = {
    "1 / i^0.5": lambda i, k: i**-0.5,
    "1 / i^0.7": lambda i, k: i**-0.7,
    "1 / i": lambda i, k: 1 / i,
    "exponential": lambda i, k: 10 ** (-2 * (i - 1) / k),
    "low rank + noise": lambda i, k: torch.where(i <= k, 10 ** (-(i - 1) / (1.5 * k)), 0.02),
}
MEASURED = ("activations", "image patches")


def matrix(kind: str, m: int, n: int, k: int) -> Tensor:
    """One of :data:`SPECTRA` with random singular vectors, or of :data:`MEASURED`; float32 ``(m, n)``."""
    if kind in SPECTRA:
        g = common.generator(0)
        U = torch.linalg.qr(torch.randn(m, n, generator=g, dtype=torch.float64)).Q
        V = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
        return ((U * SPECTRA[kind](torch.arange(1, n + 1, dtype=torch.float64), k)) @ V.mT).float()
    side = 26 if n >= 576 else 8
    P = patches(m, side).mean(1).reshape(m, -1)
    P = P - P.mean(0)
    g = common.generator(1)
    if kind == "image patches":
        return F.pad(P[:, :n], (0, max(0, n - P.shape[1]))).contiguous()
    width = P.shape[1]
    first = torch.relu(P / P.std() @ torch.randn(width, n, generator=g) / width**0.5)
    return torch.relu(first @ torch.randn(n, n, generator=g) / n**0.5 * 1.4)


@functools.cache
def patches(count: int, size: int) -> Tensor:
    """Patches of photographs at several scales, ``(count, 3, size, size)`` in [-1, 1]."""
    from sklearn.datasets import load_sample_images

    images = [torch.tensor(image).permute(2, 0, 1).float() / 127.5 - 1 for image in load_sample_images().images]
    g = common.generator(2)
    found = []
    for _ in range(count):
        image = images[int(torch.randint(len(images), (), generator=g))]
        height = int(torch.randint(size, 150, (), generator=g))
        y, x = (int(torch.randint(s - height, (), generator=g)) for s in image.shape[1:])
        patch = image[:, y : y + height, x : x + height].unsqueeze(0)
        found.append(F.interpolate(patch, size=size, mode="area")[0])
    return torch.stack(found)


@dataclass(frozen=True)
class Problem:
    """A function, a point, and its singular values there.

    Attributes:
        f: The function.
        x: The point.
        S: All singular values, float64.
        J: The Jacobian.
    """

    f: Callable[[Tensor], Tensor]
    x: Tensor
    S: Tensor
    J: Tensor


def problem(kind: str, small: bool = False) -> Problem:
    """The nearly symmetric "Gaussian denoiser" or "memorizing denoiser", n = 768, or the "trained U-Net", n = 3072."""
    if kind == "trained U-Net":
        f, x = trained("U-Net", 16 if small else 32, 20 if small else 350)
        J = jacobian(f, x)
        return Problem(f, x, torch.linalg.svdvals(J.double()), J)
    size = 8 if small else 16
    X = patches(400 if small else 1500, size).reshape(-1, 3 * size * size).double()
    X = X - X.mean(0)
    n = X.shape[1]
    noise = torch.randn(n, n, generator=common.generator(1), dtype=torch.float64)
    if kind == "Gaussian denoiser":
        C = X.mT @ X / len(X)
        J = C @ torch.linalg.inv(C + 0.25 * torch.eye(n, dtype=torch.float64))
        J = J + 0.02 * J.norm() / n * noise
    else:
        y = X[7] + 2.5 * torch.randn(n, generator=common.generator(5), dtype=torch.float64)
        w = torch.softmax(-(y - X).square().sum(1) / (2 * 2.5**2), 0)
        centred = X - w @ X
        J = (centred * w.unsqueeze(1)).mT @ centred / 2.5**2
        J = J + 0.002 * J.norm() / n * noise
    J = J.float()
    return Problem(lambda x: x @ J.mT, torch.zeros(n), torch.linalg.svdvals(J.double()), J)


class UNet(nn.Module):
    """Two levels down and up with skips; 3 channels in and out."""

    def __init__(self, c: int = 12) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(2 * c, 3, 3, padding=1)
        self.down1 = nn.Conv2d(c, 2 * c, 3, padding=1, stride=2)
        self.down2 = nn.Conv2d(2 * c, 4 * c, 3, padding=1, stride=2)
        self.middle = nn.Conv2d(4 * c, 4 * c, 3, padding=1)
        self.up1, self.up2 = nn.ConvTranspose2d(4 * c, 2 * c, 4, 2, 1), nn.ConvTranspose2d(4 * c, c, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.into(x))
        b = F.silu(self.down1(a))
        c = F.silu(self.down2(b))
        c = F.silu(self.middle(c)) + c
        u = torch.cat([F.silu(self.up1(c)), b], 1)
        return self.out(torch.cat([F.silu(self.up2(u)), a], 1))


class DiT(nn.Module):
    """A plain diffusion transformer: patches of 4 x 4, blocks of attention and an MLP."""

    def __init__(self, size: int, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.size, self.heads = size, heads
        self.into, self.out = nn.Linear(48, width), nn.Linear(width, 48)
        self.position = nn.Parameter(0.02 * torch.randn((size // 4) ** 2, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2 * depth + 1)])
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(depth)])
        self.project = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.mlp = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)]
        )

    def forward(self, x: Tensor) -> Tensor:
        cells = self.size // 4
        tokens = x.unflatten(2, (cells, 4)).unflatten(4, (cells, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        h = self.into(tokens) + self.position
        for i, (qkv, project, mlp) in enumerate(zip(self.qkv, self.project, self.mlp, strict=True)):
            q, k, v = qkv(self.norms[2 * i](h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            h = h + project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            h = h + mlp(self.norms[2 * i + 1](h))
        y = self.out(self.norms[-1](h)).unflatten(1, (cells, cells)).unflatten(3, (3, 4, 4))
        return y.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def trained(name: str, size: int, steps: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The "U-Net" or the "DiT", trained as a denoiser for a minute, and a noisy patch (noise 0.5)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet() if name == "U-Net" else DiT(size)
    X, g = patches(500, size), common.generator(3)
    optimiser = torch.optim.Adam(net.parameters(), 2e-3 if name == "U-Net" else 1e-3)
    with torch.enable_grad():
        for _ in range(steps):
            x = X[torch.randint(len(X), (16,), generator=g)]
            sigma = torch.rand(16, 1, 1, 1, generator=g) * 0.6 + 0.1
            loss = (net(x + sigma * torch.randn(x.shape, generator=g)) - x).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    net.eval().requires_grad_(False)
    x = X[3] + 0.5 * torch.randn(X[3].shape, generator=g)
    return (lambda v: net(v.unsqueeze(0))[0]), x


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor, columns: int | None = None, chunk: int = 64) -> Tensor:
    """The first columns of the Jacobian (all by default) by ``br.jvp``, as fast as it goes, ``(m, columns)``."""
    n = x.numel()
    columns = n if columns is None else columns
    parts = []
    for start in range(0, columns, chunk):
        unit = torch.zeros(min(chunk, columns - start), n)
        unit[torch.arange(len(unit)), torch.arange(start, start + len(unit))] = 1
        tangents = br.jvp(f, x, unit.view(-1, *x.shape))[1]
        parts.append(tangents.flatten(1))
    return torch.cat(parts).mT.contiguous()


def best_error(A: Tensor, k: int) -> Tensor:
    """Frobenius error of the best approximation."""
    short = A.double() if A.shape[-2] >= A.shape[-1] else A.double().mT
    theta = torch.linalg.eigvalsh(short.mT @ short).clamp_min(0)
    return theta[..., :-k].sum(-1).sqrt()
