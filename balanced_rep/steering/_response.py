r"""How steerable samples are, in numbers: the response curve of an edit and its derivative at zero.

The response of an edited sample :math:`x_a` to strength a is how far its representation has moved along the
direction v:
:math:`R(a) = \langle h(x_a) - h(x_0), v \rangle / \|v\|^2`, summed over layers, with the same noise for all strengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from balanced_rep.autodiff import jvp
from balanced_rep.models import Denoiser
from balanced_rep.models._checks import check_denoiser, check_sigmas
from balanced_rep.models._conditions import check_rows
from balanced_rep.models._noise import noise
from balanced_rep.steering._apply import another_width, as_strengths, steer
from balanced_rep.steering._direction import Direction

__all__ = ["Response", "project", "response", "response_derivative"]


@dataclass(frozen=True, eq=False)
class Response:
    """Response curves.

    Attributes:
        strengths: `(S,)`.
        values: R at each strength, `(S, n)` float64, less its value at the first.
    """

    strengths: Tensor
    values: Tensor

    @property
    def range(self) -> Tensor:
        """Largest less smallest response, `(n,)`."""
        return self.values.amax(dim=0) - self.values.amin(dim=0)

    @property
    def roughness(self) -> Tensor:
        """Largest second difference over the range, `(n,)`: 0 for a straight line, 2 for a spike; NaN for a flat one.

        Raises:
            ValueError: If there are fewer than three strengths, or they are not equally spaced.
        """
        if len(self.strengths) < 3:
            raise ValueError(f"roughness: needs three strengths or more, got {len(self.strengths)}.")
        steps = self.strengths.double().diff()
        if not bool(((steps - steps.mean()).abs() <= 1e-3 * steps.mean().abs()).all()):
            raise ValueError(f"roughness: needs strengths that are equally spaced, got {self.strengths.tolist()}.")
        return self.values.diff(n=2, dim=0).abs().amax(dim=0) / self.range

    @property
    def jump(self) -> Tensor:
        """Share of the range in the largest step, `(n,)`: 1 / (S - 1) for a straight line, 1 for a threshold."""
        return self.values.diff(dim=0).abs().amax(dim=0) / self.range

    def onset(self, share: float = 0.1) -> Tensor:
        """Strength at which a curve reaches a share of its largest value, interpolated; late if there is a threshold.

        Args:
            share: Of the largest value, between 0 and 1.

        Returns:
            `(n,)`: `share` of the way for a straight line; NaN for a curve that never rises.

        Raises:
            ValueError: If the share is not between 0 and 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"onset: share must be above 0 and at most 1, got {share}.")
        level = share * self.values.amax(dim=0)
        above = self.values >= level
        last = above.double().argmax(dim=0).clamp_min(1)
        low, high = (self.values.gather(0, i[None])[0] for i in (last - 1, last))
        a = self.strengths
        found = a[last - 1] + (level - low) / (high - low) * (a[last] - a[last - 1])
        return found.where(level > 0, torch.nan)

    @property
    def monotone(self) -> Tensor:
        """Share of the way that goes up, `(n,)`: 1 for a rising curve, 0 for a falling one."""
        steps = self.values.diff(dim=0)
        return steps.clamp_min(0).sum(dim=0) / steps.abs().sum(dim=0)


def response(
    D: Denoiser,
    direction: Direction,
    samples: Tensor,
    strengths: Sequence[float],
    *,
    cond: Any = None,
    seed: int = 0,
) -> Response:
    """The response curves of edited samples, whatever edited them.

    Args:
        D: The denoiser.
        direction: Along which the response is measured, at its noise level.
        samples: Edited samples at each strength, `(S, n, *sample_shape)`.
        strengths: S strengths, at least two.
        cond: Conditions under which representations are taken, one for each of the n.
        seed: Of the noise.

    Returns:
        The curves.

    Raises:
        ValueError: If strengths and samples do not fit, there are fewer than two strengths, they go back and forth, or
            one is not finite.
    """
    strengths = as_strengths("response", strengths)
    if len(strengths) != len(samples) or len(strengths) < 2:
        raise ValueError(f"response: {len(samples)} edits of {len(strengths)} strengths; at least two of each.")
    steps = [after - before for before, after in itertools.pairwise(strengths)]
    if not all(step > 0 for step in steps) and not all(step < 0 for step in steps):
        raise ValueError(f"response: strengths must go one way, each once, such as (0.0, 0.5, 1.0), got {strengths}.")
    with torch.no_grad():
        values = torch.stack([project(D, direction, x, cond=cond, seed=seed).double().cpu() for x in samples])
    return Response(torch.as_tensor(strengths, dtype=torch.float64), values - values[0])


