"""The Jacobian of a function at a point as a linear operator: products only, no matrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from balanced_rep.autodiff import jvp
from balanced_rep.autodiff._fallback import differentiable
from balanced_rep.autodiff._inputs import check_kwargs
from balanced_rep.autodiff._jvp import products
from balanced_rep.autodiff._memory import available_bytes
from balanced_rep.autodiff._run import capture
from balanced_rep.autodiff._tape import Tape
from balanced_rep.linalg._probes import Estimate, Probe, RunningMean, probes

__all__ = ["JacobianOperator"]

COLUMNS = 16  # products per pass where no number is asked for


class JacobianOperator:
    """J = df/dx at one point, for products with J and its transpose.

    Input and output are flattened: ``J`` has shape ``(m, n)`` with n elements of ``x`` and m of ``f(x)``, batch
    dimension included. With ``batch=True`` the first dim of ``x`` and of ``f(x)`` are samples that ``f`` treats apart,
    and ``J`` is a stack ``(batch, m, n)`` of their Jacobians; one pass serves all samples.

    ``J @ V`` costs about 1 + k forward passes for k columns, ``J.T @ U`` one forward and k backward passes. The first
    product keeps what linear layers and convolutions make of the primal, if that takes no more than an eighth of the
    free memory, so that further products cost about k passes; ``repr`` says what is kept.

    Args:
        f: Function or module of one tensor, in evaluation mode; returns a floating-point tensor.
        x: The point, floating point; a copy is kept.
        batch: One Jacobian per sample.
        output: Name of a module inside ``f`` whose output is taken.
        chunk_size: Columns per pass, as in :func:`balanced_rep.autodiff.jvp`.
        strict: Refuse functions without a multi-tangent rule.
        tangent_dtype: Lower precision for tangents of products with J, as in :func:`balanced_rep.autodiff.jvp`.
        reuse: Keep primal results between products. What they were computed from is compared at each product; where
            it has changed, as after a step of training, they are computed again, and after a second time not kept.
        kwargs: Keyword arguments of ``f``.

    Raises:
        TypeError: If ``x`` is no floating-point tensor or the output no tensor.
        ValueError: If ``batch=True`` and the first dims differ.

    Example:
        >>> import torch
        >>> from balanced_rep.linalg import JacobianOperator
        >>> J = JacobianOperator(torch.sin, torch.zeros(3, dtype=torch.float64))
        >>> J.shape, J.trace().value
        ((3, 3), tensor(3., dtype=torch.float64))
    """

    def __init__(
        self,
        f: Callable[..., Any],
        x: Tensor,
        batch: bool = False,
        *,
        output: str | None = None,
        chunk_size: int | Literal["auto"] | None = "auto",
        strict: bool = False,
        tangent_dtype: torch.dtype | None = None,
        reuse: bool = True,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"JacobianOperator: x is {type(x).__module__}.{type(x).__name__}; a torch tensor is needed, as f "
                "takes it: torch.as_tensor(x)"
            )
        if not x.is_floating_point():
            raise TypeError(f"JacobianOperator: x is {x.dtype}; real floating point is needed, e.g. x.float()")
        self._f, self._x, self._output, self._kwargs = f, x.detach().clone(), output, check_kwargs(kwargs)
        self._options = {
            "chunk_size": chunk_size, "strict": strict, "output": output, "tangent_dtype": tangent_dtype,
            "kwargs": self._kwargs,
        }  # fmt: skip
        y, _ = jvp(f, self._x, self._x.new_zeros((0, *x.shape)), **self._options)
        if not isinstance(y, Tensor) or not y.is_floating_point():
            raise TypeError(
                f"JacobianOperator: f returns {getattr(y, 'dtype', type(y).__name__)}; one float tensor is needed"
            )
        if batch and (x.dim() == 0 or y.dim() == 0 or y.shape[0] != x.shape[0]):
            raise ValueError(
                f"JacobianOperator: batch=True, but x has shape {tuple(x.shape)} and f(x) {tuple(y.shape)}: the first "
                "dim has to be the samples in both"
            )
        self._batch = batch
        self._y_shape, self.dtype, self.device = y.shape, y.dtype, y.device
        free = available_bytes(y.device)
        self._tape = Tape(None if free is None else free // 8) if reuse else None
        lead = x.shape[:1] if batch else torch.Size()
        self.shape = (*lead, *(math.prod(s[len(lead) :]) for s in (y.shape, x.shape)))

    def __repr__(self) -> str:
        kept = 0 if self._tape is None else self._tape.nbytes
        keeps = f", keeps {kept / 1e6:.3g} MB of the primal" if kept else ""
        return f"JacobianOperator(shape={self.shape}, dtype={self.dtype}, device={self.device}{keeps})"

    @property
    def batch(self) -> bool:
        """Whether there is one Jacobian per sample."""
        return self._batch

    @property
    def T(self) -> _Transposed:
        """The transpose: ``J.T @ U`` by reverse mode."""
        return _Transposed(self)

    @property
    def mT(self) -> _Transposed:
        """The transpose of each Jacobian."""
        return _Transposed(self)

    def __matmul__(self, v: Tensor) -> Tensor:
        """``J @ v`` for a vector ``(n,)`` or columns ``(n, k)``; with samples ``(batch, n)`` or ``(batch, n, k)``."""
        return self._product(v, self.shape[-1], self._forward, "J @ V")

    def matvec(self, v: Tensor) -> Tensor:
        """``J v``: ``(n,)`` to ``(m,)``, or ``(batch, n)`` to ``(batch, m)``."""
        return self @ v

    def matmat(self, v: Tensor) -> Tensor:
        """``J V``: ``(n, k)`` to ``(m, k)``, or ``(batch, n, k)`` to ``(batch, m, k)``."""
        return self @ v

    def rmatvec(self, u: Tensor) -> Tensor:
        """``J^T u``: ``(m,)`` to ``(n,)``, or ``(batch, m)`` to ``(batch, n)``."""
        return self.T @ u

    def rmatmat(self, u: Tensor) -> Tensor:
        """``J^T U``: ``(m, k)`` to ``(n, k)``, or ``(batch, m, k)`` to ``(batch, n, k)``."""
        return self.T @ u

    def _product(self, v: Tensor, size: int, apply: Callable[[Tensor], Tensor], name: str) -> Tensor:
        lead = self.shape[:-2]
        if not isinstance(v, Tensor):
            raise TypeError(f"{name}: got {type(v).__name__}; expected is a torch tensor (to_scipy() takes numpy)")
        vector = v.dim() == len(lead) + 1
        if v.shape[: len(lead) + 1] != (*lead, size) or v.dim() > len(lead) + 2:
            dims = ", ".join(map(str, (*lead, size)))
            raise ValueError(f"{name}: got shape {tuple(v.shape)}; expected is ({dims}) or ({dims}, k)")
        if v.dtype != self.dtype or v.device != self.device:
            raise TypeError(f"{name}: got {v.dtype} on {v.device}; the operator is {self.dtype} on {self.device}")
        columns = v.unsqueeze(-1) if vector else v
        rows = apply(columns.movedim(-1, 0).contiguous())  # (k, [batch,] size)
        product = rows.movedim(0, -1)
        return product.squeeze(-1) if vector else product

    def _forward(self, rows: Tensor) -> Tensor:
        """(k, [batch,] n) -> (k, [batch,] m)."""
        k = rows.shape[0]
        tangents = rows.to(self._x.dtype).reshape(k, *self._x.shape)
        _, t = products(self._f, self._x, tangents, self._tape, **self._options)
        return t.reshape(k, *self.shape[:-1])

    def _reverse(self, rows: Tensor) -> Tensor:
        """(k, [batch,] m) -> (k, [batch,] n), by one forward and one batched backward pass."""
        k = rows.shape[0]
        if k == 0:
            return rows.new_zeros((0, *self.shape[:-2], self.shape[-1]))
        call = self._f if self._output is None else capture(self._f, self._output)  # pyright: ignore[reportArgumentType]
        cotangents = rows.reshape(k, *self._y_shape)
        with torch.enable_grad(), differentiable(), _frozen(self._f):
            pull = torch.func.vjp(lambda x: call(x, **self._kwargs), self._x)[1]
            try:
                (t,) = torch.func.vmap(pull)(cotangents)
            except RuntimeError as error:  # a backward without a batching rule
                warnings.warn(
                    f"JacobianOperator: reverse mode takes one column at a time: {str(error).splitlines()[0]}",
                    UserWarning,
                    stacklevel=4,
                )
                t = torch.stack([pull(c)[0] for c in cotangents])
        return t.reshape(k, *self.shape[:-2], self.shape[-1]).detach()

    def to_scipy(self) -> Any:
        """As a ``scipy.sparse.linalg.LinearOperator`` on numpy vectors.

        Returns:
            The operator, of the dtype of ``f(x)`` (float32 for half types); of a complex vector it gives real and
            imaginary part by a product each.

        Raises:
            ValueError: If there is one Jacobian per sample.
        """
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        if self._batch:
            raise ValueError(
                "to_scipy: the operator holds one Jacobian per sample; build one per sample without batch=True"
            )
        half = self.dtype in (torch.float16, torch.bfloat16)
        numpy_dtype = torch.empty((), dtype=torch.float32 if half else self.dtype).numpy().dtype

        def through(apply: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
            def product(v: Any) -> Any:
                if np.iscomplexobj(v):
                    return product(v.real) + 1j * product(v.imag)
                given = torch.from_numpy(v.astype(numpy_dtype, copy=True)).to(self.device, self.dtype)
                return apply(given).to(dtype=torch.float32 if half else self.dtype).cpu().numpy()

            return product

        columns = through(self.__matmul__), through(self.T.__matmul__)
        vectors = (lambda v: columns[0](v.reshape(-1)), lambda v: columns[1](v.reshape(-1)))
        make: Any = LinearOperator
        return make(
            self.shape, matvec=vectors[0], rmatvec=vectors[1], matmat=columns[0], rmatmat=columns[1], dtype=numpy_dtype
        )

    def dense(self) -> Tensor:
        """The matrix ``(m, n)`` or ``(batch, m, n)``, from n products; for small inputs."""
        n = self.shape[-1]
        parts = [self._forward(self._unit(start, min(COLUMNS, n - start))) for start in range(0, n, COLUMNS)]
        if not parts:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return torch.cat(parts).movedim(0, -1)

    def trace(self, n_probes: int = 64, *, seed: int = 0, probe: Probe = "rademacher") -> Estimate:
        """Trace of a square J: exact from n products if n is at most ``n_probes``, else Hutchinson's estimate.

        Args:
            n_probes: Products to take.
            seed: Key of the probes: the same on every device and for every chunk; every sample gets the same probes.
            probe: "rademacher" or "gaussian".

        Returns:
            Scalar, or ``(batch,)``.
        """
        self._square("trace")
        return self._estimate(n_probes, seed, probe, lambda w, jw: (w * jw).sum(-1))

    def diagonal(self, n_probes: int = 64, *, seed: int = 0, probe: Probe = "rademacher") -> Estimate:
        """Diagonal of a square J: exact from n products if n is at most ``n_probes``, else Hutchinson's estimate.

        Args:
            n_probes: Products to take.
            seed: Key of the probes.
            probe: "rademacher" or "gaussian".

        Returns:
            ``(n,)`` or ``(batch, n)``.
        """
        self._square("diagonal")
        return self._estimate(n_probes, seed, probe, lambda w, jw: w * jw)

    def frobenius_norm(self, n_probes: int = 64, *, seed: int = 0, probe: Probe = "rademacher") -> Estimate:
        """Frobenius norm: exact from n products if n is at most ``n_probes``, else from the estimate of its square.

        The square is unbiased; its root is low by about half its relative variance. The error is carried over.

        Args:
            n_probes: Products to take.
            seed: Key of the probes.
            probe: "rademacher" or "gaussian".

        Returns:
            Scalar, or ``(batch,)``.
        """
        squared = self._estimate(n_probes, seed, probe, lambda _, jw: jw.square().sum(-1), dtype=torch.float64)
        value = squared.value.sqrt()
        error = torch.where(value > 0, squared.standard_error / (2 * value), squared.standard_error)
        return Estimate(value.to(self.dtype), error.to(self.dtype), squared.n_probes, squared.exact)

    def _estimate(
        self,
        n_probes: int,
        seed: int,
        kind: Probe,
        sample: Callable[[Tensor, Tensor], Tensor],
        *,
        dtype: torch.dtype | None = None,
    ) -> Estimate:
        """Mean of ``sample(w, J w)`` over probes, or its sum over unit vectors, which is exact; sums in float64."""
        n, dtype = self.shape[-1], dtype or self.dtype
        if n_probes < 1:
            raise ValueError(f"n_probes={n_probes}; at least 1 is needed")
        if n <= n_probes:
            value = sum(
                sample(e.double(), self._forward(e).double()).sum(0)
                for e in (self._unit(start, min(COLUMNS, n - start)) for start in range(0, n, COLUMNS))
            )
            value = torch.as_tensor(value, device=self.device).to(dtype)
            return Estimate(value, torch.zeros_like(value), n, exact=True)
        running = RunningMean()
        for w in self._probes(n_probes, kind, seed):
            running.add(sample(w.double(), self._forward(w).double()))
        return running.estimate(dtype)

    def _probes(self, count: int, kind: Probe, seed: int) -> Iterator[Tensor]:
        for start in range(0, count, COLUMNS):
            w = probes(start, min(COLUMNS, count - start), self.shape[-1], kind, seed, self._x)
            yield self._spread(w)

    def _unit(self, start: int, count: int) -> Tensor:
        """Unit vectors as rows (count, [batch,] n)."""
        e = self._x.new_zeros((count, self.shape[-1]))
        e[torch.arange(count), torch.arange(start, start + count)] = 1
        return self._spread(e)

    def _spread(self, rows: Tensor) -> Tensor:
        """The same rows for every sample."""
        return rows.unsqueeze(1).expand(-1, *self.shape[:-2], -1) if self._batch else rows

    def _square(self, what: str) -> None:
        if self.shape[-1] != self.shape[-2]:
            raise ValueError(f"{what}: the Jacobian is {self.shape[-2]} x {self.shape[-1]}, not square")


class _Transposed:
    """J^T of a :class:`JacobianOperator`."""

    def __init__(self, operator: JacobianOperator) -> None:
        self._operator = operator
        self.shape = (*operator.shape[:-2], operator.shape[-1], operator.shape[-2])
        self.dtype, self.device = operator.dtype, operator.device

    def __repr__(self) -> str:
        return f"{self._operator!r}.T"

    def __matmul__(self, u: Tensor) -> Tensor:
        op = self._operator
        return op._product(u, op.shape[-2], op._reverse, "J.T @ U")

    @property
    def T(self) -> JacobianOperator:
        """J itself."""
        return self._operator

    mT = T

    def matmat(self, u: Tensor) -> Tensor:
        """``J^T U``."""
        return self @ u

    def rmatmat(self, v: Tensor) -> Tensor:
        """``J V``."""
        return self._operator @ v


class _frozen:
    """Parameters of a module need no gradient inside the block: its products are with the input alone."""

    def __init__(self, f: Any) -> None:
        self._on = [p for p in f.parameters() if p.requires_grad] if isinstance(f, nn.Module) else []

    def __enter__(self) -> None:
        for p in self._on:
            p.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for p in self._on:
            p.requires_grad_(True)
