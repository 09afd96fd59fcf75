"""Loads, stores, atomics, barriers, shuffles; what the checks say about wrong ones, and their silence on right ones."""

from dataclasses import replace

import numpy as np
import pytest

from . import ptx
from .launch import Buffer, Launch, empty
from .ptx.access import narrowest_accesses
from .ptx.counters import LruCache, count_sectors, count_wavefronts
from .ptx_harness import kernel_text, run_body

WORDS = np.arange(64, dtype=np.uint32)
SHARED = "    .shared .align 16 .b8 tile[512];\n"
OWN = "    mul.lo.u32 %r0, %i, 4;\n    mov.u32 %r1, tile;\n    add.u32 %r1, %r1, %r0;\n"  # %r1: own word of the tile
GLOBAL = "    mad.wide.u32 %rd0, %i, 4, %q0;\n    mad.wide.u32 %rd1, %i, 4, %q1;\n"


def kinds(result: ptx.Result) -> set[str]:
    return result.issues.kinds()


# ---------------------------------------------------------------------------------------------- loads and stores


@pytest.mark.parametrize(("kind", "dtype"), [("u8", np.uint8), ("s8", np.int8), ("u16", np.uint16), ("s16", np.int16)])
def test_narrow_loads_extend(kind, dtype):
    values = np.arange(-16, 16).astype(dtype)
    body = f"""
    mad.wide.u32 %rd0, %i, {values.itemsize}, %q0;
    ld.global.{kind} %r0, [%rd0];
    mad.wide.u32 %rd1, %i, 4, %q1;
    st.global.b32 [%rd1], %r0;"""
    result = run_body(body, [Buffer(values), empty(32, np.int32)]).check()
    np.testing.assert_array_equal(result.buffers[1], values.astype(np.int32))


def test_vector_loads_and_stores():
    words = np.arange(128, dtype=np.uint32)
    body = """
    mad.wide.u32 %rd0, %i, 16, %q0;
    mad.wide.u32 %rd1, %i, 16, %q1;
    ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd0];
    st.global.v2.b32 [%rd1], {%r3, %r2};
    st.global.v2.b32 [%rd1+8], {%r1, %r0};"""
    result = run_body(body, [Buffer(words), empty(128, np.uint32)]).check()
    np.testing.assert_array_equal(result.buffers[1].reshape(-1, 4), words.reshape(-1, 4)[:, ::-1])
    assert result.counters.sectors == 16 + 2 * 16
    assert result.counters.bytes["load.global"] == 512


def test_local_and_constant_memory_and_generic_addresses():
    body = """
    mov.u64 %rd2, stack;
    cvta.local.u64 %rd3, %rd2;
    st.u32 [%rd3+4], %i;
    ld.local.u32 %r2, [%rd2+4];
    and.b32 %r3, %i, 3;
    mul.wide.u32 %rd4, %r3, 4;
    mov.u64 %rd5, table;
    add.u64 %rd5, %rd5, %rd4;
    ld.const.u32 %r4, [%rd5];
    mul.lo.u32 %r2, %r2, %r4;
    mad.wide.u32 %rd1, %i, 4, %q0;
    st.global.u32 [%rd1], %r2;"""
    module = ".const .align 4 .u32 table[4] = {10, 20, 30, 40};\n"
    result = run_body(
        body, [empty(32, np.uint32)], module=module, locals_="    .local .align 4 .b8 stack[8];\n"
    ).check()
    lane = np.arange(32)
    np.testing.assert_array_equal(result.buffers[0], lane * np.array([10, 20, 30, 40])[lane % 4])


def test_jump_table_and_loop():
    body = """
    and.b32 %r0, %i, 1;
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    brx.idx %r0, ways;
even:
    add.u32 %r1, %r1, 100;
    bra.uni done;
odd:
    add.u32 %r1, %r1, %i;
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p0, %r2, %i;
    @%p0 bra odd;
done:
    mad.wide.u32 %rd1, %i, 4, %q0;
    st.global.u32 [%rd1], %r1;"""
    result = run_body("ways: .branchtargets even, odd;\n" + body, [empty(64, np.uint32)], grid=2).check()
    lane = np.arange(64)
    np.testing.assert_array_equal(result.buffers[0], np.where(lane % 2, lane * lane, 100))


@pytest.mark.parametrize(
    ("offset", "kind"), [(4 * 64, "out-of-bounds"), (-4, "out-of-bounds"), (2, "misaligned"), (0, None)]
)
def test_bounds_and_alignment(offset, kind):
    body = GLOBAL + f"    ld.global.u32 %r0, [%rd0+{offset}];\n    st.global.u32 [%rd1], %r0;"
    result = run_body(body, [Buffer(WORDS), empty(64, np.uint32)], block=64)
    assert kinds(result) - {"out-of-bounds"} == ({kind} - {None, "out-of-bounds"})
    assert (kind in kinds(result)) is (kind is not None)


