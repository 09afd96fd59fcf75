"""Which method, how wide a block, how many of them, and in which precision."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from balanced_rep.kernels._supports import MAX_WIDTH
from balanced_rep.ops._registry import missing

__all__ = ["Options", "Plan", "as_integer", "as_share", "full_precision", "has_bfloat16", "make_plan", "wide_plan"]

PRECISIONS = ("auto", "full", "bfloat16")
ROUNDS = 5
NARROW_ROUNDS = 9  # of blocks half as wide: as many products with vectors, and a smaller error
LIKE_POWER = 3  # rounds beyond niter that are as accurate as niter power iterations, on the spectra of bench_svd.py ...
LIKE_POWER_NARROW = 6  # ... and of blocks half as wide
LOW_TOL = 1e-3  # the least tol that rounds in bfloat16, of 8 bits, come to
WIDE_MULTIPLE = 4  # vectors of a tile
BLOCK_MULTIPLE = 16  # the width at which products of a wide matrix with a thin one reach their speed


def as_integer(what: str, value: Any, least: int, hint: str = "") -> int:
    """An argument that counts, from whatever is an integer: of numpy and torch too.

    Args:
        what: Function and argument, for messages.
        value: As it was given.
        least: The smallest that makes sense.
        hint: Behind the message about a wrong type.

    Returns:
        The integer.

    Raises:
        TypeError: If it is none.
        ValueError: If it is too small.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{what}={value!r}; an integer of at least {least} is needed{hint}")
    if number < least:
        raise ValueError(f"{what}={number}; an integer of at least {least} is needed")
    return number


def as_share(what: str, value: Any, hint: str = "") -> float:
    """An argument between 0 and 1.

    Args:
        what: Function and argument, for messages.
        value: As it was given.
        hint: What else is accepted.

    Returns:
        The number.

    Raises:
        TypeError: If it is none.
        ValueError: If it is out of range.
    """
    try:
        number = None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError):  # torch has the last for more numbers than one
        number = None
    if number is None:
        raise TypeError(f"{what}={value!r}; expected is a number between 0 and 1{hint}")
    if not 0 < number < 1:
        raise ValueError(f"{what}={number}; expected is a number between 0 and 1{hint}")
    return number


@dataclass(frozen=True)
class Options:
    """The keyword arguments of :func:`balanced_rep.randomized_svd`, checked.

    Attributes:
        k: Triples wanted.
        tol: Stop rule.
        oversampling: Columns beyond k.
        block: Columns per round.
        rounds: Blocks, or the largest number of them.
        precision: One of :data:`PRECISIONS`.
        center: Whether column means are subtracted.
        seed: Key of the randomness.
        item: Number of the first matrix.
        check_finite: Whether NaN and infinities are refused.
        niter: Power iterations whose accuracy is wanted; in place of ``rounds``.
    """

    k: int
    tol: float | None
    oversampling: int
    block: int | None
    rounds: int | None
    precision: str
    center: bool
    seed: int
    item: int
    check_finite: bool
    niter: int | None = None

    @staticmethod
    def checked(
        k: int,
        tol: float | None,
        oversampling: int,
        block: int | None,
        rounds: int | None,
        precision: str,
        center: bool,
        seed: int | tuple[int, int],
        check_finite: bool,
    ) -> Options:
        """Options from arguments as they were given.

        Returns:
            The options.

        Raises:
            ValueError: If one is out of range.
            TypeError: If a number that counts is no integer.
        """
        k = as_integer("randomized_svd: k", k, 0, " (a target error goes into tol)")
        tol = None if tol is None else as_share("randomized_svd: tol", tol, ", or None")
        oversampling = as_integer("randomized_svd: oversampling", oversampling, 0)
        block = None if block is None else as_integer("randomized_svd: block", block, 1)
        rounds = None if rounds is None else as_integer("randomized_svd: rounds", rounds, 1)
        if precision not in PRECISIONS:
            raise ValueError(f"randomized_svd: precision={precision!r}; known are {', '.join(map(repr, PRECISIONS))}")
        if precision == "bfloat16" and tol is not None and tol < LOW_TOL:
            raise ValueError(
                f"randomized_svd: precision='bfloat16' cannot tell tol={tol} from rounding; take a tol of at least "
                f"{LOW_TOL}, or precision='auto' or 'full'"
            )
        pair = seed if isinstance(seed, tuple) and len(seed) == 2 else (seed, 0)
        number, item = (as_integer("randomized_svd: seed", value, 0, ", or (seed, item)") for value in pair)
        if number >= 2**64 or item >= 2**39:
            raise ValueError(
                f"randomized_svd: seed={seed!r}; expected is 0 to 2^64 - 1, or (seed, item) with an item below 2^39"
            )
        return Options(k, tol, oversampling, block, rounds, precision, center, number, item, check_finite)


