"""The whole reproduction: experiments one after another, each kept when it is done."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from balanced_rep._version import __version__
from balanced_rep.reproduce._detection import digits_table, dose, network
from balanced_rep.reproduce._hybrid import hybrid
from balanced_rep.reproduce._jacobian import jacobians
from balanced_rep.reproduce._page import write_page
from balanced_rep.reproduce._part import Part, Settings, Tell
from balanced_rep.reproduce._steering import steering
from balanced_rep.reproduce._theory import ablation, corollaries, sampling

__all__ = ["EXPERIMENTS", "experiments", "reproduce"]

Experiment = Callable[[Settings, Tell], Part]

EXPERIMENTS: dict[str, Experiment] = {
    "corollaries": corollaries,
    "hybrid": hybrid,
    "sampling": sampling,
    "ablation": ablation,
    "digits_table": digits_table,
    "dose": dose,
    "unet": partial(network, kind="unet"),
    "dit": partial(network, kind="dit"),
    "prompted_unet": partial(network, kind="prompted unet"),
    "jacobians": jacobians,
    "steering": steering,
}
FULL_ONLY = ("unet", "dit", "prompted_unet")


def experiments(settings: Settings) -> list[str]:
    """The experiments of a run.

    Args:
        settings: How it is done.

    Returns:
        Their names, in their order.
    """
    return [name for name in EXPERIMENTS if not (settings.quick and name in FULL_ONLY)]


def reproduce(
    folder: str | Path,
    settings: Settings | None = None,
    *,
    only: list[str] | None = None,
    tell: Callable[[str, str], None] | None = None,
) -> list[Part]:
    """Runs the experiments that are not done yet, and writes tables, figures and the page.

    Args:
        folder: Of the run; an earlier run in it with the same settings and versions is continued.
        settings: How; default: in full.
        only: Names of experiments, see `EXPERIMENTS`.
        tell: Called with the name of the experiment and what it is doing; "done" or "kept" at its end.

    Returns:
        The experiments, in their order.

    Raises:
        ValueError: If an experiment is unknown.
    """
    settings = settings or Settings()
    chosen = experiments(settings) if only is None else only
    if unknown := [name for name in chosen if name not in EXPERIMENTS]:
        raise ValueError(f"reproduce: there is no experiment {unknown}; known are {', '.join(EXPERIMENTS)}.")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    fingerprint = {"version": __version__, "torch": torch.__version__, "quick": settings.quick, "seed": settings.seed}
    say = tell or (lambda name, what: None)
    done = {name: part for name in EXPERIMENTS if (part := Part.load(root, name, fingerprint)) is not None}
    for name in chosen:
        if name in done:
            done[name].write_files(root)  # one that was removed is there again
            say(name, "kept")
            continue
        started = time.perf_counter()
        part = EXPERIMENTS[name](settings, lambda what, n=name: say(n, what))
        part.seconds = time.perf_counter() - started
        part.save(root, fingerprint)
        done[name] = part
        say(name, "done")
    parts = [done[name] for name in EXPERIMENTS if name in done]  # of earlier runs, too
    about = {
        "balanced-rep": __version__, "torch": torch.__version__, "Python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(), "seed": settings.seed,
        "mode": "quick" if settings.quick else "full", "seconds": round(sum(p.seconds for p in parts)),
    }  # fmt: skip
    write_page(parts, root, about)
    claims = [{"part": p.name, **vars(c)} for p in parts for c in p.claims]
    (root / "claims.json").write_text(json.dumps({"about": about, "claims": claims}, indent=1) + "\n", encoding="utf-8")
    return [done[name] for name in chosen]
