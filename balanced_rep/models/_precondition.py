r"""From what a network predicts to the denoised sample, in variance-exploding coordinates.

A network sees :math:`x_t = a\,y`, where :math:`y = x + \sigma \epsilon`, and every parametrisation in use has the form

.. math::  D(y, \sigma) = c_{skip}\, y + c_{out}\, F(a\, y, t),

so that its Jacobian is :math:`J_D = c_{skip} I + c_{out}\, a\, J_F`.

======== ============================ ========================= ============================
predicts a                            c_skip                    c_out
======== ============================ ========================= ============================
epsilon  :math:`1/\sqrt{1+\sigma^2}`  1                         :math:`-\sigma`
v        :math:`1/\sqrt{1+\sigma^2}`  :math:`1/(1+\sigma^2)`    :math:`-\sigma/\sqrt{1+\sigma^2}`
sample   :math:`1/\sqrt{1+\sigma^2}`  0                         1
flow     :math:`1/(1+\sigma)`         :math:`1/(1+\sigma)`      :math:`-\sigma/(1+\sigma)`
======== ============================ ========================= ============================

The first three are variance preserving, :math:`x_t = \sqrt{\bar\alpha} x + \sqrt{1 - \bar\alpha} \epsilon` with
:math:`\sigma^2 = (1 - \bar\alpha) / \bar\alpha`; a flow has :math:`x_t = (1 - s) x + s \epsilon` with
:math:`\sigma = s / (1 - s)`, and predicts :math:`\epsilon - x`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["FlowTime", "Prediction", "TimeScale", "VPTime", "check_prediction", "coefficients", "time_scale"]

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


def coefficients(kind: Prediction, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three factors.

    Args:
        kind: What the network predicts.
        sigma: Noise levels, any shape.

    Returns:
        `a`, `c_skip`, `c_out`, in the shape of `sigma`.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind == "flow_prediction":
        a = 1 / (1 + sigma)
        return a, a, -sigma * a
    a = (1 + sigma.square()).rsqrt()
    if kind == "epsilon":
        return a, torch.ones_like(sigma), -sigma
    if kind == "v_prediction":
        return a, a.square(), -sigma * a
    if kind == "sample":
        return a, torch.zeros_like(sigma), torch.ones_like(sigma)
    raise ValueError(f"prediction must be 'epsilon', 'v_prediction', 'sample' or 'flow_prediction', got {kind!r}.")


@dataclass(frozen=True, eq=False)
class VPTime:
    """Discrete times of a variance-preserving chain; between them log sigma is interpolated linearly.

    Attributes:
        log_sigmas: `(T,)` float64, increasing: of time 0 to T - 1.
    """

    log_sigmas: Tensor

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Noise levels of the first and the last time."""
        low, high = self.log_sigmas[[0, -1]].exp().tolist()
        return low, high

    def timestep(self, sigma: Tensor) -> Tensor:
        """The time of a noise level.

        Args:
            sigma: Noise levels, `(n,)`.

        Returns:
            Times, `(n,)` float64, from 0 to T - 1; integers exactly at the chain's own levels.
        """
        table = self.log_sigmas.to(sigma.device)
        wanted = sigma.double().log().clamp(table[0], table[-1])
        at = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        low, high = table[at - 1], table[at]
        time = at - 1 + (wanted - low) / (high - low)
        return torch.where((time - time.round()).abs() < 1e-6, time.round(), time)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level of a time.

        Args:
            timestep: Times, `(n,)`, from 0 to T - 1.

        Returns:
            Noise levels, `(n,)` float64.

        Raises:
            ValueError: If a time is outside the chain.
        """
        table = self.log_sigmas.to(timestep.device)
        t = _times(timestep, 0.0, len(table) - 1.0)
        at = t.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[at], table[at + 1], t - at).exp()


@dataclass(frozen=True)
class FlowTime:
    """Time of a rectified flow, `s = sigma / (1 + sigma)` in units of `scale`.

    Attributes:
        scale: What the network is given at s = 1.
        ends: Smallest and largest s that is trusted.
    """

    scale: float
    ends: tuple[float, float] = (1e-3, 0.999)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Noise levels at the ends."""
        low, high = (s / (1 - s) for s in self.ends)
        return low, high

    def timestep(self, sigma: Tensor) -> Tensor:
        """The time of a noise level.

        Args:
            sigma: Noise levels, `(n,)`.

        Returns:
            Times, `(n,)` float64.
        """
        wide = sigma.double()
        return self.scale * wide / (1 + wide)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level of a time.

        Args:
            timestep: Times, `(n,)`, between the ends.

        Returns:
            Noise levels, `(n,)` float64.

        Raises:
            ValueError: If a time is not between the ends.
        """
        s = _times(timestep, *(self.scale * s for s in self.ends)) / self.scale
        return s / (1 - s)


TimeScale = VPTime | FlowTime


def _times(timestep: Tensor, low: float, high: float) -> Tensor:
    """Times as float64, those that rounding has put beyond an end at the end."""
    t, slack = timestep.double(), 1e-6 * high
    outside = ~((t >= low - slack) & (t <= high + slack))  # so that NaN is, too
    if outside.any():
        raise ValueError(f"time {t[outside][0].item():g} is outside what this network knows, {low:g} to {high:g}.")
    return t.clamp(low, high)


def check_prediction(kind: Prediction, time: TimeScale) -> None:
    """Checks that a prediction belongs to a time scale; any other pair of them would be wrong without a sign of it.

    Args:
        kind: What a network predicts.
        time: Its time scale.

    Raises:
        ValueError: If the kind is unknown, or a flow is predicted on a variance-preserving chain, or the reverse.
    """
    coefficients(kind, torch.ones(1))
    if (kind == "flow_prediction") != isinstance(time, FlowTime):
        chain = "the time of a flow" if isinstance(time, FlowTime) else "a variance-preserving chain of betas"
        raise ValueError(
            f"the scheduler has {chain}, and the network is said to predict {kind!r}: 'flow_prediction' goes with a "
            "flow (a FlowMatch scheduler, or use_flow_sigmas=True), the others with betas. Give the scheduler of the "
            "training."
        )


def time_scale(scheduler: Any, *, flow_scale: float = 1000.0) -> tuple[TimeScale, Prediction]:
    """What a diffusers scheduler says about time and prediction.

    Args:
        scheduler: A scheduler, of which only `alphas_cumprod` and the configuration are read.
        flow_scale: What the network is given at the end of a flow.

    Returns:
        Time scale and prediction.

    Raises:
        TypeError: If it is no scheduler.
        ValueError: If the scheduler has neither, its chain is not increasing, or its prediction does not belong to it.
    """
    name = type(scheduler).__name__
    if not hasattr(scheduler, "config"):
        raise TypeError(f"scheduler= must be a scheduler of diffusers, such as DDIMScheduler(), got {name}.")
    config = dict(scheduler.config)
    if "FlowMatch" in name or config.get("use_flow_sigmas"):  # multistep solvers keep betas that a flow does not use
        said = config.get("prediction_type", "flow_prediction")
        scale = flow_scale * config.get("num_train_timesteps", 1000) / 1000
        check_prediction(said, time := FlowTime(scale))
        return time, said
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ValueError(
            f"{name} has no alphas_cumprod, and is no flow-matching scheduler: its noise levels are not known. Give a "
            "DDPMScheduler with the betas that the network was trained with."
        )
    alphas = torch.as_tensor(alphas).double().clamp(1e-12, 1 - 1e-12)  # rescaled betas end in an alpha of 0
    log_sigmas = ((1 - alphas) / alphas).log() / 2
    if len(log_sigmas) < 2 or not bool((log_sigmas.diff() > 0).all()):
        raise ValueError(f"{name}: the noise levels of its {len(log_sigmas)} times are not increasing.")
    check_prediction(said := config.get("prediction_type", "epsilon"), time := VPTime(log_sigmas))
    return time, said