@dataclass(frozen=True)
class Plan:
    """What is done with a matrix of one size.

    Attributes:
        k: Triples, at most the shorter side.
        exact: Whether all singular values are computed.
        block: Columns per round.
        rounds: Blocks.
        low: Precision of the rounds before the last pass; None for that of the matrix.
        may_widen: Whether blocks may become wider where they turn out to be too narrow.
    """

    k: int
    exact: bool
    block: int
    rounds: int
    low: torch.dtype | None
    may_widen: bool


def make_plan(
    options: Options, long: int, short: int, dtype: torch.dtype, device: torch.device, *, columns: bool = False
) -> Plan:
    """The method for matrices of a size: exact when small or when many triples are wanted, Krylov otherwise.

    Args:
        options: What was asked for. An explicit block or number of rounds asks for the Krylov iteration, where it fits.
        long: The longer side.
        short: The shorter side.
        dtype: Of the matrix.
        device: Where it is.
        columns: Whether those of the longer side lie in one piece, and not its rows.

    Returns:
        The plan.
    """
    k = min(options.k, short)
    width = k + options.oversampling
    asked = options.block is not None or options.rounds is not None
    block = options.block or max(round(width / (2 * BLOCK_MULTIPLE)), 1) * BLOCK_MULTIPLE
    kernel = options.precision != "bfloat16" and _has_kernel(dtype, device, block, columns)
    narrow = kernel and options.tol is None and options.block is None
    block = min(block // 2 if narrow else block, short)
    most = max(short // max(block, 1), 1)
    enough = -(-k // max(block, 1))  # rounds without which there are fewer than k columns
    if options.niter is not None:
        rounds = options.niter + (LIKE_POWER_NARROW if narrow else LIKE_POWER)
    elif options.tol is None:
        rounds = NARROW_ROUNDS if narrow else ROUNDS
    else:
        rounds = most // 2  # beyond that, everything costs less than more rounds
    rounds = max(options.rounds or max(rounds, enough + 1), enough)
    over = options.tol is None and rounds * block > short  # all of it, and more
    exact = k == 0 or enough > most or over or (not asked and (short <= 4 * width or 5 * k > short))
    rounds = min(rounds, most)
    low = None
    if dtype == torch.float32 and options.precision != "full":
        reaches = options.tol is None or options.tol >= LOW_TOL
        wanted = options.precision == "bfloat16" or (
            reaches and not kernel and has_bfloat16(device) and long * short >= 2**18
        )
        low = torch.bfloat16 if wanted else None
    # Fewer than two power iterations are not done when they end, on any matrix.
    may_widen = options.tol is None and low is None and not asked and (options.niter is None or options.niter >= 2)
    return Plan(k, exact, block, rounds, low, may_widen)


def wide_plan(plan: Plan, options: Options, short: int) -> Plan:
    """Blocks as wide as those of power iteration, which tell k values apart however near each other they are.

    Args:
        plan: With narrower ones.
        options: What was asked for.
        short: The shorter side.

    Returns:
        The plan; its Krylov space holds all that ``options.niter`` power iterations find.
    """
    block = min(-(-(plan.k + options.oversampling) // WIDE_MULTIPLE) * WIDE_MULTIPLE, short)
    rounds = min(max(ROUNDS, (options.niter or 0) + 1), max(short // block, 1))
    return replace(plan, block=block, rounds=rounds)


def _has_kernel(dtype: torch.dtype, device: torch.device, block: int, columns: bool) -> bool:
    """Whether products with so many vectors are those of our kernel for rows that lie in one piece.

    It reads a float32 matrix once for two products, in less time than two with a bfloat16 copy take, and products with
    8 vectors take half the time of those with 16, which no BLAS library gives. Half as wide blocks of twice their
    number then are more accurate for the same work. A forced backend changes nothing here: backends are to be compared
    on the same rounds.

    Args:
        dtype: Of the matrix.
        device: Where.
        block: Vectors.
        columns: Whether columns lie in one piece, and not rows.

    Returns:
        The answer.
    """
    return (
        dtype == torch.float32
        and device.type == "cpu"
        and block <= MAX_WIDTH
        and not columns
        and missing("balanced_rep._C") is None
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether there are units for products of bfloat16 matrices.

    Args:
        device: Where.

    Returns:
        The answer.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes: list[Any] = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(probe is not None and probe() for probe in probes)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in the precision of their dtype: the certificate rests on it.

    Autocast, and the switches that let torch round the operands of float32 products, are off inside.
    """
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