def test_report_names_threads_and_distance():
    body = GLOBAL + "    ld.global.u32 %r0, [%rd0+8];\n    st.global.u32 [%rd1], %r0;"
    result = run_body(body, [Buffer(WORDS), empty(64, np.uint32)], block=64)
    text = str(result.issues)
    assert "1 bytes beyond an allocation of 256 bytes" in text
    assert "block 0 thread 62" in text
    assert "(2 x)" in text
    with pytest.raises(ptx.GpuIssues, match="OUT-OF-BOUNDS"):
        result.check()


def test_uninitialised_reads():
    body = GLOBAL + "    ld.global.u32 %r0, [%rd0];\n    st.global.u32 [%rd1], %r0;"
    assert kinds(run_body(body, [empty(32, np.uint32), empty(32, np.uint32)])) == {"uninitialised"}
    body = OWN + GLOBAL + "    ld.shared.u32 %r2, [%r1];\n    st.global.u32 [%rd1], %r2;"
    assert kinds(run_body(body, [Buffer(WORDS), empty(32, np.uint32)], locals_=SHARED)) == {"uninitialised"}
    body = "    red.global.add.u32 [%q0], 1;"
    assert kinds(run_body(body, [empty(1, np.uint32)])) == {"uninitialised"}


def write_shared(offset: int, declared: str) -> ptx.Result:
    body = f"    mov.u32 %r1, first;\n    st.shared.u32 [%r1+{offset}], 1;\n    st.shared.u32 [second], 2;"
    return run_body(body + "\n    st.global.u32 [%q0], 1;", [empty(1, np.uint32)], locals_=declared)


def test_the_end_of_a_shared_variable():
    """One variable runs into the next, or into the padding behind it, only in the eyes of a checker."""
    declared = "    .shared .align 4 .b8 first[36];\n    .shared .align 4 .b8 second[4];\n"
    write_shared(32, declared).check()
    for offset in (36, 40, 36 + 124):
        result = write_shared(offset, declared)
        assert kinds(result) == {"out-of-bounds"}
        assert f"{offset - 36 + 1} bytes beyond the 36 bytes of first" in str(result.issues)
    last = write_shared(36, "    .shared .align 4 .b8 second[4];\n    .shared .align 4 .b8 first[36];\n")
    assert "at byte" in str(last.issues)
    assert kinds(last) == {"out-of-bounds"}


def test_dynamic_shared_memory_begins_behind_a_guard():
    body = "    st.shared.u32 [fixed], 1;\n    st.shared.u32 [more+{}], 2;\n    st.global.u32 [%q0], 1;"
    module = ".extern .shared .align 16 .b8 more[];\n"
    fixed = "    .shared .align 4 .b8 fixed[20];\n"
    run_body(body.format(28), [empty(1, np.uint32)], module=module, locals_=fixed, shared_bytes=32, grid=3).check()
    for offset in (-4, 32):
        result = run_body(body.format(offset), [empty(1, np.uint32)], module=module, locals_=fixed, shared_bytes=32)
        assert kinds(result) == {"out-of-bounds"}


@pytest.mark.parametrize(("hint", "kind"), [("", None), (".nc", "race")])
def test_read_only_load_of_what_the_kernel_has_written(hint, kind):
    body = f"{GLOBAL}    st.global.u32 [%rd0], 5;\n    ld.global{hint}.u32 %r0, [%rd0];\n    st.global.u32 [%rd1], %r0;"
    result = run_body(body, [Buffer(WORDS), empty(64, np.uint32)], block=64)
    assert kinds(result) == {kind} - {None}
    assert ("a read-only load" in str(result.issues)) is bool(hint)


# --------------------------------------------------------------------------------------------------------- races


def exchange(between: str, *, distance: int = 4 * 32, size: int = 64) -> ptx.Result:
    """Store own word, then read the word `distance` bytes on (mod the tile), with `between` in between."""
    body = f"""{OWN}{GLOBAL}
    st.shared.u32 [%r1], %i;
    {between}
    add.u32 %r2, %r0, {distance};
    and.b32 %r2, %r2, {4 * size - 1};
    mov.u32 %r3, tile;
    add.u32 %r3, %r3, %r2;
    ld.shared.u32 %r4, [%r3];
    st.global.u32 [%rd1], %r4;"""
    return run_body(body, [Buffer(WORDS), empty(size, np.uint32)], block=size, locals_=SHARED)


def test_block_barrier_orders_warps():
    assert kinds(exchange("")) == {"race"}
    assert kinds(exchange("bar.warp.sync 0xffffffff;")) == {"race"}
    result = exchange("bar.sync 0;").check()
    np.testing.assert_array_equal(result.buffers[1], (np.arange(64) + 32) % 64)


def test_warp_barrier_orders_lanes():
    assert kinds(exchange("", distance=4, size=32)) == {"race"}
    exchange("bar.warp.sync 0xffffffff;", distance=4, size=32).check()


