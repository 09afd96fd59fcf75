"""What every decomposition of this package returns: (U, S, Vh), and beside it how well it is known."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["ConvergenceWarning", "SVDInfo", "SVDResult"]


class ConvergenceWarning(UserWarning):
    """A tolerance was not reached, with ``info.converged`` false, or a gradient goes through inaccurate triples.

    What is returned is the best that was found.
    """


@dataclass(frozen=True)
class SVDInfo:
    r"""How a decomposition was found and how good it is. Tensors have the batch dims of the input.

    Attributes:
        rank: Singular values above rounding level, at most the number returned.
        rel_error: Certificate: the Frobenius norm of ``A - U S Vh`` over that of A.
        tight: Where true, ``rel_error`` is the error to 1 %; elsewhere it is an upper bound.
        converged: Whether ``tol`` was reached; true if none was given. False where the triples are NaN.
        rounds: Blocks of the Krylov space, that is, sequential steps; 0 for an exact method.
        passes: Dense: products with A or its transpose, each of which reads A once. Operators and Jacobians: columns
            that A or its transpose was applied to, each of which is a tangent or cotangent through the network.
        method: "krylov", "gram", "svd", or for a Jacobian "jvp" or "jvp+vjp".
        seed: The seed that gives the same result again.
        residuals: For Jacobians, :math:`\|J^T u_i - s_i v_i\|` of each triple; None elsewhere.
        asymmetry: For square Jacobians, :math:`\|J \Omega - J^T \Omega\| / \|J \Omega + J^T \Omega\|`, which
            estimates :math:`\|J - J^T\| / \|J + J^T\|`; None where it was not measured.
        notes: What else was done, in words: a k that was too large, for example.
    """

    rank: Any
    rel_error: Any
    tight: Any
    converged: Any
    rounds: Any
    passes: Any
    method: str
    seed: int
    residuals: Any = None
    asymmetry: Any = None
    notes: tuple[str, ...] = field(default=())

    def map(self, f: Any) -> SVDInfo:
        """The same with ``f`` applied to every tensor."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: f(value) for name, value in values.items() if isinstance(value, Tensor)})


class _Triple(NamedTuple):
    U: Any
    S: Any
    Vh: Any


class SVDResult(_Triple):
    """``U, S, Vh = result``, with ``result.info``.

    ``A`` is about ``U @ diag(S) @ Vh``: U ``(..., m, k)`` and Vh ``(..., k, n)`` have orthonormal columns and rows, S
    ``(..., k)`` falls. Of each right vector, the entry of largest magnitude is positive (the first, where several
    agree to rounding), whatever the shape of A: the transpose of A has the same rule for *its* right vectors.

    Attributes:
        U: Left singular vectors.
        S: Singular values.
        Vh: Right singular vectors, as rows.
        info: Rank, certificate, cost.
    """

    info: SVDInfo

    def __new__(cls, U: Any, S: Any, Vh: Any, info: SVDInfo | None = None) -> SVDResult:
        """Puts ``info`` beside the tuple."""
        self = super().__new__(cls, U, S, Vh)
        if info is not None:  # unpickling sets it afterwards
            self.info = info
        return self

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={tuple(value.shape)}" for name, value in zip("U S Vh".split(), self, strict=True))
        return f"SVDResult({shapes}, info={getattr(self, 'info', None)})"

    def reconstruct(self) -> Any:
        """``U @ diag(S) @ Vh``."""
        return (self.U * self.S[..., None, :]) @ self.Vh
