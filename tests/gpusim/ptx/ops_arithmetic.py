"""Floating-point arithmetic and comparison; add, sub, mul, min and max of integers go to ``ops_integer``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import ops_integer
from .decoder import Decoder, Lanes, Read, Run, opcode, require
from .numeric import flush_subnormals, fma, fma_rounded_to_odd, fmax, fmin
from .parser import Instruction
from .types import TYPES, Type, type_of

ROUNDING = ("rn", "ftz")  # directed rounding of sums and products is not modelled


def _finish(values: np.ndarray, instruction: Instruction, kind: Type) -> np.ndarray:
    """Apply ``.sat``, ``.relu`` and ``.ftz`` to a result."""
    if "sat" in instruction.modifiers:
        values = np.clip(np.where(np.isnan(values), 0, values), 0, 1).astype(values.dtype)
    if "relu" in instruction.modifiers:
        values = np.where(np.isnan(values), values, np.maximum(values, 0)).astype(values.dtype)
    if "ftz" in instruction.modifiers and kind.name == "f32":
        values = flush_subnormals(values)
    return values


def _count(m, lanes: Lanes, kind: Type, flops: int) -> None:
    pair = 2 if kind.name.endswith("x2") else 1
    m.counters.flops[kind.name.removesuffix("x2")] += flops * pair * m.count(lanes)


def _float_source(decoder: Decoder, instruction: Instruction, operand: str, kind: Type) -> Read:
    """Return a reader of a source, with subnormals flushed where ``.ftz`` says so."""
    read = decoder.float_source(operand, kind)
    flush = "ftz" in instruction.modifiers and kind.name == "f32"
    return (lambda m, lanes: flush_subnormals(read(m, lanes))) if flush else read


def _elementwise(
    decoder: Decoder, instruction: Instruction, function: Callable[..., np.ndarray], *, flops: int = 1
) -> Run:
    """Decode ``op.type d, a, ...`` for a numpy function of the sources."""
    kind = type_of(instruction.modifiers)
    write = decoder.float_target(instruction.operands[0], kind)
    reads = [_float_source(decoder, instruction, operand, kind) for operand in instruction.operands[1:]]

    finishes = not {"sat", "relu", "ftz"}.isdisjoint(instruction.modifiers)

    def run(m, lanes: Lanes) -> None:
        values = function(*[read(m, lanes) for read in reads])
        write(m, lanes, _finish(values, instruction, kind) if finishes else values)
        if flops:
            _count(m, lanes, kind, flops)

    return run


@opcode("add", "sub", "mul")
def _add_sub_mul(decoder: Decoder, instruction: Instruction) -> Run:
    if not type_of(instruction.modifiers).is_float:
        return ops_integer.add_sub_mul(decoder, instruction)
    require(instruction, *ROUNDING, "sat")
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[instruction.opcode]
    return _elementwise(decoder, instruction, function)


@opcode("fma", "mad")
def _fma(decoder: Decoder, instruction: Instruction) -> Run:
    kind = type_of(instruction.modifiers)
    if not kind.is_float:
        return ops_integer.mad(decoder, instruction)
    require(instruction, *ROUNDING, "sat", "relu")
    if kind.kind == "h":
        return _elementwise(decoder, instruction, fma_rounded_to_odd, flops=2)
    return _elementwise(decoder, instruction, fma, flops=2)


@opcode("div")
def _div(decoder: Decoder, instruction: Instruction) -> Run:
    if not type_of(instruction.modifiers).is_float:
        return ops_integer.div(decoder, instruction)
    require(instruction, *ROUNDING, "approx", "full")
    if {"approx", "full"} & set(instruction.modifiers):
        return _approximate(decoder, instruction, np.divide)
    return _elementwise(decoder, instruction, np.divide)


@opcode("min", "max")
def _min_max(decoder: Decoder, instruction: Instruction) -> Run:
    if not type_of(instruction.modifiers).is_float:
        return ops_integer.min_max(decoder, instruction)
    require(instruction, "ftz", "NaN")
    if len(instruction.operands) != 3:
        raise KeyError("three inputs")
    keep_nan = "NaN" in instruction.modifiers
    function = fmin if instruction.opcode == "min" else fmax
    return _elementwise(decoder, instruction, lambda x, y: function(x, y, keep_nan=keep_nan))


@opcode("neg", "abs")
def _neg_abs(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, "ftz")
    function = np.negative if instruction.opcode == "neg" else np.abs
    if not type_of(instruction.modifiers).is_float:
        return ops_integer.unary(decoder, instruction, function)
    return _elementwise(decoder, instruction, function, flops=0)


@opcode("copysign")
def _copysign(decoder: Decoder, instruction: Instruction) -> Run:
    return _elementwise(decoder, instruction, lambda sign, value: np.copysign(value, sign), flops=0)


@opcode("testp")
def _testp(decoder: Decoder, instruction: Instruction) -> Run:
    kind = type_of(instruction.modifiers)
    read, write = decoder.source(instruction.operands[1], kind), decoder.target(instruction.operands[0])
    smallest = np.finfo(kind.dtype).tiny
    tests: dict[str, Callable] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda x: ~np.isnan(x),
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= smallest),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < smallest),
    }
    test = tests[instruction.modifiers[0]]
    return lambda m, lanes: write(m, lanes, test(read(m, lanes)))


# ---------------------------------------------------------------------------------------------- transcendental


def _approximate(decoder: Decoder, instruction: Instruction, function: Callable) -> Run:
    """Decode an instruction whose result is approximate: the exact value, perturbed when fuzzing."""
    kind = type_of(instruction.modifiers)
    write = decoder.float_target(instruction.operands[0], kind)
    reads = [_float_source(decoder, instruction, operand, kind) for operand in instruction.operands[1:]]
    approximate = {"approx", "full"} & set(instruction.modifiers) or instruction.opcode == "tanh"
    if approximate and kind.name == "f64":
        raise KeyError("approximations in float64 have 20 bits")
    result_type = np.float64 if kind.name == "f64" else np.float32
    relative, absolute = _ERRORS.get(instruction.opcode, (0.0, lambda x: 0.0))

    def run(m, lanes: Lanes) -> None:
        values = [np.asarray(read(m, lanes), np.float64) for read in reads]
        result = function(*values).astype(result_type)
        if approximate:
            result = m.fuzz(result, relative, absolute(values[0]))
        write(m, lanes, _finish(result, instruction, kind))
        _count(m, lanes, kind, 1)

    return run


# Errors beyond an ulp or two that the PTX manual allows: relative, and absolute as a function of the argument.
_ERRORS: dict[str, tuple[float, Callable]] = {
    "tanh": (2.0**-11, lambda x: 0.0),
    "lg2": (2.0**-22, lambda x: np.where((x > 0.5) & (x < 2), 2.0**-22, 0.0)),
    "sin": (0.0, lambda x: np.where(np.abs(x) <= 2 * np.pi, 2.0**-20.5, 2.0**-14.7)),
    "cos": (0.0, lambda x: np.where(np.abs(x) <= 2 * np.pi, 2.0**-20.5, 2.0**-14.7)),
}

_FUNCTIONS: dict[str, Callable] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@opcode(*_FUNCTIONS)
def _transcendental(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, *ROUNDING, "approx")
    return _approximate(decoder, instruction, _FUNCTIONS[instruction.opcode])


# -------------------------------------------------------------------------------------------------- comparison

_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compare; with a NaN, ordered comparisons are false and the ``u`` ones true."""
    if name in {"num", "nan"}:
        either = np.isnan(x) | np.isnan(y)
        return either if name == "nan" else ~either
    name = _UNSIGNED_NAMES.get(name, name)
    result = _COMPARISONS[name[:2]](x, y)
    if np.asarray(x).dtype.kind == "f":
        either = np.isnan(x) | np.isnan(y)
        result = result | either if name.endswith("u") else result & ~either
    return result