def test_warp_barriers_of_other_lanes_order_nothing():
    """Two halves of a warp that meet at the same time, each under its own mask, have not met each other."""
    masks = """setp.lt.u32 %p1, %i, 16;
    selp.b32 %r5, 0x0000ffff, 0xffff0000, %p1;
    bar.warp.sync %r5;"""
    assert kinds(exchange(masks, distance=64, size=32)) == {"race"}
    branches = """setp.lt.u32 %p1, %i, 16;
    @%p1 bar.warp.sync 0x0000ffff;
    @!%p1 bar.warp.sync 0xffff0000;"""
    assert kinds(exchange(branches, distance=64, size=32)) == {"race"}
    exchange(f"bar.warp.sync 0xffffffff;\n{branches}", distance=64, size=32).check()


def test_overwriting_what_others_still_read():
    body = f"""{OWN}{GLOBAL}
    st.shared.u32 [%r1], %i;
    bar.sync 0;
    ld.shared.u32 %r2, [tile];
    {{}}
    setp.eq.u32 %p0, %i, 0;
    @%p0 st.shared.u32 [tile], 7;
    st.global.u32 [%rd1], %r2;"""
    buffers = [Buffer(WORDS), empty(64, np.uint32)]
    result = run_body(body.format(""), buffers, block=64, locals_=SHARED)
    assert kinds(result) == {"race"}
    assert "write after a read" in str(result.issues)
    run_body(body.format("bar.sync 0;"), buffers, block=64, locals_=SHARED).check()


def test_two_values_at_one_address():
    store = "    st.global.u32 [%q0], {};"
    assert kinds(run_body(store.format("%i"), [empty(1, np.uint32)])) == {"race"}
    run_body(store.format("5"), [empty(1, np.uint32)]).check()


@pytest.mark.parametrize(("wide", "narrow"), [("v4.b32 [%rd2], {%i, %i, %i, %i}", 0), ("b32 [%rd2], %i", 12)])
def test_cells_are_as_wide_as_the_narrowest_access_of_a_space(wide, narrow):
    """A thread stores 16 bytes; another one reads one word of them, of which it is the only reader."""
    body = f"""
    mul.wide.u32 %rd2, %i, 16;
    add.u64 %rd2, %rd2, %q0;
    st.global.{wide};
    setp.eq.u32 %p0, %i, 40;
    @%p0 ld.global.b32 %r1, [%q0+{narrow}];"""
    kernel = ptx.parse(kernel_text(body, 1))["t"]
    assert narrowest_accesses(kernel) == {"global": 4, "shared": 16}
    races = run_body(body, [Buffer(np.zeros(256, np.uint32))], block=64).issues.kinds()
    assert races == ({"race"} if narrow == 0 else set())
    wider = ptx.parse(kernel_text(body.replace("ld.global.b32 %r1", "ld.global.v2.b32 {%r1, %r2}"), 1))["t"]
    assert narrowest_accesses(wider)["global"] == (8 if "v4" in wide else 4)


def test_a_kernel_is_decoded_once():
    """Unless a variable of the module lies elsewhere, whose address is part of the decoded code."""
    body = "    mov.u64 %rd2, table;\n    ld.global.u32 %r1, [%rd2];\n" + GLOBAL + "    st.global.u32 [%rd0], %r1;\n"
    text = kernel_text(body.replace("%q1", "%q0"), 1, module=".global .align 4 .u32 table = 7;\n")
    kernel = ptx.parse(text)["t"]
    for size in (32, 32, 5000):  # the last one moves the table
        result = ptx.run(kernel, Launch((1,), (32,), [empty(size, np.uint32)])).check()
        assert (result.buffers[0][:32] == 7).all()
    assert len(kernel.decoded) == 2
    assert not replace(kernel, code=kernel.code[:-1]).decoded
    assert kernel == ptx.parse(text)["t"]


def test_bytes_of_one_word_do_not_race():
    body = "    cvt.u64.u32 %rd0, %i;\n    add.u64 %rd0, %rd0, %q0;\n    st.global.u8 [%rd0], %i;"
    result = run_body(body, [empty(64, np.uint8)], block=32, grid=2).check()
    np.testing.assert_array_equal(result.buffers[0], np.arange(64))


def ticket(before: str, after: str, atomic: str = "atom.global.add.u32", barrier: str = "bar.sync 0;") -> ptx.Result:
    """Two warps per block store a word each; the block that draws the last ticket adds them all up."""
    body = f"""
    mad.wide.u32 %rd0, %i, 4, %q0;
    st.global.u32 [%rd0], %i;
    {barrier}
    mov.u32 %r5, %tid.x;
    setp.ne.u32 %p0, %r5, 0;
    @%p0 bra join;
    {before}
    {atomic} %r2, [%q1], 1;
    {after}
    setp.eq.u32 %p1, %r2, 7;
    selp.u32 %r3, 1, 0, %p1;
    st.shared.u32 [tile], %r3;
join:
    bar.sync 0;
    ld.shared.u32 %r4, [tile];
    setp.eq.u32 %p2, %r4, 0;
    @%p2 ret;
    mov.u32 %r6, 0;
    mov.u32 %r7, 0;
    mov.u64 %rd1, %q0;
loop:
    ld.global.u32 %r8, [%rd1];
    add.u32 %r6, %r6, %r8;
    add.u64 %rd1, %rd1, 4;
    add.u32 %r7, %r7, 1;
    setp.lt.u32 %p3, %r7, 512;
    @%p3 bra loop;
    setp.eq.u32 %p4, %r5, 0;
    @%p4 st.global.u32 [%q2], %r6;
    @%p4 st.global.u32 [%q1], 0;"""
    buffers = [empty(512, np.uint32), Buffer(np.zeros(1, np.uint32)), empty(1, np.uint32)]
    return run_body(body, buffers, grid=8, block=64, locals_=SHARED)


