// The moments of some values, their merge, and how they lie in memory. All in float64.
#pragma once
#include "moments_numbers.cuh"

namespace balanced_rep {

constexpr int kFields = 10;

struct State {
  double n, mean, m2, m3, m4, l1, low, high, n_active, n_nonfinite;
};

__device__ __forceinline__ State empty_state() {
  const double inf = infinity<double>();
  return {0, 0, 0, 0, 0, 0, inf, -inf, 0, 0};
}

// What holds whatever the rounding: even moments are not negative, non-finite values have none.
__device__ __forceinline__ void settle(State& s) {
  if (s.n_nonfinite > 0) {
    s.m2 = s.m3 = s.m4 = not_a_number();
  } else {
    s.m2 = fmax(s.m2, 0.0);
    s.m4 = fmax(s.m4, 0.0);
  }
}

// Moments of the union; b may be empty. With d = mean_b - mean_a, p = n_a / n, q = n_b / n:
//   mean = mean_a + d q,  m2 = m2_a + m2_b + d^2 n_a q,
//   m3 = m3_a + m3_b + d^3 n_a q (p - q) + 3 d (p m2_b - q m2_a),
//   m4 = m4_a + m4_b + d^4 n_a q (p^2 - p q + q^2) + 6 d^2 (p^2 m2_b + q^2 m2_a) + 4 d (p m3_b - q m3_a).
__device__ __forceinline__ State merge(const State& a, const State& b) {
  if (b.n == 0) return a;
  State s;
  s.n = a.n + b.n;
  s.n_active = a.n_active + b.n_active;
  s.n_nonfinite = a.n_nonfinite + b.n_nonfinite;
  s.l1 = a.l1 + b.l1;
  const bool number = a.low == a.low && b.low == b.low;  // low and high are NaN together
  s.low = number ? fmin(a.low, b.low) : not_a_number();
  s.high = number ? fmax(a.high, b.high) : not_a_number();
  const double inverse = 1 / s.n, p = a.n * inverse, q = b.n * inverse, d = b.mean - a.mean, dd = d * d, nq = a.n * q;
  s.mean = s.n_nonfinite > 0 ? (a.n * a.mean + b.n * b.mean) * inverse : a.mean + d * q;
  s.m2 = a.m2 + b.m2 + dd * nq;
  s.m3 = a.m3 + b.m3 + dd * d * nq * (p - q) + 3 * d * (p * b.m2 - q * a.m2);
  s.m4 = a.m4 + b.m4 + dd * dd * nq * (p * p - p * q + q * q) + 6 * dd * (p * p * b.m2 + q * q * a.m2) +
         4 * d * (p * b.m3 - q * a.m3);
  return s;
}

__device__ __forceinline__ void store(double* target, int64 field_stride, State s) {
  settle(s);
  const double fields[kFields] = {s.n, s.mean, s.m2, s.m3, s.m4, s.l1, s.low, s.high, s.n_active, s.n_nonfinite};
#pragma unroll
  for (int f = 0; f < kFields; ++f) target[f * field_stride] = fields[f];
}

// Past the first-level cache, which does not see what other blocks have written.
__device__ __forceinline__ State fetch(const double* source, int64 field_stride) {
  double fields[kFields];
#pragma unroll
  for (int f = 0; f < kFields; ++f) fields[f] = __ldcg(source + f * field_stride);
  return {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5], fields[6], fields[7], fields[8], fields[9]};
}

}  // namespace balanced_rep
