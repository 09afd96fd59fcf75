"""Which way of multiplying matrices is fastest on this machine: measured once, when the first large product comes.

float32 layers on the CPU go to torch's BLAS or to oneDNN, whichever is faster (which depends on the processor and the
build of torch); tangents in a lower precision are taken only where products in it are really faster.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_rep.autodiff._fused import is_tracing

__all__ = ["Speeds", "linear", "lower_precision", "measured", "speeds"]

SAMPLE = (1024, 512, 512)  # rows, inputs, outputs of the layer that is timed
LARGE = 1 << 29  # multiply-adds of a layer for which it is worth knowing: the measurement takes a few such layers
GAIN = 1.2  # what is not the default has to be faster by this factor
ROUNDS = 4


@dataclass(frozen=True)
class Speeds:
    """Seconds of one linear layer of :data:`SAMPLE`.

    Attributes:
        float32: By torch's default.
        onednn: The same in float32 by oneDNN, ``inf`` where it does not exist or is wrong.
        lower: By dtype: what was measured of float16 and bfloat16.
    """

    float32: float
    onednn: float
    lower: dict[torch.dtype, float]

    @property
    def use_onednn(self) -> bool:
        """Whether float32 layers go to oneDNN."""
        return self.onednn * GAIN < self.float32


def speeds(device: torch.device, lower: torch.dtype | None = None) -> Speeds:
    """What a linear layer takes here.

    Args:
        device: CPU or CUDA device.
        lower: A dtype to measure beside float32.

    Returns:
        Seconds, measured at the first call for this device and number of threads.
    """
    key = (device, torch.get_num_threads(), lower)
    with _LOCK:
        if key not in _MEASURED:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):  # the caller's would decide what is timed
                _MEASURED[key] = _measure(device, lower)
        return _MEASURED[key]


def measured() -> list[str]:
    """A sentence for what has been measured of float32 layers on the CPU so far."""
    return [
        f"float32 linear layers go to {'oneDNN' if found.use_onednn else 'BLAS'} with {threads} threads: oneDNN takes "
        f"{found.onednn / found.float32:.2g} of its time"
        for (device, threads, lower), found in _MEASURED.items()
        if device.type == "cpu" and lower is None
    ]


_MEASURED: dict[tuple[torch.device, int, torch.dtype | None], Speeds] = {}
_LOCK = threading.Lock()


def _measure(device: torch.device, lower: torch.dtype | None) -> Speeds:
    generator = torch.Generator().manual_seed(0)
    rows, inputs, outputs = SAMPLE
    x = torch.randn(rows, inputs, generator=generator).to(device)
    w = torch.randn(outputs, inputs, generator=generator).to(device)
    calls: dict[str, Callable[[], Tensor]] = {"float32": lambda: F.linear(x, w)}
    if device.type == "cpu" and _onednn_is_right(x, w):
        calls["onednn"] = lambda: _onednn(x, w)
    if lower is not None:
        x_low, w_low = x.to(lower), w.to(lower)
        calls["lower"] = lambda: F.linear(x_low, w_low)
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            best[name] = min(best[name], _seconds(call, device))
    low = {} if lower is None else {lower: best["lower"]}
    return Speeds(best["float32"], best.get("onednn", float("inf")), low)


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _onednn_is_right(x: Tensor, weight: Tensor) -> bool:
    """torch keeps this operator for its own compiler: it may go, or change."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    try:
        return torch.allclose(_onednn(x, weight), F.linear(x, weight), rtol=1e-3, atol=1e-3)
    except (AttributeError, RuntimeError):
        return False


def lower_precision(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether tangents in ``dtype`` are worth it on this device.

    Args:
        device: CPU or CUDA device.
        dtype: float16 or bfloat16.

    Returns:
        The answer, and a sentence that says what was measured.
    """
    found = speeds(device, dtype)
    ratio = min(found.float32, found.onednn) / found.lower[dtype]
    name = str(dtype).removeprefix("torch.")
    worth = ratio > GAIN
    chosen = f"tangents are {name}" if worth else "tangents stay float32"
    return worth, f"{chosen}: a linear layer in {name} has {ratio:.2g} times the speed of one in float32 on {device}"


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T``, by the faster library.

    Args:
        x: ``(..., inputs)``.
        weight: ``(outputs, inputs)``.

    Returns:
        ``(..., outputs)``.
    """
    large = x.dtype == torch.float32 == weight.dtype and x.device.type == "cpu" and weight.dim() == 2
    if large and x.numel() * weight.shape[0] >= LARGE and not is_tracing() and speeds(x.device).use_onednn:
        return _onednn(x.contiguous(), weight.detach())
    return F.linear(x, weight)