@pytest.mark.parametrize(
    ("before", "after", "atomic"),
    [
        ("membar.gl;", "membar.gl;", "atom.global.add.u32"),
        ("fence.acq_rel.gpu;", "fence.acq_rel.gpu;", "atom.global.relaxed.gpu.add.u32"),
        ("fence.sc.sys;", "fence.acq_rel.gpu;", "atom.global.add.u32"),
        ("", "", "atom.global.gpu.acq_rel.add.u32"),
        ("membar.gl;", "", "atom.global.gpu.acquire.add.u32"),
    ],
)
def test_last_block_ticket_is_silent(before, after, atomic):
    result = ticket(before, after, atomic).check()
    assert result.buffers[2][0] == 512 * 511 // 2
    assert result.buffers[1][0] == 0


@pytest.mark.parametrize(
    ("before", "after", "atomic", "barrier"),
    [
        ("", "membar.gl;", "atom.global.add.u32", "bar.sync 0;"),  # nothing is released
        ("membar.gl;", "", "atom.global.add.u32", "bar.sync 0;"),  # nothing is acquired
        ("membar.cta;", "membar.cta;", "atom.global.add.u32", "bar.sync 0;"),  # the wrong scope
        ("", "", "atom.global.cta.acq_rel.add.u32", "bar.sync 0;"),
        ("membar.gl;", "membar.gl;", "atom.global.add.u32", ""),  # the other warp's word is not covered
    ],
)
def test_incomplete_ticket_is_a_race(before, after, atomic, barrier):
    assert kinds(ticket(before, after, atomic, barrier)) == {"race"}


def test_fence_by_every_writer_before_the_barrier():
    """The other usual form: all writers fence, meet, and one thread draws the ticket."""
    ticket("", "membar.gl;", barrier="membar.gl;\n    bar.sync 0;").check()


@pytest.mark.parametrize(
    ("store", "load", "clean"),
    [
        ("st.global.release.gpu.u32", "ld.global.acquire.gpu.u32", True),
        ("st.global.release.gpu.u32", "ld.global.relaxed.gpu.u32", False),
        ("st.global.relaxed.gpu.u32", "ld.global.acquire.gpu.u32", False),
        ("st.global.u32", "ld.global.u32", False),
    ],
)
def test_message_through_a_flag(store, load, clean):
    """Block 0 writes data and raises a flag; block 1 reads the flag, and the data if it is up."""
    body = f"""
    mov.u32 %r0, %ctaid.x;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra reader;
    st.global.u32 [%q0], 42;
    {store} [%q1], 1;
    bra.uni done;
reader:
    {load} %r1, [%q1];
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra done;
    ld.global.u32 %r2, [%q0];
    st.global.u32 [%q2], %r2;
done:"""
    buffers = [empty(1, np.uint32), Buffer(np.zeros(1, np.uint32)), Buffer(np.zeros(1, np.uint32))]
    result = run_body(body, buffers, grid=2, block=1)
    assert result.buffers[2][0] == 42
    assert kinds(result) == (set() if clean else {"race"})


def test_volatile_and_atomic_accesses_do_not_race_with_each_other():
    body = (
        "    red.global.add.u32 [%q0], 1;\n    ld.volatile.global.u32 %r0, [%q0];\n    st.volatile.global.u32 [%q1], 3;"
    )
    run_body(body, [Buffer(np.zeros(1, np.uint32)), empty(1, np.uint32)], grid=4, block=32).check()
    body = "    red.global.add.u32 [%q0], 1;\n    ld.global.u32 %r0, [%q0];\n    st.volatile.global.u32 [%q1], 3;"
    assert kinds(run_body(body, [Buffer(np.zeros(1, np.uint32)), empty(1, np.uint32)], grid=4)) == {"race"}


# ------------------------------------------------------------------------------------------------------ barriers


def test_barrier_that_some_threads_never_reach():
    body = "    setp.ge.u32 %p0, %i, 20;\n    @%p0 ret;\n    bar.sync 0;\n    st.global.u32 [%q0], 1;"
    result = run_body(body, [empty(1, np.uint32)], block=64)
    assert kinds(result) == {"barrier"}
    assert "20 of 64 threads reach it, 44 have returned" in str(result.issues)


def test_different_barriers_in_different_branches():
    body = """
    setp.ge.u32 %p0, %i, 32;
    @%p0 bra other;
    bar.sync 0;
    bra.uni done;
other:
    bar.sync 0;
done:
    st.global.u32 [%q0], 1;"""
    assert kinds(run_body(body, [empty(1, np.uint32)], block=64)) == {"barrier"}


