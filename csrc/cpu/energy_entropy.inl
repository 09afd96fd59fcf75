// E = sum v^2 ln v^2, in float64 throughout: terms of both signs cancel where |v| is near 1.
//
// ln |v| = k ln 2 + 2 atanh(s) with |v| = m 2^k, m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1), |s| <= 0.172. The
// odd series of atanh up to s^21 is exact to float64 rounding. v = 0 gives 0 times something finite; NaN and infinity
// pass through v^2.
#pragma once

#include "walk.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int64_t kSqrtHalfBits = 0x3FE6A09E667F3BCD;
constexpr int64_t kExponentBias = int64_t{1} << 62;  // keeps the exponent positive, so that a logical shift suffices

BR_INLINE VecD energy_log(VecD v) {
  const VecL bits = bit_cast<VecL>(abs_of(v));
  const VecL shifted = bits - kSqrtHalfBits + kExponentBias;
  const VecL k = bit_cast<VecL>(bit_cast<VecUL>(shifted) >> 52);  // k + 1024
  const VecD m = bit_cast<VecD>(bits - ((k - 1024) << 52));
  const VecD exponent = bit_cast<VecD>(k | int64_t{0x4330000000000000}) - (0x1p52 + 1024.0);
  const VecD s = (m - 1.0) / (m + 1.0), z = s * s;
  VecD series = splat(1.0 / 21);
  series = series * z + 1.0 / 19;
  series = series * z + 1.0 / 17;
  series = series * z + 1.0 / 15;
  series = series * z + 1.0 / 13;
  series = series * z + 1.0 / 11;
  series = series * z + 1.0 / 9;
  series = series * z + 1.0 / 7;
  series = series * z + 1.0 / 5;
  series = series * z + 1.0 / 3;
  series = series * z + 1.0;
  const VecD log = exponent * 0.69314718055994531 + 2.0 * s * series;
  return v * v * (2.0 * log);
}

BR_INLINE VecD energy_log_of(VecF x) { return energy_log(widen(x, 0)) + energy_log(widen(x, 1)); }
BR_INLINE VecD energy_log_of(VecD x) { return energy_log(x); }

template <class T>
BR_INLINE double sum_energy_logs(const T* p, int64_t n) {
  typedef RealOf<T> Real;
  constexpr int kLanes = Simd<Real>::kLanes;
  VecD sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += energy_log_of(load(p + i));
  if (i < n) {
    Real tail[kLanes] = {};  // zeros add nothing
    const int left = static_cast<int>(n - i);
    p += i;
    for (int j = 0; j < left; ++j) tail[j] = to_real(p[j]);
    sum += energy_log_of(load(static_cast<const Real*>(tail)));
  }
  return sum_lanes(sum);
}

template <class T, Pool kPool>
inline void entropy_items(const EntropyTask& task, int64_t first_kept, int64_t last_kept) {
  const Reduction& r = task.r;
  Walker in(r.kept, 0, first_kept), out(r.kept, r.kept_out, 0, first_kept);
  for (int64_t i = first_kept; i < last_kept; ++i, in.next(), out.next()) {
    double sum = 0;
    for_each_chunk<T, kPool>(static_cast<const T*>(r.x) + in.offset, r, 0, r.n_reduced,
                             [&](const auto* p, int64_t n) { sum += sum_energy_logs(p, n); });
    task.out[out.offset] = sum * static_cast<double>(task.repeated);
  }
}

template <class T>
void energy_entropy_items(const EntropyTask& task, int64_t first_kept, int64_t last_kept) {
  switch (task.r.pool) {
    case kPoolNone:
      return entropy_items<T, kPoolNone>(task, first_kept, last_kept);
    case kPoolMax:
      return entropy_items<T, kPoolMax>(task, first_kept, last_kept);
    case kPoolMean:
      return entropy_items<T, kPoolMean>(task, first_kept, last_kept);
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
