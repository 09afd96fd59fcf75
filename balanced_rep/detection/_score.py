"""What every memorization score has in common: what it needs, which way it points, and how it is called.

Letters: n samples, of which b are in a batch.
"""

from __future__ import annotations

import difflib
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from balanced_rep.models import Denoiser
from balanced_rep.models._checks import check_counts, check_denoiser, check_images, check_sigmas, resolve_layers
from balanced_rep.models._conditions import n_rows, take_rows

__all__ = ["OK", "Batch", "Direction", "Needs", "Score", "Scores", "get", "names", "register"]

Direction = Literal["high", "low"]
Needs = Literal["model", "samples", "condition", "reference", "sigma", "layers"]

OK = "ok"


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of samples.

    Attributes:
        values: Float64 `(n,)` on the CPU; with several layers or noise levels `(layers, sigmas, n)`. NaN only for
            samples whose status says why.
        status: For each sample "ok", or why it has no score, with several layers or levels at one of them or more.
        name: Of the score.
        direction: Which scores are suspicious: "high" or "low". Declared, never fitted.
        layers: The layers, if there are any to choose.
        sigmas: The noise levels, if there are any to choose.
        forwards: Network evaluations per sample; part of one, where the forward ends early, counts as one.
        tangents: Jacobian-vector products per sample that were carried along.
        seconds: Wall time of the call.
    """

    values: Tensor
    status: tuple[str, ...]
    name: str
    direction: Direction
    layers: tuple[str, ...] = ()
    sigmas: tuple[float, ...] = ()
    forwards: float = 0.0
    tangents: float = 0.0
    seconds: float = 0.0

    def __len__(self) -> int:
        return self.values.shape[-1]

    @property
    def ok(self) -> Tensor:
        """Which samples have a score, `(n,)` bool."""
        return torch.tensor([s == OK for s in self.status], dtype=torch.bool)

    def at(self, layer: int, sigma: int) -> Scores:
        """The scores of one layer and noise level of several; a sample that failed elsewhere only is "ok" in them.

        Args:
            layer: Index of the layer.
            sigma: Index of the noise level.

        Returns:
            Scores with values `(n,)`.
        """
        values = self.values[layer, sigma]
        finite = values.isfinite().tolist()
        return replace(
            self, values=values, layers=self.layers[layer : layer + 1], sigmas=self.sigmas[sigma : sigma + 1],
            status=tuple(OK if scored else why for scored, why in zip(finite, self.status, strict=True)),
        )  # fmt: skip

    def __repr__(self) -> str:
        failed = len(self) - int(self.ok.sum())
        return (
            f"Scores({self.name!r}, {tuple(self.values.shape)}, {self.direction} is suspicious, {failed} without score)"
        )


@dataclass
class Batch:
    """What a score is computed from.

    Attributes:
        x: Clean samples `(b, *sample_shape)`, if given.
        cond: Conditions with a leading dim b, if given.
        items: Number of each sample, `(b,)` int64: with the seed, the key of its noise.
        sigmas: Noise levels.
        layers: Layers.
        seed: Of the noise.
        reference: What the score compares with, if given.
        failed: Sample in the batch to why it cannot be scored, at one layer and noise level or more; filled by the
            score, which leaves NaN there.
        forwards: Network evaluations; counted by the score.
        tangents: Jacobian-vector products; counted by the score.
    """

    x: Tensor | None
    cond: Any
    items: Tensor
    sigmas: tuple[float, ...]
    layers: tuple[str, ...]
    seed: int
    reference: Any
    failed: dict[int, str] = field(default_factory=dict)
    forwards: float = 0.0
    tangents: float = 0.0

    def __len__(self) -> int:
        return len(self.items)

    def fail(self, rows: Tensor, reason: str) -> None:
        """Marks samples as not scored; the first reason stays.

        Args:
            rows: Which, `(b,)` bool.
            reason: Why.
        """
        for i in rows.nonzero().flatten().tolist():
            self.failed.setdefault(i, reason)


class Score(ABC):
    """A memorization score.

    Attributes:
        name: What `get` knows it by.
        formula: What it is.
        source: Where it is from.
        requires: What it needs: "model", "samples" (clean ones, to be looked at), "condition" (prompts or classes),
            "reference" (training samples or other prompts), "sigma", "layers".
        direction: Whether "high" or "low" scores are suspicious.
        cost: Network evaluations per sample, in words.
        many_sigmas: Whether one call takes several noise levels.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    requires: ClassVar[frozenset[Needs]]
    direction: ClassVar[Direction]
    cost: ClassVar[str]
    many_sigmas: ClassVar[bool] = False

    @abstractmethod
    def compute(self, D: Denoiser, batch: Batch) -> Tensor:
        """Scores a batch.

        Args:
            D: The denoiser.
            batch: Checked inputs.

        Returns:
            `(b,)`, or `(layers, sigmas, b)` if the score takes several.
        """

    def options(self) -> dict[str, Any]:
        """The arguments that `get` would make the same score from."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def prepare(self, D: Denoiser | None, reference: Any) -> Any:
        """Looks at the reference once per call.

        Args:
            D: The denoiser.
            reference: As given.

        Returns:
            What `compute` finds in `Batch.reference`.
        """
        return reference

    def default_sigma(self, D: Denoiser) -> float | None:
        """The noise level if none is given.

        Args:
            D: The denoiser.

        Returns:
            The level, or `None` if it has to be given.
        """
        return None

    def __call__(
        self,
        D: Denoiser | None,
        x: Tensor | None = None,
        *,
        cond: Any = None,
        reference: Any = None,
        sigma: float | Sequence[float] | None = None,
        layers: str | Sequence[str] | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
        on_batch: Callable[[int], None] | None = None,
    ) -> Scores:
        """Scores samples or conditions.

        Args:
            D: The denoiser; `None` for scores that need no model.
            x: Clean samples in the units of the denoiser, `(n, *sample_shape)`. They are not rescaled.
            cond: Conditions with a leading dim n; `None` scores without a prompt.
            reference: Training samples, or conditions, that the score compares with.
            sigma: Noise level in data units, or several.
            layers: Names from `D.layers`, one or several; default: all.
            seed: Of the noise. The noise of a sample depends on the seed and its number alone, so the score does not
                depend on `batch_size` beyond rounding.
            first: Number of the first sample. Samples that are scored in several calls, such as one at a time, need
                it to have noise of their own: `score(D, x[3:5], first=3)` is a part of `score(D, x)`.
            batch_size: Samples at once; each comes with all noise levels.
            on_batch: Called after each batch with the number of samples in it.

        Returns:
            The scores. A sample whose activations or score are not finite has no score but a status.

        Raises:
            TypeError: If `D` is no denoiser, `sigma` holds something other than numbers, or a score of your own returns
                something other than a number for each sample.
            ValueError: If something that the score requires is missing, or an input does not fit the model.
        """
        started = time.perf_counter()
        sigma = _numbers(self.name, sigma)
        self._check_inputs(D, x, cond, reference, sigma, layers, batch_size)
        if not isinstance(first, Integral) or first < 0:
            raise ValueError(f"{self.name}: first= is the number of a sample, at least 0, got {first!r}.")
        n = len(x) if x is not None else n_rows(cond)
        single = not isinstance(sigma, Sequence) and ("layers" not in self.requires or isinstance(layers, str))
        if D is not None and x is not None:
            check_images(self.name, D, x)
        sigmas = () if D is None else check_sigmas(self.name, D, self._sigmas(D, sigma))
        if len(sigmas) > 1 and not self.many_sigmas:
            raise ValueError(f"{self.name}: takes one noise level per call, got {len(sigmas)}.")
        chosen = resolve_layers(self.name, D, layers) if D is not None and "layers" in self.requires else ()
        reference = self.prepare(D, reference)
        values, status, forwards, tangents = [], [], 0.0, 0.0
        with torch.no_grad():
            for start in range(0, n, batch_size):
                rows = torch.arange(start, min(n, start + batch_size))
                own = None if x is None else x[start : start + batch_size]
                batch = Batch(own, take_rows(cond, rows), first + rows, sigmas, chosen, seed, reference)
                lost = torch.zeros(len(batch), dtype=torch.bool)
                for tensor in (batch.x, *tree_leaves(batch.cond)):
                    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim:
                        bad = ~tensor.isfinite().reshape(len(tensor), -1).all(dim=1)
                        batch.fail(bad, "what is to be scored is not finite")
                        lost |= bad.cpu()
                value = self.compute(D, batch)  # pyright: ignore[reportArgumentType]
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                if not isinstance(shape, tuple) or len(shape) not in (1, 3) or shape[-1] != len(batch):
                    raise TypeError(
                        f"{self.name}: compute must return a tensor (b,) or (layers, sigmas, b) for b = {len(batch)} "
                        f"samples, got {shape}."
                    )
                value = value.double().cpu()
                batch.fail(~value.isfinite().reshape(-1, len(batch)).all(dim=0), "the score is not finite")
                value = value.where(value.isfinite() & ~lost, torch.nan)
                values.append(value)
                status += [batch.failed.get(i, OK) for i in range(len(batch))]
                forwards, tangents = forwards + batch.forwards, tangents + batch.tangents
                if on_batch is not None:
                    on_batch(len(batch))
        shape = (max(1, len(chosen)), len(sigmas), 0) if self.many_sigmas else (0,)
        joined = torch.cat(values, dim=-1) if values else torch.empty(shape, dtype=torch.float64)
        if joined.ndim == 3 and single:
            joined = joined[0, 0]
        return Scores(
            joined, tuple(status), self.name, self.direction, chosen, sigmas if "sigma" in self.requires else (),
            forwards / max(n, 1), tangents / max(n, 1), time.perf_counter() - started,
        )  # fmt: skip

    def _check_inputs(
        self, D: Any, x: Any, cond: Any, reference: Any, sigma: Any, layers: Any, batch_size: int
    ) -> None:
        given = {"model": D, "samples": x, "condition": cond, "reference": reference}
        words = {"model": "a denoiser D", "samples": "samples x", "condition": "cond=", "reference": "reference="}
        missing = [words[need] for need in words if need in self.requires and given[need] is None]
        if missing:
            raise ValueError(
                f"{self.name}: {', '.join(missing)} is needed; the score requires {sorted(self.requires)}."
            )
        if "model" in self.requires:
            check_denoiser(self.name, D)
        if x is None and cond is None:
            raise ValueError(f"{self.name}: nothing to score: give samples x or cond=.")
        if x is not None and cond is not None and n_rows(cond) != len(x):
            raise ValueError(f"{self.name}: {len(x)} samples and {n_rows(cond)} conditions; one each is needed.")
        if layers is not None and "layers" not in self.requires:
            raise ValueError(f"{self.name}: takes no layers.")
        if sigma is not None and "sigma" not in self.requires:
            raise ValueError(f"{self.name}: takes no noise level.")
        if reference is not None and "reference" not in self.requires:
            raise ValueError(f"{self.name}: takes no reference.")
        check_counts(self.name, batch_size=batch_size)

    def _sigmas(self, D: Denoiser, sigma: float | Sequence[float] | None) -> tuple[float, ...]:
        if sigma is None:
            sigma = self.default_sigma(D) if "sigma" in self.requires else 0.0
            if sigma is None:
                low, high = D.sigma_range
                raise ValueError(
                    f"{self.name}: sigma= is needed, a noise level from {low:g} to {high:g} in data units."
                )
        return tuple(float(s) for s in sigma) if isinstance(sigma, Sequence) else (float(sigma),)

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options().items())
        return f"{type(self).__name__}({options})"


def _numbers(what: str, sigma: Any) -> Any:
    """Noise levels as Python has them, those of an array as a list."""
    found = sigma.tolist() if hasattr(sigma, "tolist") else sigma
    if found is None or isinstance(found, Real):
        return found
    listed = [s.item() if isinstance(s, Tensor) and not s.ndim else s for s in found] if _is_list(found) else [found]
    if not all(isinstance(s, Real) for s in listed):
        raise TypeError(f"{what}: sigma= must be a number, or a sequence of them, got {sigma!r}.")
    return listed


def _is_list(found: Any) -> bool:
    return isinstance(found, Sequence) and not isinstance(found, str)


_REGISTRY: dict[str, type[Score]] = {}


def register(kind: type[Score]) -> type[Score]:
    """Makes a score known to `get` by its name; usable as a decorator.

    Args:
        kind: The class.

    Returns:
        The class.

    Raises:
        ValueError: If another one has the name.
    """
    if _REGISTRY.get(kind.name, kind) is not kind:
        raise ValueError(f"a score named {kind.name!r} is registered already: {_REGISTRY[kind.name].__name__}.")
    _REGISTRY[kind.name] = kind
    return kind


def names() -> tuple[str, ...]:
    """The scores that `get` knows."""
    return tuple(_REGISTRY)


def get(name: str, **options: Any) -> Score:
    """A score by name.

    Args:
        name: One of `names()`.
        **options: Arguments of the score.

    Returns:
        The score.

    Raises:
        ValueError: If there is no such score, or an argument is out of range.
        TypeError: If it has no such argument; names those that it has. If `name` is no text.
    """
    if not isinstance(name, str):
        raise TypeError(f"a score is named by a text, one of {', '.join(_REGISTRY)}; got {name!r}.")
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=3, cutoff=0.4)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"there is no score {name!r}.{hint} Known are: {', '.join(_REGISTRY)}.")
    kind = _REGISTRY[name]
    takes = [] if kind.__init__ is object.__init__ else list(inspect.signature(kind).parameters.values())
    unknown = sorted(options.keys() - {p.name for p in takes})
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in takes):
        accepted = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in takes) or "none"
        raise TypeError(f"{name}: has no option {', '.join(map(repr, unknown))}; its options are: {accepted}.")
    return kind(**options)
