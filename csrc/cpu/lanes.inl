// Across the lanes of a vector: to and from float64, and horizontal sums and extremes.
#pragma once

#include "simd.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

// Vectors of doubles that hold the lanes of one vector of Real.
template <class Real>
struct Parts {
  static constexpr int kCount = Simd<Real>::kLanes / Simd<double>::kLanes;
};

template <class Half, class V>
BR_INLINE Half half_of(V v, int part) {
  Half h;
  memcpy(&h, reinterpret_cast<const char*>(&v) + part * sizeof(h), sizeof(h));
  return h;
}

BR_INLINE VecD widen(VecF x, int part) { return __builtin_convertvector(half_of<HalfVecF>(x, part), VecD); }
BR_INLINE VecD widen(VecD x, int) { return x; }
BR_INLINE VecD widen_count(VecI x, int part) { return __builtin_convertvector(half_of<HalfVecI>(x, part), VecD); }
BR_INLINE VecD widen_count(VecL x, int) { return __builtin_convertvector(x, VecD); }
BR_INLINE VecL widen_mask(VecI x, int part) { return __builtin_convertvector(half_of<HalfVecI>(x, part), VecL); }
BR_INLINE VecL widen_mask(VecL x, int) { return x; }

// The vector of Real whose lanes are part(0), part(kLanes of a vector of doubles).
template <class Real, class Part>
BR_INLINE VecOf<Real> narrow(Part part) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    return part(0);
  } else {
    const HalfVecF halves[2] = {__builtin_convertvector(part(0), HalfVecF),
                                __builtin_convertvector(part(Simd<double>::kLanes), HalfVecF)};
    return load_bytes<VecF>(halves);
  }
}

// Folds a vector of E onto its lower half until 16 bytes are left; then lane by lane. Always in the same order.
template <class E>
struct Quarter {
  typedef E V __attribute__((vector_size(16)));
};

template <class E, class V, class Op>
BR_INLINE typename Quarter<E>::V fold_to_quarter(V v, Op op) {
  typename Quarter<E>::V quarter[BR_VECTOR_BYTES / 16];
  memcpy(quarter, &v, sizeof(V));
  for (int half = BR_VECTOR_BYTES / 32; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) quarter[k] = op(quarter[k], quarter[k + half]);
  }
  return quarter[0];
}

template <class E, class V, class Op>
BR_INLINE E fold(V v, Op op) {
  const typename Quarter<E>::V q = fold_to_quarter<E>(v, op);
  E r = q[0];
  for (int k = 1; k < static_cast<int>(16 / sizeof(E)); ++k) r = op(r, static_cast<E>(q[k]));
  return r;
}

struct Add {
  template <class V>
  BR_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Smaller {
  template <class V>
  BR_INLINE V operator()(V a, V b) const {
    return a < b ? a : b;
  }
};
struct Larger {
  template <class V>
  BR_INLINE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

BR_INLINE float sum_lanes(VecF v) { return fold<float>(v, Add()); }
BR_INLINE double sum_lanes(VecD v) { return fold<double>(v, Add()); }
BR_INLINE int32_t sum_lanes(VecI v) { return fold<int32_t>(v, Add()); }
BR_INLINE int64_t sum_lanes(VecL v) { return fold<int64_t>(v, Add()); }
BR_INLINE float min_lane(VecF v) { return fold<float>(v, Smaller()); }
BR_INLINE double min_lane(VecD v) { return fold<double>(v, Smaller()); }
BR_INLINE float max_lane(VecF v) { return fold<float>(v, Larger()); }
BR_INLINE double max_lane(VecD v) { return fold<double>(v, Larger()); }

// Lanes k of two vectors of four as the compilers spell it.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define BR_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector((a), (b), (i), (j), (k), (l))
#endif
#endif
#if !defined(BR_SHUFFLE)
#define BR_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle((a), (b), (Quarter<int32_t>::V){(i), (j), (k), (l)})
#endif

// The sums of four vectors, by a transposition instead of one lane at a time.
BR_INLINE void sum_lanes(VecF a, VecF b, VecF c, VecF d, double* sums) {
  typedef Quarter<float>::V Q;
  const Q qa = fold_to_quarter<float>(a, Add()), qb = fold_to_quarter<float>(b, Add());
  const Q qc = fold_to_quarter<float>(c, Add()), qd = fold_to_quarter<float>(d, Add());
  const Q ab = BR_SHUFFLE(qa, qb, 0, 4, 1, 5) + BR_SHUFFLE(qa, qb, 2, 6, 3, 7);
  const Q cd = BR_SHUFFLE(qc, qd, 0, 4, 1, 5) + BR_SHUFFLE(qc, qd, 2, 6, 3, 7);
  const Q all = BR_SHUFFLE(ab, cd, 0, 1, 4, 5) + BR_SHUFFLE(ab, cd, 2, 3, 6, 7);
  for (int k = 0; k < 4; ++k) sums[k] = static_cast<double>(all[k]);
}
BR_INLINE void sum_lanes(VecD a, VecD b, VecD c, VecD d, double* sums) {
  sums[0] = sum_lanes(a);
  sums[1] = sum_lanes(b);
  sums[2] = sum_lanes(c);
  sums[3] = sum_lanes(d);
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
