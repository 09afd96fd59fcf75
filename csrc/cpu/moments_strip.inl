// The float32 sums of a panel of rows, column by column: one vector of columns (strip) in registers at a time.
#pragma once

#include "moments_row.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int kRows = 8;        // rows that cross the block together
constexpr int kFlushRows = 64;  // rows whose sums are kept apart

// Which columns a strip holds. Strips lie side by side; where a load of two vectors splits into even and odd elements
// (Interleaved), two neighbours share their columns that way. The last ones end with the block, so they may repeat
// columns of their neighbours.
template <class T>
struct Strips {
  static constexpr int kLanes = Simd<RealOf<T>>::kLanes;
  static constexpr int kTogether = Interleaved<T>::value ? 2 : 1;
  static constexpr int kWidth = kTogether * kLanes;  // least number of columns
  BR_INLINE static int count(int64_t n_cols) { return static_cast<int>((n_cols + kWidth - 1) / kWidth) * kTogether; }
  BR_INLINE static int64_t first_column(int64_t strip, int64_t n_cols) {
    const int64_t j = strip / kTogether * kWidth;
    return j + kWidth <= n_cols ? j : n_cols - kWidth;
  }
  BR_INLINE static int64_t column(int64_t strip, int lane, int64_t n_cols) {
    return first_column(strip, n_cols) + lane * kTogether + strip % kTogether;
  }
};

template <class Real>
struct Strip {
  Sums<Real> sums;
  VecOf<Real> minus_pivot, scale;  // d = x * scale + minus_pivot
};

// Biased exponents as integers: scale = 2^-floor(log2 spread), within the normal numbers.
template <class Real>
struct Exponent;
template <>
struct Exponent<float> {
  static constexpr int kBits = 23;
  static constexpr int32_t kTop = 254;
};
template <>
struct Exponent<double> {
  static constexpr int kBits = 52;
  static constexpr int64_t kTop = 2046;
};

template <class Real>
BR_INLINE void set_frame(VecOf<Real> mean, VecOf<Real> spread, Strip<Real>& strip) {
  typedef IntVecOf<Real> I;
  typedef VecOf<Real> V;
  typedef Exponent<Real> E;
  spread = select(bit_cast<I>(spread > V{}), spread, abs_of(mean));
  I e = bit_cast<I>(spread) >> E::kBits;
  const I low = I{} + 1, high = I{} + (E::kTop - 1);
  e = select(bit_cast<I>(e < low), low, e);
  e = select(bit_cast<I>(e > high), high, e);
  strip.scale = bit_cast<V>((E::kTop - e) << E::kBits);
  const V pivot = mean * strip.scale;
  strip.minus_pivot = -keep(bit_cast<I>(pivot - pivot == V{}), pivot);
}

// kOdd: the second of two strips that share their columns.
template <class T, bool kOdd>
BR_INLINE void sample_rows(const T* const* rows, int n, int64_t j, Strip<RealOf<T>>& strip) {
  typedef RealOf<T> Real;
  VecOf<Real> sum{}, lo = splat(static_cast<Real>(__builtin_inf())), hi = -lo;
  for (int k = 0; k < n; ++k) {
    const VecOf<Real> x = load_strip<kOdd>(rows[k] + j);
    sum += x;
    lo = min_of(lo, x);
    hi = max_of(hi, x);
  }
  set_frame<Real>(sum * splat(Real(1) / static_cast<Real>(n)), hi - lo, strip);
}

// Adds n <= kRows rows; the caller passes kRows as a constant where it can, so that the loop unrolls.
template <class T, bool kOdd>
BR_INLINE void add_rows(const T* const* rows, int n, int64_t j, VecOf<RealOf<T>> limit, Strip<RealOf<T>>& strip) {
  Registers<RealOf<T>> registers(strip.sums);
  int k = 0;
#pragma GCC unroll 4
  for (; k + 2 <= n; k += 2) {
    registers.add(load_strip<kOdd>(rows[k] + j), load_strip<kOdd>(rows[k + 1] + j), strip.scale, strip.minus_pivot,
                  limit);
  }
  if (k < n) registers.add(load_strip<kOdd>(rows[k] + j), strip.scale, strip.minus_pivot, limit);
  registers.put_aside(strip.sums);
  registers.put_extremes(strip.sums);
}

