r"""Training of the two-layer ReLU autoencoder, in seconds on a CPU.

Letters: n samples of d entries, p hidden units, r the rank of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from balanced_rep.models import ReLUDAE
from balanced_rep.theory._clusters import check_scales, sample_weights
from balanced_rep.theory._data import as_samples

__all__ = ["LEARNING_RATES", "TrainedDAE", "lam_from_weight_decay", "mask_loss", "sampled_loss", "train_dae"]

Loss = Literal["mask", "sampled"]
Optimizer = Literal["adam", "adamw", "rmsprop", "sgd"]

# At which a thousand steps on samples with a norm of a few units converge.
LEARNING_RATES: dict[Optimizer, float] = {"adam": 0.05, "adamw": 0.05, "rmsprop": 0.02, "sgd": 0.05}


@dataclass(frozen=True, eq=False)
class TrainedDAE:
    """A training run.

    Attributes:
        model: The autoencoder.
        losses: The objective at each step, before the step, ``(steps,)`` float64 on the CPU.
    """

    model: ReLUDAE
    losses: Tensor


def mask_loss(W1: Tensor, W2: Tensor, X: Tensor, *, sigma: float, lam: float, weights: Tensor | None = None) -> Tensor:
    r"""The objective with the units that are active on the *clean* samples: its expectation in closed form.

    .. math::  \frac1n \sum_i \|W_2 D_i W_1^T x_i - x_i\|^2 + \sigma^2 \|W_2 D_i W_1^T\|_F^2
               + \lambda (\|W_1\|_F^2 + \|W_2\|_F^2), \qquad D_i = \mathrm{diag}(1[W_1^T x_i > 0]).

    Equal to the true objective as long as noise flips no unit: what the theory is about. Nothing is drawn.

    Args:
        W1: Encoder, ``(d, p)``.
        W2: Decoder, ``(d, p)``.
        X: Samples, ``(n, d)``.
        sigma: Noise level.
        lam: Penalty.
        weights: Of the samples, ``(n,)`` with mean 1.

    Returns:
        The loss, a scalar with a graph.
    """
    Z = X @ W1
    active = (Z > 0).to(X.dtype)  # (n, p)
    error = ((Z * active) @ W2.T - X).square().sum(dim=1)
    noise = ((active @ ((W1.T @ W1) * (W2.T @ W2))) * active).sum(dim=1)  # |W2 D W1^T|_F^2
    return _mean(error + sigma**2 * noise, weights) + lam * (W1.square().sum() + W2.square().sum())


def sampled_loss(
    W1: Tensor, W2: Tensor, X: Tensor, noise: Tensor, *, sigma: float, lam: float, weights: Tensor | None = None
) -> Tensor:
    """The objective at drawn noise, as it is trained in practice.

    Args:
        W1: Encoder, ``(d, p)``.
        W2: Decoder, ``(d, p)``.
        X: Samples, ``(n, d)``.
        noise: Standard normal, ``(n, d)``.
        sigma: Noise level.
        lam: Penalty.
        weights: Of the samples, ``(n,)`` with mean 1.

    Returns:
        The loss, a scalar with a graph.
    """
    error = (torch.relu((X + sigma * noise) @ W1) @ W2.T - X).square().sum(dim=1)
    return _mean(error, weights) + lam * (W1.square().sum() + W2.square().sum())


def lam_from_weight_decay(weight_decay: float, d: int, *, tied: bool = False) -> float:
    """The penalty that a coupled weight decay amounts to when the loss is ``torch.nn.MSELoss`` (mean over entries).

    The mean over entries divides the squared error by d, and the gradient of ``wd / 2 |W|^2`` is ``wd W``, so that
    ``lam = d wd / 2``. A single parameter that is encoder and decoder is decayed once where the objective counts it
    twice, so that ``lam = d wd / 4``. Not valid for AdamW, whose decay is decoupled from the loss.

    Args:
        weight_decay: The optimizer's argument.
        d: Entries of a sample.
        tied: Encoder and decoder are one parameter. Two parameters over the same memory, as in the paper's code, are
            not: each is decayed.

    Returns:
        The penalty of Equation 6.

    Raises:
        ValueError: If the weight decay is negative or not finite, or d is below 1.
    """
    if not (weight_decay >= 0 and math.isfinite(weight_decay)) or d < 1:
        raise ValueError(
            "lam_from_weight_decay: weight_decay must be a finite number >= 0 and d at least 1, got "
            f"{weight_decay} and {d}."
        )
    return d * weight_decay / (4 if tied else 2)


def train_dae(
    X: Tensor,
    p: int,
    *,
    sigma: float,
    lam: float,
    weights: Tensor | None = None,
    tied: bool = True,
    loss: Loss = "mask",
    optimizer: Optimizer = "adam",
    steps: int = 1000,
    lr: float | None = None,
    batch_size: int | None = None,
    n_draws: int = 1,
    init: float = 0.05,
    weight_decay: float = 0.0,
    seed: int = 0,
    span: bool = True,
    sample_shape: tuple[int, ...] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainedDAE:
    """Trains the autoencoder on the objective of Equation 6.

    To store n samples give it more units than samples (p = 4 n always stored all of five digits; at p = n units die and
    samples are lost) and samples that point away from each other: see :func:`separable_subset`. To generalize, do not
    centre the samples and give it few units.

    Args:
        X: Samples, ``(n, d)``; decide dtype and device.
        p: Hidden units.
        sigma: Noise level.
        lam: Penalty.
        weights: How often each sample counts, ``(n,)``; scaled to the mean 1.
        tied: Train one matrix, ``W1 = W2``.
        loss: "mask", the expectation in closed form while no unit flips, or "sampled", with noise drawn at each step.
        optimizer: "adam", "adamw", "rmsprop" or "sgd" (momentum 0.9).
        steps: Steps.
        lr: Learning rate, constant for half of the steps and then falling linearly; default:
            :data:`LEARNING_RATES`.
        batch_size: Samples per step, drawn by their weights with replacement; default: all, weighted.
        n_draws: Noise draws per sample and step.
        init: Scale of the initial weights, ``init * normal / sqrt(d)``.
        weight_decay: Of the optimizer, on top of ``lam``; what it means depends on the optimizer.
        seed: Of initial weights, batches and noise.
        span: Train in coordinates of the span of the samples, where the optimum lies; faster if n < d.
        sample_shape: Of the model; default ``(d,)``.
        on_step: Called after each step with the number of steps done and the loss.

    Returns:
        The model, and the loss at each step.

    Raises:
        ValueError: If an argument is out of range.
        FloatingPointError: If the loss stops being finite; says at which step and what to change.
    """
    X = as_samples(X)
    check_scales(sigma, lam)
    if p < 1 or steps < 1 or n_draws < 1 or (batch_size is not None and batch_size < 1) or not init > 0:
        raise ValueError(
            "train_dae: p, steps, n_draws and batch_size must be at least 1 and init positive, got "
            f"p={p}, steps={steps}, n_draws={n_draws}, batch_size={batch_size}, init={init}."
        )
    if loss not in ("mask", "sampled"):
        raise ValueError(f"train_dae: loss must be 'mask' or 'sampled', got {loss!r}.")
    if loss == "mask" and n_draws != 1:
        raise ValueError(f"train_dae: loss='mask' draws no noise; n_draws={n_draws} is for loss='sampled'.")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"train_dae: lr must be positive and finite, got {lr}.")
    weights = None if weights is None else sample_weights(X, weights).to(X.dtype)
    generator = torch.Generator().manual_seed(seed)
    basis, coordinates = _span(X) if span else (None, X)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=X.dtype).to(X.device)

    scale = init / math.sqrt(X.shape[1])
    W1 = (scale * draw(coordinates.shape[1], p)).requires_grad_()
    W2 = W1 if tied else (scale * draw(coordinates.shape[1], p)).requires_grad_()
    step_of = _optimizer(optimizer, [W1] if tied else [W1, W2], lr, weight_decay)
    rate = step_of.param_groups[0]["lr"]
    losses = torch.empty(steps, dtype=torch.float64)
    for step in range(steps):
        step_of.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        x, w = _batch(coordinates, weights, batch_size, generator)
        if loss == "mask":
            value = mask_loss(W1, W2, x, sigma=sigma, lam=lam, weights=w)
        else:
            x, w = x.repeat(n_draws, 1), None if w is None else w.repeat(n_draws)
            value = sampled_loss(W1, W2, x, draw(*x.shape), sigma=sigma, lam=lam, weights=w)
        step_of.zero_grad()
        value.backward()
        step_of.step()
        losses[step] = value.detach()
        if on_step is not None:
            on_step(step + 1, float(losses[step]))
    _check_finite(losses, rate)
    full = [W.detach() if basis is None else basis @ W.detach() for W in (W1, W2)]
    model = ReLUDAE(full[0], None if tied else full[1], sigma=sigma, sample_shape=sample_shape)
    return TrainedDAE(model.requires_grad_(False).eval(), losses)


def _span(X: Tensor) -> tuple[Tensor | None, Tensor]:
    """Orthonormal basis (d, r) of the rows and coordinates (n, r) in it; no basis if they span everything."""
    _, s, vh = torch.linalg.svd(X.double(), full_matrices=False)
    rank = max(1, int((s > s[0] * max(X.shape) * torch.finfo(X.dtype).eps).sum()))
    if rank == X.shape[1]:
        return None, X
    basis = vh[:rank].T
    return basis.to(X.dtype), (X.double() @ basis).to(X.dtype)


def _optimizer(name: Optimizer, parameters: list[Tensor], lr: float | None, decay: float) -> torch.optim.Optimizer:
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
        "sgd": lambda ps, **options: torch.optim.SGD(ps, momentum=0.9, **options),
    }
    if name not in makers:
        raise ValueError(f"train_dae: optimizer must be one of {', '.join(makers)}, got {name!r}.")
    return makers[name](parameters, lr=LEARNING_RATES[name] if lr is None else lr, weight_decay=decay)


def _batch(
    X: Tensor, weights: Tensor | None, size: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """The samples of a step, and their weights where these have not decided the draw."""
    if size is None:
        return X, weights
    if weights is None:
        picked = torch.randint(len(X), (size,), generator=generator)
    else:
        picked = torch.multinomial(weights.cpu(), size, replacement=True, generator=generator)
    return X[picked.to(X.device)], None


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (values * weights).mean()


def _check_finite(losses: Tensor, rate: float) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise FloatingPointError(
            f"train_dae: the loss is {losses[bad[0]].item()} at step {int(bad[0])} (learning rate {rate:g}); "
            "lower lr, or scale the samples down."
        )
