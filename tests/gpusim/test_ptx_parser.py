"""The reader of PTX: scopes, source lines, variables, operands, and what it refuses."""

import pytest

from . import ptx
from .ptx.parser import ParseError, parse, split_operands

MODULE = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.global .align 4 .u32 table[3] = {1, 0x2, 3};
.visible .entry k(
    .param .u64 .ptr .global .align 16 k_param_0,
    .param .align 8 .b8 k_param_1[24],
    .param .u32 k_param_2
)
.reqntid 64, 2
{
    .reg .pred %p<2>; // a comment
    .reg .b32 %r<3>;
    .shared .align 8 .b8 scratch[40];
    .local .align 4 .b8 stack[16];
    .loc 1 10 3
    mov.u32 %r0, %tid.x;
    .loc 2 290 5, function_name $L__info_string0, inlined_at 1 12 7
    @!%p1 ld.global.v2.u32 {%r1, %r2}, [%rd1+-8];
    { .reg .b32 %r1; /* two
    lines */ mov.u32 %r1, 7; add.u32 %r0, %r0, %r1; }
$L__loop:
    @%p0 bra $L__loop;
    ret;
}
.file 1 "/somewhere/kernel.cu"
.file 2 "standard.py"
.section .debug_str { .b8 114 }
"""


@pytest.fixture(scope="module")
def kernel():
    return parse(MODULE)["k"]


def test_parameters_and_variables(kernel):
    assert [(p.name, p.nbytes, p.align) for p in kernel.parameters] == [
        ("k_param_0", 8, 8),
        ("k_param_1", 24, 8),
        ("k_param_2", 4, 4),
    ]
    assert kernel.required_threads == 128
    assert kernel.shared["dynamic"].dynamic
    assert kernel.shared["scratch"].nbytes == 40
    assert kernel.local["stack"].nbytes == 16
    assert kernel.global_["table"].initial == (1, 2, 3)


def test_instructions(kernel):
    load = kernel.code[1]
    assert (load.opcode, load.modifiers) == ("ld", ("global", "v2", "u32"))
    assert load.operands == ("{%r1, %r2}", "[%rd1+-8]")
    assert (load.predicate, load.negated) == ("%p1", True)
    assert kernel.labels["$L__loop"] == 4
    assert MODULE.splitlines()[load.line - 1].strip() == f"{load.text};"


def test_registers_of_inner_scopes_are_their_own(kernel):
    assert kernel.code[2].operands == ("%r1@1", "7")
    assert kernel.code[3].operands == ("%r0", "%r0", "%r1@1")
    assert {"%r0", "%r1", "%r2", "%r1@1"} <= kernel.registers.keys()


def test_source_lines(kernel):
    assert str(kernel.code[0].source) == "kernel.cu:10"
    assert str(kernel.code[1].source) == "standard.py:290 (inlined at kernel.cu:12)"


def test_split_operands():
    assert split_operands("{%r1, %r2}, [%rd1+4], -1") == ("{%r1, %r2}", "[%rd1+4]", "-1")
    assert split_operands("") == ()


def initial_values(text: str) -> tuple[int, ...]:
    return (
        parse(f".target sm_80\n.global .align 8 .b64 v[4] = {text};\n.entry k()\n{{\nret;\n}}")["k"]
        .global_["v"]
        .initial
    )


def test_initial_values():
    assert initial_values("{-1, 0x10, 7U}") == (-1, 16, 7)
    assert initial_values("{0f3FC00000, 0d3FF8000000000000}") == (0x3FC00000, 0x3FF8000000000000)  # bits of 1.5
    with pytest.raises(ParseError, match="the variable v begins as 'generic\\(table\\)'"):
        initial_values("{generic(table)}")


def test_unknown_directives_are_errors():
    with pytest.raises(ParseError, match=r"\.surfref"):
        parse(".target sm_80\n.entry k()\n{\n.surfref s;\nret;\n}")


def test_blocks_of_the_wrong_size_are_refused(kernel):
    from .ptx.machine import Machine
    from .ptx.memory import DeviceMemory

    plain = parse(".target sm_80\n.entry k()\n.reqntid 64\n{\nret;\n}")["k"]
    with pytest.raises(ptx.ExecutionError, match="requires 64 threads, got 32"):
        Machine(plain, DeviceMemory()).launch((1,), (32,), b"")
