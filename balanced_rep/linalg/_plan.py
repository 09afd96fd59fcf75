"""Which method, how wide a block, how many of them, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Options", "Plan", "has_bfloat16", "make_plan"]

PRECISIONS = ("auto", "full", "bfloat16")
ROUNDS = 5
BLOCK_MULTIPLE = 16  # the width at which products of a wide matrix with a thin one reach their speed


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
            TypeError: If k is no integer.
        """
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"randomized_svd: k is {k!r}; an integer is needed (a target error goes into tol)")
        if k < 0:
            raise ValueError(f"randomized_svd: k={k}; it must not be negative")
        if tol is not None and not 0 < tol < 1:
            raise ValueError(f"randomized_svd: tol={tol}; expected is a number between 0 and 1, or None")
        for name, value, least in (("oversampling", oversampling, 0), ("block", block, 1), ("rounds", rounds, 1)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"randomized_svd: {name}={value!r}; an integer of at least {least} is needed")
        if precision not in PRECISIONS:
            raise ValueError(f"randomized_svd: precision={precision!r}; known are {', '.join(map(repr, PRECISIONS))}")
        number, item = seed if isinstance(seed, tuple) else (seed, 0)
        if not (0 <= number < 2**64 and 0 <= item < 2**39):
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
    """

    k: int
    exact: bool
    block: int
    rounds: int
    low: torch.dtype | None


def make_plan(options: Options, long: int, short: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The method for matrices of a size: exact when small or when many triples are wanted, Krylov otherwise.

    Args:
        options: What was asked for. An explicit block or number of rounds asks for the Krylov iteration.
        long: The longer side.
        short: The shorter side.
        dtype: Of the matrix.
        device: Where it is.

    Returns:
        The plan.
    """
    k = min(options.k, short)
    width = k + options.oversampling
    asked = options.block is not None or options.rounds is not None
    block = options.block or max(round(width / (2 * BLOCK_MULTIPLE)), 1) * BLOCK_MULTIPLE
    block = min(block, short)
    most = max(short // max(block, 1), 1)
    enough = -(-k // max(block, 1))  # rounds without which there are fewer than k columns
    rounds = ROUNDS if options.tol is None else most // 2  # beyond that, everything costs less than more rounds
    rounds = min(options.rounds or max(rounds, enough + 1), most)
    rounds = max(rounds, min(enough, most))
    exact = k == 0 or enough > most or (not asked and (short <= 4 * width or 5 * k > short))
    low = None
    if dtype == torch.float32 and options.precision != "full":
        wanted = options.precision == "bfloat16" or (has_bfloat16(device) and long * short >= 2**18)
        low = torch.bfloat16 if wanted else None
    return Plan(k, exact, block, rounds, low)


def has_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are faster than those of float32 here: matrix units, not emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes: list[Any] = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(probe is not None and probe() for probe in probes)