@opcode("setp")
def _setp(decoder: Decoder, instruction: Instruction) -> Run:
    kind = type_of(instruction.modifiers)
    name = instruction.modifiers[0]
    combination = next((word for word in instruction.modifiers[1:] if word in _COMBINATIONS), None)
    require(instruction, name, *_COMBINATIONS, "ftz")
    targets = [decoder.target(operand) for operand in instruction.operands[0].split("|")]
    x, y = (_float_source(decoder, instruction, operand, kind) for operand in instruction.operands[1:3])
    third = decoder.predicate(instruction.operands[3]) if combination else None
    if third is not None and kind.name.endswith("x2"):
        raise KeyError(f"{combination} of pairs")

    def run(m, lanes: Lanes) -> None:
        result = _compare(name, x(m, lanes), y(m, lanes))
        results = [result, ~result]
        if third is not None:
            results = [_COMBINATIONS[combination](value, third(m, lanes)) for value in results]
        if result.ndim == 2:  # f16x2: one predicate per half
            results = [results[0][:, 0], results[0][:, 1]]
        for write, value in zip(targets, results, strict=False):
            write(m, lanes, value)

    return run


@opcode("set")
def _set(decoder: Decoder, instruction: Instruction) -> Run:
    name = instruction.modifiers[0]
    require(instruction, name, "ftz")
    made, compared = (TYPES[word] for word in instruction.modifiers if word in TYPES)
    write = decoder.target(instruction.operands[0])
    x, y = (_float_source(decoder, instruction, operand, compared) for operand in instruction.operands[1:3])
    true = {"f32": np.float32(1), "f16": np.float16(1)}.get(made.name, made.raw.type((1 << made.bits) - 1))
    if made.name not in {"f32", "f16", "u32", "s32"}:
        raise KeyError(f"set to {made.name}")
    zero = true.dtype.type(0)
    return lambda m, lanes: write(m, lanes, np.where(_compare(name, x(m, lanes), y(m, lanes)), true, zero))


@opcode("selp")
def _selp(decoder: Decoder, instruction: Instruction) -> Run:
    kind = type_of(instruction.modifiers)
    write = decoder.target(instruction.operands[0])
    x, y = (decoder.source(operand, kind) for operand in instruction.operands[1:3])
    chosen = decoder.predicate(instruction.operands[3])
    return lambda m, lanes: write(m, lanes, np.where(chosen(m, lanes), x(m, lanes), y(m, lanes)))


@opcode("slct")
def _slct(decoder: Decoder, instruction: Instruction) -> Run:
    require(instruction, "ftz")
    kind, compared = (TYPES[word] for word in instruction.modifiers if word in TYPES)
    write = decoder.target(instruction.operands[0])
    x, y = (decoder.source(operand, kind) for operand in instruction.operands[1:3])
    sign = decoder.source(instruction.operands[3], compared)
    return lambda m, lanes: write(m, lanes, np.where(sign(m, lanes) >= 0, x(m, lanes), y(m, lanes)))
