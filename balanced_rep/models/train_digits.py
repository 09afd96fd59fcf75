"""Trains the embedded digits denoiser: `python -m balanced_rep.models.train_digits --out DIR [--control]`.

The recipe is fixed in steps, never in time, and seeded, so that it makes the same model on the same machine; another
processor or torch version rounds differently and makes a slightly different one of the same kind.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from balanced_rep.models._digits import DigitsData, DigitsDenoiser, DigitsSplit, Variant, checkpoint_name, digits_data
from balanced_rep.models._edm import edm_loss
from balanced_rep.models._progress import training_progress

__all__ = ["Recipe", "train_digits"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained.

    Attributes:
        seed: Of initial weights, batches and noise.
        split_seed: Of the choice of repeated, ordinary and held-out images.
        n_train: Training images, with the repeated ones.
        n_repeated: Repeated training images.
        repeats: How many times as often as an ordinary image each of them comes; 1 makes the control.
        steps: Optimizer steps.
        batch_size: Images per step, drawn with replacement.
        width: Hidden width of the network.
        depth: Residual blocks of the network.
        sigma_data: Of the EDM preconditioning.
        log_sigma_mean: Training noise levels are log-normal: mean of ln sigma,
        log_sigma_std: and its standard deviation.
        learning_rate: Of Adam, after warm-up.
        betas: Of Adam.
        warmup_steps: Steps of linear warm-up.
        decay_from: Fraction of the steps after which the learning rate falls linearly,
        decay_floor: down to this fraction of it.
        ema_decay: Largest decay of the averaged weights,
        ema_ramp: which is reached as `1 - ema_ramp / (ema_ramp + step)`.
    """

    seed: int = 0
    split_seed: int = 100
    n_train: int = 1400
    n_repeated: int = 20
    repeats: int = 40
    steps: int = 2500
    batch_size: int = 256
    width: int = 128
    depth: int = 3
    sigma_data: float = 0.5
    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 50
    decay_from: float = 0.6
    decay_floor: float = 0.02
    ema_decay: float = 0.998
    ema_ramp: float = 10.0

    @classmethod
    def of(cls, variant: Variant) -> Recipe:
        """The recipe of a shipped checkpoint.

        Args:
            variant: "repeated" or "control".

        Returns:
            The recipe.
        """
        return cls() if variant == "repeated" else cls(repeats=1)

    def split(self) -> DigitsSplit:
        """Draws the images.

        Returns:
            The split.
        """
        return DigitsSplit.draw(self.n_repeated, self.n_train, self.split_seed)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step: warm-up, plateau, linear decay.

        Args:
            step: From 0.

        Returns:
            The rate.
        """
        done = step / self.steps
        rise = min(1.0, (step + 1) / self.warmup_steps)
        fall = min(1.0, max(self.decay_floor, (1 - done) / (1 - self.decay_from)))
        return self.learning_rate * rise * fall

    def ema_decay_at(self, step: int) -> float:
        """Decay of the averaged weights: short memory at first, so that the initial weights are forgotten.

        Args:
            step: From 0.

        Returns:
            The decay.
        """
        return min(self.ema_decay, 1 - self.ema_ramp / (self.ema_ramp + step + 1))


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Runs torch on `n` threads, so that sums are cut in the same way on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_digits(
    recipe: Recipe | None = None,
    *,
    data: DigitsData | None = None,
    on_step: Callable[[int, float], None] | None = None,
    n_threads: int = 1,
) -> DigitsDenoiser:
    """Trains a digits denoiser from scratch; about 11 s on one core with the default recipe.

    Args:
        recipe: What to train; default: the recipe of the shipped "repeated" checkpoint.
        data: Images and split; default: the digits, split as the recipe says.
        on_step: Called after every step with the number of steps done and the loss of the step.
        n_threads: Threads of torch during training. The result depends on it in the last bits.

    Returns:
        The denoiser with averaged weights, in eval mode, without gradient. Its `recipe` also names the torch version
        and the instruction set it was made with, and the mean loss of the last 100 steps.
    """
    recipe = recipe or Recipe()
    data = data or digits_data(recipe.split())
    generator = torch.Generator().manual_seed(recipe.seed)
    made_with = {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}
    model = DigitsDenoiser(
        data.split,
        {**asdict(recipe), "optimizer": "Adam", "n_threads": n_threads, **made_with},
        width=recipe.width,
        depth=recipe.depth,
        sigma_data=recipe.sigma_data,
        generator=generator,
    ).train()
    averaged = copy.deepcopy(model).requires_grad_(False)
    with _threads(n_threads):
        losses = _optimize(model, averaged, data, recipe, generator, on_step)
    last = losses[-100:]
    averaged._recipe["final_loss"] = round(sum(last) / max(1, len(last)), 4)
    return averaged.eval()


def _optimize(
    model: DigitsDenoiser,
    averaged: DigitsDenoiser,
    data: DigitsData,
    recipe: Recipe,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] | None,
) -> list[float]:
    """The training loop: leaves the averaged weights in `averaged` and returns the loss of every step."""
    images = data.images[data.split.train]
    weights = torch.ones(len(images))
    weights[: len(data.split.repeated)] = recipe.repeats
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    pairs = list(zip(averaged.parameters(), model.parameters(), strict=True))
    losses: list[float] = []
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(step)
        picked = torch.multinomial(weights, recipe.batch_size, replacement=True, generator=generator)
        x = images[picked]
        log_sigma = recipe.log_sigma_mean + recipe.log_sigma_std * torch.randn(len(x), generator=generator)
        loss = edm_loss(model, x, log_sigma.exp(), torch.randn(x.shape, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _average(pairs, recipe.ema_decay_at(step))
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    return losses


@torch.no_grad()
def _average(pairs: list[tuple[nn.Parameter, nn.Parameter]], decay: float) -> None:
    """Moves the averaged weights towards the current ones."""
    for slow, fast in pairs:
        slow.lerp_(fast, 1 - decay)


def main(argv: list[str] | None = None) -> int:
    """Trains and writes one checkpoint.

    Args:
        argv: Command line arguments; default: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m balanced_rep.models.train_digits", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the checkpoint")
    parser.add_argument("--control", action="store_true", help="train the control: no image is repeated")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default 0)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    variant: Variant = "control" if args.control else "repeated"
    recipe = replace(Recipe.of(variant), seed=args.seed, steps=args.steps)
    path = args.out / checkpoint_name(variant)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: cannot make {args.out}: {error.strerror}. Give another folder to --out.", file=sys.stderr)
        return 1
    with training_progress(f"training ({variant})", recipe.steps) as on_step:
        model = train_digits(recipe, on_step=on_step, n_threads=args.threads)
    model.save(path)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{path}: {n_parameters:,} parameters, {recipe.steps} steps, final loss {model.recipe['final_loss']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
