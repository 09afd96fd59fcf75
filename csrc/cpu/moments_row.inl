// Moments of a contiguous run, in chunks that stay in L1.
//
// One optimistic pass per chunk sums, around a pivot p and with an exact power-of-two scale s, d = (x - p) s and its
// powers, with sum |x|, min, max and the active count beside them: 12 vector operations an element vector, so that a
// run in memory is read once, at the speed of memory. Lanes are float32 sums of at most 32 terms, which are added to
// float32 sums of the chunk, which are merged in float64.
//
// Why the pivot needs no second pass: it is the mean so far, and a chunk whose mean differs from it by e adds
// e^2 n_a n_b / (n_a + n_b) >= e^2 n_b / 2 to the total m2 (and likewise to m4), while its own rounding error is a few
// eps n_b e^2. Only a chunk that outweighs everything before it, the first one, has to be near its own mean: it starts
// from the mean of a sample, is checked, and if need be repeated with the mean just found.
#pragma once

#include "moments_state.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int kBlockPairs = 32;  // vector pairs summed before the lanes are put aside
constexpr int kSamplePairs = 4;  // vector pairs whose mean is the first pivot
constexpr int kRunChunk = 8192;  // elements of a chunk that is read where it lies, twice only if its pivot misses
constexpr int kPrefetchBytes = 2048;

template <class Real>
struct Scale {
  Real s;  // a power of two: s * spread is in [1, 2) unless that leaves the range of normal numbers
  double inverse;
};

BR_INLINE Scale<float> scale_of(float, double spread) {
  int e = static_cast<int>(bit_cast<uint64_t>(spread) >> 52 & 0x7ff) - 1023;
  e = e < -126 ? -126 : e > 126 ? 126 : e;
  return {bit_cast<float>(static_cast<uint32_t>(127 - e) << 23),
          bit_cast<double>(static_cast<uint64_t>(1023 + e) << 52)};
}
BR_INLINE Scale<double> scale_of(double, double spread) {
  int e = static_cast<int>(bit_cast<uint64_t>(spread) >> 52 & 0x7ff) - 1023;
  e = e < -1022 ? -1022 : e > 1022 ? 1022 : e;
  return {bit_cast<double>(static_cast<uint64_t>(1023 - e) << 52),
          bit_cast<double>(static_cast<uint64_t>(1023 + e) << 52)};
}

// Where the sums of a chunk are taken: d = x * scale.s - pivot.
template <class Real>
struct Frame {
  Scale<Real> scale;
  Real pivot;  // already scaled
};

template <class Real>
BR_INLINE Frame<Real> frame_at(double mean, double spread) {
  if (!(spread > 0)) spread = __builtin_fabs(mean);
  if (!(spread > 0)) spread = 1;
  Frame<Real> f;
  f.scale = scale_of(Real(), spread);
  f.pivot = static_cast<Real>(mean * static_cast<double>(f.scale.s));
  if (!(f.pivot - f.pivot == 0)) f.pivot = 0;
  return f;
}

template <class Real>
struct Sums {
  VecOf<Real> l1, d1, m2, m3, m4, lo, hi;
  IntVecOf<Real> active;
};

template <class Real>
BR_INLINE Sums<Real> zero_sums() {
  typedef VecOf<Real> V;
  return {V{},
          V{},
          V{},
          V{},
          V{},
          splat(static_cast<Real>(__builtin_inf())),
          splat(static_cast<Real>(-__builtin_inf())),
          IntVecOf<Real>{}};
}

// Sums in registers. A pair is summed as a tree where that costs nothing, which halves the latency of the chains; the
// chains of fused multiply-adds are kept apart. Adds for m2, fused multiply-adds for m3 and m4: this balances the ports
// of processors that have separate ones. 16 registers suffice without a spill.
template <class Real>
struct Registers {
  typedef VecOf<Real> V;
  V l1{}, d1{}, m2{}, m3x{}, m3y{}, m4x{}, m4y{}, lo, hi;
  IntVecOf<Real> active;

  BR_INLINE explicit Registers(const Sums<Real>& s) : lo(s.lo), hi(s.hi), active(s.active) {}

