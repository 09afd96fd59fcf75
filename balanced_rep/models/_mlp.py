"""A small residual ReLU network, conditioned on the noise level.

Sizes: n = batch, d = entries of a sample, h = hidden width. With d = 64, h = 128 and three blocks it has 137,152
parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from balanced_rep.models._checks import check_like

__all__ = ["ResidualMLP"]


def _linear(n_in: int, n_out: int, generator: torch.Generator | None, *, zero: bool = False) -> nn.Linear:
    """A linear layer with torch's default distribution, drawn from `generator` and not from the global one."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, n_in, n_out)  # type: ignore[assignment]
    bound = 0.0 if zero else 1 / math.sqrt(n_in)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if generator is None or zero:
                parameter.zero_()
            else:
                parameter.uniform_(-bound, bound, generator=generator)
    return layer


class NoiseEmbedding(nn.Module):
    """`c_noise` -> sines and cosines at 16 frequencies from 1 to 64 -> two linear layers, `(n,)` -> `(n, h)`."""

    frequencies: Tensor

    def __init__(self, width: int, generator: torch.Generator | None) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(0.0, math.log(64.0), 16))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear_in = _linear(2 * frequencies.numel(), width, generator)
        self.act = nn.SiLU()
        self.linear_out = _linear(width, width, generator)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Embeds the noise level.

        Args:
            c_noise: `(n,)`.

        Returns:
            The embedding, `(n, h)`.
        """
        phase = c_noise[:, None] * self.frequencies  # (n, 16)
        return self.linear_out(self.act(self.linear_in(torch.cat([phase.sin(), phase.cos()], dim=1))))


class ResidualBlock(nn.Module):
    """`stream + linear_out(act(linear_in(norm(stream) + embedding)))`; `act` is the block's hidden representation."""

    def __init__(self, width: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_in = _linear(width, width, generator)
        self.act = nn.ReLU()
        self.linear_out = _linear(width, width, generator)

    def forward(self, stream: Tensor, embedding: Tensor) -> Tensor:
        """Adds the block's contribution to the residual stream.

        Args:
            stream: `(n, h)`.
            embedding: Of the noise level, `(n, h)`.

        Returns:
            The new residual stream, `(n, h)`.
        """
        return stream + self.linear_out(self.act(self.linear_in(self.norm(stream) + embedding)))


class ResidualMLP(nn.Module):
    """Residual ReLU blocks over flattened samples.

    Every nonlinearity is a module of its own (`blocks.0.act`, ...), so that a hook on it sees the activation.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        *,
        width: int = 128,
        depth: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        """Builds the network.

        Args:
            sample_shape: Shape of one sample, e.g. `(1, 8, 8)`.
            width: Hidden width h.
            depth: Number of residual blocks.
            generator: Draws the initial weights; the global generator is never touched. Without one all linear
                layers are zero, to be overwritten by a checkpoint.
        """
        super().__init__()
        self.sample_shape = tuple(sample_shape)
        n_entries = math.prod(self.sample_shape)
        self.embed = NoiseEmbedding(width, generator)
        self.linear_in = _linear(n_entries, width, generator)
        self.blocks = nn.ModuleList(ResidualBlock(width, generator) for _ in range(depth))
        self.linear_out = _linear(width, n_entries, generator, zero=True)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Runs the network.

        Args:
            x: Scaled noisy samples, `(n, *sample_shape)`.
            c_noise: Noise label, `(n,)`.

        Returns:
            Raw output, `(n, *sample_shape)`.

        Raises:
            ValueError: `x` has another sample shape, dtype or device.
        """
        if tuple(x.shape[1:]) != self.sample_shape:
            wanted = ", ".join(map(str, self.sample_shape))
            raise ValueError(f"Samples of this model have shape (batch, {wanted}), got {tuple(x.shape)}.")
        check_like(x, self.linear_in.weight)
        embedding = self.embed(c_noise)
        stream = self.linear_in(x.flatten(1))
        for block in self.blocks:
            stream = block(stream, embedding)
        return self.linear_out(stream).reshape(x.shape)