def test_named_barrier_of_half_the_block_and_deadlock():
    body = """
    setp.ge.u32 %p0, %i, 32;
    @%p0 bra done;
    bar.sync 1, {};
done:
    st.global.u32 [%q0], 1;"""
    run_body(body.format(32), [empty(1, np.uint32)], block=64).check()
    result = run_body(body.format(64), [empty(1, np.uint32)], block=64)
    assert "deadlock" in str(result.issues)


@pytest.mark.parametrize(("mode", "kind", "want"), [("popc", "u32", 10), ("or", "pred", 1), ("and", "pred", 0)])
def test_barrier_with_reduction(mode, kind, want):
    target = "%r0" if kind == "u32" else "%p1"
    move = "" if kind == "u32" else "selp.u32 %r0, 1, 0, %p1;"
    body = f"""
    setp.lt.u32 %p0, %i, 10;
    barrier.sync.aligned 0;
    bar.red.{mode}.{kind} {target}, 0, %p0;
    {move}
    mad.wide.u32 %rd0, %i, 4, %q0;
    st.global.u32 [%rd0], %r0;"""
    result = run_body(body, [empty(64, np.uint32)], block=64).check()
    assert (result.buffers[0] == want).all()


def test_endless_loop_ends():
    body = "again:\n    ld.volatile.global.u32 %r0, [%q0];\n    setp.eq.u32 %p0, %r0, 0;\n    @%p0 bra again;"
    with pytest.raises(ptx.ExecutionError, match="no end after 100"):
        run_body(body, [Buffer(np.zeros(1, np.uint32))], options=ptx.Options(max_steps=100))


# -------------------------------------------------------------------------------------------------------- atomics


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    ("op", "kind", "start", "want"),
    [
        ("add", "u32", 5, 5 + sum(range(64))),
        ("min", "s32", 50, 0),
        ("max", "u32", 9, 63),
        ("and", "b32", 0xFF, 0),
        ("or", "b32", 0, 63),
        ("xor", "b32", 1, 1),
        ("inc", "u32", 0, 64 % 43),
    ],
)
def test_atomic_results(op, kind, start, want, space):
    value = {"inc": "42"}.get(op, "%i")
    if space == "global":
        body = f"    red.global.{op}.{kind} [%q0], {value};"
    else:
        body = f"""
    setp.eq.u32 %p0, %i, 0;
    @%p0 st.shared.u32 [tile], {start};
    bar.sync 0;
    atom.shared.{op}.{kind} %r0, [tile], {value};
    bar.sync 0;
    ld.shared.u32 %r1, [tile];
    @%p0 st.global.u32 [%q0], %r1;"""
    result = run_body(body, [Buffer(np.array([start], np.uint32))], block=64, locals_=SHARED)
    assert not result.issues.kinds() - ({"race"} if space == "shared" else set())
    assert result.buffers[0][0] == want


def test_atomics_return_each_old_value_once():
    body = GLOBAL + "    atom.global.add.u32 %r0, [%q1], 1;\n    st.global.u32 [%rd0], %r0;"
    for options in (ptx.Options(), ptx.Options(fuzz_ulp=1, seed=3)):
        buffers = [empty(256, np.uint32), Buffer(np.zeros(1, np.uint32))]
        result = run_body(body, buffers, grid=4, block=64, options=options).check()
        assert sorted(result.buffers[0]) == list(range(256))
        assert (result.buffers[0] == np.arange(256)).all() == (options.fuzz_ulp == 0)


def test_compare_and_swap_and_exchange():
    body = GLOBAL + "    atom.global.cas.b32 %r0, [%q1], 0, 77;\n    st.global.u32 [%rd0], %r0;"
    result = run_body(body, [empty(32, np.uint32), Buffer(np.zeros(1, np.uint32))]).check()
    np.testing.assert_array_equal(result.buffers[0], [0] + [77] * 31)
    body = GLOBAL + "    atom.global.exch.b32 %r0, [%q1], %i;\n    st.global.u32 [%rd0], %r0;"
    result = run_body(body, [empty(32, np.uint32), Buffer(np.array([99], np.uint32))]).check()
    np.testing.assert_array_equal(result.buffers[0], [99, *range(31)])


def test_float_atomics():
    body = """
    cvt.rn.f32.u32 %f0, %i;
    red.global.add.f32 [%q0], %f0;
    cvt.f64.f32 %fd0, %f0;
    red.global.add.f64 [%q1], %fd0;"""
    result = run_body(body, [Buffer(np.zeros(1, np.float32)), Buffer(np.zeros(1, np.float64))], block=64).check()
    assert result.buffers[0][0] == result.buffers[1][0] == 64 * 63 / 2


