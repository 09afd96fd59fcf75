"""The small dense algebra between two products with A, batched and in double precision.

Vectors are rows, as in Vh: blocks of them are contiguous, and products of thin matrices faster. Rows are padded with
zeros
to whole cache lines: BLAS rounds differently where an operand does not begin at one, and a matrix of a batch would then
not come out as it does alone. Letters: B matrices; l rows of length n, a basis; b rows of a new block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from balanced_rep.ops import philox_normal
from balanced_rep.ops._registry import forced_backend, missing
from balanced_rep.ops.gram_eigh import GRAM_EIGH

__all__ = [
    "aligned",
    "double",
    "eigh_descending",
    "gaussian",
    "has_extension",
    "orthonormal_rows",
    "orthonormalise",
    "padded",
    "positive_pivots",
    "product",
    "real",
    "squares",
    "thin_svd",
]

LINE = 64  # bytes of a cache line
PAD = 8  # float64 numbers in one
THIN = 64  # rows or columns of a product up to which a BLAS library is not faster
SMALL = 1e-290  # a singular value above those of a zero matrix

DEPENDENT = 1e-7  # of a column's length: what is left of it below this is rounding of a float32 product
STREAM_BITS = 40  # items below 2^40; above them the number of the stream of random numbers


def double(dtype: torch.dtype) -> torch.dtype:
    """float64, or complex128 for a complex type."""
    return torch.complex128 if dtype.is_complex else torch.float64


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the magnitude of such a number."""
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def gaussian(items: Tensor, b: int, n: int, *, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Standard normal blocks ``(B, b, n)``, keyed by (seed, item): the same whatever else is in the batch.

    Args:
        items: Numbers of the matrices, int64 ``(B,)``.
        b: Rows.
        n: Their length.
        seed: Key.
        stream: Which of several independent blocks of the same item.
        dtype: Of the result; a complex one has zero imaginary part.

    Returns:
        The blocks.
    """
    return philox_normal(items + (stream << STREAM_BITS), b * n, seed=seed).view(-1, b, n).to(dtype)


def padded(X: Tensor) -> Tensor:
    """``X`` with zeros behind each row, so that every row begins with a cache line (if the whole does)."""
    extra = -X.shape[-1] % PAD
    return torch.nn.functional.pad(X, (0, extra)) if extra else X


def aligned(X: Tensor) -> Tensor:
    """``X (B, r, c)``, copied if a matrix of it does not begin with a cache line, in the same order."""
    if X.device.type != "cpu" or X.numel() == 0:
        return X
    size = X.element_size()
    step = X.stride(0) * size if X.shape[0] > 1 else 0
    if X.data_ptr() % LINE == 0 and step % LINE == 0:
        return X
    per_line = LINE // size
    inner = X if X.stride(-1) == 1 else X.mT
    rows, columns = inner.shape[-2:]
    room = -(-rows * columns // per_line) * per_line
    flat = X.new_empty((X.shape[0], room))
    copy = flat[:, : rows * columns].unflatten(1, (rows, columns))
    copy.copy_(inner)
    return copy if inner is X else copy.mT


def product(X: Tensor, Y: Tensor) -> Tensor:
    """``X Y``, each item as it would come out alone; rows are padded.

    Thin ones of float64 numbers on the CPU are products of our own, side by side: a BLAS library wakes its threads for
    every item, for less work than that takes. Of the others, a batched BLAS call may split the sums of one product over
    threads and not those of several; with an output whose rows have gaps torch multiplies item by item, in C++.

    Args:
        X: ``(B, r, l)``.
        Y: ``(B, l, c)``.

    Returns:
        ``(B, r, c)``.
    """
    if X.device.type != "cpu":
        return torch.bmm(X, Y)
    if _is_thin(X, Y):
        out = X.new_empty((*X.shape[:2], Y.shape[-1]))
        turned = Y.stride(-1) != 1
        _double_products(X.contiguous(), Y.mT if turned else Y, out, transposed=turned)
        return out
    if X.shape[1] == 1:  # a single row has no gaps
        return product(torch.nn.functional.pad(X, (0, 0, 0, 1)), Y)[:, :1]
    columns = Y.shape[-1]
    line = LINE // X.element_size()
    out = X.new_empty((X.shape[0], X.shape[1], (columns // line + 1) * line))[..., :columns]
    return torch.bmm(X, Y, out=out)


def _is_thin(X: Tensor, Y: Tensor) -> bool:
    return (
        X.dtype == Y.dtype == torch.float64
        and X.device.type == "cpu"
        and min(X.shape[1], Y.shape[-1]) <= THIN
        and 1 in Y.stride()[1:]
        and not (X.is_neg() or Y.is_neg() or (torch.is_grad_enabled() and (X.requires_grad or Y.requires_grad)))
        and has_extension()
    )


def has_extension() -> bool:
    """Whether the C++ kernels may be used, and are there."""
    return forced_backend() in (None, "cpp") and missing("balanced_rep._C") is None


def _double_products(*args: Any, **options: Any) -> None:
    from balanced_rep.ops._cpp import double_products  # the extension: not before it is needed

    double_products(*args, **options)


def eigh_descending(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors of positive semidefinite matrices.

    On CUDA by the batched kernel where it takes them. LAPACK gets them padded to a multiple of four with eigenvalues
    below all others, which leaves the rest untouched.

    Args:
        G: ``(..., l, l)``.

    Returns:
        ``(..., l)`` and ``(..., l, l)``.
    """
    if G.device.type == "cuda" and forced_backend() in (None, "cuda"):
        flat = G.reshape(-1, *G.shape[-2:])
        if GRAM_EIGH.why_not("cuda", flat) is None:
            values, rows = GRAM_EIGH(flat)
            return values.view(G.shape[:-1]), rows.view(G.shape).mT
    size = G.shape[-1]
    extra = -size % 4
    if extra:
        diagonal = G.diagonal(dim1=-2, dim2=-1).real
        below = -diagonal.mean(-1, keepdim=True) - torch.finfo(diagonal.dtype).tiny
        G = torch.nn.functional.pad(G, (0, extra, 0, extra))
        G.diagonal(dim1=-2, dim2=-1)[..., size:] = below
    with _without_nan(G):
        values, vectors = torch.linalg.eigh(G)
    return values.flip(-1)[..., :size], vectors.flip(-1)[..., :size, :size]


@contextmanager
def _without_nan(X: Tensor) -> Iterator[None]:
    """Says of LAPACK's refusal ("failed to converge", "ill-conditioned") when NaN is behind it."""
    try:
        yield
    except RuntimeError as error:
        if bool(X.isfinite().all()):
            raise
        raise ValueError(
            "products with NaN or infinity have no singular values; check_finite=True names them"
        ) from error


def thin_svd(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triples of ``M = rows^H``, by QR and an SVD of the triangle.

    The triangle is padded to a multiple of four with singular values above all others, which are dropped.

    Args:
        rows: ``(B, l, n)``, padded, with l at most n; float64 or complex128.

    Returns:
        Uh ``(B, l, n)``, S ``(B, l)``, Vh ``(B, l, l)``.
    """
    Q, T = torch.linalg.qr(rows.mH)
    size = T.shape[-1]
    extra = -size % 4
    if extra:
        above = 2 * torch.linalg.matrix_norm(T)
        T = torch.nn.functional.pad(T, (0, extra, 0, extra))
        T.diagonal(dim1=-2, dim2=-1)[..., size:] = torch.where(above > 0, above, SMALL).unsqueeze(-1).to(T.dtype)
    with _without_nan(T):
        W, S, Yh = torch.linalg.svd(T)
    W, S, Yh = W[..., :size, extra:], S[..., extra:], Yh[..., extra:, :size]
    S = torch.where(torch.linalg.vector_norm(rows, dim=(-2, -1)).unsqueeze(-1) > 0, S, 0.0)
    return product(W.mH, Q.mH), S, Yh


def orthonormalise(W: Tensor, basis: Tensor | None, spare: Callable[[], Tensor]) -> Tensor:
    """Rows that are orthonormal, orthogonal to ``basis``, and span what ``W`` adds to it.

    Scale, project, orthonormalise through the Gram matrix, and then project and orthonormalise once more: without the
    second time, a block that is nearly contained in the basis keeps rounding errors that point into it, and all
    orthogonality is lost within a few blocks. Directions of which only rounding is left are replaced by ``spare`` ones.
    Thin blocks of float64 rows on the CPU have a kernel, with Cholesky factors, for those that are far from dependent.

    Args:
        W: ``(B, b, n)``, any float dtype, b at most n minus the rows of the basis.
        basis: ``(B, l, n)`` with orthonormal rows, double precision, padded.
        spare: Gives ``(B, b, n)`` random rows; called if any are needed.

    Returns:
        ``(B, b, n)``, double precision, padded.

    Raises:
        ValueError: If there is no room for b further rows.
    """
    held = 0 if basis is None else basis.shape[1]
    if W.shape[1] + held > W.shape[2]:
        raise ValueError(f"orthonormalise: {W.shape[1]} rows beside {held} do not fit into {W.shape[2]} dimensions")
    W = padded(W.to(double(W.dtype)).contiguous())
    if not _has_cholesky(W, basis):
        return _orthonormalise(W, basis, spare)
    rows, done = _by_cholesky(W, basis)
    if not bool(done.all()):
        index = (~done).nonzero().squeeze(-1)
        rows[index] = _orthonormalise(W[index], None if basis is None else basis[index], lambda: spare()[index])
    return rows


def _has_cholesky(W: Tensor, basis: Tensor | None) -> bool:
    return (
        W.dtype == torch.float64
        and W.device.type == "cpu"
        and 0 < W.shape[1] <= THIN
        and (basis is None or basis.stride(-1) == 1)
        and has_extension()
    )


def _by_cholesky(W: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    from balanced_rep.ops._cpp import orthonormalise  # the extension: not before it is needed

    return orthonormalise(W, basis)


def _orthonormalise(W: Tensor, basis: Tensor | None, spare: Callable[[], Tensor]) -> Tensor:
    """The same for padded rows of any rank, by eigenvectors of the Gram matrix."""
    W = _project_out(_unit_rows(W), basis)
    values, vectors = eigh_descending(product(W, W.mH))
    alive = values > DEPENDENT**2
    scale = torch.where(alive, values.clamp_min(DEPENDENT**2).rsqrt(), 0.0)
    W = product((vectors * scale.unsqueeze(-2)).mH, W)
    if not bool(alive.all()):
        W = W + _unit_rows(_project_out(padded(spare().to(W.dtype)), basis)) * ~alive.unsqueeze(-1)
        # Random rows in what little room may be left are far from orthogonal: once more, where there are any.
        again = _whitened(_project_out(W.clone(), basis))
        W = torch.where(alive.all(-1)[:, None, None], W, again)
    return _whitened(_project_out(W, basis))


def _whitened(W: Tensor) -> Tensor:
    values, vectors = eigh_descending(product(W, W.mH))
    scale = values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt()
    return product((vectors * scale.unsqueeze(-2)).mH, W)


def _unit_rows(W: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(W, dim=-1, keepdim=True)
    return W / torch.where(length > 0, length, 1.0)


def _project_out(W: Tensor, basis: Tensor | None) -> Tensor:
    """``W`` less its part in the basis; overwritten."""
    if basis is None:
        return W
    inside = product(W, basis.mH)
    if basis.stride(-1) != 1 or not _is_thin(inside, basis):
        return W - product(inside, basis)
    _double_products(inside.neg_(), basis, W, transposed=False, add=True)
    return W


def orthonormal_rows(R: Tensor) -> Tensor:
    """The nearest thing to ``R`` with orthonormal rows that keeps their order: Householder QR, never singular.

    A zero row becomes an arbitrary one, orthogonal to the others.

    Args:
        R: ``(B, k, m)`` with m at least k, padded.

    Returns:
        ``(B, k, m)``.
    """
    Q, T = torch.linalg.qr(R.mH)
    pivot = T.diagonal(dim1=-2, dim2=-1)
    return (Q * torch.where(pivot.abs() > 0, pivot.sgn(), 1).unsqueeze(-2)).mH


def positive_pivots(Uh: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Fixes the sign (phase) of each pair: the entry of largest magnitude of each row of Vh becomes positive.

    Of entries that agree to about the square root of the precision the first counts, so that rounding does not choose.

    Args:
        Uh: ``(B, k, m)``.
        Vh: ``(B, k, n)``.

    Returns:
        Uh and Vh.
    """
    if Vh.shape[-2] == 0 or Vh.shape[-1] == 0:
        return Uh, Vh
    size = squares(Vh)
    near = size >= size.amax(-1, keepdim=True) * (1 - torch.finfo(Vh.dtype).eps ** 0.5) ** 2
    pivot = Vh.gather(-1, near.to(torch.int8).argmax(-1, keepdim=True))  # argmax takes the first
    if not Vh.is_complex():
        turn = torch.where(pivot != 0, pivot.sgn(), 1)
        return Uh * turn, Vh * turn
    length = squares(pivot).sqrt()
    alive = length > 0
    length = torch.where(alive, length, 1.0)
    turn = torch.where(alive, pivot.real / length, 1.0), torch.where(alive, -pivot.imag / length, 0.0)
    return _rotated(Uh, *turn), _rotated(Vh, *turn)


def squares(X: Tensor) -> Tensor:
    """Squared magnitudes, in real operations (see _rotated)."""
    return X.real.square() + X.imag.square() if X.is_complex() else X.square()


def _rotated(X: Tensor, real: Tensor, imag: Tensor) -> Tensor:
    """``X`` times complex numbers."""
    # Not by torch's complex product: it rounds differently where a row of vector registers ends, so that a matrix of a
    # batch would not come out as it does alone.
    return torch.complex(X.real * real - X.imag * imag, X.real * imag + X.imag * real)
