"""The two-layer denoising autoencoder of the theory: `f(y) = W2 [W1^T y]_+`, without biases.

Sizes: n = batch, d = entries of a sample, p = hidden units.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from balanced_rep.models._checks import check_like
from balanced_rep.models._digits import CheckpointError
from balanced_rep.models._protocol import Tap

__all__ = ["ReLUDAE"]

FORMAT = "balanced-rep relu-dae 1"
METADATA_KEY = "balanced_rep_relu_dae"


class ReLUDAE(nn.Module):
    """A two-layer ReLU autoencoder as a `Denoiser`; trained or built for one noise level, which it does not see.

    Equation 5 of the paper. The representation `h = [W1^T y]_+` is the output of the submodule `act`.

    Attributes:
        W1: Encoder, `(d, p)`; column j is the direction that unit j listens to.
        W2: Decoder, `(d, p)`; the same parameter as `W1` if the weights are tied.
    """

    W1: nn.Parameter
    W2: nn.Parameter

    def __init__(
        self,
        W1: Tensor,
        W2: Tensor | None = None,
        *,
        sigma: float,
        sample_shape: tuple[int, ...] | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        """Builds the model from weights, which are copied.

        Args:
            W1: Encoder, `(d, p)`, floating point, p at least 1.
            W2: Decoder, `(d, p)`; `None` ties it to the encoder.
            sigma: Noise level it is made for, in data units.
            sample_shape: Shape of one sample, with d entries; default `(d,)`.
            data_range: Smallest and largest value of a clean sample.

        Raises:
            ValueError: Shapes do not fit, or `sigma` is not positive.
        """
        super().__init__()
        if W1.ndim != 2 or not W1.is_floating_point() or W1.numel() == 0:
            raise ValueError(
                f"ReLUDAE: W1 must be floating point (d, p), not empty, got {tuple(W1.shape)} {W1.dtype}; from (n, d) "
                "samples, balanced_rep.theory.closed_form_weights gives such a matrix."
            )
        if W2 is not None and (W2.shape != W1.shape or W2.dtype != W1.dtype):
            raise ValueError(
                f"ReLUDAE: W2 must be like W1, {tuple(W1.shape)} {W1.dtype}, got {tuple(W2.shape)} {W2.dtype}."
            )
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"ReLUDAE: sigma must be a positive number, got {sigma}.")
        self.sample_shape = (W1.shape[0],) if sample_shape is None else tuple(sample_shape)
        if math.prod(self.sample_shape) != W1.shape[0]:
            raise ValueError(f"ReLUDAE: sample_shape={self.sample_shape} does not have d = {W1.shape[0]} entries.")
        self.W1 = nn.Parameter(W1.detach().clone())
        self.W2 = self.W1 if W2 is None else nn.Parameter(W2.detach().clone())
        self.act = nn.ReLU()
        self.sigma = float(sigma)
        self.data_range = data_range
        self.sigma_range = (float(sigma), float(sigma))

    @property
    def tied(self) -> bool:
        """Whether encoder and decoder are one parameter."""
        return self.W2 is self.W1

    @property
    def layers(self) -> Mapping[str, Tap]:
        """The one tap: the hidden layer."""
        units = self.W1.shape[1]
        return MappingProxyType({"act": Tap(f"hidden representation [W1^T y]_+, (batch, {units})", units=units)})

    @property
    def null_condition(self) -> None:
        """There are no conditions."""
        return None

    def forward(self, y: Tensor, sigma: float | Tensor | None = None, cond: Any = None) -> Tensor:
        """Denoises a batch.

        Args:
            y: Noisy samples, `(n, *sample_shape)`.
            sigma: Taken for the sake of the protocol and not used: the function is the same at every noise level.
            cond: Only `None`: the model is unconditional.

        Returns:
            Denoised samples, shape of `y`.

        Raises:
            ValueError: `cond` is given, or the sample shape is wrong.
        """
        if cond is not None:
            raise ValueError("This denoiser is unconditional: call it with cond=None.")
        return (self.represent(y) @ self.W2.T).reshape(y.shape)

    def represent(self, y: Tensor) -> Tensor:
        """The representation.

        Args:
            y: Samples, `(n, *sample_shape)`.

        Returns:
            `[W1^T y]_+`, `(n, p)`.

        Raises:
            ValueError: The sample shape is wrong, or dtype or device are not those of the weights.
        """
        if tuple(y.shape[1:]) != self.sample_shape:
            wanted = ", ".join(map(str, self.sample_shape))
            raise ValueError(f"Samples of this model have shape (batch, {wanted}), got {tuple(y.shape)}.")
        check_like(y, self.W1)
        return self.act(y.flatten(1) @ self.W1)

    @torch.no_grad()
    def jacobian(self, y: Tensor) -> Tensor:
        """The exact Jacobian `W2 diag(1[W1^T y > 0]) W1^T` of each sample.

        Args:
            y: Samples, `(n, *sample_shape)`.

        Returns:
            `(n, d, d)`.
        """
        active = (self.represent(y) > 0).to(self.W1.dtype)  # (n, p)
        return torch.einsum("ip,np,jp->nij", self.W2, active, self.W1)

    def save(self, path: str | Path) -> None:
        """Writes weights and settings to a safetensors file.

        Args:
            path: The file.
        """
        from safetensors.torch import save

        about = {
            "format": FORMAT,
            "sigma": self.sigma,
            "sample_shape": self.sample_shape,
            "data_range": self.data_range,
            "tied": self.tied,
        }
        tensors = {"W1": self.W1} if self.tied else {"W1": self.W1, "W2": self.W2}
        detached = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        Path(path).write_bytes(save(detached, metadata={METADATA_KEY: json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> ReLUDAE:
        """Reads a file that `save` wrote. Nothing in the file is executed.

        Args:
            path: The file.

        Returns:
            The model, on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: The file is no such checkpoint; says why.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})[METADATA_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if about["format"] != FORMAT:
                raise CheckpointError(f"{path}: format is {about['format']!r}, this version reads {FORMAT!r}.")
            return cls(
                tensors["W1"],
                None if about["tied"] else tensors["W2"],
                sigma=about["sigma"],
                sample_shape=tuple(about["sample_shape"]),
                data_range=tuple(about["data_range"]),
            )
        except CheckpointError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a ReLUDAE checkpoint ({error!r}).") from error

    def extra_repr(self) -> str:
        """Adds the sizes to `repr`.

        Returns:
            The sizes as text.
        """
        return f"d={self.W1.shape[0]}, p={self.W1.shape[1]}, tied={self.tied}, sigma={self.sigma:g}"