# ------------------------------------------------------------------------------------------------ warp primitives


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("down", 3, 31, lambda lane: np.where(lane + 3 < 32, lane + 3, lane)),
        ("up", 3, 0, lambda lane: np.where(lane >= 3, lane - 3, lane)),
        ("idx", 7, 31, lambda lane: np.full(32, 7)),
        ("bfly", 33, 31, lambda lane: lane ^ 1),  # five bits of the distance count
        ("up", -1, 0, lambda lane: np.where(lane == 31, 0, lane)),
        ("down", 1, 0x181F, lambda lane: np.where(lane % 8 < 7, lane + 1, lane)),  # segments of 8: mask 24, clamp 31
    ],
)
def test_shuffles(mode, by, clamp, source):
    body = f"{GLOBAL}    ld.global.u32 %r0, [%rd0];\n    shfl.sync.{mode}.b32 %r1, %r0, {by}, {clamp}, -1;\n"
    result = run_body(body + "    st.global.u32 [%rd1], %r1;", [Buffer(WORDS * 3), empty(32, np.uint32)]).check()
    np.testing.assert_array_equal(result.buffers[1], 3 * source(np.arange(32)))


def test_shuffle_masks():
    body = "    shfl.sync.bfly.b32 %r0, %i, 16, 31, 0x0000ffff;\n    st.global.u32 [%q0], 1;"
    assert "not in its own member mask" in str(run_body(body, [empty(1, np.uint32)]).issues)
    guard = "    setp.lt.u32 %p0, %i, 16;\n"
    body = guard + "    @%p0 shfl.sync.bfly.b32 %r0, %i, 1, 31, 0xffffffff;\n    st.global.u32 [%q0], 1;"
    assert "do not take part" in str(run_body(body, [empty(1, np.uint32)]).issues)
    body = guard + "    @%p0 shfl.sync.bfly.b32 %r0, %i, 1, 31, 0x0000ffff;\n    st.global.u32 [%q0], 1;"
    run_body(body, [empty(1, np.uint32)]).check()
    body = guard + "    @%p0 shfl.sync.bfly.b32 %r0, %i, 16, 31, 0x0000ffff;\n    st.global.u32 [%q0], 1;"
    assert "inactive" in str(run_body(body, [empty(1, np.uint32)]).issues)


def test_primitives_of_two_halves_at_once():
    """Lanes of one instruction with different member masks form groups of their own."""
    body = """
    setp.lt.u32 %p0, %i, 16;
    selp.b32 %r0, 0x0000ffff, 0xffff0000, %p0;
    setp.eq.u32 %p1, %i, 3;
    and.b32 %r7, %i, 1;
    vote.sync.ballot.b32 %r1, !%p1, %r0;
    vote.sync.any.pred %p2, %p1, %r0;
    vote.sync.all.pred %p3, !%p1, %r0;
    vote.sync.uni.pred %p4, %p1, %r0;
    redux.sync.add.u32 %r2, %i, %r0;
    match.any.sync.b32 %r3, %r7, %r0;
    selp.u32 %r4, 1, 0, %p2;
    selp.u32 %r5, 1, 0, %p3;
    selp.u32 %r6, 1, 0, %p4;
    elect.sync %r8|%p5, %r0;
    selp.u32 %r9, 1, 0, %p5;
    mad.wide.u32 %rd0, %i, 32, %q0;
    st.global.v4.u32 [%rd0], {%r1, %r2, %r3, %r4};
    st.global.v4.u32 [%rd0+16], {%r5, %r6, %r8, %r9};"""
    rows = run_body(body, [empty((32, 8), np.uint32)]).check().buffers[0]
    lane = np.arange(32)
    low = lane < 16
    np.testing.assert_array_equal(rows[:, 0], np.where(low, 0xFFF7, 0xFFFF0000))
    np.testing.assert_array_equal(rows[:, 1], np.where(low, sum(range(16)), sum(range(16, 32))))
    np.testing.assert_array_equal(rows[:, 2], np.where(low, 0x5555, 0x55550000) << (lane % 2))
    np.testing.assert_array_equal(rows[:, 3], low)
    np.testing.assert_array_equal(rows[:, 4], ~low)
    np.testing.assert_array_equal(rows[:, 5], ~low)
    np.testing.assert_array_equal(rows[:, 6], np.where(low, 0, 16))
    np.testing.assert_array_equal(rows[:, 7], (lane == 0) | (lane == 16))


def test_votes_and_reductions():
    body = """
    and.b32 %r0, %i, 3;
    setp.eq.u32 %p0, %r0, 0;
    vote.sync.ballot.b32 %r1, %p0, -1;
    vote.sync.any.pred %p1, %p0, -1;
    vote.sync.all.pred %p2, %p0, -1;
    redux.sync.add.u32 %r2, %i, -1;
    redux.sync.max.s32 %r3, %i, -1;
    match.any.sync.b32 %r4, %r0, -1;
    activemask.b32 %r5;
    selp.u32 %r6, 1, 0, %p1;
    selp.u32 %r7, 1, 0, %p2;
    mad.wide.u32 %rd0, %i, 32, %q0;
    st.global.v4.u32 [%rd0], {%r1, %r2, %r3, %r4};
    st.global.v4.u32 [%rd0+16], {%r5, %r6, %r7, %i};"""
    rows = run_body(body, [empty((64, 8), np.uint32)], block=64).check().buffers[0]
    lane = np.arange(64)
    first = 0x11111111
    assert (rows[:, 0] == first).all()
    np.testing.assert_array_equal(rows[:, 1], np.where(lane < 32, 31 * 16, 31 * 16 + 32 * 32))
    np.testing.assert_array_equal(rows[:, 2], np.where(lane < 32, 31, 63))
    np.testing.assert_array_equal(rows[:, 3], first << (lane % 4))
    np.testing.assert_array_equal(rows[:, 4:7], np.tile([0xFFFFFFFF, 1, 0], (64, 1)))


