// The state of a sample: how two merge, how one is written out, and the slow, exact way to one.
#pragma once

#include "walk.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

struct State {
  double n, mean, m2, m3, m4, l1, lo, hi, active, nonfinite;
};

BR_INLINE State empty_state() { return {0, 0, 0, 0, 0, 0, __builtin_inf(), -__builtin_inf(), 0, 0}; }

BR_INLINE double min_or_nan(double a, double b) { return a != a ? a : (b < a || b != b ? b : a); }
BR_INLINE double max_or_nan(double a, double b) { return a != a ? a : (b > a || b != b ? b : a); }

// Chan and Pebay: exact up to float64 rounding. b joins a; neither is empty.
inline void merge(State& a, const State& b) {
  const double n = a.n + b.n, ra = a.n / n, rb = b.n / n, d = b.mean - a.mean;
  if (a.nonfinite + b.nonfinite > 0) {
    a.mean = a.mean * ra + b.mean * rb;
    a.m2 = a.m3 = a.m4 = __builtin_nan("");
  } else {
    const double d2 = d * d, w = a.n * rb;
    a.m4 += b.m4 + d2 * d2 * w * (ra * ra - ra * rb + rb * rb) + 6 * d2 * (ra * ra * b.m2 + rb * rb * a.m2) +
            4 * d * (ra * b.m3 - rb * a.m3);
    a.m3 += b.m3 + d2 * d * w * (ra - rb) + 3 * d * (ra * b.m2 - rb * a.m2);
    a.m2 += b.m2 + d2 * w;
    a.mean += d * rb;
  }
  a.n = n;
  a.l1 += b.l1;
  a.lo = min_or_nan(a.lo, b.lo);
  a.hi = max_or_nan(a.hi, b.hi);
  a.active += b.active;
  a.nonfinite += b.nonfinite;
}

// A constant sample has no rounding dust in its mean and moments, and even moments are not negative.
BR_INLINE void finish(State& s) {
  const bool constant = s.lo == s.hi && s.nonfinite == 0;
  s.mean = constant ? s.lo : s.mean;
  s.m2 = constant || s.m2 < 0 ? 0.0 : s.m2;
  s.m3 = constant ? 0.0 : s.m3;
  s.m4 = constant || s.m4 < 0 ? 0.0 : s.m4;
}

// Writes states to out[field * stride + index]. Neighbours are written together, field by field: the fields of one
// state may be a multiple of 4096 bytes apart, and would evict each other from the cache.
class Emitter {
 public:
  BR_INLINE Emitter(double* out, int64_t stride) : out_(out), stride_(stride), first_(0), held_(0) {}
  BR_INLINE ~Emitter() { write(); }

  BR_INLINE void add(State s, int64_t index) {
    if (held_ == kHeld || index != first_ + held_) {
      write();
      first_ = index;
    }
    finish(s);
    states_[held_++] = s;
  }

 private:
  static constexpr int kHeld = 16;

  BR_INLINE void write() {
    for (int f = 0; f < kFields; ++f) {
      double* const to = out_ + f * stride_ + first_;
      for (int k = 0; k < held_; ++k) memcpy(to + k, reinterpret_cast<const double*>(states_ + k) + f, sizeof(double));
    }
    held_ = 0;
  }

  double* out_;
  int64_t stride_, first_;
  int held_;
  State states_[kHeld];
};

template <class Real>
BR_INLINE Real threshold_of(const MomentsTask& task);
template <>
BR_INLINE float threshold_of<float>(const MomentsTask& task) {
  return task.threshold_f32;
}
template <>
BR_INLINE double threshold_of<double>(const MomentsTask& task) {
  return task.threshold;
}

// The slow pass: two float64 passes element by element. It counts what is not finite, and it has the range for finite
// values whose float32 sums overflow. value(i) is element i as a double.
template <class Value>
inline State exact_state(int64_t n, double threshold, Value value) {
  State s = empty_state();
  s.n = static_cast<double>(n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = value(i);
    sum += x;
    s.l1 += __builtin_fabs(x);
    s.lo = min_or_nan(s.lo, x);
    s.hi = max_or_nan(s.hi, x);
    s.active += x > threshold;
    s.nonfinite += !(__builtin_fabs(x) <= DBL_MAX);
  }
  s.mean = sum / s.n;
  if (!(__builtin_fabs(s.mean) <= DBL_MAX) && s.nonfinite == 0) {  // the sum of finite values overflowed
    s.mean = 0;
    for (int64_t i = 0; i < n; ++i) s.mean += value(i) / s.n;
  }
  if (s.nonfinite > 0) {
    s.m2 = s.m3 = s.m4 = __builtin_nan("");
    return s;
  }
  double rest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = value(i) - s.mean, d2 = d * d;
    rest += d;
    s.m2 += d2;
    s.m3 += d2 * d;
    s.m4 += d2 * d2;
  }
  const double e = rest / s.n;  // what rounding left in the mean
  s.m4 -= e * (4 * s.m3 - 6 * e * s.m2) + 3 * s.n * e * e * e * e;
  s.m3 -= 3 * e * s.m2 - 2 * s.n * e * e * e;
  s.m2 -= s.n * e * e;
  s.mean += e;
  return s;
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
