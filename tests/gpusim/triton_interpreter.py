"""Makes Triton's interpreter honest about half precision, TF32 and masked loads.

Under ``TRITON_INTERPRET=1`` Triton 3.9 keeps bfloat16 as ``uint16``, and

* sums and multiplies bfloat16 *bit patterns* (a dot product comes out wrong by a factor of 1e9),
* rounds float32 to bfloat16 by truncation where the hardware rounds to nearest even,
* multiplies TF32 operands in full float32, which hides the 7e-4 error a user will see,
* fills masked-off lanes with zero where the hardware promises nothing,

all without a word. :func:`honest_interpreter` mends the first three in ``tl.dot`` and the conversions, poisons the
fourth, and refuses arithmetic on half-precision values, which the package's kernels never do: they convert to float32
right after the load.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import numpy as np

BF16_NAN = np.uint16(0x7FC0)
TF32_MASK = np.uint32(0xFFFFE000)


class HalfArithmeticError(TypeError):
    """A kernel computed on float16 or bfloat16 values instead of converting them to float32 first."""


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bit patterns to float32, exactly."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bit patterns, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), BF16_NAN, rounded.astype(np.uint16))


def truncate_to_tf32(values: np.ndarray) -> np.ndarray:
    """Keep the 19 bits of a float32 that a TF32 tensor core reads."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & TF32_MASK).view(np.float32)


def require_interpreter() -> None:
    """Check that kernels decorated from now on will be interpreted.

    Raises:
        RuntimeError: If ``TRITON_INTERPRET`` was not set before Triton's own library was imported.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.sum, InterpretedFunction):
        raise RuntimeError(
            f"Triton is not in interpreter mode (TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')!r}): "
            "set TRITON_INTERPRET=1 before the first `import triton`"
        )


@contextlib.contextmanager
def honest_interpreter(*, refuse_half_arithmetic: bool = True) -> Iterator[None]:
    """Patch Triton's interpreter for the length of a ``with`` block.

    Args:
        refuse_half_arithmetic: Raise :class:`HalfArithmeticError` on any arithmetic, comparison or reduction of
            float16 or bfloat16 values. Loads, stores, conversions, selections and ``tl.dot`` stay allowed.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patches: list[tuple[object, str, Callable]] = [
        (builder, "create_dot", _honest_dot(interpreter, builder.create_dot)),
        (builder, "create_masked_load", _poisoned_load(interpreter, builder.create_masked_load)),
        (interpreter, "_convert_float", _honest_convert(interpreter._convert_float)),
        (interpreter.ReduceOps, "generic_reduce", _tree_reduce),
        (interpreter, "_patch_lang", _patched_once(interpreter._patch_lang)),
    ]
    if refuse_half_arithmetic:
        for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs"):
            patches.append((builder, name, _refusing_half(interpreter, getattr(builder, name))))
        for cls in (interpreter.ReduceOps, interpreter.ScanOps):
            patches.append((cls, "apply_impl", _refusing_half_inputs(cls.apply_impl)))
    saved = [(owner, name, owner.__dict__[name]) for owner, name, _ in patches]
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


def _patched_once(original: Callable) -> Callable:
    """Patch ``triton.language`` once per launch and set of modules that a function sees.

    The original does so again for every call of a function by a kernel, member by member: half of a run.
    """
    import triton.language as tl

    seen: list[set[tuple[str, ...]]] = []  # the open launch's, if any

    def patch_lang(fn):
        modules = tuple(sorted({m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core}))
        if seen:  # a call by a kernel, whose scope nobody restores
            if modules not in seen[-1]:
                seen[-1].add(modules)
                original(fn)
            return None
        scope = original(fn)
        restore = scope.restore
        seen.append({modules})

        def restored() -> None:
            seen.pop()
            restore()

        scope.restore = restored
        return scope

    return patch_lang