# ----------------------------------------------------------------------------------------------------- async copies

COPY = f"""{OWN}
    mul.lo.u32 %r0, %i, 16;
    mov.u32 %r1, tile;
    add.u32 %r1, %r1, %r0;
    mad.wide.u32 %rd0, %i, 16, %q0;
    cp.async.cg.shared.global [%r1], [%rd0], 16{{size}};
    cp.async.commit_group;
    {{wait}}
    ld.shared.u32 %r2, [{{where}}];
    mad.wide.u32 %rd1, %i, 4, %q1;
    st.global.u32 [%rd1], %r2;"""


def copy(wait: str, where: str = "%r1+4", size: str = "") -> ptx.Result:
    body = COPY.format(wait=wait, where=where, size=size)
    return run_body(body, [Buffer(np.arange(128, dtype=np.uint32)), empty(32, np.uint32)], locals_=SHARED)


def test_async_copy():
    result = copy("cp.async.wait_group 0;").check()
    np.testing.assert_array_equal(result.buffers[1], np.arange(32) * 4 + 1)
    assert copy("cp.async.wait_all;").check()
    assert copy("").issues.kinds() == {"async"}
    assert copy("cp.async.wait_group 1;").issues.kinds() == {"async"}


def test_async_copy_fills_with_zero():
    np.testing.assert_array_equal(copy("cp.async.wait_all;", size=", 4").check().buffers[1], np.zeros(32))
    np.testing.assert_array_equal(copy("cp.async.wait_all;", "%r1", ", 4").check().buffers[1], np.arange(32) * 4)


@pytest.mark.parametrize(("n", "size"), [(128, ""), (126, ", 8"), (125, ", 4"), (127, ", 12")])
def test_async_copy_reads_no_further_than_it_says(n, size):
    """The last lane ends at the end of the array: with a source size nothing behind it is read."""
    last = f"    setp.eq.u32 %p0, %i, 31;\n    selp.u32 %r9, {size[2:] or 16}, 16, %p0;\n"
    body = last + COPY.format(wait="cp.async.wait_all;", where="%r1+12", size=", %r9" if size else "")
    run_body(body, [Buffer(np.arange(n, dtype=np.uint32)), empty(32, np.uint32)], locals_=SHARED).check()
    if size:
        longer = body.replace(f"selp.u32 %r9, {size[2:]},", f"selp.u32 %r9, {int(size[2:]) + 1},")
        result = run_body(longer, [Buffer(np.arange(n, dtype=np.uint32)), empty(32, np.uint32)], locals_=SHARED)
        assert "out-of-bounds" in kinds(result)


@pytest.mark.parametrize(("text", "reads"), [("%p0", False), ("!%p0", True)])
def test_async_copy_that_ignores_its_source(text, reads):
    body = "    setp.lt.u32 %p0, %i, 16;\n" + COPY.format(wait="cp.async.wait_all;", where="%r1", size=f", {text}")
    result = run_body(body, [Buffer(np.arange(128, dtype=np.uint32)), empty(32, np.uint32)], locals_=SHARED).check()
    lane = np.arange(32)
    np.testing.assert_array_equal(result.buffers[1], np.where((lane < 16) == reads, lane * 4, 0))


def test_async_copy_with_a_cache_policy():
    policy = "    createpolicy.fractional.L2::evict_first.b64 %rd5, 1.0;\n"
    body = policy + COPY.format(wait="cp.async.wait_all;", where="%r1", size=", %rd5").replace(
        "cg.shared.global ", "cg.shared.global.L2::cache_hint "
    )
    result = run_body(body, [Buffer(np.arange(128, dtype=np.uint32)), empty(32, np.uint32)], locals_=SHARED).check()
    np.testing.assert_array_equal(result.buffers[1], np.arange(32) * 4)


def test_writing_where_a_copy_is_under_way_to():
    result = copy("st.shared.u32 [%r1+8], 1;\n    cp.async.wait_all;")
    assert result.issues.kinds() == {"async"}
    assert "still under way" in str(result.issues)
    copy("cp.async.wait_all;\n    st.shared.u32 [%r1+8], 1;").check()


def test_async_copy_is_visible_to_others_after_a_barrier_only():
    assert copy("cp.async.wait_all;", "tile+16").issues.kinds() == {"race"}
    copy("cp.async.wait_all;\n    bar.sync 0;", "tile+16").check()


# -------------------------------------------------------------------------------------------------------- counters


def test_sector_counting():
    warps = np.zeros(32, int)
    lane = np.arange(32)
    assert count_sectors(4 * lane, 4, warps) == (4, 4)
    assert count_sectors(4 * lane + 4, 4, warps) == (5, 4)
    assert count_sectors(16 * lane, 16, warps) == (16, 16)
    assert count_sectors(64 * lane, 4, warps) == (32, 4)
    assert count_sectors(np.zeros(32, int), 4, warps) == (1, 1)
    assert count_sectors(4 * lane[::-1], 4, warps) == (4, 4)
    assert count_sectors(np.concatenate([4 * lane, 4 * lane]), 4, np.repeat([0, 1], 32)) == (8, 8)