// Puts the float32 sums of a strip aside: no sum has more than kFlushRows / kRows terms before it is added to the next.
template <class Real>
BR_INLINE void flush(Sums<Real>& s, Sums<Real>& total) {
  total.l1 += s.l1;
  total.d1 += s.d1;
  total.m2 += s.m2;
  total.m3 += s.m3;
  total.m4 += s.m4;
  s.l1 = s.d1 = s.m2 = s.m3 = s.m4 = VecOf<Real>{};
}

template <class Real>
BR_INLINE void clear(Sums<Real>& s) {
  s.l1 = s.d1 = s.m2 = s.m3 = s.m4 = VecOf<Real>{};
  s.lo = splat(static_cast<Real>(__builtin_inf()));
  s.hi = -s.lo;
  s.active = IntVecOf<Real>{};
}

// kRows rows cross all strips. With the last strip of a cache line go requests for that line of the next kRows rows;
// not earlier, since they may compete for the same set with the lines in use.
template <class T, bool kPrefetch>
BR_INLINE void sweep(const T* const* rows, int64_t n_cols, VecOf<RealOf<T>> limit, Strip<RealOf<T>>* strips) {
  constexpr int kWidth = Strips<T>::kWidth, kTogether = Strips<T>::kTogether;
  constexpr int kBytes = kWidth * static_cast<int>(sizeof(T)), kPerLine = kBytes < 64 ? 64 / kBytes : 1;
  const auto add = [&](int64_t j) __attribute__((always_inline)) {
    add_rows<T, false>(rows, kRows, j, limit, strips[0]);
    if (kTogether == 2) add_rows<T, true>(rows, kRows, j, limit, strips[1]);
    strips += kTogether;
  };
  int64_t j = 0;
  while (j + kPerLine * kWidth <= n_cols) {
    for (int k = 0; k < kPerLine; ++k, j += kWidth) add(j);
    if (kPrefetch) {
      for (int k = 0; k < kRows; ++k) BR_PREFETCH(rows[kRows + k] + j - kWidth);
    }
  }
  for (; j + kWidth <= n_cols; j += kWidth) add(j);
  if (j < n_cols) add(n_cols - kWidth);
}

template <class T>
BR_INLINE void sweep_rest(const T* const* rows, int n, int64_t n_cols, VecOf<RealOf<T>> limit,
                          Strip<RealOf<T>>* strips) {
  const int n_strips = Strips<T>::count(n_cols);
  for (int s = 0; s < n_strips; ++s) {
    const int64_t j = Strips<T>::first_column(s, n_cols);
    if (s % Strips<T>::kTogether == 1) {
      add_rows<T, true>(rows, n, j, limit, strips[s]);
    } else {
      add_rows<T, false>(rows, n, j, limit, strips[s]);
    }
  }
}

// All rows of a panel; totals are used where there are more than kFlushRows.
template <class T>
inline void sum_panel(const T* const* rows, int n_rows, int ahead, int64_t n_cols, RealOf<T> threshold,
                      Strip<RealOf<T>>* strips, Sums<RealOf<T>>* totals) {
  const VecOf<RealOf<T>> limit = splat(threshold);
  const int n_strips = n_rows > kFlushRows ? Strips<T>::count(n_cols) : 0;
  for (int s = 0; s < n_strips; ++s) clear(totals[s]);
  int r = 0;
  for (; r + kRows <= n_rows; r += kRows) {
    if (r + 2 * kRows <= n_rows + ahead) {
      sweep<T, true>(rows + r, n_cols, limit, strips);
    } else {
      sweep<T, false>(rows + r, n_cols, limit, strips);
    }
    if ((r + kRows) % kFlushRows == 0) {
      for (int s = 0; s < n_strips; ++s) flush(strips[s].sums, totals[s]);
    }
  }
  if (r < n_rows) sweep_rest(rows + r, n_rows - r, n_cols, limit, strips);
  for (int s = 0; s < n_strips; ++s) flush(totals[s], strips[s].sums);
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