def _tree_reduce(self, inputs) -> list:
    """Reduce with a function of the kernel by halves, as the hardware does, instead of element by element.

    A reduction of a few thousand elements takes a second in the original, and adds them up in a line, whose rounding is
    worse than the tree's.
    """
    tensors, axis = self.unravel(inputs, self.axis)
    dtypes = [tensor.dtype for tensor in tensors]
    values = [tensor.handle.data for tensor in tensors]
    while (size := values[0].shape[axis]) > 1:  # a power of two, like every size in Triton
        halves = [np.split(value, 2, axis) for value in values]
        left, right = (
            [self.to_tensor(half[i], kind) for half, kind in zip(halves, dtypes, strict=True)] for i in (0, 1)
        )
        combined = self.combine_fn.fn(*left, *right)
        combined = combined if isinstance(combined, tuple) else (combined,)
        values = [tensor.handle.data for tensor in combined]
        assert values[0].shape[axis] == size // 2
    if not self.keep_dims:
        values = [value.item() if self.axis is None else value.squeeze(axis) for value in values]
    return [self.to_tensor(value, kind) for value, kind in zip(values, dtypes, strict=True)]


def _is_half(dtype) -> bool:
    import triton.language as tl

    return dtype.scalar in {tl.float16, tl.bfloat16}


def _float32(handle) -> np.ndarray:
    import triton.language as tl

    if handle.dtype.scalar == tl.bfloat16:
        return bf16_to_f32(handle.data)
    return handle.data.astype(np.float32)


def _honest_dot(interpreter, original: Callable) -> Callable:
    import triton.language as tl

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        kinds = {a.dtype.scalar, b.dtype.scalar}
        precision = str(input_precision).upper()
        if kinds & {tl.float16, tl.bfloat16} and kinds <= {tl.float16, tl.bfloat16}:
            product = np.matmul(_float32(a), _float32(b))
        elif kinds == {tl.float32} and "TF32" in precision and "X3" not in precision:
            product = np.matmul(truncate_to_tf32(a.data), truncate_to_tf32(b.data))
        else:
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    return create_dot


def _honest_convert(original: Callable) -> Callable:
    import triton.language as tl

    def convert(data, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            return f32_to_bf16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return bf16_to_f32(data)
        return original(data, source, target, rounding_mode)

    return convert


def _poisoned_load(interpreter, original: Callable) -> Callable:
    """Fill the masked-off lanes of a load without ``other``, whose value is undefined on a GPU.

    Floats become NaN, integers a number that no test expects; as an offset it leads out of every allocation.
    """
    import triton.language as tl

    def create_masked_load(self, ptrs, mask, other, cache_policy, is_volatile):
        element = ptrs.get_element_ty()
        if other is None and (element.is_int() or (element.is_floating() and element.primitive_bitwidth >= 16)):
            dtype = interpreter._get_np_dtype(element)
            if element.is_int():
                poison = 1 if element.primitive_bitwidth == 1 else dtype.type(np.iinfo(dtype).max // 3)
            else:
                poison = BF16_NAN if element == tl.bfloat16 else np.nan
            other = interpreter.TensorHandle(np.full_like(ptrs.data, poison, dtype=dtype), element)
        return original(self, ptrs, mask, other, cache_policy, is_volatile)

    return create_masked_load


def _refuse(dtype, what: str) -> None:
    raise HalfArithmeticError(
        f"{what} on {dtype.scalar} values: kernels convert with .to(tl.float32) right after the load "
        "(the interpreter would compute on bit patterns, the hardware would round every step)"
    )


def _refusing_half(interpreter, original: Callable) -> Callable:
    def operation(self, *args):
        if args[-1] is not np.where:  # a selection moves bits and computes nothing
            for handle in args:
                if isinstance(handle, interpreter.TensorHandle) and _is_half(handle.dtype):
                    _refuse(handle.dtype, "arithmetic")
        return original(self, *args)

    return operation


def _refusing_half_inputs(original: Callable) -> Callable:
    def apply_impl(self, inputs):
        for tensor in inputs:
            if _is_half(tensor.dtype):
                _refuse(tensor.dtype, "a reduction or scan")
        return original(self, inputs)

    return apply_impl
