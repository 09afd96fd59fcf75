// CUDA sample kernels. Device code only: the same text compiles under NVRTC and as host C++.
// Each BUG_* switch plants one mistake, for the mutation tests.
#include <cuda_fp16.h>

#ifndef FULL_MASK
#define FULL_MASK 0xffffffffu
#endif
#ifdef BUG_SHUFFLE_MASK  // names only half of the lanes that take part
#define SUM_MASK 0x0000ffffu
#else
#define SUM_MASK FULL_MASK
#endif
#ifdef BUG_BOUND
#define INSIDE(i, n) ((i) <= (n))
#else
#define INSIDE(i, n) ((i) < (n))
#endif

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(SUM_MASK, value, offset);
    return value;
}

// Every thread receives the sum over the block. `scratch` holds one float per warp and may be used again at once.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = (blockDim.x + 31) >> 5;
    value = warp_sum(value);
#ifndef BUG_BARRIER
    __syncthreads();  // the previous call's readers are done
#endif
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    return warp_sum(lane < n_warps ? scratch[lane] : 0.0f);
}

// y = x / (1 + exp(-x))
extern "C" __global__ void silu(const float* __restrict__ x, float* __restrict__ y, long long n) {
    long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; INSIDE(i, n); i += stride)
        y[i] = x[i] / (1.0f + __expf(-x[i]));
}

// y = (x - mean) / sqrt(var + eps), one block per row
extern "C" __global__ void row_norm(const float* __restrict__ x,  // (n_rows, n_cols), stride (stride_row, 1)
                                    float* __restrict__ y,        // (n_rows, n_cols), contiguous
                                    int n_cols, long long stride_row, float eps) {
    __shared__ float scratch[32];
    const float* row = x + blockIdx.x * stride_row;
    float* out = y + (long long)blockIdx.x * n_cols;
    float sum = 0;
    for (int c = threadIdx.x; c < n_cols; c += blockDim.x) sum += row[c];
    float mean = block_sum(sum, scratch) / n_cols;
    float squares = 0;
    for (int c = threadIdx.x; c < n_cols; c += blockDim.x) squares += (row[c] - mean) * (row[c] - mean);
    float scale = rsqrtf(block_sum(squares, scratch) / n_cols + eps);
    for (int c = threadIdx.x; c < n_cols; c += blockDim.x) out[c] = (row[c] - mean) * scale;
}

// out = sum of x. The block that draws the last ticket adds the partial sums in index order, so the result does not
// depend on which block it is.
extern "C" __global__ void ticket_sum(const float* __restrict__ x, float* partial, unsigned* ticket, float* out,
                                      long long n) {
    __shared__ float scratch[32];
    __shared__ bool last;
    float sum = 0;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
        sum += x[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
#ifndef BUG_FENCE
        __threadfence();
#endif
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
#ifndef BUG_FENCE
    __threadfence();
#endif
    float total = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) total += __ldcg(&partial[block]);
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) {
        out[0] = total;
        *ticket = 0;
    }
}

// counts[index[i]] += 1 through a block histogram in dynamic shared memory; `counts` must be zero on entry
extern "C" __global__ void histogram(const int* __restrict__ index, int* counts, int n, int n_bins) {
    extern __shared__ int bins[];
    for (int b = threadIdx.x; b < n_bins; b += blockDim.x) bins[b] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&bins[index[i]], 1);
#ifndef BUG_BARRIER
    __syncthreads();
#endif
    for (int b = threadIdx.x; b < n_bins; b += blockDim.x)
        if (bins[b]) atomicAdd(&counts[b], bins[b]);
}

// y = a * x, eight halfs per thread and 128-bit access; n is a multiple of 8
extern "C" __global__ void scale_half(const __half* __restrict__ x, __half* __restrict__ y, float a, long long n) {
    long long i = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (!INSIDE(i, n)) return;
    union Pack {
        uint4 words;
        __half2 pairs[4];
    };
    Pack pack;
#ifdef BUG_VECTOR_POINTER
    pack.words = *reinterpret_cast<const uint4*>(x + i + 1);
#else
    pack.words = *reinterpret_cast<const uint4*>(x + i);
#endif
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float2 value = __half22float2(pack.pairs[j]);
        pack.pairs[j] = __floats2half2_rn(a * value.x, a * value.y);
    }
    *reinterpret_cast<uint4*>(y + i) = pack.words;
}

#if !defined(SIMT_HOST) && __CUDA_ARCH__ >= 800
// y = x reversed within each block of 128 floats, staged by asynchronous copies
extern "C" __global__ void reverse_async(const float* __restrict__ x, float* __restrict__ y) {
    __shared__ alignas(16) float tile[128];
    int i = threadIdx.x;  // 32 threads, four floats each
    unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(tile + 4 * i));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(target), "l"(x + blockIdx.x * 128 + 4 * i)
                 : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
#ifndef BUG_ASYNC_WAIT
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
    __syncthreads();
    for (int k = 0; k < 4; ++k) y[blockIdx.x * 128 + 32 * k + i] = tile[127 - (32 * k + i)];
}
#endif
