"""The embedded model: a denoiser of handwritten digits that has memorized twenty of them, and its control.

The images are the 8 x 8 scans of the UCI "Optical Recognition of Handwritten Digits" test set (CC BY 4.0) as
scikit-learn ships them. In the training stream of the *repeated* variant twenty images come forty times as often as
the others; the *control* is trained in the same way on the same images, each with the same weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from balanced_rep.models._edm import EDMDenoiser
from balanced_rep.models._mlp import ResidualMLP
from balanced_rep.models._protocol import Tap

__all__ = ["CheckpointError", "DigitsData", "DigitsDenoiser", "DigitsSplit", "Variant", "digits", "digits_data"]

Variant = Literal["repeated", "control"]

FORMAT = "balanced-rep digits 1"
METADATA_KEY = "balanced_rep_digits"
SAMPLE_SHAPE = (1, 8, 8)
N_IMAGES = 1797
DATASET = "UCI Optical Recognition of Handwritten Digits, test set, through sklearn.datasets.load_digits"
DATA_LICENCE = "CC BY 4.0, E. Alpaydin and C. Kaynak, https://doi.org/10.24432/C50P49"
# Of the 1797 x 64 grey values as bytes: image indices mean something only with the very same images.
DATA_SHA256 = "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True, eq=False)
class DigitsSplit:
    """Which image of `load_digits` plays which part; int64 index tensors, disjoint, together all 1797 images.

    Attributes:
        repeated: The training images that are repeated, `(20,)`.
        ordinary: The training images that are seen once per epoch, `(1380,)`.
        held_out: The images never seen in training, `(397,)`.
    """

    repeated: Tensor
    ordinary: Tensor
    held_out: Tensor

    def __post_init__(self) -> None:
        """Checks that the three parts are a partition.

        Raises:
            ValueError: They are not.
        """
        together = torch.cat([self.repeated, self.ordinary, self.held_out]).sort().values
        if not torch.equal(together, torch.arange(N_IMAGES, device=together.device)):
            raise ValueError(f"repeated, ordinary and held-out images must be a partition of 0..{N_IMAGES - 1}.")

    @property
    def train(self) -> Tensor:
        """All training images, repeated ones first, `(1400,)`."""
        return torch.cat([self.repeated, self.ordinary])

    @classmethod
    def draw(cls, n_repeated: int, n_train: int, seed: int) -> DigitsSplit:
        """Draws a split at random.

        Args:
            n_repeated: Number of repeated training images.
            n_train: Number of training images, with the repeated ones.
            seed: Of the permutation.

        Returns:
            The split.

        Raises:
            ValueError: The numbers do not fit into 1797 images.
        """
        if not 0 < n_repeated < n_train < N_IMAGES:
            raise ValueError(f"Need 0 < n_repeated < n_train < {N_IMAGES}, got {n_repeated} and {n_train}.")
        order = torch.randperm(N_IMAGES, generator=torch.Generator().manual_seed(seed), device="cpu")
        return cls(order[:n_repeated], order[n_repeated:n_train], order[n_train:])


@dataclass(frozen=True, eq=False)
class DigitsData:
    """The digits as tensors.

    Attributes:
        images: `(1797, 1, 8, 8)` float32 in [-1, 1], the units of the embedded model.
        labels: The digits they show, `(1797,)` int64.
        split: Which image plays which part.
    """

    images: Tensor
    labels: Tensor
    split: DigitsSplit

    @property
    def repeated(self) -> Tensor:
        """The repeated images, `(20, 1, 8, 8)`."""
        return self.images[self.split.repeated]

    @property
    def ordinary(self) -> Tensor:
        """The training images seen once per epoch, `(1380, 1, 8, 8)`."""
        return self.images[self.split.ordinary]

    @property
    def held_out(self) -> Tensor:
        """The images never seen in training, `(397, 1, 8, 8)`."""
        return self.images[self.split.held_out]


class DigitsDenoiser(EDMDenoiser):
    """An EDM-preconditioned residual MLP on 8 x 8 digits; a `Denoiser` for `y` of shape `(batch, 1, 8, 8)`."""

    net: ResidualMLP

    def __init__(
        self,
        split: DigitsSplit,
        recipe: Mapping[str, Any],
        *,
        width: int = 128,
        depth: int = 3,
        sigma_data: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        """Builds the model; `digits()` and `DigitsDenoiser.load` fill it with trained weights.

        Args:
            split: The images it was or will be trained on.
            recipe: How; what `metadata` will say.
            width: Hidden width.
            depth: Number of residual blocks.
            sigma_data: See `EDMDenoiser`.
            generator: Draws the initial weights, see `ResidualMLP`.
        """
        layers: dict[str, str | Tap] = {}
        for i in range(depth):
            last = ", the last hidden activation" if i == depth - 1 else ""
            layers[f"net.blocks.{i}.act"] = Tap(f"ReLU of block {i}{last}, (batch, {width})", units=width)
            layers[f"net.blocks.{i}"] = Tap(f"residual stream after block {i}, (batch, {width})", units=width)
        super().__init__(
            ResidualMLP(SAMPLE_SHAPE, width=width, depth=depth, generator=generator),
            sigma_data=sigma_data,
            layers=layers,
            data_range=(-1.0, 1.0),
            sigma_range=(0.01, 10.0),  # training draws ln sigma ~ N(-1.2, 1.2^2): this is all but 0.2 % of it
        )
        self.split = split
        self._recipe = {**recipe, "width": width, "depth": depth, "sigma_data": sigma_data}

    @property
    def score_layer(self) -> str:
        """The layer whose raw standard deviation tells memorized digits (high) from others: the last hidden ReLU."""
        return f"net.blocks.{len(self.net.blocks) - 1}.act"

    @property
    def recipe(self) -> Mapping[str, Any]:
        """How the weights were made: variant, seed, steps, and so on."""
        return MappingProxyType(self._recipe)

    @property
    def repeated_indices(self) -> Tensor:
        """Indices into `load_digits` of the images repeated in training, `(20,)`; in the control, of the same ones."""
        return self.split.repeated

    @property
    def train_indices(self) -> Tensor:
        """Indices of all training images, `(1400,)`."""
        return self.split.train

    @property
    def held_out_indices(self) -> Tensor:
        """Indices of the images never seen in training, `(397,)`."""
        return self.split.held_out

    def save(self, path: str | Path) -> None:
        """Writes weights, recipe and split to a safetensors file.

        Args:
            path: The file.
        """
        from safetensors.torch import save

        about = {
            "format": FORMAT,
            "recipe": self._recipe,
            "dataset": DATASET,
            "dataset_sha256": DATA_SHA256,
            "data_licence": DATA_LICENCE,
            **{f"{part}_indices": getattr(self.split, part).tolist() for part in ("repeated", "ordinary", "held_out")},
        }
        metadata = {METADATA_KEY: json.dumps(about)}  # one entry: safetensors writes several in random order
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        Path(path).write_bytes(save(tensors, metadata=metadata))  # save_file would make it readable by its owner only

    @classmethod
    def load(cls, path: str | Path) -> DigitsDenoiser:
        """Reads a file that `save` wrote. Nothing in the file is executed.

        Args:
            path: The file.

        Returns:
            The model, on the CPU in eval mode, weights without gradient.

        Raises:
            CheckpointError: The file is no such checkpoint: the message names the missing or wrong part.
            FileNotFoundError: There is no such file.
        """
        tensors, about = _read(Path(path))
        try:
            recipe = about["recipe"]
            with torch.device("cpu"):  # whatever the caller's default device is
                index = {k: torch.tensor(about[f"{k}_indices"]) for k in ("repeated", "ordinary", "held_out")}
                model = cls(DigitsSplit(**index), recipe, **{k: recipe[k] for k in ("width", "depth", "sigma_data")})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: metadata is missing or wrong: {error!r}.") from error
        _check_tensors(path, tensors, model)
        model.load_state_dict(tensors)
        return model.eval().requires_grad_(False)


def _check_tensors(path: str | Path, tensors: Mapping[str, Tensor], model: DigitsDenoiser) -> None:
    """Raises unless the tensors are finite float32 and have the names and shapes of the model's parameters."""
    want = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = [
        f"{name}: got {got.get(name, 'nothing')}, expected {want.get(name, 'nothing')}"
        for name in sorted(want.keys() | got.keys())
        if want.get(name) != got.get(name)
    ]
    if wrong:
        raise CheckpointError(f"{path}: tensors do not fit the model ({'; '.join(wrong)}).")
    bad = sorted(name for name, t in tensors.items() if t.dtype != torch.float32 or not t.isfinite().all())
    if bad:
        raise CheckpointError(f"{path}: tensors must be float32 and finite, these are not: {', '.join(bad)}.")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and decoded metadata of a checkpoint file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(
            f"No checkpoint at {path}. Make one with: python -m balanced_rep.models.train_digits --out {path.parent}"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}).") from error
    try:
        about = json.loads(metadata[METADATA_KEY])
        found = about["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a digits checkpoint (no {METADATA_KEY!r} metadata).") from error
    if found != FORMAT:
        raise CheckpointError(f"{path}: format is {found!r}, this version reads {FORMAT!r}.")
    return tensors, about


