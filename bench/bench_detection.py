"""Detection: all layers and noise levels in one pass, and FLIPD with many probes, against how they are computed today.

    python bench/bench_detection.py              # interleaved ratios, results/detection.csv, the bars
    pytest bench --benchmark-only                # the same calls one by one, with pytest-benchmark

The first peer is the loop of the paper's released code: one hook on one layer, one image, one noise level, a whole
forward, the activation kept, its maximum over space, its standard deviation. The second is what one would make of it
in a minute: hooks on all layers at once, still an image at a time. Both are timed on a few images and scaled to the
same work; forwards cost the same whatever the image. The third computes FLIPD's trace with one `torch.func.jvp` for
each probe, as the published code does (attention in its plain form, without which forward mode fails).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _common as common  # before torch
import _models
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from balanced_rep import detection
from balanced_rep.linalg._probes import probes
from balanced_rep.models import from_diffusers

SIGMAS = (0.05, 0.1, 0.2, 0.4)
Candidates = dict[str, Callable[[], object]]


def denoiser(size: int = 16, n_images: int = 64) -> tuple[Any, Tensor]:
    """The reduced pixel UNet as a denoiser, and images for it."""
    from diffusers import DDPMScheduler

    model, inputs = _models.edm_unet(n_images, size, channels=(32, 64, 64))
    return from_diffusers(model, DDPMScheduler()), inputs["sample"].tanh()


def transformer(n_images: int, size: int = 16) -> tuple[Any, Tensor]:
    """The reduced DiT as a denoiser; `torch.func.jvp` does not get through the UNet (a view in its group norm)."""
    from diffusers import DDPMScheduler

    model, inputs = _models.dit(n_images, size)
    return from_diffusers(model, DDPMScheduler()), inputs["hidden_states"].tanh()


def one_pass(D: Any, x: Tensor) -> Callable[[], object]:
    """Ours: every labelled layer and noise level."""
    score = detection.get("representation_std")
    return lambda: score(D, x, sigma=SIGMAS, batch_size=16)


def hook_loop(D: Any, x: Tensor, n_images: int, *, layers_at_once: int = 1) -> Callable[[], object]:
    """One image and one noise level at a time, with hooks that keep the activations of one layer, or of several."""

    def run() -> list[float]:
        found, names = [], list(D.layers)
        for first in range(0, len(names), layers_at_once):
            kept: dict[str, Tensor] = {}
            handles = [_keep(D.get_submodule(name), name, kept) for name in names[first : first + layers_at_once]]
            for sigma in SIGMAS:
                for image in x[:n_images]:
                    D((image + sigma * torch.randn_like(image))[None], sigma)
                    found += [float(h.flatten(2).amax(2).float().cpu().numpy().std()) for h in kept.values()]
            for handle in handles:
                handle.remove()
        return found

    return run


def _keep(module: torch.nn.Module, name: str, kept: dict[str, Tensor]) -> Any:
    """Listens to the input of a module."""
    return module.register_forward_pre_hook(lambda _module, args: kept.update({name: args[0].detach()}))


def batched_flipd(D: Any, x: Tensor, n_probes: int) -> Callable[[], object]:
    """Ours."""
    score = detection.get("flipd", n_probes=n_probes)
    return lambda: score(D, x, sigma=0.2, batch_size=len(x))


def jvp_per_probe(D: Any, x: Tensor, n_probes: int) -> Callable[[], object]:
    """The trace by one `torch.func.jvp` for each probe, all images at once."""
    w = probes(0, n_probes, x[0].numel(), "rademacher", 0, x).reshape(n_probes, 1, *x.shape[1:])

    def run() -> Tensor:
        total = torch.zeros(len(x))
        with sdpa_kernel(SDPBackend.MATH):
            for probe in w:
                tangent = probe.expand_as(x).contiguous()
                value, image = torch.func.jvp(lambda z: D(z, 0.2), (x,), (tangent,))
                total = total + (image * probe).flatten(1).sum(1)
        return total / n_probes + (value - x).flatten(1).square().sum(1) / 0.04

    return run


def measure(turns: int, n_images: int, n_loop: int, n_flipd: int, n_probes: int) -> list[dict[str, Any]]:
    """Rows of both comparisons; `scale` is what a peer's time is multiplied with to stand for the same work."""
    (D, x), (T, z) = denoiser(n_images=n_images), transformer(n_flipd)
    base = {"bench": "detection", "threads": torch.get_num_threads(), "layers": len(D.layers), "sigmas": len(SIGMAS)}
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        pairs: list[tuple[Candidates, dict[str, Any], float]] = [
            (
                {
                    "all layers, one pass": one_pass(D, x),
                    "a layer, an image at a time": hook_loop(D, x, n_loop),
                    "all layers, an image at a time": hook_loop(D, x, n_loop, layers_at_once=len(D.layers)),
                },
                {"images": len(x)},
                len(x) / n_loop,
            ),
            (
                {
                    "flipd": batched_flipd(T, z, n_probes),
                    "one jvp per probe": jvp_per_probe(T, z, n_probes),
                },
                {"images": n_flipd, "probes": n_probes},
                1.0,
            ),
        ]
        for candidates, about, scale in pairs:
            timings = common.interleave(candidates, budget=1e9, min_turns=turns, max_turns=turns)
            ours = next(iter(timings.values()))
            for i, (name, timing) in enumerate(timings.items()):
                factor = scale if i else 1.0
                row = {**base, **about, "candidate": name, "scale": factor, **timing.columns()}
                if i:
                    found = timing.ratios(ours)
                    row |= {key: common.significant(factor * value) for key, value in found.items()}
                rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line a comparison."""
    lines, ours = [], ""
    for row in rows:
        if "ratio" not in row:
            ours = row["candidate"]
        else:
            lines.append(
                f"{ours}: {row['ratio_cpu']:.1f} x faster than {row['candidate']} in CPU time "
                f"({row['paired_p20']:.1f} to {row['paired_p80']:.1f} by wall time)"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the CSV, prints the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="torch threads (default: 1)")
    parser.add_argument("--turns", type=int, default=5, help="samples of each candidate (default: 5)")
    parser.add_argument("--images", type=int, default=64, help="images of one pass (default: 64)")
    parser.add_argument("--loop-images", type=int, default=2, help="images of the loop (default: 2)")
    parser.add_argument("--flipd-images", type=int, default=4, help="images of FLIPD (default: 4)")
    parser.add_argument("--probes", type=int, default=16, help="probes of FLIPD (default: 16)")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "detection.csv", help="the CSV to write")
    args = parser.parse_args(argv)
    rows = []
    for n in args.threads:
        with common.threads(n):
            rows += measure(args.turns, args.images, args.loop_images, args.flipd_images, args.probes)
    common.write_csv(args.out, rows)
    print(f"{args.out}: {len(rows)} rows\n\n{summary(rows)}")
    return 0


@pytest.mark.parametrize("call", ["all layers, one pass", "flipd"])
def test_detection(benchmark: Any, call: str) -> None:
    (D, x), (T, z) = denoiser(n_images=4), transformer(2)
    with torch.no_grad(), common.threads(1):
        benchmark({"all layers, one pass": one_pass(D, x), "flipd": batched_flipd(T, z, 4)}[call])


if __name__ == "__main__":
    raise SystemExit(main())
