// Vectors of BR_VECTOR_BYTES bytes: GCC's and clang's vector extension, plus the few operations that it does not
// express well as intrinsics. Without the matching instruction set the same source is lowered by the compiler, which is
// how the 64-byte logic is tested on machines without AVX-512.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef BR_VECTOR_BYTES
#if defined(__AVX512F__)
#define BR_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define BR_VECTOR_BYTES 32
#else
#define BR_VECTOR_BYTES 16
#endif
#endif

#if BR_VECTOR_BYTES == 64 && defined(__AVX512F__)
#define BR_AVX512 1
#elif BR_VECTOR_BYTES == 32 && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BR_AVX2 1
#elif BR_VECTOR_BYTES == 16 && defined(__aarch64__)
#define BR_NEON 1
#elif BR_VECTOR_BYTES == 16 && defined(__SSE2__)
#define BR_SSE2 1
#endif

#define BR_INLINE inline __attribute__((always_inline))
#define BR_NOINLINE __attribute__((noinline))
#define BR_VECTOR __attribute__((vector_size(BR_VECTOR_BYTES)))
#define BR_PREFETCH(address) __builtin_prefetch((address), 0, 3)

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

typedef float VecF BR_VECTOR;
typedef double VecD BR_VECTOR;
typedef int32_t VecI BR_VECTOR;
typedef uint32_t VecU BR_VECTOR;
typedef int64_t VecL BR_VECTOR;
typedef uint64_t VecUL BR_VECTOR;
typedef uint16_t HalfVec __attribute__((vector_size(BR_VECTOR_BYTES / 2)));
typedef float HalfVecF __attribute__((vector_size(BR_VECTOR_BYTES / 2)));
typedef int32_t HalfVecI __attribute__((vector_size(BR_VECTOR_BYTES / 2)));

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// What an element is computed in, and the vectors of it.
template <class Real>
struct Simd;
template <>
struct Simd<float> {
  typedef VecF V;
  typedef VecI I;
  typedef int32_t Int;
  static constexpr int kLanes = BR_VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
  typedef VecD V;
  typedef VecL I;
  typedef int64_t Int;
  static constexpr int kLanes = BR_VECTOR_BYTES / 8;
};

template <class T>
struct Element {
  typedef float Real;
};
template <>
struct Element<double> {
  typedef double Real;
};

template <class T>
using RealOf = typename Element<T>::Real;
template <class Real>
using VecOf = typename Simd<Real>::V;
template <class Real>
using IntVecOf = typename Simd<Real>::I;

template <class To, class From>
BR_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Real>
BR_INLINE VecOf<Real> splat(Real x) {
  return x - VecOf<Real>{};  // not 0 + x, which the compiler has to add: it changes -0
}

template <class V>
BR_INLINE V load_bytes(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
BR_INLINE void store_bytes(void* p, V v) {
  memcpy(p, &v, sizeof(V));
}

BR_INLINE float to_real(float x) { return x; }
BR_INLINE double to_real(double x) { return x; }
BR_INLINE float to_real(BFloat x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// float16 by its bits: the magnitude, moved to float32's place, is 2^-112 of the value; infinities and NaN need the
// full exponent. A subnormal needs a normal multiplication, which this is.
BR_INLINE float to_real(Half x) {
  const uint32_t h = x.bits;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>((h & 0x7fffu) << 13) * 0x1p112f);
  if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  return bit_cast<float>(bits | (h & 0x8000u) << 16);
}

BR_INLINE VecF half_bits_to_float(VecU h) {
  VecU bits = bit_cast<VecU>(bit_cast<VecF>((h & 0x7fffu) << 13) * 0x1p112f);
  const VecU special = bit_cast<VecU>((h & 0x7c00u) == 0x7c00u);
  bits |= special & 0x7f800000u;
  return bit_cast<VecF>(bits | (h & 0x8000u) << 16);
}

// Lanes in the order of memory.
BR_INLINE VecF load(const float* p) { return load_bytes<VecF>(p); }
BR_INLINE VecD load(const double* p) { return load_bytes<VecD>(p); }
BR_INLINE VecF load(const BFloat* p) {
  return bit_cast<VecF>(__builtin_convertvector(load_bytes<HalfVec>(p), VecU) << 16);
}
BR_INLINE VecF load(const Half* p) {
#if defined(BR_AVX512)
  return bit_cast<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(BR_AVX2)
  return bit_cast<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(BR_NEON)
  return bit_cast<VecF>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)))));
#else
  return half_bits_to_float(__builtin_convertvector(load_bytes<HalfVec>(p), VecU));
#endif
}

// Two vectors in whatever order is cheapest: a reduction does not mind. pair_position says which lane holds what.
template <class T>
struct Interleaved {  // the pair splits into even and odd elements, not into first and second half
  static constexpr bool value = false;
};
template <>
struct Interleaved<BFloat> {
  static constexpr bool value = true;
};
#if !defined(BR_AVX512) && !defined(BR_AVX2) && !defined(BR_NEON)
template <>
struct Interleaved<Half> {
  static constexpr bool value = true;
};
#endif

template <class T>
BR_INLINE void load_pair(const T* p, VecOf<RealOf<T>>& x, VecOf<RealOf<T>>& y) {
  x = load(p);
  y = load(p + Simd<RealOf<T>>::kLanes);
}
// No widening shuffle: a 16-bit element moves to the high half of its 32-bit lane by a shift, or stays there by a mask.
BR_INLINE void load_pair(const BFloat* p, VecF& x, VecF& y) {
  const VecU u = load_bytes<VecU>(p);
  x = bit_cast<VecF>(u << 16);
  y = bit_cast<VecF>(u & 0xffff0000u);
}
#if !defined(BR_AVX512) && !defined(BR_AVX2) && !defined(BR_NEON)
BR_INLINE void load_pair(const Half* p, VecF& x, VecF& y) {
  const VecU u = load_bytes<VecU>(p);
  x = half_bits_to_float(u & 0xffffu);
  y = half_bits_to_float(u >> 16);
}
#endif

