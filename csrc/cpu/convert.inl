// From what is computed in to what is stored: rounding to nearest, ties to even; and rows of either as Real.
#pragma once

#include "lanes.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

BR_INLINE VecU bfloat_bits(VecF x) {
  const VecU u = bit_cast<VecU>(x);
  const VecU rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return select(bit_cast<VecU>(x != x), VecU{} + 0x7fc0u, rounded);
}

// float16 by its bits. Normal results: the float's exponent moves by 112 and 13 bits are rounded off; subnormal ones:
// adding 0.5 puts the value into the last bits of the sum, rounded.
BR_INLINE VecU half_bits(VecF x) {
  const VecU sign = bit_cast<VecU>(x) >> 16 & 0x8000u;
  const VecU a = bit_cast<VecU>(x) & 0x7fffffffu;
  const VecU normal = (a - (112u << 23) + 0xfffu + (a >> 13 & 1u)) >> 13;
  const VecU subnormal = bit_cast<VecU>(bit_cast<VecF>(a) + 0.5f) - 0x3f000000u;
  VecU bits = select(bit_cast<VecU>(a < VecU{} + 0x38800000u), subnormal, normal);
  bits =
      select(bit_cast<VecU>(a >= VecU{} + 0x477ff000u), VecU{} + 0x7c00u, bits);  // 65520 and above round to infinity
  return sign | select(bit_cast<VecU>(a > VecU{} + 0x7f800000u), VecU{} + 0x7e00u, bits);
}

BR_INLINE void store(float* p, VecF x) { store_bytes(p, x); }
BR_INLINE void store(double* p, VecD x) { store_bytes(p, x); }
BR_INLINE void store(BFloat* p, VecF x) { store_bytes(p, __builtin_convertvector(bfloat_bits(x), HalfVec)); }
BR_INLINE void store(Half* p, VecF x) {
#if defined(BR_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(BR_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  store_bytes(p, __builtin_convertvector(half_bits(x), HalfVec));
#endif
}

template <class E>
BR_INLINE E from_real(RealOf<E> x) {
  if constexpr (sizeof(E) == sizeof(RealOf<E>)) {
    return x;
  } else {
    E lanes[Simd<float>::kLanes];
    store(lanes, splat(x));
    return lanes[0];
  }
}

template <>
BR_INLINE BFloat from_real<BFloat>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x), rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

#ifdef BR_AVX512
// Rows become columns.
BR_INLINE void transpose(VecU (&m)[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)m[i], (__m512i)m[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)m[i], (__m512i)m[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    m[i] = (VecU)_mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    m[i + 8] = (VecU)_mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
  }
}
#endif

// A vector of elements at an index, and the last, shorter one: it goes through a buffer, so that nothing outside is
// touched, and holds zeros behind its end.
struct Whole {
  int64_t i;
  template <class E>
  BR_INLINE VecOf<RealOf<E>> get(const E* p) const {
    return load(p + i);
  }
  template <class E>
  BR_INLINE void put(E* p, VecOf<RealOf<E>> v) const {
    store(p + i, v);
  }
  template <class V>
  BR_INLINE V inside(V v) const {  // zero behind the end
    return v;
  }
};

struct Partial {
  int64_t i;
  int n;
  template <class E>
  BR_INLINE VecOf<RealOf<E>> get(const E* p) const {
    typedef RealOf<E> Real;
    Real lanes[Simd<Real>::kLanes] = {};
    for (int j = 0; j < n; ++j) lanes[j] = to_real(p[i + j]);
    return load(static_cast<const Real*>(lanes));
  }
  template <class E>
  BR_INLINE void put(E* p, VecOf<RealOf<E>> v) const {
    for (int j = 0; j < n; ++j) p[i + j] = from_real<E>(v[j]);
  }
  template <class V>
  BR_INLINE V inside(V v) const {
    for (int j = n; j < static_cast<int>(sizeof(V) / sizeof(v[0])); ++j) v[j] = 0;
    return v;
  }
};

// f(at) over [0, n).
template <class Real, class F>
BR_INLINE void for_vectors(int64_t n, const F& f) {
  constexpr int kLanes = Simd<Real>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(Whole{i});
  if (i < n) f(Partial{i, static_cast<int>(n - i)});
}

// total[s] += the sums s of what f(at, sums) adds up over [0, n), in vectors of Real for a few thousand elements at a
// time and in float64 beyond.
template <int kSums, class Real, class F>
BR_INLINE void sum_vectors(int64_t n, double (&total)[kSums], const F& f) {
  constexpr int kLanes = Simd<Real>::kLanes, kChains = 4;
  constexpr int64_t kStretch = 4096;
  for (int64_t first = 0; first < n; first += kStretch) {
    const int64_t end = n - first < kStretch ? n : first + kStretch;
    VecOf<Real> sums[kChains][kSums] = {};
    int64_t i = first;
    for (; i + kChains * kLanes <= end; i += kChains * kLanes) {
#pragma GCC unroll 4
      for (int u = 0; u < kChains; ++u) f(Whole{i + u * kLanes}, sums[u]);
    }
    for (; i + kLanes <= end; i += kLanes) f(Whole{i}, sums[0]);
    if (i < end) f(Partial{i, static_cast<int>(end - i)}, sums[1]);
    for (int s = 0; s < kSums; ++s) {
      total[s] += static_cast<double>(sum_lanes((sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s])));
    }
  }
}

template <class E, class Real>
BR_INLINE void convert_row(const E* from, int64_t n, Real* to) {
  for_vectors<Real>(n, [&](auto at) { at.put(to, at.get(from)); });
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