def response_derivative(
    D: Denoiser, direction: Direction, y: Tensor, sigma: float, *, cond: Any = None, seed: int = 0
) -> Tensor:
    r"""dR/da at zero for one steered denoising step, by a single Jacobian-vector product.

    Args:
        D: The denoiser.
        direction: What is added, and along which the response is measured.
        y: Noisy samples, `(n, *sample_shape)`.
        sigma: Their noise level.
        cond: Conditions, one for each of the n.
        seed: Of the noise with which the denoised sample is looked at.

    Returns:
        `(n,)`.

    Raises:
        ValueError: If the noise level is not one of this denoiser.
    """
    check_sigmas("response_derivative", D, (sigma,))

    def edited(a: Tensor) -> Tensor:
        with steer(D, direction, a):
            x = D(y, sigma, cond)
        return project(D, direction, x, cond=cond, seed=seed)

    zero = torch.zeros((), dtype=y.dtype, device=y.device)
    with torch.no_grad():
        return jvp(edited, zero, torch.ones(1, dtype=y.dtype, device=y.device))[1][0]


def project(D: Denoiser, direction: Direction, x: Tensor, *, cond: Any = None, seed: int = 0) -> Tensor:
    """The coordinate of samples along a direction, `sum over layers of <h(x), v> / |v|^2`.

    Args:
        D: The denoiser.
        direction: The direction; its noise level is used.
        x: Clean samples, `(n, *sample_shape)`.
        cond: Conditions, one for each of the n.
        seed: Of the noise.

    Returns:
        `(n,)`.

    Raises:
        ValueError: If a layer is not in the model, or has another number of units; or there is not a condition for each
            sample.
        TypeError: If `D` is no denoiser with layers that can be listened to.
    """
    check_denoiser("project", D)
    if not isinstance(D, nn.Module):
        raise TypeError(f"project: {type(D).__name__} is no torch.nn.Module: its layers cannot be listened to.")
    check_rows("project", cond, len(x))
    e = noise(torch.arange(len(x)), tuple(x.shape[1:]), seed=seed, draw=0, like=torch.empty(0, dtype=x.dtype))
    total: list[Tensor] = []

    def keep(name: str, h: Tensor) -> None:
        kind = direction.kind[name]
        pooled = h.flatten(2).mean(dim=2) if kind == "map" else h.flatten(1, -2).mean(dim=1) if kind == "tokens" else h
        if pooled.shape[1] != len(direction.vectors[name]):
            raise ValueError(another_width("project", name, pooled.shape[1], direction.vectors[name]))
        total.append(pooled @ direction.vectors[name].to(h.device, h.dtype))

    def listen(name: str, at: str) -> Any:
        def before(_module: nn.Module, args: Any) -> None:
            keep(name, args[0])

        def after(_module: nn.Module, _args: Any, output: Tensor) -> None:
            keep(name, output)

        if name not in modules:
            raise ValueError(f"project: the model has no layer {name!r}; the direction was made with another one.")
        module = modules[name]
        return module.register_forward_pre_hook(before) if at == "input" else module.register_forward_hook(after)

    modules = dict(D.named_modules())
    handles = []
    try:
        for name, at in direction.at.items():
            handles.append(listen(name, at))
        D(x + direction.sigma * e.to(x.device), direction.sigma, cond)
    finally:
        for handle in handles:
            handle.remove()
    summed = total[0]
    for part in total[1:]:
        summed = summed + part
    return summed / direction.square
