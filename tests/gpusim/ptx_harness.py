"""Wraps a few PTX instructions into a kernel: every thread loads inputs, runs them, stores the result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import ptx
from .launch import Buffer, Launch, empty
from .ptx.types import TYPES

__all__ = ["evaluate", "kernel_text", "run_body"]

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = """    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<32>, %i;
    .reg .f32 %f<16>;
    .reg .b64 %rd<32>, %offset, %base;
    .reg .f64 %fd<8>;
"""


def kernel_text(body: str, n_pointers: int, *, module: str = "", locals_: str = "") -> str:
    """Return a kernel ``t`` with its pointers in ``%q0``, ``%q1``, ... and its thread's number in ``%i``."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(n_pointers))
    pointers = "".join(f"    .reg .b64 %q{i};\n    ld.param.u64 %q{i}, [p{i}];\n" for i in range(n_pointers))
    index = (
        "    mov.u32 %i, %tid.x;\n    mov.u32 %r31, %ctaid.x;\n    mov.u32 %r30, %ntid.x;\n"
        "    mad.lo.u32 %i, %r31, %r30, %i;\n"
    )
    head = f"{HEADER}{module}.visible .entry t({parameters})\n"
    return f"{head}{{\n{REGISTERS}{locals_}{pointers}{index}{body}\n    ret;\n}}\n"


def run_body(
    body: str,
    buffers: Sequence[Buffer],
    *,
    grid: int = 1,
    block: int = 32,
    shared_bytes: int = 0,
    module: str = "",
    locals_: str = "",
    options: ptx.Options = ptx.Options(),  # noqa: B008
) -> ptx.Result:
    """Run a kernel body whose pointers are the given buffers."""
    kernel = ptx.parse(kernel_text(body, len(buffers), module=module, locals_=locals_))["t"]
    return ptx.run(kernel, Launch((grid,), (block,), list(buffers), shared_bytes), options=options)


def evaluate(
    instructions: str,
    inputs: Sequence[tuple[str, np.ndarray]],
    output: str,
    *,
    options: ptx.Options = ptx.Options(),  # noqa: B008
) -> np.ndarray:
    """Run instructions on one element per thread.

    Args:
        instructions: PTX that reads ``%a``, ``%b``, ``%c``, ``%d`` and writes ``%out``.
        inputs: PTX type and values of each input, all of one length.
        output: PTX type of the result; ``pred`` comes back as bool.
        options: Of the run.

    Returns:
        The results as the raw numpy type of the output.
    """
    n = len(inputs[0][1])
    declarations, loads = "", ""
    for position, (kind, _) in enumerate(inputs):
        name, size = "abcd"[position], TYPES[kind].size
        declarations += f"    .reg .b{8 * size} %{name};\n" if size > 1 else f"    .reg .b16 %{name};\n"
        loads += f"    mad.wide.u32 %base, %i, {size}, %q{position};\n    ld.global.b{8 * size} %{name}, [%base];\n"
    made = TYPES[output]
    predicate = output == "pred"
    size = 4 if predicate else made.size
    declarations += f"    .reg .{'pred' if predicate else f'b{8 * size}'} %out;\n"
    finish = "    selp.b32 %r29, 1, 0, %out;\n" if predicate else ""
    finish += f"    mad.wide.u32 %base, %i, {size}, %q{len(inputs)};\n"
    finish += f"    st.global.b{8 * size} [%base], {'%r29' if predicate else '%out'};\n"
    raw = np.dtype(np.uint32) if predicate else made.raw
    buffers = [Buffer(np.ascontiguousarray(values)) for _, values in inputs]
    buffers.append(empty(n, raw))
    guard = f"    setp.ge.u32 %p7, %i, {n};\n    @%p7 ret;\n"
    body = declarations + guard + loads + instructions + "\n" + finish
    result = run_body(body, buffers, grid=-(-n // 128), block=128, options=options).check()
    return result.buffers[-1].astype(bool) if predicate else result.buffers[-1]
