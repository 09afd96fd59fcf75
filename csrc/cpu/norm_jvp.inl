// Normalisations of rows and softmax, with K tangents: the primal's row becomes `unit` and `slope`, held in L1; then
// dy = slope (dx - <dx> - unit <dx unit>), one sweep over each tangent's row for the averages and one to write.
#pragma once

#include "balanced_rep/jvp_kernels.h"
#include "convert.inl"
#include "real_math.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

// A float64 mean as two Reals, so that x - mean keeps the digits of x whatever the mean is.
template <class Real>
struct Centre {
  Real high, low;
  explicit Centre(double mean)
      : high(static_cast<Real>(mean)), low(static_cast<Real>(mean - static_cast<double>(high))) {}
  BR_INLINE VecOf<Real> operator()(VecOf<Real> x) const { return (x - high) - low; }
};

// The sum of x - pivot, pivot one of the values: no digits are lost to a mean far from zero.
template <class Real, class T>
BR_INLINE double sum_from(const T* x, int64_t n, Real pivot) {
  double sum[1] = {};
  sum_vectors<1, Real>(n, sum, [&](auto at, auto& s) { s[0] += at.inside(at.get(x) - pivot); });
  return sum[0];
}

// to = x - centre; returns the sum of its squares.
template <class Real, class T>
BR_INLINE double centre_into(const T* x, int64_t n, Centre<Real> centre, Real* to) {
  double sum[1] = {};
  sum_vectors<1, Real>(n, sum, [&](auto at, auto& s) {
    const VecOf<Real> c = at.inside(centre(at.get(x)));
    at.put(to, c);
    s[0] += c * c;
  });
  return sum[0];
}

template <class T, class U>
struct RowJvp {
  typedef RealOf<T> Real;
  typedef VecOf<Real> V;
  const RowTask& t;
  Real *unit, *slope;
  int64_t b, r;

  const T* x() const { return static_cast<const T*>(t.x) + b * t.x_stride[0] + r * t.x_stride[1]; }
  T* y() const { return static_cast<T*>(t.y) + b * t.y_stride[0] + r * t.y_stride[1]; }
  const U* dx(int64_t k) const {
    return static_cast<const U*>(t.dx) + k * t.dx_stride[0] + b * t.dx_stride[1] + r * t.dx_stride[2];
  }
  U* dy(int64_t k) const {
    return static_cast<U*>(t.dy) + k * t.dy_stride[0] + b * t.dy_stride[1] + r * t.dy_stride[2];
  }

  template <bool kCentred>
  void norm() {
    const double n = static_cast<double>(t.d);
    const Real pivot = to_real(*x());
    const double mean = kCentred ? static_cast<double>(pivot) + sum_from<Real>(x(), t.d, pivot) / n : 0.0;
    const double squares = centre_into<Real>(x(), t.d, Centre<Real>(mean), unit);
    const Real rate = static_cast<Real>(1 / sqrt(squares / n + t.eps));
    const Real* const w = t.weight == nullptr ? nullptr : static_cast<const Real*>(t.weight) + b * t.weight_stride;
    const Real* const shift = t.bias == nullptr ? nullptr : static_cast<const Real*>(t.bias) + b * t.bias_stride;
    for_vectors<Real>(t.d, [&](auto at) {
      const V u = at.get(unit) * rate;
      const V gain = w == nullptr ? splat(Real{1}) : at.get(w);
      at.put(unit, u);
      at.put(slope, gain * rate);
      at.put(y(), shift == nullptr ? u * gain : u * gain + at.get(shift));
    });
    for (int64_t k = 0; k < t.k; ++k) {
      const U* const from = dx(k);
      U* const to = dy(k);
      double sums[2] = {};
      sum_vectors<2, Real>(t.d, sums, [&](auto at, auto& s) {
        const V v = at.get(from);
        if (kCentred) s[0] += v;
        s[1] += v * at.get(unit);
      });
      const Real shared = static_cast<Real>(sums[0] / n), along = static_cast<Real>(sums[1] / n);
      for_vectors<Real>(t.d, [&](auto at) {
        const V v = kCentred ? at.get(from) - shared : at.get(from);
        at.put(to, (v - at.get(unit) * along) * at.get(slope));
      });
    }
  }

  void softmax() {
    V tops = splat(-static_cast<Real>(INFINITY));
    Real top = -static_cast<Real>(INFINITY);
    for (int64_t i = 0; i + Simd<Real>::kLanes <= t.d; i += Simd<Real>::kLanes) tops = max_of(load(x() + i), tops);
    top = max_lane(tops);
    for (int64_t i = t.d / Simd<Real>::kLanes * Simd<Real>::kLanes; i < t.d; ++i) {
      const Real v = static_cast<Real>(to_real(x()[i]));
      top = v > top ? v : top;
    }
    double total[1] = {};
    sum_vectors<1, Real>(t.d, total, [&](auto at, auto& s) {
      const V e = at.inside(exp_of(at.get(x()) - top));
      at.put(unit, e);
      s[0] += e;
    });
    const Real share = static_cast<Real>(1 / total[0]);
    for_vectors<Real>(t.d, [&](auto at) {
      const V p = at.get(unit) * share;
      at.put(unit, p);
      at.put(y(), p);
    });
    for (int64_t k = 0; k < t.k; ++k) {
      const U* const from = dx(k);
      U* const to = dy(k);
      double sum[1] = {};
      sum_vectors<1, Real>(t.d, sum, [&](auto at, auto& s) { s[0] += at.get(from) * at.get(unit); });
      const Real along = static_cast<Real>(sum[0]);
      for_vectors<Real>(t.d, [&](auto at) { at.put(to, at.get(unit) * (at.get(from) - along)); });
    }
  }
};

template <class T, class U>
void row_items(const RowTask& task, int64_t first_item, int64_t last_item, void* workspace) {
  typedef RealOf<T> Real;
  Real* const unit = static_cast<Real*>(workspace);
  RowJvp<T, U> row = {task, unit, unit + (task.d + 15) / 16 * 16, 0, 0};
  for (int64_t i = first_item; i < last_item; ++i) {
    row.b = i / task.r;
    row.r = i % task.r;
    switch (task.op) {
      case kLayerNorm:
        row.template norm<true>();
        break;
      case kRmsNorm:
        row.template norm<false>();
        break;
      case kSoftmax:
        row.softmax();
        break;
    }
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
