// The CUDA vocabulary for a host compiler: keywords, built-in variables, vector types. Included before every .cu.
#pragma once
#define SIMT_HOST 1
#include "simt/runtime.h"
// order matters: the rest speaks the vocabulary above
#include "simt/atomics.h"
#include "simt/math.h"
#include "simt/warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// `__shared__` and `extern __shared__` are rewritten by transform.py, which also announces the variable for poisoning.

#define threadIdx simt::thread_index_of_caller()
#define blockIdx simt::block_index
#define blockDim simt::block_dim
#define gridDim simt::grid_dim
constexpr int warpSize = 32;

namespace simt {
inline uint3 thread_index_of_caller() {
    unsigned rank = static_cast<unsigned>(thread_rank);
    return {rank % block_dim.x, rank / block_dim.x % block_dim.y, rank / (block_dim.x * block_dim.y)};
}
}  // namespace simt

#define SIMT_VECTORS(T, name)                                         \
    struct alignas(2 * sizeof(T)) name##2 {                           \
        T x, y;                                                       \
    };                                                                \
    struct name##3 {                                                  \
        T x, y, z;                                                    \
    };                                                                \
    struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { \
        T x, y, z, w;                                                 \
    };                                                                \
    inline name##2 make_##name##2(T x, T y) {                         \
        return {x, y};                                                \
    }                                                                 \
    inline name##3 make_##name##3(T x, T y, T z) {                    \
        return {x, y, z};                                             \
    }                                                                 \
    inline name##4 make_##name##4(T x, T y, T z, T w) {               \
        return {x, y, z, w};                                          \
    }
using simt_uchar = unsigned char;
using simt_ushort = unsigned short;
using simt_ulonglong = unsigned long long;
SIMT_VECTORS(simt_uchar, uchar)
SIMT_VECTORS(short, short)
SIMT_VECTORS(simt_ushort, ushort)
SIMT_VECTORS(int, int)
SIMT_VECTORS(long long, longlong)
SIMT_VECTORS(simt_ulonglong, ulonglong)
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)
#undef SIMT_VECTORS
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