def test_bank_conflict_counting():
    warps, lane = np.zeros(32, int), np.arange(32)
    assert count_wavefronts(4 * lane, 4, warps) == (1, 1)
    assert count_wavefronts(np.zeros(32, int), 4, warps) == (1, 1)  # broadcast
    assert count_wavefronts(8 * lane, 4, warps) == (2, 1)
    assert count_wavefronts(128 * lane, 4, warps) == (32, 1)
    assert count_wavefronts(132 * lane, 4, warps) == (1, 1)  # padded
    assert count_wavefronts(16 * lane, 16, warps) == (4, 4)


def test_cache_model_evicts_the_least_recently_used():
    cache = LruCache(capacity=4 * 32)
    cache.access(np.arange(0, 128, 4), 4, write=True)
    assert (cache.bytes_read, cache.bytes_written) == (0, 0)
    cache.access(np.array([0]), 4, write=False)  # a hit, and now the newest
    cache.access(np.array([128]), 4, write=False)  # evicts sector 1, 2 or 3, which are dirty
    assert (cache.bytes_read, cache.bytes_written) == (32, 32)
    cache.access(np.array([0]), 4, write=False)
    assert cache.bytes_read == 32
    cache.flush()
    assert cache.bytes_written == 128


def test_second_read_of_an_array_beyond_the_cache_costs_again():
    n = 1 << 12
    cache = LruCache(capacity=n // 2)
    for _ in range(2):
        for start in range(0, n, 256):
            cache.access(np.arange(start, start + 256, 4), 4, write=False)
    assert cache.bytes_read == 2 * n


def test_flops_are_counted():
    body = """
    cvt.rn.f32.u32 %f0, %i;
    fma.rn.f32 %f1, %f0, %f0, %f0;
    mul.f32 %f2, %f1, %f1;
    mov.b32 %r0, %f2;
    fma.rn.f16x2 %r1, %r0, %r0, %r0;
    st.global.u32 [%q0], 1;"""
    counters = run_body(body, [empty(1, np.uint32)]).check().counters
    assert counters.flops == {"f32": 3 * 32, "f16": 4 * 32}


def test_calls_are_checked_against_the_signature():
    kernel = ptx.parse(".version 8.0\n.target sm_80\n.entry t(.param .u64 a, .param .u32 b)\n{\nret;\n}")["t"]
    with pytest.raises(ptx.ExecutionError, match="takes 2 arguments, got 1"):
        ptx.pack_parameters(kernel, [np.uint64(0)])
    with pytest.raises(ptx.ExecutionError, match="argument 1 has 8 bytes"):
        ptx.pack_parameters(kernel, [np.uint64(0), np.int64(0)])
    with pytest.raises(ptx.ExecutionError, match="argument 1 is float32, parameter b is u32"):
        ptx.pack_parameters(kernel, [np.uint64(0), np.float32(0)])
    assert ptx.pack_parameters(kernel, [np.uint64(1), np.uint32(2)]) == bytes([1, *[0] * 7, 2, 0, 0, 0])


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        ((0,), (32,), 0, r"the grid is \(0,\)"),
        (4, (32,), 0, "the grid is 4"),
        ((1, 65536), (32,), 0, r"the grid is \(1, 65536\)"),
        ((1,), (1, 1, 65), 0, r"the block is \(1, 1, 65\)"),
        ((1,), (), 0, r"the block is \(\)"),
        ((1,), (1,), -5, "-5 bytes of dynamic shared memory"),
    ],
)
def test_launches_that_no_device_takes_are_refused(grid, block, shared, message):
    with pytest.raises(ValueError, match=message):
        Launch(grid, block, [], shared)


def test_more_threads_than_the_executor_can_number():
    kernel = ptx.parse(".version 8.0\n.target sm_80\n.entry t()\n{\nret;\n}")["t"]
    with pytest.raises(ptx.ExecutionError, match="2147483647 blocks of 32 threads: fewer than 2147483647 threads"):
        ptx.run(kernel, Launch((2**31 - 1,), (32,), []))


def test_lanes_that_differ_by_rounding_are_ambiguous():
    """The same float up to its last bits from several lanes is not a race, but its winner is unspecified."""
    body = """
    and.b32 %r0, %i, 1;
    add.u32 %r0, %r0, {};
    st.global.b32 [%q0], %r0;"""
    one = int(np.float32(1).view(np.uint32))
    result = run_body(body.format(one), [empty(1, np.float32)])
    assert kinds(result) == {"ambiguous"}
    assert kinds(run_body(body.format(1_000_000), [empty(1, np.uint32)])) == {"race"}  # neighbouring indices
    result.check(allow=frozenset({"ambiguous"}))
    with pytest.raises(ptx.GpuIssues, match="AMBIGUOUS"):
        result.check()
