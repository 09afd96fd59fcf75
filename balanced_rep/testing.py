"""For tests of this package and of libraries that build on it: inputs that hurt, and comparisons in the right units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanced_rep.ops._registry import OpSpec
from balanced_rep.ops.moments import FIELDS

__all__ = ["DISTRIBUTIONS", "activations", "agreement", "assert_moments_close"]

DISTRIBUTIONS = (
    "normal", "relu", "offset", "tiny", "large", "huge", "subnormal", "constant", "step", "heavy", "nan", "inf",
)  # fmt: skip


def activations(
    distribution: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> Tensor:
    """Values of one of :data:`DISTRIBUTIONS`, rounded to ``dtype``.

    Args:
        distribution: "normal"; "relu"; "offset" (mean / std = 1000, 10 in half types); "tiny" (1e-20, 1e-6 in
            float16); "large" (1e15, 1e3 in float16); "huge" (near the end of the range, so that sums of |v| overflow);
            "subnormal"; "constant"; "step" (the mean jumps half way along the last dim); "heavy" (fifth powers);
            "nan"; "inf".
        shape: Shape of the result.
        dtype: Floating dtype.
        seed: Seed of a generator of its own.

    Returns:
        Tensor on the CPU.

    Raises:
        ValueError: If the distribution is unknown.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    narrow = dtype == torch.float16
    if distribution == "relu":
        x = x.relu()
    elif distribution == "offset":
        x = x + (10.0 if dtype in (torch.float16, torch.bfloat16) else 1000.0)
    elif distribution in ("tiny", "large"):
        x = x * {"tiny": 1e-6 if narrow else 1e-20, "large": 1e3 if narrow else 1e15}[distribution]
    elif distribution == "huge":
        x = x.sign() * (6e4 if narrow else 3e38) * (1 - 0.1 * x.abs().clamp_max(1))
    elif distribution == "subnormal":
        x = x * {torch.float16: 1e-7, torch.bfloat16: 1e-39}.get(dtype, 1e-41)
    elif distribution == "constant":
        x = torch.full_like(x, 0.1)
    elif distribution == "step":
        x[..., x.shape[-1] // 2 :] += 50.0
    elif distribution == "heavy":
        x = x.pow(3 if narrow else 5)
    elif distribution in ("nan", "inf"):
        if x.numel():
            x.view(-1)[x.numel() // 2] = float(distribution)
    elif distribution != "normal":
        raise ValueError(f"unknown distribution {distribution!r}; known: {', '.join(DISTRIBUTIONS)}")
    return x.to(dtype)


def assert_moments_close(
    got: Tensor, want: Tensor, *, rel: float = 1e-6, shape_rel: float = 1e-5, value_rel: float = 0.0
) -> None:
    """Compares moment states ``(10, *kept)`` in the units that the accuracy promise is made in.

    Args:
        got: State of a backend.
        want: float64 reference of the same rounded input.
        rel: The mean is within ``rel * max(|mean|, std)``, std within ``rel`` relative, L1 too.
        value_rel: Min and max are within this relative error: 0, unless the values are means of a pooling.
        shape_rel: Skewness is within ``shape_rel * (1 + |skewness|)`` and kurtosis within ``shape_rel`` relative.

    Raises:
        AssertionError: If a field is off; names the field, the place and the error.
    """
    assert got.dtype == torch.float64, f"state is {got.dtype}, not float64"
    assert got.shape == want.shape, f"shape {tuple(got.shape)} is not {tuple(want.shape)}"
    got, want = (t.detach().cpu().reshape(len(FIELDS), got[0].numel()) for t in (got, want))
    for name in ("n", "min", "max", "n_active", "n_nonfinite"):
        i = FIELDS.index(name)
        _check(name, got[i], want[i], (value_rel if name in ("min", "max") else 0.0) * want[i].abs())
    n, mean, m2, m3, m4, l1 = want[:6]
    std = (m2 / n).sqrt()
    _check("mean", got[1], mean, rel * torch.where(std.isnan(), mean.abs(), torch.maximum(mean.abs(), std)))
    _check("m2", got[2], m2, 2 * rel * m2)
    _check("m3", got[3], m3, shape_rel * (m3.abs() + m2 * std))
    _check("m4", got[4], m4, shape_rel * m4)
    _check("l1", got[5], l1, rel * l1)


def agreement(spec: OpSpec, got: Any, args: tuple[Any, ...]) -> str | None:
    """``None`` if an op's result agrees with its float64 reference within the spec's tolerance, else what is wrong."""
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    want = spec.reference(*wide)
    rtol, atol = spec.tolerance[args[0].dtype]
    pairs = ((got, want),) if isinstance(want, Tensor) else zip(got, want, strict=True)
    try:
        for g, w in pairs:
            torch.testing.assert_close(g.to("cpu", w.dtype), w.to("cpu"), rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None


def _check(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    same = (got == want) | (got.isnan() & want.isnan())
    bad = ~(same | ((got - want).abs() <= allowed))
    if bad.any():
        i = int(bad.nonzero()[0])
        raise AssertionError(
            f"{name}[{i}] = {got[i].item()!r}, reference {want[i].item()!r}, "
            f"off by {(got[i] - want[i]).abs().item():.3g}, allowed {allowed[i].item():.3g} "
            f"({int(bad.sum())} of {bad.numel()} are off)"
        )