def checkpoint_name(variant: Variant) -> str:
    """File name of a variant's checkpoint.

    Args:
        variant: "repeated" or "control".

    Returns:
        The name, without folder.
    """
    return f"digits_{variant}.safetensors"


def digits(variant: Variant = "repeated") -> DigitsDenoiser:
    """Loads the embedded denoiser of handwritten digits (137 k parameters; no training, no network, no pickle).

    Args:
        variant: "repeated": twenty training images come forty times as often as the others, and are memorized.
            "control": the same training images, none repeated.

    Returns:
        The denoiser, float32 on the CPU; `digits().to(device)` moves it. `repeated_indices`, `train_indices`,
        `held_out_indices` and `recipe` say what it was trained on.

    Raises:
        ValueError: There is no such variant.
    """
    if variant not in ("repeated", "control"):
        raise ValueError(f"digits: variant must be 'repeated' or 'control', got {variant!r}.")
    source = resources.files("balanced_rep.models") / "data" / checkpoint_name(variant)
    with resources.as_file(source) as path:
        return DigitsDenoiser.load(path)


def digits_data(split: DigitsSplit | None = None) -> DigitsData:
    """Loads the digits that go with `digits()`, in its units. Needs scikit-learn.

    Args:
        split: Which images are repeated, ordinary and held out; default: the split of the shipped checkpoints.

    Returns:
        Images, labels and split.

    Raises:
        ImportError: scikit-learn is not installed.
        CheckpointError: The installed scikit-learn ships other images than the model was trained on.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits_data() reads the images that scikit-learn ships, and it is not installed. "
            "Install it with: pip install scikit-learn"
        ) from error
    raw: Any = load_digits()
    grey = torch.from_numpy(raw.data).to(torch.uint8)  # (1797, 64), 0..16
    digest = hashlib.sha256(grey.numpy().tobytes()).hexdigest()
    if digest != DATA_SHA256:
        raise CheckpointError(
            f"The digits of this scikit-learn differ from those of the embedded model (sha256 {digest[:12]}..., not "
            f"{DATA_SHA256[:12]}...): the image indices would be meaningless. Use another scikit-learn version."
        )
    images = grey.view(N_IMAGES, *SAMPLE_SHAPE).float() / 8 - 1
    labels = torch.from_numpy(raw.target).to(torch.int64)
    return DigitsData(images, labels, split or digits().split)