  BR_INLINE void add(V x, V y, V scale, V minus_pivot, V limit) {
    l1 += abs_of(x) + abs_of(y);
    lo = min_of(lo, min_of(x, y));
    hi = max_of(hi, max_of(x, y));
    active = count_greater(active, x, limit);
    active = count_greater(active, y, limit);
    const V dx = x * scale + minus_pivot, dy = y * scale + minus_pivot, dx2 = dx * dx, dy2 = dy * dy;
    d1 += dx + dy;
    m2 += dx2 + dy2;
    m3x += dx2 * dx;
    m3y += dy2 * dy;
    m4x += dx2 * dx2;
    m4y += dy2 * dy2;
  }

  BR_INLINE void add(V x, V scale, V minus_pivot, V limit) {
    l1 += abs_of(x);
    lo = min_of(lo, x);
    hi = max_of(hi, x);
    active = count_greater(active, x, limit);
    const V d = x * scale + minus_pivot, d2 = d * d;
    d1 += d;
    m2 += d2;
    m3x += d2 * d;
    m4x += d2 * d2;
  }

  BR_INLINE void put_aside(Sums<Real>& s) {
    s.l1 += l1;
    s.d1 += d1;
    s.m2 += m2;
    s.m3 += m3x + m3y;
    s.m4 += m4x + m4y;
    l1 = d1 = m2 = m3x = m3y = m4x = m4y = V{};
  }

  BR_INLINE void put_extremes(Sums<Real>& s) const {
    s.lo = lo;
    s.hi = hi;
    s.active = active;
  }
};

template <class T>
BR_INLINE void accumulate(const T* p, int64_t pairs, Frame<RealOf<T>> frame, RealOf<T> threshold,
                          Sums<RealOf<T>>& sums) {
  typedef RealOf<T> Real;
  typedef VecOf<Real> V;
  const V scale = splat(frame.scale.s), minus_pivot = splat(-frame.pivot), limit = splat(threshold);
  Registers<Real> registers(sums);
  while (pairs > 0) {
    int64_t m = pairs < kBlockPairs ? pairs : kBlockPairs;
    pairs -= m;
    for (; m > 0; --m, p += 2 * Simd<Real>::kLanes) {
      V x, y;
      load_pair(p, x, y);
      BR_PREFETCH(reinterpret_cast<const char*>(p) + kPrefetchBytes);
      registers.add(x, y, scale, minus_pivot, limit);
    }
    registers.put_aside(sums);
  }
  registers.put_extremes(sums);
}

// The same for the last elements of a run of at least one pair: the pair that ends with the run, masked to what the
// full pairs left over. One pass, no reading past the end.
template <class T>
BR_INLINE void accumulate_tail(const T* p, int n, Frame<RealOf<T>> frame, RealOf<T> threshold, Sums<RealOf<T>>& sums) {
  typedef RealOf<T> Real;
  typedef VecOf<Real> V;
  typedef IntVecOf<Real> I;
  constexpr int kPair = 2 * Simd<Real>::kLanes;
  V v[2];
  I position[2];
  load_pair(p + n - kPair, v[0], v[1]);
  pair_position<T>(position[0], position[1]);
  const I first = I{} + static_cast<typename Simd<Real>::Int>(kPair - n % kPair);
  const V filler = splat(to_real(p[0]));
  for (int k = 0; k < 2; ++k) {
    const I mask = bit_cast<I>(position[k] >= first);
    const V x = select(mask, v[k], filler);
    sums.l1 += keep(mask, abs_of(x));
    sums.lo = min_of(sums.lo, x);
    sums.hi = max_of(sums.hi, x);
    sums.active -= mask & bit_cast<I>(x > splat(threshold));
    const V d = keep(mask, x * splat(frame.scale.s) - splat(frame.pivot)), d2 = d * d;
    sums.d1 += d;
    sums.m2 += d2;
    sums.m3 += d2 * d;
    sums.m4 += d2 * d2;
  }
}