// One vector of such a pair: lanes in the order of memory, or the even or odd of twice as many elements.
template <bool kOdd, class T>
BR_INLINE VecOf<RealOf<T>> load_strip(const T* p) {
  if constexpr (Interleaved<T>::value) {
    VecF x, y;
    load_pair(p, x, y);
    return kOdd ? y : x;
  } else {
    return load(p);
  }
}

template <class T>
BR_INLINE void pair_position(IntVecOf<RealOf<T>>& x, IntVecOf<RealOf<T>>& y) {
  typedef Simd<RealOf<T>> S;
  typename S::Int first[S::kLanes], second[S::kLanes];
  for (int k = 0; k < S::kLanes; ++k) {
    first[k] = Interleaved<T>::value ? 2 * k : k;
    second[k] = Interleaved<T>::value ? 2 * k + 1 : k + S::kLanes;
  }
  x = load_bytes<typename S::I>(first);
  y = load_bytes<typename S::I>(second);
}

BR_INLINE VecF abs_of(VecF x) { return bit_cast<VecF>(bit_cast<VecI>(x) & 0x7fffffff); }
BR_INLINE VecD abs_of(VecD x) { return bit_cast<VecD>(bit_cast<VecL>(x) & 0x7fffffffffffffff); }

template <class I, class V>
BR_INLINE V keep(I mask, V x) {  // x where the mask is set, else +0
  return bit_cast<V>(bit_cast<I>(x) & mask);
}
template <class I, class V>
BR_INLINE V select(I mask, V x, V y) {
  return bit_cast<V>((bit_cast<I>(x) & mask) | (bit_cast<I>(y) & ~mask));
}

// x < y ? x : y and x > y ? x : y: the second operand where one is NaN.
#if defined(BR_AVX512)
BR_INLINE VecF min_of(VecF x, VecF y) { return (VecF)_mm512_min_ps((__m512)x, (__m512)y); }
BR_INLINE VecF max_of(VecF x, VecF y) { return (VecF)_mm512_max_ps((__m512)x, (__m512)y); }
BR_INLINE VecD min_of(VecD x, VecD y) { return (VecD)_mm512_min_pd((__m512d)x, (__m512d)y); }
BR_INLINE VecD max_of(VecD x, VecD y) { return (VecD)_mm512_max_pd((__m512d)x, (__m512d)y); }
#elif defined(BR_AVX2)
BR_INLINE VecF min_of(VecF x, VecF y) { return (VecF)_mm256_min_ps((__m256)x, (__m256)y); }
BR_INLINE VecF max_of(VecF x, VecF y) { return (VecF)_mm256_max_ps((__m256)x, (__m256)y); }
BR_INLINE VecD min_of(VecD x, VecD y) { return (VecD)_mm256_min_pd((__m256d)x, (__m256d)y); }
BR_INLINE VecD max_of(VecD x, VecD y) { return (VecD)_mm256_max_pd((__m256d)x, (__m256d)y); }
#elif defined(BR_SSE2)
BR_INLINE VecF min_of(VecF x, VecF y) { return (VecF)_mm_min_ps((__m128)x, (__m128)y); }
BR_INLINE VecF max_of(VecF x, VecF y) { return (VecF)_mm_max_ps((__m128)x, (__m128)y); }
BR_INLINE VecD min_of(VecD x, VecD y) { return (VecD)_mm_min_pd((__m128d)x, (__m128d)y); }
BR_INLINE VecD max_of(VecD x, VecD y) { return (VecD)_mm_max_pd((__m128d)x, (__m128d)y); }
#else
template <class V>
BR_INLINE V min_of(V x, V y) {
  return x < y ? x : y;
}
template <class V>
BR_INLINE V max_of(V x, V y) {
  return x > y ? x : y;
}
#endif

// count + 1 in the lanes where x > y.
#if defined(BR_AVX512)
BR_INLINE VecI count_greater(VecI count, VecF x, VecF y) {
  const __mmask16 m = _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ);
  return (VecI)_mm512_mask_add_epi32((__m512i)count, m, (__m512i)count, _mm512_set1_epi32(1));
}
BR_INLINE VecL count_greater(VecL count, VecD x, VecD y) {
  const __mmask8 m = _mm512_cmp_pd_mask((__m512d)x, (__m512d)y, _CMP_GT_OQ);
  return (VecL)_mm512_mask_add_epi64((__m512i)count, m, (__m512i)count, _mm512_set1_epi64(1));
}
#else
BR_INLINE VecI count_greater(VecI count, VecF x, VecF y) { return count - bit_cast<VecI>(x > y); }
BR_INLINE VecL count_greater(VecL count, VecD x, VecD y) { return count - bit_cast<VecL>(x > y); }
#endif

template <class I>
BR_INLINE bool any(I mask) {
#if defined(BR_AVX512)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(BR_AVX2)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(BR_SSE2)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#elif defined(BR_NEON)
  return vmaxvq_u32(bit_cast<uint32x4_t>(mask)) != 0;
#else
  uint64_t bits[BR_VECTOR_BYTES / 8], joined = 0;
  memcpy(bits, &mask, sizeof(bits));
  for (uint64_t b : bits) joined |= b;
  return joined != 0;
#endif
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
