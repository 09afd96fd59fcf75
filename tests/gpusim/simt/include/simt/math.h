// Device math. Fast intrinsics are the exact functions: what their error does is the PTX executor's business.
#pragma once
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

inline float __expf(float x) {
    return expf(x);
}
inline float __exp10f(float x) {
    return powf(10.0f, x);
}
inline float __logf(float x) {
    return logf(x);
}
inline float __log2f(float x) {
    return log2f(x);
}
inline float __sinf(float x) {
    return sinf(x);
}
inline float __cosf(float x) {
    return cosf(x);
}
inline void __sincosf(float x, float* s, float* c) {
    *s = sinf(x), *c = cosf(x);
}
inline float __powf(float x, float y) {
    return powf(x, y);
}
inline float __fdividef(float x, float y) {
    return x / y;
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
inline float __fsqrt_rn(float x) {
    return sqrtf(x);
}
inline float __saturatef(float x) {
    return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f;
}
inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
inline double rsqrt(double x) {
    return 1.0 / sqrt(x);
}
inline void sincospif(float x, float* s, float* c) {
    *s = static_cast<float>(sin(M_PI * x)), *c = static_cast<float>(cos(M_PI * x));
}
inline float sinpif(float x) {
    return static_cast<float>(sin(M_PI * x));
}
inline float cospif(float x) {
    return static_cast<float>(cos(M_PI * x));
}

// One rounding each, never contracted into an fma (the host build uses -ffp-contract=off).
inline float __fadd_rn(float x, float y) {
    return x + y;
}
inline float __fsub_rn(float x, float y) {
    return x - y;
}
inline float __fmul_rn(float x, float y) {
    return x * y;
}
inline float __fdiv_rn(float x, float y) {
    return x / y;
}
inline float __fmaf_rn(float x, float y, float z) {
    return fmaf(x, y, z);
}
inline double __dadd_rn(double x, double y) {
    return x + y;
}
inline double __dsub_rn(double x, double y) {
    return x - y;
}
inline double __dmul_rn(double x, double y) {
    return x * y;
}
inline double __fma_rn(double x, double y, double z) {
    return fma(x, y, z);
}

namespace simt {
template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace simt
inline int __float_as_int(float x) {
    return simt::bit_cast<int>(x);
}
inline unsigned __float_as_uint(float x) {
    return simt::bit_cast<unsigned>(x);
}
inline float __int_as_float(int x) {
    return simt::bit_cast<float>(x);
}
inline float __uint_as_float(unsigned x) {
    return simt::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
    return simt::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
    return simt::bit_cast<double>(x);
}

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}
inline int __clz(int x) {
    return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline int __clzll(long long x) {
    return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1u) << (31 - bit);
    return result;
}
inline unsigned __umulhi(unsigned x, unsigned y) {
    return static_cast<unsigned>((uint64_t{x} * y) >> 32);
}
inline int __mulhi(int x, int y) {
    return static_cast<int>((int64_t{x} * y) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(x) * y) >> 64);
}
inline float __uint2float_rn(unsigned x) {
    return static_cast<float>(x);
}
inline float __int2float_rn(int x) {
    return static_cast<float>(x);
}
inline int __float2int_rn(float x) {
    return static_cast<int>(rintf(x));
}
inline float __double2float_rn(double x) {
    return static_cast<float>(x);
}
inline float __double2float_rd(double x) {  // toward minus infinity
    float nearest = static_cast<float>(x);
    return nearest > x ? nextafterf(nearest, -INFINITY) : nearest;
}

#define SIMT_MIN_MAX(T)       \
    inline T min(T a, T b) {  \
        return b < a ? b : a; \
    }                         \
    inline T max(T a, T b) {  \
        return a < b ? b : a; \
    }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) {
    return fminf(a, b);
}
inline float max(float a, float b) {
    return fmaxf(a, b);
}
inline double min(double a, double b) {
    return fmin(a, b);
}
inline double max(double a, double b) {
    return fmax(a, b);
}

template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcg(const T* address) {
    return *address;
}
template <class T>
T __ldcs(const T* address) {
    return *address;
}
template <class T>
void __stcg(T* address, T value) {
    *address = value;
}
template <class T>
void __stcs(T* address, T value) {
    *address = value;
}