// Mean and magnitude of a few pairs spread over the chunk: the frame of a chunk that nothing came before.
template <class T>
BR_INLINE Frame<RealOf<T>> sample_frame(const T* p, int64_t pairs) {
  typedef RealOf<T> Real;
  typedef VecOf<Real> V;
  constexpr int kPair = 2 * Simd<Real>::kLanes;
  const int64_t m = pairs < kSamplePairs ? 1 : kSamplePairs, step = pairs / m * kPair;
  V sum{}, magnitude{};
  for (int64_t k = 0; k < m; ++k) {
    V x, y;
    load_pair(p + k * step, x, y);
    sum += x + y;
    magnitude = max_of(magnitude, max_of(abs_of(x), abs_of(y)));
  }
  const double share = m == 1 ? 1.0 / kPair : 1.0 / (kSamplePairs * kPair);
  return frame_at<Real>(sum_lanes(sum) * share, static_cast<double>(max_lane(magnitude)));
}

// The horizontal sums of a chunk.
struct Totals {
  double l1, d1, m2, m3, m4, lo, hi, active;
};

template <class Real>
BR_INLINE Totals totals_of(const Sums<Real>& s) {
  double first[4];
  sum_lanes(s.l1, s.d1, s.m2, s.m3, first);
  return {first[0],        first[1],       first[2],       first[3],
          sum_lanes(s.m4), min_lane(s.lo), max_lane(s.hi), static_cast<double>(sum_lanes(s.active))};
}

// A chunk as a state; moments are moved from the pivot to the mean.
template <class Real>
BR_INLINE State state_of(double n, const Totals& t, Frame<Real> frame) {
  const double e = t.d1 / n, ne2 = t.d1 * e, u = frame.scale.inverse, u2 = u * u;
  const double c3 = t.m3 - e * (3 * t.m2 - 2 * ne2), c4 = t.m4 - e * (4 * t.m3 - e * (6 * t.m2 - 3 * ne2));
  return {n,
          (static_cast<double>(frame.pivot) + e) * u,
          (t.m2 - ne2) * u2,
          c3 * u2 * u,
          c4 * u2 * u2,
          t.l1,
          t.lo,
          t.hi,
          t.active,
          0};
}

// Least mean square, in scaled units, whose fourth powers do not underflow.
BR_INLINE constexpr double least_square(float) { return 1e-16; }
BR_INLINE constexpr double least_square(double) { return 1e-70; }
BR_INLINE constexpr double largest(float) { return FLT_MAX; }
BR_INLINE constexpr double largest(double) { return DBL_MAX; }

template <class T>
inline State chunk_state(const T* p, int n, double threshold, RealOf<T> limit, const State& before) {
  typedef RealOf<T> Real;
  constexpr int kPair = 2 * Simd<Real>::kLanes;
  const auto value = [p](int64_t i) { return static_cast<double>(to_real(p[i])); };
  if (n < kPair) return exact_state(n, threshold, value);
  const int64_t pairs = n / kPair;
  const bool outweighs = before.n < n || before.nonfinite > 0;
  Frame<Real> frame = outweighs ? sample_frame(p, pairs) : frame_at<Real>(before.mean, before.hi - before.lo);
  for (int attempt = 0; attempt < 4; ++attempt) {
    Sums<Real> sums = zero_sums<Real>();
    accumulate(p, pairs, frame, limit, sums);
    if (n % kPair != 0) accumulate_tail(p, n, frame, limit, sums);
    const Totals t = totals_of(sums);
    if (!(t.l1 <= largest(Real()))) break;
    if (t.lo == t.hi) return {static_cast<double>(n), t.lo, 0, 0, 0, t.l1, t.lo, t.hi, t.active, 0};
    const bool in_range = t.m4 <= largest(Real()) && t.m2 >= n * least_square(Real());
    if (in_range && (!outweighs || 5 * t.d1 * t.d1 <= n * t.m2)) return state_of(static_cast<double>(n), t, frame);
    const double found = (static_cast<double>(frame.pivot) + t.d1 / n) * frame.scale.inverse;
    frame = frame_at<Real>(found >= t.lo && found <= t.hi ? found : 0.5 * t.lo + 0.5 * t.hi, t.hi - t.lo);
  }
  return exact_state(n, threshold, value);
}

template <class T>
BR_INLINE void add_chunk(const T* p, int64_t n, const MomentsTask& task, State& s) {
  const State chunk = chunk_state(p, static_cast<int>(n), task.threshold, threshold_of<RealOf<T>>(task), s);
  if (s.n == 0) {
    s = chunk;
  } else {
    merge(s, chunk);
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
