"""Directions in representation space, from samples that show what is wanted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from balanced_rep.models import Denoiser
from balanced_rep.models._checks import check_counts, check_denoiser, check_images, check_sigmas, resolve_layers
from balanced_rep.models._conditions import check_rows, take_rows
from balanced_rep.models._noise import noise
from balanced_rep.stats import record

__all__ = ["Direction", "direction", "unit_means"]

FORMAT = "balanced-rep direction 1"
METADATA_KEY = "balanced_rep_direction"
Kind = Literal["features", "map", "tokens"]
Place = Literal["input", "output"]


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector for each of some layers; what does not fit together raises a ValueError.

    Attributes:
        vectors: Layer to vector over its units (channels or features), float32 `(units,)`.
        at: Layer to whether its input or its output is meant.
        kind: Layer to its layout, which says where its units are, see `Tap`.
        sigma: Noise level at which the representations were taken.
    """

    vectors: dict[str, Tensor]
    at: dict[str, Place]
    kind: dict[str, Kind]
    sigma: float

    def __post_init__(self) -> None:
        """Checks that every layer has a vector, a place and a layout."""
        if not self.vectors or not self.vectors.keys() == self.at.keys() == self.kind.keys():
            raise ValueError(
                "direction: vectors, at and kind must be of the same layers, one or more, got "
                f"{list(self.vectors)}, {list(self.at)} and {list(self.kind)}."
            )
        for name, v in self.vectors.items():
            if self.at[name] not in get_args(Place) or self.kind[name] not in get_args(Kind):
                raise ValueError(
                    f"direction: at is one of {', '.join(get_args(Place))} and kind one of "
                    f"{', '.join(get_args(Kind))}, got {self.at[name]!r} and {self.kind[name]!r} for {name!r}."
                )
            if not isinstance(v, Tensor) or v.ndim != 1 or not v.is_floating_point() or not v.isfinite().all():
                got = f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else type(v).__name__
                raise ValueError(
                    f"direction: the vector of {name!r} must be finite floating point (units,), got {got}."
                )
        if not isinstance(self.sigma, Real) or not 0 <= self.sigma < math.inf:
            raise ValueError(f"direction: sigma must be a finite number, not negative, got {self.sigma!r}.")
        if not any(v.any() for v in self.vectors.values()):
            raise ValueError(
                "direction: every vector is zero, and points nowhere: are the positive and the negative samples the "
                "same?"
            )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} ({len(v)})" for name, v in self.vectors.items())
        return f"Direction({sizes}; sigma={self.sigma:g})"

    @property
    def square(self) -> float:
        """Sum of the squared norms over layers."""
        return float(sum(v.double().square().sum() for v in self.vectors.values()))

    def only(self, layers: str | Sequence[str]) -> Direction:
        """The same for fewer layers.

        Args:
            layers: Which.

        Returns:
            The direction.

        Raises:
            ValueError: If there is no vector for one of them.
        """
        layers = [layers] if isinstance(layers, str) else list(layers)
        if missing := [name for name in layers if name not in self.vectors]:
            raise ValueError(f"direction has no vector for {missing}; it has {', '.join(self.vectors)}.")
        picked = ({n: found[n] for n in layers} for found in (self.vectors, self.at, self.kind))
        return replace(self, **dict(zip(("vectors", "at", "kind"), picked, strict=True)))

    def save(self, path: str | Path) -> None:
        """Writes the direction to a safetensors file.

        Args:
            path: The file.
        """
        from safetensors.torch import save

        about = {"format": FORMAT, "at": self.at, "kind": self.kind, "sigma": self.sigma}
        tensors = {name: v.cpu().contiguous() for name, v in self.vectors.items()}
        Path(path).write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Reads what `save` wrote.

        Args:
            path: The file.

        Returns:
            The direction.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no direction.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})[METADATA_KEY])
                vectors = {name: file.get_tensor(name) for name in about["at"]}
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r}")
            kinds = {name: about["kind"][name] for name in about["at"]}
            return cls(vectors, about["at"], kinds, float(about["sigma"]))
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not a direction that this version reads ({error!r}).") from error


def direction(
    D: Denoiser,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    sigma: float,
    layers: str | Sequence[str] | None = None,
    cond: Any = None,
    negative_cond: Any = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Direction:
    """The direction towards samples of a concept.

    With one set it is the mean representation of the samples, as the paper has it; with two, the difference of the
    means, which leaves out what both have in common, as the paper's released code has it. Representations are averaged
    over space or tokens, so that a direction fits every image size.

    Args:
        D: The denoiser.
        positive: Clean samples that show the concept, `(n, *sample_shape)`.
        negative: Clean samples that do not.
        sigma: Noise level at which the representations are taken.
        layers: Names from `D.layers`; default: all.
        cond: Conditions of the positive samples.
        negative_cond: Conditions of the negative samples.
        seed: Of the noise.
        batch_size: Samples at once.

    Returns:
        The direction.

    Raises:
        ValueError: If a representation is not finite, there are no samples, their means are the same, or an input does
            not fit the model.
    """
    check_denoiser("direction", D)
    check_counts("direction", batch_size=batch_size)
    if negative is None and negative_cond is not None:
        raise ValueError("direction: negative_cond= is given, and no negative samples.")
    names = resolve_layers("direction", D, layers)
    means = unit_means(D, positive, names, sigma=sigma, cond=cond, seed=seed, batch_size=batch_size)
    if negative is not None:
        others = unit_means(D, negative, names, sigma=sigma, cond=negative_cond, seed=seed, batch_size=batch_size)
        means = {name: means[name] - others[name] for name in names}
    taps = {name: D.layers[name] for name in names}
    return Direction(
        {n: v.float() for n, v in means.items()}, {n: tap.at for n, tap in taps.items()},
        {n: tap.kind for n, tap in taps.items()}, float(sigma),
    )  # fmt: skip


@torch.no_grad()
def unit_means(
    D: Denoiser, x: Tensor, layers: Sequence[str], *, sigma: float, cond: Any, seed: int, batch_size: int
) -> dict[str, Tensor]:
    """Mean of each unit of some layers over samples, space and tokens.

    Args:
        D: The denoiser, a module.
        x: Clean samples.
        layers: Labelled layers.
        sigma: Noise level.
        cond: Conditions.
        seed: Of the noise.
        batch_size: Samples at once.

    Returns:
        Layer to float64 `(units,)`.

    Raises:
        ValueError: If there are no samples or a representation is not finite.
    """
    check_images("direction", D, x)
    check_rows("direction", cond, len(x))
    check_sigmas("direction", D, (sigma,))
    if not len(x):
        raise ValueError("direction: no samples are given.")
    assert isinstance(D, nn.Module)
    found: dict[str, Tensor] = {}
    for at in get_args(Place):
        names = [name for name in layers if D.layers[name].at == at]
        if not names:
            continue
        with record(D, names, at, call=0, per="unit", stop=True) as recording:
            for start in range(0, len(x), batch_size):
                items = torch.arange(start, min(len(x), start + batch_size))
                part = x[start : start + batch_size]
                part_cond = take_rows(cond, items)
                D(part + sigma * noise(items, x.shape[1:], seed=seed, draw=0, like=x), sigma, part_cond)
        found |= {name: recording[name].mean.double() for name in names}
    for name, mean in found.items():
        if not mean.isfinite().all():
            raise ValueError(f"direction: the representation at {name} is not finite for some sample.")
    return {name: found[name] for name in layers}
