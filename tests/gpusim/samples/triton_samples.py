"""Triton sample kernels: elementwise, row reduction, last-block merge, matrix product."""

import triton
import triton.language as tl


@triton.jit
def silu(
    x_ptr,  # (n,)
    y_ptr,  # (n,)
    n,
    BLOCK: tl.constexpr,
):
    """y = x / (1 + exp(-x)), in float32."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    x = tl.load(x_ptr + index, mask=inside).to(tl.float32)
    tl.store(y_ptr + index, x / (1 + tl.exp(-x)), mask=inside)


@triton.jit
def row_norm(
    x_ptr,  # (n_rows, n_cols), stride (stride_row, 1)
    y_ptr,  # (n_rows, n_cols), contiguous
    n_cols,
    stride_row,
    eps,
    BLOCK: tl.constexpr,
):
    """y = (x - mean) / sqrt(var + eps), one program per row, two passes over registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n_cols
    x = tl.load(x_ptr + row * stride_row + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / n_cols
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / n_cols
    tl.store(y_ptr + row * n_cols + column, centred * tl.rsqrt(variance + tl.cast(eps, tl.float32)), mask=inside)


@triton.jit
def ticket_sum(
    x_ptr,  # (n,)
    partial_ptr,  # (n_programs,) float32 scratch
    ticket_ptr,  # (1,) int32, zero on entry and on exit
    out_ptr,  # (1,) float32
    n,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Sum of x. The program that draws the last ticket adds the partial sums in index order."""
    program = tl.program_id(0)
    index = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n, other=0.0).to(tl.float32)
    tl.store(partial_ptr + program, tl.sum(x, 0))
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        slot = tl.arange(0, MAX_PROGRAMS)
        partial = tl.load(partial_ptr + slot, mask=slot < tl.num_programs(0), other=0.0, cache_modifier=".cg")
        tl.store(out_ptr, tl.sum(partial, 0))
        tl.store(ticket_ptr, 0)


@triton.jit
def matmul(
    a_ptr,  # (m, k), stride (stride_a, 1)
    b_ptr,  # (k, n), stride (stride_b, 1)
    c_ptr,  # (m, n) float32, stride (stride_c, 1)
    m,
    n,
    k,
    stride_a,
    stride_b,
    stride_c,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c = a @ b with float32 accumulation; the loop is software pipelined with asynchronous copies."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        depth = start + inner
        a_mask = (rows[:, None] < m) & (depth[None, :] < k)
        b_mask = (depth[:, None] < k) & (cols[None, :] < n)
        a = tl.load(a_ptr + rows[:, None] * stride_a + depth[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + depth[:, None] * stride_b + cols[None, :], mask=b_mask, other=0.0)
        total = tl.dot(a, b, total)
    tl.store(c_ptr + rows[:, None] * stride_c + cols[None, :], total, mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit
def half_sum(
    x_ptr,  # (n,) float16 or bfloat16
    out_ptr,  # (1,) float32
    n,
    BLOCK: tl.constexpr,
):
    """What no kernel may do: it adds half-precision values before converting them."""
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n, other=0.0)
    tl.store(out_ptr, tl.sum(x + x, 0).to(tl.float32))


@triton.jit
def leaky_copy(
    x_ptr,  # (BLOCK,)
    y_ptr,  # (BLOCK,)
    n,
    BLOCK: tl.constexpr,
):
    """What no kernel may do: it uses lanes that a mask without ``other`` left undefined."""
    index = tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=index < n))


@triton.jit
def beyond_the_end(
    x_ptr,  # (n,)
    y_ptr,  # (n,)
    n,
    BLOCK: tl.constexpr,
):
    """A planted mistake: ``<=`` for ``<``."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index <= n
    tl.store(y_ptr + index, 2 * tl.load(x_ptr + index, mask=inside, other=0.0), mask=inside)


@triton.jit
def colliding_store(
    x_ptr,  # (n,)
    y_ptr,  # (100,)
    n,
    BLOCK: tl.constexpr,
):
    """A planted mistake: different elements go to one address."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    tl.store(y_ptr + index % 100, tl.load(x_ptr + index, mask=inside, other=0.0), mask=inside)


@triton.jit
def relaxed_ticket(
    x_ptr,  # (n,)
    partial_ptr,  # (n_programs,)
    ticket_ptr,  # (1,)
    out_ptr,  # (1,)
    n,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """A planted mistake: the ticket neither releases the partial sums nor acquires them."""
    program = tl.program_id(0)
    index = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial_ptr + program, tl.sum(tl.load(x_ptr + index, mask=index < n, other=0.0), 0))
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="relaxed") == tl.num_programs(0) - 1:
        slot = tl.arange(0, MAX_PROGRAMS)
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + slot, mask=slot < tl.num_programs(0), other=0.0), 0))
