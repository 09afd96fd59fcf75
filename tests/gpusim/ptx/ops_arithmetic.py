"""Floating-point arithmetic and comparison; add, sub, mul, min and max of integers go to ``ops_integer``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import ops_integer
from .decoder import Decoder, Lanes, Run, opcode, require
from .numeric import flush_subnormals, fma
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


def _elementwise(
    decoder: Decoder, instruction: Instruction, function: Callable[..., np.ndarray], *, flops: int = 1
) -> Run:
    """Decode ``op.type d, a, ...`` for a numpy function of the sources."""
    kind = type_of(instruction.modifiers)
    write = decoder.float_target(instruction.operands[0], kind)
    reads = [decoder.float_source(operand, kind) for operand in instruction.operands[1:]]
    flush = "ftz" in instruction.modifiers and kind.name == "f32"

    def run(m, lanes: Lanes) -> None:
        values = [read(m, lanes) for read in reads]
        if flush:
            values = [flush_subnormals(value) for value in values]
        write(m, lanes, _finish(function(*values), instruction, kind))
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
    if kind.kind == "h":  # 16-bit products and sums are exact in float64 but for a bit that the last rounding ignores
        return _elementwise(decoder, instruction, lambda x, y, z: x.astype(np.float64) * y + z, flops=2)
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
    least = instruction.opcode == "min"
    if "NaN" in instruction.modifiers:
        return _elementwise(decoder, instruction, np.minimum if least else np.maximum)
    return _elementwise(decoder, instruction, np.fmin if least else np.fmax)


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
    reads = [decoder.float_source(operand, kind) for operand in instruction.operands[1:]]
    flush = "ftz" in instruction.modifiers and kind.name == "f32"
    approximate = {"approx", "full"} & set(instruction.modifiers) or instruction.opcode == "tanh"
    result_type = np.float64 if kind.name == "f64" else np.float32

    def run(m, lanes: Lanes) -> None:
        values = [read(m, lanes) for read in reads]
        if flush:
            values = [flush_subnormals(value) for value in values]
        result = function(*(np.asarray(value, np.float64) for value in values)).astype(result_type)
        if approximate:
            result = m.fuzz(result)
        write(m, lanes, _finish(result, instruction, kind))
        _count(m, lanes, kind, 1)

    return run


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
    x, y = (decoder.float_source(operand, kind) for operand in instruction.operands[1:3])
    third = decoder.predicate(instruction.operands[3]) if combination else None

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
    x, y = (decoder.float_source(operand, compared) for operand in instruction.operands[1:3])
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
