// Activations and their gated forms with K tangents: f and f' of a chunk of the primal stay in L1 for all of them.
#pragma once

#include "balanced_rep/jvp_kernels.h"
#include "convert.inl"
#include "real_math.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

template <Activation kKind, class V>
BR_INLINE void activation(V x, V& f, V& slope) {
  if constexpr (kKind == kSilu) {
    V rest;
    const V g = logistic(x, rest);
    f = x * g;
    slope = g * (1 + x * rest);
  } else if constexpr (kKind == kGelu) {
    V density;
    normal_of(x, f, density);
    slope = f + x * density;
    f = x * f;
  } else {  // x sigma(2 u), u = sqrt(2 / pi) (x + a x^3)
    typedef decltype(x[0] + 0) Real;
    const Real c = static_cast<Real>(1.5957691216057308), a = static_cast<Real>(0.044715);
    const V z = x * x;
    V rest;
    const V g = logistic(c * (x + a * x * z), rest);
    f = x * g;
    slope = g + f * rest * (c * (1 + 3 * a * z));
  }
}

template <Activation kKind, class T, class U>
void activation_chunk(const ActivationTask& t, int64_t row, int64_t first, int64_t n) {
  typedef RealOf<T> Real;
  typedef VecOf<Real> V;
  Real value[kActivationChunk], slope[kActivationChunk];
  const T* const x = static_cast<const T*>(t.x) + row * t.x_stride + first;
  T* const y = static_cast<T*>(t.y) + row * t.y_stride + first;
  const T* const g = t.g == nullptr ? nullptr : static_cast<const T*>(t.g) + row * t.g_stride + first;
  for_vectors<Real>(n, [&](auto i) {
    V f, d;
    activation<kKind>(i.get(g == nullptr ? x : g), f, d);
    if (g == nullptr) {
      i.put(y, f);
    } else {
      const V h = i.get(x);
      i.put(y, h * f);
      i.put(value, f);
      d *= h;
    }
    i.put(slope, d);
  });
  for (int64_t k = 0; k < t.k; ++k) {
    const U* const dx = static_cast<const U*>(t.dx) + k * t.dx_stride[0] + row * t.dx_stride[1] + first;
    U* const dy = static_cast<U*>(t.dy) + k * t.dy_stride[0] + row * t.dy_stride[1] + first;
    if (g == nullptr) {
      for_vectors<Real>(n, [&](auto i) { i.put(dy, i.get(dx) * i.get(slope)); });
    } else {
      const U* const dg = static_cast<const U*>(t.dg) + k * t.dg_stride[0] + row * t.dg_stride[1] + first;
      for_vectors<Real>(n, [&](auto i) { i.put(dy, i.get(dx) * i.get(value) + i.get(dg) * i.get(slope)); });
    }
  }
}

template <class T, class U>
void activation_items(const ActivationTask& task, int64_t first_item, int64_t last_item) {
  const int64_t chunks = (task.n + kActivationChunk - 1) / kActivationChunk;
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t row = item / chunks, first = item % chunks * kActivationChunk;
    const int64_t n = task.n - first < kActivationChunk ? task.n - first : kActivationChunk;
    switch (task.kind) {
      case kSilu:
        activation_chunk<kSilu, T, U>(task, row, first, n);
        break;
      case kGelu:
        activation_chunk<kGelu, T, U>(task, row, first, n);
        break;
      default:
        activation_chunk<kGeluTanh, T, U>(task, row, first, n);
    }
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
